package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// explanation is what the tests read of GET /explain.
type explanation struct {
	Outcome struct {
		Kind, Instance, Error, Why string
		Status                     int
	}
	Route   *struct{ Service string }
	Service *struct {
		Ready     int
		Instances []struct {
			ID, Reason string
			Full       bool
			Share      float64
			SlowShare  *float64 `json:"slow_share"`
		}
		Expired []struct{ ID string }
	}
}

// explain asks about a GET of a path, from a client address if that is not empty.
func (g *running) explain(path, client string, fields ...string) (e explanation) {
	g.t.Helper()
	query := "/explain?path=" + url.QueryEscape(path)
	if client != "" {
		query += "&client=" + client
	}
	response, body := exchange(g.t, g.admin, "GET "+query+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"+strings.Join(fields, "")+"\r\n")
	if response.StatusCode != 200 {
		g.t.Fatalf("%s: %d %s", query, response.StatusCode, body)
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil {
		g.t.Fatalf("%s: %v", body, err)
	}
	return e
}

// Leases, checks, drains and limits, as a gateway that runs explains them, and as its clients then find them.
func TestExplain(t *testing.T) {
	g := launch(t, nil, "--max-in-flight-per-instance", "1", "--queue-timeout", "0s", "--breaker-failures", "2")
	if e := g.explain("/echo", ""); e.Outcome.Status != 503 || e.Outcome.Why != "no instance of the service is ready: none is registered" || len(e.Service.Instances) != 0 {
		t.Errorf("nobody: %+v", e)
	}
	gate, came := make(chan struct{}), make(chan struct{}, 10)
	g.register("echo", "a", backend(t, func(http.ResponseWriter, *http.Request) {
		came <- struct{}{}
		<-gate
	}))
	let := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(let)
	if e := g.explain("/echo", ""); e.Outcome.Kind != "instance" || e.Outcome.Instance != "a" || e.Route.Service != "echo" {
		t.Errorf("one: %+v", e)
	}
	held := make(chan int)
	go func() {
		response, _, err := converse(&net.Dialer{}, g.data, get("/echo"))
		if err != nil {
			held <- 0
			return
		}
		held <- response.StatusCode
	}()
	<-came
	e := g.explain("/echo", "")
	if status, _ := g.get("/echo"); e.Outcome.Kind != "refused" || e.Outcome.Status != status || e.Outcome.Error != "connection_limit_reached" || !e.Service.Instances[0].Full {
		t.Errorf("at its limit, answered %d: %+v", status, e)
	}
	let()
	if status := <-held; status != 200 {
		t.Errorf("the request that was held got %d", status)
	}

	for id, more := range map[string]string{
		"checked": `,"check":{"path":"/","interval":"100ms"}`,
		"leased":  `,"ttl":"1s"`,
	} {
		if status, body := g.post(`{"service":"` + id + `","id":"x","addr":"http://127.0.0.1:1"` + more + `}`); status != 204 {
			t.Fatalf("%d %s", status, body)
		}
	}
	eventually(t, "the check has failed", func() bool { return g.explain("/checked", "").Service.Instances[0].Reason != "not checked yet" })
	e = g.explain("/checked", "")
	if status, _ := g.get("/checked"); status != 503 || e.Outcome.Status != 503 || !strings.Contains(e.Outcome.Why, "1 check failing: connect: connection refused") {
		t.Errorf("a check that fails: %+v", e)
	}
	eventually(t, "the lease has ended", func() bool { return len(g.explain("/leased", "").Service.Expired) == 1 })
	if e = g.explain("/leased", ""); e.Outcome.Status != 503 || e.Service.Expired[0].ID != "x" || len(e.Service.Instances) != 0 {
		t.Errorf("a lease that has ended: %+v", e)
	}
	response, body := exchange(t, g.admin, "PATCH /services/echo/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{\"state\":\"drain\"}")
	if response.StatusCode != 204 {
		t.Fatal(body)
	}
	e = g.explain("/echo", "")
	if status, _ := g.get("/echo"); status != 503 || !strings.HasSuffix(e.Outcome.Why, ": 1 drain") || e.Service.Instances[0].Reason != "drain" {
		t.Errorf("drained: %+v", e)
	}

	// The command says the same.
	stdout, stderr, code := command(t, nil, "explain", "POST", "http://example.com/nobody?x", "--gateway", "http://"+g.admin)
	if want := "request  POST /nobody?x at example.com from 127.0.0.1\noutcome  404 destination_not_found: "; code != 0 || !strings.HasPrefix(stdout, want) {
		t.Errorf("%d %s%s", code, stdout, stderr)
	}
}

// Where a request goes is what was said, for each client by its address, and in turn.
func TestExplainedInstances(t *testing.T) {
	for _, strategy := range []string{"ip-hash", "round-robin", "weighted-round-robin"} {
		g := launch(t, nil, "--strategy", strategy)
		for i := range 5 {
			id := fmt.Sprint("i", i)
			if status, body := g.post(fmt.Sprintf(`{"service":"echo","id":%q,"addr":%q,"weight":%d}`, id, named(t, id), 1+i)); status != 204 {
				t.Fatal(body)
			}
		}
		for i := range 20 {
			client := fmt.Sprintf("127.0.0.%d", 1+i)
			e := g.explain("/echo/x", client)
			_, body, err := converse(&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}}, g.data, get("/echo/x"))
			if err != nil && i > 0 {
				break // a system whose loopback has one address
			}
			if err != nil || strings.TrimSpace(body) != e.Outcome.Instance {
				t.Errorf("%s, %s: %+v, then %q, %v", strategy, client, e.Outcome, body, err)
			}
		}
	}
}

// Nobody is told of a service that he may not read, nor whether there is one.
func TestExplainAccess(t *testing.T) {
	tokens := filepath.Join(t.TempDir(), "tokens.yaml")
	text := "- {name: users-team, token: users-0123456789abcdef, register: [users]}\n- {name: ops, token: ops-0123456789abcdef, admin: true}\n"
	if err := os.WriteFile(tokens, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g := launch(t, nil, "--tokens", tokens, "--api", "data")
	ops, team := "Authorization: Bearer ops-0123456789abcdef\r\n", "Authorization: Bearer users-0123456789abcdef\r\n"
	for _, service := range []string{"users", "orders"} {
		body := `{"service":"` + service + `","id":"a","addr":"http://127.0.0.1:1"}`
		if response, text := exchange(t, g.data, post(body, ops)); response.StatusCode != 204 {
			t.Fatal(text)
		}
	}
	ask := func(path, who string) (int, string) {
		response, body := exchange(t, g.admin, "GET /explain?path="+path+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"+who+"\r\n")
		return response.StatusCode, body
	}
	for _, row := range []struct {
		path, who string
		status    int
	}{
		{"/users", "", 401}, {"/users", team, 200}, {"/orders", ops, 200}, {"/nobody", ops, 200}, {"/a%252f..", ops, 200},
		{"/orders", team, 403}, {"/nobody", team, 403}, {"/", team, 403}, {"/users%252f../orders", team, 403},
	} {
		status, body := ask(row.path, row.who)
		if status != row.status || status == 403 && !strings.Contains(body, `"detail":"token users-team has no right to read what is at this path`) {
			t.Errorf("%s %s: %d %s", row.path, row.who, status, body)
		}
	}
	if response, body := exchange(t, g.data, "GET /explain?path=/users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"+ops+"\r\n"); response.StatusCode != 404 {
		t.Errorf("on the data listener: %d %s", response.StatusCode, body)
	}
}
