package proxy

import (
	"testing"
	"unsafe"
)

// An upstream is marked with others of its page only up to 512 bytes, and its usage has a pair of cache lines for itself only if it
// has the size of one.
func TestUpstreamSizes(t *testing.T) {
	if size := unsafe.Sizeof(upstream{}); size > 512 {
		t.Errorf("an upstream has %d bytes", size)
	}
	if size := unsafe.Sizeof(usage{}); size != 128 {
		t.Errorf("its usage has %d bytes", size)
	}
}
