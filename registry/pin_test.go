package registry

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

func pinned(service, id, addr string) Pinned {
	return Pinned{service, Instance{ID: id, Addr: addr}}
}

func TestPin(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	var heard []string
	r.OnChange(func(s string) { heard = append(heard, s) })
	weight := 7
	for _, in := range []Instance{{ID: "a", Addr: "http://10.0.0.1", TTL: time.Minute}, {ID: "z", Addr: "http://10.0.0.9"}} {
		if err := r.Register("users", in); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Patch("users", "a", Patch{SetWeight: true, Weight: &weight}); err != nil {
		t.Fatal(err)
	}
	heard = nil
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "a", "http://10.0.0.2"), pinned("users", "b", "http://10.0.0.3"), pinned("orders", "a", "http://10.0.0.4")}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"orders", "users"}; !slices.Equal(heard, want) {
		t.Errorf("heard of %v, want %v", heard, want)
	}
	a := r.Snapshot("users").Instance("a")
	if a.Addr != "http://10.0.0.2" || a.PinnedBy() != "k.yaml" || a.Weight != 0 || a.Override.Weight != nil {
		t.Errorf("users/a: %+v", a)
	}
	if _, leased := r.ExpiresIn(a); leased {
		t.Error("it has the lease of the registration before")
	}

	generation, down := a.Generation, State(Down)
	for what, call := range map[string]func() error{
		"register":   func() error { return r.Register("users", Instance{ID: "a", Addr: "http://10.0.0.2"}) },
		"unregister": func() error { return r.Unregister("users", "a", "") },
		"patch":      func() error { return r.Patch("users", "a", Patch{SetState: true, State: down}) },
		"drain":      func() error { _, _, err := r.Drain("users", "a", "", time.Second); return err },
		"hold":       func() error { _, err := r.Hold("users", Instance{ID: "a", Addr: "http://10.0.0.2"}); return err },
	} {
		if err := call(); !errors.Is(err, ErrPinned) || !strings.Contains(err.Error(), "k.yaml") {
			t.Errorf("%s: %v, want ErrPinned", what, err)
		}
	}
	if err := r.Renew("users", "a", ""); err != nil {
		t.Errorf("a heartbeat, which changes nothing: %v", err)
	}
	if now := r.Snapshot("users").Instance("a"); now != a || now.Generation != generation {
		t.Errorf("it has changed: %+v", now)
	}

	// The next one: a stays as it is, b gets another addr, orders goes.
	heard = nil
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "a", "http://10.0.0.2"), pinned("users", "b", "http://10.0.0.5")}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"orders", "users"}; !slices.Equal(heard, want) {
		t.Errorf("heard of %v, want %v", heard, want)
	}
	if r.Snapshot("users").Instance("a") != a || r.Snapshot("users").Instance("b").Addr != "http://10.0.0.5" || r.Snapshot("orders") != nil {
		t.Errorf("%v, orders %v", r.Snapshot("users").Instances(), r.Snapshot("orders"))
	}
	heard = nil
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "b", "http://10.0.0.5"), pinned("users", "a", "http://10.0.0.2")}); err != nil || heard != nil {
		t.Errorf("nothing new: %v, heard of %v", err, heard)
	}

	// One that is wrong, and all stays.
	for _, bad := range []Pinned{pinned("users", "c", "http://169.254.1.1"), pinned("us/ers", "c", "http://10.0.0.1"), pinned("users", "b", "http://10.0.0.5")} {
		err := r.Pin("k.yaml", []Pinned{pinned("users", "b", "http://10.0.0.6"), bad})
		if err == nil || !strings.Contains(err.Error(), bad.Instance.ID) || r.Snapshot("users").Instance("b").Addr != "http://10.0.0.5" || r.Snapshot("users").Len() != 3 {
			t.Errorf("%v: %v", bad, err)
		}
	}

	// What is left out may register again.
	if err := r.Pin("", nil); err != nil || r.Snapshot("users").Len() != 1 {
		t.Errorf("no more: %v, %v", err, r.Snapshot("users").Instances())
	}
	if err := r.Register("users", Instance{ID: "a", Addr: "http://10.0.0.1"}); err != nil || r.Snapshot("users").Instance("a").PinnedBy() != "" {
		t.Errorf("%v", err)
	}
}

// What the configuration holds is not in the file, and its place there is empty afterwards.
func TestPinAndStore(t *testing.T) {
	dir := t.TempDir()
	open := func() *Registry {
		t.Helper()
		r, err := Open(Config{}, dir)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := open()
	for _, id := range []string{"a", "b"} {
		if err := r.Register("users", Instance{ID: id, Addr: "http://127.0.0.1:9"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "a", "http://127.0.0.1:10"), pinned("users", "c", "http://127.0.0.1:10")}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	r = open()
	if got := r.Snapshot("users").Instances(); len(got) != 1 || got[0].ID != "b" {
		t.Errorf("after a restart: %v", got)
	}
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "a", "http://127.0.0.1:10")}); err != nil {
		t.Fatal(err)
	}
	if err := r.Pin("k.yaml", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Register("users", Instance{ID: "a", Addr: "http://127.0.0.1:11"}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	r = open()
	defer r.Close()
	if got := r.Snapshot("users").Instance("a"); got == nil || got.Addr != "http://127.0.0.1:11" {
		t.Errorf("registered after it was held: %+v", got)
	}
}

// The log of changes says what the configuration has changed, and what was before.
func TestPinIsLogged(t *testing.T) {
	var out bytes.Buffer
	r := New(Config{Log: slog.New(slog.NewTextHandler(&out, nil))})
	defer r.Close()
	a := pinned("users", "a", "http://127.0.0.1:10")
	heavier, elsewhere := a, pinned("users", "a", "http://127.0.0.1:11")
	heavier.Instance.Weight = 3
	for i, row := range []struct {
		all  []Pinned
		want string
	}{
		{nil, ""},
		{[]Pinned{a}, "action=pin instance=users/a by=k.yaml addr=http://127.0.0.1:10\n"},
		{[]Pinned{a}, ""},
		{[]Pinned{heavier}, "action=pin instance=users/a by=k.yaml weight=3 was.weight=0\n"},
		{[]Pinned{elsewhere}, "action=pin instance=users/a by=k.yaml addr=http://127.0.0.1:11 weight=0 was.addr=http://127.0.0.1:10 was.weight=3\n"},
		{nil, "action=unpin instance=users/a by=k.yaml addr=http://127.0.0.1:11\n"},
	} {
		out.Reset()
		if err := r.Pin("k.yaml", row.all); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(out.String(), row.want) || (row.want == "") != (out.Len() == 0) {
			t.Errorf("%d: %q, want %q", i, out.String(), row.want)
		}
	}
}

func TestPinOverAPI(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	if err := r.Pin("k.yaml", []Pinned{pinned("users", "a", "http://127.0.0.1:10")}); err != nil {
		t.Fatal(err)
	}
	handler := NewHandler(r, nil)
	for _, test := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/register", `{"service":"users","id":"a","addr":"http://10.0.0.1:11"}`, 409},
		{"POST", "/register?hold", `{"service":"users","id":"a","addr":"http://10.0.0.1:11"}`, 409},
		{"DELETE", "/register", `{"service":"users","id":"a"}`, 409},
		{"DELETE", "/services/users/a", "", 409},
		{"DELETE", "/services/users/a?drain=1s", "", 409},
		{"PATCH", "/services/users/a", `{"state":"down"}`, 409},
		{"POST", "/services/users/a/heartbeat", "", 204},
		{"GET", "/services/users/a", "", 200},
		{"POST", "/register", `{"service":"users","id":"b","addr":"http://10.0.0.1:11"}`, 204},
	} {
		ctx := &fasthttp.RequestCtx{}
		ctx.Request.Header.SetMethod(test.method)
		ctx.Request.SetRequestURI(test.path)
		ctx.Request.Header.SetContentType("application/json")
		ctx.Request.SetBodyString(test.body)
		handler(ctx)
		status, body := ctx.Response.StatusCode(), string(ctx.Response.Body())
		if status != test.want || status == 409 && !strings.Contains(body, "k.yaml") || status == 200 && !strings.Contains(body, `"pinned_by":"k.yaml"`) {
			t.Errorf("%s %s: %d %s", test.method, test.path, status, body)
		}
	}
}

func TestPinMany(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	calls := 0
	r.OnChange(func(string) { calls++ })
	var all []Pinned
	for i := range 10_000 {
		all = append(all, pinned("users", fmt.Sprint("i", i), "http://10.0.0.1"))
	}
	if err := r.Pin("k.yaml", all); err != nil || calls != 1 || r.Snapshot("users").Len() != len(all) {
		t.Errorf("%v, %d calls, %d instances", err, calls, r.Snapshot("users").Len())
	}
}
