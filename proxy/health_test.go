package proxy

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/lb"
	"kerberos/registry"
	"kerberos/registry/health"
)

// checked registers an instance with a check of /health every 500 ms.
func (g *gateway) checked(t testing.TB, id, addr string, change func(*registry.Instance)) {
	t.Helper()
	in := registry.Instance{ID: id, Addr: addr, Check: &registry.Check{Path: "/health", Interval: 500 * time.Millisecond, Fall: 1, Rise: 1}}
	if change != nil {
		change(&in)
	}
	if err := g.reg.Register("echo", in); err != nil {
		t.Fatal(err)
	}
}

// sick is a backend whose checks fail while sick is set; other requests are answered all the same.
type sick struct {
	*actor
	sick   atomic.Bool
	checks atomic.Int64
}

func startSick(t testing.TB, isSick bool) *sick {
	s := &sick{}
	s.sick.Store(isSick)
	s.actor = startActor(t, func(c net.Conn, m *message) bool {
		if strings.HasPrefix(m.head, "GET /health ") {
			s.checks.Add(1)
			if s.sick.Load() {
				return answers(500)(c, m)
			}
		}
		return answers(200)(c, m)
	})
	return s
}

func (g *gateway) reason(id string) string { return g.DescribeInstance("echo", id).Reason }

// openRegistry opens the registry that a directory keeps, as a start does.
func openRegistry(t *testing.T, dir string) *registry.Registry {
	t.Helper()
	reg, err := registry.Open(registry.Config{}, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Close)
	return reg
}

// After a restart instances are not all checked at once: those that accept connections serve, and have their turn within 2 s.
// One that accepts none does not serve from the start on, and its checks say so at once too, however long they are apart.
func TestRestoredAreCheckedInTheirTurn(t *testing.T) {
	t.Parallel()
	const n, turn, parts = 100, 2 * time.Second, 10
	var mu sync.Mutex
	var checks []time.Time
	here := startActor(t, func(c net.Conn, m *message) bool {
		if strings.HasPrefix(m.head, "GET /health ") {
			mu.Lock()
			checks = append(checks, time.Now())
			mu.Unlock()
		}
		return answers(200)(c, m)
	})
	dir := t.TempDir()
	reg := openRegistry(t, dir)
	var all sync.WaitGroup
	put := func(id, addr string, interval time.Duration) {
		all.Go(func() {
			if err := reg.Register("echo", registry.Instance{ID: id, Addr: addr, Check: &registry.Check{Path: "/health", Interval: interval}}); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range n {
		put(fmt.Sprint("here-", i), here.url(), time.Hour)
	}
	put("away", refusedAddr(t), time.Hour)
	all.Wait()
	reg.Close()

	reg = openRegistry(t, dir)
	began := time.Now()
	g := startGateway(t, func(cfg *Config) { cfg.Registry = reg }, nil)
	if ready, why := g.service("echo").view.Load().ready, g.reason("away"); ready != n || why != "unreachable" {
		t.Errorf("at the start %d are ready, and the one that is away is %q", ready, why)
	}
	g.do(t, smallGet).want(t, 200)
	eventually(t, "the checks of the one that is away fail", func() bool { return g.DescribeInstance("echo", "away").Health.State == string(health.Down) })
	eventually(t, "each of the others has had its check", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(checks) >= n
	})
	mu.Lock()
	defer mu.Unlock()
	var in [parts]int
	for _, at := range checks[:n] { // nobody has a second one before
		in[min(int(at.Sub(began)/(turn/parts)), parts-1)]++
	}
	for part, got := range in {
		if got > 4*n/parts {
			t.Errorf("%d checks in part %d of the time: more than four times the share; %v", got, part, in)
		}
	}
}

// An instance whose checks fail since a restart stays out when they get other settings.
func TestRestoredStaysOut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := startSick(t, true)
	reg := openRegistry(t, dir)
	if err := reg.Register("echo", registry.Instance{ID: "a", Addr: s.url()}); err != nil {
		t.Fatal(err)
	}
	reg.Close()

	reg = openRegistry(t, dir)
	every := func(interval time.Duration) map[string]Service {
		return map[string]Service{"echo": {Check: &registry.Check{Path: "/health", Interval: interval}}}
	}
	g := startGateway(t, func(cfg *Config) { cfg.Registry, cfg.Services = reg, every(time.Minute) }, nil)
	eventually(t, "its check fails", func() bool { return g.reason("a") != "" })
	for i := range 10 {
		publish, err := g.Reconfigure(Config{Registry: reg, UpstreamIdle: 100 * time.Millisecond, Services: every(time.Minute + time.Duration(i+1)*time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		publish()
		g.do(t, smallGet).want(t, 503)
	}
}

// None, one and all of the instances fail their checks: the others carry all, and without others it is as if nobody were there.
func TestChecksDecide(t *testing.T) {
	t.Parallel()
	for _, strategy := range lb.Strategies() {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, func(cfg *Config) { cfg.Strategy = strategy }, nil)
			a, b := startSick(t, true), startSick(t, false)
			weight := func(in *registry.Instance) { in.Weight = 1 }
			g.checked(t, "a", a.url(), weight)
			g.checked(t, "b", b.url(), weight)
			eventually(t, "b is ready, a is not", func() bool { return g.reason("b") == "" && g.reason("a") == "check failing: got status 500" })
			ready := func(want int) {
				t.Helper()
				eventually(t, fmt.Sprintf("%d are ready", want), func() bool { return g.service("echo").view.Load().ready == want })
				for range 4 {
					status := 200
					if want == 0 {
						status = 503
					}
					if m := g.do(t, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); m.status() != status {
						t.Errorf("%d ready: %s", want, m.head)
					}
				}
			}
			ready(1)
			if n := a.count() - int(a.checks.Load()); n > 0 {
				t.Errorf("a, which is down, got %d requests", n)
			}
			b.sick.Store(true)
			ready(0)
			a.sick.Store(false)
			b.sick.Store(false)
			ready(2)
			h := g.DescribeInstance("echo", "a").Health
			if h == nil || h.State != "up" || h.LastError != "" || h.CheckedAt == nil || h.Since.IsZero() {
				t.Errorf("health %+v", h)
			}
			if log := g.logs.String(); !strings.Contains(log, `msg="instance is down" service=echo instance=a reason="got status 500"`) || !strings.Contains(log, `msg="instance is up" service=echo instance=a`) {
				t.Errorf("logged %s", log)
			}
		})
	}
}

// A new instance waits for its first check, unless it is to start up.
func TestFirstCheck(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil, nil)
	silent := startActor(t, hangs)
	g.checked(t, "a", silent.url(), func(in *registry.Instance) { in.Check.Interval, in.Check.Timeout = time.Hour, time.Minute })
	if g.reason("a") != "not checked yet" || g.service("echo").view.Load().ready != 0 {
		t.Errorf("before its first check it is %q", g.reason("a"))
	}
	if h := g.DescribeInstance("echo", "a").Health; h.State != "unknown" || h.CheckedAt != nil {
		t.Errorf("health %+v", h)
	}
	g.checked(t, "b", silent.url(), func(in *registry.Instance) {
		in.Check.Interval, in.Check.Timeout, in.Check.Start = time.Hour, time.Minute, registry.StartUp
	})
	if g.reason("b") != "" || g.service("echo").view.Load().ready != 1 {
		t.Errorf("one that starts up is %q", g.reason("b"))
	}
}

// Whoever registers the same again keeps what is thought of him; with another check it is the other that is asked.
func TestCheckChanges(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil, nil)
	a := startSick(t, false)
	slow := func(in *registry.Instance) { in.Check.Interval, in.Check.Timeout = time.Hour, time.Minute }
	g.checked(t, "a", a.url(), slow)
	eventually(t, "a is ready", func() bool { return g.reason("a") == "" })
	for range 10 {
		g.checked(t, "a", a.url(), slow)
	}
	a.sick.Store(true)
	g.checked(t, "a", a.url(), func(in *registry.Instance) { slow(in); in.Weight = 7 })
	if ready, reason := g.service("echo").view.Load().upstream("a").ready(); !ready || a.checks.Load() != 1 {
		t.Errorf("registered again it is %q after %d checks", reason, a.checks.Load())
	}
	// A new check does not put out who is in, until it fails.
	g.checked(t, "a", a.url(), func(in *registry.Instance) { slow(in); in.Check.Fall = 2 })
	eventually(t, "the new check ran", func() bool { return g.DescribeInstance("echo", "a").Health.LastError != "" })
	if g.reason("a") != "" {
		t.Errorf("one failure of two: %s", g.reason("a"))
	}
	g.checked(t, "a", a.url(), nil)
	eventually(t, "it is down", func() bool { return g.reason("a") == "check failing: got status 500" })
	g.register(t, "echo", "a", a.url())
	if g.reason("a") != "" || g.DescribeInstance("echo", "a").Health != nil {
		t.Errorf("without a check: %q", g.reason("a"))
	}
	before := a.checks.Load()
	time.Sleep(1200 * time.Millisecond)
	if n := a.checks.Load(); n > before+1 { // one may have been under way
		t.Errorf("%d checks of who has none", n-before)
	}
	// One that served without a check is not new.
	g.checked(t, "a", a.url(), func(in *registry.Instance) { in.Check.Fall = 100 })
	if g.reason("a") != "" {
		t.Errorf("with a check again: %q", g.reason("a"))
	}
}

// Each way to be out has its reason: what an operator says, an address that is not known, a check, the breaker; the first of
// these is the one that is shown.
func TestOneReason(t *testing.T) {
	t.Parallel()
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = time.Hour }, nil)
	a := startSick(t, false)
	g.checked(t, "a", a.url(), nil)
	reasons := func(want string) {
		t.Helper()
		eventually(t, want, func() bool {
			return g.reason("a") == want && (g.service("echo").view.Load().ready == 1) == (want == "")
		})
	}
	state := func(s registry.State) {
		t.Helper()
		if err := g.reg.Patch("echo", "a", registry.Patch{SetState: true, State: s}); err != nil {
			t.Fatal(err)
		}
	}
	reasons("")
	u := g.service("echo").view.Load().upstream("a")
	for range 5 {
		token, _ := u.gate.Allow()
		u.gate.Failure(token, nil)
	}
	reasons("breaker open")
	if h := g.DescribeInstance("echo", "a").Health; h.State != "up" {
		t.Errorf("the breaker has made it %s to its checks", h.State)
	}
	a.sick.Store(true)
	reasons("check failing: got status 500")
	state(registry.Drain)
	reasons("drain")
	state(registry.Down)
	reasons("down")
	a.sick.Store(false)
	eventually(t, "it is checked while it is down", func() bool { return g.DescribeInstance("echo", "a").Health.State == "up" })
	state("")
	reasons("breaker open")

	// The other way round: checks that fail open no breaker.
	b := startSick(t, true)
	g.checked(t, "b", b.url(), nil)
	eventually(t, "six checks have failed", func() bool { return b.checks.Load() >= 6 })
	if s := g.DescribeInstance("echo", "b"); s.Breaker.State != "closed" || s.Failure != 0 {
		t.Errorf("checks have made it %+v", s)
	}
	g.checked(t, "c", "http://nobody.invalid", nil)
	eventually(t, "c is not resolved", func() bool { return strings.HasPrefix(g.reason("c"), "unresolved") })
}

// A half-open instance whose check fails gets no probe.
func TestNoProbeWhileSick(t *testing.T) {
	t.Parallel()
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 10 * time.Millisecond }, nil)
	a := startSick(t, false)
	g.checked(t, "a", a.url(), nil)
	eventually(t, "a is ready", func() bool { return g.reason("a") == "" })
	u := g.service("echo").view.Load().upstream("a")
	for range 5 {
		token, _ := u.gate.Allow()
		u.gate.Failure(token, nil)
	}
	eventually(t, "it is half-open", func() bool { return len(g.service("echo").view.Load().probing) == 1 })
	a.sick.Store(true)
	eventually(t, "it is not probed", func() bool { return len(g.service("echo").view.Load().probing) == 0 })
	if m := g.do(t, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); m.status() != 503 {
		t.Errorf("%s", m.head)
	}
	a.sick.Store(false)
	eventually(t, "requests have closed the breaker", func() bool {
		g.do(t, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		return g.reason("a") == ""
	})
}

// While an instance starts slowly its share grows from a tenth to the whole; before and after it the view is another.
func TestSlowStart(t *testing.T) {
	t.Parallel()
	for _, strategy := range []lb.Strategy{lb.RoundRobin, lb.Random, lb.WeightedRoundRobin, lb.WeightedRandom} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			const ramp = 6 * time.Second
			g := startGateway(t, func(cfg *Config) { cfg.Strategy = strategy }, nil)
			register := func(id string, slow time.Duration) *actor {
				a := startActor(t, answers(200))
				if err := g.reg.Register("echo", registry.Instance{ID: id, Addr: a.url(), Weight: 3, SlowStart: slow}); err != nil {
					t.Fatal(err)
				}
				return a
			}
			plain := fmt.Sprintf("%T", lb.New(strategy, []lb.Endpoint{{ID: "a", Weight: 1}}, nil))
			a := register("a", 0)
			if got := fmt.Sprintf("%T", g.service("echo").view.Load().balancer); got != plain {
				t.Errorf("before: %s", got)
			}
			b := register("b", ramp)
			began := time.Now()
			status := g.DescribeService("echo")
			if weighted := strategy.WithWeights(); status.InForce != string(weighted) || (status.Why == "b is in slow start") != (weighted != strategy) {
				t.Errorf("in the beginning: %+v", status)
			}
			c := g.dial(t)
			share := func() float64 { // of b, of 200 requests
				a.count()
				b.count()
				for range 200 {
					c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
					if m := c.read(false); m.status() != 200 {
						t.Fatal(m.head)
					}
				}
				others, own := a.count(), b.count()
				if others+own != 200 {
					t.Fatalf("%d and %d requests came", others, own)
				}
				return float64(own) / 200
			}
			near := func(got, want float64) bool { return got > want-0.2 && got < want+0.2 } // of 200 draws
			first, took := share(), time.Since(began)
			if took < ramp/3 && (first > 0.4 || first < 0.02) {
				t.Errorf("in the first %v its share is %.3f", took, first)
			}
			var sum, n [3]float64 // by thirds of the ramp
			for at := took; at < ramp; at = time.Since(began) {
				third := int(3 * at / ramp)
				sum[third] += share()
				n[third]++
			}
			for i := 1; i < 3; i++ { // the draws of 200 requests may be 0.1 off, the mean of many is not
				if few := min(n[i-1], n[i]) < 10; !few && sum[i]/n[i] < sum[i-1]/n[i-1] {
					t.Errorf("its share falls from %.3f to %.3f", sum[i-1]/n[i-1], sum[i]/n[i])
				}
			}
			eventually(t, "it is over", func() bool { return g.DescribeService("echo").InForce == string(strategy) })
			if got := fmt.Sprintf("%T", g.service("echo").view.Load().balancer); got != plain || g.DescribeService("echo").Why != "" {
				t.Errorf("afterwards: %s, %+v", got, g.DescribeService("echo"))
			}
			if last := share(); !near(last, 0.5) {
				t.Errorf("afterwards its share is %.3f", last)
			}
			s := g.service("echo")
			s.mu.Lock()
			defer s.mu.Unlock()
			if len(s.slow) > 0 || s.nextStep != nil {
				t.Errorf("%d are slow, timer %v", len(s.slow), s.nextStep)
			}
		})
	}
}

// A service that starts as a whole shares evenly, and serves.
func TestAllStartSlowly(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil, nil)
	var all []*actor
	for i := range 4 {
		a := startActor(t, answers(200))
		all = append(all, a)
		if err := g.reg.Register("echo", registry.Instance{ID: fmt.Sprint(i), Addr: a.url(), SlowStart: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	c := g.dial(t)
	for range 400 {
		c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
		if m := c.read(false); m.status() != 200 {
			t.Fatal(m.head)
		}
	}
	for i, a := range all {
		if n := a.count(); n < 90 || n > 110 {
			t.Errorf("instance %d got %d of 400", i, n)
		}
	}
}

// Who is registered again does not start anew; who comes back from a check or a breaker does. With ip-hash nobody does.
func TestWhoStartsSlowly(t *testing.T) {
	t.Parallel()
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 10 * time.Millisecond }, nil)
	slow := func(in *registry.Instance) { in.SlowStart = 300 * time.Millisecond }
	a := startSick(t, false)
	g.register(t, "echo", "other", startActor(t, answers(200)).url())
	starts := func(want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("slow start %t", want), func() bool { return (g.DescribeService("echo").Why == "a is in slow start") == want })
	}
	starts(false)
	g.checked(t, "a", a.url(), slow)
	starts(true)
	starts(false)
	for range 3 {
		g.checked(t, "a", a.url(), slow)
		if g.DescribeService("echo").Why != "" {
			t.Error("it starts slowly when it is registered again")
		}
	}
	a.sick.Store(true)
	eventually(t, "it is down", func() bool { return g.reason("a") != "" })
	a.sick.Store(false)
	starts(true)
	starts(false)
	u := g.service("echo").view.Load().upstream("a")
	for range 5 {
		token, _ := u.gate.Allow()
		u.gate.Failure(token, nil)
	}
	eventually(t, "the breaker has closed again", func() bool {
		g.do(t, "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		return g.DescribeInstance("echo", "a").Breaker.State == "closed" && g.DescribeService("echo").Why != ""
	})
	starts(false)

	// A weight of 1,000,000 has its share too, and one that is missing is told beside.
	h := startGateway(t, func(cfg *Config) { cfg.Strategy = lb.WeightedRoundRobin }, nil)
	for id, weight := range map[string]int{"a": registry.MaxWeight, "b": 0} {
		if err := h.reg.Register("echo", registry.Instance{ID: id, Addr: a.url(), Weight: weight, SlowStart: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	if s := h.DescribeService("echo"); s.InForce != "weighted-round-robin" || s.Why != "b has no weight; a is in slow start" {
		t.Errorf("%+v", s)
	}
	k := startGateway(t, func(cfg *Config) { cfg.Strategy = lb.IPHash }, nil)
	if err := k.reg.Register("echo", registry.Instance{ID: "a", Addr: a.url(), SlowStart: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if s := k.DescribeService("echo"); s.InForce != "ip-hash" || s.Why != "" {
		t.Errorf("%+v", s)
	}
}
