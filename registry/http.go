package registry

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/fasthttp/router"
	"github.com/valyala/fasthttp"
)

// MaxBody is the largest body of an API request, in bytes; a larger one is answered 413.
const MaxBody = 64 << 10

// Describer adds to the API's answers what only the data path knows. It is asked for registered services and instances,
// which may leave while it is asked.
type Describer interface {
	DescribeService(service string) ServiceStatus
	DescribeInstance(service, id string) InstanceStatus
}

// ServiceStatus is a service as requests see it.
type ServiceStatus struct {
	Strategy string `json:"strategy"` // the one configured
	InForce  string `json:"in_force"` // the one used, which is another if weights are missing
	Why      string `json:"why"`      // why it is another, else empty
}

// InstanceStatus is an instance as requests see it.
type InstanceStatus struct {
	Ready     bool          `json:"ready"`
	Reason    string        `json:"reason"` // why it is not ready, else empty
	Breaker   BreakerStatus `json:"breaker"`
	Health    *HealthStatus `json:"health"`    // nil: it is not checked
	Check     *Check        `json:"-"`         // in force, be it one that it registers or not; nil with Health
	InFlight  int64         `json:"in_flight"` // requests now
	Tunnels   int64         `json:"tunnels"`   // open now: upgraded connections, which are no requests in flight any more
	Success   uint64        `json:"success"`   // requests that ended, since the instance came
	Failure   uint64        `json:"failure"`
	Ignored   uint64        `json:"ignored"`
	LastError string        `json:"last_error"`
}

// BreakerStatus is the state of an instance's breaker.
type BreakerStatus struct {
	State string     `json:"state"` // closed, open, half-open
	Since time.Time  `json:"since"` // when it came to that state
	Until *time.Time `json:"until"` // when an open one will let probes through, else nil
}

// HealthStatus is what an instance's checks say.
type HealthStatus struct {
	State     string     `json:"state"`      // up, down, or unknown before the first
	Since     time.Time  `json:"since"`      // when it came to that state
	LastError string     `json:"last_error"` // why the latest check failed; empty if it passed
	CheckedAt *time.Time `json:"checked_at"` // when that ended; nil if there was none yet
}

// NewHandler returns the registration API:
//
//	POST   /register                           {"service", "id", "addr", "weight", "ttl", "metadata", "check", "slow_start"}   204
//	POST   /register?hold                      {"service", "id", "addr", "weight", "ttl", "metadata", "check", "slow_start"}   200
//	DELETE /register                           {"service", "id", "addr", "drain"}           204, 200, 404, 409
//	GET    /services                                                                        200
//	GET    /services/{service}                                                              200, 404
//	GET    /services/{service}/{id}                                                         200, 404
//	PUT    /services/{service}/{id}            {"addr", "weight", "ttl", "metadata", "check", "slow_start"}                    204
//	PATCH  /services/{service}/{id}            {"weight", "state", "metadata"}                          204, 404
//	DELETE /services/{service}/{id}?addr=&drain=                                            204, 200, 404, 409
//	POST   /services/{service}/{id}/heartbeat?addr=                                         204, 404, 409
//
// What the configuration holds (Pin) is not changed here: 409.
//
// Every refusal is problem+json (see Problem), and nothing has changed then, unless a 503 says that it is in force and not on
// disk. An instance registered by a peer that is not loopback is marked so for AddrPolicy. Who may call is decided before this
// handler (internal/access), which says who it is by SetCaller; what that Caller has no right to is answered 403. Each change is
// logged. d may be nil: what it would say keeps its zero values.
func NewHandler(reg *Registry, d Describer) fasthttp.RequestHandler {
	a := &api{reg: reg, d: d}
	if d == nil {
		a.d = noDescriber{}
	}
	r := router.New()
	r.RedirectTrailingSlash = false
	r.RedirectFixedPath = false
	r.NotFound = func(ctx *fasthttp.RequestCtx) {
		Problem(ctx, fasthttp.StatusNotFound, "", "the API answers at /register, /services, /services/{service}, /services/{service}/{id} and /services/{service}/{id}/heartbeat")
	}
	r.MethodNotAllowed = func(ctx *fasthttp.RequestCtx) { // the router has set Allow
		Problem(ctx, fasthttp.StatusMethodNotAllowed, "", fmt.Sprintf("%s is not allowed here; allowed: %s",
			clip(string(ctx.Method())), ctx.Response.Header.Peek(fasthttp.HeaderAllow)))
	}
	r.GlobalOPTIONS = func(ctx *fasthttp.RequestCtx) { ctx.SetStatusCode(fasthttp.StatusNoContent) } // likewise

	r.POST("/register", answer(a.register, "hold"))
	r.DELETE("/register", answer(a.unregister))
	for path, get := range map[string]func(*fasthttp.RequestCtx) error{
		"/services":                a.getServices,
		"/services/{service}":      a.getService,
		"/services/{service}/{id}": a.getInstance,
	} {
		r.GET(path, answer(get))
		r.HEAD(path, answer(get))
	}
	r.PUT("/services/{service}/{id}", answer(a.putInstance))
	r.PATCH("/services/{service}/{id}", answer(a.patchInstance))
	r.DELETE("/services/{service}/{id}", answer(a.deleteInstance, "addr", "drain"))
	r.POST("/services/{service}/{id}/heartbeat", answer(a.heartbeat, "addr"))

	return func(ctx *fasthttp.RequestCtx) {
		if !plainTarget(ctx) {
			Problem(ctx, fasthttp.StatusBadRequest, "", "the request-target must be a path that begins with one slash")
			return
		}
		r.Handler(ctx)
	}
}

// Serves tells whether a path is the API's.
func Serves(path string) bool {
	return path == "/register" || path == "/services" || strings.HasPrefix(path, "/services/")
}

// ServedNames are the services that the API would stand in the way of, where it answers beside them: Config.Reserved.
func ServedNames() []string { return []string{"register", "services"} }

// plainTarget tells whether the path that the router is about to read is the one that was sent. They differ where
// fasthttp takes a target like //host/x?:// for an absolute one, which whoever let the request in did not.
func plainTarget(ctx *fasthttp.RequestCtx) bool {
	target := ctx.RequestURI()
	if target[0] != '/' {
		return true // absolute form, or the * of OPTIONS
	}
	path, _, _ := bytes.Cut(target, []byte("?"))
	return bytes.Equal(path, ctx.URI().PathOriginal())
}

// api answers the calls. Each either answers and returns nil, or returns why not and has changed nothing.
type api struct {
	reg *Registry
	d   Describer
}

// POST /register
func (a *api) register(ctx *fasthttp.RequestCtx) error {
	m, err := readMembers(ctx, "service", "id", "addr", "weight", "ttl", "metadata", "check", "slow_start")
	if err != nil {
		return err
	}
	return a.put(ctx, m)
}

// PUT /services/{service}/{id}
func (a *api) putInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := pathNames(ctx)
	if err != nil {
		return err
	}
	m, err := readMembers(ctx, "addr", "weight", "ttl", "metadata", "check", "slow_start")
	if err != nil {
		return err
	}
	m.service, m.id = service, id
	return a.put(ctx, m)
}

func (a *api) put(ctx *fasthttp.RequestCtx, m members) error {
	if err := validNames(m.service, m.id); err != nil {
		return err
	}
	if err := permit(ctx, RightRegister, m.service); err != nil {
		return err
	}
	caller := callerOf(ctx)
	in := Instance{ID: m.id, Addr: m.addr, Weight: m.weight, TTL: m.ttl, Metadata: texts(m.metadata), Check: m.check, SlowStart: m.slowStart,
		remote: !ctx.RemoteIP().IsLoopback(), networks: caller.Networks()}
	if ctx.QueryArgs().Has("hold") {
		if value := ctx.QueryArgs().Peek("hold"); len(value) > 0 {
			return &refusal{fasthttp.StatusBadRequest, "hold", "hold has no value"}
		}
		held, err := a.reg.Hold(m.service, in)
		if err == errHolds {
			return &refusal{fasthttp.StatusServiceUnavailable, "", err.Error()}
		}
		a.auditChange(ctx, "register", m.service, held.before, held.now)
		if err != nil {
			return err
		}
		held.may = func() bool { return caller.Still(RightRegister, m.service) }
		ctx.SetUserValue(streamKey{}, held.serve)
		return nil
	}
	now, before, err := a.reg.register(m.service, in, nil)
	a.auditChange(ctx, "register", m.service, before, now)
	if err != nil {
		return err
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

type streamKey struct{}

// Stream is what goes on with a connection when the handler has returned, instead of a response: it writes the whole of one, and
// returns when the connection is to be closed. Usually there is none.
func Stream(ctx *fasthttp.RequestCtx) func(net.Conn) {
	stream, _ := ctx.UserValue(streamKey{}).(func(net.Conn))
	return stream
}

// DELETE /register
func (a *api) unregister(ctx *fasthttp.RequestCtx) error {
	m, err := readMembers(ctx, "service", "id", "addr", "drain")
	if err != nil {
		return err
	}
	if m.addr == "" && m.seen.has("addr") {
		return errNoAddr
	}
	return a.drop(ctx, m.service, m.id, m.addr, m.drain)
}

// DELETE /services/{service}/{id}
func (a *api) deleteInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := bareNames(ctx)
	if err != nil {
		return err
	}
	addr, err := queryAddr(ctx)
	if err != nil {
		return err
	}
	var drain time.Duration
	if text := ctx.QueryArgs().Peek("drain"); text != nil {
		if drain, err = parseDrain(string(text)); err != nil {
			return err
		}
	}
	return a.drop(ctx, service, id, addr, drain)
}

// queryAddr is the addr that a call is about, empty if it does not say.
func queryAddr(ctx *fasthttp.RequestCtx) (string, error) {
	addr := string(ctx.QueryArgs().Peek("addr"))
	if addr == "" && ctx.QueryArgs().Has("addr") {
		return "", errNoAddr
	}
	return addr, nil
}

var errNoAddr = &FieldError{"addr", "is empty: say which, or leave it out for whichever it is"}

// parseDrain reads how long an unregistration may wait.
func parseDrain(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > MaxDrain {
		return 0, &FieldError{"drain", "must be a time from 0s to 1h, such as 30s, not " + clip(text)}
	}
	return d, nil
}

// drainedJSON is what is said at the end of a drain.
type drainedJSON struct {
	Cut    int    `json:"cut"` // requests and tunnels that were not at their end
	Waited string `json:"waited"`
}

// drop unregisters an instance; with a drain it answers when that is over.
func (a *api) drop(ctx *fasthttp.RequestCtx, service, id, addr string, limit time.Duration) error {
	if err := validNames(service, id); err != nil {
		return err
	}
	if err := permit(ctx, RightRegister, service); err != nil {
		return err
	}
	var err error
	var drained drainedJSON
	if limit > 0 {
		drained, err = a.drain(ctx, service, id, addr, limit)
	} else {
		var gone *Instance
		if gone, err = a.reg.unregister(service, id, addr); gone != nil {
			a.audit(ctx, "unregister", service, id, slog.String("addr", gone.Addr))
		}
	}
	switch {
	case errors.Is(err, ErrNotFound):
		return notFound(a.reg.Snapshot(service), service, id)
	case errors.Is(err, ErrConflict):
		return conflict(service, id)
	case errors.Is(err, ErrClosed) && limit > 0:
		return &refusal{fasthttp.StatusServiceUnavailable, "", "the gateway stops: how much is under way at the instance is not known"}
	case err != nil:
		return err
	case limit > 0:
		writeJSON(ctx, drained)
		return nil
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

// drain waits for the end of a drain, which it begins unless there is one. One that is under way it may only make shorter.
func (a *api) drain(ctx *fasthttp.RequestCtx, service, id, addr string, limit time.Duration) (drainedJSON, error) {
	d, changed, err := a.reg.drain(service, id, addr, limit)
	if err != nil {
		return drainedJSON{}, err
	}
	if changed != nil {
		a.audit(ctx, "drain", service, id, slog.String("addr", changed.Addr), slog.String("limit", limit.String()))
	}
	cut, waited, err := a.reg.await(service, id, d)
	return drainedJSON{cut, waited.Round(time.Millisecond).String()}, err
}

func conflict(service, id string) error {
	return &refusal{fasthttp.StatusConflict, "addr", fmt.Sprintf("instance %s of service %s is registered with another addr by now; nothing has changed", clip(id), clip(service))}
}

// PATCH /services/{service}/{id}
func (a *api) patchInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := pathNames(ctx)
	if err != nil {
		return err
	}
	m, err := readMembers(ctx, "weight?", "state?", "metadata?")
	if err != nil {
		return err
	}
	if err := permit(ctx, RightRegister, service); err != nil {
		return err
	}
	p := Patch{SetWeight: m.seen.has("weight"), SetState: m.seen.has("state"), SetMetadata: m.seen.has("metadata") && (m.null.has("metadata") || len(m.metadata) > 0),
		State: State(m.state), Pairs: m.metadata}
	if !m.null.has("weight") {
		p.Weight = &m.weight
	}
	if p.SetState && !m.null.has("state") && m.state == "" {
		return &FieldError{"state", stateRule}
	}
	before, now, err := a.reg.patch(service, id, p)
	a.auditChange(ctx, "patch", service, before, now)
	if errors.Is(err, ErrNotFound) {
		return notFound(a.reg.Snapshot(service), service, id)
	} else if err != nil {
		return err
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

// POST /services/{service}/{id}/heartbeat
func (a *api) heartbeat(ctx *fasthttp.RequestCtx) error {
	service, id, err := bareNames(ctx)
	if err != nil {
		return err
	}
	addr, err := queryAddr(ctx)
	if err != nil {
		return err
	}
	if err := permit(ctx, RightRegister, service); err != nil {
		return err
	}
	switch err := a.reg.Renew(service, id, addr); {
	case errors.Is(err, ErrNotFound):
		return &refusal{fasthttp.StatusNotFound, "id", fmt.Sprintf("service %s has no instance %s (any more): register again", clip(service), clip(id))}
	case errors.Is(err, ErrConflict):
		return conflict(service, id)
	case err != nil:
		return err
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

// GET /services
func (a *api) getServices(ctx *fasthttp.RequestCtx) error {
	if err := noBody(ctx); err != nil {
		return err
	}
	caller := callerOf(ctx)
	list := servicesJSON{Services: []serviceJSON{}}
	for _, name := range a.reg.Names() {
		if !caller.May(RightRead, name) {
			continue
		}
		if s := a.reg.Snapshot(name); s != nil { // nil: it left since
			list.Services = append(list.Services, a.service(s))
		}
	}
	for _, e := range a.reg.Expired() {
		if caller.May(RightRead, e.Service) {
			list.Expired = append(list.Expired, expiredJSON{e.Service, e.ID, e.Addr, seconds(e.At)})
		}
	}
	writeJSON(ctx, list)
	return nil
}

// GET /services/{service}
func (a *api) getService(ctx *fasthttp.RequestCtx) error {
	service, err := pathName(ctx, "service")
	if err != nil {
		return err
	}
	if err := noBody(ctx); err != nil {
		return err
	}
	if err := permit(ctx, RightRead, service); err != nil {
		return err
	}
	s := a.reg.Snapshot(service)
	if s == nil {
		return notFound(s, service, "")
	}
	writeJSON(ctx, a.service(s))
	return nil
}

// GET /services/{service}/{id}
func (a *api) getInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := bareNames(ctx)
	if err != nil {
		return err
	}
	if err := permit(ctx, RightRead, service); err != nil {
		return err
	}
	s := a.reg.Snapshot(service)
	in := s.Instance(id)
	if in == nil {
		return notFound(s, service, id)
	}
	writeJSON(ctx, a.instance(service, in))
	return nil
}

// What GET answers. Members are only ever added; a script may rely on the names and on their order staying.
type servicesJSON struct {
	Services []serviceJSON `json:"services"`
	Expired  []expiredJSON `json:"expired,omitempty"`
}

type expiredJSON struct {
	Service   string    `json:"service"`
	ID        string    `json:"id"`
	Addr      string    `json:"addr"`
	ExpiredAt time.Time `json:"expired_at"`
}

type serviceJSON struct {
	Name string `json:"name"`
	ServiceStatus
	Instances []instanceJSON `json:"instances"`
}

type instanceJSON struct {
	ID     string `json:"id"`
	Addr   string `json:"addr"`
	Weight int    `json:"weight"`
	InstanceStatus
	RegisteredAt time.Time         `json:"registered_at"`
	Lease        *leaseJSON        `json:"lease"`      // null: it has none
	State        State             `json:"state"`      // the one in force,
	Override     *Override         `json:"override"`   // and what an operator has set; null: nothing
	Metadata     map[string]string `json:"metadata"`   // in force
	Generation   uint64            `json:"generation"` // of the registration
	Check        *Check            `json:"check"`      // in force; null: none
	SlowStart    string            `json:"slow_start"` // 0s: none

	PinnedBy string `json:"pinned_by,omitempty"` // the file that holds it; empty: none
}

type leaseJSON struct {
	TTL       string `json:"ttl"`
	ExpiresIn string `json:"expires_in"` // unless it is renewed; empty while a connection holds it
	Held      bool   `json:"held"`
	Stale     bool   `json:"stale"` // it has ended, with those of too many others to be believed
}

func (a *api) service(s *Snapshot) serviceJSON {
	out := serviceJSON{s.service, a.d.DescribeService(s.service), make([]instanceJSON, s.n)}
	for i, in := range s.Instances() {
		out.Instances[i] = a.instance(s.service, in)
	}
	return out
}

func (a *api) instance(service string, in *Instance) instanceJSON {
	st := a.d.DescribeInstance(service, in.ID)
	st.Breaker.Since = seconds(st.Breaker.Since)
	if st.Breaker.Until != nil {
		until := seconds(*st.Breaker.Until)
		st.Breaker.Until = &until
	}
	if h := st.Health; h != nil {
		h.Since = seconds(h.Since)
		if h.CheckedAt != nil {
			at := seconds(*h.CheckedAt)
			h.CheckedAt = &at
		}
	}
	out := instanceJSON{in.ID, in.Addr, in.Weight, st, seconds(in.RegisteredAt), nil, in.State(), nil, in.Metadata, in.Generation, cmp.Or(st.Check, in.Check), in.SlowStart.String(), in.pinned}
	if out.Metadata == nil {
		out.Metadata = map[string]string{}
	}
	if !in.Override.none() {
		out.Override = &in.Override
	}
	if left, ok := a.reg.ExpiresIn(in); ok {
		out.Lease = &leaseJSON{in.TTL.String(), left.Truncate(time.Millisecond).String(), false, in.stale}
	} else if in.hold != nil {
		out.Lease = &leaseJSON{cmp.Or(in.TTL, heldTTL).String(), "", true, false}
	}
	return out
}

// seconds makes a time that JSON shows as RFC 3339 in UTC without a fraction.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

type noDescriber struct{}

func (noDescriber) DescribeService(string) ServiceStatus           { return ServiceStatus{} }
func (noDescriber) DescribeInstance(string, string) InstanceStatus { return InstanceStatus{} }

// refusal is an error with the status it is answered with.
type refusal struct {
	status        int
	field, detail string
}

func (e *refusal) Error() string { return e.detail }

// answer makes a handler of a call: its query has no other parameters than these, each once unless its name has a * behind it, and
// an error is answered as what it is.
func answer(call func(*fasthttp.RequestCtx) error, params ...string) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		err := checkQuery(ctx, params)
		if err == nil {
			err = call(ctx)
		}
		if err == nil {
			return
		}
		var bad *FieldError
		var no *refusal
		var out *outsideError
		if errors.As(err, &out) {
			ctx.SetUserValue(outsideKey{}, out)
		}
		switch {
		case errors.As(err, &bad):
			Problem(ctx, fasthttp.StatusBadRequest, bad.Field, bad.Error())
		case errors.Is(err, ErrPinned):
			Problem(ctx, fasthttp.StatusConflict, "id", err.Error())
		case errors.As(err, &no):
			if no.status == fasthttp.StatusServiceUnavailable {
				ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, "1")
			}
			Problem(ctx, no.status, no.field, no.detail)
		case errors.Is(err, ErrNotSaved), errors.Is(err, ErrClosed):
			detail := ErrNotSaved.Error()
			if errors.Is(err, ErrClosed) {
				detail = "the gateway stops: nothing has changed"
			}
			ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, "1")
			Problem(ctx, fasthttp.StatusServiceUnavailable, "", detail)
		default:
			Problem(ctx, fasthttp.StatusInternalServerError, "", err.Error())
		}
	}
}

// Problem answers with application/problem+json (RFC 9457): type "about:blank", title, status, detail, and field if it is
// not empty. It leaves the header fields alone that are set already.
func Problem(ctx *fasthttp.RequestCtx, status int, field, detail string) {
	writeJSON(ctx, struct {
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
		Field  string `json:"field,omitempty"`
	}{"about:blank", fasthttp.StatusMessage(status), status, detail, field})
	ctx.SetContentType("application/problem+json")
	ctx.SetStatusCode(status)
}

// ErrorHandler is for fasthttp.Server: it answers what the server could not read as a problem, a body over the server's
// MaxRequestBodySize with 413. The server closes the connection after it.
func ErrorHandler(ctx *fasthttp.RequestCtx, err error) {
	var head *fasthttp.ErrSmallBuffer
	var network net.Error
	switch {
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		Problem(ctx, fasthttp.StatusRequestEntityTooLarge, "", tooLarge)
	case errors.As(err, &head):
		Problem(ctx, fasthttp.StatusRequestHeaderFieldsTooLarge, "", "the request line and the header fields are too long")
	case errors.As(err, &network) && network.Timeout():
		Problem(ctx, fasthttp.StatusRequestTimeout, "", "the request did not arrive in time")
	default:
		Problem(ctx, fasthttp.StatusBadRequest, "", "the request is not well-formed HTTP/1.1")
	}
}

var tooLarge = fmt.Sprintf("the body must have at most %d bytes", MaxBody)

func writeJSON(ctx *fasthttp.RequestCtx, v any) {
	ctx.SetContentType("application/json")
	ctx.Response.ResetBody()
	enc := json.NewEncoder(ctx)
	enc.SetEscapeHTML(false) // an addr may hold an &
	if err := enc.Encode(v); err != nil {
		panic(err) // our own structs, into memory
	}
}

func notFound(s *Snapshot, service, id string) error {
	if s == nil {
		return &refusal{fasthttp.StatusNotFound, "service", fmt.Sprintf("no service %s is registered; GET /services lists those that are", clip(service))}
	}
	return &refusal{fasthttp.StatusNotFound, "id", fmt.Sprintf("service %s has no instance %s; GET /services/%s lists those it has", clip(service), clip(id), service)}
}

// checkQuery refuses a parameter that a call does not take, or that comes twice: ignored, it would not do what its sender
// meant.
func checkQuery(ctx *fasthttp.RequestCtx, params []string) error {
	_, query, _ := bytes.Cut(ctx.RequestURI(), []byte("?"))
	seen := map[string]bool{}
	for part := range strings.SplitSeq(string(query), "&") {
		if part == "" {
			continue
		}
		name, _, _ := strings.Cut(part, "=")
		if s, err := url.QueryUnescape(name); err == nil {
			name = s
		}
		switch {
		case slices.Contains(params, name+"*"):
			continue
		case !slices.Contains(params, name) && len(params) == 0:
			return &refusal{fasthttp.StatusBadRequest, short(name), fmt.Sprintf("unknown query parameter %s: this call takes none", clip(name))}
		case !slices.Contains(params, name) || strings.HasSuffix(name, "*"):
			return &refusal{fasthttp.StatusBadRequest, short(name), fmt.Sprintf("unknown query parameter %s; this call takes %s", clip(name), strings.ReplaceAll(strings.Join(params, ", "), "*", ""))}
		case seen[name]:
			return &refusal{fasthttp.StatusBadRequest, name, name + " is there twice"}
		}
		seen[name] = true
	}
	return nil
}

// noBody refuses a body where a call takes none, for the same reason.
func noBody(ctx *fasthttp.RequestCtx) error {
	body, err := readBody(ctx)
	if err == nil && len(body) > 0 {
		err = &refusal{fasthttp.StatusBadRequest, "", "this call takes no body"}
	}
	return err
}

// bareNames is pathNames for a call that takes no body.
func bareNames(ctx *fasthttp.RequestCtx) (service, id string, err error) {
	if service, id, err = pathNames(ctx); err == nil {
		err = noBody(ctx)
	}
	return service, id, err
}

// pathNames returns the two names in the path.
func pathNames(ctx *fasthttp.RequestCtx) (service, id string, err error) {
	if service, err = pathName(ctx, "service"); err != nil {
		return "", "", err
	}
	id, err = pathName(ctx, "id")
	return service, id, err
}

// pathName returns one name in the path, percent-decoded once and valid.
func pathName(ctx *fasthttp.RequestCtx, field string) (string, error) {
	name, err := url.PathUnescape(ctx.UserValue(field).(string))
	if err != nil {
		return "", &FieldError{field, "has a % that two hexadecimal digits do not follow"}
	}
	if err := ValidName(name); err != nil {
		return "", &FieldError{field, err.Error()}
	}
	return name, nil
}

// readMembers reads a request's body: JSON of at most MaxBody bytes that holds no other members than those allowed.
func readMembers(ctx *fasthttp.RequestCtx, allowed ...string) (members, error) {
	kind, _, err := mime.ParseMediaType(string(ctx.Request.Header.ContentType()))
	if err != nil || kind != "application/json" {
		return members{}, &refusal{fasthttp.StatusUnsupportedMediaType, "", fmt.Sprintf("Content-Type must be application/json, not %s",
			clip(string(ctx.Request.Header.ContentType())))}
	}
	body, err := readBody(ctx)
	if err != nil {
		return members{}, err
	}
	return decodeMembers(body, allowed...)
}

// readBody returns the body, held or streamed, if it has at most MaxBody bytes.
func readBody(ctx *fasthttp.RequestCtx) ([]byte, error) {
	if ctx.Request.Header.ContentLength() > MaxBody {
		return nil, &refusal{fasthttp.StatusRequestEntityTooLarge, "", tooLarge}
	}
	var body []byte
	if stream := ctx.RequestBodyStream(); stream != nil {
		var err error
		if body, err = io.ReadAll(io.LimitReader(stream, MaxBody+1)); err != nil {
			return nil, &refusal{fasthttp.StatusBadRequest, "", "the body did not arrive whole"}
		}
	} else {
		body = ctx.Request.Body()
	}
	if len(body) > MaxBody {
		return nil, &refusal{fasthttp.StatusRequestEntityTooLarge, "", tooLarge}
	}
	return body, nil
}
