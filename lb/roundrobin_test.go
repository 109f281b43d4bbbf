package lb

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// picks are the next n of them.
func picks(b Balancer, n int, tried *Tried) []int {
	got := make([]int, n)
	for k := range got {
		got[k] = b.Pick(0, tried)
	}
	return got
}

func triedOf(indices ...int) *Tried {
	var tried Tried
	for _, i := range indices {
		tried.Add(i)
	}
	return &tried
}

func TestRoundRobin(t *testing.T) {
	var c Counter
	b := New(RoundRobin, testEndpoints(3, mixedWeights(1, 9)), &c)
	if got := picks(b, 7, nil); !slices.Equal(got, []int{0, 1, 2, 0, 1, 2, 0}) {
		t.Errorf("picked %v", got)
	}
	// Turns 7, 8, 9 are those of 1, 2, 0: one whose endpoint was tried goes to the next, and no further turn is used.
	if got := picks(b, 3, triedOf(1)); !slices.Equal(got, []int{2, 2, 0}) {
		t.Errorf("picked %v when 1 was tried", got)
	}
	if got := picks(b, 3, triedOf(1, 2)); !slices.Equal(got, []int{0, 0, 0}) {
		t.Errorf("picked %v when 1 and 2 were tried", got)
	}
	if got := c.turn.Load(); got != 13 {
		t.Errorf("13 picks used %d turns", got)
	}
}

// TestRoundRobinGoesOn: a changed set goes on in the cycle. If each one began with its first endpoint, that one would get
// everything where changes come as often as requests.
func TestRoundRobinGoesOn(t *testing.T) {
	for _, s := range []Strategy{RoundRobin, WeightedRoundRobin} {
		for _, most := range []int{1, 1_000_000} {
			var c Counter
			var b Balancer
			counts := make([]int, 4)
			for k := range 4000 {
				b = Derive(b, s, testEndpoints(3+k%2, mixedWeights(1, most)), &c)
				counts[b.Pick(0, nil)]++
			}
			want := make([]float64, 4)
			for _, n := range []int{3, 4} {
				endpoints := testEndpoints(n, mixedWeights(1, most))
				for i, e := range endpoints {
					w, total := 1.0, float64(n)
					if s.Weighted() {
						w, total = float64(e.Weight), float64(totalWeight(endpoints))
					}
					want[i] += 2000 * w / total
				}
			}
			for i := range counts {
				if d := float64(counts[i]) - want[i]; d < -700 || d > 700 {
					t.Errorf("%s, weights up to %d: %v of 4000 picks, want about %.0f", s, most, counts, want)
					break
				}
			}
		}
	}
}

func FuzzModulus(f *testing.F) {
	f.Add(uint64(0), uint32(1))
	f.Add(^uint64(0), uint32(1))
	f.Add(^uint64(0), uint32(3))
	f.Add(^uint64(0), ^uint32(0))
	f.Add(uint64(1)<<63, uint32(1)<<31)
	f.Fuzz(func(t *testing.T, x uint64, n uint32) {
		if n == 0 {
			return
		}
		for _, x := range []uint64{x, x - x%uint64(n), x - x%uint64(n) - 1} {
			if got := newModulus(int(n)).of(x); got != x%uint64(n) {
				t.Errorf("%d modulo %d is %d, want %d", x, n, got, x%uint64(n))
			}
		}
	})
}

func TestModulus(t *testing.T) {
	for range 1_000_000 {
		x, n := rand.Uint64()>>rand.IntN(64), 1+rand.IntN(1<<20)>>rand.IntN(20)
		if got := newModulus(n).of(x); got != x%uint64(n) {
			t.Fatalf("%d modulo %d is %d, want %d", x, n, got, x%uint64(n))
		}
	}
}
