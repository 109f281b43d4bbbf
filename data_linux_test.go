package main

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// While the disk is full changes are in force, and answered 503; they are on disk when it has room again.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skip("no file system of its own: ", err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	g := keep(t, dir)
	post := func(id string) (int, string) {
		t.Helper()
		status, text, err := g.call(http.MethodPost, "/register", `{"service":"echo","id":"`+id+`","addr":"http://127.0.0.1:1","metadata":{"long":"`+strings.Repeat("x", 500)+`"}}`)
		if err != nil {
			t.Fatal(err)
		}
		return status, text
	}
	if status, text := post("before"); status != http.StatusNoContent {
		t.Fatal(status, text)
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for buf := make([]byte, 4096); ; {
		if _, err := filler.Write(buf); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	var registered []string
	status, text := http.StatusNoContent, ""
	for len(registered) < 500 && status == http.StatusNoContent { // there is some room in the file
		id := strings.Repeat("n", 1+len(registered)/26) + string(rune('a'+len(registered)%26))
		registered = append(registered, id)
		status, text = post(id)
	}
	if status != http.StatusServiceUnavailable || !strings.Contains(text, "in force, but not on disk") {
		t.Fatalf("after %d: %d %s", len(registered), status, text)
	}
	if len(g.services()) != 1+len(registered) {
		t.Error("what was answered 503 is not in force")
	}
	if status, text := post("late"); status != http.StatusServiceUnavailable {
		t.Error(status, text)
	}
	registered = append(registered, "late")
	if !g.logged("registrations cannot be written", "no space left") || strings.Count(g.stderr.String(), "cannot be written") != 1 {
		t.Error("the log does not say so once")
	}
	if err := filler.Truncate(0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "they are written", func() bool { return g.logged("registrations are written again") })
	if status, text := post("after"); status != http.StatusNoContent {
		t.Error(status, text)
	}
	g.kill()
	g = keep(t, dir)
	if got := len(g.services()); got != 2+len(registered) {
		t.Errorf("%d instances, want %d", got, 2+len(registered))
	}
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
