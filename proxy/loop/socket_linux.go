package loop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrAgain says that a socket is not ready.
var ErrAgain = errors.New("not ready")

// Socket is a TCP connection that a loop watches, or what a Listener accepts from. It is a net.Conn for the goroutine that holds it.
type Socket struct {
	fd         int
	generation uint32 // tells it from others that had its descriptor
	loop       *Loop
	handler    Handler
	remote     netip.AddrPort
	held       atomic.Bool // by a goroutine
	waits      *waits      // nil until first held

	connecting bool // Connected has not said anything but ErrAgain yet

	again    bool        // it is in loop.again
	ended    bool        // Read has found the end of the stream
	due      Events      // not 0: it is in loop.later
	abortive atomic.Bool // closing does not shut down: it resets the connection, or leaves a Listener's to others that have it
	closed   atomic.Bool
	users    atomic.Int32 // calls that use the descriptor now, and one until it is closed
	released atomic.Bool  // the descriptor is closed

	hungUp   atomic.Bool
	mu       sync.Mutex // guards what follows
	onHangUp func()
}

// Watch makes a Socket of a non-blocking descriptor, which it owns from then on, and watches it. It is held if held is set:
// its handler may still be nil then, and hears nothing before Forget or Let.
func (l *Loop) Watch(fd int, remote netip.AddrPort, h Handler, held bool) (*Socket, error) {
	s := &Socket{fd: fd, generation: l.group.last.Add(1), loop: l, handler: h, remote: remote}
	s.users.Store(1)
	if held {
		s.Hold()
	}
	if !l.group.table.set(fd, s) {
		unix.Close(fd)
		return nil, fmt.Errorf("descriptor %d: %w", fd, unix.EMFILE)
	}
	ev := unix.EpollEvent{Events: watched, Fd: int32(fd), Pad: int32(s.generation)}
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		s.Close()
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	return s, nil
}

// SetHandler says who is told; while the socket is held, or on its loop.
func (s *Socket) SetHandler(h Handler) { s.handler = h }

// Hold takes the socket from its loop, for a goroutine: the handler is told nothing any more. The caller must own it.
func (s *Socket) Hold() {
	if s.waits == nil {
		s.waits = s.loop.group.waits.Get().(*waits)
	}
	s.held.Store(true)
}

// Let leaves the socket to its loop, from any goroutine. What happened on it before that the handler is not told.
func (s *Socket) Let() { s.held.Store(false) }

// Held says whether a goroutine has it. On its loop.
func (s *Socket) Held() bool { return s.held.Load() }

// Forget is Let on the loop, where nobody else uses the socket: it costs nothing any more then, and has no deadlines.
func (s *Socket) Forget() {
	s.held.Store(false)
	if s.waits != nil {
		s.waits.reset()
		s.loop.group.waits.Put(s.waits)
		s.waits = nil
	}
}

// TryRead reads what has come in; ErrAgain if nothing has. 0 without an error is the end of the stream. For the loop.
func (s *Socket) TryRead(b []byte) (int, error) { return read(s.fd, b) }

// TryWrite writes what there is room for; ErrAgain if there is none. For the loop.
func (s *Socket) TryWrite(b []byte) (int, error) { return write(s.fd, b) }

// Again has the handler called once more, as if something had come in, after those of the other sockets on which something
// has happened: for one that has more to do than it should do at a time. For the loop.
func (s *Socket) Again() {
	if !s.again {
		s.again = true
		s.loop.again = append(s.loop.again, s)
	}
}

// Peek looks at what has come in without taking it: the number of bytes (1 means one or more), 0 at the end of the stream
// or on an error, -1 if there is nothing.
func (s *Socket) Peek() int {
	if !s.enter() {
		return 0
	}
	defer s.leave()
	return peek(s.fd)
}

// HungUp says that the peer has ended its stream, even if not all of that was read yet, or that the connection is lost.
func (s *Socket) HungUp() bool { return s.hungUp.Load() }

// OnHangUp has f called on the loop when HungUp turns true, or says so again; not if it was true before the call. nil is
// nobody, and f does not run any more when OnHangUp returns. f must not wait.
func (s *Socket) OnHangUp(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onHangUp = f
}

func (s *Socket) hangUp() {
	s.hungUp.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.onHangUp != nil {
		s.onHangUp()
	}
}

// Lost reports whether nothing that is sent can reach the peer any more: the connection is reset, or closed in both
// directions.
func (s *Socket) Lost() bool {
	if !s.enter() {
		return true
	}
	defer s.leave()
	fds := []unix.PollFd{{Fd: int32(s.fd)}} // POLLERR and POLLHUP are always looked for
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
}

// Queued is how many bytes were written that the peer has not acknowledged; -1 if the socket is closed.
func (s *Socket) Queued() int {
	if !s.enter() {
		return -1
	}
	defer s.leave()
	n, err := unix.IoctlGetInt(s.fd, unix.SIOCOUTQ)
	if err != nil {
		return -1
	}
	return n
}

// enter keeps the descriptor open until leave; false if it is closed.
func (s *Socket) enter() bool {
	s.users.Add(1)
	if s.closed.Load() {
		s.leave()
		return false
	}
	return true
}

func (s *Socket) leave() {
	if s.users.Add(-1) == 0 && s.released.CompareAndSwap(false, true) {
		s.loop.group.table.set(s.fd, nil) // before another connection can get the descriptor
		unix.Close(s.fd)
	}
}

// Close closes the connection. Calls under way in other goroutines return net.ErrClosed.
func (s *Socket) Close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	if s.users.Load() > 1 && !s.abortive.Load() {
		unix.Shutdown(s.fd, unix.SHUT_RDWR) // now, not when they have left
	}
	if s.held.Load() {
		s.waits.wake(Readable | Writable)
	}
	if s.waits != nil {
		s.waits.stop() // a timer would keep them until the deadline
	}
	s.leave()
	return nil
}

// Read reads what has come in, or waits for it until the read deadline. For who holds the socket, as all that follows.
func (s *Socket) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if !s.enter() {
		return 0, net.ErrClosed
	}
	defer s.leave()
	for !s.waits.in.passed() {
		n, err := read(s.fd, b)
		switch {
		case err == ErrAgain:
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			s.ended = true
			return 0, io.EOF
		default:
			return n, nil
		}
		if err := s.await(&s.waits.in); err != nil {
			return 0, err
		}
	}
	return 0, os.ErrDeadlineExceeded
}

// Ended reports whether Read has found the end of the stream: below TLS, that its peer did not say goodbye.
func (s *Socket) Ended() bool { return s.ended }

// Write writes all of b, within the write deadline. When that passes while it waits, it tries once more: a slow peer may
// have made less room than is worth an event.
func (s *Socket) Write(b []byte) (int, error) {
	return s.push(len(b), func(done int) (int, error) {
		n, err := write(s.fd, b[done:])
		if err != nil && err != ErrAgain {
			err = os.NewSyscallError("write", err)
		}
		return max(n, 0), err
	})
}

// push calls some, which sends what follows the first done bytes, until all have gone or the write deadline passes.
func (s *Socket) push(all int, some func(done int) (int, error)) (done int, err error) {
	if !s.enter() {
		return 0, net.ErrClosed
	}
	defer s.leave()
	if s.waits.out.passed() {
		return 0, os.ErrDeadlineExceeded
	}
	var late error
	for {
		n, err := some(done)
		if done += n; done == all {
			return done, nil
		}
		if err != nil && err != ErrAgain {
			return done, err
		}
		if late != nil {
			return done, late
		}
		if n > 0 {
			continue // there may be room for more
		}
		if late = s.await(&s.waits.out); late != nil && late != os.ErrDeadlineExceeded {
			return done, late
		}
	}
}

// await waits for readiness of one side.
func (s *Socket) await(side *side) error {
	if err := side.wait(); err != nil {
		return err
	}
	if s.closed.Load() {
		return net.ErrClosed
	}
	return nil
}

// SetDeadline is both of the following.
func (s *Socket) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// SetReadDeadline says until when Read waits; zero: for ever.
func (s *Socket) SetReadDeadline(t time.Time) error { return s.setDeadline(&s.waits.in, t) }

// SetWriteDeadline says until when Write waits; zero: for ever.
func (s *Socket) SetWriteDeadline(t time.Time) error { return s.setDeadline(&s.waits.out, t) }

func (s *Socket) setDeadline(side *side, t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	side.set(t)
	if s.closed.Load() { // meanwhile
		side.set(time.Time{})
	}
	return nil
}

// CloseRead and CloseWrite end one direction. They may be called by anybody.
func (s *Socket) CloseRead() error { return s.shutdown(unix.SHUT_RD) }

// CloseWrite ends the stream to the peer.
func (s *Socket) CloseWrite() error { return s.shutdown(unix.SHUT_WR) }

// SyscallConn gives access to the descriptor, by Control alone.
func (s *Socket) SyscallConn() (syscall.RawConn, error) { return rawConn{s}, nil }

type rawConn struct{ s *Socket }

func (c rawConn) Control(f func(fd uintptr)) error {
	if !c.s.enter() {
		return net.ErrClosed
	}
	defer c.s.leave()
	f(uintptr(c.s.fd))
	return nil
}

func (rawConn) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (rawConn) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// Shutdown ends both directions: who reads finds the end, who writes an error.
func (s *Socket) Shutdown() error { return s.shutdown(unix.SHUT_RDWR) }

func (s *Socket) shutdown(how int) error {
	if !s.enter() {
		return net.ErrClosed
	}
	defer s.leave()
	return os.NewSyscallError("shutdown", unix.Shutdown(s.fd, how))
}

// SetLinger is that of net.TCPConn: 0 makes the next close a reset.
func (s *Socket) SetLinger(seconds int) error {
	if !s.enter() {
		return net.ErrClosed
	}
	defer s.leave()
	linger := unix.Linger{Onoff: 1, Linger: int32(seconds)}
	if seconds < 0 {
		linger = unix.Linger{}
	}
	s.abortive.Store(seconds == 0)
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &linger))
}

// RemoteAddr is the peer's.
func (s *Socket) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.remote) }

// LocalAddr is ours; nil once the socket is closed.
func (s *Socket) LocalAddr() net.Addr {
	if !s.enter() {
		return nil
	}
	defer s.leave()
	name, err := unix.Getsockname(s.fd)
	if err != nil {
		return nil
	}
	return net.TCPAddrFromAddrPort(addrPort(name))
}

func addrPort(name unix.Sockaddr) netip.AddrPort {
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// waits is what the goroutines that hold a socket wait for.
type waits struct{ in, out side }

func newWaits() *waits {
	w := &waits{}
	for _, s := range []*side{&w.in, &w.out} {
		s.ready, s.over = make(chan struct{}, 1), make(chan struct{})
	}
	return w
}

func (w *waits) wake(e Events) {
	if e&(Readable|HangUp) != 0 {
		w.in.wake()
	}
	if e&(Writable|HangUp) != 0 {
		w.out.wake()
	}
}

func (w *waits) stop() {
	w.in.set(time.Time{})
	w.out.set(time.Time{})
}

// reset makes them fit for another socket.
func (w *waits) reset() {
	w.stop()
	for _, s := range []*side{&w.in, &w.out} {
		select {
		case <-s.ready:
		default:
		}
	}
}

// side is one direction of a socket.
type side struct {
	ready chan struct{} // holds one token if something has happened since the last one was taken

	mu    sync.Mutex    // guards what follows
	at    time.Time     // the deadline; zero: none
	over  chan struct{} // closed when it has passed
	timer *time.Timer
}

func (s *side) wake() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// wait returns when something has happened, or os.ErrDeadlineExceeded.
func (s *side) wait() error {
	s.mu.Lock()
	over := s.over
	s.mu.Unlock()
	select {
	case <-s.ready:
		return nil
	case <-over:
		return os.ErrDeadlineExceeded
	}
}

// passed says that the deadline has passed.
func (s *side) passed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.over:
		return true
	default:
		return false
	}
}

// set moves the deadline; a wait under way sees it only if it is over, or was not before.
func (s *side) set(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = t
	select {
	case <-s.over:
		s.over = make(chan struct{})
	default:
	}
	switch d := time.Until(t); {
	case t.IsZero():
		if s.timer != nil {
			s.timer.Stop()
		}
	case d <= 0:
		close(s.over)
	case s.timer == nil:
		s.timer = time.AfterFunc(d, s.fire)
	default:
		s.timer.Reset(d)
	}
}

func (s *side) fire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at.IsZero() || time.Now().Before(s.at) {
		return // it was moved
	}
	select {
	case <-s.over:
	default:
		close(s.over)
	}
}

var _ net.Conn = (*Socket)(nil)

// Listener accepts connections as descriptors that Go's own poller does not know. A loop watches it too: Go's poller is asked
// only when a P has nothing else to do, and every 10 to 20 ms.
type Listener struct {
	socket *Socket
	addr   net.Addr
	mu     sync.Mutex // held by Accept
	begun  bool       // nobody waits who has connected before the options were set
}

// Listen takes over a listener, which is closed: its descriptor lives on in the Listener. Connections inherit their options
// from it: no delay, and keep-alive probes after 15 s as Go's own have.
func (l *Loop) Listen(ln *net.TCPListener) (*Listener, error) {
	defer ln.Close()
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, err := duplicate(raw)
	if err != nil {
		return nil, err
	}
	if err := setOptions(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	s, err := l.Watch(fd, netip.AddrPort{}, nil, true)
	if err != nil {
		return nil, err
	}
	s.abortive.Store(true)
	return &Listener{socket: s, addr: ln.Addr()}, nil
}

// duplicate returns a descriptor of our own for what Go's poller watches.
func duplicate(raw syscall.RawConn) (fd int, err error) {
	failed := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(failed, os.NewSyscallError("fcntl", err))
}

func setOptions(fd int) (err error) {
	for _, o := range [][3]int{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
	} {
		err = errors.Join(err, os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, o[0], o[1], o[2])))
	}
	return err
}

// Accept waits for the next connection. One caller at a time is served.
func (l *Listener) Accept() (fd int, remote netip.AddrPort, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.socket
	if !s.enter() {
		return -1, netip.AddrPort{}, net.ErrClosed
	}
	defer s.leave()
	for {
		fd, name, err := unix.Accept4(s.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case err == unix.EAGAIN:
			l.begun = true
			if err := s.await(&s.waits.in); err != nil {
				return -1, netip.AddrPort{}, err
			}
		case err != nil:
			return -1, netip.AddrPort{}, os.NewSyscallError("accept4", err)
		default:
			if !l.begun {
				_ = setOptions(fd) // one that is reset already fails later
			}
			return fd, addrPort(name), nil
		}
	}
}

// Addr is where it listens.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close ends Accept. When it returns, the address is free again.
func (l *Listener) Close() error {
	err := l.socket.Close()
	l.mu.Lock() // Accept has left the socket
	defer l.mu.Unlock()
	return err
}

// Discard closes a connection that was accepted and that no loop takes.
func Discard(fd int) { unix.Close(fd) }
