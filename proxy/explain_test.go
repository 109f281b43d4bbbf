package proxy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// question is one that names what a test's request has.
func question(method, path string, fields ...string) registry.Question {
	return registry.Question{Method: method, Host: "x", Path: path, Fields: fields, Client: netip.MustParseAddr("127.0.0.1")}
}

// foretold asks what a request would find, sends it, and fails the test unless it finds that.
func (g *gateway) foretold(t testing.TB, c *client, q registry.Question) registry.Explanation {
	t.Helper()
	e := g.Explain(q)
	out := e.Outcome
	c.send(q.Method + " " + q.Path + " HTTP/1.1\r\nHost: " + q.Host + "\r\n" + fieldLines(q.Fields) + "\r\n")
	m := c.read(q.Method == "HEAD")
	asked := fmt.Sprintf("%s %s: %+v, then", q.Method, q.Path, out)
	switch own := m.field("Proxy-Status"); out.Kind {
	case registry.ToInstance:
		if own != "" || m.body != out.Instance {
			t.Errorf("%s %q %q", asked, m.head, m.body)
		}
	case registry.ToDrawn:
		if own != "" || m.status() != 200 || e.Service.Instances[m.body].Share == 0 {
			t.Errorf("%s %q %q", asked, m.head, m.body)
		}
	case registry.ToGateway:
		if own != "" || out.Status != 0 && out.Status != m.status() {
			t.Errorf("%s %q", asked, m.head)
		}
	default:
		again, _ := strconv.Atoi(m.field("Retry-After"))
		if m.status() != out.Status || own != "kerberos; error="+out.Error || again-out.RetryAfter < -1 || again > out.RetryAfter {
			t.Errorf("%s %q", asked, m.head)
		}
	}
	return e
}

// What is explained is what then happens, whatever stands in the way.
func TestExplain(t *testing.T) {
	t.Parallel()
	patch := func(t *testing.T, g *gateway, id string, state registry.State) {
		if err := g.reg.Patch("echo", id, registry.Patch{SetState: true, State: state}); err != nil {
			t.Fatal(err)
		}
	}
	hour := func(cfg *Config) { cfg.Breaker.OpenFor = time.Hour }
	tests := []struct {
		name   string
		change func(*Config)
		set    func(*testing.T, *gateway) // with an instance a that answers
		ask    registry.Question
		kind   string
		status int
		kinds  string // of the error
		why    string // part of it
		reason string // of a, where there is a service
	}{
		{"it goes to the only one", nil, nil, question("GET", "/echo"), registry.ToInstance, 0, "", "no other instance is ready", ""},
		{"a body", nil, nil, question("POST", "/echo", "Content-Length: 0"), registry.ToInstance, 0, "", "", ""},
		{"no route", nil, nil, question("GET", "/nobody/x"), registry.ToRefusal, 404, "destination_not_found", "no instance of nobody was registered within the hour", ""},
		{"no name", nil, nil, question("GET", "/"), registry.ToRefusal, 404, "destination_not_found", "no route matches", ""},
		{"an ambiguous path", nil, nil, question("GET", "/echo/..%2fusers"), registry.ToRefusal, 400, "http_request_denied", "as it came it is for the service echo, and as /users it is for the service users", ""},
		{"a path above the root", nil, nil, question("GET", "/echo/../../x"), registry.ToRefusal, 400, "http_request_denied", "it climbs above /", ""},
		{"a backslash", nil, nil, question("GET", `/echo\x`), registry.ToRefusal, 400, "http_request_denied", "backslash", ""},
		{"a path that is read", func(cfg *Config) { cfg.AmbiguousPaths = NormalizePaths }, nil, question("GET", "/users/..%2fecho"), registry.ToInstance, 0, "", "", ""},
		{"a line with a space", nil, nil, question("GET", "/echo x"), registry.ToRefusal, 400, "http_request_error", "must be percent-encoded", ""},
		{"a bad method", nil, nil, question("G(T", "/echo"), registry.ToRefusal, 400, "http_request_error", "the request line is not", ""},
		{"a method that is not allowed", nil, nil, question("TRACE", "/echo"), registry.ToRefusal, 405, "http_request_denied", "", ""},
		{"a bad host", nil, nil, registry.Question{Method: "GET", Host: "a b", Path: "/echo", Client: netip.MustParseAddr("127.0.0.1")}, registry.ToRefusal, 400, "http_request_error", "Host", ""},
		{"a long line", func(cfg *Config) { cfg.Limits.RequestLine = 40 }, nil, question("GET", "/echo"+strings.Repeat("x", 40)), registry.ToRefusal, 414, "http_request_error", "limit of 40", ""},
		{"a large head", func(cfg *Config) { cfg.Limits.Head = 100 }, nil, question("GET", "/echo", "X: "+strings.Repeat("x", 100)), registry.ToRefusal, 431, "http_request_error", "limit of 100", ""},
		{"a large body", func(cfg *Config) { cfg.Limits.Body = 10 }, nil, question("POST", "/echo", "Content-Length: 11"), registry.ToRefusal, 413, "http_request_error", "limit of 10", ""},
		{"an expectation", nil, nil, question("POST", "/echo", "Expect: x", "Content-Length: 0"), registry.ToRefusal, 417, "http_request_denied", "", ""},
		{"a websocket", func(cfg *Config) { cfg.Upgrades = []string{} }, nil, question("GET", "/echo", "Connection: upgrade", "Upgrade: websocket"), registry.ToRefusal, 501, "http_upgrade_failed", "", ""},
		{"the gateway's methods", nil, nil, question("OPTIONS", "*"), registry.ToGateway, 200, "", "methods", ""},
		{"its health", func(cfg *Config) { cfg.HealthPath = "/up" }, nil, question("GET", "/up"), registry.ToGateway, 200, "", "--health-path", ""},
		{"its health at its end", func(cfg *Config) { cfg.HealthPath, cfg.Ready = "/up", func() bool { return false } }, nil, question("GET", "/up"), registry.ToGateway, 503, "", "shuts down", ""},
		{"the API", func(cfg *Config) { cfg.API = func(*fasthttp.RequestCtx) {} }, nil, question("GET", "/services"), registry.ToGateway, 0, "", "the API's", ""},
		{"nobody", nil, func(t *testing.T, g *gateway) { g.unregister(t, "echo", "a") }, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "none is registered", ""},
		{"all drain", nil, func(t *testing.T, g *gateway) { patch(t, g, "a", registry.Drain) }, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 drain", "drain"},
		{"all are down", nil, func(t *testing.T, g *gateway) { patch(t, g, "a", registry.Down) }, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 down", "down"},
		{"all breakers are open", hour, func(t *testing.T, g *gateway) {
			openBreaker(t, g, "a")
			eventually(t, "a is out", func() bool { return g.service("echo").view.Load().ready == 0 })
		}, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 breaker open", "breaker open"},
		{"a check fails", nil, func(t *testing.T, g *gateway) {
			g.checked(t, "a", startSick(t, true).url(), nil)
			eventually(t, "it was checked", func() bool { return g.reason("a") == "check failing: got status 500" })
		}, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 check failing: got status 500", "check failing: got status 500"},
		{"not checked yet", nil, func(t *testing.T, g *gateway) {
			g.unregister(t, "echo", "a")
			g.checked(t, "a", startActor(t, hangs).url(), func(in *registry.Instance) { in.Check.Interval, in.Check.Timeout = time.Hour, time.Minute })
		}, question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 not checked yet", "not checked yet"},
		{"no address", nil, func(t *testing.T, g *gateway) { g.register(t, "echo", "a", "http://no-such-name.invalid:80") },
			question("GET", "/echo"), registry.ToRefusal, 503, "destination_unavailable", "1 unresolved", "unresolved"},
		{"no queue", func(cfg *Config) { cfg.Limits.InFlightPerInstance, cfg.Limits.QueueTimeout = 1, -1 }, func(t *testing.T, g *gateway) {
			g.service("echo").view.Load().at(0).inFlight.Add(1)
			t.Cleanup(func() { g.service("echo").view.Load().at(0).inFlight.Add(-1) })
		}, question("GET", "/echo"), registry.ToRefusal, 503, "connection_limit_reached", "limit of 1 requests in flight: there is no queue", ""},
		{"a full service", func(cfg *Config) { cfg.Limits.InFlightPerService, cfg.Limits.QueueTimeout = 1, 20*time.Millisecond }, func(t *testing.T, g *gateway) {
			g.service("echo").crowd.inFlight.Add(1)
			t.Cleanup(func() { g.service("echo").crowd.inFlight.Add(-1) })
		}, question("GET", "/echo"), registry.ToQueue, 503, "connection_limit_reached", "the service has 1 requests in flight, its limit: it waits behind 0 others for a place, for 20ms at most", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, tt.change, nil)
			g.register(t, "echo", "a", startActor(t, says("a")).url())
			if tt.set != nil {
				tt.set(t, g)
			}
			e := g.foretold(t, g.dial(t), tt.ask)
			if out := e.Outcome; out.Kind != tt.kind || out.Status != tt.status || out.Error != tt.kinds || !strings.Contains(out.Why, tt.why) {
				t.Errorf("%+v", out)
			}
			if got := g.DescribeInstance("echo", "a").Reason; e.Service != nil && e.Service.Instances["a"].Addresses != nil && !strings.HasPrefix(got, tt.reason) {
				t.Errorf("a is not ready for the reason %q, want %q", got, tt.reason)
			}
		})
	}
}

// To ask takes no turn: whoever it says is next gets the next request, however often it was asked.
func TestExplainedTurns(t *testing.T) {
	for _, strategy := range []lb.Strategy{lb.RoundRobin, lb.WeightedRoundRobin, lb.Random, lb.WeightedRandom} {
		t.Run(string(strategy), func(t *testing.T) {
			g := startGateway(t, withStrategy(strategy), nil)
			for i, id := range []string{"a", "b", "c"} {
				if err := g.reg.Register("echo", registry.Instance{ID: id, Addr: startActor(t, says(id)).url(), Weight: 1 + 2*i}); err != nil {
					t.Fatal(err)
				}
			}
			c := g.dial(t)
			for i := range 20 {
				for range i % 3 {
					g.Explain(question("GET", "/echo"))
				}
				e := g.foretold(t, c, question("GET", "/echo"))
				want := [3]float64{1. / 3, 1. / 3, 1. / 3}
				if strategy.Weighted() {
					want = [3]float64{1. / 9, 3. / 9, 5. / 9}
				}
				for i, id := range []string{"a", "b", "c"} {
					if got := e.Service.Instances[id].Share; got-want[i] > 1e-9 || want[i]-got > 1e-9 {
						t.Errorf("the share of %s is %v, want %v", id, got, want[i])
					}
				}
			}
			for id := range map[string]bool{"a": true, "b": true, "c": true} {
				if s := g.DescribeInstance("echo", id); s.InFlight != 0 || s.Ignored != 0 {
					t.Errorf("%s: %+v", id, s)
				}
			}
		})
	}
}

// With ip-hash it is exact for each address.
func TestExplainedClients(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Strategy = lb.IPHash
		cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}, nil)
	startNamed(t, g, 12)
	c := g.dial(t)
	homes := map[string]bool{}
	for i := range 40 {
		client := fmt.Sprintf("198.51.100.%d", i)
		q := question("GET", "/echo")
		q.Client = netip.MustParseAddr(client)
		e := g.Explain(q)
		if e.Client != q.Client || e.Outcome.Why != "the client "+client+" belongs to it" {
			t.Errorf("%s: %+v", client, e)
		}
		if got := c.get("/echo", "X-Forwarded-For: "+client).want(t, 200).body; got != e.Outcome.Instance {
			t.Errorf("%s goes to %s, explained was %s", client, got, e.Outcome.Instance)
		}
		// The proxy that speaks for it gets the same answer.
		q = question("GET", "/echo", "X-Forwarded-For: 192.0.2.1, "+client)
		if e := g.foretold(t, c, q); e.Client.String() != client {
			t.Errorf("the client of %q is %s", q.Fields, e.Client)
		}
		homes[e.Outcome.Instance] = true
	}
	if len(homes) < 6 {
		t.Errorf("40 clients have the instances %v", homes)
	}
}

// A half-open instance is probed, by whom it says.
func TestExplainedProbe(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker.OpenFor = 30 * time.Millisecond }, nil)
	startNamed(t, g, 2)
	openBreaker(t, g, "a")
	opened := g.Explain(question("GET", "/echo")).Service.Instances["a"]
	if opened.OpenedBy != "5 failures in a row: broken by hand" {
		t.Errorf("open: %+v", opened)
	}
	g.awaitBreaker(t, "a", "half-open")
	eventually(t, "the view offers its probes", func() bool { return len(g.service("echo").view.Load().probing) == 1 })
	c := g.dial(t)
	for range 3 {
		g.Explain(question("GET", "/echo"))
		if out := g.foretold(t, c, question("GET", "/echo")).Outcome; out.Instance != "a" || out.Why != "it probes the breaker, which is half-open; if that fails, another instance is asked" {
			t.Errorf("%+v", out)
		}
	}
	g.awaitBreaker(t, "a", "closed")
	if by := g.Explain(question("GET", "/echo")).Service.Instances["a"].OpenedBy; by != "" {
		t.Errorf("closed, and opened by %q", by)
	}
}

// What is set for a service, and how much of it is used.
func TestExplainedService(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Strategy = lb.WeightedRandom
		cfg.Limits.InFlightPerInstance, cfg.Limits.InFlightPerService = 2, 5
		cfg.Breaker = cb.Config{Failures: 7, OpenFor: time.Minute}
	}, nil)
	a := startHeld(t, "a")
	for _, in := range []registry.Instance{{ID: "a", Addr: a.url()}, {ID: "b", Addr: startActor(t, says("b")).url(), Weight: 4, SlowStart: time.Hour}} {
		if err := g.reg.Register("echo", in); err != nil {
			t.Fatal(err)
		}
	}
	s := g.service("echo")
	for s.view.Load().at(0).inFlight.Load() < 2 {
		c := g.dial(t)
		c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
		select {
		case <-a.came:
		case <-time.After(100 * time.Millisecond): // it went to b
		}
	}
	eventually(t, "b is done", func() bool { return s.crowd.inFlight.Load() == 2 })
	e := g.Explain(question("GET", "/echo"))
	got := e.Service
	if got.Strategy != "weighted-random" || got.InForce != "weighted-random" || got.Why != "a has no weight; b is in slow start" || got.Ready != 2 {
		t.Errorf("%+v", got)
	}
	if b := got.Breaker; b.Failures != 7 || b.OpenFor != "1m0s" || b.Probes != 3 || len(b.Statuses) != 3 {
		t.Errorf("breaker %+v", b)
	}
	if l := got.Limits; l != (registry.LimitsInUse{InFlight: 2, InFlightPerService: 5, InFlightPerInstance: 2, Queue: 4, QueueTimeout: "1s"}) {
		t.Errorf("limits %+v", l)
	}
	ia, ib := got.Instances["a"], got.Instances["b"]
	if !ia.Full || ia.SlowShare != nil || ia.Share < 0.9 || len(ia.Addresses) != 1 || "http://"+ia.Addresses[0] != a.url() {
		t.Errorf("a: %+v", ia)
	}
	if ib.Full || ib.SlowShare == nil || *ib.SlowShare != 0.1 || ib.Share > 0.1 {
		t.Errorf("b: %+v", ib)
	}
	if e.Outcome.Kind != registry.ToInstance || e.Outcome.Instance != "b" || e.Outcome.Why != "no other instance has a place" {
		t.Errorf("%+v", e.Outcome)
	}
	for range 2 {
		a.let <- struct{}{}
	}
}

// A connection that would not be let in is no matter of the request.
func TestExplainedConnection(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Limits.ConnectionsPerClient = 1 }, nil)
	g.register(t, "echo", "a", startActor(t, says("a")).url())
	if e := g.Explain(question("GET", "/echo")); e.Connection != nil {
		t.Errorf("%+v", e.Connection)
	}
	c := g.dial(t)
	e := g.foretold(t, c, question("GET", "/echo"))
	if e = g.foretold(t, c, question("GET", "/echo")); e.Connection == nil || e.Connection.Status != 429 || e.Connection.Error != "connection_limit_reached" {
		t.Errorf("%+v", e.Connection)
	}
	g.do(t, "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n").want(t, 429)
}

// Whatever state the instances are in, wouldPick chooses whom pick then takes.
func TestExplainedAsPicked(t *testing.T) {
	all := make([]*upstream, 12) // of each state some, which they keep
	found := map[string]int{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, strategy := range []lb.Strategy{lb.RoundRobin, lb.WeightedRoundRobin, lb.IPHash} {
		for _, limit := range []int{0, 3} {
			p, err := New(Config{Registry: registry.New(registry.Config{}), Strategy: strategy, Limits: Limits{InFlightPerInstance: limit}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			s := p.service("echo")
			for i := range all {
				all[i] = &upstream{service: s, id: fmt.Sprintf("%02d", i)}
				bring(t, &all[i].gate, cb.State(i%3))
				all[i].addresses.Store(&addresses{})
			}
			for range 1000 {
				var tokens []func()
				part, v := &viewPart{}, &view{starts: []int{0}, inForce: strategy}
				most := [3]int{rnd.IntN(3), rnd.IntN(3), rnd.IntN(3)} // how many there are of each state: none, half, all
				busy := rnd.Int64N(4)
				for i, u := range all {
					if rnd.IntN(2) >= most[i%3] {
						continue
					}
					u.inFlight.Store(busy + rnd.Int64N(4-busy))
					for range rnd.IntN(3) {
						if token, ok := u.gate.Allow(); ok {
							tokens = append(tokens, func() { u.gate.Ignored(token) })
						}
					}
					part.members = append(part.members, member{upstream: u})
					switch late := rnd.IntN(5) == 0; { // a view that has not seen yet that a breaker has opened
					case u.gate.State() == cb.Closed, u.gate.State() == cb.Open && late:
						part.ready = append(part.ready, u)
						part.endpoints = append(part.endpoints, lb.Endpoint{ID: u.id, Weight: 1 + rnd.IntN(3)})
					case u.gate.State() == cb.HalfOpen:
						v.probing = append(v.probing, u)
					}
				}
				if len(part.members) == 0 {
					continue
				}
				v.parts, v.ready = []*viewPart{part}, len(part.ready)
				v.balancer = lb.New(strategy, part.endpoints, &s.counter)
				v.ipHash, _ = v.balancer.(*lb.Rendezvous)
				s.view.Store(v)

				method, began := []string{"GET", "POST"}[rnd.IntN(2)], time.Now().Add(-time.Duration(rnd.IntN(2))*probePatience)
				client := netip.AddrFrom4([4]byte{10, 0, 0, byte(rnd.IntN(256))})
				x, y := s.dry(method, client, began), s.dry(method, client, began)
				ahead := *v
				ahead.balancer = lb.Fork(v.balancer)
				before := states(part.members)
				want := x.wouldPick(&ahead)
				if after := states(part.members); after != before {
					t.Fatalf("what was %s is %s", before, after)
				}
				got := y.pick()
				if got != want || x.full != y.full || got != nil && x.covered != y.covered {
					t.Fatalf("%s, %s, limit %d: %s is explained, full %v, covered %v; %s is picked, full %v, covered %v; instances %s",
						strategy, method, limit, idOf(want), x.full, x.covered, idOf(got), y.full, y.covered, before)
				}
				switch {
				case got != nil && got.gate.State() == cb.HalfOpen:
					found["probe"]++
				case got != nil:
					found["ready"]++
				case x.full:
					found["full"]++
				default:
					found["nobody"]++
				}
				y.end(ignored, nil)
				for _, end := range tokens {
					end()
				}
			}
			p.Close()
		}
	}
	for _, kind := range []string{"ready", "probe", "full", "nobody"} {
		if found[kind] < 20 {
			t.Errorf("there were %v", found)
		}
	}
}

// bring makes a gate that stays in a state.
func bring(t *testing.T, gate *cb.Gate, state cb.State) {
	t.Helper()
	cfg := cb.Config{Failures: 1, OpenFor: time.Hour, Probes: 2, ProbeTimeout: time.Hour}
	if state == cb.HalfOpen {
		cfg.OpenFor = time.Nanosecond
	}
	if err := gate.Init(cfg, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(gate.Close)
	if token, ok := gate.Allow(); ok && state != cb.Closed {
		gate.Failure(token, nil)
	}
	eventually(t, "the gate is "+state.String(), func() bool { return gate.State() == state })
}

// dry is an exchange that has found its service.
func (s *service) dry(method string, client netip.Addr, began time.Time) *exchange {
	c := s.proxy.newConn(client)
	c.workspace = &workspace{}
	c.x.c = c
	c.req.Method = []byte(method)
	c.x.begin(began)
	c.x.service = s
	return &c.x
}

func idOf(u *upstream) string {
	if u == nil {
		return "nobody"
	}
	return u.id
}

// states is what decides whether instances are picked.
func states(all []member) (text string) {
	for _, u := range all {
		text += fmt.Sprintf("%s: %s, %d free, %d in flight; ", u.id, u.gate.State(), u.gate.FreeProbes(), u.inFlight.Load())
	}
	return text
}
