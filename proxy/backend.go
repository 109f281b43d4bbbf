package proxy

import (
	"crypto/tls"
	"net"
	"sync/atomic"
	"time"

	"kerberos/proxy/loop"
)

// backendConn is a connection to an instance.
type backendConn struct {
	net.Conn              // sock, or TLS on it
	sock     *loop.Socket // nil if no loop watches it
	below    net.Conn     // what is below TLS
	upstream *upstream    // nil until it is opened
	severed  atomic.Bool  // its end is no orderly one
	read     alarm
	write    alarm
	one      [1]byte     // for a read that is to find nothing
	client   *conn       // whose request its loop has sent; for the loop only
	failed   error       // why it has not come about; nil if it has, or that is not known yet
	dead     atomic.Bool // something came in while nobody had asked
	wake     func()      // ends a read that waits
}

// over makes it one over a socket.
func (c *backendConn) over(sock *loop.Socket) {
	c.Conn, c.sock, c.below = sock, sock, sock
	c.wake = func() { c.SetReadDeadline(time.Unix(1, 0)) }
}

// plain reports whether a loop can read and write it.
func (c *backendConn) plain() bool { return c.sock != nil && c.Conn == net.Conn(c.sock) }

// transport is the connection below TLS.
func (c *backendConn) transport() net.Conn {
	if secure, ok := c.Conn.(*tls.Conn); ok {
		return secure.NetConn()
	}
	return c.Conn
}

// Close may be called again.
func (c *backendConn) Close() error {
	if u := c.upstream; u != nil {
		u.open.mu.Lock()
		delete(u.open.conns, c)
		u.open.mu.Unlock()
	}
	return c.Conn.Close()
}

// sever ends both directions, from any goroutine; its owner has to close it all the same.
func (c *backendConn) sever() {
	c.severed.Store(true)
	if sock, ok := c.below.(*loop.Socket); ok {
		_ = sock.Shutdown()
	} else {
		_ = c.below.Close()
	}
}

// forget drops what only a goroutine needs of it. On its loop.
func (c *backendConn) forget() {
	c.sock.Forget()
	c.read.disarm()
	c.write.disarm()
}

// quiet reports whether the connection is open and nothing has come in on it: bytes that nobody asked for would be taken
// for the answer to the next request.
func (c *backendConn) quiet() bool {
	if c.dead.Load() || c.sock != nil && c.sock.Peek() >= 0 {
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
