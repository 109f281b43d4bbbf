package health

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kerberos/registry"
)

// both runs a test on sockets, where there are some, and on goroutines.
func both(t *testing.T, test func(t *testing.T, c *Checker)) {
	t.Helper()
	for _, blocking := range []bool{false, true} {
		t.Run(map[bool]string{false: "sockets", true: "goroutines"}[blocking], func(t *testing.T) {
			c := New()
			defer c.Close()
			if blocking {
				c.started = true // and has no sockets
				c.ended.Go(c.run)
			}
			test(t, c)
		})
	}
}

// backend is an instance whose connections are served by act: n is how many there were before.
type backend struct {
	addr  netip.AddrPort
	conns atomic.Int64
	open  atomic.Int64
}

func startBackend(t testing.TB, act func(conn net.Conn, n int)) *backend {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{addr: netip.MustParseAddrPort(ln.Addr().String())}
	var all sync.WaitGroup
	done := make(chan struct{})
	all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			n := int(b.conns.Add(1) - 1)
			b.open.Add(1)
			all.Go(func() {
				ended := make(chan struct{})
				defer close(ended)
				all.Go(func() {
					select {
					case <-done:
					case <-ended:
					}
					conn.Close()
				})
				act(conn, n)
				b.open.Add(-1)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		close(done)
		all.Wait()
	})
	return b
}

// answer reads requests and answers each with the text of the function; empty: it closes the connection.
func answer(text func(n int) string) func(net.Conn, int) {
	var requests atomic.Int64
	return func(conn net.Conn, _ int) {
		for in := bufio.NewReader(conn); ; {
			r, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			_ = r
			text := text(int(requests.Add(1) - 1))
			if _, err := io.WriteString(conn, text); err != nil || text == "" {
				return
			}
		}
	}
}

func always(text string) func(net.Conn, int) { return answer(func(int) string { return text }) }

// hang waits for the other side to end the connection.
func hang(conn net.Conn, _ int) { _, _ = io.Copy(io.Discard, conn) }

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

// refused is an address at which nobody listens.
func refused(t testing.TB) netip.AddrPort {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String())
}

// A name that is resolved just when a check has found no address is checked at once, not an interval later.
func TestAddressComesMeanwhile(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		b := startBackend(t, always(ok))
		in := instance(t, b.addr, registry.Check{Path: "/", Interval: time.Hour})
		up := make(chan Status, 1)
		var w *Watch
		ready := make(chan struct{})
		looks := 0
		ownerOf(in).changed = func(s Status) { up <- s }
		ownerOf(in).addrs = func() []netip.AddrPort {
			<-ready
			if looks++; looks == 1 {
				w.Soon() // from now on there is one
				return nil
			}
			return []netip.AddrPort{b.addr}
		}
		w = c.Watch(in)
		defer w.Stop()
		close(ready)
		select {
		case s := <-up:
			if s.State != Up {
				t.Errorf("%+v", s)
			}
		case <-time.After(10 * time.Second):
			t.Error("it is not checked")
		}
	})
}

// What a backend does, and what its first check says of it.
func TestVerdicts(t *testing.T) {
	path := registry.Check{Path: "/health?deep=1"}
	tcp := registry.Check{TCP: true}
	drip := func(every time.Duration) func(net.Conn, int) {
		return func(conn net.Conn, _ int) {
			for i := range len(ok) {
				if _, err := io.WriteString(conn, ok[i:i+1]); err != nil {
					return
				}
				time.Sleep(every)
			}
		}
	}
	send := func(text string) func(net.Conn, int) {
		return func(conn net.Conn, _ int) {
			_, _ = bufio.NewReader(conn).ReadString('\n')
			_, _ = io.WriteString(conn, text)
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
		}
	}
	for _, row := range []struct {
		name  string
		check registry.Check
		act   func(net.Conn, int)
		want  string // why it is down; empty: it is up
	}{
		{"200", path, always(ok), ""},
		{"399", path, always("HTTP/1.1 399 \r\n\r\n"), ""},
		{"no reason", path, always("HTTP/1.0 204\r\n\r\n"), ""},
		{"400", path, always("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), "got status 400"},
		{"500", path, always("HTTP/1.1 500 Oops\r\n\r\n"), "got status 500"},
		{"a status that it names", registry.Check{Path: "/", Status: "200,500-599"}, always("HTTP/1.1 503 Busy\r\n\r\n"), ""},
		{"one that it does not", registry.Check{Path: "/", Status: "204"}, always(ok), "got status 200"},
		{"interim ones before", path, always("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + ok), ""},
		{"another protocol", path, always("HTTP/1.1 101 Switching Protocols\r\n\r\n"), "got status 101"},
		{"slowly", path, drip(time.Millisecond), ""},
		{"too slowly", path, drip(100 * time.Millisecond), "no answer in time"},
		{"hangs", path, hang, "no answer in time"},
		{"closes", path, func(conn net.Conn, _ int) { _, _ = bufio.NewReader(conn).ReadString('\n') }, "the connection was closed without an answer"},
		{"closes at once", path, func(net.Conn, int) {}, "closed without an answer|could not be sent"},
		{"half a head", path, send("HTTP/1.1 200 OK\r\nContent-"), "the connection was closed within the head of the answer"},
		{"half a head, then nothing", path, always("HTTP/1.1 200 OK\r\nContent-"), "no answer in time"},
		{"a head of 15 KiB", path, always("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 15<<10) + "\r\n\r\n"), ""},
		{"a head of 17 KiB", path, always("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 17<<10) + "\r\n\r\n"), "the head of the answer is larger than 16 KiB"},
		{"an endless head", path, always("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20)), "the head of the answer is larger than 16 KiB"},
		{"an endless body", path, always("HTTP/1.1 200 OK\r\n\r\n" + strings.Repeat("x", 1<<20)), ""},
		{"another server", path, send("220 mail.example ESMTP\r\n"), "the answer is not HTTP/1.1"},
		{"HTTP/2", path, send("HTTP/2.0 200 OK\r\n\r\n"), "the answer is not HTTP/1.1"},
		{"no status", path, send("HTTP/1.1 OK\r\n\r\n"), "the answer is not HTTP/1.1"},
		{"a status of two", path, send("HTTP/1.1 20 OK!\r\n"), "the answer is not HTTP/1.1"},
		{"a status of four", path, send("HTTP/1.1 2000 OK\r\n"), "the answer is not HTTP/1.1"},
		{"a status past all", path, send("HTTP/1.1 600 OK\r\n"), "the answer is not HTTP/1.1"},
		{"line feeds alone", path, send("HTTP/1.1 200 OK\n\n"), "the answer is not HTTP/1.1"},
		{"nobody", path, nil, "connect: connection refused"},
		{"tcp", tcp, hang, ""},
		{"tcp to nobody", tcp, nil, "connect: connection refused"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			both(t, func(t *testing.T, c *Checker) {
				var at netip.AddrPort
				if row.act != nil {
					at = startBackend(t, row.act).addr
				} else {
					at = refused(t)
				}
				check := row.check
				check.Interval, check.Timeout = time.Hour, time.Second
				w := c.Watch(instance(t, at, check))
				if state, why := w.Verdict(); w.Status().Checked.IsZero() && (state == Up || why != "not checked yet") {
					t.Errorf("before the first check: %s %s", state, why)
				}
				eventually(t, "the first check has ended", func() bool { return w.Status().State != Unknown })
				s := w.Status()
				state, why := w.Verdict()
				ready := state == Up
				if row.want == "" {
					if s.State != Up || s.Error != "" || !ready {
						t.Errorf("%+v, want it up", s)
					}
				} else if s.State != Down || ready || !slices.ContainsFunc(strings.Split(row.want, "|"), func(want string) bool { return strings.Contains(s.Error, want) }) || why != "check failing: "+s.Error {
					t.Errorf("%+v %q, want it down: %s", s, why, row.want)
				}
				if time.Since(s.Checked) > 20*time.Second || s.Checked.Before(s.Since.Add(-time.Second)) {
					t.Errorf("checked at %v, since %v", s.Checked, s.Since)
				}
			})
		})
	}
}

// What is sent.
func TestRequest(t *testing.T) {
	for _, keep := range []bool{false, true} {
		both(t, func(t *testing.T, c *Checker) {
			got := make(chan string, 1)
			b := startBackend(t, func(conn net.Conn, _ int) {
				text := make([]byte, 4096)
				n, _ := conn.Read(text)
				got <- string(text[:n])
				_, _ = io.WriteString(conn, ok)
			})
			in := instance(t, b.addr, registry.Check{Path: "/health?x=1", Interval: time.Hour, KeepAlive: keep})
			in.Target.BasePath = "/base"
			c.Watch(in)
			want := "GET /base/health?x=1 HTTP/1.1\r\nHost: " + b.addr.String() + "\r\nUser-Agent: kerberos-check\r\nAccept: */*\r\n"
			if !keep {
				want += "Connection: close\r\n"
			}
			if request := <-got; request != want+"\r\n" {
				t.Errorf("it got %q", request)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	c := New()
	defer c.Close()
	conns := atomic.Int64{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	server.Config.ErrorLog = nil
	server.StartTLS()
	defer server.Close()
	at := netip.MustParseAddrPort(server.Listener.Addr().String())
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	silent := startBackend(t, hang).addr
	for _, row := range []struct {
		name string
		at   netip.AddrPort
		tls  *tls.Config
		keep bool
		want string
	}{
		{"trusted", at, &tls.Config{RootCAs: roots, ServerName: "example.com"}, false, ""},
		{"kept", at, &tls.Config{RootCAs: roots, ServerName: "example.com"}, true, ""},
		{"unknown authority", at, &tls.Config{ServerName: "example.com"}, false, "TLS: tls: failed to verify certificate"},
		{"another name", at, &tls.Config{RootCAs: roots, ServerName: "example.org"}, false, "TLS: tls: failed to verify certificate"},
		{"insecure", at, &tls.Config{InsecureSkipVerify: true}, false, ""},
		{"silent", silent, &tls.Config{InsecureSkipVerify: true}, false, "no TLS handshake in time"},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := conns.Load()
			in := instance(t, row.at, registry.Check{Path: "/", Interval: 300 * time.Millisecond, KeepAlive: row.keep})
			if row.at != silent { // a machine that has much to do needs time for a handshake
				in.Check.Timeout = 10 * time.Second
			}
			in.TLS = row.tls
			w := c.Watch(in)
			defer w.Stop()
			eventually(t, "the first check has ended", func() bool { return w.Status().State != Unknown })
			if s := w.Status(); (s.State == Up) != (row.want == "") || !strings.HasPrefix(s.Error, row.want) {
				t.Errorf("%+v, want %q", s, row.want)
			}
			if row.keep {
				first := w.Status().Checked
				eventually(t, "three further checks", func() bool { return w.Status().Checked.Sub(first) > 900*time.Millisecond })
				if n := conns.Load() - before; n != 1 {
					t.Errorf("%d connections", n)
				}
			}
		})
	}
}

// Where an instance has several addresses the first one that answers counts; none that is refused is dialled.
func TestAddresses(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		b := startBackend(t, always(ok))
		nobody := refused(t)
		six := netip.AddrPortFrom(netip.IPv6Loopback(), nobody.Port())
		prohibited := errors.New("prohibited")
		for _, row := range []struct {
			addrs []netip.AddrPort
			state State
			want  string
		}{
			{[]netip.AddrPort{nobody, b.addr}, Up, ""},
			{[]netip.AddrPort{six, b.addr}, Up, ""},
			{[]netip.AddrPort{nobody, six}, Down, "connect: "},
			{[]netip.AddrPort{netip.MustParseAddrPort("127.0.0.9:1"), b.addr}, Up, ""},
			{[]netip.AddrPort{netip.MustParseAddrPort("127.0.0.9:1")}, Down, "prohibited"},
		} {
			in := instance(t, b.addr, registry.Check{Path: "/", Interval: time.Hour, Timeout: 5 * time.Second})
			ownerOf(in).addrs = func() []netip.AddrPort { return row.addrs }
			ownerOf(in).allowed = func(ap netip.AddrPort) error {
				if ap.Addr() == netip.MustParseAddr("127.0.0.9") {
					return prohibited
				}
				return nil
			}
			w := c.Watch(in)
			eventually(t, "the first check has ended", func() bool { return w.Status().State != Unknown })
			if s := w.Status(); s.State != row.state || !strings.HasPrefix(s.Error, row.want) {
				t.Errorf("%v: %+v, want %s %q", row.addrs, s, row.state, row.want)
			}
		}

		// None yet: that says nothing, and it is checked as soon as there is one.
		var addrs atomic.Pointer[[]netip.AddrPort]
		addrs.Store(&[]netip.AddrPort{})
		var asked atomic.Int64
		in := instance(t, b.addr, registry.Check{Path: "/", Interval: time.Hour})
		ownerOf(in).addrs = func() []netip.AddrPort { asked.Add(1); return *addrs.Load() }
		w := c.Watch(in)
		eventually(t, "it was looked for", func() bool { return asked.Load() == 1 })
		time.Sleep(50 * time.Millisecond)
		if s := w.Status(); s.State != Unknown || s.Error != "" {
			t.Errorf("without an address: %+v", s)
		}
		addrs.Store(&[]netip.AddrPort{b.addr})
		w.Soon()
		eventually(t, "it is up", func() bool { return w.Status().State == Up })
	})
}

// Exactly so many in a row take it out and bring it back; the first success of a new one is enough.
func TestFallAndRise(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		for _, row := range []struct {
			start   registry.CheckStart
			answers string // one for each check: + passes, - fails
			want    string // the state after it: u, d, or ? for unknown
		}{
			{"down", "-+", "du"},
			{"down", "--+-+", "dduuu"},
			{"down", "+--+---+-++", "uuuuuudddd" + "u"},
			{"up", "--+---++", "uuuuudd" + "u"},
			{"up", "+++", "uuu"},
			{"recent", "-+--", "duuu"},
			{"recent", "+---", "uuud"},
		} {
			var statuses []string
			var at atomic.Int64
			var w *Watch
			var mu sync.Mutex
			seen := ""
			note := func() { // what the check before has led to
				mu.Lock()
				defer mu.Unlock()
				if w != nil && at.Load() > 0 {
					seen += string(w.Status().State)[:1]
				}
			}
			for _, a := range row.answers {
				statuses = append(statuses, map[rune]string{'+': ok, '-': "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"}[a])
			}
			done := make(chan struct{})
			b := startBackend(t, answer(func(n int) string {
				note()
				at.Add(1)
				if n < len(statuses) {
					return statuses[n]
				}
				if n == len(statuses) {
					close(done)
				}
				return ""
			}))
			start := row.start
			if start == "recent" {
				start = registry.StartDown
			}
			in := instance(t, b.addr, registry.Check{Path: "/", Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, Fall: 3, Rise: 2, Start: start})
			in.Recent = row.start == "recent"
			in.Check.Timeout = 20 * time.Second
			var changes []State
			ownerOf(in).changed = func(s Status) { changes = append(changes, s.State) }
			mu.Lock()
			w = c.Watch(in)
			mu.Unlock()
			<-done
			w.Stop()
			if seen != row.want {
				t.Errorf("start %s, %s: %s, want %s", row.start, row.answers, seen, row.want)
			}
		}
	})
}

// One that passes again says so until that is enough.
func TestRiseIsShown(t *testing.T) {
	w := &Watch{Instance: Instance{Check: &registry.Check{Rise: 2}}}
	w.status.State = Down
	if state, why := w.Verdict(); state == Up || why != "check failing: it passes, but not 2 times in a row yet" {
		t.Errorf("%s %q", state, why)
	}
}

// A connection is used again only where the check says so, and only after an answer that leaves it usable.
func TestKeptConnections(t *testing.T) {
	chunked := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
	for _, row := range []struct {
		name   string
		keep   bool
		answer string
		once   bool // all checks on one connection
	}{
		{"not kept", false, ok, false},
		{"kept", true, ok, true},
		{"no body", true, "HTTP/1.1 204 No Content\r\n\r\n", true},
		{"a body of 64 KiB", true, "HTTP/1.1 200 OK\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat("x", 64<<10), true},
		{"a larger one", true, "HTTP/1.1 200 OK\r\nContent-Length: 65537\r\n\r\n" + strings.Repeat("x", 64<<10+1), false},
		{"chunks", true, chunked, false},
		{"asked to close", true, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", false},
		{"HTTP/1.0", true, "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", false},
		{"two lengths", true, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", false},
		{"more than its length", true, ok + "HTTP/1.1 200 OK\r\n", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			both(t, func(t *testing.T, c *Checker) {
				var requests atomic.Int64
				b := startBackend(t, answer(func(int) string { requests.Add(1); return row.answer }))
				w := c.Watch(instance(t, b.addr, registry.Check{Path: "/", Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, KeepAlive: row.keep}))
				eventually(t, "five checks", func() bool { return requests.Load() == 5 })
				w.Stop()
				if n := b.conns.Load(); (n == 1) != row.once || !row.once && n != requests.Load() {
					t.Errorf("%d connections for %d checks", n, requests.Load())
				}
				eventually(t, "no connection is left", func() bool { return b.open.Load() == 0 })
			})
		})
	}
}

// That an instance closes a connection which is idle is no failure.
func TestKeptConnectionEnds(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		b := startBackend(t, func(conn net.Conn, _ int) { // one request each, and no word of that
			in := bufio.NewReader(conn)
			if _, err := http.ReadRequest(in); err == nil {
				_, _ = io.WriteString(conn, ok)
				time.Sleep(20 * time.Millisecond)
			}
		})
		in := instance(t, b.addr, registry.Check{Path: "/", Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, Fall: 1, KeepAlive: true})
		in.Check.Timeout = 5 * time.Second
		var downs atomic.Int64
		ownerOf(in).changed = func(s Status) {
			if s.State == Down {
				downs.Add(1)
			}
		}
		c.Watch(in)
		eventually(t, "five checks", func() bool { return b.conns.Load() >= 5 })
		if downs.Load() > 0 {
			t.Error("it was down")
		}
	})
}

// noted starts a backend that answers well; checked is when it was asked so far.
func noted(t *testing.T) (b *backend, checked func() []time.Time) {
	var mu sync.Mutex
	var times []time.Time
	b = startBackend(t, answer(func(int) string {
		mu.Lock()
		defer mu.Unlock()
		times = append(times, time.Now())
		return ok
	}))
	return b, func() []time.Time {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(times)
	}
}

// Many that come at once do not stay together: after the first round none of twenty parts of an interval has much more than
// its share.
func TestSpread(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		const n, interval = 400, 2 * time.Second
		b, checked := noted(t)
		for range n {
			c.Watch(instance(t, b.addr, registry.Check{Path: "/", Interval: interval}))
		}
		eventually(t, "the first checks and two rounds", func() bool { return len(checked()) >= 3*n })
		times := checked()
		last := times[len(times)-1]
		parts := map[int]int{}
		for _, at := range times[n:] {
			parts[int(last.Sub(at)/(interval/20))]++
		}
		for part, got := range parts {
			if got > 4*n/20 {
				t.Errorf("%d checks in part %d: more than four times the share", got, part)
			}
		}
	})
}

// Those that were up not long ago come all together too, and have their first checks spread over recentTurn however long the
// interval is, also where an address comes a moment later. They are up meanwhile.
func TestRecentAreSpread(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		const n, interval, parts = 200, time.Hour, 10
		b, checked := noted(t)
		began := time.Now()
		for i := range n {
			in := instance(t, b.addr, registry.Check{Path: "/", Interval: interval})
			in.Recent = true
			w := c.Watch(in)
			if i%2 == 0 {
				w.Soon()
			}
			if s := w.Status(); s.State != Up {
				t.Fatalf("%+v", s)
			}
		}
		eventually(t, "the first checks", func() bool { return len(checked()) >= n })
		var in [parts]int
		for _, at := range checked()[:n] {
			in[min(int(at.Sub(began)/(recentTurn/parts)), parts-1)]++ // the last ones may be late
		}
		for part, got := range in {
			if got > 4*n/parts {
				t.Errorf("%d first checks in part %d of the time: more than four times the share; %v", got, part, in)
			}
		}
	})
}

// Checks let requests have the CPU, but where these would take all of it checks have their part: none is late.
func TestBusyProcess(t *testing.T) {
	const interval, busy = time.Second, 50
	n := 300
	if raceDetector { // which makes a check several times dearer
		n = 100
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := New()
	defer c.Close()
	var ends sync.WaitGroup
	defer ends.Wait()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for range busy * runtime.GOMAXPROCS(0) / 2 {
		ends.Go(func() {
			for ctx.Err() == nil {
				for end := time.Now().Add(200 * time.Microsecond); time.Now().Before(end); {
				}
				runtime.Gosched()
			}
		})
	}
	watches := make([]*Watch, n)
	for i := range watches {
		watches[i] = c.Watch(instance(t, netip.MustParseAddrPort(ln.Addr().String()), registry.Check{TCP: true, Interval: interval}))
	}
	eventually(t, "all had a check within two intervals", func() bool {
		return !slices.ContainsFunc(watches, func(w *Watch) bool {
			s := w.Status()
			return s.State != Up || time.Since(s.Checked) > 2*interval
		})
	})
}

// Those that hang do not keep the others from being checked, and so many hold no more connections than they may.
func TestHangingOnes(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		const hanging, healthy = 700, 20
		var open, most atomic.Int64
		dead := startBackend(t, func(conn net.Conn, n int) {
			now := open.Add(1)
			defer open.Add(-1)
			for before := most.Load(); now > before && !most.CompareAndSwap(before, now); before = most.Load() {
			}
			hang(conn, n)
		})
		for range hanging {
			c.Watch(instance(t, dead.addr, registry.Check{Path: "/", Interval: time.Second, Timeout: time.Second}))
		}
		alive := startBackend(t, always(ok))
		watches := make([]*Watch, healthy)
		for i := range watches {
			watches[i] = c.Watch(instance(t, alive.addr, registry.Check{Path: "/", Interval: time.Second, Timeout: time.Second}))
		}
		eventually(t, "the healthy ones are up", func() bool {
			return !slices.ContainsFunc(watches, func(w *Watch) bool { return w.Status().State != Up })
		})
		for range 3 {
			since := time.Now()
			eventually(t, "each healthy one is checked again", func() bool {
				return !slices.ContainsFunc(watches, func(w *Watch) bool { return w.Status().Checked.Before(since) })
			})
			if d := time.Since(since); d > 10*time.Second {
				t.Errorf("the healthy ones waited %v for a check of every second", d)
			}
		}
		// A connection that was reset may be counted for a moment.
		if n, limit := int(most.Load()), atOnce[untested]+atOnce[failing]+atOnce[passing]; n > limit {
			t.Errorf("%d connections at once", n)
		}
	})
}

// Close ends what is under way at once.
func TestClose(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		b := startBackend(t, hang)
		w := c.Watch(instance(t, b.addr, registry.Check{Path: "/", Interval: time.Hour, Timeout: time.Minute}))
		eventually(t, "the check is under way", func() bool { return b.open.Load() == 1 })
		began := time.Now()
		c.Close()
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("it took %v", d)
		}
		eventually(t, "its connection has ended", func() bool { return b.open.Load() == 0 })
		if s := w.Status(); s.State != Unknown {
			t.Errorf("%+v", s)
		}
		w.Stop()
		c.Watch(instance(t, b.addr, registry.Check{TCP: true})).Stop()
		c.Close()
	})
}

// What this process lacks says nothing of an instance.
func TestLackOfDescriptors(t *testing.T) {
	w := &Watch{Instance: Instance{Check: &registry.Check{Fall: 1}}}
	for _, err := range []error{fmt.Errorf("socket: %w", os.NewSyscallError("socket", syscall.EMFILE)), errNowhere} {
		if s := w.judge(Up, err); s != Up || w.failed != 0 {
			t.Errorf("%v: %s", err, s)
		}
	}
	if s := w.judge(Up, errEmpty); s != Down {
		t.Error("a failure does not count")
	}
}

// However an answer comes in pieces, it is read the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{ok, "HTTP/1.1 103 x\r\n\r\n" + ok, "HTTP/1.0 200\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9", "SSH-2.0\r\n", "HTTP/1.1 204 \r\nConnection: close\r\n\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, err := parse(b)
		for n := range b {
			part, failed := parse(b[:n])
			if failed != nil && err == nil || part.status != 0 && part.status != whole.status {
				t.Fatalf("the first %d bytes are %+v %v, all are %+v %v", n, part, failed, whole, err)
			}
		}
		if err == nil && whole.status != 0 && (whole.status < 200 && whole.status != 101 || whole.status > 599) {
			t.Fatalf("status %d", whole.status)
		}
	})
}
