package health

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockets run checks over plain TCP, all in the goroutine of the Checker, which looks at them now and then and never waits for
// one: what wakes a goroutine for each step of a check costs more than the check.
//
// They are watched edge-triggered: each event is a reason to read until nothing is left, or until nothing more is wanted. A
// socket whose connection has ended is used for the next one: to make a socket and to close it is a third of a check of tcp.
type sockets struct {
	checker    *Checker
	epoll      int
	open       map[int32]*socket // by descriptor
	under      int               // how many of them are not idle
	spare      [2][]descriptor   // without a connection: for IPv4 and for IPv6
	generation uint32
	events     [256]unix.EpollEvent
	buf        [8 << 10]byte
}

// spares is how many sockets without a connection are kept of each kind.
const spares = 64

// descriptor is a socket of the system.
type descriptor struct {
	fd         int
	generation uint32 // tells it from one that had its number before
	kind       int    // which of the spare ones it may join
}

// socket is the connection of a watch. The zero value is none.
type socket struct {
	descriptor
	watch  *Watch
	stage  stage
	reused bool             // it has had an answer before
	addrs  []netip.AddrPort // connecting: the others to try
	failed error            // of the first one that was tried
	end    time.Time        // of the check
	head   []byte           // of an answer that did not come whole
	body   int              // draining: bytes to come
}

type stage int

const (
	none stage = iota
	connecting
	asked    // waiting for the head of an answer
	draining // the check has ended, its answer has not
	idle
)

func newSockets(c *Checker) *sockets {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil
	}
	return &sockets{checker: c, epoll: epoll, open: map[int32]*socket{}}
}

// close closes all connections.
func (k *sockets) close() {
	if k == nil {
		return
	}
	for _, s := range k.open {
		k.end(s)
	}
	k.trim()
	unix.Close(k.epoll)
}

// trim closes what is kept for later.
func (k *sockets) trim() {
	if k == nil {
		return
	}
	for i := range k.spare {
		for _, d := range k.spare[i] {
			unix.Close(d.fd)
		}
		k.spare[i] = nil
	}
}

// busy says that something is under way.
func (k *sockets) busy() bool { return k != nil && k.under > 0 }

// drop closes the connection of a watch that has ended.
func (k *sockets) drop(w *Watch) {
	if k != nil {
		k.end(&w.conn)
	}
}

// end closes a connection if there is one, by a reset: neither side keeps a trace of it for a minute.
func (k *sockets) end(s *socket) {
	if s.stage == none {
		return
	}
	if s.stage != idle {
		k.under--
	}
	delete(k.open, int32(s.fd))
	if len(k.spare[s.kind]) < spares && disconnect(s.fd) == nil {
		k.spare[s.kind] = append(k.spare[s.kind], s.descriptor)
	} else {
		unix.Close(s.fd)
	}
	s.stage, s.head = none, nil
}

// disconnect makes a socket as if it had never been connected; it resets the connection.
func disconnect(fd int) error {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	return connect(fd, unsafe.Pointer(&nowhere), unsafe.Sizeof(nowhere))
}

// connect is connect(2). It does not tell the scheduler: it never waits, and telling costs as much as a tenth of it.
func connect(fd int, to unsafe.Pointer, size uintptr) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(to), size); errno != 0 {
		return errno
	}
	return nil
}

// connectTo begins to connect to an address of the socket's family.
func connectTo(fd int, ap netip.AddrPort) error {
	var bytes [2]byte
	binary.BigEndian.PutUint16(bytes[:], ap.Port())
	port := binary.NativeEndian.Uint16(bytes[:])
	var err error
	if ip := ap.Addr(); ip.Is4() {
		to := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: ip.As4()}
		err = connect(fd, unsafe.Pointer(&to), unsafe.Sizeof(to))
	} else {
		to := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: ip.As16()}
		err = connect(fd, unsafe.Pointer(&to), unsafe.Sizeof(to))
	}
	if err == unix.EINPROGRESS || err == unix.EINTR {
		return nil
	}
	return err
}

// start begins a check.
func (k *sockets) start(w *Watch, addrs []netip.AddrPort) {
	end := time.Now().Add(w.Check.Timeout)
	s := &w.conn
	if s.stage == idle {
		if n, err := unix.Write(s.fd, w.request); err == nil && n == len(w.request) {
			s.stage, s.reused, s.end = asked, true, end
			k.under++
			return
		}
	}
	k.end(s) // or it is still draining
	*s = socket{watch: w, addrs: addrs, end: end}
	k.connect(s)
}

// connect tries the next address that can be tried; each has its part of the time. If none is left the check has failed.
func (k *sockets) connect(s *socket) {
	for len(s.addrs) > 0 {
		ap := s.addrs[0]
		s.addrs = s.addrs[1:]
		err := k.dial(s, ap)
		if err == nil {
			if n := len(s.addrs); n > 0 {
				k.checker.limit(s.watch, time.Until(s.end)/time.Duration(n+1))
			}
			return
		}
		s.note(err)
	}
	k.checker.finish(s.watch, s.failed)
}

// note keeps the first error.
func (s *socket) note(err error) {
	if s.failed == nil {
		s.failed = err
	}
}

// dial begins to connect.
func (k *sockets) dial(s *socket, ap netip.AddrPort) error {
	if err := s.watch.Owner.Allowed(ap); err != nil {
		return err
	}
	family, kind := unix.AF_INET, 0
	if !ap.Addr().Is4() {
		family, kind = unix.AF_INET6, 1
	}
	d, err := k.socket(family, kind)
	if err != nil {
		return err
	}
	// The last packet of the handshake goes with the request, or not at all, as in HAProxy: then a check of tcp ends before the
	// instance has to accept anything. A connection that ends takes this setting along.
	_ = unix.SetsockoptInt(d.fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	if err := connectTo(d.fd, ap); err != nil {
		unix.Close(d.fd)
		return fmt.Errorf("connect: %w", err)
	}
	s.descriptor, s.stage = d, connecting
	k.open[int32(d.fd)] = s
	k.under++
	return nil
}

// socket takes a spare socket, or makes one.
func (k *sockets) socket(family, kind int) (descriptor, error) {
	if n := len(k.spare[kind]); n > 0 {
		d := k.spare[kind][n-1]
		k.spare[kind] = k.spare[kind][:n-1]
		return d, nil
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return descriptor{}, fmt.Errorf("socket: %w", err)
	}
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // a reset, if it is closed
	k.generation++
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET&(1<<32-1), Fd: int32(fd), Pad: int32(k.generation)}
	if err := unix.EpollCtl(k.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		unix.Close(fd)
		return descriptor{}, fmt.Errorf("epoll_ctl: %w", err)
	}
	return descriptor{fd, k.generation, kind}, nil
}

// poll takes what has happened.
func (k *sockets) poll() {
	if k == nil || len(k.open) == 0 {
		return
	}
	for {
		n, err := unix.EpollWait(k.epoll, k.events[:], 0)
		if err != nil {
			return // EINTR: the next time
		}
		for _, event := range k.events[:n] {
			if s := k.open[event.Fd]; s != nil && s.generation == uint32(event.Pad) {
				k.ready(s, event.Events)
			}
			k.checker.giveWay()
		}
		if n < len(k.events) {
			return
		}
	}
}

// ready takes one event.
func (k *sockets) ready(s *socket, event uint32) {
	w := s.watch
	over := event&(unix.EPOLLERR|unix.EPOLLHUP) != 0
	switch {
	case s.stage == connecting && over:
		code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || code == 0 {
			code = int(unix.ECONNRESET)
		}
		k.end(s)
		s.note(fmt.Errorf("connect: %w", unix.Errno(code)))
		k.connect(s)
		return
	case s.stage == connecting && event&unix.EPOLLOUT == 0:
		return
	case s.stage == connecting && w.Check.TCP:
		k.end(s)
		k.checker.finish(w, nil)
		return
	case s.stage == connecting:
		s.stage = asked
		k.checker.limit(w, time.Until(s.end))
		if n, err := unix.Write(s.fd, w.request); err != nil || n < len(w.request) {
			k.end(s)
			k.checker.finish(w, fmt.Errorf("the request could not be sent: %w", err))
			return
		}
	}
	if over || event&(unix.EPOLLIN|unix.EPOLLRDHUP) != 0 {
		k.read(s)
	}
}

// read takes what has come, until nothing is left or wanted.
func (k *sockets) read(s *socket) {
	w := s.watch
	for s.stage != none {
		n, err := unix.Read(s.fd, k.buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return
		case err != nil || n == 0:
			k.cut(s)
			return
		case s.stage == idle:
			k.end(s)
			return
		case s.stage == draining:
			s.body -= n
			k.settle(s)
			continue
		}
		came := k.buf[:n]
		if len(s.head) > 0 {
			s.head = append(s.head, came...)
			came = s.head
		}
		r, err := parse(came)
		switch {
		case err != nil:
			k.end(s)
			k.checker.finish(w, err)
		case r.status == 0 && len(s.head) == 0:
			s.head = slices.Clone(came)
		case r.status != 0:
			s.head = nil
			if w.Check.KeepAlive && r.body >= 0 {
				s.stage, s.body = draining, r.body
				k.settle(s)
			} else {
				k.end(s)
			}
			k.checker.finish(w, w.verdict(r.status))
		}
	}
}

// settle keeps a connection whose answer has come whole.
func (k *sockets) settle(s *socket) {
	switch {
	case s.body < 0:
		k.end(s)
	case s.body == 0:
		s.stage = idle
		k.under--
	}
}

// cut notes that the instance has closed a connection.
func (k *sockets) cut(s *socket) {
	w := s.watch
	switch {
	case s.stage == asked && s.reused && len(s.head) == 0: // it was idle too long: that says nothing
		k.end(s)
		s.reused, s.addrs, s.failed = false, w.Owner.Addrs(), errEmpty
		k.connect(s)
	case s.stage == asked && len(s.head) == 0:
		k.end(s)
		k.checker.finish(w, errEmpty)
	case s.stage == asked:
		k.end(s)
		k.checker.finish(w, errHalf)
	default:
		k.end(s)
	}
}

// late ends a check that has taken too long, or what it has spent on one of several addresses.
func (k *sockets) late(w *Watch) {
	if k == nil || w.conn.stage == none { // a goroutine has it
		return
	}
	s := &w.conn
	switch {
	case s.stage == connecting && len(s.addrs) > 0:
		k.end(s)
		s.note(errConnect)
		k.connect(s)
	case s.stage == connecting:
		s.note(errConnect)
		k.end(s)
		k.checker.finish(w, s.failed)
	default:
		k.end(s)
		k.checker.finish(w, errSilent)
	}
}
