package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// serveOrigin answers every request with a body of that size, from one thread and one epoll instance, with one read and
// one write for each that is not large: what it costs is taken from the load's CPU. It takes as many addresses as asked
// for, knows no HEAD, no chunked bodies, and closes no connection that is used properly. It returns only with an error.
func serveOrigin(size, addrs int, ready func(addrs []string)) error {
	alone()
	o := &origin{buf: make([]byte, 64<<10)}
	one := response(bytes.Repeat([]byte("x"), size), "")
	o.size = len(one)
	o.page = bytes.Repeat(one, max(1, len(o.buf)/len(one)))
	var err error
	if o.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("origin: epoll_create1: %w", err)
	}
	var names []string
	for range addrs {
		fd, addr, err := listenOn()
		if err == nil {
			err = watch(o.epoll, unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)
		}
		if err != nil {
			return fmt.Errorf("origin: %w", err)
		}
		o.listeners, names = append(o.listeners, fd), append(names, addr.String())
	}
	ready(names)
	return fmt.Errorf("origin: %w", o.loop())
}

// serveChecked is what only checks connect to. The kernel connects them, so it need not look often, and takes hardly any
// of the load's CPU.
func serveChecked(ready func(addr string)) error {
	alone()
	listener, addr, err := listenOn()
	if err != nil {
		return fmt.Errorf("checked: %w", err)
	}
	ready(addr.String())
	for pause := unix.NsecToTimespec(5e6); ; {
		switch fd, err := acceptOn(listener); err {
		case nil:
			unix.Close(fd)
		case unix.EAGAIN:
			unix.Nanosleep(&pause, nil) // time.Sleep would keep several threads busy
		default:
			return fmt.Errorf("checked: accept: %w", err)
		}
	}
}

type origin struct {
	epoll     int
	listeners []int
	conns     []*originConn // by file descriptor
	buf       []byte        // what was just read, of whichever connection
	page      []byte        // the response, over and over: answers to pipelined requests leave in one write
	size      int           // of the response, with its head
	accepted  int           // connections so far
}

type originConn struct {
	fd      int
	in      requests
	unsent  int  // bytes of responses that are still to be written
	waiting bool // for room to write; nothing is read until then
}

func (o *origin) loop() error {
	events := make([]unix.EpollEvent, 512)
	for {
		n, errno := rawWait(o.epoll, events, nil)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("epoll_pwait2: %w", errno)
		}
		for _, e := range events[:max(n, 0)] {
			fd := int(e.Fd)
			if slices.Contains(o.listeners, fd) {
				if err := o.accept(fd); err != nil {
					return err
				}
				continue
			}
			c := o.conns[fd]
			if err := o.serve(c); err != nil {
				unix.Close(fd) // which also ends the watching
				o.conns[fd] = nil
			}
		}
	}
}

// accept takes all connections that wait.
func (o *origin) accept(listener int) error {
	for {
		fd, err := acceptOn(listener)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err) // out of file descriptors: what is measured would be something else
		}
		for fd >= len(o.conns) {
			o.conns = append(o.conns, nil)
		}
		o.conns[fd] = &originConn{fd: fd}
		o.accepted++
		if err := watch(o.epoll, unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN); err != nil {
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
	n, errno := rawRead(c.fd, o.buf)
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return nil
	case errno != 0:
		return errno
	case n == 0:
		return errClosed
	}
	var mirrorErr error
	err := c.in.feed(o.buf[:n], func(head []byte) {
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
		n, errno := rawWrite(c.fd, o.page[start:min(len(o.page), start+c.unsent)])
		switch errno {
		case 0:
			c.unsent -= n
		case unix.EINTR:
		case unix.EAGAIN:
			if c.waiting {
				return nil
			}
			c.waiting = true
			return watch(o.epoll, unix.EPOLL_CTL_MOD, c.fd, unix.EPOLLOUT)
		default:
			return errno
		}
	}
	if !c.waiting {
		return nil
	}
	c.waiting = false
	return watch(o.epoll, unix.EPOLL_CTL_MOD, c.fd, unix.EPOLLIN)
}
