package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kerberos/registry"
)

// counted is a client connection that counts the gateway's reads, but for those inside a readiness wait.
type counted struct {
	*net.TCPConn
	reads *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	c.reads.Add(1)
	return c.TCPConn.Read(b)
}

// dialCounted connects to the gateway, and returns the counter of its reads too.
func (g *gateway) dialCounted(t testing.TB) (*client, *atomic.Int64) {
	t.Helper()
	ln := listen(t)
	defer ln.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	near.SetDeadline(time.Now().Add(20 * time.Second))
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	reads := &atomic.Int64{}
	g.accepted(counted{far.(*net.TCPConn), reads})
	return &client{t: t, Conn: near, r: bufio.NewReader(near)}, reads
}

// pipePool is a pool with one connection, a pipe: a clock that does not wait stands still while a socket is waited for.
type pipePool struct{ conn *backendConn }

func (p pipePool) acquire(time.Duration) (lease, error) { return p, nil }
func (p pipePool) release(lease)                        { p.conn.Close() }
func (p pipePool) discard(lease)                        { p.conn.Close() }
func (p pipePool) closeIdle()                           {}
func (p pipePool) Conn() net.Conn                       { return p.conn }
func (p pipePool) LastUseTime() time.Time               { return time.Time{} }

// startPiped starts a gateway between two pipes, one from the client, one to the only instance of echo.
func startPiped(t *testing.T, requestTimeout time.Duration) (*client, net.Conn) {
	t.Helper()
	g := &gateway{reg: registry.New(registry.Config{})}
	p, err := New(Config{Registry: g.reg, RequestTimeout: requestTimeout}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	g.reg.OnChange(p.Update)
	g.register(t, "echo", "1", "http://127.0.0.1:1")
	out, backend := net.Pipe()
	p.service("echo").view.Load().parts[0].members[0].pools[0].Store(&pool{connPool: pipePool{&backendConn{Conn: out}}})
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close(); backend.Close() })
	p.accepted(far)
	return &client{t: t, Conn: near, r: bufio.NewReader(near)}, backend
}

// A client may send its request and the end of its stream together: it gets the answer, and the connection is closed at
// once, not when it has been idle too long.
func TestRequestAndEndOfStreamTogether(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", naming(t, "fine").url())
	for range 50 {
		c := g.dial(t)
		c.get("/echo").want(t, 200) // now it waits
		c.SetDeadline(time.Now().Add(2 * time.Second))
		c.send(toHTTP11)
		if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if m := c.read(false); m.body != "fine" {
			t.Fatal(m.head)
		}
		c.closed()
	}
	g.idle(t)
}

// An empty line is no request yet, in however many segments it comes: the connection stays idle, and Shutdown closes it.
func TestEmptyLinesLeaveAConnectionIdle(t *testing.T) {
	for _, segments := range [][]string{{"\r\n"}, {"\r", "\n"}, {"\r\n\r", "\n"}} {
		t.Run(fmt.Sprintf("%q", segments), func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, nil, nil)
			c, reads := g.dialCounted(t)
			for i, s := range segments {
				c.send(s)
				eventually(t, "taken, and more waited for", func() bool { return reads.Load() == int64(i)+2 })
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if cut := g.Shutdown(ctx); cut != 0 || ctx.Err() != nil {
				t.Errorf("%d cut, %v", cut, ctx.Err())
			}
			c.closed()
		})
	}
}

// A head that all but fills the first buffer does not leave its body to be read a few bytes at a time.
func TestBodyBehindALargeHead(t *testing.T) {
	const size = 60_000
	g := startGateway(t, nil, nil)
	o := naming(t, "")
	g.register(t, "echo", "1", o.url())
	for _, n := range []int{firstBuffer - 1000, firstBuffer - 2, firstBuffer - 1, firstBuffer} {
		c, reads := g.dialCounted(t)
		head := fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nX-A: ", size)
		head += strings.Repeat("x", n-len(head)-4) + "\r\n\r\n"
		body := filler(size)
		c.send(head + body)
		if m := c.read(false).want(t, 200); m.body != body {
			t.Errorf("behind a head of %d bytes the body came back as another", n)
		}
		if got := reads.Load(); got > size/100 {
			t.Errorf("%d reads for a body behind a head of %d bytes", got, n)
		}
	}
}

// A message may name as many as 32 fields in Connection, in however many lines: each is looked for among all others,
// which takes a time that grows with the square of what was sent.
func TestNominatedFieldsAreFew(t *testing.T) {
	// named returns lines that name n fields, in one Connection line or in a line each, and the fields.
	named := func(n int, together bool) string {
		var names, fields []string
		for i := range n {
			names = append(names, fmt.Sprintf("x-hop-%d", i))
			fields = append(fields, fmt.Sprintf("X-Hop-%d: 1", i))
		}
		separator := "\r\nConnection: "
		if together {
			separator = ", "
		}
		return "Connection: " + strings.Join(names, separator) + "\r\n" + strings.Join(fields, "\r\n") + "\r\n"
	}
	for _, together := range []bool{true, false} {
		t.Run(fmt.Sprintf("requests, in one line: %v", together), func(t *testing.T) {
			g := startGateway(t, nil, nil)
			o := naming(t, "fine")
			g.register(t, "echo", "1", o.url())
			g.do(t, "GET /echo HTTP/1.1\r\nHost: a\r\n"+named(32, together)+"X-Kept: 1\r\n\r\n").want(t, 200)
			seen := o.requests()
			if strings.Contains(seen[0].head, "Hop") || seen[0].field("X-Kept") != "1" {
				t.Errorf("the backend saw %s", seen[0].head)
			}
			c := g.dial(t)
			c.send("GET /echo HTTP/1.1\r\nHost: a\r\n" + named(33, together) + "\r\n")
			c.read(false).want(t, 400)
			c.closed()
			if n := len(o.requests()); n != 1 {
				t.Errorf("the backend saw %d requests", n)
			}
		})
		t.Run(fmt.Sprintf("responses, in one line: %v", together), func(t *testing.T) {
			g := startGateway(t, nil, nil)
			a := startActor(t, writes("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"+named(32, together)+"X-Kept: 1\r\n\r\n"))
			g.register(t, "echo", "1", a.url())
			if m := g.dial(t).get("/echo").want(t, 200); strings.Contains(m.head, "Hop") || m.field("X-Kept") != "1" {
				t.Error(m.head)
			}
			a.does(writes("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + named(33, together) + "\r\n"))
			g.dial(t).get("/echo").refused(t, errMalformed)
		})
	}
}

// Chunks that keep coming are not collected until there are many: the backend gets the first ones soon.
func TestSteadyChunksAreSentOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, backend := startPiped(t, 0)
		began := time.Now()
		var first atomic.Int64 // when the first byte was there
		go func() {
			backend.Read(make([]byte, 1))
			first.Store(int64(time.Since(began)))
			io.Copy(io.Discard, backend)
		}()
		c.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
		for range 50 {
			c.send("1\r\nx\r\n")
			time.Sleep(chunkPatience / 4)
		}
		if at := time.Duration(first.Load()); at == 0 || at > 2*chunkPatience {
			t.Errorf("first byte at the backend after %v (0: not at all), of chunks sent for %v", at, time.Since(began))
		}
	})
}

// Many tiny chunks of an upload go on as few: framing must not cost more than what it frames.
func TestTinyChunksArePutTogether(t *testing.T) {
	const size = 3 * maxHeld
	var raw bytes.Buffer
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		m, err := readMessage(bufio.NewReader(io.TeeReader(r, &raw)), false)
		if err != nil {
			t.Error(err)
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(m.body), m.body)
	})
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	body := filler(size)
	if m := g.do(t, "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"+inChunks(body, 1)); m.body != body {
		t.Errorf("another body came back, of %d bytes: %s", len(m.body), m.head)
	}
	if raw.Len() > 2*size {
		t.Errorf("the backend saw %d bytes for a body of %d", raw.Len(), size)
	}
}

// An upload that has all been sent leaves no deadline on its connection, also where the response ends before the upload's
// goroutine gets to say so: the connection serves others yet.
func TestUploadLeavesNoDeadline(t *testing.T) {
	o := startOrigin(t, func(_ *origin, _ net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
	made, err := startGateway(t, nil, nil).Proxy.dial(0, o.Addr().(*net.TCPAddr).AddrPort(), time.Now().Add(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	x := &exchange{c: &conn{nc: far}, backend: made, upload: &upload{done: make(chan struct{})}}
	use := func() {
		t.Helper()
		if err := x.backend.write.arm(x.backend.SetWriteDeadline, time.Now(), uploadTimeout); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(x.backend, "x"); err != nil {
			t.Fatal(err)
		}
	}
	use()
	close(x.upload.done)
	x.endUpload()
	if x.unread {
		t.Error("all was sent, and it counts as unread")
	}
	use()
}

// A client that only reads once its request has been answered may leave its upload at that: the time that an upload may
// stall does not cut the response.
func TestAnsweredUploadMayStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, backend := startPiped(t, 0)
		over := make(chan struct{})
		go func() {
			defer close(over)
			r := bufio.NewReader(backend)
			bodyReader(t, r)
			go io.Copy(io.Discard, r)
			io.WriteString(backend, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			for began := time.Now(); time.Since(began) < 3*bodyTimeout; time.Sleep(time.Second) {
				if _, err := io.WriteString(backend, "1\r\nx\r\n"); err != nil {
					return
				}
			}
			io.WriteString(backend, "0\r\n\r\n")
		}()
		c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc")
		began := time.Now()
		m, err := readMessage(c.r, false)
		if want := strings.Repeat("x", 90); err != nil || m.body != want {
			t.Errorf("%d of %d bytes in %v, %v", len(m.body), len(want), time.Since(began), err)
		}
		<-over
	})
}

// An upload that its backend does not take holds up nobody for longer than it takes a request to look after its client:
// neither a client that resets, nor Shutdown with a deadline, nor Close.
func TestUploadThatNobodyTakes(t *testing.T) {
	for _, how := range []string{"resets", "shutdown"} { // the end of its stream waits behind bytes that nobody takes
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			over := make(chan struct{})
			o := startOrigin(t, func(*origin, net.Conn, *bufio.Reader) { <-over })
			defer close(over)
			g := startGateway(t, nil, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
			piece := strings.Repeat("x", 4<<10)
			for err := error(nil); err == nil; { // until all sockets are full
				c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				_, err = io.WriteString(c.Conn, piece)
			}
			began := time.Now()
			switch how {
			case "resets":
				c.Conn.(*net.TCPConn).SetLinger(0)
				c.Close()
			default:
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				defer cancel()
				if cut := g.Shutdown(ctx); cut != 1 {
					t.Errorf("%d requests were cut", cut)
				}
				g.Close()
			}
			g.idle(t)
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("it ended after %v", took)
			}
			if s := g.DescribeInstance("echo", "1"); s.Ignored != 1 || s.Failure != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// What waits unread in the client's socket does not hide that the client was reset or cut while its upload is not taken.
func TestUnreadUploadThatNobodyTakes(t *testing.T) {
	for _, how := range []string{"reset", "shutdown"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			over := make(chan struct{})
			o := startOrigin(t, func(*origin, net.Conn, *bufio.Reader) { <-over })
			defer close(over)
			g := startGateway(t, nil, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
			var written atomic.Int64
			go func() {
				block := make([]byte, 64<<10)
				for {
					n, err := c.Conn.Write(block)
					written.Add(int64(n))
					if err != nil {
						return
					}
				}
			}()
			eventually(t, "nobody takes more", func() bool {
				before := written.Load()
				time.Sleep(50 * time.Millisecond)
				return before > 0 && written.Load() == before
			})
			began := time.Now()
			if how == "reset" {
				c.Conn.(*net.TCPConn).SetLinger(0)
				c.Close()
				g.idle(t)
			} else {
				ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
				defer cancel()
				if cut := g.Shutdown(ctx); cut != 1 {
					t.Errorf("%d requests were cut", cut)
				}
				g.Close()
			}
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("it ended after %v", took)
			}
			if s := g.DescribeInstance("echo", "1"); s.Ignored != 1 || s.Failure != 0 || s.InFlight != 0 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// The answer to a request that failed in us is not lost in a reset although its body was not read.
func TestPanicBeforeABody(t *testing.T) {
	g := startGateway(t, nil, func(*Request) string { panic("a bug in a RouteFunc") })
	for range 5 {
		c := g.dial(t)
		c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n" + filler(60_000))
		c.Conn.(*net.TCPConn).CloseWrite()
		c.read(false).refused(t, errInternal)
		c.closed()
	}
}

// A request that went out only in part is followed by no other, even if an answer to it has come: the connection ends.
func TestRequestCutHalfWay(t *testing.T) {
	const answer = "HTTP/1.1 413 x\r\nContent-Length: 0\r\n\r\n"
	o := startOrigin(t, func(o *origin, c net.Conn, _ *bufio.Reader) {
		io.WriteString(c, answer)
		<-t.Context().Done() // reads nothing
	})
	g := startGateway(t, nil, nil)
	for _, reused := range []bool{false, true} {
		backend, err := g.Proxy.dial(0, o.Addr().(*net.TCPAddr).AddrPort(), time.Now().Add(10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		defer backend.Close()
		c := &conn{p: g.Proxy}
		c.occupy()
		c.takeScratch(g.Proxy)
		if err := c.req.parse([]byte(smallGet), nil, false, &standard); err != nil {
			t.Fatal(err)
		}
		c.x.begin(time.Now())
		c.x.backend, c.x.sent, c.x.reused, c.x.written = backend, time.Now(), reused, true
		if err := c.x.answer(syscall.EPIPE); err != nil || c.x.res.status != 413 || !c.x.res.close {
			t.Errorf("reused %v: %v, status %d, close %v: want the answer, and the connection closed behind it", reused, err, c.x.res.status, c.x.res.close)
		}
	}
}
