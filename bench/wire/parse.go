package wire

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// errShort is a message that is not there as a whole yet.
var errShort = errors.New("not all of it is there")

// Field is a field line.
type Field struct{ Name, Value string }

// message is what requests and responses have in common. It is read as RFC 9112 wants it, without any of the leniency
// that it allows: whatever two parsers may read in two ways is an error here.
type message struct {
	start    string // first line
	fields   []Field
	length   int64 // Content-Length; -1: none
	chunked  bool
	body     []byte
	trailers []Field
	complete bool // its end was seen
}

// request is a request as the origin got it.
type request struct {
	message
	method, target string
	minor          byte
	err            error // what is wrong with its form
	settled        bool  // nothing more comes of it
}

// response is a response as the client got it.
type response struct {
	message
	status  int
	minor   byte
	interim []int // the 1xx before it, without 101
	size    int   // bytes, interim responses included
}

// values returns the values of all fields of that name.
func (m *message) values(name string) (values []string) {
	for _, f := range m.fields {
		if strings.EqualFold(f.Name, name) {
			values = append(values, f.Value)
		}
	}
	return values
}

// value returns the first of them, or "".
func (m *message) value(name string) string {
	if v := m.values(name); len(v) > 0 {
		return v[0]
	}
	return ""
}

// headEnd returns where the head that b starts with ends, an empty line included, or -1. Bare LFs count here, so that a
// head which has them is found, and then refused by parseHead.
func headEnd(b []byte) int {
	end := -1
	for _, blank := range []string{"\n\r\n", "\n\n"} {
		if i := bytes.Index(b, []byte(blank)); i >= 0 && (end < 0 || i+len(blank) < end) {
			end = i + len(blank)
		}
	}
	return end
}

// parseHead reads a head up to its empty line.
func parseHead(b []byte) (m message, err error) {
	m.length = -1
	lines := strings.Split(string(b), "\r\n")
	for _, line := range lines {
		if strings.ContainsAny(line, "\r\n") {
			return m, errors.New("bare CR or LF in the head")
		}
	}
	m.start = lines[0]
	if m.fields, err = parseFields(lines[1 : len(lines)-2]); err != nil {
		return m, err
	}
	if lengths := m.values("Content-Length"); len(lengths) > 1 {
		return m, errors.New("two Content-Length fields")
	} else if len(lengths) == 1 {
		if m.length, err = strconv.ParseInt(lengths[0], 10, 64); err != nil || strings.Trim(lengths[0], "0123456789") != "" {
			return m, fmt.Errorf("Content-Length %q", lengths[0])
		}
	}
	if codings := m.values("Transfer-Encoding"); len(codings) > 1 {
		return m, errors.New("two Transfer-Encoding fields")
	} else if len(codings) == 1 {
		if !strings.EqualFold(codings[0], "chunked") {
			return m, fmt.Errorf("Transfer-Encoding %q", codings[0])
		}
		m.chunked = true
	}
	if m.chunked && m.length >= 0 {
		return m, errors.New("both Content-Length and Transfer-Encoding")
	}
	return m, nil
}

func parseFields(lines []string) (fields []Field, err error) {
	for _, line := range lines {
		name, value, found := strings.Cut(line, ":")
		if !found || !isToken(name) {
			return nil, fmt.Errorf("field line %q", shorten(line))
		}
		if strings.ContainsAny(value, "\x00\r\n") {
			return nil, fmt.Errorf("field value %q", shorten(value))
		}
		fields = append(fields, Field{name, strings.Trim(value, " \t")})
	}
	return fields, nil
}

func isToken(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return s != ""
}

// parseRequest reads the head of a request.
func parseRequest(b []byte) (r *request, err error) {
	r = &request{}
	if r.message, r.err = parseHead(b); r.err != nil {
		return r, r.err
	}
	r.err = r.startLine()
	return r, r.err
}

func (r *request) startLine() error {
	words := strings.Split(r.start, " ")
	if len(words) != 3 {
		return fmt.Errorf("request line %q", shorten(r.start))
	}
	r.method, r.target = words[0], words[1]
	if words[2] != "HTTP/1.0" && words[2] != "HTTP/1.1" {
		return fmt.Errorf("version %q", words[2])
	}
	r.minor = words[2][7] - '0'
	if !isToken(r.method) {
		return fmt.Errorf("method %q", shorten(r.method))
	}
	for i := range len(r.target) {
		if c := r.target[i]; c <= ' ' || c == 0x7f || c == '#' {
			return fmt.Errorf("target %q", shorten(r.target))
		}
	}
	if r.target != "*" && !strings.HasPrefix(r.target, "/") {
		return fmt.Errorf("target %q", shorten(r.target))
	}
	hosts := r.values("Host")
	if r.minor == 1 && len(hosts) != 1 || len(hosts) > 1 {
		return fmt.Errorf("%d Host fields", len(hosts))
	}
	if len(hosts) == 1 && strings.ContainsAny(hosts[0], " \t,@/?#\\<>\"") {
		return fmt.Errorf("the Host %q", hosts[0])
	}
	if r.minor == 0 && r.chunked {
		return errors.New("a Transfer-Encoding in HTTP/1.0")
	}
	return nil
}

// readBody reads what follows the head of a request, and returns its length.
func (r *request) readBody(b []byte) (n int, err error) {
	if !r.chunked && r.length < 0 {
		r.complete = true
		return 0, nil
	}
	return r.message.readBody(b)
}

// readBody reads a body of known framing as far as it is there; errShort if that is not all. What it keeps may be a part of
// b, which nobody changes.
func (m *message) readBody(b []byte) (n int, err error) {
	if m.chunked {
		m.body, m.trailers, n, err = parseChunks(b)
	} else {
		n = int(min(m.length, int64(len(b))))
		m.body = b[:n:n]
		if int64(n) < m.length {
			err = errShort
		}
	}
	m.complete = err == nil
	return n, err
}

// parseChunks reads a chunked body, RFC 9112 section 7.1.
func parseChunks(b []byte) (body []byte, trailers []Field, n int, err error) {
	for {
		line, found := crlf(b[n:])
		if !found {
			if bytes.IndexByte(b[n:], '\n') >= 0 {
				return body, nil, n, errors.New("bare LF in a chunk's size line")
			}
			return body, nil, n, errShort
		}
		digits, extension, _ := strings.Cut(line, ";")
		digits = strings.TrimRight(digits, " \t") // white space before an extension is bad, but allowed
		if digits == "" || strings.Trim(digits, "0123456789abcdefABCDEF") != "" || strings.ContainsAny(extension, "\x00\r\n") {
			return body, nil, n, fmt.Errorf("chunk size line %q", shorten(line))
		}
		size, err := strconv.ParseInt(digits, 16, 63)
		if err != nil {
			return body, nil, n, fmt.Errorf("chunk size %q", shorten(digits))
		}
		n += len(line) + 2
		if size == 0 {
			break
		}
		rest := b[n:]
		if int64(len(rest)) < size+2 {
			part := rest[:min(size, int64(len(rest)))]
			if body == nil { // a large chunk is looked at often, until it is there
				return part[:len(part):len(part)], nil, n, errShort
			}
			return append(body, part...), nil, n, errShort
		}
		if string(rest[size:size+2]) != "\r\n" {
			return body, nil, n, errors.New("a chunk longer than its size")
		}
		body = append(body, rest[:size]...)
		n += int(size) + 2
	}
	var lines []string
	for {
		line, found := crlf(b[n:])
		if !found {
			return body, nil, n, errShort
		}
		n += len(line) + 2
		if line == "" {
			break
		}
		if strings.ContainsAny(line, "\r\n") {
			return body, nil, n, errors.New("bare CR or LF in the trailers")
		}
		lines = append(lines, line)
	}
	trailers, err = parseFields(lines)
	return body, trailers, n, err
}

// crlf returns what stands before the first CRLF.
func crlf(b []byte) (string, bool) {
	line, _, found := bytes.Cut(b, []byte("\r\n"))
	if !found || bytes.IndexByte(line, '\n') >= 0 {
		return "", false
	}
	return string(line), true
}

// parseResponse reads the response to a method that b starts with, the interim ones before it included. ended: nothing
// follows b. Of a response that is not there as a whole it returns what is, and errShort; nil, if that is no final head.
func parseResponse(b []byte, method string, ended bool) (*response, error) {
	r := &response{}
	for at := 0; ; {
		end := headEnd(b[at:])
		if end < 0 {
			return nil, errShort
		}
		var err error
		if r.message, err = parseHead(b[at : at+end]); err != nil {
			return nil, err
		}
		if err := r.statusLine(); err != nil {
			return nil, err
		}
		at += end
		if r.status < 200 && r.status != 101 {
			r.interim = append(r.interim, r.status)
			continue
		}
		r.size = at
		switch {
		case r.status < 200 || r.status == 204:
			if r.chunked || r.length >= 0 {
				return nil, fmt.Errorf("%d with Content-Length or Transfer-Encoding", r.status)
			}
			r.complete = true
		case r.status == 304 || method == "HEAD":
			r.complete = true
		case r.chunked || r.length >= 0:
			n, err := r.readBody(b[at:])
			r.size += n
			return r, err
		default:
			r.body, r.size, r.complete = b[at:len(b):len(b)], len(b), ended
			if !ended {
				return r, errShort
			}
		}
		return r, nil
	}
}

func (r *response) statusLine() error {
	s := r.start
	if len(s) < 13 || s[:7] != "HTTP/1." || s[7] != '0' && s[7] != '1' || s[8] != ' ' || s[12] != ' ' || strings.Trim(s[9:12], "0123456789") != "" {
		return fmt.Errorf("status line %q", shorten(s))
	}
	r.minor = s[7] - '0'
	r.status, _ = strconv.Atoi(s[9:12])
	if r.status < 100 || r.status > 599 {
		return fmt.Errorf("status %d", r.status)
	}
	if r.chunked && r.minor == 0 {
		return errors.New("a Transfer-Encoding in HTTP/1.0")
	}
	return nil
}

func shorten(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}
