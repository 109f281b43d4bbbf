package cb

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sony/gobreaker/v2"
)

// A trace is a row of steps taken by a Gate and by a plain gobreaker side by side; after each, both must agree. Each
// byte is a step: the low 3 bits say what, the rest with which token or for how long.
const (
	opAllow = iota
	opAllowToo
	opSuccess
	opFailure
	opFailureToo
	opIgnored
	opEndAgain // of a token that was a probe: changes nothing
	opSleep
)

// traceConfig makes times meet: a probe can be lost in the very step in which an open time ends, and after it.
func traceConfig(b byte) Config {
	return Config{
		Failures:     1 + int(b&3),
		Probes:       1 + int(b>>2&3),
		OpenFor:      4 * time.Second,
		ProbeTimeout: []time.Duration{2 * time.Second, 4 * time.Second, 6 * time.Second, time.Hour}[b>>4&3],
	}
}

// pair is one request as both breakers see it.
type pair struct {
	token    Token
	done     func(error) // of plain gobreaker
	deadline time.Time   // of a probe
	lost     bool        // plain was told of a failure at the deadline
}

// model is plain gobreaker with the one thing it lacks: probes that are lost.
type model struct {
	plain   *gobreaker.TwoStepCircuitBreaker[struct{}]
	probes  int
	changes []string
}

func newModel(cfg Config) *model {
	m := &model{probes: cfg.Probes}
	m.plain = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests: uint32(cfg.Probes),
		Timeout:     cfg.OpenFor,
		ReadyToTrip: func(c gobreaker.Counts) bool { return int(c.ConsecutiveFailures) >= cfg.Failures },
		IsExcluded:  func(err error) bool { return err == errIgnored },
		OnStateChange: func(_ string, from, to gobreaker.State) {
			m.changes = append(m.changes, fmt.Sprint(from, " -> ", to))
		},
	})
	return m
}

func (m *model) freeProbes() int {
	if m.plain.State() != gobreaker.StateHalfOpen {
		return 0
	}
	c := m.plain.Counts()
	return m.probes - int(c.Requests-c.TotalExclusions)
}

// runTrace takes the steps and returns the changes of state there were.
func runTrace(t *testing.T, cfg Config, steps []byte) []string {
	t.Helper()
	var changes []string
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, cfg, func(from, to State, _ error) {
			changes = append(changes, fmt.Sprint(from, " -> ", to))
		})
		m := newModel(cfg)
		var running, ended []*pair

		check := func(i int, step byte) {
			if got, want := g.State(), ours(m.plain.State()); got != want {
				t.Fatalf("step %d (%d, %d): %v, gobreaker is %v", i, step&7, step>>3, got, want)
			}
			if got, want := g.FreeProbes(), m.freeProbes(); got != want {
				t.Fatalf("step %d (%d, %d): %d free probes, gobreaker has %d", i, step&7, step>>3, got, want)
			}
			s := g.Status()
			if s.State != g.State() || s.Until.IsZero() != (s.State != Open) || (s.Reason == nil) != (s.State == Closed) {
				t.Fatalf("step %d: odd status %+v", i, s)
			}
		}
		pass := func(i int, step byte, d time.Duration) {
			// In the model a probe is lost at its deadline, however far the step goes.
			for until := time.Now().Add(d); ; {
				next := until
				for _, p := range running {
					if p.token.Probe() && !p.lost && p.deadline.Before(next) {
						next = p.deadline
					}
				}
				time.Sleep(time.Until(next))
				synctest.Wait()
				for _, p := range running {
					if p.token.Probe() && !p.lost && !time.Now().Before(p.deadline) {
						p.lost = true
						p.done(errFailed) // gobreaker itself drops it if it is of an earlier generation
					}
				}
				check(i, step)
				if next == until {
					return
				}
			}
		}

		for i, step := range steps {
			arg := int(step >> 3)
			take := func() *pair {
				if len(running) == 0 {
					return nil
				}
				at := arg % len(running)
				p := running[at]
				running = slices.Delete(running, at, at+1)
				ended = append(ended, p)
				return p
			}
			end := func(outcome error, tell func(Token)) {
				if p := take(); p != nil {
					tell(p.token)
					if !p.lost {
						p.done(outcome)
					}
				}
			}
			switch step & 7 {
			case opAllow, opAllowToo:
				wasClosed := m.plain.State() == gobreaker.StateClosed
				token, ok := g.Allow()
				done, err := m.plain.Allow()
				if ok != (err == nil) {
					t.Fatalf("step %d: admitted %v, gobreaker says %v", i, ok, err)
				}
				if token.Probe() != (ok && !wasClosed) {
					t.Fatalf("step %d: probe %v, while gobreaker closed: %v", i, token.Probe(), wasClosed)
				}
				if ok {
					running = append(running, &pair{token: token, done: done, deadline: time.Now().Add(cfg.ProbeTimeout)})
				}
			case opSuccess:
				end(nil, g.Success)
			case opFailure, opFailureToo:
				end(errFailed, func(token Token) { g.Failure(token, nil) })
			case opIgnored:
				end(errIgnored, g.Ignored)
			case opEndAgain:
				if len(ended) > 0 {
					if p := ended[arg%len(ended)]; p.token.Probe() {
						[]func(){
							func() { g.Success(p.token) },
							func() { g.Failure(p.token, nil) },
							func() { g.Ignored(p.token) },
						}[arg%3]()
					}
				}
			case opSleep:
				pass(i, step, []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 1, 4*time.Second + 1, 30 * time.Second}[arg%6])
			}
			check(i, step)
		}
		if diff := cmp.Diff(m.changes, changes); diff != "" {
			t.Fatalf("changes told (-gobreaker +gate):\n%s", diff)
		}
		g.Close()
	})
	return changes
}

func TestRandomTracesEqualGobreaker(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	seen := map[string]int{}
	for range 400 {
		steps := make([]byte, 300)
		for i := range steps {
			steps[i] = byte(rng.Uint32())
			if rng.IntN(2) == 0 {
				steps[i] &^= 7 // opAllow: many tokens are under way, and outlive their generation
			}
		}
		for _, c := range runTrace(t, traceConfig(byte(rng.Uint32())), steps) {
			seen[c]++
		}
	}
	for _, c := range []string{"closed -> open", "open -> half-open", "half-open -> open", "half-open -> closed"} {
		if seen[c] < 100 {
			t.Errorf("%s happened %d times only: the traces test little", c, seen[c])
		}
	}
}

func FuzzTraces(f *testing.F) {
	allow, fail, ok, ignore, sleep := byte(opAllow), byte(opFailure), byte(opSuccess), byte(opIgnored), byte(opSleep|4<<3)
	f.Add(byte(0x34), []byte{allow, fail, sleep, allow, allow, ok, ok})                                // closed again
	f.Add(byte(0x34), []byte{allow, fail, sleep, allow, allow, ok, fail})                              // open again
	f.Add(byte(0x34), []byte{allow, fail, sleep, allow, ignore, allow, allow, ok, ok, opEndAgain})     // ignored probe
	f.Add(byte(0x00), []byte{allow, fail, sleep, allow, opSleep | 1<<3, ok, opEndAgain | 1<<3, sleep}) // lost probe
	f.Add(byte(0x02), []byte{allow, allow, allow, allow, fail, fail, ok, fail, fail, fail, fail})
	f.Add(byte(0x01), []byte{allow, allow, allow, allow, fail, ignore, fail, ok})
	f.Fuzz(func(t *testing.T, cfg byte, steps []byte) {
		if len(steps) > 1000 {
			return
		}
		runTrace(t, traceConfig(cfg), steps)
	})
}

func newGate(tb testing.TB, cfg Config, onChange func(from, to State, reason error)) *Gate {
	tb.Helper()
	g := &Gate{}
	var l Listener
	if onChange != nil {
		l = listener(onChange)
	}
	if err := g.Init(cfg, l); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(g.Close)
	return g
}

// listener is a function that listens.
type listener func(from, to State, reason error)

func (f listener) BreakerChanged(from, to State, reason error) { f(from, to, reason) }

// fail admits and fails n requests.
func fail(tb testing.TB, g *Gate, n int) {
	tb.Helper()
	for i := range n {
		token, ok := g.Allow()
		if !ok {
			tb.Fatalf("request %d of %d refused, gate is %v", i+1, n, g.State())
		}
		g.Failure(token, errRefused)
	}
}

var errRefused = errors.New("connection refused")
