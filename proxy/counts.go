package proxy

import (
	"math"
	"sync/atomic"
	"time"
)

// counts is what one loop counts of the requests of one service. A goroutine counts with the loop whose connection it
// serves. So no CPU waits for a cache line of another one, and who reads adds up.
type counts struct {
	outcomes       [finales]atomic.Uint64
	received, sent atomic.Uint64 // bytes from clients and to them
	whole          histogram     // from the end of the request's head to the end of its response
	gateway        histogram     // what the gateway itself took of that
	backend        histogram     // and what instances took up to their answer
}

// finale is how a request has ended.
type finale uint8

const (
	answered1xx finale = iota // by an instance, with such a status
	answered2xx
	answered3xx
	answered4xx
	answered5xx
	refused4xx // by the gateway
	refused5xx
	cut  // the response broke off behind its head
	gone // the client left, or took nothing
	finales
)

// answerer is whose answer a request got.
type answerer uint8

const (
	byInstance answerer = iota // or by the API
	byGateway
	byNobody // the client was gone
	byHalf   // it broke off
)

// tally is what an exchange keeps to be counted by and told of. Times are since exchange.began.
type tally struct {
	told           bool // it was counted and told of
	by             answerer
	reason         string        // see Record
	streamed       bool          // the response went on as it came
	received, sent int64         // bytes
	head           int64         // of sent, what is no body
	held           time.Duration // how long the client was waited for, for its body
	asked          time.Duration // when the first attempt began
	uploaded       time.Duration // when the backend had the rest of the body; 0: there was none
	answered       time.Duration // when the answer was there; 0: never
}

// times is what a request took.
type times struct {
	whole   time.Duration // from the end of its head to the end of its response
	gateway time.Duration // of that, what the gateway itself took
	backend time.Duration // and what instances took up to their answer; 0: none was asked
}

func (x *exchange) times() times {
	t, whole := &x.tally, time.Since(x.began)
	if x.attempts == 0 {
		return times{whole, max(0, whole-t.held), 0}
	}
	gateway, answered := t.asked, t.answered
	switch {
	case answered == 0:
		answered = whole
	case !t.streamed: // else the rest is the pace of client and backend
		gateway += whole - answered
	}
	return times{whole, max(0, gateway-t.held), max(0, answered-max(t.asked, t.uploaded))}
}

// ended counts a request that has ended, and tells of it.
func (c *conn) ended() {
	if !c.p.timed || c.x.tally.told {
		return
	}
	c.x.tally.told = true // also if who is told panics
	took := c.x.times()
	c.count(took)
	if c.p.recorded {
		c.record(took)
	}
}

// count counts a request.
func (c *conn) count(took times) {
	x, p := &c.x, c.p
	if p.cfg().NoMetrics {
		return
	}
	if x.service == nil {
		p.unrouted[x.finale()].Add(1)
		return
	}
	n, t := x.service.counted(c.pool()), &x.tally
	if x.attempts > 0 {
		n.backend.observe(took.backend)
	}
	n.gateway.observe(took.gateway)
	n.whole.observe(took.whole)
	n.outcomes[x.finale()].Add(1)
	n.received.Add(uint64(t.received) + uint64(len(c.head)))
	n.sent.Add(uint64(t.sent))
}

func (x *exchange) finale() finale {
	switch {
	case x.tally.by == byHalf:
		return cut
	case x.tally.by == byNobody || x.status == 0:
		return gone
	case x.tally.by == byGateway && x.status >= 500:
		return refused5xx
	case x.tally.by == byGateway && x.status >= 400:
		return refused4xx
	}
	return finale(x.status/100) - 1
}

// noteAsked notes that the first attempt has begun.
func (x *exchange) noteAsked() {
	if x.p().timed && x.tally.asked == 0 {
		x.tally.asked = time.Since(x.began)
	}
}

// noteAnswered notes that the answer is there.
func (x *exchange) noteAnswered(now time.Time) {
	x.tally.answered = now.Sub(x.began)
	if x.upload != nil {
		x.tally.uploaded = x.upload.since(now).Sub(x.began)
	}
}

// counted returns the counts of a loop.
func (s *service) counted(loop int) *counts {
	if n := s.counts[loop].Load(); n != nil {
		return n
	}
	s.counts[loop].CompareAndSwap(nil, &counts{})
	return s.counts[loop].Load()
}

// The buckets of a histogram are those of a native one of Prometheus: 8 to each power of two seconds. Those of a power of
// two are a cache line, and there once they are needed.
const (
	HistogramSchema = 3 // each bucket is 2^(1/2^3), 9 %, wider than the one below

	perOctave   = 1 << HistogramSchema
	firstOctave = -20 // from 0.95 µs up; what is below has one bucket,
	octaves     = 32  // up to 4096 s; what is longer is in the last one
)

type histogram struct {
	sum     atomic.Int64 // nanoseconds
	under   atomic.Uint64
	octaves [octaves]atomic.Pointer[[perOctave]atomic.Uint64]
}

// ends are where the buckets of an octave end, as fractions of it: 2^(i/8) - 1, but for the last. In each sixteenth of an
// octave there is one of them at most, and begins says how many there are before it.
var ends, begins = octave()

func octave() (ends [perOctave]uint64, begins [16]uint8) {
	for i := range ends {
		ends[i] = math.Float64bits(math.Exp2(float64(i)/perOctave)) & (1<<52 - 1)
	}
	for i := range begins {
		for begins[i] < perOctave && ends[begins[i]] < uint64(i)<<48 {
			begins[i]++
		}
	}
	return ends, begins
}

// observe counts a duration.
func (h *histogram) observe(d time.Duration) {
	h.sum.Add(int64(max(d, 0)))
	bits := math.Float64bits(float64(d) / float64(time.Second))
	power, fraction := int(bits>>52)-1023-firstOctave, bits&(1<<52-1)
	at := int(begins[fraction>>48])
	if at < perOctave && fraction > ends[at] {
		at++
	}
	if at--; at < 0 { // a power of two ends the octave below
		power, at = power-1, perOctave-1
	}
	switch {
	case d <= 0 || power < 0:
		h.under.Add(1)
		return
	case power >= octaves:
		power, at = octaves-1, perOctave-1
	}
	line := h.octaves[power].Load()
	if line == nil {
		h.octaves[power].CompareAndSwap(nil, new([perOctave]atomic.Uint64))
		line = h.octaves[power].Load()
	}
	line[at].Add(1)
}
