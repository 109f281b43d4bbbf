package loop

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A peer that reads slowly gets all bytes, in order, however often the sockets between are full.
func TestWriteToASlowReader(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	s, far := pair(t, l)
	sent := make([]byte, 12<<20)
	mathrand.NewChaCha8([32]byte{}).Read(sent)

	n := 0
	for n < len(sent) { // as a loop does it, until the sockets are full,
		m, err := s.TryWrite(sent[n:min(n+100_000, len(sent))])
		if err == ErrAgain {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	if n == len(sent) {
		t.Fatalf("%d bytes fill no socket here", n)
	}
	wrote := make(chan error, 1)
	go func() { // and then as a goroutine does it
		m, err := s.Write(sent[n:])
		if err == nil && m != len(sent)-n {
			err = io.ErrShortWrite
		}
		wrote <- errors.Join(err, s.CloseWrite())
	}()
	awaitParked(t, 1)
	got := sha256.New()
	size := 0
	for b := make([]byte, 300_000); ; {
		m, err := far.Read(b[:1+mathrand.IntN(len(b))])
		got.Write(b[:m])
		if size += m; err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if want := sha256.Sum256(sent); size != len(sent) || !bytes.Equal(got.Sum(nil), want[:]) {
		t.Errorf("%d bytes of %d came, or others", size, len(sent))
	}
}

// What ends a call under way: a reset, a deadline, Close. Each in Read and in Write.
func TestParkedCallsEnd(t *testing.T) {
	const soon = 30 * time.Millisecond
	for _, row := range []struct {
		name string
		do   func(s *Socket, far *net.TCPConn) error
		want []error // any of them
	}{
		{"reset", func(_ *Socket, far *net.TCPConn) error {
			far.SetLinger(0)
			return far.Close()
		}, []error{syscall.ECONNRESET, syscall.EPIPE}},
		{"closed", func(s *Socket, _ *net.TCPConn) error { return s.Close() }, []error{net.ErrClosed}},
		{"deadline", func(s *Socket, _ *net.TCPConn) error { return s.SetDeadline(time.Now().Add(soon)) }, []error{os.ErrDeadlineExceeded}},
		{"deadline in the past", func(s *Socket, _ *net.TCPConn) error { return s.SetDeadline(time.Unix(1, 0)) }, []error{os.ErrDeadlineExceeded}},
		{"deadline moved closer", func(s *Socket, _ *net.TCPConn) error {
			return errors.Join(s.SetDeadline(time.Now().Add(time.Hour)), s.SetDeadline(time.Now().Add(soon)))
		}, []error{os.ErrDeadlineExceeded}},
		{"both directions shut down", func(s *Socket, _ *net.TCPConn) error {
			return errors.Join(s.CloseWrite(), s.CloseRead())
		}, []error{io.EOF, syscall.EPIPE}},
	} {
		for _, call := range []string{"Read", "Write"} {
			t.Run(row.name+" in "+call, func(t *testing.T) {
				s, far := pair(t, startGroup(t, 1).Loops[0])
				ended := make(chan error, 1)
				if call == "Read" {
					go func() {
						_, err := s.Read(make([]byte, 1))
						ended <- err
					}()
				} else {
					fill(t, s)
					go func() {
						_, err := s.Write(make([]byte, 16<<20))
						ended <- err
					}()
				}
				awaitParked(t, 1)
				if err := row.do(s, far); err != nil {
					t.Fatal(err)
				}
				select {
				case err := <-ended:
					for _, want := range row.want {
						if errors.Is(err, want) {
							return
						}
					}
					t.Errorf("got %v, want one of %v", err, row.want)
				case <-time.After(5 * time.Second):
					t.Error("it goes on waiting")
				}
			})
		}
	}
}

// A deadline is kept: not early, also after it was moved later, and lifted by a later or no deadline.
func TestDeadlines(t *testing.T) {
	s, far := pair(t, startGroup(t, 1).Loops[0])
	one := make([]byte, 1)
	read := func(at time.Time) {
		t.Helper()
		if _, err := s.Read(one); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		if early := time.Until(at); early > 0 {
			t.Errorf("%v early", early)
		}
		var ne net.Error
		if _, err := s.Read(one); !errors.As(err, &ne) || !ne.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a second read says %v", err)
		}
	}

	at := time.Now().Add(30 * time.Millisecond) // set before
	s.SetReadDeadline(at)
	read(at)

	// Moved later while a read is parked, by another goroutine, many times.
	s.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	var last atomic.Pointer[time.Time]
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 40 {
			at := time.Now().Add(20 * time.Millisecond)
			last.Store(&at)
			s.SetReadDeadline(at)
			time.Sleep(2 * time.Millisecond)
		}
	}()
	for {
		_, err := s.Read(one)
		if err == nil {
			t.Fatal("read something")
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		select {
		case <-done:
		default: // the mover was not run for 20 ms
			continue
		}
		break
	}
	read(*last.Load())

	// One that has passed ends reads at once, bytes or no bytes; a new one makes them possible again.
	far.Write([]byte("x"))
	s.SetReadDeadline(time.Unix(1, 0))
	if _, err := s.Read(one); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("behind the deadline: %v", err)
	}
	if n, err := s.Write([]byte("y")); n != 1 || err != nil {
		t.Errorf("a write knows of the deadline of reads: %d, %v", n, err)
	}
	s.SetReadDeadline(time.Now().Add(time.Hour))
	if n, err := s.Read(one); n != 1 || err != nil {
		t.Errorf("with a new deadline: %d, %v", n, err)
	}
	s.SetWriteDeadline(time.Unix(1, 0))
	if _, err := s.Write([]byte("y")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("behind the deadline: %v", err)
	}
	s.SetWriteDeadline(time.Time{})
	if n, err := s.Write([]byte("z")); n != 1 || err != nil {
		t.Errorf("without a deadline: %d, %v", n, err)
	}

	// A deadline that was lifted does not fire.
	s.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	s.SetReadDeadline(time.Time{})
	got := make(chan error, 1)
	go func() { _, err := s.Read(one); got <- err }()
	select {
	case err := <-got:
		t.Fatalf("ended with %v", err)
	case <-time.After(40 * time.Millisecond):
	}
	far.Write([]byte("x"))
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// A deadline set from many goroutines while reads run is a deadline, and no data race.
func TestDeadlinesFromAllSides(t *testing.T) {
	s, far := pair(t, startGroup(t, 1).Loops[0])
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for i := range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				s.SetDeadline([]time.Time{{}, time.Unix(1, 0), time.Now().Add(time.Millisecond), time.Now().Add(time.Hour)}[(i+mathrand.IntN(4))%4])
			}
		})
	}
	wg.Go(func() {
		for i := range 2000 {
			if _, err := far.Write([]byte{byte(i)}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	b := make([]byte, 64)
	for next := 0; next < 2000; {
		n, err := s.Read(b)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		for _, got := range b[:n] {
			if got != byte(next) {
				t.Fatalf("byte %d is %d", next, got)
			}
			next++
		}
	}
	close(stop)
	wg.Wait()
}

// A closed socket leaves no timer: one would keep it in memory until its deadline.
func TestCloseStopsTimers(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	for _, held := range []bool{true, false} {
		s, _ := pair(t, l)
		s.SetHandler(&handler{})
		if err := s.SetDeadline(time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		sides := []*side{&s.waits.in, &s.waits.out}
		if !held {
			s.Let()
		}
		s.Close()
		for i, side := range sides {
			if side.timer.Stop() {
				t.Errorf("held %v: the timer of side %d still ran", held, i)
			}
		}
		if err := s.SetDeadline(time.Now().Add(time.Hour)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a deadline of a closed socket: %v", err)
		}
	}
}

// Forget on the loop leaves nothing of what a goroutine needed.
func TestForget(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	events := make(chan Events, 10)
	s, far := pair(t, l)
	s.SetHandler(&handler{ready: func(e Events) { events <- e }})
	s.SetDeadline(time.Now().Add(time.Hour))
	waits := s.waits
	l.Call(s.Forget)
	if waits.in.timer.Stop() || waits.out.timer.Stop() {
		t.Error("a timer still ran")
	}
	if s.waits != nil || s.Held() {
		t.Error("it is held, or has what a goroutine needs")
	}
	far.Write([]byte("x"))
	if e := <-events; e&Readable == 0 {
		t.Errorf("the handler was told %x", e)
	}
}

// What is called on a closed socket says so, and touches no descriptor.
func TestClosed(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	s, _ := pair(t, l)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, readErr := s.Read(make([]byte, 1))
	_, writeErr := s.Write([]byte("x"))
	for name, err := range map[string]error{
		"Close": s.Close(), "Read": readErr, "Write": writeErr, "CloseRead": s.CloseRead(), "CloseWrite": s.CloseWrite(),
		"SetLinger": s.SetLinger(0), "SetDeadline": s.SetDeadline(time.Now()),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !s.Lost() || s.Peek() != 0 || s.LocalAddr() != nil {
		t.Error("it is gone, has ended, and has no address")
	}
	if s.RemoteAddr() == nil {
		t.Error("its peer's address is forgotten")
	}
}

// Many sockets are opened, used and closed at once, by several goroutines each, so that descriptors are soon used again:
// no byte goes to, or comes from, the connection of another.
func TestDescriptorReuse(t *testing.T) {
	g := startGroup(t, 2)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	var wg sync.WaitGroup
	var next atomic.Uint64
	for i := range 8 {
		l := g.Loops[i%2]
		wg.Go(func() {
			for range rounds {
				id := next.Add(1)
				near, far := tcpPair(t)
				s, err := take(l, near)
				if err != nil {
					t.Error(err)
					return
				}
				s.SetHandler(&handler{ready: func(Events) { s.Peek() }})
				closing := make(chan struct{})
				var users sync.WaitGroup
				// Both ends say their number again and again, and look at the other's.
				users.Go(func() { writeNumbers(s, id) })
				users.Go(func() { writeNumbers(far, id) })
				users.Go(func() { readNumbers(t, s, id) })
				users.Go(func() { readNumbers(t, far, id) })
				users.Go(func() {
					for {
						s.Lost()
						s.HungUp()
						s.OnHangUp(func() {})
						s.Peek()
						s.LocalAddr()
						s.SetDeadline(time.Now().Add(time.Second))
						select {
						case <-closing:
							return
						default:
						}
					}
				})
				time.Sleep(time.Duration(mathrand.IntN(1000)) * time.Microsecond)
				switch mathrand.IntN(4) {
				case 0:
					s.CloseWrite()
				case 1:
					s.SetLinger(0)
				}
				if mathrand.IntN(2) == 0 {
					go s.Close() // one of the two is first
				}
				s.Close()
				close(closing)
				far.SetLinger(0)
				far.Close()
				users.Wait()
			}
		})
	}
	wg.Wait()
}

func writeNumbers(w io.Writer, id uint64) {
	b := bytes.Repeat(binary.BigEndian.AppendUint64(nil, id), 64)
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

func readNumbers(t *testing.T, r io.Reader, id uint64) {
	var b [8]byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return
		}
		if got := binary.BigEndian.Uint64(b[:]); got != id {
			t.Errorf("connection %d got a number of %d", id, got)
			return
		}
	}
}

// A peer that has ended its stream has hung up, whether bytes wait or not; one whose connection is reset is lost too.
func TestHangUpAndPeek(t *testing.T) {
	reset := func(far *net.TCPConn) { far.SetLinger(0); far.Close() }
	bytes := func(far *net.TCPConn) { far.Write([]byte("bytes")) }
	for _, row := range []struct {
		name string
		do   []func(far *net.TCPConn)
		peek int
		hung bool
		lost bool
	}{
		{"nothing", nil, -1, false, false},
		{"bytes", []func(*net.TCPConn){bytes}, 1, false, false},
		{"end of stream", []func(*net.TCPConn){func(far *net.TCPConn) { far.CloseWrite() }}, 0, true, false},
		{"closed", []func(*net.TCPConn){func(far *net.TCPConn) { far.Close() }}, 0, true, false},
		{"end of stream behind bytes", []func(*net.TCPConn){bytes, func(far *net.TCPConn) { far.CloseWrite() }}, 1, true, false},
		{"reset", []func(*net.TCPConn){reset}, 0, true, true},
		{"reset behind bytes", []func(*net.TCPConn){bytes, reset}, 1, true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			s, far := pair(t, startGroup(t, 1).Loops[0])
			var told atomic.Int32
			s.OnHangUp(func() { told.Add(1) })
			for _, f := range row.do {
				f(far)
			}
			// A reset drops what was not read, or leaves it: Linux leaves it.
			eventually(t, "peek and hang-up", func() bool {
				return s.HungUp() == row.hung && s.Lost() == row.lost && (told.Load() > 0) == row.hung &&
					(s.Peek() == row.peek || row.lost && s.Peek() >= 0)
			})
			for range 3 { // looking changes nothing, but that a reset is told of once
				if s.HungUp() != row.hung || s.Lost() != row.lost {
					t.Errorf("hung up %v, lost %v", !row.hung, !row.lost)
				}
			}
			if row.peek == 1 && !row.lost {
				b := make([]byte, 10)
				if n, err := s.Read(b); n != 5 || err != nil {
					t.Errorf("then read %d, %v", n, err)
				}
			}
		})
	}
}

func TestHalfClose(t *testing.T) {
	s, far := pair(t, startGroup(t, 1).Loops[0])
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(far); len(b) > 0 || err != nil {
		t.Errorf("the peer reads %q, %v", b, err)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a write behind CloseWrite: %v", err)
	}
	far.Write([]byte("still"))
	b := make([]byte, 10)
	if n, err := s.Read(b); string(b[:n]) != "still" {
		t.Errorf("read %q, %v", b[:n], err)
	}
	read := make(chan error, 1)
	go func() { _, err := s.Read(b); read <- err }()
	awaitParked(t, 1)
	if err := s.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != io.EOF {
		t.Errorf("read behind CloseRead: %v", err)
	}
}

// The error of a reset is told once: who reads behind a write that got it finds an end.
func TestResetTakenByWrite(t *testing.T) {
	s, far := pair(t, startGroup(t, 1).Loops[0])
	far.SetLinger(0)
	far.Close()
	eventually(t, "it is lost", s.Lost)
	if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the write got %v", err)
	}
	if s.Ended() {
		t.Error("nobody has read an end")
	}
	if _, err := s.Read(make([]byte, 1)); err != io.EOF || !s.Ended() || !s.Lost() {
		t.Errorf("the read got %v; ended %v, lost %v", err, s.Ended(), s.Lost())
	}
}

func TestLinger(t *testing.T) {
	for _, row := range []struct {
		seconds int
		want    error
	}{{0, syscall.ECONNRESET}, {-1, nil}} {
		s, far := pair(t, startGroup(t, 1).Loops[0])
		if err := s.SetLinger(row.seconds); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if _, err := io.ReadAll(far); !errors.Is(err, row.want) {
			t.Errorf("linger %d: the peer got %v, want %v", row.seconds, err, row.want)
		}
	}
}

func TestAddresses(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	for _, host := range []string{"127.0.0.1", "::1"} {
		ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Logf("no %s here: %v", host, err)
			continue
		}
		defer ln.Close()
		near, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		local, remote := near.LocalAddr().String(), near.RemoteAddr().String()
		s, err := take(l, near.(*net.TCPConn))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if s.LocalAddr().String() != local || s.RemoteAddr().String() != remote {
			t.Errorf("%v to %v, want %v to %v", s.LocalAddr(), s.RemoteAddr(), local, remote)
		}
		if err := near.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the connection that was taken: %v", err)
		}
	}
}

// TLS runs over sockets, on both sides.
func TestTLS(t *testing.T) {
	g := startGroup(t, 2)
	near, far := tcpPair(t)
	client, err := take(g.Loops[0], near)
	if err != nil {
		t.Fatal(err)
	}
	server, err := take(g.Loops[1], far)
	if err != nil {
		t.Fatal(err)
	}
	certificate := selfSigned(t)
	out := tls.Client(client, &tls.Config{InsecureSkipVerify: true})
	in := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{certificate}})
	sent := make([]byte, 8<<20)
	mathrand.NewChaCha8([32]byte{1}).Read(sent)
	var wg sync.WaitGroup
	for _, c := range []*tls.Conn{out, in} { // both ways at once
		c.SetDeadline(time.Now().Add(30 * time.Second))
		wg.Go(func() {
			if _, err := c.Write(sent); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%v, or other bytes", err)
			}
		})
	}
	wg.Wait()
	out.SetReadDeadline(time.Unix(1, 0))
	if _, err := out.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("behind the deadline: %v", err)
	}
	out.SetReadDeadline(time.Time{}) // a deadline leaves the state of TLS whole
	go in.Write([]byte("more"))
	if b := make([]byte, 4); true {
		if _, err := io.ReadFull(out, b); err != nil || string(b) != "more" {
			t.Errorf("%q, %v", b, err)
		}
	}
	read := make(chan error, 1)
	go func() { _, err := in.Read(make([]byte, 1)); read <- err }()
	awaitParked(t, 1)
	out.Close()
	if err := <-read; err != io.EOF {
		t.Errorf("the other side got %v", err)
	}
	in.Close()
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Listen fails cleanly on a listener that is closed.
func TestListenClosed(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if l, err := startGroup(t, 1).Loops[0].Listen(ln.(*net.TCPListener)); err == nil {
		t.Errorf("took %v", l)
	}
}

// Empty reads and writes wait for nothing.
func TestEmptyCalls(t *testing.T) {
	s, _ := pair(t, startGroup(t, 1).Loops[0])
	for _, b := range [][]byte{nil, {}} {
		if n, err := s.Read(b); n != 0 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		if n, err := s.Write(b); n != 0 || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
	}
}

// Connections inherit from their listener no delay and keep-alive probes; those that were there before it was taken over
// get them. Its end ends Accept, and the address is free then.
func TestListener(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connect := func() net.Addr {
		t.Helper()
		near, err := net.Dial("tcp", tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { near.Close() })
		return near.LocalAddr()
	}
	peers := []net.Addr{connect(), connect(), connect()}
	l, err := startGroup(t, 1).Loops[0].Listen(tcp.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	if err := tcp.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener that was taken over: %v", err)
	}
	peers = append(peers, connect())
	for i := range 6 {
		if i >= len(peers) {
			peers = append(peers, connect()) // nobody waits before it
		}
		fd, remote, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(fd)
		if remote != peers[i].(*net.TCPAddr).AddrPort() {
			t.Errorf("%d: accepted %v, want %v", i, remote, peers[i])
		}
		for _, row := range []struct {
			name                string
			level, option, want int
		}{
			{"TCP_NODELAY", syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
			{"TCP_KEEPINTVL", syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 15},
		} {
			if got, err := syscall.GetsockoptInt(fd, row.level, row.option); got != row.want || err != nil {
				t.Errorf("%d: %s is %d, %v, want %d", i, row.name, got, err, row.want)
			}
		}
		flags, _, _ := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFL, 0)
		if flags&syscall.O_NONBLOCK == 0 {
			t.Error("the connection blocks")
		}
		flags, _, _ = syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		if flags&syscall.FD_CLOEXEC == 0 {
			t.Error("the connection is handed to other programs")
		}
	}

	ended := make(chan error, 1)
	go func() { _, _, err := l.Accept(); ended <- err }()
	eventually(t, "it waits", func() bool {
		buf := make([]byte, 1<<20)
		return bytes.Contains(buf[:runtime.Stack(buf, true)], []byte("loop.(*Listener).Accept("))
	})
	l.Close()
	if again, err := net.Listen("tcp", tcp.Addr().String()); err != nil {
		t.Error(err)
	} else {
		again.Close()
	}
	select {
	case err := <-ended:
		if err == nil || errors.Is(err, syscall.EAGAIN) {
			t.Errorf("Accept ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Accept goes on")
	}
}

// A socket that a loop and goroutines use in turns misses nothing: not where it changes hands either.
func TestChangingHands(t *testing.T) {
	g := startGroup(t, 2)
	const connections, messages = 8, 1500
	var wg sync.WaitGroup
	for i := range connections {
		l := g.Loops[i%2]
		far := echoChangingHands(t, l)
		wg.Go(func() {
			for n := range messages {
				want := fmt.Sprintf("%d of %d %s", n, i, strings.Repeat("x", mathrand.IntN(200)))
				if mathrand.IntN(4) == 0 { // in two segments
					far.Write([]byte(want[:3]))
					far.Write([]byte(want[3:]))
				} else {
					far.Write([]byte(want))
				}
				got := make([]byte, len(want))
				if k, err := io.ReadFull(far, got); err != nil || string(got) != want {
					t.Errorf("message %d of %d: %q, %v", n, i, got[:k], err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// echoChangingHands returns the peer of a socket that sends back what it gets, partly on its loop, partly in goroutines,
// which give it back as the package says.
func echoChangingHands(t *testing.T, l *Loop) *net.TCPConn {
	h := &handler{}
	s, far := pair(t, l)
	t.Cleanup(func() { l.Call(func() { s.Close() }) }) // where it changes hands
	s.SetHandler(h)
	b := make([]byte, 64)
	var step func()
	h.ready = func(e Events) {
		if e&(Readable|HangUp) != 0 {
			step()
		}
	}
	step = func() {
		for {
			if mathrand.IntN(3) == 0 {
				s.Hold()
				go func() {
					if mathrand.IntN(2) == 0 { // wait for something, or not
						n, err := s.Read(b)
						if err != nil {
							return
						}
						s.Write(b[:n])
					}
					l.Do(func() {
						s.Forget()
						step() // events that came in the meantime were not told
					})
				}()
				return
			}
			n, err := s.TryRead(b)
			if err != nil || n == 0 {
				return
			}
			if _, err := s.TryWrite(b[:n]); err != nil {
				t.Error(err)
			}
			if n < len(b) {
				return
			}
		}
	}
	l.Do(func() {
		s.Forget()
		step()
	})
	return far
}

// The generation of a socket tells it from others of its descriptor: what happened on one that is closed is told nobody.
func TestEventsOfTheClosed(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	for range 20 {
		wrong := make(chan string, 10)
		first, far1 := pair(t, l)
		second, far2 := pair(t, l)
		quiet, peer := tcpPair(t) // nothing happens on it
		defer peer.Close()
		var third *Socket
		var hit bool
		closes := func(other *Socket) *handler {
			return &handler{ready: func(e Events) {
				if e&Readable == 0 || third != nil {
					return
				}
				other.Close()
				s, err := take(l, quiet)
				if err != nil {
					wrong <- err.Error()
					return
				}
				third, hit = s, s.fd == other.fd
				s.SetHandler(&handler{ready: func(e Events) {
					if e&(Readable|HangUp) != 0 {
						wrong <- fmt.Sprintf("the third was told %x", e)
					}
				}})
				s.Let()
			}}
		}
		first.SetHandler(closes(second))
		second.SetHandler(closes(first))
		first.Let()
		second.Let()
		// Both become readable while the loop is busy: their events come together, and one of the handlers closes the other.
		busy := make(chan struct{})
		l.Do(func() { <-busy })
		far1.Write([]byte("x"))
		far2.Write([]byte("x"))
		close(busy)
		eventually(t, "a third socket", func() (there bool) { l.Call(func() { there = third != nil }); return there })
		l.Call(func() {})
		l.Call(func() { third.Close() })
		select {
		case what := <-wrong:
			t.Fatal(what)
		default:
		}
		if hit {
			return
		}
	}
	t.Log("no descriptor was used again at once")
}

// A write whose deadline passes takes what room there is by then, even if it is too little for an event.
func TestWriteTriesAtItsEnd(t *testing.T) {
	s, far := pair(t, startGroup(t, 1).Loops[0])
	fill(t, s)
	wrote := make(chan int)
	go func() {
		s.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := s.Write(make([]byte, 32<<20))
		if err != os.ErrDeadlineExceeded {
			t.Error(err)
		}
		wrote <- n
	}()
	io.ReadFull(far, make([]byte, 256<<10))
	if n := <-wrote; n == 0 {
		t.Error("nothing was written, though there was room")
	}
}
