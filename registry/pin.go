package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"
)

// ErrPinned is what the change of an instance ends with that the configuration holds: it is changed there only.
var ErrPinned = errors.New("held by the configuration")

// pinnedError refuses a change of an instance that by holds.
type pinnedError struct{ service, id, by string }

func (e *pinnedError) Error() string {
	return fmt.Sprintf("instance %s of service %s is held by %s: change it there; nothing has changed", clip(e.id), clip(e.service), e.by)
}

func (e *pinnedError) Unwrap() error { return ErrPinned }

// Pinned is an instance that the configuration holds.
type Pinned struct {
	Service  string
	Instance Instance
}

// PinnedBy is what holds the instance, as Pin was told, or empty.
func (in *Instance) PinnedBy() string { return in.pinned }

// PinError says which instance of a configuration is refused, and why.
type PinError struct {
	Service, ID string
	Err         error // a *FieldError, unless the instance is there twice
}

func (e *PinError) Error() string {
	return fmt.Sprintf("instance %s of service %s: %v", clip(e.ID), clip(e.Service), e.Err)
}

func (e *PinError) Unwrap() error { return e.Err }

// CheckPinned refuses instances that Pin refuses in a registry of cfg. The error is a *PinError. It starts nothing.
func CheckPinned(cfg Config, all []Pinned) error {
	r := &Registry{cfg: cfg}
	r.SetAddrs(cfg.Addrs)
	_, err := r.judge(all)
	return err
}

// judge returns the instances of a configuration by their names, without gaps.
func (r *Registry) judge(all []Pinned) (map[key]*Instance, error) {
	next := make(map[key]*Instance, len(all))
	for _, p := range all {
		in := p.Instance
		if err := r.check(p.Service, &in); err != nil {
			return nil, &PinError{p.Service, in.ID, err}
		}
		k := key{p.Service, in.ID}
		if next[k] != nil {
			return nil, &PinError{p.Service, in.ID, errors.New("it is there twice")}
		}
		next[k] = &in
	}
	return next, nil
}

// ReadInstance reads an instance as the body of PUT /services/{service}/{id} has it, with its id beside, and without a ttl: nobody
// would renew it. The error is a *FieldError; Field is empty where it is about the whole.
func ReadInstance(service string, body []byte) (Instance, error) {
	m, err := decodeMembers(body, "id", "addr", "weight", "metadata", "check", "slow_start")
	var no *refusal
	if errors.As(err, &no) {
		return Instance{}, &FieldError{no.field, strings.TrimPrefix(no.detail, no.field+" ")}
	}
	if err != nil {
		return Instance{}, err
	}
	in := Instance{ID: m.id, Addr: m.addr, Weight: m.weight, Metadata: texts(m.metadata), Check: m.check, SlowStart: m.slowStart}
	return in, validate(service, &in)
}

// Pin has exactly these instances be held by the configuration, which is called by (the name of a file). They stay until a later
// Pin leaves them out, need no lease, are not in the registry's own file, and no other call changes them: that ends with
// ErrPinned. One that is registered already under the same id is replaced, with what an operator has set over it. What is the same
// as before is not touched.
//
// The error is a *PinError or ErrClosed, and then nothing has changed. When Pin returns nil, every function given to
// OnChange has returned for every service that has changed.
func (r *Registry) Pin(by string, all []Pinned) error {
	next, err := r.judge(all)
	if err != nil {
		return err
	}
	for _, in := range next {
		in.TTL, in.pinned = 0, by
	}
	changed := map[string]struct{}{}
	var lines [][]slog.Attr
	line := func(action string, k key, what ...slog.Attr) {
		lines = append(lines, append([]slog.Attr{slog.String("action", action), slog.String("instance", k.service+"/"+k.id), slog.String("by", by)}, what...))
	}
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return ErrClosed
	}
	first := r.pins == nil
	for k, before := range r.pins {
		if next[k] == nil {
			at := r.service(k.service)
			r.remove(at, at.snapshot.Load().Instance(k.id))
			line("unpin", k, slog.String("addr", before.Addr))
			changed[k.service] = struct{}{}
		}
	}
	for k, in := range next {
		if before := r.pins[k]; before != nil && before.samePin(in) {
			next[k] = before
			continue
		}
		before := r.pin(k.service, in)
		line("pin", k, in.differs(before, nil)...)
		changed[k.service] = struct{}{}
	}
	r.pins = next
	hear := r.onChange
	r.mu.Unlock()
	if first && len(lines) > 0 { // a gateway that starts may have thousands
		r.cfg.Log.Info("instances of the configuration", slog.String("by", by), slog.Int("count", len(lines)))
		lines = nil
	}
	for _, line := range lines {
		r.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, "registration changed", line...)
	}
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		for _, f := range hear {
			f(name)
		}
	}
	return nil
}

// samePin says that the configuration says the same in both.
func (in *Instance) samePin(other *Instance) bool {
	sameCheck := in.Check == other.Check || in.Check != nil && other.Check != nil && *in.Check == *other.Check
	return sameCheck && in.Addr == other.Addr && in.registered.weight == other.Weight && in.SlowStart == other.SlowStart &&
		in.pinned == other.pinned && maps.Equal(in.registered.metadata, other.Metadata)
}

// pin puts an instance of the configuration into its service, and returns the one that it replaces, or nil. The caller holds mu.
func (r *Registry) pin(service string, in *Instance) (before *Instance) {
	r.generation++
	in.Generation, in.RegisteredAt = r.generation, time.Now()
	at := r.service(service)
	var prev *Snapshot
	if at != nil {
		prev = at.snapshot.Load()
	}
	before = prev.Instance(in.ID)
	r.revoke(before)
	in.inherit(nil)
	r.expired = slices.DeleteFunc(r.expired, func(e Expired) bool { return e.Service == service && e.ID == in.ID })
	r.publish(service, at, prev.with(service, in, in.Generation))
	r.store.mark(service, before, in, r.generation)
	return before
}
