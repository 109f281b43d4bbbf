package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/cb"
)

// patient is a configuration whose breakers stay out of the way.
func patient(retries int) func(*Config) {
	return func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 1 << 20}; cfg.Retries = retries }
}

// served counts the requests that came to any of the actors.
func served(actors map[string]*actor) (n int) {
	for _, a := range actors {
		n += int(a.served.Load())
	}
	return n
}

// Which requests are sent again after the backend may have seen them, and how often. The number of instances is 5.
func TestRetries(t *testing.T) {
	body := strings.Repeat("b", 10)
	tests := []struct {
		name    string
		request string
		retries int
		want    int // requests at the backends; all of them reset
	}{
		{"GET", "GET /echo HTTP/1.1\r\n", 0, 3},
		{"HEAD", "HEAD /echo HTTP/1.1\r\n", 0, 3},
		{"OPTIONS", "OPTIONS /echo HTTP/1.1\r\n", 0, 3},
		{"DELETE", "DELETE /echo HTTP/1.1\r\n", 0, 3},
		{"PUT", "PUT /echo HTTP/1.1\r\nContent-Length: 10\r\n", 0, 3},
		{"POST", "POST /echo HTTP/1.1\r\nContent-Length: 10\r\n", 0, 1},
		{"POST without body", "POST /echo HTTP/1.1\r\nContent-Length: 0\r\n", 0, 1},
		{"PATCH", "PATCH /echo HTTP/1.1\r\nContent-Length: 10\r\n", 0, 1},
		{"an unknown method", "BREW /echo HTTP/1.1\r\n", 0, 1},
		{"methods have a case", "get /echo HTTP/1.1\r\n", 0, 1},
		{"none wanted", "GET /echo HTTP/1.1\r\n", -1, 1},
		{"one wanted", "GET /echo HTTP/1.1\r\n", 1, 2},
		{"more than there are instances", "GET /echo HTTP/1.1\r\n", 9, 5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, patient(tt.retries), nil)
			actors := startNamed(t, g, 5)
			for _, a := range actors {
				a.does(resets)
			}
			sent := ""
			if strings.Contains(tt.request, ": 10") {
				sent = body
			}
			g.do(t, tt.request+"Host: x\r\n\r\n"+sent).refused(t, errTerminated)
			if got := served(actors); got != tt.want {
				t.Errorf("the backends got %d requests, want %d", got, tt.want)
			}
			for id, a := range actors {
				if a.served.Load() > 1 {
					t.Errorf("%s was asked twice", id)
				}
			}
		})
	}
}

// A request that is sent again is the same, its body included; a body that was not kept is sent once.
func TestRetriedBodies(t *testing.T) {
	kept, large := strings.Repeat("k", maxHeld), strings.Repeat("l", maxHeld+1)
	chunks := "5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
	length := func(body string) string { return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body) }
	tests := []struct {
		name, rest string // what follows the other fields
		want       string // the body; "" if the second backend must not see it
	}{
		{"small", length("hello"), "hello"},
		{"empty", length(""), ""},
		{"64 KiB", length(kept), kept},
		{"more", length(large), ""},
		{"chunks", "Transfer-Encoding: chunked\r\n\r\n" + chunks, "hello world"},
		{"expected", "Expect: 100-continue\r\n" + length("hello"), "hello"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, patient(0), nil)
			var order atomic.Int64
			second := make(chan *message, 1)
			both := func(o *origin, c net.Conn, r *bufio.Reader) {
				if order.Add(1) == 1 {
					// Whatever it saw of it, it does not like it.
					_, _ = io.ReadFull(r, make([]byte, 100))
					_ = c.(*net.TCPConn).SetLinger(0)
					return
				}
				if m, err := readMessage(r, false); err == nil {
					second <- m
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				}
			}
			g.register(t, "echo", "a", startOrigin(t, both).url())
			g.register(t, "echo", "b", startOrigin(t, both).url())
			m := g.do(t, "PUT /echo HTTP/1.1\r\nHost: x\r\n"+tt.rest)
			if m.status() == 100 {
				t.Fatal("100-continue though the body was there")
			}
			if tt.name == "more" {
				if m.status() != 502 || order.Load() != 1 {
					t.Errorf("%q after %d attempts", m.head, order.Load())
				}
				return
			}
			m.want(t, 200)
			got := <-second
			if got.body != tt.want {
				t.Errorf("the second backend got %d bytes, want %d", len(got.body), len(tt.want))
			}
			if tt.name == "chunks" && got.trailer != "X-Sum: 1\r\n" {
				t.Errorf("the second backend got the trailer %q", got.trailer)
			}
		})
	}
}

// Instances that refuse are charged to nothing: each is asked once, at most eight for one request.
func TestRefusedInstancesAreUncharged(t *testing.T) {
	tests := []struct{ dead, asked int }{{1, 1}, {3, 3}, {8, 8}, {12, 8}}
	for _, tt := range tests {
		for _, method := range []string{"GET", "POST"} {
			t.Run(fmt.Sprint(method, tt.dead), func(t *testing.T) {
				g := startGateway(t, patient(-1), nil)
				for i := range tt.dead {
					g.register(t, "echo", fmt.Sprint(i), refusedAddr(t))
				}
				g.do(t, method+" /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").refused(t, errRefused)
				total := 0
				for i := range tt.dead {
					s := g.DescribeInstance("echo", fmt.Sprint(i))
					if s.Failure > 1 {
						t.Errorf("instance %d was asked %d times", i, s.Failure)
					}
					total += int(s.Failure)
				}
				if total != tt.asked {
					t.Errorf("%d instances were asked, want %d", total, tt.asked)
				}
				if at := g.service("echo").budget.at; !at.IsZero() {
					t.Error("the retry budget was looked at")
				}

				// One among them that is alive answers, a POST too, and gets it once.
				if tt.dead < 8 {
					a := startActor(t, says("alive"))
					g.register(t, "echo", "alive", a.url())
					c := g.dial(t)
					for range 20 {
						c.send(method + " /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
						c.read(false).want(t, 200)
					}
					if n := a.count(); n != 20 {
						t.Errorf("the one alive got %d of 20", n)
					}
				}
			})
		}
	}
}

// A backend that drops every request, whichever comes first, costs no GET anything and no POST more than its own.
func TestEveryFirstPickFails(t *testing.T) {
	g := startGateway(t, patient(0), nil)
	actors := startNamed(t, g, 3)
	actors["a"].does(resets)
	c := g.dial(t)
	for range 50 {
		c.get("/echo").want(t, 200)
	}
	for _, a := range actors {
		a.count()
	}
	failed := 0
	for range 30 {
		if c.post("/echo", "x").status() == 502 {
			failed++
		}
	}
	if n := actors["a"].count(); failed != 10 || n != 10 || served(actors) != 20 {
		t.Errorf("%d of 30 POSTs failed, a got %d and the others %d: want exactly a third, each sent once", failed, n, served(actors))
	}
}

// None, one and all of the instances down.
func TestHowManyAreDown(t *testing.T) {
	const n = 4
	for down := range n + 1 {
		t.Run(fmt.Sprint(down), func(t *testing.T) {
			g := startGateway(t, patient(0), nil)
			for i := range n {
				addr := refusedAddr(t)
				if i >= down {
					addr = startActor(t, says("up")).url()
				}
				g.register(t, "echo", fmt.Sprint(i), addr)
			}
			c := g.dial(t)
			for range 10 {
				if m := c.post("/echo", "x"); down < n {
					m.want(t, 200)
				} else {
					m.refused(t, errRefused)
				}
			}
		})
	}
}

// What a backend answers is passed on, its own 503 included.
func TestStatusesAreNotRetried(t *testing.T) {
	g := startGateway(t, patient(0), nil)
	actors := startNamed(t, g, 3)
	for _, a := range actors {
		a.does(answers(503))
	}
	if m := g.dial(t).get("/echo").want(t, 503); m.body != "no" || m.field("Proxy-Status") != "" || served(actors) != 1 {
		t.Errorf("%q %q after %d attempts", m.head, m.body, served(actors))
	}
}

// Once a byte of a response has reached the client nothing is sent again; a small one that is truncated has not.
func TestBrokenOffIsNotRepeated(t *testing.T) {
	g := startGateway(t, patient(0), nil)
	actors := startNamed(t, g, 2)
	actors["a"].does(breaksOff("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"))
	c := g.dial(t)
	for range 4 {
		if got := c.picks(1); got != "b" {
			t.Errorf("%q reached the client", got)
		}
	}
	actors["a"].does(breaksOff("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello"))
	actors["b"].does(breaksOff("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello"))
	for _, a := range actors {
		a.count()
	}
	c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	if m, err := readMessage(c.r, false); err == nil || m.body != "hello" {
		t.Errorf("the client got %q, %v, want a response that breaks off", m.body, err)
	}
	if n := served(actors); n != 1 {
		t.Errorf("the backends got %d requests", n)
	}
}

// With everything failing, retries stay within the budget: what it starts with, and 20 % of what is asked.
func TestRetryBudget(t *testing.T) {
	g := startGateway(t, patient(1), nil)
	actors := startNamed(t, g, 2)
	for _, a := range actors {
		a.does(breaksOff(""))
	}
	const requests = 400
	began := time.Now()
	c := g.dial(t)
	for range requests {
		c.get("/echo").refused(t, errTerminated)
	}
	got := served(actors) - requests
	first := int(budgetFloor * budgetWindow.Seconds())
	most := first + int(budgetShare*2*requests) + int(budgetFloor*time.Since(began).Seconds()) + 1
	if got < first || got > most {
		t.Errorf("%d requests were sent %d times more, want %d to %d", requests, got, first, most)
	}
}

func TestRetryBudgetRefills(t *testing.T) {
	g := startGateway(t, patient(1), nil)
	g.register(t, "echo", "a", refusedAddr(t))
	s := g.service("echo")
	u := s.view.Load().parts[0].members[0]
	var b retryBudget
	at := time.Unix(1000, 0)
	taken := func(later time.Duration, requests uint64) (n int) {
		at = at.Add(later)
		u.outcomes[success].Add(requests)
		for b.take(s, at) {
			n++
		}
		return n
	}
	for _, step := range []struct {
		later    time.Duration
		requests uint64
		want     int
		why      string
	}{
		{0, 5000, 100, "at first as much as 10 s at the least rate save up"},
		{time.Second, 0, 10, "10 a second without requests"},
		{100 * time.Millisecond, 0, 1, "1 in a tenth of a second"},
		{50 * time.Millisecond, 1000, 0, "nothing in less than a tenth"},
		{950 * time.Millisecond, 9001, 2000, "20 % of 10,000, the retry before among the outcomes not counted"},
		{time.Hour, 0, 100, "never more than 10 s save up"},
		{time.Second, 40, 10, "20 % of few is less than 10 a second"},
	} {
		if got := taken(step.later, step.requests); got != step.want {
			t.Errorf("%s: took %d, want %d", step.why, got, step.want)
		}
	}
}

// All attempts together have the request timeout.
func TestRequestTimeout(t *testing.T) {
	t.Parallel()
	t.Run("one that hangs takes it all", func(t *testing.T) {
		g := startGateway(t, func(cfg *Config) { patient(2)(cfg); cfg.RequestTimeout = 150 * time.Millisecond }, nil)
		actors := startNamed(t, g, 3)
		for _, a := range actors {
			a.does(hangs)
		}
		began := time.Now()
		g.dial(t).get("/echo").refused(t, errResponseTimeout)
		if took := time.Since(began); took < 150*time.Millisecond {
			t.Errorf("gave up after %v", took)
		}
		if n := served(actors); n != 1 {
			t.Errorf("%d instances were asked", n)
		}
	})
	t.Run("the second has what the first left", func(t *testing.T) {
		t.Parallel()
		const timeout, first = 2 * time.Second, 1500 * time.Millisecond
		g := startGateway(t, func(cfg *Config) { patient(2)(cfg); cfg.RequestTimeout = timeout }, nil)
		var order atomic.Int64
		for _, id := range []string{"a", "b"} {
			g.register(t, "echo", id, startActor(t, func(c net.Conn, m *message) bool {
				if order.Add(1) == 1 {
					time.Sleep(first) // the backend's own time
					return resets(c, m)
				}
				return hangs(c, m)
			}).url())
		}
		began := time.Now()
		g.dial(t).get("/echo").refused(t, errResponseTimeout)
		if took := time.Since(began); took < timeout || took > first+timeout || order.Load() != 2 {
			t.Errorf("gave up after %v and %d attempts, want %v and 2", took, order.Load(), timeout)
		}
	})
	t.Run("a slow answer within it is none the worse", func(t *testing.T) {
		g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = 10 * time.Second }, nil)
		g.register(t, "echo", "a", startActor(t, func(c net.Conn, m *message) bool {
			time.Sleep(50 * time.Millisecond)
			return says("late")(c, m)
		}).url())
		if got := g.dial(t).picks(1); got != "late" {
			t.Errorf("got %q", got)
		}
	})
}

// Time in which an upload makes progress does not count; it begins with the last byte.
func TestUploadTimeDoesNotCount(t *testing.T) {
	t.Parallel()
	const timeout = 800 * time.Millisecond
	upload := func(t *testing.T, g *gateway) (c *client, ended time.Time) {
		t.Helper()
		const pieces, size = 8, 20_000
		c = g.dial(t)
		c.send(fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", pieces*size))
		for range pieces {
			time.Sleep(timeout / 5) // a slow client
			c.send(strings.Repeat("x", size))
		}
		return c, time.Now()
	}
	t.Run("answered in time", func(t *testing.T) {
		t.Parallel()
		g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = timeout }, nil)
		g.register(t, "echo", "a", startActor(t, func(c net.Conn, m *message) bool {
			time.Sleep(timeout / 2) // after the last byte
			return says("got it")(c, m)
		}).url())
		c, _ := upload(t, g)
		if m := c.read(false).want(t, 200); m.body != "got it" {
			t.Errorf("got %q", m.body)
		}
	})
	t.Run("never answered", func(t *testing.T) {
		t.Parallel()
		g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = timeout }, nil)
		g.register(t, "echo", "a", startActor(t, hangs).url())
		c, ended := upload(t, g)
		c.read(false).refused(t, errResponseTimeout)
		if took := time.Since(ended); took < timeout-50*time.Millisecond { // the last bytes are on their way a little
			t.Errorf("gave up %v after the last byte", took)
		}
	})
}

// A kept-alive connection that the backend has closed meanwhile.
func TestStaleConnections(t *testing.T) {
	keep := func(cfg *Config) { patient(-1)(cfg); cfg.UpstreamIdle = time.Minute }
	t.Run("closed before", func(t *testing.T) {
		g := startGateway(t, keep, nil)
		a := startActor(t, says("a"))
		g.register(t, "echo", "a", a.url())
		c := g.dial(t)
		for i := range 5 {
			if got := c.post("/echo", "x").want(t, 200).body; got != "a" {
				t.Errorf("got %q", got)
			}
			if n := a.accepted.Load(); n != int64(i+1) {
				t.Errorf("%d connections", n)
			}
			a.mu.Lock()
			for conn := range a.conns {
				conn.Close()
			}
			a.mu.Unlock()
			eventually(t, "closed", func() bool { return a.open() == 0 })
		}
		if s := g.DescribeInstance("echo", "a"); s.Failure != 0 || s.Ignored != 0 {
			t.Errorf("counted %+v", s)
		}
	})
	for _, method := range []string{"GET", "PUT", "POST"} {
		t.Run("closed by the request, "+method, func(t *testing.T) {
			g := startGateway(t, keep, nil)
			a := &actor{}
			var requests, lives atomic.Int64
			a.origin = startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				lives.Add(1)
				for i := 0; ; i++ {
					m, err := readMessage(r, false)
					if err != nil {
						return
					}
					requests.Add(1)
					if i == 1 { // the second on a connection is read, and not answered
						return
					}
					says("a")(c, m)
				}
			})
			g.register(t, "echo", "a", a.url())
			c := g.dial(t)
			c.get("/echo").want(t, 200)
			c.send(method + " /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
			m := c.read(false)
			if method == "POST" {
				m.refused(t, errTerminated)
				if requests.Load() != 2 || lives.Load() != 1 {
					t.Errorf("the backend got %d requests on %d connections: the POST was sent again", requests.Load()-1, lives.Load())
				}
			} else if m.want(t, 200); requests.Load() != 3 || lives.Load() != 2 {
				t.Errorf("%d requests on %d connections", requests.Load(), lives.Load())
			}
			if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
				t.Errorf("a stale connection is nobody's fault, but counted %+v", s)
			}
		})
	}
	t.Run("bytes nobody asked for", func(t *testing.T) {
		g := startGateway(t, keep, nil)
		a := startActor(t, writes("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
		g.register(t, "echo", "a", a.url())
		c := g.dial(t)
		for range 5 {
			if got := c.picks(1); got != "ok" {
				t.Fatalf("the answer to another request: %q", got)
			}
		}
	})
}

// No limit on connections per instance: a thousand clients at once see no error.
func TestThousandClients(t *testing.T) {
	const clients = 1000
	g := startGateway(t, func(cfg *Config) { cfg.ConnectTimeout = 20 * time.Second }, nil)
	all := make(chan struct{})
	a := startActor(t, after(all, says("a")))
	g.register(t, "echo", "a", a.url())
	var wg sync.WaitGroup
	for range clients {
		c := g.dial(t)
		c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
		wg.Go(func() {
			for range 2 {
				if m, err := readMessage(c.r, false); err != nil || m.status() != 200 || m.body != "a" {
					t.Errorf("%q, %v", m.head, err)
					return
				}
				if _, err := io.WriteString(c, "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Error(err)
					return
				}
			}
			if m, err := readMessage(c.r, false); err != nil || m.status() != 200 {
				t.Errorf("%q, %v", m.head, err)
			}
			c.Close()
		})
	}
	eventually(t, "all at the backend at once", func() bool { return a.served.Load() == clients })
	close(all)
	wg.Wait()
}

// Instances that do not accept use up the request timeout: it bounds all attempts together, connecting included.
func TestRequestTimeoutBoundsConnecting(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout, cfg.ConnectTimeout = 400*time.Millisecond, 300*time.Millisecond }, nil)
	for id := range 6 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		// A handshake that nobody answers takes as long as it may; the kernel accepts for the listener.
		g.register(t, "echo", strconv.Itoa(id), "https://"+ln.Addr().String())
	}
	began := time.Now()
	if m := g.do(t, "GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"); m.status() != 504 {
		t.Error(m.head)
	}
	if took := time.Since(began); took > 1200*time.Millisecond { // six connect timeouts are 1.8 s
		t.Errorf("took %v", took)
	}
}
