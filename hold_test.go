package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asHolder has this program run as a backend that keeps itself registered by a connection to the API that the variable names.
const asHolder = "TEST_HOLDS_AT"

// holderHost is where it listens; 127.0.0.1 if that is not set.
const holderHost = "TEST_HOLDS_FROM"

func holder(api string) int {
	ln, err := net.Listen("tcp", cmp.Or(os.Getenv(holderHost), "127.0.0.1")+":0")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "held") }))
	conn, r, err := held(api, "held", "http://"+ln.Addr().String(), "")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conn.Close()
	fmt.Println("held")
	io.Copy(io.Discard, r)
	return 0
}

// held registers echo/id on a connection that it returns, behind the line that says so.
func held(api, id, addr, ttl string) (net.Conn, *bufio.Reader, error) {
	conn, err := net.Dial("tcp", api)
	if err != nil {
		return nil, nil, err
	}
	body := fmt.Sprintf(`{"service":"echo","id":%q,"addr":%q}`, id, addr)
	if ttl != "" {
		body = strings.TrimSuffix(body, "}") + fmt.Sprintf(`,"ttl":%q}`, ttl)
	}
	fmt.Fprintf(conn, "POST /register?hold HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	r := bufio.NewReader(conn)
	response, err := http.ReadResponse(r, nil)
	if err == nil && (response.StatusCode != http.StatusOK || response.Header.Get("Content-Type") != "application/x-ndjson") {
		err = fmt.Errorf("%s %v", response.Status, response.Header)
	}
	line := ""
	if err == nil {
		line, err = r.ReadString('\n')
	}
	if err == nil && !strings.HasPrefix(line, `{"registered":true,"generation":`) {
		err = fmt.Errorf("the first line is %q", line)
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, r, nil
}

// A connection keeps an instance registered, on either listener.
func TestHold(t *testing.T) {
	for _, listener := range []string{"admin", "data"} {
		t.Run(listener, func(t *testing.T) {
			t.Parallel()
			g := launch(t, nil)
			testHold(t, g, map[string]string{"admin": g.admin, "data": g.data}[listener])
		})
	}
}

func testHold(t *testing.T, g *running, api string) {
	instance := func() string {
		_, text := exchange(t, g.admin, get("/services/echo/a"))
		return text
	}
	for _, row := range []struct {
		name, ttl string
		end       func(conn net.Conn, backend *http.Server) // of what keeps it
		becomes   string                                    // part of what the API says of it
	}{
		{"the connection ends, the backend does not", "", func(conn net.Conn, _ *http.Server) { conn.Close() }, `"ttl":"15s","expires_in":"1`},
		{"with a ttl", "1m", func(conn net.Conn, _ *http.Server) { conn.Close() }, `"ttl":"1m0s","expires_in":"5`},
		{"the backend ends too", "1m", func(conn net.Conn, backend *http.Server) { backend.Close(); conn.Close() }, `"status":404`},
		{"by a reset", "", func(conn net.Conn, backend *http.Server) {
			backend.Close()
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}, `"status":404`},
		{"it is registered without", "", func(net.Conn, *http.Server) { g.register("echo", "a", named(t, "a")) }, `"lease":null`},
		{"it is unregistered", "", func(net.Conn, *http.Server) {
			exchange(t, g.admin, strings.Replace(post(`{"service":"echo","id":"a"}`), "POST", "DELETE", 1))
		}, `"status":404`},
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		backend := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a") })}
		go backend.Serve(ln)
		conn, r, err := held(api, "a", "http://"+ln.Addr().String(), row.ttl)
		if err != nil {
			t.Fatal(err)
		}
		if text := instance(); !strings.Contains(text, `"held":true`) {
			t.Errorf("%s: %s", row.name, text)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "{\"heartbeat\":true}\n" {
			t.Errorf("%s: %q, %v", row.name, line, err)
		}
		if status, body := g.get("/echo"); status != http.StatusOK || body != "a" {
			t.Errorf("%s: %d %s", row.name, status, body)
		}
		row.end(conn, backend)
		began := time.Now()
		eventually(t, row.name+": "+row.becomes, func() bool { return strings.Contains(instance(), row.becomes) })
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("%s: known after %v", row.name, took)
		}
		if row.becomes != `"status":404` && !strings.Contains(instance(), `"state":"up"`) {
			t.Errorf("%s: %s", row.name, instance())
		}
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, r); err != nil && conn.SetReadDeadline(time.Time{}) == nil {
			t.Errorf("%s: the connection stays: %v", row.name, err)
		}
		conn.Close()
		backend.Close()
		exchange(t, g.admin, strings.Replace(post(`{"service":"echo","id":"a"}`), "POST", "DELETE", 1))
	}
	for _, raw := range []string{"POST /register?hold=1", "POST /register?hold&hold", "PUT /services/echo/a?hold"} {
		if response, text := exchange(t, g.admin, strings.Replace(post(`{"addr":"http://127.0.0.1:1"}`), "POST /register", raw, 1)); response.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %d %s", raw, response.StatusCode, text)
		}
	}

	// The gateway does not wait for those who hold.
	conn, r, err := held(api, "a", named(t, "a"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	began := time.Now()
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 || time.Since(began) > 10*time.Second {
		t.Errorf("exit %d after %v", code, time.Since(began))
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Error(err)
	}
}

// A backend that is killed gets no requests after 200 ms.
func TestHeldBackendIsKilled(t *testing.T) {
	g := launch(t, nil)
	g.register("echo", "b", named(t, "b"))
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), asHolder+"="+g.admin)
	p := beginCommand(t, cmd)
	eventually(t, "it is registered", func() bool { return p.stdout.String() == "held\n" })
	l := beginLoad(t, g.data, 300)
	l.more(t, 100)
	p.signal(syscall.SIGKILL)
	began := time.Now()
	eventually(t, "it is gone", func() bool {
		_, text := exchange(t, g.admin, get("/services/echo"))
		return !strings.Contains(text, `"id":"held"`)
	})
	took := time.Since(began)
	l.more(t, 100)
	l.stop()
	if took > 2*time.Second {
		t.Errorf("gone after %v", took)
	}
	_, text := exchange(t, g.admin, get("/services"))
	if !strings.Contains(text, `"expired":[{"service":"echo","id":"held"`) {
		t.Error(text)
	}
	for how := range l.failures() {
		if !strings.HasPrefix(how, "POST: ") { // what was sent to it a moment before
			t.Error(how)
		}
	}
	t.Logf("gone after %v; failed: %v", took, l.failures())
}
