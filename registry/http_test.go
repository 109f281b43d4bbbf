package registry

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"
)

var (
	near = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	far  = &net.TCPAddr{IP: net.IPv4(10, 9, 8, 7), Port: 1}
)

// call runs one request against a handler without a socket.
func call(h fasthttp.RequestHandler, peer net.Addr, method, target, body string) *fasthttp.Response {
	var req fasthttp.Request
	req.Header.SetMethod(method)
	req.SetRequestURI(target)
	req.Header.SetHost("localhost")
	if body != "" {
		req.Header.SetContentType("application/json")
		req.SetBodyString(body)
	}
	return run(h, peer, &req)
}

func run(h fasthttp.RequestHandler, peer net.Addr, req *fasthttp.Request) *fasthttp.Response {
	var ctx fasthttp.RequestCtx
	ctx.Init(req, peer, nil)
	h(&ctx)
	var resp fasthttp.Response
	ctx.Response.CopyTo(&resp)
	return &resp
}

type problem struct {
	Type, Title   string
	Status        int
	Detail, Field string
}

// wantProblem checks that a response is problem+json of that status, field and part of its detail.
func wantProblem(t *testing.T, resp *fasthttp.Response, status int, field, says string) {
	t.Helper()
	var p problem
	dec := json.NewDecoder(bytes.NewReader(resp.Body()))
	dec.DisallowUnknownFields()
	err := dec.Decode(&p)
	switch {
	case err != nil || string(resp.Header.ContentType()) != "application/problem+json":
		t.Errorf("no problem+json: %v\n%s", err, resp)
	case resp.StatusCode() != status || p.Status != status || p.Field != field || !strings.Contains(p.Detail, says):
		t.Errorf("status %d, %+v; want %d, field %q and %q", resp.StatusCode(), p, status, field, says)
	case p.Type != "about:blank" || p.Title != fasthttp.StatusMessage(status):
		t.Errorf("type %q, title %q", p.Type, p.Title)
	case len(p.Detail) > 600:
		t.Errorf("the detail has %d bytes", len(p.Detail))
	}
}

func wantNoContent(t *testing.T, resp *fasthttp.Response) {
	t.Helper()
	if resp.StatusCode() != 204 || len(resp.Body()) != 0 {
		t.Errorf("want 204 and nothing, got %s", resp)
	}
}

const inst1 = `{"service":"echo","id":"inst-1","addr":"http://localhost:8081","weight":2}`

func TestAPI(t *testing.T) {
	reg := New(Config{})
	h := NewHandler(reg, nil)
	wantNoContent(t, call(h, near, "POST", "/register", inst1))
	in := reg.Snapshot("echo").Instance("inst-1")
	if in.Addr != "http://localhost:8081" || in.Weight != 2 || in.remote {
		t.Errorf("registered %+v", in)
	}
	wantNoContent(t, call(h, near, "PUT", "/services/echo/checked", `{"check":{"path":"/health","keep_alive":true},"slow_start":"30s","addr":"http://localhost:8081"}`))
	if got := string(call(h, near, "GET", "/services/echo/checked", "").Body()); !strings.HasSuffix(got, `"check":{"path":"/health","interval":"2s","timeout":"1s","fall":3,"rise":2,"status":"200-399","keep_alive":true,"start":"down"},"slow_start":"30s"}`+"\n") {
		t.Errorf("checked: %s", got)
	}
	wantNoContent(t, call(h, near, "DELETE", "/services/echo/checked", ""))
	// The same id again updates it in place, by either call.
	wantNoContent(t, call(h, near, "POST", "/register", `{"weight":3,"addr":"http://localhost:8081","id":"inst-1","service":"echo"}`))
	if got := reg.Snapshot("echo").Instance("inst-1"); got.Weight != 3 || len(reg.Snapshot("echo").Instances()) != 1 {
		t.Errorf("updated to %+v", got)
	}
	wantNoContent(t, call(h, near, "PUT", "/services/echo/inst-1", `{"addr":"https://localhost:8082/base"}`))
	if got := reg.Snapshot("echo").Instance("inst-1"); got.Weight != 0 || got.Addr != "https://localhost:8082/base" {
		t.Errorf("put: %+v", got)
	}
	wantNoContent(t, call(h, near, "PUT", "/services/echo/a%3ab%7Ec", `{"addr":"http://localhost:1","weight":1000000}`))
	if got := ids(reg.Snapshot("echo")); !slices.Equal(got, []string{"a:b~c", "inst-1"}) {
		t.Errorf("ids %v", got)
	}

	wantNoContent(t, call(h, near, "DELETE", "/services/echo/a:b~c", ""))
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a:b~c", ""), 404, "id", `service "echo" has no instance "a:b~c"`)
	wantProblem(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"inst-9"}`), 404, "id", "no instance")
	wantNoContent(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"inst-1"}`))
	wantProblem(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"inst-1"}`), 404, "service", `no service "echo"`)
	if got := call(h, near, "GET", "/services", ""); string(got.Body()) != "{\"services\":[]}\n" || got.StatusCode() != 200 {
		t.Errorf("the list of none is %s", got)
	}
}

func TestLeaseAPI(t *testing.T) {
	reg := New(Config{})
	defer reg.Close()
	h := NewHandler(reg, nil)
	lease := func() string {
		t.Helper()
		var in struct {
			Lease *struct{ TTL, Expires_In string }
		}
		resp := call(h, near, "GET", "/services/echo/a", "")
		if err := json.Unmarshal(resp.Body(), &in); err != nil {
			t.Fatal(err)
		}
		if in.Lease == nil {
			return ""
		}
		left, err := time.ParseDuration(in.Lease.Expires_In)
		ttl, _ := time.ParseDuration(in.Lease.TTL)
		if err != nil || left > ttl || left < ttl-10*time.Second {
			t.Errorf("%+v, %v", in.Lease, err)
		}
		return in.Lease.TTL
	}
	for _, row := range []struct{ ttl, want string }{
		{`"1m30s"`, "1m30s"}, {`"15s"`, "15s"}, {`"24h"`, "24h0m0s"}, {`"1000ms"`, "1s"}, {`"0s"`, ""}, {`"0"`, ""},
	} {
		for _, c := range []struct{ method, path, body string }{
			{"POST", "/register", `{"service":"echo","id":"a","addr":"http://localhost:1","ttl":` + row.ttl + `}`},
			{"PUT", "/services/echo/a", `{"addr":"http://localhost:1","ttl":` + row.ttl + `}`},
		} {
			wantNoContent(t, call(h, near, c.method, c.path, c.body))
			if got := lease(); got != row.want {
				t.Errorf("%s with ttl %s has a lease of %q", c.method, row.ttl, got)
			}
			wantNoContent(t, call(h, near, "POST", "/services/echo/a/heartbeat", ""))
		}
	}
	for _, ttl := range []string{`"999ms"`, `"24h1s"`, `"-15s"`, `"15"`, `"x"`, `15`, `null`, `"9999999999h"`} {
		wantProblem(t, call(h, near, "PUT", "/services/echo/b", `{"addr":"http://localhost:1","ttl":`+ttl+`}`), 400, "ttl", "ttl")
	}
	wantProblem(t, call(h, near, "POST", "/services/echo/b/heartbeat", ""), 404, "id", "register again")
	wantProblem(t, call(h, near, "POST", "/services/none/b/heartbeat", ""), 404, "id", "register again")
	wantProblem(t, call(h, near, "POST", "/services/echo/a/heartbeat", "{}"), 400, "", "no body")
	wantProblem(t, call(h, near, "GET", "/services/echo/a/heartbeat", ""), 405, "", "POST")

	wantProblem(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"a","addr":"http://localhost:2"}`), 409, "addr", "nothing has changed")
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a?addr=http://localhost:2", ""), 409, "addr", "nothing has changed")
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a?addr=localhost:1", ""), 400, "addr", "http or https")
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a?addr=x&addr=y", ""), 400, "addr", "twice")
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a?addr=", ""), 400, "addr", "is empty")
	wantProblem(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"a","addr":""}`), 400, "addr", "is empty")
	wantProblem(t, call(h, near, "POST", "/services/echo/a/heartbeat?addr=http://localhost:2", ""), 409, "addr", "nothing has changed")
	wantProblem(t, call(h, near, "POST", "/services/echo/a/heartbeat?addr=", ""), 400, "addr", "is empty")
	wantNoContent(t, call(h, near, "POST", "/services/echo/a/heartbeat?addr=http://localhost:1", ""))
	wantProblem(t, call(h, near, "DELETE", "/services/echo/a?adr=x", ""), 400, "adr", "this call takes addr, drain")
	wantNoContent(t, call(h, near, "DELETE", "/services/echo/a?addr=http%3A%2F%2Flocalhost:1", ""))
}

func TestPatchAPI(t *testing.T) {
	reg := New(Config{})
	h := NewHandler(reg, nil)
	wantNoContent(t, call(h, near, "POST", "/register", inst1))
	for _, row := range []struct{ body, want string }{
		{`{"weight":5}`, `"state":"up","override":{"weight":5}`},
		{`{"state":"drain"}`, `"state":"drain","override":{"weight":5,"state":"drain"}`},
		{`{}`, `"state":"drain","override":{"weight":5,"state":"drain"}`},
		{`{"weight":null,"state":"down"}`, `"state":"down","override":{"weight":null,"state":"down"}`},
		{`{"state":"up"}`, `"state":"up","override":{"weight":null,"state":"up"}`},
		{`{"state":null}`, `"state":"up","override":null`},
	} {
		wantNoContent(t, call(h, near, "PATCH", "/services/echo/inst-1", row.body))
		if got := string(call(h, near, "GET", "/services/echo/inst-1", "").Body()); !strings.HasSuffix(got, row.want+`,"metadata":{},"generation":1,"check":null,"slow_start":"0s"}`+"\n") {
			t.Errorf("%s: %s", row.body, got)
		}
	}
	for _, row := range []struct{ body, field, says string }{
		{`{"weight":0}`, "weight", `"state":"drain"`},
		{`{"weight":-1}`, "weight", "integer"},
		{`{"weight":"5"}`, "weight", "integer"},
		{`{"state":"off"}`, "state", "up, drain, down"},
		{`{"state":""}`, "state", "up, drain, down"},
		{`{"state":1}`, "state", "a string"},
		{`{"addr":"http://localhost:1"}`, "addr", "allowed here: weight, state, metadata"},
		{`{"state":"up","state":"up"}`, "state", "twice"},
	} {
		wantProblem(t, call(h, near, "PATCH", "/services/echo/inst-1", row.body), 400, row.field, row.says)
	}
	wantProblem(t, call(h, near, "PATCH", "/services/echo/x", `{}`), 404, "id", "no instance")
	wantProblem(t, call(h, near, "PATCH", "/services/x/x", `{}`), 404, "service", "no service")
	wantProblem(t, call(h, near, "POST", "/register", `{"service":"a","id":"a","addr":"http://localhost:1","weight":null}`), 400, "weight", "null")
}

func TestDrainAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := New(Config{})
		h := NewHandler(reg, nil)
		for _, c := range []struct{ method, path, body string }{
			{"DELETE", "/register", `{"service":"echo","id":"inst-1","drain":"30s"}`},
			{"DELETE", "/register", `{"service":"echo","id":"inst-1","drain":"30s","addr":"http://localhost:8081"}`},
			{"DELETE", "/services/echo/inst-1?drain=30s", ""},
		} {
			wantNoContent(t, call(h, near, "POST", "/register", inst1))
			resp := call(h, near, c.method, c.path, c.body)
			if got := string(resp.Body()); resp.StatusCode() != 200 || got != `{"cut":0,"waited":"40ms"}`+"\n" || len(reg.Names()) != 0 {
				t.Errorf("%s %s: %d %s, left %v", c.method, c.path, resp.StatusCode(), got, reg.Names())
			}
			wantProblem(t, call(h, near, c.method, c.path, c.body), 404, "service", "no service")
		}
		wantNoContent(t, call(h, near, "POST", "/register", inst1))
		wantProblem(t, call(h, near, "DELETE", "/services/echo/inst-1?drain=30s&addr=http://localhost:1", ""), 409, "addr", "nothing has changed")
		for _, drain := range []string{"-1s", "30", "61m", "x", ""} {
			wantProblem(t, call(h, near, "DELETE", "/services/echo/inst-1?drain="+drain, ""), 400, "drain", "from 0s to 1h")
			wantProblem(t, call(h, near, "DELETE", "/register", `{"service":"echo","id":"inst-1","drain":"`+drain+`"}`), 400, "drain", "from 0s to 1h")
		}
		wantNoContent(t, call(h, near, "DELETE", "/services/echo/inst-1?drain=0s", ""))
		reg.Close()
	})
}

// An instance that has not renewed its lease is listed as expired.
func TestExpiredAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := New(Config{})
		h := NewHandler(reg, nil)
		wantNoContent(t, call(h, near, "POST", "/register", `{"service":"echo","id":"a","addr":"http://localhost:1","ttl":"1s"}`))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		want := `{"services":[],"expired":[{"service":"echo","id":"a","addr":"http://localhost:1","expired_at":"2000-01-01T00:00:01Z"}]}` + "\n"
		if got := string(call(h, near, "GET", "/services", "").Body()); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// fakeDescriber says of inst-1 what the example shows, of others something else in every member.
type fakeDescriber struct{}

var described = time.Date(2026, 11, 23, 18, 0, 0, 123456789, time.FixedZone("CET", 3600))

func (fakeDescriber) DescribeService(service string) ServiceStatus {
	return ServiceStatus{Strategy: "weighted-round-robin", InForce: "round-robin", Why: "inst-2 has no weight"}
}

func (fakeDescriber) DescribeInstance(service, id string) InstanceStatus {
	if id == "inst-1" {
		return InstanceStatus{Ready: true, Breaker: BreakerStatus{State: "closed", Since: described}}
	}
	until := described.Add(30 * time.Second)
	return InstanceStatus{Reason: "breaker", Breaker: BreakerStatus{State: "open", Since: described, Until: &until},
		InFlight: 1, Tunnels: 5, Success: 2, Failure: 3, Ignored: 4, LastError: "refused <1>"}
}

func TestGet(t *testing.T) {
	reg := New(Config{})
	h := NewHandler(reg, fakeDescriber{})
	register(t, reg, "echo", "inst-2", "http://h/a&b", 0)
	register(t, reg, "echo", "inst-1", "http://localhost:8081", 2)
	register(t, reg, "alpha", "inst-1", "http://localhost:8081", 2)
	at := func(service, id string) string {
		return reg.Snapshot(service).Instance(id).RegisteredAt.UTC().Format("2006-01-02T15:04:05Z")
	}
	generation := func(service, id string) string {
		return strconv.FormatUint(reg.Snapshot(service).Instance(id).Generation, 10)
	}
	one := func(service string) string {
		return `{"id":"inst-1","addr":"http://localhost:8081","weight":2,"ready":true,"reason":"","breaker":{"state":"closed","since":"2026-11-23T17:00:00Z","until":null},"health":null,"in_flight":0,"tunnels":0,"success":0,"failure":0,"ignored":0,"last_error":"","registered_at":"` + at(service, "inst-1") + `","lease":null,"state":"up","override":null,"metadata":{},"generation":` + generation(service, "inst-1") + `,"check":null,"slow_start":"0s"}`
	}
	two := `{"id":"inst-2","addr":"http://h/a&b","weight":0,"ready":false,"reason":"breaker","breaker":{"state":"open","since":"2026-11-23T17:00:00Z","until":"2026-11-23T17:00:30Z"},"health":null,"in_flight":1,"tunnels":5,"success":2,"failure":3,"ignored":4,"last_error":"refused <1>","registered_at":"` + at("echo", "inst-2") + `","lease":null,"state":"up","override":null,"metadata":{},"generation":1,"check":null,"slow_start":"0s"}`
	service := func(name, instances string) string {
		return `{"name":"` + name + `","strategy":"weighted-round-robin","in_force":"round-robin","why":"inst-2 has no weight","instances":[` + instances + `]}`
	}
	echo := service("echo", one("echo")+","+two)
	for target, want := range map[string]string{
		"/services":             `{"services":[` + service("alpha", one("alpha")) + "," + echo + `]}`,
		"/services?":            `{"services":[` + service("alpha", one("alpha")) + "," + echo + `]}`,
		"/services/echo":        echo,
		"/services/%65cho":      echo,
		"/services/echo/inst-2": two,
	} {
		resp := call(h, far, "GET", target, "")
		if d := cmp.Diff(want+"\n", string(resp.Body())); d != "" || resp.StatusCode() != 200 || string(resp.Header.ContentType()) != "application/json" {
			t.Errorf("GET %s: %d %s (-want +got):\n%s", target, resp.StatusCode(), resp.Header.ContentType(), d)
		}
		if resp := call(h, far, "HEAD", target, ""); resp.StatusCode() != 200 {
			t.Errorf("HEAD %s: %s", target, resp)
		}
	}

	wantProblem(t, call(h, near, "GET", "/services/none", ""), 404, "service", `no service "none"`)
	wantProblem(t, call(h, near, "GET", "/services/none/a", ""), 404, "service", `no service "none"`)
	wantProblem(t, call(h, near, "GET", "/services/echo/none", ""), 404, "id", `has no instance "none"`)

	// Without a Describer the members are there all the same.
	bare := call(NewHandler(reg, nil), near, "GET", "/services/echo/inst-1", "")
	want := `{"id":"inst-1","addr":"http://localhost:8081","weight":2,"ready":false,"reason":"","breaker":{"state":"","since":"0001-01-01T00:00:00Z","until":null},"health":null,"in_flight":0,"tunnels":0,"success":0,"failure":0,"ignored":0,"last_error":"","registered_at":"` + at("echo", "inst-1") + `","lease":null,"state":"up","override":null,"metadata":{},"generation":2,"check":null,"slow_start":"0s"}` + "\n"
	if d := cmp.Diff(want, string(bare.Body())); d != "" {
		t.Errorf("without a Describer (-want +got):\n%s", d)
	}
}

// A path, a method, a query or a body that a call does not have is refused, and nothing changes.
func TestAPIRefusesCalls(t *testing.T) {
	reg := New(Config{Reserved: []string{"register", "services"}})
	h := NewHandler(reg, nil)
	register(t, reg, "echo", "a", "http://10.0.0.1", 1)
	before := reg.Snapshot("echo")
	const drop, put = `{"service":"echo","id":"a"}`, `{"addr":"http://10.0.0.2"}`
	tests := []struct {
		method, target, body string
		status               int
		field, says          string
	}{
		{"GET", "/", "", 404, "", "/services/{service}/{id}"},
		{"GET", "/Services", "", 404, "", "answers at"},
		{"GET", "/services/", "", 404, "", "answers at"},
		{"POST", "/register/", inst1, 404, "", "answers at"},
		{"POST", "/registers", inst1, 404, "", "answers at"},
		{"GET", "/services/echo/a/", "", 404, "", "answers at"},
		{"GET", "/services/echo/a/b", "", 404, "", "answers at"},
		{"GET", "/services//a", "", 400, "service", "1 to 128"},
		{"GET", "/services/a%2Fb", "", 400, "service", "A-Z a-z"},
		{"GET", "/services/%2e%2e", "", 400, "service", "no names"},
		{"GET", "/services/../register", "", 400, "service", "no names"},
		{"GET", "/services/a%zz", "", 400, "service", "two hexadecimal"},
		{"GET", "/services/" + strings.Repeat("a", 129), "", 400, "service", "1 to 128"},
		{"DELETE", "/services/echo/a%00", "", 400, "id", "A-Z a-z"},
		{"PUT", "/services/echo/..", put, 400, "id", "no names"},
		{"PUT", "/services/register/a", put, 400, "service", "reserved"},
		{"GET", "//evil.example/services?://", "", 400, "", "one slash"},
		{"GET", "/services#x", "", 400, "", "one slash"},

		{"GET", "/register", "", 405, "", "allowed: DELETE, OPTIONS, POST"},
		{"PUT", "/register", inst1, 405, "", "allowed: DELETE, OPTIONS, POST"},
		{"POST", "/services", inst1, 405, "", "allowed: GET, HEAD, OPTIONS"},
		{"DELETE", "/services/echo", "", 405, "", "allowed: GET, HEAD, OPTIONS"},
		{"POST", "/services/echo/a", put, 405, "", "allowed: DELETE, GET, HEAD, OPTIONS, PATCH, PUT"},
		{"PATCH", "/services/echo", put, 405, "", "allowed: GET, HEAD, OPTIONS"},
		{"BREW", "/services", "", 405, "", `"BREW" is not allowed`},

		{"GET", "/services?watch", "", 400, "watch", `unknown query parameter "watch"`},
		{"GET", "/services/echo?a=1&b=2", "", 400, "a", `"a"`},
		{"POST", "/register?x%20y=1", inst1, 400, "x y", "this call takes hold"},
		{"GET", "/services/echo/a?drain=30s", "", 400, "drain", "takes none"},
		{"DELETE", "/register?id=a", drop, 400, "id", `"id"`},

		{"GET", "/services", "{}", 400, "", "no body"},
		{"GET", "/services/echo", "{}", 400, "", "no body"},
		{"GET", "/services/echo/a", "{}", 400, "", "no body"},
		{"DELETE", "/services/echo/a", drop, 400, "", "no body"},
		{"PUT", "/services/echo/a", inst1, 400, "service", "allowed here: addr, weight, ttl"},
		{"DELETE", "/register", inst1, 400, "weight", "allowed here: service, id, addr"},
		{"DELETE", "/register", `{"service":"echo"}`, 400, "id", "missing"},
		{"DELETE", "/register", `{"id":"a"}`, 400, "service", "missing"},
		{"DELETE", "/register", `{"service":"echo","id":"a/b"}`, 400, "id", "A-Z a-z"},
		{"POST", "/register", strings.Replace(inst1, "echo", "services", 1), 400, "service", "reserved"},
		{"POST", "/register", strings.Replace(inst1, "localhost", "169.254.169.254", 1), 400, "addr", "link-local"},
		{"POST", "/register", strings.Replace(inst1, "localhost", "u:p@localhost", 1), 400, "addr", "userinfo"},
	}
	for _, tt := range tests {
		t.Run(tt.method+" "+tt.target[:min(len(tt.target), 40)]+" "+tt.body, func(t *testing.T) {
			resp := call(h, near, tt.method, tt.target, tt.body)
			wantProblem(t, resp, tt.status, tt.field, tt.says)
			if allow := string(resp.Header.Peek("Allow")); tt.status == 405 != (allow != "") {
				t.Errorf("%d with Allow %q", tt.status, allow)
			} else if tt.status == 405 && strings.HasPrefix(tt.says, "allowed: ") && tt.says != "allowed: "+allow {
				t.Errorf("Allow %q, want %q", allow, tt.says)
			}
			if resp.Header.Peek("Location") != nil {
				t.Errorf("a redirect: %s", resp)
			}
		})
	}
	if reg.Snapshot("echo") != before || len(reg.Names()) != 1 {
		t.Errorf("refusals changed something: %v", reg.Names())
	}
	resp := call(h, near, "OPTIONS", "/register", "")
	wantNoContent(t, resp)
	if allow := string(resp.Header.Peek("Allow")); allow != "DELETE, OPTIONS, POST" {
		t.Errorf("OPTIONS: Allow %q", allow)
	}
}

func TestDecode(t *testing.T) {
	all := []string{"service", "id", "addr", "weight", "ttl", "metadata", "check", "slow_start"}
	a, none := "a", ""
	accepted := map[string]members{
		inst1:                                  {service: "echo", id: "inst-1", addr: "http://localhost:8081", weight: 2},
		`{}`:                                   {},
		" {\n} \r\n\t":                         {},
		`{"weight":0}`:                         {},
		`{"weight" : 7}`:                       {weight: 7},
		`{"weight":1000000,"id":"\u0061"}`:     {id: "a", weight: 1_000_000},
		`{"metadata":{}}`:                      {metadata: map[string]*string{}},
		`{"metadata":{"b":"a","B":""}}`:        {metadata: map[string]*string{"b": &a, "B": &none}},
		`{"s\u0065rvice":"a","addr":"\u00e9"}`: {service: "a", addr: "é"},
	}
	for body, want := range accepted {
		got, err := decodeMembers([]byte(body), all...)
		if got.seen = 0; err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", body, got, err, want)
		}
	}
	refused := []struct{ body, field, says string }{
		{``, "", "not JSON"},
		{`{`, "", "not JSON"},
		{`{"id":"a",}`, "", "not JSON"},
		{`{"id" "a"}`, "", "not JSON"},
		{`{'id':'a'}`, "", "not JSON"},
		{`{"id":"a"} {}`, "", "after top-level value"},
		{`{"id":"a"}x`, "", "after top-level value"},
		{inst1 + inst1, "", "after top-level value"},
		{"{\"id\":\"a\nb\"}", "", "not JSON"},
		{"\xef\xbb\xbf{}", "", "not JSON"},
		{"{\"id\":\"\xff\"}", "", "not UTF-8"},
		{`[]`, "", "must be one JSON object with service, id, addr, weight"},
		{`[` + inst1 + `]`, "", "must be one JSON object"},
		{`null`, "", "must be one JSON object"},
		{`"a"`, "", "must be one JSON object"},
		{`7`, "", "must be one JSON object"},
		{strings.Repeat("[", 20000), "", "not JSON"},
		{strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000), "a", "unknown member"},
		{`{"check":{"path":"/","interval":7}}`, "check.interval", "check.interval: must be a time from 100ms to 1h, such as 2s, not 7"},
		{`{"check":{"path":"/"},"check":{"path":"/"}}`, "check", "check is there twice"},
		{`{"check":null}`, "check", "check: must be an object"},
		{`{"slow_start":30}`, "slow_start", "must be a string"},
		{`{"slow_start":"30"}`, "slow_start", "from 0s (none) to 1h"},
		{`{"services":"a"}`, "services", `unknown member "services"; allowed here: service, id, addr, weight, ttl, metadata, check, slow_start`},
		{`{"Service":"a"}`, "Service", "unknown member"},
		{`{"":1}`, "", `unknown member ""`},
		{`{"wait":null}`, "wait", "unknown member"},
		{`{"id":"a","id":"a"}`, "id", "id is there twice"},
		{`{"weight":1,"weight":2}`, "weight", "weight is there twice"},
		{`{"id":"a","\u0069d":"b"}`, "id", "twice"},
		{`{"id":7}`, "id", "id must be a string, not 7"},
		{`{"service":null}`, "service", "service must be a string, not null"},
		{`{"addr":["http://h"]}`, "addr", "addr must be a string, not an array"},
		{`{"addr":{"host":"h"}}`, "addr", "addr must be a string, not an object"},
		{`{"id":true}`, "id", "id must be a string, not true"},
		{`{"weight":"2"}`, "weight", `weight must be an integer from 0 (no weight) to 1000000, not the string "2"`},
		{`{"weight":2.5}`, "weight", "not 2.5"},
		{`{"weight":2.0}`, "weight", "not 2.0"},
		{`{"weight":1e3}`, "weight", "not 1e3"},
		{`{"weight":-1}`, "weight", "not -1"},
		{`{"weight":1000001}`, "weight", "not 1000001"},
		{`{"weight":` + strings.Repeat("9", 400) + `}`, "weight", "not 999"},
		{`{"weight":null}`, "weight", "not null"},
		{`{"weight":true}`, "weight", "not true"},
		{`{"weight":[2]}`, "weight", "not an array"},
		{`{"weight":{}}`, "weight", "not an object"},
		{`{"metadata":null}`, "metadata", "must be an object of strings, not null"},
		{`{"metadata":"a"}`, "metadata", `not the string "a"`},
		{`{"metadata":[]}`, "metadata", "not an array"},
		{`{"metadata":{"a":1}}`, "metadata", `"a" must be a string, not 1`},
		{`{"metadata":{"a":null}}`, "metadata", `"a" must be a string, not null`},
		{`{"metadata":{"a":{"b":"c"}}}`, "metadata", `"a" must be a string, not an object`},
		{`{"metadata":{"a":"b","\u0061":"b"}}`, "metadata", `"a" is there twice`},
		{`{"metadata":{},"metadata":{}}`, "metadata", "metadata is there twice"},
	}
	h := NewHandler(New(Config{}), nil)
	for _, tt := range refused {
		_, err := decodeMembers([]byte(tt.body), all...)
		if bad, ok := err.(*FieldError); ok {
			err = &refusal{400, bad.Field, bad.Error()} // as answer does
		}
		if no, ok := err.(*refusal); !ok || no.status != 400 || no.field != tt.field || !strings.Contains(no.detail, tt.says) {
			t.Errorf("%.60s: %+v; want 400, field %q and %q", tt.body, err, tt.field, tt.says)
		}
		if tt.body != "" {
			wantProblem(t, call(h, near, "POST", "/register", tt.body), 400, tt.field, tt.says)
		}
	}
	long := strings.Repeat("n", 10_000)
	wantProblem(t, call(h, near, "POST", "/register", `{"`+long+`":1}`), 400, long[:64]+"...", "unknown member")
	wantProblem(t, call(h, near, "POST", "/register", `{"service":"`+long+`"}`), 400, "service", "has 10000 bytes")
	wantProblem(t, call(h, near, "POST", "/register", `{"service":"a","id":"a","addr":"http://`+long+`"}`), 400, "addr", "at most 2048")
}

func TestContentType(t *testing.T) {
	reg := New(Config{})
	h := NewHandler(reg, nil)
	for contentType, ok := range map[string]bool{
		"application/json":                        true,
		"Application/JSON":                        true,
		"application/json; charset=utf-8":         true,
		"application/json;charset=\"utf-8\"; x=y": true,
		"":                                  false,
		"text/plain":                        false,
		"text/plain; application/json":      false,
		"application/x-www-form-urlencoded": false,
		"multipart/form-data; boundary=x":   false,
		"application/json, text/plain":      false,
		"application/jsonp":                 false,
		"application/problem+json":          false,
		"application/json; charset":         false,
	} {
		for _, method := range []string{"POST", "DELETE", "PUT"} {
			register(t, reg, "echo", "a", "http://10.0.0.1", 1)
			before := reg.Snapshot("echo")
			target, body := "/register", `{"service":"echo","id":"a"}`
			switch method {
			case "POST":
				body = `{"service":"echo","id":"a","addr":"http://10.0.0.2"}`
			case "PUT":
				target, body = "/services/echo/a", `{"addr":"http://10.0.0.2"}`
			}
			var req fasthttp.Request
			req.Header.SetMethod(method)
			req.SetRequestURI(target)
			req.Header.SetNoDefaultContentType(true)
			req.Header.SetContentType(contentType)
			req.SetBodyString(body)
			resp := run(h, near, &req)
			if ok {
				wantNoContent(t, resp)
			} else {
				wantProblem(t, resp, 415, "", "Content-Type must be application/json")
				if reg.Snapshot("echo") != before {
					t.Errorf("%s with %q changed something", method, contentType)
				}
			}
		}
	}
}

// Who registered decides about loopback: the peer, whatever the body says.
func TestAPIRemote(t *testing.T) {
	reg := New(Config{})
	h := NewHandler(reg, nil)
	mapped := &net.TCPAddr{IP: net.ParseIP("::ffff:127.0.0.1"), Port: 1}
	six := &net.TCPAddr{IP: net.IPv6loopback, Port: 1}
	for _, peer := range []net.Addr{near, mapped, six} {
		wantNoContent(t, call(h, peer, "POST", "/register", inst1))
	}
	for _, peer := range []net.Addr{far, &net.UnixAddr{Name: "x", Net: "unix"}} {
		wantProblem(t, call(h, peer, "POST", "/register", inst1), 400, "addr", "only a peer on loopback may register it")
		wantProblem(t, call(h, peer, "PUT", "/services/echo/x", `{"addr":"http://127.0.0.1:1"}`), 400, "addr", "loopback")
	}
	wantNoContent(t, call(h, far, "POST", "/register", strings.Replace(inst1, "localhost", "backend", 1)))
	if !reg.Snapshot("echo").Instance("inst-1").remote {
		t.Error("an update from elsewhere is not marked")
	}
	wantNoContent(t, call(h, near, "POST", "/register", inst1))
	if reg.Snapshot("echo").Instance("inst-1").remote {
		t.Error("an update from loopback stays marked")
	}
}

// serve runs a handler on a real listener and returns its address.
func serve(t *testing.T, s *fasthttp.Server) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		_ = s.Shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// raw sends bytes and returns the first response as it came.
func raw(t *testing.T, addr, request string) (*http.Response, string) {
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
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%.80q: %v", request, err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func TestBodyLimit(t *testing.T) {
	pad := func(n int) string { return inst1 + strings.Repeat(" ", n-len(inst1)) }
	post := func(body string) string {
		return fmt.Sprintf("POST /register HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	chunked := func(body string) string {
		return fmt.Sprintf("POST /register HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	}
	reg := New(Config{})
	h := NewHandler(reg, nil)
	servers := map[string]*fasthttp.Server{
		"limited by the server": {Handler: h, ErrorHandler: ErrorHandler, MaxRequestBodySize: MaxBody, Logger: silent{}},
		"limited here":          {Handler: h, ErrorHandler: ErrorHandler, MaxRequestBodySize: 16 * MaxBody},
		"streamed":              {Handler: h, ErrorHandler: ErrorHandler, StreamRequestBody: true},
	}
	for name, s := range servers {
		addr := serve(t, s)
		for _, frame := range []func(string) string{post, chunked} {
			if resp, body := raw(t, addr, frame(pad(MaxBody))); resp.StatusCode != 204 {
				t.Errorf("%s, %d bytes: %s %s", name, MaxBody, resp.Status, body)
			}
			if err := reg.Unregister("echo", "inst-1", ""); err != nil {
				t.Errorf("%s, %d bytes: %v", name, MaxBody, err)
			}
			resp, body := raw(t, addr, frame(pad(MaxBody+1)))
			if resp.StatusCode != 413 || resp.Header.Get("Content-Type") != "application/problem+json" || !strings.Contains(body, "at most 65536 bytes") {
				t.Errorf("%s, %d bytes: %s %s", name, MaxBody+1, resp.Status, body)
			}
			if len(reg.Names()) != 0 {
				t.Errorf("%s: registered all the same", name)
			}
		}
	}
}

type silent struct{}

func (silent) Printf(string, ...any) {}

// What the server cannot read is a problem too.
func TestErrorHandler(t *testing.T) {
	addr := serve(t, &fasthttp.Server{Handler: NewHandler(New(Config{}), nil), ErrorHandler: ErrorHandler, ReadTimeout: 50 * time.Millisecond, Logger: silent{}})
	for request, status := range map[string]int{
		"GET /services HTTP/1.1\r\nbad\r\n\r\n":                                                              400,
		"GET /services HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 8192) + "\r\n\r\n":                  431,
		"POST /register HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n":                              400,
		"POST /register HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n{": 408,
		"GET /services HTTP/1.1\r\nHo":                                                                       408,
	} {
		resp, body := raw(t, addr, request)
		if resp.StatusCode != status || resp.Header.Get("Content-Type") != "application/problem+json" || !strings.Contains(body, fmt.Sprintf(`"status":%d`, status)) {
			t.Errorf("%.60q: %s %v %s; want %d", request, resp.Status, resp.Header, body, status)
		}
	}
}

// The API over a socket, as curl would use it, on one connection.
func TestAPIOverTCP(t *testing.T) {
	reg := New(Config{})
	addr := serve(t, &fasthttp.Server{Handler: NewHandler(reg, fakeDescriber{}), ErrorHandler: ErrorHandler})
	client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	do := func(method, path, body string) (*http.Response, string) {
		req, err := http.NewRequest(method, "http://"+addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(got)
	}
	if resp, body := do("POST", "/register", inst1); resp.StatusCode != 204 || body != "" || resp.Header.Get("Content-Type") != "" {
		t.Errorf("POST: %s %v %q", resp.Status, resp.Header, body)
	}
	if resp, body := do("GET", "/services/echo/inst-1", ""); resp.StatusCode != 200 || !strings.Contains(body, `"ready":true`) {
		t.Errorf("GET: %s %q", resp.Status, body)
	}
	if resp, body := do("HEAD", "/services", ""); resp.StatusCode != 200 || body != "" || resp.ContentLength < 100 {
		t.Errorf("HEAD: %s, length %d", resp.Status, resp.ContentLength)
	}
	if resp, body := do("PATCH", "/register", inst1); resp.StatusCode != 405 || resp.Header.Get("Allow") != "DELETE, OPTIONS, POST" || !strings.Contains(body, `"status":405`) {
		t.Errorf("PATCH: %s %v %s", resp.Status, resp.Header, body)
	}
	if resp, body := do("DELETE", "/register", `{"service":"echo","id":"inst-1"}`); resp.StatusCode != 204 {
		t.Errorf("DELETE: %s %s", resp.Status, body)
	}
	if resp, body := do("GET", "/services", ""); body != "{\"services\":[]}\n" {
		t.Errorf("GET: %s %q", resp.Status, body)
	}
	// fasthttp takes this target for an absolute one of /services; nobody else who read it did.
	if resp, body := raw(t, addr, "GET //evil.example/services?:// HTTP/1.1\r\nHost: h\r\n\r\n"); resp.StatusCode != 400 {
		t.Errorf("a target of two meanings: %s %s", resp.Status, body)
	}
	if resp, _ := raw(t, addr, "GET http://h/services HTTP/1.1\r\nHost: h\r\n\r\n"); resp.StatusCode != 200 {
		t.Errorf("absolute form: %s", resp.Status)
	}
}

// The decoder never panics, and what it accepts means the same when it is written and read again, to it and to
// encoding/json.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{inst1, `{}`, `{"id":"a","id":"b"}`, `{"weight":1e3}`, `{"weight":-0}`, `{"Id":"a"}`, `[{}]`, `{"id":"\ud800"}`,
		`{"id":"a"}{}`, `{"addr":{"a":[1,2]}}`, "{\"id\":\"\xff\"}", `{"metadata":{"a":"b","c":""}}`} {
		f.Add([]byte(s))
	}
	all := []string{"service", "id", "addr", "weight", "metadata"}
	type registration struct {
		Service string `json:"service"`
		ID      string `json:"id"`
		Addr    string `json:"addr"`
		Weight  int    `json:"weight"`

		Metadata map[string]string `json:"metadata,omitempty"`
	}
	same := func(a, b members) bool {
		return a.service == b.service && a.id == b.id && a.addr == b.addr && a.weight == b.weight && maps.Equal(texts(a.metadata), texts(b.metadata))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := decodeMembers(body, all...)
		if err != nil {
			if !reflect.ValueOf(m).IsZero() {
				t.Fatalf("%+v beside %v", m, err)
			}
			return
		}
		m.seen = 0
		var plain registration
		if err := json.Unmarshal(body, &plain); err != nil {
			t.Fatalf("%q is accepted, but encoding/json says %v", body, err)
		}
		want := members{service: plain.Service, id: plain.ID, addr: plain.Addr, weight: plain.Weight, metadata: map[string]*string{}}
		for key, value := range plain.Metadata {
			want.metadata[key] = &value
		}
		if !same(m, want) {
			t.Fatalf("%q: %+v; encoding/json reads %+v", body, m, plain)
		}
		text, err := json.Marshal(plain)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeMembers(text, all...)
		if again.seen = 0; err != nil || !same(again, m) {
			t.Fatalf("%q: %+v; written again %s: %+v, %v", body, m, text, again, err)
		}
		if m.weight < 0 || m.weight > MaxWeight {
			t.Fatalf("weight %d", m.weight)
		}
		// What is registered in the end is well formed.
		reg := New(Config{})
		if reg.Register(m.service, Instance{ID: m.id, Addr: m.addr, Weight: m.weight, Metadata: texts(m.metadata)}) == nil && (ValidName(m.service) != nil || ValidName(m.id) != nil) {
			t.Fatalf("%+v is registered", m)
		}
	})
}
