package loop

import (
	"bytes"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// handler is a Handler made of functions; those that are nil do nothing.
type handler struct {
	ready  func(Events)
	failed func(any)
}

func (h *handler) Ready(e Events) {
	if h.ready != nil {
		h.ready(e)
	}
}

func (h *handler) Failed(failure any) {
	if h.failed != nil {
		h.failed(failure)
	}
}

// startGroup starts loops that end with the test.
func startGroup(t testing.TB, n int) *Group {
	t.Helper()
	g, err := New(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

// tcpPair returns both ends of a new connection over the loopback.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	out, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	in, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	in.SetDeadline(time.Now().Add(20 * time.Second))
	return out.(*net.TCPConn), in.(*net.TCPConn)
}

// pair returns a socket that is held, and its peer; both are closed with the test.
func pair(t testing.TB, l *Loop) (*Socket, *net.TCPConn) {
	t.Helper()
	near, far := tcpPair(t)
	s, err := take(l, near)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); far.Close() })
	return s, far
}

// eventually polls a condition for up to ten seconds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// parked counts the goroutines that wait for a socket.
func parked() int {
	buf := make([]byte, 4<<20)
	n := 0
	for _, g := range bytes.Split(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
		head, _, _ := bytes.Cut(g, []byte("\n"))
		if bytes.Contains(g, []byte("loop.(*side).wait(")) && bytes.Contains(head, []byte("[select")) {
			n++
		}
	}
	return n
}

// awaitParked waits until n goroutines wait for sockets.
func awaitParked(t testing.TB, n int) {
	t.Helper()
	eventually(t, "goroutines wait for sockets", func() bool { return parked() == n })
}

// fill writes until nothing more fits into the sockets, and returns how much that was.
func fill(t testing.TB, s *Socket) (n int) {
	t.Helper()
	block := make([]byte, 64<<10)
	for quiet := 0; quiet < 3; { // what the kernel moves to the peer's side leaves room for more
		m, err := s.TryWrite(block)
		switch {
		case err == ErrAgain:
			quiet++
			time.Sleep(5 * time.Millisecond)
		case err != nil:
			t.Fatal(err)
		default:
			n += m
			quiet = 0
		}
	}
	return n
}

// descriptors counts the open descriptors of the process.
func descriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		if to, err := os.Readlink("/proc/self/fd/" + name.Name()); err == nil && !strings.HasPrefix(to, "/proc/") {
			n++
		}
	}
	return n
}

// take makes a Socket of a connection, which is closed: its descriptor lives on in the Socket. It is held.
func take(l *Loop, conn *net.TCPConn) (*Socket, error) {
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err := duplicate(raw)
	if err != nil {
		return nil, err
	}
	return l.Watch(fd, conn.RemoteAddr().(*net.TCPAddr).AddrPort(), nil, true)
}
