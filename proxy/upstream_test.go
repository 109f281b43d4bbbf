package proxy

import (
	"testing"
	"unsafe"
)

// What requests write of an upstream is the last 128 bytes of 512: see usage.
func TestUpstreamLayout(t *testing.T) {
	var u upstream
	if unsafe.Sizeof(u) != 512 || unsafe.Offsetof(u.usage) != 384 {
		t.Errorf("%d bytes, of which what comes from %d on is written: want 512 and 384", unsafe.Sizeof(u), unsafe.Offsetof(u.usage))
	}
}
