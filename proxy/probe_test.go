package proxy

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"kerberos/cb"
	"kerberos/lb"
)

// openBreaker has an instance's breaker hear of failures until it opens.
func openBreaker(t testing.TB, g *gateway, id string) {
	t.Helper()
	for u := range g.service("echo").view.Load().all {
		for u.id == id && u.gate.State() == cb.Closed {
			if token, ok := u.gate.Allow(); ok {
				u.gate.Failure(token, errors.New("broken by hand"))
			}
		}
	}
}

// The way back: probes go to requests that a ready instance could still answer; three succeed and it is closed.
func TestProbesCloseABreaker(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 30 * time.Millisecond }, nil)
	actors := startNamed(t, g, 2)
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "half-open")
	c := g.dial(t)
	if got := c.picks(3); got != "aaa" {
		t.Errorf("went to %s, want three probes before anything else", got)
	}
	g.awaitBreaker(t, "a", "closed")
	for _, a := range actors {
		a.count()
	}
	c.picks(10)
	if n := actors["a"].count(); n != 5 {
		t.Errorf("a got %d of 10 after its breaker closed", n)
	}
	for _, line := range [][]string{
		{"breaker open", "from=closed", "5 failures in a row: broken by hand"},
		{"breaker half-open", "from=open", "reason="},
		{"breaker closed", "from=half-open", "reason="},
	} {
		if n := g.logged(append(line, "service=echo", "instance=a")...); n != 1 {
			t.Errorf("%d log lines with %q: %s", n, line, g.logs)
		}
	}
}

// A probe that fails opens it again, and costs no client anything, however it fails.
func TestNoClientPaysForAProbe(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		act  act
	}{
		{"closed without an answer", breaksOff("")},
		{"reset", resets},
		{"503", answers(503)},
		{"malformed", breaksOff("nonsense\r\n\r\n")},
		{"truncated", breaksOff("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")},
		{"hangs", hangs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				cfg.Breaker.OpenFor = 20 * time.Millisecond
				if tt.name == "hangs" { // half of it is left to who makes up for the probe
					cfg.RequestTimeout = 400 * time.Millisecond
				}
				cfg.Retries = 1
			}, nil)
			actors := startNamed(t, g, 2)
			actors["a"].does(tt.act)
			openBreaker(t, g, "a")
			c := g.dial(t)
			const rounds = 3
			for range rounds {
				g.awaitBreaker(t, "a", "half-open")
				before := g.logged("breaker open", "instance=a", "from=half-open", "probe failed")
				if got := c.picks(1); got != "b" {
					t.Errorf("%q answered", got)
				}
				eventually(t, "the probe failed", func() bool {
					return g.logged("breaker open", "instance=a", "from=half-open", "probe failed") == before+1
				})
			}
			if n := actors["a"].count(); n != rounds {
				t.Errorf("a got %d requests, want one probe a round", n)
			}
			if at := g.service("echo").budget.at; !at.IsZero() {
				t.Error("what makes up for a probe was charged to the retry budget")
			}
		})
	}
}

// A probe is one that costs nothing only where an instance is left to make up for it: what it answers is passed on else.
func TestProbeAsTheLastResort(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 20 * time.Millisecond; cfg.Retries = 1 }, nil)
	actors := startNamed(t, g, 2)
	actors["a"].does(answers(503))
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "half-open")
	gate := &g.service("echo").view.Load().parts[0].members[0].gate
	var taken []cb.Token
	for gate.FreeProbes() > 0 {
		token, _ := gate.Allow()
		taken = append(taken, token)
	}
	actors["b"].does(func(c net.Conn, m *message) bool { // is asked first, and drops the request once a probe is free
		for _, token := range taken {
			gate.Ignored(token)
		}
		return resets(c, m)
	})
	if m := g.dial(t).get("/echo"); m.status() != 503 || m.body != "no" {
		t.Errorf("the client got %q %q, want a's own 503", m.head, m.body)
	}
}

// A POST takes no probe while a ready instance is there, and after a second any request may.
func TestPostsWaitWithProbes(t *testing.T) {
	t.Parallel()
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 20 * time.Millisecond }, nil)
	startNamed(t, g, 2)
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "half-open")
	c := g.dial(t)
	began := g.DescribeInstance("echo", "a").Breaker.Since
	eventually(t, "a POST is a probe once nothing else came for a second", func() bool {
		m := c.post("/echo", "x").want(t, 200)
		if m.body == "a" && time.Since(began) < probePatience {
			t.Fatalf("a POST took a probe after %v", time.Since(began))
		}
		return m.body == "a"
	})
	eventually(t, "closed by POSTs", func() bool { c.post("/echo", "x").want(t, 200); return g.breaker("a") == "closed" })
}

// With no ready instance any request may take a probe at once; where none is free: 503 with Retry-After.
func TestProbesWhereNobodyIsReady(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 20 * time.Millisecond }, nil)
	answer := make(chan struct{})
	a := startActor(t, after(answer, says("a")))
	g.register(t, "echo", "a", a.url())
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "half-open")
	var clients []*client
	for range 3 {
		c := g.dial(t)
		c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
		clients = append(clients, c)
	}
	eventually(t, "three probes under way", func() bool { return a.served.Load() == 3 })
	if m := g.dial(t).get("/echo").refused(t, errNoInstance); m.field("Retry-After") != "1" {
		t.Errorf("Retry-After is %q", m.field("Retry-After"))
	}
	close(answer)
	for _, c := range clients {
		c.read(false).want(t, 200)
	}
	g.awaitBreaker(t, "a", "closed")
	if n := a.count(); n != 3 {
		t.Errorf("%d requests came through while half-open, want 3", n)
	}
}

// With ip-hash a request probes only the instance that its client belongs to.
func TestProbesByIPHash(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Strategy = lb.IPHash; cfg.Breaker.OpenFor = 20 * time.Millisecond }, nil)
	startNamed(t, g, 3)
	c := g.dial(t)
	home := c.picks(1)
	other := "a"
	if home == "a" {
		other = "b"
	}
	openBreaker(t, g, other)
	g.awaitBreaker(t, other, "half-open")
	if got := c.picks(5); got != strings.Repeat(home, 5) {
		t.Errorf("a client of %s went to %s while %s is half-open", home, got, other)
	}
	openBreaker(t, g, home)
	g.awaitBreaker(t, home, "half-open")
	if got := c.picks(3); got != strings.Repeat(home, 3) {
		t.Errorf("a client of %s went to %s, want its probes", home, got)
	}
	g.awaitBreaker(t, home, "closed")
}

// A lost probe does not leave a breaker half-open for ever.
func TestLostProbe(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Breaker = cb.Config{OpenFor: 20 * time.Millisecond, ProbeTimeout: 50 * time.Millisecond}
	}, nil)
	a := startActor(t, hangs)
	g.register(t, "echo", "a", a.url())
	openBreaker(t, g, "a")
	g.awaitBreaker(t, "a", "half-open")
	g.dial(t).send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "the probe given up for lost", func() bool { return g.logged("breaker open", "from=half-open", "probe lost") > 0 })
	a.does(says("a"))
	eventually(t, "closed", func() bool { g.dial(t).get("/echo"); return g.breaker("a") == "closed" })
}
