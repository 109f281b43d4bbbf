package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// conn is one end of a connection. It keeps all that came.
type conn struct {
	*net.TCPConn

	mu      sync.Mutex // guards the fields below
	in      []byte
	ended   error         // how the other side ended it; nil: it did not
	changed chan struct{} // closed when one of them changes
}

func newConn(c net.Conn) *conn {
	nc := &conn{TCPConn: c.(*net.TCPConn), changed: make(chan struct{})}
	go nc.read()
	return nc
}

// read ends with the connection.
func (c *conn) read() {
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		c.mu.Lock()
		c.in = append(c.in, buf[:n]...)
		c.ended = err
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// until waits until ok says so, and returns false if ctx is over before. ok sees all that came, and whether that is all
// that ever comes.
func (c *conn) until(ctx context.Context, ok func(in []byte, ended bool) bool) bool {
	for {
		c.mu.Lock()
		in, ended, changed := c.in, c.ended, c.changed
		c.mu.Unlock()
		if ok(in, ended != nil) {
			return true
		}
		if ended != nil {
			return false
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// peer is a client or the origin while it follows a script.
type peer struct {
	*conn
	run  *run
	req  *request // the origin: what it answers
	from int      // what came before is another message's, or was waited for already
	body int      // the origin: where the request's body begins
	gone bool     // it closed the connection
}

// step is a part of a script: of a client's, or of the origin's for one request.
type step func(context.Context, *peer) error

// send sends bytes; {p} is the case's path.
func send(text string) step {
	return func(ctx context.Context, p *peer) error {
		deadline, _ := ctx.Deadline()
		p.SetWriteDeadline(deadline)
		_, err := io.WriteString(p.TCPConn, p.run.expand(text))
		return err
	}
}

// drip sends bytes one by one, with a moment between them: so they arrive one by one.
func drip(text string) step {
	return func(ctx context.Context, p *peer) error {
		for _, b := range []byte(p.run.expand(text)) {
			if err := send(string([]byte{b}))(ctx, p); err != nil {
				return err
			}
			if err := pause(time.Millisecond)(ctx, p); err != nil {
				return err
			}
		}
		return nil
	}
}

// await waits until one of the texts came.
func await(texts ...string) step {
	return func(ctx context.Context, p *peer) error {
		found := p.until(ctx, func(in []byte, _ bool) bool {
			for _, text := range texts {
				if i := bytes.Index(in[p.from:], []byte(text)); i >= 0 {
					p.from += i + len(text)
					return true
				}
			}
			return false
		})
		if !found {
			return fmt.Errorf("%q never came", strings.Join(texts, "\" or \""))
		}
		return nil
	}
}

// within bounds a step in time.
func within(d time.Duration, s step) step {
	return func(ctx context.Context, p *peer) error {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		if err := s(ctx, p); err != nil {
			return fmt.Errorf("%w within %s", err, d)
		}
		return nil
	}
}

// perhaps is a step that may fail.
func perhaps(s step) step {
	return func(ctx context.Context, p *peer) error {
		_ = s(ctx, p)
		return nil
	}
}

// tell and hear are how the two ends of a case wait for each other. What is told reads as an error where it never comes.
func tell(what string) step {
	return func(_ context.Context, p *peer) error {
		p.run.tell(what)
		return nil
	}
}

// hear waits for it, but not long.
func hear(what string) step { return hearFor(2*time.Second, what) }

func hearFor(d time.Duration, what string) step {
	return func(ctx context.Context, p *peer) error {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		select {
		case <-p.run.told(what):
			return nil
		case <-ctx.Done():
			return errors.New(what)
		}
	}
}

// readAll waits until the whole body of the request is there.
func readAll(ctx context.Context, p *peer) error {
	p.until(ctx, p.take)
	if !p.req.complete { // nobody else writes it
		return errors.New("the request did not arrive as a whole")
	}
	return nil
}

// take reads of the request's body what is there, and reports whether that is all, or will be.
func (p *peer) take(in []byte, ended bool) bool {
	p.run.mu.Lock()
	defer p.run.mu.Unlock()
	n, err := p.req.readBody(in[p.body:])
	switch {
	case err == nil:
		p.from = p.body + n
		p.req.settled = true
	case err != errShort:
		p.req.err, p.req.settled = err, true
	case ended:
		p.req.settled = true
	}
	return p.req.settled
}

// waitEnd waits until the other side has closed the connection, or its half of it.
func waitEnd(ctx context.Context, p *peer) error {
	if !p.until(ctx, func(_ []byte, ended bool) bool { return ended }) {
		return fmt.Errorf("the connection was not closed")
	}
	return nil
}

// hangUp closes the connection. What was sent arrives.
func hangUp(_ context.Context, p *peer) error {
	p.gone = true
	p.CloseWrite() // a close with bytes unread would be a reset
	time.AfterFunc(time.Second, func() { p.Close() })
	return nil
}

// halfClose says that nothing more will be sent.
func halfClose(_ context.Context, p *peer) error { return p.CloseWrite() }

// reset breaks the connection.
func reset(_ context.Context, p *peer) error {
	p.gone = true
	p.SetLinger(0)
	return p.Close()
}

// pause waits: for what has no sign, such as that nothing comes.
func pause(d time.Duration) step {
	return func(ctx context.Context, _ *peer) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
