package lb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"testing"
)

// testEndpoints are n endpoints, sorted by id.
func testEndpoints(n int, weight func(i int) int) []Endpoint {
	endpoints := make([]Endpoint, n)
	for i := range endpoints {
		endpoints[i] = Endpoint{fmt.Sprintf("inst-%06d", i), weight(i)}
	}
	return endpoints
}

func mixedWeights(seed uint64, most int) func(int) int {
	r := rand.New(rand.NewPCG(seed, 0))
	return func(int) int { return 1 + r.IntN(most) }
}

var sizes = []int{1, 8, 10, 1000, 10_000} // 8: the most that ip-hash has no table for

// clientKeys are 1<<12 keys in no order, as clients come.
func clientKeys() []uint64 {
	keys := make([]uint64, 1<<12)
	for i := range keys {
		keys[i] = Key(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	return keys
}

func BenchmarkPick(b *testing.B) {
	keys := clientKeys()
	for _, s := range Strategies() {
		for _, n := range sizes {
			b.Run(fmt.Sprintf("%s/n=%d", s, n), func(b *testing.B) {
				lb := New(s, testEndpoints(n, mixedWeights(1, 1_000_000)), new(Counter))
				b.ReportAllocs()
				i, sum := 0, 0
				for b.Loop() {
					i++
					sum += lb.Pick(keys[i%len(keys)], nil)
				}
				_ = sum
			})
		}
	}
	for _, n := range sizes {
		b.Run(fmt.Sprintf("%s/small-weights/n=%d", WeightedRoundRobin, n), func(b *testing.B) {
			lb := New(WeightedRoundRobin, testEndpoints(n, mixedWeights(1, 4)), new(Counter))
			b.ReportAllocs()
			for b.Loop() {
				lb.Pick(0, nil)
			}
		})
	}
}

// onlyCounts is a pick that does nothing but take a turn: the addition that no exact turn can do without.
type onlyCounts struct{ counter *Counter }

func (b *onlyCounts) Pick(uint64, *Tried) int { return int(b.counter.next()) }
func (b *onlyCounts) Len() int                { return 0 }

// BenchmarkPickShared picks on all cores at once, beside a bare atomic addition that they share and the same behind a Pick.
func BenchmarkPickShared(b *testing.B) {
	b.Run("atomic-add", func(b *testing.B) {
		var c Counter
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				c.turn.Add(1)
			}
		})
	})
	pick := func(name string, lb Balancer) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var cores atomic.Uint64
			b.RunParallel(func(pb *testing.PB) {
				key := cores.Add(golden)
				for pb.Next() {
					lb.Pick(key, nil)
					key += golden
				}
			})
		})
	}
	pick("atomic-add-in-pick", &onlyCounts{new(Counter)})
	for _, s := range Strategies() {
		for _, n := range sizes {
			pick(fmt.Sprintf("%s/n=%d", s, n), New(s, testEndpoints(n, mixedWeights(1, 1_000_000)), new(Counter)))
		}
	}
	for _, n := range sizes[:4] {
		pick(fmt.Sprintf("%s/small-weights/n=%d", WeightedRoundRobin, n),
			New(WeightedRoundRobin, testEndpoints(n, mixedWeights(1, 4)), new(Counter)))
	}
}

// BenchmarkPickOther is what a retry pays.
func BenchmarkPickOther(b *testing.B) {
	for _, s := range Strategies() {
		for _, n := range sizes[1:] {
			b.Run(fmt.Sprintf("%s/n=%d", s, n), func(b *testing.B) {
				lb := New(s, testEndpoints(n, mixedWeights(1, 1_000_000)), new(Counter))
				b.ReportAllocs()
				var tried Tried
				key := uint64(0)
				for b.Loop() {
					key += golden
					tried.Reset()
					tried.Add(int(key % uint64(n)))
					lb.Pick(key, &tried)
				}
			})
		}
	}
}

var changedSizes = []int{9, 17, 100, 1000, 10_000}

func BenchmarkBuild(b *testing.B) {
	for _, s := range Strategies() {
		for _, n := range changedSizes {
			b.Run(fmt.Sprintf("%s/n=%d", s, n), func(b *testing.B) {
				endpoints := testEndpoints(n, mixedWeights(1, 1_000_000))
				b.ReportAllocs()
				for b.Loop() {
					New(s, endpoints, nil)
				}
			})
		}
	}
	b.Run(fmt.Sprintf("%s/longest-cycle", WeightedRoundRobin), func(b *testing.B) {
		endpoints := testEndpoints(90, func(i int) int { return 1 + i })
		b.ReportAllocs()
		for b.Loop() {
			New(WeightedRoundRobin, endpoints, nil)
		}
	})
}

func BenchmarkDerive(b *testing.B) {
	for _, s := range Strategies() {
		for _, n := range changedSizes {
			all := testEndpoints(n, mixedWeights(1, 1_000_000))
			without := make([]Endpoint, 0, n)
			for i, e := range all {
				if i != n/2 {
					without = append(without, e)
				}
			}
			for _, bench := range []struct {
				name     string
				from, to []Endpoint
			}{{"one-joins", without, all}, {"one-leaves", all, without}} {
				b.Run(fmt.Sprintf("%s/%s/n=%d", s, bench.name, n), func(b *testing.B) {
					prev := New(s, bench.from, nil)
					b.ReportAllocs()
					for b.Loop() {
						Derive(prev, s, bench.to, nil)
					}
				})
			}
		}
	}
}
