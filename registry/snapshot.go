package registry

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Instance is one instance of a service. What Register is given is copied; what a Snapshot holds never changes and must
// not be changed.
type Instance struct {
	ID           string            // unique within the service; ValidName
	Addr         string            // where it answers, as it was registered; ParseAddr
	Weight       int               // 0 to MaxWeight; 0 means that it has none
	TTL          time.Duration     // of its lease, MinTTL to MaxTTL; 0: it has none and stays until it is unregistered
	Metadata     map[string]string // what people write about it: at most 64 names with values of up to 512 bytes
	Check        *Check            // how it is asked whether it can serve; nil: it is not
	SlowStart    time.Duration     // how long its share grows when it comes or comes back, up to MaxSlowStart; 0: not at all
	RegisteredAt time.Time         // when this id came; a later registration of the same id does not change it
	Generation   uint64            // of its last registration; grows over all services

	Override Override // what an operator has set over it; ignored by Register

	registered registered // what it says itself of what an operator may set
	drain      *drain     // it is about to leave; nil: it is not
	target     Target     // the parsed Addr
	hold       *hold      // nil: no connection keeps it registered
	remote     bool       // registered by a peer that is not loopback; set by http.go, judged by AddrPolicy
	restored   bool       // it comes from a file, and was not registered again since
	stale      bool       // its lease has ended, with those of too many others to be believed
	suspect    bool       // that connection was lost, and nobody knows yet whether it lives
	unreached  bool       // it was in the file when the gateway started, and nobody has heard of it since
	lease      *lease     // nil: none
	pinned     string     // what of the configuration holds it; empty: nothing does

	networks []netip.Prefix // where it may point by the rights of who registered it; none: wherever AddrPolicy lets it
}

// registered is what an instance registers of that which an Override may cover.
type registered struct {
	weight   int
	metadata map[string]string
}

// Restored says that the instance was registered before the gateway started, and not since.
func (in *Instance) Restored() bool { return in.restored }

// Target returns the parsed Addr.
func (in *Instance) Target() Target { return in.target }

// Snapshot is one service as it was at one moment. It never changes.
//
// Its instances stand in parts, so that a change copies one part and the list of them, not all instances: with 10,000 that
// is 2 KiB instead of 80. Parts that a change does not touch are shared between snapshots, and whoever keeps something for
// each instance can keep it for each part.
type Snapshot struct {
	service    string
	generation uint64
	parts      []*Part // in order; none has more than maxPart
	n          int     // instances
}

// Part is some of a service's instances, at least one, sorted by ID. It never changes.
type Part struct {
	Instances []*Instance
}

const (
	maxPart = 128 // a part that grows past it is halved
	minPart = 32  // a part that shrinks below it joins its neighbour, if both have room
)

// Service returns the service's name.
func (s *Snapshot) Service() string { return s.service }

// Generation returns the number of the change that made this snapshot; it grows over all services.
func (s *Snapshot) Generation() uint64 { return s.generation }

// Len returns the number of instances, at least one.
func (s *Snapshot) Len() int { return s.n }

// Parts returns the instances sorted by ID, in parts. The caller must not change them.
func (s *Snapshot) Parts() []*Part { return s.parts }

// Instances returns a list of the instances, sorted by ID.
func (s *Snapshot) Instances() []*Instance {
	all := make([]*Instance, 0, s.n)
	for _, p := range s.parts {
		all = append(all, p.Instances...)
	}
	return all
}

// Instance returns the instance of that id, or nil. A nil Snapshot has none.
func (s *Snapshot) Instance(id string) *Instance {
	if part, i, ok := s.find(id); ok {
		return s.parts[part].Instances[i]
	}
	return nil
}

// find returns where id is, or where it belongs.
func (s *Snapshot) find(id string) (part, i int, ok bool) {
	if s == nil {
		return 0, 0, false
	}
	part, ok = slices.BinarySearchFunc(s.parts, id, func(p *Part, id string) int { return cmp.Compare(p.Instances[0].ID, id) })
	if ok {
		return part, 0, true
	}
	part = max(part-1, 0) // the last part that begins before id
	i, ok = slices.BinarySearchFunc(s.parts[part].Instances, id, func(in *Instance, id string) int { return cmp.Compare(in.ID, id) })
	return part, i, ok
}

// with returns the next snapshot with in added or put in the place of the one with its id. s may be nil. A service's instances have
// the same check as a rule: then they share it.
func (s *Snapshot) with(service string, in *Instance, generation uint64) *Snapshot {
	next := &Snapshot{service: service, generation: generation, n: 1}
	if s == nil {
		next.parts = splice(nil, 0, 0, []*Instance{in})
		return next
	}
	at, i, known := s.find(in.ID)
	part := s.parts[at].Instances
	if near := part[min(i, len(part)-1)].Check; near != nil && in.Check != nil && *near == *in.Check {
		in.Check = near
	}
	next.n = s.n
	if known {
		in.RegisteredAt = part[i].RegisteredAt
		part = slices.Clone(part)
		part[i] = in
	} else {
		next.n++
		longer := make([]*Instance, 0, len(part)+1)
		part = append(append(append(longer, part[:i]...), in), part[i:]...)
	}
	if half := len(part) / 2; len(part) > maxPart {
		next.parts = splice(s.parts, at, 1, slices.Clone(part[:half]), slices.Clone(part[half:]))
	} else {
		next.parts = splice(s.parts, at, 1, part)
	}
	return next
}

// without returns the next snapshot without id, which is there.
func (s *Snapshot) without(id string, generation uint64) *Snapshot {
	at, i, _ := s.find(id)
	next := &Snapshot{service: s.service, generation: generation, n: s.n - 1}
	part := slices.Concat(s.parts[at].Instances[:i], s.parts[at].Instances[i+1:])
	beside := func(at int) []*Instance { return s.parts[at].Instances }
	joins := func(at int) bool {
		return len(part) < minPart && at >= 0 && at < len(s.parts) && len(beside(at))+len(part) <= maxPart/2
	}
	switch {
	case len(part) == 0:
		next.parts = splice(s.parts, at, 1)
	case joins(at - 1):
		next.parts = splice(s.parts, at-1, 2, slices.Concat(beside(at-1), part))
	case joins(at + 1):
		next.parts = splice(s.parts, at, 2, slices.Concat(part, beside(at+1)))
	default:
		next.parts = splice(s.parts, at, 1, part)
	}
	return next
}

// splice returns a copy of parts in which others stand in the place of n from at on.
func splice(parts []*Part, at, n int, others ...[]*Instance) []*Part {
	next := make([]*Part, 0, len(parts)-n+len(others))
	next = append(next, parts[:at]...)
	for _, instances := range others {
		next = append(next, &Part{instances})
	}
	return append(next, parts[at+n:]...)
}
