package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// headed makes a request of a head without its end.
func headed(t testing.TB, head string) *Request {
	t.Helper()
	r := &Request{}
	if err := r.parse([]byte(strings.ReplaceAll(head, "\n", "\r\n")+"\r\n\r\n"), nil, false, &standard); err != nil {
		t.Fatalf("%q: %v", head, err)
	}
	return r
}

// The order of precedence, whatever the order of the list.
func TestTablePrecedence(t *testing.T) {
	routes := []Route{
		{Service: "rest"},
		{Prefix: "/api", Service: "api"},
		{Path: "/api/exact", Service: "exact"},
		{Prefix: "/api", Methods: []string{"POST", "PUT"}, Service: "writes"},
		{Prefix: "/api", Headers: []Field{{"X-Canary", "1"}}, Service: "canary"},
		{Prefix: "/api", Methods: []string{"POST"}, Headers: []Field{{"X-Canary", "1"}}, Service: "canary-writes"},
		{Prefix: "/api/deep", Service: "deep"},
		{Host: "example.com", Service: "site"},
		{Host: "example.com", Prefix: "/api", Headers: []Field{{"Authorization", ""}}, Service: "known"},
		{Host: "*.example.com", Service: "below"},
		{Host: "*.eu.example.com", Service: "europe"},
		{Host: "*.eu.example.com", Path: "/only", Methods: []string{"GET"}, Service: "only"},
		{Host: "[::1]", Service: "v6"},
		{Prefix: "/same", Methods: []string{"GET"}, Service: "first"},
		{Prefix: "/same", Headers: []Field{{"A", ""}}, Service: "second"},
	}
	reversed := slices.Clone(routes[:13]) // those two are in order of the list
	slices.Reverse(reversed)
	for name, list := range map[string][]Route{"as listed": routes, "reversed": append(reversed, routes[13:]...)} {
		choose, err := newTestTable(list)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct{ head, want string }{
			{"GET /x HTTP/1.1\nHost: h", "rest"},
			{"GET / HTTP/1.0", "rest"},
			{"GET /api HTTP/1.1\nHost: h", "api"},
			{"GET /apis HTTP/1.1\nHost: h", "rest"},
			{"GET /api/exact HTTP/1.1\nHost: h", "exact"},
			{"GET /api/exact?x=1 HTTP/1.1\nHost: h", "exact"},
			{"GET /api/exact/ HTTP/1.1\nHost: h", "api"},
			{"POST /api/exact HTTP/1.1\nHost: h", "exact"},
			{"POST /api/x HTTP/1.1\nHost: h", "writes"},
			{"PUT /api/x HTTP/1.1\nHost: h", "writes"},
			{"post /api/x HTTP/1.1\nHost: h", "api"},
			{"GET /api/x HTTP/1.1\nHost: h\nx-canary: 1", "canary"},
			{"GET /api/x HTTP/1.1\nHost: h\nx-canary: 2", "api"},
			{"GET /api/x HTTP/1.1\nHost: h\nx-canary: 2\nx-canary: 1", "api"},
			{"POST /api/x HTTP/1.1\nHost: h\nX-Canary: 1", "canary-writes"},
			{"POST /api/deep HTTP/1.1\nHost: h\nX-Canary: 1", "deep"},
			{"GET /api HTTP/1.1\nHost: example.com", "site"},
			{"GET /api HTTP/1.1\nHost: EXAMPLE.com:8080", "site"},
			{"GET /api HTTP/1.1\nHost: example.com.", "site"},
			{"GET /api HTTP/1.1\nHost: example.com.:80", "site"},
			{"GET http://example.com/api HTTP/1.1\nHost: h", "site"},
			{"GET /api HTTP/1.1\nHost: example.com\nAuthorization: x", "known"},
			{"GET /api HTTP/1.1\nHost: notexample.com", "api"},
			{"GET /api HTTP/1.1\nHost: a.example.com", "below"},
			{"GET /api HTTP/1.1\nHost: a.b.example.com", "below"},
			{"GET /api HTTP/1.1\nHost: .example.com", "below"},
			{"GET /api HTTP/1.1\nHost: eu.example.com", "below"},
			{"GET /api HTTP/1.1\nHost: a.EU.example.com", "europe"},
			{"GET /only HTTP/1.1\nHost: a.eu.example.com", "only"},
			{"POST /only HTTP/1.1\nHost: a.eu.example.com", "europe"},
			{"GET /only HTTP/1.1\nHost: a.example.com", "below"},
			{"GET /only HTTP/1.1\nHost: [::1]:8080", "v6"},
			{"GET /same HTTP/1.1\nHost: h\nA: 1", "first"},
			{"POST /same HTTP/1.1\nHost: h\nA: 1", "second"},
			{"POST /same HTTP/1.1\nHost: h", "rest"},
			{"GET /api HTTP/1.1\nHost: " + strings.Repeat("a.", 200) + "example.com", "api"}, // no name
		} {
			if got := choose(headed(t, tt.head)); got != tt.want {
				t.Errorf("%s: %q goes to %q, want %q", name, tt.head, got, tt.want)
			}
		}
	}
}

func TestTableRefuses(t *testing.T) {
	for _, tt := range []struct {
		route Route
		want  string
	}{
		{Route{Service: "a", Host: "example.com:80"}, `host: "example.com:80" is neither a name`},
		{Route{Service: "a", Host: "*"}, "neither a name"},
		{Route{Service: "a", Host: "a.*.com"}, "neither a name"},
		{Route{Service: "a", Host: "*.*.com"}, "neither a name"},
		{Route{Service: "a", Host: "example.com."}, "neither a name"},
		{Route{Service: "a", Host: "exa mple"}, "neither a name"},
		{Route{Service: "a", Path: "/a", Prefix: "/a"}, "path: there is a prefix too"},
		{Route{Service: "a", Path: "a"}, `"a" is no path`},
		{Route{Service: "a", Path: "/a?b"}, "is no path"},
		{Route{Service: "a", Prefix: "/a", ReplacePrefix: "b"}, `"b" is no path`},
		{Route{Service: "a", Prefix: "/a", ReplacePrefix: "/b\r\nX: y"}, "is no path"},
		{Route{Service: "a", Prefix: "/a", StripPrefix: true, ReplacePrefix: "/b"}, "replace-prefix: the prefix is stripped too"},
		{Route{Service: "a", Methods: []string{"G T"}}, `"G T" is no method`},
		{Route{Service: "a", Headers: []Field{{"X Y", ""}}}, "no name of a header field"},
		{Route{Service: "a", Request: Edits{Set: []Field{{"X", "a\r\nb"}}}}, "request-headers: the value of X"},
		{Route{Service: "a", Request: Edits{Set: []Field{{"X", " a"}}}}, "spaces around"},
		{Route{Service: "a", Request: Edits{Add: []Field{{"Host", "a"}}}}, "Host cannot be added"},
		{Route{Service: "a", Request: Edits{Remove: []string{"host"}}}, "Host cannot be removed"},
		{Route{Service: "a", Request: Edits{Set: []Field{{"content-length", "1"}}}}, "content-length is left to the gateway"},
		{Route{Service: "a", Request: Edits{Remove: []string{"Transfer-Encoding"}}}, "is left to the gateway"},
		{Route{Service: "a", Request: Edits{Set: []Field{{"X-Forwarded-For", "1"}}}}, "is left to the gateway"},
		{Route{Service: "a", Response: Edits{Set: []Field{{"X-Request-ID", "1"}}}}, "is left to the gateway"},
		{Route{Service: "a", Response: Edits{Set: []Field{{"Connection", "close"}}}}, "response-headers: Connection is left to the gateway"},
		{Route{Service: "a", Response: Edits{Remove: []string{"Date"}}}, "is left to the gateway"},
		{Route{Prefix: "/a"}, "service: is missing"},
		{Route{Service: "a", Methods: []string{"GET", "get"}}, `methods: "get" never matches GET: methods are case-sensitive`},
		{Route{Service: "a", Methods: []string{"Patch"}}, `methods: "Patch" never matches PATCH`},
		{Route{Prefix: "/taken/", Service: "a"}, "the same leads to other already"},
		{Route{Prefix: "/*", StripPrefix: true}, "stands alone"},
	} {
		_, err := newTestTable([]Route{{Prefix: "/taken", Service: "other"}, tt.route})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.route, err, tt.want)
		}
	}
}

// The table agrees with a walk over all routes in the order of precedence.
func FuzzTable(f *testing.F) {
	f.Add("GET", "a.example.com", "/a/b", []byte{1, 2, 3, 4, 5, 6, 7, 8})
	f.Add("POST", "example.com", "/", []byte{0, 0, 0, 9, 9, 9, 200, 3})
	hosts := []string{"", "example.com", "*.example.com", "*.a.example.com", "a.example.com"}
	paths := []string{"/", "/a", "/a/b", "/a/b/c", "/b"}
	f.Fuzz(func(t *testing.T, method, host, path string, spec []byte) {
		if !strings.HasPrefix(path, "/") || strings.ContainsAny(host, ":]") || host != strings.ToLower(host) || strings.HasSuffix(host, ".") || len(host) > 255 {
			return
		}
		var all []Route
		for i := 0; i+2 < len(spec) && len(all) < 40; i += 3 {
			r := Route{Host: hosts[int(spec[i])%len(hosts)], Service: fmt.Sprint("s", i)}
			if spec[i+1]&8 != 0 {
				r.Path = paths[int(spec[i+1])%len(paths)]
			} else {
				r.Prefix = paths[int(spec[i+1])%len(paths)]
			}
			if spec[i+2]&1 != 0 {
				r.Methods = []string{"GET"}
			}
			if spec[i+2]&2 != 0 {
				r.Headers = []Field{{"X-A", ""}}
			}
			all = append(all, r)
		}
		table, err := newTable(all, func(string) *route { return &route{} })
		if err != nil || len(all) == 0 {
			return
		}
		want := ""
		for _, r := range table.routes {
			suffix, wild := strings.CutPrefix(r.Host, "*")
			onHost := r.Host == "" || r.Host == host || wild && strings.HasSuffix(host, suffix)
			prefix := strings.TrimSuffix(r.Prefix, "/")
			onPath := r.Path == path || r.Path == "" && (path == prefix || strings.HasPrefix(path, prefix+"/"))
			if onHost && onPath && (len(r.Methods) == 0 || method == "GET") && len(r.Headers) == 0 {
				want = r.service
				break
			}
		}
		got := ""
		if m := table.match(&Request{Method: []byte(method), Host: []byte(host), Path: []byte(path)}); m != nil {
			got = m.service
		}
		if got != want {
			t.Errorf("%s %s%s goes to %q, want %q of %v", method, host, path, got, want, all)
		}
	})
}

// What a route says of a request, on the wire: on a loop, in a goroutine (a body in chunks), and for a CONNECT not at all.
func TestRouteRewrites(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Routes = []Route{
			{Prefix: "/strip", StripPrefix: true, Service: "echo"},
			{Prefix: "/replace/", ReplacePrefix: "/v2/x/", Service: "echo"},
			{Prefix: "/bare", ReplacePrefix: "/", Service: "echo"},
			{Path: "/old", ReplacePrefix: "/new", Service: "echo"},
			{Prefix: "/", Service: "echo"},
		}
	}, nil)
	origin := naming(t, "a")
	g.register(t, "echo", "1", origin.url()+"/base")
	c := g.dial(t)
	n := 0
	for _, tt := range []struct{ target, want string }{
		{"/strip", "/"},
		{"/strip?x=1", "/?x=1"},
		{"/strip/", "/"},
		{"/strip/a/b?x=1", "/a/b?x=1"},
		{"/strip//a", "//a"},
		{"/strip/%2e/a;b", "/%2e/a;b"}, // still of the same route
		{"/replace", "/v2/x"},
		{"/replace/a?x", "/v2/x/a?x"},
		{"/bare/a", "/a"},
		{"/bare", "/"},
		{"/old", "/new"},
		{"/old?x", "/new?x"},
		{"/old/x", "/old/x"},
		{"/stripped", "/stripped"},
		{"http://h/strip/a", "/a"},
	} {
		for _, body := range []string{"\r\n", "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"} {
			c.send("POST " + tt.target + " HTTP/1.1\r\nHost: h\r\n" + body)
			c.read(false).want(t, 200)
			seen := origin.requests()
			if line, _, _ := strings.Cut(seen[n].head, "\r\n"); line != "POST /base"+tt.want+" HTTP/1.1" {
				t.Errorf("%s is sent as %q, want %s", tt.target, line, tt.want)
			}
			n++
		}
	}
	if m := c.get("/strip/%2e%2e/a"); m.status() != 400 {
		t.Errorf("a path that leaves the route: %d", m.status())
	}
}

func TestRouteEdits(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Routes = []Route{{
			Service:  "echo",
			Request:  Edits{Set: []Field{{"X-Set", "new"}, {"Host", "inner.example.com"}}, Add: []Field{{"X-Add", "more"}}, Remove: []string{"cookie"}},
			Response: Edits{Set: []Field{{"Server", "k"}}, Add: []Field{{"Set-Cookie", "b=2"}}, Remove: []string{"X-Secret"}},
		}}
	}, nil)
	for name, response := range map[string]string{
		"with a length": "HTTP/1.1 200 OK\r\nServer: nginx\r\nX-Secret: 1\r\nSet-Cookie: a=1\r\nConnection: x-hop\r\nX-Hop: 1\r\nContent-Length: 2\r\nx-secret: 2\r\n\r\nok",
		"in chunks":     "HTTP/1.1 200 OK\r\nServer: nginx\r\nX-Secret: 1\r\nSet-Cookie: a=1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"to the end":    "HTTP/1.1 200 OK\r\nServer: nginx\r\nX-Secret: 1\r\nSet-Cookie: a=1\r\n\r\nok",
	} {
		t.Run(name, func(t *testing.T) {
			origin := answering(t, response)
			g.register(t, "echo", "1", origin.url())
			m := g.do(t, "GET / HTTP/1.1\r\nHost: h\r\nCookie: a\r\nX-Set: old\r\nX-Keep: 1\r\nx-set: older\r\nX_Set: old\r\nX_Keep: 2\r\nX-Add: first\r\nConnection: x-gone\r\nX-Gone: 1\r\ncookie: b\r\n\r\n").want(t, 200)
			if m.body != "ok" || strings.Contains(strings.ToLower(m.head), "x-secret") || strings.Contains(m.head, "nginx") ||
				!strings.Contains(m.head, "Set-Cookie: a=1\r\n") || !strings.Contains(m.head, "Set-Cookie: b=2\r\n") || m.field("Server") != "k" {
				t.Errorf("the client got %q", m.head)
			}
			sent := origin.requests()[0].head
			for _, want := range []string{"X-Set: new\r\n", "X-Add: first\r\n", "X-Add: more\r\n", "X-Keep: 1\r\n", "X_Keep: 2\r\n", "Host: inner.example.com\r\n", "X-Forwarded-Host: h\r\n"} {
				if strings.Count(sent, want) != 1 {
					t.Errorf("%q is not once in %q", want, sent)
				}
			}
			for _, gone := range []string{"cookie", "x-gone", "old", "host: h\r\n"} {
				if strings.Contains(strings.ReplaceAll(strings.ToLower(sent), "x-forwarded-host: h\r\n", ""), gone) {
					t.Errorf("%q is in %q", gone, sent)
				}
			}
		})
	}
}

// Each route has its own limits, over those of its service, over those of the gateway.
func TestRoutePolicies(t *testing.T) {
	const long, short = 20 * time.Second, 100 * time.Millisecond
	g := startGateway(t, func(cfg *Config) {
		cfg.RequestTimeout, cfg.Retries, cfg.Limits.Body = long, 2, 4
		cfg.Services = map[string]Service{
			"mute": {Policy: Policy{MaxBody: 8}},
			"slow": {Policy: Policy{RequestTimeout: short}},
		}
		cfg.Routes = []Route{
			{Prefix: "/quick", Service: "mute", Policy: Policy{RequestTimeout: short}},
			{Prefix: "/large", Service: "echo", Policy: Policy{MaxBody: 16}},
			{Prefix: "/any", Service: "echo", Policy: Policy{MaxBody: -1}},
			{Prefix: "/total", Service: "mute", Policy: Policy{TotalTimeout: short}},
			{Prefix: "/mute", Service: "mute"},
			{Prefix: "/*"},
		}
	}, nil)
	g.register(t, "echo", "1", naming(t, "").url())
	for _, name := range []string{"mute", "slow"} {
		g.register(t, name, "1", startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) }).url())
	}
	for _, target := range []string{"/quick", "/total", "/slow"} {
		began := time.Now()
		if m := g.do(t, "GET "+target+" HTTP/1.1\r\nHost: h\r\n\r\n"); m.status() != 504 || time.Since(began) > long/2 {
			t.Errorf("%s: %d after %v", target, m.status(), time.Since(began))
		}
	}
	for _, tt := range []struct {
		target string
		size   int
		want   int
	}{
		{"/echo", 4, 200}, {"/echo", 5, 413}, {"/large", 16, 200}, {"/large", 17, 413}, {"/any", 1000, 200}, {"/mute", 9, 413},
	} {
		body := strings.Repeat("x", tt.size)
		for framing, bytes := range map[string]string{
			"a length": fmt.Sprintf("Content-Length: %d\r\n\r\n%s", tt.size, body),
			"chunks":   fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", tt.size, body),
		} {
			m := g.do(t, "POST "+tt.target+" HTTP/1.1\r\nHost: h\r\n"+bytes)
			if m.status() != tt.want {
				t.Errorf("%s, %d bytes with %s: %d, want %d", tt.target, tt.size, framing, m.status(), tt.want)
			}
			if limit := map[string]string{"/echo": "4 bytes", "/large": "16 bytes", "/mute": "8 bytes"}[tt.target]; tt.want == 413 && !strings.Contains(m.body, limit) {
				t.Errorf("%s: %q does not name the limit", tt.target, m.body)
			}
		}
	}
}

func TestRouteRetries(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Routes = []Route{{Prefix: "/none", Service: "bad", Policy: Policy{Retries: -1}}, {Prefix: "/three", Service: "bad", Policy: Policy{Retries: 3}}, {Prefix: "/*"}}
		cfg.Breaker.Failures = 1000
	}, nil)
	var origins []*origin
	for _, id := range []string{"1", "2", "3", "4", "5", "6"} {
		o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) { _, _ = o.next(r) }) // reads, and closes
		origins = append(origins, o)
		g.register(t, "bad", id, o.url())
	}
	before := 0
	for _, tt := range []struct {
		target   string
		attempts int
	}{{"/none", 1}, {"/three", 4}, {"/bad", 3}} {
		g.do(t, "GET "+tt.target+" HTTP/1.1\r\nHost: h\r\n\r\n").want(t, 502)
		seen := 0
		for _, o := range origins {
			seen += len(o.requests())
		}
		if seen-before != tt.attempts {
			t.Errorf("%s: %d attempts, want %d", tt.target, seen-before, tt.attempts)
		}
		before = seen
	}
}

// Strategy and breaker of a service.
func TestServiceSettings(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.Services = map[string]Service{"sticky": {Strategy: lb.IPHash, Breaker: cb.Config{Failures: 1, OpenFor: time.Hour}}}
	}, nil)
	for _, service := range []string{"sticky", "other"} {
		for _, id := range []string{"a", "b", "c"} {
			g.register(t, service, id, naming(t, id).url())
		}
	}
	if got := g.DescribeService("sticky").InForce; got != "ip-hash" {
		t.Errorf("sticky: %s", got)
	}
	if got := g.DescribeService("other").InForce; got != "round-robin" {
		t.Errorf("other: %s", got)
	}
	seen := map[string]map[string]bool{"sticky": {}, "other": {}}
	for service, answers := range seen {
		for range 6 {
			answers[g.do(t, "GET /"+service+" HTTP/1.1\r\nHost: h\r\n\r\n").want(t, 200).body] = true
		}
	}
	if len(seen["sticky"]) != 1 || len(seen["other"]) != 3 {
		t.Errorf("answers of %v", seen)
	}
	for service, want := range map[string]string{"sticky": "open", "other": "closed"} {
		g.register(t, service, "x", startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) { _, _ = o.next(r) }).url())
		for _, id := range []string{"a", "b", "c"} {
			if err := g.reg.Unregister(service, id, ""); err != nil {
				t.Fatal(err)
			}
		}
		g.do(t, "GET /"+service+" HTTP/1.1\r\nHost: h\r\n\r\n")
		if got := g.DescribeInstance(service, "x").Breaker.State; got != want {
			t.Errorf("the breaker of %s is %s after one failure, want %s", service, got, want)
		}
	}
	for _, bad := range []Service{{Strategy: "fastest"}, {Breaker: cb.Config{Probes: -1}}} {
		if _, err := New(Config{Registry: registry.New(registry.Config{}), Services: map[string]Service{"x": bad}}, nil); err == nil || !strings.Contains(err.Error(), "Services: x: ") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// manyRoutes are n routes, each with another host, a wildcard, or another prefix.
func manyRoutes(n int) []Route {
	all := []Route{{Prefix: "/", Service: "rest"}}
	for i := 1; len(all) < n; i++ {
		r := Route{Service: "s", Prefix: fmt.Sprintf("/api/%d", i)}
		switch i % 3 {
		case 0:
			r.Host = fmt.Sprintf("h%d.example.com", i)
		case 1:
			r.Host = fmt.Sprintf("*.d%d.example.com", i)
		}
		all = append(all, r)
	}
	return all
}

func TestTableAllocatesNothing(t *testing.T) {
	table, err := newTable(manyRoutes(100), func(string) *route { return &route{} })
	if err != nil {
		t.Fatal(err)
	}
	r := headed(t, "GET /api/7/x/y HTTP/1.1\nHost: A.very.long.name.D7.example.com:8080")
	if m := table.match(r); m == nil || m.Host != "*.d7.example.com" {
		t.Fatalf("it goes to %v", m)
	}
	if n := testing.AllocsPerRun(100, func() { table.match(r) }); n != 0 {
		t.Errorf("a match allocates %v times", n)
	}
	way := (&Route{Prefix: "/api", ReplacePrefix: "/v2", Request: Edits{Set: []Field{{"X-A", "1"}}, Remove: []string{"Cookie"}}, Service: "s"}).resolve(&route{})
	out := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() {
		out = way.appendTarget(out[:0], r)
		out = appendEdited(out, r.lines, r.drops, way.request)
	}); n != 0 || !bytes.HasPrefix(out, []byte("/v2/7/x/yHost: ")) {
		t.Errorf("rewriting allocates %v times: %q", n, out)
	}
}

// BenchmarkRoute is the match of one request among so many routes.
func BenchmarkRoute(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		table, err := newTable(manyRoutes(n), func(string) *route { return &route{} })
		if err != nil {
			b.Fatal(err)
		}
		for name, head := range map[string]string{"path": "GET /api/8/x/y HTTP/1.1\nHost: www.example.com", "none": "GET /a/b/c/d HTTP/1.1\nHost: www.example.com"} {
			r := headed(b, head)
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if table.match(r) == nil {
						b.Fatal("nothing matches")
					}
				}
			})
		}
	}
}
