package registry

import (
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// underWay is what all instances have under way.
type underWay struct {
	now, cuts atomic.Int32
	succeeded atomic.Uint64
}

func (u *underWay) of(string, string) Traffic { return u }

func (u *underWay) Busy() int { return int(u.now.Load()) }
func (u *underWay) Cut()      { u.cuts.Add(1) }

func (u *underWay) Succeeded() uint64 { return u.succeeded.Load() }

func TestDrain(t *testing.T) {
	const limit = 30 * time.Second
	for _, row := range []struct {
		name   string
		do     func(t *testing.T, r *Registry, u *underWay) // a second after the drain began, with two requests under way
		waited time.Duration                                // at least, and a second more at most
		cut    int
		left   []string
		state  State // of a, if it is left
	}{
		{"they end", func(_ *testing.T, _ *Registry, u *underWay) { u.now.Store(0) }, time.Second, 0, []string{"b"}, ""},
		{"they do not", func(*testing.T, *Registry, *underWay) {}, limit, 2, []string{"b"}, ""},
		{"registered again by itself", func(t *testing.T, r *Registry, u *underWay) {
			register(t, r, "echo", "a", "http://10.0.0.1", 1)
			time.Sleep(time.Second)
			u.now.Store(0)
		}, 2 * time.Second, 0, []string{"b"}, ""},
		{"registered by its successor", func(t *testing.T, r *Registry, u *underWay) {
			register(t, r, "echo", "a", "http://10.0.0.9", 1)
			u.now.Store(0)
		}, time.Second, 0, []string{"a", "b"}, Up},
		{"unregistered", func(t *testing.T, r *Registry, u *underWay) {
			if err := r.Unregister("echo", "a", ""); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Second)
			u.now.Store(0)
		}, 2 * time.Second, 0, []string{"b"}, ""},
		{"drained by an operator too, then by its successor", func(t *testing.T, r *Registry, u *underWay) {
			if err := r.Patch("echo", "a", Patch{SetState: true, State: Drain}); err != nil {
				t.Error(err)
			}
			register(t, r, "echo", "a", "http://10.0.0.9", 1)
			u.now.Store(0)
		}, time.Second, 0, []string{"a", "b"}, Drain},
		{"longer than its lease", func(t *testing.T, r *Registry, u *underWay) {
			lend(t, r, "echo", "a", 5*time.Second)
			time.Sleep(20 * time.Second)
			u.now.Store(0)
		}, 21 * time.Second, 0, []string{"b"}, ""},
		{"drained for a shorter time, then for a longer one", func(t *testing.T, r *Registry, _ *underWay) {
			for _, limit := range []time.Duration{5 * time.Second, time.Hour} {
				go func() {
					if cut, waited, err := r.Drain("echo", "a", "", limit); cut != 2 || waited > 7*time.Second || err != nil {
						t.Errorf("drained for %v: %d cut after %v, %v", limit, cut, waited, err)
					}
				}()
				synctest.Wait()
			}
		}, 6 * time.Second, 2, []string{"b"}, ""},
		{"the registry ends", func(_ *testing.T, r *Registry, _ *underWay) { go r.Close() }, -1, 0, []string{"a", "b"}, Drain},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New(Config{})
				defer r.Close()
				lend(t, r, "echo", "a", 5*time.Second)
				register(t, r, "echo", "b", "http://10.0.0.2", 1)
				var e ear
				r.OnChange(e.hear)
				u := &underWay{}
				r.Observe(u.of)
				u.now.Store(2)
				type result struct {
					cut    int
					waited time.Duration
					err    error
				}
				results := make(chan result, 2)
				for range cap(results) { // the second one waits for the first
					go func() {
						cut, waited, err := r.Drain("echo", "a", "http://10.0.0.1", limit)
						results <- result{cut, waited, err}
					}()
				}
				synctest.Wait()
				if a, heard := r.Snapshot("echo").Instance("a"), e.heard(); a.State() != Drain || len(heard) != 2 {
					t.Fatalf("%+v, heard %v", a, heard)
				}
				time.Sleep(time.Second)
				row.do(t, r, u)
				for range cap(results) {
					got := <-results
					if row.waited < 0 {
						if !errors.Is(got.err, ErrClosed) {
							t.Errorf("got %+v", got)
						}
						continue
					}
					if got.err != nil || got.cut != row.cut || got.waited < row.waited || got.waited > row.waited+time.Second {
						t.Errorf("got %+v, want %d cut after %v", got, row.cut, row.waited)
					}
				}
				time.Sleep(2 * limit)
				synctest.Wait()
				s := r.Snapshot("echo")
				if got := ids(s); !slices.Equal(got, row.left) || s.Instance("a") != nil && s.Instance("a").State() != row.state {
					t.Errorf("left %v, %+v", got, s.Instance("a"))
				}
				if got := int(u.cuts.Load()); got != min(row.cut, 1) {
					t.Errorf("cut %d times", got)
				}
			})
		})
	}
}

// A request that chose the instance a moment before is waited for.
func TestDrainLooksTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{})
		register(t, r, "echo", "a", "http://10.0.0.1", 1)
		u := &underWay{}
		r.Observe(u.of)
		go func() {
			time.Sleep(drainTick + drainTick/2) // between the first look and the second
			u.now.Store(1)
			time.Sleep(time.Second)
			u.now.Store(0)
		}()
		cut, waited, err := r.Drain("echo", "a", "", time.Minute)
		if cut != 0 || err != nil || waited < time.Second {
			t.Errorf("%d cut after %v, %v", cut, waited, err)
		}
	})
}

func TestDrainErrors(t *testing.T) {
	r := New(Config{})
	register(t, r, "echo", "a", "http://10.0.0.1", 1)
	for _, row := range []struct {
		service, id, addr string
		want              error
	}{{"none", "a", "", ErrNotFound}, {"echo", "x", "", ErrNotFound}, {"echo", "a", "http://10.0.0.2", ErrConflict}} {
		if _, _, err := r.Drain(row.service, row.id, row.addr, time.Minute); !errors.Is(err, row.want) {
			t.Errorf("%+v: %v", row, err)
		}
	}
	if a := r.Snapshot("echo").Instance("a"); a.State() != Up {
		t.Errorf("%+v", a)
	}
}

// What an operator sets lies over what the instance registers, survives registrations, and goes with null or the instance.
func TestPatch(t *testing.T) {
	r := New(Config{})
	in := func() *Instance { return r.Snapshot("echo").Instance("a") }
	patch := func(p Patch) {
		t.Helper()
		generation, change := in().Generation, r.Snapshot("echo").Generation()
		if err := r.Patch("echo", "a", p); err != nil {
			t.Fatal(err)
		}
		if in().Generation != generation || r.Snapshot("echo").Generation() <= change {
			t.Error("it is another registration, or no change")
		}
	}
	want := func(weight int, state State) {
		t.Helper()
		if got := in(); got.Weight != weight || got.State() != state {
			t.Errorf("weight %d and %s, want %d and %s", got.Weight, got.State(), weight, state)
		}
	}
	seven := 7
	register(t, r, "echo", "a", "http://10.0.0.1", 2)
	patch(Patch{SetWeight: true, Weight: &seven})
	want(7, Up)
	patch(Patch{SetState: true, State: Down})
	want(7, Down)
	register(t, r, "echo", "a", "http://10.0.0.9", 3)
	want(7, Down)
	patch(Patch{SetState: true, State: Up})
	want(7, Up)
	patch(Patch{SetWeight: true})
	want(3, Up)
	patch(Patch{SetState: true})
	if !in().Override.none() {
		t.Errorf("left: %+v", in().Override)
	}
	patch(Patch{SetWeight: true, Weight: &seven})
	if err := r.Unregister("echo", "a", ""); err != nil {
		t.Fatal(err)
	}
	register(t, r, "echo", "a", "http://10.0.0.1", 2)
	want(2, Up)

	zero, less, more := 0, -1, MaxWeight+1
	var bad *FieldError
	for field, p := range map[string][]Patch{
		"weight": {{SetWeight: true, Weight: &zero}, {SetWeight: true, Weight: &less}, {SetWeight: true, Weight: &more}},
		"state":  {{SetState: true, State: "UP"}},
	} {
		for _, p := range p {
			if err := r.Patch("echo", "a", p); !errors.As(err, &bad) || bad.Field != field {
				t.Errorf("%s: %v", field, err)
			}
		}
	}
	want(2, Up)
	if err := r.Patch("echo", "x", Patch{}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	// What Register is given of it is ignored.
	if err := r.Register("echo", Instance{ID: "a", Addr: "http://10.0.0.1", Override: Override{State: Down}}); err != nil || in().State() != Up {
		t.Errorf("%v, %+v", err, in())
	}
}
