package proxy

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"kerberos/registry"
)

// Route sends the requests that match it to Service. All of what is set must match.
//
// Of several that match the first one counts in this order: an exact Host before one with *, a longer one of those before a
// shorter one, and last those without; then an exact Path before a Prefix, and a longer Prefix before a shorter one; then who has
// more conditions (Methods is one, each of Headers is one); then who comes first in the list.
type Route struct {
	Host    string   // example.com, without a port; or *.example.com for all names that end so; empty: any
	Path    string   // all of it; or
	Prefix  string   // whole segments of it: /echo is not /echoes, and / is all; empty, with Path: /
	Methods []string // one of these, which are case-sensitive: GET; none: any
	Headers []Field  // the first field line of each name has this value, or any if it is empty

	Service string // where they go

	StripPrefix   bool   // the part of the path that Prefix or Path matched is not sent
	ReplacePrefix string // but this in its place
	Request       Edits  // of what the instance gets
	Response      Edits  // of what the client gets, but not of what the gateway itself answers, nor of 1xx

	Policy
}

// A Route whose Prefix is FirstSegmentRule has nothing else: the first segment of the path names the service, where no other route
// matches.
const FirstSegmentRule = "/*"

// Field is a field of a head.
type Field struct{ Name, Value string }

// Edits change the fields of a head: Remove takes all lines of a name away, Set too and puts one in their place, Add puts one
// beside. None may be about framing, the connection, or what the gateway itself says (X-Forwarded-*, Forwarded, X-Real-IP, Via,
// X-Request-Id, traceparent, tracestate).
type Edits struct {
	Set, Add []Field
	Remove   []string
}

// String is what the route matches: example.com/api, /api or =/api for an exact path, with its methods and the names of its header
// fields, whose values may be secrets.
func (r *Route) String() string {
	text := r.Host
	if r.Path != "" {
		text += "=" + r.Path
	} else {
		text += cmp.Or(strings.TrimSuffix(r.Prefix, "/"), "/")
	}
	if len(r.Methods) > 0 {
		text = strings.Join(r.Methods, ",") + " " + text
	}
	for _, h := range r.Headers {
		text += " " + h.Name
	}
	return text
}

// route is a Route as requests use it, with what it does not set itself. It never changes.
type route struct {
	Route                    // as it was given; empty for what serves a service without a route
	name              string // of it, for the log
	service           string // empty: the caller knows it
	cut               int    // bytes of the path that are not sent
	put               []byte // what is sent instead; not nil if anything is cut
	request, response *edits
	policy
}

// edits are Edits of one head; nil: none.
type edits struct {
	drop  []string // names of lines that do not go on
	lines []byte   // lines that go besides, each with its CRLF
	host  bool     // one of them is Host
}

// table is an immutable table of routes. A match probes one map for each label of the host, if any route has one, and one for each
// segment of the path, however many routes there are; only those with the same host and path are looked at in turn.
type table struct {
	hosts  map[string]*paths // by name; by what follows the * of a wildcard
	sizes  lengths           // of their keys
	any    *paths            // of those without a host
	first  bool              // FirstSegmentRule
	routes []*route          // in the order of precedence
}

// paths are the routes of one host.
type paths struct {
	exact    map[string][]*route // by path
	prefixes map[string][]*route // by prefix, without its last /
	sizes    lengths             // of the prefixes
	longest  int
}

// lengths is a set of lengths. What has none of them need not be looked up.
type lengths []uint64

func (l lengths) has(n int) bool { return n>>6 < len(l) && l[n>>6]>>(n&63)&1 != 0 }

func (l *lengths) add(n int) {
	for n>>6 >= len(*l) {
		*l = append(*l, 0)
	}
	(*l)[n>>6] |= 1 << (n & 63)
}

// TableError says which route of a list no table can have beside the others, and why.
type TableError struct {
	Index int    // in the list
	Route string // as Route.String has it
	Err   error  // a *RouteError if it is about the route alone
}

func (e *TableError) Error() string { return "route " + e.Route + ": " + e.Err.Error() }
func (e *TableError) Unwrap() error { return e.Err }

// CheckRoutes refuses what New refuses as Config.Routes. The error is a *TableError.
func CheckRoutes(all []Route) error {
	_, err := newTable(all, func(string) *route { return &route{} })
	return err
}

// newTable makes the table; none at all is the rule of the first segment. of is how requests to a service are served.
func newTable(all []Route, of func(service string) *route) (*table, error) {
	t := &table{hosts: map[string]*paths{}, any: newPaths(), first: len(all) == 0}
	taken := map[[3]string]string{} // by host, path and prefix
	for i := range all {
		r := all[i]
		if r.Prefix == FirstSegmentRule {
			if r.String() != FirstSegmentRule || r.Service != "" || r.StripPrefix || r.ReplacePrefix != "" || r.Policy != (Policy{}) ||
				r.Request.resolve() != nil || r.Response.resolve() != nil {
				return nil, &TableError{i, r.String(), fmt.Errorf("%s stands alone", FirstSegmentRule)}
			}
			t.first = true
			continue
		}
		if r.Prefix == "" && r.Path == "" {
			r.Prefix = "/"
		}
		if err := r.Check(); err != nil {
			return nil, &TableError{i, r.String(), err}
		}
		r.Host = strings.ToLower(r.Host)
		if r.conditions() == 0 {
			place := [3]string{r.Host, r.Path, strings.TrimSuffix(r.Prefix, "/")}
			if other, ok := taken[place]; ok {
				return nil, &TableError{i, r.String(), fmt.Errorf("the same leads to %s already", other)}
			}
			taken[place] = r.Service
		}
		t.routes = append(t.routes, r.resolve(of(r.Service)))
	}
	slices.SortStableFunc(t.routes, func(a, b *route) int { return compareRoutes(&a.Route, &b.Route) })
	for _, r := range t.routes {
		at := t.any
		if r.Host != "" {
			key := strings.TrimPrefix(r.Host, "*")
			if t.hosts[key] == nil {
				t.hosts[key] = newPaths()
				t.sizes.add(len(key))
			}
			at = t.hosts[key]
		}
		if r.Path != "" {
			at.exact[r.Path] = append(at.exact[r.Path], r)
			continue
		}
		prefix := strings.TrimSuffix(r.Prefix, "/")
		at.prefixes[prefix] = append(at.prefixes[prefix], r)
		at.longest = max(at.longest, len(prefix))
		at.sizes.add(len(prefix))
	}
	return t, nil
}

func newPaths() *paths { return &paths{exact: map[string][]*route{}, prefixes: map[string][]*route{}} }

// precedence is who comes first of two routes, by the first rule that tells them apart.
var precedence = []struct {
	why     string // the other one comes first
	compare func(a, b *Route) int
}{
	{"the other is more exact about the host", func(a, b *Route) int { return cmp.Compare(a.hostRank(), b.hostRank()) }},
	{"the other has the longer host", func(a, b *Route) int {
		if a.hostRank() != wildcardHost {
			return 0
		}
		return cmp.Compare(len(b.Host), len(a.Host))
	}},
	{"the other has the whole path", func(a, b *Route) int { return cmp.Compare(min(len(b.Path), 1), min(len(a.Path), 1)) }},
	{"the other has the longer prefix", func(a, b *Route) int {
		return cmp.Compare(len(strings.TrimSuffix(b.Prefix, "/")), len(strings.TrimSuffix(a.Prefix, "/")))
	}},
	{"the other has more conditions", func(a, b *Route) int { return cmp.Compare(b.conditions(), a.conditions()) }},
}

// compareRoutes is the order of precedence.
func compareRoutes(a, b *Route) int {
	for _, rule := range precedence {
		if c := rule.compare(a, b); c != 0 {
			return c
		}
	}
	return 0
}

// How exact a route is about the host.
const (
	exactHost = iota
	wildcardHost
	anyHost
	firstSegment // comes behind all others
)

func (r *Route) hostRank() int {
	switch {
	case r.Prefix == FirstSegmentRule:
		return firstSegment
	case r.Host == "":
		return anyHost
	case r.Host[0] == '*':
		return wildcardHost
	}
	return exactHost
}

func (r *Route) conditions() int { return min(len(r.Methods), 1) + len(r.Headers) }

// RouteError says which field of a Route is wrong, and why.
type RouteError struct {
	Field string // host, path, prefix, replace-prefix, strip-prefix, methods, headers, service, request-headers or response-headers
	Part  string // set, add or remove, of the last two
	Name  string // of a header field, or a method: which of several is wrong; empty: all of Field
	Err   error
}

func (e *RouteError) Error() string { return e.Field + ": " + e.Err.Error() }
func (e *RouteError) Unwrap() error { return e.Err }

// Check refuses what no route may have. The error is a *RouteError.
func (r *Route) Check() error {
	bad := func(field, format string, args ...any) error {
		return &RouteError{Field: field, Err: fmt.Errorf(format, args...)}
	}
	name := strings.TrimPrefix(r.Host, "*.")
	if r.Host != "" && (!validHost([]byte(name)) || strings.Contains(name, "*") || string(hostName(nil, []byte(name))) != strings.ToLower(name)) {
		return bad("host", "%q is neither a name such as example.com, without a port, nor *.example.com", r.Host)
	}
	if r.Path != "" && r.Prefix != "" {
		return bad("path", "there is a prefix too, and must be one of them")
	}
	for _, p := range []struct{ field, path string }{{"path", r.Path}, {"prefix", r.Prefix}, {"replace-prefix", r.ReplacePrefix}} {
		if p.path != "" && (p.path[0] != '/' || strings.ContainsAny(p.path, "?#*% \\") || !all([]byte(p.path), isTarget)) {
			return bad(p.field, "%q is no path such as /api", p.path)
		}
	}
	if r.StripPrefix && r.ReplacePrefix != "" {
		return bad("replace-prefix", "the prefix is stripped too, and must be one of them")
	}
	for _, method := range r.Methods {
		if !all([]byte(method), isToken) {
			return &RouteError{Field: "methods", Name: method, Err: fmt.Errorf("%q is no method", method)}
		}
		if upper := strings.ToUpper(method); upper != method && slices.Contains(usualMethods, upper) {
			return &RouteError{Field: "methods", Name: method, Err: fmt.Errorf("%q never matches %s: methods are case-sensitive", method, upper)}
		}
	}
	for _, h := range r.Headers {
		if err := h.check(); err != nil {
			return &RouteError{Field: "headers", Name: h.Name, Err: err}
		}
	}
	if err := registry.ValidName(r.Service); err != nil {
		return bad("service", "%w", err)
	}
	if part, name, err := r.Request.check(false); err != nil {
		return &RouteError{"request-headers", part, name, err}
	}
	if part, name, err := r.Response.check(true); err != nil {
		return &RouteError{"response-headers", part, name, err}
	}
	return nil
}

// usualMethods are those that a route in another case is meant for, of RFC 9110 section 9.3, and PATCH. No rule keeps a client from
// others: get is one too.
var usualMethods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}

// Order returns routes in the order in which they count; FirstSegmentRule is the last one.
func Order(all []Route) []Route {
	ordered := slices.Clone(all)
	slices.SortStableFunc(ordered, func(a, b Route) int { return compareRoutes(&a, &b) })
	return ordered
}

func (f *Field) check() error {
	if !all([]byte(f.Name), isToken) {
		return fmt.Errorf("%q is no name of a header field", f.Name)
	}
	if !visible([]byte(f.Value)) || string(trim([]byte(f.Value))) != f.Value {
		return fmt.Errorf("the value of %s has characters that a header field cannot have, or spaces around it", f.Name)
	}
	return nil
}

// check returns, with an error, the part in which the name is that it is about.
func (e *Edits) check(response bool) (part, name string, err error) {
	for _, p := range []struct {
		part   string
		fields []Field
	}{{"set", e.Set}, {"add", e.Add}} {
		for _, f := range p.fields {
			if err := f.check(); err != nil {
				return p.part, f.Name, err
			}
			if err := mayEdit(f.Name, response); err != nil {
				return p.part, f.Name, err
			}
			if p.part == "add" && identify([]byte(f.Name)) == fieldHost {
				return p.part, f.Name, fmt.Errorf("a Host cannot be added: there is one; set it")
			}
		}
	}
	for _, name := range e.Remove {
		if err := (&Field{Name: name}).check(); err != nil {
			return "remove", name, err
		}
		if identify([]byte(name)) == fieldHost {
			return "remove", name, fmt.Errorf("a Host cannot be removed: set it")
		}
		if err := mayEdit(name, response); err != nil {
			return "remove", name, err
		}
	}
	return "", "", nil
}

// markNames are the fields of Config.RequestIDs and Config.Trace.
var markNames = []string{"x-request-id", "traceparent", "tracestate"}

// mayEdit says why a field is left to the gateway.
func mayEdit(name string, response bool) error {
	switch id := identify([]byte(name)); {
	case slices.Contains(markNames, strings.ToLower(name)):
	case id == fieldOther, id == fieldHost && !response, id == fieldDate && !response:
		return nil
	case id >= fieldForwarded && response: // a backend may say such things
		return nil
	}
	return fmt.Errorf("%s is left to the gateway", name)
}

// resolve makes what requests use of a route, over how its service is served.
func (r *Route) resolve(service *route) *route {
	n := &route{Route: *r, name: r.String(), service: r.Service, request: r.Request.resolve(), response: r.Response.resolve(), policy: service.policy.with(r.Policy)}
	if r.StripPrefix || r.ReplacePrefix != "" {
		n.cut = len(r.Path) + len(strings.TrimSuffix(r.Prefix, "/"))
		n.put = []byte(strings.TrimSuffix(r.ReplacePrefix, "/"))
	}
	return n
}

func (e *Edits) resolve() *edits {
	if len(e.Set) == 0 && len(e.Add) == 0 && len(e.Remove) == 0 {
		return nil
	}
	n := &edits{drop: slices.Clone(e.Remove)}
	for _, f := range e.Set {
		n.drop = append(n.drop, f.Name)
		n.host = n.host || identify([]byte(f.Name)) == fieldHost
	}
	for _, f := range slices.Concat(e.Set, e.Add) {
		n.lines = append(n.lines, f.Name+": "+f.Value+"\r\n"...)
	}
	return n
}

// drops says that lines of a name do not go on: nor do those that servers which turn "-" and "_" into the same take for it.
func (e *edits) drops(name []byte) bool {
	return slices.ContainsFunc(e.drop, func(other string) bool {
		if len(other) != len(name) {
			return false
		}
		for i, c := range name {
			if folded(c) != folded(other[i]) {
				return false
			}
		}
		return true
	})
}

// folded is c in lower case, and "-" for "_".
func folded(c byte) byte {
	switch {
	case c == '_':
		return '-'
	case c >= 'A' && c <= 'Z':
		return c | 0x20
	}
	return c
}

// match returns the route of a request, or nil.
func (t *table) match(r *Request) *route {
	if len(t.hosts) > 0 {
		var room [256]byte
		if host := hostName(room[:0], r.Host); len(host) > 0 {
			if m := t.onHost(host, r); m != nil {
				return m
			}
			for dot, c := range host {
				if c != '.' {
					continue
				}
				if m := t.onHost(host[dot:], r); m != nil {
					return m
				}
			}
		}
	}
	return t.any.match(r)
}

// onHost returns the route of a request among those of a host, or nil.
func (t *table) onHost(key []byte, r *Request) *route {
	if !t.sizes.has(len(key)) {
		return nil
	}
	if p := t.hosts[string(key)]; p != nil {
		return p.match(r)
	}
	return nil
}

func (p *paths) match(r *Request) *route {
	if len(p.exact) > 0 {
		if m := fitting(p.exact[string(r.Path)], r); m != nil {
			return m
		}
	}
	for end := min(len(r.Path), p.longest); end >= 0; end-- {
		if !p.sizes.has(end) || end < len(r.Path) && r.Path[end] != '/' {
			continue
		}
		if m := fitting(p.prefixes[string(r.Path[:end])], r); m != nil {
			return m
		}
	}
	return nil
}

// fitting returns the first route whose conditions are met.
func fitting(routes []*route, r *Request) *route {
next:
	for _, m := range routes {
		if len(m.Methods) > 0 && !slices.Contains(m.Methods, text(r.Method)) {
			continue
		}
		for i := range m.Headers {
			if !m.Headers[i].isIn(r) {
				continue next
			}
		}
		return m
	}
	return nil
}

// isIn says that the first field line of the name has the value, or any if that is empty.
func (f *Field) isIn(r *Request) bool {
	value := r.Header(f.Name)
	return value != nil && (f.Value == "" || string(value) == f.Value)
}

// hostName appends the name of a host in lower case, without a port and the dot of the root. One that is too long to be a name is
// empty.
func hostName(dst, host []byte) []byte {
	if end := bytes.IndexByte(host, ']'); end >= 0 {
		host = host[:end+1]
	} else if end := bytes.IndexByte(host, ':'); end >= 0 {
		host = host[:end]
	}
	host = bytes.TrimSuffix(host, []byte("."))
	if len(host) > 255 {
		return dst
	}
	for _, c := range host {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// appendTarget appends the path and query that are sent.
func (r *route) appendTarget(dst []byte, req *Request) []byte {
	if r.put == nil || req.authority {
		return append(dst, req.target...)
	}
	dst = append(dst, r.put...)
	rest := req.target[r.cut:]
	if len(r.put) == 0 && (len(rest) == 0 || rest[0] != '/') {
		dst = append(dst, '/')
	}
	return append(dst, rest...)
}

// appendEdited appends lines without drops, and as the edits say.
func appendEdited(dst, lines []byte, drops []span, e *edits) []byte {
	if e == nil {
		return appendLines(dst, lines, drops)
	}
	for at := 0; at < len(lines); {
		if len(drops) > 0 && at == drops[0].from {
			at = drops[0].to
			drops = drops[1:]
			continue
		}
		f, n, err := readField(lines[at:])
		if err != nil { // it was read before
			break
		}
		if !e.drops(f.name) {
			dst = append(dst, lines[at:at+n]...)
		}
		at += n
	}
	return append(dst, e.lines...)
}
