package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drive is the built-in load: one thread, one epoll instance, one write and one read for each small request, cheap beside
// what it drives. It connects, has one request answered on each connection, calls begin, counts until d is over,
// and calls done. What is under way after d is waited for, lastWait at most. The connections end with the process.
//
// Without a rate each connection sends its next request once it has its answer (closed loop), and a latency is counted
// from sending. With one, requests are due at fixed intervals whatever the gateway does (open loop), and a latency is
// counted from when its request was due: a request that found no free connection has waited, and a stall of the gateway
// shows in all requests that were due in it.
func drive(l load, addr string, rate float64, d time.Duration, begin func() error, done func(outcome) error) error {
	alone()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	dr := &driver{load: l, addr: to, requests: l.requests(addr), clock: time.Now(), conns: make([]conn, l.Connections),
		buf: make([]byte, 64<<10), large: make([]byte, 1<<20), events: make([]unix.EpollEvent, 512)}
	if dr.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	// A timer may be 50 us late by default, which is as long as some answers take.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl: %w", err)
	}
	if err := dr.prime(); err != nil {
		return err
	}
	if err := begin(); err != nil {
		return err
	}
	if rate > 0 {
		err = dr.open(rate, d)
	} else {
		err = dr.closed(d)
	}
	if err != nil {
		return err
	}
	return done(dr.outcome())
}

const (
	primeWait = 10 * time.Second
	primeAt   = 64 // first requests at a time: so many connections to the origin they make
)

type driver struct {
	load     load
	addr     netip.AddrPort
	requests [][]byte
	epoll    int
	conns    []conn
	byFD     []*conn
	buf      []byte // what was just read, of whichever connection
	large    []byte // never written: what of a large body is to be discarded is said by a buffer's size
	events   []unix.EpollEvent
	clock    time.Time                      // when it began
	sent     int                            // requests so far; picks and numbers the next one
	busy     int                            // connections with a request under way
	done     func(c *conn, now int64) error // c has its answer, or lost its request

	elapsed           time.Duration
	latency, late     histogram
	badStatus, errors int
	unanswered        int
}

// conn is one connection.
type conn struct {
	fd    int
	busy  bool   // a request is under way
	since int64  // when it was sent, or was due
	head  []byte // of a response that is not complete yet
	body  int    // bytes of the response's body that are still to come
	bad   bool   // the response is not what was asked for
}

// now is in ns.
func (dr *driver) now() int64 { return int64(time.Since(dr.clock)) }

func (dr *driver) connect(c *conn) error {
	fd, err := dialTo(dr.addr)
	if err != nil {
		return err
	}
	*c = conn{fd: fd, head: c.head[:0]}
	for fd >= len(dr.byFD) {
		dr.byFD = append(dr.byFD, nil)
	}
	dr.byFD[fd] = c
	return watch(dr.epoll, unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)
}

// prime connects all and has each answered once: the gateway's connections to the origin are there then, too.
func (dr *driver) prime() error {
	for first := 0; first < len(dr.conns); first += primeAt {
		dr.done = func(*conn, int64) error { return nil }
		some := dr.conns[first:min(first+primeAt, len(dr.conns))]
		for i := range some {
			if err := dr.connect(&some[i]); err != nil {
				return err
			}
			if err := dr.send(&some[i], dr.now()); err != nil {
				return err
			}
		}
		for end := dr.now() + int64(primeWait); dr.busy > 0; {
			if err := dr.wait(end); err != nil {
				return err
			}
			if dr.now() > end {
				return fmt.Errorf("%d of %d first requests are not answered after %s", dr.busy, len(some), primeWait)
			}
		}
	}
	if dr.badStatus+dr.errors > 0 {
		return fmt.Errorf("first requests on %d connections: %d answers not as they should be, %d failed", len(dr.conns), dr.badStatus, dr.errors)
	}
	dr.latency = histogram{}
	return nil
}

func (dr *driver) closed(d time.Duration) error {
	begin := dr.now()
	end := begin + int64(d)
	dr.done = func(c *conn, now int64) error {
		if now >= end {
			return nil
		}
		return dr.send(c, now)
	}
	for i := range dr.conns {
		if err := dr.send(&dr.conns[i], dr.now()); err != nil {
			return err
		}
	}
	for dr.busy > 0 && dr.now() < end+int64(lastWait) {
		if err := dr.wait(end + int64(lastWait)); err != nil {
			return err
		}
	}
	dr.elapsed = time.Duration(dr.now() - begin)
	dr.giveUp()
	return nil
}

func (dr *driver) open(rate float64, d time.Duration) error {
	begin, first := dr.now(), dr.sent
	total := first + int(rate*d.Seconds())
	due := func(i int) int64 { return begin + int64(float64(i-first)*1e9/rate) }
	idle := make(chan *conn, len(dr.conns)) // the one that rested longest is next
	for i := range dr.conns {
		idle <- &dr.conns[i]
	}
	starved := false // requests were due when no connection was free: that they are late is not the load's fault
	sendDue := func(now int64) error {
		for dr.sent < total && due(dr.sent) <= now {
			if len(idle) == 0 {
				starved = true
				return nil
			}
			at := due(dr.sent)
			if !starved {
				dr.late.add(now - at)
			}
			if err := dr.send(<-idle, at); err != nil {
				return err
			}
		}
		starved = false
		return nil
	}
	dr.done = func(c *conn, now int64) error {
		idle <- c
		return sendDue(now)
	}
	last := due(total) + int64(lastWait)
	for (dr.sent < total || dr.busy > 0) && dr.now() < last {
		if err := sendDue(dr.now()); err != nil {
			return err
		}
		until := last
		if dr.sent < total && !starved {
			until = due(dr.sent)
		}
		if err := dr.wait(until); err != nil {
			return err
		}
	}
	dr.elapsed = time.Duration(dr.now() - begin)
	for ; dr.sent < total; dr.sent++ { // due, but never sent: the longest waits of all
		dr.unanswered++
		dr.latency.add(dr.now() - due(dr.sent))
	}
	dr.giveUp()
	return nil
}

// giveUp counts what is not answered, after the time that it had.
func (dr *driver) giveUp() {
	for i := range dr.conns {
		if c := &dr.conns[i]; c.busy {
			dr.unanswered++
			dr.latency.add(dr.now() - c.since)
		}
	}
}

// send sends the next request on a connection that has none under way.
func (dr *driver) send(c *conn, since int64) error {
	request := dr.requests[dr.sent%len(dr.requests)]
	if at := bytes.Index(dr.load.Body, []byte(counterMark)); at >= 0 {
		putNumber(request[len(request)-len(dr.load.Body)+at:], dr.load.Counter+dr.sent)
	}
	dr.sent++
	c.busy, c.since = true, since
	dr.busy++
	n, errno := rawWrite(c.fd, request)
	if errno == unix.EPIPE || errno == unix.ECONNRESET {
		return nil // reading will show it, too, and where it is counted
	}
	if errno != 0 || n < len(request) {
		return fmt.Errorf("a request of %d bytes does not fit into an idle connection: %d, %w", len(request), n, errno)
	}
	return nil
}

// putNumber replaces a counterMark, or the number before.
func putNumber(b []byte, n int) {
	for i := len(counterMark) - 1; i >= 0; i-- {
		b[i] = '0' + byte(n%10)
		n /= 10
	}
}

// wait handles what happens, at most until that time.
func (dr *driver) wait(until int64) error {
	timeout := unix.NsecToTimespec(max(until-dr.now(), 0))
	n, errno := rawWait(dr.epoll, dr.events, &timeout)
	if errno != 0 && errno != unix.EINTR {
		return fmt.Errorf("epoll_pwait2: %w", errno)
	}
	for _, e := range dr.events[:max(n, 0)] {
		if err := dr.read(dr.byFD[e.Fd]); err != nil {
			return err
		}
	}
	return nil
}

// read takes what has come. Errors of a connection are counted, and it is made anew.
func (dr *driver) read(c *conn) error {
	for {
		var n int
		var errno syscall.Errno
		into := dr.buf
		if c.body > 0 {
			into = dr.large[:min(c.body, len(dr.large))]
			n, errno = rawDiscard(c.fd, into)
		} else {
			n, errno = rawRead(c.fd, into)
		}
		switch {
		case errno == unix.EAGAIN || errno == unix.EINTR:
			return nil
		case errno != 0 || n == 0:
			return dr.lost(c)
		case c.body > 0:
			c.body -= n
		default:
			if err := dr.response(c, into[:n]); err != nil {
				return dr.lost(c)
			}
		}
		if c.body == 0 && len(c.head) == 0 {
			now := dr.now()
			dr.latency.add(now - c.since)
			if c.bad {
				dr.badStatus++
			}
			c.busy = false
			dr.busy--
			return dr.done(c, now)
		}
		if n < len(into) {
			return nil // there is no more yet
		}
	}
}

var errResponse = errors.New("not a response to what was asked")

// response takes the first bytes of a response. Its head is kept as long as it is not complete.
func (dr *driver) response(c *conn, b []byte) error {
	if !c.busy {
		return errResponse
	}
	if len(c.head) > 0 {
		c.head = append(c.head, b...)
		b = c.head
	}
	length, status, rest, err := parseResponse(b)
	switch {
	case err == errIncomplete:
		if len(c.head) == 0 {
			c.head = append(c.head, b...)
		}
		return nil
	case err != nil || len(rest) > length:
		return errResponse
	}
	c.head = c.head[:0]
	c.bad = status/100 != 2 || length != dr.load.Response
	c.body = length - len(rest)
	return nil
}

// lost makes a connection anew that has ended, and with it the request that was under way.
func (dr *driver) lost(c *conn) error {
	unix.Close(c.fd)
	dr.byFD[c.fd] = nil
	wasBusy := c.busy
	since := c.since
	if err := dr.connect(c); err != nil {
		return err
	}
	if !wasBusy {
		return nil
	}
	now := dr.now()
	dr.errors++
	dr.latency.add(now - since)
	dr.busy--
	return dr.done(c, now)
}

var errIncomplete = errors.New("incomplete")

// parseResponse takes a response's head apart; rest is what follows it.
func parseResponse(b []byte) (length, status int, rest []byte, err error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 && len(b) < maxHead {
		return 0, 0, nil, errIncomplete
	}
	if end < 0 || !bytes.HasPrefix(b, []byte("HTTP/1.1 ")) {
		return 0, 0, nil, errResponse
	}
	for _, digit := range b[len("HTTP/1.1 "):][:3] {
		status = 10*status + int(digit-'0')
	}
	length, err = contentLength(b[:end+4])
	return length, status, b[end+4:], err
}

func (dr *driver) outcome() outcome {
	return outcome{Requests: dr.latency.n - dr.errors - dr.unanswered, Elapsed: dr.elapsed, Latency: latency{All: &dr.latency}, Late: &dr.late,
		BadStatus: dr.badStatus, Errors: dr.errors, Unanswered: dr.unanswered}
}
