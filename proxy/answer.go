package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/valyala/fasthttp"

	"kerberos/registry"
)

// statusClientGone is logged for a request whose client left; nobody is there to read it.
const statusClientGone = 499

// maxNamed is how many services a 404 names.
const maxNamed = 50

// refuse sends an error of the gateway's own: status, why, Proxy-Status (RFC 9209).
func (c *conn) refuse(err *refusal, last bool) (keep bool) {
	return c.refuseWith(err, last, c.explain(err), 0)
}

// explain is the text of a refusal, with the limit that was passed if it is one.
func (c *conn) explain(err *refusal) string {
	if err == errBodyTooLarge {
		return err.text + " of " + bytesText(c.x.route.body)
	}
	return c.p.cfg().Limits.explain(err)
}

// refuseWith is refuse with another text, and Retry-After (in seconds) if that is more than 0. Nobody may keep the answer:
// the next one to the same request may be another.
func (c *conn) refuseWith(err *refusal, last bool, text string, retryAfter int) (keep bool) {
	c.p.noteRefusal(err)
	c.x.tally.reason = err.kind
	contentType, body := c.explanation(err.status, text)
	out := c.ownHead(err.status, contentType)
	out = append(out, "Cache-Control: no-store\r\nProxy-Status: kerberos; error="...)
	out = append(out, err.kind...)
	out = append(out, "\r\n"...)
	if err.status == 405 {
		out = append(out, c.p.cfg().allow...)
	}
	if retryAfter > 0 {
		out = append(out, "Retry-After: "...)
		out = strconv.AppendInt(out, int64(retryAfter), 10)
		out = append(out, "\r\n"...)
	}
	out = c.endOwnHead(out, len(body), last)
	if string(c.req.Method) != "HEAD" {
		out = append(out, body...)
	}
	c.out = out
	return c.flush() == nil && !last
}

// explanation is the body of a refusal: a problem (RFC 9457) for a client that would rather have JSON, one line of text for
// all others.
func (c *conn) explanation(status int, text string) (contentType string, body []byte) {
	phrase := fasthttp.StatusMessage(status)
	if c.req.prefersJSON() {
		body, _ = json.Marshal(struct {
			Type   string `json:"type"`
			Title  string `json:"title"`
			Status int    `json:"status"`
			Detail string `json:"detail"`
		}{"about:blank", phrase, status, text}) // strings and a number: it cannot fail
		return "application/problem+json", append(body, '\n')
	}
	return plainText, fmt.Appendf(nil, "%d %s: %s\n", status, phrase, text)
}

// plain sends a short text of the gateway's own that is no error.
func (c *conn) plain(status int, text string) (keep bool) {
	last := !c.passBody()
	out := c.ownHead(status, plainText)
	if string(c.req.Method) == "OPTIONS" {
		out = append(out, c.p.cfg().allow...)
	}
	out = c.endOwnHead(out, len(text), last)
	if string(c.req.Method) != "HEAD" {
		out = append(out, text...)
	}
	c.out = out
	return c.flush() == nil && !last
}

// allowField names the methods that are not refused.
func allowField(more []string) []byte {
	methods := append([]string{"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}, more...)
	slices.Sort(methods)
	return []byte("Allow: " + strings.Join(slices.Compact(methods), ", ") + "\r\n")
}

const plainText = "text/plain; charset=utf-8"

// ownHead begins a response of the gateway's own.
func (c *conn) ownHead(status int, contentType string) []byte {
	c.x.status, c.x.tally.by = status, byGateway
	return c.x.appendID(c.p.appendOwnHead(c.out[:0], status, contentType))
}

func (p *Proxy) appendOwnHead(dst []byte, status int, contentType string) []byte {
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(status), 10)
	dst = append(dst, ' ')
	dst = append(dst, fasthttp.StatusMessage(status)...)
	dst = append(dst, "\r\nContent-Type: "...)
	dst = append(dst, contentType...)
	dst = append(dst, "\r\n"...)
	return p.appendDate(dst)
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
	out = append(out, "\r\n"...)
	c.x.tally.head = c.x.tally.sent + int64(len(out))
	return out
}

// passBody passes over a body that nobody reads, and reports whether the connection goes on behind an answer of the
// gateway's own. A body that is not all here ends it; so does a CONNECT, whose client may have sent on what is meant for its
// tunnel.
func (c *conn) passBody() bool {
	r, x := &c.req, &c.x
	if is(r.Method, "connect") {
		x.unread = true
		return false
	}
	if !x.bodyRead {
		if r.chunked || x.begun || int64(len(c.in.waiting())) < r.length {
			x.unread = true
			return false
		}
		c.in.r += int(r.length)
		x.tally.received += r.length
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
	case x.started, x.noteGone(err):
		return false
	case errors.Is(err, errStale):
		own = errTerminated
	case errors.As(err, &own):
	default:
		own = errBadStatus
	}
	if isFull(own) {
		x.service.queueRefused.Add(1)
	}
	return c.refuseWith(own, !c.passBody(), c.explain(own), x.retryAfter(own))
}

// retryAfter is when a request that is refused may be sent again, in seconds; 0 if nobody knows.
func (x *exchange) retryAfter(own *refusal) int {
	switch {
	case own == errNoInstance:
		return x.service.view.Load().retryAfter(time.Now())
	case own == errNoSocket, isFull(own):
		return 1
	}
	return 0
}

// noteGone reports whether an error is that the client has left, or takes nothing, and notes it for the log.
func (x *exchange) noteGone(err error) bool {
	slow := errors.Is(err, errClientSlow)
	if !slow && !errors.Is(err, errClientGone) {
		return false
	}
	if slow {
		x.c.reset() // what waits for it in the socket would wait there for minutes
	}
	x.status, x.tally.by, x.tally.reason = statusClientGone, byNobody, kindOf(err)
	return true
}

// deliver sends what is left of an answer of which nothing more comes, and reports whether the client has taken it.
func (x *exchange) deliver() bool {
	err := x.c.flush()
	x.noteGone(err)
	return err == nil
}

// noRoute answers a request that has no service.
func (c *conn) noRoute(err *refusal) (keep bool) {
	text := err.text
	if err == errNoRoute && c.p.cfg().MayRead != nil && c.p.cfg().MayRead(c.apiContext(nil)) {
		text = c.p.routes(text)
	}
	return c.refuseWith(err, !c.passBody(), text, 0)
}

// routes adds to a text which services there are.
func (p *Proxy) routes(text string) string {
	names := p.cfg().Registry.Names()
	if len(names) == 0 {
		return text + "; none is registered"
	}
	more := ""
	if len(names) > maxNamed {
		names, more = names[:maxNamed], ", ..."
	}
	routes := p.cfg().Routes
	if len(routes) == 0 {
		return text + "; known: /" + strings.Join(names, ", /") + more
	}
	if more = ""; len(routes) > maxNamed {
		routes, more = routes[:maxNamed], ", ..."
	}
	known := make([]string, len(routes))
	for i := range routes {
		known[i] = routes[i].String()
	}
	return text + "; known: " + strings.Join(known, ", ") + more
}

// isLocal says that a request is not for a backend: methods that are not forwarded, expectations, upgrades, loops, the
// gateway's own paths.
func (c *conn) isLocal() bool {
	r, p := &c.req, c.p
	return c.denied() != nil || len(r.Path) == 1 && r.Path[0] == '*' || r.maxForwards == 0 || p.owns(r.Path)
}

// denied is why a request goes to no backend, whatever its path is.
func (c *conn) denied() *refusal {
	switch r := &c.req; {
	case r.badExpect:
		return errExpect
	case c.refusesWebSocket():
		return errUpgrade
	case r.looped:
		return errLoop
	}
	return c.p.restricted(&c.req)
}

// restricted is what stands against a CONNECT or TRACE, which Config.AllowMethods must name, as the grammar has them: a
// backend may be lenient in their case.
func (p *Proxy) restricted(r *Request) *refusal {
	connect := is(r.Method, "connect")
	switch {
	case !connect && !is(r.Method, "trace"):
		return nil
	case !slices.Contains(p.cfg().AllowMethods, unsafe.String(unsafe.SliceData(r.Method), len(r.Method))):
		return errMethod
	case r.chunked || r.length > 0:
		return errMethodBody
	case connect && !r.authority:
		return errMethodTarget
	case r.maxForwards == 0:
		return errTrace // RFC 9110 section 7.6.2: not sent on
	}
	return nil
}

// owns says whether the gateway itself answers at a path.
func (p *Proxy) owns(path []byte) bool {
	return p.isHealth(path) || p.cfg().API != nil && registry.Serves(unsafe.String(unsafe.SliceData(path), len(path)))
}

func (p *Proxy) isHealth(path []byte) bool {
	return p.cfg().HealthPath != "" && string(path) == p.cfg().HealthPath
}

// own is what of the gateway itself answers a request.
type own uint8

const (
	ownOptions own = iota // an empty 200
	ownHealth
	ownAPI
)

// local answers such a request.
func (c *conn) local() (keep bool) {
	switch who, err := c.own(); {
	case err != nil:
		return c.refuse(err, !c.passBody())
	case who == ownOptions:
		return c.plain(200, "")
	case who == ownAPI:
		return c.api()
	case c.p.cfg().Ready():
		return c.plain(200, "ready\n")
	}
	return c.plain(503, "shutting down\n")
}

// own says who answers such a request, or with which error it is refused.
func (c *conn) own() (own, *refusal) {
	r, p := &c.req, c.p
	if err := c.denied(); err != nil {
		return 0, err
	}
	if len(r.Path) == 1 && r.Path[0] == '*' || r.maxForwards == 0 {
		return ownOptions, nil
	}
	if r.unclear && p.cfg().AmbiguousPaths != PassPaths {
		if _, err := p.reading(p.cfg(), r); err != nil {
			return 0, err
		}
	}
	if p.isHealth(r.Path) {
		return ownHealth, nil
	}
	return ownAPI, nil
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
		c.p.cfg().API(ctx)
	} else {
		registry.ErrorHandler(ctx, fasthttp.ErrBodyTooLarge)
	}
	if stream := registry.Stream(ctx); stream != nil {
		x.started, x.status = true, ctx.Response.StatusCode()
		x.giveBack()
		c.read.disarm()
		c.write.disarm()
		stream(c.nc)
		return false
	}
	keep = c.passBody()
	if !keep {
		ctx.Response.SetConnectionClose()
	} else if c.req.minor == 0 {
		ctx.Response.Header.Set("Connection", "keep-alive")
	}
	if x.id != nil {
		ctx.Response.Header.SetBytesV("X-Request-Id", x.id)
	}
	ctx.Response.SkipBody = ctx.IsHead()
	x.status = ctx.Response.StatusCode()
	out := bytes.NewBuffer(c.out[:0])
	w := bufio.NewWriter(out)
	if ctx.Response.Write(w) != nil || w.Flush() != nil {
		return false
	}
	c.out = out.Bytes()
	if end := bytes.Index(c.out, headEnd); end >= 0 {
		x.tally.head = x.tally.sent + int64(end+len(headEnd))
	}
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
