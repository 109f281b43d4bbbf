package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kerberos/cb"
)

// scripted starts an origin that answers every request with the same bytes, and closes behind them if it is told to. The
// count is of its connections.
func scripted(t testing.TB, response string, closes bool) (*origin, *atomic.Int32) {
	var came atomic.Int32
	return startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		came.Add(1)
		for {
			if _, err := o.next(r); err != nil {
				return
			}
			if _, err := io.WriteString(c, response); err != nil || closes {
				return
			}
		}
	}), &came
}

// steady keeps breakers closed, for tests that fail on purpose.
func steady(cfg *Config) { cfg.Breaker, cfg.Loops = cb.Config{Failures: 1 << 20}, 1 }

const (
	toHTTP11 = "GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"
	toHTTP10 = "GET /echo HTTP/1.0\r\n\r\n"
	toHEAD   = "HEAD /echo HTTP/1.1\r\nHost: a\r\n\r\n"
)

// What reaches the client, to the byte, and whether both connections go on behind it.
func TestForwardedResponses(t *testing.T) {
	const ok, date = "HTTP/1.1 200 OK\r\n", "Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
	tenKB := "X-A: " + strings.Repeat("x", 10_000) + "\r\n"
	gzipped := "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x00\r\n\r\nnot really\x00"
	limit := func(n int) string { // a response with a head of n bytes
		const end = "\r\nContent-Length: 2\r\n\r\n"
		return ok + date + "X-A: " + strings.Repeat("x", n-len(ok+date+"X-A: "+end)) + end
	}
	sixteen := strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", maxInterim)
	rows := []struct {
		name, source string
		request      string
		response     string // closed behind it if it starts with "x"
		head         string // "" is the response's head
		body         string
		trailer      string
		closed       bool // the client's connection ends
		fresh        bool // the backend's does
	}{
		{name: "length", response: ok + date + "Content-Length: 5\r\n\r\nhello", body: "hello"},
		{name: "length 0", response: ok + date + "Content-Length: 0\r\n\r\n"},
		{name: "order, case, copies", response: ok + "server: X\r\nETag: \"a\"\r\nSet-Cookie: a=1\r\n" + date + "x-lower: 1\r\nSet-Cookie: b=2; Path=/\r\nSET-COOKIE: c\r\nX-UPPER:\t2 \r\nContent-Length: 0\r\nX-Utf: \xc3\xa4\r\n\r\n"},
		{name: "date in lower case", response: ok + "date: x\r\nContent-Length: 0\r\n\r\n"},
		{name: "no Date", source: "RFC 9110 6.6.1", response: ok + "Content-Length: 0\r\n\r\n", head: ok + "Content-Length: 0\r\nDate: {now}\r\n\r\n"},
		{name: "Date nominated away", source: "RFC 9110 6.6.1", response: ok + "Connection: Date\r\n" + date + "Content-Length: 0\r\n\r\n", head: ok + date + "Content-Length: 0\r\n\r\n"},
		{name: "no Content-Type with a body", response: ok + date + "Content-Length: 1\r\n\r\n<", body: "<"},
		{name: "no reason phrase", source: "RFC 9112 4", response: "HTTP/1.1 200 \r\n" + date + "Content-Length: 0\r\n\r\n"},
		{name: "no space either", source: "RFC 9112 4", response: "HTTP/1.1 200\r\n" + date + "Content-Length: 0\r\n\r\n", head: "HTTP/1.1 200 \r\n" + date + "Content-Length: 0\r\n\r\n"},
		{name: "odd reason phrase", source: "RFC 9112 4", response: "HTTP/1.1 299 Na ja, \xc3\xa4h\t!\r\n" + date + "Content-Length: 0\r\n\r\n"},
		{name: "odd status", source: "RFC 9110 15", response: "HTTP/1.1 599 x\r\n" + date + "Content-Length: 0\r\n\r\n"},
		{name: "backend's own 502", response: "HTTP/1.1 502 Bad Gateway\r\n" + date + "Content-Length: 2\r\n\r\nno", body: "no"},
		{name: "backend's own 503", response: "HTTP/1.1 503 x\r\nRetry-After: 7\r\n" + date + "Content-Length: 2\r\n\r\nno", body: "no"},
		{name: "redirect", response: "HTTP/1.1 302 Found\r\n" + date + "Location: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n"},
		{name: "compressed", response: ok + date + fmt.Sprintf("Content-Encoding: gzip\r\nVary: Accept-Encoding\r\nContent-Length: %d\r\n\r\n", len(gzipped)) + gzipped, body: gzipped},
		{name: "hop-by-hop", source: "RFC 9110 7.6.1",
			response: ok + "Keep-Alive: timeout=5\r\n" + date + "Proxy-Connection: x\r\nX-Hop: 1\r\nConnection: keep-alive, x-hop\r\nUpgrade: h2c\r\nProxy-Authenticate: x\r\nTE: x\r\nContent-Length: 0\r\nX-End: 1\r\n\r\n",
			head:     ok + date + "Content-Length: 0\r\nX-End: 1\r\n\r\n"},
		{name: "Content-Length is not nominated away", response: ok + date + "Connection: content-length\r\nContent-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
		{name: "forwarding fields are the backend's own", response: ok + date + "X-Forwarded-For: 1\r\nVia: 1.1 x\r\nX_Real_IP: 2\r\nContent-Length: 0\r\n\r\n"},
		{name: "head of 10 KB", response: ok + date + tenKB + "Content-Length: 2\r\n\r\nok", body: "ok"},
		{name: "head at the limit", response: limit(maxHead) + "ok", body: "ok"},

		// no body
		{name: "HEAD", source: "RFC 9110 9.3.2", request: toHEAD, response: ok + date + "Content-Length: 1000000\r\n\r\n"},
		{name: "HEAD without a length", source: "RFC 9110 9.3.2", request: toHEAD, response: ok + date + "X-A: 1\r\n\r\n"},
		{name: "HEAD in chunks", source: "RFC 9110 9.3.2", request: toHEAD, response: ok + date + "Transfer-Encoding: chunked\r\n\r\n", head: ok + date + "\r\n"},
		{name: "204", source: "RFC 9110 15.3.5", response: "HTTP/1.1 204 No Content\r\n" + date + "\r\n"},
		{name: "204 with a length", source: "RFC 9110 8.6", response: "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n" + date + "\r\n", head: "HTTP/1.1 204 No Content\r\n" + date + "\r\n"},
		{name: "205", source: "RFC 9110 15.3.6", response: "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n" + date + "\r\n"},
		{name: "205 in chunks", source: "RFC 9110 15.3.6", response: "HTTP/1.1 205 x\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{name: "205 up to the close", source: "RFC 9110 15.3.6", response: "xHTTP/1.1 205 x\r\n" + date + "\r\n", head: "HTTP/1.1 205 x\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n", fresh: true},
		{name: "interim response with a length of 0", source: "RFC 9110 8.6", response: "HTTP/1.1 103 x\r\nContent-Length: 0\r\n\r\n" + ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
		{name: "304", source: "RFC 9110 15.4.5", response: "HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n" + date + "\r\n"},
		{name: "304 with a length", source: "RFC 9110 15.4.5", response: "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n" + date + "\r\n"},
		{name: "304 to HTTP/1.0", source: "RFC 9110 15.4.5", request: toHTTP10, response: "HTTP/1.1 304 Not Modified\r\n" + date + "\r\n", head: "HTTP/1.1 304 Not Modified\r\n" + date + "Connection: close\r\n\r\n", closed: true},

		// where the body ends
		{name: "chunks", source: "RFC 9112 7.1", response: ok + "Transfer-Encoding: Chunked\r\n" + date + "\r\n2\r\nhe\r\n003;x=y\r\nllo\r\n0\r\n\r\n", head: ok + date + "Transfer-Encoding: chunked\r\n\r\n", body: "hello"},
		{name: "no chunks", source: "RFC 9112 7.1", response: ok + date + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{name: "trailers", source: "RFC 9110 6.5", response: ok + "Trailer: X-Sum\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 1\r\nContent-Length: 3\r\nx-other: 2\r\nTransfer_Encoding: x\r\n\r\n", body: "x", trailer: "X-Sum: 1\r\nx-other: 2\r\n"},
		{name: "close is the backend's", source: "RFC 9112 9.6", response: "x" + ok + date + "Connection: close\r\nContent-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello", fresh: true},
		{name: "announced close is obeyed", source: "RFC 9112 9.6", response: ok + date + "Connection: Close\r\nContent-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello", fresh: true},
		{name: "up to the close", source: "RFC 9112 6.3", response: "x" + ok + date + "\r\nhello", head: ok + date + "Transfer-Encoding: chunked\r\n\r\n", body: "hello", fresh: true},
		{name: "up to the close, nothing", source: "RFC 9112 6.3", response: "x" + ok + date + "\r\n", head: ok + date + "Transfer-Encoding: chunked\r\n\r\n", fresh: true},

		// HTTP/1.0
		{name: "from HTTP/1.0", source: "RFC 9112 9.3", response: "xHTTP/1.0 200 OK\r\n" + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello", fresh: true},
		{name: "from HTTP/1.0 up to the close", source: "RFC 9112 6.3", response: "xHTTP/1.0 200 OK\r\n" + date + "\r\nhello", head: ok + date + "Transfer-Encoding: chunked\r\n\r\n", body: "hello", fresh: true},
		{name: "from HTTP/1.0 that keeps alive", source: "RFC 9112 9.3", response: "HTTP/1.0 200 OK\r\n" + date + "Connection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
		{name: "to HTTP/1.0", source: "RFC 9112 9.3", request: toHTTP10, response: ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\nConnection: close\r\n\r\n", body: "hello", closed: true},
		{name: "to HTTP/1.0 that keeps alive", source: "RFC 9112 9.3", request: "GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", response: ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\nConnection: keep-alive\r\n\r\n", body: "hello"},
		{name: "chunks to HTTP/1.0", source: "RFC 9112 6.1", request: "GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", response: ok + date + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n", head: ok + date + "Connection: close\r\n\r\n", body: "hello", closed: true},
		{name: "up to the close to HTTP/1.0", source: "RFC 9112 6.3", request: toHTTP10, response: "x" + ok + date + "\r\nhello", head: ok + date + "Connection: close\r\n\r\n", body: "hello", closed: true, fresh: true},

		// interim responses
		{name: "103", source: "RFC 9110 15.2", response: "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
		{name: "100 unasked and 102", source: "RFC 9110 15.2", response: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 x\r\n\r\n" + ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
		{name: "16 of them", source: "RFC 9110 15.2", response: sixteen + ok + date + "Content-Length: 5\r\n\r\nhello", head: ok + date + "Content-Length: 5\r\n\r\n", body: "hello"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			response, closes := strings.CutPrefix(row.response, "x")
			g := startGateway(t, steady, nil)
			o, came := scripted(t, response, closes)
			g.register(t, "echo", "1", o.url())
			if row.request == "" {
				row.request = toHTTP11
			}
			if row.head == "" {
				row.head, _, _ = strings.Cut(response, "\r\n\r\n")
				row.head += "\r\n\r\n"
			}
			c := g.dial(t)
			for n := range int32(2) {
				c.send(row.request)
				m := c.read(row.request == toHEAD)
				if row.name == "no Date" {
					at, err := time.Parse(http.TimeFormat, m.field("Date"))
					if err != nil || time.Since(at) > 30*time.Second || time.Since(at) < 0 {
						t.Errorf("Date: %q", m.field("Date"))
					}
					m.head = strings.Replace(m.head, m.field("Date"), "{now}", 1)
				}
				interim, _, _ := strings.Cut(response, "HTTP/1.1 2")
				interim = strings.Replace(interim, "Content-Length: 0\r\n", "", 1) // RFC 9110 section 8.6
				if strings.HasPrefix(response, "HTTP/1.1 1") && c.interim != interim {
					t.Errorf("%s: the interim responses were\n%s, want\n%s", row.source, c.interim, interim)
				}
				want := &message{head: row.head, body: row.body, trailer: row.trailer, chunked: strings.Contains(row.head, "chunked\r\n")}
				if diff := cmp.Diff(want, m, cmp.AllowUnexported(message{})); diff != "" {
					t.Fatalf("%s: request %d: the client saw (-want +got):\n%s", row.source, n+1, diff)
				}
				if row.closed {
					c.closed()
					c = g.dial(t)
				}
				want2 := int32(1)
				if row.fresh {
					want2 = n + 1
				}
				if got := came.Load(); got != want2 {
					t.Errorf("%s: behind request %d the backend has seen %d connections, want %d", row.source, n+1, got, want2)
				}
			}
		})
	}
}

// A response that is not clear is a 502 that says nothing of the backend's words; its connection is not used again, the
// client's is.
func TestRefusedResponses(t *testing.T) {
	const ok, body = "HTTP/1.1 200 OK\r\nX-A: hunter2\r\n", "\r\nhunter2"
	const malformed = "http_protocol_error"
	flood := strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxInterim+1)
	rows := []struct {
		name, source, response, kind string
	}{
		{"no HTTP", "RFC 9112 4", "hunter2 200 OK\r\n\r\n", malformed},
		{"SSH", "RFC 9112 4", "SSH-2.0-OpenSSH_9.9\r\n", "http_response_incomplete"},
		{"HTTP/2.0", "RFC 9112 2.3", "HTTP/2.0 200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"HTTP/1.2", "RFC 9112 2.3", "HTTP/1.2 200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"lower-case version", "RFC 9112 2.3", "http/1.1 200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"empty line first", "RFC 9112 4", "\r\n" + ok + "Content-Length: 7\r\n" + body, malformed},
		{"status of two digits", "RFC 9112 4", "HTTP/1.1 20 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"status of four digits", "RFC 9112 4", "HTTP/1.1 2000 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"status 099", "RFC 9110 15", "HTTP/1.1 099 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"status 600", "RFC 9110 15", "HTTP/1.1 600 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"status with a sign", "RFC 9112 4", "HTTP/1.1 +20 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"no space behind the status", "RFC 9112 4", "HTTP/1.1 200OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"two spaces before the status", "RFC 9112 4", "HTTP/1.1  200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"control byte in the phrase", "RFC 9112 4", "HTTP/1.1 200 hun\x00ter2\r\nContent-Length: 7\r\n" + body, malformed},
		{"bare CR in the phrase", "RFC 9112 2.2", "HTTP/1.1 200 O\rK\r\nContent-Length: 7\r\n" + body, malformed},
		{"bare LF behind the status line", "RFC 9112 2.2", "HTTP/1.1 200 OK\nContent-Length: 7\r\n" + body, malformed},
		{"bare LFs", "RFC 9112 2.2", "HTTP/1.1 200 OK\nContent-Length: 7\n\nhunter2", malformed},
		{"folded line", "RFC 9112 5.2", ok + " folded\r\nContent-Length: 7\r\n" + body, malformed},
		{"no colon", "RFC 9112 5", ok + "hunter2\r\nContent-Length: 7\r\n" + body, malformed},
		{"space in a name", "RFC 9112 5.1", ok + "Content Length: 9\r\nContent-Length: 7\r\n" + body, malformed},
		{"space before the colon", "RFC 9112 5.1", ok + "Content-Length : 7\r\n" + body, malformed},
		{"NUL in a value", "RFC 9110 5.5", ok + "X-B: \x00\r\nContent-Length: 7\r\n" + body, malformed},
		{"bare CR in a value", "RFC 9110 5.5", ok + "X-B: a\rSet-Cookie: b\r\nContent-Length: 7\r\n" + body, malformed},

		{"length and chunks", "RFC 9112 6.3", ok + "Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"two lengths", "RFC 9112 6.3", ok + "Content-Length: 7\r\nContent-Length: 8\r\n" + body, malformed},
		{"the same length twice", "RFC 9112 6.3", ok + "Content-Length: 7\r\nContent-Length: 7\r\n" + body, malformed},
		{"list of lengths", "RFC 9112 6.3", ok + "Content-Length: 7, 7\r\n" + body, malformed},
		{"length with a sign", "RFC 9110 8.6", ok + "Content-Length: +7\r\n" + body, malformed},
		{"length with a zero in front", "RFC 9110 8.6", ok + "Content-Length: 07\r\n" + body, malformed},
		{"empty length", "RFC 9110 8.6", ok + "Content-Length:\r\n" + body, malformed},
		{"length that overflows", "RFC 9110 8.6", ok + "Content-Length: 18446744073709551623\r\n" + body, malformed},
		{"unknown coding", "RFC 9112 6.1", ok + "Transfer-Encoding: gzip\r\n" + body, malformed},
		{"gzip in chunks", "RFC 9112 6.1", ok + "Transfer-Encoding: gzip, chunked\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"chunked twice", "RFC 9112 6.1", ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"chunks from HTTP/1.0", "RFC 9112 6.1", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},

		{"status 000", "RFC 9110 15", "HTTP/1.1 000 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"HTTP/1.10", "RFC 9112 2.3", "HTTP/1.10 200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"HTTP/3", "RFC 9112 2.3", "HTTP/3 200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"tab behind the version", "RFC 9112 4", "HTTP/1.1\t200 OK\r\nContent-Length: 7\r\n" + body, malformed},
		{"tab behind the status", "RFC 9112 4", "HTTP/1.1 200\tOK\r\nContent-Length: 7\r\n" + body, malformed},
		{"DEL in the phrase", "RFC 9112 4", "HTTP/1.1 200 hun\x7fter2\r\nContent-Length: 7\r\n" + body, malformed},
		{"version alone", "RFC 9112 4", "HTTP/1.1\r\nContent-Length: 7\r\n" + body, malformed},
		{"body without a head", "RFC 9112 4", "<html>hunter2</html>\r\n\r\n", malformed},
		{"folded length", "RFC 9112 5.2", ok + "Content-Length:\r\n 7\r\n" + body, malformed},
		{"name of nothing", "RFC 9112 5", ok + ": 1\r\nContent-Length: 7\r\n" + body, malformed},
		{"bytes above ASCII in a name", "RFC 9110 5.6.2", ok + "Content-L\xc3\xa4ngth: 9\r\nContent-Length: 7\r\n" + body, malformed},
		{"hexadecimal length", "RFC 9110 8.6", ok + "Content-Length: 0x7\r\n" + body, malformed},
		{"length with a minus", "RFC 9110 8.6", ok + "Content-Length: -7\r\n" + body, malformed},
		{"length with a space", "RFC 9110 8.6", ok + "Content-Length: 7 7\r\n" + body, malformed},
		{"length with letters behind", "RFC 9110 8.6", ok + "Content-Length: 7a\r\n" + body, malformed},
		{"chunks and length", "RFC 9112 6.3", ok + "Transfer-Encoding: chunked\r\nContent-Length: 7\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"identity", "RFC 9112 6.1", ok + "Transfer-Encoding: identity\r\nContent-Length: 7\r\n" + body, malformed},
		{"empty coding", "RFC 9112 6.1", ok + "Transfer-Encoding:\r\nContent-Length: 7\r\n" + body, malformed},
		{"chunked twice in one line", "RFC 9112 6.1", ok + "Transfer-Encoding: chunked, chunked\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"chunked with a parameter", "RFC 9112 6.1", ok + "Transfer-Encoding: chunked;x\r\n\r\n7\r\nhunter2\r\n0\r\n\r\n", malformed},
		{"more than 32 nominated fields", "RFC 9110 7.6.1", ok + "Connection: " + strings.Repeat("x, ", maxNominated+1) + "\r\nContent-Length: 7\r\n" + body, malformed},
		{"204 with a body", "RFC 9110 15.3.5", "HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n" + body, malformed},
		{"204 in chunks", "RFC 9112 6.1", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", malformed},
		{"205 with a body", "RFC 9110 15.3.6", "HTTP/1.1 205 Reset Content\r\nContent-Length: 7\r\n" + body, malformed},
		{"interim response with a body", "RFC 9110 8.6", "HTTP/1.1 103 x\r\nContent-Length: 7\r\n" + body + ok + "Content-Length: 7\r\n" + body, malformed},
		{"interim response in chunks", "RFC 9112 6.1", "HTTP/1.1 103 x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + ok + "Content-Length: 7\r\n" + body, malformed},

		{"101 unasked", "RFC 9110 15.2.2", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: hunter2\r\n\r\n", "http_upgrade_failed"},
		{"101 behind 103", "RFC 9110 15.2.2", "HTTP/1.1 103 x\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n", "http_upgrade_failed"},
		{"flood of interim responses", "RFC 9110 15.2", flood + ok + "Content-Length: 7\r\n" + body, malformed},
		{"bad interim response", "RFC 9110 15.2", "HTTP/1.1 103 x\r\nhunter2\r\n\r\n" + ok + "Content-Length: 7\r\n" + body, malformed},
		{"interim responses alone", "RFC 9110 15.2", "HTTP/1.1 103 x\r\n\r\n", "connection_terminated"},

		{"nothing", "", "", "connection_terminated"},
		{"half a head", "", "HTTP/1.1 200 OK\r\nX-A: hunter2", "http_response_incomplete"},
		{"head past the limit", "", ok + strings.Repeat("X-A: hunter2\r\n", maxHead/14) + "\r\n", "http_response_header_section_size"},
		{"half a small body", "RFC 9112 8", ok + "Content-Length: 100\r\n" + body, "http_response_incomplete"},
		{"none of a small body", "RFC 9112 8", ok + "Content-Length: 100\r\n\r\n", "http_response_incomplete"},
		{"all but the last byte", "RFC 9112 8", ok + fmt.Sprintf("Content-Length: %d\r\n\r\n", maxWhole/2) + strings.Repeat("x", maxWhole/2-1), "http_response_incomplete"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { steady(cfg); logRequests(cfg) }, nil)
			// If only its end makes the response a bad one, the backend ends the connection: else the gateway has to.
			closes := row.kind == "http_response_incomplete" || row.kind == "connection_terminated"
			o, came := scripted(t, row.response, closes)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			for n := range int32(2) {
				c.send(toHTTP11)
				m := c.read(false)
				if m.status() != 502 || m.field("Proxy-Status") != "kerberos; error="+row.kind || m.field("Connection") != "" {
					t.Fatalf("%s: want 502 and %s:\n%s%s", row.source, row.kind, m.head, m.body)
				}
				_, port, _ := net.SplitHostPort(o.Addr().String())
				for _, inside := range []string{"hunter2", "127.0.0.1", port} {
					if all := m.head + m.body; strings.Contains(all, inside) {
						t.Errorf("%q leaks:\n%s", inside, all)
					}
				}
				if got := came.Load(); got != n+1 {
					t.Errorf("the backend has seen %d connections behind %d requests", got, n+1)
				}
			}
			if s := g.DescribeInstance("echo", "1"); s.Failure != 2 || s.Success != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// An instance that cannot be reached is told of without its address.
func TestRefusalsTellNothing(t *testing.T) {
	addr := refusedAddr(t)
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "hunter2", addr)
	plain := startOrigin(t, func(_ *origin, c net.Conn, _ *bufio.Reader) { io.WriteString(c, "hunter2, and not TLS at all\r\n") })
	g.register(t, "tls", "hunter2", "https"+strings.TrimPrefix(plain.url(), "http"))
	for _, row := range []struct{ request, kind string }{{toHTTP11, "connection_refused"}, {"GET /tls HTTP/1.1\r\nHost: a\r\n\r\n", "tls_protocol_error"}} {
		m := g.do(t, row.request)
		if m.status() != 502 || m.field("Proxy-Status") != "kerberos; error="+row.kind {
			t.Errorf("want %s:\n%s", row.kind, m.head)
		}
		for _, inside := range []string{"hunter2", "127.0.0.1", strings.TrimPrefix(addr, "http://127.0.0.1:")} {
			if all := m.head + m.body; strings.Contains(all, inside) {
				t.Errorf("%q leaks:\n%s", inside, all)
			}
		}
	}
}

// What a backend sends behind its response is never taken for the answer to another request.
func TestExtraBytes(t *testing.T) {
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nEVIL!"
	rows := []struct{ name, request, response string }{
		{"length", toHTTP11, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		{"chunks", toHTTP11, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
		{"large", toHTTP11, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", 2*maxWhole) + strings.Repeat("x", 2*maxWhole)},
		{"HEAD", toHEAD, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"},
		{"204", toHTTP11, "HTTP/1.1 204 No Content\r\n\r\n"},
		{"205", toHTTP11, "HTTP/1.1 205 x\r\nContent-Length: 0\r\n\r\n"},
		{"trailers", toHTTP11, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n"},
		{"from HTTP/1.0", toHTTP11, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"},
		{"304", toHTTP11, "HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n"},
	}
	for _, row := range rows {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late %v", row.name, late), func(t *testing.T) {
				answered, sent := make(chan struct{}), make(chan struct{})
				var requests, came atomic.Int32
				o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
					came.Add(1)
					for {
						if _, err := o.next(r); err != nil {
							return
						}
						switch {
						case requests.Add(1) > 1:
							io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
						case late:
							io.WriteString(c, row.response)
							<-answered
							io.WriteString(c, evil)
							close(sent)
						default:
							io.WriteString(c, row.response+evil)
							close(sent)
						}
					}
				})
				g := startGateway(t, func(cfg *Config) { cfg.UpstreamIdle = time.Minute }, nil)
				g.register(t, "echo", "1", o.url())
				c := g.dial(t)
				c.send(row.request)
				c.read(row.request == toHEAD)
				close(answered)
				<-sent
				for range 3 {
					c.send(toHTTP11)
					if m := c.read(false); m.body != "good" {
						t.Fatalf("the next client got %q", m.body)
					}
				}
				if n := came.Load(); n != 2 { // the first was not used again, the second was
					t.Errorf("the backend has seen %d connections", n)
				}
			})
		}
	}
}

// A response that breaks off once the client has seen a part of it ends in a way that cannot be taken for its end.
func TestTruncatedResponses(t *testing.T) {
	part := strings.Repeat("x", 100_000)
	const chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	rows := []struct {
		name, request, response string
		reset                   bool // instead of an orderly close
		body                    string
	}{
		{name: "large with a length", response: "HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n" + part, body: part},
		{name: "chunks, between two", response: chunked + "5\r\nhello\r\n", body: "hello"},
		{name: "chunks, in the middle of one", response: chunked + "a\r\nhello", body: "hello"},
		{name: "chunks, without the last line", response: chunked + "5\r\nhello\r\n0\r\n", body: "hello"},
		{name: "chunks, a bad one", response: chunked + "5\r\nhello\r\nzz\r\nworld\r\n0\r\n\r\n", body: "hello"},
		{name: "chunks, too long a one", response: chunked + "5\r\nhelloworld\r\n0\r\n\r\n", body: "hello"},
		{name: "chunks, one that ends in bare LF", response: chunked + "5\r\nhello\r\n5\nworld\r\n0\r\n\r\n", body: "hello"},
		{name: "chunks, one with a sign", response: chunked + "5\r\nhello\r\n+5\r\nworld\r\n0\r\n\r\n", body: "hello"},
		{name: "chunks, one that overflows", response: chunked + "5\r\nhello\r\n10000000000000005\r\nworld\r\n0\r\n\r\n", body: "hello"},
		{name: "chunks, a long extension", response: chunked + "5\r\nhello\r\n5;" + strings.Repeat("x", maxChunkLine) + "\r\nworld\r\n0\r\n\r\n", body: "hello"},
		{name: "trailers, half of them", response: chunked + "5\r\nhello\r\n0\r\nX-A: 1\r\nX-B", body: "hello"},
		{name: "trailers, a bad one", response: chunked + "5\r\nhello\r\n0\r\nX A: 1\r\n\r\n", body: "hello"},
		{name: "trailers, too many", response: chunked + "5\r\nhello\r\n0\r\n" + strings.Repeat("X-A: 1\r\n", maxTrailers/8+1) + "\r\n", body: "hello"},
		{name: "chunks to HTTP/1.0", request: toHTTP10, response: chunked + "5\r\nhello\r\n"},
		{name: "reset with a length", response: "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhello", reset: true, body: "hello"},
		{name: "reset up to the close", response: "HTTP/1.1 200 OK\r\n\r\nhello", reset: true, body: "hello"},
		{name: "reset up to the close, to HTTP/1.0", request: toHTTP10, response: "HTTP/1.1 200 OK\r\n\r\nhello", reset: true},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			arrived := make(chan struct{})
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if _, err := o.next(r); err != nil {
					return
				}
				io.WriteString(c, row.response)
				if row.reset {
					<-arrived // a reset would drop what is still on its way
					c.(*net.TCPConn).SetLinger(0)
				}
			})
			g := startGateway(t, steady, nil)
			g.register(t, "echo", "1", o.url())
			if row.request == "" {
				row.request = toHTTP11
			}
			c := g.dial(t)
			c.send(row.request)
			head := ""
			for !strings.HasSuffix(head, "\r\n\r\n") {
				line, err := c.r.ReadString('\n')
				if err != nil {
					if row.request == toHTTP10 && !row.reset {
						return // the reset has overtaken the head
					}
					t.Fatal(err)
				}
				head += line
			}
			close(arrived)
			m, err := readMessage(bufio.NewReader(io.MultiReader(strings.NewReader(head), c.r)), false)
			if err == nil {
				t.Fatalf("this looks complete: %s%q", m.head, m.body)
			}
			if row.request != toHTTP10 && (m.status() != 200 || m.body != row.body) {
				t.Errorf("%d, %d bytes of body, want %d", m.status(), len(m.body), len(row.body))
			}
			eventually(t, "counted as a failure", func() bool { return g.DescribeInstance("echo", "1").Failure == 1 })
			if !strings.Contains(g.logs.String(), "response cut") {
				t.Error("not logged")
			}
		})
	}
}

// A response that ends with its connection has not ended when that is reset, whoever finds out: the client misses the end.
func TestResetIsNoEnd(t *testing.T) {
	g := startGateway(t, steady, nil)
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\npart")
		_, _ = io.CopyN(io.Discard, r, 256<<10)
		resetNow(c)
	})
	g.register(t, "echo", "1", o.url())
	chunk := "1000\r\n" + filler(0x1000) + "\r\n"
	for range 200 {
		c := g.dial(t)
		go func() { // until it is told that nobody reads
			_, err := io.WriteString(c, "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
			for err == nil {
				_, err = io.WriteString(c, chunk)
			}
		}()
		if got, _ := io.ReadAll(c.r); strings.HasSuffix(string(got), "\r\n0\r\n\r\n") {
			t.Fatalf("got as if it were whole:\n%s", got)
		}
		c.Close()
	}
}
