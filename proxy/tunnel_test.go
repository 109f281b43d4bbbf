package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"kerberos/proxy/loop"
)

const (
	handshake = "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	switched = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)

// far is a backend's end of a tunnel.
type far struct {
	net.Conn
	tcp  *net.TCPConn
	r    *bufio.Reader
	head *message // the request
}

// switcher is an instance that answers each request with the same bytes, and then leaves the connection to the test.
type switcher struct {
	net.Listener
	url  string
	ends chan *far
}

// startSwitcher speaks TLS if cfg is not nil.
func startSwitcher(t testing.TB, cfg *tls.Config, answer string) *switcher {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &switcher{Listener: ln, url: "http://" + ln.Addr().String(), ends: make(chan *far, 5000)}
	if cfg != nil {
		s.url = "https://" + ln.Addr().String()
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	all.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, nc)
			mu.Unlock()
			all.Go(func() {
				f := &far{Conn: nc, tcp: nc.(*net.TCPConn)}
				if cfg != nil {
					f.Conn = tls.Server(nc, cfg)
				}
				_ = f.SetDeadline(time.Now().Add(60 * time.Second))
				f.r = bufio.NewReader(f.Conn)
				if f.head, err = readMessage(f.r, false); err != nil {
					nc.Close()
					return
				}
				if _, err := io.WriteString(f.Conn, answer); err == nil {
					s.ends <- f
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return s
}

// next returns the end of the tunnel that was opened last.
func (s *switcher) next(t testing.TB) *far {
	t.Helper()
	select {
	case f := <-s.ends:
		return f
	case <-time.After(10 * time.Second):
		t.Fatal("no request comes to the backend")
		return nil
	}
}

// tunnels is a gateway with a service "ws" whose one instance agrees to every upgrade.
type tunnels struct {
	*gateway
	s       *switcher
	opening sync.Mutex // held for one at a time, whose two ends belong together
}

// open opens a tunnel.
func (tt *tunnels) open(t testing.TB) (*client, *far) {
	t.Helper()
	c := tt.dial(t)
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	c.send(handshake)
	if m := c.headOf(); m.status() != 101 {
		t.Fatalf("got %q", m.head)
	}
	return c, tt.s.next(t)
}

// ended waits until nothing is left of the tunnels.
func (tt *tunnels) ended(t testing.TB) {
	t.Helper()
	tt.idle(t)
	eventually(t, "no tunnel is counted", func() bool { return tt.DescribeInstance("ws", "a").Tunnels == 0 })
}

// eachTunnel runs a test with tunnels on a loop, and with those that goroutines serve.
func eachTunnel(t *testing.T, change func(*Config), f func(t *testing.T, tt *tunnels)) {
	ca := newAuthority(t)
	cfg := &tls.Config{Certificates: []tls.Certificate{ca.issue(t, time.Now().Add(time.Hour), "127.0.0.1")}}
	for _, kind := range []string{"on a loop", "in goroutines"} {
		t.Run(kind, func(t *testing.T) {
			g := startGateway(t, func(c *Config) {
				withAuthority(ca)(c)
				if change != nil {
					change(c)
				}
			}, nil)
			tt := &tunnels{gateway: g}
			if kind == "on a loop" {
				tt.s = startSwitcher(t, nil, switched)
			} else {
				tt.s = startSwitcher(t, cfg, switched)
			}
			g.register(t, "ws", "a", tt.s.url)
			f(t, tt)
		})
	}
}

// closeWrite ends a stream: of TLS too.
func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// resetNow closes with a reset.
func resetNow(tcp net.Conn) {
	_ = tcp.(*net.TCPConn).SetLinger(0)
	tcp.Close()
}

func wantBytes(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got[:n], err, want)
	}
}

func wantEnd(t testing.TB, r io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Fatalf("want the end of the stream, got %q, %v", rest, err)
	}
}

// wantBroken: what was reset on one side is not an orderly end on the other.
func (tt *tunnels) wantBroken(t testing.TB, r io.Reader) {
	t.Helper()
	_, err := io.Copy(io.Discard, r)
	if errors.Is(err, os.ErrDeadlineExceeded) || err == nil && loop.Supported {
		t.Fatalf("want a reset, got %v", err)
	}
}

// What both sides see of a handshake, and what the books say of the tunnel.
func TestUpgrade(t *testing.T) {
	eachTunnel(t, logRequests, func(t *testing.T, tt *tunnels) {
		c := tt.dial(t)
		c.send(strings.Replace(handshake, "Connection:", "Upgrade: h2c, , foo\r\nX: y\r\nConnection: x, keep-alive\r\nConnection:", 1))
		m := c.headOf()
		if m.status() != 101 || m.field("Connection") != "Upgrade" || m.field("Upgrade") != "websocket" ||
			m.field("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" || m.field("Date") != "" {
			t.Errorf("the client got %q", m.head)
		}
		f := tt.s.next(t)
		if h := f.head; h.field("Connection") != "Upgrade" || h.field("Upgrade") != "WebSocket" || h.field("X") != "" ||
			h.field("Sec-WebSocket-Key") != "dGhlIHNhbXBsZSBub25jZQ==" || h.field("X-Forwarded-For") != "127.0.0.1" {
			t.Errorf("the backend got %q", h.head)
		}
		s := tt.DescribeInstance("ws", "a")
		if s.Success != 1 || s.Failure+s.Ignored != 0 || s.InFlight != 0 || s.Tunnels != 1 {
			t.Errorf("while the tunnel is open: %+v", s)
		}
		c.send("ping")
		wantBytes(t, f.r, "ping")
		io.WriteString(f, "pong!")
		wantBytes(t, c.r, "pong!")

		other := tt.dial(t) // its request gets a connection of its own
		other.send("GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
		plain := tt.s.next(t)
		if plain.tcp.RemoteAddr().String() == f.tcp.RemoteAddr().String() || plain.head.field("Upgrade") != "" {
			t.Errorf("the tunnel's connection was used again, for %q", plain.head.head)
		}
		other.Close()
		plain.Close()

		if tt.logged("status=101") != 0 {
			t.Error("the request is in the log before its tunnel has ended")
		}
		closeWrite(t, c.Conn)
		wantEnd(t, f.r)
		closeWrite(t, f.Conn)
		wantEnd(t, c.r)
		tt.ended(t)
		eventually(t, "its line in the log", func() bool {
			return tt.logged("msg=request", "status=101", "attempts=1", "took=", "instance=a", "up=4", "down=5") == 1
		})
	})
}

// A library at both ends: messages of all sizes, fragments, compression, pings and the closing handshake.
func TestWebSocket(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{
			Subprotocols: []string{"echo"}, CompressionMode: websocket.CompressionContextTakeover, InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer ws.CloseNow()
		ws.SetReadLimit(-1)
		for {
			kind, data, err := ws.Read(r.Context())
			if err != nil {
				return
			}
			if string(data) == "bye" {
				ws.Close(4321, "as you wish")
				return
			}
			if ws.Write(r.Context(), kind, data) != nil {
				return
			}
		}
	}
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprint("TLS ", secure), func(t *testing.T) {
			server := httptest.NewUnstartedServer(http.HandlerFunc(echo))
			if secure {
				server.StartTLS()
			} else {
				server.Start()
			}
			defer server.Close()
			g := startGateway(t, func(cfg *Config) { cfg.UpstreamInsecure = true }, nil)
			g.register(t, "ws", "a", server.URL)
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					ws, response, err := websocket.Dial(ctx, "ws://"+g.addr+"/ws/chat?x=1", &websocket.DialOptions{
						Subprotocols: []string{"other", "echo"}, CompressionMode: websocket.CompressionContextTakeover})
					if err != nil {
						t.Error(err)
						return
					}
					defer ws.CloseNow()
					ws.SetReadLimit(-1)
					if ws.Subprotocol() != "echo" || response.StatusCode != 101 {
						t.Errorf("subprotocol %q, status %d", ws.Subprotocol(), response.StatusCode)
					}
					for _, size := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
						sent := make([]byte, size)
						for i := range sent {
							sent[i] = byte(rand.IntN(1 + size%251))
						}
						if err := ws.Write(ctx, websocket.MessageBinary, sent); err != nil {
							t.Error(err)
							return
						}
						if _, got, err := ws.Read(ctx); err != nil || !bytes.Equal(got, sent) {
							t.Errorf("%d bytes came back as %d, or others, %v", size, len(got), err)
							return
						}
					}
					reading := ws.CloseRead(ctx)
					for range 3 {
						if err := ws.Ping(ctx); err != nil {
							t.Error(err)
						}
					}
					_ = reading
					_ = ws.Close(websocket.StatusNormalClosure, "")
				})
			}
			clients.Wait()
			ws, _, err := websocket.Dial(ctx, "ws://"+g.addr+"/ws", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer ws.CloseNow()
			if err := ws.Write(ctx, websocket.MessageText, []byte("bye")); err != nil {
				t.Fatal(err)
			}
			if _, _, err := ws.Read(ctx); websocket.CloseStatus(err) != 4321 || !strings.Contains(err.Error(), "as you wish") {
				t.Errorf("closed with %v", err)
			}
			ws.CloseNow()
			g.idle(t)
			if s := g.DescribeInstance("ws", "a"); s.Success != 5 || s.Tunnels != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// What comes along with the heads, on either side, belongs to the tunnel.
func TestTunnelEarlyData(t *testing.T) {
	for _, size := range []int{1, 3000, 100_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			g := startGateway(t, nil, nil)
			down, up := filler(size), filler(size+1)
			s := startSwitcher(t, nil, switched+down)
			g.register(t, "ws", "a", s.url)
			c := g.dial(t)
			c.send(handshake + up)
			if m := c.headOf(); m.status() != 101 {
				t.Fatalf("got %q", m.head)
			}
			wantBytes(t, c.r, down)
			f := s.next(t)
			wantBytes(t, f.r, up)
			f.Close()
			wantEnd(t, c.r)
		})
	}
}

// One side ends its stream: the other learns of it behind the last byte, and can go on for as long as it likes.
func TestTunnelHalfClose(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		text := filler(1 << 20)
		for range 3 {
			c, f := tt.open(t)
			go func() {
				io.WriteString(c.Conn, text)
				c.Conn.(*net.TCPConn).CloseWrite()
			}()
			wantBytes(t, f.r, text)
			wantEnd(t, f.r)
			for range 3 {
				io.WriteString(f, "still here")
				wantBytes(t, c.r, "still here")
			}
			f.Close()
			wantEnd(t, c.r)

			c, f = tt.open(t)
			go func() {
				io.WriteString(f, text)
				closeWrite(t, f.Conn)
			}()
			wantBytes(t, c.r, text)
			wantEnd(t, c.r)
			for range 3 {
				c.send("still here")
				wantBytes(t, f.r, "still here")
			}
			c.Close()
			wantEnd(t, f.r)
		}
		tt.ended(t)
	})
}

// A reset of one side is one for the other, also when that has ended its stream, does not read, or sends.
func TestTunnelReset(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		for _, row := range []struct {
			name   string
			before func(c *client, f *far)
		}{
			{"idle", func(*client, *far) {}},
			{"behind an end of the client", func(c *client, f *far) {
				closeWrite(t, c.Conn)
				wantEnd(t, f.r)
			}},
			{"with bytes that nobody read", func(c *client, f *far) {
				c.send("unread")
				io.WriteString(f, "unread")
			}},
		} {
			c, f := tt.open(t)
			row.before(c, f)
			resetNow(c.Conn)
			if row.name == "behind an end of the client" { // the backend may find out when it writes
				eventually(t, "the backend cannot write", func() bool { _, err := f.Write([]byte("x")); return err != nil })
			} else {
				tt.wantBroken(t, f.r)
			}
			c, f = tt.open(t)
			row.before(c, f)
			resetNow(f.tcp)
			tt.wantBroken(t, c.r)
			tt.ended(t)
		}
		for range 100 { // the error may be told to the gateway's write
			c, f := tt.open(t)
			go resetNow(c.Conn)
			if _, err := f.Write([]byte("x")); err == nil { // or to this one
				tt.wantBroken(t, f.r)
			}
			c, f = tt.open(t)
			go resetNow(f.tcp)
			if _, err := c.Write([]byte("x")); err == nil {
				tt.wantBroken(t, c.r)
			}
		}
		tt.ended(t)
	})
}

// What a side has sent before it was closed by a reset (it had not read all) arrives.
func TestTunnelLastWords(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		for i := range 100 {
			c, f := tt.open(t)
			from, near, to := f.Conn, f.tcp, io.Reader(c.r)
			if i%2 > 0 {
				from, near, to = c.Conn, c.Conn.(*net.TCPConn), f.r
				io.WriteString(f.Conn, "not read by the client")
			} else {
				c.send("not read by the backend")
			}
			eventually(t, "it is in the socket", func() bool { return hasBytes(t, near) })
			io.WriteString(from, "last words")
			near.Close() // with bytes unread that is a reset
			wantBytes(t, to, "last words")
			tt.wantBroken(t, to)
			c.Close()
			f.tcp.Close()
		}
		tt.ended(t)
	})
}

// The same while the other side is still writing: its next write finds the reset before the words were passed on.
func TestTunnelLastWordsBesideMore(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		for range 50 {
			c, f := tt.open(t)
			stopped := make(chan struct{})
			go func() {
				defer close(stopped)
				for {
					if _, err := c.Conn.Write([]byte("more and more")); err != nil {
						return
					}
					time.Sleep(20 * time.Microsecond) // the client's pace
				}
			}()
			eventually(t, "it is in the socket", func() bool { return hasBytes(t, f.tcp) })
			io.WriteString(f.Conn, "last words")
			f.tcp.Close()
			wantBytes(t, c.r, "last words")
			c.Close()
			<-stopped
		}
		tt.ended(t)
	})
}

// hasBytes tells whether a socket has bytes that nobody has read.
func hasBytes(t testing.TB, c *net.TCPConn) (has bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		n, _, _ := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK) // does not wait: Go's sockets are non-blocking
		has = n > 0
	})
	if err != nil {
		t.Fatal(err)
	}
	return has
}

// A side that does not read stops the other one, which loses nothing.
func TestTunnelBackPressure(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		const most = 64 << 20 // what sockets and the gateway could ever hold is far less
		for _, up := range []bool{true, false} {
			c, f := tt.open(t)
			var from net.Conn = c.Conn
			var to io.Reader = f.r
			if !up {
				from, to = f.Conn, c.r
			}
			sum := sha256.New()
			piece := []byte(filler(64 << 10))
			sent, last := 0, time.Now()
			for time.Since(last) < 300*time.Millisecond && sent < most { // nothing was taken for so long
				from.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
				n, err := from.Write(piece)
				sum.Write(piece[:n])
				if sent += n; n > 0 {
					last = time.Now()
				}
				if _, secure := from.(*tls.Conn); secure && err != nil {
					break // TLS cannot go on behind a write that was cut
				}
			}
			if sent >= most {
				t.Fatalf("%d bytes were taken and nobody read", sent)
			}
			if s := tt.DescribeInstance("ws", "a"); s.Tunnels != 1 {
				t.Fatalf("%d tunnels", s.Tunnels)
			}
			if _, secure := from.(*tls.Conn); !secure {
				from.SetWriteDeadline(time.Time{})
				go func() { from.(*net.TCPConn).CloseWrite() }()
				got := sha256.New()
				if n, err := io.Copy(got, to); err != nil || int(n) != sent || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
					t.Errorf("%d bytes of %d came, or others, %v", n, sent, err)
				}
			}
			c.Close()
			f.tcp.Close()
			tt.ended(t)
		}
	})
}

// 64 MiB each way at once, in writes of all sizes, to readers that pause.
func TestTunnelBothWays(t *testing.T) {
	total := 64 << 20
	if raceDetector {
		total = 8 << 20
	}
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		c, f := tt.open(t)
		data := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{1}).Read(data)
		var all sync.WaitGroup
		send := func(to net.Conn, seed uint64, sum *[]byte) {
			defer closeWrite(t, to)
			r := rand.New(rand.NewPCG(seed, 1))
			h := sha256.New()
			for left := total; left > 0; {
				n := min(1+r.IntN(1<<uint(1+r.IntN(20))), left)
				if _, err := io.MultiWriter(to, h).Write(data[:n]); err != nil {
					t.Error(err)
					return
				}
				left -= n
			}
			*sum = h.Sum(nil)
		}
		receive := func(from io.Reader, seed uint64, sum *[]byte) {
			r := rand.New(rand.NewPCG(seed, 2))
			h := sha256.New()
			for {
				if _, err := io.CopyN(h, from, int64(1+r.IntN(1<<20))); err == io.EOF {
					break
				} else if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(r.IntN(1000)) * time.Microsecond)
			}
			*sum = h.Sum(nil)
		}
		var upSent, upGot, downSent, downGot []byte
		all.Go(func() { send(c.Conn, 1, &upSent) })
		all.Go(func() { send(f.Conn, 2, &downSent) })
		all.Go(func() { receive(f.r, 3, &upGot) })
		all.Go(func() { receive(c.r, 4, &downGot) })
		all.Wait()
		if !bytes.Equal(upSent, upGot) || !bytes.Equal(downSent, downGot) {
			t.Error("other bytes came than were sent")
		}
		tt.ended(t)
	})
}

// A tunnel in which nothing moves is closed on both sides, and not before.
func TestTunnelIdle(t *testing.T) {
	const idle = 500 * time.Millisecond
	eachTunnel(t, func(cfg *Config) { cfg.Limits.TunnelIdle = idle }, func(t *testing.T, tt *tunnels) {
		c, f := tt.open(t)
		silent, end := tt.open(t)
		for began := time.Now(); time.Since(began) < 4*idle; time.Sleep(idle / 5) { // only one way, then only the other
			if time.Since(began) < 2*idle {
				c.send("x")
				wantBytes(t, f.r, "x")
			} else {
				io.WriteString(f, "y")
				wantBytes(t, c.r, "y")
			}
		}
		last := time.Now()
		wantEnd(t, silent.r)
		wantEnd(t, end.r)
		wantEnd(t, c.r)
		wantEnd(t, f.r)
		if after := time.Since(last); after < idle*3/4 || after > 10*idle {
			t.Errorf("closed after %v", after)
		}
		tt.ended(t)
	})
}

// With the defaults a WebSocket may be silent for ten minutes; it may not for more than an hour.
func TestTunnelIdleByDefault(t *testing.T) {
	for _, row := range []struct {
		idle, open, closed time.Duration
	}{
		{0, 10 * time.Minute, 62 * time.Minute},
		{0, 59 * time.Minute, 62 * time.Minute},
		{-1, 1000 * time.Hour, 0},
	} {
		g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.TunnelIdle = row.idle }, nil)
		tt := &tunnels{gateway: g, s: startSwitcher(t, nil, switched)}
		g.register(t, "ws", "a", tt.s.url)
		c, f := tt.open(t)
		pass := func(d time.Duration) {
			g.onLoops(func(w *worker) {
				for at := w.loop.Now(); !at.After(w.loop.Now().Add(d)); at = at.Add(time.Minute) {
					w.tick(at)
				}
			})
		}
		pass(row.open)
		c.send("here")
		wantBytes(t, f.r, "here")
		if row.closed != 0 {
			pass(row.closed)
			wantEnd(t, c.r)
			wantEnd(t, f.r)
		} else {
			c.Close()
			f.Close()
		}
		tt.ended(t)
	}
}

// What is no agreement to the upgrade that was asked for is a failure.
func TestRefusedSwitches(t *testing.T) {
	for name, answer := range map[string]string{
		"another protocol":       "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"no protocol":            "HTTP/1.1 101 x\r\nConnection: Upgrade\r\n\r\n",
		"an empty protocol":      "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade:\r\n\r\n",
		"two protocols":          "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket, websocket\r\n\r\n",
		"two fields":             "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: websocket\r\n\r\n",
		"no Connection":          "HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n",
		"another Connection":     "HTTP/1.1 101 x\r\nConnection: keep-alive\r\nUpgrade: websocket\r\n\r\n",
		"asked for, not allowed": "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, patient(0), nil)
			s := startSwitcher(t, nil, answer)
			g.register(t, "ws", "a", s.url)
			c := g.dial(t)
			c.send(strings.Replace(handshake, "WebSocket", "foo, WebSocket", 1))
			c.read(false).refused(t, errSwitch)
			wantEnd(t, s.next(t).r) // the backend's connection is closed
			if s := g.DescribeInstance("ws", "a"); s.Failure != 1 || s.Tunnels != 0 {
				t.Errorf("%+v", s)
			}
			c.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n") // that of the client is not
			c.read(false).want(t, 404)
		})
	}
	unasked := startGateway(t, patient(0), nil)
	unasked.register(t, "ws", "a", startSwitcher(t, nil, switched).url)
	unasked.do(t, "GET /ws HTTP/1.1\r\nHost: x\r\n\r\n").refused(t, errSwitch)
}

// An instance that does not agree answers like any other; the client's connection goes on, that to the backend does not.
func TestUpgradeDeclined(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
		"HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nContent-Length: 2\r\n\r\nno",
		"HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("n", 100_000),
	} {
		t.Run(answer[9:12], func(t *testing.T) {
			g := startLoops(t, 1, nil, nil)
			s := startSwitcher(t, nil, answer)
			g.register(t, "ws", "a", s.url)
			c := g.dial(t)
			for range 2 {
				c.send(handshake)
				m := c.headOf()
				for m.status() == 103 {
					m = c.headOf()
				}
				if m.field("Connection") != "" || m.field("Upgrade") != "" {
					t.Errorf("got %q", m.head)
				}
				switch {
				case m.field("Content-Length") == "2":
					wantBytes(t, c.r, "no")
				case m.status() == 404:
					wantBytes(t, c.r, strings.Repeat("n", 100_000))
				case m.status() == 200:
					wantBytes(t, c.r, "2\r\nno\r\n0\r\n\r\n")
				}
				wantEnd(t, s.next(t).r)
			}
			if s := g.DescribeInstance("ws", "a"); s.Success != 2 || s.Tunnels != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// Before the 101 a handshake is tried elsewhere like any request.
func TestUpgradeRetried(t *testing.T) {
	for name, first := range map[string]func(t *testing.T) string{
		"refuses":          func(t *testing.T) string { return refusedAddr(t) },
		"breaks off":       func(t *testing.T) string { return startActor(t, breaksOff("")).url() },
		"resets":           func(t *testing.T) string { return startActor(t, resets).url() },
		"another protocol": func(t *testing.T) string { return startSwitcher(t, nil, "HTTP/1.1 101 x\r\nUpgrade: x\r\n\r\n").url },
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, patient(2), nil)
			tt := &tunnels{gateway: g, s: startSwitcher(t, nil, switched)}
			g.register(t, "ws", "a", first(t))
			g.register(t, "ws", "b", tt.s.url)
			for range 4 {
				c, f := tt.open(t)
				c.send("x")
				wantBytes(t, f.r, "x")
				c.Close()
				wantEnd(t, f.r)
			}
			if a, b := g.DescribeInstance("ws", "a"), g.DescribeInstance("ws", "b"); a.Failure == 0 || b.Success != 4 {
				t.Errorf("%+v, %+v", a, b)
			}
		})
	}
}

// Which protocols a client may ask for.
func TestAllowedUpgrades(t *testing.T) {
	const (
		ignored = -1
		opened  = 101
	)
	for _, row := range []struct {
		allowed []string
		request string // behind the request line
		want    int
		sent    string // Upgrade at the backend
	}{
		{nil, "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", opened, "websocket"},
		{nil, "Connection: upgrade\r\nUpgrade: foo, WEBSOCKET\r\n\r\n", opened, "WEBSOCKET"},
		{nil, "Connection: upgrade\r\nUpgrade: h2c\r\n\r\n", ignored, ""},
		{nil, "Connection: upgrade\r\n\r\n", ignored, ""},
		{nil, "Upgrade: websocket\r\n\r\n", ignored, ""},
		{nil, "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nab", ignored, ""},
		{nil, "Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ignored, ""},
		{nil, "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n", opened, "websocket"},
		{nil, "Connection: upgrade\r\nUpgrade: websocket/13\r\n\r\n", ignored, ""},
		{[]string{}, "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", 501, ""},
		{[]string{}, "Connection: upgrade\r\nUpgrade: foo\r\n\r\n", ignored, ""},
		{[]string{"foo/2", "bar"}, "Connection: upgrade\r\nUpgrade: Foo/2\r\nUpgrade: baz,bar\r\n\r\n", opened, "Foo/2, bar"},
		{[]string{"foo/2", "bar"}, "Connection: upgrade\r\nUpgrade: foo/1, foo\r\n\r\n", ignored, ""},
		{[]string{"foo"}, "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", 501, ""},
		{[]string{"foo"}, "Connection: upgrade\r\nUpgrade: websocket, foo\r\n\r\n", opened, "foo"},
	} {
		t.Run(fmt.Sprint(row.allowed, strings.ReplaceAll(row.request, "\r\n", "|")), func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { cfg.Upgrades = row.allowed }, nil)
			protocol, _, _ := strings.Cut(row.sent, ",")
			answer := "HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: " + protocol + "\r\nContent-Length: 0\r\n\r\n"
			if row.want != opened {
				answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
			}
			s := startSwitcher(t, nil, answer)
			g.register(t, "echo", "a", s.url)
			c := g.dial(t)
			c.send("GET /echo HTTP/1.1\r\nHost: x\r\n" + row.request)
			m := c.headOf()
			if row.want == 501 {
				if m.status() != 501 {
					t.Errorf("got %q", m.head)
				}
				g.do(t, "GET /echo/next HTTP/1.1\r\nHost: x\r\n\r\n").want(t, 200)
				if first := s.next(t).head.head; !strings.HasPrefix(first, "GET /echo/next ") {
					t.Errorf("the backend got %q", first)
				}
				return
			}
			f := s.next(t)
			if f.head.field("Upgrade") != row.sent || (f.head.field("Connection") != "") != (row.sent != "") {
				t.Errorf("the backend got %q", f.head.head)
			}
			if row.want == opened && (m.status() != 101 || m.field("Upgrade") != protocol || m.field("Content-Length") != "") ||
				row.want == ignored && m.status() != 200 {
				t.Errorf("the client got %q", m.head)
			}
		})
	}
	old := startGateway(t, nil, nil)
	old.register(t, "echo", "a", startActor(t, says("old")).url())
	old.do(t, "GET /echo HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").want(t, 200)
	for _, bad := range []string{"", "web socket", "a,b", "foo/", "/2", "a/b/c"} {
		if _, err := New(Config{Registry: old.reg, Upgrades: []string{bad}}, nil); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", bad)) {
			t.Errorf("the protocol %q: %v", bad, err)
		}
	}
}

// At a shutdown tunnels have the drain time to end, and are closed behind it, on both sides.
func TestTunnelShutdown(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		c, f := tt.open(t)
		other, end := tt.open(t)
		done := make(chan int)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- tt.Shutdown(ctx) }()
		eventually(t, "Shutdown has begun", tt.closing.Load)
		for range 3 {
			c.send("still here")
			wantBytes(t, f.r, "still here")
		}
		c.Close()
		wantEnd(t, f.r)
		f.Close()
		select {
		case <-done:
			t.Fatal("Shutdown has not waited")
		case <-time.After(50 * time.Millisecond):
		}
		cancel()
		if cut := <-done; cut != 1 {
			t.Errorf("%d cut", cut)
		}
		wantEnd(t, end.r)
		wantEnd(t, other.r)
		tt.Close() // waits for it
		if n := tt.DescribeInstance("ws", "a").Tunnels; n != 0 {
			t.Errorf("%d tunnels are left", n)
		}
	})
}

// A tunnel outlives the registration of its instance, and ends as any other.
func TestTunnelOfAnInstanceThatLeft(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		c, f := tt.open(t)
		tt.unregister(t, "ws", "a")
		c.send("x")
		wantBytes(t, f.r, "x")
		f.Close()
		wantEnd(t, c.r)
		c.Close()
		tt.idle(t)
	})
}

// A tunnel is never closed to make room for a new connection, however long it was idle.
func TestTunnelIsNotSpare(t *testing.T) {
	g := startLoops(t, 1, func(cfg *Config) { cfg.Limits.Connections = 1 }, nil)
	tt := &tunnels{gateway: g, s: startSwitcher(t, nil, switched)}
	g.register(t, "ws", "a", tt.s.url)
	c, f := tt.open(t)
	g.ages()
	g.do(t, "GET /ws HTTP/1.1\r\nHost: x\r\n\r\n").want(t, 503)
	c.send("here")
	wantBytes(t, f.r, "here")
	c.Close()
	f.Close()
	tt.ended(t)
}

// A panic in a tunnel costs that tunnel.
func TestTunnelPanic(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	tt := &tunnels{gateway: g, s: startSwitcher(t, nil, switched)}
	g.register(t, "ws", "a", tt.s.url)
	c, f := tt.open(t)
	g.onLoops(func(w *worker) {
		for _, bucket := range w.wheel {
			for _, c := range bucket {
				c.tunnel.up.to = nil
			}
		}
	})
	other, end := tt.open(t)
	c.send("x")
	wantEnd(t, io.LimitReader(f.r, 1))
	wantEnd(t, c.r)
	other.send("x")
	wantBytes(t, end.r, "x")
	other.Close()
	end.Close()
	tt.ended(t)
	if g.logged("panic in a request") != 1 {
		t.Error("the panic is not in the log")
	}
}

// A tunnel that moves as much as it can does not keep others of its loop waiting.
func TestBusyTunnel(t *testing.T) {
	g := startLoops(t, 1, nil, nil)
	tt := &tunnels{gateway: g, s: startSwitcher(t, nil, switched)}
	g.register(t, "ws", "a", tt.s.url)
	g.register(t, "echo", "a", startActor(t, says("here")).url())
	var busy sync.WaitGroup
	defer busy.Wait()
	for range 3 {
		c, f := tt.open(t)
		piece := []byte(filler(1 << 20))
		busy.Go(func() {
			for {
				if _, err := f.Write(piece); err != nil {
					return
				}
			}
		})
		busy.Go(func() { io.Copy(io.Discard, c.Conn) })
		defer c.Close()
		defer f.Close()
	}
	other := g.dial(t)
	slowest := time.Duration(0)
	for range 200 {
		began := time.Now()
		other.get("/echo").want(t, 200)
		slowest = max(slowest, time.Since(began))
	}
	if slowest > time.Second {
		t.Errorf("a request took %v beside three busy tunnels", slowest)
	}
}

// Tunnels that end in all ways leave no connection, goroutine, descriptor or entry behind.
func TestTunnelsLeaveNothing(t *testing.T) {
	eachTunnel(t, nil, func(t *testing.T, tt *tunnels) {
		ends := []func(c *client, f *far){
			func(c *client, f *far) { c.Close(); io.Copy(io.Discard, f.r); f.Close() },
			func(c *client, f *far) { f.Close(); io.Copy(io.Discard, c.r); c.Close() },
			func(c *client, f *far) { resetNow(c.Conn); io.Copy(io.Discard, f.r); f.Close() },
			func(c *client, f *far) { resetNow(f.tcp); io.Copy(io.Discard, c.r); c.Close() },
			func(c *client, f *far) { c.Close(); f.Close() },
			func(c *client, f *far) {
				closeWrite(t, c.Conn)
				wantEnd(t, f.r)
				f.Close()
				io.Copy(io.Discard, c.r)
				c.Close()
			},
			func(c *client, f *far) { // in the middle of much
				c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
				c.Write(make([]byte, 16<<20))
				if rand.IntN(2) == 0 {
					resetNow(f.tcp)
					c.Close()
				} else {
					c.Close()
					f.tcp.Close()
				}
			},
		}
		c, f := tt.open(t) // what starts late has started
		ends[0](c, f)
		tt.ended(t)
		before := goleak.IgnoreCurrent()
		files := openFiles(t)
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				for i := range 100 {
					c, f := tt.openPair(t)
					if c == nil {
						return
					}
					way := i % (len(ends) - 1)
					if i%25 == 0 {
						way = len(ends) - 1
					}
					ends[way](&client{t: t, Conn: c, r: bufio.NewReader(c)}, f)
				}
			})
		}
		all.Wait()
		tt.ended(t)
		if err := goleak.Find(before); err != nil {
			t.Error(err)
		}
		if loop.Supported {
			if tt.group != nil {
				eventually(t, "as many descriptors as before, but for pipes kept", func() bool { return openFiles(t) <= files })
				tt.sound(t)
			}
		}
		if s := tt.DescribeInstance("ws", "a"); s.InFlight != 0 || s.Success != 1001 {
			t.Errorf("%+v", s)
		}
	})
}

// openPair opens a tunnel from one of several goroutines.
func (tt *tunnels) openPair(t *testing.T) (net.Conn, *far) {
	tt.opening.Lock()
	defer tt.opening.Unlock()
	c, err := net.Dial("tcp", tt.addr)
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	io.WriteString(c, handshake)
	head := make([]byte, len(switched))
	if _, err := io.ReadFull(c, head); err != nil {
		t.Error(err)
		return nil, nil
	}
	return c, <-tt.s.ends
}

// openFiles counts the descriptors of this process, pipes left out: a group keeps those.
func openFiles(t *testing.T) (n int) {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	for _, name := range names {
		if to, err := os.Readlink("/proc/self/fd/" + name.Name()); err == nil && !strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// An echo through a tunnel beside the same without one. CPU is that of all three, which run in this process.
func BenchmarkTunnelEcho(b *testing.B) {
	for _, size := range []int{64, 4 << 10, 32 << 10, 256 << 10, 1 << 20} {
		for _, through := range []bool{false, true} {
			b.Run(fmt.Sprintf("%d/tunnel=%v", size, through), func(b *testing.B) {
				g := startGateway(b, nil, nil)
				tt := &tunnels{gateway: g, s: startSwitcher(b, nil, switched)}
				g.register(b, "ws", "a", tt.s.url)
				var near net.Conn
				var end *far
				if through {
					near, end = tt.open(b)
				} else {
					var err error
					if near, err = net.Dial("tcp", tt.s.Addr().String()); err != nil {
						b.Fatal(err)
					}
					io.WriteString(near, handshake)
					end = tt.s.next(b)
					io.ReadFull(near, make([]byte, len(switched)))
				}
				defer near.Close()
				_ = end.SetDeadline(time.Time{})
				_ = near.SetDeadline(time.Time{})
				go func() {
					defer end.Close()
					buf := make([]byte, 64<<10)
					for {
						n, err := end.tcp.Read(buf)
						if err != nil {
							return
						}
						if _, err := end.tcp.Write(buf[:n]); err != nil {
							return
						}
					}
				}()
				message, answer := make([]byte, size), make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				before := cpuTime()
				for b.Loop() {
					if size <= 32<<10 {
						near.Write(message)
					} else {
						go near.Write(message)
					}
					if _, err := io.ReadFull(near, answer); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/op")
			})
		}
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A 2xx to CONNECT makes a tunnel; its head has no framing, whatever the backend says of that (RFC 9110 section 9.3.6).
func TestConnect(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\n", "HTTP/1.1 200 OK\r\nX-A: b\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 204 x\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 205 x\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(answer, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				cfg.AllowMethods, cfg.Routes = []string{"CONNECT"}, parseRoutes("/=echo")
			}, nil)
			s := startSwitcher(t, nil, answer)
			g.register(t, "echo", "a", s.url)
			c := g.dial(t)
			c.send("CONNECT b.example:443 HTTP/1.1\r\nHost: a\r\n\r\nearly")
			if m := c.headOf(); m.status()/100 != 2 || m.field("Content-Length")+m.field("Transfer-Encoding")+m.field("Connection") != "" ||
				(m.field("X-A") == "b") != strings.Contains(answer, "X-A") {
				t.Errorf("%q", m.head)
			}
			f := s.next(t)
			if first, _, _ := strings.Cut(f.head.head, "\r\n"); first != "CONNECT b.example:443 HTTP/1.1" || f.head.field("Upgrade") != "" {
				t.Errorf("%q", f.head.head)
			}
			got := make([]byte, 5)
			if _, err := io.ReadFull(f.r, got); err != nil || string(got) != "early" {
				t.Errorf("%q, %v", got, err)
			}
			io.WriteString(f.Conn, "hello")
			if _, err := io.ReadFull(c.r, got); err != nil || string(got) != "hello" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
