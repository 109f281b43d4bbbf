package registry

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
)

// State is whether an instance gets new requests.
type State string

// The states. Whatever an instance is doing when it leaves Up may end.
const (
	Up      State = "up"
	Drain   State = "drain"   // it is about to leave
	Down    State = "down"    // an operator has taken it out
	Suspect State = "suspect" // the connection that held it is lost, and it is being looked after

	Unreachable State = "unreachable" // it has accepted no connection since the gateway has started, and was not heard of
)

// Override is what an operator has set over what an instance registers. It survives registrations, and goes with the instance.
type Override struct {
	Weight   *int              `json:"weight"` // nil: none
	State    State             `json:"state,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"` // pairs over those that the instance registers
}

const stateRule = "must be up, drain, down, or null for what the instance itself does"

func (o Override) none() bool { return o.Weight == nil && o.State == "" && o.Metadata == nil }

// Patch changes an Override. What is not set stays; what is set to nothing goes. Of metadata, Pairs are changed: nil takes one
// away, and SetMetadata without any takes them all.
type Patch struct {
	SetWeight, SetState, SetMetadata bool

	Weight *int
	State  State
	Pairs  map[string]*string
}

// State is the one in force: what an operator says, or else what the instance does.
func (in *Instance) State() State {
	switch {
	case in.Override.State == Drain || in.Override.State == Down:
		return in.Override.State
	case in.drain != nil:
		return Drain
	case in.suspect:
		return Suspect
	case in.unreached:
		return Unreachable
	}
	return Up
}

// settle puts what an operator has set over what the instance registers.
func (in *Instance) settle() {
	in.Weight, in.Metadata = in.registered.weight, in.registered.metadata
	if in.Override.Metadata != nil {
		in.Metadata = merge(in.Metadata, in.Override.Metadata)
	}
	if in.Override.Weight != nil {
		in.Weight = *in.Override.Weight
	}
}

// inherit takes over from the registration before what outlives it. A drain that the instance itself has begun ends when it
// comes back with another addr: then it is another process.
func (in *Instance) inherit(prev *Instance) {
	in.Override, in.drain = Override{}, nil
	if prev != nil {
		in.Override = prev.Override
		if prev.target == in.target {
			in.drain = prev.drain
		}
	}
	in.registered = registered{in.Weight, merge(in.Metadata, nil)}
	in.settle()
}

// Patch sets what an operator wants of an instance. The error wraps ErrNotFound or is a *FieldError. When it returns nil, every
// function given to OnChange has returned.
func (r *Registry) Patch(service, id string, p Patch) error {
	_, _, err := r.patch(service, id, p)
	return err
}

// patch returns the instance as it was and as it is now.
func (r *Registry) patch(service, id string, p Patch) (before, now *Instance, err error) {
	switch {
	case p.SetWeight && p.Weight != nil && *p.Weight == 0:
		return nil, nil, &FieldError{"weight", `must not be 0: an instance that is to get nothing has "state":"drain"`}
	case p.SetWeight && p.Weight != nil && (*p.Weight < 0 || *p.Weight > MaxWeight):
		return nil, nil, &FieldError{"weight", fmt.Sprintf("must be an integer from 1 to %d, or null for the one that it registers", MaxWeight)}
	case p.SetState && p.State != "" && p.State != Up && p.State != Drain && p.State != Down:
		return nil, nil, &FieldError{"state", stateRule}
	}
	bad := checkMetadata(texts(p.Pairs))
	if bad != nil {
		return nil, nil, bad
	}
	err = r.amend(service, id, "", func(at *slot, in *Instance) {
		next := in.copy()
		if p.SetWeight {
			next.Override.Weight = p.Weight
		}
		if p.SetState {
			next.Override.State = p.State
		}
		if p.SetMetadata && len(p.Pairs) == 0 {
			next.Override.Metadata = nil
		} else if p.SetMetadata {
			next.Override.Metadata = patchMetadata(in.Override.Metadata, p.Pairs)
			if bad = checkMetadata(next.Override.Metadata); bad != nil {
				return // too many, with those from before
			}
		}
		next.settle()
		r.replace(at, next)
		before, now = in, next
	})
	return before, now, cmp.Or(err, bad)
}

// copy returns an instance to change. It is of the same registration.
func (in *Instance) copy() *Instance {
	next := *in
	return &next
}

// replace puts a changed copy of an instance into its place. The caller holds mu.
func (r *Registry) replace(at *slot, in *Instance) {
	r.generation++
	before := at.snapshot.Load()
	r.publish(before.service, at, before.with(before.service, in, r.generation))
	r.store.mark(before.service, before.Instance(in.ID), in, r.generation)
}

// drainTick is how often a drain looks whether something is under way.
const drainTick = 20 * time.Millisecond

// MaxDrain is the longest time that a drain may wait.
const MaxDrain = time.Hour

// drain is an unregistration that waits for what is under way.
type drain struct {
	began  time.Time
	limit  atomic.Int64 // nanoseconds from then on; whoever drains it too may make it shorter
	done   chan struct{}
	cut    int // what was not at its end, and the time that it took; valid once done is closed, as err is
	waited time.Duration
	err    error // it is not on disk that it is unregistered
}

// Traffic is what goes to an instance, also when it is registered no more.
type Traffic interface {
	Busy() int         // requests and tunnels under way
	Cut()              // breaks them off
	Succeeded() uint64 // requests that have ended well
}

// Observe says who knows the traffic of instances; nil for one that gets none. Without it all get none. Writers wait while it is
// asked.
func (r *Registry) Observe(traffic func(service, id string) Traffic) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.observed = traffic
}

// traffic is never nil.
func (r *Registry) traffic(service, id string) Traffic {
	r.mu.Lock()
	observed := r.observed
	r.mu.Unlock()
	return trafficOf(observed, service, id)
}

func trafficOf(observed func(service, id string) Traffic, service, id string) Traffic {
	if observed != nil {
		if t := observed(service, id); t != nil {
			return t
		}
	}
	return noTraffic{}
}

type noTraffic struct{}

func (noTraffic) Busy() int         { return 0 }
func (noTraffic) Cut()              {}
func (noTraffic) Succeeded() uint64 { return 0 }

// Drain takes an instance out of the balancers at once, and unregisters it when it has nothing under way any more, or after
// limit, with how much was cut then. Meanwhile it needs no lease. Whoever drains it a second time waits for the first, but for no longer than his own
// limit: then that ends both. If it is
// unregistered meanwhile, or registers with another addr, what it had under way is waited for all the same. The errors are those
// of Unregister, and ErrClosed. In a file it is gone when Drain returns; if the process ends before that, after the restart.
func (r *Registry) Drain(service, id, addr string, limit time.Duration) (cut int, waited time.Duration, err error) {
	d, _, err := r.drain(service, id, addr, limit)
	if err != nil {
		return 0, 0, err
	}
	return r.await(service, id, d)
}

// drain begins a drain, unless there is one, which it returns. changed is the
// instance, if it begins to drain or has less time for it now, or nil.
func (r *Registry) drain(service, id, addr string, limit time.Duration) (d *drain, changed *Instance, err error) {
	t, begun := r.traffic(service, id), false
	err = r.amend(service, id, addr, func(at *slot, in *Instance) {
		if d = in.drain; d != nil {
			if end := int64(time.Since(d.began) + limit); end < d.limit.Load() {
				d.limit.Store(end)
				changed = in
			}
			return
		}
		d, changed, begun = &drain{began: time.Now(), done: make(chan struct{})}, in, true
		d.limit.Store(int64(limit))
		r.revoke(in)
		next := in.copy()
		next.drain, next.lease, next.hold = d, nil, nil
		r.replace(at, next)
	})
	if err != nil && !errors.Is(err, ErrNotSaved) { // its end is written too
		return nil, nil, err
	}
	if begun { // and nobody chooses it any more
		r.mu.Lock()
		r.spawn(func() { r.finish(service, id, d, t) })
		r.mu.Unlock()
	}
	return d, changed, nil
}

// await is the end of a drain.
func (r *Registry) await(service, id string, d *drain) (cut int, waited time.Duration, err error) {
	select {
	case <-d.done:
		return d.cut, d.waited, d.err
	case <-r.closing:
		return 0, 0, fmt.Errorf("drain %s of service %s: %w", clip(id), clip(service), ErrClosed)
	}
}

// finish ends a drain, unless the registry ends before.
func (r *Registry) finish(service, id string, d *drain, t Traffic) {
	ticker := time.NewTicker(drainTick)
	defer ticker.Stop()
	for quiet := false; ; {
		select {
		case <-ticker.C:
		case <-r.closing:
			return
		}
		busy := t.Busy()
		d.waited = time.Since(d.began)
		if busy == 0 && quiet { // twice: a request may have chosen it a moment before
			break
		}
		if d.waited >= time.Duration(d.limit.Load()) {
			if d.cut = busy; busy > 0 {
				t.Cut()
			}
			break
		}
		quiet = busy == 0
	}
	left := false
	err := r.amend(service, id, "", func(at *slot, in *Instance) {
		if left = in.drain == d; left {
			r.remove(at, in)
		}
	})
	if errors.Is(err, ErrNotSaved) || errors.Is(err, ErrClosed) {
		d.err = err
	}
	close(d.done)
	if left { // and was not unregistered meanwhile, or registered with another addr
		r.cfg.Log.Info("instance has left: its drain is over", slog.String("instance", service+"/"+id), slog.Int("cut", d.cut),
			slog.String("waited", d.waited.Round(time.Millisecond).String()))
	}
}
