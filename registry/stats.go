package registry

// Stats is what a registry holds, and what it has counted.
type Stats struct {
	Leases  int    // held now
	Holds   int    // instances that a connection keeps registered
	Expired uint64 // instances that left without a word, since the registry was made

	WriteFailures uint64 // how often its file could not be written
}

// Stats returns them as they are now.
func (r *Registry) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Stats{Leases: len(r.leases), Holds: int(r.holds.Load()), Expired: r.lost}
	if r.store != nil {
		s.WriteFailures = r.store.failures.Load()
	}
	return s
}

// Stale reports whether the instance's lease has ended along with those of too many others to be believed.
func (in *Instance) Stale() bool { return in.stale }
