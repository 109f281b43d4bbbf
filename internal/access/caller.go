package access

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// all is a caller who has all rights.
type all string

func (a all) Name() string                    { return string(a) }
func (all) May(registry.Right, string) bool   { return true }
func (all) Still(registry.Right, string) bool { return true }
func (all) Networks() []netip.Prefix          { return nil }

// caller is one whose rights an entry of the tokens file says.
type caller struct {
	*grant        // with which it was let in
	kind   string // token or certificate
	now    func() *grant
}

func (c *caller) Name() string                                  { return c.kind + " " + c.name }
func (c *caller) May(right registry.Right, service string) bool { return c.may(right, service) }
func (c *caller) Networks() []netip.Prefix                      { return c.networks }

func (c *caller) Still(right registry.Right, service string) bool {
	g := c.now()
	return g != nil && g.may(right, service)
}

// notes is the log of what was refused. Its lines are limited too, so that nobody can fill a disk with them.
type notes struct {
	log   *slog.Logger
	lines limiter // all of one address

	mu   sync.Mutex
	more int // that were not logged since the last line
}

func (n *notes) skip() {
	n.mu.Lock()
	n.more++
	n.mu.Unlock()
}

// refused notes a call that was refused: by whom, if that is known, from where, why, and what it was about, if more is known of
// that. A query, which could be a secret, is not noted.
func (n *notes) refused(ctx *fasthttp.RequestCtx, by, why string, what ...slog.Attr) {
	attrs := []slog.Attr{slog.String("peer", ctx.RemoteAddr().String()), slog.String("call", clip(ctx.Method())+" "+clip(path(ctx))), slog.String("reason", why)}
	if by != "" {
		attrs = append([]slog.Attr{slog.String("by", by)}, attrs...)
	}
	n.write("API call refused", append(attrs, what...)...)
}

func (n *notes) write(message string, attrs ...slog.Attr) {
	if !n.lines.allow(netip.Addr{}, time.Now()) {
		n.skip()
		return
	}
	n.mu.Lock()
	more := n.more
	n.more = 0
	n.mu.Unlock()
	if more > 0 {
		attrs = append(attrs, slog.Int("more", more))
	}
	n.log.LogAttrs(context.Background(), slog.LevelWarn, message, attrs...)
}

// path is that of a request, without its query.
func path(ctx *fasthttp.RequestCtx) []byte {
	path, _, _ := bytes.Cut(ctx.RequestURI(), []byte("?"))
	return path
}

// clip keeps what a client has sent to a length that a log line can have.
func clip(text []byte) string {
	const most = 100
	if len(text) > most {
		return string(text[:most]) + "..."
	}
	return string(text)
}
