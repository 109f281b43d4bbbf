package accesslog

import (
	"bytes"
	"sync/atomic"
)

// ring is lines on their way from one goroutine to another one: neither waits for the other. Both counters grow for ever.
type ring struct {
	bytes []byte        // ringSize, made with the first line
	read  uint64        // of taken, what put has seen
	_     [128]byte     // what one writes stands apart from what the other does
	given atomic.Uint64 // bytes that were put
	_     [128]byte
	taken atomic.Uint64 // bytes that were taken
	_     [128]byte
}

// put puts a whole line, or reports false if there is no room for it. Only one goroutine at a time calls it.
func (r *ring) put(line []byte) bool {
	if r.bytes == nil {
		r.bytes = make([]byte, ringSize)
	}
	given := r.given.Load()
	if given+uint64(len(line))-r.read > ringSize {
		if r.read = r.taken.Load(); given+uint64(len(line))-r.read > ringSize {
			return false
		}
	}
	n := copy(r.bytes[given%ringSize:], line)
	copy(r.bytes, line[n:])
	r.given.Store(given + uint64(len(line)))
	return true
}

// crowded reports whether more than half of it is full. Whoever puts calls it.
func (r *ring) crowded() bool {
	if given := r.given.Load(); given-r.read > ringSize/2 {
		r.read = r.taken.Load()
		return given-r.read > ringSize/2
	}
	return false
}

// take appends all lines that there are. Only one goroutine at a time calls it.
func (r *ring) take(dst []byte) []byte {
	given, taken := r.given.Load(), r.taken.Load()
	if given == taken {
		return dst
	}
	from, to := taken%ringSize, given%ringSize
	if from < to {
		dst = append(dst, r.bytes[from:to]...)
	} else {
		dst = append(append(dst, r.bytes[from:]...), r.bytes[:to]...)
	}
	r.taken.Store(given)
	return dst
}

func (r *ring) waiting() bool { return r.given.Load() != r.taken.Load() }

// lines counts the lines that end in b.
func lines(b []byte) uint64 { return uint64(bytes.Count(b, []byte{'\n'})) }
