package access

import (
	"net/netip"
	"sync"
	"time"
)

const (
	failedAtOnce = 10          // attempts of one address that are answered 401 or 403 without a pause,
	failedEvery  = time.Second // and then one in that time; the others are answered 429
	mostPeers    = 4096        // addresses that are remembered
)

// limiter lets failedAtOnce events of an address through, and then one every failedEvery: a generic cell rate algorithm, which
// keeps one time for each address, the one at which it will have been quiet for long enough to be forgotten.
type limiter struct {
	mu    sync.Mutex
	quiet map[netip.Addr]time.Time
}

// allow counts an event and tells whether it is within the limit. The addresses of an IPv6 network of 64 bits are one: whoever
// has one has all.
func (l *limiter) allow(addr netip.Addr, now time.Time) bool {
	if addr.Is6() {
		network, _ := addr.WithZone("").Prefix(64)
		addr = network.Addr()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	next := l.quiet[addr]
	if next.Before(now) {
		next = now
	}
	if next = next.Add(failedEvery); next.Sub(now) > failedAtOnce*failedEvery {
		return false
	}
	l.room(addr, now)
	l.quiet[addr] = next
	return true
}

// room sees to it that there is room for an address. The caller holds mu.
func (l *limiter) room(addr netip.Addr, now time.Time) {
	if _, known := l.quiet[addr]; known || len(l.quiet) < mostPeers && l.quiet != nil {
		return
	}
	for a, quiet := range l.quiet {
		if !quiet.After(now) {
			delete(l.quiet, a)
		}
	}
	if len(l.quiet) > mostPeers/2 || l.quiet == nil { // who has so many addresses is not held up by a limit for each
		l.quiet = make(map[netip.Addr]time.Time)
	}
}
