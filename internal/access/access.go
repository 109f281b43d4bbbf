// Package access is the one rule for who may use the API, for reading and for changing. With tokens or client certificates
// everybody needs one, and its rights say for what. Without any only peers in the allowed networks may, and nobody who may speak
// for somebody else: behind a proxy on the same machine, or a page in a browser there, every client of theirs would look like a
// local one.
package access

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/internal/follow"
	"kerberos/registry"
)

// Config is who may use the API. The zero value lets in peers on loopback.
type Config struct {
	Token          string         // if set, who sends it has all rights
	Tokens         string         // if set, a file of who has which rights (README, "Access"); followed when it changes
	Certificates   bool           // the admin listener asks for certificates; without Tokens, each that is verified has all rights
	Allow          []netip.Prefix // peers let in if none of these is set; none means loopback
	AllowNone      bool           // nobody is let in without a token (--api-allow none)
	AllowSet       bool           // Allow was given explicitly: other users of this machine are let in too, if loopback is
	TrustedProxies bool           // some proxy is trusted to speak for its clients: nobody is let in without a token

	Log *slog.Logger // failed attempts, and what becomes of Tokens; default: nothing
}

// Rule is a Config made ready to check requests.
type Rule struct {
	cfg      Config
	key      keyring
	token    sum                    // what Config.Token is looked up by
	grants   atomic.Pointer[grants] // of Config.Tokens; nil without
	follower *follow.Follower

	failures limiter // attempts
	notes    notes
}

// Refusal is why a request is not let in.
type Refusal struct {
	Status int    // 401, 403 or 429
	Detail string // for the client: which rule refused, and what would help
}

// New makes a Rule of cfg. Its error is about the file of tokens. Close ends what follows that file.
func New(cfg Config) (*Rule, error) {
	r := ruleOf(cfg)
	if cfg.Tokens == "" {
		return r, nil
	}
	seen := follow.Fingerprint(cfg.Tokens)
	if err := r.read(); err != nil {
		return nil, err
	}
	r.follower = follow.Files(seen, r.reread, cfg.Tokens)
	return r, nil
}

// Check refuses a Config that New refuses. It starts nothing.
func (cfg Config) Check() error {
	if cfg.Tokens == "" {
		return nil
	}
	return ruleOf(cfg).read()
}

// ruleOf is a rule that has not read its file.
func ruleOf(cfg Config) *Rule {
	cfg.Allow = slices.Clone(cfg.Allow)
	if len(cfg.Allow) == 0 {
		cfg.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Rule{cfg: cfg, notes: notes{log: cfg.Log}}
	_, _ = rand.Read(r.key[:]) // it does not fail
	r.token = r.key.ofToken([]byte(cfg.Token))
	return r
}

// Close ends what follows the file of tokens.
func (r *Rule) Close() { r.follower.Close() }

// read makes the file of tokens what is asked from now on. On an error nothing changes.
func (r *Rule) read() error {
	data, err := follow.Read(r.cfg.Tokens)
	if err != nil {
		return err
	}
	var taken []sum
	if r.cfg.Token != "" {
		taken = append(taken, r.token)
	}
	g, err := parseTokens(data, r.key, taken...)
	if err != nil {
		return fmt.Errorf("%s:%w", r.cfg.Tokens, err)
	}
	r.grants.Store(g)
	if len(g.certificates) > 0 && !r.cfg.Certificates {
		r.cfg.Log.Warn("the tokens file has entries for certificates, and no client is asked for one: set --admin-client-ca", "file", r.cfg.Tokens)
	}
	if info, err := os.Stat(r.cfg.Tokens); err == nil {
		switch mode := info.Mode().Perm(); {
		case mode&0o022 != 0:
			r.cfg.Log.Warn("others may write the tokens file, and so give rights: chmod 600", "file", r.cfg.Tokens, "mode", mode.String())
		case mode&0o044 != 0 && g.secrets:
			r.cfg.Log.Warn("others may read the tokens in the tokens file: chmod 600, or keep their sha256 there", "file", r.cfg.Tokens, "mode", mode.String())
		}
	}
	return nil
}

func (r *Rule) reread() {
	if err := r.read(); err != nil {
		r.cfg.Log.Error("the tokens file has changed and cannot be used: what it was before stays in force", "reason", err.Error())
		return
	}
	r.cfg.Log.Info("the tokens file has been read again", "file", r.cfg.Tokens)
}

// Wrap lets those requests through to next that the rule lets in, with who makes them, and answers the others with problem+json.
// What is tried without success is logged, here and where next refuses it; beyond a limit for each address the answer is 429.
// That limit holds up nobody who has a right: many can be behind one address. So it keeps the log and the gateway free of noise;
// against guessing there is only the length of a token.
func (r *Rule) Wrap(next fasthttp.RequestHandler) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		caller, no := r.admit(ctx)
		if no == nil {
			registry.SetCaller(ctx, caller)
			next(ctx)
			if ctx.Response.StatusCode() == fasthttp.StatusForbidden {
				r.notes.refused(ctx, caller.Name(), "its rights do not cover the call")
			} else if instance, addr := registry.Outside(ctx); instance != "" {
				r.notes.refused(ctx, caller.Name(), "its networks do not cover the addr", slog.String("instance", instance), slog.String("addr", clip([]byte(addr))))
			}
			return
		}
		if r.secured() {
			peer, _ := addrPort(ctx.RemoteAddr())
			if r.failures.allow(peer.Addr(), time.Now()) {
				why, _, _ := strings.Cut(no.Detail, ";")
				r.notes.refused(ctx, "", why)
			} else {
				r.notes.skip()
				no = &Refusal{fasthttp.StatusTooManyRequests, "too many attempts from this address have failed; those with a right are answered all the same"}
			}
		}
		switch no.Status {
		case fasthttp.StatusUnauthorized:
			ctx.Response.Header.Set(fasthttp.HeaderWWWAuthenticate, `Bearer realm="kerberos"`)
		case fasthttp.StatusTooManyRequests:
			ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, strconv.Itoa(int(failedEvery.Seconds())))
		}
		registry.Problem(ctx, no.Status, "", no.Detail)
	}
}

// WrapAdmin is Wrap for what is about the gateway itself: only those with all rights are let in.
func (r *Rule) WrapAdmin(next fasthttp.RequestHandler) fasthttp.RequestHandler {
	return r.Wrap(func(ctx *fasthttp.RequestCtx) {
		if !registry.Administers(ctx) {
			registry.Problem(ctx, fasthttp.StatusForbidden, "", "this needs the right admin")
			return
		}
		next(ctx)
	})
}

// MayReadAll reports whether a request, which is not for the API, is by somebody who may read all of it. It is no attempt.
func (r *Rule) MayReadAll(ctx *fasthttp.RequestCtx) bool {
	caller, no := r.admit(ctx)
	return no == nil && caller.May(registry.RightRead, "")
}

// secured says that everybody needs a token or a certificate, those on loopback too.
func (r *Rule) secured() bool { return r.cfg.Token != "" || r.cfg.Tokens != "" || r.cfg.Certificates }

// admit returns who makes a request that is let in.
func (r *Rule) admit(ctx *fasthttp.RequestCtx) (registry.Caller, *Refusal) {
	if r.secured() {
		return r.identify(ctx)
	}
	why, allow := r.refuse(ctx)
	if why == "" {
		if ctx.RemoteIP().IsLoopback() {
			return all("loopback"), nil
		}
		return all("network"), nil
	}
	help := "; set a token (--token) and send it as Authorization: Bearer TOKEN"
	if allow {
		help += ", or name the networks that may use the API directly, without a proxy (--api-allow)"
	}
	return nil, &Refusal{fasthttp.StatusForbidden, why + help}
}

// identify returns who a token or a certificate is for. A token that is sent counts alone.
func (r *Rule) identify(ctx *fasthttp.RequestCtx) (registry.Caller, *Refusal) {
	help := "; send Authorization: Bearer TOKEN with a token of the gateway's (--token, --tokens)"
	if r.cfg.Certificates {
		help += ", or a client certificate to the admin listener (--admin-client-ca)"
	}
	fields := ctx.Request.Header.PeekAll(fasthttp.HeaderAuthorization)
	if len(fields) == 0 && r.cfg.Certificates {
		if state := ctx.TLSConnectionState(); state != nil && len(state.VerifiedChains) > 0 {
			// A browser adds a certificate to what a page of anybody's has it send, which it does to no token.
			if site := string(ctx.Request.Header.Peek("Sec-Fetch-Site")); site == "cross-site" || site == "same-site" {
				return nil, &Refusal{fasthttp.StatusForbidden, "the request was made by a page of another site, whose word a certificate is not"}
			}
			return r.certified(namesOf(state.VerifiedChains[0][0]))
		}
	}
	if len(fields) != 1 {
		return nil, &Refusal{fasthttp.StatusUnauthorized, fmt.Sprintf("the API needs one Authorization field, not %d", len(fields)) + help}
	}
	scheme, token, _ := bytes.Cut(fields[0], []byte(" "))
	if !strings.EqualFold(string(scheme), "Bearer") {
		return nil, &Refusal{fasthttp.StatusUnauthorized, "the Authorization field is not of the Bearer scheme" + help}
	}
	at := r.key.ofToken(bytes.TrimSpace(token))
	if r.cfg.Token != "" && subtle.ConstantTimeCompare(at[:], r.token[:]) == 1 {
		return all("--token"), nil
	}
	if g := r.grants.Load(); g != nil {
		if found := g.tokens[at]; found != nil {
			sent := at // which then is on the heap, and only then
			return &caller{grant: found, kind: "token", now: func() *grant { return r.grants.Load().tokens[sent] }}, nil
		}
	}
	return nil, &Refusal{fasthttp.StatusUnauthorized, "the token is not the gateway's" + help}
}

// certified returns who a verified certificate with these names is for.
func (r *Rule) certified(names []string) (registry.Caller, *Refusal) {
	if r.cfg.Tokens == "" {
		return all("certificate " + strings.Join(names, ", ")), nil
	}
	now := func() *grant { return r.grants.Load().ofCertificate(names) }
	if found := now(); found != nil {
		return &caller{grant: found, kind: "certificate", now: now}, nil
	}
	return nil, &Refusal{fasthttp.StatusForbidden, "no entry of the tokens file is for the certificate of " + strings.Join(names, ", ") +
		"; add one with certificate: and one of its names (--tokens)"}
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
