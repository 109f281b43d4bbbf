package registry

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func register(t testing.TB, r *Registry, service, id, addr string, weight int) {
	t.Helper()
	if err := r.Register(service, Instance{ID: id, Addr: addr, Weight: weight}); err != nil {
		t.Fatal(err)
	}
}

func ids(s *Snapshot) []string {
	var out []string
	if s != nil {
		for _, in := range s.Instances() {
			out = append(out, in.ID)
		}
	}
	return out
}

func TestRegister(t *testing.T) {
	r := New(Config{})
	if r.Snapshot("echo") != nil || len(r.Names()) != 0 || r.Names() == nil {
		t.Fatalf("an empty registry has %v, names %v", r.Snapshot("echo"), r.Names())
	}
	before := time.Now()
	for _, id := range []string{"b", "c", "a", "B"} {
		register(t, r, "echo", id, "http://10.0.0.1:80/"+id, 2)
	}
	register(t, r, "alpha", "a", "https://name.example", 0)

	if got, want := r.Names(), []string{"alpha", "echo"}; !slices.Equal(got, want) {
		t.Errorf("Names() = %v, want %v", got, want)
	}
	s := r.Snapshot("echo")
	if got, want := ids(s), []string{"B", "a", "b", "c"}; !slices.Equal(got, want) {
		t.Errorf("ids %v, want them sorted: %v", got, want)
	}
	if s.Service() != "echo" {
		t.Errorf("Service() = %q", s.Service())
	}
	a := s.Instance("a")
	if a.Addr != "http://10.0.0.1:80/a" || a.Weight != 2 || a.RegisteredAt.Before(before) || a.RegisteredAt.After(time.Now()) {
		t.Errorf("instance a is %+v", a)
	}
	if want := (Target{"http", "10.0.0.1", 80, netip.MustParseAddr("10.0.0.1"), "10.0.0.1", "/a"}); a.Target() != want {
		t.Errorf("Target() = %+v, want %+v", a.Target(), want)
	}
	if s.Instance("x") != nil || r.Snapshot("none").Instance("x") != nil {
		t.Error("an unknown id has an instance")
	}
}

func TestRegisterUpdatesInPlace(t *testing.T) {
	r := New(Config{})
	register(t, r, "echo", "a", "http://10.0.0.1", 1)
	register(t, r, "echo", "b", "http://10.0.0.2", 1)
	old := r.Snapshot("echo")
	first, other := old.Instance("a"), old.Instance("b")
	was := *first

	changes := []Instance{
		{ID: "a", Addr: "http://10.0.0.1", Weight: 7},
		{ID: "a", Addr: "http://10.0.0.3:8080", Weight: 7},
		{ID: "a", Addr: "http://10.0.0.3:8080", Weight: 7}, // nothing changes, and it still succeeds
	}
	last := old
	for _, in := range changes {
		if err := r.Register("echo", in); err != nil {
			t.Fatal(err)
		}
		s := r.Snapshot("echo")
		got := s.Instance("a")
		if len(s.Instances()) != 2 || got.Addr != in.Addr || got.Weight != in.Weight || got.Target().IP.String() == "" {
			t.Errorf("after %+v: %+v among %d", in, got, len(s.Instances()))
		}
		if !got.RegisteredAt.Equal(was.RegisteredAt) {
			t.Errorf("RegisteredAt moved from %v to %v", was.RegisteredAt, got.RegisteredAt)
		}
		if got.Generation <= last.Instance("a").Generation || s.Generation() <= last.Generation() || got.Generation != s.Generation() {
			t.Errorf("generations went from %d/%d to %d/%d", last.Instance("a").Generation, last.Generation(), got.Generation, s.Generation())
		}
		if s.Instance("b") != other {
			t.Error("the other instance was replaced too")
		}
		last = s
	}
	if old.Instance("a") != first || !reflect.DeepEqual(*first, was) || len(old.Instances()) != 2 {
		t.Error("a snapshot that was read before has changed")
	}

	// Leaving and coming back is a new registration.
	if err := r.Unregister("echo", "a", ""); err != nil {
		t.Fatal(err)
	}
	register(t, r, "echo", "a", "http://10.0.0.1", 1)
	if got := r.Snapshot("echo").Instance("a"); !got.RegisteredAt.After(was.RegisteredAt) {
		t.Errorf("RegisteredAt stayed %v over an unregistration", got.RegisteredAt)
	}
}

// What is registered is the registry's own copy, also of what the caller has no business to set.
func TestRegisterCopies(t *testing.T) {
	r := New(Config{Reserved: []string{"services"}})
	in := Instance{ID: "a", Addr: "http://10.0.0.1", Weight: 1, RegisteredAt: time.Unix(1, 0), Generation: 99}
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	in.Weight = 5
	got := r.Snapshot("echo").Instance("a")
	if got.Weight != 1 || got.Generation != 1 || got.RegisteredAt.Unix() == 1 {
		t.Errorf("registered: %+v", got)
	}

	cfg := Config{Reserved: []string{"services"}, Addrs: AddrPolicy{Deny: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	r = New(cfg)
	cfg.Reserved[0], cfg.Addrs.Deny[0] = "x", netip.Prefix{}
	if r.Register("services", in) == nil || r.Register("echo", in) == nil {
		t.Error("the caller's copy of the Config changes the registry")
	}
}

func TestRegisterRefuses(t *testing.T) {
	r := New(Config{Reserved: []string{"register", "services"}})
	register(t, r, "echo", "a", "http://10.0.0.1", 1)
	heard := 0
	r.OnChange(func(string) { heard++ })
	before := r.Snapshot("echo")
	good := Instance{ID: "b", Addr: "http://10.0.0.2", Weight: 1}
	tests := []struct {
		name, service string
		change        func(*Instance)
		field, says   string
	}{
		{"no service", "", nil, "service", "missing"},
		{"bad service", "a/b", nil, "service", "A-Z a-z 0-9 . _ ~ : -"},
		{"reserved", "register", nil, "service", "reserved: the API answers at /register"},
		{"reserved too", "services", nil, "service", "reserved"},
		{"no id", "echo", func(in *Instance) { in.ID = "" }, "id", "missing"},
		{"bad id", "echo", func(in *Instance) { in.ID = ".." }, "id", "A-Z a-z"},
		{"no addr", "echo", func(in *Instance) { in.Addr = "" }, "addr", "missing"},
		{"bad addr", "echo", func(in *Instance) { in.Addr = "10.0.0.1:80" }, "addr", "http or https"},
		{"refused addr", "echo", func(in *Instance) { in.Addr = "http://0.0.0.0" }, "addr", "unspecified"},
		{"weight below", "echo", func(in *Instance) { in.Weight = -1 }, "weight", "from 0 (no weight) to 1000000, not -1"},
		{"weight above", "echo", func(in *Instance) { in.Weight = MaxWeight + 1 }, "weight", "not 1000001"},
		{"known id, bad weight", "echo", func(in *Instance) { in.ID, in.Weight = "a", -1 }, "weight", "integer"},
	}
	for _, tt := range tests {
		in := good
		if tt.change != nil {
			tt.change(&in)
		}
		err := r.Register(tt.service, in)
		var field *FieldError
		if !errors.As(err, &field) || field.Field != tt.field || !strings.Contains(field.Detail, tt.says) {
			t.Errorf("%s: %v; want field %s and %q", tt.name, err, tt.field, tt.says)
		}
	}
	if r.Snapshot("echo") != before || len(r.Names()) != 1 || heard != 0 {
		t.Errorf("refusals changed something: %v, names %v, heard %d", r.Snapshot("echo"), r.Names(), heard)
	}
	for _, weight := range []int{0, 1, MaxWeight} {
		register(t, r, "echo", "b", "http://10.0.0.2", weight)
	}
}

func TestUnregister(t *testing.T) {
	r := New(Config{})
	for _, id := range []string{"a", "b", "c"} {
		register(t, r, "echo", id, "http://10.0.0.1", 1)
	}
	register(t, r, "other", "a", "http://10.0.0.1", 1)
	for _, tt := range [][2]string{{"none", "a"}, {"echo", "x"}, {"", ""}} {
		if err := r.Unregister(tt[0], tt[1], ""); !errors.Is(err, ErrNotFound) {
			t.Errorf("Unregister(%q, %q) = %v, want ErrNotFound", tt[0], tt[1], err)
		}
	}
	old := r.Snapshot("echo")
	for i, want := range [][]string{{"a", "c"}, {"c"}, nil} {
		id := []string{"b", "a", "c"}[i]
		if err := r.Unregister("echo", id, ""); err != nil {
			t.Fatal(err)
		}
		s := r.Snapshot("echo")
		if got := ids(s); !slices.Equal(got, want) {
			t.Errorf("after %s left: %v, want %v", id, got, want)
		}
		if s != nil && s.Generation() <= old.Generation() {
			t.Errorf("the generation stayed %d", s.Generation())
		}
	}
	if len(old.Instances()) != 3 {
		t.Error("a snapshot that was read before has changed")
	}
	if got := r.Names(); !slices.Equal(got, []string{"other"}) {
		t.Errorf("the last instance left, and the names are %v", got)
	}
	if err := r.Unregister("echo", "c", ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("once more: %v", err)
	}
	register(t, r, "echo", "c", "http://10.0.0.1", 1)
	if got := r.Names(); !slices.Equal(got, []string{"echo", "other"}) {
		t.Errorf("a service that came back: %v", got)
	}
}

func TestValidName(t *testing.T) {
	long := strings.Repeat("n", maxName)
	for _, name := range []string{"a", "A-Z.a_z~0:9", "...", ".a", "-", "users", long} {
		if err := ValidName(name); err != nil {
			t.Errorf("ValidName(%q): %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", long + "n", "a b", "a/b", "a%2fb", "é", "a\x00", "a\n", "a?", "a,b", "{a}", "a\xff"} {
		if err := ValidName(name); err == nil || !strings.Contains(err.Error(), "1 to 128 of A-Z a-z 0-9 . _ ~ : -") {
			t.Errorf("ValidName(%q) = %v; want an error that says what is allowed", name, err)
		}
	}
}

// Every function hears every change once, outside the lock, after it is published, and before the change returns.
func TestOnChange(t *testing.T) {
	r := New(Config{})
	register(t, r, "early", "a", "http://10.0.0.1", 1)
	var heard []string
	r.OnChange(func(service string) {
		heard = append(heard, fmt.Sprintf("1 %s %v", service, ids(r.Snapshot(service))))
	})
	r.OnChange(func(service string) {
		heard = append(heard, fmt.Sprintf("2 %s %v", service, ids(r.Snapshot(service))))
		if service == "echo" && len(ids(r.Snapshot(service))) == 2 {
			register(t, r, "nested", "a", "http://10.0.0.1", 1) // would deadlock under the lock
		}
	})
	register(t, r, "echo", "a", "http://10.0.0.1", 1)
	register(t, r, "echo", "b", "http://10.0.0.1", 1)
	register(t, r, "echo", "b", "http://10.0.0.1", 1)
	for _, id := range []string{"a", "b"} {
		if err := r.Unregister("echo", id, ""); err != nil {
			t.Fatal(err)
		}
	}
	_ = r.Unregister("echo", "b", "")
	want := []string{
		"1 echo [a]", "2 echo [a]",
		"1 echo [a b]", "2 echo [a b]", "1 nested [a]", "2 nested [a]",
		"1 echo [a b]", "2 echo [a b]", "1 nested [a]", "2 nested [a]",
		"1 echo [b]", "2 echo [b]",
		"1 echo []", "2 echo []",
	}
	if d := cmp.Diff(want, heard); d != "" {
		t.Errorf("heard (-want +got):\n%s", d)
	}
}

// Two changes of one service may be told at the same time, and a change does not return before it was told.
func TestOnChangeConcurrent(t *testing.T) {
	r := New(Config{})
	var inside sync.WaitGroup
	inside.Add(2)
	release := make(chan struct{})
	r.OnChange(func(string) {
		inside.Done()
		<-release
	})
	var returned atomic.Int32
	var done sync.WaitGroup
	for _, id := range []string{"a", "b"} {
		done.Go(func() {
			if err := r.Register("echo", Instance{ID: id, Addr: "http://10.0.0.1"}); err != nil {
				t.Error(err)
			}
			returned.Add(1)
		})
	}
	inside.Wait() // hangs if one waits for the other
	if n := returned.Load(); n != 0 {
		t.Errorf("%d changes returned before they were told", n)
	}
	if got := ids(r.Snapshot("echo")); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("told of %v, which is not published", got)
	}
	close(release)
	done.Wait()
}

// Readers beside writers see whole snapshots: sorted, with every instance that is always there, never going back, never
// an empty service.
func TestConcurrent(t *testing.T) {
	const writers, changes = 4, 400
	r := New(Config{})
	services := []string{"echo", "users"}
	stable := []string{"c", "m", "x"}
	for _, service := range services {
		for _, id := range stable {
			register(t, r, service, id, "http://10.0.0.1:1", 1)
		}
	}
	var told atomic.Int64
	r.OnChange(func(string) { told.Add(1) })
	var made atomic.Int64
	var writing, reading sync.WaitGroup
	stop := make(chan struct{})
	for w := range writers {
		writing.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			for range changes {
				service, id := services[rnd.IntN(2)], string(rune('a'+rnd.IntN(26)))
				if rnd.IntN(8) == 0 {
					service = "brief" // comes and goes as a whole
				}
				n := rnd.IntN(1000)
				if rnd.IntN(2) == 0 || slices.Contains(stable, id) {
					// weight and addr say the same, so that half a change would show
					if err := r.Register(service, Instance{ID: id, Addr: fmt.Sprintf("http://10.0.0.1:%d", n+1), Weight: n + 1}); err != nil {
						t.Error(err)
					}
					made.Add(1)
				} else if r.Unregister(service, id, "") == nil {
					made.Add(1)
				}
			}
		})
	}
	for range 3 {
		reading.Go(func() {
			seen := map[string]uint64{}
			for {
				select {
				case <-stop:
					return
				default:
				}
				names := r.Names()
				if !slices.IsSorted(names) {
					t.Errorf("names %v", names)
				}
				for _, service := range services {
					if !slices.Contains(names, service) {
						t.Errorf("%s is not in %v", service, names)
					}
				}
				for _, service := range append(names, "brief") {
					s := r.Snapshot(service)
					if s == nil {
						if service != "brief" {
							t.Errorf("%s has gone", service)
						}
						continue
					}
					checkSnapshot(t, s, service)
					if service != "brief" {
						for _, id := range stable {
							if s.Instance(id) == nil {
								t.Errorf("%s without %s: %v", service, id, ids(s))
							}
						}
					}
					if s.Generation() < seen[service] {
						t.Errorf("%s went back from %d to %d", service, seen[service], s.Generation())
					}
					seen[service] = s.Generation()
				}
			}
		})
	}
	writing.Wait()
	close(stop)
	reading.Wait()
	if told.Load() != made.Load() {
		t.Errorf("%d changes made, %d told", made.Load(), told.Load())
	}
}

func checkSnapshot(t *testing.T, s *Snapshot, service string) {
	t.Helper()
	if s.Service() != service || len(s.Instances()) == 0 {
		t.Errorf("snapshot of %s has %d instances of %s", service, len(s.Instances()), s.Service())
	}
	for i, in := range s.Instances() {
		if i > 0 && s.Instances()[i-1].ID >= in.ID {
			t.Errorf("not sorted: %v", ids(s))
		}
		if in.Generation > s.Generation() || int(in.Target().Port) != in.Weight || in.RegisteredAt.IsZero() {
			t.Errorf("half an instance: %+v in generation %d", in, s.Generation())
		}
	}
}

// Any sequence of changes leaves what a map would hold.
func FuzzRegistry(f *testing.F) {
	f.Add([]byte{0, 1, 2, 130, 131, 1, 255})
	f.Add([]byte{0, 128, 0, 0, 128})
	f.Fuzz(func(t *testing.T, ops []byte) {
		r := New(Config{})
		model := map[string]map[string]int{}
		for i, op := range ops {
			service, id := string(rune('a'+op>>4&3)), string(rune('a'+op&15))
			if op < 128 {
				register(t, r, service, id, fmt.Sprintf("http://10.0.0.1:%d", i%60000+1), i%60000+1)
				if model[service] == nil {
					model[service] = map[string]int{}
				}
				model[service][id] = i%60000 + 1
				continue
			}
			_, known := model[service][id]
			if err := r.Unregister(service, id, ""); (err == nil) != known {
				t.Fatalf("Unregister(%s, %s) = %v, known %v", service, id, err, known)
			}
			if delete(model[service], id); len(model[service]) == 0 {
				delete(model, service)
			}
		}
		got := map[string]map[string]int{}
		for _, name := range r.Names() {
			s := r.Snapshot(name)
			checkSnapshot(t, s, name)
			got[name] = map[string]int{}
			for _, in := range s.Instances() {
				got[name][in.ID] = in.Weight
			}
		}
		if d := cmp.Diff(model, got); d != "" {
			t.Fatal(d)
		}
	})
}

// Parts stay in order and of a fit size, whatever comes and goes, and those that a change does not touch are shared.
func TestParts(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var s *Snapshot
	want := map[string]bool{}
	for step := range 20_000 {
		id := fmt.Sprintf("%04d", rnd.IntN(3000))
		before := s
		if step%10_000 < 6000 {
			s = s.with("echo", &Instance{ID: id}, uint64(step))
			want[id] = true
		} else if there := s.Instance(id) != nil; there != want[id] {
			t.Fatalf("step %d: %s is there: %v", step, id, there)
		} else if there {
			s = s.without(id, uint64(step))
			delete(want, id)
		}
		if s.Len() != len(want) {
			t.Fatalf("step %d: %d instances, want %d", step, s.Len(), len(want))
		}
		if step%100 > 0 || before == nil {
			continue
		}
		shared := 0
		for _, p := range s.Parts() {
			if len(p.Instances) == 0 || len(p.Instances) > maxPart {
				t.Fatalf("step %d: a part of %d", step, len(p.Instances))
			}
			if slices.Contains(before.Parts(), p) {
				shared++
			}
		}
		if shared < len(s.Parts())-2 {
			t.Fatalf("step %d: only %d of %d parts are shared", step, shared, len(s.Parts()))
		}
		if n := s.Len() / (minPart / 2); len(s.Parts()) > n+2 {
			t.Fatalf("step %d: %d parts for %d instances", step, len(s.Parts()), s.Len())
		}
		all := s.Instances()
		if !slices.IsSortedFunc(all, func(a, b *Instance) int { return strings.Compare(a.ID, b.ID) }) {
			t.Fatalf("step %d: not sorted", step)
		}
		for _, in := range all {
			if !want[in.ID] || s.Instance(in.ID) != in {
				t.Fatalf("step %d: %s is wrong, or not found", step, in.ID)
			}
		}
	}
}
