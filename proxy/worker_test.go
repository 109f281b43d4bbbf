package proxy

import (
	"fmt"
	"strings"
	"testing"
)

// What is all there when the loop looks is answered on the loop, chunks included: no goroutine is started for it.
func TestAnsweredOnTheLoop(t *testing.T) {
	for _, row := range []struct{ name, response, body, trailer string }{
		{"length", ok(5), "rrrrr", ""},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks("hello world", 4), "hello world", ""},
		{"trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-A: b\r\n\r\n", "hello", "X-A: b\r\n"},
		{"empty chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "", ""},
		{"48 KiB", ok(48 << 10), strings.Repeat("r", 48<<10), ""},
		{"204", "HTTP/1.1 204 No Content\r\n\r\n", "", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, steady, nil)
			g.register(t, "echo", "a", "http://"+startRaw(t, 0, []byte(row.response)))
			c := g.dial(t)
			c.get("/echo") // the connection to the instance is made by a goroutine
			held := 0
			for n := range 20 {
				m := c.get("/echo")
				if m.body != row.body || m.trailer != row.trailer || m.field("Proxy-Status") != "" {
					t.Fatalf("request %d: %q %q", n, m.head, m.body)
				}
				g.mu.Lock()
				for conn := range g.conns {
					if conn.sock.Held() {
						held++
					}
				}
				g.mu.Unlock()
			}
			if held > 5 { // now and then the loop may look when a part of it has come
				t.Errorf("after %d of 20 requests a goroutine has the connection", held)
			}
		})
	}
}

// Chunks that are broken, or followed by something, are no less refused there.
func TestBrokenChunksOnTheLoop(t *testing.T) {
	for name, response := range map[string]string{
		"bad size":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nx\r\n\r\n",
		"bare LF":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
		"truncated":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
		"no CR LF":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
		"bad traile": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX A: b\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, steady, nil)
			a := startActor(t, says("fine"))
			g.register(t, "echo", "a", a.url())
			c := g.dial(t)
			c.get("/echo").want(t, 200)
			a.does(breaksOff(response))
			c.send("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
			if m, err := readMessage(c.r, false); err == nil && m.status() == 200 {
				t.Errorf("taken for whole: %q %q", m.head, m.body)
			}
			a.does(says("fine"))
			if m := g.dial(t).get("/echo"); m.body != "fine" {
				t.Errorf("then %q %q", m.head, m.body)
			}
		})
	}
	t.Run("something behind", func(t *testing.T) {
		g := startGateway(t, steady, nil)
		response := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
		a := startActor(t, writes(response))
		g.register(t, "echo", "a", a.url())
		c := g.dial(t)
		c.get("/echo").want(t, 200)
		a.does(writes(response + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
		for n := range 3 {
			if m := c.get("/echo").want(t, 200); m.body != "hello" {
				t.Errorf("request %d got %q", n, m.body)
			}
		}
		if n := a.accepted.Load(); n < 3 {
			t.Error(fmt.Sprint("a connection on which something came unasked was used again: ", n))
		}
	})
}
