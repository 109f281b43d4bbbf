package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/internal/config"
	"kerberos/internal/follow"
	"kerberos/internal/metrics"
	"kerberos/registry"
)

// origin is where a configuration comes from.
type origin struct {
	load    func() (config.Gateway, *config.Sources, error) // nil: it cannot be read again
	sources *config.Sources                                 // of what is in force
}

// quiet is how long a file of settings must be still before it is read again unasked: longer than those who write one in parts
// usually pause.
const quiet = 2 * time.Second

// reloader has the configuration read again while the gateway runs.
type reloader struct {
	origin
	follow *follow.Follower // nil: there is no file to read again

	mu    sync.Mutex // one reload at a time; guards what changes of a gateway: cfg, sources, data, admin; and what follows
	ended bool
	tried follow.Sum // of the file at the latest attempt, whatever came of it
	count metrics.Reloads
}

// reload reads the configuration again, as why asks for it. All of it is checked and built before anything changes; on an error
// what was in force stays, which is in the log, in the metrics and in the error.
func (g *gateway) reload(why string) error {
	r := &g.reloader
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || r.load == nil {
		return errors.New("the gateway stops, or has nothing to read again")
	}
	next, sources, err := r.load()
	return g.replace(why, next, sources, err)
}

// reloadFile reloads because the file has become what settled is the fingerprint of. It does nothing if that was tried already, or
// if the file has changed again by now; then it is not known, and will be followed on.
func (g *gateway) reloadFile(settled follow.Sum) {
	r := &g.reloader
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || settled == r.tried {
		return
	}
	if next, sources, err := r.load(); sources.Seen() == settled {
		_ = g.replace("a change of the file", next, sources, err) // the error is in the log
	}
}

// replace puts in force what was read, or has failed with err; it counts and logs what came of it. Its caller holds mu.
func (g *gateway) replace(why string, next config.Gateway, sources *config.Sources, err error) error {
	r := &g.reloader
	r.tried = sources.Seen()
	var changed []string
	if err == nil {
		changed, err = g.take(next, sources)
	}
	r.count.Refused = err != nil
	if err != nil {
		r.count.Failed++
		g.log.Error("the configuration cannot be used: what was before stays in force", "by", why, "reason", err.Error())
		return err
	}
	r.count.Done++
	r.count.Last = clock()
	g.log.Info("the configuration has been read again", "by", why, "file", g.cfg.File, "changed", strings.Join(changed, ", "))
	return nil
}

// end has no reload begin any more, and waits for one that has. It may be called again.
func (r *reloader) end() {
	r.follow.Close()
	r.follow = nil
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
}

// take takes over what is configured by now, and tells what has changed.
func (g *gateway) take(next config.Gateway, sources *config.Sources) (changed []string, err error) {
	if g.cfg.File != "" && next.File == "" {
		return nil, fmt.Errorf("%s is not there any more", g.cfg.File)
	}
	if sources.Empty() && !g.reloader.sources.Empty() { // as a file is that is about to be written
		return nil, fmt.Errorf("%s has no setting any more: nothing of it is applied; put back what was, or restart the gateway to have it run without", next.File)
	}
	changed, fixed := config.Changes(g.reloader.sources, sources)
	if (g.admin == nil) != (next.Admin == config.Off) {
		fixed = append(fixed, "admin (to or from off)")
	}
	if len(fixed) > 0 {
		return nil, fmt.Errorf("%s cannot change while the gateway runs: restart it, or put back what was; nothing of the file is applied", strings.Join(fixed, ", "))
	}
	next.UpstreamCA = g.cfg.UpstreamCA // the authorities of a file that is read once

	publish, err := g.proxy.Reconfigure(g.forwarding(next))
	if err != nil {
		return nil, err
	}
	data, admin := g.data, g.admin
	defer func() {
		if err != nil {
			closeOther(data, g.data)
			closeOther(admin, g.admin)
		}
	}()
	if next.Listen != g.cfg.Listen {
		if data, err = g.listenInstead(g.data, next.Listen); err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
	}
	if next.Admin != g.cfg.Admin {
		if admin, err = g.listenInstead(g.admin, next.Admin); err != nil {
			return nil, fmt.Errorf("admin: %w", err)
		}
	}
	if admin != g.admin {
		if admin, err = g.proxy.Watched(admin); err != nil {
			return nil, fmt.Errorf("admin: %w", err)
		}
	}
	// First what comes, then who uses it, then what goes: no request finds a service without its instances.
	pins := next.Pinned()
	g.registry.SetAddrs(addresses(next, data, admin))
	if err = g.registry.Pin(next.File, union(pins, g.cfg.Pinned())); err != nil {
		g.registry.SetAddrs(addresses(g.cfg, g.data, g.admin))
		return nil, fmt.Errorf("%s: %w", next.File, err)
	}
	publish()
	if err := g.registry.Pin(next.File, pins); err != nil { // all of them were judged just now
		g.log.Error("instances that the file holds no more stay", "reason", err.Error())
	}
	if data != g.data {
		g.warnOpen(next, data)
		g.serve("data", data, g.proxy.Serve)
		g.log.Info("no longer listening", "listener", "data", "addr", g.data.Addr().String())
		g.proxy.Leave(g.data)
	}
	if admin != g.admin {
		g.serve("admin", admin, g.serveAdmin)
		g.log.Info("no longer listening", "listener", "admin", "addr", g.admin.Addr().String())
		g.left.Store(g.admin, true)
		_ = g.admin.Close()
	}
	g.cfg, g.reloader.sources, g.data, g.admin = next, sources, data, admin
	return changed, nil
}

// listenInstead opens a listener that is to replace ln, or returns ln if addr is but another name of where that listens.
func (g *gateway) listenInstead(ln net.Listener, addr string) (net.Listener, error) {
	wanted, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, err
	}
	want := wanted.AddrPort()
	ip := want.Addr().Unmap()
	wide := !ip.IsValid() || ip.IsUnspecified() // all addresses, of IPv4 and IPv6, however that is written
	at := bound(ln)
	if want.Port() == at.Port() && (ip == at.Addr() || wide && at.Addr().IsUnspecified()) {
		return ln, nil
	}
	other, err := net.Listen("tcp", wanted.String())
	if !errors.Is(err, syscall.EADDRINUSE) {
		return other, err
	}
	for _, own := range []net.Listener{g.data, g.admin} {
		if own == nil {
			continue
		}
		if at := bound(own); at.Port() == want.Port() && (wide || at.Addr().IsUnspecified() || ip == at.Addr()) {
			return nil, fmt.Errorf("%s cannot be opened while the gateway itself listens on %s: restart it, or choose another port; nothing of the file is applied", addr, at)
		}
	}
	return nil, err
}

// closeOther closes a listener that was opened for nothing.
func closeOther(ln, instead net.Listener) {
	if ln != nil && ln != instead {
		_ = ln.Close()
	}
}

// union is what is pinned and, beside it, what was.
func union(now, before []registry.Pinned) []registry.Pinned {
	type name struct{ service, id string }
	known := make(map[name]bool, len(now))
	for _, p := range now {
		known[name{p.Service, p.Instance.ID}] = true
	}
	all := now[:len(now):len(now)]
	for _, p := range before {
		if !known[name{p.Service, p.Instance.ID}] {
			all = append(all, p)
		}
	}
	return all
}

// addresses is where instances may point.
func addresses(cfg config.Gateway, listeners ...net.Listener) registry.AddrPolicy {
	policy := registry.AddrPolicy{Allow: cfg.AddrAllow, Deny: cfg.AddrDeny, Own: []netip.AddrPort{}}
	for _, ln := range listeners {
		if ln != nil {
			policy.Own = append(policy.Own, bound(ln))
		}
	}
	return policy
}

// answerReload is POST /reload.
func (g *gateway) answerReload(ctx *fasthttp.RequestCtx) {
	if err := g.reload("POST /reload"); err != nil {
		registry.Problem(ctx, fasthttp.StatusUnprocessableEntity, "", err.Error())
		return
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
}

// followFile reloads whenever the file has changed. Where there is none, --config has named none: then the one that may come is
// followed.
func (g *gateway) followFile() {
	r := &g.reloader
	if r.load == nil {
		return
	}
	r.tried = r.sources.Seen()
	known := func() follow.Sum {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.tried
	}
	r.follow = follow.Settled(known, quiet, g.reloadFile, cmp.Or(g.cfg.File, config.DefaultFile))
}

// clock is the time for people.
func clock() int64 { return time.Now().UnixMilli() }

// reloads is for the metrics.
func (g *gateway) reloads() metrics.Reloads {
	g.reloader.mu.Lock()
	defer g.reloader.mu.Unlock()
	return g.reloader.count
}
