package proxy

import (
	"strings"
	"testing"

	"kerberos/registry"
)

// CONNECT and TRACE go on where they are allowed, each for itself, in one form only.
func TestAllowedMethods(t *testing.T) {
	allowing := func(methods ...string) *gateway {
		g := startGateway(t, func(cfg *Config) {
			cfg.NoVia, cfg.AllowMethods = true, methods
			cfg.Routes = parseRoutes("/=all /echo=echo")
		}, nil)
		return g
	}
	both, trace, connect := allowing("CONNECT", "TRACE"), allowing("TRACE"), allowing("CONNECT")
	o := answering(t, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
	for _, g := range []*gateway{both, trace, connect} {
		g.register(t, "echo", "1", o.url())
		g.register(t, "all", "1", o.url()+"/base")
	}
	fields := func(host string) string { return strings.Replace(ours(host, 1), "Via: 1.1 {via}\r\n", "", 1) }
	const usual = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
	for _, row := range []struct {
		name    string
		g       *gateway
		request string
		status  int
		seen    string // by the backend
		allow   string
		closed  bool
	}{
		{"TRACE", both, "TRACE /echo HTTP/1.1\r\nHost: a\r\n\r\n", 403, "TRACE /echo HTTP/1.1\r\nHost: a\r\n" + fields("a") + "\r\n", "", false},
		{"TRACE with hops", both, "TRACE /echo HTTP/1.1\r\nHost: a\r\nMax-Forwards: 3\r\n\r\n", 403, "TRACE /echo HTTP/1.1\r\nHost: a\r\n" + fields("a") + "Max-Forwards: 2\r\n\r\n", "", false},
		{"TRACE without hops", both, "TRACE /echo HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", 405, "", "CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE", false},
		{"trace", both, "trace /echo HTTP/1.1\r\nHost: a\r\n\r\n", 405, "", "CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE", false},
		{"TRACE with a body", both, "TRACE /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 400, "", "", false},
		{"TRACE with chunks", both, "TRACE /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "", "", true},
		{"TRACE alone", trace, "TRACE /echo HTTP/1.1\r\nHost: a\r\n\r\n", 403, "TRACE /echo HTTP/1.1\r\nHost: a\r\n" + fields("a") + "\r\n", "", false},
		{"CONNECT where only TRACE is", trace, "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405, "", usual + ", TRACE", true},
		{"TRACE where only CONNECT is", connect, "TRACE /echo HTTP/1.1\r\nHost: a\r\n\r\n", 405, "", "CONNECT, " + usual, false},
		{"OPTIONS *", connect, "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 200, "", "CONNECT, " + usual, false},
		{"CONNECT", connect, "CONNECT b.example:443 HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n\r\n", 403, "CONNECT b.example:443 HTTP/1.1\r\nHost: b.example:443\r\nX-A: 1\r\n" + fields("b.example:443") + "\r\n", "", true},
		{"CONNECT to IPv6", connect, "CONNECT [::1]:443 HTTP/1.1\r\nHost: a\r\n\r\n", 403, "CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n" + fields("[::1]:443") + "\r\n", "", true},
		{"connect", both, "connect a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405, "", "CONNECT, " + usual + ", TRACE", true},
		{"CONNECT with a path", both, "CONNECT /echo HTTP/1.1\r\nHost: a\r\n\r\n", 400, "", "", true},
		{"CONNECT with a URL", both, "CONNECT http://a:443/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "", "", true},
		{"CONNECT with a body", both, "CONNECT a:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 400, "", "", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := len(o.requests())
			c := row.g.dial(t)
			c.send(row.request)
			if row.closed {
				c.send(smuggled) // what a client sends into a tunnel is no request
			}
			m := c.read(false).want(t, row.status)
			if m.field("Allow") != row.allow || (m.field("Connection") == "close") != row.closed {
				t.Errorf("head:\n%s", m.head)
			}
			if row.closed {
				c.closed()
			} else {
				c.get("/echo").want(t, 403)
			}
			if seen := o.requests()[before:]; row.seen != "" && (len(seen) == 0 || seen[0].head != row.seen) || row.seen == "" && len(seen) > 1 {
				t.Errorf("the backend saw %+v", seen)
			}
		})
	}
	for _, m := range o.requests() {
		if strings.Contains(m.head, "smuggled") {
			t.Error("what followed a CONNECT was served")
		}
	}
}

// Without a route for everything nothing leads to a CONNECT's service.
func TestConnectNeedsARoute(t *testing.T) {
	allow := func(cfg *Config) { cfg.AllowMethods = []string{"CONNECT"} }
	o, came := untouched(t)
	byPrefix := startGateway(t, func(cfg *Config) { allow(cfg); cfg.Routes = parseRoutes("/echo=echo /*=") }, nil)
	for _, g := range []*gateway{startGateway(t, allow, nil), byPrefix} {
		g.register(t, "echo", "1", o.url())
		g.do(t, "CONNECT echo:80 HTTP/1.1\r\nHost: echo\r\n\r\n").refused(t, errNoRoute)
	}
	if n := came.Load(); n != 0 {
		t.Errorf("%d went on", n)
	}
	byHost := startGateway(t, allow, func(r *Request) string {
		if string(r.Method) == "CONNECT" && len(r.Path) == 0 {
			return string(r.Host[:4])
		}
		return ""
	})
	byHost.register(t, "echo", "1", answering(t, "HTTP/1.1 407 x\r\nContent-Length: 0\r\n\r\n").url())
	byHost.do(t, "CONNECT echo:80 HTTP/1.1\r\nHost: other\r\n\r\n").want(t, 407)
}

func TestBadMethods(t *testing.T) {
	for _, method := range []string{"GET", "connect", ""} {
		_, err := New(Config{Registry: registry.New(registry.Config{}), AllowMethods: []string{method}}, nil)
		if err == nil || !strings.Contains(err.Error(), "Config.AllowMethods") {
			t.Errorf("%q: %v", method, err)
		}
	}
}
