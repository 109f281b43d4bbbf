package proxy

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"slices"
	"time"
)

// maxRequestID is the longest X-Request-Id that is taken over from a trusted peer.
const maxRequestID = 128

// marks are what a request is known by, to those who look for it in logs and traces: its X-Request-Id, and its place in a
// trace (W3C Trace Context, level 1).
type marks struct {
	id     []byte   // nil without Config.RequestIDs
	madeID [36]byte // where id is, if it was made here
	trace  struct {
		id    [16]byte // zero: none
		spans *Trace   // nil: it is not sampled
		ours  bool     // the backend gets a traceparent of ours, and not the client's
		span  [8]byte  // in that one, if the request is not sampled
	}
}

// mark finds the marks that a request has and makes those that it lacks. What must not go on is dropped from its fields.
func (x *exchange) mark() {
	r, p := &x.c.req, x.p()
	var id, parent []byte
	parents, states := 0, false
	for at, to := 0, 0; at < len(r.lines); at = to {
		to = at + bytes.IndexByte(r.lines[at:], '\n') + 1
		line := r.lines[at:to]
		switch {
		case len(line) < len("tracestate:\r\n") || dropped(r.drops, at): // by Connection: it was not meant for us
		case line[10] == ':' && p.traced && is(line[:10], "tracestate"):
			states = true
		case len(line) < len("x-request-id:\r\n"):
		case line[11] == ':' && p.traced && is(line[:11], "traceparent"):
			parent = trim(line[12 : len(line)-2])
			parents++
		case line[12] == ':' && p.cfg().RequestIDs && isRequestID(line[:12]):
			if line[1] == '-' && line[9] == '-' && id == nil {
				id = trim(line[13 : len(line)-2])
			}
			r.drops = insertSpan(r.drops, at, to)
		}
	}
	if p.cfg().RequestIDs {
		if x.id = id; !x.c.trusted || !validRequestID(id) {
			x.id = x.madeID[:]
			putUUID(&x.madeID, x.began, rand.Uint64(), rand.Uint64())
		}
	}
	if p.traced {
		x.join(parent, parents, states)
	}
}

// join finds the trace that the request belongs to, or begins one. Whether it is sampled is for a trusted peer to say; all
// others could have everything sampled, so for them it is drawn. What is not sampled goes on as it came, unless it came
// with a flag that says otherwise.
func (x *exchange) join(parent []byte, parents int, states bool) {
	p, t := x.p(), &x.trace
	id, span, flagged, ok := parseTraceparent(parent)
	ok = ok && parents == 1
	sampled := flagged
	if !ok || !x.c.trusted {
		sampled = rand.Float64() < p.cfg().TraceShare
	}
	t.id, t.spans, t.ours = id, nil, !ok || sampled || flagged
	if !t.ours {
		return
	}
	t.span = newSpanID()
	if !ok {
		t.id, span = newTraceID(), [8]byte{}
	}
	if sampled {
		t.spans = &Trace{Span: t.span, Parent: span, Attempts: make([]Attempt, 0, 1)}
	}
	if parents > 0 || states {
		state := x.dropTraces(!ok)
		if sampled && ok {
			t.spans.State = string(state)
		}
	}
}

// dropTraces drops what the client said of a trace; tracestate only if all is set: it means nothing without its
// traceparent. It returns what tracestate says.
func (x *exchange) dropTraces(all bool) (state []byte) {
	r := &x.c.req
	for at := 0; at < len(r.lines); {
		f, n, err := readField(r.lines[at:])
		if err != nil {
			break
		}
		isState := is(f.name, "tracestate")
		if isState && len(f.value) > 0 {
			if len(state) > 0 {
				state = append(state, ',')
			}
			state = append(state, f.value...)
		}
		if is(f.name, "traceparent") || isState && all {
			r.drops = insertSpan(r.drops, at, at+n)
		}
		at += n
	}
	return state
}

// appendRequestMarks appends the marks to the head that goes to a backend.
func (x *exchange) appendRequestMarks(dst []byte) []byte {
	dst = x.appendID(dst)
	if t := &x.trace; t.ours {
		span, flags := t.span, byte('0')
		if t.spans != nil {
			span, flags = t.spans.spanOfAttempt(), '1'
		}
		dst = append(dst, "traceparent: 00-"...)
		dst = hex.AppendEncode(dst, t.id[:])
		dst = append(dst, '-')
		dst = hex.AppendEncode(dst, span[:])
		dst = append(dst, '-', '0', flags, '\r', '\n')
	}
	return dst
}

// appendID appends X-Request-Id, if there is one.
func (x *exchange) appendID(dst []byte) []byte {
	if x.id == nil {
		return dst
	}
	dst = append(dst, "X-Request-Id: "...)
	dst = append(dst, x.id...)
	return append(dst, '\r', '\n')
}

// dropID drops the X-Request-Id that a backend has answered with: the client gets the one that the request went by.
func (r *response) dropID() {
	for at, to := 0, 0; at < len(r.lines); at = to {
		to = at + bytes.IndexByte(r.lines[at:], '\n') + 1
		if line := r.lines[at:to]; len(line) > 12 && line[12] == ':' && isRequestID(line[:12]) {
			r.drops = insertSpan(r.drops, at, to)
		}
	}
}

// isRequestID reports whether a name of 12 bytes is X-Request-Id, or is taken for it where "-" and "_" are the same.
func isRequestID(name []byte) bool {
	return name[0]|0x20 == 'x' && (name[1] == '-' || name[1] == '_') && is(name[2:9], "request") &&
		(name[9] == '-' || name[9] == '_') && is(name[10:], "id")
}

// validRequestID: 1 to 128 of A-Z a-z 0-9 - . _ ~ : + / = @, which need no escaping in any log.
func validRequestID(id []byte) bool {
	return len(id) > 0 && len(id) <= maxRequestID && !slices.ContainsFunc(id, func(c byte) bool {
		return !unreserved(c) && c != ':' && c != '+' && c != '/' && c != '=' && c != '@'
	})
}

// putUUID makes a UUID version 7 of a time and 128 random bits: RFC 9562 section 5.7.
func putUUID(to *[36]byte, at time.Time, a, b uint64) {
	var raw [16]byte
	binary.BigEndian.PutUint64(raw[:], uint64(at.UnixMilli())<<16|0x7<<12|a>>52)
	binary.BigEndian.PutUint64(raw[8:], 0b10<<62|b>>2)
	hex.Encode(to[:], raw[:4])
	to[8], to[13], to[18], to[23] = '-', '-', '-', '-'
	hex.Encode(to[9:], raw[4:6])
	hex.Encode(to[14:], raw[6:8])
	hex.Encode(to[19:], raw[8:10])
	hex.Encode(to[24:], raw[10:])
}

func newTraceID() (id [16]byte) {
	binary.NativeEndian.PutUint64(id[:], rand.Uint64())
	binary.NativeEndian.PutUint64(id[8:], rand.Uint64()|1) // it must not be zero
	return id
}

func newSpanID() (id [8]byte) {
	binary.NativeEndian.PutUint64(id[:], rand.Uint64()|1)
	return id
}

// parseTraceparent reads a traceparent: version 00, or the part of a later one that is the same (section 3.2.4 of the
// recommendation).
func parseTraceparent(b []byte) (id [16]byte, span [8]byte, sampled, ok bool) {
	const length = len("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	if len(b) < length || b[2] != '-' || b[35] != '-' || b[52] != '-' {
		return
	}
	var version, flags [1]byte
	if !lowerHex(version[:], b[:2]) || !lowerHex(id[:], b[3:35]) || !lowerHex(span[:], b[36:52]) || !lowerHex(flags[:], b[53:55]) ||
		version[0] == 0xff || id == [16]byte{} || span == [8]byte{} ||
		len(b) > length && (version[0] == 0 || b[length] != '-') {
		return [16]byte{}, [8]byte{}, false, false
	}
	return id, span, flags[0]&1 != 0, true
}

// lowerHex decodes src, which must be lower-case hexadecimal.
func lowerHex(dst, src []byte) bool {
	for _, c := range src {
		if c >= 'A' && c <= 'F' {
			return false
		}
	}
	_, err := hex.Decode(dst, src)
	return err == nil
}
