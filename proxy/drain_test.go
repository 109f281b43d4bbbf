package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"kerberos/registry"
)

// An instance that is drained gets nothing new, and what it has is waited for.
func TestDrainWaits(t *testing.T) {
	g := startGateway(t, nil, nil)
	h := startHeld(t, "held")
	g.register(t, "echo", "a", h.url())
	c := g.ask(t, "/echo")
	h.arrived(t)
	g.register(t, "echo", "b", naming(t, "b").url())
	drained := make(chan int, 1)
	go func() {
		cut, _, err := g.reg.Drain("echo", "a", "", 20*time.Second)
		if err != nil {
			t.Error(err)
		}
		drained <- cut
	}()
	eventually(t, "it is drained", func() bool {
		s := g.DescribeInstance("echo", "a")
		return !s.Ready && s.Reason == "drain" && s.InFlight == 1
	})
	for range 10 {
		if m := g.dial(t).get("/echo").want(t, 200); m.body[0] != 'b' {
			t.Fatalf("the drained one answers: %q", m.body)
		}
	}
	select {
	case <-drained:
		t.Fatal("the drain is over")
	default:
	}
	h.let <- struct{}{}
	if m := c.read(false).want(t, 200); m.body != "held" {
		t.Error(m.body)
	}
	if cut := <-drained; cut != 0 || g.reg.Snapshot("echo").Instance("a") != nil {
		t.Errorf("%d cut", cut)
	}
}

// What is not over in time is broken off, and looks so.
func TestDrainCuts(t *testing.T) {
	for _, row := range []struct {
		name, request, begins string
		status                int // of the answer; 0: it has begun
	}{
		{"a GET goes to another one", "GET /echo HTTP/1.1\r\nHost: a\r\n\r\n", "", 200},
		{"a POST", "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", "", 502},
		{"a body with a length", toHTTP11, halfAnswer, 0},
		{"chunks", toHTTP11, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 0},
		{"up to the close", toHTTP10, "HTTP/1.1 200 OK\r\n\r\nhello", 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, nil, nil)
			came := make(chan struct{}, 1)
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if _, err := o.next(r); err != nil {
					return
				}
				io.WriteString(c, row.begins)
				came <- struct{}{}
				io.Copy(io.Discard, r)
			})
			g.register(t, "echo", "a", o.url())
			c := g.dial(t)
			c.send(row.request)
			<-came
			g.register(t, "echo", "b", naming(t, "b").url())
			if row.status == 0 {
				c.headOf()
			}
			cut, waited, err := g.reg.Drain("echo", "a", "", 100*time.Millisecond)
			if cut != 1 || err != nil || waited > time.Second {
				t.Errorf("%d cut after %v, %v", cut, waited, err)
			}
			if row.status != 0 {
				c.read(false).want(t, row.status)
			} else if rest, err := io.ReadAll(c.r); row.name == "up to the close" && !errors.Is(err, syscall.ECONNRESET) || len(rest) > 100 || strings.HasSuffix(string(rest), "0\r\n\r\n") {
				t.Errorf("%q, %v: it looks whole", rest, err)
			}
			c.Close()
			g.idle(t)
		})
	}
	t.Run("a tunnel", func(t *testing.T) {
		eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
			c, f := tt.open(t)
			c.send("x")
			wantBytes(t, f.r, "x")
			cut, _, err := tt.reg.Drain("ws", "a", "", 50*time.Millisecond)
			if cut != 1 || err != nil {
				t.Errorf("%d cut, %v", cut, err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if n, err := c.r.Read(make([]byte, 1)); n > 0 || isTimeout(err) {
				t.Errorf("the client reads %d, %v", n, err)
			}
			eventually(t, "the tunnel is gone, and its instance", func() bool {
				tt.mu.Lock()
				defer tt.mu.Unlock()
				return len(tt.conns) == 0 && tt.reg.Snapshot("ws").Instance("a") == nil
			})
			f.Close()
			c.Close()
		})
	})
}

// An operator's word counts at once.
func TestDownGetsNothing(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", naming(t, "a").url())
	for _, state := range []registry.State{registry.Down, registry.Drain} {
		if err := g.reg.Patch("echo", "a", registry.Patch{SetState: true, State: state}); err != nil {
			t.Fatal(err)
		}
		g.dial(t).get("/echo").want(t, 503)
		if s := g.DescribeInstance("echo", "a"); s.Ready || s.Reason != string(state) {
			t.Errorf("%+v", s)
		}
		if err := g.reg.Patch("echo", "a", registry.Patch{SetState: true}); err != nil {
			t.Fatal(err)
		}
		g.dial(t).get("/echo").want(t, 200)
	}
}
