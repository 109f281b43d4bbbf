package proxy

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// exchanger is a client and an origin that allocate nothing while they exchange requests of one kind.
type exchanger struct {
	net.Conn
	request []byte
	in      []byte
	length  int // of the response that the client gets
}

// startExchanger starts both around a gateway. Each request is in bytes long at the origin, and answered with body.
func startExchanger(t testing.TB, g *gateway, request, response string) *exchanger {
	t.Helper()
	body := 0
	if _, rest, ok := strings.Cut(request, "\r\n\r\n"); ok {
		body = len(rest)
	}
	o := startRaw(t, body, []byte(response))
	g.register(t, "echo", "a", "http://"+o)
	return g.exchanger(t, request)
}

// exchanger connects a client, and learns how long a response is from the first.
func (g *gateway) exchanger(t testing.TB, request string) *exchanger {
	t.Helper()
	c := g.dial(t)
	if err := c.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	c.send(request)
	m := c.read(false).want(t, 200)
	return &exchanger{Conn: c.Conn, request: []byte(request), in: make([]byte, 64<<10), length: len(m.head) + len(m.body)}
}

// exchange sends the request and reads all of the response.
func (e *exchanger) exchange(t testing.TB) {
	if _, err := e.Write(e.request); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(e.Conn, e.in[:e.length]); err != nil {
		t.Fatal(err)
	}
}

// startRaw starts an origin that answers every request that has a body of that length with the same bytes.
func startRaw(t testing.TB, body int, response []byte) (addr string) {
	t.Helper()
	ln := listen(t)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				in := make([]byte, 64<<10)
				for n := 0; ; {
					k, err := c.Read(in[n:])
					if err != nil {
						return
					}
					n += k
					end := bytes.Index(in[:n], headEnd)
					if end < 0 || n < end+len(headEnd)+body {
						continue
					}
					n = 0
					if _, err := c.Write(response); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

const (
	browserGet = "GET /echo/some/path?with=query HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
		"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\nAccept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\n" +
		"Cookie: session=0123456789abcdef0123456789abcdef\r\nConnection: keep-alive\r\n\r\n"
	smallGet = "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"
)

var (
	smallPost     = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("p", 1024)
	smallResponse = ok(100)
	largeResponse = ok(16 << 10)
)

// ok is a response with a body of that size.
func ok(size int) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nDate: Mon, 23 Nov 2026 17:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s",
		size, strings.Repeat("r", size))
}

// asServed is the configuration of the binary, where all is on by default. A long idle time keeps what happens rarely (a
// pool that is cleaned) out of the count of allocations.
func asServed(cfg *Config) {
	cfg.UpstreamIdle = time.Hour
	cfg.API = func(*fasthttp.RequestCtx) {}
	cfg.MayRead = func(*fasthttp.RequestCtx) bool { return true }
	cfg.HealthPath = "/a/path/that/a/load/balancer/asks/for"
}

// exchanges are the requests that cost no allocation.
var exchanges = []struct {
	name              string
	change            func(*Config)
	request, response string
}{
	{"small GET", nil, smallGet, smallResponse},
	{"GET of a browser", nil, browserGet, smallResponse},
	{"long path", nil, "GET /echo/" + strings.Repeat("segment/", 50) + " HTTP/1.1\r\nHost: x\r\n\r\n", smallResponse},
	{"POST of 1 KiB", nil, smallPost, smallResponse},
	{"response of 16 KiB", nil, smallGet, largeResponse},
	{"ip-hash", withStrategy(lb.IPHash), smallGet, smallResponse},
	{"path with an escape", nil, "GET /echo/a%20b HTTP/1.1\r\nHost: x\r\n\r\n", smallResponse},
	{"prefix table", func(cfg *Config) { cfg.Routes = parseRoutes("/echo=echo /=other /*=") }, smallGet, smallResponse},
	{"told of", func(cfg *Config) { cfg.AccessLog = func(*Record) {} }, browserGet, smallResponse},
	{"request ids", func(cfg *Config) { cfg.RequestIDs = true }, browserGet, smallResponse},
	{"traced, not sampled", func(cfg *Config) { cfg.Trace = func(*Record) {} }, browserGet, smallResponse},
}

// A proxied request costs no allocation: client and origin here make none, so what is counted is the gateway's.
func TestRequestsDoNotAllocate(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	for _, tt := range exchanges {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				asServed(cfg)
				if tt.change != nil {
					tt.change(cfg)
				}
			}, nil)
			e := startExchanger(t, g, tt.request, tt.response)
			for range 100 {
				e.exchange(t)
			}
			// The best of some runs: the runtime's own work (a collection, a timer's heap) counts too.
			best := 1e9
			for range 5 {
				best = min(best, allocations(200, func() { e.exchange(t) }))
			}
			if best != 0 {
				t.Errorf("%v allocations a request, want none", best)
			}
		})
	}
}

// allocations is testing.AllocsPerRun without its GOMAXPROCS of 1: client and origin would have to wait for the loop's naps.
func allocations(runs int, f func()) float64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range runs {
		f()
	}
	runtime.ReadMemStats(&after)
	return float64((after.Mallocs - before.Mallocs) / uint64(runs))
}

func BenchmarkExchange(b *testing.B) {
	for _, bb := range exchanges {
		b.Run(bb.name, func(b *testing.B) {
			g := startGateway(b, func(cfg *Config) {
				asServed(cfg)
				if bb.change != nil {
					bb.change(cfg)
				}
			}, nil)
			e := startExchanger(b, g, bb.request, bb.response)
			b.ReportAllocs()
			for b.Loop() {
				e.exchange(b)
			}
		})
	}
}

// BenchmarkConcurrent is small GETs on 64 connections at once.
func BenchmarkConcurrent(b *testing.B) {
	g := startGateway(b, asServed, nil)
	g.register(b, "echo", "a", "http://"+startRaw(b, 0, []byte(smallResponse)))
	clients := make(chan *exchanger, 64)
	for range cap(clients) {
		clients <- g.exchanger(b, smallGet)
	}
	b.ReportAllocs()
	b.SetParallelism(cap(clients) / runtime.GOMAXPROCS(0))
	b.RunParallel(func(pb *testing.PB) {
		e := <-clients
		for pb.Next() {
			e.exchange(b)
		}
	})
}

// startExchange makes a gateway's own part of a request, without sockets.
func startExchange(t testing.TB, strategy lb.Strategy, n int) *exchange {
	t.Helper()
	reg := registry.New(registry.Config{})
	for i := range n {
		if err := reg.Register("echo", registry.Instance{ID: fmt.Sprintf("i%05d", i), Addr: "http://127.0.0.1:1", Weight: 1 + i%5}); err != nil {
			t.Fatal(err)
		}
	}
	p, err := New(Config{
		Registry: reg, Strategy: strategy, Log: slog.New(slog.DiscardHandler), Breaker: cb.Config{Failures: 1, OpenFor: time.Millisecond, Probes: 1},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	c := &conn{p: p}
	c.occupy()
	if err := c.req.parse([]byte(smallGet), nil, false, &standard); err != nil {
		t.Fatal(err)
	}
	return &c.x
}

// BenchmarkPick is route, view, pick and admit, and the end of the attempt.
func BenchmarkPick(b *testing.B) {
	for _, strategy := range lb.Strategies() {
		for _, n := range []int{10, 1000} {
			b.Run(fmt.Sprintf("%s/%d", strategy, n), func(b *testing.B) {
				x := startExchange(b, strategy, n)
				now := time.Now()
				b.ReportAllocs()
				for b.Loop() {
					x.begin(now)
					s, err := x.find()
					if err != nil {
						b.Fatal(err)
					}
					x.service = s
					if x.pick() == nil {
						b.Fatal("nobody picked")
					}
					x.end(success, nil)
				}
			})
		}
	}
}

// BenchmarkProbe is what requests pay while an instance is half-open: looking past it where no probe is free, and taking
// one.
func BenchmarkProbe(b *testing.B) {
	halfOpen := func(b *testing.B) (*exchange, *upstream) {
		x := startExchange(b, lb.RoundRobin, 10)
		s := x.p().service("echo")
		u := s.view.Load().parts[0].members[3].upstream
		token, _ := u.gate.Allow()
		u.gate.Failure(token, nil)
		eventually(b, "half-open", func() bool { return len(s.view.Load().probing) == 1 })
		x.service = s
		return x, u
	}
	b.Run("none free", func(b *testing.B) {
		x, u := halfOpen(b)
		if _, ok := u.gate.Allow(); !ok {
			b.Fatal("no probe")
		}
		now := time.Now()
		b.ReportAllocs()
		for b.Loop() {
			s := x.service
			x.begin(now)
			x.service = s
			if got := x.pick(); got == nil || got == u {
				b.Fatal("not passed by")
			}
			x.end(success, nil)
		}
	})
	b.Run("taken", func(b *testing.B) {
		x, u := halfOpen(b)
		now := time.Now()
		b.ReportAllocs()
		for b.Loop() {
			s := x.service
			x.begin(now)
			x.service = s
			if x.pick() != u {
				b.Fatal("not taken")
			}
			x.end(ignored, nil) // free again
		}
	})
}

// BenchmarkView is a view built anew because one of n instances changed its weight.
func BenchmarkView(b *testing.B) {
	for _, strategy := range []lb.Strategy{lb.RoundRobin, lb.WeightedRoundRobin, lb.IPHash} {
		for _, n := range []int{100, 1000, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", strategy, n), func(b *testing.B) {
				x := startExchange(b, strategy, n)
				s, reg := x.p().service("echo"), x.p().cfg().Registry
				both := [2]*registry.Snapshot{reg.Snapshot("echo")}
				in := *both[0].Instances()[n/2]
				in.Weight++
				if err := reg.Register("echo", in); err != nil {
					b.Fatal(err)
				}
				both[1] = reg.Snapshot("echo")
				i := 0
				b.ReportAllocs()
				for b.Loop() {
					i++
					s.build(both[i%2])
				}
			})
		}
	}
}

// BenchmarkViewTurned is a view built anew because the readiness of ten instances that came together may be another.
func BenchmarkViewTurned(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x := startExchange(b, lb.RoundRobin, n)
			s, snapshot := x.p().service("echo"), x.p().cfg().Registry.Snapshot("echo")
			turned := map[*upstream]struct{}{}
			for _, in := range snapshot.Instances()[n-10:] {
				turned[s.view.Load().upstream(in.ID)] = struct{}{}
			}
			b.ReportAllocs()
			for b.Loop() {
				s.dirty = turned
				s.build(snapshot)
			}
		})
	}
}

// BenchmarkUpdate is a change of one of many services. The 5 ms between two views of one service are kept out of it.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			reg := registry.New(registry.Config{})
			all := make([]string, n)
			for i := range all {
				all[i] = fmt.Sprintf("service-%06d", i)
				if err := reg.Register(all[i], registry.Instance{ID: "1", Addr: "http://127.0.0.1:1"}); err != nil {
					b.Fatal(err)
				}
			}
			p, err := New(Config{Registry: reg, Log: slog.New(slog.DiscardHandler)}, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(p.Close)
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				s := p.service(all[i%n])
				i++
				s.builtAt = time.Time{} // long ago
				p.Update(s.name)
			}
		})
	}
}

// What the benchmarks of pick take for granted.
func TestPickDoesNotAllocate(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	for _, strategy := range lb.Strategies() {
		x := startExchange(t, strategy, 100)
		seen := map[*upstream]bool{}
		for u := range x.p().service("echo").view.Load().all {
			seen[u] = false
		}
		if allocs := testing.AllocsPerRun(300, func() {
			x.begin(x.began)
			x.service, _ = x.find()
			seen[x.pick()] = true
			x.end(success, nil)
		}); allocs != 0 {
			t.Errorf("%s: %v allocations a pick", strategy, allocs)
		}
		picked := 0
		for _, yes := range seen {
			if yes {
				picked++
			}
		}
		if strategy == lb.IPHash && picked != 1 || strategy != lb.IPHash && picked < 50 {
			t.Errorf("%s: %d of 100 instances picked", strategy, picked)
		}
	}
}

// BenchmarkMetrics is what a request that a loop serves costs without its sockets, and with what is counted and timed of it.
func BenchmarkMetrics(b *testing.B) {
	for _, metrics := range []string{"off", "on"} {
		b.Run(metrics, func(b *testing.B) {
			x := startExchange(b, lb.RoundRobin, 10)
			x.p().cfg().NoMetrics = metrics == "off"
			x.c.head = []byte(smallGet)
			x.status = 200
			b.ReportAllocs()
			for b.Loop() {
				now := time.Now()
				x.begin(now)
				s, err := x.find()
				if err != nil {
					b.Fatal(err)
				}
				x.service = s
				if x.pick() == nil {
					b.Fatal("nobody picked")
				}
				x.attempts, x.status = 1, 200
				x.given, x.taken = int64(len(smallGet)), 100
				x.noteAsked()
				x.noteAnswered(now)
				x.end(success, nil)
				x.c.ended()
			}
		})
	}
}
