package lb

import (
	"slices"
	"testing"
)

func TestTried(t *testing.T) {
	var none *Tried
	none.Add(1)
	none.Reset()
	if none.Has(1) || none.Len() != 0 || none.left(3) != 3 {
		t.Error("a nil Tried is not empty")
	}

	var tried Tried
	for _, i := range []int{5, 2, 9, 2, 0, 7, 5} {
		tried.Add(i)
	}
	for i := range 12 {
		if want := slices.Contains([]int{0, 2, 5, 7, 9}, i); tried.Has(i) != want {
			t.Errorf("Has(%d) = %v", i, !want)
		}
	}
	if tried.Len() != 5 {
		t.Errorf("Len = %d", tried.Len())
	}
	if got := []int{tried.left(0), tried.left(1), tried.left(6), tried.left(100)}; !slices.Equal(got, []int{0, 0, 3, 95}) {
		t.Errorf("left of 0, 1, 6, 100: %v", got)
	}
	for k, want := range []int{1, 3, 4, 6, 8, 10, 11} {
		if got := tried.nth(k); got != want {
			t.Errorf("nth(%d) = %d, want %d", k, got, want)
		}
	}
	for i := range 20 {
		tried.Add(100 + i)
	}
	if tried.Len() != MaxTried || tried.Has(103) {
		t.Errorf("a full one has %d", tried.Len())
	}
	tried.Reset()
	if tried.Len() != 0 || tried.Has(5) {
		t.Error("not empty after Reset")
	}
}
