package proxy

import "bytes"

// response is the head of a backend's response.
type response struct {
	status int
	line   []byte // status code and reason phrase, with the space before and the CRLF behind
	lines  []byte // all field lines, each with its CRLF
	size   int    // of the head, with the empty line
	minor  byte
	framing
	drops     []span
	close     bool // the connection ends with this response
	hasDate   bool
	upgrade   bool   // Connection: upgrade
	protocol  []byte // the Upgrade field
	protocols int    // how many of them there are
}

// parse reads the response head that b begins with, from the status line to the empty line, as strictly as we read requests. The
// errors are errMalformed, for one that could be framed in two ways too, errResponseFields and errResponseHead; with an error
// there is no status.
func (r *response) parse(b []byte, limits *Limits) *refusal {
	err := r.read(b, limits)
	if err == nil && r.size > limits.Head {
		err = errResponseHead
	}
	if err != nil {
		r.status = 0 // there is no answer
	}
	return err
}

// read is parse, but for what is left of a head that it refuses.
func (r *response) read(b []byte, limits *Limits) *refusal {
	*r = response{drops: r.drops[:0], framing: framing{length: -1}}
	nl := bytes.IndexByte(b, '\n')
	if nl < 13 || b[nl-1] != '\r' || string(b[:7]) != "HTTP/1." || b[8] != ' ' {
		return errMalformed
	}
	if r.minor = b[7] - '0'; r.minor > 1 {
		return errMalformed
	}
	code, ok := parseLength(b[9:12])
	if !ok || code < 100 || code > 599 || b[12] != ' ' && b[12] != '\r' || !visible(b[12:nl-1]) {
		return errMalformed
	}
	r.status, r.line = int(code), b[8:nl+1]
	b, r.size = b[nl+1:], nl+1
	keepAlive := false
	var named [][]byte
	at := 0
	for fields := 0; !emptyLine(b[at:]); fields++ {
		if fields == limits.Fields {
			return errResponseFields
		}
		f, n, err := readField(b[at:])
		if err != nil {
			return errMalformed
		}
		drop := false
		switch identify(f.name) {
		case fieldContentLength:
			length, ok := parseLength(f.value)
			if !ok || r.length >= 0 || f.value[0] == '0' && len(f.value) > 1 {
				return errMalformed
			}
			drop = r.status == 204 || r.status < 200 // RFC 9110 section 8.6
			r.length = length
		case fieldTransferEncoding:
			if r.chunked || r.minor == 0 || !is(f.value, "chunked") {
				return errMalformed
			}
			r.chunked, drop = true, true
		case fieldConnection:
			drop = true
			for option := range list(f.value) {
				switch {
				case is(option, "close"):
					r.close = true
				case is(option, "keep-alive"):
					keepAlive = true
				case is(option, "upgrade"):
					r.upgrade = true
				default:
					named = append(named, option)
				}
			}
		case fieldUpgrade:
			drop, r.protocol = true, f.value
			r.protocols++
		case fieldHopByHop:
			drop = true
		case fieldDate:
			r.hasDate = true
		}
		if drop {
			r.drops = appendSpan(r.drops, at, at+n)
		}
		at += n
	}
	r.lines = b[:at]
	r.size += at + len("\r\n")
	if r.chunked && r.length >= 0 || r.length > 0 && r.empty() || r.chunked && r.empty() && r.status != 205 {
		return errMalformed
	}
	r.close = r.close || r.minor == 0 && !keepAlive
	if len(named) > maxNominated {
		return errMalformed
	}
	if len(named) > 0 {
		r.drops = dropNominated(r.lines, r.drops, named)
	}
	return nil
}

// append appends the head as the client gets it, up to where our own fields go.
func (r *response) append(dst []byte, e *edits) []byte {
	dst = append(dst, "HTTP/1.1"...)
	if r.line[4] == '\r' { // no reason phrase, and no space before it: RFC 9112 section 4 wants the space
		dst = append(dst, r.line[:4]...)
		dst = append(dst, ' ', '\r', '\n')
	} else {
		dst = append(dst, r.line...)
	}
	return appendEdited(dst, r.lines, r.drops, e)
}

// empty says whether a status has no content by its definition, RFC 9110 section 15. A length beside it is a contradiction
// that peers resolve in different ways. 205 may have chunks or end with the connection, RFC 9112 section 6.3.
func (r *response) empty() bool { return r.status < 200 || r.status == 204 || r.status == 205 }

// bodyless says whether a response to this method has no body whatever its fields say, RFC 9112 section 6.3.
func (r *response) bodyless(head bool) bool {
	return head || r.status == 204 || r.status == 304 || r.status < 200
}

// appendLines appends lines without drops.
func appendLines(dst, lines []byte, drops []span) []byte {
	at := 0
	for _, d := range drops {
		dst = append(dst, lines[at:d.from]...)
		at = d.to
	}
	return append(dst, lines[at:]...)
}

// appendSpan appends a span behind the others; spans that touch become one.
func appendSpan(spans []span, from, to int) []span {
	if n := len(spans); n > 0 && spans[n-1].to == from {
		spans[n-1].to = to
		return spans
	}
	return append(spans, span{from, to})
}
