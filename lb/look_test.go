package lb

import (
	"fmt"
	"math"
	"testing"
)

// looked are balancers of all makes, over 0 to many endpoints.
func looked(t *testing.T, try func(t *testing.T, b Balancer)) {
	t.Helper()
	for _, strategy := range Strategies() {
		for _, n := range []int{0, 1, 3, 9, 1500} {
			for _, heaviest := range []int{1, 3, 100_000} {
				t.Run(fmt.Sprintf("%s/%d/%d", strategy, n, heaviest), func(t *testing.T) {
					endpoints := make([]Endpoint, n)
					for i := range endpoints {
						endpoints[i] = Endpoint{ID: fmt.Sprintf("i%04d", i), Weight: 1 + i*7919%heaviest}
					}
					try(t, New(strategy, endpoints, nil))
				})
			}
		}
	}
}

// A fork picks what comes next, also beside tried ones, and the next one who picks gets the same.
func TestFork(t *testing.T) {
	looked(t, func(t *testing.T, b Balancer) {
		switch b.(type) {
		case random, *weightedRandom:
			t.Skip("is drawn")
		}
		for key := range uint64(50) {
			key *= golden
			tried := &Tried{}
			if key%3 == 1 && b.Len() > 0 {
				tried.Add(int(key % uint64(b.Len())))
			}
			ahead := Fork(b)
			Fork(b).Pick(key, tried)
			want := []int{ahead.Pick(key, tried), ahead.Pick(key, nil)}
			if got := []int{b.Pick(key, tried), b.Pick(key, nil)}; got[0] != want[0] || got[1] != want[1] {
				t.Fatalf("the fork picked %v, then %v came", want, got)
			}
		}
	})
}

// Shares are what many picks come to.
func TestSharesOfPicks(t *testing.T) {
	looked(t, func(t *testing.T, b Balancer) {
		shares, sum := Shares(b), 0.0
		for _, share := range shares {
			sum += share
		}
		if len(shares) != b.Len() || b.Len() > 0 && math.Abs(sum-1) > 1e-9 {
			t.Fatalf("%d shares of %d add up to %v", len(shares), b.Len(), sum)
		}
		if b.Len() == 0 || b.Len() > 9 {
			return
		}
		const picks = 100_000
		got := make([]float64, b.Len())
		for key := range uint64(picks) {
			got[b.Pick(key*golden, nil)] += 1.0 / picks
		}
		for i := range got {
			if math.Abs(got[i]-shares[i]) > 0.01 { // six standard deviations of a draw
				t.Errorf("endpoint %d got %.3f of the picks, its share is %.3f", i, got[i], shares[i])
			}
		}
	})
}
