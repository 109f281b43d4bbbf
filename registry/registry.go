// Package registry owns who exists: services, their instances, and where an instance may point; how long an instance stays
// (leases, holds, drains), and the API by which it comes and goes (http.go). What New makes lives in memory and ends with the
// process; what Open makes is in a file too. It knows nothing of balancing, breakers or forwarding: whether an instance gets
// requests is proxy's.
package registry

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
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

// What the errors about an instance wrap.
var (
	ErrNotFound = errors.New("not registered")               // there is no such service or instance
	ErrConflict = errors.New("registered with another addr") // by somebody who came later
	ErrClosed   = errors.New("the registry is closed")
)

// FieldError refuses one field of a registration. Its texts are meant for the client that sent it.
type FieldError struct {
	Field  string // service, id, addr, weight, ttl, metadata, check and its members (check.path), slow_start, state, drain, or a parameter of the query
	Detail string // what is wrong, and what would be right
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Detail }

// outsideError refuses an instance for the networks of who registers it.
type outsideError struct {
	*FieldError
	instance, addr string
}

func (e *outsideError) Unwrap() error { return e.FieldError }

// Config is what a registry refuses. The zero value refuses no service name that is well formed, and the addresses that
// the zero AddrPolicy refuses.
type Config struct {
	Addrs    AddrPolicy
	Reserved []string // service names that are refused, because the API answers at these paths

	Log *slog.Logger // what nobody asked for; default: nothing
}

// Registry holds the live instances. Readers load one service and never wait. Writers take turns, build that service's
// next Snapshot beside the current one and publish it in one store: a reader sees all of a change, or none. A change
// costs a part of its own service's instances, however many services there are.
type Registry struct {
	cfg      Config
	addrs    atomic.Pointer[AddrPolicy]
	services sync.Map // name -> *slot: a hash trie, so adding or dropping one copies no others

	mu         sync.Mutex                       // serializes writers; guards what follows
	generation uint64                           // of the last change; grows by one with each
	observed   func(service, id string) Traffic // nil: nobody knows any
	onChange   []func(s string)                 // replaced, never appended in place: a change calls those it saw under mu
	leases     leases
	expired    []Expired
	lost       uint64 // instances that left without a word
	watching   bool   // there is a watch
	closed     bool
	store      *store            // nil: there is no file
	pins       map[key]*Instance // those that the configuration holds

	began    time.Time    // of the registry's clock
	resumed  atomic.Int64 // on it: no lease ends less than its ttl after this
	holds    atomic.Int64 // connections
	probes   [2]chan struct{}
	closing  chan struct{}
	watchers sync.WaitGroup
}

// slot is one service's place in the map. It is there only while its snapshot has instances.
type slot struct {
	snapshot atomic.Pointer[Snapshot]
	doubted  bool // so many fell silent that none is believed to have ended before a probe; guarded by Registry.mu
}

// New makes an empty registry. It keeps its own copy of cfg.
func New(cfg Config) *Registry {
	cfg.Reserved = slices.Clone(cfg.Reserved)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{cfg: cfg, began: time.Now(), closing: make(chan struct{})}
	r.SetAddrs(cfg.Addrs)
	r.resumed.Store(math.MinInt64 / 2)
	for i := range r.probes {
		r.probes[i] = make(chan struct{}, mostProbes)
	}
	return r
}

// SetAddrs replaces Config.Addrs. Instances that are here stay; one at an address that is refused from now on gets no new
// connections.
func (r *Registry) SetAddrs(policy AddrPolicy) {
	policy.Allow, policy.Deny, policy.Own = slices.Clone(policy.Allow), slices.Clone(policy.Deny), slices.Clone(policy.Own)
	r.addrs.Store(&policy)
}

// Close ends the watch over leases and holds: none ends any more. Drains are answered, and it waits for probes. A registry with a
// file writes what is left to write, lets go of it, and from then on refuses changes with ErrClosed.
func (r *Registry) Close() {
	r.mu.Lock()
	first := !r.closed
	if first {
		r.closed = true
		close(r.closing)
	}
	r.mu.Unlock()
	r.watchers.Wait()
	if r.store != nil {
		if first {
			close(r.store.stop)
		}
		<-r.store.done
	}
}

// Register adds an instance to a service, or updates the one with that id in place: its RegisteredAt stays, its
// Generation grows with every call, also if nothing else changed. A lease begins anew. RegisteredAt and Generation of in are
// ignored. The error is a *FieldError, and then nothing has changed, or wraps ErrNotSaved or ErrClosed. When Register returns
// nil, every function given to OnChange has returned, and if there is a file the change is on disk.
func (r *Registry) Register(service string, in Instance) error {
	_, _, err := r.register(service, in, nil)
	return err
}

// register adds an instance that has a lease, unless a connection holds it. It returns it, and the one that stood in its
// place, or nil.
func (r *Registry) register(service string, in Instance, h *hold) (now, before *Instance, err error) {
	if err := r.check(service, &in); err != nil {
		return nil, nil, err
	}
	in.RegisteredAt = time.Now()

	r.mu.Lock()
	if r.sealed() {
		r.mu.Unlock()
		return nil, nil, fmt.Errorf("register %s of service %s: %w", clip(in.ID), clip(service), ErrClosed)
	}
	at := r.service(service)
	var prev *Snapshot
	if at != nil {
		prev = at.snapshot.Load()
		service = prev.service // one text for all of its instances
	}
	before = prev.Instance(in.ID)
	if before != nil && before.pinned != "" {
		r.mu.Unlock()
		return nil, nil, &pinnedError{service, in.ID, before.pinned}
	}
	r.generation++
	in.Generation = r.generation
	r.revoke(before)
	in.lease, in.hold, in.suspect, in.stale, in.unreached = nil, h, false, false, false
	in.inherit(before)
	if h == nil && in.drain == nil {
		r.grant(service, &in)
	}
	if before == nil { // it has not left for good
		r.expired = slices.DeleteFunc(r.expired, func(e Expired) bool { return e.Service == service && e.ID == in.ID })
	}
	r.publish(service, at, prev.with(service, &in, in.Generation))
	r.store.mark(service, before, &in, r.generation)
	hear, saved := r.onChange, r.store.pending(service, in.ID)
	r.mu.Unlock()

	for _, f := range hear {
		f(service)
	}
	return &in, before, saved.wait()
}

// Unregister removes an instance, and the service with its last one. If addr is not empty, it does so only while the id
// stands with that addr: who stops late does not remove its successor. The error wraps ErrNotFound or ErrConflict, or is a
// *FieldError for an addr that is none. When Unregister returns nil, every function given to OnChange has returned. If there is a
// file the change is on disk then, and the error may wrap ErrNotSaved or ErrClosed.
func (r *Registry) Unregister(service, id, addr string) error {
	_, err := r.unregister(service, id, addr)
	return err
}

// unregister returns the instance that it removes.
func (r *Registry) unregister(service, id, addr string) (gone *Instance, err error) {
	err = r.amend(service, id, addr, func(at *slot, in *Instance) {
		r.revoke(in)
		r.remove(at, in)
		gone = in
	})
	return gone, err
}

// edit has f change an instance, under the lock, and tells of it. It does not wait for the file. The errors are those of
// Unregister but for ErrNotSaved.
func (r *Registry) edit(service, id, addr string, f func(*slot, *Instance)) error {
	_, err := r.change(service, id, addr, f)
	return err
}

// amend is edit for somebody who wants the change to be on disk.
func (r *Registry) amend(service, id, addr string, f func(*slot, *Instance)) error {
	b, err := r.change(service, id, addr, f)
	if err != nil {
		return err
	}
	return b.wait()
}

// change is edit; it returns what to wait for.
func (r *Registry) change(service, id, addr string, f func(*slot, *Instance)) (*batch, error) {
	meant, err := meaning(addr)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	if r.sealed() {
		r.mu.Unlock()
		return nil, fmt.Errorf("%s of service %s: %w", clip(id), clip(service), ErrClosed)
	}
	at := r.service(service)
	if at == nil {
		r.mu.Unlock()
		return nil, fmt.Errorf("%s of service %s, which has no instance: %w", clip(id), clip(service), ErrNotFound)
	}
	in := at.snapshot.Load().Instance(id)
	switch {
	case in == nil:
		err = ErrNotFound
	case in.pinned != "":
		r.mu.Unlock()
		return nil, &pinnedError{service, id, in.pinned}
	case !meant(in):
		err = ErrConflict
	}
	if err != nil {
		r.mu.Unlock()
		return nil, fmt.Errorf("%s of service %s: %w", clip(id), clip(service), err)
	}
	f(at, in)
	hear, saved := r.onChange, r.store.pending(service, id)
	r.mu.Unlock()

	for _, f := range hear {
		f(service)
	}
	return saved, nil
}

// sealed says that the file takes no change any more. The caller holds mu.
func (r *Registry) sealed() bool { return r.closed && r.store != nil }

// meaning tells of an instance whether it is one that an addr means: any if that is empty.
func meaning(addr string) (func(*Instance) bool, error) {
	if addr == "" {
		return func(*Instance) bool { return true }, nil
	}
	target, err := ParseAddr(addr)
	if err != nil {
		return nil, &FieldError{"addr", err.Error()}
	}
	return func(in *Instance) bool { return in.target == target }, nil
}

// remove takes an instance out of its service. The caller holds mu.
func (r *Registry) remove(at *slot, in *Instance) {
	r.generation++
	before := at.snapshot.Load()
	r.publish(before.service, at, before.without(in.ID, r.generation))
	r.store.mark(before.service, in, nil, r.generation)
}

// spawn runs f in a goroutine that Close waits for. The caller holds mu.
func (r *Registry) spawn(f func()) {
	if !r.closed {
		r.watchers.Go(f)
	}
}

// Snapshot returns a service's instances as they are now, or nil if it has none.
func (r *Registry) Snapshot(service string) *Snapshot {
	at := r.service(service)
	if at == nil {
		return nil
	}
	return at.snapshot.Load()
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
func (r *Registry) service(name string) *slot {
	if v, ok := r.services.Load(name); ok {
		return v.(*slot)
	}
	return nil
}

// publish makes next what readers see. The caller holds mu. at is nil if the service is new; next without instances
// ends it.
func (r *Registry) publish(name string, at *slot, next *Snapshot) {
	switch {
	case next.n == 0:
		// A reader that loaded the slot before it left the map must not keep seeing the last instance.
		at.snapshot.Store(nil)
		r.services.Delete(name)
	case at == nil:
		at = &slot{}
		at.snapshot.Store(next)
		r.services.Store(name, at)
	default:
		at.snapshot.Store(next)
	}
}

// check refuses what must not be registered, and fills in.target.
func (r *Registry) check(service string, in *Instance) error {
	if err := validate(service, in); err != nil {
		return err
	}
	return r.allow(service, in)
}

// validate refuses what no instance is, and fills in.target.
func validate(service string, in *Instance) error {
	if err := validNames(service, in.ID); err != nil {
		return err
	}
	if in.TTL != 0 && (in.TTL < MinTTL || in.TTL > MaxTTL) {
		return &FieldError{"ttl", ttlRule + ", not " + in.TTL.String()}
	}
	if in.Weight < 0 || in.Weight > MaxWeight {
		return &FieldError{"weight", weightRule + ", not " + strconv.Itoa(in.Weight)}
	}
	if err := checkMetadata(in.Metadata); err != nil {
		return err
	}
	if in.SlowStart < 0 || in.SlowStart > MaxSlowStart {
		return &FieldError{"slow_start", slowStartRule + ", not " + in.SlowStart.String()}
	}
	if in.Check != nil {
		check, err := in.Check.Filled()
		if err != nil {
			return err
		}
		in.Check = check
	}
	target, err := ParseAddr(in.Addr)
	if err != nil {
		return &FieldError{"addr", err.Error()}
	}
	in.target = target
	return nil
}

// allow refuses what is well formed and must not be here.
func (r *Registry) allow(service string, in *Instance) error {
	if slices.Contains(r.cfg.Reserved, service) {
		return &FieldError{"service", fmt.Sprintf("%s is reserved: the API answers at /%[1]s; choose another name", service)}
	}
	if err := r.addrs.Load().checkTarget(in.target, in); err != nil {
		bad := &FieldError{"addr", err.Error()}
		if errors.Is(err, errOutside) {
			return &outsideError{bad, service + "/" + in.ID, in.Addr}
		}
		return bad
	}
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
