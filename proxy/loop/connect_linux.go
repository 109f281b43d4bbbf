package loop

import (
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Connect begins a connection to an address, with the options of an accepted one. Its handler is told when it may have come
// about, or failed: see Connected. h and held are those of Watch. From any goroutine if it is held, else on the loop.
func (l *Loop) Connect(to netip.AddrPort, h Handler, held bool) (*Socket, error) {
	family, name := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())})
	if to.Addr().Is4() {
		family, name = unix.AF_INET, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := setOptions(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// EINTR does not end the attempt either.
	if err := unix.Connect(fd, name); err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	s, err := l.Watch(fd, to, h, held)
	if err == nil {
		s.connecting = true
	}
	return s, err
}

// Connecting says that Connected has not told yet what became of a Connect.
func (s *Socket) Connecting() bool { return s.connecting }

// Connected says what became of a Connect: nil if the socket can be used, ErrAgain if nobody knows yet, or why there is no
// connection; then it must be closed. On the loop, or for who holds the socket.
func (s *Socket) Connected() error {
	if !s.connecting {
		return nil
	}
	if !s.enter() {
		return net.ErrClosed
	}
	defer s.leave()
	code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch errno := unix.Errno(code); {
	case err != nil:
		return os.NewSyscallError("getsockopt", err)
	case errno == unix.ECONNRESET: // it was there, and is no more: reading and writing tells
		s.connecting = false
		return nil
	case errno != 0:
		s.connecting = false
		return os.NewSyscallError("connect", errno)
	}
	if _, err := unix.Getpeername(s.fd); err != nil {
		return ErrAgain
	}
	s.connecting = false
	// A port of this machine at which nobody listens may be the one that the kernel has chosen for this end: then the socket
	// is connected with itself.
	if name, err := unix.Getsockname(s.fd); err == nil && addrPort(name) == s.remote {
		return os.NewSyscallError("connect", unix.ECONNREFUSED)
	}
	return nil
}

// AwaitConnected waits for what Connected says, until a time at the latest: os.ErrDeadlineExceeded. For who holds the socket.
func (s *Socket) AwaitConnected(until time.Time) error {
	if err := s.SetWriteDeadline(until); err != nil {
		return err
	}
	for {
		if err := s.Connected(); err != ErrAgain {
			if err == nil {
				err = s.SetWriteDeadline(time.Time{})
			}
			return err
		}
		if err := s.await(&s.waits.out); err != nil {
			return err
		}
	}
}
