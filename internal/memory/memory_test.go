package memory

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestPercent(t *testing.T) {
	for _, tt := range []struct {
		live uint64
		want int
	}{
		{0, 1600}, // nothing was collected yet
		{4 << 20, 1600},
		{16 << 20, 400},
		{Headroom, 100},
		{1 << 30, 100},
	} {
		if got := percentFor(tt.live); got != tt.want {
			t.Errorf("%d bytes live: %d %%, want %d", tt.live, got, tt.want)
		}
	}
}

// current returns the percentage in force.
func current() int {
	percent := debug.SetGCPercent(-1)
	debug.SetGCPercent(percent)
	return percent
}

// The percentage follows what is in use, collection after collection.
func TestTune(t *testing.T) {
	t.Setenv("GOGC", "")
	before := current()
	t.Cleanup(func() { debug.SetGCPercent(before) })
	Tune()
	if got := current(); got < 200 {
		t.Errorf("%d %% with a small heap", got)
	}
	ballast := make([]byte, 2*Headroom)
	until := func(what string, ok func(int) bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			runtime.GC()
			if got := current(); ok(got) {
				return
			} else if time.Now().After(end) {
				t.Fatalf("%s: %d %%", what, got)
			}
		}
	}
	until("a large heap", func(percent int) bool { return percent == 100 })
	runtime.KeepAlive(ballast)
	ballast = nil
	until("a small heap again", func(percent int) bool { return percent > 200 })
}

// Who sets GOGC means it.
func TestGOGCWins(t *testing.T) {
	t.Setenv("GOGC", "70")
	before := debug.SetGCPercent(70)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	Tune()
	runtime.GC()
	if got := current(); got != 70 {
		t.Errorf("%d %%, want 70", got)
	}
}
