package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// serve runs a server on a free port until the test ends and returns its address.
func serve(t *testing.T, cfg Config, wrap func(net.Listener) net.Listener) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Log = slog.New(slog.DiscardHandler)
	s := New(cfg)
	served := make(chan error, 1)
	go func() { served <- s.Serve(wrap(ln)) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return ln.Addr().String()
}

func plain(ln net.Listener) net.Listener { return ln }

// exchange sends raw bytes and reads one response.
func exchange(t *testing.T, addr, raw string) (*http.Response, string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(raw, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

func TestPaths(t *testing.T) {
	var ready atomic.Bool
	api := func(ctx *fasthttp.RequestCtx) {
		if ctx.IsDelete() {
			panic("a defect")
		}
		ctx.SetBodyString("the API")
	}
	says := func(text string) fasthttp.RequestHandler {
		return func(ctx *fasthttp.RequestCtx) { ctx.SetBodyString(text) }
	}
	with := serve(t, Config{Ready: ready.Load, API: api, Metrics: says("metrics"), Profiles: says("profiles"), Explain: says("explained")}, plain)
	without := serve(t, Config{Ready: ready.Load}, plain)
	long := strings.Repeat("x", 20<<10)
	tests := []struct {
		name, addr, request string
		ready               bool
		status              int
		body                string // the body, or part of the detail of a problem
	}{
		{"alive", with, "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", false, 200, "ok\n"},
		{"alive, head", with, "HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n", false, 200, ""},
		{"not ready", with, "GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n", false, 503, "not ready\n"},
		{"ready", with, "GET /readyz?verbose HTTP/1.1\r\nHost: a\r\n\r\n", true, 200, "ok\n"},
		{"any host, any proxy", with, "GET /readyz HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-For: 1.2.3.4\r\nOrigin: null\r\n\r\n", true, 200, "ok\n"},
		{"HTTP/1.0", with, "GET /readyz HTTP/1.0\r\n\r\n", true, 200, "ok\n"},
		{"absolute form", with, "GET http://a/readyz HTTP/1.1\r\nHost: a\r\n\r\n", true, 200, "ok\n"},
		{"absolute form, no path", with, "GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "nothing is served"},
		{"method", with, "POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", true, 405, "GET and HEAD"},
		{"api", with, "POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", true, 200, "the API"},
		{"api, list", with, "GET /services?x HTTP/1.1\r\nHost: a\r\n\r\n", true, 200, "the API"},
		{"api, one", with, "GET /services/echo HTTP/1.1\r\nHost: a\r\n\r\n", true, 200, "the API"},
		{"api, not quite", with, "GET /servicesx HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "/healthz, /readyz, /metrics, /debug/pprof/, /explain, /register and /services"},
		{"metrics", with, "GET /metrics?x HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n", false, 200, "metrics"},
		{"metrics, method", with, "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", true, 405, "GET and HEAD"},
		{"metrics, not quite", with, "GET /metrics/ HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "/metrics, /debug/pprof/, /explain, /register and /services"},
		{"no metrics", without, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "there are /healthz and /readyz"},
		{"profiles", with, "GET /debug/pprof/heap HTTP/1.1\r\nHost: a\r\n\r\n", false, 200, "profiles"},
		{"no profiles", without, "GET /debug/pprof/ HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "there are /healthz and /readyz"},
		{"explain", with, "GET /explain?path=/ HTTP/1.1\r\nHost: a\r\n\r\n", false, 200, "explained"},
		{"explain, method", with, "POST /explain?path=/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", true, 405, "GET and HEAD"},
		{"no explain", without, "GET /explain?path=/ HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "there are /healthz and /readyz"},
		{"a panic", with, "DELETE /register HTTP/1.1\r\nHost: a\r\n\r\n", true, 500, "a defect of the gateway"},
		{"no api", without, "GET /services HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "there are /healthz and /readyz"},
		{"root", with, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "nothing is served"},
		{"a path that would need cleaning", with, "GET /x/../healthz HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "nothing is served"},
		{"an authority in the path", with, "GET //evil/healthz?:// HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "nothing is served"},
		{"an encoded path", with, "GET /%68ealthz HTTP/1.1\r\nHost: a\r\n\r\n", true, 404, "nothing is served"},
		{"body too large", with, "POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n", true, 413, "65536 bytes"},
		{"head too large", with, "GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + long + "\r\n\r\n", true, 431, "too long"},
		{"no request", with, "nonsense\r\n\r\n", true, 400, "not well-formed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ready.Store(test.ready)
			response, body := exchange(t, test.addr, test.request)
			if response.StatusCode != test.status {
				t.Errorf("status %d, want %d; body %q", response.StatusCode, test.status, body)
			}
			if test.status < 400 || test.status == 503 {
				if body != test.body {
					t.Errorf("body %q, want %q", body, test.body)
				}
				return
			}
			var problem struct {
				Status int
				Detail string
			}
			if got := response.Header.Get("Content-Type"); got != "application/problem+json" {
				t.Errorf("Content-Type %q", got)
			}
			if err := json.Unmarshal([]byte(body), &problem); err != nil {
				t.Fatalf("%v in %q", err, body)
			}
			if problem.Status != test.status || !strings.Contains(problem.Detail, test.body) {
				t.Errorf("got %+v, want %d and %q", problem, test.status, test.body)
			}
			if allow := response.Header.Get("Allow"); (allow != "") != (test.status == 405) {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
}

// hungry is a listener without file descriptors left for a while.
type hungry struct {
	net.Listener
	failures atomic.Int32 // still to come
}

func (h *hungry) Accept() (net.Conn, error) {
	if h.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return h.Listener.Accept()
}

func TestOutOfFiles(t *testing.T) {
	var ln *hungry
	addr := serve(t, Config{Ready: func() bool { return true }}, func(inner net.Listener) net.Listener {
		ln = &hungry{Listener: inner}
		ln.failures.Store(3)
		return ln
	})
	response, _ := exchange(t, addr, "GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
	if response.StatusCode != 200 {
		t.Errorf("status %d", response.StatusCode)
	}
	if left := ln.failures.Load(); left >= 0 {
		t.Errorf("%d failures were not met", left+1)
	}
}

// A body that is announced but never sent does not hold a shutdown longer than its context.
func TestShutdownEnds(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	s := New(Config{Ready: func() bool { return true }, Log: slog.New(slog.DiscardHandler), API: func(*fasthttp.RequestCtx) {
		close(entered)
		<-leave
	}})
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /services HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-entered
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v, want the deadline", err)
	}
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	close(leave)
}

// The limit is the registry's, and what it lets through arrives whole.
func TestLargestBody(t *testing.T) {
	var got atomic.Int64
	addr := serve(t, Config{Ready: func() bool { return true }, API: func(ctx *fasthttp.RequestCtx) {
		got.Store(int64(len(ctx.PostBody())))
	}}, plain)
	response, _ := exchange(t, addr, "POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: 65536\r\n\r\n"+strings.Repeat("x", registry.MaxBody))
	if response.StatusCode != 200 || got.Load() != registry.MaxBody {
		t.Errorf("status %d, %d bytes arrived", response.StatusCode, got.Load())
	}
}
