package accesslog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"kerberos/proxy"
	"kerberos/registry"
)

const loops = 2

// gateway is a proxy.Proxy on a free port of the loopback, with an access log.
type gateway struct {
	*proxy.Proxy
	reg  *registry.Registry
	log  *Log
	addr string
	path string // of the log
}

// startGateway starts a gateway that ends with the test.
func startGateway(t testing.TB, change func(*proxy.Config, *Config)) *gateway {
	t.Helper()
	g := &gateway{reg: registry.New(registry.Config{}), path: filepath.Join(t.TempDir(), "access.log")}
	quiet := slog.New(slog.DiscardHandler)
	logCfg := Config{Path: g.path, Share: 1, Loops: loops, Log: quiet}
	cfg := proxy.Config{Registry: g.reg, Loops: loops, Log: quiet}
	if change != nil {
		change(&cfg, &logCfg)
	}
	var err error
	if g.log, err = Open(logCfg); err != nil {
		t.Fatal(err)
	}
	cfg.AccessLog = g.log.Write
	if g.Proxy, err = proxy.New(cfg, nil); err != nil {
		t.Fatal(err)
	}
	g.reg.OnChange(g.Update)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.addr = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- g.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		g.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Error(err)
		}
		g.Close()
		_ = g.log.Close() // of a reader that is stalled it says so
	})
	return g
}

func (g *gateway) register(t testing.TB, service, id, addr string) {
	t.Helper()
	if err := g.reg.Register(service, registry.Instance{ID: id, Addr: addr}); err != nil {
		t.Fatal(err)
	}
}

// ask sends raw bytes on a connection of its own and returns it.
func (g *gateway) ask(t testing.TB, raw string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	return c
}

// do sends a request and reads its response to the end.
func (g *gateway) do(t testing.TB, raw string) *http.Response {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(g.ask(t, raw)), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	response.Body.Close()
	return response
}

// text is what is in the log, but for a line that is being written.
func (g *gateway) text(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(g.path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:bytes.LastIndexByte(b, '\n')+1])
}

// line waits for the line of a path and returns its fields.
func (g *gateway) line(t testing.TB, path string) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, "a line for "+path, func() bool {
		for line := range strings.Lines(g.text(t)) {
			var fields map[string]any
			if err := json.Unmarshal([]byte(line), &fields); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if fields["path"] == path || path == "" && fields["path"] == nil {
				found = fields
			}
		}
		return found != nil
	})
	return found
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func backend(t testing.TB, handler http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s.URL
}

// want compares fields: a string, a number, nil for a field that is not there, or a function that judges it.
func want(t *testing.T, line map[string]any, fields map[string]any) {
	t.Helper()
	for name, want := range fields {
		got := line[name]
		ok := got == want
		switch want := want.(type) {
		case int:
			ok = got == float64(want)
		case func(any) bool:
			ok = want(got)
		}
		if !ok {
			t.Errorf("%s is %v, want %v, in %v", name, got, want, line)
		}
	}
}

func between(low, high float64) func(any) bool {
	return func(got any) bool { f, ok := got.(float64); return ok && f >= low && f <= high }
}

const browser = "User-Agent: Mozilla/5.0 \"x\" \\ \xe9\r\nReferer: http://a.example/ä?b\r\n"

func get(path string, fields ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: a.example:80\r\nConnection: close\r\n" + strings.Join(fields, "") + "\r\n"
}

// What is logged of each way that a request can end.
func TestFields(t *testing.T) {
	g := startGateway(t, func(cfg *proxy.Config, _ *Config) {
		cfg.Routes = []proxy.Route{{Prefix: "/retried", Service: "retried"}, {Prefix: "/*"}}
		cfg.RequestIDs = true
		cfg.UpstreamIdle = 100 * time.Millisecond
	})
	hold, stream := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(hold) })
	g.register(t, "echo", "a", backend(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/slow"):
			time.Sleep(300 * time.Millisecond)
		case strings.HasSuffix(r.URL.Path, "/hold"):
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		case strings.HasSuffix(r.URL.Path, "/stream"):
			_, _ = io.WriteString(w, "first")
			w.(http.Flusher).Flush()
			<-stream
			_, _ = io.WriteString(w, strings.Repeat("x", 100_000))
			return
		case strings.HasSuffix(r.URL.Path, "/cut"):
			w.Header().Set("Content-Length", "200000")
			_, _ = w.Write(make([]byte, 100_000))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(append([]byte("hello"), body...))
	}))

	began := time.Now().UTC().Truncate(time.Microsecond)
	id := g.do(t, get("/echo/plain?q=%22", browser)).Header.Get("X-Request-Id")
	want(t, g.line(t, "/echo/plain?q=%22"), map[string]any{
		"client": "127.0.0.1", "method": "GET", "host": "a.example:80", "protocol": "HTTP/1.1", "route": "/*", "service": "echo", "instance": "a",
		"status": 200, "bytes_in": 0, "bytes_out": 5, "attempts": 1, "reason": nil, "tunnel": nil, "request_id": id, "trace_id": nil,
		"user_agent": "Mozilla/5.0 \"x\" \\ \u00e9", "referer": "http://a.example/\u00c3\u00a4?b",
		"duration": between(0.00001, 10), "gateway": between(0.000001, 10), "backend": between(0.00001, 10),
		"time": func(got any) bool {
			at, err := time.Parse("2006-01-02T15:04:05.000000Z", got.(string))
			return err == nil && !at.Before(began.Add(-time.Second)) && at.Before(time.Now())
		},
	})

	traceparent := "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
	g.do(t, get("/echo/slow", traceparent))
	slow := g.line(t, "/echo/slow")
	want(t, slow, map[string]any{
		"status": 200, "attempts": 1, "backend": between(0.3, 10), "duration": between(0.3, 10), "trace_id": "0af7651916cd43dd8448eb211c80319c",
		"user_agent": nil, "referer": nil,
	})
	if slow["gateway"].(float64)+slow["backend"].(float64) > slow["duration"].(float64)+0.0001 {
		t.Errorf("the parts are more than the whole: %v", slow)
	}

	g.do(t, "POST /echo/post HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody")
	want(t, g.line(t, "/echo/post"), map[string]any{"method": "POST", "bytes_in": 4, "bytes_out": 9})
	g.do(t, "POST /echo/chunks HTTP/1.0\r\nContent-Length: 200000\r\n\r\n"+strings.Repeat("b", 200_000))
	want(t, g.line(t, "/echo/chunks"), map[string]any{"protocol": "HTTP/1.0", "bytes_in": 200_000, "bytes_out": 200_005})

	refused, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused.Close()
	g.register(t, "retried", "a", "http://"+refused.Addr().String())
	g.register(t, "retried", "b", backend(t, func(http.ResponseWriter, *http.Request) {}))
	for i := range 2 {
		g.do(t, get(fmt.Sprintf("/retried/%d", i)))
	}
	first, second := g.line(t, "/retried/0"), g.line(t, "/retried/1")
	if first["attempts"].(float64)+second["attempts"].(float64) < 3 { // a is asked at least once
		t.Errorf("attempts: %v, %v", first, second)
	}
	want(t, first, map[string]any{"status": 200, "instance": "b", "route": "/retried", "service": "retried"})

	g.do(t, get("/nowhere"))
	want(t, g.line(t, "/nowhere"), map[string]any{
		"status": 404, "reason": "destination_not_found", "service": nil, "instance": nil, "route": nil, "attempts": 0, "backend": nil,
		"bytes_out": between(10, 1000),
	})
	response := g.do(t, "GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n")
	want(t, g.line(t, ""), map[string]any{
		"status": 400, "reason": "http_request_error", "client": "127.0.0.1", "request_id": response.Header.Get("X-Request-Id"),
		"service": nil, "attempts": 0,
	})

	c := g.ask(t, get("/echo/hold"))
	eventually(t, "it is at the instance", func() bool { return g.DescribeInstance("echo", "a").InFlight == 1 })
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
	want(t, g.line(t, "/echo/hold"), map[string]any{"status": 499, "reason": "client_gone", "instance": "a", "attempts": 1, "bytes_out": 0})

	r := bufio.NewReader(g.ask(t, get("/echo/stream")))
	if _, err := r.ReadString('t'); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() { close(stream) })
	_, _ = io.Copy(io.Discard, r)
	streamed := g.line(t, "/echo/stream")
	want(t, streamed, map[string]any{"status": 200, "bytes_out": between(100_005, 101_000), "duration": between(0.15, 10), "reason": nil})
	if streamed["backend"].(float64) >= streamed["duration"].(float64) {
		t.Errorf("the stream counts as the backend's time to its answer: %v", streamed)
	}

	_, _ = io.Copy(io.Discard, g.ask(t, get("/echo/cut")))
	want(t, g.line(t, "/echo/cut"), map[string]any{"status": 200, "reason": "http_response_incomplete", "bytes_out": 100_000})
}

// A tunnel is logged when it ends, with what went through it.
func TestTunnel(t *testing.T) {
	g := startGateway(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello")
		_, _ = io.Copy(io.Discard, r)
	}()
	g.register(t, "ws", "a", "http://"+ln.Addr().String())
	c := g.ask(t, "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUser-Agent: x\r\n\r\n")
	r := bufio.NewReader(c)
	if _, err := r.ReadString('o'); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "what goes up"); err != nil {
		t.Fatal(err)
	}
	if text := g.text(t); text != "" {
		t.Errorf("it is logged before its end: %s", text)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	_, _ = io.Copy(io.Discard, r)
	want(t, g.line(t, "/ws"), map[string]any{
		"status": 101, "tunnel": true, "bytes_in": 12, "bytes_out": 5, "attempts": 1, "service": "ws", "instance": "a", "user_agent": "x",
	})
}

// The line that goaccess, awstats and others call combined, as their own patterns have it.
var combinedLine = regexp.MustCompile(`^(\S+) (\S+) (\S+) \[(\d{2}/\w{3}/\d{4}:\d{2}:\d{2}:\d{2} [+-]\d{4})\] "((?:[A-Z]+) (?:\S+) HTTP/1\.[01]|-)" (\d{3}) (\d+|-) "([^"]*)" "([^"]*)"$`)

func TestCombined(t *testing.T) {
	g := startGateway(t, func(_ *proxy.Config, cfg *Config) { cfg.Format = Combined })
	g.register(t, "echo", "a", backend(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	g.do(t, get("/echo/a?b=\"c\\", browser))
	g.do(t, get("/echo/plain"))
	g.do(t, get("/nowhere"))
	g.do(t, "nonsense\r\n\r\n")
	eventually(t, "four lines", func() bool { return strings.Count(g.text(t), "\n") == 4 })
	got := map[string][]string{}
	for line := range strings.Lines(g.text(t)) {
		m := combinedLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			t.Fatalf("this is no line of the combined format: %s", line)
		}
		if at, err := time.Parse("02/Jan/2006:15:04:05 -0700", m[4]); err != nil || time.Since(at) > time.Minute || time.Since(at) < 0 {
			t.Errorf("the time is %s (%v)", m[4], err)
		}
		got[m[5]] = append(m[1:4:4], m[6:]...)
	}
	for request, want := range map[string]string{
		`GET /echo/a?b=\x22c\x5C HTTP/1.1`: `127.0.0.1|-|-|200|5|http://a.example/\xC3\xA4?b|Mozilla/5.0 \x22x\x22 \x5C \xE9`,
		"GET /echo/plain HTTP/1.1":         "127.0.0.1|-|-|200|5|-|-",
		"-":                                `127.0.0.1|-|-|400|\d+|-|-`,
		"GET /nowhere HTTP/1.1":            `127.0.0.1|-|-|404|\d+|-|-`,
	} {
		line := strings.Join(got[request], "|")
		if matched, _ := regexp.MatchString("^"+want+"$", line); line != want && !matched {
			t.Errorf("%s: %s, want %s", request, line, want)
		}
	}
}

// A file that is renamed and opened anew under load loses no line, as logrotate does it.
func TestReopenUnderLoad(t *testing.T) {
	g := startGateway(t, nil)
	g.register(t, "echo", "a", backend(t, func(http.ResponseWriter, *http.Request) {}))
	const clients, requests = 8, 300
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			c := g.ask(t, "")
			r := bufio.NewReader(c)
			for j := range requests {
				_, err := fmt.Fprintf(c, "GET /echo/%d/%d HTTP/1.1\r\nHost: a\r\n\r\n", i, j)
				if err == nil {
					_, err = http.ReadResponse(r, nil)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	files := []string{g.path}
	for rotating := true; rotating; {
		select {
		case <-done:
			rotating = false
		case <-time.After(20 * time.Millisecond):
			old := fmt.Sprintf("%s.%d", g.path, len(files))
			if err := os.Rename(g.path, old); err != nil {
				t.Fatal(err)
			}
			files = append(files, old)
			g.log.Reopen()
			eventually(t, "there is a new file", func() bool { _, err := os.Stat(g.path); return err == nil })
		}
	}
	if len(files) < 3 {
		t.Fatal("it was over too soon")
	}
	seen := map[string]int{}
	eventually(t, "all lines are there", func() bool {
		clear(seen)
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				if !strings.HasSuffix(line, "\n") { // it is being written
					return false
				}
				var fields struct{ Path string }
				if err := json.Unmarshal([]byte(line), &fields); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				seen[fields.Path]++
			}
		}
		return len(seen) == clients*requests
	})
	for path, n := range seen {
		if n != 1 {
			t.Errorf("%s is logged %d times", path, n)
		}
	}
	if n := g.log.Dropped(); n > 0 {
		t.Errorf("%d lines were dropped", n)
	}
}

// A pipe that nobody reads holds up no request: what does not fit is dropped, counted, and told of.
func TestStalledReader(t *testing.T) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	var told safeBuffer
	g := startGateway(t, func(_ *proxy.Config, cfg *Config) {
		cfg.Path = fmt.Sprintf("/dev/fd/%d", writer.Fd())
		cfg.Log = slog.New(slog.NewTextHandler(&told, nil))
	})
	writer.Close()
	g.register(t, "echo", "a", backend(t, func(http.ResponseWriter, *http.Request) {}))
	c := g.ask(t, "")
	r := bufio.NewReader(c)
	request := get("/echo/"+strings.Repeat("x", 3000), "User-Agent: "+strings.Repeat("\"", 4000)+"\r\n")
	request = strings.Replace(request, "Connection: close\r\n", "", 1)
	sent := 0
	for g.log.Dropped() == 0 {
		if sent++; sent > 20_000 {
			t.Fatal("nothing is dropped")
		}
		_, err := io.WriteString(c, request)
		if err == nil {
			_, err = http.ReadResponse(r, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	for range 100 {
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		if _, err := http.ReadResponse(r, nil); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("100 requests took %v", took)
	}
	eventually(t, "the log tells of it", func() bool { return strings.Contains(told.String(), "were dropped") })

	lines := make(chan int)
	go func() { // the reader goes on
		n := 0
		s := bufio.NewScanner(reader)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			if !json.Valid(s.Bytes()) {
				t.Errorf("no line: %q", s.Text())
			}
			n++
		}
		lines <- n
	}()
	eventually(t, "there is room again", func() bool {
		before := g.log.Dropped()
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		if _, err := http.ReadResponse(r, nil); err != nil {
			t.Fatal(err)
		}
		sent++
		return g.log.Dropped() == before
	})
	c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	g.Shutdown(ctx)
	if err := g.log.Close(); err != nil {
		t.Error(err)
	}
	if n := <-lines; n != sent+100-int(g.log.Dropped()) {
		t.Errorf("%d lines for %d requests, %d dropped", n, sent+100, g.log.Dropped())
	}
}

// Of a share, what failed is logged all the same.
func TestShare(t *testing.T) {
	log := func(share float64) string {
		path := filepath.Join(t.TempDir(), "log")
		l, err := Open(Config{Path: path, Share: share, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 10_000 {
			r := proxy.Record{Loop: -1, Status: 200, Client: netip.MustParseAddr("::1")}
			switch i {
			case 17:
				r.Status = 503
			case 18:
				r.Cut = true
			}
			l.Write(&r)
			if i%2500 == 0 { // else the disk may be too slow, and lines are dropped for that
				eventually(t, "they are written", l.shards[0].empty)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if n := strings.Count(log(1), "\n"); n != 10_000 {
		t.Errorf("of all there are %d", n)
	}
	if n := strings.Count(log(0), "\n"); n != 2 {
		t.Errorf("of none there are %d", n)
	}
	some := log(0.1)
	if n := strings.Count(some, "\n"); n < 800 || n > 1200 {
		t.Errorf("of a tenth there are %d", n)
	}
	if !strings.Contains(some, `"status":503`) {
		t.Error("a failure is not logged")
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "none", "log")} {
		if _, err := Open(Config{Path: path, Share: 1, Log: slog.Default()}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	path := filepath.Join(dir, "log")
	var told safeBuffer
	l, err := Open(Config{Path: path, Share: 1, Log: slog.New(slog.NewTextHandler(&told, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	eventually(t, "the log says why", func() bool { return strings.Contains(told.String(), "cannot be opened anew") })
	l.Write(&proxy.Record{Loop: -1}) // into the old one
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if l.Dropped() != 0 {
		t.Error("a line was dropped")
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
