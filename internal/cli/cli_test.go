package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// describer tells what a proxy would, so that all columns have something to show.
type describer struct{}

func (describer) DescribeService(string) registry.ServiceStatus {
	return registry.ServiceStatus{Strategy: "weighted-random", InForce: "random", Why: "b has no weight"}
}

func (describer) DescribeInstance(_, id string) registry.InstanceStatus {
	if id == "b" {
		return registry.InstanceStatus{Reason: "breaker open", Breaker: registry.BreakerStatus{State: "open"}, Failure: 5, LastError: "connection refused"}
	}
	return registry.InstanceStatus{Ready: true, Breaker: registry.BreakerStatus{State: "closed"}, InFlight: 2, Tunnels: 7, Success: 40}
}

// gateway serves the registration API of a fresh registry until the test ends, asking for token if it is not empty.
func gateway(t *testing.T, token string) (*registry.Registry, API) {
	t.Helper()
	reg := registry.New(registry.Config{})
	handler := registry.NewHandler(reg, describer{})
	server := &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) {
		if token != "" && string(ctx.Request.Header.Peek("Authorization")) != "Bearer "+token {
			registry.Problem(ctx, fasthttp.StatusUnauthorized, "", "this needs a token")
			return
		}
		handler(ctx)
	}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(ln) })
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		_ = ln.Close()
		served.Wait()
	})
	return reg, API{Gateway: "http://" + ln.Addr().String(), Token: token}
}

// do runs a command and returns what it printed.
func do(t *testing.T, command interface{ Run(*Process) error }) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := command.Run(&Process{Context: t.Context(), Out: &out})
	return out.String(), err
}

func TestCommands(t *testing.T) {
	reg, api := gateway(t, "s3cret")
	steps := []struct {
		name    string
		command interface{ Run(*Process) error }
		out     string
		err     string // part of it
	}{
		{"nothing yet", &Services{API: api}, "no services are registered\n", ""},
		{"one", &Register{API: api, Service: "echo", ID: "a", Addr: "http://127.0.0.1:8081"}, "registered echo/a at http://127.0.0.1:8081\n", ""},
		{"weighted", &Register{API: api, Service: "echo", ID: "b", Addr: "http://127.0.0.1:8082", Weight: 20}, "registered echo/b at http://127.0.0.1:8082\n", ""},
		{"table", &Services{API: api}, `SERVICE  STRATEGY  INSTANCE  ADDR                   WEIGHT  READY  BREAKER  IN FLIGHT  TUNNELS  SUCCESS  FAILURE  NOTE
echo     random    a         http://127.0.0.1:8081  0       yes    closed   2          7        40       0        not weighted-random: b has no weight
echo     random    b         http://127.0.0.1:8082  20      no     open     0          0        0        5        breaker open; last error: connection refused; not weighted-random: b has no weight
`, ""},
		{"leased and drained", &Register{API: api, Service: "users", ID: "a", Addr: "http://127.0.0.1:8081", TTL: time.Minute}, "registered users/a at http://127.0.0.1:8081\n", ""},
		{"described", &Register{API: api, Service: "users", ID: "a", Addr: "http://127.0.0.1:8081", Metadata: map[string]string{"zone": "eu"}}, "registered users/a at http://127.0.0.1:8081\n", ""},
		{"badly described", &Register{API: api, Service: "users", ID: "a", Addr: "http://127.0.0.1:8081", Metadata: map[string]string{"zo ne": "eu"}}, "", "metadata: the key"},
		{"checked", &Register{API: api, Service: "users", ID: "c", Addr: "http://127.0.0.1:8081", SlowStart: time.Second,
			Check: Check{Path: "/health", Interval: 3 * time.Second, Timeout: time.Second, Fall: 4, Rise: 5, Status: "204", KeepAlive: true, Start: "up"}}, "registered users/c at http://127.0.0.1:8081\n", ""},
		{"badly checked", &Register{API: api, Service: "users", ID: "d", Addr: "http://127.0.0.1:8081", Check: Check{TCP: true, Interval: time.Second, Fall: 1, Rise: 101, Start: "up"}}, "", "check.rise: must be an integer"},
		{"checked in two ways", &Register{API: api, Service: "users", ID: "d", Addr: "http://127.0.0.1:8081", Check: Check{TCP: true, Path: "/", Interval: time.Second, Fall: 1, Rise: 1, Start: "up"}}, "", "check.tcp"},
		{"checked no more", &Unregister{API: api, Service: "users", ID: "c"}, "unregistered users/c\n", ""},
		{"not the one meant", &Unregister{API: api, Service: "users", ID: "a", Addr: "http://127.0.0.1:8082"}, "users/a is registered with another addr: it stays\n", ""},
		{"bad ttl", &Register{API: api, Service: "users", ID: "b", Addr: "http://127.0.0.1:8081", TTL: time.Millisecond}, "", "ttl"},
		{"the one meant", &Unregister{API: api, Service: "users", ID: "a", Addr: "http://127.0.0.1:8081"}, "unregistered users/a\n", ""},
		{"table of another", &Services{API: api, Service: "users"}, "", `service: no service "users" is registered; GET /services lists those that are (404)`},
		{"bad addr", &Register{API: api, Service: "echo", ID: "c", Addr: "ftp://x"}, "", "addr"},
		{"bad weight", &Register{API: api, Service: "echo", ID: "c", Addr: "http://127.0.0.1:1", Weight: 1_000_001}, "", "weight"},
		{"gone", &Unregister{API: api, Service: "echo", ID: "a"}, "unregistered echo/a\n", ""},
		{"gone twice", &Unregister{API: api, Service: "echo", ID: "a"}, "echo/a was not registered\n", ""},
		{"gone with its service", &Unregister{API: api, Service: "nobody", ID: "a"}, "nobody/a was not registered\n", ""},
		{"wrong token", &Unregister{API: API{Gateway: api.Gateway, Token: "guess"}, Service: "echo", ID: "b"}, "", "needs a token (401)"},
		{"no token", &Services{API: API{Gateway: api.Gateway}}, "", "needs a token (401)"},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			out, err := do(t, step.command)
			if diff := cmp.Diff(step.out, out); diff != "" {
				t.Errorf("output: want -, got +:\n%s", diff)
			}
			if (err != nil) != (step.err != "") || err != nil && !strings.Contains(err.Error(), step.err) {
				t.Errorf("error %v, want %q", err, step.err)
			}
			if err != nil && strings.Count(err.Error(), "addr:") > 1 {
				t.Errorf("the field is named twice: %v", err)
			}
		})
	}
	if got := reg.Names(); !cmp.Equal(got, []string{"echo"}) {
		t.Errorf("services %v", got)
	}

	out, err := do(t, &Services{API: api, JSON: true})
	if err != nil {
		t.Fatal(err)
	}
	var all struct{ Services []struct{ Name string } }
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all.Services) != 1 || all.Services[0].Name != "echo" {
		t.Errorf("--json: %v in %s", err, out)
	}
	out, err = do(t, &Services{API: api, Service: "echo", JSON: true})
	if err != nil || !strings.HasPrefix(out, `{"name":"echo"`) {
		t.Errorf("--json of one: %v, %s", err, out)
	}
}

// What is not the API, or not there, is told apart from a refusal.
func TestNotTheAPI(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	_, err := do(t, &Unregister{API: API{Gateway: other.URL}, Service: "echo", ID: "a"})
	if !errors.Is(err, errNotTheAPI) || !strings.Contains(err.Error(), other.URL) {
		t.Errorf("got %v, want one that names %s", err, other.URL)
	}
	ours := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"status":404,"detail":"nothing is served at this path"}`)
	}))
	defer ours.Close()
	if _, err := do(t, &Unregister{API: API{Gateway: ours.URL}, Service: "echo", ID: "a"}); err == nil || !strings.Contains(err.Error(), "nothing is served") {
		t.Errorf("a listener without the API: %v", err)
	}
	garbage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	defer garbage.Close()
	if _, err := do(t, &Services{API: API{Gateway: garbage.URL}}); !errors.Is(err, errNotTheAPI) {
		t.Errorf("an answer that is no JSON: %v", err)
	}
	mute, err := net.Listen("tcp", "127.0.0.1:0") // as one that waits for a TLS handshake
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	go func() {
		for conn, err := mute.Accept(); err == nil; conn, err = mute.Accept() {
			_, _ = conn.Read(make([]byte, 4096))
			conn.Close()
		}
	}()
	if _, err := do(t, &Services{API: API{Gateway: "http://" + mute.Addr().String()}}); err == nil || !strings.HasSuffix(err.Error(), "wants https there; see --gateway") {
		t.Errorf("without TLS: %v", err)
	}
	other.Close()
	if _, err := do(t, &Services{API: API{Gateway: other.URL}}); err == nil || !strings.Contains(err.Error(), "refused") || !strings.HasSuffix(err.Error(), "is a gateway running there? see --gateway") {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := do(t, &Backend{Listen: "127.0.0.1:0", Name: "a", Register: other.URL, Service: "echo"}); err == nil || !strings.HasSuffix(err.Error(), "is a gateway running there? see --register") {
		t.Errorf("nobody there to register at: %v", err)
	}
}

// lines is a writer whose reader waits for what it is looking for.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// wait polls until condition holds.
func wait(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func TestBackend(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", ":0"} {
		t.Run(listen, func(t *testing.T) {
			reg, api := gateway(t, "s3cret")
			ctx, end := context.WithCancel(t.Context())
			defer end()
			var out lines
			done := make(chan error, 1)
			go func() {
				b := &Backend{Listen: listen, Name: "a", Register: api.Gateway, Service: "shop", Token: api.Token}
				done <- b.Run(&Process{Context: ctx, Out: &out})
			}()
			wait(t, "registered", func() bool { return strings.Contains(out.String(), "registered shop/a at http://127.0.0.1:") })
			instances := reg.Snapshot("shop").Instances()
			if len(instances) != 1 || instances[0].ID != "a" {
				t.Fatalf("registered: %+v", instances)
			}

			request, err := http.NewRequest("PATCH", instances[0].Addr+"/shop/x%2Fy?a=b;c", nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Host = "shop.example"
			request.Header["X-Forwarded-For"] = []string{"192.0.2.1", "192.0.2.2"}
			request.Header.Set("Via", "1.1 gate")
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			want := "backend a\nPATCH /shop/x%2Fy?a=b;c\nHost: shop.example\nX-Forwarded-For: 192.0.2.1, 192.0.2.2\nVia: 1.1 gate\n"
			if diff := cmp.Diff(want, string(body)); diff != "" {
				t.Errorf("answer: want -, got +:\n%s", diff)
			}

			end()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if reg.Snapshot("shop") != nil {
				t.Error("still registered")
			}
			if !strings.HasSuffix(out.String(), "unregistered shop/a\n") {
				t.Errorf("output %q", out.String())
			}
		})
	}
}

// A backend that ends late leaves its successor alone.
func TestBackendHasASuccessor(t *testing.T) {
	reg, api := gateway(t, "")
	ctx, end := context.WithCancel(t.Context())
	defer end()
	var out lines
	done := make(chan error, 1)
	go func() {
		b := &Backend{Listen: "127.0.0.1:0", Name: "a", Register: api.Gateway, Service: "shop"}
		done <- b.Run(&Process{Context: ctx, Out: &out})
	}()
	wait(t, "registered", func() bool { return reg.Snapshot("shop") != nil })
	if err := reg.Register("shop", registry.Instance{ID: "a", Addr: "http://127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	end()
	if err := <-done; err != nil || reg.Snapshot("shop") == nil || !strings.HasSuffix(out.String(), "shop/a is registered with another addr: it stays\n") {
		t.Errorf("%v, %q, left %v", err, out.String(), reg.Names())
	}
}

func TestBackendRefused(t *testing.T) {
	_, api := gateway(t, "s3cret")
	_, err := do(t, &Backend{Listen: "127.0.0.1:0", Name: "a", Register: api.Gateway, Service: "echo"})
	if err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("got %v, want the refusal", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := do(t, &Backend{Listen: ln.Addr().String()}); err == nil || !strings.Contains(err.Error(), ln.Addr().String()) {
		t.Errorf("got %v, want an error that names the address", err)
	}
}

func TestVersion(t *testing.T) {
	out, err := do(t, Version{})
	if err != nil || !strings.HasPrefix(out, "kerberos ") || !strings.Contains(out, "go1.") {
		t.Errorf("%q, %v", out, err)
	}
}

// The picture of a terminal: what it shows of a moment.
func TestFrame(t *testing.T) {
	now := time.Now()
	until := now.Add(1500 * time.Millisecond)
	s := &stage{start: now.Add(-2 * time.Second), title: "the title", order: []string{"a", "b"}, requests: 7, failed: 1, events: []string{"something"},
		perBackend: map[string]*share{
			"a": {all: 5, breaker: "closed", recent: []time.Time{now.Add(-1100 * time.Millisecond), now.Add(-time.Millisecond), now}},
			"b": {all: 1, breaker: "open", until: &until},
		}}
	frame := s.frame(now)
	for _, want := range []string{"the title", "closed", "■ 2", "open, 1.5 s left", "2.0 s, 7 requests, 1 errors", "something"} {
		if !strings.Contains(frame, want) {
			t.Errorf("%q is not in the frame %q", want, frame)
		}
	}
	if want := "  2.0 s   a  2/s closed     b  0/s open       7 requests, 1 errors\n"; s.line(now) != want {
		t.Errorf("line %q, want %q", s.line(now), want)
	}
	for range 20 {
		s.say("more")
	}
	if len(s.events) != shownEvents {
		t.Errorf("%d events are kept, want %d", len(s.events), shownEvents)
	}
}
