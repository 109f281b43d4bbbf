package lb

import (
	"math/bits"
	"math/rand/v2"
)

// random takes any of its endpoints, all equally likely. Its value is their number. The generator is the runtime's, one
// for each thread: picks share nothing that is written.
type random int

func (b random) Len() int { return int(b) }

func (b random) Pick(_ uint64, tried *Tried) int {
	left := int(b)
	if tried.Len() != 0 {
		left = tried.left(int(b))
	}
	if left == 0 {
		return -1
	}
	hi, _ := bits.Mul64(rand.Uint64(), uint64(left)) // one is more likely than another by less than left in 2^64
	if tried.Len() != 0 {
		return tried.nth(int(hi))
	}
	return int(hi)
}
