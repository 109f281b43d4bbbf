package proxy

import (
	"sync"
	"time"
)

// The retry budget of a service: 20 % of its requests, at least 10 a second, saved up for 10 s at the most. It keeps
// retries from multiplying the load when all instances fail.
const (
	budgetShare  = 0.2
	budgetFloor  = 10 // a second
	budgetWindow = 10 * time.Second
	budgetRefill = 100 * time.Millisecond
)

// retryBudget is looked at only when a request fails: what it needs to know of the others it takes from the counters of
// the instances.
type retryBudget struct {
	mu       sync.Mutex
	left     float64
	at       time.Time // of the last refill
	requests uint64    // of the service, until then
	taken    uint64    // retries since then, which are no requests
}

// take reports whether one more retry is within the budget, and charges it.
func (b *retryBudget) take(s *service, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(s, now)
	if b.left < 1 {
		return false
	}
	b.left--
	b.taken++
	return true
}

// has is how many retries it would allow.
func (b *retryBudget) has(s *service, now time.Time) float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(s, now)
	return b.left
}

// refill adds what was saved up since the last time. The lock is held.
func (b *retryBudget) refill(s *service, now time.Time) {
	if b.at.IsZero() {
		b.at, b.left, b.requests = now, budgetFloor*budgetWindow.Seconds(), s.requests()
	} else if gone := now.Sub(b.at); gone >= budgetRefill {
		requests := s.requests()
		came := float64(requests - min(b.requests+b.taken, requests)) // those of instances that left are not counted any more
		refill := max(budgetShare*came, budgetFloor*gone.Seconds())
		limit := refill / gone.Seconds() * budgetWindow.Seconds()
		b.at, b.left, b.requests, b.taken = now, min(b.left+refill, limit), requests, 0
	}
}

// requests is how many requests the service's instances have ended.
func (s *service) requests() (n uint64) {
	for u := range s.view.Load().all {
		for i := range u.outcomes {
			n += u.outcomes[i].Load()
		}
	}
	return n
}
