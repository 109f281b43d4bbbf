package lb

// What is here is for people who want to know what a balancer would do. No request needs it.

// Fork returns a balancer that goes on from where b is, on a Counter of its own: its picks are those that b's would be next if
// nobody else picked, and take no turn from b.
func Fork(b Balancer) Balancer {
	switch b := b.(type) {
	case *roundRobin:
		return &roundRobin{b.n, b.counter.fork()}
	case *weightedCycle:
		return &weightedCycle{b.n, b.length, b.cycle, b.counter.fork()}
	case *weightedSpread:
		next := *b
		next.counter = b.counter.fork()
		return &next
	}
	return b // there are no turns
}

func (c *Counter) fork() *Counter {
	next := new(Counter)
	next.turn.Store(c.turn.Load())
	return next
}

// Shares is what part of all picks each endpoint gets in the long run, by its index. They add up to 1, unless there are none.
func Shares(b Balancer) []float64 {
	parts := make([]float64, b.Len())
	switch b := b.(type) {
	case *weightedCycle:
		for _, i := range b.cycle {
			parts[i]++
		}
	case *weightedSpread:
		weigh(parts, b.endpoints)
	case *weightedRandom:
		weigh(parts, b.endpoints)
	case *Rendezvous:
		for slot := range uint64(slots) {
			if i := b.Pick(slot<<(64-slotBits), nil); i >= 0 {
				parts[i]++
			}
		}
	default:
		for i := range parts {
			parts[i] = 1
		}
	}
	sum := 0.0
	for _, part := range parts {
		sum += part
	}
	for i := range parts {
		parts[i] /= sum
	}
	return parts
}

func weigh(parts []float64, endpoints []Endpoint) {
	for i, e := range endpoints {
		parts[i] = float64(weight(e))
	}
}
