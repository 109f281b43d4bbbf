package registry

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
)

// What an operator writes lies over what the instance says, key by key, survives its registrations and can be taken away.
func TestMetadata(t *testing.T) {
	r := New(Config{})
	h := NewHandler(r, nil)
	register := func(metadata string) {
		t.Helper()
		wantNoContent(t, call(h, near, "POST", "/register", `{"service":"echo","id":"a","addr":"http://localhost:1","metadata":`+metadata+`}`))
	}
	patch := func(metadata string) {
		t.Helper()
		wantNoContent(t, call(h, near, "PATCH", "/services/echo/a", `{"metadata":`+metadata+`}`))
	}
	want := func(override, metadata string) {
		t.Helper()
		got := string(call(h, near, "GET", "/services/echo/a", "").Body())
		if text := `"override":` + override + `,"metadata":` + metadata + `,"generation"`; !strings.Contains(got, text) {
			t.Errorf("got %s, want %s", got, text)
		}
	}
	register(`{"zone":"eu","version":"1"}`)
	want(`null`, `{"version":"1","zone":"eu"}`)
	patch(`{"zone":"us","owner":"ann"}`)
	want(`{"weight":null,"metadata":{"owner":"ann","zone":"us"}}`, `{"owner":"ann","version":"1","zone":"us"}`)
	register(`{"zone":"asia","version":"2"}`)
	want(`{"weight":null,"metadata":{"owner":"ann","zone":"us"}}`, `{"owner":"ann","version":"2","zone":"us"}`)
	patch(`{}`)
	patch(`{"zone":null,"nothing":null}`)
	want(`{"weight":null,"metadata":{"owner":"ann"}}`, `{"owner":"ann","version":"2","zone":"asia"}`)
	patch(`{"owner":null}`)
	want(`null`, `{"version":"2","zone":"asia"}`)
	patch(`{"owner":"ann"}`)
	patch(`null`)
	want(`null`, `{"version":"2","zone":"asia"}`)
	wantNoContent(t, call(h, near, "PUT", "/services/echo/a", `{"addr":"http://localhost:1"}`))
	want(`null`, `{}`)
}

func TestMetadataBounds(t *testing.T) {
	many := func(n int) map[string]string {
		pairs := map[string]string{}
		for i := range n {
			pairs[fmt.Sprint("k", i)] = "v"
		}
		return pairs
	}
	changes := func(pairs map[string]string) map[string]*string {
		all := map[string]*string{}
		for key, value := range pairs {
			all[key] = &value
		}
		return all
	}
	r := New(Config{})
	var bad *FieldError
	for says, pairs := range map[string]map[string]string{
		"65 pairs":             many(maxMetadata + 1),
		"missing or empty":     {"": "v"},
		"not allowed":          {"a b": "v"},
		"129 bytes":            {strings.Repeat("k", 129): "v"},
		"513 bytes":            {"k": strings.Repeat("v", maxMetadataValue+1)},
		"must be UTF-8":        {"k": "\xff"},
		"control character U+": {"k": "a\nb"},
	} {
		if err := r.Register("echo", Instance{ID: "a", Addr: "http://10.0.0.1", Metadata: pairs}); !errors.As(err, &bad) || bad.Field != "metadata" || !strings.Contains(err.Error(), says) {
			t.Errorf("registered: %v, want %s", err, says)
		}
		if r.Register("echo", Instance{ID: "b", Addr: "http://10.0.0.1"}) != nil {
			t.Fatal("not registered")
		}
		if err := r.Patch("echo", "b", Patch{SetMetadata: true, Pairs: changes(pairs)}); !errors.As(err, &bad) || bad.Field != "metadata" || !strings.Contains(err.Error(), says) {
			t.Errorf("patched: %v, want %s", err, says)
		}
	}
	own := many(maxMetadata)
	if err := r.Register("echo", Instance{ID: "a", Addr: "http://10.0.0.1", Metadata: own}); err != nil {
		t.Fatal(err)
	}
	own["k0"] = "changed by the caller"
	if got := r.Snapshot("echo").Instance("a").Metadata; !maps.Equal(got, many(maxMetadata)) {
		t.Errorf("got %v", got)
	}
	if err := r.Patch("echo", "a", Patch{SetMetadata: true, Pairs: changes(many(maxMetadata))}); err != nil {
		t.Error(err)
	}
	over := changes(map[string]string{"one-more": "v"})
	if err := r.Patch("echo", "a", Patch{SetMetadata: true, Pairs: over}); !errors.As(err, &bad) || r.Snapshot("echo").Instance("a").Metadata["one-more"] != "" {
		t.Errorf("one more, by and by: %v", err)
	}
}
