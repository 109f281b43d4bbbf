package accesslog

import (
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"time"
	"unsafe"

	"kerberos/proxy"
)

// maxField is how much of a field that comes from a client is logged, in bytes; the rest is left out.
const maxField = 4 << 10

// encoder makes lines. It keeps what was made before and is likely to be needed again.
type encoder struct {
	format Format
	second int64
	stamp  []byte // of that second
	named  [64]named
}

// named is the part of a line that many have in common, as JSON: what was asked for in which way, and where it went.
type named struct {
	minor                    byte
	route, service, instance string
	method                   int // its length
	text                     []byte
}

// append appends a line and its end. It allocates nothing once dst is long enough.
func (e *encoder) append(dst []byte, r *proxy.Record) []byte {
	if e.format == Combined {
		return e.combined(dst, r)
	}
	return e.json(dst, r)
}

// json has the fields in the order of the README. Those that are empty are left out. Constants of up to 16 bytes are
// appended without a call.
func (e *encoder) json(dst []byte, r *proxy.Record) []byte {
	if s := r.Began.Unix(); s != e.second || len(e.stamp) == 0 {
		e.second = s
		e.stamp = r.Began.UTC().AppendFormat(append(e.stamp[:0], `{"time":"`...), "2006-01-02T15:04:05.")
	}
	dst = append(dst, e.stamp...)
	dst = appendMicros(dst, uint(r.Began.Nanosecond())/1000)
	dst = append(dst, `Z","client":"`...)
	dst = append(appendAddr(dst, r), '"')
	dst = append(dst, e.name(r)...)
	if len(r.Host) > 0 {
		dst = append(appendEscaped(append(dst, `,"host":"`...), r.Host), '"')
	}
	if len(r.Target) > 0 {
		dst = append(appendEscaped(append(dst, `,"path":"`...), r.Target), '"')
	}
	dst = append(dst, `,"status":`...)
	dst = appendUint(dst, int64(r.Status))
	dst = append(dst, `,"bytes_in":`...)
	dst = appendUint(dst, r.Received)
	dst = append(dst, `,"bytes_out":`...)
	dst = appendUint(dst, r.Sent)
	dst = append(dst, `,"attempts":`...)
	dst = appendUint(dst, int64(r.Attempts))
	dst = appendSeconds(append(dst, `,"duration":`...), r.Took)
	dst = appendSeconds(append(dst, `,"gateway":`...), r.Gateway)
	if r.Attempts > 0 {
		dst = appendSeconds(append(dst, `,"backend":`...), r.Backend)
	}
	if len(r.Reason) > 0 {
		dst = append(appendEscaped(append(dst, `,"reason":"`...), raw(r.Reason)), '"')
	}
	if r.Tunnel {
		dst = append(dst, `,"tunnel":true`...)
	}
	if len(r.RequestID) > 0 {
		dst = append(appendEscaped(append(dst, `,"request_id":"`...), r.RequestID), '"')
	}
	if r.TraceID != [16]byte{} {
		dst = append(dst, `,"trace_id":"`...)
		dst = append(hex.AppendEncode(dst, r.TraceID[:]), '"')
	}
	if len(r.UserAgent) > 0 {
		dst = append(appendEscaped(append(dst, `,"user_agent":"`...), r.UserAgent), '"')
	}
	if len(r.Referer) > 0 {
		dst = append(appendEscaped(append(dst, `,"referer":"`...), r.Referer), '"')
	}
	return append(dst, '}', '\n')
}

// name returns what a line says of method, protocol, route, service and instance.
func (e *encoder) name(r *proxy.Record) []byte {
	const before = len(`,"method":"`)
	at := uintptr(unsafe.Pointer(unsafe.StringData(r.Instance)))/16 + uintptr(len(r.Method)) // instances lie in memory as chance has it
	n := &e.named[at%uintptr(len(e.named))]
	if n.text == nil || n.minor != r.Minor || n.method != len(r.Method) || !same(n.instance, r.Instance) || !same(n.service, r.Service) ||
		!same(n.route, r.Route) || n.method > 0 && string(n.text[before:][:n.method]) != string(r.Method) {
		*n = named{r.Minor, r.Route, r.Service, r.Instance, len(r.Method), n.text[:0]}
		if n.method > 0 {
			n.text = append(appendEscaped(append(n.text, `,"method":"`...), r.Method), `","protocol":"HTTP/1.`...)
			n.text = append(n.text, '0'+r.Minor, '"')
		}
		for _, f := range [...]struct{ name, value string }{
			{`,"route":"`, r.Route}, {`,"service":"`, r.Service}, {`,"instance":"`, r.Instance},
		} {
			if len(f.value) > 0 {
				n.text = append(appendEscaped(append(n.text, f.name...), raw(f.value)), '"')
			}
		}
	}
	text := n.text
	if n.method > maxField { // it is not all there to be compared
		n.text = nil
	}
	return text
}

// same reports that two strings are one in memory.
func same(a, b string) bool { return unsafe.StringData(a) == unsafe.StringData(b) && len(a) == len(b) }

// combined is the line that Apache and nginx write under that name, with nginx's escapes.
func (e *encoder) combined(dst []byte, r *proxy.Record) []byte {
	if s := r.Began.Unix(); s != e.second || len(e.stamp) == 0 {
		e.second = s
		e.stamp = r.Began.Local().AppendFormat(e.stamp[:0], " - - [02/Jan/2006:15:04:05 -0700] ")
	}
	dst = append(appendAddr(dst, r), e.stamp...)
	if len(r.Method) == 0 {
		dst = append(dst, `"-" `...)
	} else {
		dst = appendHexEscaped(append(dst, '"'), r.Method)
		dst = appendHexEscaped(append(dst, ' '), r.Target)
		dst = append(dst, " HTTP/1."...)
		dst = append(dst, '0'+r.Minor, '"', ' ')
	}
	if r.Status == 0 {
		dst = append(dst, "00"...)
	}
	dst = append(appendUint(dst, int64(r.Status)), ' ')
	dst = appendUint(dst, r.Sent)
	for _, b := range [2][]byte{r.Referer, r.UserAgent} {
		dst = append(dst, ' ', '"')
		if len(b) == 0 {
			dst = append(dst, '-')
		}
		dst = append(appendHexEscaped(dst, b), '"')
	}
	return append(dst, '\n')
}

func appendAddr(dst []byte, r *proxy.Record) []byte {
	a := r.Client
	if !a.IsValid() { // of a request that could not be read, the peer is known
		a = r.Peer
	}
	if !a.Is4() {
		return a.AppendTo(dst)
	}
	for _, n := range a.As4() {
		switch {
		case n < 10:
			dst = append(dst, '0'+n, '.')
		case n < 100:
			dst = append(dst, '0'+n/10, '0'+n%10, '.')
		default:
			dst = append(dst, '0'+n/100, '0'+n/10%10, '0'+n%10, '.')
		}
	}
	return dst[:len(dst)-1]
}

// appendMicros appends six digits.
func appendMicros(dst []byte, n uint) []byte {
	a, b, c := n/10_000, n/100%100, n%100 // no division waits for another one
	return append(dst, byte('0'+a/10), byte('0'+a%10), byte('0'+b/10), byte('0'+b%10), byte('0'+c/10), byte('0'+c%10))
}

// appendUint appends a number that is not negative.
func appendUint(dst []byte, n int64) []byte {
	switch {
	case uint64(n) < 10:
		return append(dst, byte('0'+n))
	case uint64(n) < 100:
		return append(dst, byte('0'+n/10), byte('0'+n%10))
	case uint64(n) < 1000:
		return append(dst, byte('0'+n/100), byte('0'+n/10%10), byte('0'+n%10))
	}
	return strconv.AppendInt(dst, n, 10)
}

// appendSeconds appends a time that is not negative, to the microsecond.
func appendSeconds(dst []byte, d time.Duration) []byte {
	if n := uint(d) / uint(time.Microsecond); n < 10_000_000 {
		a, b, c := n/10_000, n/100%100, n%100
		return append(dst, byte('0'+a/100), '.', byte('0'+a/10%10), byte('0'+a%10), byte('0'+b/10), byte('0'+b%10), byte('0'+c/10), byte('0'+c%10))
	}
	dst = append(strconv.AppendInt(dst, int64(d/time.Second), 10), '.')
	return appendMicros(dst, uint(d%time.Second)/uint(time.Microsecond))
}

// raw is the bytes of s, to be read.
func raw(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

const hexDigits = "0123456789abcdef"

// appendEscaped appends the inside of a string of JSON, in visible ASCII: every other byte, and what ends or escapes a
// string, is written as the character of that number. So bytes from 0x80 stand as U+0080 to U+00FF.
func appendEscaped(dst, s []byte) []byte {
	s = s[:min(len(s), maxField)]
	for len(s) > 0 {
		n := plain(s)
		dst = append(dst, s[:n]...)
		if n < len(s) {
			c := s[n]
			n++
			if c == '"' || c == '\\' {
				dst = append(dst, '\\', c)
			} else {
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
		}
		s = s[n:]
	}
	return dst
}

// appendHexEscaped is the same with the escapes of nginx.
func appendHexEscaped(dst, s []byte) []byte {
	const upper = "0123456789ABCDEF"
	s = s[:min(len(s), maxField)]
	for len(s) > 0 {
		n := plain(s)
		dst = append(dst, s[:n]...)
		if n < len(s) {
			dst = append(dst, '\\', 'x', upper[s[n]>>4], upper[s[n]&15])
			n++
		}
		s = s[n:]
	}
	return dst
}

// plain returns how many bytes s begins with that are visible ASCII or space, and neither " nor \.
func plain(s []byte) int {
	i := 0
	for ; len(s)-i >= 32; i += 32 {
		if b := s[i : i+32]; (special(b)|special(b[8:])|special(b[16:])|special(b[24:]))&tops != 0 {
			break
		}
	}
	for ; len(s)-i >= 8; i += 8 {
		if special(s[i:])&tops != 0 {
			break
		}
	}
	if len(s) >= 8 && len(s)-i < 8 && special(s[len(s)-8:])&tops == 0 { // what is left, with some that were looked at
		return len(s)
	}
	for ; i < len(s); i++ {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

const ones, tops = 0x0101010101010101, 0x8080808080808080

// special has a top bit if one of the eight bytes that b begins with is none of those. A byte below 0x20 borrows from its top
// bit when 0x20 is taken off; what is equal is 0 by xor and borrows when 1 is; a byte from 0x7f up has its top bit when 1 is
// added, but 0xff, which has it when 0x20 is taken off. Carries go up only from bytes that have told already.
func special(b []byte) uint64 {
	w := binary.LittleEndian.Uint64(b)
	return (w - 0x20*ones) | (w + ones) | ((w ^ '"'*ones) - ones) | ((w ^ '\\'*ones) - ones)
}
