package proxy

import (
	"bytes"
	"fmt"
	"net/netip"
	"net/url"
	pathpkg "path"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

func TestFirstSegmentRouting(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, name := range []string{"echo", "users", "a.b~c:1-2_3"} {
		g.register(t, name, "1", naming(t, name).url())
	}
	tests := []struct {
		path, want string // want: the service, or "" for 404
	}{
		{"/echo", "echo"},
		{"/echo/", "echo"},
		{"/echo/x", "echo"},
		{"/echo?x=/users", "echo"},
		{"/echo//users", "echo"},
		{"/users/1", "users"},
		{"/users/echo", "users"},
		{"/a.b~c:1-2_3/x", "a.b~c:1-2_3"},
		{"/", ""},
		{"/?echo", ""},
		{"//echo", ""},
		{"/echoes", ""},
		{"/ech", ""},
		{"/Echo", ""},
		{"/x/echo", ""},
	}
	c := g.dial(t)
	for _, tt := range tests {
		m := c.get(tt.path)
		if tt.want == "" {
			m.refused(t, errNoRoute)
		} else if m.want(t, 200); m.body != tt.want {
			t.Errorf("%s went to %q, want %q", tt.path, m.body, tt.want)
		}
	}

	// Nothing to restart: a service is there as soon as somebody registers it.
	c.get("/late/x").refused(t, errNoRoute)
	g.register(t, "late", "1", naming(t, "late").url())
	if m := c.get("/late/x").want(t, 200); m.body != "late" {
		t.Errorf("/late/x went to %q", m.body)
	}
}

// What a service without instances answers.
func TestEmptyServices(t *testing.T) {
	g := startGateway(t, nil, nil)
	c := g.dial(t)
	c.get("/echo").refused(t, errNoInstance) // the promised one, though nobody ever registered it
	c.get("/users/1").refused(t, errNoRoute) // never seen
	c.get("/users%2f1").refused(t, errPath)  // neither reading has a service, but they differ
	g.register(t, "users", "1", refusedAddr(t))
	c.get("/users/1").refused(t, errRefused)
	g.unregister(t, "users", "1")
	if m := c.get("/users/1").refused(t, errNoInstance); m.field("Retry-After") != "1" {
		t.Errorf("Retry-After is %q, want 1", m.field("Retry-After"))
	}
}

// A service that lost its last instance answers 503 for an hour, then it is forgotten.
func TestForgottenServices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New(registry.Config{})
		p, err := New(Config{Registry: reg, Routes: parseRoutes("/api=configured /*=")}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		reg.OnChange(p.Update)
		want := func(path string, want *refusal, when string) {
			t.Helper()
			c := &conn{p: p, workspace: &workspace{}}
			c.x.c, c.req.Path = c, []byte(path)
			s, err := c.x.find()
			if err == nil && s.view.Load().nobody() {
				err = errNoInstance
			}
			if err != want {
				t.Fatalf("%s %s: %v, want %v", path, when, err, want)
			}
		}
		register := func(name string) {
			t.Helper()
			if err := reg.Register(name, registry.Instance{ID: "1", Addr: "http://127.0.0.1:1"}); err != nil {
				t.Fatal(err)
			}
		}
		unregister := func(name string) {
			t.Helper()
			if err := reg.Unregister(name, "1", ""); err != nil {
				t.Fatal(err)
			}
		}
		want("/users", errNoRoute, "before it was registered")
		register("users")
		want("/users", nil, "while it is registered")
		time.Sleep(3 * time.Hour)
		want("/users", nil, "three hours later")
		unregister("users")
		want("/users", errNoInstance, "at once")
		time.Sleep(59 * time.Minute)
		want("/users", errNoInstance, "59 minutes later")
		time.Sleep(2 * time.Minute)
		want("/users", errNoRoute, "61 minutes later")
		for _, path := range []string{"/echo", "/api/x"} {
			want(path, errNoInstance, "though it never had an instance")
		}

		// It comes back as if nothing had been, and the hour begins anew.
		register("users")
		want("/users", nil, "registered again")
		unregister("users")
		time.Sleep(59 * time.Minute)
		want("/users", errNoInstance, "59 minutes after it left again")

		// What was forgotten costs no memory: the next departure sweeps it out.
		time.Sleep(2 * time.Minute)
		register("other")
		unregister("other")
		synctest.Wait()
		if p.service("users") != nil {
			t.Error("users is still held after its hour")
		}
		if p.service("other") == nil {
			t.Error("other is forgotten too early")
		}
		register("users")
		want("/users", nil, "registered after it was swept out")
	})
}

// A service that comes and goes leaves one trace, and is forgotten an hour after it left for the last time.
func TestServiceThatComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New(registry.Config{})
		p, err := New(Config{Registry: reg}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		reg.OnChange(p.Update)
		round := func(name string) {
			t.Helper()
			if err := reg.Register(name, registry.Instance{ID: "1", Addr: "http://127.0.0.1:1"}); err != nil {
				t.Fatal(err)
			}
			if err := reg.Unregister(name, "1", ""); err != nil {
				t.Fatal(err)
			}
		}
		for range 1000 {
			round("users")
			time.Sleep(3 * time.Second)
		}
		if n := len(p.departures); n != 1 {
			t.Errorf("%d departures of one service", n)
		}
		for n := range 3 {
			time.Sleep(61 * time.Minute)
			round(fmt.Sprint("other", n)) // sweeps
			synctest.Wait()
		}
		if p.service("users") != nil {
			t.Error("it is not forgotten")
		}
		if n := len(p.departures); n != 1 {
			t.Errorf("%d departures in the end", n)
		}
	})
}

func TestPrefixRouting(t *testing.T) {
	tests := []struct {
		name   string
		routes string // PREFIX=SERVICE ...
		paths  string // path=service ..., "-" for none
	}{
		{"whole segments", "/echo=e", "/echo=e /echo/=e /echo/x=e /echoes=- /ech=- /=- /x/echo=-"},
		{"the longest wins", "/a=1 /a/b=2 /a/b/c=3", "/a=1 /a/x=1 /a/b=2 /a/b/x=2 /a/bb=1 /a/b/c=3 /a/b/c/d=3 /a/b/cc=2"},
		{"in any order", "/a/b/c=3 /a=1 /a/b=2", "/a=1 /a/b/c/d=3 /a/b/cc=2"},
		{"a slash at the end says nothing", "/a/=1", "/a=1 /a/=1 /a/x=1 /ab=-"},
		{"/ is a prefix too", "/=all /api=api", "/=all /x=all /api=api /api/x=api /apis=all //=all"},
		{"no first segments beside a table", "/api=api", "/api=api /users=- /=-"},
		{"unless asked for", "/api=api /*=", "/api=api /users=users /users/1=users /=-"},
		{"the table comes before them", "/api=other /*=", "/api=other /apis=apis"},
		{"/ leaves them nothing", "/=all /*=", "/users=all"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			table, err := newTestTable(parseRoutes(tt.routes))
			if err != nil {
				t.Fatal(err)
			}
			for pair := range strings.FieldsSeq(tt.paths) {
				path, want, _ := strings.Cut(pair, "=")
				if want == "-" {
					want = ""
				}
				if got := table(&Request{Path: []byte(path)}); got != want {
					t.Errorf("%s goes to %q, want %q", path, got, want)
				}
			}
		})
	}
}

// newTestTable makes a table and returns what names the service of a request.
func newTestTable(routes []Route) (func(*Request) string, error) {
	table, err := newTable(routes, func(string) *route { return &route{} })
	n := &settings{table: table}
	return func(r *Request) string {
		_, name := n.choose(r)
		return name
	}, err
}

func parseRoutes(s string) (routes []Route) {
	for pair := range strings.FieldsSeq(s) {
		prefix, service, _ := strings.Cut(pair, "=")
		routes = append(routes, Route{Prefix: prefix, Service: service})
	}
	return routes
}

func TestBadRoutes(t *testing.T) {
	for _, tt := range []struct{ prefix, service, want string }{
		{"api", "a", "is no path"},
		{"/a*", "a", "is no path"},
		{"/*", "a", "stands alone"},
		{"/a?b", "a", "is no path"},
		{"/a b", "a", "is no path"},
		{"/a%2f", "a", "is no path"},
		{"/api", "", "missing"},
		{"/api", "a/b", "not allowed"},
		{"/taken/", "a", "leads to other already"},
	} {
		_, err := New(Config{Registry: registry.New(registry.Config{}), Routes: []Route{{Prefix: "/taken", Service: "other"}, {Prefix: tt.prefix, Service: tt.service}}}, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "route "+strings.TrimSuffix(tt.prefix, "/")) {
			t.Errorf("%s=%s: %v, want an error that quotes it and says %q", tt.prefix, tt.service, err, tt.want)
		}
	}
}

// The table agrees with a walk over all prefixes.
func FuzzPrefixTable(f *testing.F) {
	f.Add("/echo/x", "/echo=a /=b")
	f.Add("/a/b/c", "/a=1 /a/b=2 /a/b/=3")
	f.Add("//", "/=b /a=c")
	f.Add("/a//b", "/a/=c /a/b=d")
	f.Add("/a/", "")
	f.Fuzz(func(t *testing.T, path, list string) {
		routes := parseRoutes(list)
		table, err := newTestTable(routes)
		if err != nil || !strings.HasPrefix(path, "/") {
			return
		}
		longest, want := -1, ""
		for _, r := range routes {
			prefix := strings.TrimSuffix(r.Prefix, "/")
			if rest, ok := strings.CutPrefix(path, prefix); ok && (rest == "" || rest[0] == '/') && len(prefix) > longest {
				longest, want = len(prefix), r.Service
			}
		}
		if (len(routes) == 0 || strings.Contains(list+" ", "/*= ")) && longest < 0 { // without any it is the rule
			want, _, _ = strings.Cut(path[1:], "/")
		}
		if got := table(&Request{Path: []byte(path)}); got != want {
			t.Errorf("%q by %q goes to %q, want %q", path, list, got, want)
		}
	})
}

func TestPrefixesEndToEnd(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.Routes = parseRoutes("/api=backend /api/v2=next /*=") }, nil)
	for _, name := range []string{"backend", "next", "echo"} {
		g.register(t, name, "1", naming(t, name).url())
	}
	c := g.dial(t)
	for path, want := range map[string]string{"/api/x": "backend", "/api/v2/x?q": "next", "/api/v22": "backend", "/echo/x": "echo"} {
		if m := c.get(path).want(t, 200); m.body != want {
			t.Errorf("%s went to %q, want %q", path, m.body, want)
		}
	}
	c.get("/apis").refused(t, errNoRoute)
	// The whole path goes on: a prefix routes, it rewrites nothing.
	o := answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	g.register(t, "next", "1", o.url())
	c.get("/api/v2/x?q").want(t, 200)
	if got := o.requests()[0].head; !strings.HasPrefix(got, "GET /api/v2/x?q HTTP/1.1\r\n") {
		t.Errorf("the backend got %q", got)
	}
}

// A path that routes elsewhere once its dot segments are resolved is refused; others pass as they are.
func TestPathsThatRouteElsewhere(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", naming(t, "").url())
	g.register(t, "users", "1", refusedAddr(t))
	tests := []struct {
		path string
		want int
	}{
		{"/echo/../users", 400},
		{"/echo/%2e%2e/users", 400},
		{"/echo/%2E./users", 400},
		{"/echo/.%2e/users", 400},
		{"/echo/..%2fusers", 400},
		{"/echo/..%5cusers", 400},
		{`/echo\..\users`, 400},
		{`/echo/x\..\..\users`, 400},
		{"/echo/..;x/users", 400},
		{"/echo/%2e%2e;/users", 400},
		{"/echo/./../users", 400},
		{"/echo/a/b/../../../users", 400},
		{"/echo/a%2f..%2f..%2fusers", 400},
		{"/echo/..", 400},
		{"/echo/../", 400},
		{"/..", 400},
		{"/../echo", 400},
		{"/./echo", 400},
		{"/echo/../../echo", 400},
		{"/echo;x/users", 400},
		{"/%65cho", 400},
		{"/echo%2fx", 400},
		{"/echo/.", 200},
		{"/echo/./x", 200},
		{"/echo/x/../y", 200},
		{"/echo/../echo", 200},
		{"/echo/..x", 200},
		{"/echo/x..", 200},
		{"/echo/...", 200},
		{"/echo/.hidden", 200},
		{"/echo/%2fx", 200},
		{"/echo/a%2fb", 200},
		{"/echo/%", 200},
		{"/echo/%2", 200},
		{"/echo/%zz", 200},
		{"/echo/x;y=1/z", 200},
		{"/echo/%252e%252e/users", 200}, // decoded twice by no one who follows the standards
		{"/echo?/../users", 200},
	}
	c := g.dial(t)
	for _, tt := range tests {
		if got := c.get(tt.path).status(); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.path, got, tt.want)
		}
	}
}

// The same holds for prefixes and for a RouteFunc, which is asked for both readings.
func TestPathsThatLeaveAPrefix(t *testing.T) {
	byPrefix := func(cfg *Config) { cfg.Routes = parseRoutes("/pub=open /pub/secret=closed /=rest") }
	own := func(r *Request) string {
		if strings.HasPrefix(string(r.Path), "/pub/secret") {
			return "closed"
		} else if strings.HasPrefix(string(r.Path), "/pub") {
			return "open"
		}
		return "rest"
	}
	for name, g := range map[string]*gateway{"table": startGateway(t, byPrefix, nil), "func": startGateway(t, nil, own)} {
		t.Run(name, func(t *testing.T) {
			for _, service := range []string{"open", "closed", "rest"} {
				g.register(t, service, "1", naming(t, service).url())
			}
			c := g.dial(t)
			for path, want := range map[string]string{
				"/pub/x/../secret": "400", "/pub/%73ecret": "400", "/pub/../x": "400", "/x/../pub": "400", "/pub%2fsecret": "400",
				"/pub/x/../y": "open", "/pub/secret/..%2fsecret": "closed", "/x/../y": "rest", "/..": "400", "/pub/secret/../secret": "closed",
			} {
				m := c.get(path)
				if got := m.body; got != want && fmt.Sprint(m.status()) != want {
					t.Errorf("%s: %d %q, want %s", path, m.status(), got, want)
				}
			}
		})
	}
}

// What becomes of a path by each policy: a status, or what the backend sees of it. The gateway serves its API and a health
// path of its own, and the services echo, users, ...
func TestAmbiguousPaths(t *testing.T) {
	const bad = "400"
	rows := []struct{ path, refuse, pass, normalize string }{
		// P leads elsewhere
		{"/echo/../users/x", bad, "echo=", "users=/users/x"},
		{"/echo/..%2fusers?/../q=%2e;", bad, "echo=", "users=/users?/../q=%2e;"},
		{"/echo/%2e%2E/users", bad, "echo=", "users=/users"},
		{"/echo/..%5Cusers", bad, "echo=", "users=/users"},
		{"/echo/..;a=b/users", bad, "echo=", "users=/users"},
		{"/%65cho/a%2fb%20c", bad, "404", "echo=/echo/a/b%20c"},
		{"/echo;v=1/a;b", bad, "404", "echo=/echo/a"},
		{"/echo%2fx", bad, "404", "echo=/echo/x"},
		{"/./echo", bad, "404", "echo=/echo"},
		{"/echo/../users?", bad, "echo=", "users=/users?"},
		{"/echo/..", bad, "echo=", "404"},
		{"http://a/echo/../users?x", bad, "echo=/echo/../users?x", "users=/users?x"},

		// P climbs above the root
		{"/..", bad, "404", bad},
		{"/../echo", bad, "404", bad},
		{"/echo/../../echo", bad, "echo=", bad},
		{"/echo/%2e%2e/%2e%2e/echo", bad, "echo=", bad},
		{"/echo/x/..\\..\\..\\echo", bad, "echo=", bad},

		// backslashes and NULs
		{"/echo/a\\b", bad, "echo=", "echo=/echo/a/b"},
		{"/echo\\..\\users", bad, "404", "users=/users"},
		{"/echo/a\\b;c/./d?\\", bad, "echo=", "echo=/echo/a/b/d?\\"},
		{"/echo/%00", bad, "echo=", bad},
		{"/echo/a.php%00.jpg", bad, "echo=", bad},
		{"/echo/%%00", bad, "echo=", bad},
		{"/%65cho/%00", bad, "404", bad},

		// P would have to be read again
		{"/x/../echo/%%32e%%32e/users", bad, "404", bad},

		// the gateway's own
		{"/%72egister", bad, "404", bad},
		{"/register;x", bad, "404", bad},
		{"/services%2fecho", bad, "404", bad},
		{"/echo/../register", bad, "echo=", bad},
		{"/echo/../services/echo", bad, "echo=", bad},
		{"/services/../echo", bad, bad, bad},
		{"/services/..%2f..%2fecho", bad, bad, bad},
		{"/-/%68ealth", bad, "404", bad},
		{"/-/x/../health", bad, "404", bad},
		{"/-\\health", bad, "404", bad},
		{"/services/%65cho", "200", "200", "200"}, // the API's, both ways
		{"/services/echo;x/..", bad, bad, bad},    // which refuses such names
		{"/services/a\\b", bad, bad, bad},
		{"/services/%00", bad, bad, bad},

		// as it came
		{"/echo/a/../b", "echo=", "echo=", "echo="},
		{"/echo/../echo/x", "echo=", "echo=", "echo="},
		{"/echo/.", "echo=", "echo=", "echo="},
		{"/echo/%2e%2f%5c%41", "echo=", "echo=", "echo="},
		{"/echo/x;y=1/z", "echo=", "echo=", "echo="},
		{"/echo/%252e%252e/users", "echo=", "echo=", "echo="},
		{"/echo/%%32e%%32e/users", "echo=", "echo=", "echo="},
		{"/echo/%c0%ae%c0%ae/users", "echo=", "echo=", "echo="},
		{"/echo/%u002e%u002e/users", "echo=", "echo=", "echo="},
		{"/echo/\xc0\xae\xff\x80/users", "echo=", "echo=", "echo="},
		{"/echo/%zz%", "echo=", "echo=", "echo="},
		{"/echo/%2500", "echo=", "echo=", "echo="},
		{"/echo//..//x", "echo=", "echo=", "echo="},
		{"/echo/\xe2\x88\x95..\xe2\x88\x95users", "echo=", "echo=", "echo="},
		{"/echo?/../users\\%00;%2e%2e", "echo=", "echo=", "echo="},
		{"//echo/..://x", "404", "404", "404"},
	}
	for _, policy := range []PathPolicy{"", PassPaths, NormalizePaths} {
		g := startWithAPI(t, func(cfg *Config) { cfg.AmbiguousPaths, cfg.HealthPath = policy, "/-/health" })
		origins := map[string]*origin{}
		for _, name := range []string{"echo", "users"} {
			origins[name] = naming(t, name)
			g.register(t, name, "1", origins[name].url())
		}
		for _, row := range rows {
			want := map[PathPolicy]string{"": row.refuse, PassPaths: row.pass, NormalizePaths: row.normalize}[policy]
			m := g.dial(t).get(row.path)
			name, path, goes := strings.Cut(want, "=")
			if path == "" {
				path = strings.TrimPrefix(row.path, "http://a")
			} else if policy == PassPaths {
				path = strings.TrimPrefix(path, "http://a")
			}
			switch {
			case !goes:
				if fmt.Sprint(m.status()) != want {
					t.Errorf("%q by %q: %d, want %s", row.path, policy, m.status(), want)
				}
			case m.body != name:
				t.Errorf("%q by %q: %d %q, want it to go to %s", row.path, policy, m.status(), m.body, name)
			default:
				seen := origins[name].requests()
				if head := seen[len(seen)-1].head; !strings.HasPrefix(head, "GET "+path+" HTTP/1.1\r\n") {
					t.Errorf("%q by %q went on as %q", row.path, policy, head)
				}
			}
		}
	}
	_, err := New(Config{Registry: registry.New(registry.Config{}), AmbiguousPaths: "allow"}, nil)
	if err == nil || !strings.Contains(err.Error(), `Config.AmbiguousPaths is "allow"`) {
		t.Errorf("another policy: %v", err)
	}
}

// A target that looks like a URL behind two slashes is a path, and the Host field says which host is meant.
func TestSlashesAreNoAuthority(t *testing.T) {
	hosts := make(chan string, 1)
	g := startGateway(t, nil, func(r *Request) string {
		hosts <- string(r.Host) + " " + string(r.Path) + " " + string(r.Query)
		return "echo"
	})
	o := naming(t, "ok")
	g.register(t, "echo", "1", o.url())
	for target, want := range map[string]string{
		"//evil.example/x://y":   "a //evil.example/x://y ",
		"//evil.example:80?x://": "a //evil.example:80 x://",
		"/http://evil.example/":  "a /http://evil.example/ ",
		"///":                    "a /// ",
	} {
		g.do(t, "GET "+target+" HTTP/1.1\r\nHost: a\r\n\r\n").want(t, 200)
		if got := <-hosts; got != want {
			t.Errorf("%s: routed as %q, want %q", target, got, want)
		}
		seen := o.requests()
		if head := seen[len(seen)-1].head; !strings.HasPrefix(head, "GET "+target+" HTTP/1.1\r\nHost: a\r\n") {
			t.Errorf("%s went on as %q", target, head)
		}
	}
}

var decoded = regexp.MustCompile(`%(?i:2[def]|3\d|4[1-9a-f]|5[\dacf]|6[1-9a-f]|7[\dae])`)

// plainly is canonical, step by step.
func plainly(path string) (string, bool) {
	path = decoded.ReplaceAllStringFunc(path, func(s string) string {
		c, _ := url.PathUnescape(s)
		return c
	})
	segments := strings.Split(strings.ReplaceAll(path, `\`, "/"), "/")[1:]
	var stack []string
	for i, s := range segments {
		s, _, _ = strings.Cut(s, ";")
		switch s {
		case "..":
			if len(stack) == 0 {
				return "", false
			}
			stack = stack[:len(stack)-1]
		case ".":
		default:
			stack = append(stack, s)
			continue
		}
		if i == len(segments)-1 {
			stack = append(stack, "")
		}
	}
	return "/" + strings.Join(stack, "/"), true
}

// What comes out of canonical is what its description says, stays as it is, and has nothing left to resolve.
func FuzzCanonical(f *testing.F) {
	for _, seed := range []string{"/", "/echo/../users", "/a/%2e%2e/b", `/a\..\b`, "/a;b/../c", "/.", "/..", "/a/.", "//..", "/%2f%2E./x", "/a/..;/", "/%5c%5C", "/%%32e", "/a;%2f..", "/;/..", "/%3b/%25/%00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if !strings.HasPrefix(path, "/") {
			return
		}
		out, ok := canonical([]byte("kept"), []byte(path))
		got, kept := strings.CutPrefix(string(out), "kept")
		want, wantOK := plainly(path)
		if !kept || ok != wantOK || ok && got != want {
			t.Fatalf("%q became %q, %v, want %q, %v", path, out, ok, want, wantOK)
		}
		if !ok {
			return
		}
		for segment := range strings.SplitSeq(got, "/") {
			if segment == "." || segment == ".." || strings.ContainsAny(segment, `\;`) {
				t.Fatalf("%q became %q, which has the segment %q", path, got, segment)
			}
		}
		if !strings.ContainsAny(got, "%") {
			again, ok := canonical(nil, []byte(got))
			if !ok || string(again) != got {
				t.Fatalf("%q became %q, and that %q", path, got, again)
			}
		}
		if !strings.ContainsAny(path, `%\;`) && !strings.Contains(path, "//") && got != "/" && pathpkg.Clean(path) != strings.TrimSuffix(got, "/") {
			t.Fatalf("%q became %q, path.Clean has %q", path, got, pathpkg.Clean(path))
		}
		// What needs no closer look reads in one way only.
		var r Request
		if r.startLine([]byte("GET "+path+" HTTP/1.1")) == nil && !r.unclear {
			if p, ok := canonical(nil, r.Path); !ok || !bytes.Equal(p, r.Path) {
				t.Fatalf("%q is %q, and nobody looks", r.Path, p)
			}
		}
	})
}

// A RouteFunc sees the raw request and decides alone.
func TestRouteFunc(t *testing.T) {
	seen := make(chan Request, 1)
	route := func(r *Request) string {
		if string(r.Path) == "/boom" {
			panic("a bug in a RouteFunc")
		}
		if r.unclear { // asked twice then; the second time with another path
			return "echo"
		}
		select {
		case seen <- Request{
			Method: []byte(string(r.Method)), Host: []byte(string(r.Host)), Path: []byte(string(r.Path)), Query: []byte(string(r.Query)),
			Client: r.Client, lines: []byte(string(r.Header("x-tenant"))),
		}:
		default:
		}
		if string(r.Host) == "users.example" {
			return "users"
		}
		return string(r.Header("X-Tenant"))
	}
	g := startGateway(t, func(cfg *Config) { cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }, route)
	g.register(t, "users", "1", naming(t, "users").url())
	g.register(t, "blue", "1", naming(t, "blue").url())

	c := g.dial(t)
	c.send("PUT /a/b?c=%2F&d HTTP/1.1\r\nHost: users.example\r\nx-TENANT:  blue \r\nX-Forwarded-For: 192.0.2.7\r\nContent-Length: 0\r\n\r\n")
	if m := c.read(false).want(t, 200); m.body != "users" {
		t.Errorf("routed to %q by its Host", m.body)
	}
	r := <-seen
	got := fmt.Sprintf("%s %s %s %s %s %s", r.Method, r.Host, r.Path, r.Query, r.Client, r.lines)
	if want := "PUT users.example /a/b c=%2F&d 192.0.2.7 blue"; got != want {
		t.Errorf("the RouteFunc saw %q, want %q", got, want)
	}
	if m := c.get("/", "X-Tenant: blue").want(t, 200); m.body != "blue" {
		t.Errorf("routed to %q by its field", m.body)
	}
	c.get("/").refused(t, errNoRoute)
	c.get("/", "X-Tenant: nobody").refused(t, errNoRoute)
	c.get("/%2e%2e%2e", "X-Tenant: nobody").refused(t, errNoInstance)
}

// A panic in a RouteFunc costs one request, not the process.
func TestPanicInRouteFunc(t *testing.T) {
	g := startGateway(t, nil, func(r *Request) string {
		if string(r.Path) == "/boom" {
			panic("a bug in a RouteFunc")
		}
		return "echo"
	})
	g.register(t, "echo", "1", naming(t, "fine").url())
	other := g.dial(t)
	other.get("/").want(t, 200)
	c := g.dial(t)
	c.get("/").want(t, 200)
	c.get("/boom").refused(t, errInternal)
	c.closed()
	other.get("/").want(t, 200)
	g.dial(t).get("/").want(t, 200)
	if g.logged("panic in a request", "a bug in a RouteFunc", "route_test.go") != 1 {
		t.Errorf("the log has no line with the panic and its stack: %s", g.logs)
	}
}

// The 404 says which routes there are only to who may read /services.
func TestRoutesInNotFound(t *testing.T) {
	mayRead := func(ctx *fasthttp.RequestCtx) bool { return string(ctx.Request.Header.Peek("X-Key")) == "right" }
	tests := []struct {
		name, routes, services, want string
	}{
		{"first segments", "", "echo users", "no service is at this path; known: /echo, /users\n"},
		{"none", "", "", "no service is at this path; none is registered\n"},
		{"a table", "/api=backend /img=pictures", "backend", "no service is at this path; known: /api, /img\n"},
		{"a table and first segments", "/api=backend /*=", "backend users", "no service is at this path; known: /api, /*\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { cfg.MayRead = mayRead; cfg.Routes = parseRoutes(tt.routes) }, nil)
			for service := range strings.FieldsSeq(tt.services) {
				g.register(t, service, "1", refusedAddr(t))
			}
			c := g.dial(t)
			if m := c.get("/nowhere", "X-Key: right").refused(t, errNoRoute); m.body != "404 Not Found: "+tt.want {
				t.Errorf("who may read is told %q", m.body)
			}
			if m := c.get("/nowhere", "X-Key: wrong").refused(t, errNoRoute); m.body != "404 Not Found: no service is at this path\n" {
				t.Errorf("who may not read is told %q", m.body)
			}
		})
	}
	g := startGateway(t, nil, nil) // nobody may
	g.register(t, "echo", "1", refusedAddr(t))
	if m := g.dial(t).get("/nowhere").refused(t, errNoRoute); strings.Contains(m.body, "/echo") {
		t.Errorf("told %q without MayRead", m.body)
	}
}

// A gateway with many services names some.
func TestManyRoutesInNotFound(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.MayRead = func(*fasthttp.RequestCtx) bool { return true } }, nil)
	for i := range 60 {
		g.register(t, fmt.Sprintf("s%02d", i), "1", "http://127.0.0.1:1")
	}
	m := g.dial(t).get("/nowhere").refused(t, errNoRoute)
	if !strings.Contains(m.body, "/s49, ...") || strings.Contains(m.body, "/s50") {
		t.Errorf("told %q, want the first 50", m.body)
	}
}
