package soak

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"
)

// patience is how long a client waits for anything: ten times the longest of the gateway's time limits in a soak. Who has
// waited longer hangs, and that is a violation.
const patience = 40 * time.Second

// kind is a kind of client.
type kind struct {
	name  string
	right []string // outcomes
	rate  float64  // sessions a second, of all its clients; due at fixed times, whatever the gateway does
	width int      // clients
	run   func(c *client) answer
}

// client runs the sessions of a kind, one after the other.
type client struct {
	*soak
	rng  *rand.Rand
	conn *conn  // kept alive; nil: none
	uri  string // of the latest request
}

// conn is a connection to the gateway.
type conn struct {
	net.Conn
	in   *bufio.Reader
	used time.Time
}

// keptFor is how long a connection is used again after its latest answer: shorter than the gateway keeps it.
const keptFor = time.Second

func (c *client) dial() (*conn, error) {
	nc, err := net.DialTimeout("tcp", c.Gateway, patience)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Now().Add(patience))
	return &conn{Conn: nc, in: bufio.NewReaderSize(nc, 4<<10)}, nil
}

// keptConn returns the connection of the session before, or a new one.
func (c *client) keptConn() (*conn, error) {
	if c.conn != nil && time.Since(c.conn.used) < keptFor {
		c.conn.SetDeadline(time.Now().Add(patience))
		return c.conn, nil
	}
	c.hangUp()
	var err error
	c.conn, err = c.dial()
	return c.conn, err
}

func (c *client) hangUp() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// path returns one that nobody has asked for yet, and its number.
func (c *client) path(service, what string) (string, uint64) {
	id := c.requests.Add(1)
	c.uri = fmt.Sprintf("/%s/%s/%d", service, what, id)
	return c.uri, id
}

func head(method, uri, fields string) string {
	return method + " " + uri + " HTTP/1.1\r\nHost: soak.test\r\n" + fields + "\r\n"
}

// lost is the answer of a connection that failed before a response.
func lost(err error) answer { return answer{cause: ending(err)} }

// response reads a response's head and judges it: next is what its body is to be judged by, nil if it is over.
func response(in *bufio.Reader, method, uri string) (*http.Response, answer) {
	r, err := http.ReadResponse(in, &http.Request{Method: method})
	if err != nil {
		return nil, lost(err)
	}
	a := answer{status: r.StatusCode}
	if r.StatusCode != http.StatusOK && r.StatusCode != http.StatusSwitchingProtocols {
		_, a.cause, _ = strings.Cut(r.Header.Get("Proxy-Status"), "error=")
		a.cause, _, _ = strings.Cut(a.cause, ";")
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			a.ended, a.cause = true, ending(err)
		}
		return nil, a
	}
	if got := r.Header.Get(pathField); got != uri && got != "" {
		a.wrong = fmt.Sprintf("the answer to %s, not to %s", got, uri)
		return nil, a
	}
	return r, a
}

// verify reads a body that must be what matches says of it piece by piece, and whole once it has said so of all.
func verify(body io.Reader, a answer, matches func([]byte) bool, whole func() bool) answer {
	b := make([]byte, 32<<10)
	for {
		n, err := body.Read(b)
		switch {
		case !matches(b[:n]):
			a.wrong = "other bytes than were sent"
			return a
		case err == io.EOF:
			if !whole() {
				a.wrong = "a body that is too short, without a sign of it"
			}
			return a
		case err != nil:
			a.ended, a.cause = true, ending(err)
			return a
		}
	}
}

func verifyStream(body io.Reader, a answer, want *stream) answer {
	return verify(body, a, want.matches, func() bool { return want.left == 0 })
}

func verifyText(body io.Reader, a answer, want string) answer {
	return verify(body, a, func(b []byte) bool {
		rest, ok := strings.CutPrefix(want, string(b))
		want = rest
		return ok
	}, func() bool { return want == "" })
}

// verifyBackend is for what `kerberos backend` answers: it says what it was asked.
func verifyBackend(body io.Reader, a answer, method, uri string) answer {
	b, err := io.ReadAll(body)
	switch {
	case err != nil:
		a.ended, a.cause = true, ending(err)
	case !bytes.Contains(b, []byte("\n"+method+" "+uri+"\n")):
		a.wrong = fmt.Sprintf("not about %s %s: %q", method, uri, b)
	}
	return a
}

// short asks for something short, on a connection that is kept alive.
func (c *client) short(method, service, body string, verify func(io.Reader, answer, string, string) answer) answer {
	uri, _ := c.path(service, "get")
	conn, err := c.keptConn()
	if err != nil {
		return lost(err)
	}
	fields := ""
	if body != "" {
		fields = fmt.Sprintf("Content-Length: %d\r\n", len(body))
	}
	if _, err := io.WriteString(conn, head(method, uri, fields)+body); err != nil {
		c.hangUp()
		return lost(err)
	}
	r, a := response(conn.in, method, uri)
	if r != nil {
		a = verify(r.Body, a, method, uri)
	}
	conn.used = time.Now()
	if r == nil && a.status == 0 || r != nil && r.Close || a.ended || a.wrong != "" || a.status != http.StatusOK {
		c.hangUp()
	}
	return a
}

func verifyShort(body io.Reader, a answer, method, uri string) answer {
	return verifyText(body, a, shortBody(method, uri))
}

func get(service string) func(*client) answer {
	return func(c *client) answer { return c.short("GET", service, "", verifyShort) }
}

func post(service string) func(*client) answer {
	return func(c *client) answer { return c.short("POST", service, "a=1&b=2", verifyShort) }
}

func getBackend(service string) func(*client) answer {
	return func(c *client) answer { return c.short("GET", service, "", verifyBackend) }
}

func postBackend(service string) func(*client) answer {
	return func(c *client) answer { return c.short("POST", service, "a=1&b=2", verifyBackend) }
}

// ask sends a request on a connection of its own, which the caller closes.
func (c *client) ask(request string) (*conn, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, request); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// postBody sends a body of up to 256 KiB and gets it back.
func postBody(c *client) answer {
	uri, id := c.path("steady", "echo")
	n := c.rng.IntN(256 << 10)
	conn, err := c.ask(head("POST", uri, fmt.Sprintf("Content-Length: %d\r\n", n)))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	go io.Copy(conn, newStream(c.pattern, id, n))
	r, a := response(conn.in, "POST", uri)
	if r != nil {
		a = verifyStream(r.Body, a, newStream(c.pattern, id, n))
	}
	return a
}

const mebibyte = 1 << 20

// download takes 1 MiB, looking at every byte.
func download(c *client) answer { return c.big(mebibyte, func(r io.Reader) io.Reader { return r }) }

func (c *client) big(n int, slow func(io.Reader) io.Reader) answer {
	uri, id := c.path("steady", "big")
	uri = fmt.Sprintf("%s?%d", uri, n)
	conn, err := c.ask(head("GET", uri, ""))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	conn.Conn.(*net.TCPConn).SetReadBuffer(16 << 10)
	r, a := response(conn.in, "GET", uri)
	if r != nil {
		a = verifyStream(slow(r.Body), a, newStream(c.pattern, id, n))
	}
	return a
}

// reader waits before each read.
type reader struct {
	io.Reader
	wait func()
}

func (r *reader) Read(b []byte) (int, error) {
	r.wait()
	return r.Reader.Read(b)
}

// slowReader takes 1 MiB a little at a time, in 3 s and more: longer than a client may take nothing.
func slowReader(c *client) answer {
	return c.big(mebibyte, func(r io.Reader) io.Reader {
		return &reader{r, func() { time.Sleep(100 * time.Millisecond) }}
	})
}

// stuckReader takes nothing of 32 MiB, more than sockets hold, for twice as long as the gateway bears that.
func stuckReader(c *client) answer {
	stuck := false
	return c.big(32*mebibyte, func(r io.Reader) io.Reader {
		return &reader{r, func() {
			if !stuck {
				stuck = true
				time.Sleep(2 * c.Limit)
			}
		}}
	})
}

// echoStream sends chunks and takes them back meanwhile.
func echoStream(c *client) answer {
	uri, id := c.path("steady", "echo")
	conn, err := c.ask(head("POST", uri, "Transfer-Encoding: chunked\r\n"))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	n := c.rng.IntN(128 << 10)
	seed := c.rng.Uint64()
	go func() {
		rng := rand.New(rand.NewPCG(seed, 0))
		for s := newStream(c.pattern, id, n); s.left > 0; {
			b := s.next(1 + rng.IntN(16<<10))
			if _, err := fmt.Fprintf(conn, "%x\r\n%s\r\n", len(b), b); err != nil {
				return
			}
			time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		}
		io.WriteString(conn, "0\r\n\r\n")
	}()
	r, a := response(conn.in, "POST", uri)
	if r != nil {
		a = verifyStream(r.Body, a, newStream(c.pattern, id, n))
	}
	return a
}

// events reads events; every second client leaves in the middle.
func events(c *client) answer {
	uri, id := c.path("steady", "sse")
	const n = 200
	uri = fmt.Sprintf("%s?%d", uri, n)
	conn, err := c.ask(head("GET", uri, ""))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	r, a := response(conn.in, "GET", uri)
	if r == nil {
		return a
	}
	stay := c.rng.IntN(2 * n)
	var want strings.Builder
	for i := range min(stay, n) {
		want.WriteString(event(id, i))
	}
	if stay >= n {
		return verifyText(r.Body, a, want.String())
	}
	got := make([]byte, want.Len())
	switch _, err := io.ReadFull(r.Body, got); {
	case err != nil:
		a.ended, a.cause = true, ending(err)
	case string(got) != want.String():
		a.wrong = "other events than were sent"
	default:
		return answer{cause: left}
	}
	return a
}

// tunnel upgrades and sends bytes there and back.
func tunnel(c *client) answer {
	uri, id := c.path("steady", "ws")
	const key = "c29hayBzb2FrIHNvYWsgcw=="
	conn, err := c.ask(head("GET", uri, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "+key+"\r\n"))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	r, a := response(conn.in, "GET", uri)
	switch {
	case r == nil:
		return a
	case r.StatusCode != http.StatusSwitchingProtocols || r.Header.Get("Sec-WebSocket-Accept") != acceptKey(key):
		a.wrong = "no handshake"
		return a
	}
	n := c.rng.IntN(256 << 10)
	halfClose := c.rng.IntN(2) == 0
	seed := c.rng.Uint64()
	go func() {
		rng := rand.New(rand.NewPCG(seed, 0))
		for s := newStream(c.pattern, id, n); s.left > 0; {
			if _, err := conn.Write(s.next(1 + rng.IntN(16<<10))); err != nil {
				return
			}
			time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
		}
		if halfClose {
			conn.Conn.(*net.TCPConn).CloseWrite()
		}
	}()
	want := newStream(c.pattern, id, n)
	if halfClose {
		return verifyStream(conn.in, a, want)
	}
	a = verifyStream(io.LimitReader(conn.in, int64(n)), a, want)
	conn.Conn.(*net.TCPConn).SetLinger(0)
	return a
}

// slowHead sends its head a byte at a time, until it hears something.
func slowHead(c *client) answer {
	uri, _ := c.path("steady", "malformed")
	conn, err := c.dial()
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	heard := make(chan answer, 1)
	go func() {
		_, a := response(conn.in, "GET", uri)
		heard <- a
	}()
	for i := 0; ; i++ {
		b := "X"
		if request := head("GET", uri, ""); i < len(request)-4 {
			b = request[i : i+1]
		}
		if _, err := io.WriteString(conn, b); err != nil {
			return <-heard
		}
		select {
		case a := <-heard:
			return a
		case <-time.After(150 * time.Millisecond):
		}
	}
}

// stoppedUpload sends a part of its body.
func stoppedUpload(c *client) answer {
	uri, id := c.path("steady", "get")
	const announced = 100_000
	conn, err := c.ask(head("POST", uri, fmt.Sprintf("Content-Length: %d\r\n", announced)))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	io.Copy(conn, newStream(c.pattern, id, c.rng.IntN(announced)))
	_, a := response(conn.in, "POST", uri)
	return a
}

// finPatience is how long the gateway lets an answer take whose client has ended its stream.
const finPatience = time.Second

// halfClose ends its stream behind its request.
func halfClose(c *client) answer {
	uri, _ := c.path("steady", "get")
	conn, err := c.ask(head("GET", uri, ""))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	began := time.Now()
	conn.Conn.(*net.TCPConn).CloseWrite()
	r, a := response(conn.in, "GET", uri)
	if r != nil {
		return verifyShort(r.Body, a, "GET", uri)
	}
	if a.status == 0 && time.Since(began) >= finPatience {
		a.cause += " after 1 s" // the origin was not quick enough
	}
	return a
}

// resets is how many phases of a request a client may reset in.
const resets = 7

// reset resets its connection in any phase of a request.
func reset(c *client) answer {
	conn, err := c.dial()
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	conn.Conn.(*net.TCPConn).SetLinger(0)
	send := func(s string) { io.WriteString(conn, s) }
	some := func(s string) string { return s[:1+c.rng.IntN(len(s)-1)] }
	short, _ := c.path("steady", "get")
	switch c.rng.IntN(resets) {
	case 0: // before it
	case 1:
		send(some(head("GET", short, "")))
	case 2: // between head and answer
		send(head("GET", short, ""))
	case 3:
		send(head("POST", short, "Content-Length: 100000\r\n") + strings.Repeat("x", c.rng.IntN(99_999)))
	case 4:
		send(head("POST", short, "Transfer-Encoding: chunked\r\n") + some("5\r\nabcde\r\n5\r\n"))
	case 5:
		uri, _ := c.path("steady", "wait")
		send(head("GET", uri+"?500", ""))
		time.Sleep(time.Duration(c.rng.IntN(50)) * time.Millisecond)
	case 6:
		uri, _ := c.path("steady", "big")
		send(head("GET", fmt.Sprintf("%s?%d", uri, mebibyte), ""))
		io.CopyN(io.Discard, conn, int64(1+c.rng.IntN(100_000)))
	}
	return answer{cause: left}
}

// pipeline sends up to eight requests at once. Their answers must come in this order.
func pipeline(c *client) answer {
	var uris []string
	var all strings.Builder
	for range 1 + c.rng.IntN(8) {
		uri, _ := c.path("steady", "get")
		uris = append(uris, uri)
		all.WriteString(head("GET", uri, ""))
	}
	conn, err := c.ask(all.String())
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	var a answer
	for _, uri := range uris {
		var r *http.Response
		if r, a = response(conn.in, "GET", uri); r != nil {
			a = verifyShort(r.Body, a, "GET", uri)
		}
		if a.outcome() != "200" {
			break
		}
	}
	return a
}

// malformedRequests must be refused. URI stands for a path of the origin that counts whatever reaches it.
var malformedRequests = []string{
	"GET URI HTTP/1.1\nHost: soak.test\n\n",
	"GET URI HTTP/1.1\r\n\r\n",
	"GET URI HTTP/1.1\r\nHost: soak.test\r\nHost: other.test\r\n\r\n",
	"GET URI HTTP/1.1\r\nHost : soak.test\r\n\r\n",
	"GET URI HTTP/1.1\r\nHost: soak.test\r\n folded: yes\r\n\r\n",
	"GET URI HTTP/1.1\r\nHost: soak.test\r\nX: \x00\r\n\r\n",
	"GET URI HTTP/2.0\r\nHost: soak.test\r\n\r\n",
	"GET  URI HTTP/1.1\r\nHost: soak.test\r\n\r\n",
	"POST URI HTTP/1.1\r\nHost: soak.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
	"POST URI HTTP/1.1\r\nHost: soak.test\r\nContent-Length: +2\r\n\r\nab",
	"POST URI HTTP/1.1\r\nHost: soak.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"POST URI HTTP/1.1\r\nHost: soak.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
	"POST URI HTTP/1.1\r\nHost: soak.test\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n\r\n",
	"GET URI HTTP/1.1\r\nHost: soak.test\r\nX: LONG\r\n\r\n",
	"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}

// malformed sends one of these.
func malformed(c *client) answer {
	uri, _ := c.path("steady", "malformed")
	request := malformedRequests[c.rng.IntN(len(malformedRequests))]
	request = strings.NewReplacer("URI", uri, "LONG", strings.Repeat("x", 40<<10)).Replace(request)
	conn, err := c.ask(request)
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	if r, a := response(conn.in, "POST", uri); r == nil {
		return a
	}
	return answer{wrong: fmt.Sprintf("%.200q was answered as if it were right", request)}
}

// old speaks HTTP/1.0: its connection ends with the response.
func old(c *client) answer {
	uri, _ := c.path("steady", "get")
	conn, err := c.ask("GET " + uri + " HTTP/1.0\r\n\r\n")
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	r, a := response(conn.in, "GET", uri)
	if r == nil {
		return a
	}
	a = verifyShort(r.Body, a, "GET", uri)
	if a.outcome() == "200" {
		if _, err := conn.in.ReadByte(); err != io.EOF {
			a.wrong = fmt.Sprintf("behind the response comes %v, not the end", err)
		}
	}
	return a
}

// noService asks for one that nobody registered.
func noService(c *client) answer {
	uri, _ := c.path("nobody", "get")
	conn, err := c.ask(head("GET", uri, ""))
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	r, a := response(conn.in, "GET", uri)
	if r != nil {
		a.wrong = "an answer of nobody"
	}
	return a
}

// kinds are all clients. rate is that of the plain GETs; the others have theirs.
func kinds(rate float64) []kind {
	return []kind{
		{"GET", []string{"200"}, rate, 32, get("steady")},
		{"POST, body echoed", []string{"200"}, 20, 8, postBody},
		{"download of 1 MiB", []string{"200"}, 10, 4, download},
		{"echo stream, both ways", []string{"200"}, 10, 8, echoStream},
		{"events, some leave", []string{"200", left}, 8, 24, events},
		{"tunnel (101)", []string{"101"}, 10, 8, tunnel},
		{"slow reader", []string{"200"}, 1, 8, slowReader},
		{"reader that stops", []string{"cut 200"}, 0.3, 3, stuckReader},
		{"head byte by byte", []string{"408 http_request_error", "closed", "reset"}, 2, 8, slowHead},
		{"upload that stops", []string{"408 http_request_error"}, 2, 8, stoppedUpload},
		{"half-close", []string{"200", "closed after 1 s"}, 10, 4, halfClose},
		{"reset in any phase", []string{left}, 30, 8, reset},
		{"pipeline of up to 8", []string{"200"}, 20, 4, pipeline},
		{"malformed request", []string{"400 *", "431 *", "501 *", "505 *"}, 20, 4, malformed},
		{"HTTP/1.0", []string{"200"}, 10, 4, old},
		{"no such service", []string{"404 destination_not_found"}, 5, 2, noService},
		{"GET, rolling restarts", []string{"200"}, 100, 8, getBackend("rolling")},
		{"POST, rolling restarts", []string{"200"}, 20, 4, postBackend("rolling")},
		{"GET, kill -9", []string{"200"}, 100, 8, getBackend("killed")},
		{"POST, kill -9", []string{"200", "502 *"}, 20, 4, postBackend("killed")},
		{"GET, connections closed", []string{"200"}, 50, 8, get("closing")},
		{"POST, connections closed", []string{"200", "502 *"}, 20, 4, post("closing")},
		{"GET, flaky instances", []string{"200"}, 20, 4, get("flaky")},
		{"POST, flaky instances", []string{"200", "502 *"}, 5, 4, post("flaky")},
		{"GET, broken instances", []string{"200", "502 *", "504 *", "cut 200"}, 10, 40, get("broken")},
	}
}
