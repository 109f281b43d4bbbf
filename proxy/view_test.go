package proxy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"kerberos/registry"
)

// Whatever comes and goes, a view has all instances in order, finds each, and keeps the upstream of one that stays.
func TestViewsOfALargeService(t *testing.T) {
	g := startGateway(t, nil, nil)
	rnd := rand.New(rand.NewPCG(1, 2))
	want := map[string]string{} // id -> addr
	kept := map[string]*upstream{}
	for round := range 60 {
		grow := round%20 < 12
		for range 40 {
			id := fmt.Sprintf("i%04d", rnd.IntN(1500))
			if grow {
				addr := fmt.Sprintf("http://127.0.0.1:%d", 1+rnd.IntN(2))
				g.register(t, "echo", id, addr)
				if want[id] != addr {
					delete(kept, id)
				}
				want[id] = addr
			} else if want[id] != "" {
				g.unregister(t, "echo", id)
				delete(want, id)
				delete(kept, id)
			}
		}
		v := g.service("echo").view.Load()
		all := slices.Collect(v.all)
		ids := slices.Sorted(maps.Keys(want))
		if len(all) != len(ids) || v.ready != len(ids) || v.balancer.Len() != len(ids) {
			t.Fatalf("round %d: %d upstreams, %d ready, %d in the balancer, want %d", round, len(all), v.ready, v.balancer.Len(), len(ids))
		}
		for i, id := range ids {
			u := all[i]
			if u.id != id || u.instance.Load().Addr != want[id] || v.at(i) != u || v.find(u) != i || v.upstream(id) != u {
				t.Fatalf("round %d: upstream %d is %s, at gives %s, find %d; want %s", round, i, u.id, v.at(i).id, v.find(u), id)
			}
			if old := kept[id]; old != nil && old != u || u.closed.Load() {
				t.Fatalf("round %d: %s has another upstream, or a closed one", round, id)
			}
			kept[id] = u
		}
		if v.upstream("") != nil || v.upstream("j") != nil || v.upstream("i0000x") != nil {
			t.Fatal("an instance that nobody registered was found")
		}
	}
}

// All of them may change at once.
func TestAllOfALargeServiceChange(t *testing.T) {
	g := startGateway(t, nil, nil)
	const n = 500
	for i := range n {
		g.register(t, "echo", fmt.Sprint(i), "http://127.0.0.1:1")
	}
	for u := range g.service("echo").view.Load().all {
		for range 5 {
			token, _ := u.gate.Allow()
			u.gate.Failure(token, nil)
		}
	}
	eventually(t, "none is ready", func() bool { return g.service("echo").view.Load().ready == 0 })
}

// What is no longer ready leaves the view although nothing was registered, and comes back.
func TestReadinessInALargeService(t *testing.T) {
	g := startGateway(t, nil, nil)
	const n = 500
	for i := range n {
		g.register(t, "echo", fmt.Sprint(i), "http://127.0.0.1:1")
	}
	u := g.service("echo").view.Load().upstream("250")
	for range 5 { // a breaker opens
		token, ok := u.gate.Allow()
		if !ok {
			t.Fatal("not admitted")
		}
		u.gate.Failure(token, nil)
	}
	eventually(t, "one less is ready", func() bool {
		v := g.service("echo").view.Load()
		return v.ready == n-1 && v.find(u) == -1
	})
	for i := range n - 1 {
		if g.service("echo").view.Load().at(i) == u {
			t.Error("it can still be picked")
		}
	}
	g.register(t, "echo", "250", "http://127.0.0.1:2") // another process in its place
	eventually(t, "all are ready", func() bool { return g.service("echo").view.Load().ready == n })
}

func BenchmarkAt(b *testing.B) {
	for _, n := range []int{1, 100, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			reg := registry.New(registry.Config{})
			for i := range n {
				if err := reg.Register("echo", registry.Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1"}); err != nil {
					b.Fatal(err)
				}
			}
			p, err := New(Config{Registry: reg}, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(p.Close)
			v := p.service("echo").view.Load()
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				if v.at(i) == nil {
					b.Fatal("none")
				}
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}

// What happens to an instance that has just left does not hide what happens to the one that came in its place.
func TestSuccessorTouchedBeforeItsPredecessor(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.register(t, "echo", "a", "http://127.0.0.1:1")
	s := g.service("echo")
	before := s.view.Load().upstream("a")
	g.register(t, "echo", "a", "http://127.0.0.1:2")
	now := s.view.Load().upstream("a")
	s.touched.Store(true) // nobody builds yet
	for range 5 {
		token, _ := now.gate.Allow()
		now.gate.Failure(token, nil)
	}
	s.touch(before) // its name was being looked up
	s.touched.Store(false)
	s.refresh()
	if v := s.view.Load(); v.ready != 0 {
		t.Errorf("%d are ready with breaker %s", v.ready, now.gate.State())
	}
}
