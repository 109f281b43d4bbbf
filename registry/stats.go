package registry

// Stats is what a registry holds, and what it has counted.
type Stats struct {
	Leases  int    // held now
	Holds   int    // instances that a connection keeps registered
	Expired uint64 // instances that left without a word, since the registry was made
}

// Stats returns them as they are now.
func (r *Registry) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Stats{len(r.leases), int(r.holds.Load()), r.lost}
}

// Stale reports whether the instance's lease has ended along with those of too many others to be believed.
func (in *Instance) Stale() bool { return in.stale }
