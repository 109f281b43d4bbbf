package lb

import "math/bits"

// roundRobin takes the endpoints in turn. One atomic addition gives each pick a turn of its own, so over k*n picks each
// of n endpoints gets exactly k, whoever picks.
type roundRobin struct {
	n       modulus
	counter *Counter
}

func newRoundRobin(n int, c *Counter) *roundRobin { return &roundRobin{newModulus(n), c} }

func (b *roundRobin) Len() int { return int(b.n.n) }

// Pick takes the next turn; if its endpoint was tried, the next one that was not.
func (b *roundRobin) Pick(_ uint64, tried *Tried) int {
	n := b.n // read before the addition: what comes after it waits until it is done, and others wait for the next one
	if n.n == 0 {
		return -1
	}
	i := int(n.of(b.counter.next()))
	if tried.Len() == 0 {
		return i
	}
	return b.walk(i, tried)
}

// walk goes on from i to an endpoint that was not tried, without taking anybody's turn.
func (b *roundRobin) walk(i int, tried *Tried) int {
	n := b.Len()
	if tried.left(n) == 0 {
		return -1
	}
	for tried.Has(i) {
		if i++; i == n {
			i = 0
		}
	}
	return i
}

// modulus divides by a number that is known beforehand: two multiplications instead of a division.
type modulus struct{ n, inv uint64 } // inv: 2^64/n rounded down

func newModulus(n int) modulus {
	if n == 0 {
		return modulus{}
	}
	return modulus{uint64(n), ^uint64(0) / uint64(n)}
}

// of returns x modulo n.
func (m modulus) of(x uint64) uint64 {
	r := m.near(x)
	if r >= m.n {
		r -= m.n
	}
	return r
}

// near returns x modulo n, or n more: the quotient from inv is the true one or one less.
func (m modulus) near(x uint64) uint64 {
	q, _ := bits.Mul64(x, m.inv)
	return x - q*m.n
}
