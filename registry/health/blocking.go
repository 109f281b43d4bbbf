package health

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

// check runs one check, until ctx ends.
func (w *Watch) check(ctx context.Context, addrs []netip.AddrPort) error {
	if conn := w.takeKept(); conn != nil {
		if came, err := w.ask(ctx, conn); err == nil || came || ctx.Err() != nil {
			return err
		}
		// Nothing came on a connection that was idle: the instance has closed it, and may be well.
	}
	conn, err := w.dial(ctx, addrs)
	if err != nil {
		return err
	}
	if w.Check.TCP {
		return conn.Close()
	}
	_, err = w.ask(ctx, conn)
	return err
}

// dial connects to the first address that answers; each has its part of the time.
func (w *Watch) dial(ctx context.Context, addrs []netip.AddrPort) (net.Conn, error) {
	var first error
	end, _ := ctx.Deadline()
	for i, ap := range addrs {
		now := time.Now()
		conn, err := w.dialOne(ctx, ap, now.Add(end.Sub(now)/time.Duration(len(addrs)-i)))
		if err == nil {
			return conn, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

func (w *Watch) dialOne(ctx context.Context, ap netip.AddrPort, end time.Time) (net.Conn, error) {
	if err := w.Owner.Allowed(ap); err != nil {
		return nil, err
	}
	dialer := net.Dialer{Deadline: end, KeepAlive: -1}
	conn, err := dialer.DialContext(ctx, "tcp", ap.String())
	if err != nil {
		return nil, connectError(err)
	}
	_ = conn.(*net.TCPConn).SetLinger(0) // as sockets do: no connection lingers for a minute on either side
	if w.TLS == nil {
		return conn, nil
	}
	secure := tls.Client(conn, w.TLS)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, errors.New("no TLS handshake in time")
		}
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return secure, nil
}

// connectError says why no connection came about, without addresses: who reads it knows the instance.
func connectError(err error) error {
	var errno syscall.Errno
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return errConnect
	case errors.As(err, &errno):
		return fmt.Errorf("connect: %w", errno)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errConnect
	}
	return err
}

// ask sends the request and reads the answer, and keeps the connection or closes it. came says that a byte of an answer did.
func (w *Watch) ask(ctx context.Context, conn net.Conn) (came bool, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	keep := false
	defer func() {
		if !stop() || !keep || !w.keep(conn) {
			conn.Close()
		}
	}()
	if _, err := conn.Write(w.request); err != nil {
		return false, broken(ctx, err)
	}
	in := bufio.NewReaderSize(conn, 4096)
	var head []byte
	for {
		_, err := in.Peek(1)
		if err != nil {
			switch {
			case ctx.Err() != nil:
				return came, errSilent
			case !came:
				return false, errEmpty
			}
			return true, errHalf
		}
		came = true
		b, _ := in.Peek(in.Buffered())
		head = append(head, b...)
		_, _ = in.Discard(len(b))
		r, err := parse(head)
		if err != nil {
			return true, err
		}
		if r.status == 0 {
			continue
		}
		if w.Check.KeepAlive && r.body >= 0 {
			_, err := io.CopyN(io.Discard, in, int64(r.body))
			keep = err == nil && in.Buffered() == 0
		}
		return true, w.verdict(r.status)
	}
}

// broken is why a request could not be sent.
func broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errSilent
	}
	return fmt.Errorf("the request could not be sent: %w", err)
}

// takeKept returns the connection that was kept, if there is one. Its owner is then who runs the check.
func (w *Watch) takeKept() net.Conn {
	w.checker.mu.Lock()
	defer w.checker.mu.Unlock()
	if w.kept == nil {
		return nil
	}
	conn := w.kept
	w.kept = nil
	return conn
}

// keep keeps a connection for the next check; false if there will be none.
func (w *Watch) keep(conn net.Conn) bool {
	w.checker.mu.Lock()
	defer w.checker.mu.Unlock()
	if w.over || w.checker.closed {
		return false
	}
	w.kept = conn
	return true
}

// dropKept closes it. The caller holds the checker's mu.
func (w *Watch) dropKept() {
	if w.kept != nil {
		w.kept.Close()
		w.kept = nil
	}
}
