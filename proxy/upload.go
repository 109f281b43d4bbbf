package proxy

import (
	"errors"
	"sync/atomic"
	"syscall"
	"time"

	"kerberos/proxy/loop"
)

// upload sends the rest of a request body while the response is awaited, in a goroutine of its own: a backend may answer
// before it has read all, and both may stream at once.
type upload struct {
	done     chan struct{}
	ended    atomic.Bool
	err      error                 // why not all was sent; valid once done is closed
	stopped  atomic.Bool           // nobody waits for it any more
	failed   atomic.Pointer[error] // a refusal or errClientGone, which ends the exchange
	waiting  atomic.Bool           // for the client: this time is not the backend's
	moved    int64                 // bytes of the body from the client; valid once done is closed
	began    time.Time             // by the monotonic clock: one that is set must not end an upload, nor keep it
	progress atomic.Int64          // nanoseconds after that, when the backend last took something or the client sent it
}

func (x *exchange) startUpload() {
	x.upload = &upload{done: make(chan struct{}), began: time.Now()}
	go x.upload.run(x.c, x.backend, &x.body)
}

// run moves the body from the client to the backend. While it runs it alone reads from the client and writes to the
// backend.
func (up *upload) run(c *conn, backend *backendConn, b *body) {
	defer close(up.done)
	err := up.copy(c, b)
	up.err = err
	up.ended.Store(true)
	if err != nil && isOwn(err) && !up.stopped.Load() {
		up.failed.Store(&err)
		backend.SetReadDeadline(time.Unix(1, 0)) // wakes the exchange, which waits for the response
	}
}

func (up *upload) copy(c *conn, b *body) (err error) {
	defer func() {
		if failure := recover(); failure != nil {
			c.logPanic(failure)
			err = errInternal
		}
	}()
	var parts, framed []byte
	left := c.x.route.body - int64(len(c.x.held))
	for {
		data, done, err := b.next(&c.in, relaySize)
		if err != nil {
			return errChunk
		}
		if b.chunked { // what has come in goes on as one chunk
			parts, framed = parts[:0], framed[:0]
			for len(data) > 0 {
				parts = append(parts, data...)
				if data, done, err = b.next(&c.in, relaySize); err != nil {
					return errChunk
				}
			}
			if len(parts) > 0 {
				framed = appendChunk(framed, parts)
			}
			if done {
				framed = appendLastChunk(framed, b.trailers)
			}
			left -= int64(len(parts))
			up.moved += int64(len(parts))
			data = framed
		} else {
			up.moved += int64(len(data))
		}
		if left < 0 {
			return errBodyTooLarge
		}
		if len(data) > 0 {
			err := up.push(c, len(data), func(done int) (int, error) { return c.x.backend.Write(data[done:]) })
			if err != nil {
				return err
			}
		}
		if done {
			return nil
		}
		if len(data) > 0 {
			continue
		}
		if !b.chunked && b.left >= spliceFrom && c.sock != nil && c.x.backend.plain() {
			if pipe, err := c.p.group.Pipe(); err == nil { // else there are enough of them, or no more descriptors
				return up.splice(c, b, pipe)
			}
		}
		room := c.in.space(relaySize)
		n, err := up.receive(c, func() (int, error) { return c.nc.Read(room) })
		c.in.w += n
		if err != nil {
			return err
		}
		if n == len(room) { // not before: thousands of uploads may be slow
			c.in.grow(c.in.base + relaySize)
		}
	}
}

// splice is copy for what is left of a large body with a length, between two sockets.
func (up *upload) splice(c *conn, b *body, pipe *loop.Pipe) error {
	empty := false
	defer func() { c.p.group.Release(pipe, empty) }() // after a panic too
	for b.left > 0 {
		n, err := up.receive(c, func() (int, error) { return c.sock.SpliceTo(pipe, b.left) })
		if err != nil {
			return err
		}
		b.left -= int64(n)
		up.moved += int64(n)
		if err = up.push(c, n, func(done int) (int, error) { return c.x.backend.sock.SpliceFrom(pipe, n-done) }); err != nil {
			return err
		}
	}
	empty = true
	return nil
}

// push sends to the backend; an error that is none of ours says that it has closed, and what it had to say is for the
// exchange to read.
func (up *upload) push(c *conn, all int, write func(done int) (int, error)) error {
	_, err := c.x.push(all, time.Now(), write)
	up.progressed()
	if isTimeout(err) {
		return errWriteTimeout
	}
	return err
}

// receive waits for the client.
func (up *upload) receive(c *conn, read func() (int, error)) (int, error) {
	up.waiting.Store(true)
	n, err := c.receive(c.p.cfg().Limits.BodyTimeout, read)
	up.progressed()
	up.waiting.Store(false)
	return n, err
}

func (up *upload) progressed() { up.progress.Store(int64(time.Since(up.began))) }

// since is when the backend's time to answer began: it does not run while the client is waited for.
func (up *upload) since(now time.Time) time.Time {
	if up.waiting.Load() {
		return now
	}
	return up.began.Add(time.Duration(up.progress.Load()))
}

// uploaded reports whether all of the request body was sent. A backend may answer to its last byte before the goroutine
// that sent it gets to say so.
func (x *exchange) uploaded() bool {
	if x.upload == nil {
		return x.complete
	}
	select {
	case <-x.upload.done:
		return x.upload.err == nil
	case <-time.After(uploadGrace):
		return false
	}
}

// brokenOff reports whether the backend has reset the connection and the upload was told: the kernel tells it once, and
// who reads finds an end.
func (x *exchange) brokenOff() bool {
	if x.upload == nil || x.backend.sock == nil || !x.backend.sock.Lost() {
		return false
	}
	select {
	case <-x.upload.done:
		return errors.Is(x.upload.err, syscall.ECONNRESET)
	case <-time.After(uploadGrace):
		return false
	}
}

// uploadFailed returns why the upload ended the exchange, or nil.
func (x *exchange) uploadFailed() error {
	if x.upload == nil {
		return nil
	}
	failed := x.upload.failed.Load()
	if failed == nil || x.started && (*failed == errBodyTimeout || *failed == errBodySlow) { // who only reads a response that has begun may go on
		return nil
	}
	return *failed
}

// overtaken says that the upload is to end. endUpload sets deadlines behind it: who looks here behind its own sees one of
// the two.
func (x *exchange) overtaken() bool { return x.upload != nil && x.upload.stopped.Load() }

// endUpload stops an upload that the response has overtaken, and waits for its goroutine.
func (x *exchange) endUpload() {
	up := x.upload
	if up == nil {
		return
	}
	if !up.ended.Load() {
		up.stopped.Store(true)
		x.c.nc.SetReadDeadline(time.Unix(1, 0))
		x.backend.SetWriteDeadline(time.Unix(1, 0))
	}
	<-up.done
	x.bodyRead, x.unread = up.err == nil, up.err != nil
	x.tally.received += up.moved
	x.upload = nil
	x.c.read.disarm()
	x.backend.write.disarm() // the connection may serve others yet
}
