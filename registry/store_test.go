package registry

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/valyala/fasthttp"
	"go.etcd.io/bbolt"
)

// reopen opens a registry and closes it when the test ends.
func reopen(t testing.TB, dir string) *Registry {
	t.Helper()
	r, err := Open(Config{Addrs: AddrPolicy{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")}}}, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// atRest has a file that bbolt has changed be one that nobody was changing.
func atRest(t testing.TB, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = settle(path, readMetas(data)[0])
	}
	if err != nil {
		t.Fatal(err)
	}
}

// together calls f with 0 to n-1, all at once, and waits for them: what they change is written together.
func together(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// listener accepts connections, and refuser is an address that refuses them.
func listener(t testing.TB) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return "http://" + ln.Addr().String()
}

func refuser(t testing.TB) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	return "http://" + ln.Addr().String()
}

// all is everything that a registry holds, as it is after a restart.
func all(r *Registry) map[key]record {
	m := map[key]record{}
	for _, name := range r.Names() {
		for _, in := range r.Snapshot(name).Instances() {
			rec := recordOf(in)
			if rec.Held && rec.TTL == 0 {
				rec.TTL = heldTTL
			}
			rec.Held = false
			m[key{name, in.ID}] = rec
		}
	}
	return m
}

// onDisk is the same of the file, which may be in use.
func onDisk(t testing.TB, r *Registry) map[key]record {
	t.Helper()
	data, err := os.ReadFile(r.store.path)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), fileName)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := readFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return found.records()
}

// records is what is registered in a file.
func (f *found) records() map[key]record {
	m := map[key]record{}
	for _, s := range f.instances {
		if !s.drain {
			m[s.key] = recordOf(s.instance)
		}
	}
	return m
}

// difference is cmp.Diff for records.
func difference(want, got any) string {
	return cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.AllowUnexported(Check{}))
}

// What an instance registers and what an operator sets over it is there after a restart, as it was.
func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there")
	alive, dead := listener(t), refuser(t)
	r := reopen(t, dir)
	five := 5
	for _, in := range []Instance{
		{ID: "plain", Addr: alive},
		{ID: "all", Addr: alive + "/base", Weight: 3, TTL: time.Minute, Metadata: map[string]string{"zone": "a", "x": "<&\u00e4>"},
			Check: &Check{Path: "/health", Interval: time.Minute, KeepAlive: true}, SlowStart: 30 * time.Second},
		{ID: "patched", Addr: alive, Weight: 2, Metadata: map[string]string{"zone": "a"}},
		{ID: "dead", Addr: dead, TTL: time.Hour},
		{ID: "moved", Addr: "http://10.9.9.9"},
		{ID: "moved", Addr: alive},
		{ID: "gone", Addr: alive},
		{ID: "remote", Addr: dead, remote: true},
		{ID: "bound", Addr: alive, networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}},
	} {
		if err := r.Register("echo", in); err != nil {
			t.Fatal(err)
		}
	}
	zone := "b"
	if err := r.Patch("echo", "patched", Patch{SetWeight: true, Weight: &five, SetState: true, State: Drain, SetMetadata: true, Pairs: map[string]*string{"zone": &zone}}); err != nil {
		t.Fatal(err)
	}
	if err := r.Unregister("echo", "gone", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Hold("held", Instance{ID: "a", Addr: alive}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Hold("held", Instance{ID: "b", Addr: alive, TTL: time.Minute}); err != nil {
		t.Fatal(err)
	}
	before, highest := all(r), r.generation
	if diff := difference(before, onDisk(t, r)); diff != "" {
		t.Errorf("acknowledged and not on disk (-want +got):\n%s", diff)
	}
	r.Close()
	if info, err := os.Stat(filepath.Join(dir, fileName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}

	began := time.Now()
	r = reopen(t, dir)
	if diff := difference(before, all(r)); diff != "" {
		t.Errorf("after the restart (-want +got):\n%s", diff)
	}
	for id, want := range map[string]State{"plain": Up, "all": Up, "patched": Drain, "dead": Unreachable, "moved": Up, "remote": Unreachable} {
		in := r.Snapshot("echo").Instance(id)
		if in.State() != want {
			t.Errorf("%s is %s, want %s", id, in.State(), want)
		}
		if left, ok := r.ExpiresIn(in); ok != (in.TTL > 0) || ok && left < in.TTL-time.Since(began) {
			t.Errorf("%s has %v left of %v", id, left, in.TTL)
		}
		if in.Generation <= highest {
			t.Errorf("%s has generation %d, and there was %d", id, in.Generation, highest)
		}
	}
	if bound := r.Snapshot("echo").Instance("bound"); r.CheckAddr(bound, netip.MustParseAddrPort("127.0.0.1:1")) != nil || r.CheckAddr(bound, netip.MustParseAddrPort("10.0.0.1:1")) == nil {
		t.Errorf("the networks of who registered it are lost: %+v", bound)
	}
	if patched := r.Snapshot("echo").Instance("patched"); patched.Weight != 5 || patched.Metadata["zone"] != "b" {
		t.Errorf("%+v", patched)
	}
	if err := r.Patch("echo", "patched", Patch{SetWeight: true, SetState: true, SetMetadata: true}); err != nil {
		t.Fatal(err)
	}
	if patched := r.Snapshot("echo").Instance("patched"); patched.Weight != 2 || patched.Metadata["zone"] != "a" || patched.State() != Up {
		t.Errorf("%+v", patched)
	}
	if all := r.Snapshot("echo").Instance("all"); all.Check == nil || !all.Check.Accepts(399) || !all.Restored() {
		t.Errorf("%+v", all)
	}
	if held := r.Snapshot("held").Instance("b"); held.TTL != time.Minute || held.lease == nil || held.hold != nil {
		t.Errorf("%+v", held)
	}
}

// A file that cannot be used is said to be so, and nothing is written to it.
func TestBadFiles(t *testing.T) {
	good := t.TempDir()
	r := reopen(t, good)
	together(300, func(i int) {
		if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1"}); err != nil {
			t.Error(err)
		}
	})
	r.Close()
	sound, err := os.ReadFile(filepath.Join(good, fileName))
	if err != nil {
		t.Fatal(err)
	}
	// rewritten is a file to which bbolt itself has done something.
	rewritten := func(f func(about, instances *bbolt.Bucket) error) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, sound, 0o600); err != nil {
				t.Fatal(err)
			}
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Update(func(tx *bbolt.Tx) error { return f(tx.Bucket(aboutBucket), tx.Bucket(instancesBucket)) }); err != nil {
				t.Fatal(err)
			}
			db.Close()
			atRest(t, path)
		}
	}
	raw := func(data []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	record := func(text string) func(t *testing.T, path string) {
		return rewritten(func(_, instances *bbolt.Bucket) error {
			at := key{"echo", "a"}.bytes()
			return instances.Put(at, seal(at, []byte(text)))
		})
	}
	rows := []struct {
		name string
		make func(t *testing.T, path string)
		want string
	}{
		{"empty", raw(nil), "is damaged"},
		{"a word", raw([]byte("hello")), "is damaged"},
		{"garbage", raw([]byte(strings.Repeat("garbage ", 10_000))), "is damaged"},
		{"zeroes", raw(make([]byte, 65536)), "is damaged"},
		{"another version", rewritten(func(about, _ *bbolt.Bucket) error { return about.Put(versionKey, []byte("3")) }), "has version \"3\", this one knows 2"},
		{"no version", rewritten(func(about, _ *bbolt.Bucket) error { return about.Delete(versionKey) }), "has no version"},
		{"something else", rewritten(func(about, _ *bbolt.Bucket) error { return about.Put([]byte("colour"), []byte("red")) }), "has \"colour\" in \"about\""},
		{"a value that is not sealed", rewritten(func(_, instances *bbolt.Bucket) error { return instances.Put([]byte("echo\x00a"), []byte("{}")) }), "is damaged"},
		{"a key that was changed", rewritten(func(_, instances *bbolt.Bucket) error {
			return instances.Put([]byte("echo\x00b"), seal([]byte("echo\x00a"), []byte("{}")))
		}), "is damaged"},
		{"an instance less", rewritten(func(_, instances *bbolt.Bucket) error { return instances.Delete(key{"echo", "7"}.bytes()) }), "does not add up"},
		{"no sum", rewritten(func(about, _ *bbolt.Bucket) error { return about.Delete(sumKey) }), "does not add up"},
		{"a sum that is none", rewritten(func(about, _ *bbolt.Bucket) error { return about.Put(sumKey, seal(sumKey, []byte("x"))) }), "is damaged"},
		{"no JSON", record("{"), "another version"},
		{"a field that is not known", record(`{"addr":"http://127.0.0.1:1","colour":"red"}`), `unknown field "colour"`},
		{"an addr that is none", record(`{"addr":"10.0.0.1"}`), "instance \"a\" of service \"echo\": addr:"},
		{"a weight out of bounds", record(`{"addr":"http://127.0.0.1:1","weight":-1}`), "weight"},
		{"an override out of bounds", record(`{"addr":"http://127.0.0.1:1","override":{"weight":0}}`), "override: weight"},
		{"a directory", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, "is no file"},
		{"not to be read", func(t *testing.T, path string) {
			if os.Geteuid() == 0 {
				t.Skip("root may read everything")
			}
			if err := os.WriteFile(path, sound, 0o200); err != nil {
				t.Fatal(err)
			}
		}, "permission denied"},
		{"in use", func(t *testing.T, path string) {
			raw(sound)(t, path)
			other, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { other.Close() })
		}, "is in use by another process"},
	}
	last := readMetas(sound)[0]
	end := int(last.high * last.size) // there is room behind it
	for _, n := range []int{1, 100, 4096, 8192, 12288, end / 2, end - 4096, end - 1} {
		rows = append(rows, struct {
			name string
			make func(t *testing.T, path string)
			want string
		}{fmt.Sprintf("cut after %d of %d bytes", n, end), raw(sound[:n]), "is damaged"})
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			row.make(t, path)
			before, _ := os.ReadFile(path)
			began := time.Now()
			r, err := Open(Config{}, dir)
			if err == nil {
				r.Close()
				t.Fatal("it was taken")
			}
			if !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v; want %q and the path", err, row.want)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
			if after, _ := os.ReadFile(path); !slices.Equal(before, after) {
				t.Error("the file has changed")
			}
			if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
				t.Errorf("files: %v", names)
			}
		})
	}
}

// A file from before there were sums is read, and has one then.
func TestFileWithoutSum(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	r := reopen(t, dir)
	together(100, func(i int) {
		if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1"}); err != nil {
			t.Error(err)
		}
	})
	want := all(r)
	r.Close()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		about := tx.Bucket(aboutBucket)
		return errors.Join(about.Put(versionKey, []byte(sumlessVersion)), about.Delete(sumKey))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if found, err := readFile(path); err != nil || found.version != sumlessVersion || found.late {
		t.Fatalf("%+v, %v", found, err)
	}
	for range 2 {
		r = reopen(t, dir)
		if diff := difference(want, all(r)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if diff := difference(want, onDisk(t, r)); diff != "" {
			t.Errorf("on disk (-want +got):\n%s", diff)
		}
		r.Close()
		if found, err := readFile(path); err != nil || found.version != fileVersion || !found.settled {
			t.Fatalf("%+v, %v", found, err)
		}
	}
}

// A file at rest says the same in both pages of meta: if one is damaged the other is taken, and the first made anew.
func TestOnePageOfMeta(t *testing.T) {
	for page := range 2 {
		dir := t.TempDir()
		path := filepath.Join(dir, fileName)
		r := reopen(t, dir)
		if err := r.Register("echo", Instance{ID: "a", Addr: "http://127.0.0.1:1"}); err != nil {
			t.Fatal(err)
		}
		r.Close()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[page*int(readMetas(data)[0].size)+pageHeader+20] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r = reopen(t, dir)
		if r.Snapshot("echo").Instance("a") == nil {
			t.Errorf("page %d damaged: it is lost", page)
		}
		r.Close()
		if found, err := readFile(path); err != nil || found.late || !found.settled {
			t.Errorf("page %d damaged, and after a start: %+v, %v", page, found, err)
		}
	}
}

// A file from before there were sums has no transaction that is there in part: what is damaged in its last one is damaged.
func TestDamagedFileWithoutSum(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	reopen(t, dir).Close()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := key{"echo", "a"}.bytes()
	rec := recordOf(&Instance{Addr: "http://127.0.0.1:1"})
	value, err := rec.encode(at)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func(about, instances *bbolt.Bucket) error{
		func(about, _ *bbolt.Bucket) error {
			return errors.Join(about.Put(versionKey, []byte(sumlessVersion)), about.Delete(sumKey))
		},
		func(about, _ *bbolt.Bucket) error { return about.Put(versionKey, []byte(sumlessVersion)) },
		func(_, instances *bbolt.Bucket) error { return instances.Put(at, value) },
	} {
		if err := db.Update(func(tx *bbolt.Tx) error { return f(tx.Bucket(aboutBucket), tx.Bucket(instancesBucket)) }); err != nil {
			t.Fatal(err)
		}
	}
	db.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pair := bytes.Index(data, slices.Concat(at, value))
	data[pair+len(at)+10] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := Open(Config{}, dir); err == nil {
		r.Close()
		t.Error("it was taken")
	}
	if now, _ := os.ReadFile(path); !bytes.Equal(now, data) {
		t.Error("the file has changed")
	}
}

// Gateways that begin in the same directory at once make one file, and one of them gets it.
func TestOpenTogether(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	var got []*Registry
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			r, err := Open(Config{}, dir)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				got = append(got, r)
			} else if !strings.Contains(err.Error(), "another") {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(got) != 1 {
		t.Fatalf("%d have it", len(got))
	}
	if err := got[0].Register("echo", Instance{ID: "a", Addr: "http://127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	got[0].Close()
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("files: %v", names)
	}
	if r := reopen(t, dir); r.Snapshot("echo").Len() != 1 {
		t.Error("what was registered is lost")
	}
}

// What changes nothing that the file keeps writes nothing, however often it comes.
func TestNothingToWrite(t *testing.T) {
	dir := t.TempDir()
	r := reopen(t, dir)
	in := Instance{ID: "a", Addr: "http://127.0.0.1:1", TTL: time.Minute, Weight: 2, Metadata: map[string]string{"zone": "a"}}
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	three := 3
	if err := r.Patch("echo", "a", Patch{SetWeight: true, Weight: &three}); err != nil {
		t.Fatal(err)
	}
	transaction := func() (id int) {
		_ = r.store.db.View(func(tx *bbolt.Tx) error { id = tx.ID(); return nil })
		return id
	}
	before := transaction()
	for range 100 {
		in.Metadata = map[string]string{"zone": "a"}
		if err := r.Register("echo", in); err != nil {
			t.Fatal(err)
		}
		if err := r.Renew("echo", "a", ""); err != nil {
			t.Fatal(err)
		}
		if err := r.Patch("echo", "a", Patch{SetWeight: true, Weight: &three}); err != nil {
			t.Fatal(err)
		}
	}
	if after := transaction(); after != before {
		t.Errorf("%d transactions", after-before)
	}
	in.Check = &Check{TCP: true}
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	if after := transaction(); after == before {
		t.Error("a check is not written")
	}
	before = transaction()
	in.Weight = 4
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	if after := transaction(); after != before+1 {
		t.Errorf("%d transactions for a change", after-before)
	}
}

// Generations grow over restarts and crashes, also those that were used by what writes nothing.
func TestGenerationsGrow(t *testing.T) {
	dir := t.TempDir()
	highest := uint64(0)
	for range 3 {
		r := reopen(t, dir)
		for range 10 {
			if err := r.Register("echo", Instance{ID: "a", Addr: "http://127.0.0.1:1"}); err != nil {
				t.Fatal(err)
			}
			if got := r.Snapshot("echo").Instance("a").Generation; got <= highest {
				t.Fatalf("%d after %d", got, highest)
			} else {
				highest = got
			}
		}
		crashed := t.TempDir()
		data, err := os.ReadFile(r.store.path)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if err := os.WriteFile(filepath.Join(crashed, fileName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := reopen(t, crashed).Snapshot("echo").Instance("a").Generation; got <= highest {
			t.Errorf("%d after a crash at %d", got, highest)
		}
	}
	if highest > 1000 {
		t.Errorf("%d: an orderly end gives back what was reserved", highest)
	}
}

// Whoever changes something while the registry is closed is told that nothing has changed, or it is on disk.
func TestCloseDuringChanges(t *testing.T) {
	for round := range 20 {
		dir := t.TempDir()
		r := reopen(t, dir)
		var mu sync.Mutex
		acknowledged := map[string]bool{}
		var callers sync.WaitGroup
		for i := range 16 {
			callers.Go(func() {
				for n := 0; ; n++ {
					id := fmt.Sprintf("%d-%d", i, n)
					err := r.Register("echo", Instance{ID: id, Addr: "http://127.0.0.1:1"})
					if err == nil && n%3 == 0 {
						mu.Lock()
						acknowledged[id] = true
						mu.Unlock()
						if err = r.Unregister("echo", id, ""); err == nil {
							mu.Lock()
							acknowledged[id] = false
							mu.Unlock()
						}
					} else if err == nil {
						mu.Lock()
						acknowledged[id] = true
						mu.Unlock()
					}
					if err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(round) * time.Millisecond)
		r.Close()
		r.Close()
		callers.Wait()
		s := reopen(t, dir).Snapshot("echo")
		for id, want := range acknowledged {
			if got := s.Instance(id) != nil; got != want {
				t.Fatalf("round %d: %s is there: %v, want %v", round, id, got, want)
			}
		}
	}
}

// Changes that come together share transactions, and nothing is left behind.
func TestStoreLeavesNothing(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	r := reopen(t, t.TempDir())
	rounds := 10_000
	if testing.Short() {
		rounds = 1000
	}
	const callers = 100
	together(callers, func(i int) {
		for n := range rounds / callers {
			id := fmt.Sprintf("%d-%d", i, n%5)
			if err := r.Register("echo", Instance{ID: id, Addr: "http://127.0.0.1:1", TTL: time.Hour}); err != nil {
				t.Error(err)
			}
			if err := r.Renew("echo", id, ""); err != nil {
				t.Error(err)
			}
			if err := r.Unregister("echo", id, "http://127.0.0.1:1"); err != nil {
				t.Error(err)
			}
		}
	})
	if got := onDisk(t, r); len(got) != 0 {
		t.Errorf("on disk: %v", got)
	}
	r.mu.Lock()
	if len(r.store.next.keys) != 0 || len(r.leases) != 0 || len(r.Names()) != 0 {
		t.Errorf("left: %v, %d leases, %v", r.store.next.keys, len(r.leases), r.Names())
	}
	r.mu.Unlock()
	r.Close()
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), goroutines)
		}
	}
}

// A drain that was under way ends with the process: the instance is not registered after it.
func TestDrainAndRestart(t *testing.T) {
	dir := t.TempDir()
	addr := listener(t)
	r := reopen(t, dir)
	for _, id := range []string{"a", "b"} {
		if err := r.Register("echo", Instance{ID: id, Addr: addr}); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := r.Drain("echo", "b", "", time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := onDisk(t, r); len(got) != 1 {
		t.Errorf("a drain has returned, and on disk is %v", got)
	}
	busy := &underWay{}
	busy.now.Store(1)
	r.Observe(busy.of)
	ended := make(chan error, 1)
	go func() {
		_, _, err := r.Drain("echo", "a", "", time.Hour)
		ended <- err
	}()
	for r.Snapshot("echo").Instance("a").State() != Drain {
		time.Sleep(time.Millisecond)
	}
	r.Close()
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("the drain: %v", err)
	}
	r = reopen(t, dir)
	if s := r.Snapshot("echo"); s != nil {
		t.Errorf("it is back: %+v", s.Instance("a"))
	}
	r.Close()
	if found, err := readFile(filepath.Join(dir, fileName)); err != nil || len(found.instances) != 0 {
		t.Errorf("%+v, %v", found, err)
	}
}

// What is not reached at the start is up when it accepts connections, or was heard of.
func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	addrs := map[string]string{}
	r := reopen(t, dir)
	for _, id := range []string{"comes", "renews", "renews-its-lease", "registers", "moves", "never"} {
		addrs[id] = refuser(t)
		in := Instance{ID: id, Addr: addrs[id]}
		if id == "renews-its-lease" {
			in.TTL = time.Minute
		}
		if err := r.Register("echo", Instance{ID: in.ID, Addr: in.Addr, TTL: in.TTL}); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	r = reopen(t, dir)
	state := func(id string) State { return r.Snapshot("echo").Instance(id).State() }
	for id := range addrs {
		if state(id) != Unreachable {
			t.Errorf("%s is %s", id, state(id))
		}
	}
	for _, id := range []string{"renews", "renews-its-lease"} {
		if err := r.Renew("echo", id, ""); err != nil || state(id) != Up {
			t.Errorf("%s is %s: %v", id, state(id), err)
		}
	}
	if err := r.Register("echo", Instance{ID: "registers", Addr: addrs["registers"]}); err != nil || state("registers") != Up {
		t.Errorf("%s: %v", state("registers"), err)
	}
	if err := r.Register("echo", Instance{ID: "moves", Addr: listener(t)}); err != nil || state("moves") != Up {
		t.Errorf("%s: %v", state("moves"), err)
	}
	heard := make(chan string, 100)
	r.OnChange(func(s string) { heard <- s })
	ln, err := net.Listen("tcp", strings.TrimPrefix(addrs["comes"], "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	select {
	case <-heard:
	case <-time.After(10 * knockEvery):
		t.Fatal("it is not looked for")
	}
	if state("comes") != Up || state("never") != Unreachable {
		t.Errorf("%s, %s", state("comes"), state("never"))
	}
}

// An instance that may not be registered any more stays, and is not asked for a connection.
func TestRefusedByNow(t *testing.T) {
	dir := t.TempDir()
	r := reopen(t, dir)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := r.Register("echo", Instance{ID: "a", Addr: "http://" + ln.Addr().String()}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	var log strings.Builder
	r, err = Open(Config{Addrs: AddrPolicy{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, Log: slog.New(slog.NewTextHandler(&log, nil))}, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if in := r.Snapshot("echo").Instance("a"); in == nil || r.CheckAddr(in, netip.MustParseAddrPort(ln.Addr().String())) == nil {
		t.Errorf("%+v", in)
	}
	if !strings.Contains(log.String(), "instance=echo/a") || !strings.Contains(log.String(), "--addr-deny") {
		t.Error(log.String())
	}
	if err := ln.(*net.TCPListener).SetDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := ln.Accept(); err == nil {
		t.Error("it was asked for a connection")
	}
	if err := r.Unregister("echo", "a", ""); err != nil || len(onDisk(t, r)) != 0 {
		t.Error(err)
	}
}

// While nothing can be written, changes are in force, and their callers are told that they are not on disk.
func TestNotSaved(t *testing.T) {
	t.Parallel() // it waits most of the time, as the next one does
	alive := listener(t)
	var log lines
	r, err := Open(Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, id := range []string{"a", "b", "same"} {
		if err := r.Register("echo", Instance{ID: id, Addr: alive}); err != nil {
			t.Fatal(err)
		}
	}
	r.store.db.Close() // TestDiskFull has the real thing
	h := NewHandler(r, nil)
	post := func(target, body string) *fasthttp.Response {
		return call(h, near, http.MethodPost, target, body)
	}
	began := time.Now()
	for name, response := range map[string]*fasthttp.Response{
		"register": post("/register", `{"service":"echo","id":"c","addr":"`+alive+`"}`),
		"hold":     post("/register?hold", `{"service":"echo","id":"d","addr":"`+alive+`"}`),
		"delete":   call(h, near, http.MethodDelete, "/services/echo/a", ""),
		"drain":    call(h, near, http.MethodDelete, "/services/echo/b?drain=1s", ""),
		"patch":    call(h, near, http.MethodPatch, "/services/echo/c", `{"weight":7}`),
	} {
		if body := string(response.Body()); response.StatusCode() != http.StatusServiceUnavailable || string(response.Header.Peek("Retry-After")) != "1" || !strings.Contains(body, "in force, but not on disk") {
			t.Errorf("%s: %d %s", name, response.StatusCode(), body)
		}
	}
	if took := time.Since(began); took > 5*(savePause+drainTick+time.Second)*10 {
		t.Errorf("it took %v to say so", took)
	}
	if response := post("/register", `{"service":"echo","id":"same","addr":"`+alive+`"}`); response.StatusCode() != http.StatusNoContent {
		t.Errorf("what needs nothing written: %d %s", response.StatusCode(), response.Body())
	}
	if got, want := ids(r.Snapshot("echo")), []string{"c", "d", "same"}; !slices.Equal(got, want) {
		t.Errorf("in force: %v, want %v", got, want)
	}
	if d := r.Snapshot("echo").Instance("d"); d.hold != nil || d.lease == nil {
		t.Errorf("nobody holds it: %+v", d)
	}
	r.Close()
	if got := log.String(); strings.Count(got, "cannot be written") != 1 || !strings.Contains(got, "changes are lost") {
		t.Error(got)
	}
	if response := post("/register", `{"service":"echo","id":"e","addr":"`+alive+`"}`); response.StatusCode() != http.StatusServiceUnavailable || !strings.Contains(string(response.Body()), "the gateway stops: nothing has changed") {
		t.Errorf("when it is closed: %d %s", response.StatusCode(), response.Body())
	}
}

// A write that hangs holds up neither readers nor other changes, and is told to be late.
func TestLateWrite(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	t.Parallel()
	r := reopen(t, t.TempDir())
	hanging, err := r.store.db.Begin(true)
	if err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	began := time.Now()
	for i := range 10 {
		callers.Go(func() {
			if err := r.Register("echo", Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1"}); err != ErrNotSaved {
				t.Error(err)
			}
		})
	}
	for r.Snapshot("echo") == nil || r.Snapshot("echo").Len() < 10 {
		if time.Since(began) > saveTimeout {
			t.Fatal("changes wait for each other")
		}
		time.Sleep(time.Millisecond)
	}
	callers.Wait()
	if took := time.Since(began); took < saveTimeout {
		t.Errorf("late after %v", took)
	}
	if err := hanging.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := r.Register("echo", Instance{ID: "last", Addr: "http://127.0.0.1:1"}); err != nil || len(onDisk(t, r)) != 11 {
		t.Errorf("%v, on disk %v", err, onDisk(t, r))
	}
}
