package registry

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Where the kernel takes no orders fdatasync is called, and an error is one either way.
func TestSync(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	beside, end := newSync(f)
	defer end()
	refused := &queue{file: f} // its context is none that the kernel knows
	if refused.submit() {
		t.Error("the kernel takes an order without a context")
	}
	for name, sync := range map[string]func() error{"beside": beside, "refused": refused.sync} {
		if _, err := f.WriteString("x"); err != nil {
			t.Fatal(err)
		}
		if err := sync(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.Close()
	for name, sync := range map[string]func() error{"beside": beside, "refused": refused.sync} {
		if err := sync(); !errors.Is(err, syscall.EBADF) {
			t.Errorf("%s: a closed file: %v", name, err)
		}
	}
}
