package config

import (
	"errors"
	"reflect"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"github.com/goccy/go-yaml/ast"

	"kerberos/proxy"
)

const routesHelp = "Where requests go: each as --route has it, or with the keys host, path or prefix, methods, headers, service, " +
	"strip-prefix, replace-prefix, request-headers, response-headers, and of its own request-timeout, total-timeout, retries, max-body. " +
	"Without any the first segment of the path names the service."

// readRoutes reads the list of routes.
func (f *file) readRoutes(node ast.Node) error {
	list, ok := node.(*ast.SequenceNode)
	if !ok || len(list.Values) == 0 {
		return f.wrong(node, "routes must be a list of at least one, such as [/api=echo, /*]")
	}
	f.routesAt, _ = place(list.Values[0])
	for _, item := range list.Values {
		route, err := f.readRoute(item)
		if err != nil {
			return err
		}
		f.routes = append(f.routes, route)
	}
	return nil
}

func (f *file) readRoute(node ast.Node) (r Route, err error) {
	if _, ok := node.(ast.MapNode); !ok {
		text, err := f.scalar("a route", node)
		if err != nil {
			return r, err
		}
		if r, err = parseRoute(text); err != nil {
			return r, f.wrong(node, "routes: %v", err)
		}
		return r, nil
	}
	keys := f.policy(&r.Policy)
	for key, to := range map[string]*string{"host": &r.Host, "service": &r.Service} {
		keys[key] = f.text(key, to)
	}
	for key, to := range map[string]*string{"path": &r.Path, "prefix": &r.Prefix, "replace-prefix": &r.ReplacePrefix} {
		keys[key] = f.path(key, to)
	}
	keys["strip-prefix"] = f.onOff("strip-prefix", &r.StripPrefix)
	keys["methods"] = f.texts("methods", &r.Methods)
	keys["headers"] = f.fields("headers", &r.Headers)
	keys["request-headers"] = f.edits("request-headers", &r.Request)
	keys["response-headers"] = f.edits("response-headers", &r.Response)
	if err := f.mapping(node, "a route", "key of a route", keys); err != nil {
		return r, err
	}
	for i := range r.Headers {
		if r.Headers[i].Value == "*" { // any
			r.Headers[i].Value = ""
		}
	}
	var bad *proxy.RouteError
	if err := r.Check(); errors.As(err, &bad) {
		return r, f.wrong(routeNode(node, bad), "%v", err)
	}
	return r, nil
}

// routeNode returns what an error about a route is about: the name of a header field, not its value.
func routeNode(node ast.Node, bad *proxy.RouteError) ast.Node {
	at := lookup(node, bad.Field)
	if part := child(at, bad.Part); bad.Part != "" && part != nil {
		at = part
	}
	if key := keyOf(at, bad.Name); bad.Name != "" && key != nil {
		return key
	}
	if list, ok := at.(*ast.SequenceNode); ok {
		for _, item := range list.Values {
			if item.GetToken().Value == bad.Name {
				return item
			}
		}
	}
	return at
}

// policy are the keys that services and routes have in common.
func (f *file) policy(p *proxy.Policy) map[string]func(ast.Node) error {
	return map[string]func(ast.Node) error{
		"request-timeout": ownLimit(f, "request-timeout", &p.RequestTimeout),
		"total-timeout":   ownLimit(f, "total-timeout", &p.TotalTimeout),
		"retries":         ownLimit(f, "retries", &p.Retries),
		"max-body":        ownLimit(f, "max-body", &p.MaxBody),
	}
}

// ownLimit is override for a limit: its 0 is none, which a package that is configured is told by less than 0.
func ownLimit[T int | int64 | time.Duration](f *file, key string, to *T) func(ast.Node) error {
	read := override(f, key, to)
	return func(node ast.Node) error {
		err := read(node)
		if *to == 0 {
			*to = -1
		}
		return err
	}
}

// override returns what reads a value that a flag of that name sets for all.
func override[T any](f *file, key string, to *T) func(ast.Node) error {
	return func(node ast.Node) error {
		flag := f.flags[key]
		text, err := f.judged(flag, key, node)
		if err != nil {
			return err
		}
		scan := kong.Scan().PushTyped(text, kong.FlagValueToken)
		if err := flag.Mapper.Decode(&kong.DecodeContext{Value: flag.Value, Scan: scan}, reflect.ValueOf(to).Elem()); err != nil {
			return f.wrong(node, "%s: %v", key, err)
		}
		return nil
	}
}

func (f *file) text(key string, to *string) func(ast.Node) error {
	return func(node ast.Node) (err error) {
		*to, err = f.scalar(key, node)
		return err
	}
}

func (f *file) path(key string, to *string) func(ast.Node) error {
	return func(node ast.Node) error {
		text, err := f.scalar(key, node)
		if err != nil {
			return err
		}
		if *to, err = parsePath(text); err != nil {
			return f.wrong(node, "%s: %v", key, err)
		}
		return nil
	}
}

func (f *file) onOff(key string, to *bool) func(ast.Node) error {
	return func(node ast.Node) error {
		text, err := f.scalar(key, node)
		if err != nil {
			return err
		}
		on, known := onOrOff(text)
		if !known {
			return f.wrong(node, "%s: %q is neither on nor off", key, text)
		}
		*to = on
		return nil
	}
}

func (f *file) texts(key string, to *[]string) func(ast.Node) error {
	return func(node ast.Node) error {
		list, ok := node.(*ast.SequenceNode)
		if !ok || len(list.Values) == 0 {
			return f.wrong(node, "%s must be a list of at least one, such as [a, b]", key)
		}
		for _, item := range list.Values {
			text, err := f.scalar(key, item)
			if err != nil {
				return err
			}
			*to = append(*to, text)
		}
		return nil
	}
}

// fields reads names and values of header fields.
func (f *file) fields(key string, to *[]proxy.Field) func(ast.Node) error {
	return func(node ast.Node) error {
		m, ok := node.(ast.MapNode)
		if !ok {
			return f.wrong(node, "%s must have names and values of header fields, such as {X-Env: test}", key)
		}
		for at := m.MapRange(); at.Next(); {
			name := at.Key().GetToken().Value
			for _, other := range *to {
				if strings.EqualFold(other.Name, name) {
					return f.wrong(at.Key(), "%s is there twice", name)
				}
			}
			value, err := f.scalar(name, at.Value())
			if err != nil {
				return err
			}
			*to = append(*to, proxy.Field{Name: name, Value: value})
		}
		return nil
	}
}

// edits reads what is done to header fields.
func (f *file) edits(key string, to *proxy.Edits) func(ast.Node) error {
	return func(node ast.Node) error {
		return f.mapping(node, key, "key of "+key, map[string]func(ast.Node) error{
			"set": f.fields("set", &to.Set), "add": f.fields("add", &to.Add), "remove": f.texts("remove", &to.Remove),
		})
	}
}
