package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// reconfigure changes what is in force.
func (g *gateway) reconfigure(t testing.TB, change func(*Config)) {
	t.Helper()
	cfg := g.cfg().Config
	cfg.RequestTimeout, cfg.Limits, cfg.Retries = 0, Limits{}, 0 // they are in force with their defaults filled in
	change(&cfg)
	publish, err := g.Reconfigure(cfg)
	if err != nil {
		t.Fatal(err)
	}
	publish()
}

func TestReconfigure(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 2, OpenFor: time.Hour} }, nil)
	for _, service := range []string{"one", "two"} {
		for _, id := range []string{"a", "b"} {
			g.register(t, service, id, naming(t, service+id).url())
		}
	}
	c := g.dial(t)
	c.get("/one").want(t, 200)
	upstream := g.service("one").view.Load().upstream("a")

	g.reconfigure(t, func(cfg *Config) {
		cfg.Routes = parseRoutes("/x=one /y=later")
		cfg.Limits.Body = 3
		cfg.NoVia = true
	})
	if body := c.get("/x").want(t, 200).body; !strings.HasPrefix(body, "one") {
		t.Errorf("/x: %q", body)
	}
	c.get("/one").want(t, 404)
	c.get("/y").want(t, 503) // named, and nobody is there
	c.post("/x", "1234").want(t, 413)
	if g.service("one").view.Load().upstream("a") != upstream {
		t.Error("instances began anew")
	}

	// A strategy and a breaker of one service.
	g.reconfigure(t, func(cfg *Config) {
		cfg.Routes = nil
		cfg.Services = map[string]Service{"one": {Strategy: lb.IPHash, Breaker: cb.Config{Failures: 1}}}
	})
	if got := g.DescribeService("one").InForce; got != "ip-hash" {
		t.Errorf("one: %s", got)
	}
	if got := g.DescribeService("two").InForce; got != "round-robin" {
		t.Errorf("two: %s", got)
	}
	seen := map[string]bool{}
	for range 4 {
		seen[c.get("/one").want(t, 200).body] = true
	}
	if len(seen) != 1 {
		t.Errorf("ip-hash: answers of %v", seen)
	}
	c.get("/y").want(t, 404)
	for _, service := range []string{"one", "two"} {
		if err := g.reg.Unregister(service, "b", ""); err != nil {
			t.Fatal(err)
		}
		token, _ := g.service(service).view.Load().upstream("a").gate.Allow()
		g.service(service).view.Load().upstream("a").gate.Failure(token, nil)
	}
	if one, two := g.DescribeInstance("one", "a").Breaker.State, g.DescribeInstance("two", "a").Breaker.State; one != "open" || two != "closed" {
		t.Errorf("breakers after one failure: one %s, two %s", one, two)
	}
	// The breaker that is open stays so.
	g.reconfigure(t, func(cfg *Config) { cfg.Services = nil })
	if got := g.DescribeInstance("one", "a").Breaker.State; got != "open" {
		t.Errorf("the breaker of one is %s", got)
	}
}

// A check of a service is that of its instances which register none, and comes and goes while they are asked.
func TestReconfigureChecks(t *testing.T) {
	g := startGateway(t, nil, nil)
	a, own := startSick(t, false), startSick(t, true)
	g.register(t, "echo", "a", a.url())
	g.checked(t, "own", own.url(), nil)
	eventually(t, "its own check fails", func() bool { return g.reason("own") == "check failing: got status 500" })
	set := func(check *registry.Check) {
		t.Helper()
		g.reconfigure(t, func(cfg *Config) { cfg.Services = map[string]Service{"echo": {Check: check}} })
	}
	set(&registry.Check{Path: "/health", Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, Fall: 1})
	if g.reason("a") != "" { // it has served, and is out when it fails
		t.Errorf("a is %q", g.reason("a"))
	}
	eventually(t, "a is checked", func() bool { return a.checks.Load() > 1 })
	if status := g.DescribeInstance("echo", "a"); status.Check == nil || status.Check.Path != "/health" || status.Health == nil {
		t.Errorf("%+v", status)
	}
	a.sick.Store(true)
	eventually(t, "a is down", func() bool { return g.reason("a") == "check failing: got status 500" })
	if reason := g.reason("own"); reason != "check failing: got status 500" {
		t.Errorf("own is %q", reason)
	}
	set(nil)
	if status := g.DescribeInstance("echo", "a"); !status.Ready || status.Health != nil {
		t.Errorf("without a check: %+v", status)
	}
	g.dial(t).get("/echo").want(t, 200)
	if g.DescribeInstance("echo", "own").Health == nil {
		t.Error("own is not checked any more")
	}
	// One that comes under it is new.
	set(&registry.Check{Path: "/health", Interval: time.Hour, Timeout: time.Minute})
	g.register(t, "echo", "b", startActor(t, hangs).url())
	if reason := g.reason("b"); reason != "not checked yet" {
		t.Errorf("b is %q", reason)
	}
	cfg := g.cfg().Config
	cfg.Services = map[string]Service{"echo": {Check: &registry.Check{}}}
	if _, err := g.Reconfigure(cfg); err == nil || !strings.Contains(err.Error(), "echo: Check: check") {
		t.Errorf("a check of nothing: %v", err)
	}
}

func TestReconfigureRefuses(t *testing.T) {
	g := startGateway(t, nil, nil)
	before := g.cfg()
	for name, change := range map[string]func(*Config){
		"UpstreamIdle": func(cfg *Config) { cfg.UpstreamIdle = time.Hour },
		"Loops":        func(cfg *Config) { cfg.Loops = 7 },
		"Strategy":     func(cfg *Config) { cfg.Strategy = "fastest" },
		"route api":    func(cfg *Config) { cfg.Routes = []Route{{Prefix: "api", Service: "x"}} },
	} {
		cfg := before.Config
		change(&cfg)
		if _, err := g.Reconfigure(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if g.cfg() != before {
		t.Error("something was published")
	}
}

// A request that waits for a place has it when the limit is raised.
func TestReconfigureLimits(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits.InFlightPerService, cfg.Limits.QueueTimeout = 1, 20*time.Second }, nil)
	arrived, answer := make(chan struct{}, 2), make(chan struct{})
	g.register(t, "echo", "a", startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		for {
			if _, err := o.next(r); err != nil {
				return
			}
			arrived <- struct{}{}
			<-answer
			fmt.Fprint(c, ok(2))
		}
	}).url())
	first, second := g.dial(t), g.dial(t)
	first.send(smallGet)
	<-arrived
	second.send(smallGet)
	eventually(t, "the second one waits", func() bool { return g.service("echo").crowd.waiting.Load() == 1 })
	g.reconfigure(t, func(cfg *Config) { cfg.Limits.InFlightPerService, cfg.Limits.QueueTimeout = 2, 20*time.Second })
	<-arrived
	close(answer)
	first.read(false).want(t, 200)
	second.read(false).want(t, 200)
}

// Leave closes one listener, and neither its connections nor the other.
func TestLeave(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", naming(t, "a").url())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(ln) }()
	other := &gateway{Proxy: g.Proxy, addr: ln.Addr().String()}
	c := other.dial(t)
	c.get("/echo").want(t, 200)
	g.Leave(ln)
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := net.Dial("tcp", other.addr); err == nil {
		t.Error("it still accepts")
	}
	c.get("/echo").want(t, 200)
	g.dial(t).get("/echo").want(t, 200)
}

// A listener that is left before it is served is closed all the same: two reloads may come close together.
func TestLeaveBeforeServe(t *testing.T) {
	g := startGateway(t, nil, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.Leave(ln)
	served := make(chan error, 1)
	go func() { served <- g.Serve(ln) }()
	select {
	case err := <-served:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it is served")
	}
	if c, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		c.Close()
		t.Error("it still accepts")
	}
}

// answerAll answers each request, and unlike naming keeps none.
func answerAll(_ *origin, c net.Conn, r *bufio.Reader) {
	for {
		if _, err := readMessage(r, false); err != nil {
			return
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"); err != nil {
			return
		}
	}
}

// Many changes under load: no request fails, and nothing is left of them.
func TestReconfigureUnderLoad(t *testing.T) {
	changes := 10_000
	if testing.Short() || raceDetector {
		changes = 300
	}
	g := startGateway(t, nil, nil)
	for _, service := range []string{"one", "two"} {
		for _, id := range []string{"a", "b", "c"} {
			g.register(t, service, id, startOrigin(t, answerAll).url())
		}
	}
	change := func(i int) {
		g.reconfigure(t, func(cfg *Config) {
			cfg.Routes = []Route{
				{Prefix: "/x", Service: []string{"one", "two"}[i%2], Policy: Policy{Retries: i % 3}},
				{Prefix: "/y", Service: "one", StripPrefix: i%2 == 0, Response: Edits{Set: []Field{{"X-Change", fmt.Sprint(i)}}}},
				{Prefix: "/*"},
			}
			if i%10 == 0 {
				cfg.Services = map[string]Service{"one": {Strategy: lb.Strategies()[i/10%len(lb.Strategies())], Breaker: cb.Config{Failures: 1 + i%7}}}
			}
			cfg.Limits.InFlightPerInstance = []int{0, 1000}[i%2]
		})
	}
	change(0)
	stop := make(chan struct{})
	var load sync.WaitGroup
	var answered atomic.Int64
	for i := range 4 {
		load.Go(func() {
			c := g.dial(t)
			for {
				select {
				case <-stop:
					return
				default:
				}
				request := []string{"GET /x HTTP/1.1\r\nHost: h\r\n\r\n", "POST /y/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"}[i%2]
				c.send(request)
				if m := c.read(false); m == nil || m.status() != 200 {
					t.Errorf("%q: %+v", request, m)
					return
				}
				answered.Add(1)
			}
		})
	}
	memory := func() (uint64, int) {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, runtime.NumGoroutine()
	}
	for i := range changes / 10 {
		change(i)
	}
	heap, goroutines := memory()
	for i := range changes * 9 / 10 {
		change(i)
	}
	heapAfter, goroutinesAfter := memory()
	close(stop)
	load.Wait()
	if heapAfter > heap+4<<20 || goroutinesAfter > goroutines+10 {
		t.Errorf("after %d changes: %d KiB and %d goroutines, before the last nine tenths %d KiB and %d", changes, heapAfter>>10, goroutinesAfter, heap>>10, goroutines)
	}
	t.Logf("%d requests beside %d changes; %d KiB, %d goroutines", answered.Load(), changes, heapAfter>>10, goroutinesAfter)
}
