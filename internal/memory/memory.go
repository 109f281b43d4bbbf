// Package memory decides how far the heap may grow between two collections.
package memory

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// Headroom is how many bytes at least may be allocated between two collections. Go's default, as much as is in use, is
// little for a gateway: its heap is small, and what a storm of registrations leaves behind has it collect several times a
// second. While it collects, requests wait for milliseconds now and then.
const Headroom = 64 << 20

// Tune keeps to Headroom for as long as the process runs, unless the environment has a GOGC of its own. A limit in
// GOMEMLIMIT is kept in any case: that is the runtime's own affair.
func Tune() {
	if os.Getenv("GOGC") != "" {
		return
	}
	t := &tuner{live: []metrics.Sample{{Name: "/gc/heap/live:bytes"}}}
	t.adjust()
	t.rearm()
}

// tuner is unreachable but for its finalizer, which therefore runs after each collection.
type tuner struct {
	live    []metrics.Sample
	percent int // as it was set last
}

func (t *tuner) rearm() {
	runtime.SetFinalizer(t, func(t *tuner) {
		t.adjust()
		t.rearm()
	})
}

// adjust sets the percentage for what is in use now. Setting it stops the world for a moment, so small changes are let be.
func (t *tuner) adjust() {
	metrics.Read(t.live)
	percent := percentFor(t.live[0].Value.Uint64())
	if diff := percent - t.percent; diff > t.percent/8 || -diff > t.percent/8 {
		t.percent = percent
		debug.SetGCPercent(percent)
	}
}

// percentFor is the GOGC with which a heap of that many live bytes grows by Headroom, or by as much as it is. The runtime's
// own minimum, 4 MiB of heap at 100 %, grows with it too: that bounds it.
func percentFor(live uint64) int {
	const most = Headroom * 100 / (4 << 20)
	return int(min(max(100, Headroom*100/max(live, 1)), most))
}
