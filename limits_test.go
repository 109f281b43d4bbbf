package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Each limit that is a flag, over the program as it is started: who goes past it gets what the table of the README promises;
// where that is a time, not before it, and within ten times of it.
func TestLimitFlags(t *testing.T) {
	t.Parallel()
	const (
		soon   = 500 * time.Millisecond // what the flags say, unless the default is within ten times that
		window = 5 * time.Second        // of a rate
	)
	tested := map[string]bool{"--max-connections-per-client": true} // by TestReadmeLimitsAtOnce
	var all sync.WaitGroup
	run := func(flags, name string, f func(*testing.T, *running)) {
		for _, flag := range strings.Fields(flags) {
			flag, _, _ = strings.Cut(flag, "=")
			tested[flag] = true
		}
		all.Go(func() { // not t.Parallel, which lets as many run as there are processors: these wait, they do not compute
			t.Run(strings.TrimSpace(flags+" "+name), func(t *testing.T) { f(t, launch(t, nil, strings.Fields(flags)...)) })
		})
	}

	x := func(n int) string { return strings.Repeat("x", n) }
	plain := func(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: a\r\n\r\n" }
	with := func(path, fields string) string { return strings.TrimSuffix(plain(path), "\r\n") + fields + "\r\n" }
	long := func(path string, n int) string { return plain(path + "?" + x(n-len("GET "+path+"? HTTP/1.1\r\n"))) }
	large := func(path string, n int) string { return plain(path + "?" + x(n-len(plain(path+"?")))) }
	wide := func(path string, n int) string { return with(path, strings.Repeat("Y: y\r\n", n-1)) }
	sized := func(path string, n int) string { return with(path, fmt.Sprintf("Content-Length: %d\r\n", n)) } // without its body
	chunk := func(path string, n int) string {                                                               // without its end
		return with(path, "Transfer-Encoding: chunked\r\n") + fmt.Sprintf("%x\r\n%s\r\n", n, x(n))
	}
	const end = "0\r\n\r\n"
	hello, half := plain("/echo"), "GET /past HTTP/1.1\r\nX: "
	handshake := with("/past", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n")

	const ok, begun = "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
	does := func(f func(net.Conn)) func(*testing.T) string {
		return func(t *testing.T) string {
			addr, _ := scripted(t, f)
			return addr
		}
	}
	says := func(s string) func(*testing.T) string { return does(func(c net.Conn) { _, _ = io.WriteString(c, s) }) }
	silent := says("")
	goesOn := does(func(c net.Conn) {
		for _, err := io.WriteString(c, begun); err == nil; _, err = io.WriteString(c, "1\r\nx\r\n") {
			time.Sleep(10 * time.Millisecond) // slow, not silent
		}
	})
	unseen := func(t *testing.T) string { return does(func(net.Conn) { t.Error("the request went on") })(t) }

	for _, row := range []struct {
		flag, name string
		limit      time.Duration           // 0: at once
		within     string                  // to /echo, which answers it
		past       string                  // to /past
		drips      bool                    // and goes on, a byte at a time
		backend    func(*testing.T) string // of /past
		want       string                  // in the words of untilClosed
	}{
		{"--client-first-byte-timeout=500ms", "", soon, "", "", false, unseen, "EOF"},
		{"--client-head-timeout=500ms", "first", soon, "", half, true, unseen, "408 http_request_error, EOF"},
		{"--client-head-timeout=500ms", "second", soon, hello, half, true, unseen, "408 http_request_error, EOF"},
		{"--client-idle-timeout=500ms", "", soon, hello, "", false, unseen, "EOF"},
		{"--client-body-timeout=500ms", "small", soon, hello, sized("/past", 5) + x(4), false, unseen, "408 http_request_error, EOF"},
		{"--client-body-timeout=500ms", "large", soon, hello, sized("/past", 500_000) + x(100_000), false, silent, "408 http_request_error, EOF"},
		{"--client-body-timeout=500ms", "chunks", soon, hello, chunk("/past", 100_000), false, silent, "408 http_request_error, EOF"},
		{"--client-min-upload=1000", "small", window, hello, sized("/past", 50_000), true, unseen, "408 http_request_error, EOF"},
		{"--client-min-upload=1000", "large", window, hello, sized("/past", 500_000), true, silent, "408 http_request_error, EOF"},
		{"--connect-timeout=3s", "", 3 * time.Second, hello, get("/past"), false, deaf, "504 connection_timeout, EOF"},
		{"--request-timeout=500ms", "", soon, hello, get("/past"), false, silent, "504 http_response_timeout, EOF"},
		{"--response-idle-timeout=500ms", "", soon, hello, get("/past"), false, says(begun), "200, unexpected EOF"},
		{"--tunnel-idle-timeout=500ms", "", soon, hello, handshake, false,
			says("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"), "101, EOF"},
		{"--total-timeout=500ms", "no answer", soon, hello, get("/past"), false, silent, "504 http_response_timeout, EOF"},
		{"--total-timeout=500ms", "no end of it", soon, hello, get("/past"), false, goesOn, "200, unexpected EOF"},
		{"--max-body=1000", "length", 0, sized("/echo", 1000) + x(1000), sized("/past", 1001), false, unseen, "413 http_request_error, EOF"},
		{"--max-body=1000", "chunks", 0, chunk("/echo", 1000) + end, chunk("/past", 1001), false, unseen, "413 http_request_error, EOF"},
		{"--max-body=100000", "chunks", 0, chunk("/echo", 100_000) + end, chunk("/past", 100_001), false, silent, "413 http_request_error, EOF"},
		{"--max-head=400", "request", 0, large("/echo", 400), large("/past", 401), false, unseen, "431 http_request_error, EOF"},
		{"--max-head=400", "response", 0, hello, get("/past"), false, says(ok + "X: " + x(400) + "\r\n\r\n"), "502 http_response_header_section_size, EOF"},
		{"--max-fields=20", "request", 0, wide("/echo", 20), wide("/past", 21), false, unseen, "431 http_request_error, EOF"},
		{"--max-fields=20", "response", 0, hello, get("/past"), false, says(ok + strings.Repeat("Y: y\r\n", 21) + "\r\n"), "502 http_response_header_section_size, EOF"},
		{"--max-request-line=100", "", 0, long("/echo", 100), long("/past", 101), false, unseen, "414 http_request_error, EOF"},
	} {
		run(row.flag, row.name, func(t *testing.T, g *running) {
			g.register("echo", "a", named(t, "a"))
			g.register("past", "a", "http://"+row.backend(t))
			longest := 10 * row.limit
			if longest == 0 {
				longest = 10 * time.Second
			}
			began := time.Now()
			conn, r := talk(t, g, longest, row.within)
			if row.within != "" {
				response, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
					t.Fatalf("within the limit: %s, %v", response.Status, err)
				}
			}
			if _, err := io.WriteString(conn, row.past); err != nil {
				t.Fatal(err)
			}
			if row.drips {
				go func() { // until the connection is closed, here or there
					for _, err := io.WriteString(conn, "x"); err == nil; _, err = io.WriteString(conn, "x") {
						time.Sleep(20 * time.Millisecond)
					}
				}()
			}
			got := untilClosed(r)
			if took := time.Since(began); got != row.want || took < row.limit {
				t.Errorf("%s after %v, want %s after %v", got, took, row.want, row.limit)
			}
		})
	}

	// What is seen from behind only, or takes more than one connection.
	since := func(t *testing.T, began time.Time, limit time.Duration) {
		t.Helper()
		if took := time.Since(began); took < limit || took > 10*limit {
			t.Errorf("after %v, want %v", took, limit)
		}
	}
	for _, framing := range []string{"length", "chunks"} {
		const size = 128 * mib // more than the kernel takes
		for _, row := range []struct {
			flag  string
			limit time.Duration
			takes pace // 0: nothing
		}{
			{"--client-write-timeout=500ms", soon, 0},
			{"--client-min-download=100KiB", window, 20 << 10},
		} {
			run(row.flag, framing, func(t *testing.T, g *running) {
				g.register("echo", "a", "http://"+startBulk(t, 0, 0).Addr().String())
				began := time.Now()
				conn, r := talk(t, g, 10*row.limit, "")
				_ = conn.(*net.TCPConn).SetReadBuffer(8 << 10)
				_, err := io.WriteString(conn, plain(fmt.Sprintf("/echo/%s/%d", framing, size)))
				if err != nil {
					t.Fatal(err)
				}
				var got, n int64
				eventually(t, "it is given up", func() bool {
					if row.takes > 0 && err == nil {
						n, err = row.takes.copy(r, 1<<10)
						got += n
					}
					_, text := exchange(t, g.admin, get("/services/echo/a"))
					return strings.Contains(text, `"ignored":1`)
				})
				since(t, began, row.limit)
				if err == nil {
					n, err = io.Copy(io.Discard, r)
					got += n
				}
				if !errors.Is(err, syscall.ECONNRESET) || got >= size {
					t.Errorf("the client got %d bytes and %v", got, err)
				}
			})
		}
	}
	run("--upstream-idle-timeout=5s", "", func(t *testing.T, g *running) {
		addr, ended := scripted(t, func(c net.Conn) { _, _ = io.WriteString(c, ok+"Content-Length: 0\r\n\r\n") })
		g.register("echo", "a", "http://"+addr)
		began := time.Now()
		_, r := talk(t, g, 20*time.Second, hello)
		if response, err := http.ReadResponse(r, nil); err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response, err)
		}
		<-ended
		since(t, began, 5*time.Second)
	})
	run("--abort-on-fin=on", "", func(t *testing.T, g *running) {
		addr, ended := scripted(t, func(net.Conn) {})
		g.register("echo", "a", "http://"+addr)
		began := time.Now()
		conn, _ := talk(t, g, 10*time.Second, hello)
		_ = conn.(*net.TCPConn).CloseWrite()
		<-ended
		since(t, began, time.Second)
	})
	run("--abort-on-fin=off", "", func(t *testing.T, g *running) {
		addr, _ := scripted(t, func(c net.Conn) {
			time.Sleep(1500 * time.Millisecond) // more than the second after which it would be given up
			_, _ = io.WriteString(c, ok+"Content-Length: 0\r\n\r\n")
		})
		g.register("echo", "a", "http://"+addr)
		conn, r := talk(t, g, 15*time.Second, get("/echo"))
		_ = conn.(*net.TCPConn).CloseWrite()
		if got := untilClosed(r); got != "200, EOF" {
			t.Errorf("%s, want the answer", got)
		}
	})
	for _, limit := range []string{"--max-in-flight-per-instance=1", "--max-in-flight-per-service=1"} {
		const patience = 2 * time.Second
		run(limit+" --queue-timeout=2s", "", func(t *testing.T, g *running) {
			h := hold(t)
			g.register("echo", "a", h.url)
			first := h.request(t, g)
			began, refused := time.Now(), make(chan time.Duration, 2)
			for range cap(refused) { // there is room for one
				_, r := talk(t, g, 10*patience, get("/echo"))
				go func() {
					if got := untilClosed(r); got != "503 connection_limit_reached, EOF" {
						t.Errorf("%s past the limit", got)
					}
					refused <- time.Since(began)
				}()
			}
			if full, waited := <-refused, <-refused; full >= patience || waited < patience || waited > 10*patience {
				t.Errorf("one was refused after %v, the other after %v; want at once and %v", full, waited, patience)
			}
			close(h.release)
			if got := <-first; got != "done" {
				t.Errorf("the one within the limit got %s", got)
			}
		})
	}
	run("--max-connections=1", "", func(t *testing.T, g *running) {
		g.register("echo", "a", named(t, "a"))
		began := time.Now()
		_, r := talk(t, g, 20*time.Second, hello)
		if response, err := http.ReadResponse(r, nil); err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response, err)
		}
		eventually(t, "the idle one makes room", func() bool { status, _ := g.get("/echo"); return status == http.StatusOK })
		since(t, began, 2*time.Second)
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Errorf("the idle one got %v", err)
		}
	})

	run("--metrics-max-series=120", "", func(t *testing.T, g *running) { // echo is 80, an instance is 20
		omitted := func() float64 { return g.scrape().value("kerberos_metrics_omitted") }
		for i := range 2 {
			g.register("echo", fmt.Sprint(i), "http://127.0.0.1:1")
			if n := omitted(); n != 0 {
				t.Errorf("%v are left out within the limit", n)
			}
		}
		g.register("echo", "2", "http://127.0.0.1:1")
		if s := g.scrape(); s.value("kerberos_metrics_omitted", "what=instances") != 3 || s["kerberos_instance_ready"] != nil {
			t.Errorf("%v are left out past the limit", omitted())
		}
	})

	all.Wait()
	for _, row := range rows(t, "Limits") {
		flag, _, _ := strings.Cut(strings.TrimPrefix(row[0], "`"), "`")
		if strings.HasPrefix(flag, "--") && !tested[flag] {
			t.Errorf("%s: nothing tests it", flag)
		}
	}
}

// talk sends raw bytes on a connection of its own, which may take so long.
func talk(t *testing.T, g *running, longest time.Duration, raw string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := (&net.Dialer{Control: asOnEthernet}).Dial("tcp", g.data)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(longest)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

// untilClosed reads until the other side closes, and tells what came: the status of a response with the error type of its
// Proxy-Status, if it came; then how its body was cut, or what came instead of another one.
func untilClosed(r *bufio.Reader) string {
	if _, err := r.Peek(1); err != nil {
		return errorOf(err)
	}
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return err.Error()
	}
	told := fmt.Sprint(response.StatusCode)
	if _, kind, ok := strings.Cut(response.Header.Get("Proxy-Status"), "error="); ok {
		told += " " + kind
	}
	if _, err = io.Copy(io.Discard, response.Body); err == nil {
		if _, err = r.ReadByte(); err == nil {
			return told + ", more"
		}
	}
	return told + ", " + errorOf(err)
}

// scripted is a backend that reads the head of a request, does f, and waits until the gateway has closed the connection.
func scripted(t *testing.T, f func(net.Conn)) (addr string, closed <-chan struct{}) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	ended := make(chan struct{}, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(time.Minute))
				if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
					return
				}
				f(c)
				_, _ = io.Copy(io.Discard, c)
				ended <- struct{}{}
			}()
		}
	}()
	return ln.Addr().String(), ended
}
