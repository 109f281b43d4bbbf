package lb

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// idsLike are n endpoints with ids as people give them, another set for each seed.
var idsLike = []struct {
	name string
	id   func(seed, i int) string
}{
	{"inst", func(seed, i int) string { return fmt.Sprintf("inst-%d", seed*1000+i+1) }},
	{"host", func(seed, i int) string { return fmt.Sprintf("10.%d.%d.%d:8080", seed>>8, seed&255, i) }},
	{"port", func(seed, i int) string { return fmt.Sprintf("web%d.example.com:%d", seed, 8000+i) }},
	{"uuid", func(seed, i int) string {
		r := rand.New(rand.NewPCG(uint64(seed), uint64(i)))
		return fmt.Sprintf("%08x-%04x-4%03x-%04x-%012x", r.Uint32(), r.IntN(1<<16), r.IntN(1<<12), r.IntN(1<<16), r.Uint64N(1<<48))
	}},
}

func endpointsLike(n, seed int, id func(seed, i int) string) []Endpoint {
	endpoints := make([]Endpoint, n)
	for i := range endpoints {
		endpoints[i].ID = id(seed, i)
	}
	slices.SortFunc(endpoints, func(a, b Endpoint) int { return strings.Compare(a.ID, b.ID) })
	return endpoints
}

// keyOf is a key in the middle of a slot.
func keyOf(slot int) uint64 { return uint64(slot)<<(64-slotBits) | 1<<(63-slotBits) }

// owners are the ids that own each slot.
func owners(b *Rendezvous) []string {
	ids := make([]string, slots)
	for slot := range ids {
		ids[slot] = b.endpoints[b.Pick(keyOf(slot), nil)].ID
	}
	return ids
}

// TestMappingStays has the mapping in numbers: another release, another process and another gateway must agree with it.
func TestMappingStays(t *testing.T) {
	clients := []string{"192.0.2.1", "192.0.2.2", "198.51.100.7", "203.0.113.254", "10.0.0.1", "2001:db8::1", "2001:db8::2", "::1"}
	tests := []struct {
		n    int
		want []int // by client
	}{
		{2, []int{0, 1, 0, 0, 0, 1, 0, 0}},
		{3, []int{0, 2, 2, 0, 0, 1, 2, 0}},
		{8, []int{5, 2, 7, 4, 0, 6, 4, 7}},
		{9, []int{5, 2, 7, 4, 0, 6, 4, 7}},
		{100, []int{83, 65, 61, 41, 62, 62, 97, 24}},
		{2000, []int{174, 943, 1977, 1898, 1542, 422, 830, 630}},
	}
	for _, test := range tests {
		b := newRendezvous(testEndpoints(test.n, mixedWeights(1, 9)))
		var got []int
		for _, c := range clients {
			got = append(got, b.Pick(Key(netip.MustParseAddr(c)), nil))
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%d endpoints: %#v, want %#v", test.n, got, test.want)
		}
	}
}

// TestSlotsByRendezvous compares each slot of a table with all endpoints asked one by one: few and many have one mapping,
// and a build that lets endpoints claim slots ends where asking each does.
func TestSlotsByRendezvous(t *testing.T) {
	for _, n := range []int{1, 2, 5, 8, 9, 17, 64, 300, 5000} {
		endpoints := endpointsLike(n, n, idsLike[0].id)
		b := newRendezvous(endpoints)
		step := max(1, n/64) // with many endpoints not all slots
		for slot := 0; slot < slots; slot += step {
			best := 0
			for i := range b.ids {
				if b.ids[i].of(uint32(slot)) < b.ids[best].of(uint32(slot)) {
					best = i
				}
			}
			if got := b.Pick(keyOf(slot), nil); got != best {
				t.Fatalf("%d endpoints: slot %d is %d's, want %d", n, slot, got, best)
			}
		}
	}
}

func FuzzPreference(f *testing.F) {
	f.Add("inst-1", uint32(0))
	f.Add("", uint32(slots-1))
	f.Fuzz(func(t *testing.T, id string, slot uint32) {
		slot %= slots
		p := prefer(id)
		rank := p.rank(slot)
		if rank >= slots || p.inverse().slot(rank) != slot {
			t.Errorf("%q: slot %d has rank %d, which is slot %d's", id, slot, rank, p.inverse().slot(rank))
		}
	})
}

// TestTiesAreEven: where two endpoints rank a slot alike, it is the slot that decides, not one of them that has all such slots.
func TestTiesAreEven(t *testing.T) {
	for i := range 20 {
		p, q := prefer(idsLike[0].id(i, 1)), prefer(idsLike[0].id(i, 2))
		first := 0
		for slot := range uint32(slots) {
			if p.of(slot)<<slotBits < q.of(slot)<<slotBits { // without the rank
				first++
			}
		}
		if first < slots*45/100 || first > slots*55/100 {
			t.Errorf("pair %d: the first has %d of %d ties", i, first, slots)
		}
	}
}

// TestFewHaveNoTable: a hundred thousand services of a few instances must not take a table each.
func TestFewHaveNoTable(t *testing.T) {
	few, many := testEndpoints(fewEndpoints, mixedWeights(1, 9)), testEndpoints(fewEndpoints+1, mixedWeights(1, 9))
	b := newRendezvous(many)
	if b.narrow == nil || b.wide != nil {
		t.Errorf("%d endpoints have no table of 16 bits", len(many))
	}
	for _, b := range []*Rendezvous{newRendezvous(few), b.derive(few)} {
		if b.narrow != nil || b.wide != nil {
			t.Errorf("%d endpoints have a table", len(few))
		}
	}
}

// TestNear: a change of one endpoint is derived, a new set is built.
func TestNear(t *testing.T) {
	for _, n := range []int{20, 100, 1000, 10_000} {
		b := newRendezvous(testEndpoints(n, mixedWeights(1, 9)))
		if !b.narrow.near(n, n-1, 1, 0) || !b.narrow.near(n, n+1, 0, 1) {
			t.Errorf("%d endpoints: a change of one is built", n)
		}
		if b.narrow.near(n, n, n, n) || b.narrow.near(n, 20*n, 0, 19*n) {
			t.Errorf("%d endpoints: a new set is derived", n)
		}
	}
}

// TestShares: with up to 100 endpoints no share is further than 15 % from even, whatever the ids look like.
func TestShares(t *testing.T) {
	seeds, some := 3, 1
	if raceEnabled {
		seeds, some = 1, 7
	}
	for _, like := range idsLike {
		for seed := range seeds {
			for n := 2; n <= 100; n += some {
				if n > 10 && n < 95 && (n+seed)%5 != 0 {
					continue
				}
				b := newRendezvous(endpointsLike(n, seed*100+n, like.id))
				counts := make([]int, n)
				for slot := range slots {
					counts[b.Pick(keyOf(slot), nil)]++
				}
				even := float64(slots) / float64(n)
				if least, most := float64(slices.Min(counts))/even, float64(slices.Max(counts))/even; least < .85 || most > 1.15 {
					t.Errorf("%d ids like %s: shares from %.3f to %.3f of even", n, b.endpoints[0].ID, least, most)
				}
			}
		}
	}
}

// TestSharesOfMany: what the comment of slots says of more than 100 endpoints.
func TestSharesOfMany(t *testing.T) {
	for _, like := range idsLike {
		for _, n := range []int{100, 1000, 10_000} {
			b := newRendezvous(endpointsLike(n, 5, func(seed, i int) string { return like.id(seed+i/250, i%250) }))
			counts := make([]int, n)
			for slot := range slots {
				counts[b.Pick(keyOf(slot), nil)]++
			}
			even := float64(slots) / float64(n)
			var squares float64
			for _, k := range counts {
				squares += (float64(k)/even - 1) * (float64(k)/even - 1)
			}
			deviation, want := math.Sqrt(squares/float64(n)), .71*math.Sqrt(float64(n)/slots)
			if deviation < .7*want || deviation > 1.35*want {
				t.Errorf("%d ids like %s: standard deviation %.4f, want about %.4f", n, b.endpoints[0].ID, deviation, want)
			}
			if slices.Min(counts) == 0 {
				t.Errorf("%d ids like %s: one has no share", n, b.endpoints[0].ID)
			}
		}
	}
}

// TestSharesOfClients: real addresses, one after the other as networks have them, spread over the slots.
func TestSharesOfClients(t *testing.T) {
	b := newRendezvous(testEndpoints(10, mixedWeights(1, 9)))
	v4, v6 := make([]int, 10), make([]int, 10)
	for i := range 100_000 {
		v4[b.Pick(Key(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})), nil)]++
		v6[b.Pick(Key(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, byte(i >> 16), byte(i >> 8), byte(i), 15: 1})), nil)]++
	}
	for _, counts := range [][]int{v4, v6} {
		if slices.Min(counts) < 9_400 || slices.Max(counts) > 10_600 {
			t.Errorf("100,000 clients over ten endpoints: %v", counts)
		}
	}
}

// TestOnlyItsKeysMove: when an endpoint leaves, its slots go to others, evenly, and no other slot moves; when it returns so
// do they.
func TestOnlyItsKeysMove(t *testing.T) {
	for _, n := range []int{2, 3, 8, 9, 10, 60} {
		endpoints := endpointsLike(n, n, idsLike[1].id)
		b := newRendezvous(endpoints)
		all := owners(b)
		for gone := 0; gone < n; gone += 1 + n/10 {
			id := endpoints[gone].ID
			rest := b.derive(changed(endpoints, id, 0))
			heirs := make(map[string]int)
			for slot, now := range owners(rest) {
				if all[slot] == id {
					heirs[now]++
				} else if now != all[slot] {
					t.Fatalf("%d endpoints: slot %d moved from %s to %s as %s left", n, slot, all[slot], now, id)
				}
			}
			even := float64(slots) / float64(n) / float64(n-1)
			for _, e := range rest.endpoints {
				if d := math.Abs(float64(heirs[e.ID]) - even); d > 6*math.Sqrt(even)+.03*even {
					t.Errorf("%d endpoints: %s got %d slots of %s, want about %.0f", n, e.ID, heirs[e.ID], id, even)
				}
			}
			if !slices.Equal(owners(rest.derive(endpoints)), all) {
				t.Fatalf("%d endpoints: not everything returned with %s", n, id)
			}
		}
	}
}

// FuzzOnlyItsKeysMove: the same for any ids, key by key.
func FuzzOnlyItsKeysMove(f *testing.F) {
	f.Add("a b c", uint64(0), uint8(1))
	f.Add("1 2 3 4 5 6 7 8 9 10 11", ^uint64(0), uint8(3))
	f.Fuzz(func(t *testing.T, words string, key uint64, which uint8) {
		var endpoints []Endpoint
		for _, id := range strings.Fields(words) {
			if len(endpoints) < 12 {
				endpoints = append(endpoints, Endpoint{ID: id})
			}
		}
		slices.SortFunc(endpoints, func(a, b Endpoint) int { return strings.Compare(a.ID, b.ID) })
		endpoints = slices.Compact(endpoints)
		if len(endpoints) == 0 {
			return
		}
		id := endpoints[int(which)%len(endpoints)].ID
		all, rest := newRendezvous(endpoints), newRendezvous(changed(endpoints, id, 0))
		owner := all.endpoints[all.Pick(key, nil)].ID
		if !all.WouldOwn(key, owner) || rest.WouldOwn(key, id) != (owner == id) {
			t.Fatalf("WouldOwn is wrong: %q of %v, who own %s", id, endpoints, owner)
		}
		var tried Tried
		tried.Add(int(which) % len(endpoints))
		other, without := all.Pick(key, &tried), rest.Pick(key, nil)
		if other == -1 {
			if len(endpoints) != 1 {
				t.Fatalf("nobody of %v has the key without %s", endpoints, id)
			}
			return
		}
		if all.endpoints[other].ID != rest.endpoints[without].ID {
			t.Fatalf("tried and gone differ: %s and %s", all.endpoints[other].ID, rest.endpoints[without].ID)
		}
		if owner != id && rest.endpoints[without].ID != owner {
			t.Fatalf("the key moved from %s to %s as %s left", owner, rest.endpoints[without].ID, id)
		}
	})
}

// TestTriedAsIfGone: with tried ones the pick is that of a set without them, however many endpoints.
func TestTriedAsIfGone(t *testing.T) {
	for _, n := range []int{3, 8, 9, 12, 200} {
		endpoints := endpointsLike(n, 1, idsLike[3].id)
		b := newRendezvous(endpoints)
		var tried Tried
		rest := endpoints
		for _, gone := range []int{n - 1, 0, n / 2} {
			tried.Add(gone)
			rest = changed(rest, endpoints[gone].ID, 0)
			without := newRendezvous(rest)
			for slot := 0; slot < slots; slot += 37 {
				got, want := b.Pick(keyOf(slot), &tried), without.Pick(keyOf(slot), nil)
				if (got == -1) != (want == -1) || got != -1 && endpoints[got].ID != rest[want].ID {
					t.Fatalf("%d endpoints, slot %d: %d, want %d of the rest", n, slot, got, want)
				}
			}
		}
	}
}

func TestWouldOwn(t *testing.T) {
	if !newRendezvous(nil).WouldOwn(1, "any") {
		t.Error("the only endpoint does not own everything")
	}
	for _, n := range []int{1, 5, 8, 30} {
		endpoints := endpointsLike(n, 2, idsLike[0].id)
		b := newRendezvous(endpoints)
		joins := "inst-joins"
		with := newRendezvous(changed(endpoints, joins, 1))
		for slot := 0; slot < slots; slot += 11 {
			key := keyOf(slot)
			if got, want := b.WouldOwn(key, joins), with.endpoints[with.Pick(key, nil)].ID == joins; got != want {
				t.Fatalf("%d endpoints, slot %d: WouldOwn %v, want %v", n, slot, got, want)
			}
			for i, e := range endpoints[:min(n, 3)] {
				if got, want := b.WouldOwn(key, e.ID), b.Pick(key, nil) == i; got != want {
					t.Fatalf("%d endpoints, slot %d, %s: WouldOwn %v, want %v", n, slot, e.ID, got, want)
				}
			}
		}
	}
}

// TestWeightsDoNotMatter: the mapping is made of ids alone, and a changed weight shares the table.
func TestWeightsDoNotMatter(t *testing.T) {
	endpoints := testEndpoints(50, mixedWeights(1, 9))
	b := newRendezvous(endpoints)
	next := b.derive(changed(endpoints, endpoints[7].ID, 1000))
	if next.narrow != b.narrow || next.endpoints[7].Weight != 1000 {
		t.Error("a changed weight made another table")
	}
}

// TestWideTable: more endpoints than 16 bits can tell apart.
func TestWideTable(t *testing.T) {
	if raceEnabled {
		t.Skip("takes long with the race detector, and there is one goroutine")
	}
	const most = math.MaxUint16 // in a narrow table: one number stands for nobody
	endpoints := testEndpoints(most+3, mixedWeights(1, 9))
	narrow := newRendezvous(endpoints[:most])
	wide := newRendezvous(endpoints[:most+1])
	if narrow.narrow == nil || wide.wide == nil {
		t.Fatal("not the tables that this is about")
	}
	for _, step := range []struct{ from, to *Rendezvous }{
		{narrow, wide},
		{wide, narrow},
		{wide, newRendezvous(endpoints)},
		{newRendezvous(endpoints[2:]), wide},
	} {
		if !same(step.from.derive(step.to.endpoints), step.to) {
			t.Errorf("derived from %d endpoints, %d are not what was built", step.from.Len(), step.to.Len())
		}
	}
	for slot := 0; slot < slots; slot += 997 {
		if got, want := wide.Pick(keyOf(slot), nil), owner(wide.ids, uint32(slot), nil); got != want {
			t.Errorf("slot %d is %d's, want %d", slot, got, want)
		}
	}
}

// TestEqualHashes: ids of one hash, which somebody may construct, tie in every slot; the first has them all, in a table or not.
func TestEqualHashes(t *testing.T) {
	for _, n := range []int{3, 20} {
		ids := make([]preference, n)
		for i := range ids {
			ids[i] = prefer("the same")
		}
		if got := owner(ids, 5, nil); got != 0 {
			t.Errorf("%d ids: owner %d", n, got)
		}
		for slot, o := range newTable[uint16](ids).owner {
			if o != 0 {
				t.Fatalf("%d ids: slot %d is %d's", n, slot, o)
			}
		}
	}
}
