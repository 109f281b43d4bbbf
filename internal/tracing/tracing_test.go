package tracing

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"kerberos/proxy"
	"kerberos/registry"
)

// receiver is a collector.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	url     string
	mu      sync.Mutex
	spans   []*otlp.Span
	about   map[string]string // the resource
	paths   map[string]bool   // by HTTP
	headers map[string]string // those that the tests ask for
	fails   bool
}

func (r *receiver) take(request *collector.ExportTraceServiceRequest, header string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fails {
		return fmt.Errorf("the disk is full")
	}
	r.headers["x-tenant"] = header
	for _, rs := range request.ResourceSpans {
		r.about = attributes(rs.Resource.Attributes)
		for _, ss := range rs.ScopeSpans {
			r.spans = append(r.spans, ss.Spans...)
		}
	}
	return nil
}

func (r *receiver) Export(ctx context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	return &collector.ExportTraceServiceResponse{}, r.take(request, strings.Join(md.Get("x-tenant"), ","))
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	body := io.Reader(request.Body)
	if request.Header.Get("Content-Encoding") == "gzip" {
		var err error
		if body, err = gzip.NewReader(body); err != nil {
			w.WriteHeader(400)
			return
		}
	}
	b, err := io.ReadAll(body)
	var message collector.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(b, &message)
	}
	if err != nil || request.Header.Get("Content-Type") != "application/x-protobuf" {
		w.WriteHeader(400)
		return
	}
	r.mu.Lock()
	r.paths[request.URL.Path] = true
	r.mu.Unlock()
	if r.take(&message, request.Header.Get("X-Tenant")) != nil {
		w.WriteHeader(400)
	}
}

func startReceiver(t *testing.T, byGRPC bool) *receiver {
	r := &receiver{paths: map[string]bool{}, headers: map[string]string{}}
	if !byGRPC {
		s := httptest.NewServer(r)
		t.Cleanup(s.Close)
		r.url = s.URL
		return r
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, r)
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(s.Stop)
	r.url = "http://" + ln.Addr().String()
	return r
}

// trace waits for the spans of a path: that of the request, and those of its attempts, in their order.
func (r *receiver) trace(t *testing.T, path string) (server *otlp.Span, clients []*otlp.Span) {
	t.Helper()
	eventually(t, "the spans of "+path, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, s := range r.spans {
			if s.Kind == otlp.Span_SPAN_KIND_SERVER && attributes(s.Attributes)["url.path"] == path {
				server = s
			}
		}
		if server == nil {
			return false
		}
		clients = nil
		for _, s := range r.spans {
			if s.Kind == otlp.Span_SPAN_KIND_CLIENT && string(s.ParentSpanId) == string(server.SpanId) {
				clients = append(clients, s)
			}
		}
		return true
	})
	return server, clients
}

func attributes(all []*common.KeyValue) map[string]string {
	m := map[string]string{}
	for _, kv := range all {
		switch v := kv.Value.Value.(type) {
		case *common.AnyValue_StringValue:
			m[kv.Key] = v.StringValue
		case *common.AnyValue_IntValue:
			m[kv.Key] = fmt.Sprint(v.IntValue)
		}
	}
	return m
}

func want(t *testing.T, span *otlp.Span, fields map[string]string) {
	t.Helper()
	got := attributes(span.Attributes)
	for name, want := range fields {
		if got[name] != want {
			t.Errorf("%s of %s is %q, want %q", name, span.Name, got[name], want)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// gateway is a proxy.Proxy on a free port of the loopback that is traced.
type gateway struct {
	*proxy.Proxy
	reg  *registry.Registry
	addr string
}

func startGateway(t *testing.T, cfg Config, change func(*proxy.Config)) *gateway {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	tracer, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{reg: registry.New(registry.Config{})}
	p := proxy.Config{Registry: g.reg, Log: slog.New(slog.DiscardHandler), Trace: tracer.Trace, TraceShare: 1, RequestIDs: true}
	if change != nil {
		change(&p)
	}
	if g.Proxy, err = proxy.New(p, nil); err != nil {
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
		if err := tracer.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return g
}

func (g *gateway) register(t *testing.T, service, id, addr string) {
	t.Helper()
	if err := g.reg.Register(service, registry.Instance{ID: id, Addr: addr}); err != nil {
		t.Fatal(err)
	}
}

// do sends a request and reads its response.
func (g *gateway) do(t *testing.T, raw string) *http.Response {
	t.Helper()
	c, err := net.Dial("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	response.Body.Close()
	return response
}

func get(path string, fields ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: a.example:80\r\nConnection: close\r\n" + strings.Join(fields, "") + "\r\n"
}

const (
	parentTrace = "0af7651916cd43dd8448eb211c80319c"
	parentSpan  = "b7ad6b7169203331"
)

// What a collector gets of a request, by both protocols.
func TestSpans(t *testing.T) {
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=42")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
	for _, byGRPC := range []bool{false, true} {
		t.Run(map[bool]string{false: "http", true: "grpc"}[byGRPC], func(t *testing.T) {
			r := startReceiver(t, byGRPC)
			g := startGateway(t, Config{Endpoint: r.url, GRPC: byGRPC}, func(cfg *proxy.Config) {
				cfg.Routes = []proxy.Route{{Prefix: "/users", Service: "users"}, {Prefix: "/retried", Service: "retried"}}
				cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
			})
			parents := make(chan string, 1)
			backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				parents <- r.Header.Get("Traceparent")
				if strings.HasSuffix(r.URL.Path, "/slow") {
					time.Sleep(150 * time.Millisecond)
				}
				if strings.HasSuffix(r.URL.Path, "/broken") {
					w.WriteHeader(500)
				}
			}))
			t.Cleanup(backend.Close)
			host, port, _ := net.SplitHostPort(strings.TrimPrefix(backend.URL, "http://"))
			g.register(t, "users", "a", backend.URL)

			before := time.Now()
			id := g.do(t, get("/users/\xff?q=\xfe", "User-Agent: x\xe9\r\n", "X-Forwarded-For: 192.0.2.7\r\n",
				"traceparent: 00-"+parentTrace+"-"+parentSpan+"-01\r\ntracestate: a=1\r\n")).Header.Get("X-Request-Id")
			server, clients := r.trace(t, "/users/\uFFFD")
			want(t, server, map[string]string{
				"http.request.method": "GET", "url.scheme": "http", "url.query": "q=\uFFFD", "server.address": "a.example", "server.port": "80",
				"client.address": "192.0.2.7", "network.peer.address": "127.0.0.1", "network.protocol.version": "1.1", "http.response.status_code": "200",
				"http.route": "/users", "user_agent.original": "x\uFFFD", "kerberos.service": "users", "kerberos.request_id": id, "error.type": "",
			})
			if server.Name != "GET /users" || hex.EncodeToString(server.TraceId) != parentTrace || hex.EncodeToString(server.ParentSpanId) != parentSpan ||
				server.TraceState != "a=1" || server.Status.GetCode() != otlp.Status_STATUS_CODE_UNSET {
				t.Errorf("the span of the request is %v", server)
			}
			if server.StartTimeUnixNano < uint64(before.UnixNano()) || server.EndTimeUnixNano < server.StartTimeUnixNano || server.EndTimeUnixNano > uint64(time.Now().UnixNano()) {
				t.Errorf("its times are %d to %d", server.StartTimeUnixNano, server.EndTimeUnixNano)
			}
			if len(clients) != 1 {
				t.Fatalf("there are %d attempts", len(clients))
			}
			want(t, clients[0], map[string]string{
				"http.request.method": "GET", "server.address": host, "server.port": port, "url.full": backend.URL + "/users/\uFFFD?q=\uFFFD",
				"http.response.status_code": "200", "kerberos.service": "users", "kerberos.instance": "a", "http.request.resend_count": "", "error.type": "",
			})
			if got, want := <-parents, "00-"+parentTrace+"-"+hex.EncodeToString(clients[0].SpanId)+"-01"; got != want || clients[0].Name != "GET" {
				t.Errorf("the backend got %s, want %s of %v", got, want, clients[0])
			}
			r.mu.Lock()
			if r.about["service.name"] != "kerberos" || r.about["deployment.environment.name"] != "test" || r.headers["x-tenant"] != "42" {
				t.Errorf("the resource is %v, the headers %v", r.about, r.headers)
			}
			r.mu.Unlock()

			g.do(t, get("/users/slow")) // by a goroutine
			<-parents
			server, clients = r.trace(t, "/users/slow")
			if len(server.ParentSpanId) != 0 || len(clients) != 1 || clients[0].EndTimeUnixNano-clients[0].StartTimeUnixNano < 150e6 {
				t.Errorf("%v, %v", server, clients)
			}

			g.do(t, get("/users/broken"))
			<-parents
			server, clients = r.trace(t, "/users/broken")
			for _, s := range append(clients, server) {
				want(t, s, map[string]string{"http.response.status_code": "500", "error.type": "500"})
				if s.Status.GetCode() != otlp.Status_STATUS_CODE_ERROR {
					t.Errorf("%v is no error", s)
				}
			}

			refused, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			refused.Close()
			g.register(t, "retried", "a", "http://"+refused.Addr().String())
			g.register(t, "retried", "b", backend.URL)
			for i := 0; ; i++ {
				path := fmt.Sprintf("/retried/%d", i)
				g.do(t, get(path))
				<-parents
				if server, clients = r.trace(t, path); len(clients) == 2 {
					break
				}
				if i == 10 {
					t.Fatal("nothing is retried")
				}
			}
			want(t, clients[0], map[string]string{"kerberos.instance": "a", "error.type": "connection_refused", "http.response.status_code": "", "http.request.resend_count": ""})
			want(t, clients[1], map[string]string{"kerberos.instance": "b", "error.type": "", "http.response.status_code": "200", "http.request.resend_count": "1"})
			want(t, server, map[string]string{"error.type": "", "http.response.status_code": "200"})

			g.do(t, "BREW /nowhere HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
			server, clients = r.trace(t, "/nowhere")
			want(t, server, map[string]string{
				"http.request.method": "_OTHER", "http.request.method_original": "BREW", "http.response.status_code": "404",
				"error.type": "destination_not_found", "server.address": "::1",
			})
			if server.Name != "HTTP" || len(clients) != 0 || server.Status.GetCode() != otlp.Status_STATUS_CODE_UNSET {
				t.Errorf("%v, %v", server, clients)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if !byGRPC && (len(r.paths) != 1 || !r.paths[tracesPath]) {
				t.Errorf("they came at %v", r.paths)
			}
		})
	}
}

// A collector that takes nothing, or is not there, is told of once, and holds up nobody.
func TestCollectorFails(t *testing.T) {
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
	r := startReceiver(t, false)
	r.fails = true
	var log safeBuffer
	g := startGateway(t, Config{Endpoint: r.url + "/collector/", Log: slog.New(slog.NewTextHandler(&log, nil))}, nil)
	for range 20 {
		g.do(t, get("/nowhere"))
	}
	eventually(t, "the log says it", func() bool { return strings.Contains(log.String(), "traces are lost") })
	r.mu.Lock()
	r.fails = false
	if !r.paths["/collector"+tracesPath] {
		t.Errorf("they came at %v", r.paths)
	}
	r.mu.Unlock()
	eventually(t, "the log says that it is over", func() bool {
		g.do(t, get("/again"))
		return strings.Contains(log.String(), "takes traces again")
	})
	if n := strings.Count(log.String(), "traces are lost"); n != 1 {
		t.Errorf("it is told %d times: %s", n, log.String())
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

// BenchmarkTrace is what the spans of a sampled request cost where it ends.
func BenchmarkTrace(b *testing.B) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	tracer, err := New(Config{Endpoint: s.URL, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer tracer.Close(context.Background())
	now := time.Now()
	r := &proxy.Record{
		Began: now, Took: time.Millisecond, Client: netip.MustParseAddr("192.0.2.1"), Peer: netip.MustParseAddr("192.0.2.1"),
		Method: []byte("GET"), Host: []byte("www.example.com"), Target: []byte("/users/1234?x=y"), Minor: 1, Status: 200, Attempts: 1,
		Service: "users", Instance: "a", TraceID: [16]byte{1}, Trace: &proxy.Trace{Span: [8]byte{1}, Attempts: []proxy.Attempt{
			{Span: [8]byte{2}, Instance: "a", Addr: "http://10.0.0.5:8080", Host: "10.0.0.5", Port: 8080, Began: now, Ended: now, Status: 200},
		}},
	}
	b.ReportAllocs()
	for b.Loop() {
		tracer.Trace(r)
	}
}
