package proxy

import (
	"bytes"
	"errors"
	"log/slog"
	"math"
	"net/netip"
	"runtime/debug"
	"time"

	"kerberos/proxy/loop"
)

const (
	// slowAfter is how long a loop waits for a backend; then a goroutine does, which also looks after the client.
	slowAfter = 100 * time.Millisecond

	wheelSize   = 128              // seconds, more than the usual timeouts: what expires later is looked at meanwhile
	readRequest = 32 << 10         // of a client at once; a larger head is read in a goroutine
	readSize    = maxWhole + 8<<10 // a response that is read whole, with its head
	firstRead   = 20 << 10         // of it: as long as nobody knows how large it is, most are small
	expireTurn  = 32               // connections that are closed at once when their time is up; others have their turn then
	lateCost    = 7                // that is more, in such, if the client is told why
	headroom    = 1 << 10          // in front of what is read: a head that has grown finds room before its body
)

// worker is what the connections of one loop share; only the loop touches it.
//
// A request whose head and body come at once, for an instance to which a connection is idle or can be begun, and whose
// answer comes at once too, is served on the loop from end to end: step sends it, answered sends the answer, and no goroutine
// is needed.
// Whatever else happens is left to a goroutine (see conn.slow), which goes on from where the loop has come to, in the code
// that all other connections use. So nothing here is the only place where a thing is done, and nothing here waits.
type worker struct {
	p       *Proxy
	loop    *loop.Loop
	index   int     // of the loop, and of the pools that its connections use
	request []byte  // what a client has just sent
	in      []byte  // what a backend has just sent, behind headroom
	out     []byte  // what is about to be sent
	waiting []*conn // their requests are at backends
	wheel   [wheelSize][]*conn
	second  int64     // of the wheel: the last one that is done
	began   time.Time // when second was 0
	conns   int       // in the wheel
	leaving []*parting
	record  Record
}

// startLoops starts the loops, one for each CPU that the program may use.
func (p *Proxy) startLoops() error {
	p.loops.Do(func() {
		p.group, p.loopsErr = loop.New(len(p.workers), func(i int, now time.Time) time.Duration { return p.workers[i].tick(now) })
		if p.loopsErr != nil {
			return
		}
		for i, l := range p.group.Loops {
			l.Call(func() {
				*p.workers[i] = worker{p: p, loop: l, index: i, request: make([]byte, readRequest), in: make([]byte, headroom+readSize), began: l.Now()}
			})
		}
	})
	return p.loopsErr
}

// noMoreLoops has startLoops fail from now on, unless it was called before.
func (p *Proxy) noMoreLoops() {
	p.loops.Do(func() { p.loopsErr = errors.New("the gateway is shut down") })
}

// adopt takes over a connection that was accepted, or leaves it to one of so many others that may have room for it. On the
// loop.
func (w *worker) adopt(fd int, remote netip.AddrPort, others int) {
	c := w.p.newConn(remote.Addr())
	c.worker = w
	if others > 0 && w.p.crowded(c) && w.spare() == nil {
		next := w.p.workers[(w.index+1)%len(w.p.workers)]
		if !next.loop.Do(func() { next.adopt(fd, remote, others-1) }) {
			loop.Discard(fd)
		}
		return
	}
	sock, err := w.loop.Watch(fd, remote, c, false)
	if err != nil {
		w.p.log.Warn("connection refused", slog.String("reason", err.Error()))
		return
	}
	c.sock, c.nc = sock, sock
	err = w.p.add(c)
	if err == error(errGatewayFull) {
		if other := w.spare(); other != nil {
			other.close()
			err = w.p.add(c)
		}
	}
	if err != nil {
		w.turnAway(sock, err)
		return
	}
	w.conns++
	w.keep(c, w.p.cfg().Limits.FirstByteTimeout)
}

// keep has a connection close unless a request comes within d.
func (w *worker) keep(c *conn, d time.Duration) {
	now := w.loop.Now()
	c.since, c.expires = w.seconds(now), w.seconds(now.Add(d+time.Second))
	switch {
	case c.place < 0:
		w.shelve(c, c.expires)
	case c.expires < c.shelf:
		w.unshelve(c)
		w.shelve(c, c.expires)
	}
	w.loop.Within(time.Second)
}

func (w *worker) seconds(t time.Time) int64 { return int64(t.Sub(w.began) / time.Second) }

// shelve puts a connection into the wheel, to be looked at in that second. It stays there when it expires later: a
// kept-alive connection costs a look a minute, not one a request.
func (w *worker) shelve(c *conn, second int64) {
	bucket := &w.wheel[second%wheelSize]
	c.shelf, c.place = second, len(*bucket)
	*bucket = append(*bucket, c)
}

func (w *worker) unshelve(c *conn) {
	bucket := w.wheel[c.shelf%wheelSize]
	last := bucket[len(bucket)-1]
	bucket[c.place], last.place = last, c.place
	bucket[len(bucket)-1] = nil
	w.wheel[c.shelf%wheelSize] = bucket[:len(bucket)-1]
	c.place = -1
}

// tick leaves requests that take long to goroutines, and closes connections on which nothing comes.
func (w *worker) tick(now time.Time) time.Duration {
	patience := w.p.cfg().slowAfter
	for i := len(w.waiting) - 1; i >= 0; i-- {
		c := w.waiting[i]
		if now.Sub(c.x.began) < patience {
			continue
		}
		if !c.x.backend.sock.Connecting() {
			w.loop.Guard(c, func() { c.answered(0) }) // it may be the loop that is late
		}
		if c.slot == i && now.Sub(c.x.began) >= patience {
			c.slow(stageAsked)
		}
	}
	reached := w.seconds(now)
	left := expireTurn
	for w.second = max(w.second, reached-wheelSize); w.second < reached && left >= 0; {
		if left = w.expire(w.second+1, left); left >= 0 {
			w.second++
		}
	}
	w.part(reached)
	switch {
	case left < 0:
		return time.Millisecond
	case len(w.waiting) > 0:
		return patience / 2
	case w.conns > 0 || len(w.leaving) > 0:
		return time.Second
	}
	return loop.Never
}

// expire looks at the connections of one second. It closes left of them at most, and returns how many more it might have,
// less than 0 if there are some that it did not close.
func (w *worker) expire(second int64, left int) int {
	bucket := w.wheel[second%wheelSize]
	for i := len(bucket) - 1; i >= 0; i-- {
		c := bucket[i]
		if w.reshelve(c, second) {
			continue
		}
		if left--; left < 0 {
			break
		}
		if c.reading {
			left -= lateCost
			c.reading = false
			c.slow(stageLate)
		} else {
			c.close()
		}
	}
	return left
}

// reshelve moves a connection of that second to a later one, if it is not to expire in this.
func (w *worker) reshelve(c *conn, second int64) bool {
	switch {
	case c.sock.Held() || c.slot >= 0:
		w.unshelve(c)
		w.shelve(c, second+wheelSize/2)
	case c.expires > second:
		w.unshelve(c)
		w.shelve(c, c.expires)
	default:
		return false
	}
	return true
}

// shutdown closes what is idle, and leaves requests under way to goroutines, which Shutdown can count and cut.
func (w *worker) shutdown() {
	w.part(math.MaxInt64)
	for _, bucket := range w.wheel {
		for _, c := range append([]*conn(nil), bucket...) {
			switch {
			case c.slot >= 0:
				c.slow(stageAsked)
			case c.reading:
				c.reading = false
				c.slow(stageReading)
			case !c.sock.Held():
				if c.tunnel == nil {
					c.close()
				}
			case c.state.CompareAndSwap(stateIdle, stateClosed):
				c.cut()
			}
		}
	}
}

// await notes that the request of a connection is at a backend; done that it is no more.
func (w *worker) await(c *conn) {
	c.slot = len(w.waiting)
	w.waiting = append(w.waiting, c)
	w.loop.Within(w.p.cfg().slowAfter)
}

func (w *worker) done(c *conn) {
	last := w.waiting[len(w.waiting)-1]
	w.waiting[c.slot], last.slot = last, c.slot
	w.waiting[len(w.waiting)-1] = nil
	w.waiting = w.waiting[:len(w.waiting)-1]
	c.slot = -1
	c.x.backend.client = nil
}

// A stage is how far the loop has come with a request.
type stage uint8

const (
	stageHead     stage = iota // not to the end of its head
	stageLate                  // nor will it come: there was time enough
	stageReading               // not to its end, or it is none that a loop serves
	stagePicked                // to an instance that a loop cannot talk to
	stageDial                  // to one to which no connection is idle, nor can the loop make one
	stageAsked                 // it is at the instance, but for x.unsent
	stageAnswered              // the answer was made, and what of it was not sent is in c.out
	stagePanicked
)

// Ready is called by the loop.
func (c *conn) Ready(e loop.Events) {
	if e&(loop.Readable|loop.HangUp) == 0 {
		return
	}
	c.more = true
	c.ending = c.ending || e&loop.HangUp != 0
	switch {
	case c.slot < 0:
		c.step()
	case e&loop.HangUp != 0: // in the middle of a request
		c.slow(stageAsked)
	}
}

// step reads requests and sends them to backends, until one is under way or nothing more has come in.
func (c *conn) step() {
	for {
		c.occupy()
		b := &c.in
		b.skipEmptyLines()
		if b.r < b.w {
			switch s, ok := c.ask(); {
			case ok:
				c.reading = false
				return
			case s != stageHead:
				c.reading = false
				c.slow(s)
				return
			case !c.reading:
				c.reading = true
				c.worker.keep(c, c.p.cfg().Limits.HeadTimeout)
			default:
				c.since = c.worker.seconds(c.worker.loop.Now())
			}
		}
		if !c.more {
			if b.r == b.w {
				c.vacate()
			}
			return
		}
		room := c.worker.request[:readRequest-len(b.waiting())]
		n, err := c.sock.TryRead(room)
		if err == loop.ErrAgain {
			c.more, c.ending = false, false
			continue
		}
		if err != nil || n == 0 {
			c.close()
			return
		}
		b.fill(room[:n])
		c.more = n == len(room) || c.ending
	}
}

// ask sends the request that has come in to an instance. If it is not one for the loop, ok is false, and s says how far it
// came with it.
func (c *conn) ask() (s stage, ok bool) {
	b, r, x, w := &c.in, &c.req, &c.x, c.worker
	waiting := b.waiting()
	limits := &c.p.cfg().Limits
	// Most heads are whole, so they are parsed before it is known; those that are not, once.
	if c.reading && !bytes.Contains(waiting, headEnd) || r.parse(waiting, c.p.cfg().via, c.trusted, limits) != nil {
		return unfinished(waiting, limits), false
	}
	end := r.size
	if end > limits.Head || r.authority || r.chunked || r.length > int64(len(waiting)-end) || c.isLocal() || c.asksTunnel() {
		return stageReading, false
	}
	x.begin(w.loop.Now())
	service, err := x.find()
	if err != nil || r.length > x.route.body {
		return stageReading, false
	}
	v := service.view.Load()
	if len(v.probing) > 0 || v.ready == 0 {
		return stageReading, false
	}
	x.service = service
	if c.p.cfg().capped && (service.crowd.waiting.Load() > 0 || !x.enter()) {
		return stageReading, false
	}
	x.use(v)
	if x.choose(v) == nil {
		x.leave()
		return stageReading, false
	}
	c.head = waiting[:end]
	b.r += end
	b.base = b.r
	_ = x.hold(false) // it is all here
	if x.upstream.tls != nil {
		return stagePicked, false
	}
	x.reused = true
	if x.lease, x.backend = x.upstream.idle(w.index); x.lease == nil {
		if x.lease, x.backend, x.reused = x.upstream.begin(w.index); x.lease == nil {
			return stageDial, false
		}
	}
	x.attempts, x.sent = 1, x.began
	return stageAsked, c.put()
}

// unfinished says what becomes of a head that parse does not take: more of it may come, or it is bad.
func unfinished(b []byte, limits *Limits) stage {
	if b[0] != '\r' && len(b) < min(readRequest, limits.Head) && !bytes.Contains(b, headEnd) && !bareLF(b, 0) &&
		(len(b) < limits.RequestLine || bytes.IndexByte(b, '\n') >= 0) {
		return stageHead
	}
	return stageReading
}

// put sends the request to the backend, as soon as it is connected; false: not all of it.
func (c *conn) put() bool {
	x, w := &c.x, c.worker
	b := x.backend
	b.forget()
	out := append(c.appendHead(w.out[:0], &c.req, x.route, &x.upstream.target), x.held...)
	w.out = out[:0]
	b.client = c
	w.await(c)
	n, err := 0, b.sock.Connected()
	onItsWay := err == loop.ErrAgain
	if err == nil {
		n, _ = b.sock.TryWrite(out) // an error is one of the next write too
	} else if !onItsWay {
		b.failed = err
	}
	x.noteAsked()
	x.written, x.given = n > 0, int64(max(n, 0))
	if n < len(out) {
		x.unsent = append([]byte(nil), out[max(n, 0):]...)
	}
	return n == len(out) || onItsWay
}

// connected is called by the loop when the connection to the backend may have come about.
func (c *conn) connected(e loop.Events) {
	x, b := &c.x, c.x.backend
	switch err := b.sock.Connected(); {
	case err == loop.ErrAgain:
		return
	case err != nil:
		b.failed = err
		c.slow(stageAsked)
		return
	}
	x.sent = c.worker.loop.Now()
	n, _ := b.sock.TryWrite(x.unsent)
	x.written, x.given = n > 0, int64(max(n, 0))
	if n < len(x.unsent) {
		x.unsent = x.unsent[max(n, 0):]
		c.slow(stageAsked)
		return
	}
	x.unsent = nil
	if e&(loop.Readable|loop.HangUp) != 0 {
		c.answered(e)
	}
}

// dial makes the connection that the loop has none of, in a goroutine, and goes back to the loop with it; or it reports why
// it could not.
func (c *conn) dial() error {
	x := &c.x
	x.attempts, x.sent = 1, time.Now()
	var err error
	x.lease, x.backend, x.reused, err = x.upstream.acquire(c.pool(), false, x.timeLeft())
	if err == nil && x.reused && !x.backend.quiet() { // somebody gave it back meanwhile
		x.upstream.release(c.pool(), x.lease, false)
		x.lease, x.backend, x.reused, err = x.upstream.acquire(c.pool(), true, x.timeLeft())
	}
	if err != nil {
		return x.undialled(err)
	}
	c.leave(func() {
		x.sent = c.worker.loop.Now()
		if !c.put() || c.p.closing.Load() {
			c.slow(stageAsked)
			return
		}
		c.answered(0) // it may have come before the loop was told of anything
	})
	return nil
}

// leave gives the connection back to its loop, from the goroutine that had it, and has the loop go on with f.
func (c *conn) leave(f func()) {
	l := c.worker.loop
	l.Do(func() {
		c.sock.Forget()
		c.read.disarm()
		c.write.disarm()
		c.state.Store(stateIdle)
		c.more, c.ending = true, true // events that came in the meantime were not told
		l.Guard(c, f)
	})
}

// rejoin does so between requests.
func (c *conn) rejoin() {
	c.leave(func() {
		if c.p.closing.Load() {
			c.close()
			return
		}
		c.worker.keep(c, c.p.cfg().Limits.IdleTimeout)
		c.step()
	})
}

// answered is called by the loop when something has come from the backend. An answer that is there as a whole is sent.
func (c *conn) answered(e loop.Events) {
	x, w := &c.x, c.worker
	room := w.in[headroom:]
	got, end := 0, 0
	for limit := firstRead; ; limit = len(room) {
		n, err := x.backend.sock.TryRead(room[got:limit])
		if err == loop.ErrAgain && got == 0 {
			return
		}
		got += max(n, 0)
		if end == 0 {
			if end = -1; x.res.parse(room[:got], &w.p.cfg().Limits) == nil && x.res.status >= 200 {
				end = x.res.size
			}
		}
		if end < 0 || got < limit || limit == len(room) || x.res.length > maxWhole || x.whole(got-end) {
			break
		}
	}
	x.taken += int64(got)
	data := room[:got]
	var out []byte
	rest, ok := 0, false // what follows the answer
	if end > 0 {
		if x.res.chunked && c.req.minor == 1 && !x.bodyless() {
			out, rest, ok = w.chunked(x, data[end:])
		} else {
			out, rest, ok = w.sized(x, end, got)
		}
	}
	if !ok {
		switch {
		case got < firstBuffer:
			c.takeScratch(c.p)
		case got <= relaySize:
			x.back.b = x.borrow(relayBuffer)
		default:
			x.back.b = x.borrow(backBuffer)
		}
		x.back.base, x.back.r, x.back.w = 0, 0, copy(x.back.b, data)
		c.slow(stageAsked)
		return
	}
	w.done(c)
	x.noteAnswered(w.loop.Now())
	x.started, x.status = true, x.res.status
	x.end(x.verdict())
	x.release(rest == 0 && e&loop.HangUp == 0)
	n, err := c.sock.TryWrite(out)
	x.tally.sent = int64(max(n, 0))
	switch {
	case n == len(out):
		if c.after(x.keep) {
			w.keep(c, c.p.cfg().Limits.IdleTimeout)
			c.step()
		} else {
			c.close()
		}
	case err == nil || err == loop.ErrAgain:
		c.out = append(c.out[:0], out[max(n, 0):]...)
		c.slow(stageAnswered)
	default:
		x.status, x.tally.by, x.tally.reason = statusClientGone, byNobody, reasonGone
		c.after(false)
		c.close()
	}
}

// sized makes an answer whose body has a length, or that has none, of what is in w.in: the head up to end, and what came
// behind it up to got. rest is how many bytes follow the answer; ok is false if it is not all here.
func (w *worker) sized(x *exchange, end, got int) (out []byte, rest int, ok bool) {
	if !x.whole(got - end) {
		return nil, 0, false
	}
	length := 0
	if !x.bodyless() {
		length = int(x.res.length)
	}
	out = x.appendResponse(w.out[:0])
	w.out = out[:0]
	body := w.in[headroom+end:][:length]
	if start := headroom + end - len(out); length > headroom && start >= 0 {
		copy(w.in[start:], out) // in front of the body: spare the copy of the larger one
		out = w.in[start : headroom+end+length]
	} else {
		out = append(out, body...)
		w.out = out[:0]
	}
	return out, got - end - length, true
}

// chunked makes an answer whose body comes in chunks.
func (w *worker) chunked(x *exchange, data []byte) (out []byte, rest int, ok bool) {
	if !bytes.HasSuffix(data, headEnd) { // spare the copy: its last chunk is not here, or something follows
		return nil, 0, false
	}
	x.resBody.start(x.res.framing)
	b := buffer{b: data, w: len(data)}
	out = x.appendResponse(w.out[:0])
	for {
		part, done, err := x.resBody.next(&b, len(data))
		if err != nil || !done && len(part) == 0 {
			w.out = out[:0]
			return nil, 0, false // broken, or not all here
		}
		if len(part) > 0 {
			out = appendChunk(out, part)
		}
		if done {
			out = appendLastChunk(out, x.resBody.trailers)
			w.out = out[:0]
			return out, len(b.waiting()), true
		}
	}
}

// slow leaves the connection, and the request on it, to a goroutine.
func (c *conn) slow(s stage) {
	if c.slot >= 0 {
		c.x.backend.sock.Hold()
		c.worker.done(c)
	}
	if s != stageReading {
		c.state.Store(stateActive)
	}
	c.sock.Hold()
	c.worker.loop.Go(func() { c.serve(s) })
}

// close ends the connection. On the loop.
func (c *conn) close() {
	c.vacate()
	c.state.Store(stateClosed)
	if c.tunnel != nil {
		c.tunnel.release()
	}
	c.sock.Close()
	c.worker.forget(c)
	c.p.remove(c)
}

// forget takes a closed connection out of the wheel.
func (w *worker) forget(c *conn) {
	if c.place >= 0 {
		w.unshelve(c)
		w.conns--
	}
}

// Failed is called by the loop after a panic: it costs the request, not the process.
func (c *conn) Failed(failure any) {
	c.logPanic(failure)
	if c.workspace == nil {
		c.close()
		return
	}
	c.slow(stagePanicked)
}

func (c *conn) logPanic(failure any) {
	c.p.log.Error("panic in a request", slog.Any("panic", failure), slog.String("stack", string(debug.Stack())))
}

// Ready is called by the loop: it brings an answer, or the connection can no longer be used.
func (b *backendConn) Ready(e loop.Events) {
	switch c := b.client; {
	case c != nil && b.sock.Connecting():
		c.worker.loop.Blame(c)
		c.connected(e)
	case e&(loop.Readable|loop.HangUp) == 0:
	case c != nil:
		c.worker.loop.Blame(c)
		c.answered(e)
	case b.sock.Peek() >= 0: // while it was idle
		b.dead.Store(true)
	}
}

// Failed is called by the loop after a panic that was no client's.
func (b *backendConn) Failed(any) { b.dead.Store(true) }
