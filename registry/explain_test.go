package registry

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// explainer leads paths to the service that their first segment names, and remembers what it was asked.
type explainer struct {
	noDescriber
	asked Question
}

func (e *explainer) Explain(q Question) Explanation {
	e.asked = q
	out := Explanation{Client: q.Client, Outcome: Outcome{Kind: ToRefusal, Status: 404}}
	name := strings.Trim(q.Path, "/")
	if name == "" {
		return out
	}
	out.Route = &RouteExplanation{Match: "/" + name, Service: name}
	out.Near = []RouteExplanation{{Service: "users"}, {Service: "orders"}, {Service: "users-2"}}
	out.Service = &ServiceExplanation{Name: name, Ready: 1, Instances: map[string]InstanceExplanation{"a": {Share: 1, Addresses: []string{"10.0.0.1:80"}}}}
	return out
}

func TestExplainQuestions(t *testing.T) {
	e := &explainer{}
	h := NewExplainHandler(New(Config{}), e)
	for _, row := range []struct {
		query string
		want  Question
	}{
		{"path=/users", Question{Method: "GET", Host: "localhost", Path: "/users", Client: netip.MustParseAddr("127.0.0.1")}},
		{"method=POST&host=example.com:80&path=/users%3Fx=1%252f&client=::ffff:10.0.0.7&header=A:%20b&header=A:c",
			Question{Method: "POST", Host: "example.com:80", Path: "/users?x=1%2f", Fields: []string{"A: b", "A:c"}, Client: netip.MustParseAddr("10.0.0.7")}},
	} {
		if resp := call(h, near, "GET", "/explain?"+row.query, ""); resp.StatusCode() != 200 {
			t.Errorf("%s: %s", row.query, resp)
		}
		if diff := cmp.Diff(row.want, e.asked, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: want -, asked +:\n%s", row.query, diff)
		}
	}
	for _, row := range []struct{ query, field, says string }{
		{"", "path", "is missing or empty"},
		{"path=", "path", "is missing or empty"},
		{"path=/x%0d%0aEvil:1", "path", "has a line break"},
		{"path=/x&method=GET%0a", "method", "has a line break"},
		{"path=/x&host=a%0d", "host", "has a line break"},
		{"path=/x&header=A:%0ab", "header", "has a line break"},
		{"path=/x&header=nothing", "header", "must be NAME: VALUE"},
		{"path=/x&header=host:b", "header", "Host has its own parameter"},
		{"path=/x&client=somebody", "client", "must be an IP address such as 10.0.0.7"},
		{"path=/x&client=fe80::1%25eth0", "client", "must be an IP address such as 10.0.0.7"},
		{"path=/x&path=/y", "path", "is there twice"},
		{"path=/x&service=y", "service", "this call takes method, host, path, client, header"},
		{"path=/x&header*=y", "header*", "unknown query parameter"},
	} {
		wantProblem(t, call(h, near, "GET", "/explain?"+row.query, ""), 400, row.field, row.says)
	}
	wantProblem(t, call(h, near, "GET", "/explain?path=/x", "{}"), 400, "", "takes no body")
}

// The answer has what the registry knows of instances beside what the explainer does; one that it does not know yet too.
func TestExplainAnswers(t *testing.T) {
	reg := New(Config{})
	defer reg.Close()
	for _, in := range []Instance{{ID: "a", Addr: "http://10.0.0.1", TTL: time.Minute}, {ID: "b", Addr: "http://10.0.0.2", Weight: 3}} {
		if err := reg.Register("users", in); err != nil {
			t.Fatal(err)
		}
	}
	reg.expired = append(reg.expired, Expired{"users", "c", "http://10.0.0.3", time.Now()}, Expired{"orders", "d", "http://10.0.0.3", time.Now()})
	resp := call(NewExplainHandler(reg, &explainer{}), near, "GET", "/explain?path=/users", "")
	var got struct {
		Request struct{ Method, Host, Path string }
		Client  string
		Route   struct{ Match, Service string }
		Service struct {
			Name      string
			Instances []struct {
				ID, Addr  string
				Weight    int
				Share     float64
				Lease     *struct{ TTL string }
				Addresses []string
			}
			Expired []struct{ ID string }
		}
	}
	if err := json.Unmarshal(resp.Body(), &got); err != nil {
		t.Fatal(err)
	}
	s := got.Service
	if got.Request.Path != "/users" || got.Client != "127.0.0.1" || got.Route.Service != "users" || s.Name != "users" || len(s.Instances) != 2 || len(s.Expired) != 1 || s.Expired[0].ID != "c" {
		t.Fatalf("%s", resp.Body())
	}
	a, b := s.Instances[0], s.Instances[1]
	if a.ID != "a" || a.Share != 1 || a.Lease.TTL != "1m0s" || a.Addresses[0] != "10.0.0.1:80" || b.Weight != 3 || b.Share != 0 || b.Addresses == nil || b.Lease != nil {
		t.Errorf("%s", resp.Body())
	}
}

// Who may not read a service is not told whether there is one.
func TestExplainRights(t *testing.T) {
	reg := New(Config{})
	defer reg.Close()
	if err := reg.Register("orders", Instance{ID: "a", Addr: "http://10.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	h := named{may: "users"}.calling(NewExplainHandler(reg, &explainer{}))
	texts := map[string]bool{}
	for _, path := range []string{"/orders", "/nobody", "/"} {
		resp := call(h, near, "GET", "/explain?path="+path, "")
		wantProblem(t, resp, 403, "path", "the test has no right to read what is at this path")
		texts[string(resp.Body())] = true
	}
	if len(texts) != 1 {
		t.Errorf("the refusals tell what is there: %v", texts)
	}
	resp := call(h, near, "GET", "/explain?path=/users", "")
	if body := string(resp.Body()); resp.StatusCode() != 200 || strings.Contains(body, "orders") || !strings.Contains(body, `"service":"users-2"`) {
		t.Errorf("%s", resp)
	}
}
