package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"kerberos/lb"
)

// startNamed starts n instances of echo that answer with their id: a, b, c ...
func startNamed(t testing.TB, g *gateway, n int) map[string]*actor {
	t.Helper()
	actors := map[string]*actor{}
	for i := range n {
		id := string(rune('a' + i))
		actors[id] = startActor(t, says(id))
		g.register(t, "echo", id, actors[id].url())
	}
	return actors
}

// picks sends n requests on one connection and returns who answered, in order.
func (c *client) picks(n int, lines ...string) string {
	c.t.Helper()
	var s strings.Builder
	for range n {
		s.WriteString(c.get("/echo", lines...).want(c.t, 200).body)
	}
	return s.String()
}

func TestRoundRobinIsExact(t *testing.T) {
	g := startGateway(t, nil, nil)
	actors := startNamed(t, g, 3)
	if got := g.dial(t).picks(9); got != "abcabcabc" && got != "bcabcabca" && got != "cabcabcab" {
		t.Errorf("nine requests went to %s, want them in turn", got)
	}
	for _, a := range actors {
		a.count()
	}
	const clients, each = 12, 25
	var wg sync.WaitGroup
	for range clients {
		c := g.dial(t)
		wg.Go(func() {
			for range each {
				c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
				if m, err := readMessage(c.r, false); err != nil || m.status() != 200 {
					t.Errorf("%v, %q", err, m.head)
					return
				}
			}
		})
	}
	wg.Wait()
	for id, a := range actors {
		if got := a.count(); got != clients*each/3 {
			t.Errorf("%s got %d of %d concurrent requests, want exactly a third", id, got, clients*each)
		}
	}
}

// A registry change does not restart the cycle: were it so, the first instance would get every request here.
func TestChangesDoNotRestartTheCycle(t *testing.T) {
	g := startGateway(t, nil, nil)
	actors := startNamed(t, g, 3)
	c := g.dial(t)
	for i := range 30 {
		c.get("/echo").want(t, 200)
		g.registerWeight(t, "echo", "a", actors["a"].url(), i+1)
	}
	for id, a := range actors {
		if got := a.count(); got != 10 {
			t.Errorf("%s got %d of 30", id, got)
		}
	}
}

func TestRandom(t *testing.T) {
	g := startGateway(t, withStrategy(lb.Random), nil)
	actors := startNamed(t, g, 3)
	order := g.dial(t).picks(300)
	for id, a := range actors {
		if got := a.count(); got < 50 || got > 150 { // six standard deviations from 100
			t.Errorf("%s got %d of 300", id, got)
		}
	}
	if strings.Contains(order, "abcabcabcabcabcabc") {
		t.Errorf("a cycle, not random: %s", order)
	}
}

func TestWeightedRoundRobin(t *testing.T) {
	g := startGateway(t, withStrategy(lb.WeightedRoundRobin), nil)
	actors := startNamed(t, g, 0)
	for i, weight := range []int{5, 1, 1} {
		id := string(rune('a' + i))
		actors[id] = startActor(t, says(id))
		g.registerWeight(t, "echo", id, actors[id].url(), weight)
	}
	const cycle = "aabacaa" // nginx's order
	if got := g.dial(t).picks(14); !strings.Contains(cycle+cycle+cycle, got) {
		t.Errorf("14 requests went to %s, want the cycle %s", got, cycle)
	}
	if s := g.DescribeService("echo"); s.Strategy != "weighted-round-robin" || s.InForce != "weighted-round-robin" || s.Why != "" {
		t.Errorf("described as %+v", s)
	}
}

func TestWeightedRandom(t *testing.T) {
	g := startGateway(t, withStrategy(lb.WeightedRandom), nil)
	a, b := startActor(t, says("a")), startActor(t, says("b"))
	g.registerWeight(t, "echo", "a", a.url(), 9)
	g.registerWeight(t, "echo", "b", b.url(), 1)
	g.dial(t).picks(500)
	if got := b.count(); got < 15 || got > 95 { // of 50, standard deviation 6.7
		t.Errorf("b with a tenth of the weight got %d of 500", got)
	}
}

// A registration that repeats id and addr changes the weight at once, and nothing else.
func TestChangedWeight(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Strategy = lb.WeightedRoundRobin
		cfg.UpstreamIdle = time.Minute
		cfg.Retries = -1
	}, nil)
	a, b := startActor(t, says("a")), startActor(t, says("b"))
	g.registerWeight(t, "echo", "a", a.url(), 1)
	g.registerWeight(t, "echo", "b", b.url(), 1)
	c := g.dial(t)
	c.picks(20)
	if a, b := a.count(), b.count(); a != 10 || b != 10 {
		t.Fatalf("with equal weights %d and %d of 20", a, b)
	}
	for i, weights := range [][2]int{{3, 1}, {1, 9}, {1_000_000, 1_000_000}} {
		g.registerWeight(t, "echo", "a", a.url(), weights[0])
		g.registerWeight(t, "echo", "b", b.url(), weights[1])
		c.picks(20)
		if got, want := a.count(), 20*weights[0]/(weights[0]+weights[1]); got != want {
			t.Errorf("with weights %v a got %d of 20, want %d", weights, got, want)
		}
		eventually(t, "the counters count on", func() bool {
			return g.DescribeInstance("echo", "a").Success+g.DescribeInstance("echo", "b").Success == uint64(20*(i+2))
		})
	}
	if a, b := a.accepted.Load(), b.accepted.Load(); a != 1 || b != 1 {
		t.Errorf("%d and %d connections were made, want one each: they are kept", a, b)
	}

	// The breaker stays as well: its run of failures goes on, and once open it stays open.
	g.unregister(t, "echo", "b")
	a.does(answers(503))
	for i := range 5 {
		g.registerWeight(t, "echo", "a", a.url(), i+1)
		c.get("/echo").want(t, 503)
	}
	g.awaitBreaker(t, "a", "open")
	g.registerWeight(t, "echo", "a", a.url(), 9)
	if got := g.breaker("a"); got != "open" {
		t.Errorf("the breaker is %s behind a registration that repeats the addr", got)
	}

	// Another addr is another upstream.
	elsewhere := startActor(t, says("a2"))
	g.registerWeight(t, "echo", "a", elsewhere.url(), 9)
	if m := c.get("/echo").want(t, 200); m.body != "a2" {
		t.Errorf("%q answered", m.body)
	}
	if s := g.DescribeInstance("echo", "a"); s.Breaker.State != "closed" || s.Failure != 0 || s.LastError != "" {
		t.Errorf("another addr starts anew, but: %+v", s)
	}
	eventually(t, "no connection to the addr that left", func() bool { return a.open() == 0 })
}

// Where an instance has no weight, the unweighted strategy is in force: /services says why, and the log does once.
func TestFallback(t *testing.T) {
	for weighted, plain := range map[lb.Strategy]lb.Strategy{lb.WeightedRoundRobin: lb.RoundRobin, lb.WeightedRandom: lb.Random} {
		t.Run(string(weighted), func(t *testing.T) {
			g := startGateway(t, withStrategy(weighted), nil)
			a, b := startActor(t, says("a")), startActor(t, says("b"))
			g.registerWeight(t, "echo", "a", a.url(), 100)
			if s := g.DescribeService("echo"); s.InForce != string(weighted) || s.Why != "" {
				t.Errorf("with weights: %+v", s)
			}
			for range 3 { // again and again, one line
				g.registerWeight(t, "echo", "b", b.url(), 0)
				g.registerWeight(t, "echo", "a", a.url(), 100)
			}
			if s := g.DescribeService("echo"); s.Strategy != string(weighted) || s.InForce != string(plain) || s.Why != "b has no weight" {
				t.Errorf("without a weight: %+v", s)
			}
			warning := []string{"level=WARN", "service=echo", "strategy=" + string(weighted), "in_force=" + string(plain), `reason="b has no weight"`}
			if n := g.logged(warning...); n != 1 {
				t.Errorf("%d warnings, want one: %s", n, g.logs)
			}
			g.dial(t).picks(40)
			if got := b.count(); weighted == lb.WeightedRoundRobin && got != 20 || got < 4 {
				t.Errorf("b got %d of 40 while no weights are in force", got)
			}

			g.registerWeight(t, "echo", "b", b.url(), 1)
			if s := g.DescribeService("echo"); s.InForce != string(weighted) || s.Why != "" {
				t.Errorf("with weights again: %+v", s)
			}
			g.registerWeight(t, "echo", "b", b.url(), 0)
			if n := g.logged(warning...); n != 2 {
				t.Errorf("%d warnings, want another one when it happens again", n)
			}
		})
	}
}

// One client, one instance; when one leaves only its clients move, and they return when it does.
func TestIPHash(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Strategy = lb.IPHash
		cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}, nil)
	actors := startNamed(t, g, 4)
	c := g.dial(t)
	const clients = 64
	from := func(i int) string { return fmt.Sprintf("X-Forwarded-For: 203.0.113.9, 198.51.100.%d", i) }
	where := func() (at [clients]string) {
		t.Helper()
		for i := range at {
			at[i] = c.get("/echo", from(i)).want(t, 200).body
		}
		return at
	}
	home := where()
	if again := where(); again != home {
		t.Fatal("clients moved though nothing changed")
	}
	for i := range 8 { // IPv4-mapped IPv6 is the same client
		if got := c.get("/echo", fmt.Sprintf("X-Forwarded-For: ::ffff:198.51.100.%d", i)).body; got != home[i] {
			t.Errorf("client %d as IPv4 goes to %s, as mapped IPv6 to %s", i, home[i], got)
		}
	}
	used := map[string]int{}
	for _, id := range home {
		used[id]++
	}
	if len(used) != 4 {
		t.Fatalf("%d clients use %v", clients, used)
	}

	g.unregister(t, "echo", "c")
	moved := where()
	for i := range home {
		if stays := home[i] != "c"; stays != (moved[i] == home[i]) {
			t.Errorf("c left, and client %d of %s goes to %s", i, home[i], moved[i])
		}
	}
	g.register(t, "echo", "c", actors["c"].url())
	if where() != home {
		t.Error("c came back, and not all its clients returned")
	}

	// An open breaker is a leave too.
	var who int
	for home[who] != "b" {
		who++
	}
	actors["b"].does(answers(503))
	for range 5 {
		c.get("/echo", from(who)).want(t, 503)
	}
	g.awaitBreaker(t, "b", "open")
	for i, id := range where() {
		if stays := home[i] != "b"; stays != (id == home[i]) || id == "b" {
			t.Errorf("b is open, and client %d of %s goes to %s", i, home[i], id)
		}
	}

	// The mapping is a function of the ids alone: another gateway, other addresses, another order.
	other := startGateway(t, func(cfg *Config) {
		cfg.Strategy = lb.IPHash
		cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}, nil)
	for _, id := range []string{"d", "b", "a", "c"} {
		other.register(t, "echo", id, startActor(t, says(id)).url())
	}
	c = other.dial(t)
	if where() != home {
		t.Error("another gateway sends clients elsewhere")
	}
}

// Without trusted proxies the peer's address counts, whatever it claims.
func TestIPHashOfThePeer(t *testing.T) {
	g := startGateway(t, withStrategy(lb.IPHash), nil)
	startNamed(t, g, 8)
	c := g.dial(t)
	home := c.picks(1)
	for i := range 32 {
		if got := c.picks(1, fmt.Sprintf("X-Forwarded-For: 198.51.100.%d", i)); got != home {
			t.Fatalf("a forged address moved the client from %s to %s", home, got)
		}
	}
}

// Every strategy sends a request that its first pick cannot serve to another instance.
func TestEveryStrategyPassesDeadInstances(t *testing.T) {
	for _, strategy := range lb.Strategies() {
		t.Run(string(strategy), func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { cfg.Strategy = strategy; cfg.Breaker.OpenFor = long }, nil)
			alive := startActor(t, says("alive"))
			g.registerWeight(t, "echo", "m", alive.url(), 1)
			for i := range 7 { // with eight instances eight attempts see all
				g.registerWeight(t, "echo", fmt.Sprint(i), refusedAddr(t), 1000)
			}
			if got := g.dial(t).picks(40); got != strings.Repeat("alive", 40) {
				t.Errorf("got %s", got)
			}
		})
	}
}
