package main

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// Every duration is in a bucket whose top is not below it, and less than 1 % above.
func TestHistogramBuckets(t *testing.T) {
	last := -1
	for ns := uint64(0); ns < 1_000_000_000_000; ns += max(1, ns/1000) {
		b := bucketOf(ns)
		if top := topOf(b); top < ns || float64(top-ns) > 0.01*float64(ns) {
			t.Fatalf("%d ns: bucket %d, whose top is %d", ns, b, top)
		}
		if b < last || ns > 0 && bucketOf(topOf(b)) != b || ns > 0 && bucketOf(topOf(b)+1) != b+1 {
			t.Fatalf("%d ns: bucket %d, after %d", ns, b, last)
		}
		last = b
	}
	if b := bucketOf(math.MaxUint64); b != buckets-1 {
		t.Errorf("more than all: bucket %d", b)
	}
}

func TestHistogramQuantiles(t *testing.T) {
	var h histogram
	if q := h.quantile(0.5); q != 0 {
		t.Errorf("of none: %s", q)
	}
	var all []int64
	r := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		ns := int64(math.Exp(r.Float64() * 20))
		all = append(all, ns)
		h.add(ns)
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		exact := time.Duration(all[max(int(math.Ceil(q*float64(len(all))))-1, 0)])
		if got := h.quantile(q); got < exact || float64(got) > 1.01*float64(exact)+1 {
			t.Errorf("%v: %d, want %d", q, got, exact)
		}
	}
	h.add(-5) // the clock cannot do that, but nothing must break
	if q := h.quantile(0); q > 1 {
		t.Errorf("the least of all: %d", q)
	}
}

// Halves that are counted apart, and one of them sent as JSON, are the whole.
func TestHistogramMerges(t *testing.T) {
	var whole, a, b histogram
	for i := range int64(1000) {
		whole.add(i * i * i)
		if i%3 == 0 {
			a.add(i * i * i)
		} else {
			b.add(i * i * i)
		}
	}
	text, err := json.Marshal(&b)
	if err != nil {
		t.Fatal(err)
	}
	var read histogram
	read.add(1) // what was there before is gone
	if err := json.Unmarshal(text, &read); err != nil || read != b {
		t.Errorf("%v: %d of %d\n%s", err, read.n, b.n, text)
	}
	if a.merge(&read); a != whole {
		t.Errorf("%d of %d", a.n, whole.n)
	}
	for _, text := range []string{"{}", "[[1]]x", "[[-1,1]]", "[[1,-1]]", "[[99999999,1]]", "[[1,5000000000]]"} {
		if json.Unmarshal([]byte(text), &read) == nil {
			t.Errorf("%s: no error", text)
		}
	}
}
