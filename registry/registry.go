// Package registry owns who exists: services, their instances, and where an instance may point. It knows nothing of
// balancing, breakers or forwarding, and HTTP in http.go only. Everything is held in memory.
package registry

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// MaxWeight is the largest weight an instance may have; 0 means that it has none.
const MaxWeight = 1_000_000

// maxName is the longest name of a service or an instance, in bytes.
const maxName = 128

// ErrNotFound is what Unregister wraps when there is no such service or instance.
var ErrNotFound = errors.New("not registered")

// FieldError refuses one field of a registration. Its texts are meant for the client that sent it.
type FieldError struct {
	Field  string // service, id, addr or weight
	Detail string // what is wrong, and what would be right
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Detail }

// Config is what a registry refuses. The zero value refuses no service name that is well formed, and the addresses that
// the zero AddrPolicy refuses.
type Config struct {
	Addrs    AddrPolicy
	Reserved []string // service names that are refused, because the API answers at these paths
}

// Registry holds the live instances. Readers load one service and never wait. Writers take turns, build that service's
// next Snapshot beside the current one and publish it in one store: a reader sees all of a change, or none. A change
// costs a part of its own service's instances, however many services there are.
type Registry struct {
	cfg      Config
	services sync.Map // name -> *service: a hash trie, so adding or dropping one copies no others

	mu         sync.Mutex       // serializes writers; guards what follows
	generation uint64           // of the last change; grows by one with each
	onChange   []func(s string) // replaced, never appended in place: a change calls those it saw under mu
}

// service is one service's slot in the map. It is in the map only while its snapshot has instances.
type service struct{ snapshot atomic.Pointer[Snapshot] }

// New makes an empty registry. It keeps its own copy of cfg.
func New(cfg Config) *Registry {
	cfg.Addrs.Allow = slices.Clone(cfg.Addrs.Allow)
	cfg.Addrs.Deny = slices.Clone(cfg.Addrs.Deny)
	cfg.Addrs.Own = slices.Clone(cfg.Addrs.Own)
	cfg.Reserved = slices.Clone(cfg.Reserved)
	return &Registry{cfg: cfg}
}

// Register adds an instance to a service, or updates the one with that id in place: its RegisteredAt stays, its
// Generation grows with every call, also if nothing else changed. RegisteredAt and Generation of in are ignored. The
// error is a *FieldError, and then nothing has changed. When Register returns nil, every function given to OnChange has
// returned.
func (r *Registry) Register(service string, in Instance) error {
	if err := r.check(service, &in); err != nil {
		return err
	}
	in.RegisteredAt = time.Now()

	r.mu.Lock()
	r.generation++
	in.Generation = r.generation
	slot := r.service(service)
	var prev *Snapshot
	if slot != nil {
		prev = slot.snapshot.Load()
	}
	r.publish(service, slot, prev.with(service, &in))
	hear := r.onChange
	r.mu.Unlock()

	for _, f := range hear {
		f(service)
	}
	return nil
}

// Unregister removes an instance, and the service with its last one. The error wraps ErrNotFound if it is not there.
// When Unregister returns nil, every function given to OnChange has returned.
func (r *Registry) Unregister(service, id string) error {
	r.mu.Lock()
	slot := r.service(service)
	if slot == nil {
		r.mu.Unlock()
		return fmt.Errorf("unregister %s of service %s, which has no instance: %w", clip(id), clip(service), ErrNotFound)
	}
	next, ok := slot.snapshot.Load().without(id, r.generation+1)
	if !ok {
		r.mu.Unlock()
		return fmt.Errorf("unregister %s of service %s: %w", clip(id), clip(service), ErrNotFound)
	}
	r.generation++
	r.publish(service, slot, next)
	hear := r.onChange
	r.mu.Unlock()

	for _, f := range hear {
		f(service)
	}
	return nil
}

// Snapshot returns a service's instances as they are now, or nil if it has none.
func (r *Registry) Snapshot(service string) *Snapshot {
	slot := r.service(service)
	if slot == nil {
		return nil
	}
	return slot.snapshot.Load()
}

// Names returns the names of all services, sorted. It is for lists, not for requests: it walks all of them.
func (r *Registry) Names() []string {
	names := []string{}
	r.services.Range(func(name, _ any) bool {
		names = append(names, name.(string))
		return true
	})
	slices.Sort(names)
	return names
}

// OnChange adds f to what is called after every change, with the name of the service. f runs in the goroutine of whoever
// made the change, after the change is published and outside every lock: it may run at the same time for several
// callers, also for one service, and in another order than the changes were made. So f reads Snapshot itself; nil means
// that the service has gone. f hears nothing of what was registered before it was added.
func (r *Registry) OnChange(f func(service string)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.onChange = append(slices.Clip(r.onChange), f)
}

// service returns a service's slot, or nil.
func (r *Registry) service(name string) *service {
	if v, ok := r.services.Load(name); ok {
		return v.(*service)
	}
	return nil
}

// publish makes next what readers see. The caller holds mu. slot is nil if the service is new; next without instances
// ends it.
func (r *Registry) publish(name string, slot *service, next *Snapshot) {
	switch {
	case next.n == 0:
		// A reader that loaded the slot before it left the map must not keep seeing the last instance.
		slot.snapshot.Store(nil)
		r.services.Delete(name)
	case slot == nil:
		slot = new(service)
		slot.snapshot.Store(next)
		r.services.Store(name, slot)
	default:
		slot.snapshot.Store(next)
	}
}

// check refuses what must not be registered, and fills in.target.
func (r *Registry) check(service string, in *Instance) error {
	if err := validNames(service, in.ID); err != nil {
		return err
	}
	if slices.Contains(r.cfg.Reserved, service) {
		return &FieldError{"service", fmt.Sprintf("%s is reserved: the API answers at /%[1]s; choose another name", service)}
	}
	if in.Weight < 0 || in.Weight > MaxWeight {
		return &FieldError{"weight", weightRule + ", not " + strconv.Itoa(in.Weight)}
	}
	target, err := ParseAddr(in.Addr)
	if err != nil {
		return &FieldError{"addr", err.Error()}
	}
	if err := r.cfg.Addrs.checkTarget(target, in.remote); err != nil {
		return &FieldError{"addr", err.Error()}
	}
	in.target = target
	return nil
}

const weightRule = "must be an integer from 0 (no weight) to 1000000"

// ValidName checks the name of a service or an instance: 1 to 128 of A-Z a-z 0-9 . _ ~ : -, but not . or .. (they would
// vanish from a path). The error says what is wrong and what is allowed.
func ValidName(s string) error {
	const rule = "must be 1 to 128 of A-Z a-z 0-9 . _ ~ : - (. and .. alone are no names)"
	switch {
	case s == "":
		return errors.New("is missing or empty: " + rule)
	case s == "." || s == "..":
		return fmt.Errorf("is %s: %s", s, rule)
	case len(s) > maxName:
		return fmt.Errorf("has %d bytes: %s", len(s), rule)
	}
	for i := range len(s) {
		if c := s[i]; !alphanumeric(c) && !strings.ContainsRune("._~:-", rune(c)) {
			return fmt.Errorf("%s has a character that is not allowed at byte %d: %s", clip(s), i+1, rule)
		}
	}
	return nil
}

// validNames checks both names of an instance; the error is a *FieldError.
func validNames(service, id string) error {
	if err := ValidName(service); err != nil {
		return &FieldError{"service", err.Error()}
	}
	if err := ValidName(id); err != nil {
		return &FieldError{"id", err.Error()}
	}
	return nil
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// clip quotes what a client sent for a message, and keeps the message short.
func clip(s string) string { return strconv.QuoteToASCII(short(s)) }

// short cuts what a client sent to the length of a word.
func short(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
