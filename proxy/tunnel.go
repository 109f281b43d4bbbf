package proxy

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kerberos/proxy/loop"
)

const (
	tunnelTurn = 256 << 10 // what one direction of a tunnel moves before the other sockets of its loop have their turn
	tunnelRead = 16 << 10  // what a goroutine reads at a time: a record of TLS
)

// tunnel is what a client's connection and one to an instance become when the instance agrees to an Upgrade (RFC 9110
// section 7.8), or to CONNECT (section 9.3.6): bytes both ways as they come, until both sides have ended their stream. To the
// breaker and the counters the request has ended when it begins.
//
// Two sockets of one loop are served there: while nothing moves they cost no goroutine and no buffer. Otherwise, as with
// TLS, two goroutines copy.
type tunnel struct {
	c        *conn
	upstream *upstream
	backend  *backendConn
	up, down flow        // from the client, to the client
	broken   atomic.Bool // one side has failed: the other shall not take that for the end
	released bool
	record   *Record // of the request; nil if nobody is told

	// for goroutines
	since   time.Time    // the clock of moved
	moved   atomic.Int64 // nanoseconds on it: when something was last read or written
	idle    *time.Timer
	half    atomic.Bool // the client was told that the backend has ended
	aborted atomic.Bool // both connections are closed here: that neither can be used is no failure of its side
}

// flow is one direction of a tunnel. On the loop it is the handler of the socket that it reads.
type flow struct {
	t        *tunnel
	from, to *loop.Socket
	back     *flow // the other direction
	more     bool  // from may hold something
	ending   bool  // from may have ended, see conn.ending
	over     bool  // nothing can be written to from any more
	ended    bool  // from has ended and to was told, or to takes nothing any more
	waiting  []byte
	pipe     *loop.Pipe        // nil unless from brings more than fits into a buffer
	piped    int               // bytes in it
	total    int64             // what to was given
	counters [2]*atomic.Uint64 // of the service, of the instance
}

// asksTunnel says that the request asks for an Upgrade that is allowed, or is a CONNECT. Any other Upgrade is ignored, RFC
// 9110 section 7.8.
func (c *conn) asksTunnel() bool {
	r := &c.req
	return r.authority || r.upgrade && r.upgradeField && c.mayUpgrade(nil)
}

// mayUpgrade reports whether the request may change to a protocol that it asks for; to any if protocol is nil. A body would
// have to be read in the old protocol while the new one begins: such a request is served as if it did not ask.
func (c *conn) mayUpgrade(protocol []byte) bool {
	r := &c.req
	if r.minor == 0 || r.chunked || r.length > 0 {
		return false
	}
	for asked := range c.upgrades {
		if protocol == nil || among([][]byte{asked}, protocol) {
			return true
		}
	}
	return false
}

// upgrades yields the protocols that the request asks for and that are allowed, as the client wrote them.
func (c *conn) upgrades(yield func(protocol []byte) bool) {
	for rest := c.req.lines; len(rest) > 0; {
		f, n, err := readField(rest)
		if err != nil {
			return
		}
		if rest = rest[n:]; identify(f.name) != fieldUpgrade {
			continue
		}
		for protocol := range list(f.value) {
			if among(c.p.cfg().upgrades, protocol) && !yield(protocol) {
				return
			}
		}
	}
}

// refusesWebSocket says that the request is a WebSocket handshake, which cannot succeed.
func (c *conn) refusesWebSocket() bool {
	return c.req.upgrade && c.req.websocket && !among(c.p.cfg().upgrades, []byte("websocket")) && !c.asksTunnel()
}

// appendUpgrade appends what asks the backend for an Upgrade.
func (c *conn) appendUpgrade(dst []byte) []byte {
	before := "Connection: Upgrade\r\nUpgrade: "
	for protocol := range c.upgrades {
		dst = append(dst, before...)
		dst = append(dst, protocol...)
		before = ", "
	}
	if before != ", " { // CONNECT
		return dst
	}
	return append(dst, '\r', '\n')
}

// switches reports whether the response makes a tunnel of the connection: one protocol, and one that was asked for.
func (x *exchange) switches() bool {
	res := &x.res
	switch {
	case !x.c.req.switching:
		return false
	case x.c.req.authority:
		return res.status/100 == 2
	}
	return res.status == 101 && res.upgrade && res.protocols == 1 && len(res.protocol) > 0 && x.c.mayUpgrade(res.protocol)
}

// appendSwitch appends the head that tells the client that the tunnel begins. It has no framing, whatever the backend said:
// RFC 9110 sections 8.6 and 9.3.6.
func (x *exchange) appendSwitch(dst []byte) []byte {
	res := &x.res
	for at := 0; res.length >= 0 && res.status > 199 && res.status != 204 && at < len(res.lines); { // of others parse drops it
		f, n, _ := readField(res.lines[at:])
		if identify(f.name) == fieldContentLength {
			res.drops = append(res.drops, span{at, at + n})
			slices.SortFunc(res.drops, func(a, b span) int { return a.from - b.from })
			break
		}
		at += n
	}
	dst = res.append(dst, x.route.response)
	if res.status == 101 {
		dst = append(dst, "Connection: Upgrade\r\nUpgrade: "...)
		dst = append(dst, res.protocol...)
		dst = append(dst, '\r', '\n')
	}
	return append(dst, '\r', '\n')
}

// openTunnel ends the request and makes a tunnel of its two connections. Where goroutines serve it, it returns when the
// tunnel has ended; otherwise the tunnel begins when the caller, who has them, leaves the connections to it.
func (x *exchange) openTunnel() {
	c := x.c
	t := &tunnel{c: c, upstream: x.upstream, backend: x.backend}
	t.up = flow{t: t, from: c.sock, to: x.backend.sock, back: &t.down, waiting: slices.Clone(c.in.waiting())}
	t.down = flow{t: t, from: x.backend.sock, to: c.sock, back: &t.up, waiting: append(slices.Clone(c.out), x.back.waiting()...)}
	t.down.total = -int64(len(c.out))       // the head does not count
	x.taken -= int64(len(x.back.waiting())) // it has come through the tunnel
	n, at := x.service.counted(c.pool()), x.upstream.pool(c.pool())
	t.up.counters, t.down.counters = [2]*atomic.Uint64{&n.received, &at.received}, [2]*atomic.Uint64{&n.sent, &at.sent}
	took := x.times()
	c.count(took)
	t.upstream.tunnels.Add(1)
	x.tunnel, x.lease = t, nil
	x.watchClient(false)
	x.end(success, nil)
	if c.p.recorded {
		t.record = c.tunnelRecord(took)
	}
	x.leave()
	c.out = c.out[:0]
	x.giveBack()
	if t.plain() {
		return
	}
	defer t.release()
	if c.p.enter(t) {
		t.run()
	}
}

// plain reports whether the tunnel is served on a loop.
func (t *tunnel) plain() bool { return t.c.sock != nil && t.backend.plain() }

// enter makes the tunnel what its connection is. It reports false if Shutdown has cut the connection.
func (p *Proxy) enter(t *tunnel) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	t.c.tunnel = t
	return !p.cutting
}

// cut ends the tunnel, whatever it is doing. p.mu is held.
func (t *tunnel) cut() {
	if t.plain() {
		t.c.worker.loop.Do(t.c.close)
		return
	}
	t.abort()
}

// release ends what belongs to the tunnel beside the client's connection. Only the first call counts.
func (t *tunnel) release() {
	if t.released {
		return
	}
	t.released = true
	for _, f := range []*flow{&t.up, &t.down} {
		f.waiting = nil
		f.dropPipe()
	}
	t.backend.Close()
	t.upstream.tunnels.Add(-1)
	if r := t.record; r != nil {
		r.Took, r.Received, r.Sent = time.Since(r.Began), t.up.total, max(t.down.total, 0)
		t.c.p.tell(r)
	}
}

// leave gives both connections to the loop, from the goroutine that had them, and begins.
func (t *tunnel) leave() {
	c, l := t.c, t.c.worker.loop
	c.vacate()
	l.Do(func() {
		c.sock.SetHandler(&t.up)
		c.sock.Forget()
		c.read.disarm()
		c.write.disarm()
		t.backend.sock.SetHandler(&t.down)
		t.backend.forget()
		l.Guard(&t.up, t.begin)
	})
}

// begin sends what has come in already. On the loop, as all that follows up to run.
func (t *tunnel) begin() {
	c := t.c
	if !c.p.enter(t) {
		c.close()
		return
	}
	c.worker.keep(c, t.patience())
	for _, f := range []*flow{&t.down, &t.up} {
		f.more, f.ending = true, true // events that came in the meantime were not told
	}
	t.down.pump()
	t.up.pump()
}

// patience is how long nothing may move.
func (t *tunnel) patience() time.Duration { return t.c.p.cfg().Limits.TunnelIdle }

// Ready is called for what has happened on from.
func (f *flow) Ready(e loop.Events) {
	if e&(loop.Readable|loop.HangUp) != 0 {
		f.more = true
		f.ending = f.ending || e&loop.HangUp != 0
		f.over = f.over || e&loop.Over != 0
		if !f.blocked() || f.over {
			f.pump()
		}
	}
	if e&loop.Writable != 0 && f.back.blocked() {
		f.back.pump()
	}
}

// Failed is called after a panic: it costs the tunnel.
func (f *flow) Failed(failure any) {
	f.t.c.logPanic(failure)
	f.t.c.close()
}

// blocked says that to did not take all that was read.
func (f *flow) blocked() bool { return len(f.waiting) > 0 || f.piped > 0 }

// pump moves what from holds to to: until nothing is left, to takes no more, or the turn is over. What is left over of a
// read is kept, and nothing more is read before it is gone.
func (f *flow) pump() {
	t := f.t
	if t.released {
		return
	}
	before := f.total
	for !f.ended {
		if f.blocked() {
			if err := f.flush(); err != nil {
				f.fail()
				return
			}
			if f.blocked() {
				f.waiting = slices.Clone(f.waiting) // the loop's buffer is for all
				break
			}
		}
		if f.more && f.total-before >= tunnelTurn {
			f.from.Again()
			break
		}
		if !f.more {
			break
		}
		if err := f.fetch(); err != nil {
			t.broken.Store(true)
			t.end()
			return
		}
	}
	switch {
	case f.ended && (f.back.ended || f.over):
		t.end()
	case f.total != before:
		t.c.worker.keep(t.c, t.patience())
	}
}

// gave notes that to was given so many bytes. They are counted as they go: a tunnel may last for days.
func (f *flow) gave(n int) {
	before := max(f.total, 0)
	f.total += int64(n)
	f.counters[0].Add(uint64(n))
	f.counters[1].Add(uint64(max(f.total, 0) - before)) // the head was counted as it came
}

// flush writes what waits, as much as to takes.
func (f *flow) flush() error {
	for f.blocked() {
		var n int
		var err error
		if f.piped > 0 {
			n, err = f.to.TrySpliceFrom(f.pipe, f.piped)
			f.piped -= n
		} else {
			n, err = f.to.TryWrite(f.waiting)
			f.waiting = f.waiting[n:]
		}
		f.gave(n)
		switch err {
		case nil:
		case loop.ErrAgain:
			return nil
		default:
			return err
		}
	}
	return nil
}

// fetch reads once, and tells to of the end. A read that fills the buffer makes it likely that there is a lot: that goes
// through a pipe, until nothing is left.
func (f *flow) fetch() error {
	var n int
	var err error
	buf := f.t.c.worker.request
	if f.pipe != nil {
		n, err = f.from.TrySpliceTo(f.pipe)
	} else {
		n, err = f.from.TryRead(buf)
	}
	switch {
	case err == loop.ErrAgain:
		f.more, f.ending = false, false
		f.dropPipe()
	case err != nil:
		return err
	case n == 0:
		f.ended = true
		f.dropPipe()
		if f.t.broken.Load() || f.t.backend.severed.Load() || f.over && !f.back.ended { // it is no orderly end
			return nil
		}
		return f.to.CloseWrite()
	case f.pipe != nil:
		f.piped = n
	default:
		f.waiting = buf[:n]
		f.more = n == len(buf) || f.ending
		if n == len(buf) {
			f.pipe, _ = f.t.c.p.group.Pipe() // nil if there are no more descriptors: the buffer does it too
		}
	}
	return nil
}

func (f *flow) dropPipe() {
	if f.pipe != nil {
		f.t.c.p.group.Release(f.pipe, f.piped == 0)
		f.pipe, f.piped = nil, 0
	}
}

// fail ends a direction whose receiver takes nothing any more. What that has sent before is still passed on.
func (f *flow) fail() {
	f.t.broken.Store(true)
	f.ended, f.waiting = true, nil
	f.dropPipe()
	b := f.back
	b.more, b.ending, b.over = true, true, true
	b.pump()
}

// end closes both connections.
func (t *tunnel) end() {
	if t.broken.Load() || !t.up.ended || !t.down.ended {
		t.reset()
	}
	t.c.close()
}

// reset makes the next close of both connections a reset.
func (t *tunnel) reset() {
	t.c.reset()
	resetOnClose(t.backend.transport())
}

// run copies, in this goroutine and another one, until the tunnel has ended.
func (t *tunnel) run() {
	client := t.c.nc
	if errors.Join(client.SetDeadline(time.Time{}), t.backend.SetDeadline(time.Time{})) != nil {
		return
	}
	t.since = time.Now()
	t.idle = time.AfterFunc(t.patience(), t.expire)
	defer t.idle.Stop()
	var upload sync.WaitGroup
	upload.Go(func() { t.copy(&t.up, t.backend.Conn, client) })
	t.copy(&t.down, client, t.backend.Conn)
	upload.Wait()
	if t.broken.Load() {
		t.reset()
	}
}

// expire closes the tunnel if nothing has moved.
func (t *tunnel) expire() {
	if left := t.patience() - time.Since(t.since) + time.Duration(t.moved.Load()); left > 0 {
		t.idle.Reset(left)
		return
	}
	t.abort()
}

// copy is one direction.
func (t *tunnel) copy(f *flow, to, from net.Conn) {
	defer func() {
		if failure := recover(); failure != nil {
			t.c.logPanic(failure)
			t.abort()
		}
	}()
	buf := make([]byte, tunnelRead)
	data, err := f.waiting, error(nil)
	for {
		if len(data) > 0 {
			n, failed := to.Write(data)
			f.gave(n)
			if failed != nil { // what to has sent before is still passed on, by the other direction
				t.fail()
				return
			}
			t.moved.Store(int64(time.Since(t.since)))
		}
		if err != nil {
			break
		}
		var n int
		n, err = from.Read(buf)
		data = buf[:n]
	}
	orderly := err == io.EOF && !t.broken.Load() && !t.backend.severed.Load()
	if s := f.from; s != nil && s.Ended() && s.Lost() && !t.half.Load() { // a write got the error
		orderly = false
	}
	if half, ok := to.(interface{ CloseWrite() error }); ok && orderly {
		if to == t.c.nc {
			t.half.Store(true)
		}
		if half.CloseWrite() != nil {
			t.fail() // as above
		}
		return
	}
	if !orderly && t.fail() {
		t.reset()
	}
	t.abort()
}

// fail notes that a side has failed. It reports false if abort has closed both.
func (t *tunnel) fail() bool {
	if t.aborted.Load() {
		return false
	}
	t.broken.Store(true)
	return true
}

// abort closes both connections at once, from any goroutine.
func (t *tunnel) abort() {
	t.aborted.Store(true)
	t.c.nc.Close()
	t.backend.transport().Close()
}
