package registry

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// A connection that is lost has its say about its own registration only.
func TestLostHold(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	alive := "http://" + ln.Addr().String()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	dead := "http://" + closed.Addr().String()
	for _, row := range []struct {
		name, addr string
		meanwhile  func(t *testing.T, r *Registry)
		left       bool
		lease      time.Duration
	}{
		{"it lives", alive, nil, true, heldTTL},
		{"it is dead", dead, nil, false, 0},
		{"registered again", dead, func(t *testing.T, r *Registry) { lend(t, r, "echo", "a", time.Minute) }, true, time.Minute},
		{"held again", dead, func(t *testing.T, r *Registry) {
			if _, err := r.Hold("echo", Instance{ID: "a", Addr: dead}); err != nil {
				t.Fatal(err)
			}
		}, true, 0},
		{"patched", dead, func(t *testing.T, r *Registry) {
			if err := r.Patch("echo", "a", Patch{SetState: true, State: Drain}); err != nil {
				t.Fatal(err)
			}
		}, false, 0},
		{"unregistered", alive, func(t *testing.T, r *Registry) { _ = r.Unregister("echo", "a", "") }, false, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := New(Config{})
			defer r.Close()
			states := make(chan State, 10)
			h, err := r.Hold("echo", Instance{ID: "a", Addr: row.addr})
			if err != nil || !h.Current() || h.Generation == 0 {
				t.Fatalf("%+v, %v", h, err)
			}
			if row.meanwhile != nil {
				row.meanwhile(t, r)
			}
			r.OnChange(func(string) {
				if in := r.Snapshot("echo").Instance("a"); in != nil {
					states <- in.State()
				}
			})
			current := h.Current()
			h.Lost()
			in := r.Snapshot("echo").Instance("a")
			if (in != nil) != row.left || h.Current() {
				t.Fatalf("left: %+v", in)
			}
			if row.left {
				if left, _ := r.ExpiresIn(in); left > row.lease || left < row.lease-10*time.Second || in.suspect {
					t.Errorf("%v are left, want %v", left, row.lease)
				}
			}
			if got := len(r.Expired()) > 0; got == (row.left || row.name == "unregistered") {
				t.Errorf("expired: %+v", r.Expired())
			}
			close(states)
			var seen []State
			for s := range states {
				seen = append(seen, s)
			}
			if current && row.name != "patched" && !slices.Contains(seen, Suspect) {
				t.Errorf("states %v", seen)
			}
		})
	}
}

// A connection too many is refused, and registers nothing.
func TestTooManyHolds(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	h := NewHandler(r, nil)
	const body = `{"service":"echo","id":"a","addr":"http://127.0.0.1:1"}`
	r.holds.Store(mostHolds)
	resp := call(h, near, "POST", "/register?hold", body)
	wantProblem(t, resp, 503, "", "as many connections as it may")
	if after := string(resp.Header.Peek("Retry-After")); after != "1" || r.Snapshot("echo") != nil {
		t.Errorf("Retry-After %q, registered: %v", after, r.Names())
	}
	r.holds.Store(mostHolds - 1)
	if resp := call(h, near, "POST", "/register?hold", body); resp.StatusCode() != 200 || r.Snapshot("echo") == nil {
		t.Errorf("status %d, registered: %v", resp.StatusCode(), r.Names())
	}
}

// What comes on the connection means nothing, and is bounded.
func TestHoldIsBounded(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	h, err := r.Hold("echo", Instance{ID: "a", Addr: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer near.Close()
	over := make(chan struct{})
	go func() {
		h.serve(far)
		far.Close()
		close(over)
	}()
	in := bufio.NewReader(near)
	for line := ""; !strings.HasPrefix(line, "{"); {
		if line, err = in.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	go io.Copy(io.Discard, in)
	n, err := near.Write(make([]byte, 2*holdBytes))
	if err == nil || n > holdBytes+512 {
		t.Errorf("%d bytes were taken, %v", n, err)
	}
	<-over
	if in := r.Snapshot("echo").Instance("a"); in != nil {
		t.Errorf("left: %+v", in)
	}
}

// The list of those that ended is bounded also where no lease ever ends and nobody reads it.
func TestLostHoldsAreBounded(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	for i := range keptExpired + 5 {
		register(t, r, "echo", fmt.Sprint(i), "http://127.0.0.1:1", 0)
		_ = r.edit("echo", fmt.Sprint(i), "", func(at *slot, in *Instance) { r.lose(at, in) })
	}
	if n := len(r.expired); n != keptExpired {
		t.Errorf("%d are kept", n)
	}
}

// Of an instance that is back before anybody knows whether it has ended, nobody reads in the log that it has.
func TestLostHoldOfWhoIsBack(t *testing.T) {
	var log bytes.Buffer
	r := New(Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	defer r.Close()
	dead := Instance{ID: "a", Addr: "http://127.0.0.1:1"}
	h, err := r.Hold("echo", dead)
	if err != nil {
		t.Fatal(err)
	}
	r.OnChange(func(string) {
		if in := r.Snapshot("echo").Instance("a"); in != nil && in.State() == Suspect {
			_, err = r.Hold("echo", dead)
		}
	})
	h.Lost()
	if in := r.Snapshot("echo").Instance("a"); err != nil || in == nil || in.State() != Up || log.Len() > 0 {
		t.Errorf("%v, left: %+v, log: %s", err, in, &log)
	}
}
