package proxy

import (
	"log/slog"
	"math"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kerberos/lb"
	"kerberos/registry"
)

const (
	viewEvery    = 5 * time.Millisecond // changes of one service that come closer together are published together
	rememberName = time.Hour            // how long a service without instances answers 503 before it is forgotten (404)
)

// service is what the proxy holds of one service for as long as it has instances, and an hour longer.
type service struct {
	name    string
	proxy   *Proxy
	view    atomic.Pointer[view]
	changes atomic.Uint64             // grows with every reason to build a new view
	touched atomic.Bool               // a refresh is on its way
	emptied atomic.Pointer[time.Time] // when the last instance left; nil while there is one
	counter lb.Counter
	budget  retryBudget
	crowd   crowd
	counts  []atomic.Pointer[counts] // one for each loop, made when it is first needed

	retries       atomic.Uint64 // attempts beyond the first
	retriesDenied atomic.Uint64 // by the budget
	queueRefused  atomic.Uint64 // requests that found no place

	listed bool // in Proxy.departures; guarded by Proxy.mu

	dirtyMu sync.Mutex             // guards what follows
	dirty   map[*upstream]struct{} // those that may have become ready, or no longer are

	mu        sync.Mutex // one builder at a time; guards what follows
	built     uint64     // of changes: what the view has seen
	builtAt   time.Time
	forgotten bool                    // no longer in Proxy.services
	warned    bool                    // the fallback to an unweighted strategy is in the log
	slow      map[*upstream]time.Time // those whose share grows, and when they came into the balancers
	nextStep  *time.Timer             // when it does; nil if there are none
}

// view is what a request reads of a service: which instances may be picked now. It never changes; the next one replaces
// it whole.
type view struct {
	balancer lb.Balancer    // over the ready ones; its indices are those of at
	ipHash   *lb.Rendezvous // the balancer, if that strategy is in force
	probing  []*upstream    // half-open: each has probes to give away
	parts    []*viewPart    // all instances, sorted by id
	starts   []int          // for each part, how many are ready in those before it
	ready    int            // how many are ready in all

	strategy lb.Strategy // that is configured
	inForce  lb.Strategy
	why      string // why another strategy than the configured one is in force
}

// viewPart is what a view knows of one part of a registry.Snapshot. It never changes: the next view has it too, unless the
// part has changed or the readiness of one of its instances. So a change costs a part and the list of parts.
type viewPart struct {
	of        *registry.Part
	members   []member // one for each of its instances, sorted by id
	ready     []*upstream
	endpoints []lb.Endpoint // of ready, where the strategy needs them
	probing   []*upstream
	noWeight  string // the id of an instance without a weight, if there is one and weights count
}

// member is an instance in a view. What is beside the pointers spares looking behind them: with 10,000 instances that is
// most of the cost of a view.
type member struct {
	instance *registry.Instance
	*upstream
	state memberState
}

type memberState uint8

const (
	notReady memberState = iota
	ready
	probing // half-open
)

// touch says that an instance may have become ready, or no longer be, and has the view built anew soon, by another
// goroutine: it is called where requests run.
func (s *service) touch(u *upstream) {
	s.dirtyMu.Lock()
	if s.dirty == nil {
		s.dirty = map[*upstream]struct{}{}
	}
	s.dirty[u] = struct{}{}
	s.dirtyMu.Unlock()
	s.changes.Add(1)
	if s.touched.CompareAndSwap(false, true) {
		s.proxy.spawn(func() {
			s.touched.Store(false)
			s.refresh()
		})
	}
}

// refresh returns when the view has seen all changes up to now. The first caller builds, the others find it done. Builds
// keep a distance of viewEvery, so that a storm of changes is published in few views. Callers go on one after the other, and before
// each of them a loop that waits for a CPU gets it: at once they would hold up requests for half a millisecond.
func (s *service) refresh() {
	want := s.changes.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	defer runtime.Gosched()
	if s.built >= want {
		return
	}
	if wait := viewEvery - time.Since(s.builtAt); wait > 0 {
		time.Sleep(wait)
	}
	seen := s.changes.Load()
	s.build(s.proxy.cfg().Registry.Snapshot(s.name))
	s.built, s.builtAt = seen, time.Now()
}

// build makes the view of a snapshot (nil: no instances) and publishes it.
func (s *service) build(snapshot *registry.Snapshot) {
	before := s.view.Load()
	next := &view{strategy: s.proxy.cfg().strategy(s.name)}
	next.inForce = next.strategy
	var gone []*upstream
	next.parts, gone = s.parts(before, next.strategy, snapshot)

	if next.inForce.Weighted() {
		for _, p := range next.parts {
			if p.noWeight != "" {
				next.inForce, next.why = next.inForce.Unweighted(), p.noWeight+" has no weight"
				break
			}
		}
		if next.why != "" && !s.warned {
			s.proxy.log.Warn("strategy falls back", slog.String("service", s.name), slog.String("strategy", string(next.strategy)),
				slog.String("in_force", string(next.inForce)), slog.String("reason", next.why))
		}
		s.warned = next.why != ""
	}

	next.starts = make([]int, len(next.parts))
	for i, p := range next.parts {
		next.starts[i] = next.ready
		next.ready += len(p.ready)
		next.probing = append(next.probing, p.probing...)
	}
	if s.slowly(next) {
		next.balancer = lb.New(next.inForce, s.slowed(next), &s.counter)
	} else if next.inForce.NeedsEndpoints() {
		endpoints := make([]lb.Endpoint, 0, next.ready)
		for _, p := range next.parts {
			endpoints = append(endpoints, p.endpoints...)
		}
		if before.balancer != nil {
			next.balancer = lb.Derive(before.balancer, next.inForce, endpoints, &s.counter)
		} else {
			next.balancer = lb.New(next.inForce, endpoints, &s.counter)
		}
	} else {
		next.balancer = lb.Even(next.inForce, next.ready, &s.counter)
	}
	next.ipHash, _ = next.balancer.(*lb.Rendezvous)

	if len(next.parts) > 0 {
		s.emptied.Store(nil)
	} else if s.emptied.Load() == nil {
		now := time.Now()
		s.emptied.Store(&now)
		s.proxy.departed(s)
	}
	s.view.Store(next)
	s.crowd.wake() // if nobody is left who could have a place, they all go, one after the other
	for _, u := range gone {
		u.close()
		delete(s.slow, u)
	}
}

// parts makes the parts of the next view: those that nothing has happened in are the ones from before. gone are the
// upstreams that no instance needs any more.
func (s *service) parts(last *view, strategy lb.Strategy, snapshot *registry.Snapshot) (next []*viewPart, gone []*upstream) {
	before := last.parts
	s.dirtyMu.Lock()
	dirty := s.dirty
	s.dirty = nil
	s.dirtyMu.Unlock()
	turned := make(map[*viewPart]struct{}, len(dirty)) // in these an instance may have
	for u := range dirty {
		if n := last.part(u.id); n >= 0 {
			turned[before[n]] = struct{}{}
		}
	}
	var have []member // of parts that are no more
	stale := func(p *viewPart) { have = append(have, p.members...) }
	if strategy != last.strategy { // parts have what one strategy needs
		for _, p := range before {
			stale(p)
		}
		before = nil
	}
	if snapshot != nil {
		next = make([]*viewPart, len(snapshot.Parts()))
		for i, part := range snapshot.Parts() {
			// A part that comes before this one, and was not found yet, is in the snapshot no more.
			for len(before) > 0 && before[0].of != part && before[0].members[0].id < part.Instances[0].ID {
				stale(before[0])
				before = before[1:]
			}
			if len(before) > 0 && before[0].of == part {
				if _, is := turned[before[0]]; !is {
					next[i], before = before[0], before[1:]
				}
			}
		}
	}
	for _, p := range before {
		stale(p)
	}
	for i, p := range next {
		if p == nil {
			next[i], have, gone = s.part(strategy, have, gone, snapshot.Parts()[i], dirty)
		}
	}
	for _, m := range have {
		gone = append(gone, m.upstream)
	}
	return next, gone
}

// upstream returns that of an instance, or nil.
func (p *viewPart) upstream(id string) *upstream {
	if i, ok := slices.BinarySearchFunc(p.members, id, func(m member, id string) int { return strings.Compare(m.id, id) }); ok {
		return p.members[i].upstream
	}
	return nil
}

// part makes a part of a view. have is what is left over from before, sorted by id; what is in neither is added to gone.
func (s *service) part(strategy lb.Strategy, have []member, gone []*upstream, of *registry.Part, dirty map[*upstream]struct{}) (*viewPart, []member, []*upstream) {
	p := &viewPart{of: of, members: make([]member, 0, len(of.Instances)), ready: make([]*upstream, 0, len(of.Instances))}
	for _, in := range of.Instances {
		m, before := member{instance: in}, notReady
		switch {
		case len(have) > 0 && have[0].instance == in: // nearly all
			m, have = have[0], have[1:]
			before = m.state
			if _, is := dirty[m.upstream]; is {
				m.state = m.stateNow()
			}
		default:
			for len(have) > 0 && have[0].id < in.ID {
				gone, have = append(gone, have[0].upstream), have[1:]
			}
			if len(have) > 0 && have[0].id == in.ID {
				if u := have[0].upstream; u.target == in.Target() {
					u.register(in)
					m.upstream, before = u, have[0].state
				} else {
					gone = append(gone, u)
				}
				have = have[1:]
			}
			if m.upstream == nil {
				m.upstream = s.newUpstream(in)
			}
			m.state = m.stateNow()
		}
		if m.state != before {
			s.turned(m)
		}
		p.members = append(p.members, m)
		switch m.state {
		case ready:
			p.ready = append(p.ready, m.upstream)
			if strategy.NeedsEndpoints() {
				p.endpoints = append(p.endpoints, lb.Endpoint{ID: in.ID, Weight: in.Weight})
			}
		case probing:
			p.probing = append(p.probing, m.upstream)
		}
		if strategy.Weighted() && p.noWeight == "" && in.Weight < 1 {
			p.noWeight = in.ID
		}
	}
	return p, have, gone
}

// stateNow looks behind the pointers.
func (m *member) stateNow() memberState {
	switch c, _ := m.condition(); c {
	case isReady:
		return ready
	case isHalfOpen:
		return probing
	}
	return notReady
}

// nobody says that no instance could be asked, not even for a probe.
func (v *view) nobody() bool { return v.ready == 0 && len(v.probing) == 0 }

// at returns the i-th of those that are ready, sorted by id. Parts differ in size by little, so it looks near where the
// i-th would be if they did not.
func (v *view) at(i int) *upstream {
	p := 0
	if len(v.starts) > 1 {
		p = i * len(v.starts) / v.ready
		for v.starts[p] > i {
			p--
		}
		for p+1 < len(v.starts) && v.starts[p+1] <= i {
			p++
		}
	}
	return v.parts[p].ready[i-v.starts[p]]
}

// all yields the upstreams of all instances, sorted by id.
func (v *view) all(yield func(*upstream) bool) {
	for _, p := range v.parts {
		for _, m := range p.members {
			if !yield(m.upstream) {
				return
			}
		}
	}
}

// upstream returns that of an instance, or nil.
func (v *view) upstream(id string) *upstream {
	if n := v.part(id); n >= 0 {
		return v.parts[n].upstream(id)
	}
	return nil
}

// part returns the index of the part in which that id is, if it is in any; -1 if there is none.
func (v *view) part(id string) int {
	return sort.Search(len(v.parts), func(i int) bool { return v.parts[i].members[0].id > id }) - 1
}

// find returns the index of u among the ready ones, or -1.
func (v *view) find(u *upstream) int {
	n := v.part(u.id)
	if n < 0 {
		return -1
	}
	list := v.parts[n].ready
	i, ok := slices.BinarySearchFunc(list, u.id, func(u *upstream, id string) int { return strings.Compare(u.id, id) })
	if !ok || list[i] != u {
		return -1
	}
	return v.starts[n] + i
}

// retryAfter is when the first breaker lets a probe through, in seconds, at least 1.
func (v *view) retryAfter(now time.Time) int {
	soonest := time.Duration(math.MaxInt64)
	for u := range v.all {
		if until := u.gate.Status().Until; !until.IsZero() {
			soonest = min(soonest, until.Sub(now))
		}
	}
	if soonest == math.MaxInt64 {
		return 1
	}
	return max(1, int((soonest+time.Second-1)/time.Second))
}

// service returns the service of that name if there is one, or was within the last hour.
func (p *Proxy) service(name string) *service {
	if s, ok := p.services.Load(name); ok {
		return s.(*service)
	}
	return nil
}

// addService returns the service of that name; if need be it is made.
func (p *Proxy) addService(name string) *service {
	if s := p.service(name); s != nil {
		return s
	}
	s := &service{name: name, proxy: p, counts: make([]atomic.Pointer[counts], len(p.workers))}
	strategy := p.cfg().strategy(name)
	s.view.Store(&view{strategy: strategy, inForce: strategy})
	now := time.Now()
	s.emptied.Store(&now)
	found, _ := p.services.LoadOrStore(name, s)
	return found.(*service)
}

// Update takes over what the registry holds of a service; give it to Registry.OnChange. When it returns, requests see
// the change.
func (p *Proxy) Update(name string) {
	for {
		s := p.service(name)
		if s == nil {
			if p.cfg().Registry.Snapshot(name) == nil {
				return
			}
			s = p.addService(name)
		}
		s.changes.Add(1)
		s.refresh()
		s.mu.Lock()
		forgotten := s.forgotten
		s.mu.Unlock()
		if !forgotten {
			return
		}
	}
}

// departed notes that a service has lost its last instance and forgets those for which that was an hour ago.
func (p *Proxy) departed(s *service) {
	if p.cfg().kept[s.name] {
		return
	}
	now := time.Now()
	p.mu.Lock()
	old := 0
	for old < len(p.departures) && now.Sub(p.departures[old].at) > rememberName {
		p.departures[old].service.listed = false
		old++
	}
	due := slices.Clone(p.departures[:old])
	p.departures = slices.Delete(p.departures, 0, old)
	p.list(s, now)
	p.mu.Unlock()
	for _, d := range due {
		if d.service != s {
			p.spawn(func() { p.forget(d.service) })
		}
	}
}

// list has a service looked at an hour later, once however often it comes and goes until then. The caller holds Proxy.mu.
func (p *Proxy) list(s *service, now time.Time) {
	if !s.listed {
		s.listed = true
		p.departures = append(p.departures, departure{s, now})
	}
}

// departure is a service that was without instances, and when it was listed.
type departure struct {
	service *service
	at      time.Time
}

func (p *Proxy) forget(s *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.known():
		s.forgotten = true
		p.services.CompareAndDelete(s.name, s)
	case s.emptied.Load() != nil: // it was there again, and has left again
		p.mu.Lock()
		p.list(s, time.Now())
		p.mu.Unlock()
	}
}

// known says whether the service answers 503 without instances, not 404.
func (s *service) known() bool {
	since := s.emptied.Load()
	return since == nil || time.Since(*since) < rememberName || s.proxy.cfg().kept[s.name]
}

// close ends the service's upstreams.
func (s *service) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nextStep != nil {
		s.nextStep.Stop()
	}
	for u := range s.view.Load().all {
		u.close()
	}
}

// DescribeService tells which strategy is in force for a service. It makes Proxy a registry.Describer.
func (p *Proxy) DescribeService(name string) registry.ServiceStatus {
	strategy := string(p.cfg().strategy(name))
	status := registry.ServiceStatus{Strategy: strategy, InForce: strategy}
	if s := p.service(name); s != nil {
		v := s.view.Load()
		status.InForce, status.Why = string(v.inForce), v.why
	}
	return status
}

// DescribeInstance tells how an instance is doing.
func (p *Proxy) DescribeInstance(name, id string) registry.InstanceStatus {
	s := p.service(name)
	if s == nil {
		return registry.InstanceStatus{Reason: "not published yet"}
	}
	u := s.view.Load().upstream(id)
	if u == nil {
		return registry.InstanceStatus{Reason: "not published yet"}
	}
	breaker := u.gate.Status()
	status := registry.InstanceStatus{
		Breaker:  registry.BreakerStatus{State: breaker.State.String(), Since: breaker.Since},
		InFlight: u.inFlight.Load(),
		Tunnels:  u.tunnels.Load(),
		Success:  u.outcomes[success].Load(),
		Failure:  u.outcomes[failure].Load(),
		Ignored:  u.outcomes[ignored].Load(),
	}
	status.Ready, status.Reason = u.ready()
	if !breaker.Until.IsZero() {
		status.Breaker.Until = &breaker.Until
	}
	if last := u.lastError.Load(); last != nil {
		status.LastError = *last
	}
	if w := u.health.Load(); w != nil {
		now := w.Status()
		status.Check = w.Check
		status.Health = &registry.HealthStatus{State: string(now.State), Since: now.Since, LastError: now.Error}
		if !now.Checked.IsZero() {
			status.Health.CheckedAt = &now.Checked
		}
	}
	return status
}

// traffic is what goes to an instance, also when it has left; nil if requests do not know it.
func (p *Proxy) traffic(name, id string) registry.Traffic {
	if s := p.service(name); s != nil {
		if u := s.view.Load().upstream(id); u != nil {
			return u
		}
	}
	return nil
}
