package proxy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kerberos/registry"
)

// Why a route is the one, which others come behind it, and which would have been with one thing else.
func TestExplainedRoutes(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Routes = []Route{
			{Prefix: "/api", Service: "api"},
			{Prefix: "/api/v1", Methods: []string{"GET", "HEAD"}, Service: "old"},
			{Path: "/api/v1/users", Headers: []Field{{"X-Beta", ""}, {"X-Key", "s3cret"}}, Service: "beta"},
			{Host: "*.example.com", Prefix: "/api", Service: "tenants"},
			{Host: "www.example.com", Service: "web"},
			{Prefix: "/files", Service: "files"},
			{Prefix: FirstSegmentRule},
		}
	}, nil)
	const (
		api, old, beta      = "/api -> api", "GET,HEAD /api/v1 -> old", "=/api/v1/users X-Beta X-Key -> beta"
		tenants, web, files = "*.example.com/api -> tenants", "www.example.com/ -> web", "/files -> files"
	)
	for _, tt := range []struct {
		method, host, path string
		fields             []string
		want               []string // the route, then those near
	}{
		{"GET", "x", "/api", nil, []string{api + ": the path is below /api",
			old + ": the path is not below /api/v1", web + ": the host is not www.example.com", tenants + ": the host is not *.example.com"}},
		{"GET", "x", "/api/v1/users", nil, []string{old + ": the path is below /api/v1, the method is GET or HEAD",
			api + ": it matches too, but the other has the longer prefix", web + ": the host is not www.example.com", tenants + ": the host is not *.example.com"}},
		{"GET", "x", "/api/v1/users", []string{"X-Beta: 1", "X-Key: guess"}, []string{old + ": the path is below /api/v1, the method is GET or HEAD",
			api + ": it matches too, but the other has the longer prefix",
			beta + ": the field X-Key has another value, or is not there", web + ": the host is not www.example.com", tenants + ": the host is not *.example.com"}},
		{"GET", "x", "/api/v1/users", []string{"X-Beta: 1", "X-Key: s3cret"}, []string{
			beta + ": the path is /api/v1/users, there is a field X-Beta, the field X-Key has the right value",
			old + ": it matches too, but the other has the whole path", api + ": it matches too, but the other has the whole path", web + ": the host is not www.example.com", tenants + ": the host is not *.example.com"}},
		{"POST", "x", "/api/v1", nil, []string{api + ": the path is below /api", old + ": the method is not GET or HEAD", web + ": the host is not www.example.com", tenants + ": the host is not *.example.com"}},
		{"GET", "A.Example.COM:8080", "/api/v1", nil, []string{tenants + ": the path is below /api, the host is *.example.com",
			old + ": it matches too, but the other is more exact about the host", api + ": it matches too, but the other is more exact about the host", web + ": the host is not www.example.com"}},
		{"GET", "www.example.com", "/api", nil, []string{web + ": the host is www.example.com",
			tenants + ": it matches too, but the other is more exact about the host", api + ": it matches too, but the other is more exact about the host",
			old + ": the path is not below /api/v1"}},
		{"GET", "x", "/filesystem/1", nil, []string{"/* -> filesystem: the first segment of the path names the service", files + ": the path is not below /files", web + ": the host is not www.example.com"}},
		{"GET", "x", "/Files", nil, []string{"/* -> Files: the first segment of the path names the service", files + ": the path is not below /files", web + ": the host is not www.example.com"}},
		{"GET", "x", "/", nil, []string{"none", web + ": the host is not www.example.com"}},
		{"GET", "x", "/other", nil, []string{"/* -> other: the first segment of the path names the service", web + ": the host is not www.example.com"}},
	} {
		e := g.Explain(registry.Question{Method: tt.method, Host: tt.host, Path: tt.path, Fields: tt.fields, Client: netip.MustParseAddr("127.0.0.1")})
		got := []string{"none"}
		if e.Route != nil {
			got[0] = fmt.Sprintf("%s -> %s: %s", e.Route.Match, e.Route.Service, e.Route.Why)
		}
		for _, r := range e.Near {
			got = append(got, fmt.Sprintf("%s -> %s: %s", r.Match, r.Service, r.Why))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s %s%s %q: want -, got +\n%s", tt.method, tt.host, tt.path, tt.fields, diff)
		}
	}
}

// Names that are nearly registered, a program's own routing, and no more routes than can be read.
func TestExplainedNames(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, name := range []string{"users", "users-2", "orders"} {
		g.register(t, name, "a", "http://127.0.0.1:1")
	}
	e := g.Explain(question("GET", "/Users/1"))
	if len(e.Near) != 1 || e.Near[0] != (registry.RouteExplanation{Match: "/users", Service: "users", Why: "the first segment of the path is Users"}) {
		t.Errorf("%+v", e)
	}
	if e = g.Explain(question("GET", "/users/1")); len(e.Near) != 0 || e.Route.Match != "/*" {
		t.Errorf("%+v", e)
	}

	g = startGateway(t, nil, func(*Request) string { return "mine" })
	if e = g.foretold(t, g.dial(t), question("GET", "/x")); e.Route.Match != "RouteFunc" || e.Route.Service != "mine" || len(e.Near) != 0 {
		t.Errorf("%+v", e)
	}

	var routes []Route
	for i := range 3 * maxNear {
		routes = append(routes, Route{Host: fmt.Sprintf("h%d.example.com", i), Service: "web"})
	}
	g = startGateway(t, func(cfg *Config) { cfg.Routes = routes }, nil)
	if e = g.Explain(question("GET", "/x")); len(e.Near) != maxNear || e.Route != nil || e.Outcome.Why != "no service is at this path: no route matches" {
		t.Errorf("%+v", e)
	}
}

// The settings of a route are those that decide.
func TestExplainedPolicy(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits.Body = 5
		cfg.Routes = []Route{{Prefix: "/large", Service: "echo", Policy: Policy{MaxBody: 10}}, {Prefix: "/", Service: "echo"}}
	}, nil)
	g.register(t, "echo", "a", startActor(t, says("a")).url())
	for _, path := range []string{"/", "/large"} {
		if e := g.foretold(t, g.dial(t), question("POST", path, "Content-Length: 11")); e.Outcome.Status != 413 {
			t.Errorf("%s: %+v", path, e.Outcome)
		}
	}
	if e := g.Explain(question("POST", "/large", "Content-Length: 6")); e.Outcome.Kind != registry.ToInstance {
		t.Errorf("%+v", e.Outcome)
	}
	if e := g.Explain(question("POST", "/", "Content-Length: 6")); e.Outcome.Why != "the request body is larger than the limit of 5 bytes" {
		t.Errorf("%+v", e.Outcome)
	}
}

func BenchmarkExplain(b *testing.B) {
	for _, n := range []int{1, 1000, 10_000} {
		b.Run(fmt.Sprintf("routes-%d", n), func(b *testing.B) {
			g := startGateway(b, func(cfg *Config) {
				for i := range n {
					cfg.Routes = append(cfg.Routes, Route{Prefix: fmt.Sprintf("/p%d/x", i), Methods: []string{"GET"}, Service: "echo"})
				}
			}, nil)
			q := question("GET", "/p0/y")
			b.ReportAllocs()
			for b.Loop() {
				g.Explain(q)
			}
		})
	}
}
