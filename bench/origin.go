package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// mirrorQuery asks the origin for the request's head, as it saw it, instead of its usual answer. acceptedHeader of that
// answer tells how many connections the origin took so far.
const (
	mirrorQuery    = "?mirror"
	acceptedHeader = "Origin-Accepted"
)

// maxHead is the size of a request's head that the origin takes.
const maxHead = 64 << 10

// response returns the bytes of an answer as a backend would give it. fields are whole header lines.
func response(body []byte, fields string) []byte {
	return append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n%s\r\n",
		time.Now().UTC().Format(http.TimeFormat), len(body), fields), body...)
}

// requests finds where requests end in the bytes of one connection, in whatever pieces they come.
type requests struct {
	head []byte // of a request that is not complete yet
	body int    // bytes of the current request's body that are still to come; its head waits in head until then
}

var (
	errHeadTooLarge = errors.New("head too large")
	errNoLength     = errors.New("a body needs one valid Content-Length")
)

// feed takes the next bytes and calls answer with the head of each request that is complete with them. answer must not
// keep the head.
func (r *requests) feed(b []byte, answer func(head []byte)) error {
	for len(b) > 0 {
		if r.body > 0 {
			n := min(r.body, len(b))
			r.body -= n
			b = b[n:]
			if r.body == 0 {
				answer(r.head)
				r.head = r.head[:0]
			}
			continue
		}
		head, kept := b, len(r.head)
		if kept > 0 {
			r.head = append(r.head, b...)
			head = r.head
		}
		from := max(0, kept-3) // the end of the head may have come in two pieces
		end := bytes.Index(head[from:], []byte("\r\n\r\n"))
		if end < 0 {
			if kept == 0 {
				r.head = append(r.head, b...)
			}
			if len(r.head) > maxHead {
				return errHeadTooLarge
			}
			return nil
		}
		head = head[:from+end+4]
		b = b[len(head)-kept:]
		length, err := contentLength(head)
		if err != nil {
			return err
		}
		if len(r.head) == 0 && length <= len(b) {
			b = b[length:] // all of it is here: nothing to keep
			answer(head)
			continue
		}
		if length > 0 {
			r.head, r.body = append(r.head[:0], head...), length
			continue
		}
		answer(head)
		r.head = r.head[:0]
	}
	return nil
}

// contentLength returns the length that a head announces for its body, 0 if none.
func contentLength(head []byte) (int, error) {
	length, found := 0, false
	for {
		end := bytes.IndexByte(head, '\n')
		if end < 0 {
			return length, nil
		}
		line := head[:end]
		head = head[end+1:]
		if len(line) == 0 || line[0]|0x20 != 'c' && line[0]|0x20 != 't' {
			continue // most lines, at little cost: a browser sends many
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 31)
			if err != nil || found {
				return 0, errNoLength
			}
			length, found = int(n), true
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			return 0, errNoLength
		}
	}
}

// isMirror tells whether the head's target ends with mirrorQuery.
func isMirror(head []byte) bool {
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	return bytes.HasSuffix(line, []byte(mirrorQuery+" HTTP/1.1"))
}
