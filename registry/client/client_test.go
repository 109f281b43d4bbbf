package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// api is the registration API of a gateway, which can be stopped and started again.
type api struct {
	*registry.Registry
	url    string
	server *fasthttp.Server
	calls  atomic.Int64
}

func serve(t *testing.T, addr string) *api {
	t.Helper()
	a := &api{Registry: registry.New(registry.Config{})}
	a.listen(t, addr)
	return a
}

func (a *api) listen(t *testing.T, addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + ln.Addr().String()
	handler := registry.NewHandler(a.Registry, nil)
	a.server = &fasthttp.Server{CloseOnShutdown: true, Handler: func(ctx *fasthttp.RequestCtx) {
		a.calls.Add(1)
		handler(ctx)
	}}
	go a.server.Serve(ln)
	t.Cleanup(a.stop)
}

func (a *api) stop() {
	_ = a.server.Shutdown()
	a.Close()
}

func (a *api) has(id string) bool { return a.Snapshot("users").Instance(id) != nil }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 20 s: " + what)
		}
	}
}

func config(gateways ...*api) Config {
	cfg := Config{Service: "users", ID: "a", Addr: "http://127.0.0.1:8080", Weight: 2, TTL: time.Second, Drain: time.Second, HTTP: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	for _, g := range gateways {
		cfg.Gateways = append(cfg.Gateways, g.url+"/")
	}
	return cfg
}

// It stays registered for longer than its lease, at every gateway, and is gone when it is closed.
func TestRegistration(t *testing.T) {
	first, second := serve(t, "127.0.0.1:0"), serve(t, "127.0.0.1:0")
	cfg := config(first, second)
	cfg.Check, cfg.SlowStart = map[string]any{"path": "/health", "interval": "5s"}, time.Minute
	cfg.Metadata = map[string]string{"zone": "rack-2"}
	r, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range []*api{first, second} {
		in := g.Snapshot("users").Instance("a")
		if in == nil || in.Weight != 2 || in.TTL != time.Second || in.Addr != "http://127.0.0.1:8080" ||
			in.Metadata["zone"] != "rack-2" || in.Check == nil || in.Check.Path != "/health" || in.SlowStart != time.Minute {
			t.Fatalf("registered: %+v", in)
		}
		registered := in.RegisteredAt
		eventually(t, "it has outlived its lease", func() bool {
			if !g.has("a") {
				t.Fatal("it is gone")
			}
			return time.Since(registered) > 2*time.Second+time.Second
		})
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if first.has("a") || second.has("a") {
		t.Error("it is registered yet")
	}
}

// A gateway that restarts is told again, and one that comes late too.
func TestGatewayComesBack(t *testing.T) {
	first, late := serve(t, "127.0.0.1:0"), serve(t, "127.0.0.1:0")
	late.stop()
	r, err := Start(t.Context(), config(first, late))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, g := range []*api{first, late} {
		g.stop()
		again := serve(t, strings.TrimPrefix(g.url, "http://"))
		eventually(t, "it is registered again", func() bool { return again.has("a") })
	}
}

// Close returns when the requests that are under way have ended, and not before.
func TestCloseDrains(t *testing.T) {
	g := serve(t, "127.0.0.1:0")
	var busy traffic
	busy.Store(1)
	g.Observe(func(string, string) registry.Traffic { return &busy })
	cfg := config(g)
	cfg.Drain = time.Minute
	r, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- r.Close() }()
	eventually(t, "it drains", func() bool { return g.Snapshot("users").Instance("a").State() == registry.Drain })
	select {
	case err := <-closed:
		t.Fatalf("Close has returned beside a request: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	busy.Store(0)
	if err := <-closed; err != nil || g.has("a") {
		t.Errorf("%v, left: %v", err, g.has("a"))
	}
}

// traffic is how many requests are under way.
type traffic struct{ atomic.Int64 }

func (t *traffic) Busy() int         { return int(t.Load()) }
func (t *traffic) Cut()              {}
func (t *traffic) Succeeded() uint64 { return 0 }

// A gateway that restarts just then is told all the same that the program leaves.
func TestCloseTriesAgain(t *testing.T) {
	g := serve(t, "127.0.0.1:0")
	cfg, failed := config(g), make(chan struct{}, 100)
	cfg.HTTP.Transport = told{cfg.HTTP.Transport, failed}
	r, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	in := *g.Snapshot("users").Instance("a")
	g.stop()
	closed := make(chan error)
	go func() { closed <- r.Close() }()
	<-failed
	again := &api{Registry: registry.New(registry.Config{}), url: g.url}
	in.TTL = 0
	if err := again.Register("users", in); err != nil { // as it has read from its disk
		t.Fatal(err)
	}
	again.listen(t, strings.TrimPrefix(g.url, "http://"))
	if err := <-closed; err != nil || again.has("a") {
		t.Errorf("%v, left: %v", err, again.has("a"))
	}
}

// So is one that goes away while it waits for the program's requests to end, however long it has.
func TestCloseTriesAgainWithinDrain(t *testing.T) {
	var asked atomic.Int64
	g := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete && asked.Add(1) == 1 {
			time.Sleep(leaveAgain + retryAfter)
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer g.Close()
	cfg := config()
	cfg.Gateways, cfg.Drain = []string{g.URL}, time.Minute
	r, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil || asked.Load() != 2 {
		t.Errorf("%v, asked %d times", err, asked.Load())
	}
}

// A start that a gateway refuses ends at once, though another one is down.
func TestStartRefused(t *testing.T) {
	g := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	defer g.Close()
	down := httptest.NewServer(nil)
	down.Close()
	cfg := config()
	cfg.Gateways = []string{g.URL, down.URL}
	began := time.Now()
	if _, err := Start(t.Context(), cfg); statusOf(err) != http.StatusForbidden || time.Since(began) > leaveAgain {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// told tells of unregistrations that fail.
type told struct {
	http.RoundTripper
	failed chan struct{}
}

func (c told) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := c.RoundTripper.RoundTrip(r)
	if err != nil && r.Method == http.MethodDelete {
		c.failed <- struct{}{}
	}
	return response, err
}

// A successor with the same id stays when its predecessor is closed.
func TestSuccessorStays(t *testing.T) {
	g := serve(t, "127.0.0.1:0")
	old, err := Start(t.Context(), config(g))
	if err != nil {
		t.Fatal(err)
	}
	cfg := config(g)
	cfg.Addr = "http://127.0.0.1:8081"
	next, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil || !g.has("a") {
		t.Errorf("%v, left: %v", err, g.has("a"))
	}
	if err := next.Close(); err != nil || g.has("a") {
		t.Errorf("%v, left: %v", err, g.has("a"))
	}
}

func TestStartErrors(t *testing.T) {
	g := serve(t, "127.0.0.1:0")
	cfg := config(g)
	cfg.Addr = "8080"
	var refused *Refusal
	if _, err := Start(t.Context(), cfg); !errors.As(err, &refused) || refused.Status != 400 || refused.Field != "addr" || !strings.Contains(err.Error(), "http or https") {
		t.Errorf("a bad addr: %v", err)
	}
	g.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Start(ctx, config(g)); err == nil || errors.As(err, &refused) && refused.Status != 400 {
		t.Errorf("nobody there: %v", err)
	}
	// A server that is no gateway.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.NotFoundHandler()}
	go other.Serve(ln)
	defer other.Close()
	cfg.Gateways = []string{"http://" + ln.Addr().String()}
	if _, err := Start(t.Context(), cfg); !errors.As(err, &refused) || refused.Status != 404 {
		t.Errorf("something else there: %v", err)
	}
}
