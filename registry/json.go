package registry

import (
	"bytes"
	"encoding/json"
)

// scanner walks JSON whose syntax and UTF-8 are right. A json.Decoder does too, with a dozen allocations for each token.
type scanner struct{ rest []byte }

// token is a brace, a bracket, or a value that is neither.
type token struct {
	kind byte   // how it begins: { } [ ] " t f n, and 0 for all numbers
	text []byte // what a string says, or anything else as it is written; as valid as what is walked
}

// next returns the next token. Commas and colons are none: where the syntax is right they say nothing.
func (s *scanner) next() token {
	s.rest = bytes.TrimLeft(s.rest, ",: \t\r\n")
	kind, end := s.rest[0], 1
	switch kind {
	case '{', '}', '[', ']':
	case '"':
		escaped := false
		for ; s.rest[end] != '"'; end++ {
			if s.rest[end] == '\\' {
				escaped = true
				end++
			}
		}
		end++
		if escaped {
			var text string
			_ = json.Unmarshal(s.rest[:end], &text) // its syntax is right
			s.rest = s.rest[end:]
			return token{kind, []byte(text)}
		}
		text := s.rest[1 : end-1]
		s.rest = s.rest[end:]
		return token{kind, text}
	default:
		if kind == '-' || '0' <= kind && kind <= '9' {
			kind = '0'
		}
		for end < len(s.rest) && bytes.IndexByte([]byte(",: \t\r\n]}"), s.rest[end]) < 0 {
			end++
		}
	}
	text := s.rest[:end]
	s.rest = s.rest[end:]
	return token{kind, text}
}

// describe says what a value is, for a message.
func (t token) describe() string {
	switch t.kind {
	case '"':
		return "the string " + clip(string(t.text))
	case '[':
		return "an array"
	case '{':
		return "an object"
	}
	return short(string(t.text))
}
