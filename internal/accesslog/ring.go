package accesslog

import (
	"bytes"
	"sync/atomic"
)

// lineRoom is the room that a line must find to be made: one that turns out to be longer may still be dropped.
const lineRoom = 2 << 10

// ring is lines on their way from one goroutine to another one: neither waits for the other. Each line is in one piece, and
// is made and written to the file where it lies. Positions grow for ever; what is left at the end of a lap is passed over.
type ring struct {
	bytes []byte        // ringSize, made with the first line
	read  uint64        // of taken, what put has seen
	_     [128]byte     // what one writes stands apart from what the other does
	given atomic.Uint64 // where the next line goes
	end   int           // where the lines of the lap before end; written before given, read behind it
	_     [128]byte
	taken atomic.Uint64 // what was taken ends here
	_     [128]byte
}

// room returns the empty slice that a line is to be appended to, or nil if there is no room for it. Only one goroutine at a
// time calls it and put.
func (r *ring) room() []byte {
	if r.bytes == nil {
		r.bytes = make([]byte, ringSize)
	}
	at, n := r.place(lineRoom)
	if n < lineRoom {
		return nil
	}
	return r.bytes[at : at : at+n]
}

// place finds room for a line of some length: where, and how much in one piece.
func (r *ring) place(length int) (at, n int) {
	given := r.given.Load()
	at = int(given % ringSize)
	free := ringSize - int(given-r.read)
	if free < ringSize-at+length { // it may not do behind this lap
		r.read = r.taken.Load()
		free = ringSize - int(given-r.read)
	}
	n = min(free, ringSize-at)
	if rest := free - n; n < length && rest >= length {
		return 0, rest
	}
	return at, n
}

// put puts a line that was appended to room, or reports false if there was no room for so much.
func (r *ring) put(room, line []byte) bool {
	given := r.given.Load()
	at := int(given % ringSize)
	to := at
	if len(line) > cap(room) { // it has outgrown it
		var n int
		if to, n = r.place(len(line)); n < len(line) {
			return false
		}
		copy(r.bytes[to:], line)
	} else if &room[:1][0] == &r.bytes[0] {
		to = 0
	}
	if to != at { // on to the next lap
		r.end = at
		given += uint64(ringSize - at)
	}
	if to+len(line) == ringSize {
		r.end = ringSize
	}
	r.given.Store(given + uint64(len(line)))
	return true
}

// crowded reports whether half of it is full. Whoever puts calls it.
func (r *ring) crowded() bool {
	given := r.given.Load()
	if given-r.read <= ringSize/2 {
		return false
	}
	r.read = r.taken.Load()
	return given-r.read > ringSize/2
}

// waiting returns all lines that there are, in two pieces, and what to tell took when they are not needed any more. Only one
// goroutine at a time calls them.
func (r *ring) waiting() (lines [2][]byte, upTo uint64) {
	given, taken := r.given.Load(), r.taken.Load()
	from, to := taken%ringSize, given%ringSize
	switch {
	case given == taken: // it may not have been made yet
	case given/ringSize == taken/ringSize:
		lines[0] = r.bytes[from:to]
	default:
		lines[0], lines[1] = r.bytes[from:r.end], r.bytes[:to]
	}
	return lines, given
}

func (r *ring) took(upTo uint64) { r.taken.Store(upTo) }

// empty reports whether there are no lines.
func (r *ring) empty() bool { return r.given.Load() == r.taken.Load() }

// count counts the lines that end in b.
func count(b []byte) uint64 { return uint64(bytes.Count(b, []byte{'\n'})) }
