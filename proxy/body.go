package proxy

import (
	"bytes"
	"errors"
	"math/bits"
)

// buffer is what has come in on a connection and was not used yet. What stands before base is kept where it is: the head
// of the request that is being served.
type buffer struct {
	b          []byte
	base, r, w int
}

// waiting is what has come in.
func (b *buffer) waiting() []byte { return b.b[b.r:b.w] }

// space makes room for at least one byte, and returns the room there is. It returns nil if that takes more than limit
// bytes behind base.
func (b *buffer) space(limit int) []byte {
	if b.r == b.w {
		b.r, b.w = b.base, b.base
	}
	if b.w == len(b.b) {
		switch {
		case b.r > b.base:
			b.w = b.base + copy(b.b[b.base:], b.b[b.r:b.w])
			b.r = b.base
		case b.w-b.base >= limit:
			return nil
		default:
			b.grow(min(2*len(b.b), b.base+limit))
		}
	}
	return b.b[b.w:]
}

// grow makes the buffer at least size bytes long. What points into it stays valid: it keeps the old bytes alive.
func (b *buffer) grow(size int) {
	if size > len(b.b) {
		next := make([]byte, size)
		copy(next, b.b[:b.w])
		b.b = next
	}
}

// leave has the last bytes of the buffer not be used, if they are not yet.
func (b *buffer) leave(bytes int) {
	if end := len(b.b) - bytes; b.w <= end {
		b.b = b.b[:end]
	}
}

// fill adds what has just come in; the buffer grows to the next power of two if need be. What was used before is gone.
func (b *buffer) fill(data []byte) {
	rest := b.waiting()
	if size := len(rest) + len(data); size > len(b.b) {
		next := make([]byte, 1<<bits.Len(uint(size-1)))
		copy(next, rest)
		b.b = next
	} else if b.r > 0 {
		copy(b.b, rest)
	}
	b.base, b.r, b.w = 0, 0, len(rest)+copy(b.b[len(rest):], data)
}

// skipEmptyLines does that in front of a request: RFC 9112 section 2.2.
func (b *buffer) skipEmptyLines() {
	for w := b.waiting(); len(w) >= 2 && w[0] == '\r' && w[1] == '\n'; w = w[2:] {
		b.r += 2
	}
}

// next forgets the request that was served; what came in behind it moves to the front.
func (b *buffer) next() {
	b.base = 0
	if len(b.b) > 4*firstBuffer {
		b.shrink()
		return
	}
	if b.r == b.w {
		b.r, b.w = 0, 0
	}
}

// shrink goes back to a small buffer after a large head or body, if nothing that is still needed is in it.
func (b *buffer) shrink() {
	rest := b.waiting()
	next := make([]byte, max(firstBuffer, len(rest)))
	b.r, b.w = 0, copy(next, rest)
	b.b = next
}

// body reads the body of one message out of a buffer, as far as it has come in.
type body struct {
	left     int64 // of the Content-Length, or of the current chunk; -1: until the connection closes
	chunked  bool
	state    chunkState
	trailers []byte // field lines of the trailer section, each with its CRLF
	seen     int    // bytes of the trailer section
}

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkData
	chunkEnd
	chunkTrailers
	chunkDone
)

// errMalformedBody is a fault of the sender's framing.
var errMalformedBody = errors.New("malformed chunked body")

// start begins the body of a message; the slice for trailers is used again.
func (d *body) start(f framing) {
	*d = body{left: f.length, chunked: f.chunked, trailers: d.trailers[:0]}
	if f.chunked {
		d.left = 0
	}
}

// next takes at most limit bytes of the body out of the buffer. done is true once the body has ended; no data and not
// done means that more must come in. The data are valid until the buffer is read into again.
func (d *body) next(b *buffer, limit int) (data []byte, done bool, err error) {
	for {
		if !d.chunked || d.state == chunkData {
			data = b.waiting()
			if d.left >= 0 && int64(len(data)) > d.left {
				data = data[:d.left]
			}
			data = data[:min(len(data), limit)]
			b.r += len(data)
			if d.left >= 0 {
				d.left -= int64(len(data))
			}
			if !d.chunked {
				return data, d.left == 0, nil
			}
			if d.left == 0 {
				d.state = chunkEnd
			}
			return data, false, nil
		}
		if d.state == chunkDone {
			return nil, true, nil
		}
		line, ok, err := d.line(b)
		if !ok || err != nil {
			return nil, false, err
		}
		switch d.state {
		case chunkSize:
			if d.left, ok = parseChunkSize(line); !ok {
				return nil, false, errMalformedBody
			}
			d.state = chunkData
			if d.left == 0 {
				d.state = chunkTrailers
			}
		case chunkEnd:
			if len(line) != 0 {
				return nil, false, errMalformedBody
			}
			d.state = chunkSize
		case chunkTrailers:
			if len(line) == 0 {
				d.state = chunkDone
				return nil, true, nil
			}
			if d.seen += len(line) + 2; d.seen > maxTrailers {
				return nil, false, errMalformedBody
			}
			if err := d.trailer(line); err != nil {
				return nil, false, err
			}
		}
	}
}

// gather takes all that has come in of the body out of the buffer, in one piece: what several chunks hold is moved to where
// the first of them is. An error may come with data in front of it.
func (d *body) gather(b *buffer) (data []byte, done bool, err error) {
	from, to := 0, 0
	for {
		part, done, err := d.next(b, len(b.b))
		switch {
		case len(part) > 0 && to == 0:
			from, to = b.r-len(part), b.r
		case len(part) > 0:
			to += copy(b.b[to:], part)
		}
		if done || err != nil || len(part) == 0 {
			return b.b[from:to], done, err
		}
	}
}

// line takes a line that has come in whole, without its CRLF.
func (d *body) line(b *buffer) (line []byte, ok bool, err error) {
	w := b.waiting()
	nl := bytes.IndexByte(w, '\n')
	switch {
	case d.state == chunkEnd && len(w) > 0 && w[0] != '\r': // the end of its line need not come
		return nil, false, errMalformedBody
	case nl < 0 && len(w) <= maxChunkLine:
		return nil, false, nil
	case nl < 1 || nl > maxChunkLine || w[nl-1] != '\r':
		return nil, false, errMalformedBody
	}
	b.r += nl + 1
	return w[:nl-1], true, nil
}

// trailer keeps a trailer field, unless it is one that only a head may have (RFC 9110 section 6.5.1).
func (d *body) trailer(line []byte) error {
	whole := append(d.trailers, line...)
	whole = append(whole, '\r', '\n')
	f, _, err := readField(whole[len(d.trailers):])
	if err != nil {
		return errMalformedBody
	}
	id := identify(f.name)
	if f.underscore {
		id = shadowed(f.name)
	}
	if id == fieldOther {
		d.trailers = whole
	}
	return nil
}

// parseChunkSize reads the hexadecimal size in front of a chunk; extensions are passed over, RFC 9112 section 7.1.1.
func parseChunkSize(line []byte) (int64, bool) {
	var n int64
	i := 0
	for ; i < len(line); i++ {
		d, ok := hexDigit(line[i])
		if !ok {
			break
		}
		if i >= 15 {
			return 0, false
		}
		n = n<<4 | int64(d)
	}
	if i == 0 {
		return 0, false
	}
	rest := line[i:] // extensions, or white space that some servers pad the size with, but not both
	if len(rest) > 0 && rest[0] == ';' {
		return n, visible(rest)
	}
	return n, len(trim(rest)) == 0
}

// appendChunk appends data as one chunk.
func appendChunk(dst, data []byte) []byte {
	dst = appendHex(dst, len(data))
	dst = append(dst, '\r', '\n')
	dst = append(dst, data...)
	return append(dst, '\r', '\n')
}

func appendHex(dst []byte, n int) []byte {
	const digits = "0123456789abcdef"
	shift := 0
	for n>>shift > 15 {
		shift += 4
	}
	for ; shift >= 0; shift -= 4 {
		dst = append(dst, digits[n>>shift&15])
	}
	return dst
}

// appendLastChunk appends what ends a chunked body.
func appendLastChunk(dst, trailers []byte) []byte {
	dst = append(dst, "0\r\n"...)
	dst = append(dst, trailers...)
	return append(dst, '\r', '\n')
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c|0x20 >= 'a' && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10, true
	}
	return 0, false
}
