package proxy

import (
	"math"
	"time"
)

// Limits is what a request may take. A field that is zero has the default that its comment begins with, a negative one
// is no limit.
type Limits struct {
	FirstByteTimeout time.Duration // 30 s: a new connection that sends nothing is closed without a word
	HeadTimeout      time.Duration // 10 s: from the first byte of a request head to its end, then 408
	IdleTimeout      time.Duration // 75 s: a kept-alive connection between requests is closed
	BodyTimeout      time.Duration // 30 s: a client that sends no byte of its request body, then 408
	WriteTimeout     time.Duration // 60 s: a client that takes no byte of its response is closed
	SilenceTimeout   time.Duration // 5 min: an instance that sends no byte of its response body; the response is cut
	TotalTimeout     time.Duration // none: from the end of a request head to the end of the response; 504, or cut

	MinUpload   int64 // none: bytes a second of a request body, over the time that it was waited for (5 s at least), then 408
	MinDownload int64 // none: bytes a second that a client takes of a response, in the same way, then it is closed

	Body int64 // none: bytes of a request body; 413 by Content-Length before it is read, and by counting

	Connections          int // none: of clients, on all listeners; one that is idle makes room, or 503
	ConnectionsPerClient int // none: of one address, 429; proxies that are trusted speak for many and have no limit

	InFlightPerInstance int           // none: requests at one instance at once; what finds no place waits
	InFlightPerService  int           // none: requests of one service, from their admission to their end
	QueueTimeout        time.Duration // 1 s: how long a request waits for a place, then 503; negative: not at all
}

// The defaults of the time limits.
const (
	firstByteTimeout = 30 * time.Second
	headTimeout      = 10 * time.Second
	idleTimeout      = 75 * time.Second
	bodyTimeout      = 30 * time.Second
	writeTimeout     = 60 * time.Second
	silenceTimeout   = 5 * time.Minute
)

// forever is in the place of a time limit that is not set.
const forever = 100 * 365 * 24 * time.Hour

// maxCount keeps sums of limits far from where they overflow.
const maxCount = 1 << 30

// withDefaults fills the gaps, so that what is no limit is one that nothing reaches.
func (l Limits) withDefaults() Limits {
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{
		{&l.FirstByteTimeout, firstByteTimeout},
		{&l.HeadTimeout, headTimeout},
		{&l.IdleTimeout, idleTimeout},
		{&l.BodyTimeout, bodyTimeout},
		{&l.WriteTimeout, writeTimeout},
		{&l.SilenceTimeout, silenceTimeout},
		{&l.TotalTimeout, forever},
	} {
		*d.value = orForever(*d.value, d.standard)
	}
	if l.Body <= 0 {
		l.Body = math.MaxInt64
	}
	l.MinUpload, l.MinDownload = max(l.MinUpload, 0), max(l.MinDownload, 0)
	for _, n := range []*int{&l.Connections, &l.ConnectionsPerClient, &l.InFlightPerInstance, &l.InFlightPerService} {
		*n = min(max(*n, 0), maxCount) // 0 is no limit
	}
	if l.QueueTimeout == 0 {
		l.QueueTimeout = time.Second
	}
	l.QueueTimeout = max(l.QueueTimeout, 0) // 0 is no queue
	return l
}

// orForever reads a time limit as Limits has them.
func orForever(d, standard time.Duration) time.Duration {
	switch {
	case d == 0:
		return standard
	case d < 0:
		return forever
	}
	return d
}

// paceWindow is how long a client must have been waited for before its rate says anything.
const paceWindow = 5 * time.Second

// pace is how fast a client sends or takes a body. Only the time that it was waited for counts.
type pace struct {
	waited time.Duration
	bytes  int64
}

// add notes that bytes came or went while the client was waited for since began.
func (p *pace) add(n int, began time.Time) {
	p.bytes += int64(n)
	p.waited += time.Since(began)
}

// below says that the client is slower than so many bytes a second, 0 for no limit.
func (p *pace) below(rate int64) bool {
	return rate > 0 && p.waited >= paceWindow && float64(p.bytes) < float64(rate)*p.waited.Seconds()
}
