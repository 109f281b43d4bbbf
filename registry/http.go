package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

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

// NewHandler returns the registration API:
//
//	POST   /register                 {"service", "id", "addr", "weight"}   204
//	DELETE /register                 {"service", "id"}                     204, 404
//	GET    /services                                                       200
//	GET    /services/{service}                                             200, 404
//	GET    /services/{service}/{id}                                        200, 404
//	PUT    /services/{service}/{id}  {"addr", "weight"}                    204
//	DELETE /services/{service}/{id}                                        204, 404
//
// Every refusal is problem+json (see Problem), and nothing has changed then. An instance registered by a peer that is
// not loopback is marked so for AddrPolicy. Who may call is decided before this handler (internal/access). d may be nil:
// what it would say keeps its zero values.
func NewHandler(reg *Registry, d Describer) fasthttp.RequestHandler {
	a := &api{reg: reg, d: d}
	if d == nil {
		a.d = noDescriber{}
	}
	r := router.New()
	r.RedirectTrailingSlash = false
	r.RedirectFixedPath = false
	r.NotFound = func(ctx *fasthttp.RequestCtx) {
		Problem(ctx, fasthttp.StatusNotFound, "", "the API answers at /register, /services, /services/{service} and /services/{service}/{id}")
	}
	r.MethodNotAllowed = func(ctx *fasthttp.RequestCtx) { // the router has set Allow
		Problem(ctx, fasthttp.StatusMethodNotAllowed, "", fmt.Sprintf("%s is not allowed here; allowed: %s",
			clip(string(ctx.Method())), ctx.Response.Header.Peek(fasthttp.HeaderAllow)))
	}
	r.GlobalOPTIONS = func(ctx *fasthttp.RequestCtx) { ctx.SetStatusCode(fasthttp.StatusNoContent) } // likewise

	r.POST("/register", answer(a.register))
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
	r.DELETE("/services/{service}/{id}", answer(a.deleteInstance))

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
	m, err := readMembers(ctx, "service", "id", "addr", "weight")
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
	m, err := readMembers(ctx, "addr", "weight")
	if err != nil {
		return err
	}
	m.service, m.id = service, id
	return a.put(ctx, m)
}

func (a *api) put(ctx *fasthttp.RequestCtx, m members) error {
	remote := !ctx.RemoteIP().IsLoopback()
	err := a.reg.Register(m.service, Instance{ID: m.id, Addr: m.addr, Weight: m.weight, remote: remote})
	if err != nil {
		return err
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

// DELETE /register
func (a *api) unregister(ctx *fasthttp.RequestCtx) error {
	m, err := readMembers(ctx, "service", "id")
	if err != nil {
		return err
	}
	return a.drop(ctx, m.service, m.id)
}

// DELETE /services/{service}/{id}
func (a *api) deleteInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := pathNames(ctx)
	if err != nil {
		return err
	}
	if err := noBody(ctx); err != nil {
		return err
	}
	return a.drop(ctx, service, id)
}

func (a *api) drop(ctx *fasthttp.RequestCtx, service, id string) error {
	if err := validNames(service, id); err != nil {
		return err
	}
	if err := a.reg.Unregister(service, id); err != nil { // ErrNotFound is all it can be
		return notFound(a.reg.Snapshot(service), service, id)
	}
	ctx.SetStatusCode(fasthttp.StatusNoContent)
	return nil
}

// GET /services
func (a *api) getServices(ctx *fasthttp.RequestCtx) error {
	if err := noBody(ctx); err != nil {
		return err
	}
	list := servicesJSON{Services: []serviceJSON{}}
	for _, name := range a.reg.Names() {
		if s := a.reg.Snapshot(name); s != nil { // nil: it left since
			list.Services = append(list.Services, a.service(s))
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
	s := a.reg.Snapshot(service)
	if s == nil {
		return notFound(s, service, "")
	}
	writeJSON(ctx, a.service(s))
	return nil
}

// GET /services/{service}/{id}
func (a *api) getInstance(ctx *fasthttp.RequestCtx) error {
	service, id, err := pathNames(ctx)
	if err != nil {
		return err
	}
	if err := noBody(ctx); err != nil {
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
	RegisteredAt time.Time `json:"registered_at"`
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
	return instanceJSON{in.ID, in.Addr, in.Weight, st, seconds(in.RegisteredAt)}
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

// answer makes a handler of a call: none takes a query, and an error is answered as what it is.
func answer(call func(*fasthttp.RequestCtx) error) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		err := noQuery(ctx)
		if err == nil {
			err = call(ctx)
		}
		var bad *FieldError
		var no *refusal
		switch {
		case err == nil:
		case errors.As(err, &bad):
			Problem(ctx, fasthttp.StatusBadRequest, bad.Field, bad.Error())
		case errors.As(err, &no):
			Problem(ctx, no.status, no.field, no.detail)
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

// noQuery refuses a query: no call takes one, and one that is ignored would not do what its sender meant.
func noQuery(ctx *fasthttp.RequestCtx) error {
	_, query, _ := strings.Cut(string(ctx.RequestURI()), "?")
	if query == "" {
		return nil
	}
	first, _, _ := strings.Cut(query, "&")
	name, _, _ := strings.Cut(first, "=")
	if s, err := url.QueryUnescape(name); err == nil {
		name = s
	}
	return &refusal{fasthttp.StatusBadRequest, short(name), fmt.Sprintf("unknown query parameter %s: this call takes none", clip(name))}
}

// noBody refuses a body where a call takes none, for the same reason.
func noBody(ctx *fasthttp.RequestCtx) error {
	body, err := readBody(ctx)
	if err == nil && len(body) > 0 {
		err = &refusal{fasthttp.StatusBadRequest, "", "this call takes no body"}
	}
	return err
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

// members are what a body may hold. A missing string is empty, a missing weight 0: no weight.
type members struct {
	service, id, addr string
	weight            int
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

// decodeMembers reads one JSON object strictly: a member that is unknown, comes twice or has the wrong type is refused by
// its name, and so is anything after the object. encoding/json alone lets all of that pass, and names in other case.
func decodeMembers(body []byte, allowed ...string) (members, error) {
	bad := func(field, format string, args ...any) (members, error) {
		return members{}, &refusal{fasthttp.StatusBadRequest, field, fmt.Sprintf(format, args...)}
	}
	expected := "one JSON object with " + strings.Join(allowed, ", ")
	if !utf8.Valid(body) {
		return bad("", "the body is not UTF-8; must be %s", expected)
	}
	var whole json.RawMessage
	if err := json.Unmarshal(body, &whole); err != nil { // the syntax, once and for all; what follows only walks it
		return bad("", "the body is not JSON: %v; must be %s", err, expected)
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return bad("", "the body must be %s", expected)
	}
	var m members
	seen := make(map[string]bool, len(allowed))
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return bad("", "the body must be %s", expected)
		}
		if !slices.Contains(allowed, name) {
			return bad(short(name), "unknown member %s; allowed here: %s", clip(name), strings.Join(allowed, ", "))
		}
		if seen[name] {
			return bad(name, "%s is there twice", name)
		}
		seen[name] = true
		value, err := dec.Token()
		if err != nil {
			return bad(name, "%s cannot be read: %v", name, err)
		}
		if name == "weight" {
			number, ok := value.(json.Number)
			if m.weight, err = strconv.Atoi(number.String()); !ok || err != nil || m.weight < 0 || m.weight > MaxWeight {
				return bad(name, "%s %s, not %s", name, weightRule, describe(value))
			}
			continue
		}
		text, ok := value.(string)
		if !ok {
			return bad(name, "%s must be a string, not %s", name, describe(value))
		}
		switch name {
		case "service":
			m.service = text
		case "id":
			m.id = text
		case "addr":
			m.addr = text
		}
	}
	return m, nil
}

// describe says what a JSON value is, for a message.
func describe(value json.Token) string {
	switch v := value.(type) {
	case nil:
		return "null"
	case string:
		return "the string " + clip(v)
	case json.Number:
		return short(v.String())
	case json.Delim:
		if v == '[' {
			return "an array"
		}
		return "an object"
	}
	return fmt.Sprint(value)
}
