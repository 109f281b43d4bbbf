package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kerberos/registry"
)

// Instances come and go under traffic: while one healthy instance stays, no request fails.
func TestChurn(t *testing.T) {
	t.Parallel()
	for _, strategy := range []func(*Config){nil, withStrategy("weighted-random"), withStrategy("ip-hash")} {
		g := startGateway(t, strategy, nil)
		stays := startActor(t, says("stays"))
		g.registerWeight(t, "echo", "stays", stays.url(), 1)
		guests := make([]*actor, 4)
		for i := range guests {
			guests[i] = startActor(t, says("guest"))
		}
		stop := make(chan struct{})
		var running, churning sync.WaitGroup
		var answered atomic.Int64
		for i := range 8 {
			c := g.dial(t)
			method := []string{"GET", "POST"}[i%2]
			running.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := io.WriteString(c, method+" /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"); err != nil {
						t.Error(err)
						return
					}
					if m, err := readMessage(c.r, false); err != nil || m.status() != 200 {
						t.Errorf("%s: %q %q, %v", method, m.head, m.body, err)
						return
					}
					answered.Add(1)
				}
			})
		}
		for i, guest := range guests {
			churning.Go(func() {
				id := fmt.Sprint("guest", i)
				for round := range 15 {
					if err := g.reg.Register("echo", registry.Instance{ID: id, Addr: guest.url(), Weight: 1 + round%3}); err != nil {
						t.Error(err)
					}
					if round%4 == 3 { // a new addr
						if err := g.reg.Register("echo", registry.Instance{ID: id, Addr: stays.url(), Weight: 1}); err != nil {
							t.Error(err)
						}
					}
					if err := g.reg.Unregister("echo", id, ""); err != nil {
						t.Error(err)
					}
				}
			})
		}
		churning.Wait()
		close(stop)
		running.Wait()
		if answered.Load() < 100 {
			t.Errorf("only %d requests", answered.Load())
		}
		if all := slices.Collect(g.service("echo").view.Load().all); len(all) != 1 || all[0].id != "stays" {
			t.Errorf("%d instances are left", len(all))
		}
	}
}

// A storm of registrations of one service is published in few views, 5 ms apart; Register returns when its own change is.
func TestStormOfRegistrations(t *testing.T) {
	g := startGateway(t, nil, nil)
	const callers, each = 50, 4
	var mu sync.Mutex
	views := map[*view]bool{}
	began := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for j := range each {
				id := fmt.Sprintf("%d-%d", i, j)
				if err := g.reg.Register("echo", registry.Instance{ID: id, Addr: "http://127.0.0.1:1"}); err != nil {
					t.Error(err)
				}
				v := g.service("echo").view.Load()
				if !slices.ContainsFunc(slices.Collect(v.all), func(u *upstream) bool { return u.id == id }) {
					t.Errorf("%s is not published when Register returns", id)
				}
				mu.Lock()
				views[v] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n, most := len(views), int(time.Since(began)/viewEvery)+2; n > most {
		t.Errorf("%d registrations were published in %d views, want at most %d", callers*each, n, most)
	}
}

// What leaves leaves nothing behind: no connection after its last request, no goroutine later than one idle time.
func TestNothingStaysBehind(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.checked(t, "stays", startActor(t, says("stays")).url(), func(in *registry.Instance) { in.Check.Start = registry.StartUp })
	g.dial(t).picks(1) // what starts late has started
	before := goleak.IgnoreCurrent()
	a := startActor(t, says("guest"))
	c := g.dial(t)
	c.picks(4)

	const services, rounds = 20, 50 // a thousand rounds; changes of one service are 5 ms apart
	var wg sync.WaitGroup
	for i := range services {
		c := g.dial(t)
		wg.Go(func() {
			defer c.Close()
			name := fmt.Sprint("s", i%10) // two at a time in each
			for round := range rounds {
				id := fmt.Sprint(i)
				check := &registry.Check{Path: "/", KeepAlive: round%2 == 0, Start: registry.StartUp}
				if err := g.reg.Register(name, registry.Instance{ID: id, Addr: a.url(), Check: check, SlowStart: time.Minute}); err != nil {
					t.Error(err)
				}
				if round%10 == 0 {
					io.WriteString(c, "GET /"+name+" HTTP/1.1\r\nHost: x\r\n\r\n")
					if m, err := readMessage(c.r, false); err != nil || m.status() != 200 {
						t.Errorf("%q, %v", m.head, err)
					}
				}
				if err := g.reg.Unregister(name, id, ""); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if a.served.Load() == 0 {
		t.Fatal("no request reached the guest")
	}
	eventually(t, "no connection to an instance that left", func() bool { return a.open() == 0 })

	c.Close()
	a.stop()
	if err := goleak.Find(before); err != nil { // tries for about 0.4 s; one idle time is 0.1 s here
		t.Error(err)
	}
}

// An instance that leaves in the middle of a request keeps that connection until the request ends, and no longer; its idle
// ones go at once, long before their idle time.
func TestLeavingInMidRequest(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.UpstreamIdle, cfg.Loops = long, 1 }, nil)
	a := startActor(t, says("first"))
	g.register(t, "slow", "1", a.url())
	gate := make(chan struct{})
	var busy []*client
	for range 3 {
		c := g.dial(t)
		c.get("/slow").want(t, 200)
		busy = append(busy, c)
	}
	var there atomic.Int64
	a.does(func(c net.Conn, m *message) bool {
		there.Add(1)
		return after(gate, says("last words"))(c, m)
	})
	for i, c := range busy {
		c.send("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
		eventually(t, "at the backend", func() bool { return there.Load() == int64(i+1) })
	}
	a.does(says("idle"))
	idle := g.dial(t)
	idle.get("/slow").want(t, 200)
	eventually(t, "one idle connection beside three", func() bool { return a.open() == 4 && g.DescribeInstance("slow", "1").InFlight == 3 })
	g.unregister(t, "slow", "1")
	eventually(t, "the idle one closed", func() bool { return a.open() == 3 })
	close(gate)
	for _, c := range busy {
		if m := c.read(false).want(t, 200); m.body != "last words" {
			t.Errorf("got %q", m.body)
		}
	}
	eventually(t, "closed behind their last request", func() bool { return a.open() == 0 })
}

// A gateway that is shut down and closed leaves no goroutine, timer or connection.
func TestCloseLeavesNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	reg := registry.New(registry.Config{})
	p, err := New(Config{Registry: reg, UpstreamIdle: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	reg.OnChange(p.Update)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- p.Serve(ln) }()
	o := serveOrigin(listen(t), namingHandler("a"))
	for id, addr := range map[string]string{"literal": o.url(), "name": "http://unknown.test:1", "dead": refusedAddr(t)} {
		if err := reg.Register("echo", registry.Instance{ID: id, Addr: addr}); err != nil {
			t.Fatal(err)
		}
	}
	c := (&gateway{addr: ln.Addr().String()}).dial(t)
	c.picks(20)
	if cut := p.Shutdown(context.Background()); cut != 0 {
		t.Errorf("%d requests cut", cut)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	p.Close()
	c.Close()
	o.stop()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// Idle connections are closed at once, those in use when their request ends, and nothing new is accepted.
func TestShutdown(t *testing.T) {
	g := startGateway(t, nil, nil)
	gate := make(chan struct{})
	a := startActor(t, says("quick"))
	g.register(t, "echo", "a", a.url())
	fresh, idle, busy, streaming := g.dial(t), g.dial(t), g.dial(t), g.dial(t)
	idle.get("/echo").want(t, 200)
	a.does(after(gate, says("finished")))
	busy.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "the first under way", func() bool { return a.served.Load() == 2 })
	a.does(func(c net.Conn, _ *message) bool {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n")
		<-gate
		io.WriteString(c, "4\r\nmore\r\n0\r\n\r\n")
		return false
	})
	streaming.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := streaming.r.Peek(1); err != nil {
		t.Fatal(err)
	}

	down := make(chan int, 1)
	go func() { down <- g.Shutdown(context.Background()) }()
	fresh.closed()
	idle.closed()
	eventually(t, "nothing new accepted", func() bool {
		conn, err := net.Dial("tcp", g.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	select {
	case <-down:
		t.Fatal("shut down before the requests in flight ended")
	case <-time.After(50 * time.Millisecond):
	}
	close(gate)
	if m := busy.read(false).want(t, 200); m.body != "finished" || m.field("Connection") != "close" {
		t.Errorf("the request in flight got %q %q", m.head, m.body)
	}
	busy.closed()
	if m := streaming.read(false).want(t, 200); m.body != "somemore" {
		t.Errorf("the stream got %q", m.body)
	}
	streaming.closed()
	if cut := <-down; cut != 0 {
		t.Errorf("%d requests were cut", cut)
	}
	ln := listen(t)
	if err := g.Serve(ln); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		t.Error("Serve after Shutdown left its listener open")
	}
}

// What is still in flight at the deadline is cut, and counted.
func TestShutdownDeadline(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil, nil)
	a := startActor(t, hangs)
	g.register(t, "echo", "a", a.url())
	busy := []*client{g.dial(t), g.dial(t), g.dial(t)}
	for _, c := range busy {
		c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	half := g.dial(t)
	half.send("GET /echo HT")
	g.dial(t) // idle
	eventually(t, "under way", func() bool { return a.served.Load() == 3 && g.active() == 3 && g.halfRead() == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if cut := g.Shutdown(ctx); cut != 4 {
		t.Errorf("%d requests were cut, want 3 and the half one", cut)
	}
	for _, c := range append(busy, half) {
		if rest, err := io.ReadAll(c.r); len(rest) > 0 {
			t.Errorf("got %q, %v from a request that was cut", rest, err)
		}
	}
	g.Close() // waits for them
	eventually(t, "what we cut counted as nobody's fault", func() bool {
		s := g.DescribeInstance("echo", "a")
		return s.Ignored == 3 && s.Failure == 0 && s.InFlight == 0
	})
}

// active counts the connections that serve a request.
func (g *gateway) active() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if c.state.Load() == stateActive {
			n++
		}
	}
	return n
}

// Shutdown under load: a response is whole or the connection was closed before the request was looked at.
func TestShutdownUnderLoad(t *testing.T) {
	for range 5 {
		g := startGateway(t, nil, nil)
		g.register(t, "echo", "a", startActor(t, says("whole")).url())
		var wg sync.WaitGroup
		var answered atomic.Int64
		for range 8 {
			c := g.dial(t)
			wg.Go(func() {
				for {
					if _, err := io.WriteString(c, "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
						return
					}
					m, err := readMessage(c.r, false)
					if err != nil {
						if m.head != "" {
							t.Errorf("half a response: %q %q, %v", m.head, m.body, err)
						}
						return
					}
					if m.status() != 200 || m.body != "whole" {
						t.Errorf("%q %q", m.head, m.body)
					}
					answered.Add(1)
				}
			})
		}
		eventually(t, "traffic", func() bool { return answered.Load() > 50 })
		if cut := g.Shutdown(context.Background()); cut != 0 {
			t.Errorf("%d requests cut", cut)
		}
		wg.Wait()
	}
}

// Running out of file descriptors pauses accepting; it recovers. The test runs in a process of its own.
func TestOutOfFileDescriptors(t *testing.T) {
	const variable = "KERBEROS_TEST_FEW_FILES"
	if os.Getenv(variable) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestOutOfFileDescriptors$", "-test.v")
		cmd.Env = append(os.Environ(), variable+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("PASS: TestOutOfFileDescriptors")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	g := startGateway(t, func(cfg *Config) { cfg.UpstreamIdle = time.Minute }, nil)
	g.register(t, "echo", "a", startActor(t, says("a")).url())
	g.register(t, "other", "new", startActor(t, says("new")).url())
	first := g.dial(t)
	first.picks(1)
	waiting := make([]*client, 20)
	for i := range waiting {
		waiting[i] = g.dial(t)
	}
	eventually(t, "all accepted", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.conns) == 21 })

	// No descriptor is left: what connects now waits in the backlog.
	late, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	limit := syscall.Rlimit{}
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = uint64(late) + 1
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	var holders []*os.File
	for { // fill the gaps
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		holders = append(holders, f)
	}
	at := netip.MustParseAddrPort(g.addr)
	if err := syscall.Connect(late, &syscall.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a line that says so", func() bool { return g.logged("accepting pauses", "too many open files") == 1 })
	if got := first.picks(10); got != strings.Repeat("a", 10) { // what is connected is served on
		t.Errorf("got %q meanwhile", got)
	}
	for range 6 { // what needs a new connection to an instance fails for us, and that is not the instance's fault
		m := first.get("/other")
		m.refused(t, errNoSocket)
		if m.field("Retry-After") != "1" {
			t.Error(m.head)
		}
	}
	if s := g.DescribeInstance("other", "new"); s.Failure != 0 || s.Ignored != 6 || !s.Ready {
		t.Errorf("described as %+v", s)
	}
	for _, f := range holders {
		f.Close()
	}
	for _, c := range waiting {
		c.Close()
	}
	request := "GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	if _, err := syscall.Write(late, []byte(request)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, err := syscall.Read(late, answer)
	if err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 200 OK\r\n")) {
		t.Errorf("after the pause: %q, %v", answer[:max(n, 0)], err)
	}
	syscall.Close(late)
	g.dial(t).picks(1)
}
