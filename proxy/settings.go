package proxy

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/registry"
)

// Policy is how requests are served, for a service or a route. A field that is zero is as it is for the service, or else for the
// gateway; a negative one is none.
type Policy struct {
	RequestTimeout time.Duration // see Config
	TotalTimeout   time.Duration // see Limits
	Retries        int           // see Config
	MaxBody        int64         // see Limits.Body
}

// Service is what is set for one service. A field that is zero is as it is for the gateway.
type Service struct {
	Policy
	Strategy lb.Strategy
	Breaker  cb.Config
	Check    *registry.Check // of the instances that register none
}

// settings is a Config with all that is made of it. It never changes: the next one replaces it as a whole.
type settings struct {
	Config
	via       []byte // our name there; nil if we add none
	upgrades  [][]byte
	allow     []byte        // the Allow field
	failing   [600]bool     // by status: Config.BreakerStatuses
	capped    bool          // requests in flight are limited
	slowAfter time.Duration // see the constant; less with a short request timeout
	byFunc    RouteFunc     // nil: table
	table     *table
	standard  *route                     // of a service for which nothing is set
	services  map[string]*route          // of those for which something is, and their routes nothing
	checks    map[string]*registry.Check // of the instances of a service that register none
	kept      map[string]bool            // services that are never forgotten: somebody has named them
}

// cfg is what is in force.
func (p *Proxy) cfg() *settings { return p.live.Load() }

// settings checks a Config and makes what requests need of it.
func (p *Proxy) settings(cfg Config, byFunc RouteFunc) (*settings, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &settings{Config: cfg, byFunc: byFunc, allow: allowField(cfg.AllowMethods), services: map[string]*route{},
		checks: map[string]*registry.Check{}, kept: map[string]bool{defaultService: true}}
	n.capped = cfg.Limits.InFlightPerInstance > 0 || cfg.Limits.InFlightPerService > 0
	if !cfg.NoVia {
		n.via = p.pseudonym
	}
	for _, status := range cfg.BreakerStatuses {
		n.failing[status] = true
	}
	for _, protocol := range cfg.Upgrades {
		n.upgrades = append(n.upgrades, []byte(protocol))
	}
	name := ""
	if len(cfg.Routes) > 0 && byFunc == nil {
		name = FirstSegmentRule
	}
	n.standard = &route{name: name, policy: policy{cfg.RequestTimeout, cfg.Limits.TotalTimeout, cfg.Retries, cfg.Limits.Body}}
	for _, name := range slices.Sorted(maps.Keys(cfg.Services)) {
		s := cfg.Services[name]
		if err := s.check(name); err != nil {
			return nil, err
		}
		if s.Check != nil {
			if n.checks[name], err = s.Check.Filled(); err != nil {
				return nil, fmt.Errorf("proxy: Config.Services: %s: Check: %w", name, err)
			}
		}
		n.kept[name] = true
		n.services[name] = &route{name: name, policy: n.standard.policy.with(s.Policy)}
	}
	if n.table, err = newTable(cfg.Routes, n.of); err != nil {
		return nil, err
	}
	n.slowAfter = min(slowAfter, n.standard.quickest())
	for _, r := range n.services {
		n.slowAfter = min(n.slowAfter, r.quickest())
	}
	for _, r := range n.table.routes {
		n.slowAfter = min(n.slowAfter, r.quickest())
		n.kept[r.service] = true
	}
	return n, nil
}

// check refuses what no service may have.
func (s *Service) check(name string) error {
	if err := registry.ValidName(name); err != nil {
		return fmt.Errorf("proxy: Config.Services: the name of a service %w", err)
	}
	if s.Strategy != "" {
		if _, err := lb.ParseStrategy(string(s.Strategy)); err != nil {
			return fmt.Errorf("proxy: Config.Services: %s: Strategy: %w", name, err)
		}
	}
	if _, err := s.Breaker.WithDefaults(); err != nil {
		return fmt.Errorf("proxy: Config.Services: %s: Breaker: %w", name, err)
	}
	return nil
}

// of is how requests to a service are served, unless a route says more.
func (n *settings) of(service string) *route {
	if len(n.services) > 0 {
		if r := n.services[service]; r != nil {
			return r
		}
	}
	return n.standard
}

// strategy is the one configured for a service.
func (n *settings) strategy(service string) lb.Strategy {
	if s := n.Services[service].Strategy; s != "" {
		return s
	}
	return n.Strategy
}

// check is how an instance of a service is checked; nil: it is not.
func (n *settings) check(service string, in *registry.Instance) *registry.Check {
	if in.Check != nil {
		return in.Check
	}
	return n.checks[service]
}

// breaker is how the breakers of a service's instances are configured.
func (n *settings) breaker(service string) cb.Config {
	c, s := n.Breaker, n.Services[service].Breaker
	if s.Failures != 0 {
		c.Failures = s.Failures
	}
	if s.OpenFor != 0 {
		c.OpenFor = s.OpenFor
	}
	if s.Probes != 0 {
		c.Probes = s.Probes
	}
	if s.ProbeTimeout != 0 {
		c.ProbeTimeout = s.ProbeTimeout
	}
	return c
}

// policy is a Policy without gaps.
type policy struct {
	requestTimeout time.Duration
	totalTimeout   time.Duration
	retries        int
	body           int64
}

// with is a policy over which another one is set.
func (p policy) with(over Policy) policy {
	p.requestTimeout = orForever(over.RequestTimeout, p.requestTimeout)
	p.totalTimeout = orForever(over.TotalTimeout, p.totalTimeout)
	if over.Retries != 0 {
		p.retries = max(over.Retries, 0)
	}
	if over.MaxBody != 0 {
		p.body = orEndless(over.MaxBody)
	}
	return p
}

// quickest is how long a loop may wait at most, for a request to be over in time.
func (p *policy) quickest() time.Duration { return min(p.requestTimeout, p.totalTimeout) / 8 }
