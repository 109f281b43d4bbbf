package proxy

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"kerberos/cb"
	"kerberos/registry/health"
)

// Where the system had no socket for the gateway.
const (
	accepting = iota
	dialling
	shortages
)

// Stats is what a Proxy has counted since it was made, beside what is a service's. Nothing in it ever falls but Connections.
type Stats struct {
	Unrouted    []Count   // requests without a service: the API's, those that were refused before they had one
	Refusals    []Refused // answers of the gateway's own
	Connections int       // of clients, open now
	Accepted    uint64    // connections
	Surplus     []Count   // connections that were refused, by the limit
	Socketless  []Count   // how often the system had no socket for us: when accepting, when connecting to an instance
}

// Count is how often something has happened.
type Count struct {
	What  string
	Times uint64
}

// Refused is how often the gateway itself gave an answer.
type Refused struct {
	Status int
	Error  string // the type of RFC 9209
	Times  uint64
}

// finaleNames are what Stats call them.
var finaleNames = [finales]string{"1xx", "2xx", "3xx", "4xx", "5xx", "refused_4xx", "refused_5xx", "cut", "gone"}

// noteRefusal counts an answer of the gateway's own.
func (p *Proxy) noteRefusal(err *refusal) {
	n, there := p.refusals.Load(err)
	if !there {
		n, _ = p.refusals.LoadOrStore(err, &atomic.Uint64{})
	}
	n.(*atomic.Uint64).Add(1)
}

// Stats returns what was counted so far.
func (p *Proxy) Stats() Stats {
	s := Stats{
		Socketless: []Count{{"accept", p.socketless[accepting].Load()}, {"connect", p.socketless[dialling].Load()}},
	}
	for i, name := range finaleNames {
		s.Unrouted = append(s.Unrouted, Count{name, p.unrouted[i].Load()})
	}
	p.refusals.Range(func(key, n any) bool {
		err, times := key.(*refusal), n.(*atomic.Uint64).Load()
		i, known := slices.BinarySearchFunc(s.Refusals, err, func(r Refused, err *refusal) int {
			return cmp.Or(cmp.Compare(r.Status, err.status), strings.Compare(r.Error, err.kind))
		})
		if known {
			s.Refusals[i].Times += times
		} else {
			s.Refusals = slices.Insert(s.Refusals, i, Refused{err.status, err.kind, times})
		}
		return true
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Connections, s.Accepted = len(p.conns), p.connected
	s.Surplus = []Count{{"connections", p.turnedAway[errGatewayFull]}, {"client", p.turnedAway[errClientFull]}}
	return s
}

// ServiceStats is one service. What only grows begins at 0 when the service becomes known, and again if it was forgotten
// (an hour after its last instance has left). It outlives the instances.
type ServiceStats struct {
	Name           string
	Requests       []Count // that have ended, by how: the class of the status, refused_ if it was the gateway's, cut, gone
	Received, Sent uint64  // bytes, from its clients and to them

	Whole   Histogram // from the end of a request's head to the end of its response
	Gateway Histogram // what the gateway itself took of that: not the pace of clients and instances, but the queue
	Backend Histogram // from the first attempt to the answer

	Retries       uint64  // attempts beyond the first
	RetriesDenied uint64  // by the budget
	RetryBudget   float64 // retries that it would allow now

	InFlight     int64   // requests that instances have now
	Waiting      int64   // requests in the queue
	QueueRefused uint64  // requests that found no place, at once or in time
	States       []Count // instances now, by what they are
	Stale        int     // instances that fell silent along with too many others to be believed
	Instances    int

	view *view
}

// Histogram counts durations in the buckets of a native one of Prometheus, of HistogramSchema.
type Histogram struct {
	Sum    time.Duration
	Under  uint64   // up to 2^-20 s
	First  int      // the index of the first bucket: bucket i ends at 2^(i/8) s
	Counts []uint64 // of that and those that follow, up to the last one that is not empty
}

// Bounds of a Histogram, as powers of two seconds.
const (
	HistogramUnder = firstOctave
	HistogramOver  = firstOctave + octaves
)

// Services yields all services that are known, in no order. It is for who looks now and then: it reads what requests write.
func (p *Proxy) Services() iter.Seq[ServiceStats] {
	return func(yield func(ServiceStats) bool) {
		p.services.Range(func(_, s any) bool { return yield(s.(*service).stats()) })
	}
}

func (s *service) stats() ServiceStats {
	out := ServiceStats{
		Name: s.name, view: s.view.Load(),
		Retries: s.retries.Load(), RetriesDenied: s.retriesDenied.Load(), RetryBudget: s.budget.has(s, time.Now()),
		Waiting: s.crowd.waiting.Load(), QueueRefused: s.queueRefused.Load(),
	}
	for i, name := range finaleNames {
		out.Requests = append(out.Requests, Count{What: name})
		for loop := range s.counts {
			if n := s.counts[loop].Load(); n != nil {
				out.Requests[i].Times += n.outcomes[i].Load()
			}
		}
	}
	var whole, gateway, backend total
	for loop := range s.counts {
		if n := s.counts[loop].Load(); n != nil {
			out.Received += n.received.Load()
			out.Sent += n.sent.Load()
			whole.add(&n.whole)
			gateway.add(&n.gateway)
			backend.add(&n.backend)
		}
	}
	out.Whole, out.Gateway, out.Backend = whole.histogram(), gateway.histogram(), backend.histogram()
	var states [len(conditionNames)]uint64
	for u := range out.view.all {
		out.Instances++
		out.InFlight += u.inFlight.Load()
		c, _ := u.condition()
		states[c]++
		if u.instance.Load().Stale() {
			out.Stale++
		}
	}
	for i, name := range conditionNames {
		out.States = append(out.States, Count{name, states[i]})
	}
	return out
}

// total adds up histograms.
type total struct {
	Histogram
	all [octaves * perOctave]uint64
}

func (s *total) add(h *histogram) {
	s.Sum += time.Duration(h.sum.Load())
	s.Under += h.under.Load()
	for i := range h.octaves {
		if line := h.octaves[i].Load(); line != nil {
			for j := range line {
				s.all[i*perOctave+j] += line[j].Load()
			}
		}
	}
}

func (s *total) histogram() Histogram {
	first, end := 0, len(s.all)
	for first < end && s.all[first] == 0 {
		first++
	}
	for end > first && s.all[end-1] == 0 {
		end--
	}
	s.First, s.Counts = firstOctave*perOctave+1+first, slices.Clone(s.all[first:end])
	return s.Histogram
}

// UpstreamStats is one instance as it is used. What only grows begins at 0 when it is registered with another address.
type UpstreamStats struct {
	ID          string
	Requests    []Count // attempts that have ended, by what they say of it: success, failure, ignored
	Received    uint64  // bytes of requests that went to it, health checks aside
	Sent        uint64  // and of responses that came from it
	Retries     uint64  // attempts at it beyond the first of a request
	InFlight    int64   // requests
	Tunnels     int64   // open now
	Ready       bool
	Checked     bool // it has a health check,
	Healthy     bool // which passes
	Breaker     []BreakerState
	Connections int    // open now
	Connected   uint64 // connections that there ever were
}

// BreakerState is one of the states of an instance's breaker.
type BreakerState struct {
	State   string // closed, open, half-open
	Now     bool
	Changes uint64 // how often it came to that state
}

// Upstreams yields the instances of the service, sorted by id.
func (s *ServiceStats) Upstreams() iter.Seq[UpstreamStats] {
	return func(yield func(UpstreamStats) bool) {
		for u := range s.view.all {
			if !yield(u.stats()) {
				return
			}
		}
	}
}

func (u *upstream) stats() UpstreamStats {
	out := UpstreamStats{
		ID: u.id, InFlight: u.inFlight.Load(), Tunnels: u.tunnels.Load(),
		Requests: []Count{{"success", u.outcomes[success].Load()}, {"failure", u.outcomes[failure].Load()}, {"ignored", u.outcomes[ignored].Load()}},
	}
	for i := range u.pools {
		if n := u.pools[i].Load(); n != nil {
			out.Received += n.received.Load()
			out.Sent += n.sent.Load()
			out.Retries += n.retries.Load()
		}
	}
	out.Ready, _ = u.ready()
	if w := u.health.Load(); w != nil {
		out.Checked, out.Healthy = true, w.Status().State == health.Up
	}
	now := u.gate.State()
	for i := range u.changes {
		state := cb.State(i)
		out.Breaker = append(out.Breaker, BreakerState{state.String(), state == now, u.changes[i].Load()})
	}
	u.open.mu.Lock()
	defer u.open.mu.Unlock()
	out.Connections, out.Connected = len(u.open.conns), u.open.total
	return out
}
