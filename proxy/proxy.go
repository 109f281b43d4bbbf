// Package proxy is the way of a request: HTTP/1.1 in, HTTP/1.1 out. It joins the registry (who is there), the balancers
// (whom to ask) and the breakers (whom not to ask). It does not know configuration files, flags or signals.
//
// Heads and bodies are taken from and put on the wire as they are, so that fields keep their order and case, and nothing is
// parsed twice. Connections to instances come from one fasthttp.HostClient an instance and loop.
//
// handle, in this file, is a request from top to bottom, in a goroutine that may wait at each step. Most requests never need
// to: worker.go takes the same steps on an event loop, and leaves a request to a goroutine, in the middle of the way if need
// be, where it would have to wait. Around the two: server.go has the client connections, head.go the guard (what is
// refused), route.go the routes, view.go who is ready; exchange.go is one request with its attempts, upload.go its body where
// that streams, forward.go what is sent, response.go and body.go what comes back, tunnel.go what an Upgrade leads to;
// upstream.go is an instance, slowstart.go its share when it has just come, backend.go a connection to it, budget.go the bound on
// retries; limits.go has the limits, queue.go those on requests in flight, connections.go those on connections; errors.go says
// whose fault it was, answer.go answers where no backend does, prefer.go in the form that the client wants. The package loop
// below this one knows sockets and epoll, and no HTTP; registry/health asks instances whether they can serve.
package proxy

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/proxy/loop"
	"kerberos/registry"
	"kerberos/registry/health"
)

// probePatience is how long the probes of a half-open instance wait for requests that can do without it.
const probePatience = time.Second

// defaultService answers 503, not 404, even if nobody ever registered it.
const defaultService = "echo"

// Config is what a Proxy is made of. Fields that are left zero get the default.
type Config struct {
	Registry *registry.Registry // who is there; needed
	Strategy lb.Strategy        // round-robin
	Routes   []Route            // none: FirstSegment
	Services map[string]Service // none: what is set for some of them

	// Time limits: zero is the default, negative is none.
	RequestTimeout time.Duration // 30 s: from the last byte of a request sent to the response head, over all attempts
	ConnectTimeout time.Duration // 2 s, for each address of an instance, and again for a TLS handshake
	UpstreamIdle   time.Duration // 4 s: how long a connection to an instance is kept without a request
	Limits         Limits        // of clients and bodies
	IgnoreFIN      bool          // a client that has ended its stream is waited on; else 1 s, and not at all within a response

	Retries         int       // 2 further attempts; negative: none
	Breaker         cb.Config // 5 failures in a row, 30 s, 3 probes
	BreakerStatuses []int     // 502, 503, 504: what counts as a failure of the instance

	AmbiguousPaths PathPolicy // RefusePaths: what becomes of paths that can be read in two ways
	AllowMethods   []string   // none: of CONNECT and TRACE, which are refused otherwise

	Upgrades []string // websocket: protocols, foo or foo/2, to which a client may upgrade; empty but not nil: none

	TrustedProxies   []netip.Prefix // none: whose forwarding fields are believed
	UpstreamCA       *x509.CertPool // nil: the system's roots
	UpstreamInsecure bool           // certificates of instances are not verified
	NoVia            bool           // no Via field is added, and loops are not found by it

	HealthPath string      // none: a path answered here with 200 while Ready, else 503
	Ready      func() bool // nil: always

	API     fasthttp.RequestHandler         // nil: the registration API is not served here
	MayRead func(*fasthttp.RequestCtx) bool // who is told which services there are when a path has none; nil: nobody

	Loops int // GOMAXPROCS: how many goroutines serve what needs no waiting; each has its own connections to instances

	NoMetrics bool         // requests are neither counted by service nor timed, nor are their bytes; those of tunnels are
	Log       *slog.Logger // nil: slog.Default()

	AccessLog  func(*Record) // nil: none; it is told of each request that has ended, and must not wait
	RequestIDs bool          // each request has an X-Request-Id: that of a trusted peer, or one made here
	Trace      func(*Record) // nil: there are no traces; it is told of those requests that are sampled, and must not wait
	TraceShare float64       // 0 to 1: of the requests, those that are sampled, unless a trusted peer has decided
}

// withDefaults checks a Config and fills its gaps.
func (cfg Config) withDefaults() (Config, error) {
	if cfg.Registry == nil {
		return cfg, errors.New("proxy: Config.Registry is nil")
	}
	if cfg.Strategy == "" {
		cfg.Strategy = lb.RoundRobin
	}
	if _, err := lb.ParseStrategy(string(cfg.Strategy)); err != nil {
		return cfg, fmt.Errorf("proxy: Config.Strategy: %w", err)
	}
	cfg.RequestTimeout = orForever(cfg.RequestTimeout, 30*time.Second)
	cfg.ConnectTimeout = orForever(cfg.ConnectTimeout, 2*time.Second)
	cfg.UpstreamIdle = orForever(cfg.UpstreamIdle, 4*time.Second)
	switch {
	case cfg.Retries == 0:
		cfg.Retries = 2
	case cfg.Retries < 0:
		cfg.Retries = 0
	}
	if cfg.BreakerStatuses == nil {
		cfg.BreakerStatuses = []int{502, 503, 504}
	}
	for _, status := range cfg.BreakerStatuses {
		if status < 100 || status > 599 {
			return cfg, fmt.Errorf("proxy: Config.BreakerStatuses has %d: a status is 100 to 599", status)
		}
	}
	if cfg.Upgrades == nil {
		cfg.Upgrades = []string{"websocket"}
	}
	for _, protocol := range cfg.Upgrades {
		name, version, versioned := strings.Cut(protocol, "/")
		if !all([]byte(name), isToken) || versioned && !all([]byte(version), isToken) {
			return cfg, fmt.Errorf("proxy: Config.Upgrades has %q: a protocol is a name such as websocket, or a name and a version such as foo/2", protocol)
		}
	}
	if _, err := cfg.Breaker.WithDefaults(); err != nil {
		return cfg, fmt.Errorf("proxy: Config.Breaker: %w", err)
	}
	switch cfg.AmbiguousPaths {
	case "":
		cfg.AmbiguousPaths = RefusePaths
	case RefusePaths, PassPaths, NormalizePaths:
	default:
		return cfg, fmt.Errorf("proxy: Config.AmbiguousPaths is %q: it must be one of %s, %s, %s", cfg.AmbiguousPaths, RefusePaths, PassPaths, NormalizePaths)
	}
	for _, method := range cfg.AllowMethods {
		if method != "CONNECT" && method != "TRACE" {
			return cfg, fmt.Errorf("proxy: Config.AllowMethods has %q: CONNECT and TRACE are all that it can allow", method)
		}
	}
	limits, err := cfg.Limits.withDefaults()
	if err != nil {
		return cfg, err
	}
	cfg.Limits = limits
	if cfg.Loops < 0 {
		return cfg, fmt.Errorf("proxy: Config.Loops is %d: it must be at least 1, or 0 for GOMAXPROCS", cfg.Loops)
	}
	if cfg.Loops == 0 {
		cfg.Loops = runtime.GOMAXPROCS(0)
	}
	if !(cfg.TraceShare >= 0 && cfg.TraceShare <= 1) {
		return cfg, fmt.Errorf("proxy: Config.TraceShare is %v: it must be from 0 to 1", cfg.TraceShare)
	}
	if cfg.Ready == nil {
		cfg.Ready = func() bool { return true }
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return cfg, nil
}

// Proxy forwards requests to the instances of a registry.
type Proxy struct {
	live       atomic.Pointer[settings] // see cfg
	log        *slog.Logger
	pseudonym  []byte   // our name in Via, unique to the process (RFC 9110 section 7.6.3)
	timed      bool     // requests that have ended are counted or told of
	recorded   bool     // somebody is told of them
	traced     bool     // Config.Trace is set
	marked     bool     // requests have marks
	services   sync.Map // name -> *service
	checks     *health.Checker
	large      sync.Pool // of *[]byte, for bodies
	relays     sync.Pool // of *[]byte, for streams
	workspaces sync.Pool // of *workspace
	scratches  sync.Pool // of *scratch
	date       atomic.Pointer[dateLine]
	workers    []*worker     // one for each loop
	turns      atomic.Uint64 // the worker of the next listener
	unrouted   [finales]atomic.Uint64
	refusals   sync.Map                 // *refusal -> *atomic.Uint64: how many answers of ours
	socketless [shortages]atomic.Uint64 // how often the system had no socket for us

	loops    sync.Once // starts what follows
	group    *loop.Group
	loopsErr error

	closing    atomic.Bool    // Shutdown has begun
	background sync.WaitGroup // what Close waits for

	mu         sync.Mutex // guards what follows
	listeners  []listener
	left       []net.Listener      // before they were served
	conns      map[*conn]struct{}  // open client connections
	noConns    *sync.Cond          // conns has become empty
	clients    map[netip.Addr]int  // how many of them have that address; but for trusted proxies
	refused    int                 // connections, since the last line in the log
	refusedAt  time.Time           // of that line
	turnedAway map[*refusal]uint64 // connections
	connected  uint64              // connections that were let in
	departures []departure         // services that lost their last instance, the oldest first
	cutting    bool                // Shutdown cuts what is left
	stopped    bool                // Close has begun
}

// New makes a Proxy for a Registry; route nil means cfg.Routes, and if there are none FirstSegment.
// Give Update to Registry.OnChange.
func New(cfg Config, route RouteFunc) (*Proxy, error) {
	var id [6]byte
	rand.Read(id[:]) // never fails
	p := &Proxy{pseudonym: []byte("kerberos-" + hex.EncodeToString(id[:])), checks: health.New()}
	now, err := p.settings(cfg, route)
	if err != nil {
		return nil, err
	}
	cfg = now.Config
	p.log = cfg.Log
	p.live.Store(now)
	p.timed = !cfg.NoMetrics || cfg.AccessLog != nil || cfg.Trace != nil
	p.recorded, p.traced = cfg.AccessLog != nil || cfg.Trace != nil, cfg.Trace != nil
	p.marked = cfg.RequestIDs || p.traced
	p.large.New = func() any {
		b := make([]byte, maxWhole+2*firstBuffer)
		return &b
	}
	p.relays.New = func() any {
		b := make([]byte, relaySize)
		return &b
	}
	p.workspaces.New = func() any {
		w := &workspace{}
		w.in.b = make([]byte, firstRequest)
		return w
	}
	p.scratches.New = func() any {
		return &scratch{back: make([]byte, firstBuffer), out: make([]byte, 0, firstBuffer)}
	}
	p.workers = make([]*worker, cfg.Loops)
	for i := range p.workers {
		p.workers[i] = &worker{}
	}
	p.conns, p.clients, p.turnedAway = map[*conn]struct{}{}, map[netip.Addr]int{}, map[*refusal]uint64{}
	p.noConns = sync.NewCond(&p.mu)
	for name := range now.kept {
		p.addService(name)
	}
	cfg.Registry.Observe(p.traffic)
	for _, name := range cfg.Registry.Names() {
		p.Update(name)
	}
	return p, nil
}

// poolFor returns the pool of an exchange's buffers for a use.
func (p *Proxy) poolFor(use int) *sync.Pool {
	if use == relayBuffer {
		return &p.relays
	}
	return &p.large
}

// handle serves the request that c.req holds, and reports whether the connection can serve another one.
func (c *conn) handle() (keep bool) {
	r, x := &c.req, &c.x
	x.begin(time.Now())
	if c.isLocal() {
		return c.local()
	}
	s, err := x.find()
	if err != nil {
		return c.noRoute(err)
	}
	x.service = s
	if s.view.Load().nobody() { // before the body is asked for: 100-continue is not sent for nothing
		return c.fail(errNoInstance)
	}
	if r.length > x.route.body {
		return c.fail(errBodyTooLarge)
	}
	if s.packed() {
		return c.fail(x.noPlace())
	}
	if err := x.hold(false); err != nil {
		return c.fail(err)
	}
	return x.run(stageReading, nil)
}

// run asks one instance after the other until one has answered. The first attempt may have come to a stage on the loop, or
// to an error of a dial for it.
func (x *exchange) run(s stage, err error) (keep bool) {
	for {
		switch s {
		case stageReading:
			u, why := x.next()
			if why != nil {
				return x.c.fail(why)
			}
			err = x.send(u, false)
		case stagePicked, stageAsked:
			err = x.send(x.upstream, s == stageAsked)
		}
		if err == nil {
			return x.finish()
		}
		if !x.again(err) {
			return x.c.fail(x.err)
		}
		s = stageReading
	}
}

// find routes the request.
func (x *exchange) find() (*service, *refusal) {
	p, r := x.c.p, &x.c.req
	now := p.cfg()
	way, name := now.choose(r)
	if r.unclear {
		var err *refusal
		if way, name, err = p.settle(now, r, way, name); err != nil {
			return nil, err
		}
	}
	s := p.service(name)
	if s == nil || !s.known() {
		return nil, errNoRoute
	}
	if way == nil {
		way = now.of(name)
	}
	x.route, x.retries = way, way.retries
	return s, nil
}

// pick chooses the instance to ask next and passes its breaker; nil if nobody is left. Balancers hold ready instances
// only. A free probe of a half-open instance goes to a request that a ready one could still answer, so that no client
// pays for it; to any request if that did not happen for a second, or if no instance is ready. x.full says that the limit
// of an instance was in the way.
func (x *exchange) pick() *upstream {
	if x.full { // those that had no place may have one now
		x.full, x.view = false, nil
	}
	if x.asked.n == lb.MaxTried {
		return nil
	}
	v := x.service.view.Load()
	x.use(v)
	if len(v.probing) > 0 {
		if u := x.probe(v, false); u != nil {
			return u
		}
	}
	if u := x.choose(v); u != nil {
		return u
	}
	// Limits, or breakers that opened a moment ago, before the next view, are in the way: look at all.
	for i := range v.ready {
		if u := v.at(i); !x.asked.has(u) && x.admit(u) {
			return u
		}
	}
	return x.probe(v, true)
}

// choose takes the instance whose turn it is, or the next one that has a place and whose breaker does not block.
func (x *exchange) choose(v *view) *upstream {
	for x.tried.Len() < lb.MaxTried {
		i := v.balancer.Pick(x.key, &x.tried)
		if i < 0 {
			break
		}
		x.tried.Add(i)
		if u := v.at(i); x.admit(u) {
			return u
		}
	}
	return nil
}

// probe takes a free probe of a half-open instance that was not asked yet.
func (x *exchange) probe(v *view, nobodyElse bool) *upstream {
	for _, u := range v.probing {
		if covered, ok := x.mayProbe(v, u, nobodyElse); ok && x.admit(u) {
			x.covered = covered
			return u
		}
	}
	return nil
}

// mayProbe says whether the request is one for a probe of u, and whether a ready instance can make up for it.
func (x *exchange) mayProbe(v *view, u *upstream, nobodyElse bool) (covered, ok bool) {
	if u.gate.FreeProbes() == 0 || x.asked.has(u) {
		return false, false
	}
	covered = !nobodyElse && x.canCover(v, u)
	return covered, covered || nobodyElse || x.began.Sub(u.gate.Status().Since) >= probePatience
}

// canCover reports whether a ready instance can make up for a probe of u that fails: the request may be sent again (not
// with retries off: then it is sent once, whatever comes), and somebody is left to send it to. With ip-hash only the
// clients of u probe it.
func (x *exchange) canCover(v *view, u *upstream) bool {
	return x.route.retries > 0 && x.repeatable() &&
		x.tried.Len() < v.ready && x.asked.n+1 < lb.MaxTried &&
		(v.ipHash == nil || v.ipHash.WouldOwn(x.key, u.id))
}

// admit takes a place of u and passes its breaker; false if there is none, or that blocks.
func (x *exchange) admit(u *upstream) bool {
	if limit := x.p().cfg().Limits.InFlightPerInstance; limit == 0 {
		u.inFlight.Add(1)
	} else if !take(&u.inFlight, limit) {
		x.full = true
		return false
	}
	token, ok := u.gate.Allow()
	if !ok {
		u.inFlight.Add(-1)
		return false
	}
	x.asked.add(u)
	x.upstream, x.token, x.running, x.settled, x.covered = u, token, true, false, false
	x.res.status, x.given, x.taken = 0, 0, 0
	if x.trace.spans != nil {
		x.trace.spans.beginAttempt(u)
	}
	return true
}

// again decides whether another instance is asked after a failed attempt. Nothing written: always. Otherwise if the
// method is idempotent, the body is still here and the retry budget allows it; a probe that another instance can make up
// for is not charged.
func (x *exchange) again(err error) bool {
	x.err = err
	x.end(blame(err), err)
	switch {
	case x.timeLeft() <= 0:
		return false
	case !x.written:
		return true
	case blame(err) == ignored || !x.repeatable():
		return false
	case x.covered:
		return true
	case x.retries == 0:
		return false
	case !x.service.budget.take(x.service, time.Now()):
		x.service.retriesDenied.Add(1)
		return false
	}
	x.retries--
	return true
}
