package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/cb"
	"kerberos/proxy/loop"
	"kerberos/registry"
	"kerberos/registry/health"
)

const (
	resolveEvery   = 10 * time.Second // how often a name is looked up again
	resolveTimeout = 5 * time.Second
)

// upstream is one instance as it is used: connection pool, breaker and counters. Its identity is service, id and addr:
// it outlives snapshots and registrations that repeat them, and is closed when the instance leaves.
type upstream struct {
	service *service
	id      string
	target  registry.Target
	pools   []atomic.Pointer[pool] // one for each loop, made when it is first needed
	tls     *tls.Config            // nil: http

	addresses atomic.Pointer[addresses]
	instance  atomic.Pointer[registry.Instance] // the latest registration
	health    atomic.Pointer[health.Watch]      // nil: it is not checked
	closed    atomic.Bool

	gate     cb.Gate
	resolver *resolver // nil: the address is a literal

	usage
}

// usage is what requests write of an upstream. It stands apart from what they read: pairs of cache lines are fetched together, and
// it is the last pair of the 512 bytes of an upstream, which begins at a multiple of them. Objects of up to that size are marked by
// the page when garbage is collected, which takes a third of the time that it takes for larger ones.
type usage struct {
	inFlight atomic.Int64
	tunnels  atomic.Int64     // open now
	outcomes [3]atomic.Uint64 // by outcome
	changes  [3]atomic.Uint64 // of the breaker, by the state it came to

	lastError atomic.Pointer[string]
	open      struct {
		mu    sync.Mutex
		conns map[*backendConn]struct{} // all connections, idle or not
		total uint64                    // of those that there ever were
	}
	_ [32]byte
}

// addresses is where an upstream may be dialled now. It never changes.
type addresses struct {
	list []netip.AddrPort // the last good one first
	err  error            // why one that was found is not in list
}

// resolver looks a name up, now and again.
type resolver struct {
	ctx   context.Context
	stop  context.CancelFunc
	mu    sync.Mutex
	timer *time.Timer // nil once closed; guarded by mu
}

// pool is one HostClient, and the part of it that we use. Loops share none: a connection is watched by the loop that uses it.
// So each has one to count with, too, and no CPU waits for a cache line of another one; who reads adds up.
type pool struct {
	connPool
	received, sent atomic.Uint64 // bytes, by the instance
	retries        atomic.Uint64 // attempts at it beyond the first of a request
	_              [24]byte      // to a whole cache line
}

// lease stands for the unexported connection type of HostClient.
type connPool interface {
	acquire(timeout time.Duration) (lease, error)
	release(lease)
	discard(lease)
	closeIdle()
}

type lease interface {
	Conn() net.Conn
	LastUseTime() time.Time
}

// hostPool adapts a HostClient; C is its connection type, which has no name outside fasthttp.
type hostPool[C lease] struct {
	take       func(time.Duration, bool) (C, error)
	give, drop func(C)
	idle       func()
}

func newPool[C lease](take func(time.Duration, bool) (C, error), give, drop func(C), idle func()) *pool {
	return &pool{connPool: &hostPool[C]{take, give, drop, idle}}
}

func (p *hostPool[C]) acquire(timeout time.Duration) (lease, error) { return p.take(timeout, false) }
func (p *hostPool[C]) release(l lease)                              { p.give(l.(C)) }
func (p *hostPool[C]) discard(l lease)                              { p.drop(l.(C)) }
func (p *hostPool[C]) closeIdle()                                   { p.idle() }

// apart is the lease of a connection that is no pool's.
type apart struct{ conn *backendConn }

func (a apart) Conn() net.Conn       { return a.conn }
func (apart) LastUseTime() time.Time { return time.Time{} }

// newUpstream starts an instance: nothing is dialled, but a name begins to be resolved.
func (s *service) newUpstream(in *registry.Instance) *upstream {
	cfg := s.proxy.cfg()
	u := &upstream{
		service: s,
		id:      in.ID,
		target:  in.Target(),
	}
	u.instance.Store(in)
	if err := u.gate.Init(cfg.breaker(s.name), u); err != nil {
		panic(err) // New has judged the configuration
	}
	if u.target.Scheme == "https" {
		u.tls = &tls.Config{
			ServerName: u.target.Host, RootCAs: cfg.UpstreamCA, InsecureSkipVerify: cfg.UpstreamInsecure,
			MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, ClientSessionCache: tls.NewLRUClientSessionCache(8),
		}
	}
	u.pools = make([]atomic.Pointer[pool], len(s.proxy.workers))
	switch {
	case u.target.IP.IsValid():
		only := &struct { // one object, for nearly all instances
			addresses
			list [1]netip.AddrPort
		}{list: [1]netip.AddrPort{netip.AddrPortFrom(u.target.IP, u.target.Port)}}
		if only.err = u.Allowed(only.list[0]); only.err == nil {
			only.addresses.list = only.list[:]
		}
		u.addresses.Store(&only.addresses)
	case isLocalhost(u.target.Host): // RFC 6761 section 6.3: known without a look-up
		u.setAddresses([]netip.AddrPort{
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), u.target.Port),
			netip.AddrPortFrom(netip.IPv6Loopback(), u.target.Port),
		})
	default:
		u.addresses.Store(&addresses{err: errors.New("unresolved")})
		r := &resolver{}
		u.resolver = r
		r.ctx, r.stop = context.WithCancel(context.Background())
		r.mu.Lock()
		r.timer = time.AfterFunc(0, func() { s.proxy.spawn(u.resolve) }) // so that Close waits for it
		r.mu.Unlock()
	}
	u.recheck(in)
	return u
}

// register takes over another registration of the same instance. The caller holds service.mu.
func (u *upstream) register(in *registry.Instance) {
	u.instance.Store(in)
	u.recheck(in)
}

// recheck has the instance checked as its registration says, or else the settings of its service. If that says the same as before nothing changes; a new check of an
// instance that is known goes on from what is thought of it. The caller holds service.mu.
func (u *upstream) recheck(in *registry.Instance) {
	before, check := u.health.Load(), u.service.proxy.cfg().check(u.service.name, in)
	if before == nil && check == nil || before != nil && check != nil && *before.Check == *check {
		return
	}
	if before != nil {
		before.Stop()
	}
	if check == nil {
		u.health.Store(nil)
		return
	}
	up := check.Start == registry.StartUp
	switch view := u.service.view.Load(); {
	case before != nil && before.Status().State != health.Unknown:
		up = before.Status().State == health.Up
	case before == nil && view.upstream(u.id) == u: // it served without one until now
		up = true
	}
	w := u.service.proxy.checks.Watch(health.Instance{
		Owner: u, Check: check, Target: &u.target, TLS: u.tls, Up: up, Recent: before == nil && in.Restored() && in.State() != registry.Unreachable,
	})
	u.health.Store(w)
	if u.resolver != nil {
		w.Soon() // the name may have been resolved between the two
	}
}

// Addrs is where it may be dialled now; with what follows it makes the upstream the health.Owner of its checks.
func (u *upstream) Addrs() []netip.AddrPort { return u.addresses.Load().list }

// HealthChanged is told when checks have another result.
func (u *upstream) HealthChanged(now health.Status) {
	if u.closed.Load() {
		return
	}
	level, why := slog.LevelWarn, now.Error
	if now.State == health.Up {
		level, why = slog.LevelInfo, "checks passed"
	}
	u.service.proxy.log.LogAttrs(context.Background(), level, "instance is "+string(now.State), slog.String("service", u.service.name),
		slog.String("instance", u.id), slog.String("reason", why))
	u.service.touch(u)
}

// Allowed says whether the instance may point to an address.
func (u *upstream) Allowed(ap netip.AddrPort) error {
	return u.service.proxy.cfg().Registry.CheckAddr(u.instance.Load(), ap)
}

func isLocalhost(name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// resolve looks the name up, and again later. A failed look-up keeps the last addresses.
func (u *upstream) resolve() {
	ctx, cancel := context.WithTimeout(u.resolver.ctx, resolveTimeout)
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.target.Host)
	cancel()
	if err == nil {
		list := make([]netip.AddrPort, len(ips))
		for i, ip := range ips {
			list[i] = netip.AddrPortFrom(ip.Unmap(), u.target.Port)
		}
		u.setAddresses(list)
	} else if before := u.addresses.Load(); len(before.list) == 0 {
		u.addresses.Store(&addresses{err: errors.New("unresolved: the name has no address")})
		u.noteError("resolve: " + err.Error())
		u.service.touch(u)
	}
	u.resolver.mu.Lock()
	defer u.resolver.mu.Unlock()
	if u.resolver.timer != nil {
		u.resolver.timer.Reset(resolveEvery)
	}
}

// setAddresses takes over the addresses that are allowed. Those known before keep their order, so that the last good
// one stays first.
func (u *upstream) setAddresses(found []netip.AddrPort) {
	next := &addresses{}
	known := map[netip.AddrPort]bool{}
	for _, ap := range found {
		if err := u.Allowed(ap); err != nil {
			next.err = err
			continue
		}
		known[ap] = true
	}
	before := u.addresses.Load()
	if before != nil {
		for _, ap := range before.list {
			if known[ap] {
				next.list = append(next.list, ap)
				delete(known, ap)
			}
		}
	}
	for _, ap := range found {
		if known[ap] {
			next.list = append(next.list, ap)
			delete(known, ap)
		}
	}
	u.addresses.Store(next)
	if w := u.health.Load(); w != nil && before != nil && len(before.list) == 0 && len(next.list) > 0 {
		w.Soon()
	}
	if before != nil && (len(before.list) == 0) != (len(next.list) == 0) {
		u.service.touch(u)
	}
}

// dial connects to the first address that answers, in timeout all together; it is the DialTimeout of the pool. All refused
// is one failure: the first one is reported, but rather one of a handshake than of another address at which nobody listens.
func (u *upstream) dial(i int, timeout time.Duration) (net.Conn, error) {
	switch timeout {
	case noDial:
		return nil, errNoIdle
	case noWait:
		return u.start(i)
	}
	end := time.Now().Add(timeout)
	now := u.addresses.Load()
	var failed error
	for n, ap := range now.list {
		conn, err := u.connect(i, ap, end)
		if err == nil {
			if n > 0 {
				u.preferAddress(now, n)
			}
			return conn, nil
		}
		var handshake *handshakeError
		if failed == nil || errors.As(err, &handshake) && !errors.As(failed, &handshake) {
			failed = err
		}
	}
	if failed == nil {
		failed = errUnreachable
	}
	return nil, failed
}

// handshakeError is why TLS did not come about on a connection.
type handshakeError struct{ cause error }

func (e *handshakeError) Error() string { return e.cause.Error() }
func (e *handshakeError) Unwrap() error { return e.cause }

// connect dials one address, until end at the latest. It has the connect timeout, and a handshake has it again.
func (u *upstream) connect(i int, ap netip.AddrPort, end time.Time) (net.Conn, error) {
	if u.Allowed(ap) != nil {
		return nil, errProhibited
	}
	b, err := u.service.proxy.dial(i, ap, earlier(end, time.Now().Add(u.service.proxy.cfg().ConnectTimeout)))
	if err != nil {
		return nil, err
	}
	u.opened(b)
	if u.tls == nil {
		return b, nil
	}
	secure := tls.Client(b.Conn, u.tls)
	ctx, cancel := context.WithTimeout(context.Background(), min(u.service.proxy.cfg().ConnectTimeout, time.Until(end)))
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		b.Close() // conn is closed already: the loop has its descriptor
		return nil, &handshakeError{err}
	}
	b.Conn = secure
	return b, nil
}

// opened notes a connection; its Close forgets it.
func (u *upstream) opened(b *backendConn) {
	b.upstream = u
	u.open.mu.Lock()
	defer u.open.mu.Unlock()
	if u.open.conns == nil {
		u.open.conns = map[*backendConn]struct{}{}
	}
	u.open.conns[b] = struct{}{}
	u.open.total++
}

// Busy is how many requests and tunnels it has under way.
func (u *upstream) Busy() int { return int(u.inFlight.Load() + u.tunnels.Load()) }

// Succeeded is how many requests it has answered well.
func (u *upstream) Succeeded() uint64 { return u.outcomes[success].Load() }

// Cut breaks them off: whoever waits on one of the connections finds that it has ended.
func (u *upstream) Cut() {
	u.open.mu.Lock()
	defer u.open.mu.Unlock()
	for b := range u.open.conns {
		b.sever()
	}
}

// dial makes a connection that a loop watches, until a time at the latest. It is held by the calling goroutine.
func (p *Proxy) dial(i int, to netip.AddrPort, until time.Time) (*backendConn, error) {
	if !loop.Supported {
		dialer := net.Dialer{Deadline: until}
		conn, err := dialer.Dial("tcp", to.String())
		if err != nil {
			return nil, err
		}
		return &backendConn{Conn: conn, below: conn}, nil
	}
	if err := p.startLoops(); err != nil {
		return nil, err
	}
	b := &backendConn{}
	sock, err := p.group.Loops[i].Connect(to, b, true)
	if err != nil {
		return nil, err
	}
	if err := sock.AwaitConnected(until); err != nil {
		sock.Close()
		return nil, err
	}
	b.over(sock)
	return b, nil
}

// begin takes a connection for the loop that asks, which may still be on its way; nil if a goroutine has to make it.
func (u *upstream) begin(i int) (l lease, conn *backendConn, reused bool) {
	if u.tls != nil || len(u.addresses.Load().list) != 1 {
		return nil, nil, false
	}
	l, err := u.pool(i).acquire(noWait)
	if err != nil {
		return nil, nil, false
	}
	conn, reused = l.Conn().(*backendConn), !l.LastUseTime().IsZero()
	if reused && !conn.quiet() {
		u.pool(i).discard(l)
		return nil, nil, false
	}
	return l, conn, reused
}

// start makes that connection. On the loop.
func (u *upstream) start(i int) (net.Conn, error) {
	list := u.addresses.Load().list
	if len(list) == 0 { // it was none when begin looked
		return nil, errUnreachable
	}
	ap := list[0]
	if u.Allowed(ap) != nil {
		return nil, errProhibited
	}
	b := &backendConn{}
	sock, err := u.service.proxy.group.Loops[i].Connect(ap, b, false)
	if err != nil {
		return nil, err
	}
	b.over(sock)
	u.opened(b)
	return b, nil
}

// preferAddress puts the i-th address first; a change that came in between wins.
func (u *upstream) preferAddress(seen *addresses, i int) {
	next := &addresses{list: make([]netip.AddrPort, 0, len(seen.list))}
	next.list = append(next.list, seen.list[i])
	next.list = append(next.list, seen.list[:i]...)
	next.list = append(next.list, seen.list[i+1:]...)
	u.addresses.CompareAndSwap(seen, next)
}

// Timeouts for AcquireConn that say: an idle connection or none, and one that may still be on its way.
const (
	noDial = -1
	noWait = -2
)

// errNoIdle is what the dial function answers to the first.
var errNoIdle = errors.New("no connection is idle")

// pool returns the pool of a loop.
func (u *upstream) pool(i int) *pool {
	if p := u.pools[i].Load(); p != nil {
		return p
	}
	hc := &fasthttp.HostClient{
		Addr:                u.id, // for its messages; dial knows where to
		DialTimeout:         func(_ string, timeout time.Duration) (net.Conn, error) { return u.dial(i, timeout) },
		MaxConns:            math.MaxInt32,
		MaxIdleConnDuration: u.service.proxy.cfg().UpstreamIdle,
		ConnPoolStrategy:    fasthttp.LIFO, // the others grow idle and are closed
	}
	u.pools[i].CompareAndSwap(nil, newPool(hc.AcquireConn, hc.ReleaseConn, hc.CloseConn, hc.CloseIdleConnections))
	return u.pools[i].Load()
}

// acquire takes a connection from the pool of a loop, or a new one: only a new one if fresh is set. Whether a kept one can
// still be used is for the caller to find out. The connection is held by the calling goroutine.
//
// A new connection takes at most timeout to make.
func (u *upstream) acquire(i int, fresh bool, timeout time.Duration) (l lease, conn *backendConn, reused bool, err error) {
	for {
		if l, err = u.pool(i).acquire(max(timeout, 0)); err != nil {
			return nil, nil, false, err
		}
		conn, reused = l.Conn().(*backendConn), !l.LastUseTime().IsZero()
		if !fresh || !reused {
			if conn.sock != nil {
				conn.sock.Hold()
			}
			return l, conn, reused, nil
		}
		u.pool(i).discard(l)
	}
}

// dialApart makes a connection that no pool has. It is held by the calling goroutine.
func (u *upstream) dialApart(i int, timeout time.Duration) (lease, *backendConn, error) {
	nc, err := u.dial(i, max(timeout, 0))
	if err != nil {
		return nil, nil, err
	}
	conn := nc.(*backendConn)
	return apart{conn}, conn, nil
}

// idle takes an idle connection for the loop that asks; nil if there is none that it can use.
func (u *upstream) idle(i int) (lease, *backendConn) {
	if u.tls != nil {
		return nil, nil
	}
	for {
		l, err := u.pool(i).acquire(noDial)
		if err != nil {
			return nil, nil
		}
		if conn := l.Conn().(*backendConn); conn.plain() && conn.quiet() {
			return l, conn
		}
		u.pool(i).discard(l)
	}
}

// release gives a connection back, or closes it if it cannot serve another request or the instance has left.
func (u *upstream) release(i int, l lease, reusable bool) {
	if own, ok := l.(apart); ok {
		own.conn.Close()
		return
	}
	if !reusable {
		u.pool(i).discard(l)
		return
	}
	if conn := l.Conn().(*backendConn); conn.sock != nil {
		conn.sock.Let()
	}
	u.pool(i).release(l)
	if u.closed.Load() { // after the release: close may have emptied the pool a moment before
		u.pool(i).closeIdle()
	}
}

// condition is what an instance is, in one word: ready, or the first thing that keeps requests from it.
type condition uint8

const (
	isReady condition = iota
	isDraining
	isDown
	isSuspect
	isUnreachable
	isNowhere
	isFailing
	isUnchecked
	isOpen
	isHalfOpen
)

// conditionNames are what Stats call them.
var conditionNames = [...]string{"ready", "drain", "down", "suspect", "unreachable", "no_address", "check_failing", "unchecked", "breaker_open", "breaker_half_open"}

// byState are those that the registry says.
var byState = map[registry.State]condition{
	registry.Drain: isDraining, registry.Down: isDown, registry.Suspect: isSuspect, registry.Unreachable: isUnreachable,
}

// condition returns it, and why it is not ready.
func (u *upstream) condition() (c condition, why string) {
	if state := u.instance.Load().State(); state != registry.Up {
		return byState[state], string(state)
	}
	if now := u.addresses.Load(); len(now.list) == 0 {
		return isNowhere, now.err.Error()
	}
	if w := u.health.Load(); w != nil {
		switch state, why := w.Verdict(); state {
		case health.Unknown:
			return isUnchecked, why
		case health.Down:
			return isFailing, why
		}
	}
	switch state := u.gate.State(); state {
	case cb.Open:
		return isOpen, "breaker " + state.String()
	case cb.HalfOpen:
		return isHalfOpen, "breaker " + state.String()
	}
	return isReady, ""
}

// ready says whether requests may go to the instance, and if not, why.
func (u *upstream) ready() (bool, string) {
	c, why := u.condition()
	return c == isReady, why
}

func (u *upstream) noteError(reason string) { u.lastError.Store(&reason) }

// BreakerChanged is told every change of the breaker's state.
func (u *upstream) BreakerChanged(from, to cb.State, reason error) {
	if u.closed.Load() {
		return
	}
	u.changes[to].Add(1)
	why := "open time is up"
	switch {
	case reason != nil:
		why = reason.Error()
	case to == cb.Closed:
		why = "probes succeeded"
	}
	u.service.proxy.log.LogAttrs(context.Background(), slog.LevelWarn, "breaker "+to.String(), slog.String("service", u.service.name),
		slog.String("instance", u.id), slog.String("from", from.String()), slog.String("reason", why))
	u.service.touch(u)
}

// close ends the upstream: idle connections are closed at once, those in use when their request ends.
func (u *upstream) close() {
	u.closed.Store(true)
	u.gate.Close()
	if w := u.health.Load(); w != nil {
		w.Stop()
	}
	if r := u.resolver; r != nil {
		r.mu.Lock()
		if r.timer != nil {
			r.timer.Stop()
			r.timer = nil
			r.stop()
		}
		r.mu.Unlock()
	}
	for i := range u.pools {
		if p := u.pools[i].Load(); p != nil {
			p.closeIdle()
		}
	}
}
