package lb

import (
	"math"
	"math/bits"
	"slices"
)

const (
	// A cycle that is not longer, in turns, of not more endpoints is kept as a table; it costs the writer that builds it.
	maxCycle   = 4096
	maxInCycle = 1000

	maxWalk = 64                 // turns that a pick goes on in search of an endpoint that was not tried
	golden  = 0x9E3779B97F4A7C15 // 2^64 divided by the golden ratio
)

// newWeightedRoundRobin takes the endpoints in turn, each as often as its weight says and as evenly spread as it can. One
// atomic addition gives each pick a turn of its own, and the turn alone says whose it is. With few and small weights
// (divided by their greatest common divisor) that is read from a table of one cycle, else computed.
func newWeightedRoundRobin(endpoints []Endpoint, c *Counter) Balancer {
	if cycle := newCycle(endpoints); cycle != nil {
		return &weightedCycle{len(endpoints), newModulus(len(cycle)), append(cycle, cycle...), c}
	}
	return newWeightedSpread(endpoints, c)
}

// weightedCycle is weighted round-robin from a table, exact over each cycle.
type weightedCycle struct {
	n       int
	length  modulus  // of the cycle
	cycle   []uint16 // twice, for modulus.near
	counter *Counter
}

func (b *weightedCycle) Len() int { return b.n }

// Pick takes the next turn; if its endpoint was tried, the one with the next turn in the table that was not.
func (b *weightedCycle) Pick(_ uint64, tried *Tried) int {
	length, cycle := b.length, b.cycle // before the addition, see roundRobin.Pick
	if len(cycle) == 0 {
		return -1
	}
	at := length.near(b.counter.next())
	if tried.Len() == 0 {
		return int(cycle[at])
	}
	return b.walk(int(at), tried)
}

func (b *weightedCycle) walk(at int, tried *Tried) int {
	if tried.left(b.n) == 0 {
		return -1
	}
	for tried.Has(int(b.cycle[at])) { // each endpoint has a turn, so this ends within one cycle
		if at++; at == len(b.cycle) {
			at = 0
		}
	}
	return int(b.cycle[at])
}

// newCycle lays down one cycle in nginx's order (ngx_http_upstream_round_robin.c): each turn, everybody's current value
// grows by his weight, the greatest (of equals the first) has the turn, and his value falls by the sum of all weights.
// It returns nil if the cycle is longer than a table may be.
//
// Endpoints of equal weight have their turns one after the other, as their values differ only by how often they had one.
// So only the one of each weight whose turn is next is looked at, and a cycle has no more than 90 different weights
// (1+2+...+91 > 4096).
func newCycle(endpoints []Endpoint) []uint16 {
	if len(endpoints) > maxInCycle {
		return nil
	}
	var divisor uint64
	for _, e := range endpoints {
		divisor = gcd(weight(e), divisor)
	}
	var total int
	for _, e := range endpoints {
		if total += int(weight(e) / divisor); total > maxCycle {
			return nil
		}
	}

	type group struct {
		weight, current int // current: of the member that is next
		next            int // position in members
		members         []uint16
	}
	var groups []group
	groupOf := make(map[int]int)
	for i, e := range endpoints {
		w := int(weight(e) / divisor)
		g, ok := groupOf[w]
		if !ok {
			g = len(groups)
			groupOf[w] = g
			groups = append(groups, group{weight: w})
		}
		groups[g].members = append(groups[g].members, uint16(i))
	}

	cycle := make([]uint16, total)
	for turn := range cycle {
		first := 0
		for i := range groups {
			g, f := &groups[i], &groups[first]
			g.current += g.weight
			if g.current > f.current || g.current == f.current && g.members[g.next] < f.members[f.next] {
				first = i
			}
		}
		g := &groups[first]
		cycle[turn] = g.members[g.next]
		if g.next++; g.next == len(g.members) {
			g.next = 0
			g.current -= total // the first member is next again, and has had one turn more
		}
	}
	return cycle
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// weightedSpread is weighted round-robin for any weights, without a table of a whole cycle. The endpoints lie end to end
// on a circle, each as long as its weight. The circle has equal parts, a power of two of them, and each turn goes to the part
// that is about one golden ratio of the circle further, so that a round of turns sees each part once, and turns close in
// time are far apart on the circle. Where in the part is the same for one round, and one golden ratio further in the next.
// That way an endpoint's turns are spread evenly, and after any number of picks, from whichever turn on, it is within a few
// picks of its quota, however long or short it is: the whole parts that it covers are exact after each round and a few
// picks off within one, and the at most two parts that it has a piece of are off by a pick or two. Sources: Knuth, "The Art
// of Computer Programming" vol. 3, 6.4, theorem S; Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods",
// 1992, 3.1 and 5.1.
type weightedSpread struct {
	endpoints []Endpoint
	last      []uint64 // the last point of each endpoint, in 2^-32 of a part
	order     []part   // in the order of turns: successive picks read successive memory
	round     uint8    // 1<<round turns make one
	step      uint64   // parts from one turn's to the next one's
	counter   *Counter
}

// part says who owns it: up to border (of 2^32) one endpoint, beyond it the next. As there are two parts or more for each
// endpoint, few of them have more than two owners: those are crowded, and border is then the last owner.
type part struct{ owner, border uint32 }

const crowded = 1 << 31 // in owner

// at returns the owner at a level of the part, of 2^32. Which side of the border it is on cannot be foretold: no branch.
func (p part) at(level uint64) int {
	_, beyond := bits.Sub64(uint64(p.border), level, 0)
	return int(p.owner) + int(beyond)
}

func newWeightedSpread(endpoints []Endpoint, c *Counter) *weightedSpread {
	n, total := len(endpoints), totalWeight(endpoints)
	round := bits.Len(uint(2*n - 1))
	parts := uint64(1) << round
	b := &weightedSpread{
		endpoints: endpoints,
		last:      make([]uint64, n),
		order:     make([]part, parts),
		round:     uint8(round),
		step:      evenStep(round),
		counter:   c,
	}
	var sum uint64
	for i, e := range endpoints {
		sum += weight(e)
		hi, lo := bits.Mul64(sum, parts<<32)
		end, _ := bits.Div64(hi, lo, total) // with two parts an endpoint, and maxWeight, everyone has 4 points or more
		b.last[i] = end - 1
	}
	owner, back := 0, uint64(inverseOf(uint32(b.step))) // back: turns from one part's to the next part's
	for p := range parts {
		for b.last[owner] < p<<32 {
			owner++
		}
		first := owner
		for b.last[owner] < p<<32|math.MaxUint32 {
			owner++
		}
		turn := p * back % parts
		switch owner - first {
		case 0:
			b.order[turn] = part{uint32(first), math.MaxUint32}
		case 1:
			b.order[turn] = part{uint32(first), uint32(b.last[first])}
		default:
			b.order[turn] = part{uint32(first) | crowded, uint32(owner)}
		}
	}
	return b
}

// evenStep returns an odd number near the golden ratio of 1<<round, whose multiples modulo 1<<round lie nearly as evenly as
// those of the golden ratio itself do. That one has only ones in its continued fraction; here none may be above 4.
func evenStep(round int) uint64 {
	step := uint64(golden)>>(64-round) | 1
	for greatestTerm(1<<round, step) > 4 { // some hundred steps at the most, up to a round of 2^32
		step -= 2
	}
	return step
}

// greatestTerm returns the greatest term of the continued fraction of a/b.
func greatestTerm(a, b uint64) uint64 {
	var greatest uint64
	for b != 0 {
		greatest = max(greatest, a/b)
		a, b = b, a%b
	}
	return greatest
}

func (b *weightedSpread) Len() int { return len(b.endpoints) }

// Pick takes the next turn; if its endpoint was tried, the one with the next turn that was not. Where the tried ones have
// nearly all turns, it looks for one among the others alone.
func (b *weightedSpread) Pick(_ uint64, tried *Tried) int {
	order, round := b.order, b.round&63 // before the addition, see roundRobin.Pick
	turn := b.counter.next()
	p := order[turn&uint64(len(order)-1)]
	if p.owner&crowded == 0 && tried.Len() == 0 {
		return p.at(turn >> round * golden >> 32)
	}
	i := b.at(turn)
	if tried.Has(i) {
		return b.walk(turn, tried)
	}
	return i
}

// level is where in its part a turn falls, of 2^32.
func (b *weightedSpread) level(turn uint64) uint64 { return turn >> (b.round & 63) * golden >> 32 }

// at returns the endpoint whose turn it is.
func (b *weightedSpread) at(turn uint64) int {
	i := turn % uint64(len(b.order))
	p := b.order[i]
	if p.owner&crowded == 0 {
		return p.at(b.level(turn))
	}
	first, last := p.owner&^crowded, p.border
	point := i*b.step%uint64(len(b.order))<<32 | b.level(turn)
	after, _ := slices.BinarySearch(b.last[first:last], point)
	return int(first) + after
}

func (b *weightedSpread) walk(turn uint64, tried *Tried) int {
	if tried.left(len(b.endpoints)) == 0 {
		return -1
	}
	for range maxWalk {
		turn++
		if i := b.at(turn); !tried.Has(i) {
			return i
		}
	}
	return weighOthers(b.endpoints, tried, turn*golden)
}
