package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/proxy/loop"
	"kerberos/registry"
)

// names is a name server for the tests: no look-up leaves the machine.
var names = &nameServer{records: map[string][]netip.Addr{}}

func TestMain(m *testing.M) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go names.serve(pc)
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
	_ = new(fasthttp.Response).Header.Header() // starts a goroutine that must not be in a bubble of synctest
	flag.Parse()
	if err := flag.Set("test.parallel", "16"); err != nil { // parallel tests here wait, they do not compute
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

type nameServer struct {
	mu      sync.Mutex
	records map[string][]netip.Addr
	failing bool // SERVFAIL
}

// set gives a name its addresses; none: the name does not exist.
func (s *nameServer) set(name string, addrs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[name] = nil
	for _, a := range addrs {
		s.records[name] = append(s.records[name], netip.MustParseAddr(a))
	}
}

func (s *nameServer) fail(failing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing = failing
}

func (s *nameServer) serve(pc net.PacketConn) {
	b := make([]byte, 4096)
	for {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		if answer := s.answer(b[:n]); answer != nil {
			_, _ = pc.WriteTo(answer, from)
		}
	}
}

// answer makes the response to a query, RFC 1035 section 4.
func (s *nameServer) answer(query []byte) []byte {
	const header, typeA, typeAAAA = 12, 1, 28
	var labels []string
	at := header
	for at < len(query) && query[at] != 0 {
		end := at + 1 + int(query[at])
		if end > len(query) {
			return nil
		}
		labels = append(labels, string(query[at+1:end]))
		at = end
	}
	if at+5 > len(query) {
		return nil
	}
	asked := binary.BigEndian.Uint16(query[at+1:])
	s.mu.Lock()
	defer s.mu.Unlock()
	addrs := s.records[strings.Join(labels, ".")]
	out := slices.Clone(query[:at+5])
	out[2], out[3] = 0x85, 0x80
	switch {
	case s.failing:
		out[3] |= 2
	case len(addrs) == 0:
		out[3] |= 3 // no such name
	}
	answers := 0
	for _, a := range addrs {
		if s.failing || a.Is4() != (asked == typeA) || a.Is6() != (asked == typeAAAA) {
			continue
		}
		answers++
		raw := a.AsSlice()
		out = append(out, 0xc0, header) // the name of the question
		out = binary.BigEndian.AppendUint16(out, asked)
		out = append(out, 0, 1, 0, 0, 0, 0, 0, byte(len(raw))) // internet, for 0 s
		out = append(out, raw...)
	}
	binary.BigEndian.PutUint16(out[6:], uint16(answers))
	binary.BigEndian.PutUint32(out[8:], 0)
	return out
}

// port returns the port of an origin.
func (o *origin) port() uint16 { return o.Addr().(*net.TCPAddr).AddrPort().Port() }

// addresses returns where an instance of echo is dialled, in order.
func (g *gateway) addresses(id string) (list []string) {
	for u := range g.service("echo").view.Load().all {
		if u.id == id {
			for _, ap := range u.addresses.Load().list {
				list = append(list, ap.Addr().String())
			}
		}
	}
	return list
}

// resolveNow looks a name up as the timer would, ten seconds later.
func (g *gateway) resolveNow(id string) {
	for u := range g.service("echo").view.Load().all {
		if u.id == id {
			u.resolve()
		}
	}
}

func (g *gateway) awaitReason(t testing.TB, id, part string) {
	t.Helper()
	eventually(t, id+" not ready: "+part, func() bool {
		s := g.DescribeInstance("echo", id)
		return !s.Ready && strings.Contains(s.Reason, part)
	})
}

// localhost and what is below it is known without a look-up: it is ready when Register returns.
func TestLocalhostIsKnown(t *testing.T) {
	for _, name := range []string{"localhost", "LOCALHOST", "localhost.", "a.localhost", "x.y.Localhost."} {
		g := startGateway(t, nil, nil)
		a := startActor(t, says("a"))
		g.register(t, "echo", "a", fmt.Sprintf("http://%s:%d", name, a.port()))
		if got := g.dial(t).picks(2); got != "aa" {
			t.Errorf("%s: got %q", name, got)
		}
		if got := g.addresses("a"); !slices.Equal(got, []string{"127.0.0.1", "::1"}) {
			t.Errorf("%s is dialled at %v", name, got)
		}
	}
}

// A dial tries the addresses in turn, and the last good one first. All refused is one failure.
func TestAddressesInTurn(t *testing.T) {
	ln, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 on the loopback:", err)
	}
	o := serveOrigin(ln, namingHandler("six"))
	t.Cleanup(o.stop)
	g := startGateway(t, patient(0), nil)
	g.register(t, "echo", "a", fmt.Sprintf("http://localhost:%d", o.port()))
	if got := g.dial(t).post("/echo", "").want(t, 200).body; got != "six" { // 127.0.0.1 refused it
		t.Errorf("got %q", got)
	}
	if got := g.addresses("a"); !slices.Equal(got, []string{"::1", "127.0.0.1"}) {
		t.Errorf("dialled next at %v, want the good one first", got)
	}
	eventually(t, "one success", func() bool { return g.DescribeInstance("echo", "a").Success == 1 })
	if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
		t.Errorf("counted %+v", s)
	}
	o.stop()
	eventually(t, "the idle connection closed", func() bool { return o.open() == 0 })
	g.dial(t).post("/echo", "").refused(t, errRefused)
	if s := g.DescribeInstance("echo", "a"); s.Failure != 1 {
		t.Errorf("all refused counted as %d failures", s.Failure)
	}
}

// A name is looked up off the request path; until it is known the instance is not ready, and says why.
func TestNames(t *testing.T) {
	g := startGateway(t, nil, nil)
	a := startActor(t, says("a"))
	names.set("moves.test")
	g.register(t, "echo", "a", fmt.Sprintf("http://moves.test:%d", a.port()))
	g.awaitReason(t, "a", "unresolved")
	c := g.dial(t)
	c.get("/echo").refused(t, errNoInstance)
	eventually(t, "the cause is told", func() bool {
		return strings.Contains(g.DescribeInstance("echo", "a").LastError, "no such host")
	})
	if s := g.DescribeInstance("echo", "a"); s.Breaker.State != "closed" || s.Failure != 0 {
		t.Errorf("a name without address is no failure, but: %+v", s)
	}

	names.set("moves.test", "127.0.0.1")
	g.resolveNow("a")
	g.awaitReady(t, 1)
	c.picks(1)
	if s := g.DescribeInstance("echo", "a"); !s.Ready || s.Reason != "" {
		t.Errorf("described as %+v", s)
	}

	// A failed look-up keeps the last addresses, for whatever reason it fails.
	for _, fail := range []func(){func() { names.fail(true) }, func() { names.set("moves.test") }} {
		fail()
		g.resolveNow("a")
		names.fail(false)
		if got := g.addresses("a"); !slices.Equal(got, []string{"127.0.0.1"}) {
			t.Errorf("behind a failed look-up dialled at %v", got)
		}
		c.picks(1)
	}

	// A name that moves is followed, by new connections.
	names.set("moves.test", "127.0.0.2")
	g.resolveNow("a")
	if got := g.addresses("a"); !slices.Equal(got, []string{"127.0.0.2"}) {
		t.Errorf("dialled at %v", got)
	}

	// The order of those known before stays: the last good one is the first.
	names.set("moves.test", "127.0.0.3", "127.0.0.2")
	g.resolveNow("a")
	if got := g.addresses("a"); !slices.Equal(got, []string{"127.0.0.2", "127.0.0.3"}) {
		t.Errorf("dialled at %v", got)
	}
}

// A name known from the start is ready soon after Register, which does not wait for it; a slow one delays nobody.
func TestNamesResolveInTheBackground(t *testing.T) {
	g := startGateway(t, nil, nil)
	a := startActor(t, says("a"))
	names.set("known.test", "127.0.0.1")
	g.register(t, "echo", "a", fmt.Sprintf("http://known.test:%d", a.port()))
	g.awaitReady(t, 1)
	g.dial(t).picks(3)
	if host := fmt.Sprintf("known.test:%d", a.port()); g.service("echo").view.Load().parts[0].members[0].target.Authority != host {
		t.Errorf("the authority is not %s", host)
	}
}

// A name that moves to a refused address is not ready, with that reason; one that has both kinds uses the allowed.
func TestNamesAtRefusedAddresses(t *testing.T) {
	denied := netip.MustParsePrefix("127.0.0.66/32")
	g := startGateway(t, func(cfg *Config) {
		cfg.Registry = registry.New(registry.Config{Addrs: registry.AddrPolicy{Deny: []netip.Prefix{denied}}})
	}, nil)
	a := startActor(t, says("a"))
	names.set("rebinds.test", "127.0.0.1")
	g.register(t, "echo", "a", fmt.Sprintf("http://rebinds.test:%d", a.port()))
	g.awaitReady(t, 1)
	c := g.dial(t)
	c.picks(1)
	for _, tt := range []struct{ addr, reason string }{
		{"127.0.0.66", "--addr-deny"},
		{"169.254.169.254", "link-local"},
		{"0.0.0.0", "unspecified"},
		{"224.0.0.1", "multicast"},
		{"fd00:ec2::254", "metadata"},
		{"::ffff:169.254.169.254", "link-local"},
	} {
		names.set("rebinds.test", tt.addr)
		g.resolveNow("a")
		g.awaitReason(t, "a", tt.reason)
		g.awaitReady(t, 0)
		c.get("/echo").refused(t, errNoInstance)

		names.set("rebinds.test", tt.addr, "127.0.0.1")
		g.resolveNow("a")
		g.awaitReady(t, 1)
		if got := g.addresses("a"); !slices.Equal(got, []string{"127.0.0.1"}) {
			t.Errorf("dialled at %v, want the allowed one alone", got)
		}
		c.picks(1)
	}
	if s := g.DescribeInstance("echo", "a"); s.Failure != 0 {
		t.Errorf("counted %+v", s)
	}
}

// The very address that is dialled is judged, whatever was thought of it before.
func TestAddrPolicyAtDial(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Registry = registry.New(registry.Config{Addrs: registry.AddrPolicy{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.66/32")}}})
	}, nil)
	ln, err := net.Listen("tcp", "127.0.0.66:0")
	if err != nil {
		t.Skip("the loopback has one address only:", err)
	}
	accepted := make(chan net.Conn, 1)
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			accepted <- c
		}
	}()
	names.set("sneaky.test", "127.0.0.1")
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	g.register(t, "echo", "a", fmt.Sprintf("http://sneaky.test:%d", port))
	g.awaitReady(t, 1)
	u := g.service("echo").view.Load().parts[0].members[0]
	u.addresses.Store(&addresses{list: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("127.0.0.66:%d", port))}})
	g.dial(t).get("/echo").refused(t, errProhibited)
	select {
	case <-accepted:
		t.Error("a refused address was dialled")
	default:
	}
	if _, err := u.dial(0, time.Second); !errors.Is(err, errProhibited) {
		t.Errorf("dial: %v", err)
	}
}

// Who registered an instance last decides whether its name may lead to the loopback.
func TestNamesRegisteredFromAfar(t *testing.T) {
	g := startGateway(t, nil, nil)
	api := registry.NewHandler(g.reg, g.Proxy)
	a := startActor(t, says("a"))
	names.set("local.test", "127.0.0.1")
	addr := fmt.Sprintf("http://local.test:%d", a.port())
	var req fasthttp.Request
	req.Header.SetMethod("POST")
	req.Header.SetContentType("application/json")
	req.SetRequestURI("/register")
	req.SetBodyString(registration("a", addr))
	ctx := &fasthttp.RequestCtx{}
	ctx.Init(&req, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1234}, nil)
	if api(ctx); ctx.Response.StatusCode() != 204 {
		t.Fatalf("%d %s", ctx.Response.StatusCode(), ctx.Response.Body())
	}
	g.awaitReason(t, "a", "loopback")
	g.register(t, "echo", "a", addr) // by a local caller
	g.resolveNow("a")
	g.awaitReady(t, 1)
	g.dial(t).picks(1)
}

// The gateway's own listeners are no instance's address, by name neither.
func TestOwnListeners(t *testing.T) {
	own := netip.MustParseAddrPort("127.0.0.1:18080")
	g := startGateway(t, func(cfg *Config) {
		cfg.Registry = registry.New(registry.Config{Addrs: registry.AddrPolicy{Own: []netip.AddrPort{own}}})
	}, nil)
	names.set("me.test", "127.0.0.1")
	g.register(t, "echo", "a", "http://me.test:18080")
	g.awaitReason(t, "a", "own listeners")
	g.dial(t).get("/echo").refused(t, errNoInstance)
}

// An instance that leaves takes its look-ups along.
func TestResolverEnds(t *testing.T) {
	g := startGateway(t, nil, nil)
	names.set("leaves.test", "127.0.0.1")
	g.register(t, "echo", "a", "http://leaves.test:1")
	g.awaitReady(t, 1)
	u := g.service("echo").view.Load().parts[0].members[0]
	g.unregister(t, "echo", "a")
	u.resolve() // one that was under way
	u.resolver.mu.Lock()
	defer u.resolver.mu.Unlock()
	if u.resolver.timer != nil || u.resolver.ctx.Err() == nil {
		t.Error("the name will be looked up again")
	}
}

// A name may lose its addresses between the look at them and the connection.
func TestConnectionToNowhere(t *testing.T) {
	if !loop.Supported {
		t.Skip("no loops here")
	}
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", "http://127.0.0.1:1")
	if err := g.startLoops(); err != nil {
		t.Fatal(err)
	}
	u := g.service("echo").view.Load().upstream("a")
	u.addresses.Store(&addresses{err: errProhibited})
	if _, err := u.start(0); err != errUnreachable {
		t.Error(err)
	}
}
