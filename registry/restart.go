package registry

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	firstKnock  = 2 * time.Second        // that Open waits for instances to accept a connection
	knockTime   = 500 * time.Millisecond // for one
	mostKnocks  = 512                    // at once, before anybody is served; then mostProbes
	knockEvery  = time.Second            // for those that have not
	mostRefused = 10                     // of which the log tells each
)

// Open makes a registry whose instances outlast the process, in the file registry.db in dir; both are made if need be. What is in
// the file is registered again, each instance with its whole ttl, those that a connection held with 15 s if they have none, but
// for those that were about to leave by a drain: they have left. All are asked for a connection, which Open waits for; those that
// accept none within 2 s are Unreachable until they do, register, or renew their leases.
//
// Register, Unregister, Patch, Hold and Drain then return when their change is on disk, which is a while after it is in force; if
// it cannot be written they end with ErrNotSaved.
//
// The error says why the file cannot be used: it is damaged, written by another version, or in use by another process, which is
// waited for a second at most. Then nothing is written to it.
func Open(cfg Config, dir string) (*Registry, error) {
	r := New(cfg)
	s, all, err := openFile(dir, r.cfg.Log)
	if err != nil {
		return nil, err
	}
	r.store, r.generation = s, all.generation
	if all.late {
		r.cfg.Log.Warn("the file was cut off in a change, or is damaged: the last change may be missing", slog.String("file", s.path))
	}
	n, waiting := r.restore(all.instances)
	r.cfg.Log.Info("registrations restored", slog.String("file", s.path), slog.Int("instances", n), slog.Int("unreachable", len(waiting)))
	s.poke() // to reserve generations
	first := s.next
	go r.keep()
	_ = first.wait() // else it is in the log
	if len(waiting) > 0 {
		r.mu.Lock()
		r.spawn(func() { r.find(waiting) })
		r.mu.Unlock()
	}
	return r, nil
}

// restore registers what a file holds, and returns how many that are, and those that do not accept connections. Nobody else uses
// the registry yet.
func (r *Registry) restore(all []stored) (n int, waiting []stored) {
	refused := 0
	var asked []stored
	for _, s := range all {
		switch err := r.allow(s.service, s.instance); {
		case s.drain:
			r.store.next.keys[s.key] = struct{}{} // to be deleted: it is not registered
		case err == nil:
			asked = append(asked, s)
		default: // it stays, and requests do not go there
			if refused++; refused <= mostRefused {
				r.cfg.Log.Warn("instance would not be registered any more", slog.String("instance", s.service+"/"+s.id), slog.String("error", err.Error()))
			}
		}
	}
	if refused > mostRefused {
		r.cfg.Log.Warn("instances would not be registered any more", slog.Int("count", refused))
	}
	// In no order: where a part of the network is silent, the others must not all stand behind it.
	rand.Shuffle(len(asked), func(i, j int) { asked[i], asked[j] = asked[j], asked[i] })
	ctx, cancel := context.WithTimeout(context.Background(), firstKnock)
	defer cancel()
	for i, accepts := range r.knock(ctx, asked, mostKnocks) {
		if !accepts {
			asked[i].instance.unreached = true
			waiting = append(waiting, asked[i])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range all {
		if s.drain {
			continue
		}
		n++
		r.generation++
		s.instance.Generation = r.generation
		r.grant(s.service, s.instance)
		at := r.service(s.service)
		var prev *Snapshot
		if at != nil {
			prev = at.snapshot.Load()
		}
		r.publish(s.service, at, prev.with(s.service, s.instance, r.generation))
	}
	return n, waiting
}

// knock asks instances for a connection, many at a time, and returns which of them accept one before ctx ends.
func (r *Registry) knock(ctx context.Context, all []stored, most int) []bool {
	accept := make([]bool, len(all))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(most, len(all)) {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(all) && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				one, cancel := context.WithTimeout(ctx, knockTime)
				if conn, err := r.dial(one, all[i].instance); err == nil {
					conn.Close()
					accept[i] = true
				}
				cancel()
			}
		})
	}
	workers.Wait()
	return accept
}

// find asks those again that were not reached, until each was, or is registered no more or anew, or has renewed its lease.
func (r *Registry) find(waiting []stored) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-r.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	ticker := time.NewTicker(knockEvery)
	defer ticker.Stop()
	for len(waiting) > 0 {
		select {
		case <-ticker.C:
		case <-r.closing:
			return
		}
		left := waiting[:0]
		for _, s := range waiting {
			if in := r.Snapshot(s.service).Instance(s.id); in != nil && in.unreached {
				left = append(left, s)
			}
		}
		waiting = left
		for i, accepts := range r.knock(ctx, waiting, mostProbes) {
			if accepts {
				r.reached(waiting[i].service, waiting[i].instance)
			}
		}
	}
}

// reached notes that an instance which came from the file accepts connections.
func (r *Registry) reached(service string, in *Instance) {
	found := false
	_ = r.edit(service, in.ID, "", func(at *slot, now *Instance) {
		if found = now.unreached && now.Generation == in.Generation; found {
			next := now.copy()
			next.unreached = false
			r.replace(at, next)
		}
	})
	if found {
		r.cfg.Log.Info("instance accepts connections now", slog.String("instance", service+"/"+in.ID))
	}
}
