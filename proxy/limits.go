package proxy

import (
	"fmt"
	"math"
	"strconv"
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
	TunnelIdle       time.Duration // 1 h: a tunnel in which no byte moves is closed
	TotalTimeout     time.Duration // none: from the end of a request head to the end of the response; 504, or cut

	MinUpload   int64 // none: bytes a second of a request body, over the time that it was waited for (5 s at least), then 408
	MinDownload int64 // none: bytes a second that a client takes of a response, in the same way, then it is closed

	Head        int   // 32 KiB: start line and fields of a request (431) or response (502), in bytes; none is MaxHead
	Fields      int   // 200: field lines of a request (431) or response (502)
	RequestLine int   // 16 KiB: with its CRLF, in bytes (414); judged while the line still comes
	Body        int64 // none: bytes of a request body; 413 by Content-Length before it is read, and by counting

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
	tunnelIdle       = time.Hour
)

// forever is in the place of a time limit that is not set.
const forever = 100 * 365 * 24 * time.Hour

// MaxHead is the largest Limits.Head: a head is held in memory as a whole.
const MaxHead = 1 << 20

// maxCount keeps sums of limits far from where they overflow.
const maxCount = 1 << 30

// withDefaults fills the gaps, so that what is no limit is one that nothing reaches.
func (l Limits) withDefaults() (Limits, error) {
	if l.Head > MaxHead {
		return l, fmt.Errorf("proxy: Config.Limits.Head is %d: it must be at most %d", l.Head, MaxHead)
	}
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
		{&l.TunnelIdle, tunnelIdle},
		{&l.TotalTimeout, forever},
	} {
		*d.value = orForever(*d.value, d.standard)
	}
	for _, n := range []struct {
		value          *int
		standard, none int
	}{
		{&l.Head, 32 << 10, MaxHead},
		{&l.Fields, 200, math.MaxInt},
		{&l.RequestLine, 16 << 10, math.MaxInt},
	} {
		switch {
		case *n.value == 0:
			*n.value = n.standard
		case *n.value < 0:
			*n.value = n.none
		}
	}
	l.Body = orEndless(l.Body)
	l.MinUpload, l.MinDownload = max(l.MinUpload, 0), max(l.MinDownload, 0)
	for _, n := range []*int{&l.Connections, &l.ConnectionsPerClient, &l.InFlightPerInstance, &l.InFlightPerService} {
		*n = min(max(*n, 0), maxCount) // 0 is no limit
	}
	if l.QueueTimeout == 0 {
		l.QueueTimeout = time.Second
	}
	l.QueueTimeout = max(l.QueueTimeout, 0) // 0 is no queue
	return l, nil
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

// orEndless reads a limit of bytes in the same way.
func orEndless(n int64) int64 {
	if n <= 0 {
		return math.MaxInt64
	}
	return n
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

// explain is the text of a refusal, with the limit that was passed if it is one of these.
func (l *Limits) explain(err *refusal) string {
	switch err {
	case errHeadTooLarge, errResponseHead:
		return err.text + " of " + bytesText(int64(l.Head))
	case errFields, errResponseFields:
		return err.text + " of " + strconv.Itoa(l.Fields)
	case errRequestLineTooLong:
		return err.text + " of " + bytesText(int64(l.RequestLine))
	case errServiceFull:
		return fmt.Sprintf("the service has %d requests in flight, its limit", l.InFlightPerService)
	case errInstancesFull:
		return fmt.Sprintf("all instances are at their limit of %d requests in flight", l.InFlightPerInstance)
	case errGatewayFull:
		return fmt.Sprintf("the gateway has %d connections, its limit", l.Connections)
	case errClientFull:
		return fmt.Sprintf("your address has %d connections here, the limit for one", l.ConnectionsPerClient)
	}
	return err.text
}

// bytesText writes a number of bytes for people: 32 KiB, 1 MiB, 1000 bytes.
func bytesText(n int64) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return strconv.FormatInt(n>>20, 10) + " MiB"
	case n >= 1<<10 && n%(1<<10) == 0:
		return strconv.FormatInt(n>>10, 10) + " KiB"
	}
	return strconv.FormatInt(n, 10) + " bytes"
}
