package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// scripted is a server whose n-th request, counted from 0 over all connections, is answered by the function given. It
// closes the connection if that returns false.
func scripted(t *testing.T, answer func(n int, c net.Conn, body string) bool) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	var mu sync.Mutex
	count := 0
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					req, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					body, err := io.ReadAll(req.Body)
					if err != nil {
						return
					}
					mu.Lock()
					n := count
					count++
					mu.Unlock()
					if !answer(n, c, string(body)) {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func say(c net.Conn, s string) bool {
	_, err := io.WriteString(c, s)
	return err == nil
}

// driven is what the built-in load counts at addr; rate 0 is a closed loop.
func driven(t *testing.T, l load, addr string, rate float64, d time.Duration) outcome {
	t.Helper()
	b, err := startDrive(t.Context(), nil, l, addr, rate, d)
	if err != nil {
		t.Fatal(err)
	}
	defer b.stop()
	o, err := b.run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (l latency) String() string {
	return fmt.Sprintf("p50 %s, p99 %s, p99.9 %s", l.quantile(0.5), l.quantile(0.99), l.quantile(0.999))
}

func at(o outcome, q float64) time.Duration { return o.Latency.quantile(q) }

func TestDriveCounts(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer func(n int, c net.Conn) bool // from the third request on
		bad    func(o outcome) bool
	}{
		{"good ones", func(_ int, c net.Conn) bool { return say(c, ok) },
			func(o outcome) bool { return o.Requests < 10 || o.Errors+o.BadStatus > 0 }},
		{"in pieces", func(_ int, c net.Conn) bool {
			for _, b := range strings.Split(ok, "") {
				say(c, b)
				time.Sleep(100 * time.Microsecond)
			}
			return true
		}, func(o outcome) bool { return o.Requests < 10 || o.Errors+o.BadStatus > 0 }},
		{"closed after each", func(_ int, c net.Conn) bool { say(c, ok); return false },
			func(o outcome) bool { return o.Requests < 1 || o.Errors < 1 || o.BadStatus > 0 }},
		{"closed instead", func(int, net.Conn) bool { return false },
			func(o outcome) bool { return o.Requests != 0 || o.Errors < 10 }},
		{"another status", func(n int, c net.Conn) bool {
			return say(c, strings.Replace(ok, "200", []string{"200", "404", "502"}[n%3], 1))
		}, func(o outcome) bool { return o.BadStatus < o.Requests*2/3-1 || o.BadStatus > o.Requests*2/3+1 }},
		{"another length", func(_ int, c net.Conn) bool { return say(c, strings.Replace(ok, "2\r\n\r\n", "3\r\n\r\n.", 1)) },
			func(o outcome) bool { return o.Requests < 10 || o.BadStatus != o.Requests }},
		{"more than was said", func(_ int, c net.Conn) bool { return say(c, ok+"!") },
			func(o outcome) bool { return o.Requests != 0 || o.Errors < 10 }},
		{"chunked", func(_ int, c net.Conn) bool {
			return say(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
		}, func(o outcome) bool { return o.Requests != 0 || o.Errors < 10 }},
		{"something else", func(_ int, c net.Conn) bool { return say(c, "SSH-2.0-OpenSSH_9.9\r\n\r\n") },
			func(o outcome) bool { return o.Requests != 0 || o.Errors < 10 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			addr := scripted(t, func(n int, c net.Conn, _ string) bool {
				if n < 2 {
					return say(c, ok)
				}
				return test.answer(n, c)
			})
			o := driven(t, load{Method: "GET", Response: 2, Connections: 2}, addr, 0, 300*time.Millisecond)
			if test.bad(o) {
				t.Errorf("%+v", o)
			}
			if o.Requests > 0 && (at(o, 0.5) <= 0 || at(o, 0.99) < at(o, 0.5)) {
				t.Errorf("latencies: %+v", o)
			}
		})
	}
}

func TestDriveNeedsGoodFirstAnswers(t *testing.T) {
	t.Parallel()
	addr := scripted(t, func(_ int, c net.Conn, _ string) bool { return say(c, "HTTP/1.1 503 No\r\n\r\n") })
	if _, err := startDrive(t.Context(), nil, load{Method: "GET", Response: 2, Connections: 2}, addr, 0, time.Second); err == nil ||
		!strings.Contains(err.Error(), "2 answers not as they should be") {
		t.Error(err)
	}
}

// All requests that are due are sent and counted, each once, and none of them with another.
func TestOpenLoopKeepsItsRate(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	numbers := map[string]int{}
	addr := scripted(t, func(_ int, c net.Conn, body string) bool {
		mu.Lock()
		numbers[body]++
		mu.Unlock()
		return say(c, ok)
	})
	l := load{Method: "POST", Body: []byte("{" + counterMark + "}"), Counter: 99_999_000, Response: 2, Connections: 4}
	o := driven(t, l, addr, 500, 600*time.Millisecond)
	if o.Requests != 300 || o.Errors+o.BadStatus > 0 {
		t.Errorf("%+v, want 300 requests", o)
	}
	if o.Elapsed < 590*time.Millisecond {
		t.Errorf("they were sent within %s", o.Elapsed)
	}
	for i := range 304 { // one on each connection came before
		if body := fmt.Sprintf("{%d}", 99_999_000+i); numbers[body] != 1 {
			t.Fatalf("%s came %d times, of %d", body, numbers[body], len(numbers))
		}
	}
}

// A server that stalls for 200 ms of a second delays a fifth of the requests that are due, not only those few that it
// happens to hold: a percent of all waits for more than 190 ms.
func TestOpenLoopShowsAStall(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	stalled := false
	addr := scripted(t, func(n int, c net.Conn, _ string) bool {
		mu.Lock()
		if n == 400 && !stalled {
			stalled = true
			time.Sleep(200 * time.Millisecond)
		}
		mu.Unlock()
		return say(c, ok)
	})
	l := load{Method: "GET", Response: 2, Connections: 4}
	o := driven(t, l, addr, 1000, time.Second)
	if o.Requests != 1000 || o.Errors > 0 || at(o, 0.5) > 100*time.Millisecond || at(o, 0.99) < 170*time.Millisecond || at(o, 0.999) < 190*time.Millisecond {
		t.Errorf("open loop: %+v", o)
	}
	again := driven(t, l, scripted(t, func(n int, c net.Conn, _ string) bool {
		mu.Lock()
		if n == 400 {
			time.Sleep(200 * time.Millisecond)
		}
		mu.Unlock()
		return say(c, ok)
	}), 0, time.Second)
	if again.Requests < 1000 || at(again, 0.99) > 150*time.Millisecond {
		t.Errorf("a closed loop would hide it, so that this test shows something: %+v", again)
	}
}

// What is never answered is not forgotten.
func TestOpenLoopCountsTheUnanswered(t *testing.T) {
	t.Parallel()
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	addr := scripted(t, func(n int, c net.Conn, _ string) bool {
		if n >= 104 {
			<-never
		}
		return say(c, ok)
	})
	o := driven(t, load{Method: "GET", Response: 2, Connections: 4}, addr, 1000, 200*time.Millisecond)
	if o.Requests != 100 || o.Unanswered != 100 || o.Errors > 0 || at(o, 0.99) < lastWait {
		t.Errorf("%+v, want 100 answered and 100 not", o)
	}
}

// A server that closes connections at rest costs no request.
func TestOpenLoopReconnects(t *testing.T) {
	t.Parallel()
	addr := scripted(t, func(n int, c net.Conn, _ string) bool {
		if n%10 == 0 {
			say(c, ok)
			return false
		}
		return say(c, ok)
	})
	if o := driven(t, load{Method: "GET", Response: 2, Connections: 4}, addr, 100, 500*time.Millisecond); o.Requests+o.Errors != 50 || o.Errors > 2 {
		t.Errorf("%+v, want 50 requests, nearly all of them answered", o) // one may be sent just before the close is seen
	}
}
