package wire

import (
	"errors"
	"strings"
	"testing"
)

// A parser that lets something pass finds nothing wrong with any gateway.
func TestParseRequest(t *testing.T) {
	const host = "Host: a\r\n"
	rows := []struct{ name, head, err string }{
		{"plain", "GET /a HTTP/1.1\r\n" + host + "X-A: \xe4\t1\r\n\r\n", ""},
		{"HTTP/1.0 without Host", "GET /a HTTP/1.0\r\n\r\n", ""},
		{"chunked", "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", ""},
		{"asterisk", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n", ""},
		{"bare LFs", "GET /a HTTP/1.1\nHost: a\n\n", "bare"},
		{"one bare LF", "GET /a HTTP/1.1\r\nX-A: 1\n" + host + "\r\n", "bare"},
		{"bare LF at the end", "GET /a HTTP/1.1\r\n" + host + "\n", "bare"},
		{"bare CR", "GET /a HTTP/1.1\r\n" + host + "X-A: a\rb\r\n\r\n", "bare"},
		{"folded", "GET /a HTTP/1.1\r\n" + host + "X-A: 1\r\n b\r\n\r\n", "field line"},
		{"space before the colon", "GET /a HTTP/1.1\r\n" + host + "X-A : 1\r\n\r\n", "field line"},
		{"no colon", "GET /a HTTP/1.1\r\n" + host + "X\r\n\r\n", "field line"},
		{"no name", "GET /a HTTP/1.1\r\n" + host + ": 1\r\n\r\n", "field line"},
		{"NUL", "GET /a HTTP/1.1\r\n" + host + "X-A: \x00\r\n\r\n", "field value"},
		{"two lengths", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n", "two Content-Length"},
		{"sign", "POST /a HTTP/1.1\r\n" + host + "Content-Length: +1\r\n\r\n", "Content-Length"},
		{"list", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 1, 1\r\n\r\n", "Content-Length"},
		{"empty", "POST /a HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n", "Content-Length"},
		{"overflow", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 18446744073709551619\r\n\r\n", "Content-Length"},
		{"both", "POST /a HTTP/1.1\r\n" + host + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "and Transfer-Encoding"},
		{"two codings", "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "two Transfer-Encoding"},
		{"unknown coding", "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\n", "Transfer-Encoding"},
		{"coding in HTTP/1.0", "POST /a HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", "HTTP/1.0"},
		{"no Host", "GET /a HTTP/1.1\r\n\r\n", "0 Host"},
		{"two Hosts", "GET /a HTTP/1.1\r\n" + host + host + "\r\n", "2 Host"},
		{"userinfo", "GET /a HTTP/1.1\r\nHost: u@a\r\n\r\n", "Host"},
		{"fragment", "GET /a#b HTTP/1.1\r\n" + host + "\r\n", "target"},
		{"DEL", "GET /a\x7f HTTP/1.1\r\n" + host + "\r\n", "target"},
		{"absolute-form", "GET http://a/ HTTP/1.1\r\n" + host + "\r\n", "target"},
		{"two spaces", "GET  /a HTTP/1.1\r\n" + host + "\r\n", "request line"},
		{"version", "GET /a HTTP/1.2\r\n" + host + "\r\n", "version"},
		{"method", "G@T /a HTTP/1.1\r\n" + host + "\r\n", "method"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			if end := headEnd([]byte(row.head + "GET / HTTP/1.1\r\n\r\n")); end != len(row.head) {
				t.Errorf("the head of %d bytes ends at %d", len(row.head), end)
			}
			_, err := parseRequest([]byte(row.head))
			if (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
				t.Errorf("got %v, want %q", err, row.err)
			}
		})
	}
}

func TestParseChunks(t *testing.T) {
	rows := []struct{ name, sent, body, err string }{
		{"two", "2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\n\r\n", "hello", ""},
		{"trailer", "0\r\nX-A: 1\r\n\r\n", "", ""},
		{"no end", "5\r\nhello\r\n0\r\n", "hello", "not all"},
		{"half", "5\r\nhel", "hel", "not all"},
		{"LF behind the size", "5\nhello\r\n0\r\n\r\n", "", "bare"},
		{"LF behind the data", "5\r\nhello\n0\r\n\r\n", "", "longer"},
		{"longer", "5\r\nhello!\r\n0\r\n\r\n", "", "longer"},
		{"minus", "-5\r\nhello\r\n0\r\n\r\n", "", "size"},
		{"0x", "0x5\r\nhello\r\n0\r\n\r\n", "", "size"},
		{"space", " 5\r\nhello\r\n0\r\n\r\n", "", "size"},
		{"none", "\r\nhello\r\n0\r\n\r\n", "", "size"},
		{"overflow", "10000000000000005\r\nhello\r\n0\r\n\r\n", "", "size"},
		{"CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n", "", "size line"},
		{"LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n", "", "bare"},
		{"folded trailer", "0\r\nX-A: 1\r\n b\r\n\r\n", "", "field line"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			body, _, n, err := parseChunks([]byte(row.sent))
			if (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
				t.Errorf("got %v, want %q", err, row.err)
			}
			if row.body != "" && string(body) != row.body {
				t.Errorf("body %q", body)
			}
			if err == nil && n != len(row.sent) {
				t.Errorf("it ends at %d of %d bytes", n, len(row.sent))
			}
		})
	}
}

func TestParseResponse(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	rows := []struct {
		name, method, sent string
		ended              bool
		body               string
		size               int // 0: all of it
		err                error
	}{
		{"length", "GET", ok + "Content-Length: 2\r\n\r\nokMORE", false, "ok", len(ok) + 23, nil},
		{"chunks", "GET", ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", false, "ok", 0, nil},
		{"HEAD", "HEAD", ok + "Content-Length: 2\r\n\r\n", false, "", 0, nil},
		{"204", "GET", "HTTP/1.1 204 x\r\n\r\n", false, "", 0, nil},
		{"204 with a length", "GET", "HTTP/1.1 204 x\r\nContent-Length: 0\r\n\r\n", false, "", 0, errors.New("204")},
		{"304", "GET", "HTTP/1.1 304 x\r\nContent-Length: 2\r\n\r\n", false, "", 0, nil},
		{"behind 103", "GET", "HTTP/1.1 103 x\r\n\r\n" + ok + "Content-Length: 2\r\n\r\nok", false, "ok", 0, nil},
		{"103 alone", "GET", "HTTP/1.1 103 x\r\n\r\n", true, "", 0, errShort},
		{"up to the end", "GET", ok + "\r\nok", true, "ok", 0, nil},
		{"no end", "GET", ok + "\r\nok", false, "ok", 0, errShort},
		{"cut", "GET", ok + "Content-Length: 3\r\n\r\nok", true, "ok", 0, errShort},
		{"cut in chunks", "GET", ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", true, "ok", 0, errShort},
		{"half a head", "GET", ok, true, "", 0, errShort},
		{"status line", "GET", "HTTP/2.0 200 OK\r\n\r\n", false, "", 0, errors.New("status line")},
		{"no phrase", "GET", "HTTP/1.1 200\r\n\r\n", false, "", 0, errors.New("status line")},
		{"status 600", "GET", "HTTP/1.1 600 x\r\n\r\n", false, "", 0, errors.New("status 600")},
		{"folded", "GET", ok + "X-A: 1\r\n 2\r\n\r\n", false, "", 0, errors.New("field line")},
		{"bare LF", "GET", "HTTP/1.1 200 OK\n\n", false, "", 0, errors.New("bare")},
		{"bad chunk", "GET", ok + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", false, "", 0, errors.New("chunk size")},
		{"chunks in HTTP/1.0", "GET", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", false, "", 0, errors.New("HTTP/1.0")},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			r, err := parseResponse([]byte(row.sent), row.method, row.ended)
			if (err == nil) != (row.err == nil) || err != nil && !strings.Contains(err.Error(), row.err.Error()) {
				t.Fatalf("got %v, want %v", err, row.err)
			}
			if r == nil {
				return
			}
			if string(r.body) != row.body || r.complete != (err == nil) {
				t.Errorf("complete %v, body %q", r.complete, r.body)
			}
			if row.size == 0 {
				row.size = len(row.sent)
			}
			if err == nil && r.size != row.size {
				t.Errorf("%d bytes of %d", r.size, row.size)
			}
		})
	}
}
