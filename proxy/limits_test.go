package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kerberos/registry"
)

var unlimited = Limits{-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1}

func TestLimitsDefaults(t *testing.T) {
	standard := Limits{
		FirstByteTimeout: 30 * time.Second, HeadTimeout: 10 * time.Second, IdleTimeout: 75 * time.Second, BodyTimeout: 30 * time.Second,
		WriteTimeout: time.Minute, SilenceTimeout: 5 * time.Minute, TunnelIdle: time.Hour, TotalTimeout: forever, Body: math.MaxInt64,
		Head: 32 << 10, Fields: 200, RequestLine: 16 << 10,
		QueueTimeout: time.Second,
	}
	if got, err := (Limits{}).withDefaults(); got != standard || err != nil {
		t.Errorf("defaults: %+v", got)
	}
	none := Limits{
		FirstByteTimeout: forever, HeadTimeout: forever, IdleTimeout: forever, BodyTimeout: forever,
		WriteTimeout: forever, SilenceTimeout: forever, TunnelIdle: forever, TotalTimeout: forever, Body: math.MaxInt64,
		Head: MaxHead, Fields: math.MaxInt, RequestLine: math.MaxInt,
	}
	if got, err := unlimited.withDefaults(); got != none || err != nil {
		t.Errorf("none: %+v", got)
	}
	g := startGateway(t, func(cfg *Config) {
		cfg.Limits = unlimited
		cfg.RequestTimeout, cfg.ConnectTimeout, cfg.UpstreamIdle = -1, -1, -1
	}, nil)
	g.register(t, "echo", "1", naming(t, "ok ").url())
	for _, c := range []*client{g.dial(t), g.dial(t)} {
		c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel")
		c.send("lo" + toHTTP11)
		if m := c.read(false); m.body != "ok hello" {
			t.Error(m)
		}
		c.read(false)
	}
}

// What clients may take their time for, as settings, on real sockets.
func TestClientTimeoutSettings(t *testing.T) {
	const body = "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: "
	for _, row := range []struct {
		name   string
		set    func(*Limits)
		send   []string // each after an answer, but the first
		status int      // 0: closed without a word
	}{
		{"first byte", func(l *Limits) { l.FirstByteTimeout = time.Second }, nil, 0},
		{"head", func(l *Limits) { l.HeadTimeout = 100 * time.Millisecond }, []string{"GET /echo HTTP/1.1\r\nHost"}, 408},
		{"head behind a request", func(l *Limits) { l.HeadTimeout = 100 * time.Millisecond }, []string{toHTTP11, "GET"}, 408},
		{"idle", func(l *Limits) { l.IdleTimeout = time.Second }, []string{toHTTP11, ""}, 0},
		{"small body", func(l *Limits) { l.BodyTimeout = 100 * time.Millisecond }, []string{body + "5\r\n\r\nhell"}, 408},
		{"large body", func(l *Limits) { l.BodyTimeout = 100 * time.Millisecond }, []string{body + "500000\r\n\r\n" + filler(400_000)}, 408},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, func(cfg *Config) { row.set(&cfg.Limits) }, nil)
			g.register(t, "echo", "1", naming(t, "ok").url())
			c := g.dial(t)
			c.SetDeadline(time.Now().Add(10 * time.Second)) // the limit, a second of the wheel's, ten times that
			for i, bytes := range row.send {
				if i > 0 {
					c.read(false)
				}
				c.send(bytes)
			}
			if row.status != 0 {
				if m := c.read(false); m.status() != row.status || m.field("Connection") != "close" {
					t.Error(m.head)
				}
			}
			c.closed()
			g.idle(t)
		})
	}
}

// Empty lines before a request do not begin the time for it anew, nor need they a goroutine.
func TestEmptyLinesKeepNothing(t *testing.T) {
	eachLoops(t, func(t *testing.T, loops int) {
		g := startLoops(t, loops, func(cfg *Config) { cfg.Limits.FirstByteTimeout = time.Second }, nil)
		c := g.dial(t)
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			if n := g.handedOver(); n > 0 {
				t.Fatalf("%d connections have a goroutine", n)
			}
			if _, err := io.WriteString(c.Conn, "\r\n"); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond) // the client's pace
		}
		t.Error("it is there yet")
	})
}

// A client that takes no byte is closed, and so is the backend's connection.
func TestWriteTimeout(t *testing.T) {
	const size = 8 << 20 // more than the kernel takes for the client
	for _, row := range []struct {
		kind, response string
		requests       int
	}{
		{"length", fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", size, filler(size)), 1},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(filler(size), 50_000), 1},
		{"read whole", "HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + filler(60_000), size / 60_000},
	} {
		t.Run(row.kind, func(t *testing.T) {
			t.Parallel()
			left := make(chan struct{})
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				for {
					if _, err := o.next(r); err != nil {
						break
					}
					io.WriteString(c, row.response)
				}
				close(left)
			})
			g := startGateway(t, func(cfg *Config) {
				cfg.Limits.WriteTimeout, cfg.UpstreamIdle = 200*time.Millisecond, time.Second
				logRequests(cfg)
			}, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.Conn.(*net.TCPConn).SetReadBuffer(4 << 10)
			c.send(strings.Repeat(toHTTP11, row.requests))
			select {
			case <-left:
			case <-time.After(10 * time.Second):
				t.Fatal("the backend's connection is still open")
			}
			if _, err := io.Copy(io.Discard, c.r); !errors.Is(err, syscall.ECONNRESET) { // else the rest would wait in the socket for minutes
				t.Errorf("the client reads %v", err)
			}
			c.Close()
			g.idle(t)
			if g.logged("status=499") != 1 {
				t.Error(g.logs)
			}
			if s := g.DescribeInstance("echo", "1"); s.Failure != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// One that takes some, however slowly, is not; on a clock that does not wait: its connection is a pipe.
func TestClientTakesSome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := startUpon(t, Limits{})
		defer p.Close()
		defer c.Close()
		c.send("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
		var got []byte
		for !bytes.HasSuffix(got, headEnd) {
			time.Sleep(writeTimeout / 2)
			b := make([]byte, 1)
			if _, err := c.Read(b); err != nil {
				t.Fatalf("%q, %v", got, err)
			}
			got = append(got, b...)
		}
	})
}

// startUpon serves one client, over a pipe.
func startUpon(t *testing.T, limits Limits) (*client, *Proxy) {
	reg := registry.New(registry.Config{})
	p, err := New(Config{Registry: reg, Limits: limits, API: registry.NewHandler(reg, nil)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	p.accepted(far)
	return &client{t: t, Conn: near, r: bufio.NewReader(near)}, p
}

// The rates, on a clock that does not wait: connections are pipes.
func TestMinimumRates(t *testing.T) {
	drip := func(w io.Writer, n int, every time.Duration) {
		for range n {
			time.Sleep(every)
			if _, err := w.Write([]byte("x")); err != nil {
				return
			}
		}
	}
	for _, row := range []struct {
		name   string
		rate   int64
		bytes  int // which the client sends, 2 a second, of 60
		status int
	}{{"none", -1, 60, 415}, {"kept", 1, 60, 415}, {"not kept", 4, 60, 408}, {"silent", 4, 1, 408}} {
		t.Run("upload, "+row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, p := startUpon(t, Limits{MinUpload: row.rate})
				defer p.Close()
				c.send("POST /register HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60\r\n\r\n")
				dripped := make(chan struct{})
				go func() { defer close(dripped); drip(c, row.bytes, time.Second/2) }()
				defer func() { c.Close(); <-dripped }()
				began := time.Now()
				if m := c.read(false); m.status() != row.status {
					t.Error(m.head)
				}
				if took := time.Since(began); row.status == 408 && took > paceWindow+2*time.Second || row.status != 408 && took < 29*time.Second {
					t.Errorf("after %v", took)
				}
			})
		})
	}
	for _, row := range []struct {
		name string
		rate int64 // the client takes 2 bytes a second
		cut  bool
	}{{"none", -1, false}, {"kept", 1, false}, {"not kept", 4, true}} {
		t.Run("download, "+row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, p := startUpon(t, Limits{MinDownload: row.rate})
				defer p.Close()
				defer c.Close()
				c.send("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
				began, n := time.Now(), 0
				for b := make([]byte, 1); ; n++ {
					if time.Sleep(time.Second / 2); n == 60 {
						break
					}
					if _, err := c.Read(b); err != nil {
						break
					}
				}
				if took := time.Since(began); (n < 60) != row.cut || row.cut && took > 2*paceWindow+2*time.Second {
					t.Errorf("%d bytes in %v", n, took)
				}
			})
		})
	}
}

// A body of which a part was read already is not passed over as if all of it were still here: what follows would begin in the
// midst of the next request.
func TestSlowBodyThenRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New(registry.Config{})
		if err := reg.Register("echo", registry.Instance{ID: "1", Addr: "http://127.0.0.1:1"}); err != nil {
			t.Fatal(err)
		}
		p, err := New(Config{Registry: reg, Limits: Limits{MinUpload: 1000}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		near, far := net.Pipe()
		p.accepted(far)
		c := &client{t: t, Conn: near, r: bufio.NewReader(near)}
		defer c.Close()
		c.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n0123456789")
		time.Sleep(paceWindow + time.Second/2) // a deadline has up to a second of slack
		c.send("0123456789" + "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
		if m := c.read(false); m.status() != 408 || m.field("Connection") != "close" {
			t.Error(m.head)
		}
		c.closed()
	})
}

func TestTotalTimeout(t *testing.T) {
	for _, row := range []struct {
		name    string
		request string
		origin  func(c net.Conn)
		status  int // 0: it is cut; -1: nobody sees that
	}{
		{"no answer", toHTTP11, func(net.Conn) {}, 504},
		{"half a head", toHTTP11, func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nX") }, 504},
		{"stream that goes on", toHTTP11, func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			for {
				if _, err := io.WriteString(c, "1\r\nx\r\n"); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}, 0},
		{"large body that nobody reads", toHTTP11, func(c net.Conn) {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", 64<<20)
			io.WriteString(c, filler(64<<20))
		}, -1},
		{"upload that stops", "PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n" + filler(100_000), func(net.Conn) {}, 504},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				for {
					if line, err := r.ReadString('\n'); err != nil || line == "\r\n" {
						break
					}
				}
				row.origin(c)
				io.Copy(io.Discard, r)
			})
			g := startGateway(t, func(cfg *Config) { cfg.Limits.TotalTimeout = 300 * time.Millisecond }, nil)
			g.register(t, "echo", "1", o.url())
			g.register(t, "echo", "2", o.url())
			c := g.dial(t)
			c.SetDeadline(time.Now().Add(10 * time.Second))
			began := time.Now()
			c.send(row.request)
			switch {
			case row.status > 0:
				if m := c.read(false); m.status() != row.status || m.field("Proxy-Status") != "kerberos; error=http_response_timeout" {
					t.Error(m.head)
				}
			case row.status == 0:
				if m, err := readMessage(c.r, false); err == nil || !strings.HasPrefix(m.head, "HTTP/1.1 200") {
					t.Errorf("%s%v", m.head, err)
				}
			default:
				c.headOf()
				eventually(t, "it is over", func() bool {
					return g.DescribeInstance("echo", "1").InFlight+g.DescribeInstance("echo", "2").InFlight == 0
				})
			}
			c.Close()
			g.idle(t)
			if took := time.Since(began); took < 250*time.Millisecond || took > 3*time.Second {
				t.Errorf("over after %v", took)
			}
			for _, id := range []string{"1", "2"} {
				if s := g.DescribeInstance("echo", id); s.Failure != 0 || s.InFlight != 0 {
					t.Errorf("outcomes: %+v", s)
				}
			}
		})
	}
}

func TestBodyLimit(t *testing.T) {
	for _, limit := range []int64{1000, 200_000} {
		var bodies atomic.Int32
		o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
			for {
				if _, err := o.next(r); err != nil {
					return
				}
				bodies.Add(1)
				io.WriteString(c, "HTTP/1.1 204 x\r\n\r\n")
			}
		})
		g := startGateway(t, func(cfg *Config) { cfg.Limits.Body = limit }, nil)
		g.register(t, "echo", "1", o.url())
		for _, row := range []struct {
			name, head string
			body       string
			status     int
			seen       bool // by the backend
		}{
			{"at the limit", fmt.Sprintf("Content-Length: %d", limit), filler(int(limit)), 204, true},
			{"past it", fmt.Sprintf("Content-Length: %d", limit+1), filler(int(limit + 1)), 413, false},
			{"past it, unsent", fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue", limit+1), "", 413, false},
			{"chunks at the limit", "Transfer-Encoding: chunked", inChunks(filler(int(limit)), 700), 204, true},
			{"chunks past it", "Transfer-Encoding: chunked", inChunks(filler(int(limit+1)), 700), 413, false},
			{"chunks without an end", "Transfer-Encoding: chunked", strings.TrimSuffix(inChunks(filler(int(limit+1)), 700), "0\r\n\r\n"), 413, false},
		} {
			t.Run(fmt.Sprint(limit, " ", row.name), func(t *testing.T) {
				bodies.Store(0)
				c := g.dial(t)
				c.send("PUT /echo HTTP/1.1\r\nHost: a\r\n" + row.head + "\r\n\r\n" + row.body)
				m := c.read(false)
				if m.status() != row.status || c.interim != "" {
					t.Errorf("%s%s", c.interim, m.head)
				}
				if row.status == 413 {
					if m.field("Proxy-Status") != "kerberos; error=http_request_error" {
						t.Error(m.head)
					}
					if here := row.name == "past it" && limit < firstBuffer; !here { // its end is known: the connection may go on
						c.closed()
					}
				}
				c.Close()
				g.idle(t)
				if seen := bodies.Load() == 1; seen != row.seen {
					t.Errorf("the backend has seen a whole request: %v", seen)
				}
			})
		}
		if s := g.DescribeInstance("echo", "1"); s.Failure != 0 {
			t.Errorf("outcomes: %+v", s)
		}
	}
}
