package proxy

import (
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kerberos/cb"
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
	pinned  bool // named by the configuration: never forgotten
	view    atomic.Pointer[view]
	changes atomic.Uint64 // grows with every reason to build a new view
	touched atomic.Bool   // a refresh is on its way
	emptied atomic.Int64  // Unix nanoseconds of when the last instance left; 0 while there is one
	counter lb.Counter
	budget  retryBudget

	mu        sync.Mutex // one builder at a time; guards what follows
	built     uint64     // of changes: what the view has seen
	builtAt   time.Time
	forgotten bool // no longer in Proxy.services
	warned    bool // the fallback to an unweighted strategy is in the log
}

// view is what a request reads of a service: which instances may be picked now. It never changes; the next one replaces
// it whole.
type view struct {
	ready    []*upstream // sorted by id; the balancer's indices are into it
	balancer lb.Balancer
	ipHash   *lb.Rendezvous // the balancer, if that strategy is in force
	probing  []*upstream    // half-open: each has probes to give away
	all      []*upstream    // sorted by id

	inForce lb.Strategy
	why     string // why another strategy than the configured one is in force
}

// touch says that something of the service has changed and has the view built anew soon, by another goroutine: it is
// called where requests run.
func (s *service) touch() {
	s.changes.Add(1)
	if s.touched.CompareAndSwap(false, true) {
		s.proxy.spawn(func() {
			s.touched.Store(false)
			s.refresh()
		})
	}
}

// refresh returns when the view has seen all changes up to now. The first caller builds, the others find it done. Builds
// keep a distance of viewEvery, so that a storm of changes is published in few views.
func (s *service) refresh() {
	want := s.changes.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.built >= want {
		return
	}
	if wait := viewEvery - time.Since(s.builtAt); wait > 0 {
		time.Sleep(wait)
	}
	seen := s.changes.Load()
	s.build(s.proxy.cfg.Registry.Snapshot(s.name))
	s.built, s.builtAt = seen, time.Now()
}

// build makes the view of a snapshot (nil: no instances) and publishes it.
func (s *service) build(snapshot *registry.Snapshot) {
	before := s.view.Load()
	next := &view{inForce: s.proxy.cfg.Strategy}
	var instances []*registry.Instance
	if snapshot != nil {
		instances = snapshot.Instances()
	}
	var gone []*upstream
	next.all, gone = s.upstreams(before.all, instances)

	if next.inForce.Weighted() {
		for _, in := range instances {
			if in.Weight < 1 {
				next.inForce, next.why = next.inForce.Unweighted(), in.ID+" has no weight"
				break
			}
		}
		if next.why != "" && !s.warned {
			s.proxy.log.Warn("strategy falls back", slog.String("service", s.name), slog.String("strategy", string(s.proxy.cfg.Strategy)),
				slog.String("in_force", string(next.inForce)), slog.String("reason", next.why))
		}
		s.warned = next.why != ""
	}

	endpoints := make([]lb.Endpoint, 0, len(next.all))
	next.ready = make([]*upstream, 0, len(next.all))
	for i, u := range next.all {
		if ok, _ := u.ready(); ok {
			next.ready = append(next.ready, u)
			endpoints = append(endpoints, lb.Endpoint{ID: u.id, Weight: instances[i].Weight})
		} else if u.gate.State() == cb.HalfOpen {
			next.probing = append(next.probing, u)
		}
	}
	if before.balancer != nil {
		next.balancer = lb.Derive(before.balancer, next.inForce, endpoints, &s.counter)
	} else {
		next.balancer = lb.New(next.inForce, endpoints, &s.counter)
	}
	next.ipHash, _ = next.balancer.(*lb.Rendezvous)

	if len(next.all) > 0 {
		s.emptied.Store(0)
	} else if s.emptied.Load() == 0 {
		s.emptied.Store(time.Now().UnixNano())
		s.proxy.departed(s)
	}
	s.view.Store(next)
	for _, u := range gone {
		u.close()
	}
}

// upstreams finds the upstream of each instance: the one there is, or a new one. Both lists are sorted by id. gone are
// those that no instance needs any more.
func (s *service) upstreams(have []*upstream, instances []*registry.Instance) (all, gone []*upstream) {
	all = make([]*upstream, 0, len(instances))
	for _, in := range instances {
		if len(have) > 0 && have[0].instance.Load() == in { // nearly all: spare the comparison of ids
			all = append(all, have[0])
			have = have[1:]
			continue
		}
		for len(have) > 0 && have[0].id < in.ID {
			gone = append(gone, have[0])
			have = have[1:]
		}
		if len(have) > 0 && have[0].id == in.ID {
			u := have[0]
			have = have[1:]
			if u.instance.Load().Addr == in.Addr {
				u.instance.Store(in)
				all = append(all, u)
				continue
			}
			gone = append(gone, u)
		}
		all = append(all, s.newUpstream(in))
	}
	return all, append(gone, have...)
}

// nobody says that no instance could be asked, not even for a probe.
func (v *view) nobody() bool { return len(v.ready) == 0 && len(v.probing) == 0 }

// find returns the index of u among the ready ones, or -1.
func (v *view) find(u *upstream) int {
	i, ok := slices.BinarySearchFunc(v.ready, u.id, func(u *upstream, id string) int { return strings.Compare(u.id, id) })
	if !ok || v.ready[i] != u {
		return -1
	}
	return i
}

// retryAfter is when the first breaker lets a probe through, in seconds, at least 1.
func (v *view) retryAfter(now time.Time) int {
	soonest := time.Duration(math.MaxInt64)
	for _, u := range v.all {
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
func (p *Proxy) addService(name string, pinned bool) *service {
	if s := p.service(name); s != nil {
		return s
	}
	s := &service{name: name, proxy: p, pinned: pinned}
	s.view.Store(&view{inForce: p.cfg.Strategy})
	s.emptied.Store(time.Now().UnixNano())
	found, _ := p.services.LoadOrStore(name, s)
	return found.(*service)
}

// Update takes over what the registry holds of a service; give it to Registry.OnChange. When it returns, requests see
// the change.
func (p *Proxy) Update(name string) {
	for {
		s := p.service(name)
		if s == nil {
			if p.cfg.Registry.Snapshot(name) == nil {
				return
			}
			s = p.addService(name, false)
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
	if s.pinned {
		return
	}
	now := time.Now()
	p.mu.Lock()
	p.departures = append(p.departures, departure{s, now})
	old := 0
	for old < len(p.departures) && now.Sub(p.departures[old].at) > rememberName {
		old++
	}
	due := slices.Clone(p.departures[:old])
	p.departures = slices.Delete(p.departures, 0, old)
	p.mu.Unlock()
	for _, d := range due {
		if d.service != s {
			p.spawn(func() { p.forget(d.service) })
		}
	}
}

// departure is a service without instances, and since when.
type departure struct {
	service *service
	at      time.Time
}

func (p *Proxy) forget(s *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.known() {
		s.forgotten = true
		p.services.CompareAndDelete(s.name, s)
	}
}

// known says whether the service answers 503 without instances, not 404.
func (s *service) known() bool {
	since := s.emptied.Load()
	return s.pinned || since == 0 || time.Since(time.Unix(0, since)) < rememberName
}

// close ends the service's upstreams.
func (s *service) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.view.Load().all {
		u.close()
	}
}

// DescribeService tells which strategy is in force for a service. It makes Proxy a registry.Describer.
func (p *Proxy) DescribeService(name string) registry.ServiceStatus {
	status := registry.ServiceStatus{Strategy: string(p.cfg.Strategy), InForce: string(p.cfg.Strategy)}
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
	all := s.view.Load().all
	i, ok := slices.BinarySearchFunc(all, id, func(u *upstream, id string) int { return strings.Compare(u.id, id) })
	if !ok {
		return registry.InstanceStatus{Reason: "not published yet"}
	}
	u := all[i]
	breaker := u.gate.Status()
	status := registry.InstanceStatus{
		Breaker:  registry.BreakerStatus{State: breaker.State.String(), Since: breaker.Since},
		InFlight: u.inFlight.Load(),
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
	return status
}
