package proxy

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

var uuid7 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

func trustLoopback(cfg *Config) {
	cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
}

func TestUUID(t *testing.T) {
	at := time.UnixMilli(0x017F22E279B0) // the example of RFC 9562, appendix A.6
	var got [36]byte
	putUUID(&got, at, 0xCC3<<52, 0x18C4DC0C0C07398F<<2)
	if want := "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"; string(got[:]) != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestRequestIDs(t *testing.T) {
	long := strings.Repeat("x", maxRequestID)
	for _, row := range []struct {
		name    string
		trusted bool
		fields  string
		keeps   string // what is kept; empty: a new one is made
	}{
		{"none", false, "", ""},
		{"of anybody", false, "X-Request-Id: mine\r\n", ""},
		{"of anybody, as servers may read it", false, "x_request-id: mine\r\nX_REQUEST_ID: mine\r\nx-request_ID: mine\r\n", ""},
		{"of a trusted peer", true, "x-request-id: AZaz09-._~:+/=@\r\n", "AZaz09-._~:+/=@"},
		{"long", true, "X-Request-Id: " + long + "\r\n", long},
		{"too long", true, "X-Request-Id: " + long + "x\r\n", ""},
		{"empty", true, "X-Request-Id:\r\n", ""},
		{"with a space", true, "X-Request-Id: a b\r\n", ""},
		{"with a quote", true, "X-Request-Id: a\"b\r\n", ""},
		{"not ASCII", true, "X-Request-Id: \xe9\r\n", ""},
		{"two", true, "X-Request-Id: a\r\nX: y\r\nX-Request-Id: b\r\n", "a"},
		{"for this hop", true, "Connection: x-request-id, x\r\nX-Request-Id: a\r\nX: y\r\n", ""},
	} {
		for _, slow := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, slow %v", row.name, slow), func(t *testing.T) {
				var mu sync.Mutex
				var told []string
				g := startGateway(t, func(cfg *Config) {
					if cfg.RequestIDs = true; row.trusted {
						trustLoopback(cfg)
					}
					cfg.AccessLog = func(r *Record) {
						mu.Lock()
						defer mu.Unlock()
						told = append(told, string(r.RequestID))
					}
				}, nil)
				if slow {
					g.cfg().slowAfter = 0
				}
				asked := make(chan *message, 1)
				a := startActor(t, func(c net.Conn, m *message) bool {
					asked <- m
					if slow {
						time.Sleep(30 * time.Millisecond)
					}
					_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nX-Request-ID: theirs\r\nX: y\r\nX_Request_Id: theirs\r\nContent-Length: 0\r\n\r\n")
					return err == nil
				})
				g.register(t, "echo", "a", a.url())
				answer := g.do(t, "GET /echo HTTP/1.1\r\nHost: a\r\n"+row.fields+"\r\n").want(t, 200)
				id, head := answer.field("X-Request-Id"), (<-asked).head
				if row.keeps != "" && id != row.keeps || row.keeps == "" && !uuid7.MatchString(id) {
					t.Errorf("the client got %q", answer.head)
				}
				if strings.Contains(answer.head, "theirs") || answer.field("X") != "y" {
					t.Errorf("the client got %q", answer.head)
				}
				if !strings.Contains(head, "\r\nX-Request-Id: "+id+"\r\n") || len(regexp.MustCompile(`(?i)x[-_]request[-_]id:`).FindAllString(head, -1)) != 1 {
					t.Errorf("the backend got %q", head)
				}
				eventually(t, "it is told", func() bool {
					mu.Lock()
					defer mu.Unlock()
					return slices.Equal(told, []string{id})
				})
			})
		}
	}
}

// What the gateway answers itself has an id too, and ids differ.
func TestRequestIDsOfOwnAnswers(t *testing.T) {
	g := startGateway(t, func(cfg *Config) { cfg.RequestIDs, cfg.HealthPath = true, "/up" }, nil)
	seen := map[string]bool{}
	for _, request := range []string{
		"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n", "GET /echo HTTP/1.1\r\nHost: a\r\n\r\n", "nonsense\r\n\r\n", "GET /up HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		id := g.do(t, request).field("X-Request-Id")
		if !uuid7.MatchString(id) || seen[id] {
			t.Errorf("%q: %q", request, id)
		}
		seen[id] = true
	}
	off := startGateway(t, nil, nil)
	off.register(t, "echo", "a", answering(t, "HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 0\r\n\r\n").url())
	if m := off.do(t, toHTTP11); m.field("X-Request-Id") != "theirs" {
		t.Errorf("without request ids: %q", m.head)
	}
}

const (
	parentTrace = "0af7651916cd43dd8448eb211c80319c"
	parentSpan  = "b7ad6b7169203331"
)

// Those of the test suite of W3C Trace Context that are about the syntax.
func TestParseTraceparent(t *testing.T) {
	valid := "00-" + parentTrace + "-" + parentSpan + "-01"
	for _, row := range []struct {
		value       string
		ok, sampled bool
	}{
		{valid, true, true},
		{strings.Replace(valid, "-01", "-00", 1), true, false},
		{strings.Replace(valid, "-01", "-ff", 1), true, true},
		{strings.Replace(valid, "-01", "-02", 1), true, false},
		{"cc" + valid[2:], true, true},
		{"cc" + valid[2:] + "-what-the-future-brings", true, true},
		{"cc" + valid[2:] + ".what", false, false},
		{"ff" + valid[2:], false, false},
		{valid + "-", false, false},
		{valid + "-x", false, false},
		{valid[:54], false, false},
		{"", false, false},
		{strings.ToUpper(valid), false, false},
		{strings.Replace(valid, parentTrace, strings.Repeat("0", 32), 1), false, false},
		{strings.Replace(valid, parentSpan, strings.Repeat("0", 16), 1), false, false},
		{strings.Replace(valid, "af", "ag", 1), false, false},
		{strings.Replace(valid, "-", "_", 1), false, false},
		{strings.Replace(valid, "-01", "-0x", 1), false, false},
	} {
		id, span, sampled, ok := parseTraceparent([]byte(row.value))
		if ok != row.ok || sampled != row.sampled || ok && (hex.EncodeToString(id[:]) != parentTrace || hex.EncodeToString(span[:]) != parentSpan) {
			t.Errorf("%s: %x %x %v %v", row.value, id, span, sampled, ok)
		}
		if !ok && (id != [16]byte{} || span != [8]byte{}) {
			t.Errorf("%s: it is malformed and has %x %x", row.value, id, span)
		}
	}
}

// FuzzTraceparent compares with OpenTelemetry's parser. That refuses flags of version 00 which the recommendation has not
// given a meaning yet, and takes a "-" behind them.
func FuzzTraceparent(f *testing.F) {
	valid := "00-" + parentTrace + "-" + parentSpan + "-01"
	for _, seed := range []string{valid, "cc" + valid[2:] + "-more", "ff" + valid[2:], valid + "-", valid[:53] + "ff", valid[:54], strings.ToUpper(valid), ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		id, span, sampled, ok := parseTraceparent([]byte(value))
		their := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(t.Context(), propagation.MapCarrier{"traceparent": value}))
		first := strings.HasPrefix(value, "00-")
		switch {
		case ok && their.IsValid():
			if their.TraceID() != id || their.SpanID() != span || their.IsSampled() != sampled {
				t.Errorf("%q: %x %x %v, and %+v", value, id, span, sampled, their)
			}
		case ok && !(first && value[53:] > "03"):
			t.Errorf("%q is taken", value)
		case their.IsValid() && !ok && !(first && strings.HasSuffix(value, "-")):
			t.Errorf("%q is refused", value)
		}
	})
}

var traceparentLine = regexp.MustCompile(`(?i)\r\ntraceparent: (.*)\r\n`)

// What becomes of a traceparent, by who sent it and what is sampled.
func TestTraceparent(t *testing.T) {
	sampled, unsampled := "00-"+parentTrace+"-"+parentSpan+"-01", "00-"+parentTrace+"-"+parentSpan+"-00"
	const state = "tracestate: a=1\r\nTracestate: b=2\r\n"
	for _, row := range []struct {
		name      string
		trusted   bool
		share     float64
		fields    string
		traced    bool
		continues bool   // the trace goes on
		passes    string // as it came; empty: one of ours
		state     bool   // tracestate goes on
	}{
		{"none", false, 1, "", true, false, "", false},
		{"none, not sampled", false, 0, "", false, false, "", false},
		{"one", false, 1, "Traceparent: " + sampled + "\r\n" + state, true, true, "", true},
		{"not sampled by a client", false, 1, "traceparent: " + unsampled + "\r\n" + state, true, true, "", true},
		{"sampled by a client", false, 0, "traceparent: " + sampled + "\r\n" + state, false, true, "", true},
		{"nobody samples", false, 0, "traceparent: " + unsampled + "\r\n" + state, false, true, unsampled, true},
		{"sampled by a trusted peer", true, 0, "traceparent: " + sampled + "\r\n" + state, true, true, "", true},
		{"not sampled by a trusted peer", true, 1, "traceparent: " + unsampled + "\r\n" + state, false, true, unsampled, true},
		{"malformed", true, 0, "traceparent: 00-x\r\n" + state, false, false, "", false},
		{"malformed, sampled", false, 1, "traceparent: 00-x\r\n" + state, true, false, "", false},
		{"two", true, 1, "traceparent: " + sampled + "\r\nX: y\r\ntraceparent: " + sampled + "\r\n" + state, true, false, "", false},
		{"tracestate alone", false, 1, state, true, false, "", false},
		{"for this hop", true, 1, "Connection: traceparent, tracestate\r\ntraceparent: " + sampled + "\r\n" + state, true, false, "", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			traces := make(chan Record, 1)
			ids := make(chan [16]byte, 1)
			g := startGateway(t, func(cfg *Config) {
				if row.trusted {
					trustLoopback(cfg)
				}
				cfg.TraceShare = row.share
				cfg.Trace = func(r *Record) { traces <- *r.clone() }
				cfg.AccessLog = func(r *Record) { ids <- r.TraceID }
			}, nil)
			o := naming(t, "a")
			g.register(t, "echo", "a", o.url())
			g.do(t, "GET /echo HTTP/1.1\r\nHost: a\r\n"+row.fields+"\r\n").want(t, 200)
			head, id := o.requests()[0].head, <-ids
			found := traceparentLine.FindAllStringSubmatch(head, -1)
			if len(found) != 1 {
				t.Fatalf("the backend got %q", head)
			}
			got, gotSpan, flagged, ok := parseTraceparent([]byte(found[0][1]))
			if !ok || got != id || (hex.EncodeToString(id[:]) == parentTrace) != row.continues || flagged != row.traced {
				t.Errorf("the backend got %q of the trace %x", head, id)
			}
			if row.passes != "" && found[0][1] != row.passes || row.passes == "" && hex.EncodeToString(gotSpan[:]) == parentSpan {
				t.Errorf("the backend got %q", head)
			}
			if (strings.Contains(head, "a=1") && strings.Contains(head, "b=2")) != row.state || !row.state && strings.Contains(strings.ToLower(head), "tracestate") {
				t.Errorf("the backend got %q", head)
			}
			if !row.traced {
				select {
				case r := <-traces:
					t.Errorf("it is traced: %+v", r)
				default:
				}
				return
			}
			r := <-traces
			if len(r.Trace.Attempts) != 1 || r.Trace.Attempts[0].Span != gotSpan || r.TraceID != id {
				t.Errorf("%+v", r.Trace)
			}
			if row.continues != (hex.EncodeToString(r.Trace.Parent[:]) == parentSpan) || row.continues && r.Trace.State != "a=1,b=2" || !row.continues && r.Trace.State != "" {
				t.Errorf("%+v", r.Trace)
			}
		})
	}
}

// Without tracing what a client says of a trace goes on as it came, also if it is malformed.
func TestTraceparentPasses(t *testing.T) {
	o := naming(t, "a")
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", o.url())
	g.do(t, "GET /echo HTTP/1.1\r\nHost: a\r\ntraceparent: nonsense\r\ntracestate: a=1\r\n\r\n").want(t, 200)
	if head := o.requests()[0].head; !strings.Contains(head, "traceparent: nonsense\r\ntracestate: a=1\r\n") {
		t.Errorf("the backend got %q", head)
	}
}

// Each attempt has a span, with what became of it.
func TestAttempts(t *testing.T) {
	traces := make(chan Record, 1)
	g := startGateway(t, func(cfg *Config) {
		patient(2)(cfg)
		cfg.TraceShare, cfg.Trace = 1, func(r *Record) { traces <- *r.clone() }
	}, nil)
	g.register(t, "echo", "a", refusedAddr(t))
	b := naming(t, "b")
	g.register(t, "echo", "b", b.url())
	for range 2 {
		g.do(t, toHTTP11).want(t, 200)
		r := <-traces
		spans := map[[8]byte]bool{r.Trace.Span: true}
		for i, a := range r.Trace.Attempts {
			if spans[a.Span] || a.Began.Before(r.Began) || a.Ended.Before(a.Began) || a.Ended.After(r.Began.Add(r.Took)) {
				t.Errorf("%+v of %+v", a, r)
			}
			spans[a.Span] = true
			switch last := i == len(r.Trace.Attempts)-1; {
			case last && (a.Instance != "b" || a.Status != 200 || a.Reason != "" || a.Addr != b.url()):
				t.Errorf("%+v", a)
			case !last && (a.Instance != "a" || a.Status != 0 || a.Reason != "connection_refused" || a.Host != "127.0.0.1" || a.Port == 0):
				t.Errorf("%+v", a)
			}
		}
		if len(r.Trace.Attempts) != r.Attempts {
			t.Errorf("%d spans of %d attempts", len(r.Trace.Attempts), r.Attempts)
		}
	}
}

// What an instance said of an answer that was none, in part or badly, is no status of the attempt.
func TestAttemptWithoutAnswer(t *testing.T) {
	traces := make(chan Record, 1)
	g := startGateway(t, func(cfg *Config) {
		cfg.TraceShare, cfg.Trace = 1, func(r *Record) { traces <- *r.clone() }
	}, nil)
	for i, said := range []string{"HTTP/1.1 20", "HTTP/1.1 200 OK\r\nX: y\r\n", "HTTP/1.1 200 OK\r\nX: y\r\nBad Name: z\r\n\r\n"} {
		service := fmt.Sprint("s", i)
		o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
			if _, err := readMessage(r, false); err == nil {
				_, _ = io.WriteString(c, said)
			}
		})
		g.register(t, service, "a", o.url())
		g.do(t, "POST /"+service+" HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").want(t, 502)
		for _, a := range (<-traces).Trace.Attempts {
			if a.Status != 0 || a.Reason == "" {
				t.Errorf("%q: %+v", said, a)
			}
		}
	}
}

// Spans that are put among others, in any order, drop just those lines.
func TestInsertSpan(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		lines := make([]byte, 26)
		for i := range lines {
			lines[i] = byte('a' + i)
		}
		var spans []span
		gone := map[int]bool{}
		for i := 0; i < 26; i++ { // as parse does
			if random.IntN(4) == 0 {
				spans = appendSpan(spans, i, i+1)
				gone[i] = true
			}
		}
		for range random.IntN(6) {
			i := random.IntN(26)
			if dropped(spans, i) != gone[i] {
				t.Fatalf("%v: %d", spans, i)
			}
			spans = insertSpan(spans, i, i+1)
			gone[i] = true
		}
		want := ""
		for i, c := range lines {
			if !gone[i] {
				want += string(c)
			}
		}
		if got := string(appendLines(nil, lines, spans)); got != want {
			t.Fatalf("%v: %s, want %s", spans, got, want)
		}
	}
}
