package proxy

import (
	"errors"
	"net"
	"slices"

	"kerberos/cb"
)

// Reconfigure checks another Config and makes all that requests need of it; publish has it be in force, at once and as a whole.
// Requests that have begun go on; connections, breakers and counters stay. What publish costs grows with what has changed.
//
// Registry, Loops, UpstreamIdle, UpstreamCA and UpstreamInsecure cannot change: the error says so. A Proxy that was made with a
// RouteFunc keeps it. Of two calls, the first one must have been published, or never be, before the second.
func (p *Proxy) Reconfigure(cfg Config) (publish func(), err error) {
	before := p.cfg()
	next, err := p.settings(cfg, before.byFunc)
	if err != nil {
		return nil, err
	}
	for name, changed := range map[string]bool{
		"Registry": next.Registry != before.Registry, "Loops": next.Loops != before.Loops, "UpstreamIdle": next.UpstreamIdle != before.UpstreamIdle,
		"UpstreamCA": next.UpstreamCA != before.UpstreamCA, "UpstreamInsecure": next.UpstreamInsecure != before.UpstreamInsecure,
	} {
		if changed {
			return nil, errors.New("proxy: Config." + name + " cannot change while the proxy runs")
		}
	}
	return func() { p.publish(next) }, nil
}

// Check refuses a Config that New refuses. It starts nothing.
func (cfg Config) Check() error {
	_, err := (&Proxy{}).settings(cfg, nil)
	return err
}

func (p *Proxy) publish(next *settings) {
	before := p.cfg()
	for name := range next.kept {
		p.addService(name)
	}
	p.live.Store(next)
	limits, was := next.Limits, before.Limits
	wake := limits.InFlightPerInstance != was.InFlightPerInstance || limits.InFlightPerService != was.InFlightPerService || limits.QueueTimeout != was.QueueTimeout
	touch := func(s *service) {
		if a, b := before.breaker(s.name), next.breaker(s.name); a != b {
			s.setBreakers(b)
		}
		if a, b := before.checks[s.name], next.checks[s.name]; (a == nil) != (b == nil) || a != nil && *a != *b {
			s.recheck()
			s.refresh()
		}
		if before.strategy(s.name) != next.strategy(s.name) {
			s.changes.Add(1)
			s.refresh()
		}
		if before.kept[s.name] && !next.kept[s.name] && s.emptied.Load() != nil {
			p.departed(s) // nobody names it any more
		}
		if wake {
			s.crowd.wake()
		}
	}
	if wake || next.Strategy != before.Strategy || next.Breaker != before.Breaker {
		p.services.Range(func(_, s any) bool {
			touch(s.(*service))
			return true
		})
		return
	}
	for _, names := range []map[string]bool{before.kept, next.kept} {
		for name := range names { // and so those of Config.Services
			if s := p.service(name); s != nil {
				touch(s)
			}
		}
	}
}

// recheck has all instances checked as is configured now.
func (s *service) recheck() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range s.view.Load().all {
		u.recheck(u.instance.Load())
		s.touch(u)
	}
}

// setBreakers configures the breakers of all instances; those to come are made so.
func (s *service) setBreakers(cfg cb.Config) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for u := range s.view.Load().all {
		if err := u.gate.Configure(cfg); err != nil {
			panic(err) // settings has judged it
		}
	}
}

// Leave ends Serve for one listener, also if it has yet to begin: it returns nil. Connections that it has accepted stay.
func (p *Proxy) Leave(ln net.Listener) {
	p.mu.Lock()
	i := slices.IndexFunc(p.listeners, func(l listener) bool { return l.Listener == ln })
	if i < 0 {
		p.left = append(p.left, ln)
		p.mu.Unlock()
		return
	}
	l := p.listeners[i]
	p.listeners = slices.Delete(p.listeners, i, i+1)
	p.mu.Unlock()
	l.closer.Close()
}

// listener is one that is served.
type listener struct {
	net.Listener
	closer interface{ Close() error }
}

// serves says whether a listener is still to be served.
func (p *Proxy) serves(ln net.Listener) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.listeners, func(l listener) bool { return l.Listener == ln })
}
