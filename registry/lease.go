package registry

import (
	"container/heap"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync/atomic"
	"time"
)

// The shortest and the longest lease.
const (
	MinTTL = time.Second
	MaxTTL = 24 * time.Hour
)

const (
	leaseTick   = 250 * time.Millisecond // how often the registry looks for leases that have ended
	latestTick  = time.Second            // a tick that is later by more says that the process was stopped for a while
	expireTurn  = 256                    // instances that expire while writers wait
	keptExpired = 1000                   // instances that are listed as expired,
	expiredFor  = 10 * time.Minute       // for so long
	leaseOver   = math.MinInt64          // in lease.until
	ttlRule     = "must be a time from 1s to 24h, such as 15s, or absent or 0s for no lease"
)

// lease is the time that an instance has until it must register or renew again. Each registration has its own, so that none
// ends another. Renewing costs one atomic write: a lease is in its heap by the time at which it would have ended when it was
// last looked at.
type lease struct {
	service, id string
	ttl         time.Duration
	until       atomic.Int64 // of the registry's clock; leaseOver

	due       int64  // when it is looked at; guarded by Registry.mu, as what follows is
	place     int    // in Registry.leases
	verifying bool   // a probe of its instance is under way
	extended  int64  // until then it lasts because its service is doubted
	succeeded uint64 // requests to its instance, when it began or was last looked at
}

// renew has the lease last for another ttl from now on. It reports false if it is over.
func (l *lease) renew(now int64) bool {
	for {
		until := l.until.Load()
		if until == leaseOver {
			return false
		}
		if l.until.CompareAndSwap(until, now+int64(l.ttl)) {
			return true
		}
	}
}

// leases is a heap by due.
type leases []*lease

func (ls leases) Len() int           { return len(ls) }
func (ls leases) Less(i, j int) bool { return ls[i].due < ls[j].due }
func (ls leases) Swap(i, j int) {
	ls[i], ls[j] = ls[j], ls[i]
	ls[i].place, ls[j].place = i, j
}

func (ls *leases) Push(x any) {
	l := x.(*lease)
	l.place = len(*ls)
	*ls = append(*ls, l)
}

func (ls *leases) Pop() any {
	last := len(*ls) - 1
	l := (*ls)[last]
	(*ls)[last] = nil
	*ls = (*ls)[:last]
	return l
}

// Expired is an instance that has not renewed its lease.
type Expired struct {
	Service, ID, Addr string
	At                time.Time
}

// now is the registry's clock. It is monotonic: one that is set ends no lease and keeps none.
func (r *Registry) now() int64 { return int64(time.Since(r.began)) }

// grant gives an instance its lease, if it asks for one. The caller holds mu.
func (r *Registry) grant(service string, in *Instance) {
	if in.TTL == 0 {
		return
	}
	l := &lease{service: service, id: in.ID, ttl: in.TTL}
	l.due = r.now() + int64(l.ttl)
	l.until.Store(l.due)
	l.succeeded = trafficOf(r.observed, service, in.ID).Succeeded()
	in.lease = l
	heap.Push(&r.leases, l)
	if !r.watching {
		r.watching = true
		r.spawn(r.watch)
	}
}

// revoke ends the lease of an instance that leaves or is registered anew. The caller holds mu.
func (r *Registry) revoke(in *Instance) {
	if in != nil && in.lease != nil && in.lease.until.Swap(leaseOver) != leaseOver {
		heap.Remove(&r.leases, in.lease.place)
	}
}

// Renew has an instance's lease last for its whole ttl again; one without a lease needs none. If addr is not empty, only while
// the id stands with that addr. The error wraps ErrNotFound if it is not there, or expired: then it has to register again. The
// others are those of Unregister.
func (r *Registry) Renew(service, id, addr string) error {
	meant, err := meaning(addr)
	if err != nil {
		return err
	}
	for {
		in := r.Snapshot(service).Instance(id)
		switch {
		case in == nil:
		case !meant(in):
			return fmt.Errorf("renew %s of service %s: %w", clip(id), clip(service), ErrConflict)
		case in.lease == nil || in.lease.renew(r.now()):
			// Looked at behind it: it may have been marked a moment ago.
			if now := r.Snapshot(service).Instance(id); now != nil && (now.stale || now.unreached) {
				return r.revive(service, in)
			}
			return nil
		}
		if in == nil || in == r.Snapshot(service).Instance(id) { // else it was registered anew meanwhile
			return fmt.Errorf("renew %s of service %s: %w", clip(id), clip(service), ErrNotFound)
		}
	}
}

// revive notes that an instance was heard of that is stale, or was not reached.
func (r *Registry) revive(service string, in *Instance) error {
	return r.edit(service, in.ID, "", func(at *slot, now *Instance) {
		if now.Generation == in.Generation && (now.stale || now.unreached) {
			next := now.copy()
			next.stale, next.unreached = false, false
			r.replace(at, next)
		}
	})
}

// ExpiresIn is how long an instance's lease lasts unless it is renewed. It reports false if it has none.
func (r *Registry) ExpiresIn(in *Instance) (time.Duration, bool) {
	if in.lease == nil {
		return 0, false
	}
	return max(0, time.Duration(max(in.lease.until.Load(), r.resumed.Load()+int64(in.lease.ttl))-r.now())), true
}

// Expired returns the instances that have expired in the last ten minutes and were not registered again since, the latest
// 1,000 of them, oldest first.
func (r *Registry) Expired() []Expired {
	r.mu.Lock()
	r.forgetExpired(time.Now())
	all := slices.Clone(r.expired)
	r.mu.Unlock()
	return slices.DeleteFunc(all, func(e Expired) bool { return r.Snapshot(e.Service).Instance(e.ID) != nil })
}

// forgetExpired keeps the list to its size and time. The caller holds mu.
func (r *Registry) forgetExpired(now time.Time) {
	old := max(0, len(r.expired)-keptExpired)
	for old < len(r.expired) && now.Sub(r.expired[old].At) >= expiredFor {
		old++
	}
	r.expired = slices.Delete(r.expired, 0, old)
}

// watch ends leases, for as long as there are some.
func (r *Registry) watch() {
	ticker := time.NewTicker(leaseTick)
	defer ticker.Stop()
	for last := r.now(); ; {
		select {
		case <-ticker.C:
		case <-r.closing:
			return
		}
		now := r.now()
		if time.Duration(now-last) > leaseTick+latestTick {
			r.resume(now)
		}
		last = now
		due, left := true, true
		for due {
			due, left = r.expire(now)
		}
		if !left {
			return
		}
	}
}

// resume gives each lease a whole ttl from now on: the process was stopped, and could not hear of renewals.
func (r *Registry) resume(now int64) { r.resumed.Store(now) }

// expire removes the instances whose leases have ended, some at a time so that writers have their turn. due says that there
// are more of them. If no leases are left the watch is over.
func (r *Registry) expire(now int64) (due, left bool) {
	var changed, gone, kept []string
	judged := map[string]bool(nil) // services of which it is known whether they are doubted
	r.mu.Lock()
	for n := 0; len(r.leases) > 0 && r.leases[0].due <= now; n++ {
		if due = n == expireTurn; due {
			break
		}
		l := r.leases[0]
		until := l.until.Load()
		if l.due = max(until, r.resumed.Load()+int64(l.ttl)); l.due > now {
			l.succeeded = trafficOf(r.observed, l.service, l.id).Succeeded()
			heap.Fix(&r.leases, 0)
			continue
		}
		at := r.service(l.service)
		in := at.snapshot.Load().Instance(l.id)
		if !judged[l.service] {
			if judged == nil {
				judged = map[string]bool{}
			}
			judged[l.service] = true
			at.judge(now, r.resumed.Load())
		}
		if at.doubted {
			if again := now + int64(l.ttl); l.until.CompareAndSwap(until, again) {
				if !in.stale {
					next := in.copy()
					next.stale = true
					r.replace(at, next)
					kept = append(kept, l.service+"/"+l.id)
					changed = appendNew(changed, l.service)
				}
				l.extended, l.due = again, again
				heap.Fix(&r.leases, 0)
				r.verify(l, in)
			}
			continue
		}
		if !l.until.CompareAndSwap(until, leaseOver) {
			continue // renewed just now
		}
		heap.Pop(&r.leases)
		r.lose(at, in)
		gone = append(gone, l.service+"/"+l.id)
		changed = appendNew(changed, l.service)
	}
	r.forgetExpired(time.Now())
	left = len(r.leases) > 0
	r.watching = left
	hear := r.onChange
	r.mu.Unlock()
	for _, name := range changed {
		for _, f := range hear {
			f(name)
		}
	}
	for _, name := range kept {
		r.cfg.Log.Warn("instance is stale: too many of its service are silent", slog.String("instance", name))
	}
	for _, name := range gone {
		r.cfg.Log.Warn("instance has expired", slog.String("instance", name))
	}
	return due, left
}

// lose removes an instance that did not say so, and lists it as expired. The caller holds mu.
func (r *Registry) lose(at *slot, in *Instance) {
	now := time.Now()
	r.lost++
	r.expired = append(r.expired, Expired{at.snapshot.Load().service, in.ID, in.Addr, now})
	r.forgetExpired(now)
	r.remove(at, in)
}

func appendNew(names []string, name string) []string {
	if slices.Contains(names, name) {
		return names
	}
	return append(names, name)
}

// fewest is how many instances a service must have for so many of them to be silent that it is not believed.
const fewest = 4

// judge finds out whether a service is doubted: more than half of its instances are silent, that is, have not renewed their
// leases for half of the time. Then it is more likely that they are not heard than that they have all ended. It is doubted until
// none is silent any more. The caller holds the registry's mu.
func (at *slot) judge(now, resumed int64) {
	s, silent := at.snapshot.Load(), 0
	for _, part := range s.parts {
		for _, in := range part.Instances {
			if l := in.lease; l != nil && (in.stale || max(l.until.Load(), resumed+int64(l.ttl))-now < int64(l.ttl)/2) {
				silent++
			}
		}
	}
	at.doubted = silent > s.n/2 && s.n >= fewest || at.doubted && silent > 0
}

// verify looks whether a stale instance accepts connections, or has answered requests since it was last looked at. If it has done
// neither, nor renewed its lease, it is removed, however often that was extended while the probe had to wait for its turn. The caller
// holds mu.
func (r *Registry) verify(l *lease, in *Instance) {
	if l.verifying {
		return
	}
	l.verifying = true
	r.spawn(func() {
		alive := r.probe(in, r.probes[0])
		succeeded := r.traffic(l.service, l.id).Succeeded()
		_ = r.edit(l.service, l.id, "", func(at *slot, now *Instance) {
			alive = alive || succeeded > l.succeeded
			l.verifying, l.succeeded = false, succeeded
			if !alive && now.lease == l && l.until.CompareAndSwap(l.extended, leaseOver) {
				heap.Remove(&r.leases, l.place)
				r.lose(at, now)
			}
		})
	})
}
