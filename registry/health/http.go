package health

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

const (
	maxHead    = 16 << 10 // of a response, with the interim ones before it
	maxBody    = 64 << 10 // that is read for a connection to be kept
	minStatus  = len("HTTP/1.1 200\r\n")
	statusLine = "HTTP/1."
)

// request is what is sent. The path is below the base path of the instance, as that of every request is.
func request(in *Instance) []byte {
	var b strings.Builder
	b.WriteString("GET " + in.Target.BasePath + in.Check.Path + " HTTP/1.1\r\nHost: " + in.Target.Authority +
		"\r\nUser-Agent: kerberos-check\r\nAccept: */*\r\n")
	if !in.Check.KeepAlive {
		b.WriteString("Connection: close\r\n")
	}
	b.WriteString("\r\n")
	return []byte(b.String())
}

// response is what is read of one.
type response struct {
	status int // 0: not known yet
	body   int // bytes of it to come; -1: the connection cannot be used again
}

var (
	errMalformed = errors.New("the answer is not HTTP/1.1")
	errHead      = fmt.Errorf("the head of the answer is larger than %d KiB", maxHead>>10)
	errEmpty     = errors.New("the connection was closed without an answer")
	errHalf      = errors.New("the connection was closed within the head of the answer")
	errConnect   = errors.New("no connection in time")
	errSilent    = errors.New("no answer in time")
)

// parse reads a response from its beginning, as far as it has come. Its status is 0 while the head has not come whole. What is
// in b behind the head counts as body.
func parse(b []byte) (response, error) {
	for read := 0; ; {
		rest := b[read:]
		if n := min(len(rest), len(statusLine)); string(rest[:n]) != statusLine[:n] {
			return response{}, errMalformed
		}
		end := bytes.Index(rest, []byte("\r\n\r\n"))
		if end < 0 {
			if len(b) >= maxHead {
				return response{}, errHead
			}
			if line := bytes.IndexByte(rest, '\n'); line >= 0 {
				if _, err := parseStatus(rest[:line+1]); err != nil {
					return response{}, err
				}
			}
			return response{}, nil
		}
		if read+end+4 > maxHead {
			return response{}, errHead
		}
		head := rest[:end+2]
		status, err := parseStatus(head[:bytes.IndexByte(head, '\n')+1])
		if err != nil {
			return response{}, err
		}
		read += end + 4
		if status < 200 && status != 101 { // an interim one, as 103
			continue
		}
		return response{status, bodyOf(head, status) - (len(b) - read)}, nil
	}
}

// parseStatus reads a status line with its line end.
func parseStatus(line []byte) (int, error) {
	if len(line) < minStatus || line[len(line)-2] != '\r' || line[7] != '0' && line[7] != '1' || line[8] != ' ' || line[12] != ' ' && line[12] != '\r' {
		return 0, errMalformed
	}
	status := 0
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return 0, errMalformed
		}
		status = 10*status + int(c-'0')
	}
	if status < 100 || status > 599 {
		return 0, errMalformed
	}
	return status, nil
}

// unusable is far below any length less what has come.
const unusable = -1 << 40

// bodyOf is how long the body is of a response after which the connection can be used again; any other is unusable. A body in
// chunks is not worth reading for that.
func bodyOf(head []byte, status int) int {
	length := -1
	if status == 204 || status == 304 {
		length = 0
	}
	if head[7] == '0' || status == 101 { // HTTP/1.0
		return unusable
	}
	for line := range bytes.SplitSeq(head[bytes.IndexByte(head, '\n')+1:], []byte("\r\n")) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch {
		case is(name, "Connection") && !is(bytes.TrimSpace(value), "keep-alive"), is(name, "Transfer-Encoding"):
			return unusable
		case is(name, "Content-Length") && length != 0:
			n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 31)
			if err != nil || n > maxBody || length > 0 {
				return unusable
			}
			length = int(n)
		}
	}
	if length < 0 {
		return unusable
	}
	return length
}

func is(text []byte, word string) bool { return bytes.EqualFold(text, []byte(word)) }

// verdict says whether a status passes.
func (w *Watch) verdict(status int) error {
	if w.Check.Accepts(status) {
		return nil
	}
	return fmt.Errorf("got status %d", status)
}
