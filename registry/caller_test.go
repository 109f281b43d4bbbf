package registry

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"
)

// lines are what was logged. They may be read while there are more.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// take returns the lines since the last call, without what all have.
func (l *lines) take(t *testing.T) []string {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	for line := range strings.Lines(l.text.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if fields["msg"] == "registration changed" && (fields["by"] != "the test" || fields["peer"] != near.String() || fields["level"] != "INFO") {
			t.Errorf("who and where: %s", line)
		}
		for _, name := range []string{"time", "level", "by", "peer"} {
			delete(fields, name)
		}
		if fields["msg"] == "registration changed" {
			delete(fields, "msg")
		}
		text, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(text))
	}
	l.text.Reset()
	return all
}

// named is a caller who may do everything, or nothing to services that do not begin with may, and to some networks only.
type named struct {
	may      string
	networks []netip.Prefix
}

func (named) Name() string                             { return "the test" }
func (n named) May(_ Right, service string) bool       { return strings.HasPrefix(service, n.may) }
func (n named) Still(right Right, service string) bool { return n.May(right, service) }
func (n named) Networks() []netip.Prefix               { return n.networks }
func (n named) calling(h fasthttp.RequestHandler) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		SetCaller(ctx, n)
		h(ctx)
	}
}

// Each change is logged once, with what has become another, and what changes nothing is not.
func TestAudit(t *testing.T) {
	log := &lines{}
	reg := New(Config{Log: slog.New(slog.NewJSONHandler(log, nil))})
	defer reg.Close()
	h := named{}.calling(NewHandler(reg, nil))
	const one = `"addr":"http://10.0.0.1"`
	for _, row := range []struct {
		method, target, body string
		status               int
		want                 []string
	}{
		{"POST", "/register", `{"service":"echo","id":"a",` + one + `}`, 204, []string{`{"action":"register","addr":"http://10.0.0.1","instance":"echo/a"}`}},
		{"POST", "/register", `{"service":"echo","id":"a",` + one + `}`, 204, nil},
		{"POST", "/register", `{"service":"echo","id":"a",` + one + `,"weight":3,"ttl":"1m"}`, 204,
			[]string{`{"action":"register","instance":"echo/a","ttl":"1m0s","was":{"ttl":"0s","weight":0},"weight":3}`}},
		{"PUT", "/services/echo/a", `{` + one + `,"weight":3,"ttl":"1m"}`, 204, nil},
		{"PUT", "/services/echo/a", `{"addr":"http://10.0.0.2","weight":3,"ttl":"1m"}`, 204,
			[]string{`{"action":"register","addr":"http://10.0.0.2","instance":"echo/a","was":{"addr":"http://10.0.0.1"}}`}},
		{"PUT", "/services/echo/a", `{"addr":"http://10.0.0.2","weight":3,"ttl":"1m","check":{"tcp":true},"slow_start":"9s"}`, 204,
			[]string{`{"action":"register","check":"{\"tcp\":true,\"interval\":\"2s\",\"timeout\":\"1s\",\"fall\":3,\"rise\":2,\"start\":\"down\"}","instance":"echo/a","slow_start":"9s","was":{"check":"","slow_start":"0s"}}`}},
		{"PUT", "/services/echo/a", `{"addr":"http://10.0.0.2","weight":3,"ttl":"1m","check":{"tcp":true},"slow_start":"9s"}`, 204, nil},
		{"PUT", "/services/echo/a", `{"addr":"http://10.0.0.2","weight":3,"ttl":"1m"}`, 204,
			[]string{`{"action":"register","check":"","instance":"echo/a","slow_start":"0s","was":{"check":"{\"tcp\":true,\"interval\":\"2s\",\"timeout\":\"1s\",\"fall\":3,\"rise\":2,\"start\":\"down\"}","slow_start":"9s"}}`}},
		{"POST", "/services/echo/a/heartbeat", "", 204, nil},
		{"POST", "/services/echo/b/heartbeat", "", 404, nil},
		{"GET", "/services", "", 200, nil},
		{"PATCH", "/services/echo/a", `{"weight":9,"state":"down"}`, 204,
			[]string{`{"action":"patch","instance":"echo/a","override_state":"down","override_weight":9,"was":{"override_state":"","override_weight":0}}`}},
		{"PATCH", "/services/echo/a", `{"weight":9}`, 204, nil},
		{"PATCH", "/services/echo/a", `{}`, 204, nil},
		{"PATCH", "/services/echo/a", `{"state":null}`, 204,
			[]string{`{"action":"patch","instance":"echo/a","override_state":"","was":{"override_state":"down"}}`}},
		{"PATCH", "/services/echo/a", `{"metadata":{"zone":"b"}}`, 204,
			[]string{`{"action":"patch","instance":"echo/a","override_metadata":"{\"zone\":\"b\"}","was":{"override_metadata":""}}`}},
		{"PATCH", "/services/echo/a", `{"metadata":{"zone":"b"}}`, 204, nil},
		{"PATCH", "/services/echo/a", `{"metadata":null}`, 204,
			[]string{`{"action":"patch","instance":"echo/a","override_metadata":"","was":{"override_metadata":"{\"zone\":\"b\"}"}}`}},
		{"PATCH", "/services/echo/b", `{"weight":9}`, 404, nil},
		{"PATCH", "/services/echo/a", `{"weight":0}`, 400, nil},
		{"POST", "/register?hold", `{"service":"echo","id":"a","addr":"http://10.0.0.2","weight":3,"ttl":"1m"}`, 200,
			[]string{`{"action":"register","held":true,"instance":"echo/a","was":{"held":false}}`}},
		{"POST", "/register?hold", `{"service":"echo","id":"a","addr":"http://10.0.0.2","weight":3,"ttl":"1m"}`, 200, nil},
		{"DELETE", "/services/echo/a?addr=http://10.0.0.1", "", 409, nil},
		{"DELETE", "/services/echo/a?addr=http://10.0.0.1&drain=1s", "", 409, nil},
		{"DELETE", "/services/echo/a", "", 204, []string{`{"action":"unregister","addr":"http://10.0.0.2","instance":"echo/a"}`}},
		{"DELETE", "/services/echo/a", "", 404, nil},
		{"DELETE", "/services/echo/a?drain=1s", "", 404, nil},
		{"POST", "/register?hold", `{"service":"echo","id":"b",` + one + `}`, 200,
			[]string{`{"action":"register","addr":"http://10.0.0.1","held":true,"instance":"echo/b"}`}},
		{"DELETE", "/register", `{"service":"echo","id":"b","drain":"1m"}`, 200, []string{
			`{"action":"drain","addr":"http://10.0.0.1","instance":"echo/b","limit":"1m0s"}`,
			`{"cut":0,"instance":"echo/b","msg":"instance has left: its drain is over","waited":"TIME"}`}},
		{"POST", "/register", `{"service":"echo","id":"c","addr":"nowhere"}`, 400, nil},
		{"POST", "/register", `{"service":"echo","id":"c",` + one + `,"metadata":{"b":"2","a":"1"}}`, 204,
			[]string{`{"action":"register","addr":"http://10.0.0.1","instance":"echo/c","metadata":"{\"a\":\"1\",\"b\":\"2\"}"}`}},
		{"POST", "/register", `{"service":"echo","id":"c",` + one + `,"metadata":{"a":"1","b":"2"}}`, 204, nil},
		{"DELETE", "/register", `{"service":"echo","id":"c"}`, 204, []string{`{"action":"unregister","addr":"http://10.0.0.1","instance":"echo/c"}`}},
	} {
		what := row.method + " " + row.target + " " + row.body
		if got := call(h, near, row.method, row.target, row.body); got.StatusCode() != row.status {
			t.Errorf("%s: %s", what, got)
		}
		var got []string
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // the end of a drain is logged behind its answer
			if got = append(got, log.take(t)...); len(got) >= len(row.want) || time.Now().After(deadline) {
				break
			}
		}
		for i, line := range got {
			if before, after, ok := strings.Cut(line, `"waited":"`); ok {
				_, after, _ = strings.Cut(after, `"`)
				got[i] = before + `"waited":"TIME"` + after
			}
		}
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("%s: want -, got +\n%s", what, diff)
		}
	}
}

// What the line for a new instance, and that a renewal needs none, costs beside the registration.
func BenchmarkAudit(b *testing.B) {
	var ctx fasthttp.RequestCtx
	ctx.Init(&fasthttp.Request{}, near, nil)
	in := &Instance{ID: "inst-1", Addr: "http://10.0.0.1:8080", registered: registered{weight: 3}}
	file, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	for _, row := range []struct {
		name   string
		out    io.Writer
		before *Instance
	}{{"new", io.Discard, nil}, {"new, to a file", file, nil}, {"renewal", io.Discard, in.copy()}} {
		b.Run(row.name, func(b *testing.B) {
			a := &api{reg: New(Config{Log: slog.New(slog.NewJSONHandler(row.out, nil))})}
			b.ReportAllocs()
			for b.Loop() {
				a.auditChange(&ctx, "register", "echo", row.before, in)
			}
		})
	}
}

// Who drains twice changes something once, and a drain that its instance did not wait for says nothing at its end.
// Where the name of an instance may lead follows from who registers it.
func TestAuditNetworks(t *testing.T) {
	log := &lines{}
	reg := New(Config{Log: slog.New(slog.NewJSONHandler(log, nil))})
	defer reg.Close()
	const body = `{"service":"echo","id":"a","addr":"http://10.0.0.1"}`
	wantNoContent(t, call(named{}.calling(NewHandler(reg, nil)), near, "POST", "/register", body))
	log.take(t)
	within := named{networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}.calling(NewHandler(reg, nil))
	for _, want := range [][]string{{`{"action":"register","instance":"echo/a","networks":"10.0.0.0/8 fd00::/8","was":{"networks":""}}`}, nil} {
		wantNoContent(t, call(within, near, "POST", "/register", body))
		if diff := cmp.Diff(want, log.take(t)); diff != "" {
			t.Error(diff)
		}
	}
}

func TestAuditDrains(t *testing.T) {
	log := &lines{}
	reg := New(Config{Log: slog.New(slog.NewJSONHandler(log, nil))})
	defer reg.Close()
	u := &underWay{}
	u.now.Store(1)
	reg.Observe(u.of)
	h := named{}.calling(NewHandler(reg, nil))
	wantNoContent(t, call(h, near, "POST", "/register", inst1))
	log.take(t)
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() { call(h, near, "DELETE", "/services/echo/inst-1?drain=1m", "") })
	}
	var got []string
	eventually(t, "it drains", func() bool { got = append(got, log.take(t)...); return len(got) > 0 })
	both.Go(func() { call(h, near, "DELETE", "/services/echo/inst-1?drain=30s", "") })
	eventually(t, "the drain is shorter", func() bool { got = append(got, log.take(t)...); return len(got) > 1 })
	wantNoContent(t, call(h, near, "DELETE", "/services/echo/inst-1", ""))
	u.now.Store(0)
	both.Wait()
	got = append(got, log.take(t)...)
	want := []string{`{"action":"drain","addr":"http://localhost:8081","instance":"echo/inst-1","limit":"1m0s"}`,
		`{"action":"drain","addr":"http://localhost:8081","instance":"echo/inst-1","limit":"30s"}`,
		`{"action":"unregister","addr":"http://localhost:8081","instance":"echo/inst-1"}`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}

// A caller without the right changes nothing, and learns nothing of what there is.
func TestPermit(t *testing.T) {
	reg := New(Config{})
	defer reg.Close()
	register(t, reg, "theirs", "a", "http://10.0.0.1", 1)
	register(t, reg, "mine", "a", "http://10.0.0.1", 1)
	before := reg.Snapshot("theirs")
	h := named{may: "mine"}.calling(NewHandler(reg, nil))
	for _, service := range []string{"theirs", "unknown"} {
		for _, row := range []struct{ right, method, target, body string }{
			{"register", "POST", "/register", `{"service":"` + service + `","id":"a","addr":"http://10.0.0.9"}`},
			{"register", "POST", "/register?hold", `{"service":"` + service + `","id":"a","addr":"http://10.0.0.9"}`},
			{"register", "DELETE", "/register", `{"service":"` + service + `","id":"a"}`},
			{"register", "DELETE", "/register", `{"service":"` + service + `","id":"a","drain":"1s"}`},
			{"register", "PUT", "/services/" + service + "/a", `{"addr":"http://10.0.0.9"}`},
			{"register", "PATCH", "/services/" + service + "/a", `{"state":"down"}`},
			{"register", "DELETE", "/services/" + service + "/a", ""},
			{"register", "DELETE", "/services/" + service + "/a?drain=1s", ""},
			{"register", "POST", "/services/" + service + "/a/heartbeat", ""},
			{"read", "GET", "/services/" + service, ""},
			{"read", "GET", "/services/" + service + "/a", ""},
		} {
			wantProblem(t, call(h, near, row.method, row.target, row.body), 403, "service", fmt.Sprintf("the test has no right to %s service %q", row.right, service))
		}
	}
	if reg.Snapshot("theirs") != before {
		t.Error("it has changed")
	}
	if got := call(h, near, "GET", "/services", ""); strings.Contains(string(got.Body()), "theirs") || !strings.Contains(string(got.Body()), `"name":"mine"`) {
		t.Errorf("the list is %s", got)
	}
	// A bad name is one for everybody.
	wantProblem(t, call(h, near, "POST", "/register", `{"service":"a b","id":"a","addr":"http://10.0.0.9"}`), 400, "service", "not allowed at byte 2")
}

// What has expired is listed to those who may read it.
func TestExpiredOfOthers(t *testing.T) {
	reg := New(Config{})
	defer reg.Close()
	reg.expired = []Expired{{"theirs", "a", "http://10.0.0.1", time.Now()}, {"mine", "b", "http://10.0.0.1", time.Now()}}
	got := call(named{may: "mine"}.calling(NewHandler(reg, nil)), near, "GET", "/services", "")
	if text := string(got.Body()); strings.Contains(text, "theirs") || !strings.Contains(text, `"service":"mine"`) {
		t.Error(text)
	}
}

// Networks of who registers narrow where an instance may point, and widen nothing.
func TestNetworks(t *testing.T) {
	reg := New(Config{Addrs: AddrPolicy{Deny: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}})
	h := named{networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("127.0.0.2/32")}}.calling(NewHandler(reg, nil))
	addr := func(peer net.Addr, addr string) *fasthttp.Response {
		return call(h, peer, "POST", "/register", fmt.Sprintf(`{"service":"echo","id":"a","addr":%q}`, addr))
	}
	for _, good := range []string{"http://10.0.0.1", "http://[2001:db8::1]:80", "http://[::ffff:10.2.0.1]", "http://users.example"} {
		wantNoContent(t, addr(near, good))
	}
	for bad, says := range map[string]string{
		"http://11.0.0.1": "none of the networks", "http://[2001:db9::1]": "none of the networks", "http://127.0.0.1": "none of the networks",
		"http://localhost:80": "none of the networks", "http://10.1.0.1": "--addr-deny",
	} {
		wantProblem(t, addr(near, bad), 400, "addr", says)
	}
	wantNoContent(t, addr(near, "http://127.0.0.2"))
	wantProblem(t, addr(far, "http://127.0.0.2"), 400, "addr", "loopback")

	// A name is judged where it leads to, also when an operator has changed the instance, until somebody else registers it.
	wantNoContent(t, addr(near, "http://users.example"))
	wantNoContent(t, call(h, near, "PATCH", "/services/echo/a", `{"weight":7}`))
	in := reg.Snapshot("echo").Instance("a")
	if err := reg.CheckAddr(in, netip.MustParseAddrPort("10.0.0.1:80")); err != nil {
		t.Error(err)
	}
	if reg.CheckAddr(in, netip.MustParseAddrPort("11.0.0.1:80")) == nil {
		t.Error("a name may lead out of the networks")
	}
	wantNoContent(t, call(NewHandler(reg, nil), near, "POST", "/register", `{"service":"echo","id":"a","addr":"http://users.example"}`))
	if err := reg.CheckAddr(reg.Snapshot("echo").Instance("a"), netip.MustParseAddrPort("11.0.0.1:80")); err != nil {
		t.Error(err)
	}
}
