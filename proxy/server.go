package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"kerberos/proxy/loop"
)

// What is left of a refused upload is read and dropped this long and this far, so that the answer is not lost in a reset.
const (
	lingerTimeout = time.Second
	lingerBytes   = 1 << 20
)

const (
	firstBuffer  = 4 << 10 // the size of a goroutine's buffers as long as nothing larger comes
	firstRequest = 1 << 10 // of what holds a request: at a backend there may be thousands
)

// state of a client connection.
const (
	stateIdle   = iota // waits for a request
	stateActive        // serves one
	stateClosed
)

// conn is one client connection: it serves one request after the other, on its loop or, where that would have to wait, in
// a goroutine.
type conn struct {
	p        *Proxy
	nc       net.Conn     // for a goroutine
	sock     *loop.Socket // the same; nil if no loop watches it
	peer     netip.Addr
	trusted  bool
	constant []byte // see forwardingFields
	state    atomic.Int32
	read     alarm
	write    alarm

	// What follows belongs to the loop.
	worker  *worker // nil: there is none
	more    bool    // the socket may hold something
	ending  bool    // the client may have ended its stream: it has if the socket holds nothing and does not say ErrAgain
	reading bool    // a head has begun and is not at its end
	slot    int     // in worker.waiting; -1: no request is at a backend
	shelf   int64   // the second for which it is in worker.wheel,
	place   int     // and where there; -1: not in it
	since   int64   // the second since which nothing has come,
	expires int64   // and the one in which it is closed, unless something comes

	tunnel *tunnel // what the connection has become; set by Proxy.enter

	*workspace // nil between requests
}

// workspace is what a connection needs while it serves a request. Between requests it has none: few that are warm serve
// better than one for each idle connection.
type workspace struct {
	in       buffer
	head     []byte // of the request, as it came
	out      []byte // what goes to the client next; in an attempt that begins, to the instance
	req      Request
	x        exchange
	*scratch // nil on a loop, which has buffers of its own
}

// scratch is the buffers of a goroutine that serves requests: where exchange.back and workspace.out begin.
type scratch struct {
	back, out []byte
	record    Record
}

// occupy takes a workspace, and vacate gives it back.
func (c *conn) occupy() {
	if c.workspace != nil {
		return
	}
	c.workspace = c.p.workspaces.Get().(*workspace)
	c.x.c = c
}

func (c *conn) vacate() {
	if w := c.workspace; w != nil {
		c.workspace = nil
		w.in.base, w.in.r, w.in.w = 0, 0, 0 // what one client sent is never read for another
		w.in.next()
		w.putScratch(c.p)
		w.head = nil
		w.x.c, w.x.route, w.x.service, w.x.view, w.x.upstream, w.x.backend, w.x.tunnel, w.x.err = nil, nil, nil, nil, nil, nil, nil, nil
		w.x.asked = asked{}
		c.p.workspaces.Put(w)
	}
}

// takeScratch gives a goroutine its buffers.
func (w *workspace) takeScratch(p *Proxy) {
	if w.scratch != nil {
		return
	}
	s := p.scratches.Get().(*scratch)
	w.scratch = s
	if len(w.out) == 0 { // else the loop has left something to send
		w.out = s.out[:0]
	}
	if len(w.x.back.b) == 0 { // the same of what it has received
		w.x.back.b = s.back
	}
}

func (w *workspace) putScratch(p *Proxy) {
	if s := w.scratch; s != nil {
		p.scratches.Put(s)
	}
	w.scratch, w.x.back.b, w.out = nil, nil, nil
}

// Serve accepts connections until Shutdown or Leave, which make it return nil. It takes over the listener. Running out of file
// descriptors pauses it.
func (p *Proxy) Serve(ln net.Listener) error {
	accept, closer, err := p.acceptor(ln)
	if p.closing.Load() && err != nil {
		ln.Close()
		return nil
	}
	if err != nil {
		return fmt.Errorf("serve %s: %w", ln.Addr(), err)
	}
	p.mu.Lock()
	left := slices.Index(p.left, ln)
	if left >= 0 {
		p.left = slices.Delete(p.left, left, left+1)
	}
	if p.closing.Load() || left >= 0 {
		p.mu.Unlock()
		closer.Close()
		return nil
	}
	p.listeners = append(p.listeners, listener{ln, closer})
	p.mu.Unlock()
	const shortest, longest = 5 * time.Millisecond, time.Second
	for pause := shortest; ; {
		err := accept()
		if err == nil {
			pause = shortest
			continue
		}
		if p.closing.Load() || !p.serves(ln) {
			return nil
		}
		if ownLimit(err) {
			p.socketless[accepting].Add(1)
		}
		if !temporary(err) {
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		if pause == shortest {
			p.log.Warn("accepting pauses", slog.String("listener", ln.Addr().String()), slog.String("reason", err.Error()))
		}
		time.Sleep(pause)
		pause = min(2*pause, longest)
	}
}

// acceptTurn is how many accepted connections of a listener wait for their loops at most. The others wait in the kernel: when
// thousands come at once, those that are there already have their turns between them.
const acceptTurn = 8

// acceptor returns what takes the next connection of a listener, and what ends that: connections of TCP go to the loops in
// turn, any other is served by a goroutine.
func (p *Proxy) acceptor(ln net.Listener) (accept func() error, _ io.Closer, _ error) {
	tcp, ok := ln.(*net.TCPListener)
	if !ok || !loop.Supported {
		return func() error {
			nc, err := ln.Accept()
			if err == nil {
				p.accepted(nc)
			}
			return err
		}, ln, nil
	}
	l, err := p.listen(tcp)
	if err != nil {
		return nil, nil, err
	}
	adopting := make(chan struct{}, acceptTurn)
	turn := 0 // of the loops
	return func() error {
		adopting <- struct{}{}
		adopted := func() { <-adopting }
		fd, remote, err := l.Accept()
		if err != nil {
			adopted()
			return err
		}
		turn++
		w := p.workers[turn%len(p.workers)]
		if !w.loop.Do(func() { defer adopted(); w.adopt(fd, remote, len(w.p.workers)-1) }) {
			adopted()
			loop.Discard(fd) // Close was faster
		}
		return nil
	}, l, nil
}

// listen has one of the loops watch a listener, which it takes over.
func (p *Proxy) listen(tcp *net.TCPListener) (*loop.Listener, error) {
	if err := p.startLoops(); err != nil {
		tcp.Close()
		return nil, err
	}
	return p.workers[p.turns.Add(1)%uint64(len(p.workers))].loop.Listen(tcp)
}

// Watched returns a listener in the place of ln, which it takes over, for a server of another kind: it and its connections are
// watched by the loops too. What Go's own poller watches comes up only every 10 to 20 ms while the loops have much to do, and then
// all of it at once, in front of the requests; the loops wake some at a time, as soon as something has come.
func (p *Proxy) Watched(ln net.Listener) (net.Listener, error) {
	tcp, ok := ln.(*net.TCPListener)
	if !ok || !loop.Supported {
		return ln, nil
	}
	l, err := p.listen(tcp)
	if err != nil {
		return nil, err
	}
	return &watched{Listener: l, p: p}, nil
}

type watched struct {
	*loop.Listener
	p     *Proxy
	turns atomic.Uint64 // of the loops
}

func (l *watched) Accept() (net.Conn, error) {
	fd, remote, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	s, err := l.p.workers[l.turns.Add(1)%uint64(len(l.p.workers))].loop.Watch(fd, remote, nil, true)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// temporary errors of accept pass: a limit of ours is reached, or the client left before it was accepted.
func temporary(err error) bool {
	return ownLimit(err) || errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EINTR)
}

// accepted starts a connection that no loop watches.
func (p *Proxy) accepted(nc net.Conn) {
	var peer netip.Addr
	if addr, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		peer = addr.AddrPort().Addr()
	}
	c := p.newConn(peer)
	c.nc = nc
	if err := p.add(c); err != nil {
		c.turnAway(err)
		return
	}
	go c.serve(stageReading)
}

func (p *Proxy) newConn(peer netip.Addr) *conn {
	peer = peer.Unmap().WithZone("")
	return &conn{p: p, peer: peer, trusted: p.trusts(peer), constant: forwardingFields(peer), slot: -1, place: -1}
}

// serve runs requests of a connection in a goroutine: first the one that its loop has brought to a stage, then those that
// have come in behind it. It ends by giving the connection back to the loop, if there is one, or when one side closes it. A
// panic costs the request, not the process.
func (c *conn) serve(s stage) {
	left := false // to the loop
	defer func() {
		if failure := recover(); failure != nil {
			c.logPanic(failure)
			c.afterPanic()
		} else if !left && c.workspace != nil && c.x.tunnel != nil && c.x.tunnel.plain() {
			left = true
			c.x.tunnel.leave()
		}
		if left {
			return
		}
		c.vacate()
		c.state.Store(stateClosed)
		c.nc.Close()
		c.p.remove(c)
		if c.worker != nil {
			c.worker.loop.Do(func() { c.worker.forget(c) })
		}
	}()
	c.occupy()
	var err error
	if s == stageDial {
		if err = c.dial(); err == nil {
			left = true
			return
		}
	}
	c.takeScratch(c.p)
	switch s {
	case stageReading:
	case stageLate:
		c.req = Request{}
		c.unreadable(errHeadTimeout)
		return
	case stagePanicked:
		c.afterPanic()
		return
	case stageAnswered:
		if !c.after(c.x.deliver() && c.x.keep) {
			return
		}
	default:
		if !c.after(c.x.run(s, err)) {
			return
		}
	}
	for first := true; ; first = false {
		if c.sock != nil && (s != stageReading || !first) && len(c.in.waiting()) == 0 {
			c.vacate()
			left = true
			c.rejoin()
			return
		}
		head, err := c.readHead(first)
		if err == nil && head != nil {
			c.head = head
			err = c.req.parse(head, c.p.cfg().via, c.trusted, &c.p.cfg().Limits)
		} else {
			c.req = Request{} // not the one before: the answer would be made for its method
		}
		if err != nil {
			c.unreadable(err)
			return
		}
		if head == nil || !c.after(c.handle()) {
			return
		}
	}
}

// unreadable refuses what is no request, or none that could be read to its end.
func (c *conn) unreadable(err *refusal) {
	c.req.lines, c.req.xff = nil, c.req.xff[:0] // what could be read of them says nothing
	c.x.begin(time.Now())
	c.refuse(err, true)
	c.ended()
	c.linger()
}

// after ends a request, and reports whether the connection can serve another one.
func (c *conn) after(keep bool) bool {
	if c.x.tunnel == nil { // else it has ended with its answer
		c.ended()
	}
	c.x.leave()
	if c.x.unread || c.req.authority && c.x.tunnel == nil { // or what its client sent into a tunnel that is none
		c.linger()
	}
	if !keep || c.p.closing.Load() {
		return false
	}
	// Looked at again when idle: Shutdown may have passed by while the state was active.
	if c.state.Load() == stateActive && (!c.state.CompareAndSwap(stateActive, stateIdle) || c.p.closing.Load()) {
		return false
	}
	c.in.next()
	return true
}

// afterPanic gives up the request, and the workspace: nobody knows what state it is in.
func (c *conn) afterPanic() {
	if c.workspace == nil {
		return
	}
	streaming := c.x.started && c.x.lease != nil
	c.x.abandon()
	if streaming {
		c.reset() // the client shall not take it for the end of a body
	}
	if !c.x.started {
		c.refuse(errInternal, true)
		c.linger()
	}
	if c.x.tunnel == nil {
		c.ended()
	}
	c.workspace = nil
}

// readHead waits for a request head and returns it whole; it stays in the buffer until the request is done. nil without
// an error: the connection is over.
func (c *conn) readHead(first bool) ([]byte, *refusal) {
	b, limits := &c.in, &c.p.cfg().Limits
	scanned := 0
	var begin, deadline time.Time // for the first byte of a head, and for its end
	for {
		if scanned == 0 {
			b.skipEmptyLines()
		}
		w := b.waiting()
		if len(w) > 0 && string(w) != "\r" && !c.activate() { // half an empty line is no request yet
			return nil, nil
		}
		if end := bytes.Index(w[scanned:], headEnd); end >= 0 {
			if end += scanned + len(headEnd); end > limits.Head {
				return nil, errHeadTooLarge
			}
			b.r += end
			b.base = b.r
			return w[:end], nil
		}
		switch {
		case bareLF(w, scanned):
			return nil, errBareLF
		case len(w) >= limits.RequestLine && bytes.IndexByte(w, '\n') < 0:
			return nil, errRequestLineTooLong
		case len(w) >= limits.Head:
			return nil, errHeadTooLarge
		}
		scanned = max(0, len(w)-len(headEnd)+1)
		room := b.space(limits.Head)
		var err error
		switch now := time.Now(); {
		case len(w) > 0 && deadline.IsZero():
			deadline = now.Add(limits.HeadTimeout)
			c.read.disarm()
			err = c.nc.SetReadDeadline(deadline)
		case len(w) > 0:
		case begin.IsZero():
			patience := limits.IdleTimeout
			if first {
				patience = limits.FirstByteTimeout
			}
			begin = now.Add(patience)
			err = c.read.arm(c.nc.SetReadDeadline, now, patience)
		default: // what has come were empty lines
			deadline = time.Time{}
			c.read.disarm()
			err = c.nc.SetReadDeadline(begin)
		}
		if err != nil {
			return nil, nil
		}
		n, err := c.nc.Read(room)
		b.w += n
		if n > 0 {
			continue
		}
		if err != nil {
			if len(w) > 0 && isTimeout(err) {
				return nil, errHeadTimeout
			}
			return nil, nil
		}
	}
}

// activate says that a request has begun. It is false if Shutdown was faster.
func (c *conn) activate() bool {
	return c.state.Load() == stateActive || c.state.CompareAndSwap(stateIdle, stateActive)
}

// flush sends what is in out.
func (c *conn) flush() error {
	rest := c.out
	c.out = c.out[:0]
	if len(rest) == 0 {
		return nil
	}
	return c.send(rest)
}

// linger reads what a client still sends after an answer that came early, and drops it: closing at once would reset the
// connection, and the answer could be lost on its way.
func (c *conn) linger() {
	half, ok := c.nc.(halfCloser)
	if !ok || half.CloseWrite() != nil || c.nc.SetReadDeadline(time.Now().Add(lingerTimeout)) != nil {
		return
	}
	for read := 0; read < lingerBytes; {
		n, err := c.nc.Read(c.in.b) // what is in there is not needed any more
		if err != nil {
			return
		}
		read += n
	}
}

// Shutdown closes the listeners and the idle connections, waits for the requests in flight and, when ctx ends, cuts those
// that are left. It returns how many were cut.
func (p *Proxy) Shutdown(ctx context.Context) (cut int) {
	p.closing.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ln := range p.listeners {
		ln.closer.Close()
	}
	for c := range p.conns {
		if c.worker == nil && c.state.CompareAndSwap(stateIdle, stateClosed) {
			c.nc.Close()
		}
	}
	p.mu.Unlock()
	if p.noMoreLoops(); p.group != nil {
		for _, w := range p.workers {
			w.loop.Call(w.shutdown)
		}
	}
	p.mu.Lock()
	defer context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.noConns.Broadcast()
	})()
	for len(p.conns) > 0 && ctx.Err() == nil {
		p.noConns.Wait()
	}
	p.cutting = true
	for c := range p.conns {
		if c.state.Load() == stateActive {
			cut++
		}
		c.cut()
	}
	return cut
}

// halfCloser is a *net.TCPConn or a *loop.Socket.
type halfCloser interface {
	CloseRead() error
	CloseWrite() error
	SetLinger(seconds int) error
}

// cut ends a connection whatever it is doing. Its request finds out when it checks on its client, within 2 s; Close
// would wait for that.
func (c *conn) cut() {
	if c.tunnel != nil {
		c.tunnel.cut()
		return
	}
	if half, ok := c.nc.(halfCloser); ok {
		_ = half.CloseRead()
		_ = half.CloseWrite()
		return
	}
	c.nc.Close()
}

// Close stops what runs beside the requests: timers, resolvers, idle connections to instances. Requests that Shutdown has
// cut end within 2 s, and it waits for them. Call it after Shutdown, with no more changes of the registry to come.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.stopped = true
	for len(p.conns) > 0 { // requests that were cut
		p.noConns.Wait()
	}
	p.mu.Unlock()
	p.services.Range(func(_, s any) bool {
		s.(*service).close()
		return true
	})
	p.checks.Close()
	p.background.Wait()
	if p.noMoreLoops(); p.group != nil {
		p.group.Close()
	}
}

// spawn runs f in a goroutine that Close waits for, unless Close has begun.
func (p *Proxy) spawn(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.stopped {
		p.background.Go(f)
	}
}

// reset makes the next close of the client connection a reset.
func (c *conn) reset() { resetOnClose(c.nc) }

func resetOnClose(nc net.Conn) {
	if tcp, ok := nc.(halfCloser); ok {
		_ = tcp.SetLinger(0)
	}
}

// send writes data, and nothing else, to the client.
func (c *conn) send(data []byte) error {
	return c.push(len(data), func(done int) (int, error) { return c.nc.Write(data[done:]) })
}

// push calls write, which sends what follows the first done bytes, until all have gone, as long as the client takes some
// of them within the limits. It returns errClientGone, errClientSlow or errOverTime.
//
// What the system takes from us is not yet taken by the client, so at each quarter of the time it is asked what was
// acknowledged.
func (c *conn) push(all int, write func(done int) (int, error)) error {
	limits := &c.p.cfg().Limits
	patience := limits.WriteTimeout / 4
	if limits.MinDownload > 0 {
		patience = min(patience, paceWindow)
	}
	began := time.Now()
	last, taken, looked := began, 0, c.sock == nil
	for done := 0; done < all; began = time.Now() {
		d := min(patience, limits.WriteTimeout-began.Sub(last))
		if c.x.started { // what says that a request is late has its own time
			d = c.x.within(began, d)
		}
		var err error
		if began == last {
			err = c.write.arm(c.nc.SetWriteDeadline, began, d)
		} else {
			err = c.nc.SetWriteDeadline(began.Add(d))
		}
		if err != nil {
			return errClientGone
		}
		n, err := write(done)
		done += n
		c.x.tally.sent += int64(n)
		if limits.MinDownload > 0 {
			c.x.download.add(n, began)
			if c.takesTooLittle() {
				return errClientSlow
			}
		}
		if done == all {
			break
		}
		if !isTimeout(err) {
			return errClientGone
		}
		c.write.disarm()
		now, before := time.Now(), taken
		if taken = done; c.sock != nil {
			taken -= c.sock.Queued()
		}
		if looked && taken > before {
			last = now
		}
		looked = true
		switch {
		case c.x.started && c.x.late(now):
			return errOverTime
		case now.Sub(last) >= limits.WriteTimeout:
			return errClientSlow
		}
	}
	return nil
}

// takesTooLittle says that the client takes less of a response than it must. What waits in the system it has not taken.
func (c *conn) takesTooLittle() bool {
	taken := c.x.download
	if taken.waited < paceWindow {
		return false
	}
	if c.sock != nil {
		taken.bytes -= int64(c.sock.Queued())
	}
	return taken.below(c.p.cfg().Limits.MinDownload)
}

// receive calls read, which takes more of the request body, for patience or the limits at most. It returns errClientGone,
// errBodyTimeout, errBodySlow or errOverTime.
func (c *conn) receive(patience time.Duration, read func() (int, error)) (int, error) {
	limits, x := &c.p.cfg().Limits, &c.x
	first := time.Now()
	for began := first; ; began = time.Now() {
		d := x.within(began, patience-began.Sub(first))
		if limits.MinUpload > 0 {
			d = min(d, paceWindow)
		}
		if c.read.arm(c.nc.SetReadDeadline, began, d) != nil {
			return 0, errClientGone
		}
		if x.overtaken() {
			return 0, errClientGone
		}
		n, err := read()
		if n == 0 && !isTimeout(err) {
			return 0, errClientGone
		}
		if limits.MinUpload > 0 {
			x.uploadPace.add(n, began)
			if x.uploadPace.below(limits.MinUpload) {
				return n, errBodySlow
			}
		}
		if n > 0 {
			return n, nil
		}
		c.read.disarm()
		switch now := time.Now(); {
		case x.late(now):
			return 0, errOverTime
		case now.Sub(first) >= patience:
			return 0, errBodyTimeout
		}
	}
}

// chunkRoom is what a chunk of a buffer's size needs before and behind its data, and a little more.
const chunkRoom = 8

// sendChunk sends data, a part of buffer, as one chunk. The chunk is made where the data stand: the chunkRoom bytes in front
// of them must be done with; what stands behind them is put back.
func (c *conn) sendChunk(buffer, data []byte) error {
	buffer = buffer[:cap(buffer)]
	to := cap(buffer) - cap(data) + len(data)
	from := to - len(data)
	var room [chunkRoom]byte
	line := append(appendHex(room[:0], len(data)), '\r', '\n')
	from -= copy(buffer[from-len(line):], line)
	if to+2 > len(buffer) {
		c.out = append(c.out, '\r', '\n') // with what comes next
		return c.send(buffer[from:to])
	}
	behind := [2]byte(buffer[to:])
	copy(buffer[to:], "\r\n")
	err := c.send(buffer[from : to+2])
	copy(buffer[to:], behind[:])
	return err
}

// pool says whose connections to instances it uses.
func (c *conn) pool() int {
	if c.worker == nil {
		return 0
	}
	return c.worker.index
}
