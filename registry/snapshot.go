package registry

import (
	"cmp"
	"slices"
	"time"
)

// Instance is one instance of a service. What Register is given is copied; what a Snapshot holds never changes and must
// not be changed.
type Instance struct {
	ID           string    // unique within the service; ValidName
	Addr         string    // where it answers, as it was registered; ParseAddr
	Weight       int       // 0 to MaxWeight; 0 means that it has none
	RegisteredAt time.Time // when this id came; a later registration of the same id does not change it
	Generation   uint64    // of its last registration; grows over all services

	remote bool   // registered by a peer that is not loopback; set by http.go, judged by AddrPolicy
	target Target // the parsed Addr
}

// Target returns the parsed Addr.
func (in *Instance) Target() Target { return in.target }

// Snapshot is one service as it was at one moment. It never changes.
type Snapshot struct {
	service    string
	generation uint64
	instances  []*Instance // sorted by ID, at least one
}

// Service returns the service's name.
func (s *Snapshot) Service() string { return s.service }

// Generation returns the number of the change that made this snapshot; it grows over all services.
func (s *Snapshot) Generation() uint64 { return s.generation }

// Instances returns the instances sorted by ID. The caller must not change the slice.
func (s *Snapshot) Instances() []*Instance { return s.instances }

// Instance returns the instance of that id, or nil. A nil Snapshot has none.
func (s *Snapshot) Instance(id string) *Instance {
	if i, ok := s.find(id); ok {
		return s.instances[i]
	}
	return nil
}

// find returns where id is, or where it belongs.
func (s *Snapshot) find(id string) (int, bool) {
	if s == nil {
		return 0, false
	}
	return slices.BinarySearchFunc(s.instances, id, func(in *Instance, id string) int { return cmp.Compare(in.ID, id) })
}

// with returns the next snapshot with in added or put in the place of the one with its id. s may be nil.
func (s *Snapshot) with(service string, in *Instance) *Snapshot {
	next := &Snapshot{service: service, generation: in.Generation}
	i, known := s.find(in.ID)
	switch {
	case s == nil:
		next.instances = []*Instance{in}
	case known:
		in.RegisteredAt = s.instances[i].RegisteredAt
		next.instances = slices.Clone(s.instances)
		next.instances[i] = in
	default:
		next.instances = make([]*Instance, 0, len(s.instances)+1)
		next.instances = append(append(append(next.instances, s.instances[:i]...), in), s.instances[i:]...)
	}
	return next
}

// without returns the next snapshot without id, and false if id is not there.
func (s *Snapshot) without(id string, generation uint64) (*Snapshot, bool) {
	i, known := s.find(id)
	if !known {
		return nil, false
	}
	next := &Snapshot{service: s.service, generation: generation}
	next.instances = make([]*Instance, 0, len(s.instances)-1)
	next.instances = append(append(next.instances, s.instances[:i]...), s.instances[i+1:]...)
	return next, true
}
