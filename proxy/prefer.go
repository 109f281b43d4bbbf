package proxy

import "bytes"

// prefersJSON reports whether the Accept fields of a request, RFC 9110 section 12.5.1, rank JSON (application/json or any
// application/...+json) above text/plain, or as high without naming text at all. Without them, or with one that cannot be
// read, nothing is preferred.
func (r *Request) prefersJSON() bool {
	json, text, any := -1, -1, -1 // the weights in thousandths; -1: not named
	for rest := r.lines; len(rest) > 0; {
		f, n, err := readField(rest)
		if err != nil {
			return false
		}
		rest = rest[n:]
		if !is(f.name, "accept") {
			continue
		}
		for member := range list(f.value) {
			name, weight, ok := mediaRange(member)
			switch {
			case !ok:
				return false
			case is(name, "application/json"), len(name) > 17 && is(name[:12], "application/") && is(name[len(name)-5:], "+json"):
				json = max(json, weight)
			case is(name, "text/plain"), is(name, "text/*"):
				text = max(text, weight)
			case string(name) == "*/*":
				any = max(any, weight)
			}
		}
	}
	if text >= 0 {
		return json > text
	}
	return json > 0 && json >= any
}

// mediaRange reads one member of an Accept field: its range, and its weight in thousandths.
func mediaRange(b []byte) (name []byte, weight int, ok bool) {
	name, rest, more := bytes.Cut(b, []byte{';'})
	name = trim(name)
	top, sub, ok := bytes.Cut(name, []byte{'/'})
	if !ok || !all(top, isToken) || !all(sub, isToken) {
		return nil, 0, false
	}
	weight = 1000
	for more {
		var parameter []byte
		parameter, rest, more = bytes.Cut(rest, []byte{';'})
		key, value, found := bytes.Cut(trim(parameter), []byte{'='})
		if !found || !all(key, isToken) {
			return nil, 0, false
		}
		if is(key, "q") {
			if weight, ok = parseWeight(value); !ok {
				return nil, 0, false
			}
		}
	}
	return name, weight, true
}

// parseWeight reads a weight, RFC 9110 section 12.4.2, in thousandths: 0, 0.25 or 1.000.
func parseWeight(b []byte) (int, bool) {
	if len(b) == 0 || len(b) > 5 || b[0] != '0' && b[0] != '1' || len(b) > 1 && b[1] != '.' {
		return 0, false
	}
	weight := int(b[0]-'0') * 1000
	for i, scale := 2, 100; i < len(b); i, scale = i+1, scale/10 {
		if b[i] < '0' || b[i] > '9' {
			return 0, false
		}
		weight += int(b[i]-'0') * scale
	}
	return weight, weight <= 1000
}
