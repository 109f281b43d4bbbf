package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// Explain says what a request would find now. It goes the way of a request, by the same code, as far as to the choice of an
// instance, but takes no turn, no place and no probe there, and counts nothing. It makes Proxy a registry.Explainer.
func (p *Proxy) Explain(q registry.Question) registry.Explanation {
	c := p.newConn(q.Client)
	c.workspace = &workspace{}
	x := &c.x
	x.c = c
	e := registry.Explanation{Client: c.peer, Connection: c.turnedAway()}

	head := q.Method + " " + q.Path + " HTTP/1.1\r\nHost: " + q.Host + "\r\n"
	for _, field := range q.Fields {
		head += field + "\r\n"
	}
	head += "\r\n"
	limits := &p.cfg().Limits
	if len(head) > limits.Head {
		e.Outcome = x.refused(errHeadTooLarge)
		return e
	}
	if err := c.req.parse([]byte(head), p.cfg().via, c.trusted, limits); err != nil {
		e.Outcome = x.refused(err)
		return e
	}
	x.begin(time.Now())
	e.Client = c.req.Client
	if c.isLocal() {
		e.Outcome = c.ownOutcome()
		return e
	}
	e.Outcome = x.explain(&e)
	return e
}

// turnedAway is what becomes of a new connection of that peer; nil if it is let in.
func (c *conn) turnedAway() *registry.Outcome {
	c.p.mu.Lock()
	err := c.p.refuses(c)
	c.p.mu.Unlock()
	var own *refusal
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &own):
		return &registry.Outcome{Kind: registry.ToRefusal, Why: "the gateway shuts down, and takes no more connections"}
	}
	out := c.x.refused(own)
	if own == errGatewayFull {
		out.Why += ", and one that is idle has to make room"
	}
	return &out
}

// ownOutcome is what becomes of a request that is for no backend.
func (c *conn) ownOutcome() registry.Outcome {
	switch who, err := c.own(); {
	case err != nil:
		return c.x.refused(err)
	case who == ownOptions:
		return registry.Outcome{Kind: registry.ToGateway, Status: 200, Why: "the gateway says which methods it allows"}
	case who == ownAPI:
		return registry.Outcome{Kind: registry.ToGateway, Why: "the path is the API's, which is served on this listener (--api)"}
	case c.p.cfg().Ready():
		return registry.Outcome{Kind: registry.ToGateway, Status: 200, Why: "the path is --health-path, and the gateway is ready"}
	}
	return registry.Outcome{Kind: registry.ToGateway, Status: 503, Why: "the path is --health-path, and the gateway shuts down"}
}

// refused is the outcome of a request that gets an error of the gateway's own; more says what its client is not told.
func (x *exchange) refused(err *refusal, more ...string) registry.Outcome {
	return registry.Outcome{
		Kind: registry.ToRefusal, Status: err.status, Error: err.kind, RetryAfter: x.retryAfter(err),
		Why: strings.Join(append([]string{x.c.explain(err)}, more...), ": "),
	}
}

// explain goes on from the route. What there is to say beside the outcome is added to e.
func (x *exchange) explain(e *registry.Explanation) registry.Outcome {
	p, r := x.p(), &x.c.req
	now := p.cfg()
	way, name := now.choose(r)
	if r.unclear {
		cameBy, came := way, name
		var err *refusal
		if way, name, err = p.settle(now, r, way, name); err != nil {
			return x.refused(err, x.readings(err, cameBy, came)...)
		}
	}
	x.explainRoute(e, way, name)
	s := p.service(name)
	if s == nil || !s.known() {
		why := "no instance of " + name + " was registered within the hour"
		if name == "" {
			why = "no route matches"
		}
		return x.refused(errNoRoute, why)
	}
	if x.service, x.route = s, way; way == nil {
		x.route = now.of(name)
	}
	x.retries = x.route.retries
	v := *s.view.Load()
	if v.balancer != nil {
		v.balancer = lb.Fork(v.balancer)
	}
	e.Service = s.explain(&v)
	return x.explainChoice(&v)
}

// readings says where the two readings of an ambiguous path lead.
func (x *exchange) readings(err *refusal, cameBy *route, came string) []string {
	r := &x.c.req
	if err != errPath {
		return nil
	}
	reading, ok := canonical(nil, r.Path)
	if !ok {
		return []string{"it climbs above /"}
	}
	raw := r.Path
	defer func() { r.Path = raw }()
	r.Path = reading
	readBy, read := x.p().cfg().choose(r)
	whom := func(path []byte, way *route, service string) string {
		switch {
		case x.p().owns(path):
			return "the gateway itself"
		case service == "":
			return "nobody"
		}
		if way != nil {
			return "the service " + service + " by the route " + way.name
		}
		return "the service " + service
	}
	return []string{fmt.Sprintf("as it came it is for %s, and as %s it is for %s", whom(raw, cameBy, came), reading, whom(reading, readBy, read))}
}

// explainChoice is handle from where it has found the service, which has the view v.
func (x *exchange) explainChoice(v *view) registry.Outcome {
	p, r, s := x.p(), &x.c.req, x.service
	if v.nobody() {
		return x.refused(errNoInstance, v.unready())
	}
	if r.length > x.route.body {
		return x.refused(errBodyTooLarge)
	}
	x.complete = !r.chunked && r.length <= maxHeld && !r.expect // as far as hold can tell from a head
	if !p.cfg().capped || s.crowd.waiting.Load() == 0 {
		switch u, err := x.wouldLook(v); {
		case u != nil:
			return x.chosen(v, u)
		case err == errNoInstance:
			return x.refused(err, v.unready())
		}
	}
	full, _ := x.noPlace().(*refusal)
	s.crowd.mu.Lock()
	n, packed := s.crowd.list.Len(), s.full()
	s.crowd.mu.Unlock()
	switch timeout := p.cfg().Limits.QueueTimeout; {
	case timeout == 0:
		return x.refused(full, "there is no queue (--queue-timeout)")
	case packed:
		return x.refused(full, fmt.Sprintf("%d wait already, as many as may", n))
	default:
		out := x.refused(full, fmt.Sprintf("it waits behind %d others for a place, for %s at most (--queue-timeout)", n, timeout))
		out.Kind = registry.ToQueue
		return out
	}
}

// wouldLook is look without taking anything: no turn, since the balancer of v is a fork, no place, and no probe.
func (x *exchange) wouldLook(v *view) (*upstream, *refusal) {
	if limit := x.p().cfg().Limits.InFlightPerService; limit > 0 && x.service.crowd.inFlight.Load() >= int64(limit) {
		return nil, errServiceFull
	}
	if u := x.wouldPick(v); u != nil {
		return u, nil
	}
	if x.full {
		return nil, errInstancesFull
	}
	return nil, errNoInstance
}

// wouldPick is pick in the same way.
func (x *exchange) wouldPick(v *view) *upstream {
	x.use(v)
	if u := x.wouldProbe(v, false); u != nil {
		return u
	}
	for x.tried.Len() < lb.MaxTried {
		i := v.balancer.Pick(x.key, &x.tried)
		if i < 0 {
			break
		}
		x.tried.Add(i)
		if u := v.at(i); x.wouldAdmit(u) {
			return u
		}
	}
	for i := range v.ready {
		if u := v.at(i); x.wouldAdmit(u) {
			return u
		}
	}
	return x.wouldProbe(v, true)
}

// wouldProbe is probe in the same way.
func (x *exchange) wouldProbe(v *view, nobodyElse bool) *upstream {
	for _, u := range v.probing {
		if covered, ok := x.mayProbe(v, u, nobodyElse); ok && x.wouldAdmit(u) {
			x.covered = covered
			return u
		}
	}
	return nil
}

// wouldAdmit is admit in the same way.
func (x *exchange) wouldAdmit(u *upstream) bool {
	if u.full() {
		x.full = true
		return false
	}
	return u.gate.State() == cb.Closed || u.gate.FreeProbes() > 0
}

// full says that it has as many requests in flight as it may.
func (u *upstream) full() bool {
	limit := u.service.proxy.cfg().Limits.InFlightPerInstance
	return limit > 0 && u.inFlight.Load() >= int64(limit)
}

// chosen is the outcome for an instance.
func (x *exchange) chosen(v *view, u *upstream) registry.Outcome {
	out := registry.Outcome{Kind: registry.ToInstance, Instance: u.id}
	switch {
	case u.gate.State() != cb.Closed:
		out.Why = "it probes the breaker, which is half-open"
		if x.covered {
			out.Why += "; if that fails, another instance is asked"
		}
	case v.ready == 1:
		out.Why = "no other instance is ready"
	case v.inForce == lb.Random, v.inForce == lb.WeightedRandom:
		if x.takers(v) == 1 {
			out.Why = "no other instance has a place"
		} else {
			out.Kind, out.Instance, out.Why = registry.ToDrawn, "", "the instance is drawn, each with the chance that its share says"
		}
	case x.tried.Len() > 1:
		out.Why = "it comes behind others that are full, or whose breakers have just opened"
	case v.inForce == lb.IPHash:
		out.Why = fmt.Sprintf("the client %s belongs to it", x.c.req.Client)
	default:
		out.Why = "its turn is next"
	}
	return out
}

// takers is how many of those that are ready would take the request.
func (x *exchange) takers(v *view) (n int) {
	for i := range v.ready {
		if x.wouldAdmit(v.at(i)) {
			n++
		}
	}
	return n
}

// unready says why no instance is ready: each reason that there is, with how many have it.
func (v *view) unready() string {
	reasons := map[string]int{}
	for u := range v.all {
		if ok, why := u.ready(); !ok {
			reasons[why]++
		}
	}
	if len(reasons) == 0 {
		return "none is registered"
	}
	most := slices.SortedFunc(maps.Keys(reasons), func(a, b string) int {
		return cmp.Or(cmp.Compare(reasons[b], reasons[a]), strings.Compare(a, b))
	})
	more := ""
	if len(most) > maxReasons {
		most, more = most[:maxReasons], ", ..."
	}
	for i, why := range most {
		most[i] = fmt.Sprintf("%d %s", reasons[why], why)
	}
	return strings.Join(most, ", ") + more
}

// maxReasons is how many different ones are named.
const maxReasons = 5

// explain says what is set for a service, and what its requests find there.
func (s *service) explain(v *view) *registry.ServiceExplanation {
	cfg := s.proxy.cfg()
	breaker, err := cfg.breaker(s.name).WithDefaults()
	if err != nil {
		panic(err) // New has built one of the same configuration
	}
	out := &registry.ServiceExplanation{
		Name: s.name, ServiceStatus: s.proxy.DescribeService(s.name), Ready: v.ready,
		Breaker: registry.BreakerSettings{Failures: breaker.Failures, OpenFor: breaker.OpenFor.String(), Probes: breaker.Probes, Statuses: cfg.BreakerStatuses},
		Limits: registry.LimitsInUse{
			InFlight: s.crowd.inFlight.Load(), InFlightPerService: cfg.Limits.InFlightPerService, InFlightPerInstance: cfg.Limits.InFlightPerInstance,
			Waiting: s.crowd.waiting.Load(), QueueTimeout: cfg.Limits.QueueTimeout.String(),
		},
		Instances: map[string]registry.InstanceExplanation{},
	}
	if s.proxy.cfg().capped {
		out.Limits.Queue = s.places()
	}
	var shares []float64
	if v.balancer != nil {
		shares = lb.Shares(v.balancer)
	}
	inFlight := int64(0)
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range v.all {
		in := registry.InstanceExplanation{Full: u.full(), Addresses: []string{}}
		if i := v.find(u); i >= 0 {
			in.Share = shares[i]
		}
		if came, slow := s.slow[u]; slow && v.inForce != lb.IPHash {
			share := float64(u.share(came, time.Now())) / fullShare
			in.SlowShare = &share
		}
		if status := u.gate.Status(); status.Reason != nil {
			in.OpenedBy = status.Reason.Error()
		}
		for _, ap := range u.addresses.Load().list {
			in.Addresses = append(in.Addresses, ap.String())
		}
		out.Instances[u.id] = in
		inFlight += u.inFlight.Load()
	}
	if cfg.Limits.InFlightPerService == 0 { // they are counted only where there is a limit
		out.Limits.InFlight = inFlight
	}
	return out
}
