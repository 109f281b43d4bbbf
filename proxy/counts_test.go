package proxy

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kerberos/cb"
	"kerberos/registry"
)

// Each duration is in the bucket that Prometheus would put it into.
func TestHistogramBuckets(t *testing.T) {
	durations := []time.Duration{-1, 0, 1, 953, 954, 955, time.Second / 8, time.Second/8 + 1, time.Second/8 - 1, time.Second, 2 * time.Second,
		4095 * time.Second, 4096 * time.Second, 5000 * time.Second, math.MaxInt64}
	for range 100_000 {
		durations = append(durations, time.Duration(math.Exp(rand.Float64()*math.Log(1e13))))
	}
	for _, d := range durations {
		var h histogram
		h.observe(d)
		var all total
		all.add(&h)
		got := all.histogram()
		want := Histogram{Sum: max(d, 0), First: got.First, Counts: []uint64{}}
		if index := int(math.Ceil(math.Log2(d.Seconds()) * perOctave)); d.Seconds() <= math.Exp2(firstOctave) {
			want.Under = 1
		} else {
			want.First, want.Counts = min(index, HistogramOver*perOctave), []uint64{1}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("%d ns: want -, got +\n%s", d, diff)
		}
	}
}

// statsOf returns what is counted of a service.
func (g *gateway) statsOf(name string) ServiceStats {
	for s := range g.Services() {
		if s.Name == name {
			return s
		}
	}
	return ServiceStats{}
}

// nonzero are the requests of a service that have ended, without those kinds of which there is none.
func nonzero(all []Count) map[string]uint64 {
	some := map[string]uint64{}
	for _, n := range all {
		if n.Times > 0 {
			some[n.What] = n.Times
		}
	}
	return some
}

// count is how many durations a histogram has.
func (h *Histogram) count() (n uint64) {
	n = h.Under
	for _, more := range h.Counts {
		n += more
	}
	return n
}

// Each way for a request to end is counted as what it is, once.
func TestRequestsAreCounted(t *testing.T) {
	const get = "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"
	answer := func(status string) string { return "HTTP/1.1 " + status + "\r\nContent-Length: 2\r\n\r\nhi" }
	for _, row := range []struct {
		name, request, response string
		change                  func(*Config)
		want                    string
		attempts                map[string]uint64
	}{
		{"200", get, answer("200 OK"), nil, "2xx", map[string]uint64{"success": 1}},
		{"302", get, answer("302 Found"), nil, "3xx", map[string]uint64{"success": 1}},
		{"404 of a backend", get, answer("404 Not Found"), nil, "4xx", map[string]uint64{"success": 1}},
		{"499 of a backend", get, answer("499 Odd"), nil, "4xx", map[string]uint64{"success": 1}},
		{"503 of a backend", get, answer("503 Busy"), nil, "5xx", map[string]uint64{"failure": 1}},
		{"a streamed one", get, ok(300 << 10), nil, "2xx", map[string]uint64{"success": 1}},
		{"a POST", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", answer("200 OK"), nil, "2xx", map[string]uint64{"success": 1}},
		{"a large upload", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("u", 300_000), answer("200 OK"), nil, "2xx",
			map[string]uint64{"success": 1}},
		{"an upload in chunks", "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", answer("200 OK"), nil, "2xx",
			map[string]uint64{"success": 1}},
		{"too large", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "", func(cfg *Config) { cfg.Limits.Body = 4 }, "refused_4xx", nil},
		{"no answer", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "close", nil, "refused_5xx", map[string]uint64{"failure": 1}},
		{"half an answer", get, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhi", nil, "cut", map[string]uint64{"failure": 1}},
		{"a tunnel", strings.Replace(handshake, "/ws", "/echo", 1), switched, nil, "1xx", map[string]uint64{"success": 1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, row.change, nil)
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if _, err := o.next(r); err == nil && row.response != "close" {
					io.WriteString(c, row.response)
				}
			})
			g.register(t, "echo", "a", o.url())
			c := g.dial(t)
			c.send(row.request)
			if row.name == "a tunnel" {
				c.read(false)
			}
			if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			response, err := io.ReadAll(c.r) // up to the end, which may be broken
			if len(response) == 0 && row.name != "a tunnel" {
				t.Fatal(err)
			}
			var s ServiceStats
			eventually(t, "it is counted", func() bool {
				s = g.statsOf("echo")
				return len(nonzero(s.Requests)) > 0
			})
			if diff := cmp.Diff(map[string]uint64{row.want: 1}, nonzero(s.Requests)); diff != "" {
				t.Errorf("want -, got +\n%s", diff)
			}
			if s.Whole.count() != 1 || s.Gateway.count() != 1 || s.Backend.count() != s.Whole.count() && row.attempts != nil {
				t.Errorf("durations: %d in all, %d of the gateway, %d of backends", s.Whole.count(), s.Gateway.count(), s.Backend.count())
			}
			if s.Whole.Sum < s.Gateway.Sum || s.Whole.Sum < s.Backend.Sum {
				t.Errorf("%v in all, %v of the gateway, %v of backends", s.Whole.Sum, s.Gateway.Sum, s.Backend.Sum)
			}
			if received := uint64(len(row.request)); row.attempts != nil && row.name != "an upload in chunks" && s.Received != received {
				t.Errorf("%d bytes received, want %d", s.Received, received)
			}
			if row.want == "2xx" && s.Sent != uint64(len(response)) {
				t.Errorf("%d bytes sent, want %d", s.Sent, len(response))
			}
			for u := range s.Upstreams() {
				eventually(t, "the attempt is counted", func() bool {
					return cmp.Equal(nonzero(g.instanceStats("echo", u.ID).Requests), row.attempts) || row.attempts == nil
				})
			}
		})
	}
}

func (g *gateway) instanceStats(service, id string) (found UpstreamStats) {
	s := g.statsOf(service)
	for u := range s.Upstreams() {
		if u.ID == id {
			found = u
		}
	}
	return found
}

// tapped counts the bytes of a connection as its owner reads and writes them.
type tapped struct {
	net.Conn
	received, sent *atomic.Uint64
}

func (m tapped) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.received.Add(uint64(n))
	return n, err
}

func (m tapped) Write(p []byte) (int, error) {
	n, err := m.Conn.Write(p)
	m.sent.Add(uint64(n))
	return n, err
}

// tap starts an origin that counts its bytes. It reads each request whole and gives answer the connection behind it,
// until that reports false.
func tap(t *testing.T, answer func(c net.Conn, r *bufio.Reader) bool) (o *origin, received, sent *atomic.Uint64) {
	received, sent = new(atomic.Uint64), new(atomic.Uint64)
	o = startOrigin(t, func(o *origin, c net.Conn, _ *bufio.Reader) {
		m := tapped{c, received, sent}
		for r := bufio.NewReader(m); ; {
			if _, err := o.next(r); err != nil || !answer(m, r) {
				return
			}
		}
	})
	return o, received, sent
}

// wantBytesOf waits for the instance to say what is counted of it: it knows of a Write only when that has returned.
func wantBytesOf(t *testing.T, u UpstreamStats, received, sent *atomic.Uint64) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); u.Received != received.Load() || u.Sent != sent.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: received %d, sent %d; itself it says %d and %d", u.ID, u.Received, u.Sent, received.Load(), sent.Load())
		}
	}
}

// An instance's bytes are those that it has read and written itself, however they came and went.
func TestBytesOfInstances(t *testing.T) {
	const get = "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"
	text := func(response string) func(net.Conn, *bufio.Reader) bool {
		return func(c net.Conn, _ *bufio.Reader) bool {
			_, err := io.WriteString(c, response)
			return err == nil
		}
	}
	slowly := func(pause time.Duration, parts ...string) func(net.Conn, *bufio.Reader) bool {
		return func(c net.Conn, _ *bufio.Reader) bool {
			for _, part := range parts {
				io.WriteString(c, part)
				time.Sleep(pause)
			}
			return true
		}
	}
	for _, row := range []struct {
		name, request string
		answer        func(net.Conn, *bufio.Reader) bool
		requests      int
	}{
		{"small ones", get, text(ok(2)), 3},
		{"no body", strings.Replace(get, "GET", "HEAD", 1), text(ok(2)[:len(ok(2))-2]), 1},
		{"a POST", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", text(ok(2)), 2},
		{"a POST that is held apart", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + filler(60_000), text(ok(2)), 1},
		{"a large upload", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + filler(500_000), text(ok(2)), 1},
		{"an upload in chunks", "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" +
			strings.Repeat("ff\r\n"+filler(255)+"\r\n", 500) + "0\r\n\r\n", text(ok(2)), 1},
		{"one that is read whole", get, text(ok(60 << 10)), 1},
		{"one that comes in two", get, slowly(wholeTimeout/5, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", "again"), 1},
		{"one that comes slowly", get, slowly(2*wholeTimeout, "HTTP/1.1 200 OK\r\nContent-Le", "ngth: 10\r\n\r\n", "hello", "again"), 1},
		{"a large one", get, text(ok(1 << 20)), 1},
		{"one in chunks", get, slowly(2*wholeTimeout, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n", "0\r\n\r\n"), 1},
		{"an interim one", get, text("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok(2)), 1},
		{"one that breaks off", get, func(c net.Conn, _ *bufio.Reader) bool {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhi")
			return false
		}, 1},
		{"a tunnel", strings.Replace(handshake, "/ws", "/echo", 1), func(c net.Conn, r *bufio.Reader) bool {
			io.WriteString(c, switched+"early")
			part := make([]byte, 100_000)
			n, _ := io.ReadFull(r, part)
			c.Write(part[:n])
			c.(tapped).Conn.(*net.TCPConn).CloseWrite()
			return true
		}, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, nil, nil)
			o, received, sent := tap(t, row.answer)
			g.register(t, "echo", "a", o.url())
			for range row.requests {
				c := g.dial(t)
				c.send(row.request)
				if row.name == "a tunnel" {
					go io.WriteString(c.Conn, filler(100_000))
				} else if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, c.r) // to the end, which may be broken
				c.Close()
			}
			var u UpstreamStats
			eventually(t, "all has ended", func() bool {
				u = g.instanceStats("echo", "a")
				return u.Requests[success].Times+u.Requests[failure].Times == uint64(row.requests) && u.Tunnels == 0
			})
			wantBytesOf(t, u, received, sent)
			if u.Received == 0 || u.Sent == 0 || u.Retries != 0 {
				t.Errorf("%d bytes received, %d sent, %d retries", u.Received, u.Sent, u.Retries)
			}
		})
	}
}

// What an instance gets because another one has failed is a retry of its own, and each has its own bytes of the request.
func TestRetriesOfInstances(t *testing.T) {
	g := startGateway(t, nil, nil)
	failing, failingReceived, failingSent := tap(t, func(net.Conn, *bufio.Reader) bool { return false })
	fine, fineReceived, fineSent := tap(t, func(c net.Conn, _ *bufio.Reader) bool {
		_, err := io.WriteString(c, ok(2))
		return err == nil
	})
	g.register(t, "echo", "failing", failing.url())
	g.register(t, "echo", "fine", fine.url())
	const requests = 8
	for range requests {
		g.do(t, "PUT /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello").want(t, 200)
	}
	var a, b UpstreamStats
	eventually(t, "all are counted", func() bool {
		a, b = g.instanceStats("echo", "failing"), g.instanceStats("echo", "fine")
		return b.Requests[success].Times == requests
	})
	failed := a.Requests[failure].Times
	if failed == 0 || failed != uint64(len(failing.requests())) {
		t.Errorf("%d failures of %d attempts", failed, len(failing.requests()))
	}
	if s := g.statsOf("echo"); a.Retries != 0 || b.Retries != failed || s.Retries != failed {
		t.Errorf("after %d failures: %d retries at the one that fails, %d at the other, %d in all", failed, a.Retries, b.Retries, s.Retries)
	}
	wantBytesOf(t, a, failingReceived, failingSent)
	wantBytesOf(t, b, fineReceived, fineSent)
	if a.Received == 0 || a.Sent != 0 {
		t.Errorf("the one that fails has received %d bytes and sent %d", a.Received, a.Sent)
	}
}

// A client that leaves is counted as that, and what is no service's apart.
func TestOthersAreCounted(t *testing.T) {
	g := startGateway(t, nil, nil)
	h := startHeld(t, "held")
	g.register(t, "echo", "a", h.url())
	c := g.ask(t, "/echo")
	h.arrived(t)
	resetNow(c.Conn)
	eventually(t, "it has gone", func() bool { return cmp.Equal(nonzero(g.statsOf("echo").Requests), map[string]uint64{"gone": 1}) })

	g.do(t, "GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n").want(t, 404)
	g.do(t, "GET / HTTP/9\r\n\r\n").want(t, 400)
	eventually(t, "they are counted", func() bool { return nonzero(g.Stats().Unrouted)["refused_4xx"] == 2 })
	want := []Refused{{400, "http_request_error", 1}, {404, "destination_not_found", 1}}
	if diff := cmp.Diff(want, g.Stats().Refusals); diff != "" {
		t.Errorf("want -, got +\n%s", diff)
	}
	if n := g.Stats().Accepted; n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
}

// The time of the backend is the backend's, that of a client that is slow nobody's, and that of the queue the gateway's.
func TestDurations(t *testing.T) {
	const pause = 200 * time.Millisecond
	slowly := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		for {
			if _, err := o.next(r); err != nil {
				return
			}
			time.Sleep(pause)
			io.WriteString(c, ok(2))
		}
	})
	for _, row := range []struct {
		name             string
		change           func(*Config)
		run              func(g *gateway)
		gateway, backend time.Duration // at least
		client           time.Duration // what is left, at least
	}{
		{"backend", nil, func(g *gateway) { g.do(t, smallGet).want(t, 200) }, 0, pause, 0},
		{"client", nil, func(g *gateway) {
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nh")
			time.Sleep(pause)
			c.send("i")
			c.read(false).want(t, 200)
		}, 0, pause, pause / 2},
		{"queue", func(cfg *Config) { cfg.Limits.InFlightPerService, cfg.Limits.QueueTimeout = 1, 10*time.Second }, func(g *gateway) {
			first := g.ask(t, "/echo")
			eventually(t, "it is there", func() bool { return g.instanceStats("echo", "a").InFlight == 1 })
			g.do(t, smallGet).want(t, 200)
			first.read(false).want(t, 200)
		}, pause / 2, 2 * pause, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, row.change, nil)
			g.register(t, "echo", "a", slowly.url())
			row.run(g)
			var s ServiceStats
			eventually(t, "all are counted", func() bool {
				s = g.statsOf("echo")
				return g.instanceStats("echo", "a").InFlight == 0 && nonzero(s.Requests)["2xx"] == nonzero(g.instanceStats("echo", "a").Requests)["success"]
			})
			left := s.Whole.Sum - s.Gateway.Sum - s.Backend.Sum
			if s.Gateway.Sum < row.gateway || s.Backend.Sum < row.backend || left < row.client {
				t.Errorf("of %v: gateway %v, want %v; backend %v, want %v; others %v, want %v", s.Whole.Sum,
					s.Gateway.Sum, row.gateway, s.Backend.Sum, row.backend, left, row.client)
			}
		})
	}
}

// What a service has counted stays when its instances leave.
func TestCountsOutliveInstances(t *testing.T) {
	g := startGateway(t, nil, nil)
	for i := range 3 {
		id := fmt.Sprint(i)
		g.register(t, "echo", id, naming(t, id).url())
		g.do(t, smallGet).want(t, 200)
		eventually(t, "it is counted", func() bool { return nonzero(g.statsOf("echo").Requests)["2xx"] == uint64(i+1) })
		if err := g.reg.Unregister("echo", id, ""); err != nil {
			t.Fatal(err)
		}
		if s := g.statsOf("echo"); nonzero(s.Requests)["2xx"] != uint64(i+1) || s.Instances != 0 || s.Whole.count() != uint64(i+1) {
			t.Errorf("after %d: %v, %d instances, %d durations", i, s.Requests, s.Instances, s.Whole.count())
		}
	}
}

func TestRetriesAreCounted(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", refusedAddr(t))
	g.register(t, "echo", "b", naming(t, "b").url())
	for range 4 {
		g.do(t, smallGet).want(t, 200)
	}
	s := g.statsOf("echo")
	if a := nonzero(g.instanceStats("echo", "a").Requests)["failure"]; a == 0 || s.Retries != a {
		t.Errorf("%d retries after %d failures", s.Retries, a)
	}
	if states := nonzero(s.States); states["ready"] != 2 {
		t.Errorf("%v", states)
	}
	if s.RetryBudget < 99 {
		t.Errorf("a budget of %v", s.RetryBudget)
	}
}

// Each instance is counted by what it is.
func TestInstancesAreCounted(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 1, OpenFor: time.Hour} }, nil)
	ill := answering(t, "HTTP/1.1 500 Ill\r\nContent-Length: 0\r\n\r\n")
	well := naming(t, "well")
	for _, in := range []registry.Instance{
		{ID: "open", Addr: refusedAddr(t)},
		{ID: "ready", Addr: well.url()},
		{ID: "checked", Addr: well.url(), Check: &registry.Check{Path: "/"}},
		{ID: "ill", Addr: ill.url(), Check: &registry.Check{Path: "/"}},
		{ID: "lost", Addr: "http://no-such-name.invalid"},
		{ID: "down", Addr: well.url()},
		{ID: "drain", Addr: well.url()},
	} {
		if err := g.reg.Register("echo", in); err != nil {
			t.Fatal(err)
		}
	}
	for _, state := range []registry.State{registry.Down, registry.Drain} {
		if err := g.reg.Patch("echo", string(state), registry.Patch{SetState: true, State: state}); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]uint64{"ready": 2, "check_failing": 1, "no_address": 1, "down": 1, "drain": 1, "breaker_open": 1}
	eventually(t, "all are what they are", func() bool {
		g.do(t, smallGet).want(t, 200)
		return cmp.Equal(nonzero(g.statsOf("echo").States), want)
	})
	for id, want := range map[string][3]bool{ // ready, checked, healthy
		"ready": {true, false, false}, "checked": {true, true, true}, "ill": {false, true, false}, "open": {},
	} {
		if u := g.instanceStats("echo", id); [3]bool{u.Ready, u.Checked, u.Healthy} != want {
			t.Errorf("%s: %+v", id, u)
		}
	}
	if open := g.instanceStats("echo", "open").Breaker; !open[cb.Open].Now || open[cb.Open].Changes != 1 || open[cb.Closed].Now {
		t.Errorf("%+v", open)
	}
}

// With NoMetrics nothing is kept but what the API shows.
func TestNoMetrics(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.NoMetrics = true }, nil)
	g.register(t, "echo", "a", naming(t, "a").url())
	g.do(t, smallGet).want(t, 200)
	eventually(t, "the attempt is counted", func() bool { return nonzero(g.instanceStats("echo", "a").Requests)["success"] == 1 })
	if s := g.statsOf("echo"); len(nonzero(s.Requests)) > 0 || s.Whole.count() > 0 {
		t.Errorf("%v", s.Requests)
	}
	if u := g.instanceStats("echo", "a"); u.Received+u.Sent > 0 {
		t.Errorf("%d bytes received, %d sent", u.Received, u.Sent)
	}
}
