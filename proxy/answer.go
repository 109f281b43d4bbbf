package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// maxNamed is how many services a 404 names.
const maxNamed = 50

// refuse sends an error of the gateway's own: status, one line that says why, Proxy-Status (RFC 9209).
func (c *conn) refuse(err *refusal, last bool) (keep bool) {
	return c.refuseWith(err, last, err.text, 0)
}

// refuseWith is refuse with another text, and Retry-After (in seconds) if that is more than 0.
func (c *conn) refuseWith(err *refusal, last bool, text string, retryAfter int) (keep bool) {
	out := c.ownHead(err.status)
	out = append(out, "Proxy-Status: kerberos; error="...)
	out = append(out, err.kind...)
	out = append(out, "\r\n"...)
	if err.status == 405 {
		out = append(out, allowField...)
	}
	if retryAfter > 0 {
		out = append(out, "Retry-After: "...)
		out = strconv.AppendInt(out, int64(retryAfter), 10)
		out = append(out, "\r\n"...)
	}
	phrase := fasthttp.StatusMessage(err.status)
	out = c.endOwnHead(out, len("503 ")+len(phrase)+len(": ")+len(text)+len("\n"), last)
	if string(c.req.Method) != "HEAD" {
		out = strconv.AppendInt(out, int64(err.status), 10)
		out = append(out, ' ')
		out = append(out, phrase...)
		out = append(out, ": "...)
		out = append(out, text...)
		out = append(out, '\n')
	}
	c.out = out
	return c.flush() == nil && !last
}

// plain sends a short text of the gateway's own that is no error.
func (c *conn) plain(status int, text string) (keep bool) {
	last := !c.persistent()
	out := c.ownHead(status)
	if string(c.req.Method) == "OPTIONS" {
		out = append(out, allowField...)
	}
	out = c.endOwnHead(out, len(text), last)
	if string(c.req.Method) != "HEAD" {
		out = append(out, text...)
	}
	c.out = out
	return c.flush() == nil && !last
}

// allowField names the methods that are not answered here.
const allowField = "Allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n"

// ownHead begins a response of the gateway's own.
func (c *conn) ownHead(status int) []byte {
	c.x.status = status
	out := append(c.out[:0], "HTTP/1.1 "...)
	out = strconv.AppendInt(out, int64(status), 10)
	out = append(out, ' ')
	out = append(out, fasthttp.StatusMessage(status)...)
	out = append(out, "\r\nContent-Type: text/plain; charset=utf-8\r\n"...)
	return c.p.appendDate(out)
}

// endOwnHead ends the head of a response of the gateway's own.
func (c *conn) endOwnHead(out []byte, length int, last bool) []byte {
	out = append(out, "Content-Length: "...)
	out = strconv.AppendInt(out, int64(length), 10)
	out = append(out, "\r\n"...)
	switch {
	case last:
		out = append(out, "Connection: close\r\n"...)
	case c.req.minor == 0:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	return append(out, "\r\n"...)
}

// persistent reports whether the connection goes on after an answer that is not a backend's. A body that was not read
// ends it, unless all of it is here.
func (c *conn) persistent() bool {
	r, x := &c.req, &c.x
	if !x.bodyRead {
		if r.chunked || int64(len(c.in.waiting())) < r.length {
			x.unread = true
			return false
		}
		c.in.r += int(r.length)
		x.bodyRead = true
	}
	return (r.minor == 1 || r.keepAlive) && !r.close && !c.p.closing.Load()
}

// fail answers a request that no instance answered.
func (c *conn) fail(err error) (keep bool) {
	x := &c.x
	defer x.giveBack()
	var own *refusal
	switch {
	case x.started:
		return false
	case errors.Is(err, errClientGone):
		x.status = 499 // for the log: nobody is there to read it
		return false
	case errors.Is(err, errStale):
		own = errTerminated
	case errors.As(err, &own):
	default:
		own = errBadStatus
	}
	if own == errNoInstance {
		return c.refuseWith(own, !c.persistent(), own.text, x.service.view.Load().retryAfter(time.Now()))
	}
	return c.refuse(own, !c.persistent())
}

// noRoute answers a request that has no service.
func (c *conn) noRoute(err *refusal) (keep bool) {
	text := err.text
	if err == errNoRoute && c.p.cfg.MayRead != nil && c.p.cfg.MayRead(c.apiContext(nil)) {
		text = c.p.routes(text)
	}
	return c.refuseWith(err, !c.persistent(), text, 0)
}

// routes adds to a text which services there are.
func (p *Proxy) routes(text string) string {
	names := p.cfg.Registry.Names()
	if len(names) == 0 {
		return text + "; none is registered"
	}
	more := ""
	if len(names) > maxNamed {
		names, more = names[:maxNamed], ", ..."
	}
	if len(p.cfg.Routes) == 0 {
		return text + "; known: /" + strings.Join(names, ", /") + more
	}
	prefixes := make([]string, len(p.cfg.Routes))
	for i, r := range p.cfg.Routes {
		prefixes[i] = r.Prefix
	}
	return text + "; known: " + strings.Join(prefixes, ", ")
}

// isLocal says that a request is not for a backend: methods that are not forwarded, expectations, upgrades, loops, the
// gateway's own paths.
func (c *conn) isLocal() bool {
	r, p := &c.req, c.p
	return is(r.Method, "connect") || is(r.Method, "trace") || // in any case: a backend may be lenient
		r.badExpect || c.refusesWebSocket() || r.looped ||
		len(r.Path) == 1 && r.Path[0] == '*' || r.maxForwards == 0 || c.isHealthCheck() ||
		p.cfg.API != nil && registry.Serves(unsafe.String(unsafe.SliceData(r.Path), len(r.Path)))
}

func (c *conn) isHealthCheck() bool {
	return c.p.cfg.HealthPath != "" && string(c.req.Path) == c.p.cfg.HealthPath
}

// local answers such a request.
func (c *conn) local() (keep bool) {
	r, p := &c.req, c.p
	switch {
	case is(r.Method, "connect"), is(r.Method, "trace"):
		return c.refuse(errMethod, !c.persistent())
	case r.badExpect:
		return c.refuse(errExpect, !c.persistent())
	case c.refusesWebSocket():
		return c.refuse(errUpgrade, !c.persistent())
	case r.looped:
		return c.refuse(errLoop, !c.persistent())
	case len(r.Path) == 1 && r.Path[0] == '*', r.maxForwards == 0:
		return c.plain(200, "")
	case !c.isHealthCheck():
		return c.api()
	case p.cfg.Ready():
		return c.plain(200, "ready\n")
	}
	return c.plain(503, "shutting down\n")
}

// apiContext is the request as fasthttp's handlers read it.
func (c *conn) apiContext(body []byte) *fasthttp.RequestCtx {
	ctx := &fasthttp.RequestCtx{}
	ctx.Init2(c.nc, nil, true)
	r := bufio.NewReaderSize(bytes.NewReader(c.head), len(c.head))
	if err := ctx.Request.Header.Read(r); err != nil {
		// Our parser has taken it, so this is one that fasthttp refuses besides; without fields nobody is let in.
		ctx.Request.Header.Reset()
		ctx.Request.Header.SetProtocol("HTTP/1.0")
	}
	ctx.Request.SetBody(body)
	return ctx
}

// api has the registration API answer.
func (c *conn) api() (keep bool) {
	x := &c.x
	defer x.giveBack()
	err := x.hold(true)
	var own *refusal
	switch {
	case errors.As(err, &own):
		return c.refuse(own, true)
	case err != nil:
		return false
	}
	ctx := c.apiContext(x.held)
	if x.complete {
		c.p.cfg.API(ctx)
	} else {
		registry.ErrorHandler(ctx, fasthttp.ErrBodyTooLarge)
	}
	keep = c.persistent()
	if !keep {
		ctx.Response.SetConnectionClose()
	} else if c.req.minor == 0 {
		ctx.Response.Header.Set("Connection", "keep-alive")
	}
	ctx.Response.SkipBody = ctx.IsHead()
	x.status = ctx.Response.StatusCode()
	out := bytes.NewBuffer(c.out[:0])
	w := bufio.NewWriter(out)
	if ctx.Response.Write(w) != nil || w.Flush() != nil {
		return false
	}
	c.out = out.Bytes()
	return c.flush() == nil && keep
}

// dateLine is a Date field for one second.
type dateLine struct {
	second int64
	line   []byte
}

// appendDate appends a Date field, RFC 9110 section 6.6.1.
func (p *Proxy) appendDate(dst []byte) []byte {
	now := time.Now()
	d := p.date.Load()
	if d == nil || d.second != now.Unix() {
		d = &dateLine{now.Unix(), now.UTC().AppendFormat([]byte("Date: "), "Mon, 02 Jan 2006 15:04:05 GMT\r\n")}
		p.date.Store(d)
	}
	return append(dst, d.line...)
}

// logCut notes a response that broke off behind its head: the client saw a part of it.
func (p *Proxy) logCut(x *exchange, err error) {
	p.log.LogAttrs(context.Background(), slog.LevelWarn, "response cut", slog.String("service", x.service.name),
		slog.String("instance", x.upstream.id), slog.String("path", string(x.c.req.Path)),
		slog.String("reason", err.Error()))
}
