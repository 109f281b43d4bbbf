package proxy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"

	"kerberos/cb"
	"kerberos/registry"
)

// startWithAPI starts a gateway that serves the registration API on its data listener.
func startWithAPI(t testing.TB, change func(*Config)) *gateway {
	t.Helper()
	var api fasthttp.RequestHandler // made of the gateway that it is given to
	g := startGateway(t, func(cfg *Config) {
		cfg.API = func(ctx *fasthttp.RequestCtx) { api(ctx) }
		if change != nil {
			change(cfg)
		}
	}, nil)
	api = registry.NewHandler(g.reg, g.Proxy)
	return g
}

func registration(id, addr string) string {
	return fmt.Sprintf(`{"service":"echo","id":%q,"addr":%q,"weight":2}`, id, addr)
}

const asJSON = "Content-Type: application/json"

// Registering, using, listing and unregistering, all on one connection.
func TestAPIOnTheDataListener(t *testing.T) {
	g := startWithAPI(t, nil)
	a := startActor(t, says("a"))
	c := g.dial(t)
	c.get("/echo").refused(t, errNoInstance)
	m := c.post("/register", registration("inst-1", a.url()), asJSON).want(t, 204)
	if m.field("Connection") != "" || m.field("Content-Length") != "" || m.field("Date") == "" {
		t.Errorf("204 came with %q", m.head)
	}
	c.picks(3)
	eventually(t, "three successes listed", func() bool {
		m = c.get("/services").want(t, 200)
		return strings.Contains(m.body, `"success":3`)
	})
	if m.field("Content-Type") != "application/json" {
		t.Errorf("listed as %q", m.field("Content-Type"))
	}
	var got any
	if err := json.Unmarshal([]byte(m.body), &got); err != nil {
		t.Fatal(err)
	}
	in := g.reg.Snapshot("echo").Instances()[0]
	want := map[string]any{"services": []any{map[string]any{
		"name": "echo", "strategy": "round-robin", "in_force": "round-robin", "why": "",
		"instances": []any{map[string]any{
			"id": "inst-1", "addr": a.url(), "weight": 2.0, "ready": true, "reason": "",
			"breaker":   map[string]any{"state": "closed", "since": instant(g.DescribeInstance("echo", "inst-1").Breaker.Since), "until": nil},
			"in_flight": 0.0, "tunnels": 0.0, "success": 3.0, "failure": 0.0, "ignored": 0.0, "last_error": "", "registered_at": instant(in.RegisteredAt),
			"lease": nil, "state": "up", "override": nil, "metadata": map[string]any{}, "generation": 1.0, "health": nil, "check": nil, "slow_start": "0s",
		}},
	}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("GET /services (-want +got):\n%s", diff)
	}
	head := c.request("HEAD", "/services").want(t, 200)
	if head.field("Content-Length") != m.field("Content-Length") || head.field("Content-Type") != "application/json" {
		t.Errorf("HEAD says %q, GET %q", head.head, m.head)
	}
	c.get("/services/echo").want(t, 200)
	c.get("/services/echo/inst-1").want(t, 200)
	c.get("/services/nobody").want(t, 404)
	if m := c.request("PATCH", "/register").want(t, 405); m.field("Allow") == "" {
		t.Errorf("405 without Allow: %q", m.head)
	}
	c.post("/register", "{}", "Content-Type: text/plain").want(t, 415)
	if m := c.post("/register", `{"service":"echo","id":"x","addr":"ftp://x"}`, asJSON).want(t, 400); m.field("Content-Type") != "application/problem+json" {
		t.Errorf("a refusal is %q", m.head)
	}
	c.send("DELETE /register HTTP/1.1\r\nHost: x\r\n" + asJSON + "\r\nContent-Length: 32\r\n\r\n" + `{"service":"echo","id":"inst-1"}`)
	c.read(false).want(t, 204)
	c.get("/echo").refused(t, errNoInstance)
	c.get("/services/echo").want(t, 404)
}

// instant is a time as the API writes it.
func instant(at time.Time) string { return at.UTC().Format(time.RFC3339) }

// Bodies in every shape that HTTP/1.1 has for them.
func TestAPIBodies(t *testing.T) {
	body := registration("a", "http://127.0.0.1:1")
	padded := body + strings.Repeat(" ", registry.MaxBody-len(body))
	chunked := func(body string) string {
		return fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	}
	length := func(body string) string { return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body) }
	tests := []struct {
		name, rest string
		want       int
		closes     bool
	}{
		{"length", length(body), 204, false},
		{"chunked", chunked(body), 204, false},
		{"64 KiB", length(padded), 204, false},
		{"64 KiB chunked", chunked(padded), 204, false},
		{"more than 64 KiB", length(padded + " "), 413, true},
		{"more than 64 KiB chunked", chunked(padded + " "), 413, true},
		{"much more", length(padded + padded), 413, true},
		{"none", "\r\n", 400, false},
		{"malformed chunks", "Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", 400, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startWithAPI(t, nil)
			c := g.dial(t)
			c.send("POST /register HTTP/1.1\r\nHost: x\r\n" + asJSON + "\r\n" + tt.rest)
			c.read(false).want(t, tt.want)
			if registered := g.reg.Snapshot("echo") != nil; registered != (tt.want == 204) {
				t.Errorf("registered: %v", registered)
			}
			if tt.closes {
				c.closed()
			} else {
				c.get("/services").want(t, 200)
			}
		})
	}
	t.Run("in pieces", func(t *testing.T) {
		c := startWithAPI(t, nil).dial(t)
		c.send(fmt.Sprintf("POST /register HTTP/1.1\r\nHost: x\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s", asJSON, len(body), body[:10]))
		time.Sleep(2 * chunkPatience) // a forwarded one would be streamed from here on
		c.send(body[10:] + "\r\n0\r\n\r\n")
		c.read(false).want(t, 204)
	})
	t.Run("expected", func(t *testing.T) {
		c := startWithAPI(t, nil).dial(t)
		c.send(fmt.Sprintf("POST /register HTTP/1.1\r\nHost: x\r\n%s\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", asJSON, len(body)))
		c.next(false).want(t, 100)
		c.send(body)
		c.read(false).want(t, 204)
	})
	t.Run("in a pipeline", func(t *testing.T) {
		g := startWithAPI(t, nil)
		body := registration("a", naming(t, "a").url())
		c := g.dial(t)
		c.send(fmt.Sprintf("POST /register HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: %d\r\n\r\n%s"+
			"GET /echo HTTP/1.1\r\nHost: x\r\n\r\nGET /services HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", asJSON, len(body), body))
		c.read(false).want(t, 204)
		if m := c.read(false).want(t, 200); m.body != "a" {
			t.Errorf("got %q", m.body)
		}
		if m := c.read(false).want(t, 200); m.field("Connection") != "close" {
			t.Errorf("got %q", m.head)
		}
		c.closed()
	})
}

// A body that the API will not take is refused before it is sent.
func TestAPIRefusesBeforeTheBody(t *testing.T) {
	c := startWithAPI(t, nil).dial(t)
	c.send(fmt.Sprintf("POST /register HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", maxHeld+1))
	if m := c.read(false); m.status() != 413 || c.interim != "" {
		t.Errorf("%s%s", c.interim, m.head)
	}
}

// What decides who may use the API is all there: peer, version, host and fields as they were sent.
func TestAPISeesTheRequest(t *testing.T) {
	seen := make(chan string, 1)
	g := startGateway(t, func(cfg *Config) {
		cfg.API = func(ctx *fasthttp.RequestCtx) {
			h := &ctx.Request.Header
			seen <- fmt.Sprintf("%s %s %v %s|%s|%s|%s|%s", h.Method(), ctx.RequestURI(), h.IsHTTP11(), ctx.RemoteIP(), h.Host(),
				h.Peek("X-Forwarded-For"), h.Peek("Via"), h.Peek("Authorization"))
			ctx.SetStatusCode(204)
		}
		cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	}, nil)
	c := g.dial(t)
	c.get("/services/echo?x=1", "X-Forwarded-For: 192.0.2.1", "Via: 1.1 front", "Authorization: Bearer t").want(t, 204)
	if got, want := <-seen, "GET /services/echo?x=1 true 127.0.0.1|x|192.0.2.1|1.1 front|Bearer t"; got != want {
		t.Errorf("the API saw %q, want %q", got, want)
	}
	c.send("GET /services HTTP/1.0\r\nHost: y\r\n\r\n")
	if m := c.read(false).want(t, 204); m.field("Connection") != "close" {
		t.Errorf("an HTTP/1.0 client got %q", m.head)
	}
	if got, want := <-seen, "GET /services false 127.0.0.1|y|||"; got != want {
		t.Errorf("the API saw %q, want %q", got, want)
	}
	c.closed()
	c = g.dial(t)
	c.send("GET /services HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	if m := c.read(false).want(t, 204); m.field("Connection") != "keep-alive" {
		t.Errorf("an HTTP/1.0 client that keeps alive got %q", m.head)
	}
	<-seen
}

// Which paths are the API's, and whose they are where it is not served.
func TestAPIPaths(t *testing.T) {
	api := func(ctx *fasthttp.RequestCtx) { ctx.SetStatusCode(204) }
	for _, served := range []bool{true, false} {
		g := startGateway(t, func(cfg *Config) {
			if served {
				cfg.API = api
			}
		}, nil)
		for _, name := range []string{"register", "services", "servicesx", "registered"} {
			g.register(t, name, "1", naming(t, name).url())
		}
		c := g.dial(t)
		for path, service := range map[string]string{
			"/register": "", "/register?x": "", "/services": "", "/services/": "", "/services/a/b": "",
			"/register/": "register", "/register/x": "register", "/servicesx": "servicesx", "/registered": "registered",
		} {
			if service == "" && !served {
				service, _, _ = strings.Cut(path[1:], "/")
				service, _, _ = strings.Cut(service, "?")
			}
			if m := c.get(path); service == "" && m.status() != 204 || m.body != service {
				t.Errorf("with the API %v, %s got %d %q, want it to go to %q", served, path, m.status(), m.body, service)
			}
		}
		for _, path := range []string{"/x/../register", "/%72egister", "/services%2fx", "/./services"} {
			c.get(path).refused(t, errPath)
		}
	}
}

func TestHealthPath(t *testing.T) {
	var ready atomic.Bool
	ready.Store(true)
	g := startGateway(t, func(cfg *Config) { cfg.HealthPath = "/-/health"; cfg.Ready = ready.Load }, nil)
	g.register(t, "-", "1", naming(t, "the service named -").url())
	c := g.dial(t)
	if m := c.get("/-/health").want(t, 200); m.body != "ready\n" || m.field("Date") == "" {
		t.Errorf("%q %q", m.head, m.body)
	}
	c.get("/-/health?x").want(t, 200)
	if m := c.request("HEAD", "/-/health").want(t, 200); m.field("Content-Length") != "6" {
		t.Errorf("%q", m.head)
	}
	ready.Store(false)
	if m := c.get("/-/health").want(t, 503); m.body != "shutting down\n" {
		t.Errorf("%q", m.body)
	}
	if m := c.get("/-/healthy").want(t, 200); m.body != "the service named -" {
		t.Errorf("%q", m.body)
	}
	none := startGateway(t, nil, nil)
	none.dial(t).get("/-/health").refused(t, errNoRoute)
}

// One line a request, with what is known of it.
func TestLogRequests(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { patient(0)(cfg); logRequests(cfg) }, nil)
	g.register(t, "echo", "a", refusedAddr(t))
	g.register(t, "echo", "b", startActor(t, says("b")).url())
	c := g.dial(t)
	c.get("/echo?q=1").want(t, 200) // refused by a
	c.get("/echo?q=2").want(t, 200)
	c.get("/nowhere").want(t, 404)
	c.request("PUT", "/echo/%2e%2e/x", "Content-Length: 0").want(t, 400)
	for _, words := range [][]string{
		{"msg=request", "client=127.0.0.1", "method=GET", "/echo?q=1", "status=200", "attempts=2", "took=", "service=echo", "instance=b"},
		{"msg=request", "/echo?q=2", "status=200", "instance=b"},
		{"msg=request", "/nowhere", "status=404", "attempts=0"},
		{"msg=request", "method=PUT", "target=/echo/%2e%2e/x", "status=400"},
	} {
		eventually(t, fmt.Sprintf("one line with %q", words), func() bool { return g.logged(words...) == 1 })
	}
	quiet := startGateway(t, nil, nil)
	quiet.dial(t).get("/nowhere")
	if quiet.logged("msg=request") != 0 {
		t.Error("requests are in the log unasked")
	}
}

func TestBadConfig(t *testing.T) {
	reg := registry.New(registry.Config{})
	for _, tt := range []struct {
		cfg  Config
		want []string
	}{
		{Config{}, []string{"Registry", "nil"}},
		{Config{Registry: reg, Strategy: "fastest"}, []string{"Strategy", `"fastest"`, "round-robin", "ip-hash"}},
		{Config{Registry: reg, Breaker: cb.Config{Failures: -1}}, []string{"Breaker", "Failures", "-1"}},
		{Config{Registry: reg, Breaker: cb.Config{OpenFor: -1}}, []string{"Breaker", "OpenFor", "-1ns"}},
		{Config{Registry: reg, BreakerStatuses: []int{503, 99}}, []string{"BreakerStatuses", "99"}},
		{Config{Registry: reg, BreakerStatuses: []int{600}}, []string{"BreakerStatuses", "600"}},
		{Config{Registry: reg, Routes: []Route{{Prefix: "api", Service: "x"}}}, []string{"route api"}},
		{Config{Registry: reg, TraceShare: 1.5}, []string{"TraceShare", "1.5", "0 to 1"}},
	} {
		p, err := New(tt.cfg, nil)
		if err == nil || p != nil {
			t.Errorf("%+v was accepted", tt.cfg)
			continue
		}
		for _, word := range tt.want {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%q does not say %s", err, word)
			}
		}
	}
}

// What a Config leaves out has the promised default, and the caller's copy stays as it is.
func TestDefaults(t *testing.T) {
	cfg := Config{Registry: registry.New(registry.Config{})}
	p, err := New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	got := p.cfg()
	if got.Strategy != "round-robin" || got.RequestTimeout != 30*time.Second || got.ConnectTimeout != 2*time.Second || got.Retries != 2 {
		t.Errorf("defaults are %+v", got)
	}
	for status, failing := range p.cfg().failing {
		if failing != (status == 502 || status == 503 || status == 504) {
			t.Errorf("status %d counts as a failure: %v", status, failing)
		}
	}
	if cfg.Strategy != "" || cfg.RequestTimeout != 0 || cfg.Log != nil {
		t.Errorf("the caller's Config became %+v", cfg)
	}
}

// The API's bodies have the limit of any other, also if they come behind their head.
func TestAPIBodyLimit(t *testing.T) {
	g := startWithAPI(t, func(cfg *Config) { cfg.Limits.Body = 100 })
	body := registration("a", "http://127.0.0.1:1")
	body += strings.Repeat(" ", 1000-len(body))
	head := "POST /register HTTP/1.1\r\nHost: x\r\n" + asJSON + fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n", len(body))
	for _, first := range []int{len(head), len(head) + 1, len(head) + len(body)} {
		c := g.dial(t)
		c.send((head + body)[:first])
		if first < len(head)+len(body) {
			time.Sleep(5 * time.Millisecond) // so that they are likely to be read apart
			c.send((head + body)[first:])
		}
		c.read(false).want(t, 413)
	}
}
