package proxy

import (
	"time"

	"kerberos/lb"
)

const (
	fullShare  = 20                     // of an instance that does not start slowly
	firstShare = 2                      // of one that has just come
	minStep    = 100 * time.Millisecond // from one share to the next
)

// turned notes that an instance has come into the balancers or left them: whoever comes, and is to start slowly, does. The caller
// holds mu.
func (s *service) turned(m member) {
	if m.state != ready || m.instance.SlowStart == 0 {
		delete(s.slow, m.upstream)
		return
	}
	if s.slow == nil {
		s.slow = map[*upstream]time.Time{}
	}
	s.slow[m.upstream] = time.Now()
}

// share is what an instance that came in at a time has of its weight by now, of fullShare.
func (u *upstream) share(came, now time.Time) int {
	grown, over := now.Sub(came), u.instance.Load().SlowStart
	if grown >= over {
		return fullShare
	}
	return firstShare + int((fullShare-firstShare)*grown/over)
}

// slowly says whether somebody starts slowly in the next view, whose strategy then is one with weights. With ip-hash nobody does:
// clients would move to others and back. It has the view after the next one built when a share grows. The caller holds mu.
func (s *service) slowly(next *view) bool {
	now := time.Now()
	step, who := time.Duration(0), ""
	for u, came := range s.slow {
		if u.share(came, now) == fullShare {
			delete(s.slow, u)
			continue
		}
		if d := max(u.instance.Load().SlowStart/(fullShare-firstShare), minStep); step == 0 || d < step {
			step = d
		}
		if who == "" || u.id < who {
			who = u.id
		}
	}
	if s.nextStep != nil {
		s.nextStep.Stop()
		s.nextStep = nil
	}
	if who == "" || next.inForce == lb.IPHash {
		return false
	}
	s.nextStep = time.AfterFunc(step, func() {
		s.changes.Add(1)
		s.proxy.spawn(s.refresh)
	})
	if weighted := next.inForce.WithWeights(); weighted != next.inForce {
		next.inForce = weighted
		if next.why != "" {
			next.why += "; "
		}
		next.why += who + " is in slow start"
	}
	return true
}

// slowed are the endpoints of a view in which somebody starts slowly: all have their weights, or one if these do not count, times
// their shares. It is in s.slow who has less than the whole. The caller holds mu.
func (s *service) slowed(v *view) []lb.Endpoint {
	now := time.Now()
	weights := v.strategy.Weighted() && v.why == ""
	endpoints := make([]lb.Endpoint, 0, v.ready)
	for _, p := range v.parts {
		for _, u := range p.ready {
			weight := fullShare
			if came, slow := s.slow[u]; slow {
				weight = u.share(came, now)
			}
			if weights {
				weight *= u.instance.Load().Weight
			}
			endpoints = append(endpoints, lb.Endpoint{ID: u.id, Weight: weight})
		}
	}
	return endpoints
}
