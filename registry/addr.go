package registry

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// maxAddr is the longest addr in bytes: its base path is put before every target.
const maxAddr = 2048

// Target is an Addr taken apart.
type Target struct {
	Scheme    string     // http or https
	Host      string     // name or literal as written, without brackets
	Port      uint16     // never 0; 80 or 443 if none was written
	IP        netip.Addr // the literal, IPv4-mapped unmapped; the zero Addr if Host is a name
	Authority string     // for a Host field: host[:port] as RFC 3986 has it, the scheme's default port left out
	BasePath  string     // what is put before a target, byte for byte: "" or "/x", without a slash at the end
}

// ParseAddr takes an instance's addr apart: http or https, "://", an IPv4 address, an IPv6 address in brackets or a name,
// a port if it is not the scheme's own, and a base path. The host is a name by RFC 1123 (underscores are allowed too, as
// container names have them; a dot at the end as well). The path is one by RFC 3986 without empty and dot segments. What
// a resolver or a browser would read as an IPv4 address but is not written as four decimal numbers (127.1, 0x7f.1,
// 017700000001, 127.0.0.1.) is refused, and so are IPv6 zones, userinfo, queries and fragments. The error says what is
// wrong and what would be right.
func ParseAddr(s string) (Target, error) {
	if s == "" {
		return Target{}, errors.New("is missing or empty: must be a URL like http://10.0.0.5:8080")
	}
	if len(s) > maxAddr {
		return Target{}, fmt.Errorf("has %d bytes: at most %d are allowed", len(s), maxAddr)
	}
	scheme, rest, ok := strings.Cut(s, "://")
	var t Target
	switch {
	case ok && strings.EqualFold(scheme, "http"):
		t.Scheme, t.Port = "http", 80
	case ok && strings.EqualFold(scheme, "https"):
		t.Scheme, t.Port = "https", 443
	default:
		return Target{}, fmt.Errorf("%s is not an http or https URL: it must look like http://10.0.0.5:8080", clip(s))
	}
	if strings.ContainsAny(rest, "?#") {
		return Target{}, fmt.Errorf("%s has a query or a fragment: only scheme, host, port and path are allowed", clip(s))
	}
	authority, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	if strings.Contains(authority, "@") {
		// Not quoted: it may hold a password.
		return Target{}, errors.New("has userinfo before an @: only scheme, host, port and path are allowed")
	}
	host, port, err := splitAuthority(authority)
	if err != nil {
		return Target{}, err
	}
	standard := t.Port
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || port[0] == '0' {
			return Target{}, fmt.Errorf("port %s must be a number from 1 to 65535", clip(port))
		}
		t.Port = uint16(n)
	}
	t.Host = host
	if authority[0] == '[' {
		t.IP = netip.MustParseAddr(host).Unmap()
	} else if t.IP, err = parseHost(host); err != nil {
		return Target{}, err
	}
	t.Authority = authority // a part of s, as all of it is: an instance is kept with few objects
	if t.Port == standard {
		t.Authority = strings.TrimSuffix(authority, ":"+port)
	}
	t.BasePath, err = parseBasePath(path)
	if err != nil {
		return Target{}, err
	}
	return t, nil
}

// splitAuthority splits host[:port]. A host in brackets is an IPv6 address when it returns, any other is not checked yet.
func splitAuthority(authority string) (host, port string, err error) {
	var after string
	if strings.HasPrefix(authority, "[") {
		var ok bool
		if host, after, ok = strings.Cut(authority[1:], "]"); !ok {
			return "", "", fmt.Errorf("host %s has no closing bracket", clip(authority))
		}
		if strings.Contains(host, "%") {
			return "", "", fmt.Errorf("host %s has a zone: an address that needs one cannot be registered", clip(host))
		}
		if ip, err := netip.ParseAddr(host); err != nil || !ip.Is6() {
			return "", "", fmt.Errorf("host %s is no IPv6 address: only one is written in brackets", clip(host))
		}
	} else {
		i := strings.IndexByte(authority, ':')
		if i < 0 {
			i = len(authority)
		}
		host, after = authority[:i], authority[i:]
		if strings.Count(after, ":") > 1 {
			return "", "", fmt.Errorf("host %s: an IPv6 address is written in brackets, like http://[2001:db8::1]:8080", clip(authority))
		}
	}
	if host == "" {
		return "", "", errors.New("has no host: must be like http://10.0.0.5:8080")
	}
	if after == "" {
		return host, "", nil
	}
	if after[0] != ':' || len(after) == 1 {
		return "", "", fmt.Errorf("%s must be a host, or a host, a colon and a port", clip(authority))
	}
	return host, after[1:], nil
}

// parseHost checks a host without brackets. It returns the zero Addr for a name.
func parseHost(host string) (netip.Addr, error) {
	const rule = "must be an IPv4 address, an IPv6 address in brackets, or a name of letters, digits, hyphens and underscores"
	name := strings.TrimSuffix(host, ".")
	if len(name) > 253 {
		return netip.Addr{}, fmt.Errorf("host has %d characters: a name has at most 253", len(name))
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	if numeric(last) {
		ip, err := netip.ParseAddr(host)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("host %s looks like an IPv4 address, but is not four decimal numbers from 0 to 255", clip(host))
		}
		return ip, nil
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return netip.Addr{}, fmt.Errorf("host %s: each part between dots must have 1 to 63 characters", clip(host))
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return netip.Addr{}, fmt.Errorf("host %s: no part between dots may begin or end with a hyphen", clip(host))
		}
		for i := range len(label) {
			if c := label[i]; !alphanumeric(c) && c != '-' && c != '_' {
				if c >= 0x80 {
					return netip.Addr{}, fmt.Errorf("host %s is not ASCII: write the name in its xn-- form", clip(host))
				}
				return netip.Addr{}, fmt.Errorf("host %s %s", clip(host), rule)
			}
		}
	}
	return netip.Addr{}, nil
}

// numeric tells whether a host that ends in this label is read as an IPv4 address (WHATWG URL, "ends in a number";
// inet_aton reads the same forms).
func numeric(label string) bool {
	digits, allowed := label, "0123456789"
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		digits, allowed = label[2:], "0123456789abcdefABCDEF"
	} else if label == "" {
		return false
	}
	return strings.Trim(digits, allowed) == ""
}

// parseBasePath checks a path and drops the slash at its end.
func parseBasePath(path string) (string, error) {
	if strings.Contains(path, "//") {
		return "", fmt.Errorf("path %s has an empty segment", clip(path))
	}
	path = strings.TrimSuffix(path, "/")
	decoded := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '%':
			if i+2 >= len(path) {
				return "", fmt.Errorf("path %s: %% must be followed by two hexadecimal digits", clip(path))
			}
			n, err := strconv.ParseUint(path[i+1:i+3], 16, 8)
			if err != nil {
				return "", fmt.Errorf("path %s: %% must be followed by two hexadecimal digits", clip(path))
			}
			if n < 0x20 || n == 0x7f {
				return "", fmt.Errorf("path %s has an encoded control character", clip(path))
			}
			decoded = append(decoded, byte(n))
			i += 2
		case alphanumeric(c), strings.IndexByte("/-._~!$&'()*+,;=:@", c) >= 0: // pchar of RFC 3986 3.3
			decoded = append(decoded, c)
		default:
			return "", fmt.Errorf("path %s: byte %d must be percent-encoded", clip(path), i+1)
		}
	}
	// Also those that a backend would see after decoding: /a%2f..%2fb, and with backslashes.
	for segment := range strings.FieldsFuncSeq(string(decoded), func(r rune) bool { return r == '/' || r == '\\' }) {
		if segment == "." || segment == ".." {
			return "", fmt.Errorf("path %s has a dot segment", clip(path))
		}
	}
	return path, nil
}

// AddrPolicy says where an instance may point, beyond what is always refused. The zero value has no further networks and
// knows no listeners.
type AddrPolicy struct {
	Allow []netip.Prefix   // if set, nothing outside is allowed, and loopback inside is allowed to every peer (--addr-allow)
	Deny  []netip.Prefix   // never these (--addr-deny)
	Own   []netip.AddrPort // the gateway's own listeners as bound; an unspecified address stands for every local one
}

// never holds what no instance may have, by rule.
var never = []struct {
	prefix netip.Prefix
	rule   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fd00:ec2::254/128"), "a cloud's metadata service"},
}

// Check judges one address that is about to be registered or dialled. remote says that the instance was registered by a
// peer that is not loopback. An IPv6 address that carries an IPv4 one (IPv4-mapped, NAT64, 6to4, IPv4-compatible) is
// judged as both. The error names the rule, and the flag if there is one.
func (p *AddrPolicy) Check(ap netip.AddrPort, remote bool) error {
	ip := ap.Addr().Unmap().WithZone("")
	if !ip.IsValid() {
		return errors.New("no address")
	}
	inner := embedded(ip)
	for _, n := range never {
		if n.prefix.Contains(ip) || n.prefix.Contains(inner) {
			return fmt.Errorf("%s is %s (%s), where no instance may point", ip, n.rule, n.prefix)
		}
	}
	for _, form := range [...]netip.Addr{ip, inner} {
		if err := p.checkOwn(netip.AddrPortFrom(form, ap.Port())); err != nil {
			return err
		}
	}
	for _, n := range p.Deny {
		if contains(n, ip) || contains(n, inner) {
			return fmt.Errorf("%s is in %s, which --addr-deny refuses", ip, n)
		}
	}
	switch {
	case len(p.Allow) > 0:
		if !slices.ContainsFunc(p.Allow, func(n netip.Prefix) bool { return contains(n, ip) || contains(n, inner) }) {
			return fmt.Errorf("%s is in none of the networks of --addr-allow", ip)
		}
	case remote && (ip.IsLoopback() || inner.IsLoopback()):
		return fmt.Errorf("%s is a loopback address: only a peer on loopback may register it, unless --addr-allow contains it", ip)
	}
	return nil
}

// checkOwn refuses what one of the gateway's listeners answers: an instance there would send requests in a circle. ap may
// be without an address.
func (p *AddrPolicy) checkOwn(ap netip.AddrPort) error {
	for _, own := range p.Own {
		if own.Port() != ap.Port() || !ap.IsValid() {
			continue
		}
		at := own.Addr().Unmap().WithZone("")
		same := at == ap.Addr()
		if at.IsUnspecified() && !same {
			var err error
			if same, err = local(ap.Addr()); err != nil {
				return fmt.Errorf("whether %s is one of the gateway's own listeners cannot be told: %w", ap, err)
			}
		}
		if same {
			return fmt.Errorf("%s is one of the gateway's own listeners", ap)
		}
	}
	return nil
}

// local tells whether this machine answers at ip. It asks the system each time, since interfaces come and go; it is asked
// only about a listener's own port.
func local(ip netip.Addr) (bool, error) {
	if ip.IsLoopback() {
		return true, nil
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		if !ok {
			return false
		}
		at, _ := netip.AddrFromSlice(n.IP)
		return at.Unmap() == ip
	}), nil
}

// checkTarget judges a target as far as that can be done without resolving names.
func (p *AddrPolicy) checkTarget(t Target, in *Instance) error {
	if t.IP.IsValid() {
		return p.checkFor(in, netip.AddrPortFrom(t.IP, t.Port))
	}
	name := strings.ToLower(strings.TrimSuffix(t.Host, "."))
	if name != "localhost" && !strings.HasSuffix(name, ".localhost") {
		return nil
	}
	// RFC 6761 6.3: these are loopback, and need no resolver to tell.
	err := p.checkFor(in, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), t.Port))
	if err != nil && p.checkFor(in, netip.AddrPortFrom(netip.IPv6Loopback(), t.Port)) != nil {
		return fmt.Errorf("%s: %w", t.Host, err)
	}
	return nil
}

// CheckAddr judges an address that a registered instance's name has resolved to, or that is about to be dialled for it.
func (r *Registry) CheckAddr(in *Instance, ap netip.AddrPort) error {
	return r.addrs.Load().checkFor(in, ap)
}

// errOutside is why an instance is refused to one caller that would be taken from another.
var errOutside = errors.New("none of the networks of who registers it")

// checkFor is Check, and then the networks of who registered the instance.
func (p *AddrPolicy) checkFor(in *Instance, ap netip.AddrPort) error {
	if err := p.Check(ap, in.remote); err != nil || len(in.networks) == 0 {
		return err
	}
	ip := ap.Addr().Unmap().WithZone("")
	inner := embedded(ip)
	if !slices.ContainsFunc(in.networks, func(n netip.Prefix) bool { return contains(n, ip) || contains(n, inner) }) {
		return fmt.Errorf("%s is in %w", ip, errOutside)
	}
	return nil
}

var (
	nat64     = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052 2.1
	sixToFour = netip.MustParsePrefix("2002::/16")    // RFC 3056 2
	v4Compat  = netip.MustParsePrefix("::/96")        // RFC 4291 2.5.5.1, long deprecated
)

// embedded returns the IPv4 address that an IPv6 address leads to, or the zero Addr.
func embedded(ip netip.Addr) netip.Addr {
	b := ip.As16()
	switch {
	case nat64.Contains(ip), v4Compat.Contains(ip) && !ip.IsLoopback() && !ip.IsUnspecified():
		return netip.AddrFrom4([4]byte(b[12:]))
	case sixToFour.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6]))
	}
	return netip.Addr{}
}

// contains is n.Contains, but a network that is written IPv4-mapped holds the IPv4 addresses it means. ip may be zero.
func contains(n netip.Prefix, ip netip.Addr) bool {
	if n.Addr().Is4In6() && n.Bits() >= 96 {
		n = netip.PrefixFrom(n.Addr().Unmap(), n.Bits()-96)
	}
	return n.Contains(ip)
}
