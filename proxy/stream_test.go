package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// filler returns n bytes that do not repeat soon.
func filler(n int) string {
	b := make([]byte, n)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return string(b)
}

// inChunks frames a body in chunks of a size.
func inChunks(body string, size int) string {
	var b strings.Builder
	for chunk := range slices.Chunk([]byte(body), size) {
		fmt.Fprintf(&b, "%x\r\n%s\r\n", len(chunk), chunk)
	}
	return b.String() + "0\r\n\r\n"
}

// inPieces cuts a message into what is written at once: n bytes, or all of it for 0.
func inPieces(message string, n int) iter.Seq[[]byte] {
	if n == 0 {
		n = len(message)
	}
	return slices.Chunk([]byte(message), n)
}

func TestUploads(t *testing.T) {
	g := startGateway(t, nil, nil)
	o := naming(t, "")
	g.register(t, "echo", "1", o.url())
	const mib = 1 << 20
	for _, row := range []struct {
		size   int
		chunks int // 0: with a length
		pieces int // bytes a write; 0: all at once
	}{
		{size: 1}, {size: 1, chunks: 1}, {size: 100, pieces: 1}, {size: 100, chunks: 7, pieces: 1},
		{size: firstBuffer}, {size: firstBuffer + 1}, {size: 3 * firstBuffer}, {size: 3 * firstBuffer, chunks: 1000},
		{size: maxHead}, {size: maxHeld - 1}, {size: maxHeld, pieces: 5000},
		{size: maxHeld}, {size: maxHeld, chunks: maxHeld}, {size: maxHeld, chunks: 1},
		{size: maxHeld + 1}, {size: maxHeld + 1, chunks: maxHeld + 1}, {size: maxHeld + 1, chunks: maxHeld}, {size: maxHeld + 1, chunks: 1},
		{size: mib, chunks: 100, pieces: 10_007}, {size: mib, pieces: 10_007},
		{size: 10 * mib}, {size: 10 * mib, chunks: 100_000},
	} {
		t.Run(fmt.Sprintf("%d in chunks of %d and pieces of %d", row.size, row.chunks, row.pieces), func(t *testing.T) {
			body := filler(row.size)
			request := fmt.Sprintf("PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			if row.chunks > 0 {
				request = "PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(body, row.chunks)
			}
			c := g.dial(t)
			for piece := range inPieces(request+toHTTP11, row.pieces) {
				c.send(string(piece))
			}
			m := c.read(false)
			if m.status() != 200 || m.body != body {
				t.Fatalf("%d, %d bytes of %d came back", m.status(), len(m.body), len(body))
			}
			if m.field("Connection") == "" { // it may close behind an upload that ended late
				if m := c.read(false); m.status() != 200 || m.body != "" {
					t.Fatalf("the next request: %d %.100q", m.status(), m.body)
				}
			}
		})
	}
}

func TestDownloads(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct {
		size   int
		chunks int // 0: with a length, -1: up to the close
		pieces int // bytes a write; 0: all at once
	}{
		{size: 1, pieces: 1}, {size: 100, chunks: 7, pieces: 1}, {size: 100, chunks: -1, pieces: 1},
		{size: firstBuffer}, {size: maxWhole}, {size: maxWhole, pieces: 1000}, {size: maxWhole + 1}, {size: maxWhole + 1, chunks: 1},
		{size: maxWhole, chunks: maxWhole}, {size: mib, pieces: 10_007}, {size: mib, chunks: 100, pieces: 10_007}, {size: mib, chunks: -1},
		{size: 10 * mib}, {size: 10 * mib, chunks: 100_000},
	} {
		t.Run(fmt.Sprintf("%d in chunks of %d and pieces of %d", row.size, row.chunks, row.pieces), func(t *testing.T) {
			body := filler(row.size)
			response := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			switch {
			case row.chunks > 0:
				response = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(body, row.chunks)
			case row.chunks < 0:
				response = "HTTP/1.1 200 OK\r\n\r\n" + body
			}
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				for {
					if _, err := o.next(r); err != nil {
						return
					}
					for piece := range inPieces(response, row.pieces) {
						if _, err := c.Write(piece); err != nil {
							return
						}
					}
					if row.chunks < 0 {
						return
					}
				}
			})
			g := startGateway(t, nil, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			for range 2 {
				c.send(toHTTP11)
				if m := c.read(false); m.status() != 200 || m.body != body || m.field("Connection") != "" {
					t.Fatalf("%s%d bytes of %d", m.head, len(m.body), len(body))
				}
			}
		})
	}
}

// Chunks of any size that come in pieces of any size go on as the same body, whatever is in the gateway's buffer when it sends.
func TestChunksOfAnySize(t *testing.T) {
	g := startGateway(t, nil, nil)
	var response atomic.Pointer[string]
	o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		for {
			if _, err := o.next(r); err != nil {
				return
			}
			for rest := *response.Load(); rest != ""; {
				n := min(len(rest), 1+rand.IntN([]int{10, 5000, 100_000}[rand.IntN(3)]))
				if _, err := io.WriteString(c, rest[:n]); err != nil {
					return
				}
				rest = rest[n:]
			}
		}
	})
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	for range 100 {
		body := filler(1 + rand.IntN(400_000))
		var framed strings.Builder
		framed.WriteString("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		size := []int{2000, 20_000, 200_000}[rand.IntN(3)]
		for rest := body; rest != ""; {
			n := min(len(rest), 1+rand.IntN(size))
			fmt.Fprintf(&framed, "%x\r\n%s\r\n", n, rest[:n])
			rest = rest[n:]
		}
		framed.WriteString("0\r\nX-Sum: 1\r\n\r\n")
		text := framed.String()
		response.Store(&text)
		c.send(toHTTP11)
		if m := c.read(false); m.body != body || m.trailer != "X-Sum: 1\r\n" || m.field("Connection") != "" {
			t.Fatalf("%s%d bytes of %d, trailer %q", m.head, len(m.body), len(body), m.trailer)
		}
	}
}

// bodyReader reads the body of a request piece by piece, behind its head.
func bodyReader(t testing.TB, r *bufio.Reader) io.Reader {
	head := &message{}
	for !strings.HasSuffix(head.head, "\r\n\r\n") {
		line, err := r.ReadString('\n')
		if err != nil {
			return strings.NewReader("")
		}
		head.head += line
	}
	if head.field("Transfer-Encoding") == "chunked" {
		return httputil.NewChunkedReader(r)
	}
	var n int64
	if _, err := fmt.Sscan(head.field("Content-Length"), &n); err != nil {
		t.Error(err)
	}
	return io.LimitReader(r, n)
}

// mirror sends back each piece of a body as it comes.
func mirror(t testing.TB) *origin {
	return startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		body := bodyReader(t, r)
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"); err != nil {
			return
		}
		w := httputil.NewChunkedWriter(c)
		b := make([]byte, relaySize)
		for {
			n, err := body.Read(b)
			if n > 0 {
				w.Write(b[:n])
			}
			if err != nil {
				if err == io.EOF {
					w.Close()
					io.WriteString(c, "\r\n")
				}
				return
			}
		}
	})
}

// headOf reads a response head alone.
func (c *client) headOf() *message {
	c.t.Helper()
	m := &message{}
	for !strings.HasSuffix(m.head, "\r\n\r\n") {
		line, err := c.r.ReadString('\n')
		if err != nil {
			c.t.Fatalf("reading a head: %v (so far %q)", err, m.head)
		}
		m.head += line
	}
	return m
}

// Both bodies flow at once: each piece of the upload comes back before the next is sent.
func TestEcho(t *testing.T) {
	const size = 3000
	for _, row := range []struct {
		name, framing string
		pieces        int
		frame         func(piece string) string
		end           string
	}{
		{"chunks", "Transfer-Encoding: chunked", 50, func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }, "0\r\n\r\n"},
		{"length", fmt.Sprintf("Content-Length: %d", 50*size), 50, func(s string) string { return s }, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, nil, nil)
			g.register(t, "echo", "1", mirror(t).url())
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: a\r\n" + row.framing + "\r\n\r\n")
			if m := c.headOf(); m.status() != 200 {
				t.Fatal(m.head)
			}
			back := httputil.NewChunkedReader(c.r)
			b := make([]byte, size)
			for i := range row.pieces {
				piece := filler(size-1) + string(rune('a'+i%26))
				c.send(row.frame(piece))
				if _, err := io.ReadFull(back, b); err != nil || string(b) != piece {
					t.Fatalf("piece %d did not come back: %v", i, err)
				}
			}
			c.send(row.end)
			if n, err := back.Read(b); n != 0 || err != io.EOF {
				t.Errorf("the end did not come back: %d bytes, %v", n, err)
			}
			eventually(t, "a success", func() bool { return g.DescribeInstance("echo", "1").Success == 1 })
		})
	}
}

// A slow upload reaches the backend as it comes, trailers included.
func TestSlowUpload(t *testing.T) {
	came := make(chan string)
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		body := bodyReader(t, r)
		b := make([]byte, 100)
		for {
			n, err := body.Read(b)
			if n > 0 {
				came <- string(b[:n])
			}
			if err != nil {
				break
			}
		}
		trailer, _ := r.ReadString('\n')
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Got: "+trailer+"\r\n")
	})
	// The upload takes longer than the request timeout, which counts from its end.
	g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = 300 * time.Millisecond }, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
	for i := range 12 {
		c.send(fmt.Sprintf("1\r\n%c\r\n", 'a'+i))
		select {
		case got := <-came:
			if got != string(rune('a'+i)) {
				t.Fatalf("piece %d is %q", i, got)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("piece %d did not arrive", i)
		}
		time.Sleep(50 * time.Millisecond) // the client's pace: this is what is tested
	}
	c.send("0\r\nX-T: 1\r\n\r\n")
	if m := c.read(false); m.status() != 200 || m.field("X-Got") != "X-T: 1" {
		t.Errorf("%s%s", m.head, m.body)
	}
}

// A backend that answers nothing is waited for from the end of the upload on.
func TestSilenceBehindUpload(t *testing.T) {
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
	g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = 300 * time.Millisecond }, nil)
	g.register(t, "echo", "1", o.url())
	m := g.do(t, fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", 10*maxHeld, filler(10*maxHeld)))
	if m.status() != 504 || m.field("Proxy-Status") != "kerberos; error=http_response_timeout" {
		t.Error(m.head)
	}
}

// A small body may come behind its head, in both directions.
func TestSlowSmallBodies(t *testing.T) {
	headSeen, firstSeen := make(chan struct{}), make(chan struct{})
	o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		m, err := o.next(r)
		if err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
		<-headSeen
		io.WriteString(c, m.body[:2])
		<-firstSeen
		io.WriteString(c, m.body[2:])
	})
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
	time.Sleep(50 * time.Millisecond) // the client's pace
	c.send("hello")
	if m := c.headOf(); m.status() != 200 {
		t.Fatal(m.head)
	}
	close(headSeen)
	b := make([]byte, 5)
	if _, err := io.ReadFull(c.r, b[:2]); err != nil {
		t.Fatal(err)
	}
	close(firstSeen)
	if _, err := io.ReadFull(c.r, b[2:]); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}

// Server-sent events arrive one by one, each before the next is sent, and soon: the median is asked to be within ten
// times what is aimed at.
func TestServerSentEvents(t *testing.T) {
	const events = 21
	for _, row := range []struct {
		name, request, head, end string
		frame                    func(string) string
	}{
		{"chunks", toHTTP11, "Transfer-Encoding: chunked\r\n", "0\r\n\r\n", func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }},
		{"up to the close", toHTTP11, "", "", func(s string) string { return s }},
		{"length", toHTTP11, "Content-Length: 1000000\r\n", "", func(s string) string { return s }},
		{"to HTTP/1.0", toHTTP10, "Transfer-Encoding: chunked\r\n", "0\r\n\r\n", func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			next := make(chan time.Time, 1)
			seen := make(chan struct{})
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if _, err := o.next(r); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"+row.head+"\r\n")
				for i := range events {
					<-seen
					next <- time.Now()
					io.WriteString(c, row.frame(fmt.Sprintf("data: %d\n\n", i)))
				}
				io.WriteString(c, row.end)
			})
			g := startGateway(t, nil, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			defer close(seen)
			c.send(row.request)
			m := c.headOf()
			var body io.Reader = c.r
			if m.field("Transfer-Encoding") == "chunked" {
				body = httputil.NewChunkedReader(c.r)
			}
			var took []time.Duration
			for i := range events {
				seen <- struct{}{}
				want := fmt.Sprintf("data: %d\n\n", i)
				b := make([]byte, len(want))
				if _, err := io.ReadFull(body, b); err != nil || string(b) != want {
					t.Fatalf("event %d: %q, %v", i, b, err)
				}
				took = append(took, time.Since(<-next))
			}
			slices.Sort(took)
			if median := took[events/2]; median > 200*time.Millisecond {
				t.Errorf("events take %v", median)
			}
		})
	}
}

// A reader that is slow holds up its own backend, which needs no memory of ours.
func TestBackPressure(t *testing.T) {
	const total = 64 << 20
	var written atomic.Int64
	o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		if _, err := o.next(r); err != nil {
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", total)
		block := make([]byte, 64<<10)
		for written.Load() < total {
			n, err := c.Write(block)
			written.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send(toHTTP11)
	c.headOf()
	eventually(t, "the backend waits", func() bool {
		before := written.Load()
		time.Sleep(50 * time.Millisecond)
		return before > 0 && written.Load() == before
	})
	if n := written.Load(); n > total/2 {
		t.Errorf("nobody reads, and the backend could write %d bytes", n)
	}
	if n, err := io.CopyN(io.Discard, c.r, total); err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A server that has too much to do may answer as soon as it has accepted: that is found although nothing more comes.
func TestAnswerBeforeRequest(t *testing.T) {
	const answer = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
	for _, ends := range []bool{false, true} {
		o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
			io.WriteString(c, answer)
			if ends {
				c.(*net.TCPConn).CloseWrite()
			}
			io.Copy(io.Discard, r)
		})
		g := startGateway(t, nil, nil)
		g.register(t, "echo", "a", o.url())
		if m := g.do(t, toHTTP11).want(t, 503); m.field("Proxy-Status") != "" {
			t.Errorf("ends %v: %q", ends, m.head)
		}
	}
}

// A backend may answer before it has read all of an upload, and may not want the rest: the client gets the answer.
func TestEarlyAnswer(t *testing.T) {
	const answer = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno!"
	body := strings.Repeat("0123456789abcdef", 2<<20) // more than all socket buffers hold
	requests := map[string]string{
		"length": fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(body), body),
		"chunks": "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(body, 1<<20),
	}
	for _, then := range []string{"reads on", "reads no more", "closes", "resets"} {
		for framing, request := range requests {
			t.Run(then+", "+framing, func(t *testing.T) {
				over := make(chan struct{})
				o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
					bodyReader(t, r)
					io.WriteString(c, answer)
					switch then {
					case "reads on":
						io.Copy(io.Discard, r)
					case "reads no more":
						<-over
					case "resets":
						c.(*net.TCPConn).SetLinger(0)
					}
				})
				g := startGateway(t, nil, nil)
				g.register(t, "echo", "1", o.url())
				c := g.dial(t)
				went := make(chan struct{})
				go func() {
					defer close(went)
					io.WriteString(c.Conn, request) // fails once the gateway has had enough
				}()
				if m := c.read(false); m.status() != 413 || m.body != "no!" || m.field("Connection") != "close" {
					t.Errorf("%s%s", m.head, m.body)
				}
				c.Close()
				<-went
				g.idle(t)
				close(over)
				if s := g.DescribeInstance("echo", "1"); s.Failure != 0 {
					t.Errorf("outcomes: %+v", s)
				}
			})
		}
	}
}

// An early answer reaches the client in good order too where the backend closes while the first part of the body is still
// being written to it.
func TestEarlyAnswerToHeldBody(t *testing.T) {
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		if _, err := r.ReadByte(); err != nil {
			return
		}
		time.Sleep(100 * time.Millisecond) // the gateway's buffer is full
		io.WriteString(c, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")
	})
	raw, err := o.Listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { // the system keeps little then, on both sides
		err = errors.Join(syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2<<10),
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 536))
	})
	if err != nil {
		t.Fatal(err)
	}
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.TrimSuffix(inChunks(filler(maxHeld+(40<<10)), 1000), "0\r\n\r\n"))
	if m := c.read(false); m.status() != 413 || m.field("Connection") != "close" {
		t.Errorf("%s%s", m.head, m.body)
	}
	c.closed() // not reset: the answer could be lost
	c.Close()
	g.idle(t)
}

// A response up to the close that breaks off is reset, though the upload beside it has not ended.
func TestCutBesideUpload(t *testing.T) {
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		bodyReader(t, r)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nno size\r\n")
		io.Copy(io.Discard, r)
	})
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send("PUT /echo HTTP/1.0\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome")
	if got, err := io.ReadAll(c.r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v: it looks whole", got, err)
	}
	g.idle(t)
}

// idle waits until no client connection is left.
func (g *gateway) idle(t testing.TB) {
	t.Helper()
	eventually(t, "the client's connection ends", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.conns) == 0
	})
}

// A client that breaks off its body has asked for nothing: the backend never sees a whole request.
func TestClientBreaksOff(t *testing.T) {
	for _, row := range []struct {
		name, request string
		reached       bool
	}{
		{"small", "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhello", false},
		{"large", fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", 10*maxHeld, filler(2*maxHeld)), true},
		{"chunks", "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", true},
		{"in the middle of a chunk", "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", true},
		{"many chunks", "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.TrimSuffix(inChunks(filler(3*maxHeld), 1000), "0\r\n\r\n"), true},
	} {
		for _, how := range []string{"close", "reset", "half"} {
			t.Run(row.name+", "+how, func(t *testing.T) {
				begun, ended := make(chan struct{}), make(chan error, 1)
				o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
					if _, err := r.Peek(1); err != nil {
						return
					}
					close(begun)
					_, err := readMessage(r, false)
					ended <- err
				})
				g := startGateway(t, nil, nil)
				g.register(t, "echo", "1", o.url())
				c := g.dial(t)
				c.send(row.request)
				if row.reached {
					<-begun
				}
				switch how {
				case "reset":
					c.Conn.(*net.TCPConn).SetLinger(0)
					c.Close()
				case "close":
					c.Close()
				default:
					c.Conn.(*net.TCPConn).CloseWrite()
					c.closed()
				}
				if !row.reached {
					g.idle(t)
					select {
					case <-begun:
						t.Error("the backend saw a part of it")
					default:
					}
					return
				}
				if err := <-ended; err == nil {
					t.Error("the backend saw a whole request")
				}
				eventually(t, "the outcome", func() bool { return g.DescribeInstance("echo", "1").InFlight == 0 })
				if s := g.DescribeInstance("echo", "1"); s.Failure != 0 || s.Success != 0 || s.Ignored != 1 {
					t.Errorf("outcomes: %+v", s)
				}
			})
		}
	}
}

// A chunk that is malformed ends an upload that is under way: 400, or a response that ends early. It is not the
// backend's fault.
func TestMalformedChunkLater(t *testing.T) {
	for _, echo := range []bool{false, true} {
		t.Run(fmt.Sprintf("response has begun: %v", echo), func(t *testing.T) {
			g := startGateway(t, nil, nil)
			begun, ended := make(chan struct{}), make(chan error, 1)
			o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
				body := bodyReader(t, r)
				if echo {
					io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
				}
				close(begun)
				_, err := io.Copy(io.Discard, body)
				ended <- err
			})
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
			<-begun
			if echo {
				c.headOf()
			}
			c.send("zz\r\n" + smuggled)
			if echo {
				rest, err := io.ReadAll(c.r)
				if bytes.HasSuffix(rest, []byte("0\r\n\r\n")) && err == nil {
					t.Errorf("this looks complete: %q", rest)
				}
			} else {
				if m := c.read(false); m.status() != 400 || m.field("Connection") != "close" {
					t.Error(m.head)
				}
				c.closed()
			}
			if err := <-ended; err == nil {
				t.Error("the backend saw a whole request")
			}
			eventually(t, "the outcome", func() bool { return g.DescribeInstance("echo", "1").InFlight == 0 })
			if s := g.DescribeInstance("echo", "1"); s.Failure != 0 || s.Success != 0 || s.Ignored != 1 {
				t.Errorf("outcomes: %+v", s)
			}
		})
	}
}

// A client that leaves ends the backend's work, and no failure is counted for it.
func TestClientLeaves(t *testing.T) {
	rows := []struct {
		name, sent string
		status     int // in the log
	}{
		{"before the head", "", 499},
		{"behind interim responses", "HTTP/1.1 103 x\r\n\r\n", 499},
		{"behind half a head", "HTTP/1.1 200 OK\r\nX-A", 499},
		{"behind a head", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 499},
		{"in a stream", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", 499},
	}
	var wait []func() // for all at once: it takes the gateway a second to look
	for _, row := range rows {
		for _, how := range []string{"close", "reset"} {
			answered, left := make(chan struct{}), make(chan struct{})
			o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
				if _, err := o.next(r); err != nil {
					return
				}
				io.WriteString(c, row.sent)
				close(answered)
				io.Copy(io.Discard, r)
				close(left)
			})
			g := startGateway(t, logRequests, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send(toHTTP11)
			<-answered
			if strings.HasSuffix(row.sent, "\r\n") && strings.Contains(row.sent, " 200 ") {
				c.headOf()
			}
			if how == "reset" {
				c.Conn.(*net.TCPConn).SetLinger(0)
			}
			c.Close()
			wait = append(wait, func() {
				t.Run(row.name+", "+how, func(t *testing.T) {
					select {
					case <-left:
					case <-time.After(20 * time.Second):
						t.Fatal("the backend still works for nobody")
					}
					g.idle(t)
					if s := g.DescribeInstance("echo", "1"); s.InFlight != 0 || s.Failure != 0 || s.Ignored != 1 {
						t.Errorf("outcomes: %+v", s)
					}
					if !strings.Contains(g.logs.String(), fmt.Sprintf("status=%d", row.status)) {
						t.Errorf("want status %d in the log: %s", row.status, g.logs)
					}
				})
			})
		}
	}
	for _, f := range wait {
		f()
	}
}

// A client that has sent its next request already is still there, however long the backend takes.
func TestPipelinedClientStays(t *testing.T) {
	t.Parallel()
	o := startOrigin(t, func(o *origin, c net.Conn, r *bufio.Reader) {
		for n := 0; ; n++ {
			if _, err := o.next(r); err != nil {
				return
			}
			if n == 0 {
				time.Sleep(1500 * time.Millisecond) // it looks after the client once a second
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send(toHTTP11 + toHTTP11)
	for range 2 {
		if m := c.read(false); m.body != "ok" {
			t.Fatal(m.head)
		}
	}
}

// What a workspace keeps for its next request is small, whatever the last ones were.
func TestWorkspaceStaysSmall(t *testing.T) {
	body := filler(10 * maxHeld)
	chunks := inChunks(body, 100_000)
	large := "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: " + strings.Repeat("x", maxHead-1000) + "\r\n\r\nhello"
	rows := []struct{ name, request, response string }{
		{"large heads", sized(maxHead), large},
		{"small body", toHTTP11, "HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + body[:60000]},
		{"large body", toHTTP11, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)},
		{"chunks", toHTTP11, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks},
		{"small upload", "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + inChunks(body[:60000], 10_000), "HTTP/1.1 204 x\r\n\r\n"},
		{"large upload", fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(body), body), "HTTP/1.1 204 x\r\n\r\n"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			var mu sync.Mutex // guards what follows
			var made []*workspace
			var scratches []*scratch
			g := startGateway(t, nil, nil)
			anew, scratched := g.workspaces.New, g.scratches.New
			g.workspaces.New = func() any {
				w := anew().(*workspace)
				mu.Lock()
				defer mu.Unlock()
				made = append(made, w)
				return w
			}
			g.scratches.New = func() any {
				s := scratched().(*scratch)
				mu.Lock()
				defer mu.Unlock()
				scratches = append(scratches, s)
				return s
			}
			o, _ := scripted(t, row.response, false)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send(row.request)
			if m := c.read(false); m.field("Connection") != "" {
				t.Skip("the upload ended late: there is no idle connection")
			}
			c.Close()
			g.idle(t)
			mu.Lock()
			defer mu.Unlock()
			if len(made) == 0 {
				t.Fatal("no workspace was seen")
			}
			for _, w := range made {
				if len(w.in.b) > 4*firstBuffer || w.scratch != nil || w.out != nil || w.x.back.b != nil {
					t.Errorf("a workspace holds %d bytes, or a scratch", len(w.in.b))
				}
			}
			for _, s := range scratches {
				for name, size := range map[string]int{"out": cap(s.out), "back": len(s.back)} {
					if size > firstBuffer {
						t.Errorf("%s holds %d bytes", name, size)
					}
				}
			}
		})
	}
}

// Time that a client takes for its upload is not the backend's: a breaker must not open for clients that stall.
func TestStalledUpload(t *testing.T) {
	for name, start := range map[string]string{
		"length":  fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nabc", 2*maxHeld),
		"chunked": "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
			g := startGateway(t, func(cfg *Config) { cfg.RequestTimeout = 50 * time.Millisecond; cfg.Breaker.Failures = 1 }, nil)
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			c.send(start)
			eventually(t, "on its way", func() bool { return g.DescribeInstance("echo", "1").InFlight == 1 })
			began := time.Now()
			eventually(t, "well past the request timeout, or ended", func() bool {
				return time.Since(began) > 500*time.Millisecond || g.DescribeInstance("echo", "1").InFlight == 0
			})
			c.Close()
			eventually(t, "ended", func() bool { return g.DescribeInstance("echo", "1").InFlight == 0 })
			if got := g.DescribeInstance("echo", "1"); got.Ignored != 1 || got.Failure != 0 || !got.Ready {
				t.Errorf("%+v", got)
			}
		})
	}
}

// A stream is whole behind a head of any size, and whatever has come at once with it.
func TestStreamBehindAHead(t *testing.T) {
	body := make([]byte, 4<<20)
	for i := range body {
		body[i] = byte(i ^ i>>8 ^ i>>16)
	}
	for _, head := range []int{100, 5_000, 40_000, 150_000} {
		for _, chunk := range []int{0, 1000, 70_000} { // 0: the end of the connection is the end of the body
			for _, early := range []int{17, 4_000, 1 << 30} { // so much comes, and the rest a moment later
				t.Run(fmt.Sprintf("%d/%d/%d", head, chunk, early), func(t *testing.T) {
					t.Parallel()
					g := startGateway(t, func(cfg *Config) { cfg.Limits.Head = 200 << 10 }, nil)
					var out bytes.Buffer
					out.WriteString("HTTP/1.1 200 OK\r\n")
					for range head / 1000 {
						fmt.Fprintf(&out, "X-A: %s\r\n", strings.Repeat("x", 990))
					}
					if chunk == 0 {
						out.WriteString("Connection: close\r\n\r\n")
						out.Write(body)
					} else {
						out.WriteString("Transfer-Encoding: chunked\r\n\r\n")
						for part := range slices.Chunk(body, chunk) {
							fmt.Fprintf(&out, "%x\r\n%s\r\n", len(part), part)
						}
						out.WriteString("0\r\n\r\n")
					}
					o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
						if _, err := http.ReadRequest(r); err != nil {
							return
						}
						n, _ := c.Write(out.Bytes()[:min(early, out.Len())])
						time.Sleep(20 * time.Millisecond)
						c.Write(out.Bytes()[n:])
					})
					g.register(t, "echo", "1", o.url())
					c := g.dial(t)
					c.send(toHTTP11)
					response, err := http.ReadResponse(c.r, nil)
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(response.Body)
					if err != nil || response.StatusCode != 200 || !bytes.Equal(got, body) {
						t.Errorf("%d: %d of %d bytes, %v", response.StatusCode, len(got), len(body), err)
					}
				})
			}
		}
	}
}

// Who is slow holds little: an upload and a stream that come in small pieces need no larger buffers than they began with.
func TestSlowOnesHoldLittle(t *testing.T) {
	const pieces, size = 200, 500
	piece := filler(size)
	var mu sync.Mutex // guards what follows
	var made []*workspace
	larger := 0
	g := startGateway(t, nil, nil)
	anew := g.workspaces.New
	g.workspaces.New = func() any {
		mu.Lock()
		defer mu.Unlock()
		made = append(made, anew().(*workspace))
		return made[len(made)-1]
	}
	large := g.large.New
	g.large.New = func() any {
		mu.Lock()
		defer mu.Unlock()
		larger++
		return large()
	}
	arrived := make(chan struct{}) // a piece has, so that the next one comes alone
	o := startOrigin(t, func(_ *origin, c net.Conn, r *bufio.Reader) {
		request, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		for range pieces {
			if _, err := io.ReadFull(request.Body, make([]byte, size)); err != nil {
				return
			}
			select {
			case arrived <- struct{}{}:
			case <-t.Context().Done():
				return
			}
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		for range pieces {
			fmt.Fprintf(c, "%x\r\n%s\r\n", size, piece)
			select {
			case <-arrived:
			case <-t.Context().Done():
				return
			}
		}
		io.WriteString(c, "0\r\n\r\n")
	})
	g.register(t, "echo", "1", o.url())
	c := g.dial(t)
	c.send(fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", pieces*size))
	for range pieces {
		c.send(piece)
		<-arrived
	}
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	for n := range pieces {
		got := make([]byte, size)
		if _, err := io.ReadFull(response.Body, got); err != nil || string(got) != piece {
			t.Fatalf("piece %d: %q, %v", n, got, err)
		}
		arrived <- struct{}{}
	}
	if rest, err := io.ReadAll(response.Body); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
	c.Close()
	g.idle(t)
	mu.Lock()
	defer mu.Unlock()
	if larger > 0 {
		t.Errorf("%d larger buffers were used", larger)
	}
	for _, w := range made {
		if len(w.in.b) > firstRequest {
			t.Errorf("a workspace has come to hold %d bytes", len(w.in.b))
		}
	}
}
