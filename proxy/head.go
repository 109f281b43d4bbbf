package proxy

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"unsafe"
)

// Limits of what the wire may ask of us beside those that can be set. They are the same for requests and responses.
const (
	maxChunkLine = 4 << 10  // a chunk's size with its extensions, or one line of a trailer section
	maxTrailers  = 16 << 10 // a whole trailer section
	maxNominated = 32       // fields that Connection names: each is looked for among all others
)

// Request is what routing may know of a request. Its byte slices are the raw bytes of the wire; they and the Request
// itself are valid only until the RouteFunc returns.
type Request struct {
	Method []byte
	Host   []byte     // the Host field, or the authority of an absolute-form target; empty only with HTTP/1.0
	Path   []byte     // as sent: nothing is decoded, merged or resolved; starts with "/", or is "*", or empty with CONNECT
	Query  []byte     // what follows the "?", without it
	Client netip.Addr // the peer, or whom a trusted proxy names (see Config.TrustedProxies)

	target []byte // path and query, as they are sent on
	lines  []byte // all field lines, each with its CRLF
	size   int    // of the head, with the empty line
	minor  byte   // the x of HTTP/1.x
	framing
	drops         []span   // what is not sent on of lines: hop-by-hop fields and those that we set ourselves
	close         bool     // Connection: close
	keepAlive     bool     // Connection: keep-alive
	upgrade       bool     // Connection: upgrade
	upgradeField  bool     // there is an Upgrade field
	websocket     bool     // and it names websocket
	switching     bool     // it asks for a tunnel, on a connection to the backend that is no pool's; set by begin
	expect        bool     // Expect: 100-continue
	badExpect     bool     // any other expectation
	asking        bool     // the backend is asked whether it wants the body: Expect is passed on
	nominated     [][]byte // the fields that Connection names
	authority     bool     // the target is an authority: CONNECT in the form that it must have
	hasHost       bool     // the lines that are sent on hold a Host
	looped        bool     // a Via line has our own name
	unclear       bool     // the path has bytes that a backend may read in another way, see canonical
	hasProto      bool     // the lines that are sent on hold an X-Forwarded-Proto
	hasFwdHost    bool     // ... an X-Forwarded-Host
	lengthDropped bool     // Content-Length is written anew
	maxForwards   int      // -1: none, or not for us
	xff           []span   // X-Forwarded-For lines of a trusted peer, in order
	reading       []byte   // used again for the other reading of an unclear path
}

// span is a part of Request.lines.
type span struct{ from, to int }

// framing is where a message's body ends, RFC 9112 section 6.
type framing struct {
	length  int64 // Content-Length; -1: none
	chunked bool
}

// Header returns the value of the first field line of that name (any case), or nil.
func (r *Request) Header(name string) []byte {
	for rest := r.lines; len(rest) > 0; {
		f, n, err := readField(rest)
		if err != nil {
			return nil
		}
		if len(f.name) == len(name) && bytes.EqualFold(f.name, unsafe.Slice(unsafe.StringData(name), len(name))) {
			return f.value
		}
		rest = rest[n:]
	}
	return nil
}

// A fieldID names the fields that we act upon; all others are only copied.
type fieldID uint8

const (
	fieldOther fieldID = iota
	fieldHost
	fieldDate
	fieldConnection
	fieldContentLength
	fieldTransferEncoding
	fieldHopByHop // Keep-Alive, Proxy-Connection, Proxy-Authenticate, Proxy-Authorization, TE
	fieldExpect
	fieldUpgrade
	fieldVia
	fieldMaxForwards
	fieldForwarded // Forwarded, X-Forwarded-*, X-Real-IP: from here on, what only a trusted peer may set
	fieldXForwardedFor
	fieldXForwardedProto
	fieldXForwardedHost
	fieldXRealIP
)

func identify(name []byte) fieldID {
	switch len(name) {
	case 2:
		if is(name, "te") {
			return fieldHopByHop
		}
	case 3:
		if is(name, "via") {
			return fieldVia
		}
	case 4:
		if is(name, "host") {
			return fieldHost
		}
		if is(name, "date") {
			return fieldDate
		}
	case 6:
		if is(name, "expect") {
			return fieldExpect
		}
	case 7:
		if is(name, "upgrade") {
			return fieldUpgrade
		}
	case 9:
		if is(name, "forwarded") {
			return fieldForwarded
		}
		if is(name, "x-real-ip") {
			return fieldXRealIP
		}
	case 10:
		if is(name, "connection") {
			return fieldConnection
		}
		if is(name, "keep-alive") {
			return fieldHopByHop
		}
	case 12:
		if is(name, "max-forwards") {
			return fieldMaxForwards
		}
	case 14:
		if is(name, "content-length") {
			return fieldContentLength
		}
	case 16:
		if is(name, "proxy-connection") {
			return fieldHopByHop
		}
	case 17:
		if is(name, "transfer-encoding") {
			return fieldTransferEncoding
		}
	case 18:
		if is(name, "proxy-authenticate") {
			return fieldHopByHop
		}
	case 19:
		if is(name, "proxy-authorization") {
			return fieldHopByHop
		}
	}
	if len(name) > 12 && name[0]|0x20 == 'x' && is(name[:12], "x-forwarded-") {
		switch {
		case is(name[12:], "for"):
			return fieldXForwardedFor
		case is(name[12:], "proto"):
			return fieldXForwardedProto
		case is(name[12:], "host"):
			return fieldXForwardedHost
		}
		return fieldForwarded
	}
	return fieldOther
}

// is reports whether token equals lower, which has lower-case letters and any of "*+-/" only, in any case. No other byte that
// a token may hold becomes one of those by setting 0x20.
func is(token []byte, lower string) bool {
	if len(token) != len(lower) {
		return false
	}
	for i := range len(lower) {
		if token[i]|0x20 != lower[i] {
			return false
		}
	}
	return true
}

// shadowed finds the field that a name with "_" is taken for by servers that turn "-" and "_" into the same (CGI, WSGI).
func shadowed(name []byte) fieldID {
	var dashed [32]byte
	if len(name) > len(dashed) {
		return fieldOther
	}
	for i, c := range name {
		if c == '_' {
			c = '-'
		}
		dashed[i] = c
	}
	return identify(dashed[:len(name)])
}

// Byte classes.
const (
	isToken   = 1 << iota // RFC 9110 tchar
	isTarget              // may stand in a request target: visible ASCII but "#", and bytes from 0x80
	isUnclear             // in a path, a reason for a closer look: % \ ;
	isHost                // may stand in a Host field: RFC 3986 host and port, without userinfo and "%", which some decode
)

var class = func() (c [256]uint8) {
	for b := range c {
		switch {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9':
			c[b] = isToken | isTarget | isHost
		case b > 0x20 && b < 0x7f && b != '#', b >= 0x80:
			c[b] = isTarget
		}
	}
	for _, b := range []byte("!#$%&'*+-.^_`|~") {
		c[b] |= isToken
	}
	for _, b := range []byte(`%\;`) {
		c[b] |= isUnclear
	}
	for _, b := range []byte("-._~!$&'()*+;=:[]") {
		c[b] |= isHost
	}
	return c
}()

func all(b []byte, want uint8) bool {
	for _, c := range b {
		if class[c]&want == 0 {
			return false
		}
	}
	return len(b) > 0
}

// field is one field line.
type field struct {
	name, value []byte
	underscore  bool
}

// readField reads the field line that b starts with and returns its length, CRLF included. It accepts what RFC 9112
// section 5 allows and nothing that a lenient peer may read in another way: no obsolete line folding, no bare CR or LF,
// no white space around the name.
func readField(b []byte) (f field, n int, err *refusal) {
	nl := bytes.IndexByte(b, '\n')
	if nl < 1 || b[nl-1] != '\r' {
		return f, 0, errBareLF
	}
	line := b[:nl-1]
	i := 0
	for i < len(line) && class[line[i]]&isToken != 0 {
		f.underscore = f.underscore || line[i] == '_'
		i++
	}
	if i == 0 || i == len(line) || line[i] != ':' {
		return f, 0, errFieldName
	}
	f.name, f.value = line[:i], trim(line[i+1:])
	if !visible(f.value) {
		return f, 0, errFieldValue
	}
	return f, nl + 1, nil
}

// emptyLine reports whether b begins with the line that ends a head.
func emptyLine(b []byte) bool { return len(b) >= 2 && b[0] == '\r' && b[1] == '\n' }

// trim cuts optional white space, RFC 9110 section 5.6.3.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// visible reports that b has no control byte but tabs. It looks at eight bytes at a time: a byte below 0x20 borrows from
// its own top bit when 0x20 is taken off, and 0x7f becomes zero by xor.
func visible(b []byte) bool {
	const ones, tops = 0x0101010101010101, 0x8080808080808080
	for len(b) >= 8 {
		w := binary.LittleEndian.Uint64(b)
		del := w ^ 0x7f*ones
		if ((w-0x20*ones)&^w|(del-ones)&^del)&tops != 0 && !visibleBytes(b[:8]) {
			return false
		}
		b = b[8:]
	}
	return visibleBytes(b)
}

func visibleBytes(b []byte) bool {
	for _, c := range b {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// parse reads the request head that b begins with, from the request line to the empty line. via is our own name there, nil if we have
// none; trusted says whether the peer's forwarding fields are believed. The errors are the answers that the client gets.
func (r *Request) parse(b, via []byte, trusted bool, limits *Limits) *refusal {
	*r = Request{drops: r.drops[:0], xff: r.xff[:0], nominated: r.nominated[:0], reading: r.reading[:0], framing: framing{length: -1}, maxForwards: -1}
	nl := bytes.IndexByte(b, '\n')
	if nl < 1 || b[nl-1] != '\r' {
		return errBareLF
	}
	if nl >= limits.RequestLine {
		return errRequestLineTooLong
	}
	if err := r.startLine(b[:nl-1]); err != nil {
		return err
	}
	absolute := len(r.Host) > 0
	b, r.size = b[nl+1:], nl+1
	at := 0
	for fields := 0; !emptyLine(b[at:]); fields++ {
		if fields == limits.Fields {
			return errFields
		}
		f, n, err := readField(b[at:])
		if err != nil {
			return err
		}
		drop := false
		switch id := identify(f.name); id {
		case fieldOther, fieldDate:
			if f.underscore && shadowed(f.name) != fieldOther {
				drop = true
			}
		case fieldHost:
			if r.hasHost {
				return errHost
			}
			r.hasHost, drop = true, absolute
			if !absolute {
				r.Host = f.value
			}
		case fieldConnection:
			drop = true
			r.connection(f.value)
		case fieldContentLength:
			length, ok := parseLength(f.value)
			if !ok || r.length >= 0 {
				return errContentLength
			}
			r.length = length
			r.lengthDropped = f.value[0] == '0' && len(f.value) > 1 // "007": ours is written instead
			drop = r.lengthDropped
		case fieldTransferEncoding:
			drop = true
			switch {
			case r.chunked:
				return errTransferEncoding
			case !is(f.value, "chunked"):
				return errTransferCoding
			case r.minor == 0:
				return errTransferEncoding
			}
			r.chunked = true
		case fieldHopByHop:
			drop = true
		case fieldExpect:
			drop = true
			if r.minor == 1 { // RFC 9110 section 10.1.1: ignored in HTTP/1.0
				r.expect = is(f.value, "100-continue")
				r.badExpect = r.badExpect || !r.expect
			}
		case fieldUpgrade:
			drop, r.upgradeField = true, true
			for protocol := range list(f.value) {
				r.websocket = r.websocket || is(protocol, "websocket")
			}
		case fieldVia:
			r.looped = r.looped || via != nil && bytes.Contains(f.value, via)
		case fieldMaxForwards:
			if string(r.Method) == "OPTIONS" || string(r.Method) == "TRACE" {
				hops, ok := parseLength(f.value)
				if !ok || r.maxForwards >= 0 {
					return errMaxForwards
				}
				drop, r.maxForwards = true, int(min(hops, 1<<30))
			}
		default:
			drop = !trusted || id == fieldXForwardedFor || id == fieldXRealIP // both are written anew
			if trusted {
				switch id {
				case fieldXForwardedFor:
					r.xff = append(r.xff, span{at, at + n})
				case fieldXForwardedProto:
					r.hasProto = true
				case fieldXForwardedHost:
					r.hasFwdHost = true
				}
			}
		}
		if drop {
			r.drops = appendSpan(r.drops, at, at+n)
		}
		at += n
	}
	r.lines = b[:at]
	r.size += at + len("\r\n")
	if r.chunked && r.length >= 0 {
		return errBothLengths
	}
	if r.minor == 1 && !r.hasHost || (r.hasHost || absolute) && !validHost(r.Host) {
		return errHost
	}
	if absolute {
		r.hasHost = false
	}
	if len(r.nominated) > maxNominated {
		return errConnection
	}
	if len(r.nominated) > 0 {
		r.drops = dropNominated(r.lines, r.drops, r.nominated)
	}
	return nil
}

var slashDot = []byte("/.")

// startLine reads "GET /path?query HTTP/1.1".
func (r *Request) startLine(line []byte) *refusal {
	sp := bytes.IndexByte(line, ' ')
	last := bytes.LastIndexByte(line, ' ')
	if sp <= 0 || last == sp || !all(line[:sp], isToken) {
		return errRequestLine
	}
	r.Method = line[:sp]
	version := line[last+1:]
	if len(version) != 8 || string(version[:5]) != "HTTP/" || version[6] != '.' {
		return errRequestLine
	}
	if version[5] != '1' || version[7] != '0' && version[7] != '1' {
		return errVersion
	}
	r.minor = version[7] - '0'

	target := line[sp+1 : last]
	var seen uint8 = isTarget
	var unclear uint8
	for _, c := range target {
		seen &= class[c]
		unclear |= class[c]
	}
	if len(target) == 0 || seen&isTarget == 0 {
		return errTarget
	}
	switch {
	case target[0] == '/':
	case len(target) == 1 && target[0] == '*':
		if string(r.Method) != "OPTIONS" {
			return errTarget
		}
	case len(target) > 7 && is(target[:4], "http") && string(target[4:7]) == "://":
		target = r.absolute(target[7:])
	case len(target) > 8 && is(target[:5], "https") && string(target[5:8]) == "://":
		target = r.absolute(target[8:])
	case string(r.Method) == "CONNECT" && withPort(target): // RFC 9112 section 3.2.3
		r.authority, r.Host, r.target = true, target, target
		return nil
	case string(r.Method) == "CONNECT":
		return errMethodTarget
	case is(r.Method, "connect"):
		return errMethod
	default:
		return errTarget
	}
	if target == nil {
		return errTarget
	}
	r.target = target
	r.Path = target
	if q := bytes.IndexByte(target, '?'); q >= 0 {
		r.Path, r.Query = target[:q], target[q+1:]
	}
	r.unclear = unclear&isUnclear != 0 && bytes.ContainsAny(r.Path, `%\;`) || bytes.Contains(r.Path, slashDot)
	return nil
}

// absolute takes the authority off what follows "http://"; the rest is the origin-form, RFC 9112 section 3.2.2.
func (r *Request) absolute(rest []byte) []byte {
	end := bytes.IndexAny(rest, "/?")
	switch {
	case end < 0:
		r.Host = rest
		if string(r.Method) == "OPTIONS" {
			return []byte{'*'}
		}
		return []byte{'/'}
	case end == 0:
		return nil
	}
	r.Host = rest[:end]
	if rest[end] == '?' {
		return append([]byte{'/'}, rest[end:]...)
	}
	return rest[end:]
}

// connection reads the options of a Connection field.
func (r *Request) connection(value []byte) {
	for option := range list(value) {
		switch {
		case is(option, "close"):
			r.close = true
		case is(option, "keep-alive"):
			r.keepAlive = true
		case is(option, "upgrade"):
			r.upgrade = true
		case is(option, "te"):
		default:
			r.nominated = append(r.nominated, option)
		}
	}
}

// list yields the members of a comma list, RFC 9110 section 5.6.1.
func list(value []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(value) > 0 {
			member := value
			if c := bytes.IndexByte(value, ','); c >= 0 {
				member, value = value[:c], value[c+1:]
			} else {
				value = nil
			}
			if member = trim(member); len(member) > 0 && !yield(member) {
				return
			}
		}
	}
}

// dropNominated adds to drops the lines that a Connection field names. What frames or addresses the message
// is never dropped that way: a client would take it from the backend, RFC 9110 section 7.6.1. Nor is Date, which a
// response must have.
func dropNominated(lines []byte, drops []span, names [][]byte) []span {
	more := make([]span, 0, len(drops)+4)
	for at := 0; at < len(lines); {
		f, n, err := readField(lines[at:])
		if err != nil {
			return drops
		}
		for len(drops) > 0 && at >= drops[0].to {
			drops = drops[1:]
		}
		dropped := len(drops) > 0 && at >= drops[0].from
		id := identify(f.name)
		if dropped || id != fieldHost && id != fieldContentLength && id != fieldDate && among(names, f.name) {
			more = appendSpan(more, at, at+n)
		}
		at += n
	}
	return more
}

// among reports whether name is one of names.
func among(names [][]byte, name []byte) bool {
	for _, n := range names {
		if len(n) == len(name) && bytes.EqualFold(n, name) {
			return true
		}
	}
	return false
}

// parseLength reads digits and nothing else: a Content-Length is no list and has no sign here.
func parseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// validHost reports whether b is a host with an optional port and nothing else.
func validHost(b []byte) bool {
	if !all(b, isHost) {
		return false
	}
	if b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 0 {
			return false
		}
		if ip, err := netip.ParseAddr(string(b[1:end])); err != nil || !ip.Is6() || ip.Zone() != "" {
			return false
		}
		b = b[end+1:]
		return len(b) == 0 || b[0] == ':' && isPort(b[1:])
	}
	if bytes.IndexByte(b, '[') >= 0 || bytes.IndexByte(b, ']') >= 0 {
		return false
	}
	c := bytes.IndexByte(b, ':')
	return c < 0 || c > 0 && isPort(b[c+1:])
}

// withPort reports whether an authority ends in a port. Whether it is valid is judged with the Host field.
func withPort(b []byte) bool {
	colon := bytes.LastIndexByte(b, ':')
	return colon > 0 && colon+1 < len(b) && isPort(b[colon+1:])
}

// isPort reports whether b is a port, which may be empty.
func isPort(b []byte) bool {
	port, ok := parseLength(b)
	return len(b) == 0 || ok && port < 1<<16 && len(b) <= 5
}

var headEnd = []byte("\r\n\r\n")

// bareLF reports whether a head that is not complete can never be: one of its lines, of those that end behind from, ends
// without CR.
func bareLF(b []byte, from int) bool {
	for {
		nl := bytes.IndexByte(b[from:], '\n')
		if nl < 0 {
			return false
		}
		if from += nl; from == 0 || b[from-1] != '\r' {
			return true
		}
		from++
	}
}
