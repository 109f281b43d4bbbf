package proxy

import (
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"kerberos/cb"
)

// Each kind of failure, five times in a row, opens a breaker; four times does not.
func TestWhatOpensABreaker(t *testing.T) {
	t.Parallel()
	const short = 60 * time.Millisecond
	head := "HTTP/1.1 200 OK\r\n"
	tests := []struct {
		name   string
		act    act // nil: nobody listens
		status int // what the client gets; 0: a response that breaks off
		reason string
	}{
		{"refused", nil, 502, errRefused.text},
		{"closed without an answer", breaksOff(""), 502, errTerminated.text},
		{"reset", resets, 502, errTerminated.text},
		{"closed in the head", breaksOff(head + "Content-Le"), 502, errIncomplete.text},
		{"header timeout", hangs, 504, errResponseTimeout.text},
		{"half a head, then nothing", func(c net.Conn, m *message) bool { io.WriteString(c, head); return hangs(c, m) }, 504, errResponseTimeout.text},
		{"malformed", breaksOff("SMTP ready\r\n\r\n"), 502, errMalformed.text},
		{"two lengths", breaksOff(head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), 502, errMalformed.text},
		{"an endless head", breaksOff(head + "X: " + strings.Repeat("x", 40<<10)), 502, errResponseHead.text},
		{"a switch of protocols", breaksOff("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), 502, errSwitch.text},
		{"truncated", breaksOff(head + "Content-Length: 10\r\n\r\nhello"), 502, errIncomplete.text},
		{"truncated stream", breaksOff(head + "Content-Length: 100000\r\n\r\nhello"), 0, errIncomplete.text},
		{"truncated chunks", breaksOff(head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"), 0, errIncomplete.text},
		{"malformed chunks", breaksOff(head + "Transfer-Encoding: chunked\r\n\r\nhello\r\n"), 0, errMalformed.text},
		{"502", answers(502), 502, "status 502"},
		{"503", answers(503), 503, "status 503"},
		{"504", answers(504), 504, "status 504"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				cfg.Breaker.OpenFor = 25 * time.Second
				if tt.reason == errResponseTimeout.text {
					cfg.RequestTimeout = short
				}
			}, nil)
			addr := ""
			var a *actor
			if tt.act == nil {
				addr = refusedAddr(t)
			} else {
				a = startActor(t, tt.act)
				addr = a.url()
			}
			g.register(t, "echo", "a", addr)
			for i := range 5 {
				if state := g.breaker("a"); state != "closed" {
					t.Fatalf("%s after %d failures", state, i)
				}
				c := g.dial(t)
				c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
				m, err := readMessage(c.r, false)
				if broken := err != nil; broken != (tt.status == 0) || !broken && m.status() != tt.status {
					t.Fatalf("the client got %q, %q, %v", m.head, m.body, err)
				}
				eventually(t, "the failure counted", func() bool { return g.DescribeInstance("echo", "a").Failure == uint64(i+1) })
			}
			g.awaitBreaker(t, "a", "open")
			if a != nil {
				if n := a.count(); n != 5 {
					t.Errorf("the backend got %d requests, want 5", n)
				}
			}
			s := g.DescribeInstance("echo", "a")
			if s.Ready || s.Reason != "breaker open" || s.LastError != tt.reason || s.Breaker.Until == nil || s.InFlight != 0 {
				t.Errorf("described as %+v, want the last error %q", s, tt.reason)
			}
			if n := g.logged("breaker open", "service=echo", "instance=a", "from=closed", "5 failures in a row: "+tt.reason); n != 1 {
				t.Errorf("%d log lines name service, instance and reason, want one: %s", n, g.logs)
			}

			// All open: refused at once, with the time after which it makes sense to come back.
			c, quickest := g.dial(t), time.Minute
			var m *message
			for range 5 { // the machine may be busy with other tests
				began := time.Now()
				m = c.get("/echo").refused(t, errNoInstance)
				quickest = min(quickest, time.Since(began))
			}
			if quickest > 50*time.Millisecond {
				t.Errorf("refused after %v, want less than 5 ms", quickest)
			}
			if seconds, err := strconv.Atoi(m.field("Retry-After")); err != nil || seconds < 20 || seconds > 25 {
				t.Errorf("Retry-After is %q, want what is left of 25 s", m.field("Retry-After"))
			}
			if a != nil && a.count() != 0 {
				t.Error("a request reached the backend through an open breaker")
			}
		})
	}
}

// What is nobody's fault, or not the instance's, neither adds to a run of failures nor ends it.
func TestWhatABreakerIgnores(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		do   func(t *testing.T, g *gateway, a *actor)
	}{
		{"the client leaves while it waits", func(t *testing.T, g *gateway, a *actor) {
			a.does(hangs)
			c := g.dial(t)
			c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
			eventually(t, "the request at the backend", func() bool { return g.DescribeInstance("echo", "a").InFlight == 1 })
			c.Close()
		}},
		{"the client leaves in its body", func(t *testing.T, g *gateway, a *actor) {
			a.does(hangs)
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nsome")
			eventually(t, "the request at the backend", func() bool { return g.DescribeInstance("echo", "a").InFlight == 1 })
			c.Close()
		}},
		{"the client's chunks are malformed", func(t *testing.T, g *gateway, a *actor) {
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n")
			eventually(t, "the request at the backend", func() bool { return g.DescribeInstance("echo", "a").InFlight == 1 })
			c.send("nonsense\r\n")
			c.read(false).refused(t, errChunk)
		}},
		{"the client leaves in the response", func(t *testing.T, g *gateway, a *actor) {
			a.does(func(c net.Conn, m *message) bool {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nsome")
				return hangs(c, m)
			})
			c := g.dial(t)
			c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
			if _, err := c.r.Peek(1); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // each waits for the look after the client, once a second
			g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = long; cfg.Retries = -1 }, nil)
			a := startActor(t, answers(503))
			g.register(t, "echo", "a", a.url())
			c := g.dial(t)
			for range 4 {
				c.get("/echo").want(t, 503)
			}
			eventually(t, "four failures counted", func() bool { return g.DescribeInstance("echo", "a").Failure == 4 })
			tt.do(t, g, a)
			eventually(t, "the request ended", func() bool {
				s := g.DescribeInstance("echo", "a")
				return s.InFlight == 0 && s.Ignored == 1
			})
			if s := g.DescribeInstance("echo", "a"); s.Breaker.State != "closed" || s.Failure != 4 {
				t.Fatalf("described as %+v", s)
			}
			a.does(answers(503))
			c.get("/echo").want(t, 503)
			g.awaitBreaker(t, "a", "open")
		})
	}
}

// A success ends a run of failures: 4 + 4 of them open nothing. Statuses that are not on the list are successes.
func TestSuccessEndsTheRun(t *testing.T) {
	for _, status := range []int{200, 404, 429, 500, 501} {
		g := startGateway(t, func(cfg *Config) { cfg.Retries = -1 }, nil)
		a := startActor(t, answers(503))
		g.register(t, "echo", "a", a.url())
		c := g.dial(t)
		for range 3 {
			for range 4 {
				c.get("/echo").want(t, 503)
			}
			a.does(answers(status))
			c.get("/echo").want(t, status)
			a.does(answers(503))
		}
		eventually(t, "all counted", func() bool { s := g.DescribeInstance("echo", "a"); return s.Failure == 12 && s.Success == 3 })
		if got := g.breaker("a"); got != "closed" {
			t.Errorf("%s behind runs of four failures with a %d after each", got, status)
		}
	}
}

func TestBreakerStatuses(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.BreakerStatuses = []int{500}
		cfg.Breaker = cb.Config{Failures: 2, OpenFor: long}
	}, nil)
	a := startActor(t, answers(503))
	g.register(t, "echo", "a", a.url())
	c := g.dial(t)
	for range 4 {
		c.get("/echo").want(t, 503)
	}
	a.does(answers(500))
	c.get("/echo").want(t, 500)
	c.get("/echo").want(t, 500)
	g.awaitBreaker(t, "a", "open")
	if f := g.DescribeInstance("echo", "a"); f.Failure != 2 || f.Success != 4 {
		t.Errorf("counted %+v", f)
	}
}

// While one is open the others carry its share evenly, and no client sees an error of ours.
func TestOthersCarryTheShareEvenly(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = long }, nil)
	actors := startNamed(t, g, 4)
	actors["c"].does(resets)
	c := g.dial(t)
	for range 40 { // GETs: what c drops, another one answers
		c.get("/echo").want(t, 200)
	}
	g.awaitBreaker(t, "c", "open")
	if n := actors["c"].count(); n != 5 {
		t.Errorf("c got %d requests before its breaker opened, want 5", n)
	}
	for _, id := range []string{"a", "b", "d"} {
		actors[id].count()
	}
	c.picks(60)
	for _, id := range []string{"a", "b", "d"} {
		if n := actors[id].count(); n != 20 {
			t.Errorf("%s got %d of 60, want a third", id, n)
		}
	}
}

// A breaker that opens while a slow request runs is told nothing by its late end.
func TestLateOutcome(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = long }, nil)
	gate := make(chan struct{})
	a := startActor(t, after(gate, says("a")))
	g.register(t, "echo", "a", a.url())
	c := g.dial(t)
	c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "under way", func() bool { return a.served.Load() == 1 })
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "open")
	close(gate)
	c.read(false).want(t, 200)
	if got := g.breaker("a"); got != "open" {
		t.Errorf("%s by the end of a request that began before", got)
	}
}

// Concurrent failures open a breaker once, and nobody gets past it.
func TestConcurrentFailures(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = long }, nil)
	a := startActor(t, answers(503))
	g.register(t, "echo", "a", a.url())
	const clients = 20
	var wg sync.WaitGroup
	for range clients {
		c := g.dial(t)
		wg.Go(func() {
			for range 5 {
				if _, err := io.WriteString(c, "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Error(err)
					return
				}
				if m, err := readMessage(c.r, false); err != nil || m.status() != 503 {
					t.Errorf("%q, %v", m.head, err)
					return
				}
			}
		})
	}
	wg.Wait()
	g.awaitBreaker(t, "a", "open")
	if n := g.logged("breaker open"); n != 1 {
		t.Errorf("%d log lines for one change", n)
	}
	// Each client may have had one under way when the fifth failure was counted.
	if n := a.count(); n < 5 || n > 4+clients {
		t.Errorf("the backend got %d requests", n)
	}
}

// A long response counts as a success while it still runs: it says nothing more when it is cut later.
func TestLongResponseIsSettledEarly(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = long }, nil)
	more, cut := make(chan struct{}), make(chan struct{})
	a := startActor(t, answers(503))
	g.register(t, "echo", "a", a.url())
	c := g.dial(t)
	for range 4 {
		c.get("/echo").want(t, 503)
	}
	eventually(t, "four failures counted", func() bool { return g.DescribeInstance("echo", "a").Failure == 4 })
	a.does(func(c net.Conn, _ *message) bool {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"+strings.Repeat("x", 100_000))
		<-more
		io.WriteString(c, "y")
		<-cut
		return false
	})
	stream := g.dial(t)
	stream.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	for line := ""; line != "\r\n"; {
		var err error
		if line, err = stream.r.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.r.Discard(100_000); err != nil {
		t.Fatal(err)
	}
	close(more)
	if _, err := stream.r.ReadByte(); err != nil { // it looked for this byte after it told the breaker
		t.Fatal(err)
	}
	a.does(answers(503))
	// The run of four is over: four more failures open nothing.
	for range 4 {
		c.get("/echo").want(t, 503)
	}
	close(cut)
	if rest, err := io.ReadAll(stream.r); err == nil && len(rest) > 900_000 {
		t.Error("the response was not cut")
	}
	eventually(t, "the cut counted", func() bool { return g.DescribeInstance("echo", "a").Failure == 9 })
	if got := g.breaker("a"); got != "closed" {
		t.Errorf("%s: the cut of a settled response counted against the instance", got)
	}
	if g.logged("response cut", "service=echo", "instance=a", errIncomplete.text) != 1 {
		t.Errorf("no log line for the cut: %s", g.logs)
	}
}
