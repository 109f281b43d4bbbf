package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"time"
)

// errAgain says that a socket is not ready.
var errAgain = errors.New("not ready")

// backendConn is a connection to an instance.
type backendConn struct {
	net.Conn
	raw    syscall.RawConn // of the TCP connection, also below TLS
	read   alarm
	write  alarm
	peek   func(fd uintptr)
	peeked int     // what the last peek found, see peekSocket
	one    [1]byte // for a read that is to find nothing

	// What follows serves a Read on a plain connection. The functions are made once: a closure a call would allocate.
	ready   func(fd uintptr) bool // turn
	request []byte                // goes out before the next Read waits
	reused  bool                  // the connection must be quiet before that
	wrote   bool                  // bytes of the request went out
	cut     bool                  // not all of them did
	room    []byte
	n       int
	err     error
}

func newBackendConn(conn net.Conn, tcp *net.TCPConn) (net.Conn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &backendConn{Conn: conn, raw: raw}
	c.peek = func(fd uintptr) { c.peeked = peekSocket(fd) }
	if socketsAreRaw && conn == net.Conn(tcp) {
		c.ready = c.turn
	}
	return c, nil
}

// plain reports whether reads and writes can be made inside a readiness wait.
func (c *backendConn) plain() bool { return c.ready != nil }

// ask has the next Read send a request before it waits for the answer: the poller is armed before the bytes leave, so that
// the first read is made when something is there, not in vain. If reused is set the connection must be quiet; else Read
// returns io.EOF, and wrote stays false.
func (c *backendConn) ask(request []byte, reused bool) {
	c.request, c.reused, c.wrote, c.cut = request, reused, false, false
}

// Read reads what has come in, or waits for it until the read deadline.
func (c *backendConn) Read(b []byte) (int, error) {
	if !c.plain() {
		return c.Conn.Read(b)
	}
	c.room, c.n, c.err = b, 0, nil
	err := c.raw.Read(c.ready)
	c.room = nil
	if err == nil {
		err = c.err
	}
	if err == nil && c.n == 0 {
		err = io.EOF
	}
	return c.n, err
}

// turn runs whenever the socket is ready to be read, and once before. What comes in from its first call on makes it run
// again. A response that is there already, or an end of the stream, does not: so it is looked for here.
func (c *backendConn) turn(fd uintptr) (done bool) {
	if request := c.request; request != nil {
		c.request = nil
		if c.reused && peekSocket(fd) >= 0 {
			return true
		}
		n, err := writeSocket(fd, request)
		c.wrote = n > 0
		if n < len(request) && (err == nil || err == errAgain) {
			if err = c.write.arm(c.SetWriteDeadline, time.Now(), uploadTimeout); err == nil {
				n, err = c.Conn.Write(request[n:])
				c.wrote = c.wrote || n > 0
			}
		}
		if err != nil {
			c.err, c.cut = err, true // it may have answered before it closed
			if n, _ := readSocket(fd, c.room); n > 0 {
				c.n, c.err = n, nil
			}
			return true
		}
		if c.reused { // it was quiet when the poller was armed; a new connection may hold an answer already
			return false
		}
	}
	if c.n, c.err = readSocket(fd, c.room); c.err == errAgain {
		return false
	}
	return true
}

// quiet reports whether the connection is open and nothing has come in on it: bytes that nobody asked for would be taken
// for the answer to the next request.
func (c *backendConn) quiet() bool {
	if c.raw.Control(c.peek) != nil || c.peeked >= 0 {
		return false
	}
	if _, secure := c.Conn.(*tls.Conn); !secure {
		return true
	}
	// TLS may hold what it has read from the socket along with the last response. A read whose deadline has passed finds
	// that, and asks the socket for nothing; it leaves the state of TLS whole.
	c.read.disarm()
	if c.SetReadDeadline(time.Unix(1, 0)) != nil {
		return false
	}
	n, err := c.Read(c.one[:])
	return n == 0 && isTimeout(err)
}

// alarm is one deadline of a connection. Arming a timer costs more than the rest of the bookkeeping of a request, so a
// deadline that is late by less than its slack (a quarter, at most a second) is left alone.
type alarm struct{ at time.Time }

// arm sets the deadline at now + d, or up to d's slack later.
func (a *alarm) arm(set func(time.Time) error, now time.Time, d time.Duration) error {
	soonest := now.Add(d)
	slack := min(d/4, time.Second)
	if left := a.at.Sub(soonest); left >= 0 && left <= slack {
		return nil
	}
	a.at = soonest.Add(slack)
	return set(a.at)
}

func (a *alarm) disarm() { a.at = time.Time{} }
