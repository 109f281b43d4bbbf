package loop

import (
	"bytes"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spliced moves n bytes from one socket to another through a pipe.
func spliced(g *Group, from, to *Socket, n int64) error {
	p, err := g.Pipe()
	if err != nil {
		return err
	}
	empty := true
	defer func() { g.Release(p, empty) }()
	for n > 0 {
		m, err := from.SpliceTo(p, n)
		if err != nil {
			return err
		}
		n -= int64(m)
		empty = false
		if _, err := to.SpliceFrom(p, m); err != nil {
			return err
		}
		empty = true
	}
	return nil
}

// What is spliced comes as it was sent, and not a byte more, between a sender in pieces and a slow reader.
func TestSplice(t *testing.T) {
	g := startGroup(t, 2)
	from, sender := pair(t, g.Loops[0])
	to, reader := pair(t, g.Loops[1])
	sent := make([]byte, 12<<20)
	mathrand.NewChaCha8([32]byte{2}).Read(sent)
	const rest = 1234
	go func() {
		for at := 0; at < len(sent); {
			n := min(1+mathrand.IntN(1+at/100), len(sent)-at)
			if _, err := sender.Write(sent[at : at+n]); err != nil {
				return
			}
			at += n
		}
	}()
	done := make(chan error, 1)
	go func() {
		done <- errors.Join(spliced(g, from, to, int64(len(sent)-rest)), to.CloseWrite())
	}()
	awaitParked(t, 1) // the sockets are full, or empty
	got, err := io.ReadAll(reader)
	if err != nil || !bytes.Equal(got, sent[:len(sent)-rest]) {
		t.Errorf("%d bytes, or others, %v", len(got), err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	last := make([]byte, rest)
	if _, err := io.ReadFull(from, last); err != nil || !bytes.Equal(last, sent[len(sent)-rest:]) {
		t.Errorf("what comes behind is lost, %v", err)
	}
}

// What ends a splice under way: ends, resets, deadlines, Close, of either socket.
func TestSpliceEnds(t *testing.T) {
	for _, row := range []struct {
		name string
		full bool // the reader's socket, so that SpliceFrom waits
		do   func(from, to *Socket, sender, reader *net.TCPConn)
		want []error
	}{
		{"end", false, func(_, _ *Socket, sender, _ *net.TCPConn) { sender.Close() }, []error{io.EOF}},
		{"reset", false, func(_, _ *Socket, sender, _ *net.TCPConn) { sender.SetLinger(0); sender.Close() }, []error{syscall.ECONNRESET}},
		{"closed", false, func(from, _ *Socket, _, _ *net.TCPConn) { from.Close() }, []error{net.ErrClosed}},
		{"deadline", false, func(from, _ *Socket, _, _ *net.TCPConn) { from.SetReadDeadline(time.Now().Add(20 * time.Millisecond)) }, []error{os.ErrDeadlineExceeded}},
		{"reset of the reader", true, func(_, _ *Socket, _, reader *net.TCPConn) { reader.SetLinger(0); reader.Close() }, []error{syscall.ECONNRESET, syscall.EPIPE}},
		{"reader's socket closed", true, func(_, to *Socket, _, _ *net.TCPConn) { to.Close() }, []error{net.ErrClosed}},
		{"reader's deadline", true, func(_, to *Socket, _, _ *net.TCPConn) { to.SetWriteDeadline(time.Now().Add(20 * time.Millisecond)) }, []error{os.ErrDeadlineExceeded}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGroup(t, 1)
			from, sender := pair(t, g.Loops[0])
			to, reader := pair(t, g.Loops[0])
			size := 1000
			if row.full {
				fill(t, to)
				size = 32 << 20 // whatever room the kernel finds yet
			}
			go sender.Write(make([]byte, size))
			done := make(chan error, 1)
			go func() { done <- spliced(g, from, to, 1<<30) }()
			awaitParked(t, 1)
			row.do(from, to, sender, reader)
			select {
			case err := <-done:
				for _, want := range row.want {
					if errors.Is(err, want) {
						err = nil
					}
				}
				if err != nil {
					t.Errorf("got %v, want one of %v", err, row.want)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("it goes on")
			}
			if _, err := from.SpliceTo(&Pipe{r: -1, w: -1}, 1); row.name == "closed" && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			g.pipes.mu.Lock()
			defer g.pipes.mu.Unlock()
			if kept := len(g.pipes.idle); kept > 0 == row.full {
				t.Errorf("%d pipes are kept, with something in them: %v", kept, row.full)
			}
		})
	}
}

// Pipes are used again when they are empty, up to a number, and closed otherwise and with their group.
func TestPipes(t *testing.T) {
	g, err := New(1, nil)
	if err != nil {
		t.Fatal(err)
	}
	var pipes []*Pipe
	for range idlePipes + 5 {
		p, err := g.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if p.size != pipeSize && p.size != 64<<10 {
			t.Errorf("a size of %d", p.size)
		}
		pipes = append(pipes, p)
	}
	open := func(p *Pipe) bool {
		_, r := unix.FcntlInt(uintptr(p.r), unix.F_GETFD, 0)
		_, w := unix.FcntlInt(uintptr(p.w), unix.F_GETFD, 0)
		return r == nil && w == nil
	}
	g.Release(pipes[0], false)
	if open(pipes[0]) {
		t.Error("one that is not empty is kept")
	}
	for _, p := range pipes[1:] {
		g.Release(p, true)
	}
	if n := len(g.pipes.idle); n != idlePipes {
		t.Errorf("%d are kept", n)
	}
	if p, err := g.Pipe(); err != nil || p != pipes[idlePipes] {
		t.Error("the last one is not used again")
	} else {
		g.Release(p, true)
	}
	for range mostPipes {
		p, err := g.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		pipes = append(pipes, p)
	}
	if _, err := g.Pipe(); err != errPipes {
		t.Errorf("one more than there may be: %v", err)
	}
	for _, p := range pipes[len(pipes)-mostPipes:] {
		g.Release(p, true)
	}
	g.Close()
	for i, p := range pipes {
		if open(p) {
			t.Errorf("pipe %d is open", i)
		}
	}
}
