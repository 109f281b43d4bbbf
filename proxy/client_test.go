package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// thinking is an origin that tells of each request, and of its connection's end, and answers when it is told to.
type thinking struct {
	*origin
	came, left chan struct{}
	answer     chan string
}

func startThinking(t *testing.T) *thinking {
	th := &thinking{came: make(chan struct{}, 10), left: make(chan struct{}, 10), answer: make(chan string)}
	th.origin = startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		over := make(chan struct{})
		defer close(over)
		go func() {
			for {
				select {
				case answer := <-th.answer:
					io.WriteString(c, answer)
				case <-over:
					return
				}
			}
		}()
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				break
			}
			if line == "\r\n" {
				th.came <- struct{}{}
			}
		}
		th.left <- struct{}{}
	})
	return th
}

// within fails the test unless something happens within ten times what is promised.
func within(t *testing.T, promise time.Duration, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(10 * promise):
		t.Fatalf("%s: not within %v", what, 10*promise)
	}
}

const halfAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhello"

// A client that ends its stream behind its request may only have ended its half: it has a second for the answer.
func TestClientEndsItsHalf(t *testing.T) {
	end := func(c *client) { c.Conn.(*net.TCPConn).CloseWrite() }
	for _, row := range []struct {
		name   string
		ignore bool // --abort-on-fin off
		wait   time.Duration
		served bool
	}{
		{"answer at once", false, 0, true},
		{"answer within a second", false, 400 * time.Millisecond, true},
		{"no answer", false, time.Hour, false},
		{"answer later, waited for", true, 1700 * time.Millisecond, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			th := startThinking(t)
			g := startGateway(t, func(cfg *Config) { cfg.IgnoreFIN = row.ignore; logRequests(cfg) }, nil)
			g.register(t, "echo", "1", th.url())
			c := g.dial(t)
			c.send(toHTTP11)
			end(c)
			<-th.came
			if row.served {
				time.Sleep(row.wait)
				th.answer <- "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
				if m := c.read(false); m.body != "hello" {
					t.Error(m)
				}
				c.closed()
			} else {
				began := time.Now()
				within(t, finGrace, "the backend is let go", th.left)
				if took := time.Since(began); took < finGrace/2 {
					t.Errorf("after %v", took)
				}
				eventually(t, "the log says it", func() bool { return g.logged("status=499") == 1 })
			}
			g.idle(t)
			if s := g.DescribeInstance("echo", "1"); s.Failure != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
	t.Run("a stream that began in time", func(t *testing.T) {
		t.Parallel()
		th := startThinking(t)
		g := startGateway(t, nil, nil)
		g.register(t, "echo", "1", th.url())
		c := g.dial(t)
		c.send(toHTTP11)
		end(c)
		<-th.came
		th.answer <- halfAnswer
		if m := c.headOf(); m.status() != 200 {
			t.Error(m)
		}
		within(t, finGrace, "the backend is let go", th.left)
		g.idle(t)
	})
	t.Run("a stream, waited for", func(t *testing.T) {
		t.Parallel()
		th := startThinking(t)
		g := startGateway(t, func(cfg *Config) { cfg.IgnoreFIN = true }, nil)
		g.register(t, "echo", "1", th.url())
		c := g.dial(t)
		c.send(toHTTP11)
		end(c)
		<-th.came
		th.answer <- "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
		time.Sleep(finGrace + finGrace/2)
		th.answer <- "0\r\n\r\n"
		if m := c.read(false); m.body != "hello" {
			t.Error(m)
		}
		g.idle(t)
	})
	t.Run("an upload that nobody reads, with bytes on their way", func(t *testing.T) {
		t.Parallel()
		came, over := make(chan struct{}), make(chan struct{})
		stuck := startOrigin(t, func(_ *origin, c net.Conn, _ *bufio.Reader) {
			c.(*net.TCPConn).SetReadBuffer(4 << 10)
			close(came)
			<-over
		})
		defer close(over)
		g := startGateway(t, nil, nil)
		g.register(t, "echo", "1", stuck.url())
		c := g.dial(t)
		fmt.Fprintf(c, "PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", 64<<20)
		<-came
		c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		io.WriteString(c, filler(400<<10))
		end(c)
		eventually(t, "the backend is let go", func() bool { return g.DescribeInstance("echo", "1").InFlight == 0 })
		c.Close()
		g.idle(t)
	})
}

// A client whose connection is lost is gone at once, and so is one that ends its stream in the midst of a long response.
func TestClientIsGone(t *testing.T) {
	for _, row := range []struct {
		name   string
		ignore bool
		answer string
		runs   time.Duration
		reset  bool
	}{
		{"reset before the head", false, "", 0, true},
		{"reset before the head, FIN ignored", true, "", 0, true},
		{"reset in half a head", false, "HTTP/1.1 200 OK\r\nX", 0, true},
		{"reset in a stream", false, halfAnswer, 0, true},
		{"end in a stream", false, halfAnswer, finGrace + 100*time.Millisecond, false},
		{"end in chunks", false, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", finGrace + 100*time.Millisecond, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			th := startThinking(t)
			g := startGateway(t, func(cfg *Config) { cfg.IgnoreFIN = row.ignore; logRequests(cfg) }, nil)
			g.register(t, "echo", "1", th.url())
			c := g.dial(t)
			c.send(toHTTP11)
			<-th.came
			if row.answer != "" {
				th.answer <- row.answer
			}
			if strings.Contains(row.answer, "\r\n\r\n") {
				c.headOf()
				if _, err := c.r.ReadByte(); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(row.runs)
			if row.reset {
				c.Conn.(*net.TCPConn).SetLinger(0)
				c.Close()
			} else {
				c.Conn.(*net.TCPConn).CloseWrite()
			}
			within(t, 50*time.Millisecond, "the backend is let go", th.left)
			eventually(t, "the log says it", func() bool { return g.logged("status=499") == 1 })
			c.Close()
			g.idle(t)
			if s := g.DescribeInstance("echo", "1"); s.Failure != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// Interim responses reach clients that know them when they come, not with the response that they announce.
func TestInterimResponses(t *testing.T) {
	th := startThinking(t)
	g := startGateway(t, func(cfg *Config) { cfg.Loops = 1 }, nil) // one pool: one connection to the backend
	g.register(t, "echo", "1", th.url())
	c := g.dial(t)
	c.send(toHTTP11)
	<-th.came
	for _, interim := range []string{
		"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", "HTTP/1.1 102 Processing\r\n\r\n", "HTTP/1.1 199 \r\nX-A: b\r\n\r\n",
	} {
		th.answer <- interim
		if m := c.next(false); m.head != interim {
			t.Errorf("%q, want %q", m.head, interim)
		}
	}
	th.answer <- "HTTP/1.1 103 x\r\nConnection: x-hop, close\r\nX-Hop: a\r\nX-End: b\r\n\r\n"
	if m := c.next(false); m.head != "HTTP/1.1 103 x\r\nX-End: b\r\n\r\n" {
		t.Errorf("%q", m.head)
	}
	th.answer <- "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
	if m := c.next(false); m.body != "hello" {
		t.Error(m)
	}

	old := g.dial(t)
	old.send("GET /echo HTTP/1.0\r\n\r\n")
	<-th.came
	th.answer <- "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
	if m := old.next(false); m.status() != 200 || m.body != "hello" {
		t.Errorf("HTTP/1.0: %s", m.head)
	}
}

// What has begun to answer is not asked again: the interim response came from it.
func TestNoRetryBehindInterim(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, id := range []string{"1", "2"} {
		o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
			if _, err := o.next(r); err == nil {
				io.WriteString(c, "HTTP/1.1 103 Early Hints\r\n\r\n")
			}
		})
		g.register(t, "echo", id, o.url())
	}
	c := g.dial(t)
	c.send(toHTTP11)
	if m := c.read(false); m.status() != 502 || strings.Count(c.interim, "103") != 1 {
		t.Errorf("%s%s", c.interim, m.head)
	}
}

// A client that waits with its body is told what the backend says of it.
func TestExpectIsPassedOn(t *testing.T) {
	const head = "Host: a\r\nExpect: 100-continue\r\n"
	large := filler(maxHeld + 1)
	for _, framing := range []struct{ name, field, body string }{
		{"length", fmt.Sprintf("Content-Length: %d\r\n\r\n", len(large)), large},
		{"chunks", "Transfer-Encoding: chunked\r\n\r\n", inChunks(large, 5000)},
		{"small", "Content-Length: 5\r\n\r\n", "hello"},
	} {
		for _, row := range []struct {
			name      string
			before    string // what the backend says before it has the body; "": nothing
			status    int
			continues bool // the client is told to go on
		}{
			{"wanted", "HTTP/1.1 100 Continue\r\n\r\n", 200, true},
			{"hints, then wanted", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n", 200, true},
			{"refused", "HTTP/1.1 413 x\r\nContent-Length: 0\r\n\r\n", 413, false},
			{"nobody there", "HTTP/1.1 401 x\r\nContent-Length: 2\r\n\r\nno", 401, false},
			{"not understood", "", 200, true},
			{"malformed", "HTTP/1.1 100\r\n bad\r\n\r\n", 502, false},
			{"closed", "close", 502, false},
		} {
			t.Run(framing.name+", "+row.name, func(t *testing.T) {
				t.Parallel()
				seen, got := make(chan string, 10), make(chan int, 10)
				o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
					head := ""
					for !strings.HasSuffix(head, "\r\n\r\n") {
						line, err := r.ReadString('\n')
						if err != nil {
							return
						}
						head += line
					}
					seen <- head
					if row.before == "close" {
						return
					}
					io.WriteString(c, row.before)
					if row.status == 200 {
						body, err := io.ReadAll(bodyReader(t, bufio.NewReader(io.MultiReader(strings.NewReader(head), r))))
						if err != nil {
							t.Error(err)
						}
						got <- len(body)
						io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					}
					rest, _ := io.ReadAll(r)
					got <- len(rest)
				})
				g := startGateway(t, nil, nil)
				g.register(t, "echo", "1", o.url())
				c := g.dial(t)
				c.send("POST /echo HTTP/1.1\r\n" + head + framing.field)
				if m := (&message{head: <-seen}); m.field("Expect") != "100-continue" {
					t.Errorf("the backend is not asked: %s", m.head)
				}
				if row.continues {
					for m := c.next(false); m.head != continueMessage; m = c.next(false) {
						if m.status() != 103 {
							t.Fatal(m.head)
						}
					}
					c.send(framing.body)
				}
				m := c.read(false)
				if m.status() != row.status || strings.Contains(c.interim, " 100 ") || (m.field("Connection") == "close") == row.continues {
					t.Errorf("%s%s", c.interim, m.head)
				}
				if row.continues {
					if n := <-got; n != len(large) && framing.name != "small" || n != 5 && framing.name == "small" {
						t.Errorf("the backend got %d bytes", n)
					}
				} else {
					c.closed()
				}
				c.Close()
				g.idle(t)
				if row.before != "close" {
					if n := <-got; n != 0 {
						t.Errorf("%d bytes more", n)
					}
				}
			})
		}
	}
	t.Run("what it took to ask counts once", func(t *testing.T) {
		t.Parallel()
		const timeout = 400 * time.Millisecond
		o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
		g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = timeout }, nil)
		g.register(t, "echo", "1", o.url())
		c := g.dial(t)
		c.send("POST /echo HTTP/1.1\r\n" + head + "Content-Length: 5\r\n\r\n")
		if m := c.next(false); m.status() != 100 { // after half the time
			t.Fatal(m.head)
		}
		began := time.Now()
		c.send("hello")
		c.read(false).refused(t, errResponseTimeout)
		if took := time.Since(began); took < timeout {
			t.Errorf("the backend had %v", took)
		}
	})
	t.Run("the next instance is asked", func(t *testing.T) {
		g := startGateway(t, nil, nil)
		for _, id := range []string{"1", "2"} {
			n := 0
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if n++; id == "1" {
					r.ReadString('\n')
					return
				}
				if m, err := o.next(r); err == nil {
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(m.body), m.body)
				}
			})
			g.register(t, "echo", id, o.url())
		}
		for range 2 {
			c := g.dial(t)
			c.send("PUT /echo HTTP/1.1\r\n" + head + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(large)))
			if m := c.next(false); m.status() != 100 {
				t.Fatal(m.head)
			}
			c.send(large)
			if m := c.read(false); m.status() != 200 || m.body != large {
				t.Error(m.head)
			}
		}
	})
}

// Heads that come in pieces wait on the loop: a client that drips costs no goroutine.
func TestSlowHeadsNeedNoGoroutine(t *testing.T) {
	g := startLoops(t, 2, func(cfg *Config) { cfg.Limits.HeadTimeout = 5 * time.Second }, nil)
	g.register(t, "echo", "1", naming(t, "ok ").url())
	var clients []*client
	for range 200 {
		c := g.dial(t)
		c.send("GET /echo HTTP/1.1\r\nHo")
		clients = append(clients, c)
	}
	eventually(t, "all are taken", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.conns) == len(clients)
	})
	for _, piece := range []string{"s", "t: a\r", "\nX: " + strings.Repeat("x", 5000), "\r\n\r"} {
		for _, c := range clients {
			c.send(piece)
		}
		g.taken(t)
		if goroutines, loops := g.handedOver(), g.halfRead(); goroutines > 0 || loops != len(clients) {
			t.Errorf("behind %.4q goroutines have %d heads, loops %d of %d", piece, goroutines, loops, len(clients))
		}
	}
	for _, c := range clients[:100] {
		c.send("\n" + toHTTP11 + "GET")
		for range 2 {
			if m := c.read(false); m.body != "ok " {
				t.Fatal(m)
			}
		}
	}
	for _, c := range clients {
		if m := c.read(false); m.status() != 408 {
			t.Fatal(m.head)
		}
		c.closed()
	}
	g.idle(t)
}
