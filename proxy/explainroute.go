package proxy

import (
	"slices"
	"strings"

	"kerberos/registry"
)

// maxNear is how many other routes are named.
const maxNear = 10

// explainRoute tells which route a request takes, and of those for its host and path why they are not the one.
func (x *exchange) explainRoute(e *registry.Explanation, way *route, name string) {
	now, r := x.p().cfg(), &x.c.req
	switch {
	case now.byFunc != nil:
		if name != "" {
			e.Route = &registry.RouteExplanation{Service: name, Why: "the RouteFunc says so"}
		}
		return
	case way != nil:
		e.Route = &registry.RouteExplanation{Match: way.name, Service: name, Why: "of those that match it comes first"}
	case name != "":
		e.Route = &registry.RouteExplanation{Match: FirstSegmentRule, Service: name, Why: "no other route matches: the first segment of the path is the name"}
	}
	for _, other := range now.table.routes {
		if other == way || len(e.Near) == maxNear || !other.isFor(r) {
			continue
		}
		why := other.unmet(r)
		if why == "" {
			why = "it matches too, and comes behind"
		}
		e.Near = append(e.Near, registry.RouteExplanation{Match: other.name, Service: other.service, Why: why})
	}
}

// isFor says that host and path of a request are those of a route.
func (m *route) isFor(r *Request) bool {
	host, path := string(hostName(nil, r.Host)), string(r.Path)
	suffix, wildcard := strings.CutPrefix(m.Host, "*")
	prefix := strings.TrimSuffix(m.Prefix, "/")
	onHost := m.Host == "" || m.Host == host || wildcard && strings.HasSuffix(host, suffix)
	return onHost && (m.Path == path || m.Path == "" && (path == prefix || strings.HasPrefix(path, prefix+"/")))
}

// unmet is the first condition of a route that a request does not meet; empty if it meets all.
func (m *route) unmet(r *Request) string {
	if len(m.Methods) > 0 && !slices.Contains(m.Methods, string(r.Method)) {
		return "it is for " + strings.Join(m.Methods, ", ")
	}
	for i := range m.Headers {
		switch h := &m.Headers[i]; {
		case r.Header(h.Name) == nil:
			return "it is for requests with the field " + h.Name
		case !h.isIn(r):
			return "it is for another value of " + h.Name
		}
	}
	return ""
}
