// Package lb decides which endpoint a request goes to next: one file a strategy. It knows no HTTP and no clock, and not
// whether an endpoint is alive: whoever builds a balancer gives it those that may be picked.
package lb

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
)

// Balancer chooses among the endpoints it was built over. It never changes (a changed set gets a new one, see Derive)
// and may be used by any number of goroutines at once.
type Balancer interface {
	// Pick returns the index, in the slice given to New or Derive, of an endpoint that is not in tried (nil: none was
	// tried), or -1 if there is none. Only IPHash looks at key. It does not lock and does not allocate.
	Pick(key uint64, tried *Tried) int
	// Len is the number of endpoints.
	Len() int
}

// Endpoint is an instance as a balancer sees it.
type Endpoint struct {
	ID     string // unique within its service
	Weight int    // its share beside the others'; only weighted strategies look at it
}

// Strategy is the name of a way to balance, as configuration and API write it.
type Strategy string

// The strategies. The empty one is RoundRobin.
const (
	RoundRobin         Strategy = "round-robin"          // in turn
	Random             Strategy = "random"               // all equally likely
	WeightedRoundRobin Strategy = "weighted-round-robin" // in turn, as often as the weight says, evenly spread
	WeightedRandom     Strategy = "weighted-random"      // as likely as the weight says
	IPHash             Strategy = "ip-hash"              // the same client to the same endpoint while that is there
)

// Strategies lists all strategies, the default first.
func Strategies() []Strategy {
	return []Strategy{RoundRobin, Random, WeightedRoundRobin, WeightedRandom, IPHash}
}

// ParseStrategy returns the strategy of that name; the error lists the names there are.
func ParseStrategy(name string) (Strategy, error) {
	all := Strategies()
	if slices.Contains(all, Strategy(name)) {
		return Strategy(name), nil
	}
	names := make([]string, len(all))
	for i, s := range all {
		names[i] = string(s)
	}
	return "", fmt.Errorf("unknown strategy %q: want one of %s", name, strings.Join(names, ", "))
}

// Weighted tells whether the strategy looks at weights.
func (s Strategy) Weighted() bool { return s == WeightedRoundRobin || s == WeightedRandom }

// Unweighted is the same strategy without weights: what is in force where an instance has none.
func (s Strategy) Unweighted() Strategy {
	switch s {
	case WeightedRoundRobin:
		return RoundRobin
	case WeightedRandom:
		return Random
	}
	return s
}

// WithWeights is the same strategy with weights, if there is one.
func (s Strategy) WithWeights() Strategy {
	switch s {
	case RoundRobin:
		return WeightedRoundRobin
	case Random:
		return WeightedRandom
	}
	return s
}

// Counter is the position in the cycle of one service. It is handed from each of its balancers to the next, so that a
// changed set goes on where the last one was instead of beginning with its first endpoint each time. The zero value is
// ready; it must not be copied. All turns of a service meet here, so it has a cache line for itself.
type Counter struct {
	_    [64]byte
	turn atomic.Uint64
	_    [56]byte
}

func (c *Counter) next() uint64 { return c.turn.Add(1) - 1 }

// New builds a balancer. endpoints must be sorted by ID, each ID once, and belong to the balancer from then on. c holds
// the service's position (nil: one of its own). A weighted strategy works as its unweighted form if a weight is below 1,
// and takes a weight above 1<<31 as 1<<31. A strategy that ParseStrategy refuses is a mistake of the caller's: New panics.
func New(s Strategy, endpoints []Endpoint, c *Counter) Balancer {
	if c == nil {
		c = new(Counter)
	}
	if s.Weighted() && slices.ContainsFunc(endpoints, func(e Endpoint) bool { return e.Weight < 1 }) {
		s = s.Unweighted()
	}
	switch s {
	case RoundRobin, "":
		return newRoundRobin(len(endpoints), c)
	case Random:
		return random(len(endpoints))
	case WeightedRoundRobin:
		return newWeightedRoundRobin(endpoints, c)
	case WeightedRandom:
		return newWeightedRandom(endpoints)
	case IPHash:
		return newRendezvous(endpoints)
	}
	panic(fmt.Sprintf("lb: unknown strategy %q", s))
}

// Even is New for as many endpoints of which nothing else is known, for the strategies that are not NeedsEndpoints.
func Even(s Strategy, n int, c *Counter) Balancer {
	if s == Random {
		return random(n)
	}
	return newRoundRobin(n, c)
}

// NeedsEndpoints says whether a strategy looks at what distinguishes endpoints: their weights or their ids.
func (s Strategy) NeedsEndpoints() bool { return s.Weighted() || s == IPHash }

// Derive builds the balancer that New would build, and is cheaper where prev (which may be nil) is of the same strategy
// and has nearly the same endpoints. prev stays as it is and may still be in use. Only IPHash has anything to gain: the
// others are built within microseconds (a thousand endpoints) to a fraction of a millisecond (ten thousand).
func Derive(prev Balancer, s Strategy, endpoints []Endpoint, c *Counter) Balancer {
	if prev, ok := prev.(*Rendezvous); ok && s == IPHash {
		return prev.derive(endpoints)
	}
	return New(s, endpoints, c)
}

// Key is what IPHash goes by: the xxhash of the address in its 16-byte form, in which an IPv4 address and the same one
// mapped into IPv6 are equal. A zone does not count.
func Key(client netip.Addr) uint64 {
	b := client.As16()
	return xxhash.Sum64(b[:])
}
