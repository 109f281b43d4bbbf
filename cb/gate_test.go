package cb

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// log collects what onChange hears.
type log struct {
	mu    sync.Mutex
	lines []string
}

func (l *log) add(from, to State, reason error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf("%v -> %v: %v", from, to, reason))
}

func (l *log) want(t *testing.T, want ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if diff := cmp.Diff(want, l.lines); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}

func wantGate(t *testing.T, g *Gate, state State, free int) {
	t.Helper()
	if got := g.State(); got != state {
		t.Errorf("state %v, want %v", got, state)
	}
	if got := g.FreeProbes(); got != free {
		t.Errorf("%d free probes, want %d", got, free)
	}
}

func probeOf(t *testing.T, g *Gate) Token {
	t.Helper()
	token, ok := g.Allow()
	if !ok || !token.Probe() {
		t.Fatalf("Allow: probe %v, admitted %v; want a probe; gate is %v with %d free", token.Probe(), ok, g.State(), g.FreeProbes())
	}
	return token
}

func wantRefused(t *testing.T, g *Gate) {
	t.Helper()
	if token, ok := g.Allow(); ok || token != (Token{}) {
		t.Errorf("admitted (probe %v) by a gate that is %v with %d free probes", token.Probe(), g.State(), g.FreeProbes())
	}
}

// halfOpen fails a closed gate and waits until it is half-open.
func halfOpen(t *testing.T, g *Gate) {
	t.Helper()
	fail(t, g, g.cfg.Failures)
	time.Sleep(g.cfg.OpenFor + 1)
	synctest.Wait()
	wantGate(t, g, HalfOpen, g.cfg.Probes)
}

func TestConfig(t *testing.T) {
	tests := []struct {
		name string
		cfg  Config
		want Config
		err  string // must be in the error
	}{
		{"defaults", Config{}, Config{5, 30 * time.Second, 3, time.Minute}, ""},
		{"all set", Config{1, 1, 1, 1}, Config{1, 1, 1, 1}, ""},
		{"largest", Config{math.MaxInt32, 8760 * time.Hour, math.MaxInt32, 8760 * time.Hour}, Config{math.MaxInt32, 8760 * time.Hour, math.MaxInt32, 8760 * time.Hour}, ""},
		{"negative failures", Config{Failures: -1}, Config{}, "Failures is -1"},
		{"negative probes", Config{Probes: -2}, Config{}, "Probes is -2"},
		{"negative open time", Config{OpenFor: -time.Second}, Config{}, "OpenFor is -1s"},
		{"negative probe time", Config{ProbeTimeout: -1}, Config{}, "ProbeTimeout is -1ns"},
		{"open time that overflows", Config{OpenFor: math.MaxInt64}, Config{}, "OpenFor is 2562047h"},
		{"probe time that overflows", Config{ProbeTimeout: math.MaxInt64}, Config{}, "ProbeTimeout is 2562047h"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var g Gate
			err := g.Init(tt.cfg, nil)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			if g.cfg != tt.want {
				t.Errorf("config %+v, want %+v", g.cfg, tt.want)
			}
		})
	}
}

func TestStateString(t *testing.T) {
	for s, want := range map[State]string{Closed: "closed", Open: "open", HalfOpen: "half-open", 3: "state 3"} {
		if got := s.String(); got != want {
			t.Errorf("State(%d) is %q, want %q", uint8(s), got, want)
		}
	}
}

func TestRunOfFailures(t *testing.T) {
	tests := []struct {
		name     string
		outcomes string // s success, f failure, i ignored
		want     State
	}{
		{"four", "ffff", Closed},
		{"five", "fffff", Open},
		{"a success ends the run", "ffffsffff", Closed},
		{"and begins it anew", "ffffsfffff", Open},
		{"ignored leaves it", "ffiffiif", Open},
		{"ignored is no failure", "ffffiiii", Closed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t, Config{}, nil)
			for i, o := range tt.outcomes {
				token, ok := g.Allow()
				if !ok {
					t.Fatalf("request %d refused", i+1)
				}
				switch o {
				case 's':
					g.Success(token)
				case 'f':
					g.Failure(token, errRefused)
				case 'i':
					g.Ignored(token)
				}
			}
			wantGate(t, g, tt.want, 0)
		})
	}
}

// The whole way round, and what is told of it.
func TestRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told log
		g := newGate(t, Config{}, told.add)
		start := time.Now()
		wantStatus := func(want Status, reason string) {
			t.Helper()
			got := g.Status()
			if fmt.Sprint(got.Reason) != reason {
				t.Errorf("reason %v, want %v", got.Reason, reason)
			}
			got.Reason = nil
			if got.State != want.State || !got.Since.Equal(want.Since) || !got.Until.Equal(want.Until) {
				t.Errorf("status %+v, want %+v", got, want)
			}
		}
		wantStatus(Status{State: Closed, Since: start}, "<nil>")

		time.Sleep(time.Second)
		fail(t, g, 5)
		wantStatus(Status{State: Open, Since: start.Add(time.Second), Until: start.Add(31 * time.Second)}, "5 failures in a row: connection refused")
		if !errors.Is(g.Status().Reason, errRefused) {
			t.Error("the reason does not wrap the error given to Failure")
		}
		wantRefused(t, g)

		time.Sleep(30 * time.Second)
		synctest.Wait()
		wantGate(t, g, Open, 0) // 30 s are not over at 30 s
		wantRefused(t, g)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		wantGate(t, g, HalfOpen, 3) // nobody asked: the gate's own timer
		wantStatus(Status{State: HalfOpen, Since: start.Add(31*time.Second + 1)}, "5 failures in a row: connection refused")

		a, b := probeOf(t, g), probeOf(t, g)
		g.Success(a)
		wantGate(t, g, HalfOpen, 1)
		g.Failure(b, nil)
		wantGate(t, g, Open, 0)
		wantStatus(Status{State: Open, Since: start.Add(31*time.Second + 1), Until: start.Add(61*time.Second + 1)}, "probe failed")
		wantRefused(t, g)

		time.Sleep(31 * time.Second)
		synctest.Wait()
		for range 3 {
			wantGate(t, g, HalfOpen, g.FreeProbes())
			g.Success(probeOf(t, g))
		}
		wantGate(t, g, Closed, 0)
		wantStatus(Status{State: Closed, Since: start.Add(62*time.Second + 1)}, "<nil>")
		fail(t, g, 4)
		wantGate(t, g, Closed, 0)

		told.want(t,
			"closed -> open: 5 failures in a row: connection refused",
			"open -> half-open: open for 30s",
			"half-open -> open: probe failed",
			"open -> half-open: open for 30s",
			"half-open -> closed: 3 of 3 probes succeeded")
	})
}

func TestProbesAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Config{}, nil)
		halfOpen(t, g)
		var tokens []Token
		for free := 3; free > 0; free-- {
			wantGate(t, g, HalfOpen, free)
			tokens = append(tokens, probeOf(t, g))
		}
		wantGate(t, g, HalfOpen, 0)
		wantRefused(t, g)

		g.Ignored(tokens[1]) // its place, and no more than that, is free again
		g.Ignored(tokens[1])
		wantGate(t, g, HalfOpen, 1)
		tokens[1] = probeOf(t, g)
		wantRefused(t, g)

		g.Success(tokens[0]) // a success keeps its place
		g.Success(tokens[0])
		wantGate(t, g, HalfOpen, 0)
		wantRefused(t, g)
		g.Success(tokens[1])
		wantGate(t, g, HalfOpen, 0)
		g.Success(tokens[2])
		wantGate(t, g, Closed, 0)
	})
}

func TestLostProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told log
		g := newGate(t, Config{OpenFor: 10 * time.Second}, told.add)
		halfOpen(t, g)
		ignored := probeOf(t, g)
		time.Sleep(30 * time.Second)
		lost := probeOf(t, g)
		g.Ignored(ignored) // the timer was set for this one
		wantGate(t, g, HalfOpen, 2)
		time.Sleep(time.Minute - 1)
		synctest.Wait()
		wantGate(t, g, HalfOpen, 2)
		g.Success(probeOf(t, g)) // in time, and not for the lost one
		probeOf(t, g)            // has its own minute
		wantGate(t, g, HalfOpen, 0)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		wantGate(t, g, Open, 0)
		g.Success(lost) // found again: too late
		wantGate(t, g, Open, 0)

		time.Sleep(10*time.Second + 1)
		synctest.Wait()
		wantGate(t, g, HalfOpen, 3)
		g.Failure(lost, errRefused)
		wantGate(t, g, HalfOpen, 3)
		for range 3 {
			g.Success(probeOf(t, g))
		}
		wantGate(t, g, Closed, 0)
		time.Sleep(time.Hour)
		synctest.Wait()
		wantGate(t, g, Closed, 0)
		told.want(t,
			"closed -> open: 5 failures in a row: connection refused",
			"open -> half-open: open for 10s",
			"half-open -> open: probe lost: no outcome within 1m0s",
			"open -> half-open: open for 10s",
			"half-open -> closed: 3 of 3 probes succeeded")
	})
}

// A half-open gate to which nobody sends a probe waits for one.
func TestNoProbeTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, Config{}, nil)
		halfOpen(t, g)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		wantGate(t, g, HalfOpen, 3)
	})
}

// Outcomes of an earlier generation change nothing, in whatever state they arrive.
func TestLateOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told log
		g := newGate(t, Config{Failures: 2, Probes: 2}, told.add)
		old, _ := g.Allow()
		var tokens []Token // each has ended already or is of an earlier generation
		late := func() {
			t.Helper()
			state, free, n := g.State(), g.FreeProbes(), count(g.word.Load())
			for range 3 {
				for _, token := range append(tokens, old, Token{}) {
					g.Failure(token, errRefused)
					g.Success(token)
					g.Ignored(token)
				}
			}
			wantGate(t, g, state, free)
			if got := count(g.word.Load()); got != n {
				t.Errorf("%v: late outcomes moved the count from %d to %d", state, n, got)
			}
		}
		fail(t, g, 2)
		late()

		time.Sleep(31 * time.Second)
		synctest.Wait()
		late()
		a, b := probeOf(t, g), probeOf(t, g)
		g.Failure(a, nil)
		tokens = append(tokens, a, b) // b was under way
		late()

		time.Sleep(31 * time.Second)
		synctest.Wait()
		late()
		c := probeOf(t, g)
		g.Success(c)
		tokens = append(tokens, c)
		late()
		d := probeOf(t, g)
		tokens = append(tokens, d)
		g.Success(d)
		wantGate(t, g, Closed, 0)
		late()
		fail(t, g, 1)
		late() // with a run of one: neither longer nor ended
		told.want(t,
			"closed -> open: 2 failures in a row: connection refused",
			"open -> half-open: open for 30s",
			"half-open -> open: probe failed",
			"open -> half-open: open for 30s",
			"half-open -> closed: 2 of 2 probes succeeded")
	})
}

// However many callers fail at once, the gate opens at exactly the configured failure.
func TestExactCountConcurrently(t *testing.T) {
	const callers, each = 8, 25
	for range 200 {
		var opened atomic.Int32
		g := newGate(t, Config{Failures: callers * each}, func(_, to State, _ error) { opened.Add(1) })
		last, _ := g.Allow()
		var wg sync.WaitGroup
		for i := range callers {
			n := each
			if i == 0 {
				n-- // one failure too few
			}
			wg.Go(func() {
				for range n {
					if token, ok := g.Allow(); ok {
						g.Failure(token, errRefused)
					}
				}
			})
		}
		wg.Wait()
		wantGate(t, g, Closed, 0)
		g.Failure(last, errRefused)
		wantGate(t, g, Open, 0)
		if n := opened.Load(); n != 1 {
			t.Fatalf("opened %d times", n)
		}
		g.Close()
	}
}

// What may happen between a caller's look at the word and its turn under the lock.
func TestInterleaved(t *testing.T) {
	t.Run("a success before the last failure", func(t *testing.T) {
		g := newGate(t, Config{}, nil)
		fail(t, g, 4)
		token, _ := g.Allow()
		w := g.word.Load()
		g.Success(token)
		if g.trip(w, errRefused) {
			t.Error("opened by a run that had ended")
		}
		wantGate(t, g, Closed, 0)
		fail(t, g, 4)
		wantGate(t, g, Closed, 0)
	})
	t.Run("two last failures", func(t *testing.T) {
		var told log
		g := newGate(t, Config{}, told.add)
		fail(t, g, 4)
		w := g.word.Load()
		if !g.trip(w, errRefused) || g.trip(w, errRefused) {
			t.Error("not opened by exactly the first")
		}
		wantGate(t, g, Open, 0)
		told.want(t, "closed -> open: 5 failures in a row: connection refused")
	})
	t.Run("closed while a probe was wanted", func(t *testing.T) {
		g := newGate(t, Config{}, nil)
		token, ok := g.allowProbe()
		if !ok || token.Probe() {
			t.Errorf("admitted %v, probe %v; want an ordinary token", ok, token.Probe())
		}
		g.Success(token)
		wantGate(t, g, Closed, 0)
		fail(t, g, 5)
		wantGate(t, g, Open, 0)
	})
	t.Run("open while a probe was wanted", func(t *testing.T) {
		g := newGate(t, Config{}, nil)
		fail(t, g, 5)
		if token, ok := g.allowProbe(); ok || token != (Token{}) {
			t.Error("admitted by an open gate")
		}
		wantGate(t, g, Open, 0)
	})
}

// More failures than needed, at once: it opens once, and the rest are late.
func TestOpensOnceConcurrently(t *testing.T) {
	for range 200 {
		var told log
		g := newGate(t, Config{}, told.add)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 5 {
					token, ok := g.Allow()
					if ok {
						g.Failure(token, errRefused)
					}
				}
			})
		}
		wg.Wait()
		wantGate(t, g, Open, 0)
		told.want(t, "closed -> open: 5 failures in a row: connection refused")
		g.Close()
	}
}

// However many callers want a probe at once, and however often one is given back, no more are under way than allowed.
func TestProbesAreLimitedConcurrently(t *testing.T) {
	const probes = 3
	isHalfOpen := make(chan struct{})
	g := newGate(t, Config{Failures: 1, OpenFor: 1, Probes: probes, ProbeTimeout: time.Hour}, func(_, to State, _ error) {
		if to == HalfOpen {
			close(isHalfOpen)
		}
	})
	fail(t, g, 1)
	<-isHalfOpen
	var running, admitted atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				token, ok := g.Allow()
				if !ok {
					continue
				}
				if n := running.Add(1); n > probes {
					t.Errorf("%d probes under way", n)
				}
				admitted.Add(1)
				runtime.Gosched()
				running.Add(-1)
				g.Ignored(token)
			}
		})
	}
	wg.Wait()
	wantGate(t, g, HalfOpen, probes)
	if admitted.Load() < 1000 {
		t.Errorf("%d probes only: tests little", admitted.Load())
	}
}

// Everything at once, with times so short that all states come by: no change is skipped, told twice or out of order.
func TestConcurrentRounds(t *testing.T) {
	const rounds = 20
	var (
		last   = Closed // no lock: the race detector would see two calls at a time
		closed atomic.Int32
	)
	g := newGate(t, Config{Failures: 3, OpenFor: time.Millisecond, ProbeTimeout: 5 * time.Millisecond}, func(from, to State, reason error) {
		if from != last || to == from || reason == nil {
			t.Errorf("told %v -> %v (%v) after %v", from, to, reason, last)
		}
		if last = to; to == Closed {
			closed.Add(1)
		}
	})
	deadline := time.Now().Add(10 * time.Second)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := i; closed.Load() < rounds; n++ {
				if time.Now().After(deadline) {
					t.Errorf("closed %d times within 10 s, want %d", closed.Load(), rounds)
					return
				}
				token, ok := g.Allow()
				switch {
				case !ok:
					time.Sleep(50 * time.Microsecond)
				case token.Probe() && n%16 == 0, !token.Probe() && n%4 > 0:
					g.Failure(token, errRefused)
				case token.Probe() && n%16 == 1:
					g.Ignored(token)
				case token.Probe() && n%16 == 2: // lost
				default:
					g.Success(token)
				}
				g.Status()
			}
		})
	}
	wg.Wait()
}

// onChange may call anything, also what changes the state again: that is told after it, not within it.
func TestChangeWithinOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			g      *Gate
			told   log
			within int
		)
		g = newGate(t, Config{Failures: 1, Probes: 1}, func(from, to State, reason error) {
			if within++; within > 1 {
				t.Error("called within itself")
			}
			defer func() { within-- }()
			told.add(from, to, reason)
			if g.Status().State != g.State() {
				t.Error("Status and State differ")
			}
			if to == HalfOpen {
				token := probeOf(t, g)
				wantRefused(t, g)
				g.Success(token)
				if g.State() != Closed { // true at once, told later
					t.Errorf("state %v after the probe", g.State())
				}
				fail(t, g, 1)
				told.add(to, to, errors.New("end of the first call"))
			}
		})
		fail(t, g, 1)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		told.want(t,
			"closed -> open: 1 failures in a row: connection refused",
			"open -> half-open: open for 30s",
			"half-open -> half-open: end of the first call",
			"half-open -> closed: 1 of 1 probes succeeded",
			"closed -> open: 1 failures in a row: connection refused")
	})
}

// While one call of onChange takes its time, no other waits, and what they change is told afterwards in order.
func TestSlowOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told log
		gate := make(chan struct{})
		g := newGate(t, Config{Failures: 1, Probes: 1}, func(from, to State, reason error) {
			<-gate
			told.add(from, to, reason)
		})
		token, _ := g.Allow()
		go g.Failure(token, errRefused)
		synctest.Wait() // it hangs in onChange
		wantGate(t, g, Open, 0)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		g.Success(probeOf(t, g)) // does not hang
		wantGate(t, g, Closed, 0)
		g.Status()
		told.want(t)
		close(gate)
		synctest.Wait()
		told.want(t,
			"closed -> open: 1 failures in a row: connection refused",
			"open -> half-open: open for 30s",
			"half-open -> closed: 1 of 1 probes succeeded")
	})
}

// In the goroutine that caused it, before the call that caused it returns.
func TestOnChangeIsDirect(t *testing.T) {
	n := 0 // no lock: the race detector would see another goroutine
	g := newGate(t, Config{}, func(_, _ State, _ error) { n++ })
	fail(t, g, 4)
	if n != 0 {
		t.Error("told before the fifth failure")
	}
	fail(t, g, 1)
	if n != 1 {
		t.Errorf("told %d times when Failure returned, want 1", n)
	}
}

// A panic in onChange is its caller's; the gate goes on.
func TestPanicInOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told log
		g := newGate(t, Config{Failures: 1, Probes: 1}, func(from, to State, reason error) {
			told.add(from, to, reason)
			if to == Open {
				panic("in onChange")
			}
		})
		func() {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			fail(t, g, 1)
		}()
		time.Sleep(31 * time.Second)
		synctest.Wait()
		g.Success(probeOf(t, g))
		wantGate(t, g, Closed, 0)
		told.want(t,
			"closed -> open: 1 failures in a row: connection refused",
			"open -> half-open: open for 30s",
			"half-open -> closed: 1 of 1 probes succeeded")
	})
}

func TestClose(t *testing.T) {
	tests := []struct {
		name  string
		until func(t *testing.T, g *Gate) []Token // brings the gate to where it is closed
		state State
	}{
		{"closed", func(t *testing.T, g *Gate) []Token {
			token, _ := g.Allow()
			fail(t, g, 4)
			return []Token{token}
		}, Closed},
		{"open", func(t *testing.T, g *Gate) []Token {
			fail(t, g, 5)
			return nil
		}, Open},
		{"half-open", func(t *testing.T, g *Gate) []Token {
			halfOpen(t, g)
			return nil
		}, HalfOpen},
		{"half-open with a probe", func(t *testing.T, g *Gate) []Token {
			halfOpen(t, g)
			g.Success(probeOf(t, g))
			return []Token{probeOf(t, g)}
		}, HalfOpen},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				closed := false
				g := newGate(t, Config{}, func(from, to State, _ error) {
					if closed {
						t.Errorf("told %v -> %v after Close", from, to)
					}
				})
				tokens := tt.until(t, g)
				g.Close()
				g.Close()
				closed = true
				if g.timer != nil && g.timer.Stop() {
					t.Error("the timer is still set")
				}
				before := g.Status()
				wantGate(t, g, tt.state, 0)
				if _, ok := g.Allow(); ok != (tt.state == Closed) {
					t.Errorf("Allow says %v", ok)
				}
				for _, token := range tokens {
					g.Failure(token, errRefused)
				}
				time.Sleep(time.Hour)
				synctest.Wait()
				wantGate(t, g, tt.state, 0)
				if after := g.Status(); after != before {
					t.Errorf("status %+v became %+v", before, after)
				}
			})
		})
	}
}

// What waits to be told when the gate is closed is not told.
func TestCloseWithinOnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			g    *Gate
			told log
		)
		g = newGate(t, Config{Failures: 1, Probes: 1}, func(from, to State, reason error) {
			told.add(from, to, reason)
			if to == HalfOpen {
				g.Success(probeOf(t, g))
				g.Close()
			}
		})
		fail(t, g, 1)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		wantGate(t, g, Closed, 0)
		told.want(t,
			"closed -> open: 1 failures in a row: connection refused",
			"open -> half-open: open for 30s")
	})
}

func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	healthy := newGate(t, Config{}, nil)
	open := newGate(t, Config{Failures: 1, OpenFor: time.Hour}, nil)
	fail(t, open, 1)
	for name, f := range map[string]func(){
		"success": func() {
			token, _ := healthy.Allow()
			healthy.Success(token)
		},
		"failure": func() {
			token, _ := healthy.Allow()
			healthy.Failure(token, errRefused)
			healthy.Success(token)
		},
		"ignored": func() {
			token, _ := healthy.Allow()
			healthy.Ignored(token)
		},
		"refused": func() { open.Allow() },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
}

// Another configuration is in force at once while the gate is closed, and else when it is closed again.
func TestConfigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gate{}
		if err := g.Init(Config{Failures: 3, OpenFor: time.Second, Probes: 1}, nil); err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		if err := g.Configure(Config{Failures: -1}); err == nil {
			t.Error("a bad one was accepted")
		}
		fail(t, g, 1)
		if err := g.Configure(Config{Failures: 2, OpenFor: time.Minute, Probes: 2}); err != nil {
			t.Fatal(err)
		}
		fail(t, g, 1) // the run went on
		wantGate(t, g, Open, 0)
		if err := g.Configure(Config{Failures: 1, OpenFor: time.Hour, Probes: 3}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute + 1) // the open time that it began with
		synctest.Wait()
		wantGate(t, g, HalfOpen, 2)
		for range 2 {
			g.Success(probeOf(t, g))
		}
		wantGate(t, g, Closed, 0)
		fail(t, g, 1)
		wantGate(t, g, Open, 0)
		time.Sleep(time.Hour + 1)
		synctest.Wait()
		wantGate(t, g, HalfOpen, 3)
	})
}
