package lb

import (
	"math/bits"
	"math/rand/v2"
)

// weightedRandom takes an endpoint with the likelihood of its weight, in constant time: as many columns as endpoints, all
// equally likely, each shared by its own endpoint and one other, its alias. Source: Vose, "A Linear Algorithm for
// Generating Random Numbers with a Given Distribution", 1991. The table is made of integers and exact to 2^-64 of a column.
type weightedRandom struct {
	endpoints []Endpoint
	columns   []column
}

type column struct {
	own   uint64 // how much of the column is its own endpoint's, of 2^64
	alias uint32 // whose the rest is
}

func newWeightedRandom(endpoints []Endpoint) *weightedRandom {
	// A column holds the sum of all weights and an endpoint brings n times its weight, so n columns hold exactly all of it.
	n, total := uint64(len(endpoints)), totalWeight(endpoints)
	columns := make([]column, n)
	rest := make([]uint64, n)
	stack := make([]uint32, n) // the columns not full yet from the front, those that overflow from the back
	small, large := 0, len(stack)
	for i, e := range endpoints {
		rest[i] = n * weight(e)
		if rest[i] < total {
			stack[small] = uint32(i)
			small++
		} else {
			large--
			stack[large] = uint32(i)
		}
	}
	for small > 0 { // as long as one is not full, another overflows: together they are full
		small--
		s, l := stack[small], stack[large]
		own, _ := bits.Div64(rest[s], 0, total)
		columns[s] = column{own, l}
		if rest[l] -= total - rest[s]; rest[l] < total {
			large++
			stack[small] = l
			small++
		}
	}
	for _, i := range stack[large:] {
		columns[i] = column{^uint64(0), i}
	}
	return &weightedRandom{endpoints, columns}
}

func (b *weightedRandom) Len() int { return len(b.endpoints) }

func (b *weightedRandom) Pick(_ uint64, tried *Tried) int {
	if tried.Len() != 0 {
		return b.pickOther(tried)
	}
	if len(b.columns) == 0 {
		return -1
	}
	return b.draw()
}

func (b *weightedRandom) draw() int {
	own, level := bits.Mul64(rand.Uint64(), uint64(len(b.columns)))
	c := &b.columns[own]
	alias := uint64(c.alias)
	_, below := bits.Sub64(level, c.own, 0) // whose it is cannot be foretold, so no branch: that costs twice as much
	return int(alias ^ (alias^own)&-below)
}

// pickOther draws again where it drew a tried one, which leaves the others' likelihoods in proportion. Where the tried
// ones have nearly all of the weight, it ends with one draw among the others alone.
func (b *weightedRandom) pickOther(tried *Tried) int {
	if tried.left(len(b.endpoints)) == 0 {
		return -1
	}
	for range 8 {
		if i := b.draw(); !tried.Has(i) {
			return i
		}
	}
	return weighOthers(b.endpoints, tried, rand.Uint64())
}

// maxWeight keeps n times a weight and the sum of n weights within 63 bits for any n below 2^32.
const maxWeight = 1 << 31

func weight(e Endpoint) uint64 { return uint64(min(e.Weight, maxWeight)) }

func totalWeight(endpoints []Endpoint) uint64 {
	var sum uint64
	for _, e := range endpoints {
		sum += weight(e)
	}
	return sum
}

// weighOthers returns the endpoint at point (a fraction of 2^64) of the weights of those that were not tried, laid end to
// end. There must be one. It looks at all endpoints: for the rare pick that nothing cheaper has answered.
func weighOthers(endpoints []Endpoint, tried *Tried, point uint64) int {
	var sum uint64
	for i, e := range endpoints {
		if !tried.Has(i) {
			sum += weight(e)
		}
	}
	at, _ := bits.Mul64(point, sum) // below sum, so the loop ends within the slice
	for i, e := range endpoints {
		if tried.Has(i) {
			continue
		}
		if at < weight(e) {
			return i
		}
		at -= weight(e)
	}
	return -1
}
