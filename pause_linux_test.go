package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A gateway that was stopped for longer than its leases last ends none of them before it has gone on for as long.
func TestPausedGateway(t *testing.T) {
	t.Parallel()
	g := launch(t, nil)
	const ttl = 2 * time.Second
	for i := range 3 {
		if status, answer := g.post(fmt.Sprintf(`{"service":"echo","id":"%d","addr":%q,"ttl":%q}`, i, named(t, "x"), ttl)); status != http.StatusNoContent {
			t.Fatalf("%d %s", status, answer)
		}
	}
	if !g.logged("registrations end with this process") {
		t.Error("it does not say that registrations end with it")
	}
	g.signal(syscall.SIGSTOP)
	time.Sleep(2 * ttl)
	resumed := time.Now()
	g.signal(syscall.SIGCONT)
	count := func() int {
		_, text := exchange(t, g.admin, get("/services"))
		return strings.Count(text, `"ready":true`)
	}
	for left := count(); time.Since(resumed) < ttl; left = count() {
		if left != 3 && time.Since(resumed) < ttl {
			t.Fatalf("%d are left %v after it went on", left, time.Since(resumed))
		}
		time.Sleep(10 * time.Millisecond)
	}
	eventually(t, "they have expired", func() bool { return count() == 0 })
}

// A drain goes on when whoever asked for it has hung up.
func TestDrainOutlastsItsCaller(t *testing.T) {
	for _, listener := range []string{"admin", "data"} {
		t.Run(listener, func(t *testing.T) {
			t.Parallel()
			g := launch(t, nil)
			api := map[string]string{"admin": g.admin, "data": g.data}[listener]
			began, end := make(chan struct{}), make(chan struct{})
			backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				close(began)
				<-end
				io.WriteString(w, "done")
			}))
			defer backend.Close()
			g.register("echo", "a", backend.URL)
			answer := make(chan string, 1)
			go func() {
				response, text, err := converse(&net.Dialer{}, g.data, get("/echo"))
				if err != nil {
					answer <- err.Error()
					return
				}
				answer <- fmt.Sprint(response.StatusCode, " ", text)
			}()
			<-began
			conn, err := net.Dial("tcp", api)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, "DELETE /services/echo/a?drain=1m HTTP/1.1\r\nHost: localhost\r\n\r\n")
			state := func() string {
				_, text := exchange(t, g.admin, get("/services/echo/a"))
				return text
			}
			eventually(t, "it is drained", func() bool { return strings.Contains(state(), `"state":"drain"`) })
			conn.Close()
			for range 10 {
				if text := state(); !strings.Contains(text, `"in_flight":1`) {
					t.Fatal(text)
				}
				time.Sleep(10 * time.Millisecond)
			}
			close(end)
			if got := <-answer; got != "200 done" {
				t.Error(got)
			}
			eventually(t, "it has left", func() bool { return strings.Contains(state(), `"status":404`) })
			eventually(t, "the log says so", func() bool { return g.logged("instance has left: its drain is over", `"cut":0`) })
		})
	}
}
