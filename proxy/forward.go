package proxy

import (
	"bytes"
	"net/netip"
	"strconv"
	"unsafe"

	"kerberos/registry"
)

// trusts says whether the peer's forwarding fields are believed.
func (p *Proxy) trusts(peer netip.Addr) bool {
	for _, network := range p.cfg().TrustedProxies {
		if network.Contains(peer) {
			return true
		}
	}
	return false
}

// client finds whom a trusted peer speaks for: the rightmost X-Forwarded-For entry, of all lines in order, that is not
// itself trusted. An entry that is no address ends the walk at the last good one.
func (p *Proxy) client(r *Request, peer netip.Addr) netip.Addr {
	for i := len(r.xff) - 1; i >= 0; i-- {
		f, _, err := readField(r.lines[r.xff[i].from:])
		if err != nil {
			return peer
		}
		for rest := f.value; len(rest) > 0; {
			comma := bytes.LastIndexByte(rest, ',')
			entry := trim(rest[comma+1:])
			rest = rest[:max(comma, 0)]
			addr, ok := parseNode(entry)
			if !ok {
				return peer
			}
			if peer = addr; !p.trusts(addr) {
				return peer
			}
		}
	}
	return peer
}

// parseNode reads an address as proxies write it: with or without port, IPv6 with or without brackets.
func parseNode(b []byte) (netip.Addr, bool) {
	s := unsafe.String(unsafe.SliceData(b), len(b))
	if n := len(s); n > 1 && s[0] == '[' && s[n-1] == ']' {
		addr, err := netip.ParseAddr(s[1 : n-1])
		return addr.Unmap(), err == nil && addr.Is6() && addr.Zone() == ""
	}
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return addr.Unmap(), true
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Zone() == "" {
		return ap.Addr().Unmap(), true
	}
	return netip.Addr{}, false
}

// forwardingFields are the fields that every request of a connection gets, unless its peer is trusted: they say where it
// came from.
func forwardingFields(peer netip.Addr) []byte {
	fields := peer.AppendTo([]byte("X-Forwarded-For: "))
	fields = peer.AppendTo(append(fields, "\r\nX-Real-IP: "...))
	return append(fields, "\r\nX-Forwarded-Proto: http\r\n"...)
}

// appendHead appends the head as the backend gets it: the request line with the base path of its addr, the client's field
// lines byte for byte without those that are for this hop, and ours; all as its route says.
func (c *conn) appendHead(dst []byte, r *Request, way *route, t *registry.Target) []byte {
	dst = append(dst, r.Method...)
	dst = append(dst, ' ')
	if !r.authority {
		dst = append(dst, t.BasePath...)
	}
	dst = way.appendTarget(dst, r)
	dst = append(dst, " HTTP/1.1\r\n"...)
	edits := way.request
	if !r.hasHost && (edits == nil || !edits.host) {
		dst = append(dst, "Host: "...)
		if len(r.Host) > 0 {
			dst = append(dst, r.Host...) // of an absolute-form target
		} else {
			dst = append(dst, t.Authority...)
		}
		dst = append(dst, '\r', '\n')
	}
	dst = appendEdited(dst, r.lines, r.drops, edits)
	if !c.trusted {
		dst = append(dst, c.constant...)
	} else {
		dst = append(dst, "X-Forwarded-For: "...)
		for _, s := range r.xff {
			f, _, _ := readField(r.lines[s.from:])
			dst = append(dst, f.value...)
			dst = append(dst, ", "...)
		}
		dst = c.peer.AppendTo(dst)
		dst = append(dst, "\r\nX-Real-IP: "...)
		dst = r.Client.AppendTo(dst)
		dst = append(dst, '\r', '\n')
		if !r.hasProto {
			dst = append(dst, "X-Forwarded-Proto: http\r\n"...)
		}
	}
	if c.p.marked {
		dst = c.x.appendRequestMarks(dst)
	}
	if !r.hasFwdHost && len(r.Host) > 0 {
		dst = append(dst, "X-Forwarded-Host: "...)
		dst = append(dst, r.Host...)
		dst = append(dst, '\r', '\n')
	}
	if via := c.p.cfg().via; via != nil {
		dst = append(dst, "Via: 1."...)
		dst = append(dst, '0'+r.minor, ' ')
		dst = append(dst, via...)
		dst = append(dst, '\r', '\n')
	}
	switch {
	case r.chunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	case r.lengthDropped:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, r.length, 10)
		dst = append(dst, '\r', '\n')
	}
	if r.asking {
		dst = append(dst, "Expect: 100-continue\r\n"...)
	}
	if r.maxForwards > 0 {
		dst = append(dst, "Max-Forwards: "...)
		dst = strconv.AppendInt(dst, int64(r.maxForwards-1), 10)
		dst = append(dst, '\r', '\n')
	}
	if r.switching {
		dst = c.appendUpgrade(dst)
	}
	return append(dst, '\r', '\n')
}
