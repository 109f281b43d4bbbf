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
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"
)

// What a client may take its time for.
const (
	firstByteTimeout = 30 * time.Second // a new connection that sends nothing is closed without a word
	headTimeout      = 10 * time.Second // from the first byte of a head to its end
	idleTimeout      = 75 * time.Second // a kept-alive connection between requests
	bodyTimeout      = 30 * time.Second // between two reads of a request body
	writeTimeout     = 60 * time.Second // a client that takes no byte of the response
	lingerTimeout    = time.Second      // what is left of a refused upload is read and dropped this long,
	lingerBytes      = 1 << 20          // and this far, so that the answer is not lost in a reset
)

// firstBuffer is the size of a connection's buffers as long as nothing larger comes.
const firstBuffer = 4 << 10

// state of a client connection.
const (
	stateIdle   = iota // waits for a request
	stateActive        // serves one
	stateClosed
)

// conn is one client connection: it serves one request after the other in a goroutine of its own.
type conn struct {
	p        *Proxy
	nc       net.Conn
	raw      syscall.RawConn       // nil: not a socket, so it cannot be looked at
	ready    func(fd uintptr) bool // turn
	peek     func(fd uintptr)
	peeked   int
	hungUp   bool
	peer     netip.Addr
	trusted  bool
	constant []byte // see forwardingFields
	state    atomic.Int32
	read     alarm
	write    alarm
	fd       uintptr       // the socket while turn runs, else 0
	slow     bool          // turn has left a request to the slow way
	patience time.Duration // for the next request to begin

	*workspace // nil between requests
}

// workspace is what a connection needs while it serves a request. Between requests it has none: few that are warm serve
// better than one for each idle connection.
type workspace struct {
	in   buffer
	head []byte // of the request, as it came
	out  []byte // what goes to the client next
	req  Request
	x    exchange
}

// occupy takes a workspace, and vacate gives it back.
func (c *conn) occupy() {
	if c.workspace == nil {
		c.workspace = c.p.workspaces.Get().(*workspace)
		c.x.c = c
	}
}

func (c *conn) vacate() {
	if w := c.workspace; w != nil {
		c.workspace = nil
		w.in.base, w.in.r, w.in.w = 0, 0, 0 // what one client sent is never read for another
		w.in.next()
		w.head, w.out = nil, w.out[:0]
		w.x.c, w.x.service, w.x.view, w.x.upstream, w.x.err = nil, nil, nil, nil, nil
		w.x.asked = asked{}
		c.p.workspaces.Put(w)
	}
}

// Serve accepts connections until Shutdown, which makes it return nil. Running out of file descriptors pauses it.
func (p *Proxy) Serve(ln net.Listener) error {
	p.mu.Lock()
	if p.closing.Load() {
		p.mu.Unlock()
		ln.Close()
		return nil
	}
	p.listeners = append(p.listeners, ln)
	p.mu.Unlock()
	const shortest, longest = 5 * time.Millisecond, time.Second
	for pause := shortest; ; {
		nc, err := ln.Accept()
		if err == nil {
			pause = shortest
			p.accepted(nc)
			continue
		}
		if p.closing.Load() {
			return nil
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

// temporary errors of accept pass: a limit of ours is reached, or the client left before it was accepted.
func temporary(err error) bool {
	return ownLimit(err) || errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EINTR)
}

// accepted starts a connection.
func (p *Proxy) accepted(nc net.Conn) {
	c := &conn{p: p, nc: nc}
	if addr, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		c.peer = addr.AddrPort().Addr().Unmap().WithZone("")
	}
	c.trusted = p.trusts(c.peer)
	c.constant = forwardingFields(c.peer)
	if sc, ok := nc.(syscall.Conn); ok {
		c.raw, _ = sc.SyscallConn()
		c.peek = func(fd uintptr) { c.peeked, c.hungUp = peekSocket(fd), hungUp(fd) }
		c.ready = c.turn
	}
	p.mu.Lock()
	if p.closing.Load() {
		p.mu.Unlock()
		nc.Close()
		return
	}
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	go c.serve()
}

// serve runs the requests of a connection until one side closes it. A panic costs the request, not the process.
func (c *conn) serve() {
	defer func() {
		if failure := recover(); failure != nil {
			c.p.log.Error("panic in a request", slog.Any("panic", failure), slog.String("stack", string(debug.Stack())))
			c.fd = 0
			c.x.abandon()
			if !c.x.started {
				c.refuse(errInternal, true)
				c.linger()
			}
			c.workspace = nil // nobody knows what state it is in
		}
		c.vacate()
		c.state.Store(stateClosed)
		c.nc.Close()
		c.p.mu.Lock()
		delete(c.p.conns, c)
		if len(c.p.conns) == 0 {
			c.p.noConns.Broadcast()
		}
		c.p.mu.Unlock()
	}()
	for first := true; ; first = false {
		if socketsAreRaw && c.raw != nil && !c.serveReady(first) {
			return
		}
		c.occupy()
		head, err := c.readHead(first)
		if err == nil && head != nil {
			c.head = head
			err = c.req.parse(head, c.p.pseudonym, c.trusted)
		} else {
			c.req = Request{} // not the one before: the answer would be made for its method
		}
		if err != nil {
			c.refuse(err, true)
			c.linger()
			return
		}
		if head == nil || !c.serveOne() {
			return
		}
	}
}

// serveOne serves the request in c.req, and reports whether the connection can serve another one.
func (c *conn) serveOne() bool {
	keep := c.handle()
	if c.x.unread {
		c.linger()
	}
	// Looked at again when idle: Shutdown may have passed by while the state was active.
	if !keep || c.p.closing.Load() || !c.state.CompareAndSwap(stateActive, stateIdle) || c.p.closing.Load() {
		return false
	}
	c.in.next()
	return true
}

// serveReady serves requests as they come in, all in one wait for readiness: turn runs whenever the socket has something to
// read, and what comes in while it runs makes it run again. So a connection needs no workspace while it waits. A request
// for which more must be read than is there (the rest of a head, a body) is left to the slow way: then serveReady returns
// true. It returns false when the connection is over.
func (c *conn) serveReady(first bool) bool {
	c.patience = idleTimeout
	if first {
		c.patience = firstByteTimeout
	}
	if c.read.arm(c.nc.SetReadDeadline, time.Now(), c.patience) != nil {
		return false
	}
	c.slow = false
	return c.raw.Read(c.ready) == nil && c.slow
}

// turn serves what has come in. It returns false to wait for more.
func (c *conn) turn(fd uintptr) (done bool) {
	c.occupy()
	b := &c.in
	for {
		if b.r == b.w { // also when it has just been emptied: one event may tell of a request and of the end behind it
			n, err := readSocket(fd, b.space(maxHead))
			if err == errAgain {
				c.vacate()
				return c.read.arm(c.nc.SetReadDeadline, time.Now(), c.patience) != nil
			}
			if err != nil || n == 0 {
				return true
			}
			b.w += n
		}
		w := b.waiting()
		if c.slow = w[0] == '\r'; c.slow || !c.activate() { // an empty line is no request yet
			return true
		}
		end := bytes.Index(w, headEnd) + len(headEnd)
		c.slow = end < len(headEnd) || c.req.parse(w[:end], c.p.pseudonym, c.trusted) != nil ||
			c.req.chunked || c.req.length > int64(len(w)-end)
		if c.slow {
			return true
		}
		c.head = w[:end]
		b.r += end
		b.base = b.r
		c.fd = fd
		keep := c.serveOne()
		c.fd = 0
		if !keep {
			return true
		}
		c.patience = idleTimeout
	}
}

// readHead waits for a request head and returns it whole; it stays in the buffer until the request is done. nil without
// an error: the connection is over.
func (c *conn) readHead(first bool) ([]byte, *refusal) {
	b := &c.in
	scanned := 0
	var deadline time.Time
	for {
		for b.w-b.r >= 2 && b.b[b.r] == '\r' && b.b[b.r+1] == '\n' && scanned == 0 {
			b.r += 2 // RFC 9112 section 2.2: empty lines before a request are skipped
		}
		w := b.waiting()
		if len(w) > 0 && string(w) != "\r" && !c.activate() { // half an empty line is no request yet
			return nil, nil
		}
		if end := bytes.Index(w[scanned:], headEnd); end >= 0 {
			end += scanned + len(headEnd)
			b.r += end
			b.base = b.r
			return w[:end], nil
		}
		if bareLF(w) {
			return nil, errBareLF
		}
		scanned = max(0, len(w)-len(headEnd)+1)
		room := b.space(maxHead)
		if room == nil {
			return nil, errHeadTooLarge
		}
		var err error
		switch now := time.Now(); {
		case len(w) > 0 && deadline.IsZero():
			deadline = now.Add(headTimeout)
			c.read.disarm()
			err = c.nc.SetReadDeadline(deadline)
		case len(w) > 0:
		default:
			deadline = time.Time{} // what had come was an empty line
			patience := idleTimeout
			if first {
				patience = firstByteTimeout
			}
			err = c.read.arm(c.nc.SetReadDeadline, now, patience)
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

// flush sends what is in out. What the socket has room for needs no deadline.
func (c *conn) flush() error {
	rest := c.out
	c.out = c.out[:0]
	if c.fd != 0 && len(rest) > 0 {
		if n, err := writeSocket(c.fd, rest); err == nil {
			rest = rest[n:]
		}
	}
	if len(rest) == 0 {
		return nil
	}
	return c.send(rest)
}

// gone reports whether the client has left while we work for it: it has closed its side and all that it sent was read, or
// the connection is reset or closed in both directions.
func (c *conn) gone() bool {
	return c.raw != nil && (c.raw.Control(c.peek) != nil || c.peeked == 0 || c.hungUp)
}

// linger reads what a client still sends after an answer that came early, and drops it: closing at once would reset the
// connection, and the answer could be lost on its way.
func (c *conn) linger() {
	if half, ok := c.nc.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil &&
		c.nc.SetReadDeadline(time.Now().Add(lingerTimeout)) == nil {
		_, _ = io.CopyN(io.Discard, c.nc, lingerBytes) // whatever ends it, the connection is closed next
	}
}

// Shutdown closes the listeners and the idle connections, waits for the requests in flight and, when ctx ends, cuts those
// that are left. It returns how many were cut.
func (p *Proxy) Shutdown(ctx context.Context) (cut int) {
	p.closing.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ln := range p.listeners {
		ln.Close()
	}
	for c := range p.conns {
		if c.state.CompareAndSwap(stateIdle, stateClosed) {
			c.nc.Close()
		}
	}
	defer context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.noConns.Broadcast()
	})()
	for len(p.conns) > 0 && ctx.Err() == nil {
		p.noConns.Wait()
	}
	for c := range p.conns {
		if c.state.Load() == stateActive {
			cut++
		}
		c.cut()
	}
	return cut
}

// cut ends a connection whatever it is doing. Its request finds out when it checks on its client, within 2 s; Close
// would wait for that.
func (c *conn) cut() {
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		_ = tcp.CloseRead()
		_ = tcp.CloseWrite()
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
	p.background.Wait()
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
