package proxy

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"kerberos/registry"
)

// maxNear is how many other routes are told of.
const maxNear = 8

// explainRoute adds to e the route that the request was given, or the service without one, and those that came close.
func (x *exchange) explainRoute(e *registry.Explanation, way *route, name string) {
	n, r := x.p().cfg(), &x.c.req
	switch {
	case way != nil:
		e.Route = &registry.RouteExplanation{Match: way.name, Service: name, Why: way.met()}
	case name == "":
	case n.byFunc != nil:
		e.Route = &registry.RouteExplanation{Match: "RouteFunc", Service: name, Why: "this program's RouteFunc says so"}
	default:
		e.Route = &registry.RouteExplanation{Match: FirstSegmentRule, Service: name, Why: "the first segment of the path names the service"}
	}
	if n.byFunc != nil {
		return
	}
	var near []nearRoute
	for _, other := range n.table.routes {
		if other == way {
			continue
		}
		if why, by := other.missed(r); by > 0 {
			near = append(near, nearRoute{registry.RouteExplanation{Match: other.name, Service: other.service, Why: why}, by})
		} else if by == 0 && way != nil {
			near = append(near, nearRoute{registry.RouteExplanation{Match: other.name, Service: other.service, Why: "it matches too, but " + precedes(&way.Route, &other.Route)}, 0})
		}
	}
	if n.table.first && way == nil && x.p().service(name) == nil {
		near = x.nearNames(near, name)
	}
	slices.SortStableFunc(near, func(a, b nearRoute) int { return cmp.Compare(a.by, b.by) })
	for _, other := range near[:min(len(near), maxNear)] {
		e.Near = append(e.Near, other.RouteExplanation)
	}
}

// nearRoute is a route that came close; by is how far from it it was, 0 for one that matches.
type nearRoute struct {
	registry.RouteExplanation
	by int
}

// met says what the request has that the route asks for.
func (r *Route) met() string {
	var all []string
	for _, c := range r.parts() {
		if c.met != "" {
			all = append(all, c.met)
		}
	}
	if len(all) == 0 {
		return "it is for all requests"
	}
	return strings.Join(all, ", ")
}

// missed says which condition the request does not meet, if it is the only one and near enough to be what was meant. by is how far
// away it is: 0 if all are met, less if it is too far.
func (r *Route) missed(req *Request) (why string, by int) {
	if !r.nearPath(req.Path) { // nor does it match, then
		return "", -1
	}
	for _, c := range r.parts() {
		if c.only.meets(req) {
			continue
		}
		if by != 0 {
			return "", -1
		}
		why, by = c.missed, c.far
	}
	return why, by
}

// How far a request is from a route that asks for one more thing.
const (
	farField = 1 + iota // or another method
	farPath
	farHost
)

// demand is one thing that a route asks for.
type demand struct {
	only        Route // asks for nothing else
	met, missed string
	far         int
}

// parts are what a route asks for, the path first: it is what most routes differ in.
func (r *Route) parts() []demand {
	var all []demand
	if r.Path != "" {
		all = append(all, demand{Route{Path: r.Path}, "the path is " + r.Path, "the path is not " + r.Path, farPath})
	} else if r.Prefix != "/" {
		all = append(all, demand{Route{Prefix: r.Prefix}, "the path is below " + r.Prefix, "the path is not below " + r.Prefix, farPath})
	}
	if r.Host != "" {
		all = append(all, demand{Route{Host: r.Host}, "the host is " + r.Host, "the host is not " + r.Host, farHost})
	}
	if len(r.Methods) > 0 {
		list := strings.Join(r.Methods, " or ")
		all = append(all, demand{Route{Methods: r.Methods}, "the method is " + list, "the method is not " + list, farField})
	}
	for _, h := range r.Headers {
		c := demand{Route{Headers: []Field{h}}, "there is a field " + h.Name, "there is no field " + h.Name, farField}
		if h.Value != "" { // which may be a secret
			c.met, c.missed = "the field "+h.Name+" has the right value", "the field "+h.Name+" has another value, or is not there"
		}
		all = append(all, c)
	}
	return all
}

// meets says whether a table with no other route leads the request to this one.
func (r Route) meets(req *Request) bool {
	r.Service = defaultService
	t, err := newTable([]Route{r}, func(string) *route { return &route{} })
	if err != nil {
		panic(err) // it is a part of a route that was checked
	}
	return t.match(req) != nil
}

// nearPath says whether a path may have been meant for the route: that is for all, it has the same first segment, in any case of
// letters, or one begins as the other does.
func (r *Route) nearPath(path []byte) bool {
	own := []byte(strings.TrimSuffix(r.Path+r.Prefix, "/"))
	first := func(path []byte) []byte {
		segment, _, _ := bytes.Cut(bytes.TrimPrefix(path, []byte("/")), []byte("/"))
		return segment
	}
	return len(own) == 0 || bytes.EqualFold(first(own), first(path)) || bytes.HasPrefix(path, own) || len(path) > 1 && bytes.HasPrefix(own, path)
}

// precedes says why a comes before b, which the same request matches.
func precedes(a, b *Route) string {
	for _, rule := range precedence {
		if rule.compare(a, b) < 0 {
			return rule.why
		}
	}
	return "the other comes before it in the list"
}

// nearNames adds the services whose names are nearly the one that the first segment of the path says.
func (x *exchange) nearNames(near []nearRoute, name string) []nearRoute {
	for _, other := range x.p().cfg().Registry.Names() {
		if len(near) >= maxNear {
			break
		}
		if name != "" && (strings.EqualFold(other, name) || strings.HasPrefix(other, name) || strings.HasPrefix(name, other)) {
			near = append(near, nearRoute{registry.RouteExplanation{Match: "/" + other, Service: other, Why: fmt.Sprintf("the first segment of the path is %s", name)}, farPath})
		}
	}
	return near
}
