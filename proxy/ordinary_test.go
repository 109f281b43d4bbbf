package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// Ordinary clients pass with the defaults. All times are a sixtieth: a minute of theirs takes a second.
func TestOrdinaryClients(t *testing.T) {
	const minute = time.Second
	scaled := func(cfg *Config) {
		cfg.Limits, _ = Limits{}.withDefaults()
		for _, d := range []*time.Duration{
			&cfg.Limits.FirstByteTimeout, &cfg.Limits.HeadTimeout, &cfg.Limits.IdleTimeout, &cfg.Limits.BodyTimeout,
			&cfg.Limits.WriteTimeout, &cfg.Limits.SilenceTimeout,
		} {
			*d /= 60
		}
		cfg.Limits.TunnelIdle = time.Hour / 60
		cfg.Limits.QueueTimeout, cfg.RequestTimeout = 0, 30*time.Second/60
	}
	start := func(t *testing.T, f func(o *origin, c net.Conn, r *bufio.Reader)) *gateway {
		g := startGateway(t, scaled, nil)
		g.register(t, "echo", "1", startOrigin(t, f).url())
		return g
	}
	patient := func(g *gateway, t *testing.T) *client {
		c := g.dial(t)
		c.SetDeadline(time.Now().Add(time.Minute))
		return c
	}

	t.Run("a browser that opens connections ahead", func(t *testing.T) {
		t.Parallel()
		g := start(t, namingHandler("ok "))
		ahead := []*client{patient(g, t), patient(g, t), patient(g, t)}
		ahead[0].get("/echo").want(t, 200)
		time.Sleep(minute / 3) // 20 s later it needs a second one
		ahead[1].get("/echo").want(t, 200)
		ahead[0].get("/echo").want(t, 200)
		ahead[2].closed() // without a word: it would be taken for an answer
	})
	t.Run("ab, HTTP/1.0 with keep-alive", func(t *testing.T) {
		t.Parallel()
		c := patient(start(t, namingHandler("ok ")), t)
		for range 1000 {
			c.send("GET /echo HTTP/1.0\r\nConnection: Keep-Alive\r\nHost: a\r\nUser-Agent: ApacheBench/2.3\r\nAccept: */*\r\n\r\n")
			if m := c.read(false); m.body != "ok " || !strings.EqualFold(m.field("Connection"), "keep-alive") || m.field("Content-Length") == "" {
				t.Fatal(m.head)
			}
		}
	})
	t.Run("ab, HTTP/1.0 without", func(t *testing.T) {
		t.Parallel()
		g := start(t, namingHandler("ok "))
		for range 50 {
			c := patient(g, t)
			c.send("GET /echo HTTP/1.0\r\nHost: a\r\nUser-Agent: ApacheBench/2.3\r\nAccept: */*\r\n\r\n")
			if m := c.read(false); m.body != "ok " {
				t.Fatal(m.head)
			}
			c.closed()
		}
	})
	t.Run("a WebSocket idle for 10 minutes", func(t *testing.T) {
		t.Parallel()
		g := start(t, func(o *origin, c net.Conn, r *bufio.Reader) {
			if _, err := o.next(r); err == nil {
				io.WriteString(c, "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				io.Copy(c, r)
			}
		})
		c := patient(g, t)
		c.send("GET /echo HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		if m := c.headOf(); m.status() != 101 {
			t.Fatal(m.head)
		}
		for _, word := range []string{"hello", "again"} {
			c.send(word)
			got := make([]byte, 5)
			if _, err := io.ReadFull(c.r, got); err != nil || string(got) != word {
				t.Fatalf("%q, %v", got, err)
			}
			if word == "hello" {
				time.Sleep(10 * minute)
			}
		}
	})
	t.Run("server-sent events silent for 4 minutes", func(t *testing.T) {
		t.Parallel()
		c := patient(start(t, func(o *origin, c net.Conn, r *bufio.Reader) {
			if _, err := o.next(r); err == nil {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: a\n\n\r\n")
				time.Sleep(4 * minute)
				io.WriteString(c, "9\r\ndata: b\n\n\r\n0\r\n\r\n")
			}
		}), t)
		c.send(toHTTP11)
		if m := c.read(false); m.body != "data: a\n\ndata: b\n\n" {
			t.Errorf("%q", m.body)
		}
	})
	t.Run("an upload of 20 minutes at 100 KB/s", func(t *testing.T) {
		t.Parallel()
		c := patient(start(t, namingHandler("got ")), t)
		const pieces, piece = 1200, 1000 // one a second of its time; the rate is what matters to no limit
		c.send(fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", pieces*piece))
		for range pieces {
			c.send(strings.Repeat("x", piece))
			time.Sleep(minute / 60)
		}
		if m := c.read(false); m.status() != 200 || len(m.body) != len("got ")+pieces*piece {
			t.Error(m.head)
		}
	})
}
