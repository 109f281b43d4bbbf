package registry

import (
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var compareAddrs = cmpopts.EquateComparable(netip.Addr{})

func TestParseAddr(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	name253 := strings.Repeat(label63+".", 3) + strings.Repeat("b", 61)
	ip := netip.MustParseAddr
	tests := []struct {
		addr string
		want Target
	}{
		{"http://localhost:8081", Target{"http", "localhost", 8081, netip.Addr{}, "localhost:8081", ""}},
		{"http://localhost", Target{"http", "localhost", 80, netip.Addr{}, "localhost", ""}},
		{"https://localhost", Target{"https", "localhost", 443, netip.Addr{}, "localhost", ""}},
		{"http://localhost:80", Target{"http", "localhost", 80, netip.Addr{}, "localhost", ""}},
		{"https://localhost:443/", Target{"https", "localhost", 443, netip.Addr{}, "localhost", ""}},
		{"https://localhost:80", Target{"https", "localhost", 80, netip.Addr{}, "localhost:80", ""}},
		{"http://h:443", Target{"http", "h", 443, netip.Addr{}, "h:443", ""}},
		{"HTTP://Back.End", Target{"http", "Back.End", 80, netip.Addr{}, "Back.End", ""}},
		{"hTTps://h", Target{"https", "h", 443, netip.Addr{}, "h", ""}},
		{"http://10.1.2.3:65535", Target{"http", "10.1.2.3", 65535, ip("10.1.2.3"), "10.1.2.3:65535", ""}},
		{"http://[2001:db8::1]", Target{"http", "2001:db8::1", 80, ip("2001:db8::1"), "[2001:db8::1]", ""}},
		{"https://[2001:DB8::1]:1/a", Target{"https", "2001:DB8::1", 1, ip("2001:db8::1"), "[2001:DB8::1]:1", "/a"}},
		{"http://[::ffff:10.0.0.1]:81", Target{"http", "::ffff:10.0.0.1", 81, ip("10.0.0.1"), "[::ffff:10.0.0.1]:81", ""}},
		{"http://my_service_1:81", Target{"http", "my_service_1", 81, netip.Addr{}, "my_service_1:81", ""}},
		{"http://_srv.a-b.example.", Target{"http", "_srv.a-b.example.", 80, netip.Addr{}, "_srv.a-b.example.", ""}},
		{"http://1a.example", Target{"http", "1a.example", 80, netip.Addr{}, "1a.example", ""}},
		{"http://1.2.3.4.example", Target{"http", "1.2.3.4.example", 80, netip.Addr{}, "1.2.3.4.example", ""}},
		{"http://0xg", Target{"http", "0xg", 80, netip.Addr{}, "0xg", ""}},
		{"http://" + name253, Target{"http", name253, 80, netip.Addr{}, name253, ""}},
		{"http://h/a/b%2Fc%c3%a9/;v=1,$&'()*+!~@:_-.x..", Target{"http", "h", 80, netip.Addr{}, "h", "/a/b%2Fc%c3%a9/;v=1,$&'()*+!~@:_-.x.."}},
		{"http://h/a/", Target{"http", "h", 80, netip.Addr{}, "h", "/a"}},
		{"http://h/user@home", Target{"http", "h", 80, netip.Addr{}, "h", "/user@home"}},
		{"http://h/...", Target{"http", "h", 80, netip.Addr{}, "h", "/..."}},
		{"http://h/%252e%252e/x", Target{"http", "h", 80, netip.Addr{}, "h", "/%252e%252e/x"}},
	}
	for _, tt := range tests {
		got, err := ParseAddr(tt.addr)
		if err != nil {
			t.Errorf("ParseAddr(%q): %v", tt.addr, err)
		} else if d := cmp.Diff(tt.want, got, compareAddrs); d != "" {
			t.Errorf("ParseAddr(%q) (-want +got):\n%s", tt.addr, d)
		}
	}
}

func TestParseAddrRefuses(t *testing.T) {
	const (
		numbers = "not four decimal numbers"
		dots    = "dot segment"
		coded   = "must be percent-encoded"
	)
	tests := []struct{ addr, says string }{
		{"", "is missing"},
		{"localhost:8081", "http or https"},
		{"//localhost", "http or https"},
		{"ftp://h", "http or https"},
		{"unix:///tmp/x", "http or https"},
		{" http://h", "http or https"},
		{"http:/h", "http or https"},
		{"http:h", "http or https"},
		{"http://", "no host"},
		{"http:///x", "no host"},
		{"http://:80", "no host"},
		{"http://h?q", "query or a fragment"},
		{"http://h/?", "query or a fragment"},
		{"http://h/x#f", "query or a fragment"},
		{"http://h#", "query or a fragment"},
		{"http://u@h", "userinfo"},
		{"http://u:secret@h/", "userinfo"},
		{"http://@h", "userinfo"},
		{"http://good@evil@h", "userinfo"},
		{"http://h:0", "1 to 65535"},
		{"http://h:65536", "1 to 65535"},
		{"http://h:080", "1 to 65535"},
		{"http://h:+80", "1 to 65535"},
		{"http://h:-1", "1 to 65535"},
		{"http://h:http", "1 to 65535"},
		{"http://h:8 0", "1 to 65535"},
		{"http://h:99999999999999999999", "1 to 65535"},
		{"http://h:", "a colon and a port"},
		{"http://[::1]:", "a colon and a port"},
		{"http://[::1]80", "a colon and a port"},
		{"http://[::1]x:80", "a colon and a port"},
		{"http://[::1", "closing bracket"},
		{"http://::1", "in brackets"},
		{"http://2001:db8::1:80", "in brackets"},
		{"http://[fe80::1%25eth0]", "zone"},
		{"http://[fe80::1%eth0]", "zone"},
		{"http://[::1%25]", "zone"},
		{"http://[127.0.0.1]", "no IPv6 address"},
		{"http://[v1.x]", "no IPv6 address"},
		{"http://[]", "no IPv6 address"},
		{"http://[h]", "no IPv6 address"},
		{"http://127.1", numbers},
		{"http://127.0.1", numbers},
		{"http://2130706433", numbers},
		{"http://0", numbers},
		{"http://0x7f000001", numbers},
		{"http://0X7F.0.0.1", numbers},
		{"http://0x7f.1", numbers},
		{"http://0x", numbers},
		{"http://127.0.0.0x1", numbers},
		{"http://0177.0.0.1", numbers},
		{"http://127.0.0.01", numbers},
		{"http://017700000001", numbers},
		{"http://256.0.0.1", numbers},
		{"http://1.2.3.4.5", numbers},
		{"http://127.0.0.1.", numbers},
		{"http://127.1.", numbers},
		{"http://a.1", numbers},
		{"http://a.0x1f.", numbers},
		{"http://a..b", "1 to 63"},
		{"http://.", "1 to 63"},
		{"http://.a", "1 to 63"},
		{"http://a..", "1 to 63"},
		{"http://" + strings.Repeat("a", 64), "1 to 63"},
		{"http://" + strings.Repeat("a.", 127) + "b", "at most 253"},
		{"http://-a", "hyphen"},
		{"http://a-.b", "hyphen"},
		{"http://a b", "must be an IPv4"},
		{"http://a\tb", "must be an IPv4"},
		{"http://a\x00b", "must be an IPv4"},
		{"http://a\r\nX", "must be an IPv4"},
		{"http://h:80\r\nX", "1 to 65535"},
		{"http://a%41", "must be an IPv4"},
		{"http://a\\b", "must be an IPv4"},
		{"http://h\\@evil", "userinfo"},
		{"http://a,b", "must be an IPv4"},
		{"http://münchen.example", "xn--"},
		{"http://h/a b", coded},
		{"http://h/a\r\nX: y", coded},
		{"http://h/a\x7f", coded},
		{"http://h/é", coded},
		{"http://h/a\\b", coded},
		{"http://h/<x>", coded},
		{"http://h/{x}", coded},
		{"http://h/%", "two hexadecimal"},
		{"http://h/%4", "two hexadecimal"},
		{"http://h/%4g", "two hexadecimal"},
		{"http://h/%+1", "two hexadecimal"},
		{"http://h/%00", "control character"},
		{"http://h/%0d%0a", "control character"},
		{"http://h/%7F", "control character"},
		{"http://h//", "empty segment"},
		{"http://h//a", "empty segment"},
		{"http://h/a//b", "empty segment"},
		{"http://h/a//", "empty segment"},
		{"http://h/.", dots},
		{"http://h/..", dots},
		{"http://h/a/../b", dots},
		{"http://h/a/./", dots},
		{"http://h/%2e", dots},
		{"http://h/%2E%2e/", dots},
		{"http://h/.%2e/x", dots},
		{"http://h/a%2f..%2fb", dots},
		{"http://h/..%5Cb", dots},
		{"http://h/" + strings.Repeat("a", maxAddr), "at most 2048"},
	}
	for _, tt := range tests {
		got, err := ParseAddr(tt.addr)
		switch {
		case err == nil:
			t.Errorf("ParseAddr(%q) = %+v; want an error that says %q", tt.addr, got, tt.says)
		case !strings.Contains(err.Error(), tt.says):
			t.Errorf("ParseAddr(%q): %v; want it to say %q", tt.addr, err, tt.says)
		case strings.Contains(err.Error(), "secret"):
			t.Errorf("ParseAddr(%q) repeats a password: %v", tt.addr, err)
		case got != (Target{}):
			t.Errorf("ParseAddr(%q) returns %+v beside its error", tt.addr, got)
		}
	}
}

func FuzzParseAddr(f *testing.F) {
	for _, s := range []string{"http://localhost:8081", "https://[::1]:443/x/", "http://10.0.0.1/a%2Fb", "http://u:p@h", "http://127.1",
		"http://a_b.example.:81/;x@y", "http://[fe80::1%25eth0]", "http://h/%2e%2e", "http://0x7f.1", "HTTP://h/a'b(c)"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseAddr(s)
		if err != nil {
			return
		}
		u, err := url.Parse(s)
		if err != nil {
			t.Fatalf("%q is accepted, but url.Parse says %v", s, err)
		}
		if u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" {
			t.Fatalf("%q is accepted with more than host and path: %#v", s, u)
		}
		if u.Scheme != got.Scheme || u.Hostname() != got.Host {
			t.Fatalf("%q: %+v; url.Parse reads %s and %s", s, got, u.Scheme, u.Hostname())
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		if strconv.Itoa(int(got.Port)) != port {
			t.Fatalf("%q: port %d; url.Parse reads %s", s, got.Port, port)
		}
		if strings.TrimSuffix(u.EscapedPath(), "/") != got.BasePath || strings.HasSuffix(got.BasePath, "/") {
			t.Fatalf("%q: base path %q; url.Parse reads %q", s, got.BasePath, u.EscapedPath())
		}
		if clean := (&url.URL{Path: "/"}).JoinPath(u.Path).Path; got.BasePath != "" && strings.TrimSuffix(clean, "/") != strings.TrimSuffix(u.Path, "/") && !strings.Contains(u.Path, "//") {
			t.Fatalf("%q: path %q resolves to %q", s, u.Path, clean)
		}
		if ip := net.ParseIP(got.Host); (ip != nil) != got.IP.IsValid() || ip != nil && !ip.Equal(got.IP.AsSlice()) {
			t.Fatalf("%q: IP %v; net reads %v", s, got.IP, ip)
		}
		// The parts put together again are the same target, and all of it is safe in a head.
		again, err := ParseAddr(got.Scheme + "://" + got.Authority + got.BasePath)
		if err != nil || again != got {
			t.Fatalf("%q: %+v; put together again: %+v, %v", s, got, again, err)
		}
		for _, c := range []byte(got.Authority + got.BasePath) {
			if c <= ' ' || c >= 0x7f {
				t.Fatalf("%q: byte %#x in %+v", s, c, got)
			}
		}
	})
}

func TestAddrPolicy(t *testing.T) {
	prefixes := func(s ...string) (out []netip.Prefix) {
		for _, p := range s {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	own := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9901"), netip.MustParseAddrPort("[::]:8080"), netip.MustParseAddrPort("0.0.0.0:8443")}
	tests := []struct {
		name     string
		policy   AddrPolicy
		addr     string
		loopback string // what the error says if the registering peer is loopback; empty: allowed
		remote   string // if it is not
	}{
		{"private", AddrPolicy{}, "10.1.2.3:80", "", ""},
		{"public", AddrPolicy{}, "[2001:db8::1]:80", "", ""},
		{"unique local", AddrPolicy{}, "[fd00:ec2::253]:80", "", ""},
		{"unspecified", AddrPolicy{}, "0.0.0.0:80", "unspecified", "unspecified"},
		{"unspecified network", AddrPolicy{}, "0.1.2.3:80", "unspecified", "unspecified"},
		{"unspecified 6", AddrPolicy{}, "[::]:80", "unspecified", "unspecified"},
		{"multicast", AddrPolicy{}, "224.0.0.1:80", "multicast", "multicast"},
		{"multicast end", AddrPolicy{}, "239.255.255.255:80", "multicast", "multicast"},
		{"multicast 6", AddrPolicy{}, "[ff02::1]:80", "multicast", "multicast"},
		{"broadcast", AddrPolicy{}, "255.255.255.255:80", "broadcast", "broadcast"},
		{"link-local", AddrPolicy{}, "169.254.0.1:80", "link-local", "link-local"},
		{"metadata", AddrPolicy{}, "169.254.169.254:80", "link-local", "link-local"},
		{"metadata 6", AddrPolicy{}, "[fd00:ec2::254]:80", "metadata", "metadata"},
		{"link-local 6", AddrPolicy{}, "[fe80::1]:80", "link-local", "link-local"},
		{"link-local 6 end", AddrPolicy{}, "[febf::1]:80", "link-local", "link-local"},
		{"link-local with zone", AddrPolicy{}, "[fe80::1%lo]:80", "link-local", "link-local"},
		{"mapped metadata", AddrPolicy{}, "[::ffff:169.254.169.254]:80", "link-local", "link-local"},
		{"NAT64 metadata", AddrPolicy{}, "[64:ff9b::169.254.169.254]:80", "link-local", "link-local"},
		{"6to4 metadata", AddrPolicy{}, "[2002:a9fe:a9fe::1]:80", "link-local", "link-local"},
		{"compatible metadata", AddrPolicy{}, "[::169.254.169.254]:80", "link-local", "link-local"},
		{"NAT64 private", AddrPolicy{}, "[64:ff9b::10.0.0.1]:80", "", ""},
		{"never, whatever is allowed", AddrPolicy{Allow: prefixes("169.254.0.0/16", "::/0", "0.0.0.0/0")}, "169.254.1.1:80", "link-local", "link-local"},

		{"loopback", AddrPolicy{}, "127.0.0.1:80", "", "--addr-allow"},
		{"loopback end", AddrPolicy{}, "127.255.255.255:80", "", "--addr-allow"},
		{"loopback 6", AddrPolicy{}, "[::1]:80", "", "--addr-allow"},
		{"mapped loopback", AddrPolicy{}, "[::ffff:127.0.0.1]:80", "", "--addr-allow"},
		{"NAT64 loopback", AddrPolicy{}, "[64:ff9b::127.0.0.1]:80", "", "--addr-allow"},
		{"6to4 loopback", AddrPolicy{}, "[2002:7f00:1::]:80", "", "--addr-allow"},
		{"loopback let in", AddrPolicy{Allow: prefixes("127.0.0.0/8")}, "127.0.0.1:80", "", ""},
		{"loopback let in by a mapped network", AddrPolicy{Allow: prefixes("::ffff:127.0.0.0/104")}, "127.0.0.1:80", "", ""},
		{"loopback not among the allowed", AddrPolicy{Allow: prefixes("10.0.0.0/8")}, "127.0.0.1:80", "--addr-allow", "--addr-allow"},

		{"allowed", AddrPolicy{Allow: prefixes("10.0.0.0/8", "2001:db8::/32")}, "10.9.9.9:80", "", ""},
		{"allowed 6", AddrPolicy{Allow: prefixes("10.0.0.0/8", "2001:db8::/32")}, "[2001:db8::5]:80", "", ""},
		{"allowed, mapped", AddrPolicy{Allow: prefixes("10.0.0.0/8")}, "[::ffff:10.9.9.9]:80", "", ""},
		{"not allowed", AddrPolicy{Allow: prefixes("10.0.0.0/8")}, "11.0.0.1:80", "--addr-allow", "--addr-allow"},
		{"denied", AddrPolicy{Deny: prefixes("10.0.0.0/8")}, "10.0.0.1:80", "10.0.0.0/8, which --addr-deny", "--addr-deny"},
		{"denied, mapped", AddrPolicy{Deny: prefixes("10.0.0.0/8")}, "[::ffff:10.0.0.1]:80", "--addr-deny", "--addr-deny"},
		{"denied, NAT64", AddrPolicy{Deny: prefixes("10.0.0.0/8")}, "[64:ff9b::10.0.0.1]:80", "--addr-deny", "--addr-deny"},
		{"denied by a mapped network", AddrPolicy{Deny: prefixes("::ffff:10.0.0.0/104")}, "10.0.0.1:80", "--addr-deny", "--addr-deny"},
		{"denied inside the allowed", AddrPolicy{Allow: prefixes("10.0.0.0/8"), Deny: prefixes("10.1.0.0/16")}, "10.1.0.1:80", "--addr-deny", "--addr-deny"},
		{"loopback denied", AddrPolicy{Deny: prefixes("127.0.0.0/8")}, "127.0.0.1:80", "--addr-deny", "--addr-deny"},
		{"beside the denied", AddrPolicy{Deny: prefixes("10.0.0.0/8")}, "11.0.0.1:80", "", ""},

		{"own admin", AddrPolicy{Own: own}, "127.0.0.1:9901", "own listeners", "own listeners"},
		{"own admin, mapped", AddrPolicy{Own: own}, "[::ffff:127.0.0.1]:9901", "own listeners", "own listeners"},
		{"another address on its port", AddrPolicy{Own: own}, "127.0.0.2:9901", "", "--addr-allow"},
		{"own data on loopback", AddrPolicy{Own: own}, "127.0.0.1:8080", "own listeners", "own listeners"},
		{"own data anywhere on loopback", AddrPolicy{Own: own}, "127.9.9.9:8080", "own listeners", "own listeners"},
		{"own data on loopback 6", AddrPolicy{Own: own}, "[::1]:8080", "own listeners", "own listeners"},
		{"own data bound to IPv4", AddrPolicy{Own: own}, "127.0.0.1:8443", "own listeners", "own listeners"},
		{"own, though allowed", AddrPolicy{Own: own, Allow: prefixes("127.0.0.0/8")}, "127.0.0.1:8080", "own listeners", "own listeners"},
		{"another machine on our port", AddrPolicy{Own: own}, "192.0.2.1:8080", "", ""},
		{"another port here", AddrPolicy{Own: own}, "127.0.0.1:8081", "", "--addr-allow"},
	}
	for _, tt := range tests {
		for _, remote := range []bool{false, true} {
			want := tt.loopback
			if remote {
				want = tt.remote
			}
			err := tt.policy.Check(netip.MustParseAddrPort(tt.addr), remote)
			if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: Check(%s, remote %v) = %v; want it to say %q", tt.name, tt.addr, remote, err, want)
			}
		}
	}
	if (&AddrPolicy{}).Check(netip.AddrPort{}, false) == nil {
		t.Error("no address at all is let through")
	}
}

// A listener on every address answers at each of the machine's addresses.
func TestAddrPolicyOwnInterfaces(t *testing.T) {
	policy := AddrPolicy{Own: []netip.AddrPort{netip.MustParseAddrPort("[::]:8080")}}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.(*net.IPNet).IP)
		ip = ip.Unmap()
		if ip.IsLinkLocalUnicast() {
			continue // refused in any case
		}
		checked++
		if err := policy.Check(netip.AddrPortFrom(ip, 8080), false); err == nil || !strings.Contains(err.Error(), "own listeners") {
			t.Errorf("%s:8080 is ours, but Check says %v", ip, err)
		}
		if err := policy.Check(netip.AddrPortFrom(ip, 8081), false); err != nil {
			t.Errorf("%s:8081 is not ours, but Check says %v", ip, err)
		}
	}
	if checked == 0 {
		t.Fatal("this machine has no address")
	}
}

func FuzzAddrPolicy(f *testing.F) {
	f.Add([]byte{169, 254, 169, 254}, true)
	f.Add(netip.MustParseAddr("64:ff9b::7f00:1").AsSlice(), true)
	f.Add(netip.MustParseAddr("::ffff:0.0.0.0").AsSlice(), false)
	policy := AddrPolicy{Deny: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	f.Fuzz(func(t *testing.T, b []byte, remote bool) {
		ip, ok := netip.AddrFromSlice(b)
		if !ok || policy.Check(netip.AddrPortFrom(ip, 80), remote) != nil {
			return
		}
		plain := ip.Unmap()
		if plain.IsUnspecified() || plain.IsMulticast() || plain.IsLinkLocalUnicast() || remote && plain.IsLoopback() ||
			plain.Is4() && (plain.As4()[0] == 10 || plain.As4()[0] == 0) {
			t.Fatalf("%s is let through", ip)
		}
		// However an IPv4 address is wrapped, what it leads to is judged as well.
		if plain.Is4() {
			return
		}
		if b := plain.As16(); [12]byte(b[:12]) == [12]byte{0, 0x64, 0xff, 0x9b} && policy.Check(netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:])), 80), remote) != nil {
			t.Fatalf("%s is let through", ip)
		}
	})
}

// Where a literal or localhost is registered, its refusal is a refusal of the field; other names are judged when they are
// resolved, with the memory of who registered them.
func TestRegisterJudgesAddr(t *testing.T) {
	own := []netip.AddrPort{netip.MustParseAddrPort("[::]:8080"), netip.MustParseAddrPort("127.0.0.1:9901")}
	loopbackAllowed := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	tests := []struct {
		addr   string
		remote bool
		allow  []netip.Prefix
		says   string
	}{
		{"http://localhost:8081", false, nil, ""},
		{"http://localhost:8081", true, nil, "localhost: 127.0.0.1 is a loopback"},
		{"http://LocalHost.:8081", true, nil, "loopback"},
		{"http://app.localhost", true, nil, "loopback"},
		{"http://localhost:8081", true, loopbackAllowed, ""},
		{"http://localhost:8080", false, nil, "own listeners"},
		{"http://mylocalhost:8081", true, nil, ""},
		{"http://127.0.0.1:8081", false, nil, ""},
		{"http://127.0.0.1:8081", true, nil, "loopback"},
		{"http://127.0.0.1:9901", false, nil, "own listeners"},
		{"http://169.254.169.254/latest", false, nil, "link-local"},
		{"http://[::ffff:169.254.169.254]", false, nil, "link-local"},
		{"http://example.com", true, loopbackAllowed, ""},
	}
	for _, tt := range tests {
		r := New(Config{Addrs: AddrPolicy{Own: own, Allow: tt.allow}})
		err := r.Register("echo", Instance{ID: "a", Addr: tt.addr, remote: tt.remote})
		switch {
		case tt.says == "" && err != nil:
			t.Errorf("%s (remote %v): %v", tt.addr, tt.remote, err)
		case tt.says != "" && (err == nil || !strings.HasPrefix(err.Error(), "addr: ") || !strings.Contains(err.Error(), tt.says)):
			t.Errorf("%s (remote %v): %v; want addr and %q", tt.addr, tt.remote, err, tt.says)
		case (err == nil) != (r.Snapshot("echo") != nil):
			t.Errorf("%s: registered %v with error %v", tt.addr, r.Snapshot("echo") != nil, err)
		}
	}

	r := New(Config{Addrs: AddrPolicy{Own: own}})
	for id, remote := range map[string]bool{"near": false, "far": true} {
		if err := r.Register("echo", Instance{ID: id, Addr: "http://name.example", remote: remote}); err != nil {
			t.Fatal(err)
		}
	}
	at := netip.MustParseAddrPort("127.0.0.1:80")
	if err := r.CheckAddr(r.Snapshot("echo").Instance("near"), at); err != nil {
		t.Errorf("a name registered from here that resolves to loopback: %v", err)
	}
	if err := r.CheckAddr(r.Snapshot("echo").Instance("far"), at); err == nil {
		t.Error("a name registered from elsewhere that resolves to loopback is let through")
	}
	if err := r.CheckAddr(r.Snapshot("echo").Instance("near"), netip.MustParseAddrPort("169.254.169.254:80")); err == nil {
		t.Error("a name that resolves to a metadata service is let through")
	}
}
