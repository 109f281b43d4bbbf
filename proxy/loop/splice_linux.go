package loop

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	pipeSize  = 256 << 10
	idlePipes = 64  // kept by a group: 16 MiB of buffers at the most, and only while data is in them
	mostPipes = 256 // in use: each takes two descriptors, also while nothing moves, and connections need theirs
)

// Pipe is where data is between two sockets on its way by splice(2): pages change hands, and no byte is copied through the
// program. It is used by one goroutine at a time.
type Pipe struct{ r, w, size int }

// pipes keeps those that are not in use.
type pipes struct {
	mu   sync.Mutex
	idle []*Pipe
	used int
}

// errPipes says that as many are in use as may be.
var errPipes = errors.New("too many pipes")

// Pipe returns an empty pipe; give it back with Release. There is an error if too many are in use, or descriptors are short.
func (g *Group) Pipe() (*Pipe, error) {
	g.pipes.mu.Lock()
	defer g.pipes.mu.Unlock()
	if g.pipes.used == mostPipes {
		return nil, errPipes
	}
	if n := len(g.pipes.idle); n > 0 {
		p := g.pipes.idle[n-1]
		g.pipes.idle = g.pipes.idle[:n-1]
		g.pipes.used++
		return p, nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	p := &Pipe{r: fds[0], w: fds[1], size: pipeSize}
	if _, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		p.size = 64 << 10 // the limit for users is reached: what it has anyway
	}
	g.pipes.used++
	return p, nil
}

// Release takes a pipe back. One that is not empty is closed.
func (g *Group) Release(p *Pipe, empty bool) {
	g.pipes.mu.Lock()
	defer g.pipes.mu.Unlock()
	g.pipes.used--
	if empty && len(g.pipes.idle) < idlePipes {
		g.pipes.idle = append(g.pipes.idle, p)
		return
	}
	p.close()
}

func (p *Pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

func (ps *pipes) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.idle {
		p.close()
	}
	ps.idle = nil
}

// SpliceTo is Read into an empty pipe, of at most limit bytes.
func (s *Socket) SpliceTo(p *Pipe, limit int64) (int, error) {
	if !s.enter() {
		return 0, net.ErrClosed
	}
	defer s.leave()
	for !s.waits.in.passed() {
		n, err := splice(s.fd, p.w, int(min(limit, int64(p.size))))
		switch {
		case err == unix.EAGAIN:
		case err != nil:
			return 0, os.NewSyscallError("splice", err)
		case n == 0:
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

// SpliceFrom is Write of the n bytes that are in a pipe.
func (s *Socket) SpliceFrom(p *Pipe, n int) (int, error) {
	return s.push(n, func(done int) (int, error) {
		m, err := splice(p.r, s.fd, n-done)
		switch err {
		case nil:
		case unix.EAGAIN:
			err = ErrAgain
		default:
			err = os.NewSyscallError("splice", err)
		}
		return max(m, 0), err
	})
}

// TrySpliceTo is TryRead into an empty pipe.
func (s *Socket) TrySpliceTo(p *Pipe) (int, error) { return trySplice(s.fd, p.w, p.size) }

// TrySpliceFrom is TryWrite of the n bytes that are in a pipe.
func (s *Socket) TrySpliceFrom(p *Pipe, n int) (int, error) { return trySplice(p.r, s.fd, n) }

func trySplice(from, to, n int) (int, error) {
	n, err := splice(from, to, n)
	if err == unix.EAGAIN {
		err = ErrAgain
	}
	return max(n, 0), err
}

// splice moves at most n bytes; unix.EAGAIN says that the socket is not ready.
func splice(from, to, n int) (int, error) {
	for {
		m, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return int(m), err
		}
	}
}
