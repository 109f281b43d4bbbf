package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kerberos/cb"
	"kerberos/proxy/loop"
)

// What is served on loops, and where loops and goroutines meet.

// startLoops starts a gateway with so many loops, which keeps its connections to instances.
func startLoops(t testing.TB, loops int, change func(*Config), route RouteFunc) *gateway {
	t.Helper()
	if !loop.Supported {
		t.Skip("no loops on this system")
	}
	g := startGateway(t, func(cfg *Config) {
		cfg.Loops, cfg.UpstreamIdle = loops, time.Minute
		if change != nil {
			change(cfg)
		}
	}, route)
	if err := g.startLoops(); err != nil { // before the tests look at them
		t.Fatal(err)
	}
	return g
}

// waits sets how long loops wait for backends, before there is traffic.
func (g *gateway) waits(d time.Duration) { g.cfg().slowAfter = d }

// onLoops has f run for each worker, on its loop.
func (g *gateway) onLoops(f func(w *worker)) {
	for i, l := range g.group.Loops {
		l.Call(func() { f(g.workers[i]) })
	}
}

// atBackends counts the requests that loops have sent and wait for.
func (g *gateway) atBackends() (n int) {
	g.onLoops(func(w *worker) { n += len(w.waiting) })
	return n
}

// handedOver counts the connections that goroutines have.
func (g *gateway) handedOver() (n int) {
	g.onLoops(func(w *worker) {
		for _, bucket := range w.wheel {
			for _, c := range bucket {
				if c.sock.Held() {
					n++
				}
			}
		}
	})
	return n
}

// halfRead counts the connections whose head is not at its end, on the loops.
func (g *gateway) halfRead() (n int) {
	g.onLoops(func(w *worker) {
		for _, bucket := range w.wheel {
			for _, c := range bucket {
				if c.reading {
					n++
				}
			}
		}
	})
	return n
}

// taken waits until the gateway has read all that its clients have sent. Over the loopback a write is there when it returns.
func (g *gateway) taken(t testing.TB) {
	t.Helper()
	eventually(t, "all was read", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		for c := range g.conns {
			if c.sock != nil && c.sock.Peek() == 1 {
				return false
			}
		}
		return true
	})
}

// sound checks the books of the loops.
func (g *gateway) sound(t testing.TB) {
	t.Helper()
	g.onLoops(func(w *worker) {
		n := 0
		for i, bucket := range w.wheel {
			for j, c := range bucket {
				if n++; int(c.shelf%wheelSize) != i || c.place != j || c.worker != w {
					t.Errorf("in bucket %d at %d is a connection of bucket %d at %d", i, j, c.shelf%wheelSize, c.place)
				}
				if c.slot < 0 && !c.sock.Held() && !c.reading && c.workspace != nil {
					t.Error("an idle connection has a workspace")
				}
			}
		}
		if n != w.conns {
			t.Errorf("%d connections in the wheel, %d counted", n, w.conns)
		}
		for i, c := range w.waiting {
			if c.slot != i || c.x.backend.client != c || c.sock.Held() || c.x.backend.sock.Held() {
				t.Errorf("waiting at %d is a connection of slot %d, or it is not all the loop's", i, c.slot)
			}
		}
	})
}

// quiet waits until nothing is under way at the instances of a service, and no client is connected.
func (g *gateway) quiet(t testing.TB, service string, ids ...string) {
	t.Helper()
	g.idle(t)
	for _, id := range ids {
		eventually(t, "nothing under way at "+id, func() bool { return g.DescribeInstance(service, id).InFlight == 0 })
	}
	eventually(t, "the books are empty", func() (empty bool) {
		empty = true
		g.onLoops(func(w *worker) { empty = empty && w.conns == 0 && len(w.waiting) == 0 })
		return empty
	})
	g.sound(t)
}

// warm has each loop connect to each of n instances behind a path.
func (g *gateway) warm(t testing.TB, path string, n int) {
	t.Helper()
	for range len(g.workers) { // they take turns
		c := g.dial(t)
		for range 2 * n {
			c.get(path).want(t, 200)
		}
		c.Close()
	}
}

// echoing is an act that answers with the request's target and body.
func echoing(c net.Conn, m *message) bool {
	target := strings.Fields(m.head)[1]
	_, err := fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s %s", len(target)+1+len(m.body), target, m.body)
	return err == nil
}

func eachLoops(t *testing.T, f func(t *testing.T, loops int)) {
	for _, loops := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(loops, " loops"), func(t *testing.T) { f(t, loops) })
	}
}

// A request to an instance that is connected is served on the loop alone: no goroutine has the connection.
func TestServedOnALoop(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		g.waits(time.Minute)
		gate := make(chan struct{})
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		g.warm(t, "/echo", 1)
		a.does(after(gate, echoing))
		var clients []*client
		for range 3 * loops {
			c := g.dial(t)
			c.send("POST /echo/x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody")
			clients = append(clients, c)
		}
		eventually(t, "all at the backend", func() bool { return g.atBackends() == 3*loops })
		if n := g.handedOver(); n != 0 {
			t.Errorf("goroutines have %d", n)
		}
		g.sound(t)
		close(gate)
		for _, c := range clients {
			if m := c.read(false); m.body != "/echo/x body" {
				t.Errorf("got %q", m.body)
			}
			c.Close()
		}
		g.quiet(t, "echo", "a")
	})
}

// Pipelined requests are answered in their order, however they come in and however long each takes.
func TestPipelinesOnLoops(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		g.waits(5 * time.Millisecond)
		a := startActor(t, func(c net.Conn, m *message) bool {
			if strings.Contains(m.head, "/slow") {
				time.Sleep(20 * time.Millisecond)
			}
			return echoing(c, m)
		})
		g.register(t, "echo", "a", a.url())
		g.warm(t, "/echo", 1)
		for _, slow := range []int{-1, 0, 7, 29} {
			var all strings.Builder
			for i := range 30 {
				path := fmt.Sprint("/echo/", i)
				if i == slow {
					path += "/slow"
				}
				switch i % 3 {
				case 0:
					fmt.Fprintf(&all, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
				case 1:
					fmt.Fprintf(&all, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", path)
				default: // not one for a loop
					fmt.Fprintf(&all, "POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", path)
				}
			}
			for _, chunk := range []int{all.Len(), 1000, 77} {
				c := g.dial(t)
				go func() {
					for rest := all.String(); len(rest) > 0; {
						n := min(chunk, len(rest))
						if _, err := io.WriteString(c.Conn, rest[:n]); err != nil {
							return
						}
						rest = rest[n:]
					}
				}()
				for i := range 30 {
					m := c.read(false).want(t, 200)
					if !strings.HasPrefix(m.body, fmt.Sprintf("/echo/%d", i)) || i%3 > 0 && !strings.HasSuffix(m.body, " hello") {
						t.Fatalf("answer %d is %q", i, m.body)
					}
				}
				c.Close()
			}
		}
		g.quiet(t, "echo", "a")
	})
}

// Two requests in two segments, split at every position, and byte by byte.
func TestRequestsSplitAnywhere(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	a := startActor(t, echoing)
	g.register(t, "echo", "a", a.url())
	g.warm(t, "/echo", 1)
	const both = "GET /echo/1 HTTP/1.1\r\nHost: x\r\n\r\nPOST /echo/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
	c := g.dial(t)
	answers := func() {
		t.Helper()
		for _, want := range []string{"/echo/1 ", "/echo/2 hello"} {
			if m := c.read(false).want(t, 200); m.body != want {
				t.Fatalf("got %q, want %q", m.body, want)
			}
		}
	}
	for i := 1; i < len(both); i++ {
		c.send(both[:i])
		g.taken(t)
		c.send(both[i:])
		answers()
	}
	for i := range both {
		c.send(both[i : i+1])
		g.taken(t)
	}
	answers()
	c.Close()
	g.quiet(t, "echo", "a")
}

// Answers in two segments, split at every position, to requests that a loop has sent.
func TestAnswersSplitAnywhere(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nX-A: b\r\n"
	for _, row := range []struct{ name, method, answer, body string }{
		{"length", "GET", head + "Content-Length: 5\r\n\r\nhello", "hello"},
		{"chunks", "POST", head + "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", "hello"},
		{"none", "GET", "HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n", ""},
		{"not modified", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nX-A: b\r\n\r\n", ""},
		{"HEAD", "HEAD", head + "Content-Length: 5\r\n\r\n", ""},
		{"interim", "GET", "HTTP/1.1 103 Early Hints\r\n\r\n" + head + "Content-Length: 5\r\n\r\nhello", "hello"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startLoops(t, 1, nil, nil)
			a := startActor(t, says("warm"))
			g.register(t, "echo", "a", a.url())
			g.warm(t, "/echo", 1)
			c := g.dial(t)
			for i := 1; i < len(row.answer); i++ {
				a.does(func(c net.Conn, _ *message) bool {
					io.WriteString(c, row.answer[:i])
					eventually(t, "a goroutine has it", func() bool { return g.atBackends() == 0 })
					_, err := io.WriteString(c, row.answer[i:])
					return err == nil
				})
				m := c.request(row.method, "/echo")
				if m.body != row.body || m.field("X-A") != "b" {
					t.Fatalf("split at %d: %q %q", i, m.head, m.body)
				}
			}
			if n := a.accepted.Load(); n > 2 {
				t.Errorf("%d connections to the instance", n)
			}
			c.Close()
			g.quiet(t, "echo", "a")
		})
	}
}

// Answers of all sizes are whole, with heads that grow and shrink on their way.
func TestAnswerSizes(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	a := startActor(t, says("warm"))
	g.register(t, "echo", "a", a.url())
	g.warm(t, "/echo", 1)
	c := g.dial(t)
	for _, lines := range []string{"", "X-A: " + strings.Repeat("a", 1500) + "\r\n", "Connection: x-a\r\nX-A: " + strings.Repeat("a", 5000) + "\r\n", "X-A: " + strings.Repeat("a", 30_000) + "\r\n"} {
		for _, size := range []int{0, 1, headroom - 1, headroom, headroom + 1, 16 << 10, firstRead - 100, firstRead - len("HTTP/1.1 200 OK\r\nContent-Length: 20480\r\n\r\n"), firstRead,
			firstRead + 1, maxWhole - 1, maxWhole, maxWhole + 1, spliceFrom, spliceFrom + 50_000, 1 << 20} {
			body := filler(size)
			for _, method := range []string{"GET", "HEAD"} {
				answer := fmt.Sprintf("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n", lines, size)
				want := ""
				if method == "GET" {
					answer += body
					want = body
				}
				a.does(writes(answer))
				if m := c.request(method, "/echo").want(t, 200); m.body != want || m.field("Content-Length") != fmt.Sprint(size) {
					t.Fatalf("%s: %d of %d bytes, or others, %s", method, len(m.body), size, m.field("Content-Length"))
				}
			}
		}
	}
	c.Close()
	g.quiet(t, "echo", "a")
}

// HTTP/1.0 on a loop.
func TestHTTP10OnALoop(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	a := startActor(t, echoing)
	g.register(t, "echo", "a", a.url())
	g.warm(t, "/echo", 1)
	c := g.dial(t)
	for range 3 {
		c.send("GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
		if m := c.read(false).want(t, 200); m.field("Connection") != "keep-alive" {
			t.Error(m.head)
		}
	}
	c.send("GET /echo HTTP/1.0\r\n\r\n")
	if m := c.read(false).want(t, 200); m.field("Connection") != "close" {
		t.Error(m.head)
	}
	c.closed()
	c = g.dial(t)
	if m := c.get("/echo", "Connection: close").want(t, 200); m.field("Connection") != "close" {
		t.Error(m.head)
	}
	c.closed()
	g.quiet(t, "echo", "a")
}

// A backend that ends its connection right behind an answer costs no request.
func TestAnswerAndEndTogether(t *testing.T) {
	for _, answer := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfine",
		"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine", "HTTP/1.0 200 OK\r\n\r\nfine"} {
		g := startLoops(t, 1, nil, nil)
		var n atomic.Int64
		a := startActor(t, func(c net.Conn, _ *message) bool { // every third answer is the last one of its connection
			if n.Add(1)%3 == 0 || !strings.Contains(answer, "1.1 200 OK\r\nContent") {
				io.WriteString(c, answer)
				return false
			}
			_, err := io.WriteString(c, answer)
			return err == nil
		})
		g.register(t, "echo", "a", a.url())
		c := g.dial(t)
		for range 200 {
			if m := c.get("/echo").want(t, 200); m.body != "fine" {
				t.Fatalf("%q", m.body)
			}
		}
		c.Close()

		g.quiet(t, "echo", "a")
		if s := g.DescribeInstance("echo", "a"); s.Failure != 0 || s.Success != 200 {
			t.Errorf("outcomes: %+v", s)
		}
	}
}

// A client that ends its stream while its request is at the backend gets the answer, and the connection ends: on the loop,
// and where a goroutine has it.
func TestEndOfStreamInMidRequest(t *testing.T) {
	for _, handed := range []bool{false, true} {
		t.Run(fmt.Sprint("handed over: ", handed), func(t *testing.T) {
			g := startLoops(t, 1, nil, nil)
			g.waits(time.Minute)
			if handed {
				g.waits(time.Millisecond)
			}
			a := startActor(t, echoing)
			g.register(t, "echo", "a", a.url())
			g.warm(t, "/echo", 1)
			for _, behind := range []string{"", "GET /echo/2 HTTP/1.1\r\nHost: x\r\n\r\n"} {
				gate := make(chan struct{})
				a.does(after(gate, echoing))
				c := g.dial(t)
				c.send("GET /echo/1 HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
				if handed {
					eventually(t, "a goroutine has it", func() bool { return g.handedOver() == 1 })
				} else {
					eventually(t, "the loop has sent it", func() bool { return g.atBackends() == 1 })
				}
				c.Conn.(*net.TCPConn).CloseWrite()
				eventually(t, "a goroutine has it", func() bool { return g.handedOver() == 1 })
				close(gate)
				if m := c.read(false).want(t, 200); m.body != "/echo/1 " {
					t.Error(m.body)
				}
				if behind != "" {
					if m := c.read(false).want(t, 200); m.body != "/echo/2 " {
						t.Error(m.body)
					}
				}
				c.closed()
			}
			g.quiet(t, "echo", "a")
		})
	}
}

// A client that resets its connection ends its request, at whatever stage that is; nobody is blamed.
func TestClientResets(t *testing.T) {
	for _, row := range []struct {
		name    string
		patient bool // the loop
		request string
		act     func(gate chan struct{}) act
		there   func(g *gateway, c *client) bool // as far as it shall come
	}{
		{"idle", true, "", func(chan struct{}) act { return echoing }, func(*gateway, *client) bool { return true }},
		{"half a head", true, "GET /ec", func(chan struct{}) act { return echoing }, func(g *gateway, _ *client) bool { return g.halfRead() == 1 }},
		{"on the loop", true, smallGet, func(gate chan struct{}) act { return after(gate, echoing) },
			func(g *gateway, _ *client) bool { return g.atBackends() == 1 }},
		{"handed over", false, smallGet, func(gate chan struct{}) act { return after(gate, echoing) },
			func(g *gateway, _ *client) bool { return g.handedOver() == 1 }},
		{"in mid answer", true, smallGet, func(gate chan struct{}) act {
			return func(c net.Conn, m *message) bool {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n")
				return after(gate, says("never"))(c, m)
			}
		}, func(_ *gateway, c *client) bool { _, err := c.r.Peek(1); return err == nil }},
		{"with half an answer read", true, smallGet, func(gate chan struct{}) act {
			return writes("HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + filler(50_000))
		},
			func(_ *gateway, c *client) bool { _, err := c.r.Peek(1); return err == nil }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startLoops(t, 1, nil, nil)
			g.waits(time.Minute)
			if !row.patient {
				g.waits(time.Millisecond)
			}
			a := startActor(t, echoing)
			g.register(t, "echo", "a", a.url())
			g.warm(t, "/echo", 1)
			for range 3 {
				gate := make(chan struct{})
				a.does(row.act(gate))
				c := g.dial(t)
				c.send(row.request)
				eventually(t, "so far", func() bool { return row.there(g, c) })
				c.Conn.(*net.TCPConn).SetLinger(0)
				c.Close()
				if row.name == "on the loop" {
					eventually(t, "a goroutine has it", func() bool { return g.atBackends() == 0 })
				}
				g.idle(t)
				close(gate)
			}
			a.does(echoing)
			g.dial(t).get("/echo").want(t, 200)
			if s := g.DescribeInstance("echo", "a"); s.Failure != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// A backend that resets: the answer is a clean one, and a request that must not be sent twice is not.
func TestBackendResets(t *testing.T) {
	for _, row := range []struct {
		name      string
		first     string // what it sends before
		get, post int    // the status
	}{
		{"before it answers", "", 200, 502},
		{"in the head", "HTTP/1.1 200 O", 502, 502},
		{"behind the head", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", 502, 502},
		{"in the body", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", 502, 502},
		{"behind the answer", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine", 200, 200},
	} {
		for _, how := range []string{"reset", "end"} {
			t.Run(row.name+", "+how, func(t *testing.T) {
				t.Parallel()
				g := startLoops(t, 1, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 100} }, nil)
				g.waits(time.Minute)
				a := startActor(t, says("fine"))
				g.register(t, "echo", "a", a.url())
				var posts atomic.Int64
				for _, method := range []string{"GET", "POST"} {
					for range 10 {
						g.warm(t, "/echo", 1)
						var resets atomic.Bool
						var began atomic.Pointer[time.Time] // when the first bytes of an answer that breaks off were sent
						resets.Store(true)
						a.does(func(c net.Conn, m *message) bool {
							if strings.HasPrefix(m.head, "POST") {
								posts.Add(1)
							}
							if !resets.CompareAndSwap(true, false) {
								return says("fine")(c, m)
							}
							if row.first != "" {
								now := time.Now()
								began.Store(&now)
								io.WriteString(c, row.first)
								if row.name != "behind the answer" {
									eventually(t, "the gateway has that", func() bool { return g.atBackends() == 0 })
								}
							}
							if how == "reset" {
								c.(*net.TCPConn).SetLinger(0)
							}
							return false
						})
						c := g.dial(t)
						c.send(method + " /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
						want := row.get
						if method == "POST" {
							want = row.post
						}
						m, err := readMessage(c.r, false)
						switch {
						case err != nil && m != nil && began.Load() != nil && time.Since(*began.Load()) > wholeTimeout/2:
							// On a busy machine the end came late, and the head was passed on before.
							c = g.dial(t)
						case err != nil:
							t.Fatal(err)
						case want == 200 && m.body != "fine":
							t.Fatalf("%q", m.body)
						default:
							m.want(t, want)
						}
						a.does(says("fine"))
						c.get("/echo").want(t, 200) // it goes on
						c.Close()
					}
				}
				if n := posts.Load(); n != 10 {
					t.Errorf("10 POSTs came as %d", n)
				}
				g.quiet(t, "echo", "a")
			})
		}
	}
}

// A connection that the backend has closed while it was idle costs no request, of whatever method: nothing was written.
func TestIdleConnectionClosedByBackend(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		var posts atomic.Int64
		a := startActor(t, func(c net.Conn, m *message) bool {
			if strings.HasPrefix(m.head, "POST") {
				posts.Add(1)
			}
			return echoing(c, m)
		})
		g.register(t, "echo", "a", a.url())
		for i := range 30 {
			g.warm(t, "/echo", 1)
			a.mu.Lock()
			for c := range a.conns {
				if i%2 == 0 {
					c.(*net.TCPConn).SetLinger(0)
				}
				c.Close() // over the loopback the gateway's end knows at once
			}
			a.mu.Unlock()
			c := g.dial(t)
			c.post("/echo", "hello").want(t, 200)
			c.get("/echo").want(t, 200)
			c.Close()
		}
		if n := posts.Load(); n != 30 {
			t.Errorf("30 POSTs came as %d", n)
		}
		g.quiet(t, "echo", "a")
		if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
			t.Errorf("outcomes: %+v", s)
		}
	})
}

// GETs race with backends that close connections which have served requests: none is lost.
func TestIdleConnectionsClosedAtAnyTime(t *testing.T) {
	g := startLoops(t, 2, nil, nil)
	var closing sync.WaitGroup
	t.Cleanup(closing.Wait) // when the actor has ended
	a := startActor(t, func(c net.Conn, m *message) bool {
		ok := echoing(c, m)
		if n := rand.IntN(5); n < 2 {
			closing.Go(func() {
				time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
				if n == 0 {
					c.(*net.TCPConn).SetLinger(0)
				}
				c.Close()
			})
		}
		return ok
	})
	g.register(t, "echo", "a", a.url())
	var wg sync.WaitGroup
	for range 4 {
		c := g.dial(t)
		wg.Go(func() {
			for i := range 500 {
				path := fmt.Sprint("/echo/", i)
				if m, err := exchangeOn(c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil || m.body != path+" " {
					t.Errorf("%d: %q %q, %v", i, m.head, m.body, err)
					return
				}
			}
			c.Close()
		})
	}
	wg.Wait()
	g.quiet(t, "echo", "a")
}

// exchangeOn sends a request and reads the answer, in any goroutine.
func exchangeOn(c *client, request string) (*message, error) {
	if _, err := io.WriteString(c.Conn, request); err != nil {
		return &message{}, err
	}
	return readMessage(c.r, strings.HasPrefix(request, "HEAD"))
}

// Bytes of a backend that nobody asked for are answers to nobody: neither with an answer nor later.
func TestUnaskedBytes(t *testing.T) {
	const extra = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint("late: ", late), func(t *testing.T) {
			g := startLoops(t, 1, nil, nil)
			a := startActor(t, says("warm"))
			g.register(t, "echo", "a", a.url())
			g.warm(t, "/echo", 1)
			c := g.dial(t)
			for i := range 50 {
				body := fmt.Sprint("right ", i)
				answer := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				sent := make(chan struct{})
				next := make(chan struct{})
				a.does(func(c net.Conn, _ *message) bool {
					defer close(sent)
					if !late {
						io.WriteString(c, answer+extra)
						return true
					}
					io.WriteString(c, answer)
					<-next
					io.WriteString(c, extra)
					return true
				})
				method := []string{"GET", "POST"}[i%2]
				if m := c.request(method, "/echo").want(t, 200); m.body != body {
					t.Fatalf("%d: %q", i, m.body)
				}
				close(next)
				<-sent
			}
			c.Close()
			g.quiet(t, "echo", "a")
			if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// A client that reads nothing while its requests are answered holds up nobody, and gets the rest when it reads.
func TestClientThatReadsNothing(t *testing.T) {
	for _, size := range []int{2 << 10, 16 << 10, 60 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			g := startLoops(t, 1, nil, nil)
			body := filler(size)
			a := startActor(t, says(body))
			g.register(t, "echo", "a", a.url())
			g.warm(t, "/echo", 1)
			requests := 8 << 20 / size
			c := g.dial(t)
			go func() {
				for range requests / 100 {
					if _, err := io.WriteString(c.Conn, strings.Repeat(smallGet, 100)); err != nil {
						return
					}
				}
			}()
			eventually(t, "its socket is full", func() bool { return g.handedOver() == 1 })
			other := g.dial(t)
			for range 100 {
				began := time.Now()
				if m := other.get("/echo").want(t, 200); m.body != body {
					t.Fatal("another body")
				}
				if d := time.Since(began); d > 2*time.Second {
					t.Errorf("another client waited for %v", d)
				}
			}
			for i := range requests / 100 * 100 {
				if m := c.read(false).want(t, 200); m.body != body {
					t.Fatalf("answer %d is another, of %d bytes", i, len(m.body))
				}
			}
			c.Close()
			other.Close()
			g.quiet(t, "echo", "a")
		})
	}
}

// An answer that comes late is a goroutine's, and the connection goes back to its loop.
func TestHandedOverAndBack(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		if g.cfg().slowAfter != slowAfter {
			t.Errorf("a loop waits %v", g.cfg().slowAfter)
		}
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		g.warm(t, "/echo", 1)
		c := g.dial(t)
		for range 2 {
			gate := make(chan struct{})
			a.does(after(gate, echoing))
			began := time.Now()
			c.send("POST /echo/late HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
			eventually(t, "the loop has sent it", func() bool { return g.atBackends() == 1 })
			eventually(t, "a goroutine has it", func() bool { return g.handedOver() == 1 && g.atBackends() == 0 })
			if d := time.Since(began); d < slowAfter {
				t.Errorf("handed over after %v", d)
			}
			close(gate)
			if m := c.read(false).want(t, 200); m.body != "/echo/late hi" {
				t.Error(m.body)
			}
			a.does(echoing)
			eventually(t, "it is the loop's again", func() bool { return g.handedOver() == 0 })
			c.get("/echo").want(t, 200)
			if n := g.handedOver(); n != 0 {
				t.Errorf("goroutines have %d", n)
			}
		}
		c.Close()
		g.quiet(t, "echo", "a")
	})
}

// Many connections of all kinds at once: what is answered is right, and nothing is left behind.
func TestManyConnections(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 1 << 20}; logRequests(cfg) }, nil)
		g.waits(3 * time.Millisecond)
		var actors []*actor
		for i := range 3 {
			a := startActor(t, func(c net.Conn, m *message) bool {
				switch target := strings.Fields(m.head)[1]; {
				case strings.Contains(target, "slow"):
					time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
				case strings.Contains(target, "split"):
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-")
					time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
					_, err := fmt.Fprintf(c, "Length: %d\r\n\r\n%s %s", len(target)+1+len(m.body), target, m.body)
					return err == nil
				case strings.Contains(target, "close"):
					echoing(c, m)
					return false
				}
				return echoing(c, m)
			})
			g.register(t, "echo", fmt.Sprint(i), a.url())
			actors = append(actors, a)
		}
		connections := 1000
		if raceDetector || testing.Short() {
			connections = 300
		}
		var wg sync.WaitGroup
		var answered atomic.Int64
		for i := range connections {
			c := g.dial(t)
			wg.Go(func() {
				defer c.Close()
				for j := range 6 {
					kind := []string{"fast", "slow", "split", "fast", "close", "fast"}[(i+j)%6]
					path := fmt.Sprintf("/echo/%s/%d/%d", kind, i, j)
					request, want := "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n", path+" "
					if kind == "split" || kind == "slow" {
						request, want = "PUT "+path+" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", path+" hello"
					}
					if i%10 == 9 && j == 3 { // some leave in the middle
						io.WriteString(c.Conn, request[:rand.IntN(len(request)+1)])
						if i%20 == 9 {
							c.Conn.(*net.TCPConn).SetLinger(0)
						}
						return
					}
					m, err := exchangeOn(c, request)
					if err != nil || m.body != want {
						t.Errorf("%s: %q %q, %v", path, m.head, m.body, err)
						return
					}
					answered.Add(1)
				}
			})
			if i%100 == 99 {
				g.sound(t)
			}
		}
		wg.Wait()
		g.quiet(t, "echo", "0", "1", "2")
		sum := uint64(0)
		for i := range actors {
			s := g.DescribeInstance("echo", fmt.Sprint(i))
			if s.Failure != 0 {
				t.Errorf("outcomes: %+v", s)
			}
			sum += s.Success
		}
		if n := uint64(answered.Load()); sum < n || sum > n+uint64(connections)/10 {
			t.Errorf("%d successes for %d answers", sum, n)
		}
	})
}

// A request is told of once, wherever it was served.
func TestLinesOfRequests(t *testing.T) {
	g := startLoops(t, 2, logRequests, nil)
	g.waits(3 * time.Millisecond)
	var resets atomic.Bool
	a := startActor(t, func(c net.Conn, m *message) bool {
		switch {
		case strings.Contains(m.head, "/slow"):
			time.Sleep(10 * time.Millisecond)
		case strings.Contains(m.head, "/reset") && resets.CompareAndSwap(true, false):
			c.(*net.TCPConn).SetLinger(0)
			return false
		case strings.Contains(m.head, "/large"):
			return says(filler(100_000))(c, m)
		}
		return echoing(c, m)
	})
	g.register(t, "echo", "a", a.url())
	c := g.dial(t)
	want := 0
	for range 10 {
		c.get("/echo/fast").want(t, 200)
		c.get("/echo/slow").want(t, 200)
		resets.Store(true)
		c.get("/echo/reset").want(t, 200) // two attempts
		c.get("/echo/large").want(t, 200)
		c.post("/echo/post", "body").want(t, 200)
		c.get("/nowhere").want(t, 404)
		c.send(strings.Repeat(smallGet, 3))
		for range 3 {
			c.read(false).want(t, 200)
		}
		resets.Store(true)
		c.post("/echo/reset", "body").want(t, 502)
		want += 10
	}
	c.Close()
	g.quiet(t, "echo", "a")
	if n := g.logged("msg=request"); n != want {
		t.Errorf("%d lines for %d requests", n, want)
	}
	for _, row := range []struct {
		n     int
		words []string
	}{
		{10, []string{"/echo/fast", "status=200", "attempts=1", "instance=a"}}, {10, []string{"/echo/slow", "status=200", "attempts=1"}},
		{10, []string{"method=GET", "/echo/reset", "status=200"}}, {10, []string{"method=POST", "/echo/reset", "status=502"}},
		{10, []string{"/nowhere", "status=404"}}, {10, []string{"method=POST", "/echo/post", "status=200"}},
	} {
		if n := g.logged(append(row.words, "msg=request")...); n != row.n {
			t.Errorf("%d lines with %v, want %d", n, row.words, row.n)
		}
	}
}

// Shutdown finds connections wherever they are: those that are idle end, requests under way are answered, and one that is
// in the middle of its head is cut.
func TestShutdownOfLoops(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		g.waits(time.Minute)
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		g.warm(t, "/echo", 1)
		idle, fresh, half := g.dial(t), g.dial(t), g.dial(t)
		idle.get("/echo").want(t, 200)
		gate := make(chan struct{})
		a.does(after(gate, echoing))
		var onLoop []*client
		for range 3 {
			c := g.dial(t)
			c.send("GET /echo/loop HTTP/1.1\r\nHost: x\r\n\r\n")
			onLoop = append(onLoop, c)
		}
		eventually(t, "on loops", func() bool { return g.atBackends() == 3 })
		handed := g.dial(t)
		handed.send("POST /echo/handed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
		half.send("GET /echo HT")
		eventually(t, "with goroutines", func() bool {
			return g.handedOver() == 1 && g.halfRead() == 1 && g.DescribeInstance("echo", "a").InFlight == 4
		})

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		cut := make(chan int)
		go func() { cut <- g.Shutdown(ctx) }()
		idle.closed()
		fresh.closed()
		eventually(t, "all with goroutines", func() bool { return g.atBackends() == 0 && g.handedOver() == 5 })
		close(gate)
		for _, c := range append(onLoop, handed) {
			if m := c.read(false).want(t, 200); m.field("Connection") != "close" {
				t.Error(m.head)
			}
			c.closed()
		}
		cancel()
		if n := <-cut; n != 1 {
			t.Errorf("%d were cut, want the half one", n)
		}
		if rest, _ := io.ReadAll(half.r); len(rest) > 0 {
			t.Errorf("the half one got %q", rest)
		}
		g.Close()
		if s := g.DescribeInstance("echo", "a"); s.InFlight != 0 || s.Failure != 0 {
			t.Errorf("outcomes: %+v", s)
		}
	})
}

// Shutdown while instances are dialled: the requests are answered.
func TestShutdownInADial(t *testing.T) {
	for range 20 {
		g := startLoops(t, 2, nil, nil)
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		var clients []*client
		for range 8 {
			clients = append(clients, g.dial(t))
		}
		clients[0].get("/echo").want(t, 200) // all were accepted
		var wg sync.WaitGroup
		for _, c := range clients {
			wg.Go(func() {
				m, err := exchangeOn(c, smallGet)
				if m.head != "" && (err != nil || m.status() != 200) {
					t.Errorf("%q, %v", m.head, err)
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Microsecond)
		if cut := g.Shutdown(t.Context()); cut != 0 {
			t.Errorf("%d were cut", cut)
		}
		wg.Wait()
		g.Close()
	}
}

// later moves the clocks of the wheels.
func (g *gateway) later(d time.Duration) {
	g.onLoops(func(w *worker) {
		w.began = w.began.Add(-d)
		w.loop.Within(0)
	})
	g.onLoops(func(*worker) {}) // the tick has come
}

// A connection that sends nothing is closed after 30 s, one between requests after 75 s, and not before.
func TestTimeoutsOfTheWheel(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	a := startActor(t, echoing)
	g.register(t, "echo", "a", a.url())
	open := func(c *client) bool {
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		defer c.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := c.r.Peek(1)
		return isTimeout(err)
	}
	accepted := func(n int) {
		t.Helper()
		eventually(t, "accepted", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.conns) == n })
	}
	silent := g.dial(t)
	accepted(1)
	g.later(firstByteTimeout - time.Second)
	if !open(silent) {
		t.Fatal("closed early")
	}
	kept := g.dial(t)
	kept.get("/echo").want(t, 200)
	g.later(4 * time.Second)
	silent.closed()
	g.later(firstByteTimeout) // the bucket in which it was first
	if !open(kept) {
		t.Fatal("closed early")
	}
	g.later(idleTimeout - firstByteTimeout - 6*time.Second)
	if !open(kept) {
		t.Fatal("closed early")
	}
	kept.get("/echo").want(t, 200) // begins anew
	g.later(idleTimeout - time.Second)
	if !open(kept) {
		t.Fatal("closed early")
	}
	// What is at a backend, or with a goroutine, is not idle, for however long.
	gate := make(chan struct{})
	a.does(after(gate, echoing))
	g.waits(time.Minute)
	kept.send(smallGet)
	half := g.dial(t)
	half.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nh")
	eventually(t, "both under way", func() bool { return g.handedOver() == 1 && g.atBackends() == 1 })
	for range 10 {
		g.later(100 * time.Second)
		g.sound(t)
	}
	close(gate)
	kept.read(false).want(t, 200)
	half.send("i")
	half.read(false).want(t, 200)
	eventually(t, "both are the loop's", func() bool { return g.handedOver() == 0 })
	g.later(idleTimeout - time.Second)
	if !open(kept) || !open(half) {
		t.Fatal("closed early")
	}
	g.later(3 * time.Second)
	kept.closed()
	half.closed()
	g.quiet(t, "echo", "a")
}

// The wheel loses nobody and closes nobody early, whatever happens in whatever order.
func TestWheel(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	g.register(t, "echo", "a", startActor(t, echoing).url())
	random := rand.New(rand.NewPCG(1, 2))
	type known struct {
		*client
		expires time.Duration // earliest
	}
	var now time.Duration // by the wheel; real time runs on beside it, by less than slack
	const slack = 10 * time.Second
	var clients []*known
	for range 300 {
		switch n := random.IntN(6); {
		case n < 2 || len(clients) == 0:
			c := &known{g.dial(t), now + firstByteTimeout}
			clients = append(clients, c)
			eventually(t, "accepted", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.conns) == len(clients) })
		case n < 4:
			c := clients[random.IntN(len(clients))]
			c.get("/echo").want(t, 200)
			c.expires = now + idleTimeout
		case n == 4:
			i := random.IntN(len(clients))
			clients[i].Close()
			clients = slices.Delete(clients, i, i+1)
			eventually(t, "gone", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.conns) == len(clients) })
		default:
			d := time.Duration(random.IntN(50)) * time.Second
			if random.IntN(10) == 0 {
				d = 300 * time.Second
			}
			now += d
			g.later(d)
			g.mu.Lock()
			open := map[string]bool{}
			for c := range g.conns {
				open[c.sock.RemoteAddr().String()] = true
			}
			g.mu.Unlock()
			var left []*known
			for _, c := range clients {
				is := open[c.LocalAddr().String()]
				if !is && now < c.expires-slack || is && now > c.expires+3*time.Second+slack {
					t.Errorf("at %v one that expires at %v is open: %v", now, c.expires, is)
				}
				if is {
					left = append(left, c)
				} else {
					c.closed()
				}
			}
			clients = left
		}
		g.sound(t)
	}
	for _, c := range clients {
		c.Close()
	}
	g.quiet(t, "echo", "a")
}

// An instance that leaves while loops have requests there still answers them; its connections end then.
func TestInstanceLeavesLoops(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, nil)
		g.waits(time.Minute)
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		for range 5 {
			g.warm(t, "/echo", 1)
			gate := make(chan struct{})
			a.does(after(gate, echoing))
			var clients []*client
			for range 6 {
				c := g.dial(t)
				c.send(smallGet)
				clients = append(clients, c)
			}
			eventually(t, "at the backend", func() bool { return g.atBackends() == 6 })
			g.unregister(t, "echo", "a")
			eventually(t, "idle connections closed", func() bool { return a.open() == 6 })
			close(gate)
			for _, c := range clients {
				c.read(false).want(t, 200)
				c.get("/echo").want(t, 503)
				c.Close()
			}
			eventually(t, "all connections closed", func() bool { return a.open() == 0 })
			a.does(echoing)
			g.register(t, "echo", "a", a.url())
		}
		g.quiet(t, "echo", "a")
	})
}

// Answers on loops trip the breaker, and what comes then goes elsewhere.
func TestBreakerOnLoops(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 3, OpenFor: long} }, nil)
	a, b := startActor(t, says("a")), startActor(t, says("b"))
	g.register(t, "echo", "a", a.url())
	g.register(t, "echo", "b", b.url())
	g.warm(t, "/echo", 2)
	a.does(answers(503))
	c := g.dial(t)
	failed := 0
	for range 40 {
		if c.get("/echo").status() == 503 {
			failed++
		}
	}
	g.awaitBreaker(t, "a", "open")
	if s := g.DescribeInstance("echo", "a"); failed < 3 || s.Failure != uint64(failed) || s.InFlight != 0 {
		t.Errorf("%d failures seen, %+v", failed, s)
	}
	for range 10 {
		if m := c.get("/echo").want(t, 200); m.body != "b" {
			t.Error(m.body)
		}
	}
	c.Close()
	g.quiet(t, "echo", "a", "b")
}

// A panic on a loop costs its request, and nobody else's.
func TestPanicsOnLoops(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, nil, func(r *Request) string {
			if strings.Contains(string(r.Path), "bug") {
				panic("a bug in a RouteFunc")
			}
			return "echo"
		})
		g.waits(time.Minute)
		a := startActor(t, echoing)
		g.register(t, "echo", "a", a.url())
		g.warm(t, "/echo", 1)
		gate := make(chan struct{})
		a.does(after(gate, echoing))
		others := []*client{g.dial(t), g.dial(t), g.dial(t)}
		for _, c := range others {
			c.send(smallGet)
		}
		eventually(t, "others at the backend", func() bool { return g.atBackends() == 3 })
		a.does(echoing)
		bug := "GET /bug HTTP/1.1\r\nHost: x\r\n\r\n"
		for i, before := range []string{"", smallGet, "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"} {
			for _, together := range []bool{true, false} {
				c := g.dial(t)
				if together {
					c.send(before + bug)
				} else {
					c.send(before)
				}
				if before != "" {
					c.read(false).want(t, 200)
				}
				if !together {
					c.send(bug)
				}
				if m := c.read(false); m.status() != 500 {
					t.Fatalf("behind %d, together %v: %q", i, together, m.head)
				}
				c.closed()
				c.Close()
			}
		}
		if n := g.logged("panic in a request", "a bug in a RouteFunc", "RouteFunc"); n != 6 {
			t.Errorf("%d panics logged", n)
		}
		close(gate)
		for _, c := range others {
			c.read(false).want(t, 200)
			c.Close()
		}
		g.quiet(t, "echo", "a")
	})
}

// A panic where an answer has come on a loop costs that request and that connection, and is told of once.
func TestPanicInAnAnswer(t *testing.T) {
	var panics atomic.Bool
	handler := &panickingLog{panics: &panics}
	g := startLoops(t, 1, func(cfg *Config) { cfg.Log = handler.logger(); logRequests(cfg) }, nil)
	g.waits(time.Minute)
	a := startActor(t, echoing)
	g.register(t, "echo", "a", a.url())
	for range 10 {
		g.warm(t, "/echo", 1)
		c := g.dial(t)
		panics.Store(true) // in the line of the request, which is written behind the answer
		c.get("/echo/bug").want(t, 200)
		c.closed()
		if panics.Load() {
			t.Fatal("nothing has panicked")
		}
	}
	g.quiet(t, "echo", "a")
}

// A panic in the middle of a body that ends with the connection does not look like its end.
func TestPanicInABody(t *testing.T) {
	var panics atomic.Bool
	handler := &panickingLog{panics: &panics}
	g := startGateway(t, func(cfg *Config) { cfg.Log = handler.logger() }, nil)
	gate := make(chan struct{})
	o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		o.next(r)
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhello")
		<-gate
		c.(*net.TCPConn).SetLinger(0)
	})
	g.register(t, "echo", "a", o.url())
	c := g.dial(t)
	c.send("GET /echo/bug HTTP/1.0\r\n\r\n")
	for line := ""; line != "hello"; {
		b, err := c.r.ReadByte()
		if err != nil {
			t.Fatal(err)
		}
		if line += string(b); b == '\n' {
			line = ""
		}
	}
	panics.Store(true) // in the line that says that the response was cut
	close(gate)
	if _, err := c.r.ReadByte(); !errors.Is(err, syscall.ECONNRESET) || panics.Load() {
		t.Errorf("%v, no panic: %v", err, panics.Load())
	}
	g.idle(t)
}

// A TLS handshake that fails leaves no connection.
func TestFailedHandshakeCloses(t *testing.T) {
	var ended atomic.Int64
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		io.WriteString(c, "this is no TLS, but long enough for a record of it\r\n")
		io.Copy(io.Discard, r)
		ended.Add(1)
	})
	g := startGateway(t, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 100} }, nil)
	g.register(t, "echo", "a", "https://"+o.Addr().String())
	for range 5 {
		g.dial(t).get("/echo").refused(t, errTLS)
	}
	eventually(t, "all closed", func() bool { return ended.Load() == 5 })
}

// A connection that is accepted while the loops end is closed.
func TestAcceptedTooLate(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	ln := listen(t)
	accept, closer, err := g.acceptor(ln)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	g.Shutdown(t.Context())
	g.Close()
	if err := accept(); err != nil {
		t.Fatal(err)
	}
	near.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := near.Read(make([]byte, 1)); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d, %v", n, err)
	}
}

// An idle connection holds nothing but itself, wherever its last request was served.
func TestIdleConnectionsAreSmall(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	a := startActor(t, echoing)
	g.register(t, "echo", "a", a.url())
	c := g.dial(t)
	for _, request := range []string{smallGet, "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + filler(60_000)} {
		c.send(request)
		c.read(false).want(t, 200)
		eventually(t, "it is the loop's", func() bool { return g.handedOver() == 0 })
		g.sound(t)
		g.onLoops(func(w *worker) {
			for _, bucket := range w.wheel {
				for _, c := range bucket {
					if c.workspace != nil {
						t.Error("it has a workspace")
					}
				}
			}
		})
	}
}

// panickingLog is a log that panics at the next line that names a path with a bug, once.
type panickingLog struct {
	slog.Handler
	panics *atomic.Bool
}

func (l *panickingLog) logger() *slog.Logger {
	l.Handler = slog.DiscardHandler
	return slog.New(l)
}

func (l *panickingLog) Enabled(context.Context, slog.Level) bool { return true }

func (l *panickingLog) Handle(_ context.Context, r slog.Record) error {
	bug := false
	r.Attrs(func(a slog.Attr) bool {
		bug = bug || strings.Contains(a.Value.String(), "/bug")
		return true
	})
	if bug && l.panics.CompareAndSwap(true, false) {
		panic("a bug in a log")
	}
	return nil
}

// backlog is how many connections of a listener wait in the kernel to be accepted.
func backlog(t *testing.T, port int) int {
	t.Helper()
	text, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(text), "\n") {
		var n, at, sent, waiting int
		var local, remote string
		if _, err := fmt.Sscanf(line, "%d: %s %s %x %x:%x", &n, &local, &remote, &at, &sent, &waiting); err != nil {
			continue
		}
		if _, hex, _ := strings.Cut(local, ":"); at == 0x0a && hex == fmt.Sprintf("%04X", port) { // LISTEN
			return waiting
		}
	}
	t.Fatalf("nobody listens on port %d", port)
	return 0
}

// Of many that connect at once few are taken over at a time, so that those who are there already have their turns: what the loops
// have not got to yet stays in the kernel. All are served in the end, or let go when the gateway ends meanwhile.
func TestManyConnectAtOnce(t *testing.T) {
	const many = 100
	g := startLoops(t, 2, nil, nil)
	g.register(t, "echo", "a", startActor(t, says("a")).url())
	g.do(t, smallGet).want(t, 200) // it listens, and has accepted
	port := netip.MustParseAddrPort(g.addr).Port()
	busy := func() (end func()) { // the loop that does not watch the listener
		release := make(chan struct{})
		g.group.Loops[0].Do(func() { <-release })
		return sync.OnceFunc(func() { close(release) })
	}
	crowd := func() []*client {
		all := make([]*client, many)
		for i := range all {
			all[i] = g.dial(t)
			all[i].send(smallGet)
		}
		stacks := make([]byte, 1<<20)
		eventually(t, "accepting waits for the busy loop", func() bool {
			return regexp.MustCompile(`\[chan send\]:\n[^\n]*\.\(\*Proxy\)\.acceptor`).Match(stacks[:runtime.Stack(stacks, true)])
		})
		if n := backlog(t, int(port)); n < many-2*acceptTurn-1 || n > many-acceptTurn {
			t.Errorf("%d of %d wait in the kernel", n, many)
		}
		return all
	}
	end := busy()
	defer end()
	all := crowd()
	end()
	for _, c := range all {
		c.read(false).want(t, 200)
		c.Close()
	}

	end = busy()
	defer end()
	all = crowd()
	ended := make(chan int)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go func() { ended <- g.Shutdown(ctx) }()
	end()
	if cut := <-ended; cut != 0 || ctx.Err() != nil {
		t.Errorf("%d cut, %v", cut, ctx.Err())
	}
	for _, c := range all {
		io.Copy(io.Discard, c.r) // to its end: an answer, or none
	}
}

// A server of another kind can be served by the loops: it has its deadlines, hears of clients that leave, and ends.
func TestWatched(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Loops = 2 }, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	left := make(chan error, 1)
	server := &http.Server{ReadHeaderTimeout: 200 * time.Millisecond, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			<-r.Context().Done()
			left <- r.Context().Err()
			return
		}
		io.Copy(w, r.Body)
	}), ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
		if _, ok := nc.(*loop.Socket); ok != loop.Supported {
			t.Errorf("a %T", nc)
		}
		return ctx
	}}
	served := make(chan error, 1)
	watched, err := g.Watched(ln)
	if err != nil {
		t.Fatal(err)
	}
	go func() { served <- server.Serve(watched) }()
	url := "http://" + ln.Addr().String()
	body := strings.Repeat("x", 1<<20)
	for range 20 {
		resp, err := http.Post(url, "text/plain", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(got) != body {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	slow, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	slow.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := slow.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	if n, err := slow.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("half a head: %d, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url+"/wait", nil)
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	select {
	case <-left:
	case <-time.After(10 * time.Second):
		t.Error("nobody hears that the client has left")
	}
	http.DefaultClient.CloseIdleConnections()
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
}
