package access

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// TestMain also is the program that a test runs as another user: it sends its standard input to the address in the
// environment and prints what comes back.
func TestMain(m *testing.M) {
	if addr := os.Getenv("ACCESS_TEST_SEND_TO"); addr != "" {
		if err := sendStdin(addr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func sendStdin(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(c, os.Stdin); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, c)
	return err
}

func newRule(t testing.TB, cfg Config) *Rule {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func check(t testing.TB, cfg Config, ctx *fasthttp.RequestCtx) *Refusal {
	t.Helper()
	_, no := newRule(t, cfg).admit(ctx)
	return no
}

// gateway is a server of the registration API behind a rule.
type gateway struct {
	addr string
	reg  *registry.Registry
}

func newGateway(t testing.TB, cfg Config, listen string) gateway {
	t.Helper()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Skipf("cannot listen on %s: %v", listen, err)
	}
	g := gateway{ln.Addr().String(), registry.New(registry.Config{})}
	s := &fasthttp.Server{Handler: newRule(t, cfg).Wrap(registry.NewHandler(g.reg, nil)), ErrorHandler: registry.ErrorHandler, DisablePreParseMultipartForm: true}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		_ = s.Shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return g
}

const body = `{"service":"echo","id":"a","addr":"http://10.0.0.1:80"}`

// post is a registration whose head ends with the given lines.
func post(lines ...string) string {
	return fmt.Sprintf("POST /register HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n\r\n%s",
		len(body), strings.Join(lines, "\r\n"), body)
}

type answer struct {
	status int
	header http.Header
	detail string
}

func send(t testing.TB, addr, request string) answer {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	return readAnswer(t, c)
}

func readAnswer(t testing.TB, r io.Reader) answer {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{status: resp.StatusCode, header: resp.Header, detail: string(text)}
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		var p struct {
			Status int
			Detail string
		}
		if err := json.Unmarshal(text, &p); err != nil || p.Status != a.status {
			t.Errorf("problem %s with status %d: %v", text, a.status, err)
		}
		a.detail = p.Detail
	}
	return a
}

// want checks an answer to a registration: says is empty if it must have been let in, else part of the refusal.
func (g gateway) want(t testing.TB, name string, got answer, says string) {
	t.Helper()
	registered := g.reg.Snapshot("echo") != nil
	if registered {
		if err := g.reg.Unregister("echo", "a", ""); err != nil {
			t.Fatal(err)
		}
	}
	if says == "" {
		if got.status != 204 || !registered {
			t.Errorf("%s: %d %s, registered %v; want it let in", name, got.status, got.detail, registered)
		}
		return
	}
	if got.status != 403 || registered || !strings.Contains(got.detail, says) {
		t.Errorf("%s: %d %q, registered %v; want 403 and %q", name, got.status, got.detail, registered, says)
	}
	if !strings.Contains(got.detail, "--token") {
		t.Errorf("%s: %q does not name --token", name, got.detail)
	}
}

func TestWithoutToken(t *testing.T) {
	g := newGateway(t, Config{}, "127.0.0.1:0")
	const host = "Host: localhost"
	tests := []struct{ name, request, says string }{
		{"curl", post(host, "User-Agent: curl/8", "Accept: */*"), ""},
		{"Host with port", post("Host: localhost:8080"), ""},
		{"Host in capitals", post("Host: LOCALHOST"), ""},
		{"Host an address", post("Host: 127.0.0.1:9901"), ""},
		{"Host any loopback address", post("Host: 127.9.9.9"), ""},
		{"Host IPv6", post("Host: [::1]:8080"), ""},
		{"harmless fields", post(host, "X-Forward: a", "Viaduct: b", "X-Request-Id: c", "Forwarded-By: d", "Referer: http://x/", "Cookie: a=b"), ""},
		{"a useless Authorization", post(host, "Authorization: Bearer x"), ""},

		{"HTTP/1.0", strings.Replace(post(host), "HTTP/1.1", "HTTP/1.0", 1), "HTTP/1.0"},
		{"HTTP/1.0 kept alive", strings.Replace(post(host, "Connection: keep-alive"), "HTTP/1.1", "HTTP/1.0", 1), "HTTP/1.0"},
		{"HTTP/1.0 without Host", strings.Replace(post("X: y"), "HTTP/1.1", "HTTP/1.0", 1), "HTTP/1.0"},
		{"absolute form", strings.Replace(post(host), "/register", "http://localhost/register", 1), "not a path"},
		{"absolute form elsewhere", strings.Replace(post(host), "/register", "http://evil.example/register", 1), "not a path"},

		{"Host elsewhere", post("Host: evil.example"), "Host"},
		{"Host elsewhere, rebound", post("Host: evil.example:8080"), "Host"},
		{"Host below localhost", post("Host: app.localhost"), "Host"},
		{"Host with localhost in it", post("Host: localhost.evil.example"), "Host"},
		{"Host another address", post("Host: 10.0.0.1"), "Host"},
		{"Host unspecified", post("Host: 0.0.0.0:8080"), "Host"},
		{"Host short", post("Host: 127.1"), "Host"},

		{"Forwarded", post(host, "Forwarded: for=127.0.0.1"), "field Forwarded"},
		{"X-Forwarded-For", post(host, "X-Forwarded-For: 127.0.0.1"), "field X-Forwarded-For"},
		{"X-Forwarded-For of three", post(host, "X-Forwarded-For: 127.0.0.1, 127.0.0.1, ::1"), "field X-Forwarded-For"},
		{"X-Forwarded-Proto, small", post(host, "x-forwarded-proto: http"), "field X-Forwarded-Proto"},
		{"X-FORWARDED-ANYTHING", post(host, "X-FORWARDED-ANYTHING: 1"), "field X-Forwarded-Anything"},
		{"X-Forwarded-For, empty", post(host, "X-Forwarded-For:"), "field X-Forwarded-For"},
		{"X-Real-IP", post(host, "X-Real-IP: 127.0.0.1"), "field X-Real-Ip"},
		{"Via", post(host, "Via: 1.1 proxy"), "field Via"},
		{"via", post(host, "via: 1.1 proxy"), "field Via"},
		{"Origin", post(host, "Origin: http://localhost"), "field Origin"},
		{"Origin null", post(host, "Origin: null"), "field Origin"},
		{"Sec-Fetch-Site", post(host, "Sec-Fetch-Site: same-origin"), "field Sec-Fetch-Site"},
		{"sec-fetch-mode", post(host, "sec-fetch-mode: cors"), "field Sec-Fetch-Mode"},
	}
	for _, tt := range tests {
		g.want(t, tt.name, send(t, g.addr, tt.request), tt.says)
	}

	// Reading and every other call are under the same rule.
	for _, target := range []string{"GET /services", "GET /services/echo", "GET /services/echo/a", "PUT /services/echo/a", "DELETE /services/echo/a", "DELETE /register", "GET /other", "OPTIONS /register"} {
		got := send(t, g.addr, target+" HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
		g.want(t, target, got, "Host")
	}
	if got := send(t, g.addr, "GET /services HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); got.status != 200 {
		t.Errorf("reading: %d %s", got.status, got.detail)
	}
}

// A connection over IPv6, or over a listener for both, is judged alike.
func TestLoopbackAddresses(t *testing.T) {
	for listen, dial := range map[string]string{"[::1]:0": "[::1]", "[::]:0": "127.0.0.1", "127.0.0.2:0": "127.0.0.2"} {
		g := newGateway(t, Config{}, listen)
		_, port, _ := net.SplitHostPort(g.addr)
		to := dial + ":" + port
		g.want(t, listen, send(t, to, post("Host: localhost")), "")
		g.want(t, listen, send(t, to, post("Host: evil.example")), "Host")
	}
}

func TestConfigs(t *testing.T) {
	nets := func(s ...string) (out []netip.Prefix) {
		for _, p := range s {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	good := post("Host: localhost")
	tests := []struct {
		name          string
		cfg           Config
		request, says string
	}{
		{"trusted proxies", Config{TrustedProxies: true}, good, "--trusted-proxies"},
		{"trusted proxies and explicit networks", Config{TrustedProxies: true, AllowSet: true, Allow: nets("127.0.0.0/8")}, good, "--trusted-proxies"},
		{"none", Config{AllowSet: true, AllowNone: true}, good, "--api-allow none"},
		{"other networks", Config{AllowSet: true, Allow: nets("10.0.0.0/8", "::1/128")}, good, "127.0.0.1 is in none of the networks"},
		{"explicit loopback", Config{AllowSet: true, Allow: nets("127.0.0.0/8", "::1/128")}, good, ""},
		{"everybody", Config{AllowSet: true, Allow: nets("0.0.0.0/0", "::/0")}, good, ""},
		{"explicit loopback, Host elsewhere", Config{AllowSet: true, Allow: nets("127.0.0.0/8")}, post("Host: evil.example"), "Host"},
		{"explicit loopback, forwarded", Config{AllowSet: true, Allow: nets("127.0.0.0/8")}, post("Host: localhost", "Via: x"), "Via"},
	}
	for _, tt := range tests {
		g := newGateway(t, tt.cfg, "127.0.0.1:0")
		g.want(t, tt.name, send(t, g.addr, tt.request), tt.says)
	}
}

// wantHint checks that --api-allow is named where it would let this very request in, and nowhere else.
func wantHint(t *testing.T, name string, cfg Config, ctx *fasthttp.RequestCtx, no *Refusal) {
	t.Helper()
	if no == nil {
		return
	}
	cfg.Allow, cfg.AllowNone, cfg.AllowSet = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}, false, true
	helps := check(t, cfg, ctx) == nil
	if named := strings.Contains(no.Detail, "or name the networks"); named != helps {
		t.Errorf("%s: %q; --api-allow would help: %v", name, no.Detail, helps)
	}
}

func TestHint(t *testing.T) {
	here, elsewhere := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, &net.TCPAddr{IP: net.IPv4(10, 1, 1, 1)}
	hinted := 0
	for _, cfg := range []Config{{}, {TrustedProxies: true}, {AllowNone: true, AllowSet: true}, {AllowNone: true, AllowSet: true, TrustedProxies: true}} {
		for _, peer := range []net.Addr{here, elsewhere, &net.UnixAddr{Name: "x", Net: "unix"}} {
			for _, host := range []string{"localhost", "evil.example"} {
				for _, field := range []string{"Accept", "Via"} {
					var req fasthttp.Request
					req.SetRequestURI("/services")
					req.Header.SetHost(host)
					req.Header.Set(field, "x")
					var ctx fasthttp.RequestCtx
					ctx.Init(&req, peer, nil)
					no := check(t, cfg, &ctx)
					wantHint(t, fmt.Sprintf("%+v, %v, %s, %s", cfg, peer, host, field), cfg, &ctx, no)
					if no != nil && strings.Contains(no.Detail, "or name the networks") {
						hinted++
					}
				}
			}
		}
	}
	if hinted == 0 {
		t.Error("nobody is told of --api-allow")
	}
}

// Peers elsewhere: they may use any Host, but not speak for others either.
func TestRemotePeers(t *testing.T) {
	office := Config{AllowSet: true, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}}
	tests := []struct {
		name  string
		cfg   Config
		peer  net.Addr
		field string
		says  string
	}{
		{"by default", Config{}, &net.TCPAddr{IP: net.IPv4(10, 1, 1, 1)}, "", "10.1.1.1 is in none"},
		{"allowed", office, &net.TCPAddr{IP: net.IPv4(10, 1, 1, 1)}, "", ""},
		{"allowed, mapped", office, &net.TCPAddr{IP: net.ParseIP("::ffff:10.1.1.1")}, "", ""},
		{"allowed 6", office, &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Zone: "eth0"}, "", ""},
		{"not allowed", office, &net.TCPAddr{IP: net.IPv4(11, 1, 1, 1)}, "", "11.1.1.1 is in none"},
		{"loopback not among them", office, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, "", "127.0.0.1 is in none"},
		{"allowed, but forwarding", office, &net.TCPAddr{IP: net.IPv4(10, 1, 1, 1)}, "X-Forwarded-For", "X-Forwarded-For"},
		{"allowed, but a browser", office, &net.TCPAddr{IP: net.IPv4(10, 1, 1, 1)}, "Origin", "Origin"},
		{"no IP address", Config{}, &net.UnixAddr{Name: "x", Net: "unix"}, "", "no IP address"},
	}
	for _, tt := range tests {
		var req fasthttp.Request
		req.SetRequestURI("/services")
		req.Header.SetHost("gateway.example")
		if tt.field != "" {
			req.Header.Set(tt.field, "x")
		}
		var ctx fasthttp.RequestCtx
		ctx.Init(&req, tt.peer, nil)
		no := check(t, tt.cfg, &ctx)
		wantHint(t, tt.name, tt.cfg, &ctx, no)
		if (no == nil) != (tt.says == "") || no != nil && (no.Status != 403 || !strings.Contains(no.Detail, tt.says)) {
			t.Errorf("%s: %+v; want %q", tt.name, no, tt.says)
		}
	}
}

func TestToken(t *testing.T) {
	// All that would keep a request out without a token does not matter with one.
	g := newGateway(t, Config{Token: "s3cret", TrustedProxies: true, AllowNone: true, AllowSet: true}, "127.0.0.1:0")
	in := []string{
		post("Host: localhost", "Authorization: Bearer s3cret"),
		post("Host: evil.example", "authorization: bearer s3cret", "Via: x", "Origin: http://page", "X-Forwarded-For: 1.2.3.4"),
		post("Host: localhost", "Authorization: BEARER   s3cret "),
		strings.Replace(post("Host: localhost", "Authorization: Bearer s3cret"), "HTTP/1.1", "HTTP/1.0", 1),
		strings.Replace(post("Host: localhost", "Authorization: Bearer s3cret"), "/register", "http://localhost/register", 1),
	}
	for _, request := range in {
		g.want(t, request, send(t, g.addr, request), "")
	}
	for lines, says := range map[string]string{
		"X: y":                                "one Authorization field, not 0",
		"Authorization: Bearer wrong":         "not the gateway's",
		"Authorization: Bearer s3cre":         "not the gateway's",
		"Authorization: Bearer s3cret2":       "not the gateway's",
		"Authorization: Bearer S3CRET":        "not the gateway's",
		"Authorization: Bearer s3cret s3cret": "not the gateway's",
		"Authorization: Bearer":               "not the gateway's",
		"Authorization: Bearer ":              "not the gateway's",
		"Authorization: s3cret":               "Bearer scheme",
		"Authorization: Basic s3cret":         "Bearer scheme",
		"Authorization:":                      "Bearer scheme",
		"Authorization: Bearer s3cret\r\nAuthorization: Bearer s3cret": "not 2",
		"Proxy-Authorization: Bearer s3cret":                           "not 0",
		"Cookie: Authorization=s3cret":                                 "not 0",
	} {
		g := newGateway(t, Config{Token: "s3cret"}, "127.0.0.1:0") // each its own, since so many would be too many
		got := send(t, g.addr, post("Host: localhost", lines))
		if got.status != 401 || got.header.Get("WWW-Authenticate") != `Bearer realm="kerberos"` || !strings.Contains(got.detail, says) || !strings.Contains(got.detail, "--token") {
			t.Errorf("%s: %d %v %q; want 401 and %q", lines, got.status, got.header, got.detail, says)
		}
		if strings.Contains(got.detail, "s3cre") || g.reg.Snapshot("echo") != nil {
			t.Errorf("%s: registered %v, answered %q", lines, g.reg.Snapshot("echo") != nil, got.detail)
		}
	}
	if got := send(t, g.addr, "GET /services HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); got.status != 401 {
		t.Errorf("reading without the token: %d", got.status)
	}
}

// The Rule keeps its own copy of the networks.
func TestNewCopies(t *testing.T) {
	cfg := Config{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, AllowSet: true}
	r := newRule(t, cfg)
	cfg.Allow[0] = netip.MustParsePrefix("0.0.0.0/0")
	var ctx fasthttp.RequestCtx
	ctx.Init(&fasthttp.Request{}, &net.TCPAddr{IP: net.IPv4(11, 0, 0, 1)}, nil)
	if _, no := r.admit(&ctx); no == nil {
		t.Error("the caller's copy of the Config changes the rule")
	}
}

// A Host that is let in is localhost or a loopback address to others who read it, too.
func FuzzLoopbackHost(f *testing.F) {
	for _, s := range []string{"localhost", "LocalHost:80", "127.0.0.1:8080", "[::1]:1", "[::ffff:127.0.0.1]", "127.1", "localhost.", "[::1%lo]",
		"[127.0.0.1]", "::1", "localhost:", "[::1]x", "localhost@evil", "localhost:80:80", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		if !loopbackHost(host) {
			return
		}
		u, err := url.Parse("http://" + host)
		if err != nil || u.Host != host {
			t.Fatalf("%q is let in; url.Parse: %v, %v", host, u, err)
		}
		if ip, err := netip.ParseAddr(u.Hostname()); !strings.EqualFold(u.Hostname(), "localhost") && (err != nil || !ip.Unmap().IsLoopback()) {
			t.Fatalf("%q is let in", host)
		}
	})
}

func TestLoopbackHost(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:1": true, "127.0.0.1": true, "[::1]": true, "[::1]:65535": true, "[::ffff:127.0.0.1]:1": true,
		"": false, ":80": false, "localhost.": false, "localhost:": false, "localhost:x": false, "localhost:65536": false, "::1": false,
		"[::1": false, "[::1]x": false, "[::1]:": false, "[localhost]": false, "[127.0.0.1]": false, "[::1%lo]": false, "localhost:80:80": false,
		"user@localhost": false, "127.0.0.1.evil.example": false, "[::2]": false, "10.0.0.1": false, "127.0.0.01": false, "2130706433": false,
	} {
		if got := loopbackHost(host); got != want {
			t.Errorf("loopbackHost(%q) = %v", host, got)
		}
	}
}
