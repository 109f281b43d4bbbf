package proxy

import (
	"bytes"
	"unsafe"
)

// A RouteFunc names the service that a request goes to; "" answers 404. It runs for every request, at the same time on
// many goroutines, and must not wait: it is called on an event loop, whose other requests would wait with it. It may keep
// nothing of the Request. The string may point into the request's bytes. Where the path could be read in two ways it is
// called for both, and a request on which it disagrees with itself is refused.
type RouteFunc func(r *Request) string

// FirstSegment is the rule of a gateway that nobody configured: /users/1 goes to the service "users".
func FirstSegment(r *Request) string {
	if len(r.Path) < 2 || r.Path[0] != '/' {
		return ""
	}
	segment := r.Path[1:]
	if end := bytes.IndexByte(segment, '/'); end >= 0 {
		segment = segment[:end]
	}
	return text(segment)
}

// text is bytes as a string, for as long as they do not change.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// choose routes a request: to the route that matches, or to a service; "" is nowhere.
func (n *settings) choose(r *Request) (*route, string) {
	if n.byFunc != nil {
		return nil, n.byFunc(r)
	}
	if m := n.table.match(r); m != nil {
		return m, m.service
	}
	if n.table.first {
		return nil, FirstSegment(r)
	}
	return nil, ""
}

// PathPolicy says what becomes of a path that a backend may read in another way than routing did. P is the path with
// encoded letters, dots, slashes and backslashes decoded, "\" read as "/", ";..." cut from each segment and dot segments
// resolved. A path is ambiguous if P leads to another service, or one of the two to the gateway itself, or if P climbs above
// "/"; so is one with a raw backslash or %00. Any other path goes on as it came, to the byte. The query is never looked at.
type PathPolicy string

const (
	RefusePaths    PathPolicy = "refuse"    // 400
	PassPaths      PathPolicy = "pass"      // it is routed and sent as it came
	NormalizePaths PathPolicy = "normalize" // P is routed and sent, but for P above "/", one that names the gateway itself, and %00
)

// settle decides on an unclear path that leads to a route and the service name as it came. It returns those that it leads to, and
// where that is for P, the request's path is P from then on.
func (p *Proxy) settle(n *settings, r *Request, way *route, name string) (*route, string, *refusal) {
	if n.AmbiguousPaths == PassPaths {
		return way, name, nil
	}
	raw := r.Path
	reading, err := p.reading(n, r)
	if err != nil {
		return nil, "", err
	}
	r.Path = reading
	otherWay, other := n.choose(r)
	switch {
	case otherWay == way && other == name && bytes.IndexByte(raw, '\\') < 0:
		r.Path = raw
		return way, name, nil
	case n.AmbiguousPaths == RefusePaths:
		r.Path = raw
		return nil, "", errPath
	}
	if again, ok := canonical(nil, reading); !ok || !bytes.Equal(again, reading) { // "%%32e" has become "%2e"
		r.Path = raw
		return nil, "", errPath
	}
	r.target = append(bytes.Clone(reading), r.target[len(raw):]...)
	return otherWay, other, nil
}

// reading returns P of an unclear path, unless that is nothing to route by.
func (p *Proxy) reading(n *settings, r *Request) ([]byte, *refusal) {
	if bytes.Contains(r.Path, encodedNUL) || n.AmbiguousPaths == RefusePaths && bytes.IndexByte(r.Path, '\\') >= 0 {
		return nil, errPathBytes
	}
	reading, ok := canonical(r.reading, r.Path)
	if cap(reading) <= firstBuffer {
		r.reading = reading[:0]
	}
	if !ok || p.owns(reading) != p.owns(r.Path) {
		return nil, errPath
	}
	return reading, nil
}

var encodedNUL = []byte("%00")

// canonical returns the path as a backend may read it: dots, slashes, backslashes and unreserved letters decoded, "\"
// taken for "/", parameters (";...") cut from each segment, dot segments resolved (RFC 3986 section 5.2.4). ok is false
// if the path climbs above "/". It appends to dst.
func canonical(dst, path []byte) (out []byte, ok bool) {
	segment := len(dst) // where the current segment begins, its "/" included
	first := segment
	params := false
	flush := func() bool {
		switch string(dst[segment:]) {
		case "/.":
			dst = dst[:segment]
		case "/..":
			if segment == first {
				return false
			}
			dst = dst[:max(first, first+bytes.LastIndexByte(dst[first:segment], '/'))]
		}
		return true
	}
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) {
			if d, isHex := unhex(path[i+1], path[i+2]); isHex && (d == '.' || d == '/' || d == '\\' || unreserved(d)) {
				c = d
				i += 2
			}
		}
		switch c {
		case '\\', '/':
			if len(dst) > first && !flush() {
				return dst, false
			}
			segment, params = len(dst), false
			dst = append(dst, '/')
		case ';':
			params = true
		default:
			if !params {
				dst = append(dst, c)
			}
		}
	}
	last := dst[min(segment, len(dst)):]
	dots := string(last) == "/." || string(last) == "/.."
	if !flush() {
		return dst, false
	}
	if dots || len(dst) == first {
		dst = append(dst, '/')
	}
	return dst, true
}

func unhex(hi, lo byte) (byte, bool) {
	h, okH := hexDigit(hi)
	l, okL := hexDigit(lo)
	return h<<4 | l, okH && okL
}

// unreserved: RFC 3986 section 2.3.
func unreserved(c byte) bool {
	return c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}
