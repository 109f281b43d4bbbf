// Package loop watches sockets: one epoll instance and one goroutine a CPU, as in nginx or HAProxy, within a Go program.
//
// A Socket that nobody holds belongs to its loop: what happens on it is told to its Handler, on the loop, which reads and
// writes with TryRead and TryWrite and never waits. So a request costs no switch between goroutines, and no read that
// finds nothing. What has to wait is done by a goroutine: it holds the socket, which is a net.Conn for it, with deadlines
// and all, and gives it back afterwards.
//
// Sockets are watched edge-triggered: an event says that something has come, not that something is there. The rules that
// follow from that are few. Who read less than there was room for needs no further read before the next event, because
// whatever came later makes one, unless that event told of the end of the stream (HangUp) too. Who read all that there was
// room for has to read again. A goroutine that takes over a socket tries before it waits, and so does the loop.
//
// The package knows no HTTP. Without Linux there are no loops: see Supported.
package loop

import "time"

// Handler is told what happens on a Socket.
type Handler interface {
	// Ready is called on the socket's loop. It must not wait: all other sockets of the loop wait with it.
	Ready(e Events)
	// Failed is called in the place of the rest of a Ready that panicked.
	Failed(panicked any)
}

// Events are what may have happened on a Socket: each is a reason to try, and no promise.
type Events uint32

// Never is the time to the next tick when none is needed.
const Never = time.Duration(1<<63 - 1)
