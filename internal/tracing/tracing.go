// Package tracing sends the spans of requests to an OpenTelemetry collector. Which requests are sampled, and what their
// spans are called, package proxy has decided: here spans are made when a request has ended, from what there is to say of it.
package tracing

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"kerberos/proxy"
)

// tracesPath is where a collector takes traces by HTTP.
const tracesPath = "/v1/traces"

// Config is what a Tracer is made of. What is not in it, as headers, timeouts and certificates, the exporter reads from
// OTEL_EXPORTER_OTLP_*, and what is said of this process from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
type Config struct {
	Endpoint string       // http or https URL of the collector
	GRPC     bool         // else by HTTP, at the path /v1/traces below Endpoint
	Log      *slog.Logger // where it says that the collector takes nothing
}

// Tracer sends spans. They wait in a queue, and are dropped where that is full.
type Tracer struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// New makes a Tracer. It does not wait for the collector.
func New(cfg Config) (*Tracer, error) {
	ctx := context.Background()
	exporter, err := newExporter(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("--otlp-endpoint %s: %w", cfg.Endpoint, err)
	}
	about, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(semconv.ServiceName("kerberos")), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	provider := sdk.NewTracerProvider(
		sdk.WithBatcher(&reporting{SpanExporter: exporter, log: cfg.Log}), sdk.WithResource(about),
		sdk.WithSampler(sdk.AlwaysSample()), sdk.WithIDGenerator(given{}),
	)
	return &Tracer{provider, provider.Tracer("kerberos")}, nil
}

func newExporter(ctx context.Context, cfg Config) (sdk.SpanExporter, error) {
	if cfg.GRPC {
		return otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(cfg.Endpoint))
	}
	endpoint := cfg.Endpoint
	if !strings.HasSuffix(endpoint, tracesPath) {
		var err error
		if endpoint, err = url.JoinPath(endpoint, tracesPath); err != nil {
			return nil, err
		}
	}
	return otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(endpoint))
}

// Close sends what waits, until ctx ends.
func (t *Tracer) Close(ctx context.Context) error { return t.provider.Shutdown(ctx) }

// Trace makes the spans of a request. It is a function for proxy.Config.Trace.
func (t *Tracer) Trace(r *proxy.Record) {
	id := trace.TraceID(r.TraceID)
	ctx := context.Background()
	if r.Trace.Parent != [8]byte{} {
		state, _ := trace.ParseTraceState(r.Trace.State) // what is malformed says nothing
		ctx = trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: id, SpanID: r.Trace.Parent, TraceFlags: trace.FlagsSampled, TraceState: state, Remote: true,
		}))
	}
	method, known := methodOf(r)
	attemptName := method
	if !known {
		attemptName = "HTTP"
	}
	name := attemptName
	if r.Route != "" {
		name += " " + text(r.Route)
	}
	ctx, span := t.tracer.Start(named{ctx, id, r.Trace.Span}, name,
		trace.WithSpanKind(trace.SpanKindServer), trace.WithTimestamp(r.Began), trace.WithAttributes(serverAttributes(r, method, known)...))
	if r.Status >= 500 || r.Cut || r.Status == 0 {
		span.SetStatus(codes.Error, "")
	}
	for i := range r.Trace.Attempts {
		a := &r.Trace.Attempts[i]
		_, attempt := t.tracer.Start(named{ctx, id, a.Span}, attemptName,
			trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(a.Began), trace.WithAttributes(clientAttributes(r, a, i, method, known)...))
		if a.Status >= 400 || a.Reason != "" {
			attempt.SetStatus(codes.Error, "")
		}
		attempt.End(trace.WithTimestamp(a.Ended))
	}
	span.End(trace.WithTimestamp(r.Began.Add(r.Took)))
}

// serverAttributes are those of semantic conventions for HTTP servers.
func serverAttributes(r *proxy.Record, method string, known bool) []attribute.KeyValue {
	path, query, _ := bytes.Cut(r.Target, []byte{'?'})
	all := append(make([]attribute.KeyValue, 0, 20),
		semconv.URLScheme("http"), semconv.URLPath(text(path)), semconv.ClientAddress(r.Client.String()),
		semconv.NetworkPeerAddress(r.Peer.String()), semconv.NetworkProtocolVersion("1."+strconv.Itoa(int(r.Minor))),
	)
	all = appendMethod(all, r, method, known)
	if len(query) > 0 {
		all = append(all, semconv.URLQuery(text(query)))
	}
	if host, port, err := net.SplitHostPort(string(r.Host)); err == nil {
		all = append(all, semconv.ServerAddress(text(host)))
		if n, err := strconv.Atoi(port); err == nil {
			all = append(all, semconv.ServerPort(n))
		}
	} else if len(r.Host) > 0 {
		all = append(all, semconv.ServerAddress(strings.Trim(text(r.Host), "[]")))
	}
	if len(r.UserAgent) > 0 {
		all = append(all, semconv.UserAgentOriginal(text(r.UserAgent)))
	}
	if r.Route != "" {
		all = append(all, semconv.HTTPRoute(text(r.Route)))
	}
	if r.Service != "" {
		all = append(all, attribute.String("kerberos.service", r.Service))
	}
	if len(r.RequestID) > 0 {
		all = append(all, attribute.String("kerberos.request_id", text(r.RequestID)))
	}
	return appendOutcome(all, r.Status, r.Reason, 500)
}

// clientAttributes are those for HTTP clients.
func clientAttributes(r *proxy.Record, a *proxy.Attempt, resent int, method string, known bool) []attribute.KeyValue {
	all := append(make([]attribute.KeyValue, 0, 12),
		semconv.ServerAddress(a.Host), semconv.ServerPort(int(a.Port)), semconv.URLFull(a.Addr+text(r.Target)),
		attribute.String("kerberos.service", r.Service), attribute.String("kerberos.instance", a.Instance),
	)
	all = appendMethod(all, r, method, known)
	if resent > 0 {
		all = append(all, semconv.HTTPRequestResendCount(resent))
	}
	return appendOutcome(all, a.Status, a.Reason, 400)
}

func appendMethod(all []attribute.KeyValue, r *proxy.Record, method string, known bool) []attribute.KeyValue {
	all = append(all, semconv.HTTPRequestMethodKey.String(method))
	if !known {
		all = append(all, semconv.HTTPRequestMethodOriginal(text(r.Method)))
	}
	return all
}

// appendOutcome: a status from failed on is an error by itself.
func appendOutcome(all []attribute.KeyValue, status int, reason string, failed int) []attribute.KeyValue {
	if status > 0 {
		all = append(all, semconv.HTTPResponseStatusCode(status))
	}
	switch {
	case reason != "":
		all = append(all, semconv.ErrorTypeKey.String(reason))
	case status >= failed:
		all = append(all, semconv.ErrorTypeKey.String(strconv.Itoa(status)))
	}
	return all
}

// methodOf is the method where it is a known one: others could be any number.
func methodOf(r *proxy.Record) (method string, known bool) {
	switch m := string(r.Method); m {
	case "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE":
		return m, true
	}
	return "_OTHER", false
}

// text is a string as a collector takes it: one that is not UTF-8 would cost all that is sent with it.
func text[T string | []byte](s T) string { return strings.ToValidUTF8(string(s), "\uFFFD") }

// named is a context in which the next span has an id that is known already.
type named struct {
	context.Context
	trace trace.TraceID
	span  trace.SpanID
}

type nameKey struct{}

func (n named) Value(key any) any {
	if _, ok := key.(nameKey); ok {
		return n
	}
	return n.Context.Value(key)
}

// given takes ids from a named.
type given struct{}

func (given) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	n, _ := ctx.Value(nameKey{}).(named)
	return n.trace, n.span
}

func (given) NewSpanID(ctx context.Context, _ trace.TraceID) trace.SpanID {
	n, _ := ctx.Value(nameKey{}).(named)
	return n.span
}

// reporting is an exporter that says once that nothing can be exported, and once that it can again.
type reporting struct {
	sdk.SpanExporter
	log     *slog.Logger
	failing atomic.Bool
}

func (e *reporting) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	switch {
	case err != nil && !e.failing.Swap(true):
		e.log.Warn("traces are lost: the collector does not take them", slog.String("reason", err.Error()))
	case err == nil && e.failing.Swap(false):
		e.log.Info("the collector takes traces again")
	}
	return nil // the library would print it
}

// CloseTimeout is how long the end of the process may wait for the collector.
const CloseTimeout = 2 * time.Second
