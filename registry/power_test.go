package registry

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

// disk is a disk under a file that may lose its power at any time. Then it has all that was brought to it, and of what was written
// since any sectors.
type disk struct {
	t      *testing.T
	rng    *rand.Rand
	path   string                      // of the file
	lost   string                      // where a file is put that a loss of power leaves
	kept   []byte                      // certainly there
	seen   []byte                      // the file when it was last brought there
	states map[string]map[key]record   // that a start may find: the one acknowledged last, and those under way since
	counts struct{ before, under int } // how often it found which
	fails  bool                        // the next time
}

const sector = 512

// changed returns which sectors were written since.
func (d *disk) changed(now []byte) (all []int) {
	for at := 0; at < len(now); at += sector {
		if at >= len(d.seen) || !bytes.Equal(now[at:at+sector], d.seen[at:at+sector]) {
			all = append(all, at)
		}
	}
	return all
}

// mix is what the disk has when only some of the changes were written.
func (d *disk) mix(now []byte, changed []int) []byte {
	data := bytes.Clone(d.kept)
	if d.rng.IntN(4) > 0 && len(data) < len(now) {
		data = append(data, make([]byte, len(now)-len(data))...)
	}
	share := []float64{0.05, 0.5, 0.95, 1}[d.rng.IntN(4)]
	meta := d.rng.IntN(2) == 0
	for _, at := range changed {
		if at+sector <= len(data) && (meta && at < 8192 || d.rng.Float64() < share) {
			copy(data[at:at+sector], now[at:])
		}
	}
	return data
}

// state is what a start finds in a file, and how it prints.
func (d *disk) state(data []byte) (map[key]record, string) {
	d.t.Helper()
	if err := os.WriteFile(d.lost, data, 0o600); err != nil {
		d.t.Fatal(err)
	}
	found, err := readFile(d.lost)
	if err != nil {
		d.t.Fatalf("the file is lost: %v", err)
	}
	m := found.records()
	return m, fmt.Sprint(m)
}

func (d *disk) sync() error {
	now, err := os.ReadFile(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	changed := d.changed(now)
	under, name := d.state(now)
	d.states[name] = under
	for range 10 {
		switch got, at := d.state(d.mix(now, changed)); {
		case at == name:
			d.counts.under++
		case d.states[at] != nil:
			d.counts.before++
		default:
			d.t.Fatalf("neither a state that was acknowledged nor one under way:\n%s", cmp.Diff(under, got))
		}
	}
	if d.fails { // some is there, and the system forgets the rest: nobody who goes on from it may rely on it
		d.kept = d.mix(now, changed)
		d.kept = append(d.kept, make([]byte, max(0, len(now)-len(d.kept)))...)
		d.seen = bytes.Clone(d.kept)
		f, err := os.OpenFile(d.path, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(d.kept, 0)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			d.t.Fatal(err)
		}
		return syscall.EIO
	}
	for _, at := range changed {
		if at >= len(d.kept) {
			d.kept = append(d.kept, now[at:at+sector]...)
		} else {
			copy(d.kept[at:at+sector], now[at:])
		}
	}
	d.seen = now
	d.states = map[string]map[key]record{name: under}
	return nil
}

// Whenever the power goes, and whatever of the last write is on the disk by then, a start finds what was acknowledged, or what was
// just being written, as a whole; also after writes of which the disk has said that they failed.
func TestLossOfPower(t *testing.T) {
	rounds, writes := 4, 60
	if testing.Short() {
		rounds = 1
	}
	for round := range rounds {
		dir := t.TempDir()
		reopen(t, dir).Close()
		d := &disk{t: t, rng: rand.New(rand.NewPCG(uint64(round), 1)), path: filepath.Join(dir, fileName), lost: filepath.Join(t.TempDir(), fileName),
			states: map[string]map[key]record{}}
		s, _, err := openFile(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if d.kept, err = os.ReadFile(d.path); err != nil {
			t.Fatal(err)
		}
		d.seen = bytes.Clone(d.kept)
		state, name := d.state(d.kept)
		d.states[name] = state
		s.sync = d.sync
		r := New(Config{}) // which keeps nothing: what is written is written here
		most := 1 << (2 + d.rng.IntN(9))
		b := newBatch()
		for n := range writes {
			for range 1 + d.rng.IntN(1+most/8) {
				k := key{fmt.Sprint("service-", d.rng.IntN(5)), fmt.Sprint(d.rng.IntN(most))}
				b.keys[k] = struct{}{}
				if r.Snapshot(k.service).Instance(k.id) != nil && d.rng.IntN(3) == 0 {
					err = r.Unregister(k.service, k.id, "")
				} else {
					err = r.Register(k.service, Instance{ID: k.id, Addr: fmt.Sprint("http://127.0.0.1:", 1+d.rng.IntN(100)), Metadata: map[string]string{"x": strings.Repeat("x", d.rng.IntN(200))}})
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			d.fails = d.rng.IntN(4) == 0 && n+1 < writes
			r.store = s
			reserved := s.reserved + uint64(n%2)
			err := s.commit(func(tx *bbolt.Tx) (uint64, error) { return r.put(tx, b, reserved) })
			r.store = nil
			if d.fails {
				if !errors.Is(err, syscall.EIO) {
					t.Fatalf("a write that failed: %v", err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			s.reserved = reserved
			clear(b.keys)
			if got, _ := d.state(d.kept); difference(all(r), got) != "" {
				t.Fatalf("acknowledged and not on disk (-want +got):\n%s", difference(all(r), got))
			}
		}
		s.close()
		t.Logf("up to %d instances in a service: %d times what was acknowledged, %d times more", most, d.counts.before, d.counts.under)
		if d.counts.before == 0 || d.counts.under == 0 {
			t.Error("that is not all there is")
		}
		if got := all(reopen(t, dir)); !maps.EqualFunc(got, all(r), func(a, b record) bool { return difference(a, b) == "" }) {
			t.Errorf("after a restart (-want +got):\n%s", difference(all(r), got))
		}
	}
}
