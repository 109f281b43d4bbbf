package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/lb"
	"kerberos/registry"
)

// act answers one request on a connection; false closes it.
type act func(c net.Conn, m *message) bool

// actor is an origin whose behaviour can be changed while it runs.
type actor struct {
	*origin
	now      atomic.Pointer[act]
	accepted atomic.Int64 // connections so far
	served   atomic.Int64 // requests so far
}

func startActor(t testing.TB, first act) *actor {
	t.Helper()
	a := &actor{}
	a.does(first)
	a.origin = startOrigin(t, a.serve)
	return a
}

func (a *actor) serve(_ *origin, c net.Conn, r *bufio.Reader) {
	a.accepted.Add(1)
	for {
		m, err := readMessage(r, false)
		if err != nil {
			return
		}
		a.served.Add(1)
		if !(*a.now.Load())(c, m) {
			return
		}
	}
}

func (a *actor) does(f act) { a.now.Store(&f) }

// count returns how many requests came since the last count.
func (a *actor) count() int { return int(a.served.Swap(0)) }

// What actors do.

func says(text string) act {
	return writes(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text))
}

func answers(status int) act {
	return writes(fmt.Sprintf("HTTP/1.1 %d Some Reason\r\nContent-Length: 2\r\n\r\nno", status))
}

// writes answers with these bytes and keeps the connection.
func writes(response string) act {
	return func(c net.Conn, _ *message) bool {
		_, err := io.WriteString(c, response)
		return err == nil
	}
}

// breaksOff writes these bytes and closes.
func breaksOff(response string) act {
	return func(c net.Conn, _ *message) bool {
		_, _ = io.WriteString(c, response)
		return false
	}
}

// resets closes with a reset.
func resets(c net.Conn, _ *message) bool {
	_ = c.(*net.TCPConn).SetLinger(0)
	return false
}

// hangs never answers.
func hangs(c net.Conn, _ *message) bool {
	_, _ = io.Copy(io.Discard, c)
	return false
}

// after does next once the channel is closed.
func after(gate <-chan struct{}, next act) act {
	return func(c net.Conn, m *message) bool {
		<-gate
		return next(c, m)
	}
}

// request writes a request and reads its response.
func (c *client) request(method, path string, lines ...string) *message {
	c.t.Helper()
	c.send(method + " " + path + " HTTP/1.1\r\nHost: x\r\n" + fieldLines(lines) + "\r\n")
	return c.read(method == "HEAD")
}

func (c *client) get(path string, lines ...string) *message {
	c.t.Helper()
	return c.request("GET", path, lines...)
}

func (c *client) post(path, body string, lines ...string) *message {
	c.t.Helper()
	c.send("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + fmt.Sprint(len(body)) + "\r\n" + fieldLines(lines) + "\r\n" + body)
	return c.read(false)
}

func fieldLines(lines []string) (s string) {
	for _, line := range lines {
		s += line + "\r\n"
	}
	return s
}

// want fails the test unless the response has this status.
func (m *message) want(t testing.TB, status int) *message {
	t.Helper()
	if m.status() != status {
		t.Fatalf("want status %d, got %q %q", status, m.head, m.body)
	}
	return m
}

// refused fails the test unless the response is the gateway's own, of this kind.
func (m *message) refused(t testing.TB, want *refusal) *message {
	t.Helper()
	m.want(t, want.status)
	if got := m.field("Proxy-Status"); got != "kerberos; error="+want.kind {
		t.Fatalf("Proxy-Status is %q, want the error %q", got, want.kind)
	}
	return m
}

func (g *gateway) registerWeight(t testing.TB, service, id, addr string, weight int) {
	t.Helper()
	if err := g.reg.Register(service, registry.Instance{ID: id, Addr: addr, Weight: weight}); err != nil {
		t.Fatal(err)
	}
}

func (g *gateway) unregister(t testing.TB, service, id string) {
	t.Helper()
	if err := g.reg.Unregister(service, id, ""); err != nil {
		t.Fatal(err)
	}
}

// breaker returns the state of an instance's breaker.
func (g *gateway) breaker(id string) string { return g.DescribeInstance("echo", id).Breaker.State }

// awaitReady waits until this many instances of echo are in the balancer.
func (g *gateway) awaitReady(t testing.TB, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d instances ready", n), func() bool { return g.service("echo").view.Load().ready == n })
}

// awaitBreaker waits until an instance's breaker is in a state and the view of echo has seen it.
func (g *gateway) awaitBreaker(t testing.TB, id, state string) {
	t.Helper()
	eventually(t, id+"'s breaker "+state, func() bool {
		if g.breaker(id) != state {
			return false
		}
		v := g.service("echo").view.Load()
		ready := false
		for i := range v.ready {
			ready = ready || v.at(i).id == id
		}
		probing := false
		for _, u := range v.probing {
			probing = probing || u.id == id
		}
		return ready == (state == "closed") && probing == (state == "half-open")
	})
}

// logged counts the log lines that have all of these words.
func (g *gateway) logged(words ...string) (n int) {
	for line := range strings.Lines(g.logs.String()) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			n++
		}
	}
	return n
}

func withStrategy(s lb.Strategy) func(*Config) { return func(cfg *Config) { cfg.Strategy = s } }

// long is a time that no test waits for.
const long = time.Hour
