package lb

import (
	"math/bits"

	"github.com/cespare/xxhash/v2"
)

const (
	// slots is how many parts the keys are cut into. A part is the least that can move from one endpoint to another. With n
	// endpoints the standard deviation of a share is 0.71*sqrt(n/slots) of it: 2 % with 100, 6 % with 1,000, 20 % with
	// 10,000. Each endpoint has a share as long as n is not more than a tenth of the slots or so: the chance that one of n
	// has none is n*exp(-1.64*slots/n), 4 in a million with 10,000 and 1 in 100 with 15,000.
	slots    = 1 << slotBits
	slotBits = 17

	// fewEndpoints is up to how many endpoints there is no table of slots. It takes 256 KiB (twice that beyond 65,535
	// endpoints), and a gateway may have a hundred thousand services of one or a few instances. The endpoint past the few has
	// a table built, which takes 3 to 4 ms; each one after it is derived in less than 1 ms.
	fewEndpoints = 8
)

// Rendezvous is the balancer of IPHash: the same key goes to the same endpoint while that is there. When one leaves, only
// its keys move, evenly to all others, and they return when it does. Source: Thaler and Ravishankar, "Using Name-Based
// Mappings to Increase Hit Rates", 1998.
//
// Each endpoint has an order of preference over the slots, made from its id alone, and a slot belongs to the endpoint that
// ranks it first. So who owns a slot depends on the ids in the set, and not on order, history or process. The order is a
// permutation that is computed either way: which rank a slot has, to settle a slot, and which slot has a rank, to let an
// endpoint claim slots beginning with those it is likely to get. That makes a build some ten claims per slot where
// comparing all endpoints in all slots would take n; and as each endpoint has each rank once, shares vary by 0.71 times
// what independent draws would give.
type Rendezvous struct {
	endpoints []Endpoint
	ids       []preference
	narrow    *table[uint16] // who owns each slot, in one of the two; neither with few endpoints
	wide      *table[uint32]
}

func newRendezvous(endpoints []Endpoint) *Rendezvous {
	b := &Rendezvous{endpoints: endpoints, ids: make([]preference, len(endpoints))}
	for i, e := range endpoints {
		b.ids[i] = prefer(e.ID)
	}
	b.build()
	return b
}

func (b *Rendezvous) build() {
	switch n := len(b.ids); {
	case n <= fewEndpoints:
	case fits[uint16](n):
		b.narrow = newTable[uint16](b.ids)
	default:
		b.wide = newTable[uint32](b.ids)
	}
}

func (b *Rendezvous) Len() int { return len(b.endpoints) }

// Pick returns the owner of the key's slot, and with tried ones the endpoint that would be the owner without them.
func (b *Rendezvous) Pick(key uint64, tried *Tried) int {
	slot := uint32(key >> (64 - slotBits))
	switch {
	case tried.Len() != 0:
		return owner(b.ids, slot, tried)
	case b.narrow != nil:
		return int(b.narrow.owner[slot])
	case b.wide != nil:
		return int(b.wide.owner[slot])
	}
	return ownerOfFew(b.ids, slot)
}

// WouldOwn tells whether an endpoint of that id, if it were in the set, would own the key; of one in the set, whether it does.
func (b *Rendezvous) WouldOwn(key uint64, id string) bool {
	i := b.Pick(key, nil)
	if i < 0 {
		return true
	}
	slot := uint32(key >> (64 - slotBits))
	mine, best := prefer(id).of(slot), b.ids[i].of(slot)
	return mine < best || mine == best && id <= b.endpoints[i].ID
}

// derive builds the balancer over endpoints from this one.
func (b *Rendezvous) derive(endpoints []Endpoint) *Rendezvous {
	next := &Rendezvous{endpoints: endpoints, ids: make([]preference, len(endpoints))}
	old := b.endpoints
	moved := make([]int, len(old)) // where each of the old ones is now, or -1
	for i := range moved {
		moved[i] = -1
	}
	var added []int
	i := 0
	for j, e := range endpoints {
		for i < len(old) && old[i].ID != e.ID && old[i].ID < e.ID { // != first: most often it is the very same string
			i++
		}
		if i < len(old) && old[i].ID == e.ID {
			moved[i] = j
			next.ids[j] = b.ids[i]
			i++
		} else {
			added = append(added, j)
			next.ids[j] = prefer(e.ID)
		}
	}

	n := len(endpoints)
	removed := len(old) - (n - len(added))
	switch {
	case removed == 0 && len(added) == 0: // only weights changed
		next.narrow, next.wide = b.narrow, b.wide
	case n <= fewEndpoints:
	case b.narrow != nil && fits[uint16](n) && b.narrow.near(len(old), n, removed, len(added)):
		next.narrow = b.narrow.derive(b.ids, next.ids, moved, added)
	case b.wide != nil && !fits[uint16](n) && b.wide.near(len(old), n, removed, len(added)):
		next.wide = b.wide.derive(b.ids, next.ids, moved, added)
	default:
		next.build()
	}
	return next
}

// preference is the xxhash of an endpoint's id, from which its order of slots is made.
type preference uint64

func prefer(id string) preference { return preference(xxhash.Sum64String(id)) }

// of is how an endpoint ranks a slot: the least of all owns it. It has the rank above, and below it what settles a tie,
// another way in each slot. Two are equal only for ids of equal hash: then the first id owns.
func (p preference) of(slot uint32) uint64 { return p.with(slot, tieOf(slot)) }

func (p preference) with(slot uint32, tie uint64) uint64 {
	return uint64(p.rank(slot))<<(64-slotBits) | (uint64(p)^tie)>>slotBits
}

func tieOf(slot uint32) uint64 { return uint64(slot) * golden }

// rank is a permutation of the slots, chosen by 51 bits of the hash. Each step can be undone: inverse does.
func (p preference) rank(slot uint32) uint32 {
	x := slot ^ uint32(p)%slots
	x = x * p.factor(1) % slots
	x ^= x >> half
	x = x * p.factor(2) % slots
	return x ^ x>>half
}

// factor is odd, so that it has an inverse modulo slots.
func (p preference) factor(i int) uint32 { return uint32(p>>(i*slotBits)) | 1 }

// half of slotBits, rounded up: x ^= x >> half undoes itself.
const half = (slotBits + 1) / 2

// inverse is the permutation the other way, prepared for many ranks.
type inverse struct{ first, second, add uint32 }

func (p preference) inverse() inverse {
	return inverse{inverseOf(p.factor(2)), inverseOf(p.factor(1)), uint32(p) % slots}
}

// slot is the one that has that rank.
func (v inverse) slot(rank uint32) uint32 {
	x := rank ^ rank>>half
	x = x * v.first % slots
	x ^= x >> half
	x = x * v.second % slots
	return x ^ v.add
}

// inverseOf returns the inverse of an odd number modulo 2^32. Modulo 8 each is its own, and each of Newton's steps doubles
// the bits that are right.
func inverseOf(odd uint32) uint32 {
	x := odd
	for range 4 {
		x *= 2 - odd*x
	}
	return x
}

// owner returns the index of the endpoint that owns the slot among those not tried, -1 if there is none.
func owner(ids []preference, slot uint32, tried *Tried) int {
	first, best := -1, ^uint64(0)
	tie := tieOf(slot)
	for i, p := range ids {
		if s := p.with(slot, tie); s < best && !tried.Has(i) {
			first, best = i, s
		}
	}
	return first
}

// ownerOfFew is owner without tried ones and, as compiled, without a branch: among a few, which is the first so far cannot
// be foretold, and a branch for it costs twice as much. Among many it hardly ever changes, and the branch is cheaper.
func ownerOfFew(ids []preference, slot uint32) int {
	first, best := -1, ^uint64(0)
	tie := tieOf(slot)
	for i, p := range ids {
		if s := p.with(slot, tie); s < best {
			first, best = i, s
		}
	}
	return first
}

// index is how a table writes an endpoint. Its greatest value stands for a slot that nobody owns yet.
type index interface{ uint16 | uint32 }

func fits[I index](n int) bool { return uint64(n) <= uint64(^I(0)) }

// table says who owns each slot.
type table[I index] struct {
	owner [slots]I
	// ranked counts the slots by the rank that their owner gives them. Beyond the highest there is, an endpoint that joins
	// has nothing to gain.
	ranked [slots / ranksCounted]int32
}

const ranksCounted = 256 // ranks that are counted as one

// nobody is the owner of an open slot.
func nobody[I index]() I { return ^I(0) }

func newTable[I index](ids []preference) *table[I] {
	t := new(table[I])
	for slot := range t.owner[:] {
		t.owner[slot] = nobody[I]()
	}
	// All claim the slots they rank highest until so few are open that it is quicker to settle those one by one: a claim
	// each for 1/n of the slots leaves 1/e of them open.
	limit := min(claimsToBuild(len(ids))*slots/len(ids), slots)
	for i := range ids {
		t.claim(ids, I(i), uint32(limit))
	}
	for slot, o := range t.owner[:] {
		if o == nobody[I]() {
			t.settle(ids, uint32(slot))
		}
	}
	return t
}

// claimsToBuild is how many claims a slot gets in a build over n endpoints. Settling one that stays open takes n looks, each
// a fraction of a claim.
func claimsToBuild(n int) int { return bits.Len(uint(n / 8)) }

// claim gives endpoint i each slot that it ranks below limit and its owner does not rank lower.
func (t *table[I]) claim(ids []preference, i I, limit uint32) {
	me := ids[i]
	inverse := me.inverse()
	for rank := range limit {
		slot := inverse.slot(rank)
		if o := t.owner[slot]; o != nobody[I]() {
			theirs := ids[o].rank(slot)
			if theirs < rank {
				continue
			}
			if theirs == rank {
				if mine, best := me.of(slot), ids[o].of(slot); mine > best || mine == best && i > o {
					continue
				}
			}
			t.ranked[theirs/ranksCounted]--
		}
		t.owner[slot] = i
		t.ranked[rank/ranksCounted]++
	}
}

// settle gives the slot to its owner among all.
func (t *table[I]) settle(ids []preference, slot uint32) {
	o := owner(ids, slot, nil)
	t.owner[slot] = I(o)
	t.ranked[ids[o].rank(slot)/ranksCounted]++
}

// limit is a rank that no owner gives its slot, nor any higher one.
func (t *table[I]) limit() uint32 {
	i := len(t.ranked)
	for t.ranked[i-1] == 0 {
		i--
	}
	return uint32(i * ranksCounted)
}

// near tells whether deriving costs less than building: settling the slots of those that left looks at all endpoints, and
// each of the new ones claims up to the limit.
func (t *table[I]) near(before, after, removed, added int) bool {
	looks := removed * slots / before * after
	claims := added * int(t.limit())
	return looks/4+claims < claimsToBuild(after)*slots
}

// derive is the table after some endpoints left and some joined. moved has the new index of each old one (-1: it left),
// added those of the new ones.
func (t *table[I]) derive(before, after []preference, moved, added []int) *table[I] {
	next := &table[I]{ranked: t.ranked}
	renumber := make([]I, len(moved))
	for i, j := range moved {
		renumber[i] = I(j) // -1 becomes nobody
	}
	var open []uint32
	for slot, o := range t.owner[:] {
		n := renumber[o]
		next.owner[slot] = n
		if n == nobody[I]() {
			open = append(open, uint32(slot))
			next.ranked[before[o].rank(uint32(slot))/ranksCounted]--
		}
	}
	for _, slot := range open {
		next.settle(after, slot)
	}
	limit := next.limit()
	for _, i := range added {
		next.claim(after, I(i), limit)
	}
	return next
}
