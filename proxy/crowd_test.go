package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// meter counts the requests that are at instances at once.
type meter struct{ now, most atomic.Int64 }

func (m *meter) enter() {
	n := m.now.Add(1)
	for most := m.most.Load(); n > most && !m.most.CompareAndSwap(most, n); most = m.most.Load() {
	}
}

func (m *meter) leave() { m.now.Add(-1) }

// metered does next after a moment, and has meters count it until just before.
func metered(next act, meters ...*meter) act {
	return func(c net.Conn, m *message) bool {
		for _, m := range meters {
			m.enter()
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Microsecond) // the work
		for _, m := range meters {
			m.leave()
		}
		return next(c, m)
	}
}

// settled fails the test unless the gateway has nothing in flight any more, and nobody waits.
func (g *gateway) settled(t testing.TB) {
	t.Helper()
	eventually(t, "nothing is in flight and nobody waits", func() bool {
		s := g.service("echo")
		n := s.crowd.inFlight.Load() + s.crowd.waiting.Load()
		for u := range s.view.Load().all {
			n += u.inFlight.Load()
		}
		return n == 0
	})
}

func (g *gateway) waiting() int64 { return g.service("echo").crowd.waiting.Load() }

// There are never more in flight than the limits allow, with every strategy, with instances that fail and are probed, and
// all that fit into the queue are served: no place that comes free is forgotten.
func TestInFlightLimitsAreExact(t *testing.T) {
	for _, strategy := range lb.Strategies() {
		for _, tt := range []struct {
			name                 string
			perInstance, service int
			clients              int // as many as may be in flight and wait
			failing              bool
		}{
			{"instance", 2, 0, 12, false},
			{"service", 0, 4, 8, false},
			{"both", 2, 5, 10, false},
			{"one", 1, 1, 2, false},
			{"failing", 2, 0, 8, true}, // two thirds: one of three may be out
		} {
			t.Run(string(strategy)+"/"+tt.name, func(t *testing.T) {
				g := startGateway(t, func(cfg *Config) {
					cfg.Strategy = strategy
					cfg.Limits = Limits{InFlightPerInstance: tt.perInstance, InFlightPerService: tt.service, QueueTimeout: 15 * time.Second}
					cfg.Breaker = cb.Config{Failures: 2, OpenFor: 5 * time.Millisecond, Probes: 1}
					cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
					cfg.UpstreamIdle = time.Minute
				}, nil)
				var all meter
				var each [3]meter
				for i := range each {
					a := startActor(t, metered(says("x"), &each[i], &all))
					if tt.failing && i == 0 {
						a.does(func(c net.Conn, m *message) bool {
							if rand.IntN(3) > 0 {
								return metered(says("x"), &each[i], &all)(c, m)
							}
							return metered(answers(503), &each[i], &all)(c, m)
						})
					}
					if err := g.reg.Register("echo", registry.Instance{ID: fmt.Sprint(i), Addr: a.url(), Weight: 1 + i}); err != nil {
						t.Fatal(err)
					}
				}
				var wg sync.WaitGroup
				for i := range tt.clients {
					c := g.dial(t)
					wg.Go(func() {
						for range 60 {
							c.send(fmt.Sprintf("GET /echo HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.%d\r\n\r\n", i))
							m, err := readMessage(c.r, false)
							own := err == nil && m.field("Proxy-Status") != ""
							if err != nil || own || m.status() != 200 && !tt.failing {
								t.Errorf("%v, %q %q", err, m.head, m.body)
								return
							}
						}
					})
				}
				wg.Wait()
				for i := range each {
					if most := each[i].most.Load(); tt.perInstance > 0 && most > int64(tt.perInstance) {
						t.Errorf("instance %d had %d in flight, its limit is %d", i, most, tt.perInstance)
					}
				}
				if most := all.most.Load(); tt.service > 0 && most > int64(tt.service) {
					t.Errorf("the service had %d in flight, its limit is %d", most, tt.service)
				}
				g.settled(t)
			})
		}
	}
}

// held is an actor each of whose requests waits until it is let go.
type held struct {
	*actor
	came chan string // targets, in the order of arrival
	let  chan struct{}
}

func startHeld(t testing.TB, text string) *held {
	h := &held{came: make(chan string, 100), let: make(chan struct{}, 100)}
	over := make(chan struct{})
	h.actor = startActor(t, func(c net.Conn, m *message) bool {
		h.came <- strings.Fields(m.head)[1]
		select {
		case <-h.let:
			return says(text)(c, m)
		case <-over:
			return false
		}
	})
	t.Cleanup(func() { close(over) })
	return h
}

// arrived returns the target of the next request, or fails the test.
func (h *held) arrived(t testing.TB) string {
	t.Helper()
	select {
	case target := <-h.came:
		return target
	case <-time.After(10 * time.Second):
		t.Fatal("no request within 10 s")
		return ""
	}
}

// ask sends a request whose answer is read later.
func (g *gateway) ask(t testing.TB, path string) *client {
	t.Helper()
	c := g.dial(t)
	c.send("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
	return c
}

// queue sends requests that find no place, one after the other.
func (g *gateway) queue(t testing.TB, paths ...string) (clients []*client) {
	t.Helper()
	for _, path := range paths {
		n := g.waiting()
		clients = append(clients, g.ask(t, path))
		eventually(t, path+" waits", func() bool { return g.waiting() == n+1 })
	}
	return clients
}

func TestQueueIsServedInOrder(t *testing.T) {
	for name, limits := range map[string]Limits{
		"service":  {InFlightPerService: 5},
		"instance": {InFlightPerInstance: 5},
		"both":     {InFlightPerInstance: 5, InFlightPerService: 5},
	} {
		t.Run(name, func(t *testing.T) {
			limits.QueueTimeout = 15 * time.Second
			g := startGateway(t, func(cfg *Config) { cfg.Limits = limits }, nil)
			h := startHeld(t, "x")
			g.register(t, "echo", "a", h.url())
			var first []*client
			for range 5 {
				first = append(first, g.ask(t, "/echo/first"))
				h.arrived(t)
			}
			paths := []string{"/echo/1", "/echo/2", "/echo/3", "/echo/4", "/echo/5"}
			queued := g.queue(t, paths...)
			g.do(t, "GET /echo/6 HTTP/1.1\r\nHost: x\r\n\r\n").want(t, 503)
			var got []string
			for range paths {
				h.let <- struct{}{}
				got = append(got, h.arrived(t))
			}
			for range first {
				h.let <- struct{}{}
			}
			if !slices.Equal(got, paths) {
				t.Errorf("served %v", got)
			}
			for _, c := range append(first, queued...) {
				c.read(false).want(t, 200)
			}
			g.settled(t)
		})
	}
}

// Who finds no place gets a 503 that says why, at once if the queue is full, else after its time.
func TestQueueIsBounded(t *testing.T) {
	const long, short = 20 * time.Second, 50 * time.Millisecond
	for _, tt := range []struct {
		name    string
		limits  Limits
		waiting int // before
		text    string
	}{
		{"service, full", Limits{InFlightPerService: 1, QueueTimeout: long}, 1, "the service has 1 requests in flight, its limit"},
		{"service, late", Limits{InFlightPerService: 1, QueueTimeout: short}, 0, "the service has 1 requests in flight, its limit"},
		{"service, no queue", Limits{InFlightPerService: 1, QueueTimeout: -1}, 0, "the service has 1 requests in flight, its limit"},
		{"instance, full", Limits{InFlightPerInstance: 1, QueueTimeout: long}, 1, "all instances are at their limit of 1 requests in flight"},
		{"instance, late", Limits{InFlightPerInstance: 1, QueueTimeout: short}, 0, "all instances are at their limit of 1 requests in flight"},
		{"instance, no queue", Limits{InFlightPerInstance: 1, QueueTimeout: -1}, 0, "all instances are at their limit of 1 requests in flight"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { cfg.Limits = tt.limits }, nil)
			h := startHeld(t, "x")
			g.register(t, "echo", "a", h.url())
			first := g.ask(t, "/echo")
			h.arrived(t)
			var queued []*client
			for range tt.waiting {
				queued = append(queued, g.queue(t, "/echo")...)
			}
			began := time.Now()
			c := g.dial(t)
			m := c.get("/echo").want(t, 503)
			if took := time.Since(began); took > 5*time.Second || tt.waiting == 0 && tt.limits.QueueTimeout > 0 && took < short {
				t.Errorf("took %v", took)
			}
			if m.field("Retry-After") != "1" || m.field("Proxy-Status") != "kerberos; error=connection_limit_reached" || !strings.Contains(m.body, tt.text) {
				t.Errorf("got %q %q", m.head, m.body)
			}
			for range 1 + tt.waiting {
				h.let <- struct{}{}
			}
			for _, c := range append(queued, first) {
				c.read(false).want(t, 200)
			}
			g.settled(t) // the place is given back a moment after the answer
			h.let <- struct{}{}
			c.get("/echo").want(t, 200) // the same connection goes on
			g.settled(t)
		})
	}
}

// A body is neither waited for nor asked for where its request would be refused in any case.
func TestFullQueueRefusesBeforeTheBody(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits = Limits{InFlightPerService: 1, QueueTimeout: 20 * time.Second} }, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "a", h.url())
	first := g.ask(t, "/echo")
	h.arrived(t)
	queued := g.queue(t, "/echo")
	for _, fields := range []string{"Content-Length: 5\r\n", "Content-Length: 100000\r\nExpect: 100-continue\r\n"} {
		c := g.dial(t)
		_ = c.SetReadDeadline(time.Now().Add(time.Second)) // no body ever comes
		c.send("PUT /echo HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n")
		c.read(false).want(t, 503)
		if c.interim != "" {
			t.Errorf("got %q first", c.interim)
		}
	}
	h.let <- struct{}{}
	h.let <- struct{}{}
	for _, c := range append(queued, first) {
		c.read(false).want(t, 200)
	}
}

func TestClientLeavesTheQueue(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) {
		cfg.Limits = Limits{InFlightPerService: 2, QueueTimeout: time.Minute}
		logRequests(cfg)
	}, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "a", h.url())
	first := []*client{g.ask(t, "/echo"), g.ask(t, "/echo")}
	h.arrived(t)
	h.arrived(t)
	queued := g.queue(t, "/echo/gone", "/echo/stays")
	queued[0].Close()
	eventually(t, "it leaves the queue", func() bool { return g.waiting() == 1 })
	eventually(t, "it is in the log", func() bool { return g.logged("status=499", "target=/echo/gone") == 1 })
	h.let <- struct{}{}
	if got := h.arrived(t); got != "/echo/stays" {
		t.Errorf("next came %s", got)
	}
	h.let <- struct{}{}
	h.let <- struct{}{}
	for _, c := range append(first, queued[1]) {
		c.read(false).want(t, 200)
	}
	g.settled(t)
}

// Instances that come and go are told to those who wait.
func TestQueueSeesInstances(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits = Limits{InFlightPerInstance: 3, QueueTimeout: time.Minute} }, nil)
	h := startHeld(t, "a")
	g.register(t, "echo", "a", h.url())
	var first []*client
	for range 3 {
		first = append(first, g.ask(t, "/echo"))
		h.arrived(t)
	}
	queued := g.queue(t, "/echo", "/echo", "/echo")
	b := startHeld(t, "b")
	g.register(t, "echo", "b", b.url())
	for range queued {
		b.arrived(t)
		b.let <- struct{}{}
	}
	for _, c := range queued {
		if m := c.read(false).want(t, 200); m.body != "b" {
			t.Errorf("%q answered", m.body)
		}
	}
	if err := g.reg.Unregister("echo", "b", ""); err != nil {
		t.Fatal(err)
	}
	queued = g.queue(t, "/echo", "/echo", "/echo")
	if err := g.reg.Unregister("echo", "a", ""); err != nil {
		t.Fatal(err)
	}
	for _, c := range queued {
		c.read(false).refused(t, errNoInstance)
	}
	for range first {
		h.let <- struct{}{}
	}
	for _, c := range first {
		c.read(false).want(t, 200)
	}
	g.settled(t)
}

// Time in the queue is not the backend's.
func TestQueueDoesNotCountAsRequestTime(t *testing.T) {
	const timeout = 200 * time.Millisecond
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits = Limits{InFlightPerService: 1, QueueTimeout: 20 * time.Second}
		cfg.RequestTimeout = timeout
	}, nil)
	release := make(chan struct{})
	a := startActor(t, func(c net.Conn, m *message) bool {
		if strings.Contains(m.head, "/slow") { // for longer than the timeout, with its head in time
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
			<-release
			_, err := io.WriteString(c, strings.Repeat("x", 100000))
			return err == nil
		}
		return says("x")(c, m)
	})
	g.register(t, "echo", "a", a.url())
	slow := g.ask(t, "/echo/slow")
	eventually(t, "it is in flight", func() bool { return a.served.Load() == 1 })
	queued := g.queue(t, "/echo")
	time.Sleep(timeout + timeout/2)
	close(release)
	slow.read(false).want(t, 200)
	queued[0].read(false).want(t, 200)
}

func TestTotalTimeoutInTheQueue(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits = Limits{InFlightPerService: 1, QueueTimeout: 20 * time.Second, TotalTimeout: 300 * time.Millisecond}
	}, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "a", h.url())
	first := g.ask(t, "/echo")
	h.arrived(t)
	g.queue(t, "/echo")[0].read(false).refused(t, errOverTime)
	first.read(false).refused(t, errOverTime)
	g.settled(t)
}

// A request that has to go to another instance waits for a place there, and gives up its own.
func TestRetryWaitsForAPlace(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits = Limits{InFlightPerInstance: 1, InFlightPerService: 2, QueueTimeout: 20 * time.Second}
	}, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "b", h.url())
	first := g.ask(t, "/echo")
	h.arrived(t)
	g.register(t, "echo", "a", refusedAddr(t))
	queued := g.queue(t, "/echo") // was at a
	h.let <- struct{}{}
	first.read(false).want(t, 200)
	h.arrived(t)
	h.let <- struct{}{}
	queued[0].read(false).want(t, 200)
	g.settled(t)
}

// One that has a place of the service waits in front of those that have none: what they wait for is none for it.
func TestRetryWaitsInFront(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits = Limits{InFlightPerInstance: 1, InFlightPerService: 2, QueueTimeout: 20 * time.Second}
	}, nil)
	came, does := make(chan int, 10), [2]chan act{make(chan act, 5), make(chan act, 5)}
	for i := range does {
		a := startActor(t, func(c net.Conn, m *message) bool {
			came <- i
			next, ok := <-does[i]
			return ok && next(c, m)
		})
		t.Cleanup(func() { close(does[i]) })
		g.register(t, "echo", fmt.Sprint(i), a.url())
	}
	arrived := func() int {
		select {
		case i := <-came:
			return i
		case <-time.After(10 * time.Second):
			t.Fatal("no request within 10 s")
			return 0
		}
	}
	first := g.ask(t, "/echo/first")
	at := arrived()
	second := g.ask(t, "/echo/second")
	arrived()
	third := g.queue(t, "/echo/third")[0]
	fails := func(net.Conn, *message) bool { return false }
	does[at] <- fails
	eventually(t, "the first waits too", func() bool { return g.waiting() == 2 })
	does[1-at] <- fails // the second goes where the first was, the first to where the second was
	arrived()
	arrived()
	does[1-at] <- says("first")
	if m := first.read(false).want(t, 200); m.body != "first" {
		t.Error(m.body)
	}
	for range 2 {
		does[0] <- says("x")
		does[1] <- says("x")
	}
	second.read(false).want(t, 200)
	third.read(false).want(t, 200)
	g.settled(t)
}

func TestShutdownServesTheQueue(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits = Limits{InFlightPerService: 2, QueueTimeout: 20 * time.Second} }, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "a", h.url())
	clients := []*client{g.ask(t, "/echo"), g.ask(t, "/echo")}
	h.arrived(t)
	h.arrived(t)
	clients = append(clients, g.queue(t, "/echo", "/echo")...)
	done := make(chan int)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		done <- g.Shutdown(ctx)
	}()
	eventually(t, "the shutdown has begun", g.closing.Load)
	for range clients {
		h.let <- struct{}{}
	}
	for _, c := range clients {
		c.read(false).want(t, 200)
	}
	if cut := <-done; cut != 0 {
		t.Errorf("%d were cut", cut)
	}
}

// Whatever clients, instances and timeouts do at once, every place comes back.
func TestQueueUnderStress(t *testing.T) {
	for name, limits := range map[string]Limits{
		"instance": {InFlightPerInstance: 1},
		"both":     {InFlightPerInstance: 2, InFlightPerService: 3},
	} {
		t.Run(name, func(t *testing.T) {
			limits.QueueTimeout = 2 * time.Millisecond
			g := startGateway(t, func(cfg *Config) {
				cfg.Limits, cfg.UpstreamIdle = limits, time.Minute
				cfg.Breaker = cb.Config{Failures: 2, OpenFor: time.Millisecond, Probes: 1}
			}, nil)
			var meters [3]meter
			var urls []string
			for i := range meters {
				ordinary, failing := metered(says("x"), &meters[i]), metered(answers(503), &meters[i])
				a := startActor(t, func(c net.Conn, m *message) bool {
					if rand.IntN(20) == 0 {
						return failing(c, m)
					}
					return ordinary(c, m)
				})
				urls = append(urls, a.url())
				g.register(t, "echo", fmt.Sprint(i), a.url())
			}
			var wg sync.WaitGroup
			var served atomic.Int64
			for i := range 24 {
				wg.Go(func() {
					for n := 0; n < 40; n++ {
						conn, err := net.Dial("tcp", g.addr)
						if err != nil {
							t.Error(err)
							return
						}
						_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
						c := &client{t: t, Conn: conn}
						_, _ = io.WriteString(conn, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
						if (i+n)%4 > 0 {
							if answer, err := io.ReadAll(c); err != nil || len(answer) == 0 {
								t.Errorf("%q, %v", answer, err)
							} else if strings.HasPrefix(string(answer), "HTTP/1.1 200") {
								served.Add(1)
							}
						}
						conn.Close()
					}
				})
			}
			stop := make(chan struct{})
			var churn sync.WaitGroup
			churn.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(3 * time.Millisecond):
					}
					_ = g.reg.Unregister("echo", "0", "")
					_ = g.reg.Register("echo", registry.Instance{ID: "0", Addr: urls[0]})
				}
			})
			wg.Wait()
			close(stop)
			churn.Wait()
			for i := range meters[1:] { // 0 came and went: what was in flight there is another instance's
				if most := meters[1+i].most.Load(); most > int64(limits.InFlightPerInstance) {
					t.Errorf("%d were in flight at once", most)
				}
			}
			if served.Load() == 0 {
				t.Error("none was served")
			}
			g.settled(t)
			eventually(t, "a request passes", func() bool { return g.do(t, smallGet).status() == 200 })
		})
	}
}

// ages has all idle connections be idle for longer than they are.
func (g *gateway) ages() {
	g.onLoops(func(w *worker) {
		for _, bucket := range w.wheel {
			for _, c := range bucket {
				c.since -= 10
			}
		}
	})
}

func (g *gateway) open() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns)
}

func TestConnectionsAreLimited(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections = 3 }, nil)
	g.register(t, "echo", "a", naming(t, "x").url())
	var clients []*client
	for range 3 {
		c := g.dial(t)
		c.get("/echo").want(t, 200)
		clients = append(clients, c)
	}
	for range 2 * maxLeaving {
		c := g.dial(t)
		m := c.get("/echo").want(t, 503)
		if m.field("Connection") != "close" || m.field("Retry-After") != "1" ||
			m.field("Proxy-Status") != "kerberos; error=connection_limit_reached" || !strings.Contains(m.body, "3 connections") {
			t.Fatalf("got %q %q", m.head, m.body)
		}
		c.closed()
	}
	if n := g.logged("connections refused"); n < 1 || n > 5 {
		t.Errorf("%d lines in the log", n)
	}
	g.onLoops(func(w *worker) {
		if len(w.leaving) > maxLeaving {
			t.Errorf("%d connections are being left", len(w.leaving))
		}
	})
	eventually(t, "the refused ones are closed", func() (none bool) {
		g.onLoops(func(w *worker) { none = len(w.leaving) == 0 })
		return none
	})

	clients[0].Close()
	eventually(t, "it is gone", func() bool { return g.open() == 2 })
	clients[0] = g.dial(t)
	clients[0].get("/echo").want(t, 200)

	g.ages()
	clients[2].get("/echo").want(t, 200) // now it has not been idle for long
	for range 2 {
		c := g.dial(t)
		c.get("/echo").want(t, 200)
	}
	clients[0].closed()
	clients[1].closed()
	clients[2].get("/echo").want(t, 200)
	g.dial(t).read(false).want(t, 503) // without a request, after a moment
	if n := g.open(); n != 3 {
		t.Errorf("%d are open", n)
	}
}

// However long connections may be idle, one of them makes room.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	for _, idle := range []time.Duration{0, 10 * time.Minute, -1} {
		g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections, cfg.Limits.IdleTimeout = 2, idle }, nil)
		g.register(t, "echo", "a", naming(t, "x").url())
		for range 5 {
			g.dial(t).get("/echo").want(t, 200)
			g.ages()
		}
		if n := g.open(); n != 2 {
			t.Errorf("idle timeout %v: %d are open", idle, n)
		}
	}
}

// A connection with a request under way makes room for nobody, nor does one that has just sent something.
func TestBusyConnectionsMakeNoRoom(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections = 2 }, nil)
	h := startHeld(t, "x")
	g.register(t, "echo", "a", h.url())
	clients := []*client{g.ask(t, "/echo"), g.ask(t, "/echo")}
	h.arrived(t)
	h.arrived(t)
	g.ages()
	for range 3 {
		g.dial(t).get("/echo").want(t, 503)
	}
	for range clients {
		h.let <- struct{}{}
	}
	for _, c := range clients {
		c.read(false).want(t, 200)
	}
}

// One that goes on sending its head does not either.
func TestHeadThatGoesOnMakesNoRoom(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections = 1 }, nil)
	g.register(t, "echo", "a", naming(t, "x").url())
	c := g.dial(t)
	c.send("GET /echo HTTP/1.1\r\n")
	eventually(t, "it has begun", func() bool { return g.halfRead() == 1 })
	g.ages()
	c.send("Host: x\r\n")
	g.taken(t)
	g.dial(t).get("/echo").want(t, 503)
	c.send("\r\n")
	c.read(false).want(t, 200)
}

// Nor does it matter which loop the idle connection is on, and which one the new one comes to.
func TestConnectionsOfOtherLoopsMakeRoom(t *testing.T) {
	g := startLoops(t, 4, func(cfg *Config) { cfg.Limits.Connections = 1 }, nil)
	g.register(t, "echo", "a", naming(t, "x").url())
	for range 20 {
		g.dial(t).get("/echo").want(t, 200)
		g.ages()
	}
}

// A client that has too many of its own costs nobody else one.
func TestTooManyOfAClientMakeNoRoom(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections, cfg.Limits.ConnectionsPerClient = 2, 1 }, nil)
	g.register(t, "echo", "a", naming(t, "x").url())
	clients := []*client{g.dial(t), dialFrom(t, g, "127.0.0.2")}
	for _, c := range clients {
		c.get("/echo").want(t, 200)
	}
	g.ages()
	g.dial(t).get("/echo").want(t, 429)
	for _, c := range clients {
		c.get("/echo").want(t, 200)
	}
}

func TestConnectionsPerClientAreLimited(t *testing.T) {
	for name, trusted := range map[string][]netip.Prefix{"client": nil, "trusted": {netip.MustParsePrefix("127.0.0.1/32")}} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				cfg.Limits.ConnectionsPerClient = 2
				cfg.TrustedProxies = trusted
			}, nil)
			g.register(t, "echo", "a", naming(t, "x").url())
			var clients []*client
			for range 2 {
				c := g.dial(t)
				c.get("/echo").want(t, 200)
				clients = append(clients, c)
			}
			if trusted != nil {
				g.dial(t).get("/echo").want(t, 200)
				return
			}
			c := g.dial(t)
			m := c.get("/echo").want(t, 429)
			if m.field("Retry-After") != "1" || m.field("Proxy-Status") != "kerberos; error=connection_limit_reached" {
				t.Errorf("got %q", m.head)
			}
			c.closed()
			other := dialFrom(t, g, "127.0.0.2")
			other.get("/echo").want(t, 200)
			clients[0].Close()
			eventually(t, "it is gone", func() bool { return g.open() == 2 })
			c = g.dial(t)
			c.get("/echo").want(t, 200)
			for _, c := range []*client{c, clients[1], other} {
				c.Close()
			}
			eventually(t, "nothing is left", func() bool {
				g.mu.Lock()
				defer g.mu.Unlock()
				return len(g.conns) == 0 && len(g.clients) == 0
			})
		})
	}
}

// dialFrom connects from another address of the loopback.
func dialFrom(t testing.TB, g *gateway, ip string) *client {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	conn, err := d.Dial("tcp", g.addr)
	if err != nil {
		t.Skipf("no connection from %s: %v", ip, err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{t: t, Conn: conn, r: bufio.NewReader(conn)}
}

// Ordinary clients read why they are refused, whether they have sent something before or not.
func TestRefusedConnectionsReadWhy(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits.Connections = 1 }, nil)
	g.register(t, "echo", "a", naming(t, "x").url())
	c := g.dial(t)
	c.get("/echo").want(t, 200)
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	ordinary := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	for range 50 {
		response, err := ordinary.Post("http://"+g.addr+"/echo", "text/plain", strings.NewReader(strings.Repeat("x", 200<<10)))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != 503 || !strings.Contains(string(body), "1 connections") {
			t.Fatalf("%v, %d %q", err, response.StatusCode, body)
		}
	}
}
