package lb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestParseStrategy(t *testing.T) {
	for _, s := range Strategies() {
		if got, err := ParseStrategy(string(s)); got != s || err != nil {
			t.Errorf("ParseStrategy(%q) = %q, %v", s, got, err)
		}
	}
	for _, name := range []string{"", "Random", "round_robin", "least-conn"} {
		_, err := ParseStrategy(name)
		if err == nil {
			t.Errorf("ParseStrategy(%q): no error", name)
			continue
		}
		for _, s := range Strategies() {
			if !strings.Contains(err.Error(), string(s)) {
				t.Errorf("ParseStrategy(%q): %v does not name %s", name, err, s)
			}
		}
	}
}

func TestUnweighted(t *testing.T) {
	want := map[Strategy]Strategy{
		RoundRobin: RoundRobin, Random: Random, WeightedRoundRobin: RoundRobin, WeightedRandom: Random, IPHash: IPHash,
	}
	for _, s := range Strategies() {
		if s.Unweighted() != want[s] || s.Weighted() != (want[s] != s) {
			t.Errorf("%s: Unweighted %s, Weighted %v", s, s.Unweighted(), s.Weighted())
		}
		if with := s.WithWeights(); s != IPHash && (!with.Weighted() || with.Unweighted() != s.Unweighted()) || s == IPHash && with != s {
			t.Errorf("%s: WithWeights %s", s, with)
		}
	}
}

func TestNew(t *testing.T) {
	for _, weights := range [][]int{{0, 1, 2}, {3, -1, 2}} {
		endpoints := testEndpoints(3, func(i int) int { return weights[i] })
		for _, s := range []Strategy{WeightedRoundRobin, WeightedRandom} {
			got, want := New(s, endpoints, nil), New(s.Unweighted(), endpoints, nil)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s with weights %v is %#v, want %#v", s, weights, got, want)
			}
		}
	}
	if _, ok := New("", nil, nil).(*roundRobin); !ok {
		t.Error("the empty strategy is not round-robin")
	}
	defer func() {
		if recover() == nil {
			t.Error("New took an unknown strategy")
		}
	}()
	New("least-conn", nil, nil)
}

func TestKey(t *testing.T) {
	tests := []struct {
		addr string
		want uint64
	}{
		{"192.0.2.1", 0xde3cbbe5a2240bf0},
		{"::ffff:192.0.2.1", 0xde3cbbe5a2240bf0},
		{"192.0.2.2", 0x566d2f7acfe37ee2},
		{"2001:db8::1", 0x97f11e0685f67ae8},
		{"fe80::1%eth0", 0xea859e9204b3f155},
		{"fe80::1", 0xea859e9204b3f155},
	}
	for _, test := range tests {
		if got := Key(netip.MustParseAddr(test.addr)); got != test.want {
			t.Errorf("Key(%s) = %#x, want %#x", test.addr, got, test.want)
		}
	}
	Key(netip.Addr{}) // has a key as well, whichever
}

// sets are the makes of a balancer that have code of their own.
var sets = []struct {
	strategy Strategy
	n, most  int // endpoints, and their greatest weight
}{
	{RoundRobin, 0, 1}, {RoundRobin, 1, 1}, {RoundRobin, 2, 1}, {RoundRobin, 8, 1}, {RoundRobin, 50, 1},
	{Random, 0, 1}, {Random, 1, 1}, {Random, 2, 1}, {Random, 8, 1}, {Random, 50, 1},
	{WeightedRoundRobin, 0, 1}, {WeightedRoundRobin, 1, 5}, {WeightedRoundRobin, 3, 5}, {WeightedRoundRobin, 8, 100},
	{WeightedRoundRobin, 2, 1_000_000}, {WeightedRoundRobin, 8, 1_000_000}, {WeightedRoundRobin, 50, 1_000_000},
	{WeightedRandom, 0, 1}, {WeightedRandom, 1, 5}, {WeightedRandom, 3, 5}, {WeightedRandom, 8, 1_000_000}, {WeightedRandom, 50, 10},
	{IPHash, 0, 1}, {IPHash, 1, 1}, {IPHash, 2, 1}, {IPHash, 8, 1}, {IPHash, 9, 1}, {IPHash, 50, 1},
}

// TestPickAll picks without end what was not tried, from every set: each endpoint comes once, then -1.
func TestPickAll(t *testing.T) {
	for _, set := range sets {
		b := New(set.strategy, testEndpoints(set.n, mixedWeights(1, set.most)), nil)
		if b.Len() != set.n {
			t.Errorf("%v: Len %d", set, b.Len())
		}
		for _, key := range []uint64{0, ^uint64(0), 1 << 40} {
			var tried Tried
			for range min(set.n, MaxTried) {
				i := b.Pick(key, &tried)
				if i < 0 || i >= set.n || tried.Has(i) {
					t.Fatalf("%v: picked %d with tried %v", set, i, tried)
				}
				tried.Add(i)
			}
			if got := b.Pick(key, &tried); set.n <= MaxTried && got != -1 {
				t.Errorf("%v: picked %d when all were tried", set, got)
			}
			if got := b.Pick(key, nil); (got == -1) != (set.n == 0) {
				t.Errorf("%v: picked %d when none was tried", set, got)
			}
		}
	}
}

// FuzzPick: the index is in range and was not tried; -1 only if all were; whatever the weights and the turn.
func FuzzPick(f *testing.F) {
	f.Add(uint8(0), []byte{1}, []byte{0}, uint64(0), uint64(0))
	f.Add(uint8(2), []byte{5, 1, 1}, []byte{0}, uint64(7), uint64(1))
	f.Add(uint8(2), []byte{255, 0, 1}, []byte{0, 1}, uint64(1<<63), uint64(1))
	f.Add(uint8(3), []byte{255, 1, 1}, []byte{0, 1, 2}, uint64(7), uint64(1))
	f.Add(uint8(4), []byte{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, []byte{0, 4, 9, 200}, ^uint64(0), ^uint64(0))
	f.Fuzz(func(t *testing.T, strategy uint8, weights, used []byte, turn, key uint64) {
		s := Strategies()[int(strategy)%len(Strategies())]
		endpoints := testEndpoints(min(len(weights), 40), func(i int) int { // 0 to over 2 million
			return int(weights[i]) << (weights[i] >> 4)
		})
		var c Counter
		c.turn.Store(turn)
		b := New(s, endpoints, &c)
		var tried Tried
		for _, i := range used {
			tried.Add(int(i)) // also some that there are not
		}
		for range 5 {
			i := b.Pick(key, &tried)
			if i < -1 || i >= len(endpoints) || tried.Has(i) {
				t.Fatalf("%s: picked %d of %d with tried %v", s, i, len(endpoints), tried)
			}
			if i == -1 && tried.left(len(endpoints)) > 0 {
				t.Fatalf("%s: picked none of %d with tried %v", s, len(endpoints), tried)
			}
			key += golden
		}
	})
}

func TestPickDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, set := range sets {
		b := New(set.strategy, testEndpoints(set.n, mixedWeights(1, set.most)), nil)
		var tried Tried
		tried.Add(0)
		key := uint64(0)
		if allocs := testing.AllocsPerRun(100, func() {
			b.Pick(key, nil)
			b.Pick(key, &tried)
			key += golden
		}); allocs != 0 {
			t.Errorf("%v: %v allocations a pick", set, allocs)
		}
	}
	addr := netip.MustParseAddr("2001:db8::1")
	b := New(IPHash, testEndpoints(3, mixedWeights(1, 1)), nil).(*Rendezvous)
	if allocs := testing.AllocsPerRun(100, func() { b.WouldOwn(Key(addr), "inst-000007") }); allocs != 0 {
		t.Errorf("Key and WouldOwn: %v allocations", allocs)
	}
}

// TestPickAtOnce has many goroutines on one balancer, and counts what they got: turns are exact whoever takes them.
func TestPickAtOnce(t *testing.T) {
	const pickers, least = 4, 50_000
	for _, set := range sets {
		if set.n == 0 || set.strategy == Random || set.strategy == WeightedRandom {
			continue
		}
		var c Counter
		c.turn.Store(12345)
		endpoints := testEndpoints(set.n, mixedWeights(1, set.most))
		b := New(set.strategy, endpoints, &c)
		got := make([][]int, pickers)
		each := set.n * (least/set.n + 1)
		var wg sync.WaitGroup
		for p := range got {
			got[p] = make([]int, set.n)
			wg.Go(func() {
				for k := range each {
					got[p][b.Pick(uint64(k)*golden, nil)]++
				}
			})
		}
		wg.Wait()
		sum, want := make([]int, set.n), make([]int, set.n)
		for _, counts := range got {
			for i, k := range counts {
				sum[i] += k
			}
		}
		var alone Counter
		alone.turn.Store(12345)
		b = New(set.strategy, endpoints, &alone)
		for k := range pickers * each {
			want[b.Pick(uint64(k%each)*golden, nil)]++
		}
		if !slices.Equal(sum, want) {
			t.Errorf("%v: at once %v, one by one %v", set, sum, want)
		}
		if set.strategy == RoundRobin && slices.Min(sum) != pickers*each/set.n {
			t.Errorf("%v: %v, want %d each", set, sum, pickers*each/set.n)
		}
	}
}

// same tells whether two balancers are alike inside.
func same(a, b Balancer) bool {
	x, ok := a.(*Rendezvous)
	if !ok {
		return reflect.DeepEqual(a, b)
	}
	y, ok := b.(*Rendezvous)
	return ok && slices.Equal(x.endpoints, y.endpoints) && slices.Equal(x.ids, y.ids) &&
		(x.narrow == nil) == (y.narrow == nil) && (x.narrow == nil || *x.narrow == *y.narrow) &&
		(x.wide == nil) == (y.wide == nil) && (x.wide == nil || *x.wide == *y.wide)
}

// changed is endpoints after one change: id joins, or if it is there, leaves (weight 0) or has that weight.
func changed(endpoints []Endpoint, id string, weight int) []Endpoint {
	i, found := slices.BinarySearchFunc(endpoints, id, func(e Endpoint, id string) int { return strings.Compare(e.ID, id) })
	endpoints = slices.Clone(endpoints)
	switch {
	case found && weight == 0:
		return slices.Delete(endpoints, i, i+1)
	case found:
		endpoints[i].Weight = weight
		return endpoints
	default:
		return slices.Insert(endpoints, i, Endpoint{id, weight})
	}
}

// derived fails if what derives from prev is not what New builds, and returns it.
func derived(t *testing.T, prev Balancer, s Strategy, endpoints []Endpoint, c *Counter) Balancer {
	t.Helper()
	got, want := Derive(prev, s, endpoints, c), New(s, endpoints, c)
	if !same(got, want) {
		t.Fatalf("%s over %d endpoints: derived is not what was built", s, len(endpoints))
	}
	return got
}

func TestDerive(t *testing.T) {
	for _, s := range Strategies() {
		for _, size := range []struct{ n, spread, steps int }{
			{0, 12, 60},   // around nothing and the few that have no table
			{30, 200, 30}, // joins and leaves, where a table shrinks
			{300, 400, 10},
			{3000, 6000, 10},
		} {
			t.Run(fmt.Sprintf("%s/n=%d", s, size.n), func(t *testing.T) {
				if raceEnabled && size.n == 3000 {
					t.Skip("takes long with the race detector, and there is one goroutine")
				}
				r := rand.New(rand.NewPCG(uint64(size.n), 1))
				var c Counter
				endpoints := testEndpoints(size.n, mixedWeights(1, 3))
				b := derived(t, nil, s, endpoints, &c)
				for range size.steps {
					for range 1 + r.IntN(3)*r.IntN(3) { // a few changes that were published together
						endpoints = changed(endpoints, fmt.Sprintf("inst-%06d", r.IntN(size.spread)), r.IntN(4))
					}
					b = derived(t, b, s, endpoints, &c)
				}
				derived(t, b, s, testEndpoints(2*size.n, mixedWeights(2, 3)), &c) // nearly everything at once
				derived(t, b, s, endpoints[:len(endpoints)/2], &c)
				derived(t, b, s, nil, &c)
				for _, other := range Strategies() {
					derived(t, b, other, endpoints, &c)
				}
			})
		}
	}
}

func FuzzDerive(f *testing.F) {
	f.Add(uint8(2), []byte{1, 2, 3, 4, 1, 2})
	f.Add(uint8(4), []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 10, 11, 12, 3, 4, 5})
	f.Fuzz(func(t *testing.T, strategy uint8, changes []byte) {
		s := Strategies()[int(strategy)%len(Strategies())]
		var c Counter
		var endpoints []Endpoint
		b := New(s, nil, &c)
		for _, change := range changes[:min(len(changes), 40)] {
			id := fmt.Sprintf("inst-%02d", change%16)
			weight := int(change / 16)
			endpoints = changed(endpoints, id, weight)
			if weight == 15 {
				continue // published together with the next one
			}
			b = derived(t, b, s, endpoints, &c)
		}
	})
}

// Even is New, for strategies that ask for nothing but the number.
func TestEven(t *testing.T) {
	for _, s := range Strategies() {
		if s.NeedsEndpoints() {
			continue
		}
		for _, n := range []int{0, 1, 7} {
			a, b := New(s, make([]Endpoint, n), new(Counter)), Even(s, n, new(Counter))
			if a.Len() != n || b.Len() != n {
				t.Fatalf("%s: %d and %d endpoints, want %d", s, a.Len(), b.Len(), n)
			}
			if reflect.TypeOf(a) != reflect.TypeOf(b) {
				t.Errorf("%s: %T and %T", s, a, b)
			}
			if i, j := a.Pick(0, nil), b.Pick(0, nil); s == RoundRobin && i != j || n == 0 && j != -1 {
				t.Errorf("%s: of %d, %d and %d", s, n, i, j)
			}
		}
	}
}
