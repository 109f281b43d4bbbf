package proxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"kerberos/cb"
)

// toxic is one fault of the network between the gateway and a backend, as toxiproxy makes it.
type toxic struct {
	Type       string         `json:"type"`
	Stream     string         `json:"stream"` // upstream: of the request, downstream: of the response
	Attributes map[string]int `json:"attributes"`
}

// poisoned is the address of a backend behind toxics.
func poisoned(t testing.TB, backend net.Addr, toxics ...toxic) string {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := toxiproxy.NewProxy(server, t.Name(), "127.0.0.1:0", backend.String())
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	for _, toxic := range toxics {
		text, err := json.Marshal(toxic)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Toxics.AddToxicJson(strings.NewReader(string(text))); err != nil {
			t.Fatal(err)
		}
	}
	return "http://" + p.Listen
}

// A request to a backend behind a bad network is answered in time and as it is promised, alone and with a healthy instance
// beside; a POST is never seen twice, and what cannot be helped is a failure of the instance.
func TestToxicBackends(t *testing.T) {
	down := func(kind string, attributes map[string]int) toxic { return toxic{kind, "downstream", attributes} }
	up := func(kind string, attributes map[string]int) toxic { return toxic{kind, "upstream", attributes} }
	for _, row := range []struct {
		name   string
		toxics []toxic
		size   int      // of the answer's body
		alone  *refusal // nil: answered
		beside *refusal // what a GET gets when another instance is healthy; nil: an answer
		spared bool     // the backend sees nothing of the request
	}{
		{"late", []toxic{down("latency", map[string]int{"latency": 50})}, 100, nil, nil, false},
		{"late, both ways", []toxic{up("latency", map[string]int{"latency": 50, "jitter": 20}), down("latency", map[string]int{"latency": 50, "jitter": 20})}, 100, nil, nil, false},
		{"drips", []toxic{down("slicer", map[string]int{"average_size": 1, "delay": 100})}, 300, nil, nil, false},
		{"drips, both ways", []toxic{up("slicer", map[string]int{"average_size": 1, "delay": 100}), down("slicer", map[string]int{"average_size": 1, "delay": 100})}, 300, nil, nil, false},
		{"large in slices", []toxic{down("slicer", map[string]int{"average_size": 900, "size_variation": 500, "delay": 10})}, 2 * maxWhole, nil, nil, false},
		{"narrow", []toxic{down("bandwidth", map[string]int{"rate": 500})}, 2 * maxWhole, nil, nil, false}, // KB/s
		{"closes late", []toxic{down("slow_close", map[string]int{"delay": 100})}, 100, nil, nil, false},
		{"hangs before the head", []toxic{up("timeout", map[string]int{"timeout": 0})}, 100, errResponseTimeout, errResponseTimeout, true},
		{"hangs with the answer", []toxic{down("timeout", map[string]int{"timeout": 0})}, 100, errResponseTimeout, errResponseTimeout, false},
		{"hangs and closes", []toxic{down("timeout", map[string]int{"timeout": 100})}, 100, errTerminated, nil, false},
		{"resets at the request", []toxic{up("reset_peer", map[string]int{"timeout": 0})}, 100, errTerminated, nil, true},
		{"resets with the answer", []toxic{down("reset_peer", map[string]int{"timeout": 20})}, 100, errTerminated, nil, false},
		{"ends in the head", []toxic{down("limit_data", map[string]int{"bytes": 20})}, 100, errIncomplete, nil, false},
		{"ends behind the head", []toxic{down("limit_data", map[string]int{"bytes": len("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")})}, 100, errIncomplete, nil, false},
		{"ends in the body", []toxic{down("limit_data", map[string]int{"bytes": 100})}, 100, errIncomplete, nil, false},
		{"takes a part of the request", []toxic{up("limit_data", map[string]int{"bytes": 50})}, 100, errTerminated, nil, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			timeout := 10 * time.Second // more than a busy machine takes for what is answered
			if row.alone == errResponseTimeout {
				timeout = 400 * time.Millisecond
			}
			body := filler(row.size)
			a := startActor(t, says(body))
			well := startActor(t, says(body))
			for _, beside := range []bool{false, true} {
				g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = timeout; cfg.Breaker = cb.Config{Failures: 100} }, nil)
				g.register(t, "echo", "a", poisoned(t, a.Addr(), row.toxics...))
				if beside {
					g.register(t, "echo", "b", well.url())
				}
				for _, method := range []string{"GET", "POST", "GET", "POST", "GET", "POST"} {
					a.count()
					well.count()
					began := time.Now()
					c := g.dial(t)
					c.send(method + " /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
					m, err := readMessage(c.r, false)
					// A body that is not there soon behind its head is waited for no more: then the client sees that it is cut.
					cut := err != nil && row.alone == errIncomplete && m.status() == 200
					if err != nil && !cut {
						t.Fatalf("%s: %v, so far %q", method, err, m.head)
					}
					if took := time.Since(began); took > timeout+5*time.Second {
						t.Errorf("%s took %v", method, took)
					}
					seen, elsewhere := a.count(), well.count()
					if row.spared && seen > 0 {
						t.Errorf("%s came to the backend: this tests something else", method)
					}
					if method == "POST" && seen+elsewhere > 1 {
						t.Errorf("POST was seen %d times", seen+elsewhere)
					}
					if cut {
						continue
					}
					want := row.alone
					switch {
					case beside && method == "GET":
						want = row.beside
						if m.status() == 200 && elsewhere == 1 {
							want = nil // it went there in the first place
						}
					case beside && elsewhere == 1:
						want = nil
					}
					if want != nil {
						m.refused(t, want)
					} else if m.want(t, 200).body != body {
						t.Errorf("%s: %d bytes of %d", method, len(m.body), len(body))
					}
				}
				eventually(t, "the last attempt ends", func() bool { return g.DescribeInstance("echo", "a").InFlight == 0 })
				if s := g.DescribeInstance("echo", "a"); (row.alone != nil) != (s.Failure > 0) {
					t.Errorf("beside another: %v: outcomes %+v", beside, s)
				}
			}
		})
	}
}

// A larger answer that breaks off behind its first bytes is visible to the client as cut, and a failure of the instance.
func TestToxicCut(t *testing.T) {
	body := filler(4 * maxWhole)
	for _, row := range []struct {
		name, answer string
	}{
		{"length", fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(body, 1000)},
	} {
		for _, how := range []string{"limit_data", "reset_peer"} {
			t.Run(row.name+", "+how, func(t *testing.T) {
				t.Parallel()
				a := startActor(t, writes(row.answer))
				cut := toxic{"limit_data", "downstream", map[string]int{"bytes": 2 * maxWhole}}
				toxics := []toxic{cut}
				if how == "reset_peer" { // the reset comes when the next chunk does
					toxics = []toxic{{"reset_peer", "downstream", map[string]int{"timeout": 0}}}
				}
				g := startGateway(t, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 100}; cfg.Retries = -1 }, nil)
				g.register(t, "echo", "a", poisoned(t, a.Addr(), toxics...))
				c := g.dial(t)
				c.send(toHTTP11)
				m, err := readMessage(c.r, false)
				switch {
				case how == "reset_peer": // before any byte of the answer
					m.refused(t, errTerminated)
				case err == nil || m.status() != 200 || !strings.HasPrefix(body, m.body) || len(m.body) < maxWhole:
					t.Errorf("%v and %d bytes of %d", err, len(m.body), len(body))
				}
				eventually(t, "a failure", func() bool { return g.DescribeInstance("echo", "a").Failure == 1 })
			})
		}
	}
}

// A backend that stops in its head, or drips it, has the request timeout for all of it.
func TestHeadNeverEnds(t *testing.T) {
	const timeout = 300 * time.Millisecond
	for name, slowly := range map[string]act{
		"hangs": func(c net.Conn, m *message) bool {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Le")
			return hangs(c, m)
		},
		"drips": func(c net.Conn, _ *message) bool {
			for _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nX-Padding: "); err == nil; _, err = io.WriteString(c, "x") {
				time.Sleep(10 * time.Millisecond) // the backend's pace
			}
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := startActor(t, slowly)
			g := startGateway(t, func(cfg *Config) { patient(0)(cfg); cfg.RequestTimeout = timeout }, nil)
			g.register(t, "echo", "a", a.url())
			for n, method := range []string{"GET", "POST"} {
				began := time.Now()
				g.do(t, method+" /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").refused(t, errResponseTimeout)
				if took := time.Since(began); took < timeout || took > 10*timeout {
					t.Errorf("%s took %v", method, took)
				}
				if s := g.DescribeInstance("echo", "a"); s.Failure != uint64(n+1) || a.count() != 1 {
					t.Errorf("%s: outcomes %+v, or sent again", method, s)
				}
			}
		})
	}
}

// Requests of every kind race with a backend that closes its connections, each at another moment: before it reads, while
// the request comes, behind it, behind the answer, orderly or with a reset. Each is answered once: by the backend, or by one
// 502 if it may have been delivered and cannot be repeated, and such a one is never delivered twice.
func TestClosesRaceRequests(t *testing.T) {
	const clients, rounds = 4, 250
	for _, row := range []struct {
		name  string
		large bool // a body that is not held, and goes by a goroutine
	}{{"small", false}, {"large", true}} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				cfg.Breaker = cb.Config{Failures: 1 << 20}
				cfg.UpstreamIdle = time.Minute
				cfg.Loops = 2
			}, nil)
			var mu sync.Mutex // guards delivered
			delivered := map[string]int{}
			deliveries := func(id string) int {
				mu.Lock()
				defer mu.Unlock()
				return delivered[id]
			}
			var closing sync.WaitGroup
			o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
				for {
					m, err := readMessage(r, false)
					if err != nil {
						return
					}
					mu.Lock()
					delivered[m.field("X-Id")]++
					mu.Unlock()
					reset, kind := rand.IntN(2) == 0, rand.IntN(8)
					end := func() {
						if reset {
							c.(*net.TCPConn).SetLinger(0)
						}
						c.Close()
					}
					if kind == 0 && !repeatable(m.head) { // delivered, and not answered
						end()
						return
					}
					answer := "HTTP/1.1 200 OK\r\nContent-Length: " + fmt.Sprint(len(m.field("X-Id"))) + "\r\n\r\n" + m.field("X-Id")
					if _, err := io.WriteString(c, answer); err != nil {
						return
					}
					if kind < 4 { // answered, and closed at some moment around the next request
						wait := time.Duration(rand.IntN(400)) * time.Microsecond
						closing.Go(func() { time.Sleep(wait); end() })
					}
				}
			})
			defer func() {
				o.stop() // so that no more begin
				closing.Wait()
			}()
			g.register(t, "echo", "a", o.url())
			body := "hello"
			if row.large {
				body = filler(maxHeld + 1)
			}
			var answered, refused atomic.Int64
			var wg sync.WaitGroup
			for n := range clients {
				c := g.dial(t)
				wg.Go(func() {
					for i := range rounds {
						method := []string{"POST", "GET", "PATCH", "PUT"}[i%4]
						id := fmt.Sprintf("%s-%d-%d", method, n, i)
						m, err := exchangeOn(c, fmt.Sprintf("%s /echo HTTP/1.1\r\nHost: x\r\nX-Id: %s\r\nContent-Length: %d\r\n\r\n%s", method, id, len(body), body))
						repeatable := !row.large && repeatable(method)
						switch {
						case err != nil:
							t.Errorf("%s: %q, %v", id, m.head, err)
							return
						case m.status() == 200 && m.body == id:
							answered.Add(1)
						case m.status() == 502 && m.field("Proxy-Status") == "kerberos; error=connection_terminated" && !repeatable:
							refused.Add(1)
						default:
							t.Errorf("%s: %q %q", id, m.head, m.body)
						}
						if got := deliveries(id); got > 1 && !repeatable {
							t.Errorf("%s was delivered %d times", id, got)
						}
						if m.field("Connection") == "close" {
							c.Close()
							c = g.dial(t)
						}
					}
					c.Close()
				})
			}
			wg.Wait()
			if answered.Load()+refused.Load() != clients*rounds || answered.Load() < clients*rounds/2 {
				t.Errorf("%d answered, %d refused", answered.Load(), refused.Load())
			}
			t.Logf("%d answered, %d refused with 502", answered.Load(), refused.Load())
			g.quiet(t, "echo", "a")
		})
	}
}

// A backend whose name fails to resolve stays where it was; when the name comes back with another address, requests go there,
// kept-alive connections to the old one included once it has closed them.
func TestNameComesBackElsewhere(t *testing.T) {
	const name = "comes-back.test"
	here := startActor(t, says("here"))
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.2", fmt.Sprint(here.port())))
	if err != nil {
		t.Skip(err) // the port is taken there, or it is no Linux
	}
	there := serveOrigin(ln, namingHandler("there"))
	t.Cleanup(there.stop)
	names.set(name, "127.0.0.1")
	g := startGateway(t, func(cfg *Config) { patient(0)(cfg); cfg.UpstreamIdle = time.Minute }, nil)
	g.register(t, "echo", "a", fmt.Sprintf("http://%s:%d", name, here.port()))
	g.awaitReady(t, 1)
	c := g.dial(t)
	post := func() *message { return c.post("/echo", "") }
	if got := post().want(t, 200).body; got != "here" {
		t.Fatalf("%q", got)
	}
	for _, failure := range []func(){func() { names.fail(true) }, func() { names.set(name) }} {
		failure()
		g.resolveNow("a")
		names.fail(false)
		if got := post().want(t, 200).body; got != "here" {
			t.Errorf("while no name server knows: %q", got)
		}
	}
	here.stop()
	eventually(t, "all is closed there", func() bool { return here.open() == 0 })
	m := post()
	if strings.Contains(m.field("Proxy-Status"), errTerminated.kind) {
		m = post() // the end of the kept connection was on its way yet
	}
	m.refused(t, errRefused)
	names.set(name, "127.0.0.2")
	g.resolveNow("a")
	for range 5 {
		if got := post().want(t, 200).body; got != "there" {
			t.Errorf("behind the move: %q", got)
		}
	}
	if s := g.DescribeInstance("echo", "a"); s.Failure != 1 || !s.Ready {
		t.Errorf("%+v", s)
	}
}

// repeatable says so of a request that begins like that, as far as its method goes.
func repeatable(request string) bool {
	return strings.HasPrefix(request, "GET") || strings.HasPrefix(request, "PUT")
}
