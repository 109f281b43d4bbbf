package main

import (
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"time"
)

// histogram counts durations in buckets of at most 1/128 of their value: the layout of HdrHistogram, in 17 KiB. The zero
// value is empty.
type histogram struct {
	counts [buckets]uint32
	n      int
}

const (
	fineBits = 7              // 1<<fineBits buckets for each power of two
	buckets  = 34 << fineBits // up to 18 minutes; what is longer counts as that
)

// bucketOf returns the bucket of ns: how often it is halved until it fits into 8 bits, followed by the lower 7 of these.
func bucketOf(ns uint64) int {
	halved := max(bits.Len64(ns)-fineBits-1, 0)
	return min(halved<<fineBits+int(ns>>halved), buckets-1)
}

// topOf returns the largest duration that a bucket counts, in ns.
func topOf(bucket int) uint64 {
	halved := max(bucket>>fineBits-1, 0)
	return uint64(bucket-halved<<fineBits+1)<<halved - 1
}

// add counts one duration, in ns.
func (h *histogram) add(ns int64) {
	h.counts[bucketOf(uint64(max(ns, 0)))]++
	h.n++
}

// merge adds what another one counted.
func (h *histogram) merge(other *histogram) {
	for i, c := range other.counts {
		h.counts[i] += c
	}
	h.n += other.n
}

// MarshalJSON writes the buckets that are not empty, each with its count.
func (h *histogram) MarshalJSON() ([]byte, error) {
	pairs := [][2]int{}
	for i, c := range h.counts {
		if c > 0 {
			pairs = append(pairs, [2]int{i, int(c)})
		}
	}
	return json.Marshal(pairs)
}

// UnmarshalJSON reads them.
func (h *histogram) UnmarshalJSON(b []byte) error {
	var pairs [][2]int
	if err := json.Unmarshal(b, &pairs); err != nil {
		return err
	}
	*h = histogram{}
	for _, p := range pairs {
		if p[0] < 0 || p[0] >= buckets || p[1] < 0 || p[1] > math.MaxUint32 {
			return fmt.Errorf("no bucket with a count: %v", p)
		}
		h.counts[p[0]] = uint32(p[1])
		h.n += p[1]
	}
	return nil
}

// quantile returns a duration that at least the share q of all is not above: the top of the bucket it is in, so that it
// is less than 1 % too long. Of none it is 0.
func (h *histogram) quantile(q float64) time.Duration {
	rank, seen := max(int(math.Ceil(q*float64(h.n))), 1), 0
	for i, c := range h.counts {
		if seen += int(c); seen >= rank {
			return time.Duration(topOf(i))
		}
	}
	return 0
}
