package registry

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/valyala/fasthttp"
)

// Explainer says what requests find; a Proxy is one.
type Explainer interface {
	Describer
	Explain(Question) Explanation
}

// Question is a request that somebody asks about: as a client would send it, but for the body.
type Question struct {
	Method string // GET
	Host   string // of the Host field
	Path   string // the request-target: a path, with a query or without
	Fields []string
	Client netip.Addr
}

// Explanation is what a request would find at this moment. What it does not come to is nil.
type Explanation struct {
	Client     netip.Addr          `json:"client"`     // whom a trusted proxy names, or the one of the question
	Connection *Outcome            `json:"connection"` // of a new one of the client; nil if it is let in
	Outcome    Outcome             `json:"outcome"`    // of a request on one that was
	Route      *RouteExplanation   `json:"route"`
	Near       []RouteExplanation  `json:"near"` // other routes, which do not match or come behind it
	Service    *ServiceExplanation `json:"service"`
}

// Outcome is what would become of it.
type Outcome struct {
	Kind       string `json:"kind"`        // one of the constants
	Instance   string `json:"instance"`    // the first that is asked
	Status     int    `json:"status"`      // of the gateway's own answer; in the queue, if no place comes free in time
	Error      string `json:"error"`       // the type in Proxy-Status
	RetryAfter int    `json:"retry_after"` // seconds
	Why        string `json:"why"`
}

// The kinds of outcomes.
const (
	ToInstance = "instance" // it goes to Instance
	ToDrawn    = "drawn"    // it goes to an instance, which is drawn by the shares
	ToQueue    = "queue"    // it waits for a place below a limit
	ToGateway  = "gateway"  // the gateway itself answers
	ToRefusal  = "refused"  // likewise, with an error
)

// RouteExplanation is a route, and why it is the one, or is not.
type RouteExplanation struct {
	Match   string `json:"match"`
	Service string `json:"service"`
	Why     string `json:"why"`
}

// ServiceExplanation is a service as its requests find it.
type ServiceExplanation struct {
	Name string `json:"name"`
	ServiceStatus
	Ready     int                            `json:"ready"` // instances
	Breaker   BreakerSettings                `json:"breaker"`
	Limits    LimitsInUse                    `json:"limits"`
	Instances map[string]InstanceExplanation `json:"-"` // by id
}

// BreakerSettings are those of a service's instances.
type BreakerSettings struct {
	Failures int    `json:"failures"` // in a row, to open
	OpenFor  string `json:"open_for"`
	Probes   int    `json:"probes"` // that must all succeed
	Statuses []int  `json:"statuses"`
}

// LimitsInUse are the limits of requests in flight, and what there is of them now. 0 is no limit.
type LimitsInUse struct {
	InFlight            int64  `json:"in_flight"` // of the service: those at its instances, with a limit of the service all that were admitted
	InFlightPerService  int    `json:"in_flight_per_service"`
	InFlightPerInstance int    `json:"in_flight_per_instance"`
	Waiting             int64  `json:"waiting"`
	Queue               int64  `json:"queue"` // so many may wait
	QueueTimeout        string `json:"queue_timeout"`
}

// InstanceExplanation is an instance as requests find it, beside its InstanceStatus.
type InstanceExplanation struct {
	Share     float64  `json:"share"`      // of the service's requests, by the strategy in force; 0 if it is not ready
	SlowShare *float64 `json:"slow_share"` // of its weight, as long as it starts slowly; else null
	Full      bool     `json:"full"`       // it has as many requests in flight as it may
	OpenedBy  string   `json:"opened_by"`  // why its breaker opened, as long as that is not closed
	Addresses []string `json:"addresses"`  // where it is dialled: the last good one first
}

// NewExplainHandler returns the handler of
//
//	GET /explain?method=&host=&path=&client=&header=
//
// which answers with an Explanation, in which the service has its instances as GET /services/{service} has them. Only path is
// needed: method is GET, host localhost, and client the caller. header, NAME: VALUE, may come more than once. The caller needs the
// right to read the service that the path leads to, or all of them where it leads to none.
func NewExplainHandler(reg *Registry, e Explainer) fasthttp.RequestHandler {
	a := &api{reg: reg, d: e}
	return answer(func(ctx *fasthttp.RequestCtx) error { return a.explain(ctx, e) }, "method", "host", "path", "client", "header*")
}

// explanationJSON is what GET /explain answers.
type explanationJSON struct {
	Request questionJSON `json:"request"`
	Explanation
	Service *explainedJSON `json:"service"`
}

type questionJSON struct {
	Method string `json:"method"`
	Host   string `json:"host"`
	Path   string `json:"path"`
}

type explainedJSON struct {
	ServiceExplanation
	Instances []explainedInstanceJSON `json:"instances"`
	Expired   []expiredJSON           `json:"expired"` // in the last ten minutes
}

type explainedInstanceJSON struct {
	instanceJSON
	InstanceExplanation
}

func (a *api) explain(ctx *fasthttp.RequestCtx, e Explainer) error {
	if err := noBody(ctx); err != nil {
		return err
	}
	q, err := question(ctx)
	if err != nil {
		return err
	}
	x := e.Explain(q)
	service := ""
	if x.Route != nil {
		service = x.Route.Service
	}
	caller := callerOf(ctx)
	if !caller.May(RightRead, service) {
		return &refusal{fasthttp.StatusForbidden, "path", fmt.Sprintf("%s has no right to read what is at this path: its rights are none of admin, read and register for the service there", caller.Name())}
	}
	x.Near = slices.DeleteFunc(x.Near, func(r RouteExplanation) bool { return !caller.May(RightRead, r.Service) })
	if x.Near == nil {
		x.Near = []RouteExplanation{}
	}
	out := explanationJSON{questionJSON{q.Method, q.Host, q.Path}, x, nil}
	if x.Service != nil {
		out.Service = a.explained(x.Service)
	}
	writeJSON(ctx, out)
	return nil
}

// explained adds to a service what the registry knows.
func (a *api) explained(s *ServiceExplanation) *explainedJSON {
	out := &explainedJSON{*s, []explainedInstanceJSON{}, []expiredJSON{}}
	if snapshot := a.reg.Snapshot(s.Name); snapshot != nil {
		for _, in := range snapshot.Instances() {
			more := s.Instances[in.ID]
			if more.Addresses == nil {
				more.Addresses = []string{}
			}
			out.Instances = append(out.Instances, explainedInstanceJSON{a.instance(s.Name, in), more})
		}
	}
	for _, e := range a.reg.Expired() {
		if e.Service == s.Name {
			out.Expired = append(out.Expired, expiredJSON{e.Service, e.ID, e.Addr, seconds(e.At)})
		}
	}
	return out
}

// question reads the request that a call asks about.
func question(ctx *fasthttp.RequestCtx) (Question, error) {
	args := ctx.QueryArgs()
	q := Question{
		Method: cmp.Or(string(args.Peek("method")), "GET"),
		Host:   cmp.Or(string(args.Peek("host")), "localhost"),
		Path:   string(args.Peek("path")),
	}
	for _, field := range args.PeekMulti("header") {
		q.Fields = append(q.Fields, string(field))
		if name, _, ok := strings.Cut(string(field), ":"); !ok || strings.EqualFold(name, "Host") {
			return Question{}, &FieldError{"header", "must be NAME: VALUE, not " + clip(string(field)) + "; Host has its own parameter"}
		}
	}
	if q.Path == "" {
		return Question{}, &FieldError{"path", "is missing or empty: it must be the path of a request, such as /users/1"}
	}
	for _, p := range []struct{ name, value string }{{"method", q.Method}, {"host", q.Host}, {"path", q.Path}, {"header", strings.Join(q.Fields, "")}} {
		if strings.ContainsAny(p.value, "\r\n") {
			return Question{}, &FieldError{p.name, "has a line break, which no request has there"}
		}
	}
	client := string(args.Peek("client"))
	if client == "" {
		client = ctx.RemoteIP().String()
	}
	addr, err := netip.ParseAddr(client)
	if err != nil || addr.Zone() != "" {
		return Question{}, &FieldError{"client", "must be an IP address such as 10.0.0.7, not " + clip(client)}
	}
	q.Client = addr.Unmap()
	return q, nil
}
