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

// encoder makes lines. It keeps what was made for the second that it is.
type encoder struct {
	format Format
	second int64
	stamp  []byte // of that second
}

// append appends a line and its end. It allocates nothing once dst is long enough.
func (e *encoder) append(dst []byte, r *proxy.Record) []byte {
	if e.format == Combined {
		return e.combined(dst, r)
	}
	return e.json(dst, r)
}

// json has the fields in the order of the README. Those that are empty are left out.
func (e *encoder) json(dst []byte, r *proxy.Record) []byte {
	if s := r.Began.Unix(); s != e.second || len(e.stamp) == 0 {
		e.second = s
		e.stamp = r.Began.UTC().AppendFormat(e.stamp[:0], "2006-01-02T15:04:05.")
	}
	dst = append(dst, `{"time":"`...)
	dst = append(dst, e.stamp...)
	dst = appendMicros(dst, r.Began.Nanosecond()/1000)
	dst = append(dst, `Z","client":"`...)
	dst = appendAddr(dst, r)
	dst = append(dst, '"')
	if len(r.Method) > 0 {
		dst = appendField(dst, `,"method":"`, r.Method)
		dst = appendField(dst, `,"host":"`, r.Host)
		dst = appendField(dst, `,"path":"`, r.Target)
		dst = append(dst, `,"protocol":"HTTP/1.`...)
		dst = append(dst, '0'+r.Minor, '"')
	}
	dst = appendField(dst, `,"route":"`, raw(r.Route))
	dst = appendField(dst, `,"service":"`, raw(r.Service))
	dst = appendField(dst, `,"instance":"`, raw(r.Instance))
	dst = append(dst, `,"status":`...)
	dst = strconv.AppendInt(dst, int64(r.Status), 10)
	dst = append(dst, `,"bytes_in":`...)
	dst = strconv.AppendInt(dst, r.Received, 10)
	dst = append(dst, `,"bytes_out":`...)
	dst = strconv.AppendInt(dst, r.Sent, 10)
	dst = append(dst, `,"attempts":`...)
	dst = strconv.AppendInt(dst, int64(r.Attempts), 10)
	dst = appendSeconds(append(dst, `,"duration":`...), r.Took)
	dst = appendSeconds(append(dst, `,"gateway":`...), r.Gateway)
	if r.Attempts > 0 {
		dst = appendSeconds(append(dst, `,"backend":`...), r.Backend)
	}
	dst = appendField(dst, `,"reason":"`, raw(r.Reason))
	if r.Tunnel {
		dst = append(dst, `,"tunnel":true`...)
	}
	dst = appendField(dst, `,"request_id":"`, r.RequestID)
	if r.TraceID != [16]byte{} {
		dst = append(dst, `,"trace_id":"`...)
		dst = append(hex.AppendEncode(dst, r.TraceID[:]), '"')
	}
	dst = appendField(dst, `,"user_agent":"`, r.UserAgent)
	dst = appendField(dst, `,"referer":"`, r.Referer)
	return append(dst, "}\n"...)
}

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
	dst = append(strconv.AppendInt(dst, int64(r.Status), 10), ' ')
	dst = strconv.AppendInt(dst, r.Sent, 10)
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
	if !r.Client.IsValid() { // of a request that could not be read, the peer is known
		return r.Peer.AppendTo(dst)
	}
	return r.Client.AppendTo(dst)
}

// appendMicros appends six digits.
func appendMicros(dst []byte, n int) []byte {
	a, b, c := n/10_000, n/100%100, n%100 // no division waits for another one
	return append(dst, byte('0'+a/10), byte('0'+a%10), byte('0'+b/10), byte('0'+b%10), byte('0'+c/10), byte('0'+c%10))
}

// appendSeconds appends a time that is not negative, to the microsecond.
func appendSeconds(dst []byte, d time.Duration) []byte {
	dst = append(strconv.AppendInt(dst, int64(d/time.Second), 10), '.')
	return appendMicros(dst, int(d%time.Second/time.Microsecond))
}

// appendField appends a field of JSON, unless it is empty.
func appendField(dst []byte, name string, value []byte) []byte {
	if len(value) == 0 {
		return dst
	}
	return append(appendEscaped(append(dst, name...), value), '"')
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

// plain returns how many bytes s begins with that are visible ASCII or space, and neither " nor \. It looks at eight at a
// time: see visible in package proxy.
func plain(s []byte) int {
	const ones, tops = 0x0101010101010101, 0x8080808080808080
	i := 0
	for ; len(s)-i >= 8; i += 8 {
		w := binary.LittleEndian.Uint64(s[i:])
		quote, slash, del := w^'"'*ones, w^'\\'*ones, w^0x7f*ones
		if (w|(w-0x20*ones)|(quote-ones)&^quote|(slash-ones)&^slash|(del-ones)&^del)&tops != 0 {
			break
		}
	}
	for ; i < len(s); i++ {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			break
		}
	}
	return i
}
