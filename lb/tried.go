package lb

// MaxTried is how many endpoints a Tried holds: a request asks no more instances than that.
const MaxTried = 8

// Tried is the set of indices of one balancer that a request has used already. The zero value is empty, and a nil one is
// empty for good: Add and Reset of it do nothing.
type Tried struct {
	n     int
	index [MaxTried]int32 // the first n, ascending
}

// Add puts i into the set. It does nothing if i is in it or the set is full: whoever retries stops at MaxTried.
func (t *Tried) Add(i int) {
	if t == nil || t.n == MaxTried || t.Has(i) {
		return
	}
	at := t.n
	for ; at > 0 && t.index[at-1] > int32(i); at-- {
		t.index[at] = t.index[at-1]
	}
	t.index[at] = int32(i)
	t.n++
}

// Has tells whether i is in the set.
func (t *Tried) Has(i int) bool {
	if t == nil {
		return false
	}
	for _, j := range t.index[:t.n] {
		if j == int32(i) {
			return true
		}
	}
	return false
}

// Len is the number of indices in the set.
func (t *Tried) Len() int {
	if t == nil {
		return 0
	}
	return t.n
}

// Reset empties the set.
func (t *Tried) Reset() {
	if t != nil {
		t.n = 0
	}
}

// left is how many of the indices 0..n-1 are not in the set.
func (t *Tried) left(n int) int {
	left := n
	if t != nil {
		for _, j := range t.index[:t.n] {
			if j >= 0 && int(j) < n {
				left--
			}
		}
	}
	return left
}

// nth returns the k-th index (from 0) that is not in the set.
func (t *Tried) nth(k int) int {
	for _, j := range t.index[:t.n] { // ascending, so that each one passed moves k on by one
		if int(j) >= 0 && k >= int(j) {
			k++
		}
	}
	return k
}
