package lb

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// nginxOrder is ngx_http_upstream_get_peer of nginx, written down plainly: each turn looks at all endpoints.
func nginxOrder(weights []int, turns int) []uint16 {
	current := make([]int, len(weights))
	total := 0
	for _, w := range weights {
		total += w
	}
	order := make([]uint16, turns)
	for k := range order {
		best := -1
		for i, w := range weights {
			current[i] += w
			if best < 0 || current[i] > current[best] {
				best = i
			}
		}
		current[best] -= total
		order[k] = uint16(best)
	}
	return order
}

func TestWeightedRoundRobin(t *testing.T) {
	tests := []struct {
		weights []int
		want    string
	}{
		{[]int{5, 1, 1}, "AABACAA"},
		{[]int{50, 10, 10}, "AABACAA"}, // divided by 10
		{[]int{1, 1, 1}, "ABC"},
		{[]int{7, 7}, "AB"},
		{[]int{1, 2}, "BAB"},
		{[]int{4, 3, 2, 1}, "ABCABDACBA"},
		{[]int{9}, "A"},
	}
	for _, test := range tests {
		b := New(WeightedRoundRobin, testEndpoints(len(test.weights), func(i int) int { return test.weights[i] }), nil)
		for cycle := range 3 {
			var got strings.Builder
			for _, i := range picks(b, len(test.want), nil) {
				got.WriteByte('A' + byte(i))
			}
			if got.String() != test.want {
				t.Errorf("weights %v, cycle %d: %s, want %s", test.weights, cycle, got.String(), test.want)
			}
		}
	}
}

func TestCycleIsNginxOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	check := func(weights []int) {
		cycle := newCycle(testEndpoints(len(weights), func(i int) int { return weights[i] }))
		if cycle == nil {
			t.Fatalf("no table for %v", weights)
		}
		if want := nginxOrder(weights, len(cycle)); !slices.Equal(cycle, want) {
			t.Fatalf("weights %v: %v, want %v", weights, cycle, want)
		}
	}
	for range 300 {
		weights := make([]int, 1+r.IntN(40))
		for i := range weights {
			weights[i] = 1 + r.IntN(1+r.IntN(100))
		}
		check(weights)
	}
	longest := make([]int, 90) // 1 to 90 in no order, together 4095
	for i, w := range r.Perm(90) {
		longest[i] = w + 1
	}
	check(longest)
	check(slices.Repeat([]int{4, 5, 3}, 333))
}

func FuzzCycle(f *testing.F) {
	f.Add([]byte{5, 1, 1})
	f.Add([]byte{4, 6, 4, 2, 6})
	f.Fuzz(func(t *testing.T, data []byte) {
		weights := make([]int, 0, len(data))
		total := 0
		for _, w := range data {
			if total += int(w); w > 0 && total <= maxCycle {
				weights = append(weights, int(w))
			}
		}
		cycle := newCycle(testEndpoints(len(weights), func(i int) int { return weights[i] }))
		if want := nginxOrder(weights, len(cycle)); !slices.Equal(cycle, want) {
			t.Fatalf("weights %v: %v, want %v", weights, cycle, want)
		}
		counts := make([]int, len(weights))
		for _, i := range cycle {
			counts[i]++
		}
		for i := range counts {
			if counts[i]*weights[0] != counts[0]*weights[i] {
				t.Fatalf("weights %v: %v turns", weights, counts)
			}
		}
	})
}

// TestCycleLimits: a table for 4,096 turns of 1,000 endpoints and no more.
func TestCycleLimits(t *testing.T) {
	tests := []struct {
		name   string
		n      int
		weight func(i int) int
		want   int // turns in the table
	}{
		{"4096 turns", 2, func(i int) int { return []int{4095, 1}[i] }, 4096},
		{"4097 turns", 2, func(i int) int { return []int{4096, 1}[i] }, 0},
		{"4096 turns times 1000", 2, func(i int) int { return []int{4095000, 1000}[i] }, 4096},
		{"1000 endpoints", 1000, func(int) int { return 1_000_000 }, 1000},
		{"1001 endpoints", 1001, func(int) int { return 1 }, 0},
		{"beyond any weight", 3, func(int) int { return math.MaxInt }, 3},
	}
	for _, test := range tests {
		endpoints := testEndpoints(test.n, test.weight)
		b, isCycle := New(WeightedRoundRobin, endpoints, nil).(*weightedCycle)
		if isCycle != (test.want > 0) || isCycle && int(b.length.n) != test.want {
			t.Errorf("%s: table %v, want one of %d turns", test.name, isCycle, test.want)
		}
	}
}

func TestCycleTried(t *testing.T) {
	var c Counter
	b := New(WeightedRoundRobin, testEndpoints(3, func(i int) int { return []int{5, 1, 1}[i] }), &c) // A A B A C A A
	if got := picks(b, 7, triedOf(0)); !slices.Equal(got, []int{1, 1, 1, 2, 2, 1, 1}) {
		t.Errorf("picked %v when A was tried", got)
	}
	if got := picks(b, 7, triedOf(1, 2)); !slices.Equal(got, []int{0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("picked %v when B and C were tried", got)
	}
	if got := c.turn.Load(); got != 14 {
		t.Errorf("14 picks used %d turns", got)
	}
}

// spreads are weights of every shape.
var spreads = []struct {
	name   string
	weight func(r *rand.Rand, i int) int
}{
	{"any", func(r *rand.Rand, _ int) int { return 1 + r.IntN(1_000_000) }},
	{"any magnitude", func(r *rand.Rand, _ int) int { return int(math.Exp(r.Float64() * math.Log(1_000_000))) }},
	{"one heavy", func(_ *rand.Rand, i int) int { return 1 + max(0, 1-i)*999_999 }}, // 1,000,000/1/1 with three
	{"every other heavy", func(_ *rand.Rand, i int) int { return 1 + i%2*999_999 }},
	{"few heavy", func(r *rand.Rand, i int) int { return 1 + r.IntN(1000) + max(0, 1-i%1000)*900_000 }},
	{"rising", func(_ *rand.Rand, i int) int { return 5000 + i }},
}

// TestSpreadQuota: after any number of picks no endpoint is further from its quota than 8 picks; the promise is 32 picks or
// 1 % of it, whichever is more. An endpoint is furthest below just before a pick of it and furthest above just after, so
// looking there looks at every number of picks.
func TestSpreadQuota(t *testing.T) {
	total := 10_000_000
	if raceEnabled {
		total = 100_000
	}
	for _, n := range []int{3, 100, 10_000} {
		for _, shape := range spreads {
			r := rand.New(rand.NewPCG(uint64(n), 1))
			endpoints := testEndpoints(n, func(i int) int { return shape.weight(r, i) })
			var c Counter
			c.turn.Store(r.Uint64()) // a service that has served long before its weights changed
			b := newWeightedSpread(endpoints, &c)
			weights := float64(totalWeight(endpoints))
			quota := make([]float64, n) // of one pick
			for i, e := range endpoints {
				quota[i] = float64(e.Weight) / weights
			}
			counts := make([]int, n)
			var worst float64
			for k := range total {
				i := b.Pick(0, nil)
				worst = max(worst, float64(k)*quota[i]-float64(counts[i]))
				counts[i]++
				worst = max(worst, float64(counts[i])-float64(k+1)*quota[i])
			}
			for i := range counts {
				worst = max(worst, math.Abs(float64(counts[i])-float64(total)*quota[i]))
			}
			if worst > 8 {
				t.Errorf("%d endpoints, %s: %.1f picks from the quota", n, shape.name, worst)
			}
		}
	}
}

// TestSpreadIsSmooth: an endpoint never waits longer for its turn than three times its fair distance between two turns.
func TestSpreadIsSmooth(t *testing.T) {
	for _, n := range []int{3, 100, 2000} {
		for _, shape := range spreads {
			r := rand.New(rand.NewPCG(uint64(n), 2))
			endpoints := testEndpoints(n, func(i int) int { return shape.weight(r, i) })
			b := newWeightedSpread(endpoints, new(Counter))
			total := float64(totalWeight(endpoints))
			before := make([]int, n)
			var worst float64
			for k := 1; k <= 300_000; k++ {
				i := b.Pick(0, nil)
				if before[i] > 0 {
					worst = max(worst, float64(k-before[i])*float64(endpoints[i].Weight)/total)
				}
				before[i] = k
			}
			if worst > 3 {
				t.Errorf("%d endpoints, %s: waited %.2f times the fair distance", n, shape.name, worst)
			}
		}
	}
}

// FuzzSpread: each endpoint has its part of the circle to a rounding, a turn belongs to who lies there, and picks stay near
// the quota for any weights from any turn on.
func FuzzSpread(f *testing.F) {
	f.Add([]byte{255, 0, 0}, uint64(0))
	f.Add([]byte{1, 2, 3, 200, 100}, uint64(1)<<63)
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255}, ^uint64(0)-500)
	f.Fuzz(func(t *testing.T, data []byte, turn uint64) {
		if len(data) == 0 {
			return
		}
		endpoints := testEndpoints(len(data), func(i int) int { return 1 + int(data[i])<<(data[i]>>3) }) // up to maxWeight and beyond
		b := newWeightedSpread(endpoints, new(Counter))
		b.counter.turn.Store(turn)
		total := totalWeight(endpoints)
		circle := float64(uint64(len(b.order)) << 32)
		from := uint64(0)
		for i, e := range endpoints {
			want := float64(weight(e)) / float64(total) * circle
			if got := float64(b.last[i] + 1 - from); math.Abs(got-want) > 1+want*1e-9 {
				t.Fatalf("weights %v: endpoint %d has %.0f of the circle, want %.0f", endpoints, i, got, want)
			}
			from = b.last[i] + 1
		}
		counts := make([]int, len(endpoints))
		const picks = 2000
		for range picks {
			k := b.counter.turn.Load()
			length := uint64(len(b.order))
			point := k%length*b.step%length<<32 | k/length*golden>>32
			want, _ := slices.BinarySearch(b.last, point)
			got := b.Pick(0, nil)
			if got != want {
				t.Fatalf("weights %v: turn %d is %d's, want %d", endpoints, k, got, want)
			}
			counts[got]++
		}
		for i, e := range endpoints {
			quota := picks * float64(weight(e)) / float64(total)
			if math.Abs(float64(counts[i])-quota) > 16 && turn < math.MaxUint64-picks { // the counter starts over after 2^64
				t.Fatalf("weights %v: %d picks of endpoint %d, quota %.1f", endpoints, counts[i], i, quota)
			}
		}
	})
}

func TestSpreadTried(t *testing.T) {
	var c Counter
	b := New(WeightedRoundRobin, testEndpoints(4, func(i int) int { return []int{1_000_000, 1, 1, 2}[i] }), &c)
	if _, ok := b.(*weightedSpread); !ok {
		t.Fatal("not the make that this is about")
	}
	counts := make([]int, 4)
	for range 4000 {
		counts[b.Pick(0, triedOf(0))]++
	}
	// Hardly ever is one of them within the turns looked at, so it is the weights of the rest that decide.
	for i, want := range []int{0, 1000, 1000, 2000} {
		if d := counts[i] - want; d < -50 || d > 50 {
			t.Errorf("of the light ones %v, want about %d for %d", counts, want, i)
		}
	}
	if got := c.turn.Load(); got != 4000 {
		t.Errorf("4000 picks used %d turns", got)
	}

	b = New(WeightedRoundRobin, testEndpoints(100, mixedWeights(1, 1_000_000)), &c)
	next := New(WeightedRoundRobin, testEndpoints(100, mixedWeights(1, 1_000_000)), new(Counter)).(*weightedSpread)
	for range 1000 {
		turn := c.turn.Load()
		tried := triedOf(next.at(turn), next.at(turn+2))
		want := next.at(turn + 1)
		for k := turn + 1; tried.Has(want); k++ {
			want = next.at(k)
		}
		if got := b.Pick(0, tried); got != want {
			t.Fatalf("turn %d: %d, want %d, the next not in %v", turn, got, want, *tried)
		}
	}
}

// TestWeightsReachTheirEnd: weights that no registry lets through do not overflow.
func TestWeightsReachTheirEnd(t *testing.T) {
	endpoints := testEndpoints(1001, func(i int) int { return math.MaxInt - i%2*(math.MaxInt-1) })
	for _, s := range []Strategy{WeightedRoundRobin, WeightedRandom} {
		b := New(s, endpoints, nil)
		heavy := 0
		for range 10_000 {
			heavy += 1 - b.Pick(0, nil)%2
		}
		if heavy < 9_990 {
			t.Errorf("%s: %d of 10,000 picks", s, heavy)
		}
	}
}

func ExampleNew() {
	b := New(WeightedRoundRobin, []Endpoint{{"a", 5}, {"b", 1}, {"c", 1}}, new(Counter))
	for range 7 {
		fmt.Print(b.Pick(0, nil), " ")
	}
	// Output: 0 0 1 0 2 0 0
}

// TestEvenStep: there is one for every length of a round, and the parts are all seen.
func TestEvenStep(t *testing.T) {
	for round := 2; round <= 32; round++ {
		step := evenStep(round)
		parts := uint64(1) << round
		if step%2 != 1 || step >= parts || greatestTerm(parts, step) > 4 {
			t.Errorf("1<<%d parts: step %d", round, step)
		}
		if back := uint64(inverseOf(uint32(step))); step*back%parts != 1 {
			t.Errorf("1<<%d parts: %d is not the inverse of %d", round, back, step)
		}
	}
}
