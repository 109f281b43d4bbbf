package follow

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// followed is a file that is followed, and what was told of it. Its time is that of synctest: a test takes as long as its reads do.
type followed struct {
	t    *testing.T
	name string
	mu   sync.Mutex
	told []string // what stood in the file each time; "(none)" where it was gone
}

const quiet = 2 * time.Second

// begin follows a file that holds text, with Settled. unstable has the first so many reads find another file than was settled.
func begin(t *testing.T, text string, unstable int) *followed {
	f := &followed{t: t, name: filepath.Join(t.TempDir(), "file")}
	f.write(text)
	known := Fingerprint(f.name)
	follower := Settled(func() Sum { return known }, quiet, func(settled Sum) {
		data, err := Read(f.name)
		if Of(data, err) != settled {
			t.Errorf("told of what does not stand there: %q", data)
		}
		if err != nil {
			data = []byte("(none)")
		}
		f.mu.Lock()
		f.told = append(f.told, string(data))
		f.mu.Unlock()
		if unstable--; unstable < 0 {
			known = settled
		}
	}, f.name)
	t.Cleanup(follower.Close)
	return f
}

func (f *followed) write(text string) {
	f.t.Helper()
	if err := os.WriteFile(f.name, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// wait lets time pass; it ends between two looks.
func (f *followed) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (f *followed) tells(what string, want ...string) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.told, want) {
		f.t.Errorf("%s: told %q, want %q", what, f.told, want)
	}
	f.told = nil
}

// inBubble runs a test of which the time is its own.
func inBubble(t *testing.T, text string, unstable int, test func(f *followed)) {
	synctest.Test(t, func(t *testing.T) {
		f := begin(t, text, unstable)
		f.wait(Every / 2)
		test(f)
	})
}

func TestSettledPauses(t *testing.T) {
	inBubble(t, "old", 0, func(f *followed) {
		f.write("")
		f.wait(1900 * time.Millisecond)
		f.write("ne")
		f.wait(1900 * time.Millisecond)
		f.tells("while it is written")
		f.write("new")
		f.wait(quiet + 2*Every)
		f.tells("when it is still", "new")
		f.wait(time.Minute)
		f.tells("once")
	})
}

func TestSettledRename(t *testing.T) {
	inBubble(t, "old", 0, func(f *followed) {
		next := f.name + ".next"
		if err := os.WriteFile(next, []byte("new"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, f.name); err != nil {
			t.Fatal(err)
		}
		f.wait(quiet + Every)
		f.tells("renamed over", "new")
	})
}

func TestSettledRemoved(t *testing.T) {
	inBubble(t, "old", 0, func(f *followed) {
		for _, gone := range []time.Duration{quiet - Every, quiet + Every} {
			if err := os.Remove(f.name); err != nil {
				t.Fatal(err)
			}
			f.wait(gone)
			if gone < quiet {
				f.tells("gone for a moment")
			} else {
				f.tells("gone", "(none)")
			}
			f.write("old")
			f.wait(quiet + Every)
			if gone < quiet {
				f.tells("back before it was missed")
			} else {
				f.tells("back", "old")
			}
		}
	})
}

func TestSettledSameContent(t *testing.T) {
	inBubble(t, "old", 0, func(f *followed) {
		if err := os.Chtimes(f.name, time.Now(), time.Now()); err != nil {
			t.Fatal(err)
		}
		f.wait(quiet + Every)
		f.write("old")
		f.wait(quiet + Every)
		f.tells("touched, and written with the same")
	})
}

// What was not taken over is told again, and not before it was still for as long again.
func TestSettledNotTaken(t *testing.T) {
	inBubble(t, "old", 2, func(f *followed) {
		f.write("new")
		f.wait(quiet + Every)
		f.tells("at first", "new")
		f.wait(quiet - Every)
		f.tells("at once again")
		f.wait(Every)
		f.tells("again", "new")
		f.wait(time.Minute)
		f.tells("until it is taken", "new")
	})
}

// Files tells after two looks.
func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &followed{t: t, name: filepath.Join(t.TempDir(), "file")}
		f.write("old")
		var times atomic.Int32
		follower := Files(Fingerprint(f.name), func() { times.Add(1) }, f.name)
		defer follower.Close()
		f.wait(Every / 2)
		f.write("new")
		f.wait(Every)
		if times.Load() != 0 {
			t.Error("told at the first look")
		}
		f.wait(Every)
		if n := times.Load(); n != 1 {
			t.Errorf("told %d times at the second look", n)
		}
		f.wait(time.Minute)
		if n := times.Load(); n != 1 {
			t.Errorf("told %d times of one change", n)
		}
	})
}
