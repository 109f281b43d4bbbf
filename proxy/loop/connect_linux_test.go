package loop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// deaf is an address at which connections are never accepted: the queue of its listener is full, and it drops what comes.
func deaf(t testing.TB) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		t.Cleanup(func() { unix.Close(fd) })
		err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := addrPort(name)
	for range 3 { // it takes one more than its queue is long
		if conn, err := net.DialTimeout("tcp", to.String(), 100*time.Millisecond); err == nil {
			t.Cleanup(func() { conn.Close() })
		}
	}
	return to
}

func listening(t testing.TB, network, addr string) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener), ln.Addr().(*net.TCPAddr).AddrPort()
}

// A goroutine gets a connection, or why there is none, by the time that it names.
func TestConnect(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	before := descriptors(t)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, to := listening(t, "tcp", addr)
		s, err := l.Connect(to, nil, true)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.AwaitConnected(time.Now().Add(10 * time.Second)); err != nil || s.Connecting() {
			t.Fatalf("%s: %v", to, err)
		}
		far, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if s.LocalAddr().String() != far.RemoteAddr().String() || s.RemoteAddr().String() != far.LocalAddr().String() {
			t.Errorf("%v to %v, there %v from %v", s.LocalAddr(), s.RemoteAddr(), far.LocalAddr(), far.RemoteAddr())
		}
		go io.Copy(struct{ io.Writer }{far}, far) // not by splice, whose pipes stay a while
		echoed := make([]byte, 5)
		if _, err := s.Write([]byte("hello")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(s, echoed); err != nil || string(echoed) != "hello" {
			t.Errorf("%q, %v", echoed, err)
		}
		s.Close()
		far.Close()
		ln.Close()
		if s, err = l.Connect(to, nil, true); err == nil {
			err = s.AwaitConnected(time.Now().Add(10 * time.Second))
			s.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens at %s: %v", to, err)
		}
	}
	eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })

	s, err := l.Connect(deaf(t), nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	began := time.Now()
	if err := s.AwaitConnected(began.Add(100 * time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) || !s.Connecting() {
		t.Errorf("a deaf one: %v", err)
	}
	if took := time.Since(began); took < 100*time.Millisecond || took > time.Second {
		t.Errorf("a deaf one: after %v", took)
	}
	go func() { time.Sleep(10 * time.Millisecond); s.Close() }() // while it waits
	if err := s.AwaitConnected(began.Add(time.Minute)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed while it waits: %v", err)
	}
}

// A peer that resets what it has just accepted was there: who writes or reads hears of it.
func TestConnectedAndReset(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	ln, to := listening(t, "tcp", "127.0.0.1:0")
	s, err := l.Connect(to, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	far.(*net.TCPConn).SetLinger(0)
	far.Close()
	eventually(t, "the reset is there", s.Lost)
	if err := s.AwaitConnected(time.Now().Add(10 * time.Second)); err != nil {
		t.Errorf("connected: %v", err)
	}
	if _, err := s.Write([]byte("x")); err == nil {
		t.Error("written")
	}
}

// A handler on the loop hears when the connection has come about.
func TestConnectOnLoop(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	_, to := listening(t, "tcp", "127.0.0.1:0")
	var calls, connected atomic.Int32
	l.Call(func() {
		h := &handler{}
		s, err := l.Connect(to, h, false)
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { s.Close() })
		h.ready = func(Events) {
			if calls.Add(1); s.Connecting() && s.Connected() == nil {
				connected.Add(1)
			}
		}
	})
	eventually(t, "it is connected", func() bool { return connected.Load() == 1 })
	if calls.Load() != 1 {
		t.Errorf("told %d times", calls.Load())
	}
}

// A connection to a port of this machine may find itself: that is nobody who listens.
func TestConnectedWithItself(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	ln, to := listening(t, "tcp", "127.0.0.1:0")
	ln.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	name := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(to.Port())}
	if err := errors.Join(unix.Bind(fd, name), unix.Connect(fd, name), unix.SetNonblock(fd, true)); err != nil {
		t.Fatal(err)
	}
	s, err := l.Watch(fd, to, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.connecting = true
	if err := s.Connected(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connected with itself: %v", err)
	}
}

// Of many goroutines that become ready at once a loop wakes some at a time, and serves what is its own in between.
func TestTurns(t *testing.T) {
	const many = 500
	l := startGroup(t, 1).Loops[0]
	echo, far := pair(t, l)
	echo.SetHandler(&handler{ready: func(Events) {
		b := make([]byte, 10)
		if n, err := echo.TryRead(b); err == nil {
			echo.TryWrite(b[:n])
		}
	}})
	echo.Let()
	var most, begun, ended atomic.Int32
	l.Call(func() {
		for range many {
			l.Go(func() {
				begun.Add(1)
				for end := time.Now().Add(200 * time.Microsecond); time.Now().Before(end); {
				}
				ended.Add(1)
			})
			most.Store(max(most.Load(), begun.Load()))
		}
	})
	one := []byte("x")
	for ended.Load() < many {
		before := begun.Load()
		if _, err := far.Write(one); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(far, one); err != nil {
			t.Fatal(err)
		}
		if passed := begun.Load() - before; passed > many/2 {
			t.Errorf("%d goroutines went first", passed)
		}
	}
	if most.Load() > many/2 {
		t.Errorf("%d were made ready at once", most.Load())
	}

	// Those that hold sockets are woken in the order of what happened, and none is forgotten; not by a loop that ends either.
	var woken atomic.Int32
	for range 100 {
		s, far := pair(t, l)
		go func() {
			buf := make([]byte, 1)
			if n, err := s.Read(buf); n == 1 && err == nil && bytes.Equal(buf, one) {
				woken.Add(1)
			}
		}()
		if _, err := far.Write(one); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all have read", func() bool { return woken.Load() == 100 })
	g, err := New(1, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.Loops[0].Do(func() {
		for range many {
			g.Loops[0].Go(func() { woken.Add(1) })
		}
	})
	g.Close()
	eventually(t, "the last ones have run", func() bool { return woken.Load() == 100+many })
}
