package cli

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"

	"kerberos/internal/config"
	"kerberos/registry"
)

// explainer has one answer for each path.
type explainer struct {
	describer
	answers map[string]registry.Explanation
	asked   registry.Question
}

func (e *explainer) Explain(q registry.Question) registry.Explanation {
	e.asked = q
	x := e.answers[q.Path]
	x.Client = q.Client
	return x
}

func TestExplain(t *testing.T) {
	reg := registry.New(registry.Config{})
	set := 20
	slow := 0.1
	for _, in := range []registry.Instance{{ID: "a", Addr: "http://127.0.0.1:8081"}, {ID: "b", Addr: "http://name:8082", TTL: time.Hour}} {
		if err := reg.Register("echo", in); err != nil {
			t.Fatal(err)
		}
	}
	if err := reg.Patch("echo", "a", registry.Patch{SetWeight: true, Weight: &set}); err != nil {
		t.Fatal(err)
	}
	e := &explainer{answers: map[string]registry.Explanation{
		"/refused": {Outcome: registry.Outcome{Kind: registry.ToRefusal, Status: 503, Error: "destination_unavailable", RetryAfter: 7, Why: "no"},
			Connection: &registry.Outcome{Kind: registry.ToRefusal, Status: 429, Error: "connection_limit_reached", Why: "too many"}},
		"/own":   {Outcome: registry.Outcome{Kind: registry.ToGateway, Status: 200, Why: "it is ready"}},
		"/api":   {Outcome: registry.Outcome{Kind: registry.ToGateway, Why: "the path is the API's"}},
		"/queue": {Outcome: registry.Outcome{Kind: registry.ToQueue, Status: 503, Error: "connection_limit_reached", RetryAfter: 1, Why: "full"}},
		"/echo?x=y": {
			Outcome: registry.Outcome{Kind: registry.ToInstance, Instance: "a", Why: "its turn is next"},
			Route:   &registry.RouteExplanation{Match: "/echo", Service: "echo", Why: "it is the longest"},
			Near:    []registry.RouteExplanation{{Match: "=/echo", Service: "other", Why: "the path is longer"}},
			Service: &registry.ServiceExplanation{Name: "echo", Ready: 1, ServiceStatus: describer{}.DescribeService("echo"),
				Breaker: registry.BreakerSettings{Failures: 5, OpenFor: "30s", Probes: 3, Statuses: []int{502, 503}},
				Limits:  registry.LimitsInUse{InFlight: 3, InFlightPerService: 9, InFlightPerInstance: 2, Waiting: 1, Queue: 4, QueueTimeout: "1s"},
				Instances: map[string]registry.InstanceExplanation{
					"a": {Share: 0.3333, SlowShare: &slow, Full: true, Addresses: []string{"127.0.0.1:8081"}},
					"b": {OpenedBy: "5 failures in a row: connection refused", Addresses: []string{"10.0.0.1:8082", "10.0.0.2:8082"}},
				}},
		},
	}}
	server := &fasthttp.Server{Handler: registry.NewExplainHandler(reg, e)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(ln) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		_ = server.Shutdown()
	})
	for _, row := range []struct {
		args string
		want string
		ask  registry.Question
	}{
		{"/refused", `request     GET /refused at localhost from 127.0.0.1
connection  429 connection_limit_reached: too many
outcome     503 destination_unavailable, Retry-After 7: no
`, registry.Question{Method: "GET", Host: "localhost", Path: "/refused"}},
		{"HEAD /own --host a", "request  HEAD /own at a from 127.0.0.1\noutcome  200: it is ready\n", registry.Question{Method: "HEAD", Host: "a", Path: "/own"}},
		{"https://b:1/api#x --client 10.0.0.7 --header A:b --header C:d", "request  GET /api at b:1 from 10.0.0.7\noutcome  the path is the API's\n",
			registry.Question{Method: "GET", Host: "b:1", Path: "/api", Fields: []string{"A:b", "C:d"}, Client: netip.MustParseAddr("10.0.0.7")}},
		{"/queue", "request  GET /queue at localhost from 127.0.0.1\noutcome  waits, or else 503 connection_limit_reached: full\n", registry.Question{Method: "GET", Host: "localhost", Path: "/queue"}},
		{"POST http://c/echo?x=y --host d", `request   POST /echo?x=y at d from 127.0.0.1
outcome   goes to a: its turn is next
route     /echo to echo: it is the longest
not       =/echo to other: the path is longer
service   echo, 1 of 2 ready; random, not weighted-random, as b has no weight
breaker   opens for 30s after 5 failures in a row, 502, 503 among them; closes after 3 probes
requests  3 in flight of 9, at most 2 at one instance; 1 of 4 wait, for 1s at most
INSTANCE  ADDR                   READY  WEIGHT   SHARE                 BREAKER  IN FLIGHT  NOTE
a         http://127.0.0.1:8081  yes    20, set  33.3%, slowly at 10%  closed   2          full
b         http://name:8082       no     0        0%                    open     0          breaker open; 5 failures in a row: connection refused; expires in TIME; at 10.0.0.1:8082 10.0.0.2:8082
`, registry.Question{Method: "POST", Host: "d", Path: "/echo?x=y"}},
	} {
		command, err := parseExplain(strings.Fields(row.args))
		if err != nil {
			t.Fatalf("%s: %v", row.args, err)
		}
		command.Gateway = "http://" + ln.Addr().String()
		out, err := do(t, command)
		if err != nil {
			t.Fatalf("%s: %v", row.args, err)
		}
		if before, after, ok := strings.Cut(out, "expires in "); ok {
			_, after, _ = strings.Cut(after, ";")
			out = before + "expires in TIME;" + after
		}
		if diff := cmp.Diff(row.want, out); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", row.args, diff)
		}
		if !row.ask.Client.IsValid() {
			row.ask.Client = netip.MustParseAddr("127.0.0.1")
		}
		if diff := cmp.Diff(row.ask, e.asked, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: want -, asked +:\n%s", row.args, diff)
		}
	}

	command, err := parseExplain([]string{"/own", "--json"})
	if err != nil {
		t.Fatal(err)
	}
	command.Gateway = "http://" + ln.Addr().String()
	if out, err := do(t, command); err != nil || !strings.HasPrefix(out, `{"request":{"method":"GET","host":"localhost","path":"/own"},`) || !strings.HasSuffix(out, "}\n") {
		t.Errorf("%q, %v", out, err)
	}
	for _, args := range [][]string{{"echo"}, {"ftp://x/y"}, {"a", "b", "c"}, {}, {"GET", "x/y"}} {
		if _, err := parseExplain(args); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
	if command, err := parseExplain([]string{"CONNECT", "a:1"}); err != nil || command.target != "a:1" {
		t.Errorf("%v", err)
	}

	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"hello":1}`)) }))
	defer other.Close()
	command.Gateway = other.URL
	command.JSON = false
	if _, err := do(t, command); err == nil || !strings.Contains(err.Error(), errNotTheAPI.Error()) {
		t.Errorf("something else answered: %v", err)
	}
}

// parseExplain reads a command line.
func parseExplain(args []string) (*Explain, error) {
	var grammar struct {
		Explain Explain `cmd:""`
	}
	_, err := config.Parse(&grammar, append([]string{"explain"}, args...), func(string) (string, bool) { return "", false })
	return &grammar.Explain, err
}
