package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

const canPump = true

// pipeSize is how much of a response is under way in splice's pipe. A pipe counts pieces of memory, not bytes: 16 of
// them by default, which hold less of what came in small packets.
const pipeSize = 256 << 10

// servePump forwards bytes between each client and a connection of its own to the origin, and knows nothing of HTTP: one
// thread, one epoll instance, and for each request a read and a write there and back. That is what a gateway cannot
// avoid, so it is the floor for all of them. With splice, what the origin sends stays in the kernel. It returns only
// with an error.
func servePump(origin netip.AddrPort, splice bool, ready func(addr string)) error {
	alone()
	p := &pump{origin: origin, splice: splice, buf: make([]byte, 64<<10)}
	listener, addr, err := listenOn()
	if err != nil {
		return fmt.Errorf("pump: %w", err)
	}
	p.listener = listener
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("pump: epoll_create1: %w", err)
	}
	if err := watch(p.epoll, unix.EPOLL_CTL_ADD, p.listener, unix.EPOLLIN); err != nil {
		return fmt.Errorf("pump: %w", err)
	}
	ready(addr.String())
	return fmt.Errorf("pump: %w", p.loop())
}

// alone makes the calling goroutine the only one that matters in this process: see sys_linux.go.
func alone() {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
}

type pump struct {
	epoll, listener int
	origin          netip.AddrPort
	splice          bool
	ends            []*end // by file descriptor
	buf             []byte // what was just read, of whichever connection
}

// end is one of the two sockets of a connection that is pumped.
type end struct {
	fd    int
	other *end
	held  []byte // read from the other, and not yet written here; part of store
	store []byte
	pipe  *pipe // nil where bytes are copied
	ended bool  // nothing more comes from here
}

// pipe is what splice needs between two sockets.
type pipe struct{ out, in, held int } // file descriptors, and bytes that are in it

var errEnded = errors.New("ended")

func (p *pump) loop() error {
	events := make([]unix.EpollEvent, 512)
	for {
		n, errno := rawWait(p.epoll, events, nil)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("epoll_pwait2: %w", errno)
		}
		for _, e := range events[:max(n, 0)] {
			if int(e.Fd) == p.listener {
				if err := p.accept(); err != nil {
					return err
				}
				continue
			}
			at := p.ends[e.Fd]
			if at == nil {
				continue // closed since
			}
			var err error
			if e.Events&unix.EPOLLOUT != 0 {
				err = p.flush(at)
			}
			if err == nil && e.Events&^unix.EPOLLOUT != 0 && !at.ended && at.other.empty() {
				err = p.move(at)
			}
			if err != nil {
				p.close(at)
			}
		}
	}
}

// accept takes all connections that wait, and makes one to the origin for each.
func (p *pump) accept() error {
	for {
		fd, err := acceptOn(p.listener)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		to, err := dialTo(p.origin)
		if err != nil {
			return err
		}
		client, upstream := &end{fd: fd}, &end{fd: to}
		client.other, upstream.other = upstream, client
		if p.splice {
			var fds [2]int
			if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
				return fmt.Errorf("pipe: %w", err)
			}
			unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // or it stays smaller, which is right, too
			client.pipe = &pipe{out: fds[0], in: fds[1]}
		}
		for _, e := range []*end{client, upstream} {
			for e.fd >= len(p.ends) {
				p.ends = append(p.ends, nil)
			}
			p.ends[e.fd] = e
			if err := watch(p.epoll, unix.EPOLL_CTL_ADD, e.fd, unix.EPOLLIN); err != nil {
				return err
			}
		}
	}
}

// move takes what has come from one end to the other. If that has no room, nothing more is read until it has.
func (p *pump) move(from *end) error {
	to := from.other
	var n int
	var errno syscall.Errno
	if to.pipe != nil {
		n, errno = rawSplice(from.fd, to.pipe.in, pipeSize)
	} else {
		n, errno = rawRead(from.fd, p.buf)
	}
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return nil
	case errno != 0:
		return errno
	case n == 0:
		from.ended = true
		if to.ended {
			return errEnded
		}
		unix.Shutdown(to.fd, unix.SHUT_WR)
		return p.watch(from)
	}
	var err error
	if to.pipe != nil {
		to.pipe.held = n
		err = to.drain()
	} else {
		err = to.write(p.buf[:n])
	}
	if err != nil || to.empty() {
		return err
	}
	return errors.Join(p.watch(from), p.watch(to))
}

// flush writes what waited for room.
func (p *pump) flush(to *end) error {
	var err error
	if to.pipe != nil {
		err = to.drain()
	} else {
		err = to.writeHeld()
	}
	if err != nil || !to.empty() {
		return err
	}
	return errors.Join(p.watch(to.other), p.watch(to))
}

func (e *end) empty() bool { return len(e.held) == 0 && (e.pipe == nil || e.pipe.held == 0) }

// write writes as much as there is room for, and holds the rest.
func (e *end) write(b []byte) error {
	n, errno := rawWrite(e.fd, b)
	switch {
	case errno == 0 && n == len(b):
		return nil
	case errno == 0:
		b = b[n:]
	case errno != unix.EAGAIN && errno != unix.EINTR:
		return errno
	}
	e.store = append(e.store[:0], b...)
	e.held = e.store
	return nil
}

func (e *end) writeHeld() error {
	n, errno := rawWrite(e.fd, e.held)
	switch errno {
	case 0:
		e.held = e.held[n:]
	case unix.EAGAIN, unix.EINTR:
	default:
		return errno
	}
	return nil
}

// drain empties the pipe as far as there is room.
func (e *end) drain() error {
	for e.pipe.held > 0 {
		n, errno := rawSplice(e.pipe.out, e.fd, e.pipe.held)
		switch errno {
		case 0:
			e.pipe.held -= n
		case unix.EINTR:
		case unix.EAGAIN:
			return nil
		default:
			return errno
		}
	}
	return nil
}

// watch waits for what this end can be used for now: to be read, if there is room for it at the other, or for room.
func (p *pump) watch(e *end) error {
	var events uint32
	if !e.ended && e.other.empty() {
		events |= unix.EPOLLIN
	}
	if !e.empty() {
		events |= unix.EPOLLOUT
	}
	return watch(p.epoll, unix.EPOLL_CTL_MOD, e.fd, events)
}

// close closes both ends, which also ends the watching.
func (p *pump) close(e *end) {
	for _, e := range []*end{e, e.other} {
		unix.Close(e.fd)
		p.ends[e.fd] = nil
		if e.pipe != nil {
			unix.Close(e.pipe.in)
			unix.Close(e.pipe.out)
		}
	}
}
