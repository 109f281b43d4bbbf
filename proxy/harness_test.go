package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"kerberos/registry"
)

// These are the limits of a gateway that is told nothing.
const maxHead, maxFields, maxRequestLine = 32 << 10, 200, 16 << 10

// standard is these limits as a parser takes them.
var standard = Limits{Head: maxHead, Fields: maxFields, RequestLine: maxRequestLine, Body: 1 << 40}

// gateway is a Proxy that listens on a free port of the loopback.
type gateway struct {
	*Proxy
	reg  *registry.Registry
	addr string
	logs *logBuffer
}

// startGateway starts a gateway that ends with the test. change may alter the configuration.
func startGateway(t testing.TB, change func(*Config), route RouteFunc) *gateway {
	t.Helper()
	g := &gateway{reg: registry.New(registry.Config{}), logs: &logBuffer{}}
	cfg := Config{Registry: g.reg, Log: slog.New(slog.NewTextHandler(g.logs, nil)), UpstreamIdle: 100 * time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	g.reg = cfg.Registry
	p, err := New(cfg, route)
	if err != nil {
		t.Fatal(err)
	}
	g.Proxy = p
	g.reg.OnChange(p.Update)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.addr = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- p.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		p.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		p.Close()
	})
	return g
}

// logRequests has a line in the log of a gateway for each Record.
func logRequests(cfg *Config) {
	log := cfg.Log
	cfg.AccessLog = func(r *Record) {
		attrs := []slog.Attr{
			slog.String("client", r.Client.String()), slog.String("method", string(r.Method)), slog.String("target", string(r.Target)),
			slog.Int("status", r.Status), slog.Int("attempts", r.Attempts), slog.String("service", r.Service), slog.String("instance", r.Instance),
			slog.String("took", r.Took.String()), slog.String("reason", r.Reason),
		}
		if r.Tunnel {
			attrs = append(attrs, slog.Int64("up", r.Received), slog.Int64("down", r.Sent))
		}
		log.LogAttrs(context.Background(), slog.LevelInfo, "request", attrs...)
	}
}

func (g *gateway) register(t testing.TB, service, id, addr string) {
	t.Helper()
	if err := g.reg.Register(service, registry.Instance{ID: id, Addr: addr}); err != nil {
		t.Fatal(err)
	}
}

// do sends one request on a connection of its own and returns the response.
func (g *gateway) do(t testing.TB, request string) *message {
	t.Helper()
	c := g.dial(t)
	c.send(request)
	return c.read(strings.HasPrefix(request, "HEAD "))
}

// client is a raw connection to a gateway.
type client struct {
	t testing.TB
	net.Conn
	r       *bufio.Reader
	interim string // responses before the last one that was read
}

func (g *gateway) dial(t testing.TB) *client {
	t.Helper()
	conn, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &client{t: t, Conn: conn, r: bufio.NewReader(conn)}
}

func (c *client) send(bytes string) {
	c.t.Helper()
	if _, err := io.WriteString(c.Conn, bytes); err != nil {
		c.t.Fatal(err)
	}
}

// read reads one response, and the interim ones before it into c.interim; head says that it answers a HEAD.
func (c *client) read(head bool) *message {
	c.t.Helper()
	c.interim = ""
	for {
		m := c.next(head)
		if m.status() >= 200 || m.status() == 101 {
			return m
		}
		c.interim += m.head
	}
}

// next reads one response, which may be an interim one.
func (c *client) next(head bool) *message {
	c.t.Helper()
	m, err := readMessage(c.r, head)
	if err != nil {
		c.t.Fatalf("reading a response: %v (so far %q)", err, m.head)
	}
	return m
}

// closed fails the test unless the gateway has closed the connection and sent nothing more.
func (c *client) closed() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		c.t.Fatalf("want the connection closed, got %q, %v", rest, err)
	}
}

// message is a request or response as it was on the wire.
type message struct {
	head    string // with the empty line
	body    string // chunks put together
	chunked bool
	trailer string
}

func (m *message) status() int {
	n, _ := strconv.Atoi(strings.SplitN(m.head, " ", 3)[1])
	return n
}

// field returns the values of a field, joined with "|".
func (m *message) field(name string) string {
	var values []string
	for _, line := range strings.Split(m.head, "\r\n")[1:] {
		if n, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(n, name) {
			values = append(values, strings.TrimSpace(v))
		}
	}
	return strings.Join(values, "|")
}

// readMessage reads a message by a parser of its own, so that a test does not trust what it tests.
func readMessage(r *bufio.Reader, bodyless bool) (*message, error) {
	m := &message{}
	for {
		line, err := r.ReadString('\n')
		m.head += line
		if err != nil {
			return m, err
		}
		if line == "\r\n" {
			break
		}
	}
	response := strings.HasPrefix(m.head, "HTTP/")
	if response {
		s := m.status()
		bodyless = bodyless || s == 204 || s == 304 || s < 200
	}
	m.chunked = strings.EqualFold(m.field("Transfer-Encoding"), "chunked")
	length := m.field("Content-Length")
	switch {
	case bodyless:
	case m.chunked:
		var body strings.Builder
		defer func() { m.body = body.String() }() // what there is of it, on errors too
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return m, err
			}
			n, err := strconv.ParseInt(strings.TrimSpace(strings.SplitN(line, ";", 2)[0]), 16, 64)
			if err != nil {
				return m, err
			}
			if n == 0 {
				break
			}
			chunk := make([]byte, n+2)
			if k, err := io.ReadFull(r, chunk); err != nil {
				body.Write(chunk[:min(k, int(n))])
				return m, err
			}
			body.Write(chunk[:n])
		}
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return m, err
			}
			if line == "\r\n" {
				break
			}
			m.trailer += line
		}
	case length != "":
		n, err := strconv.Atoi(length)
		if err != nil {
			return m, err
		}
		body := make([]byte, n)
		k, err := io.ReadFull(r, body)
		m.body = string(body[:k])
		if err != nil {
			return m, err
		}
	case response:
		body, err := io.ReadAll(r)
		m.body = string(body)
		return m, err
	}
	return m, nil
}

// origin is a backend in the test's hands.
type origin struct {
	net.Listener
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns map[net.Conn]bool
	seen  []*message
}

// startOrigin serves each connection with f until the test ends.
func startOrigin(t testing.TB, f func(o *origin, c net.Conn, r *bufio.Reader)) *origin {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := serveOrigin(ln, f)
	t.Cleanup(o.stop)
	return o
}

func serveOrigin(ln net.Listener, f func(o *origin, c net.Conn, r *bufio.Reader)) *origin {
	o := &origin{Listener: ln, conns: map[net.Conn]bool{}}
	o.wg.Go(func() {
		for {
			c, err := o.Accept()
			if err != nil {
				return
			}
			o.mu.Lock()
			o.conns[c] = true
			o.mu.Unlock()
			o.wg.Go(func() {
				defer func() {
					c.Close()
					o.mu.Lock()
					delete(o.conns, c)
					o.mu.Unlock()
				}()
				f(o, c, bufio.NewReader(c))
			})
		}
	})
	return o
}

// stop ends the origin and its connections.
func (o *origin) stop() {
	o.Close()
	o.mu.Lock()
	for c := range o.conns {
		c.Close()
	}
	o.mu.Unlock()
	o.wg.Wait()
}

func (o *origin) url() string { return "http://" + o.Addr().String() }

// next reads a request and keeps it.
func (o *origin) next(r *bufio.Reader) (*message, error) {
	m, err := readMessage(r, false)
	if err == nil {
		o.mu.Lock()
		o.seen = append(o.seen, m)
		o.mu.Unlock()
	}
	return m, err
}

// requests returns what has come in.
func (o *origin) requests() []*message {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]*message(nil), o.seen...)
}

// open counts the connections.
func (o *origin) open() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.conns)
}

// answering starts an origin that answers every request with the same bytes; without Content-Length or chunks in them
// the connection is closed behind it.
func answering(t testing.TB, response string) *origin {
	t.Helper()
	return startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		for {
			if _, err := o.next(r); err != nil {
				return
			}
			if _, err := io.WriteString(c, response); err != nil {
				return
			}
			lower := strings.ToLower(response)
			if !strings.Contains(lower, "content-length") && !strings.Contains(lower, "chunked") && !strings.Contains(lower, " 204 ") &&
				!strings.Contains(lower, " 304 ") || strings.Contains(lower, "connection: close") {
				return
			}
		}
	})
}

// naming starts an origin that answers with its name and the request's body.
func naming(t testing.TB, name string) *origin {
	t.Helper()
	return startOrigin(t, namingHandler(name))
}

func namingHandler(name string) func(o *origin, c net.Conn, r *bufio.Reader) {
	return func(o *origin, c net.Conn, r *bufio.Reader) {
		for {
			m, err := o.next(r)
			if err != nil {
				return
			}
			body := name + m.body
			if _, err := fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
				return
			}
		}
	}
}

// eventually polls a condition for up to ten seconds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// refusedAddr returns an address nobody listens on.
func refusedAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return "http://" + ln.Addr().String()
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
