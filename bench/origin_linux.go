package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// serveOrigin answers every request with a body of that size, from one thread and one epoll instance, with one read and
// one write for each: what it costs is taken from the load's CPU. It knows no HEAD, no chunked bodies, and closes no
// connection that is used properly. It returns only with an error.
func serveOrigin(size int, ready func(addr string)) error {
	runtime.LockOSThread()
	o := &origin{buf: make([]byte, 64<<10)}
	one := response(bytes.Repeat([]byte("x"), size), "")
	o.size = len(one)
	o.page = bytes.Repeat(one, max(1, len(o.buf)/len(one)))
	addr, err := o.listen()
	if err != nil {
		return fmt.Errorf("origin: %w", err)
	}
	ready(addr.String())
	return fmt.Errorf("origin: %w", o.loop())
}

type origin struct {
	epoll, listener int
	conns           []*originConn // by file descriptor
	buf             []byte        // what was just read, of whichever connection
	page            []byte        // the response, over and over: answers to pipelined requests leave in one write
	size            int           // of the response, with its head
	accepted        int           // connections so far
}

type originConn struct {
	fd      int
	in      requests
	unsent  int  // bytes of responses that are still to be written
	waiting bool // for room to write; nothing is read until then
}

func (o *origin) listen() (netip.AddrPort, error) {
	var err error
	if o.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return netip.AddrPort{}, fmt.Errorf("socket: %w", err)
	}
	loopback := [4]byte{127, 0, 0, 1}
	if err := unix.Bind(o.listener, &unix.SockaddrInet4{Addr: loopback}); err != nil {
		return netip.AddrPort{}, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(o.listener, 4096); err != nil {
		return netip.AddrPort{}, fmt.Errorf("listen: %w", err)
	}
	if o.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return netip.AddrPort{}, fmt.Errorf("epoll_create1: %w", err)
	}
	if err := o.watch(unix.EPOLL_CTL_ADD, o.listener, unix.EPOLLIN); err != nil {
		return netip.AddrPort{}, err
	}
	name, err := unix.Getsockname(o.listener)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("getsockname: %w", err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(loopback), uint16(name.(*unix.SockaddrInet4).Port)), nil
}

func (o *origin) watch(op, fd int, events uint32) error {
	if err := unix.EpollCtl(o.epoll, op, fd, &unix.EpollEvent{Fd: int32(fd), Events: events}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

func (o *origin) loop() error {
	events := make([]unix.EpollEvent, 512)
	for {
		n, err := unix.EpollWait(o.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("epoll_wait: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if int(e.Fd) == o.listener {
				if err := o.accept(); err != nil {
					return err
				}
				continue
			}
			c := o.conns[e.Fd]
			if err := o.serve(c); err != nil {
				unix.Close(c.fd) // which also ends the watching
				o.conns[c.fd] = nil
			}
		}
	}
}

// accept takes all connections that wait.
func (o *origin) accept() error {
	for {
		fd, _, err := unix.Accept4(o.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
		case unix.EAGAIN:
			return nil
		case unix.EINTR, unix.ECONNABORTED:
			continue
		default:
			return fmt.Errorf("accept: %w", err) // out of file descriptors: what is measured would be something else
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return fmt.Errorf("TCP_NODELAY: %w", err)
		}
		for fd >= len(o.conns) {
			o.conns = append(o.conns, nil)
		}
		o.conns[fd] = &originConn{fd: fd}
		o.accepted++
		if err := o.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

var errClosed = errors.New("closed by the client")

// serve does what the connection is ready for; any error ends it.
func (o *origin) serve(c *originConn) error {
	if c.waiting {
		return o.flush(c)
	}
	n, err := unix.Read(c.fd, o.buf)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return nil
	case err != nil:
		return err
	case n == 0:
		return errClosed
	}
	var mirrorErr error
	err = c.in.feed(o.buf[:n], func(head []byte) {
		if isMirror(head) {
			count := fmt.Sprintf("%s: %d\r\n", acceptedHeader, o.accepted)
			_, mirrorErr = unix.Write(c.fd, response(head, count)) // one short answer on a connection of its own: there is room
			return
		}
		c.unsent += o.size
	})
	if err := errors.Join(err, mirrorErr); err != nil {
		return err
	}
	return o.flush(c)
}

// flush writes what there is room for, and waits for more room or for the next request.
func (o *origin) flush(c *originConn) error {
	for c.unsent > 0 {
		start := (o.size - c.unsent%o.size) % o.size
		n, err := unix.Write(c.fd, o.page[start:min(len(o.page), start+c.unsent)])
		switch err {
		case nil:
			c.unsent -= n
		case unix.EINTR:
		case unix.EAGAIN:
			if c.waiting {
				return nil
			}
			c.waiting = true
			return o.watch(unix.EPOLL_CTL_MOD, c.fd, unix.EPOLLOUT)
		default:
			return err
		}
	}
	if !c.waiting {
		return nil
	}
	c.waiting = false
	return o.watch(unix.EPOLL_CTL_MOD, c.fd, unix.EPOLLIN)
}
