package proxy

import (
	linked "container/list"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// crowd is what a service knows of its limits: how many of its requests are in flight, and who waits for a place.
//
// A place is one below each limit that is set: of the service, held from the admission of a request to its end, and of an
// instance, held for one attempt. Whoever gives one back wakes the first that waits, and that looks for itself whether
// there is a place for it. When it has one, or needs none any more, it has the next one look: several places may have come
// free since. So places go in the order of arrival, and none is lost: a waiter is in the list before it looks for the
// first time.
type crowd struct {
	_        [128]byte    // away from what requests only read
	inFlight atomic.Int64 // only counted where there is a limit
	waiting  atomic.Int64 // len(list), for those that come and go: no new request overtakes those who wait
	_        [128]byte

	mu   sync.Mutex  // guards what follows; nobody waits for anything while holding it
	list linked.List // of *waiter
}

// waiter is a request in the list.
type waiter struct {
	turn chan struct{} // holds one: it is to look for a place
	// It was at instances already: not every place is one for it, so the next one looks as well.
	choosy bool
}

func (w *waiter) wake() {
	select {
	case w.turn <- struct{}{}:
	default: // it has not looked since the last time
	}
}

// wake has the first that waits look for a place, if there is one.
func (q *crowd) wake() {
	if q.waiting.Load() == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	wake(q.list.Front())
}

func wake(e *linked.Element) {
	if e != nil {
		e.Value.(*waiter).wake()
	}
}

// join goes to the end of the list, or of those at its front who were at instances already: they have places of the service,
// so they never wait for what others give back behind them. nil if the list is full.
func (s *service) join(choosy bool) *linked.Element {
	q := &s.crowd
	q.mu.Lock()
	defer q.mu.Unlock()
	if s.full() {
		return nil
	}
	e := q.list.PushBack(&waiter{make(chan struct{}, 1), choosy})
	if newcomer := q.newcomer(); choosy && newcomer != nil {
		q.list.MoveBefore(e, newcomer)
	}
	q.waiting.Add(1)
	if first := q.list.Front(); first == e || first.Value.(*waiter).choosy {
		wake(first) // a place may have come free before it was in the list
	}
	return e
}

// newcomer is the first in the list that was at no instance yet.
func (q *crowd) newcomer() *linked.Element {
	e := q.list.Front()
	for e != nil && e.Value.(*waiter).choosy {
		e = e.Next()
	}
	return e
}

// quit takes a request out of the list. If it was to look for a place, or has just done so, the next one looks. The lock is
// held.
func (q *crowd) quit(e *linked.Element, looked bool) {
	if looked || len(e.Value.(*waiter).turn) > 0 {
		wake(e.Next())
	}
	q.list.Remove(e)
	q.waiting.Add(-1)
}

// isFull says that an error is that a request found no place.
func isFull(err error) bool { return err == error(errServiceFull) || err == error(errInstancesFull) }

// places is how many requests of the service may wait: as many as its limits let be in flight. Those of instances count
// for each one that is ready.
func (s *service) places() int64 {
	l := &s.proxy.cfg().Limits
	if l.QueueTimeout == 0 {
		return 0
	}
	n := int64(math.MaxInt64)
	if l.InFlightPerService > 0 {
		n = int64(l.InFlightPerService)
	}
	if l.InFlightPerInstance > 0 {
		n = min(n, int64(l.InFlightPerInstance)*int64(max(s.view.Load().ready, 1)))
	}
	return n
}

// full says that no more requests may wait. Those who only have not taken their places yet do not count. The lock of the
// crowd is held.
func (s *service) full() bool {
	over := int64(s.crowd.list.Len()) - s.places()
	return over >= 0 && (s.proxy.cfg().Limits.QueueTimeout == 0 || over >= s.free(over+1))
}

// free is how many places nobody has taken; it counts as far as to enough.
func (s *service) free(enough int64) int64 {
	l := &s.proxy.cfg().Limits
	n := enough
	if limit := int64(l.InFlightPerService); limit > 0 {
		n = min(n, limit-s.crowd.inFlight.Load())
	}
	if limit := int64(l.InFlightPerInstance); limit > 0 {
		v := s.view.Load()
		sum := int64(0)
		for i := 0; i < v.ready && sum < n; i++ {
			sum += limit - v.at(i).inFlight.Load()
		}
		n = min(n, sum)
	}
	return n
}

// packed is full for a request that has not looked for a place yet.
func (s *service) packed() bool {
	if s.crowd.waiting.Load() == 0 {
		return false
	}
	s.crowd.mu.Lock()
	defer s.crowd.mu.Unlock()
	return s.full()
}

// enter takes a place below the limit of the service.
func (x *exchange) enter() bool {
	limit := x.p().cfg().Limits.InFlightPerService
	if limit > 0 && !x.counted {
		x.counted = take(&x.service.crowd.inFlight, limit)
		return x.counted
	}
	return true
}

// leave gives it back.
func (x *exchange) leave() {
	if x.counted {
		x.counted = false
		x.service.crowd.inFlight.Add(-1)
		x.service.crowd.wake()
	}
}

// take adds one to a number of requests in flight, unless the limit is reached. What others see is never more than that: a
// place that is taken and given back at once would be missed by who looks in between.
func take(inFlight *atomic.Int64, limit int) bool {
	for {
		n := inFlight.Load()
		if n >= int64(limit) {
			return false
		}
		if inFlight.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// next chooses the instance to ask next. Where limits are in the way, it waits for a place. The error says why there is
// none.
func (x *exchange) next() (*upstream, error) {
	if x.p().cfg().capped && x.asked.n == 0 && x.service.crowd.waiting.Load() > 0 {
		return x.queue()
	}
	u, err := x.look()
	if isFull(err) {
		x.service.crowd.wake() // somebody may have missed the place of the service that look took and gave back
		return x.queue()
	}
	return u, err
}

// look is next without waiting.
func (x *exchange) look() (*upstream, error) {
	if !x.service.view.Load().nobody() {
		held := x.counted
		if !x.enter() {
			return nil, errServiceFull
		}
		if u := x.pick(); u != nil {
			return u, nil
		}
		if x.full {
			if !held && x.counted {
				x.counted = false
				x.service.crowd.inFlight.Add(-1)
			}
			return nil, errInstancesFull
		}
	}
	if x.err != nil {
		return nil, x.err
	}
	return nil, errNoInstance
}

// queue waits for a place behind those that came before. Time spent here is not the instance's.
func (x *exchange) queue() (*upstream, error) {
	e := x.service.join(x.asked.n > 0)
	if e == nil {
		return nil, x.noPlace()
	}
	x.queued = true
	patience := time.NewTimer(x.within(time.Now(), x.p().cfg().Limits.QueueTimeout))
	defer patience.Stop()
	check := time.NewTicker(finGrace / 4)
	defer check.Stop()
	for {
		select {
		case <-e.Value.(*waiter).turn:
			if u, err := x.turn(e); !isFull(err) {
				return u, err
			}
			continue
		case now := <-check.C:
			if !x.left(now) {
				continue
			}
		case <-patience.C:
		}
		q := &x.service.crowd
		q.mu.Lock()
		q.quit(e, false)
		q.mu.Unlock()
		switch now := time.Now(); {
		case x.left(now):
			return nil, errClientGone
		case x.late(now):
			return nil, errOverTime
		}
		return nil, x.noPlace()
	}
}

// turn is look for one that waits; with a place, or without need for one, it waits no more.
func (x *exchange) turn(e *linked.Element) (u *upstream, err error) {
	q := &x.service.crowd
	q.mu.Lock()
	defer q.mu.Unlock()
	defer func() {
		switch {
		case !isFull(err): // or in a panic
			q.quit(e, true)
		case e.Value.(*waiter).choosy:
			wake(e.Next())
		}
	}()
	return x.look()
}

// noPlace says which limit is in the way, or what went wrong before.
func (x *exchange) noPlace() error {
	limits := &x.p().cfg().Limits
	switch {
	case x.err != nil:
		return x.err
	case limits.InFlightPerInstance == 0,
		limits.InFlightPerService > 0 && x.service.crowd.inFlight.Load() >= int64(limits.InFlightPerService):
		return errServiceFull
	}
	return errInstancesFull
}
