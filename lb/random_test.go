package lb

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"testing"
)

// expect fails if a count of total draws is further from its likelihood than chance allows: seven standard deviations, once
// in 10^11 tests.
func expect(t *testing.T, what string, counts []int, likelihood []float64) {
	t.Helper()
	total := 0
	for _, k := range counts {
		total += k
	}
	for i, k := range counts {
		p := likelihood[i]
		if d := math.Abs(float64(k) - p*float64(total)); d > 7*math.Sqrt(float64(total)*p*(1-p))+1 {
			t.Errorf("%s: %d of %d draws for %d, want about %.0f", what, k, total, i, p*float64(total))
		}
	}
}

func draws(b Balancer, n int, tried *Tried) []int {
	counts := make([]int, b.Len())
	for range n {
		counts[b.Pick(0, tried)]++
	}
	return counts
}

func TestRandom(t *testing.T) {
	b := New(Random, testEndpoints(5, mixedWeights(1, 100)), nil)
	expect(t, "none tried", draws(b, 100_000, nil), []float64{.2, .2, .2, .2, .2})
	expect(t, "two tried", draws(b, 100_000, triedOf(0, 3)), []float64{0, 1. / 3, 1. / 3, 0, 1. / 3})
}

func TestWeightedRandom(t *testing.T) {
	of := func(weights ...int) Balancer {
		return New(WeightedRandom, testEndpoints(len(weights), func(i int) int { return weights[i] }), nil)
	}
	expect(t, "5, 3, 2", draws(of(5, 3, 2), 100_000, nil), []float64{.5, .3, .2})
	expect(t, "equal", draws(of(7, 7, 7, 7), 100_000, nil), []float64{.25, .25, .25, .25})
	expect(t, "tried", draws(of(5, 3, 1, 2), 100_000, triedOf(0)), []float64{0, .5, 1. / 6, 1. / 3})
	// All eight draws hit the heavy one, nearly always: the draw among the rest is in proportion too.
	expect(t, "heavy tried", draws(of(1_000_000, 3, 1, 2), 100_000, triedOf(0)), []float64{0, .5, 1. / 6, 1. / 3})
}

// TestAliasTable adds up whose the columns are, which is exactly how likely each endpoint is.
func TestAliasTable(t *testing.T) {
	for _, n := range []int{1, 2, 3, 100, 10_000} {
		for _, shape := range spreads {
			r := rand.New(rand.NewPCG(uint64(n), 3))
			endpoints := testEndpoints(n, func(i int) int { return shape.weight(r, i) })
			b := newWeightedRandom(endpoints)
			got := make([]float64, n) // in columns
			for i, c := range b.columns {
				own := float64(c.own) / (1 << 64)
				got[i] += own
				got[c.alias] += 1 - own
			}
			total := float64(totalWeight(endpoints))
			for i, e := range endpoints {
				want := float64(e.Weight) / total * float64(n)
				if math.Abs(got[i]-want) > 1e-10*float64(n) {
					t.Fatalf("%d endpoints, %s: %d has %g columns, want %g", n, shape.name, i, got[i], want)
				}
			}
		}
	}
}

func FuzzWeighOthers(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint8(1), uint64(0))
	f.Add([]byte{1, 2, 3}, uint8(2), ^uint64(0))
	f.Fuzz(func(t *testing.T, weights []byte, used uint8, point uint64) {
		endpoints := testEndpoints(len(weights), func(i int) int { return 1 + int(weights[i]) })
		tried := triedOf(int(used))
		if tried.left(len(endpoints)) == 0 {
			return
		}
		got := weighOthers(endpoints, tried, point)
		if got < 0 || tried.Has(got) {
			t.Fatalf("%d of weights %v at %d when %d was tried", got, weights, point, used)
		}
		var before, sum uint64
		for i, e := range endpoints {
			if !tried.Has(i) {
				sum += weight(e)
				if i < got {
					before += weight(e)
				}
			}
		}
		at, _ := bits.Mul64(point, sum)
		if at < before || at >= before+weight(endpoints[got]) {
			t.Fatalf("%d of weights %v at %d when %d was tried", got, weights, point, used)
		}
	})
}
