package soak

import (
	"bytes"
	"io"
	"math/rand/v2"
)

// patternSize is that of the bytes that bodies are made of: a prime, so that it falls together with no buffer's size.
const patternSize = 65_521

// newPattern returns the bytes that all bodies of a run are made of.
func newPattern(seed uint64) []byte {
	b := make([]byte, patternSize)
	var s [32]byte
	s[0], s[1], s[2], s[3] = byte(seed), byte(seed>>8), byte(seed>>16), byte(seed>>24)
	rand.NewChaCha8(s).Read(b)
	return b
}

// stream is a body: the pattern from another place for each request, so that one request's bytes are not another's.
type stream struct {
	pattern []byte
	at      int
	left    int
}

func newStream(pattern []byte, id uint64, n int) *stream {
	return &stream{pattern, int(id * 7919 % patternSize), n}
}

// next returns the next bytes, at most n, or nothing at the end.
func (s *stream) next(n int) []byte {
	n = min(n, s.left, len(s.pattern)-s.at)
	b := s.pattern[s.at:][:n]
	s.at = (s.at + n) % len(s.pattern)
	s.left -= n
	return b
}

func (s *stream) Read(b []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	return copy(b, s.next(len(b))), nil
}

// matches reports whether these are the next bytes.
func (s *stream) matches(b []byte) bool {
	for len(b) > 0 {
		want := s.next(len(b))
		if len(want) == 0 || !bytes.Equal(want, b[:len(want)]) {
			return false
		}
		b = b[len(want):]
	}
	return true
}
