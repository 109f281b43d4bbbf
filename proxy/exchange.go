package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"kerberos/cb"
	"kerberos/lb"
)

const (
	maxHeld      = 64 << 10              // request bodies up to this size may be sent again
	maxWhole     = 64 << 10              // responses up to this size are read whole before they are passed on,
	wholeTimeout = 20 * time.Millisecond // if they are there this long after their head
	relaySize    = 32 << 10              // what a stream is read and written in

	settledBytes = 64 << 10    // a response that has run this far,
	settledTime  = time.Second // or this long, is a success to the breaker

	clientCheck     = time.Second     // how often a request that waits looks whether its client is still there
	silenceTimeout  = 5 * time.Minute // a backend that sends nothing in mid-body
	maxInterim      = 16              // responses 1xx before the final one
	uploadGrace     = 5 * time.Millisecond
	chunkPatience   = 20 * time.Millisecond
	uploadTimeout   = 30 * time.Second // a backend that takes nothing of a request
	continueMessage = "HTTP/1.1 100 Continue\r\n\r\n"
)

// exchange is one request on its way to an answer. A connection has one and uses it again and again.
type exchange struct {
	c       *conn
	now     time.Time // when the request's head was there
	service *service
	key     uint64 // of the client, for ip-hash
	retries int    // what is left of Config.Retries
	waited  time.Duration

	// whom to ask
	view     *view
	tried    lb.Tried // indices into view.ready
	asked    asked    // the same across views
	upstream *upstream
	token    cb.Token
	open     bool // the token, and the request in flight, have not ended yet
	settled  bool // the breaker was told already
	spare    bool // the attempt is a probe that a ready instance can make up for
	err      error
	attempts int

	// the request body
	held     []byte // what was read of it before the first attempt
	complete bool   // held is all of it
	body     body
	upload   *upload // what is left of it is being sent
	bodyRead bool    // it was read to its end
	unread   bool    // it was not, and the connection has to end for that

	// one attempt
	lease    lease
	conn     *backendConn
	written  bool // the backend may have seen something of the request
	sent     time.Time
	back     buffer // what comes from the backend
	backOut  []byte // the head that goes to it
	res      response
	resBody  body
	resEnded bool // all of the response is in conn.out

	// the response to the client
	started bool // bytes of it may have reached the client
	keep    bool // the client connection goes on behind it
	chunks  bool // it is sent in chunks
	status  int

	buffers [3]*[]byte // pooled, given back by begin
	small   [2][]byte  // what they stand in for
}

// asked is the instances that a request went to.
type asked struct {
	n    int
	list [lb.MaxTried]*upstream
}

func (a *asked) add(u *upstream) {
	a.list[a.n] = u
	a.n++
}

func (a *asked) has(u *upstream) bool {
	for _, other := range a.list[:a.n] {
		if other == u {
			return true
		}
	}
	return false
}

func (x *exchange) p() *Proxy { return x.c.p }

// begin starts an exchange for the request in c.req.
func (x *exchange) begin(now time.Time) {
	r := &x.c.req
	r.Client = x.c.peer
	if len(r.xff) > 0 {
		r.Client = x.p().client(r, x.c.peer)
	}
	if x.back.b == nil {
		x.back.b = make([]byte, firstBuffer)
	}
	x.now, x.service, x.key, x.retries, x.waited = now, nil, 0, x.p().cfg.Retries, 0
	x.view, x.asked.n, x.upstream, x.open, x.spare, x.err, x.attempts = nil, 0, nil, false, false, nil, 0
	x.held, x.complete, x.upload, x.unread = nil, true, nil, false
	x.bodyRead = !r.chunked && r.length <= 0
	x.started, x.status, x.settled = false, 0, false
}

// look takes a view for the next pick; what was asked in another one stays asked.
func (x *exchange) look(v *view) {
	if v == x.view {
		return
	}
	x.view = v
	x.tried.Reset()
	for _, u := range x.asked.list[:x.asked.n] {
		if i := v.find(u); i >= 0 {
			x.tried.Add(i)
		}
	}
	if v.ipHash != nil {
		x.key = lb.Key(x.c.req.Client)
	}
}

// end ends the attempt for the breaker and the counters. Only the first call of an attempt counts.
func (x *exchange) end(o outcome, reason error) {
	if !x.open {
		return
	}
	x.open = false
	u := x.upstream
	switch {
	case x.settled:
	case o == success:
		u.gate.Success(x.token)
	case o == failure:
		u.gate.Failure(x.token, reason)
	default:
		u.gate.Ignored(x.token)
	}
	if o == failure {
		u.fail(reason.Error())
	}
	u.outcomes[o].Add(1)
	u.inFlight.Add(-1)
}

// settle tells the breaker that a long response is a success while it still runs.
func (x *exchange) settle() {
	if !x.open || x.settled {
		return
	}
	x.settled = true
	if o, reason := x.verdict(); o == success {
		x.upstream.gate.Success(x.token)
	} else {
		x.upstream.gate.Failure(x.token, reason)
	}
}

// verdict is what a complete response says of its instance.
func (x *exchange) verdict() (outcome, error) {
	if x.p().failing[x.res.status] {
		return failure, statusError(x.res.status)
	}
	return success, nil
}

// repeatable reports whether the request may be sent a second time: RFC 9110 section 9.2.2.
func (x *exchange) repeatable() bool {
	if !x.complete {
		return false
	}
	switch string(x.c.req.Method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// timeLeft is what is left of the request timeout.
func (x *exchange) timeLeft() time.Duration { return x.p().cfg.RequestTimeout - x.waited }

// hold reads a request body that is small enough to be sent twice. One that is larger, or comes slowly in chunks, is
// sent as it comes. A client that waits for it is told to go on.
// patient means to wait for slow chunks too.
func (x *exchange) hold(patient bool) error {
	c, r, b := x.c, &x.c.req, &x.c.in
	if x.bodyRead {
		return nil
	}
	if !r.chunked && int64(len(b.waiting())) >= r.length { // it came with the head
		x.held = b.b[b.r : b.r+int(r.length)]
		b.r += int(r.length)
		b.base = b.r
		x.bodyRead = true
		return nil
	}
	x.body.start(r.framing)
	if r.expect && len(b.waiting()) == 0 {
		c.out = append(c.out[:0], continueMessage...)
		if c.flush() != nil {
			return errClientGone
		}
	}
	if r.length > maxHeld {
		x.complete = false
		return nil
	}
	held := x.borrow(0, maxHeld)[:0]
	for {
		data, done, err := x.body.next(b, maxHeld-len(held))
		held = append(held, data...)
		x.held = held
		switch {
		case err != nil:
			return errChunk
		case done:
			x.bodyRead = true
			return nil
		case len(data) > 0:
			continue
		case len(held) == maxHeld:
			x.complete = false
			return nil
		}
		if r.chunked && !patient {
			c.read.disarm()
			if c.nc.SetReadDeadline(time.Now().Add(chunkPatience)) != nil {
				return errClientGone
			}
		} else if c.read.arm(c.nc.SetReadDeadline, time.Now(), bodyTimeout) != nil {
			return errClientGone
		}
		n, err := c.nc.Read(b.space(maxHead))
		b.w += n
		switch {
		case n > 0:
		case r.chunked && !patient && isTimeout(err):
			x.complete = false
			return nil
		case isTimeout(err):
			return errBodyTimeout
		default:
			return errClientGone
		}
	}
}

// send makes one attempt, up to a response head; a small body is read with it. Where a kept-alive connection turns out to
// be closed, the attempt is made again on a new one, unless the backend may have seen a request that must not be sent
// twice.
func (x *exchange) send(u *upstream) error {
	x.attempts++
	err := x.attempt(u, false)
	if errors.Is(err, errStale) && (!x.written || x.repeatable()) {
		err = x.attempt(u, true)
	}
	if err != nil {
		x.drop()
	}
	return err
}

func (x *exchange) attempt(u *upstream, fresh bool) error {
	x.written = false
	x.drop()
	var reused bool
	var err error
	if x.lease, x.conn, reused, err = u.acquire(fresh); err != nil {
		return dialFailure(err)
	}
	x.sent = x.now
	if !reused || x.attempts > 1 || !x.complete || len(x.held) > 0 {
		x.sent = time.Now()
	}
	out := x.c.appendHead(x.backOut[:0], &x.c.req, &u.target)
	x.backOut = out[:0]
	rest := x.held
	switch {
	case x.c.req.chunked && len(rest) > 0:
		out = appendChunk(out, rest)
		x.backOut, rest = nil, nil // not kept: it may be large
	case len(rest) <= firstBuffer:
		out, rest = append(out, rest...), nil
		x.backOut = out[:0]
	}
	if x.c.req.chunked && x.complete {
		out = appendLastChunk(out, x.body.trailers)
	}
	x.back.base, x.back.r, x.back.w = 0, 0, 0
	if x.complete && len(rest) == 0 && x.conn.plain() {
		x.conn.ask(out, reused)
		err = x.await(reused)
		if x.written = x.conn.wrote; err != nil {
			return err
		}
		return x.answer()
	}
	if reused && !x.conn.quiet() {
		return errStale
	}
	if err = x.conn.write.arm(x.conn.SetWriteDeadline, x.sent, uploadTimeout); err == nil {
		var n int
		n, err = x.conn.Write(out)
		x.written = n > 0
		if err == nil && len(rest) > 0 {
			_, err = x.conn.Write(rest)
		}
	}
	if err != nil {
		switch {
		case isTimeout(err):
			return errWriteTimeout
		case reused:
			return errStale
		case x.written && x.await(false) == nil: // it answered before it had all, and closed
			x.res.close = true
			return x.answer()
		}
		return errTerminated
	}
	if !x.complete {
		x.startUpload()
	}
	if err = x.await(reused); err != nil {
		return err
	}
	return x.answer()
}

// await reads the response head, over interim responses (RFC 9110 section 15.2).
func (x *exchange) await(reused bool) error {
	b := &x.back
	began := x.sent
	limit := x.timeLeft()
	if x.spare {
		limit /= 2 // leave the other half to the instance that makes up for a probe that hangs
	}
	err := x.head(b, began.Add(limit), reused)
	if err != nil {
		x.waited += time.Since(began)
	}
	return err
}

func (x *exchange) head(b *buffer, limit time.Time, reused bool) error {
	scanned := 0
	for interim := 0; ; {
		w := b.waiting()
		if end := bytes.Index(w[scanned:], headEnd); end >= 0 {
			end += scanned + len(headEnd)
			if !x.res.parse(w[:end]) {
				return errMalformed
			}
			b.r += end
			b.base = b.r
			switch {
			case x.res.status == 101:
				return errSwitch
			case x.res.status >= 200:
				return nil
			}
			if interim++; interim > maxInterim {
				return errMalformed
			}
			b.base, scanned = 0, 0
			continue
		}
		if bareLF(w) {
			return errMalformed
		}
		scanned = max(0, len(w)-len(headEnd)+1)
		room := b.space(maxHead)
		if room == nil {
			return errResponseHead
		}
		n, err := x.receive(room, x.sent, limit)
		b.w += n
		switch {
		case err == nil:
		case isOwn(err):
			return err
		case reused && len(b.waiting()) == 0 && interim == 0:
			return errStale
		case len(b.waiting()) == 0:
			return errTerminated
		default:
			return errIncomplete
		}
	}
}

// receive reads from the backend, until limit at the latest. While it waits it looks once a second whether the client is
// still there. now may be a little old. It returns a refusal, errClientGone, or the error of the connection.
func (x *exchange) receive(room []byte, now, limit time.Time) (int, error) {
	for {
		var err error
		if limit.Sub(now) > clientCheck {
			err = x.conn.read.arm(x.conn.SetReadDeadline, now, clientCheck)
		} else {
			x.conn.read.disarm()
			err = x.conn.SetReadDeadline(limit)
		}
		if failed := x.uploadFailed(); failed != nil {
			return 0, failed
		}
		if err != nil {
			return 0, err
		}
		n, err := x.conn.Read(room)
		switch {
		case n > 0:
			return n, nil
		case err == nil:
			return 0, io.ErrNoProgress
		case !isTimeout(err):
			return 0, err
		}
		x.conn.read.disarm()
		if failed := x.uploadFailed(); failed != nil {
			return 0, failed
		}
		now = time.Now()
		if x.upload != nil && !x.started {
			// Time in which an upload makes progress does not count. It may have ended since the last look.
			if later := time.Unix(0, x.upload.progress.Load()).Add(x.timeLeft()); later.After(limit) {
				limit = later
			}
		}
		if (x.upload == nil || x.upload.ended.Load()) && x.c.gone() {
			return 0, errClientGone
		}
		if x.started && now.Sub(x.sent) > settledTime {
			x.settle()
		}
		if !now.Before(limit) {
			return 0, errResponseTimeout
		}
	}
}

// answer makes the response that goes to the client: its head, and its body if that is small and there at once.
// Then nothing has reached the client yet if the backend breaks off.
func (x *exchange) answer() error {
	c, r, res := x.c, &x.c.req, &x.res
	if x.spare && x.p().failing[res.status] {
		return statusError(res.status)
	}
	bodyless := res.bodyless(string(r.Method) == "HEAD")
	whole := !bodyless && res.length >= 0 && res.length <= maxWhole
	c.out = c.out[:0]
	if whole && int(res.length)+len(res.lines)+1024 > cap(c.out) {
		c.out = x.borrow(1, maxWhole+2*firstBuffer)[:0]
	}
	x.keep = (r.minor == 1 || r.keepAlive) && !r.close && x.uploaded() && !x.p().closing.Load()
	x.chunks = !bodyless && res.length < 0 && r.minor == 1
	if !bodyless && res.length < 0 && r.minor == 0 {
		x.keep = false // the end of the connection is the end of the body
	}
	out := res.append(c.out)
	if !res.hasDate {
		out = x.p().appendDate(out)
	}
	if x.chunks {
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	}
	switch {
	case !x.keep:
		out = append(out, "Connection: close\r\n"...)
	case r.minor == 0:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	c.out = append(out, '\r', '\n')
	if whole {
		c.out = slices.Grow(c.out, int(res.length))
	}

	x.resEnded = bodyless
	if bodyless {
		x.resBody.start(framing{length: 0})
		return nil
	}
	x.resBody.start(res.framing)
	if !whole {
		return nil
	}
	data, done, _ := x.resBody.next(&x.back, maxWhole)
	c.out = append(c.out, data...)
	if !done {
		x.conn.read.disarm()
		if err := x.conn.SetReadDeadline(time.Now().Add(wholeTimeout)); err != nil {
			return errIncomplete
		}
	}
	for !done {
		at := len(c.out)
		n, err := x.conn.Read(c.out[at : at+int(x.resBody.left)])
		c.out = c.out[:at+n]
		x.resBody.left -= int64(n)
		done = x.resBody.left == 0
		if n == 0 && err != nil && !done {
			if isTimeout(err) {
				return nil // the rest is streamed
			}
			return errIncomplete
		}
	}
	x.resEnded = true
	return nil
}

// finish sends the response and ends the exchange. What has not come in yet is passed on as it comes.
func (x *exchange) finish() (keep bool) {
	c := x.c
	x.started, x.status = true, x.res.status
	whole := x.resEnded
	var err error
	if whole {
		err = c.flush()
		if err != nil {
			err = errClientGone
		}
	} else {
		err = x.relay()
	}
	x.endUpload()
	switch {
	case err == nil:
		x.end(x.verdict())
	case blame(err) == ignored: // the client left, or its upload broke off
		x.end(ignored, err)
	default:
		x.end(failure, err)
		x.p().logCut(x, err)
	}
	if err != nil && !x.chunks && x.res.length < 0 {
		c.reset() // an orderly close would look like the end of the body
	}
	reusable := err == nil && !x.res.close && !x.unread && len(x.back.waiting()) == 0 &&
		(whole || x.res.length >= 0 || x.res.chunked)
	x.upstream.release(x.lease, reusable)
	x.lease = nil
	x.giveBack()
	return err == nil && x.keep
}

// relay streams the response: what has come in is passed on before it waits for more.
func (x *exchange) relay() error {
	c := x.c
	x.back.b = x.replace(2, x.back.b)
	x.back.base = 0 // the head is done with
	var total int64
	for {
		data, done, err := x.resBody.next(&x.back, relaySize)
		if err != nil {
			_ = c.flush() // the client shall see how far it came
			return errMalformed
		}
		total += int64(len(data))
		switch {
		case len(data) == 0:
		case x.chunks:
			c.out = appendChunk(c.out, data)
		case len(c.out) == 0 && len(data) > firstBuffer: // nothing to send along: spare the copy
			if err := c.send(data); err != nil {
				return errClientGone
			}
		default:
			c.out = append(c.out, data...)
		}
		if done {
			if x.chunks {
				c.out = appendLastChunk(c.out, x.resBody.trailers)
			}
			if c.flush() != nil {
				return errClientGone
			}
			return nil
		}
		if len(data) > 0 {
			continue
		}
		if c.flush() != nil {
			return errClientGone
		}
		now := time.Now()
		if x.open && (total >= settledBytes || now.Sub(x.sent) >= settledTime) {
			x.settle()
		}
		n, err := x.receive(x.back.space(relaySize), now, now.Add(silenceTimeout))
		x.back.w += n
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && x.res.length < 0 && !x.res.chunked: // the close is the end
			if x.chunks {
				c.out = appendLastChunk(c.out, nil)
			}
			if c.flush() != nil {
				return errClientGone
			}
			return nil
		case isOwn(err):
			return err
		default:
			return errIncomplete
		}
	}
}

// drop closes the connection of an attempt that failed.
func (x *exchange) drop() {
	if x.lease != nil {
		x.conn.Close() // an upload that still writes is woken
		x.endUpload()
		x.upstream.release(x.lease, false)
		x.lease = nil
	}
}

// abandon ends an exchange in the middle, after a panic.
func (x *exchange) abandon() {
	x.drop()
	x.end(ignored, nil)
	x.giveBack()
}

// upload sends the rest of a request body while the response is awaited, in a goroutine of its own: a backend may answer
// before it has read all, and both may stream at once.
type upload struct {
	done     chan struct{}
	ended    atomic.Bool
	whole    bool                  // all was sent; valid once done is closed
	stopped  atomic.Bool           // nobody waits for it any more
	failed   atomic.Pointer[error] // a refusal or errClientGone, which ends the exchange
	progress atomic.Int64          // Unix nanoseconds of the last byte that went on
}

func (x *exchange) startUpload() {
	x.upload = &upload{done: make(chan struct{})}
	x.upload.progress.Store(time.Now().UnixNano())
	go x.upload.run(x.c, x.conn, &x.body)
}

// run moves the body from the client to the backend. While it runs it alone reads from the client and writes to the
// backend.
func (up *upload) run(c *conn, backend *backendConn, b *body) {
	defer close(up.done)
	err := up.copy(c, backend, b)
	up.whole = err == nil
	up.ended.Store(true)
	if err != nil && isOwn(err) && !up.stopped.Load() {
		up.failed.Store(&err)
		backend.SetReadDeadline(time.Unix(1, 0)) // wakes the exchange, which waits for the response
	}
}

func (up *upload) copy(c *conn, backend *backendConn, b *body) error {
	c.in.grow(c.in.base + relaySize)
	var framed []byte
	for {
		data, done, err := b.next(&c.in, relaySize)
		if err != nil {
			return errChunk
		}
		if b.chunked {
			framed = framed[:0]
			if len(data) > 0 {
				framed = appendChunk(framed, data)
			}
			if done {
				framed = appendLastChunk(framed, b.trailers)
			}
			data = framed
		}
		if len(data) > 0 {
			if err := backend.write.arm(backend.SetWriteDeadline, time.Now(), uploadTimeout); err != nil {
				return err
			}
			if up.stopped.Load() { // endUpload sets the deadline behind stopped: one of the two is seen
				return errClientGone
			}
			if _, err := backend.Write(data); err != nil {
				if isTimeout(err) {
					return errWriteTimeout
				}
				return err // the exchange reads what the backend had to say
			}
			up.progress.Store(time.Now().UnixNano())
		}
		if done {
			return nil
		}
		if len(data) > 0 {
			continue
		}
		if err := c.read.arm(c.nc.SetReadDeadline, time.Now(), bodyTimeout); err != nil {
			return errClientGone
		}
		if up.stopped.Load() {
			return errClientGone
		}
		n, err := c.nc.Read(c.in.space(relaySize))
		c.in.w += n
		switch {
		case n > 0:
		case isTimeout(err):
			return errBodyTimeout
		default:
			return errClientGone
		}
	}
}

// uploaded reports whether all of the request body was sent. A backend may answer to its last byte before the goroutine
// that sent it gets to say so.
func (x *exchange) uploaded() bool {
	if x.upload == nil {
		return x.complete
	}
	select {
	case <-x.upload.done:
		return x.upload.whole
	case <-time.After(uploadGrace):
		return false
	}
}

// uploadFailed returns why the upload ended the exchange, or nil.
func (x *exchange) uploadFailed() error {
	if x.upload == nil {
		return nil
	}
	if failed := x.upload.failed.Load(); failed != nil {
		return *failed
	}
	return nil
}

// endUpload stops an upload that the response has overtaken, and waits for its goroutine.
func (x *exchange) endUpload() {
	up := x.upload
	if up == nil {
		return
	}
	if !up.ended.Load() {
		up.stopped.Store(true)
		x.c.nc.SetReadDeadline(time.Unix(1, 0))
		x.conn.SetWriteDeadline(time.Unix(1, 0))
	}
	<-up.done
	x.bodyRead, x.unread = up.whole, !up.whole
	x.upload = nil
	x.c.read.disarm()
}

// borrow returns the i-th pooled buffer of the exchange, at least size bytes long.
func (x *exchange) borrow(i, size int) []byte {
	if x.buffers[i] == nil {
		x.buffers[i] = x.p().large.Get().(*[]byte)
	}
	if len(*x.buffers[i]) < size {
		*x.buffers[i] = make([]byte, size)
	}
	if i == 1 && x.small[0] == nil {
		x.small[0] = x.c.out[:0]
	}
	return *x.buffers[i]
}

// replace puts a pooled buffer in the place of b, with the same bytes in it.
func (x *exchange) replace(i int, b []byte) []byte {
	if len(b) >= relaySize {
		return b
	}
	next := x.borrow(i, relaySize)
	copy(next, b)
	x.small[1] = b
	return next
}

// giveBack returns the pooled buffers and drops others that have grown: a connection may wait long for its next request.
func (x *exchange) giveBack() {
	if x.small[0] != nil {
		x.c.out, x.small[0] = x.small[0], nil
	}
	if x.small[1] != nil {
		x.back.b, x.small[1] = x.small[1], nil
	}
	if len(x.back.b) > 4*firstBuffer {
		x.back.b = nil
	}
	if cap(x.backOut) > 4*firstBuffer {
		x.backOut = nil
	}
	if cap(x.c.out) > 4*firstBuffer {
		x.c.out = make([]byte, 0, firstBuffer)
	}
	for i, b := range x.buffers {
		if b != nil {
			x.p().large.Put(b)
			x.buffers[i] = nil
		}
	}
	x.held = nil
}

// blame says whose fault an error is: the instance's, or not.
func blame(err error) outcome {
	switch {
	case errors.Is(err, errClientGone), err == errBodyTimeout, err == errChunk, errors.Is(err, errStale), err == errNoInstance, err == errNoSocket:
		return ignored
	}
	return failure
}

// isOwn reports whether an error is one of ours, not one of a connection.
func isOwn(err error) bool {
	var r *refusal
	return errors.Is(err, errClientGone) || errors.As(err, &r)
}

// reset makes the next close of the client connection a reset.
func (c *conn) reset() {
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
}

// send writes data, and nothing else, to the client.
func (c *conn) send(data []byte) error {
	err := c.write.arm(c.nc.SetWriteDeadline, time.Now(), writeTimeout)
	if err == nil {
		_, err = c.nc.Write(data)
	}
	return err
}
