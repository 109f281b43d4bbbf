// Package access is the one rule for who may use the API, for reading and for changing. With a token everybody needs it.
// Without one only peers in the allowed networks may, and nobody who may speak for somebody else: behind a proxy on the
// same machine, or a page in a browser there, every client of theirs would look like a local one.
package access

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// Config is who may use the API. The zero value lets in peers on loopback.
type Config struct {
	Token          string         // if set, it decides alone
	Allow          []netip.Prefix // peers let in without a token; none means loopback
	AllowNone      bool           // nobody is let in without a token (--api-allow none)
	AllowSet       bool           // Allow was given explicitly: other users of this machine are let in too, if loopback is
	TrustedProxies bool           // some proxy is trusted to speak for its clients: nobody is let in without a token
}

// Rule is a Config made ready to check requests. It never changes.
type Rule struct {
	cfg   Config
	token [sha256.Size]byte // of Config.Token; comparing hashes hides its length too
}

// Refusal is why a request is not let in.
type Refusal struct {
	Status int    // 401 or 403
	Detail string // for the client: which rule refused, and what would help
}

// New makes a Rule of cfg.
func New(cfg Config) *Rule {
	cfg.Allow = slices.Clone(cfg.Allow)
	if len(cfg.Allow) == 0 {
		cfg.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	}
	return &Rule{cfg: cfg, token: sha256.Sum256([]byte(cfg.Token))}
}

// Wrap lets those requests through to next that Check lets in, and answers the others with problem+json.
func (r *Rule) Wrap(next fasthttp.RequestHandler) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		no := r.Check(ctx)
		if no == nil {
			next(ctx)
			return
		}
		if no.Status == fasthttp.StatusUnauthorized {
			ctx.Response.Header.Set(fasthttp.HeaderWWWAuthenticate, `Bearer realm="kerberos"`)
		}
		registry.Problem(ctx, no.Status, "", no.Detail)
	}
}

// Check returns nil for a request that is let in.
func (r *Rule) Check(ctx *fasthttp.RequestCtx) *Refusal {
	if r.cfg.Token != "" {
		return r.checkToken(ctx)
	}
	why, allow := r.refuse(ctx)
	if why == "" {
		return nil
	}
	help := "; set a token (--token) and send it as Authorization: Bearer TOKEN"
	if allow {
		help += ", or name the networks that may use the API directly, without a proxy (--api-allow)"
	}
	return &Refusal{fasthttp.StatusForbidden, why + help}
}

func (r *Rule) checkToken(ctx *fasthttp.RequestCtx) *Refusal {
	const help = "; send Authorization: Bearer TOKEN with the gateway's token (--token)"
	fields := ctx.Request.Header.PeekAll(fasthttp.HeaderAuthorization)
	if len(fields) != 1 {
		return &Refusal{fasthttp.StatusUnauthorized, fmt.Sprintf("the API needs one Authorization field, not %d", len(fields)) + help}
	}
	scheme, token, _ := strings.Cut(string(fields[0]), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return &Refusal{fasthttp.StatusUnauthorized, "the Authorization field is not of the Bearer scheme" + help}
	}
	sum := sha256.Sum256([]byte(strings.TrimSpace(token)))
	if subtle.ConstantTimeCompare(sum[:], r.token[:]) != 1 {
		return &Refusal{fasthttp.StatusUnauthorized, "the token is not the gateway's" + help}
	}
	return nil
}

// refuse returns the rule that keeps a request without a token out, or nothing; allow tells whether the same request
// could be let in by naming networks.
func (r *Rule) refuse(ctx *fasthttp.RequestCtx) (why string, allow bool) {
	if r.cfg.TrustedProxies {
		return "proxies are trusted (--trusted-proxies), so nobody may use the API without a token", false
	}
	peer, ok := addrPort(ctx.RemoteAddr())
	if !ok {
		return "the peer has no IP address", false
	}
	why = forOthers(ctx, peer.Addr())
	allow = why == ""
	switch {
	case r.cfg.AllowNone:
		return "nobody may use the API without a token (--api-allow none)", allow
	case !slices.ContainsFunc(r.cfg.Allow, func(p netip.Prefix) bool { return p.Contains(peer.Addr()) }):
		return fmt.Sprintf("the peer %s is in none of the networks that may use the API", peer.Addr()), allow
	case why != "", !peer.Addr().IsLoopback(), r.cfg.AllowSet:
		return why, false
	}
	here, ok := addrPort(ctx.LocalAddr())
	if !ok {
		return "the address it came to is unknown", true
	}
	return otherUser(peer, here), true
}

// forOthers says why a request may be somebody else's than its peer's, whom no network vouches for, or nothing.
func forOthers(ctx *fasthttp.RequestCtx, peer netip.Addr) string {
	if !ctx.Request.Header.IsHTTP11() {
		return fmt.Sprintf("the request is %.64s, as proxies send it, and not HTTP/1.1", ctx.Request.Header.Protocol())
	}
	if ctx.RequestURI()[0] != '/' {
		return "the request-target is not a path, as it is for proxies"
	}
	for name := range ctx.Request.Header.All() {
		if speaksForOthers(string(name)) {
			return fmt.Sprintf("the request has the field %s, so it may come from a proxy or a browser", name)
		}
	}
	if !peer.IsLoopback() {
		return ""
	}
	if host := string(ctx.Request.Header.Host()); !loopbackHost(host) {
		return fmt.Sprintf("the request comes from this machine, but its Host is %.64q and not localhost or a loopback address", host)
	}
	return ""
}

// speaksForOthers tells whether a field of that name is one that proxies or browsers add.
func speaksForOthers(name string) bool {
	switch name = strings.ToLower(name); name {
	case "forwarded", "x-real-ip", "via", "origin":
		return true
	}
	return strings.HasPrefix(name, "x-forwarded-") || strings.HasPrefix(name, "sec-fetch-")
}

// loopbackHost tells whether a Host field names this machine to itself: localhost or a loopback address, with any port.
// Another name that resolves to loopback is how a page in a browser gets here (DNS rebinding).
func loopbackHost(host string) bool {
	name, port, ok := strings.Cut(host, ":")
	if strings.HasPrefix(host, "[") {
		i := strings.IndexByte(host, ']')
		if i < 0 {
			return false
		}
		name = host[1:i]
		if ip, err := netip.ParseAddr(name); err != nil || !ip.Is6() {
			return false
		}
		port, ok = strings.CutPrefix(host[i+1:], ":")
		if !ok && port != "" {
			return false
		}
	}
	if ok {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return false
		}
	}
	if strings.EqualFold(name, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.Zone() == "" && ip.Unmap().IsLoopback()
}

// addrPort returns a TCP address as both ends of a connection know it: IPv4-mapped unmapped, without a zone.
func addrPort(a net.Addr) (netip.AddrPort, bool) {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, false
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	return netip.AddrPortFrom(ip.Unmap(), uint16(tcp.Port)), ok
}
