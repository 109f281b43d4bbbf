package proxy

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/proxy/loop"
)

const (
	maxHeld      = 64 << 10              // request bodies up to this size may be sent again
	maxWhole     = 64 << 10              // responses up to this size are read whole before they are passed on,
	wholeTimeout = 15 * time.Millisecond // if they are there this long after their head, which reaches the client within 20 ms
	relaySize    = 32 << 10              // what a stream is read and written in
	spliceFrom   = 128 << 10             // what is left of a body to be moved by splice: it costs more calls, and no copies

	settledBytes = 64 << 10    // a response that has run this far,
	settledTime  = time.Second // or this long, is a success to the breaker

	finGrace        = time.Second           // a client that has ended its stream may still get an answer this long
	receiveCheck    = time.Second           // how often one who waits for a backend looks at what else has changed
	maxInterim      = 16                    // responses 1xx before the final one
	uploadGrace     = 5 * time.Millisecond  // for the goroutine of an upload to say that it has ended
	chunkPatience   = 20 * time.Millisecond // for the next chunk of a request body before it is sent as it comes
	uploadTimeout   = 30 * time.Second      // a backend that takes nothing of a request
	expectPatience  = time.Second           // for a backend to say 100 Continue, before the gateway does
	continueMessage = "HTTP/1.1 100 Continue\r\n\r\n"
)

// exchange is one request on its way to an answer. A connection has one and uses it again and again.
type exchange struct {
	c       *conn
	began   time.Time // when the head was there
	route   *route    // how it is served
	service *service
	key     uint64        // of the client, for ip-hash
	retries int           // what is left of them
	waited  time.Duration // of the request timeout, by attempts that failed
	counted bool          // it has a place below the limit of the service
	full    bool          // an instance had no place for it
	queued  bool          // it has waited for a place

	// whom to ask
	view     *view
	tried    lb.Tried // indices of view.at
	asked    asked    // the same across views
	upstream *upstream
	token    cb.Token
	running  bool // the attempt: neither the token nor the request in flight has ended
	settled  bool // the breaker was told already
	covered  bool // it is a probe, and a ready instance can make up for it
	err      error
	attempts int
	tunnel   *tunnel // what came of it, if it asked for that

	// the request body
	held     []byte // what was read of it before the first attempt
	complete bool   // held is all of it
	body     body
	upload   *upload // what is left of it is being sent
	begun    bool    // some of it may have been read apart from what waits
	bodyRead bool    // it was read to its end
	unread   bool    // it was not, and the connection has to end for that

	uploadPace pace // of the client
	download   pace

	// one attempt
	lease    lease
	backend  *backendConn
	reused   bool   // the connection had served another request
	unsent   []byte // what a loop could not write of the request
	written  bool   // the backend may have seen something of the request
	given    int64  // bytes to the instance: by this goroutine, or that of the upload while there is one
	taken    int64  // and from it
	sent     time.Time
	back     buffer // what comes from the backend
	res      response
	resBody  body
	resEnded bool // all of the response is in c.out
	pipe     *loop.Pipe

	// the response to the client
	started bool      // bytes of it may have reached the client
	interim bool      // an interim response has
	finAt   time.Time // when the client ended its stream; within a response, when it sent its request
	keep    bool      // the client connection goes on behind it
	chunks  bool      // it is sent in chunks
	status  int
	tally   tally
	marks

	buffers [bufferUses]*[]byte // pooled, by use; given back by giveBack
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
	x.route = x.p().cfg().standard // until it is routed
	r.Client = x.c.peer
	if len(r.xff) > 0 {
		r.Client = x.p().client(r, x.c.peer)
	}
	x.back.base, x.back.r, x.back.w = 0, 0, 0
	x.began, x.service, x.key, x.retries, x.waited = now, nil, 0, 0, 0
	x.view, x.asked.n, x.upstream, x.running, x.covered, x.err, x.attempts = nil, 0, nil, false, false, nil, 0
	x.held, x.complete, x.upload, x.unread = nil, true, nil, false
	x.bodyRead = !r.chunked && r.length <= 0
	x.started, x.status, x.settled, x.written = false, 0, false, false
	r.switching, x.tunnel = x.c.asksTunnel(), nil
	x.interim, x.finAt, x.begun = false, time.Time{}, false
	x.uploadPace, x.download = pace{}, pace{}
	x.counted, x.full, x.queued = false, false, false
	x.tally = tally{}
	if x.p().marked {
		x.mark()
	}
}

// over is when the request has taken as long as it may in all.
func (x *exchange) over() time.Time { return x.began.Add(x.route.totalTimeout) }

// within is d, or less if the request is over before.
func (x *exchange) within(now time.Time, d time.Duration) time.Duration {
	return min(d, x.over().Sub(now))
}

// late says that the request is over.
func (x *exchange) late(now time.Time) bool { return !now.Before(x.over()) }

// left reports whether the client has left: its connection is lost, or it has ended its stream. One that does so behind
// its request has finGrace for the answer: it may only have ended its half. In the midst of a response that is no longer
// likely.
func (x *exchange) left(now time.Time) bool {
	client := x.c.sock
	switch {
	case client == nil || !client.HungUp():
		return false
	case client.Lost():
		return true
	case x.p().cfg().IgnoreFIN:
		return false
	}
	x.noteFIN(now)
	return now.Sub(x.finAt) >= finGrace
}

func (x *exchange) noteFIN(now time.Time) {
	if !x.finAt.IsZero() {
		return
	}
	x.finAt = now
	if x.started {
		x.finAt = x.began
	}
}

// use takes a view for the next pick; what was asked in another one stays asked.
func (x *exchange) use(v *view) {
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
	if !x.running {
		return
	}
	x.running = false
	u := x.upstream
	if x.trace.spans != nil {
		x.trace.spans.endAttempt(x.res.status, reason)
	}
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
		u.noteError(reason.Error())
	}
	if x.given+x.taken > 0 && !x.p().cfg().NoMetrics {
		n := u.pool(x.c.pool())
		n.received.Add(uint64(x.given))
		n.sent.Add(uint64(x.taken))
	}
	u.outcomes[o].Add(1)
	u.inFlight.Add(-1)
	if x.p().cfg().Limits.InFlightPerInstance > 0 {
		u.service.crowd.wake()
	}
}

// settle tells the breaker that a long response is a success while it still runs.
func (x *exchange) settle() {
	if !x.running || x.settled {
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
	if x.p().cfg().failing[x.res.status] {
		return failure, statusError(x.res.status)
	}
	return success, nil
}

// repeatable reports whether the request may be sent a second time: RFC 9110 section 9.2.2.
func (x *exchange) repeatable() bool {
	if !x.complete && !x.c.req.asking || x.interim {
		return false
	}
	switch string(x.c.req.Method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE":
		return true
	}
	return false
}

// timeLeft is what is left of the request timeout.
func (x *exchange) timeLeft() time.Duration {
	return x.within(time.Now(), x.route.requestTimeout-x.waited)
}

// hold reads a request body that is small enough to be sent twice. One that is larger, or comes slowly in chunks, is
// sent as it comes, unless patient says to wait for slow chunks too. Where the client waits to be asked for it, the backend
// is to say so; if patient is set the gateway does.
func (x *exchange) hold(patient bool) error {
	c, r, b := x.c, &x.c.req, &x.c.in
	if x.bodyRead {
		return nil
	}
	if !r.chunked && r.length > x.route.body {
		return errBodyTooLarge
	}
	if !r.chunked && int64(len(b.waiting())) >= r.length { // it came with the head
		x.holdWaiting()
		return nil
	}
	x.begun = true
	x.body.start(r.framing)
	waits := r.expect && len(b.waiting()) == 0
	if r.length > maxHeld || waits && !patient {
		r.asking, x.complete = waits && !patient, false
		return nil
	}
	if waits {
		if err := x.goOn(); err != nil {
			return err
		}
	}
	b.grow(b.base + firstBuffer)
	from := time.Now()
	slowest := from.Add(chunkPatience)
	defer func() {
		x.tally.held, x.tally.received = time.Since(from), int64(len(x.held))
	}()
	if !r.chunked && r.length <= firstBuffer { // there is room where it comes in
		for int64(len(b.waiting())) < r.length {
			n, err := c.receive(x.p().cfg().Limits.BodyTimeout, func() (int, error) { return c.nc.Read(b.space(relaySize)) })
			if b.w += n; err != nil {
				x.held = b.waiting()
				return err
			}
		}
		x.holdWaiting()
		return nil
	}
	held := x.borrow(heldBuffer)[:0]
	for {
		data, done, err := x.body.next(b, maxHeld-len(held))
		held = append(held, data...)
		x.held = held
		switch {
		case err != nil:
			return errChunk
		case int64(len(held)) > x.route.body:
			return errBodyTooLarge
		case done:
			x.bodyRead = true
			return nil
		case len(data) > 0:
			continue
		case len(held) == maxHeld:
			x.complete = false
			return nil
		}
		patience := x.p().cfg().Limits.BodyTimeout
		if r.chunked && !patient {
			c.read.disarm()
			patience = min(patience, time.Until(slowest))
		}
		n, err := c.receive(patience, func() (int, error) { return c.nc.Read(b.space(relaySize)) })
		b.w += n
		switch {
		case err == errBodyTimeout && r.chunked && !patient:
			c.read.disarm()
			x.complete = false
			return nil
		case err != nil:
			return err
		}
	}
}

// holdWaiting holds a request body that has come in, where it is.
func (x *exchange) holdWaiting() {
	b, size := &x.c.in, int(x.c.req.length)
	x.held = b.b[b.r : b.r+size]
	x.tally.received = int64(size)
	b.r += size
	b.base = b.r
	x.bodyRead = true
}

// goOn tells the client to send its body.
func (x *exchange) goOn() error {
	x.c.out = append(x.c.out[:0], continueMessage...)
	return x.c.flush()
}

// send makes one attempt, up to a response head; a small body is read with it. Where a kept-alive connection turns out to
// be closed, the attempt is made again on a new one, unless the backend may have seen a request that must not be sent
// twice.
//
// If asked is set a loop has sent the request, but for what is in unsent; it may still wait for the connection.
func (x *exchange) send(u *upstream, asked bool) error {
	var err error
	if asked {
		unsent := x.unsent
		x.unsent = nil
		if err = x.connected(); err == nil {
			_, err = x.write(unsent)
			err = x.answer(err)
		}
	} else {
		if x.attempts++; x.attempts > 1 {
			x.service.retries.Add(1)
			u.pool(x.c.pool()).retries.Add(1)
		}
		err = x.attempt(u, false)
	}
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
	var err error
	x.sent = x.began
	if x.attempts > 1 || !x.complete || len(x.held) > 0 || x.queued {
		x.sent = time.Now()
	}
	x.noteAsked()
	if x.c.req.switching {
		x.reused = false
		x.lease, x.backend, err = u.dialApart(x.c.pool(), x.timeLeft())
	} else {
		x.lease, x.backend, x.reused, err = u.acquire(x.c.pool(), fresh, x.timeLeft())
	}
	if err != nil {
		return x.undialled(err)
	}
	if x.reused && !x.backend.quiet() {
		return errStale
	}
	if !x.reused {
		x.sent = time.Now()
	}
	out := x.c.appendHead(x.c.out[:0], &x.c.req, x.route, &u.target) // there is nothing for the client yet
	x.c.out = out[:0]
	rest := x.held
	switch {
	case x.c.req.chunked && len(rest) > 0:
		out = appendChunk(out, rest)
		rest = nil
	case len(rest) <= firstBuffer:
		out, rest = append(out, rest...), nil
		x.c.out = out[:0]
	}
	if x.c.req.chunked && x.complete {
		out = appendLastChunk(out, x.body.trailers)
	}
	x.back.base, x.back.r, x.back.w = 0, 0, 0
	if _, err = x.write(out); err == nil {
		_, err = x.write(rest)
	}
	return x.answer(err)
}

// connected waits for a connection that a loop has begun.
func (x *exchange) connected() error {
	b := x.backend
	if b.failed == nil && !b.sock.Connecting() {
		return nil
	}
	if b.failed == nil {
		b.failed = b.sock.AwaitConnected(earlier(x.sent.Add(x.p().cfg().ConnectTimeout), time.Now().Add(x.timeLeft())))
	}
	if b.failed != nil {
		return x.undialled(b.failed)
	}
	x.sent = time.Now()
	return nil
}

// undialled says why there is no connection for an attempt that began at x.sent.
func (x *exchange) undialled(err error) error {
	now := time.Now()
	x.waited += now.Sub(x.sent)
	if x.late(now) {
		return errOverTime
	}
	if err = dialFailure(err); err == error(errNoSocket) {
		x.p().socketless[dialling].Add(1)
	}
	return err
}

// write sends a part of the request.
func (x *exchange) write(data []byte) (int, error) {
	if len(data) == 0 {
		return 0, nil
	}
	n, err := x.push(len(data), x.sent, func(done int) (int, error) { return x.backend.Write(data[done:]) })
	x.written = x.written || n > 0
	return n, err
}

// push calls write, which sends what follows the first done bytes to the backend, until all have gone, as long as it takes
// some of them. It is called by whoever sends the request: this goroutine, or that of an upload.
func (x *exchange) push(all int, now time.Time, write func(done int) (int, error)) (sent int, err error) {
	b := x.backend
	for {
		if err = b.write.arm(b.SetWriteDeadline, now, uploadTimeout); err != nil {
			return sent, err
		}
		if x.overtaken() {
			return sent, errClientGone
		}
		n, err := write(sent)
		sent += n
		x.given += int64(n)
		if sent == all || n == 0 || !isTimeout(err) {
			return sent, err
		}
		b.write.disarm()
		now = time.Now()
	}
}

// answer takes the answer to a request whose writing ended with err.
func (x *exchange) answer(err error) error {
	switch {
	case err == nil:
	case isTimeout(err):
		return errWriteTimeout
	case x.written && x.await(x.reused) == nil: // it answered before it had all, and closed
		x.res.close, x.unread = true, !x.complete
		return x.compose()
	case x.reused:
		return errStale
	default:
		return errTerminated
	}
	x.watchClient(true)
	switch {
	case x.c.req.asking:
		if err = x.ask(); err != errContinue {
			break
		}
		x.c.req.asking = false
		if err = x.goOn(); err != nil {
			break
		}
		fallthrough
	case !x.complete:
		x.startUpload()
		fallthrough
	default:
		err = x.await(x.reused)
	}
	if err != nil {
		return err
	}
	return x.compose()
}

// ask waits for the backend to say whether it wants the body: errContinue if it does, or says nothing for so long that it
// may not know how; nil if it has answered without.
func (x *exchange) ask() error {
	err := x.head(&x.back, time.Now().Add(min(expectPatience, x.timeLeft()/2)), x.reused)
	switch {
	case err == errResponseTimeout && x.timeLeft() > 0:
		return errContinue
	case err == nil:
		x.unread = true
	case err != errContinue:
		x.waited += time.Since(x.sent)
	}
	return err
}

// watchClient has a wait for the backend end when the client hangs up, or no more.
func (x *exchange) watchClient(on bool) {
	client, b := x.c.sock, x.backend
	switch {
	case client == nil:
	case on:
		client.OnHangUp(b.wake)
	default:
		client.OnHangUp(nil)
		if client.HungUp() {
			b.read.disarm()
		}
	}
}

// await reads the response head, over interim responses (RFC 9110 section 15.2).
func (x *exchange) await(reused bool) error {
	b := &x.back
	began := x.sent
	limit := x.route.requestTimeout - x.waited
	if x.covered {
		limit /= 2 // leave the other half to the instance that makes up for a probe that hangs
	}
	err := x.head(b, began.Add(limit), reused)
	if err != nil {
		x.waited += time.Since(began)
	}
	return err
}

func (x *exchange) head(b *buffer, limit time.Time, reused bool) error {
	scanned, limits := 0, &x.p().cfg().Limits
	for interim := 0; ; {
		w := b.waiting()
		if end := bytes.Index(w[scanned:], headEnd); end >= 0 {
			end += scanned + len(headEnd)
			if end > limits.Head {
				return errResponseHead
			}
			if err := x.res.parse(w[:end], limits); err != nil {
				return err
			}
			b.r += end
			b.base = b.r
			switch {
			case x.res.status == 101 && !x.switches():
				return errSwitch
			case x.res.status == 101:
				return nil
			case x.res.status >= 200:
				return nil
			}
			if interim++; interim > maxInterim {
				return errMalformed
			}
			b.base, scanned = 0, 0
			if x.c.req.asking && x.res.status == 100 {
				return errContinue
			}
			if err := x.passInterim(); err != nil {
				return err
			}
			continue
		}
		if bareLF(w, scanned) {
			return errMalformed
		}
		scanned = max(0, len(w)-len(headEnd)+1)
		if len(w) >= limits.Head {
			return errResponseHead
		}
		room := b.space(limits.Head)
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

// passInterim passes an interim response on, unless the client would not understand it (RFC 9110 section 15.2).
func (x *exchange) passInterim() error {
	if x.c.req.minor == 0 {
		return nil
	}
	x.interim = true
	x.c.out = append(x.res.append(x.c.out[:0], nil), '\r', '\n')
	return x.c.flush()
}

// receive reads from the backend into room, or by splice into x.pipe if that is nil, until limit at the latest, or until the
// client has left. now may be a little old. It returns a refusal, errClientGone, or the error of the connection.
func (x *exchange) receive(room []byte, now, limit time.Time) (int, error) {
	over := x.over()
	for {
		var err error
		until := earlier(limit, over)
		if !x.finAt.IsZero() {
			until = earlier(until, x.finAt.Add(finGrace))
		}
		if until.Sub(now) > receiveCheck {
			err = x.backend.read.arm(x.backend.SetReadDeadline, now, receiveCheck)
		} else {
			x.backend.read.disarm()
			err = x.backend.SetReadDeadline(until)
		}
		// Both wake this wait with a deadline of their own, which the one above may have replaced.
		if failed := x.uploadFailed(); failed != nil {
			return 0, failed
		}
		if x.left(now) {
			return 0, errClientGone
		}
		if err != nil {
			return 0, err
		}
		var n int
		if room != nil {
			n, err = x.backend.Read(room)
		} else {
			n, err = x.backend.sock.SpliceTo(x.pipe, x.resBody.left)
		}
		switch {
		case n > 0:
			x.taken += int64(n)
			return n, nil
		case err == nil:
			return 0, io.ErrNoProgress
		case !isTimeout(err):
			return 0, err
		}
		x.backend.read.disarm()
		if failed := x.uploadFailed(); failed != nil {
			return 0, failed
		}
		now = time.Now()
		if x.upload != nil && !x.started {
			// Time in which an upload makes progress does not count. It may have ended since the last look.
			if later := x.upload.since(now).Add(x.route.requestTimeout - x.waited); later.After(limit) {
				limit = later
			}
		}
		if x.left(now) {
			return 0, errClientGone
		}
		if !now.Before(over) {
			return 0, errOverTime
		}
		if x.started && now.Sub(x.sent) > settledTime {
			x.settle()
		}
		if !now.Before(limit) {
			return 0, errResponseTimeout
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// compose makes the response that goes to the client: its head, and its body if that is small and there at once.
// Then nothing has reached the client yet if the backend breaks off.
func (x *exchange) compose() error {
	c, res := x.c, &x.res
	if x.covered && x.p().cfg().failing[res.status] {
		return statusError(res.status)
	}
	if x.switches() {
		c.out = x.appendSwitch(c.out[:0])
		return nil
	}
	bodyless := x.bodyless()
	whole := !bodyless && res.length >= 0 && res.length <= maxWhole
	c.out = c.out[:0]
	if whole && x.buffers[outBuffer] == nil && int(res.length)+len(res.lines)+1024 > cap(c.out) {
		c.out = x.borrow(outBuffer)[:0]
	}
	c.out = x.appendResponse(c.out)
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
		x.backend.read.disarm()
		if err := x.backend.SetReadDeadline(time.Now().Add(wholeTimeout)); err != nil {
			return errIncomplete
		}
	}
	for !done {
		at := len(c.out)
		n, err := x.backend.Read(c.out[at : at+int(x.resBody.left)])
		c.out = c.out[:at+n]
		x.taken += int64(n)
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

// bodyless says that the response has no body.
func (x *exchange) bodyless() bool { return x.res.bodyless(string(x.c.req.Method) == "HEAD") }

// whole says that a response of which so much has come in behind its head is all here, if it is one to wait for.
func (x *exchange) whole(have int) bool {
	return x.bodyless() ||
		x.res.length >= 0 && x.res.length <= maxWhole && x.res.length <= int64(have)
}

// appendResponse appends the head that goes to the client.
func (x *exchange) appendResponse(dst []byte) []byte {
	r, res := &x.c.req, &x.res
	bodyless := x.bodyless()
	x.unread = x.unread || r.authority // what follows a CONNECT was meant for its tunnel
	x.keep = (r.minor == 1 || r.keepAlive) && !r.close && !r.authority && x.uploaded() && !x.p().closing.Load()
	x.chunks = !bodyless && res.length < 0 && r.minor == 1
	if !bodyless && res.length < 0 && r.minor == 0 {
		x.keep = false // the end of the connection is the end of the body
	}
	if x.id != nil {
		res.dropID()
	}
	out := x.appendID(res.append(dst, x.route.response))
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
	out = append(out, '\r', '\n')
	x.tally.head = x.tally.sent + int64(len(out)-len(dst))
	return out
}

// finish sends the response and ends the exchange. What has not come in yet is passed on as it comes.
func (x *exchange) finish() (keep bool) {
	c := x.c
	if c.sock != nil && c.sock.HungUp() && !x.p().cfg().IgnoreFIN {
		x.noteFIN(time.Now())
	}
	x.started, x.status = true, x.res.status
	x.tally.streamed = !x.resEnded
	if x.p().timed {
		x.noteAnswered(time.Now())
	}
	if x.switches() {
		x.openTunnel()
		return false
	}
	if x.resEnded { // the backend's part is done
		x.endUpload()
		x.end(x.verdict())
		x.release(true)
		keep = x.deliver() && x.keep
		x.giveBack()
		return keep
	}
	err := x.relay()
	x.endUpload()
	x.tally.reason = kindOf(err)
	switch {
	case err == nil:
		x.end(x.verdict())
	case blame(err) == ignored: // the client left, or its upload broke off
		x.end(ignored, err)
		if !x.noteGone(err) {
			x.tally.by = byHalf
		}
	default:
		x.end(failure, err)
		x.tally.by = byHalf
		x.p().logCut(x, err)
	}
	if err != nil && !x.chunks && x.res.length < 0 {
		c.reset()        // an orderly close would look like the end of the body,
		x.unread = false // and so would that of lingering
	}
	x.release(err == nil && (x.res.length >= 0 || x.res.chunked))
	x.giveBack()
	return err == nil && x.keep
}

// release gives the connection of an answered request back, if both messages on it have ended and nothing follows them.
func (x *exchange) release(ended bool) {
	x.watchClient(false)
	x.upstream.release(x.c.pool(), x.lease, ended && !x.res.close && !x.unread && len(x.back.waiting()) == 0)
	x.lease = nil
}

// relay streams the response: what has come in is passed on before it waits for more.
func (x *exchange) relay() error {
	c := x.c
	if c.sock != nil && x.backend.plain() && !x.resBody.chunked && x.resBody.left-int64(len(x.back.waiting())) >= spliceFrom {
		if pipe, err := x.p().group.Pipe(); err == nil { // else there are enough of them, or no more descriptors
			return x.splice(pipe)
		}
	}
	x.back.base = chunkRoom // the head is done with
	x.back.leave(chunkRoom)
	var total int64
	for {
		data, done, err := x.resBody.gather(&x.back)
		total += int64(len(data))
		switch fits := len(c.out)+len(data)+2*chunkRoom <= cap(c.out); {
		case len(data) == 0:
		case fits && x.chunks:
			c.out = appendChunk(c.out, data)
		case fits:
			c.out = append(c.out, data...)
		default: // spare the copy, and a buffer to hold it
			failed := c.flush()
			switch {
			case failed != nil:
			case x.chunks:
				failed = c.sendChunk(x.back.b, data)
			default:
				failed = c.send(data)
			}
			if failed != nil {
				return failed
			}
		}
		if err != nil {
			_ = c.flush() // the client shall see how far it came
			return errMalformed
		}
		if done {
			if x.chunks {
				c.out = appendLastChunk(c.out, x.resBody.trailers)
			}
			return c.flush()
		}
		if err := c.flush(); err != nil {
			return err
		}
		if len(x.back.b) > relaySize { // what came at once has gone on, but for part of a line: thousands of streams may be slow
			x.relayIn(x.borrow(relayBuffer))
			x.giveBackOne(backBuffer)
		}
		room := x.back.space(relaySize)
		n, err := x.more(total, room)
		x.back.w += n
		if n == len(room) && x.buffers[relayBuffer] == nil { // nor do those that come in small pieces need so much
			x.relayIn(x.borrow(relayBuffer))
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && x.res.length < 0 && !x.res.chunked && !x.backend.severed.Load() && !x.brokenOff(): // the close is the end
			if x.chunks {
				c.out = appendLastChunk(c.out, nil)
			}
			return c.flush()
		case isOwn(err):
			return err
		default:
			return errIncomplete
		}
	}
}

// relayIn goes on in another buffer, which has room for what waits.
func (x *exchange) relayIn(b []byte) {
	x.back = buffer{b: b, base: chunkRoom, r: chunkRoom, w: chunkRoom + copy(b[chunkRoom:], x.back.waiting())}
	x.back.leave(chunkRoom)
}

// more receives what comes next of a response of which total bytes were passed on.
func (x *exchange) more(total int64, room []byte) (int, error) {
	now := time.Now()
	if x.running && (total >= settledBytes || now.Sub(x.sent) >= settledTime) {
		x.settle()
	}
	return x.receive(room, now, now.Add(x.p().cfg().Limits.SilenceTimeout))
}

// splice is relay for a large body with a length, between two sockets.
func (x *exchange) splice(pipe *loop.Pipe) error {
	c, empty := x.c, false
	x.pipe = pipe
	defer func() { // after a panic too
		x.pipe = nil
		x.p().group.Release(pipe, empty)
	}()
	data, _, _ := x.resBody.next(&x.back, len(x.back.waiting()))
	c.out = append(c.out, data...)
	if err := c.flush(); err != nil {
		return err
	}
	x.back = buffer{b: c.scratch.back} // nothing more comes in there
	x.giveBackOne(relayBuffer)
	for total := int64(len(data)); x.resBody.left > 0; {
		n, err := x.more(total, nil)
		switch {
		case err == nil:
		case isOwn(err):
			return err
		default:
			return errIncomplete
		}
		x.resBody.left -= int64(n)
		total += int64(n)
		err = c.push(n, func(done int) (int, error) { return c.sock.SpliceFrom(pipe, n-done) })
		if err != nil {
			return err
		}
	}
	empty = true
	return nil
}

// drop closes the connection of an attempt that failed.
func (x *exchange) drop() {
	if x.lease != nil {
		x.watchClient(false)
		x.backend.Close() // an upload that still writes is woken
		x.endUpload()
		x.upstream.release(x.c.pool(), x.lease, false)
		x.lease = nil
	}
}

// abandon ends an exchange in the middle, after a panic.
func (x *exchange) abandon() {
	x.drop()
	if x.tunnel != nil {
		x.tunnel.release()
	}
	x.end(ignored, nil)
	x.leave()
	x.giveBack()
}

// What a pooled buffer is for.
const (
	heldBuffer  = iota // the request body that is held
	outBuffer          // in the place of conn.out
	backBuffer         // in the place of exchange.back
	relayBuffer        // the same of a stream, which can be slow: of relaySize
	bufferUses
)

// borrow returns the pooled buffer for a use.
func (x *exchange) borrow(use int) []byte {
	if x.buffers[use] == nil {
		x.buffers[use] = x.p().poolFor(use).Get().(*[]byte)
	}
	return *x.buffers[use]
}

// giveBackOne returns it.
func (x *exchange) giveBackOne(use int) {
	if b := x.buffers[use]; b != nil {
		x.p().poolFor(use).Put(b)
		x.buffers[use] = nil
	}
}

// giveBack returns the pooled buffers, and goes back to those of the scratch from others that have grown.
func (x *exchange) giveBack() {
	if s := x.c.scratch; s != nil {
		x.back.b, x.c.out = s.back, s.out[:0]
	}
	for use := range bufferUses {
		x.giveBackOne(use)
	}
	x.held = nil
}
