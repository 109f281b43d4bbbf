package registry

import (
	"cmp"
	"errors"
	"fmt"
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
	in.Weight, in.Metadata = in.registered.weight, merge(in.registered.metadata, in.Override.Metadata)
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
	switch {
	case p.SetWeight && p.Weight != nil && *p.Weight == 0:
		return &FieldError{"weight", `must not be 0: an instance that is to get nothing has "state":"drain"`}
	case p.SetWeight && p.Weight != nil && (*p.Weight < 0 || *p.Weight > MaxWeight):
		return &FieldError{"weight", fmt.Sprintf("must be an integer from 1 to %d, or null for the one that it registers", MaxWeight)}
	case p.SetState && p.State != "" && p.State != Up && p.State != Drain && p.State != Down:
		return &FieldError{"state", stateRule}
	}
	bad := checkMetadata(texts(p.Pairs))
	if bad != nil {
		return bad
	}
	err := r.amend(service, id, "", func(at *slot, in *Instance) {
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
	})
	return cmp.Or(err, bad)
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
	done   chan struct{}
	cut    int // what was not at its end, and the time that it took; valid once done is closed, as err is
	waited time.Duration
	err    error // it is not on disk that it is unregistered
}

// Traffic is what an instance has under way, also when it is registered no more.
type Traffic interface {
	Busy() int // requests and tunnels now
	Cut()      // breaks them off
}

// Drain takes an instance out of the balancers at once, and unregisters it when it has nothing under way any more, or after
// limit, with how much was cut then. Meanwhile it needs no lease. Whoever drains it a second time waits for the first. If it is
// unregistered meanwhile, or registers with another addr, what it had under way is waited for all the same. The errors are those
// of Unregister, and ErrClosed. In a file it is gone when Drain returns; if the process ends before, it is gone after the restart.
func (r *Registry) Drain(service, id, addr string, limit time.Duration, t Traffic) (cut int, waited time.Duration, err error) {
	var d *drain
	first := false
	err = r.amend(service, id, addr, func(at *slot, in *Instance) {
		if d = in.drain; d != nil {
			return
		}
		d, first = &drain{done: make(chan struct{})}, true
		r.revoke(in)
		next := in.copy()
		next.drain, next.lease, next.hold = d, nil, nil
		r.replace(at, next)
	})
	if err != nil && !errors.Is(err, ErrNotSaved) { // its end is written too
		return 0, 0, err
	}
	if first { // and nobody chooses it any more
		r.mu.Lock()
		r.spawn(func() { r.finish(service, id, d, limit, t) })
		r.mu.Unlock()
	}
	select {
	case <-d.done:
		return d.cut, d.waited, d.err
	case <-r.closing:
		return 0, 0, fmt.Errorf("drain %s of service %s: %w", clip(id), clip(service), ErrClosed)
	}
}

// finish ends a drain, unless the registry ends before.
func (r *Registry) finish(service, id string, d *drain, limit time.Duration, t Traffic) {
	began := time.Now()
	ticker := time.NewTicker(drainTick)
	defer ticker.Stop()
	for quiet := false; ; {
		select {
		case <-ticker.C:
		case <-r.closing:
			return
		}
		busy := t.Busy()
		d.waited = time.Since(began)
		if busy == 0 && quiet { // twice: a request may have chosen it a moment before
			break
		}
		if d.waited >= limit {
			if d.cut = busy; busy > 0 {
				t.Cut()
			}
			break
		}
		quiet = busy == 0
	}
	err := r.amend(service, id, "", func(at *slot, in *Instance) {
		if in.drain == d {
			r.remove(at, in)
		}
	})
	if errors.Is(err, ErrNotSaved) || errors.Is(err, ErrClosed) {
		d.err = err
	}
	close(d.done)
}
