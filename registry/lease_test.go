package registry

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func lend(t testing.TB, r *Registry, service, id string, ttl time.Duration) {
	t.Helper()
	if err := r.Register(service, Instance{ID: id, Addr: "http://10.0.0.1", TTL: ttl}); err != nil {
		t.Fatal(err)
	}
}

// ear hears of changes.
type ear struct {
	mu    sync.Mutex
	names []string
}

func (e *ear) hear(service string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.names = append(e.names, service)
}

// heard is what was heard since the last call.
func (e *ear) heard() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer func() { e.names = nil }()
	return e.names
}

// Leases end when nobody renews them, within a second, and not before.
func TestLeases(t *testing.T) {
	const ttl = 15 * time.Second
	for _, row := range []struct {
		name  string
		do    func(t *testing.T, r *Registry) // from when the lease was given
		lasts time.Duration                   // from then on; 0: for ever
	}{
		{"left alone", func(*testing.T, *Registry) {}, ttl},
		{"renewed", func(t *testing.T, r *Registry) {
			for range 10 {
				time.Sleep(ttl - time.Second)
				if err := r.Renew("echo", "a", ""); err != nil {
					t.Fatal(err)
				}
			}
		}, 10*(ttl-time.Second) + ttl},
		{"registered again", func(t *testing.T, r *Registry) {
			time.Sleep(ttl - time.Second)
			lend(t, r, "echo", "a", ttl)
		}, ttl - time.Second + ttl},
		{"registered again with a longer one", func(t *testing.T, r *Registry) { lend(t, r, "echo", "a", time.Minute) }, time.Minute},
		{"registered again with a shorter one", func(t *testing.T, r *Registry) { lend(t, r, "echo", "a", time.Second) }, time.Second},
		{"registered again without", func(t *testing.T, r *Registry) { lend(t, r, "echo", "a", 0) }, 0},
		{"unregistered and registered without", func(t *testing.T, r *Registry) {
			if err := r.Unregister("echo", "a", ""); err != nil {
				t.Fatal(err)
			}
			lend(t, r, "echo", "a", 0)
		}, 0},
		{"renewed without a lease", func(t *testing.T, r *Registry) {
			lend(t, r, "echo", "a", 0)
			if err := r.Renew("echo", "a", ""); err != nil {
				t.Fatal(err)
			}
		}, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New(Config{})
				defer r.Close()
				var e ear
				r.OnChange(e.hear)
				began := time.Now()
				lend(t, r, "echo", "a", ttl)
				lend(t, r, "echo", "b", MaxTTL)
				row.do(t, r)
				e.heard()
				longest := row.lasts
				if row.lasts == 0 {
					longest = MaxTTL - time.Second
				}
				time.Sleep(time.Until(began.Add(longest - time.Millisecond)))
				synctest.Wait()
				if got, heard := ids(r.Snapshot("echo")), e.heard(); !slices.Equal(got, []string{"a", "b"}) || len(heard) > 0 {
					t.Fatalf("after %v: %v, heard %v", time.Since(began), got, heard)
				}
				if row.lasts == 0 {
					return
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if got, heard := ids(r.Snapshot("echo")), e.heard(); !slices.Equal(got, []string{"b"}) || !slices.Equal(heard, []string{"echo"}) {
					t.Errorf("after %v: %v, heard %v", time.Since(began), got, heard)
				}
				if err := r.Renew("echo", "a", ""); !errors.Is(err, ErrNotFound) {
					t.Errorf("renewed all the same: %v", err)
				}
				if got := r.Expired(); len(got) != 1 || got[0].Service != "echo" || got[0].ID != "a" || got[0].Addr != "http://10.0.0.1" {
					t.Errorf("expired: %+v", got)
				}
				lend(t, r, "echo", "a", ttl)
				if got := r.Expired(); len(got) != 0 {
					t.Errorf("expired, though registered again: %+v", got)
				}
			})
		})
	}
}

// The last instance takes its service along.
func TestExpiredService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{})
		lend(t, r, "echo", "a", MinTTL)
		lend(t, r, "users", "a", 3*MinTTL)
		time.Sleep(MinTTL + time.Second)
		synctest.Wait()
		if got := r.Names(); !slices.Equal(got, []string{"users"}) {
			t.Errorf("services %v", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait() // and the watch has ended: synctest waits for all goroutines
		if n, watching := r.lent(); n != 0 || watching {
			t.Errorf("%d leases, watched: %v", n, watching)
		}
	})
}

// After a pause of the process each lease has its whole time again: nobody could renew.
func TestLeasesAfterAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{})
		defer r.Close()
		pause := 10 * time.Second
		r.OnChange(func(s string) {
			if s == "first" && r.Snapshot(s) == nil {
				time.Sleep(pause) // the watch calls this
			}
		})
		lend(t, r, "first", "a", MinTTL)
		lend(t, r, "echo", "a", 5*time.Second) // would end in the pause
		lend(t, r, "echo", "b", 12*time.Second)
		time.Sleep(MinTTL + leaseTick + pause + leaseTick)
		synctest.Wait()
		resumed := time.Now()
		time.Sleep(5*time.Second - 3*leaseTick)
		synctest.Wait()
		if got := ids(r.Snapshot("echo")); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("%v after the pause: %v", time.Since(resumed), got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := ids(r.Snapshot("echo")); !slices.Equal(got, []string{"b"}) {
			t.Errorf("%v after the pause: %v", time.Since(resumed), got)
		}
		time.Sleep(7 * time.Second)
		synctest.Wait()
		if got := ids(r.Snapshot("echo")); got != nil {
			t.Errorf("%v after the pause: %v", time.Since(resumed), got)
		}
	})
}

// More than fit into one turn expire together, each service is heard of, and the list of the expired is bounded in size and time.
func TestManyExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{})
		const n = keptExpired + 2*expireTurn
		for i := range n {
			lend(t, r, fmt.Sprint("s", i/3), fmt.Sprint(i), 2*time.Second) // too few of each to be missed
		}
		var e ear
		r.OnChange(e.hear)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		heard := e.heard()
		if slices.Sort(heard); len(r.Names()) != 0 || len(slices.Compact(heard)) != (n+2)/3 {
			t.Errorf("left: %v, heard of: %v", r.Names(), heard)
		}
		if got := len(r.Expired()); got != keptExpired {
			t.Errorf("%d are listed", got)
		}
		time.Sleep(expiredFor)
		if got := len(r.Expired()); got != 0 {
			t.Errorf("%d are listed yet", got)
		}
	})
}

// Random registrations, renewals and unregistrations beside a model of what must be there.
func TestLeasesAgainstAModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{})
		defer r.Close()
		type entry struct {
			ttl   time.Duration
			until time.Time
		}
		model := map[string]entry{}
		rng := rand.New(rand.NewPCG(1, 2))
		for range 5000 {
			id := fmt.Sprint(rng.IntN(40))
			switch rng.IntN(4) {
			case 0:
				e := entry{ttl: time.Duration(rng.IntN(6)) * time.Second}
				e.until = time.Now().Add(e.ttl)
				lend(t, r, id, "a", e.ttl)
				model[id] = e
			case 1, 2:
				e, known := model[id]
				if err := r.Renew(id, "a", ""); (err == nil) != known {
					t.Fatalf("renewing %s: %v, known: %v", id, err, known)
				}
				if known {
					e.until = time.Now().Add(e.ttl)
					model[id] = e
				}
			case 3:
				_, known := model[id]
				if err := r.Unregister(id, "a", ""); (err == nil) != known {
					t.Fatalf("unregistering %s: %v, known: %v", id, err, known)
				}
				delete(model, id)
			}
			time.Sleep(time.Duration(rng.IntN(4)) * leaseTick)
			synctest.Wait()
			want := []string{}
			lent := 0
			for id, e := range model {
				if e.ttl > 0 && !time.Now().Before(e.until) {
					delete(model, id) // the clock is at a tick: it is gone at once
					continue
				}
				want = append(want, id)
				if e.ttl > 0 {
					lent++
				}
			}
			slices.Sort(want)
			if got := r.Names(); !slices.Equal(got, want) {
				t.Fatalf("got %v, want %v", got, want)
			}
			if n, _ := r.lent(); n != lent {
				t.Fatalf("%d leases for %d", n, lent)
			}
		}
	})
}

// Renewals that race with the end of a lease either keep the instance or say that it is gone.
func TestRenewOrExpire(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	const n = 2000
	for i := range n {
		lend(t, r, fmt.Sprint(i), "a", MinTTL)
	}
	var renewed [n]bool
	var wg sync.WaitGroup
	now := int64(2 * time.Second) // of the registry's clock; the watch itself finds nothing due before
	wg.Go(func() {
		for i := range n {
			renewed[i] = r.Snapshot(fmt.Sprint(i)).Instance("a").renewAt(now)
		}
	})
	wg.Go(func() {
		for due := true; due; {
			due, _ = r.expire(now)
		}
	})
	wg.Wait()
	kept := 0
	for i := range n {
		there := r.Snapshot(fmt.Sprint(i)).Instance("a") != nil
		if there && !renewed[i] || !there && renewed[i] {
			t.Errorf("%d: renewed %v, there %v", i, renewed[i], there)
		}
		if there {
			kept++
		}
	}
	t.Logf("%d of %d were renewed in time", kept, n)
}

func (in *Instance) renewAt(now int64) bool { return in != nil && in.lease.renew(now) }

// Nothing is left behind.
func TestLeasesLeaveNothing(t *testing.T) {
	r := New(Config{})
	for i := range 10_000 {
		id := fmt.Sprint(i % 7)
		lend(t, r, "echo", id, time.Hour)
		if err := r.Renew("echo", id, ""); err != nil {
			t.Fatal(err)
		}
		if err := r.Unregister("echo", id, "http://10.0.0.1"); err != nil {
			t.Fatal(err)
		}
	}
	if n, _ := r.lent(); n != 0 || r.Snapshot("echo") != nil || len(r.Names()) != 0 {
		t.Errorf("%d leases, %v", n, r.Names())
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, watching := r.lent(); !watching {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it is watched yet")
		}
	}
	r.watchers.Wait()
}

// lent is how many leases there are, and whether they are watched.
func (r *Registry) lent() (n int, watching bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.leases), r.watching
}

// Who stops late does not take its successor along.
func TestUnregisterByAddr(t *testing.T) {
	r := New(Config{})
	register(t, r, "echo", "a", "http://10.0.0.1:8080", 0)
	register(t, r, "echo", "a", "http://10.0.0.2:80", 0)
	if err := r.Unregister("echo", "a", "http://10.0.0.1:8080"); !errors.Is(err, ErrConflict) {
		t.Errorf("the predecessor: %v", err)
	}
	var bad *FieldError
	if err := r.Unregister("echo", "a", "10.0.0.2"); !errors.As(err, &bad) || bad.Field != "addr" {
		t.Errorf("an addr that is none: %v", err)
	}
	if got := ids(r.Snapshot("echo")); !slices.Equal(got, []string{"a"}) {
		t.Fatal(got)
	}
	if err := r.Unregister("echo", "a", "http://10.0.0.2"); err != nil { // the same, written in another way
		t.Error(err)
	}
}

// Where more than half of a service fall silent at once, those that accept connections stay, and are marked.
func TestTooManyFallSilent(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	alive, dead := "http://"+ln.Addr().String(), "http://"+closed.Addr().String()
	for _, row := range []struct {
		name   string
		addrs  []string // of the silent ones
		others int      // that renew
		left   int      // of the silent ones
		answer bool     // all requests are answered well
	}{
		{"more than half", []string{alive, alive, alive}, 2, 3, false},
		{"and one of them is dead", []string{alive, dead, alive}, 2, 2, false},
		{"all", []string{alive, alive, alive, alive}, 0, 4, false},
		{"all accept nothing more, and answer", []string{dead, dead, dead, dead}, 0, 4, true},
		{"all are dead", []string{dead, dead, dead, dead}, 0, 0, false},
		{"half", []string{alive, alive}, 2, 0, false},
		{"of three", []string{alive, alive, alive}, 0, 0, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := New(Config{})
			defer r.Close()
			var u underWay
			r.Observe(u.of)
			const ttl = MinTTL
			for i, addr := range row.addrs {
				if err := r.Register("echo", Instance{ID: fmt.Sprint("silent-", i), Addr: addr, TTL: ttl}); err != nil {
					t.Fatal(err)
				}
			}
			for i := range row.others {
				lend(t, r, "echo", fmt.Sprint(i), ttl)
			}
			counts := func() (silent, stale int) {
				s := r.Snapshot("echo")
				for i := range row.addrs {
					if in := s.Instance(fmt.Sprint("silent-", i)); in != nil {
						silent++
						if in.stale {
							stale++
						}
					}
				}
				return silent, stale
			}
			for began := time.Now(); time.Since(began) < 4*ttl; time.Sleep(ttl / 5) {
				if row.answer {
					u.succeeded.Add(1)
				}
				for i := range row.others {
					if err := r.Renew("echo", fmt.Sprint(i), ""); err != nil {
						t.Fatal(err)
					}
				}
			}
			if silent, stale := counts(); silent != row.left || stale != row.left {
				t.Errorf("%d are left, %d of them stale; want %d", silent, stale, row.left)
			}
			for i := range row.addrs {
				_ = r.Renew("echo", fmt.Sprint("silent-", i), "")
			}
			if row.answer { // until they do not
				eventually(t, "they have expired", func() bool { return r.Snapshot("echo") == nil })
				return
			}
			if silent, stale := counts(); silent != row.left || stale != 0 {
				t.Errorf("%d are left, %d of them stale though they were heard of", silent, stale)
			}
		})
	}
}

// A probe whose turn comes later than the end of the lease, as where a whole network is silent, counts all the same.
func TestLateProbeOfTheSilent(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	for range mostProbes {
		r.probes[0] <- struct{}{} // all turns are taken
	}
	for i := range fewest {
		if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1", TTL: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	for hours := range 3 {
		for due := true; due; {
			due, _ = r.expire(int64(time.Duration(hours+1)*time.Hour + time.Minute))
		}
	}
	if s := r.Snapshot("echo"); s.Len() != fewest || !s.Instance("0").stale {
		t.Fatalf("left %v", ids(s))
	}
	if err := r.Renew("echo", "1", ""); err != nil {
		t.Fatal(err)
	}
	for range mostProbes {
		<-r.probes[0]
	}
	eventually(t, "only the one that was heard of is left", func() bool { return slices.Equal(ids(r.Snapshot("echo")), []string{"1"}) })
}

// Requests that were answered before the lease was last renewed are no sign of life.
func TestTrafficOfLongAgo(t *testing.T) {
	for _, row := range []struct {
		name string
		do   func(r *Registry, id string) error // within the lease
	}{
		{"renewed", func(r *Registry, id string) error { return r.Renew("echo", id, "") }},
		{"registered again", func(r *Registry, id string) error {
			return r.Register("echo", Instance{ID: id, Addr: "http://127.0.0.1:1", TTL: time.Hour})
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := New(Config{})
			defer r.Close()
			u := &underWay{}
			r.Observe(u.of)
			for i := range fewest {
				if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1", TTL: time.Hour}); err != nil {
					t.Fatal(err)
				}
			}
			var began int64 // when the lease ends that began last
			for _, l := range r.leases {
				began = max(began, l.due)
			}
			u.succeeded.Store(100)
			for i := range fewest {
				if err := row.do(r, fmt.Sprint(i)); err != nil {
					t.Fatal(err)
				}
			}
			r.expire(began)
			if s := r.Snapshot("echo"); s.Len() != fewest || s.Instance("0").stale {
				t.Fatalf("left %v", ids(s))
			}
			r.expire(int64(time.Hour + time.Minute))
			eventually(t, "they are gone", func() bool { return r.Snapshot("echo") == nil })
		})
	}
}

// However many are silent, who was unregistered or drained does not come back.
func TestStaleLeaveForGood(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r := New(Config{})
	defer r.Close()
	for i := range fewest {
		if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://" + ln.Addr().String(), TTL: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	r.expire(int64(time.Hour + time.Minute))
	if s := r.Snapshot("echo"); s.Len() != fewest || !s.Instance("0").stale || !s.Instance("1").stale {
		t.Fatalf("left %v", ids(s))
	}
	if err := r.Unregister("echo", "0", ""); err != nil {
		t.Error(err)
	}
	if _, _, err := r.Drain("echo", "1", "", time.Minute); err != nil {
		t.Error(err)
	}
	for id := range 2 {
		if err := r.Renew("echo", fmt.Sprint(id), ""); !errors.Is(err, ErrNotFound) {
			t.Errorf("%d was renewed: %v", id, err)
		}
	}
	for hours := range 3 {
		r.expire(int64(time.Duration(hours+2)*time.Hour + 2*time.Minute))
	}
	if got := ids(r.Snapshot("echo")); !slices.Equal(got, []string{"2", "3"}) {
		t.Errorf("left %v", got)
	}
}
