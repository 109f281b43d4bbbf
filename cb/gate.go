// Package cb decides when to stop asking an instance.
//
// A Gate is a circuit breaker around one instance. It is closed while the instance answers, opens after so many
// failures in a row, is half-open once the open time is over, and then lets a few probes through: all succeed and it
// closes, one fails and it is open again. sony/gobreaker decides all of that except the run of failures; the Gate in
// front of it makes the healthy path one atomic load, keeps the time, and never waits for ever for a lost probe.
//
// The package knows no HTTP and no instances: what counts as a failure, and who gets a probe, is for the caller to say.
package cb

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

// State is what a Gate does with requests.
type State uint8

const (
	Closed   State = iota // every request passes
	Open                  // no request passes
	HalfOpen              // a few requests pass, as probes
)

// String returns closed, open or half-open.
func (s State) String() string {
	switch s {
	case Closed:
		return "closed"
	case Open:
		return "open"
	case HalfOpen:
		return "half-open"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Config says when a Gate opens and what closes it again. A zero field stands for its default.
type Config struct {
	Failures     int           // failures in a row that open the gate; 5
	OpenFor      time.Duration // how long it is open before it is half-open; 30 s
	Probes       int           // probes that must all succeed to close it; 3
	ProbeTimeout time.Duration // a probe that did not end by then counts as failed; 1 min
}

// WithDefaults returns cfg with its zero fields filled, or an error that names the field that is out of range.
func (cfg Config) WithDefaults() (Config, error) {
	const longest = 365 * 24 * time.Hour // far from where times overflow
	for _, f := range []struct {
		name  string
		value *int
		def   int
	}{
		{"Failures", &cfg.Failures, 5},
		{"Probes", &cfg.Probes, 3},
	} {
		if *f.value < 0 || *f.value > math.MaxInt32 {
			return cfg, fmt.Errorf("breaker: %s is %d, must be 1 to %d (0 means %d)", f.name, *f.value, math.MaxInt32, f.def)
		}
		if *f.value == 0 {
			*f.value = f.def
		}
	}
	for _, f := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"OpenFor", &cfg.OpenFor, 30 * time.Second},
		{"ProbeTimeout", &cfg.ProbeTimeout, time.Minute},
	} {
		if *f.value < 0 || *f.value > longest {
			return cfg, fmt.Errorf("breaker: %s is %v, must be more than 0s and at most %v (0s means %v)", f.name, *f.value, longest, f.def)
		}
		if *f.value == 0 {
			*f.value = f.def
		}
	}
	return cfg, nil
}

// The word of a Gate is all that a request reads of it. The low 32 bits count: failures in a row while closed, free
// probes while half-open, nothing while open. Above them are 2 bits of State, and above those the generation, which every
// change of state begins anew (30 bits, from 1 on). The era is the word without its count.

func pack(generation uint64, s State, n int) uint64 {
	return generation<<34 | uint64(s)<<32 | uint64(n)
}

func generation(w uint64) uint64 { return w >> 34 }
func state(w uint64) State       { return State(w >> 32 & 3) }
func count(w uint64) int         { return int(uint32(w)) }
func era(w uint64) uint64        { return w &^ math.MaxUint32 }

// Token is the leave to send one request. It must end in exactly one of Success, Failure or Ignored of the gate that
// gave it; a deferred call sees to it.
//
// What a token reports is about the generation that admitted it: once the state has changed, it changes nothing. Nor
// does the zero Token, and a probe counts once however often it ends. A token that is no probe has no memory (that is
// what keeps the healthy path free of stores): two Failures of one token are two failures.
type Token struct {
	era   uint64 // in which it was given; 0 for a probe
	probe *probe
}

// Probe reports whether the request is a probe of a half-open gate.
func (t Token) Probe() bool { return t.probe != nil }

// probe is a request let through while half-open.
type probe struct {
	report   func(error) // tells gobreaker the outcome; nil once it is known, or the state has changed
	deadline time.Time   // when it is given up for lost
}

// How outcomes are told to gobreaker; success is nil.
var (
	errFailed  = errors.New("failed")
	errIgnored = errors.New("ignored")
)

// Status is a Gate at one moment.
type Status struct {
	State  State
	Since  time.Time // of the last change of state, or of Init
	Until  time.Time // when the open time is over; zero unless open
	Reason error     // why the gate opened; nil while closed
}

// change is one call of the listener.
type change struct {
	from, to State
	reason   error
}

// Gate is a breaker whose healthy path is one atomic load: the run of failures lives in one word, and gobreaker is asked
// only once that run is long enough, and for probes. An open gate refuses by the same load. All methods may be called
// at any time by any number of goroutines, and from the listener.
//
// Who writes word: while it is closed anybody, by compare-and-swap of the count; all else is written under mu. So a
// change of state is one swap of the word that ended the old state, and the count that opens the gate is exact.
//
// It is made to be a part of what it guards: one object less for each instance. What others write should stand 128 bytes away
// from it, since pairs of cache lines are fetched together.
type Gate struct {
	word     atomic.Uint64
	failures atomic.Int64 // cfg.Failures
	listener Listener     // or nil

	mu      sync.Mutex // guards what follows; never held while the listener runs
	cfg     Config
	slow    *gobreaker.TwoStepCircuitBreaker[struct{}] // nil until the gate first opens: then there is something to remember
	since   time.Time
	reason  error
	probes  []*probe    // under way, oldest first; at most cfg.Probes
	timer   *time.Timer // runs tick at the end of the open time, or when the oldest probe is lost; nil until first needed
	changes []change    // not yet told to the listener
	telling bool        // a goroutine is telling them
	stopped bool        // by Close
	next    *Config     // by Configure, while it is not closed; nil: none
}

// Listener hears every change of a gate's state: one call at a time, in order, none left out. It is called with no lock held, so
// it may call any method of the gate. State may have moved on by then: act on what State says, and let from, to and reason
// tell how it came about. reason wraps the error given to Failure where there is one ("5 failures in a row: ..."), and is
// never nil.
//
// The call is made by the goroutine that caused the change (the timer's where it was time) before its call of Success,
// Failure or Allow returns, unless another call of the listener is under way. Then nobody waits: the goroutine that made
// that one makes this one after it.
type Listener interface {
	BreakerChanged(from, to State, reason error)
}

// Init makes a closed gate of the zero Gate. Its error names the field of cfg that is out of range. l may be nil. Close the gate to
// stop its timer.
func (g *Gate) Init(cfg Config, l Listener) error {
	cfg, err := cfg.WithDefaults()
	if err != nil {
		return err
	}
	g.listener, g.since = l, time.Now()
	g.configure(cfg)
	g.word.Store(pack(1, Closed, 0))
	return nil
}

// configure sets the configuration. mu is held, or nobody knows the gate yet.
func (g *Gate) configure(cfg Config) {
	g.cfg = cfg
	g.failures.Store(int64(cfg.Failures))
}

// remember makes the gobreaker for an open gate. mu is held.
func (g *Gate) remember() {
	g.slow = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests:   uint32(g.cfg.Probes),
		Timeout:       g.cfg.OpenFor,
		ReadyToTrip:   func(gobreaker.Counts) bool { return true }, // it hears of the last failure of a run only
		IsExcluded:    func(err error) bool { return err == errIgnored },
		OnStateChange: g.changed,
	})
}

// Configure has the gate go by another configuration: from now on if it is closed, and its run of failures goes on; else when it
// is closed again. The error is as that of Init, and then nothing has changed.
func (g *Gate) Configure(cfg Config) error {
	cfg, err := cfg.WithDefaults()
	if err != nil {
		return err
	}
	g.locked(func() { g.next = &cfg })
	return nil
}

// State returns the state at this moment: one atomic load.
func (g *Gate) State() State { return state(g.word.Load()) }

// FreeProbes returns how many probes a half-open gate would admit now, else 0: one atomic load.
func (g *Gate) FreeProbes() int {
	if w := g.word.Load(); state(w) == HalfOpen {
		return count(w)
	}
	return 0
}

// Status returns the state with its circumstances. It takes a lock: for people, not for requests.
func (g *Gate) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Status{State: g.State(), Since: g.since, Until: g.until(), Reason: g.reason}
}

// Allow reports whether a request may be sent, and with which Token. Closed and open it is one atomic load; half-open
// it takes a lock, if a probe is free. It does not allocate, except for a probe.
func (g *Gate) Allow() (Token, bool) {
	switch w := g.word.Load(); {
	case state(w) == Closed:
		return Token{era: era(w)}, true
	case count(w) == 0: // open, or every probe is taken
		return Token{}, false
	}
	return g.allowProbe()
}

// Success ends a token whose request went well: it ends the run of failures.
func (g *Gate) Success(t Token) {
	if g.word.Load() != t.era { // equal: same era, no failures, nothing to store
		g.success(t)
	}
}

func (g *Gate) success(t Token) {
	if t.probe != nil {
		g.endProbe(t.probe, nil, nil)
		return
	}
	for {
		w := g.word.Load()
		if era(w) != t.era || g.word.CompareAndSwap(w, t.era) {
			return
		}
	}
}

// Failure ends a token whose request failed. reason, which may be nil, is kept and told if it opens the gate.
func (g *Gate) Failure(t Token, reason error) {
	if t.probe != nil {
		g.endProbe(t.probe, errFailed, because("probe failed", reason))
		return
	}
	for {
		w := g.word.Load()
		switch {
		case era(w) != t.era:
			return // of an earlier generation
		case int64(count(w))+1 >= g.failures.Load():
			if g.trip(w, reason) {
				return
			}
		case g.word.CompareAndSwap(w, w+1):
			return
		}
	}
}

// Ignored ends a token whose request says nothing about the instance: the run of failures stays as it is, and a probe
// is free again.
func (g *Gate) Ignored(t Token) {
	if t.probe != nil {
		g.endProbe(t.probe, errIgnored, nil)
	}
}

// Close stops the gate's timer. Nothing changes any more, and the listener is not called again; a call that another
// goroutine has begun may still be under way when Close returns. A gate that is closed at this time goes on admitting
// requests, any other refuses them.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
	g.probes, g.changes = nil, nil
	if g.timer != nil {
		g.timer.Stop()
	}
	if w := g.word.Load(); state(w) == HalfOpen {
		g.word.Store(pack(generation(w), HalfOpen, 0)) // no probe is offered
	}
}

// allowProbe is Allow where there was a free probe a moment ago; gobreaker knows whether there still is.
func (g *Gate) allowProbe() (t Token, ok bool) {
	g.locked(func() {
		if w := g.word.Load(); state(w) == Closed { // in that moment
			t, ok = Token{era: era(w)}, true
			return
		}
		report, err := g.slow.Allow()
		if err != nil {
			return
		}
		p := &probe{report: report, deadline: time.Now().Add(g.cfg.ProbeTimeout)}
		g.probes = append(g.probes, p)
		g.word.Add(^uint64(0)) // one free probe less
		t, ok = Token{probe: p}, true
	})
	return t, ok
}

// trip opens the gate if its word is still w, the last of the run. It reports false if w has changed.
func (g *Gate) trip(w uint64, reason error) bool {
	tripped := true // or stopped: then there is nothing to try again
	g.locked(func() {
		if tripped = g.word.CompareAndSwap(w, pack(generation(w), Open, 0)); !tripped {
			return
		}
		g.reason = because(fmt.Sprintf("%d failures in a row", g.cfg.Failures), reason)
		if g.slow == nil {
			g.remember()
		}
		report, _ := g.slow.Allow() // never refused: it is closed as long as the word is
		report(errFailed)
	})
	return tripped
}

func (g *Gate) endProbe(p *probe, outcome, reason error) {
	g.locked(func() { g.end(p, outcome, reason) })
}

// end tells gobreaker the outcome of a probe, once. reason is why it failed. mu is held.
func (g *Gate) end(p *probe, outcome, reason error) {
	report := p.report
	if report == nil {
		return
	}
	p.report = nil
	i := slices.Index(g.probes, p)
	g.probes = slices.Delete(g.probes, i, i+1)
	switch outcome {
	case errFailed:
		g.reason = reason // one is enough to open
	case errIgnored:
		g.word.Add(1) // free again
	}
	report(outcome)
}

// tick is run by the timer: it does what is due.
func (g *Gate) tick() {
	g.locked(func() {
		switch now := time.Now(); {
		case g.State() == Open:
			g.slow.State() // gobreaker looks at its clock when asked
		case len(g.probes) > 0 && !now.Before(g.probes[0].deadline):
			g.end(g.probes[0], errFailed, fmt.Errorf("probe lost: no outcome within %v", g.cfg.ProbeTimeout))
		}
	})
}

// until is when the open time is over; zero unless open. mu is held.
func (g *Gate) until() time.Time {
	if g.State() != Open {
		return time.Time{}
	}
	return g.since.Add(g.cfg.OpenFor)
}

// arm sets the timer to what comes next. mu is held.
func (g *Gate) arm() {
	var next time.Time
	switch {
	case g.State() == Open:
		next = g.until().Add(1) // gobreaker is half-open only after its time, not at it
	case len(g.probes) > 0:
		next = g.probes[0].deadline
	default:
		if g.timer != nil {
			g.timer.Stop()
		}
		return
	}
	if d := time.Until(next); g.timer == nil {
		g.timer = time.AfterFunc(d, g.tick)
	} else {
		g.timer.Reset(d)
	}
}

// changed is called by gobreaker within any call of ours, mu and its own lock held: it notes the change and must not
// ask gobreaker anything.
func (g *Gate) changed(_ string, gFrom, gTo gobreaker.State) {
	from, to := ours(gFrom), ours(gTo)
	for _, p := range g.probes {
		p.report = nil // too late
	}
	g.probes = nil
	g.since = time.Now()
	c := change{from, to, g.reason}
	free := 0
	switch to {
	case HalfOpen:
		free = g.cfg.Probes
		c.reason = fmt.Errorf("open for %v", g.cfg.OpenFor)
	case Closed:
		g.reason = nil
		c.reason = fmt.Errorf("%d of %[1]d probes succeeded", g.cfg.Probes)
	}
	g.word.Store(pack(generation(g.word.Load())+1, to, free))
	if g.listener != nil {
		g.changes = append(g.changes, c)
	}
}

// locked runs step under mu, unless the gate is stopped, and then tells the listener what it changed.
func (g *Gate) locked(step func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return
	}
	step()
	if g.next != nil && g.State() == Closed {
		g.configure(*g.next)
		g.slow, g.next = nil, nil // what is closed has nothing to remember
	}
	g.arm()
	if g.telling {
		return // whoever is telling goes on to these
	}
	g.telling = true
	defer func() { g.telling = false }() // also if the listener panics: the rest is told with the next change
	for len(g.changes) > 0 {
		c := g.changes[0]
		g.changes = g.changes[1:]
		g.tell(c)
	}
}

// tell calls the listener with mu released.
func (g *Gate) tell(c change) {
	g.mu.Unlock()
	defer g.mu.Lock()
	g.listener.BreakerChanged(c.from, c.to, c.reason)
}

// ours is gobreaker's state as one of ours.
func ours(s gobreaker.State) State {
	switch s {
	case gobreaker.StateOpen:
		return Open
	case gobreaker.StateHalfOpen:
		return HalfOpen
	}
	return Closed
}

// because returns an error that says what happened, and wraps reason if there is one.
func because(what string, reason error) error {
	if reason == nil {
		return errors.New(what)
	}
	return fmt.Errorf("%s: %w", what, reason)
}
