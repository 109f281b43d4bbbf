package config

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"kerberos/registry"
)

const servicesHelp = "Services by name, each with settings of its own (strategy, breaker-failures, breaker-open, breaker-probes, request-timeout, " +
	"total-timeout, retries, max-body), a check of the instances that register none, and instances that nobody registers. These are as the body of PUT /services/{service}/{id} has them, with the id: " +
	"id, addr, weight, metadata, check, slow_start. They stand beside those that register, and the API does not change them."

// readServices reads the mapping of services.
func (f *file) readServices(node ast.Node) error {
	m, ok := node.(ast.MapNode)
	if !ok {
		return f.wrong(node, "services must have the names of services as keys")
	}
	seen := map[string]bool{}
	for at := m.MapRange(); at.Next(); {
		s := Service{Name: at.Key().GetToken().Value}
		if err := registry.ValidName(s.Name); err != nil {
			return f.wrong(at.Key(), "the name of a service %v", err)
		}
		if seen[s.Name] {
			return f.wrong(at.Key(), "service %s is there twice", s.Name)
		}
		seen[s.Name] = true
		if _, null := at.Value().(*ast.NullNode); null {
			return f.wrong(at.Key(), "service %s has nothing in it: give it instances, or leave it out", s.Name)
		}
		keys := f.policy(&s.Settings.Policy)
		keys["instances"] = func(node ast.Node) error { return f.readInstances(&s, node) }
		keys["strategy"] = override(f, "strategy", &s.Settings.Strategy)
		keys["breaker-failures"] = override(f, "breaker-failures", &s.Settings.Breaker.Failures)
		keys["breaker-open"] = override(f, "breaker-open", &s.Settings.Breaker.OpenFor)
		keys["breaker-probes"] = override(f, "breaker-probes", &s.Settings.Breaker.Probes)
		keys["check"] = func(node ast.Node) error { return f.readCheck(&s, node) }
		err := f.mapping(at.Value(), "a service", "key of a service", keys)
		if err != nil {
			return err
		}
		f.services = append(f.services, s)
	}
	return nil
}

// readInstances reads the list of a service's instances.
func (f *file) readInstances(s *Service, node ast.Node) error {
	list, ok := node.(*ast.SequenceNode)
	if !ok || len(list.Values) == 0 {
		return f.wrong(node, "instances must be a list of at least one, such as [{id: a, addr: http://10.0.0.5:8080}]")
	}
	seen := map[string]bool{}
	for _, item := range list.Values {
		if _, ok := item.(ast.MapNode); !ok {
			return f.wrong(item, "an instance must have keys and values, such as {id: a, addr: http://10.0.0.5:8080}")
		}
		in, err := f.readInstance(s.Name, item)
		if err != nil {
			return err
		}
		if seen[in.ID] {
			return f.wrong(item, "instance %s of service %s is there twice", in.ID, s.Name)
		}
		seen[in.ID] = true
		s.Instances = append(s.Instances, in)
	}
	return nil
}

// readInstance has an instance be judged as the API does.
func (f *file) readInstance(service string, node ast.Node) (registry.Instance, error) {
	body, err := f.asJSON(node)
	if err != nil {
		return registry.Instance{}, err
	}
	in, err := registry.ReadInstance(service, body)
	var bad *registry.FieldError
	if errors.As(err, &bad) {
		message := bad.Error()
		if bad.Field == "" {
			message = bad.Detail
		}
		return in, f.wrong(lookup(node, bad.Field), "%s", message)
	}
	if err != nil {
		return in, f.wrong(node, "%v", err)
	}
	return in, nil
}

// readCheck has a check be judged as the API does.
func (f *file) readCheck(s *Service, node ast.Node) error {
	text, err := f.asJSON(node)
	if err != nil {
		return err
	}
	s.Settings.Check = &registry.Check{}
	err = s.Settings.Check.UnmarshalJSON(text)
	var bad *registry.FieldError
	if errors.As(err, &bad) {
		_, member, _ := strings.Cut(bad.Field, ".")
		return f.wrong(lookup(node, member), "%s", bad)
	}
	if err != nil {
		return f.wrong(node, "check: %v", err)
	}
	return nil
}

// asJSON is a part of the file as the API's parsers read it.
func (f *file) asJSON(node ast.Node) ([]byte, error) {
	if err := f.unique(node); err != nil {
		return nil, err
	}
	var value any
	if err := yaml.NodeToValue(node, &value); err != nil {
		return nil, f.syntax(err)
	}
	text, err := json.Marshal(value)
	if err != nil {
		return nil, f.wrong(node, "there cannot be such a value: %v", err)
	}
	return text, nil
}

// unique refuses a key that is there twice.
func (f *file) unique(node ast.Node) error {
	m, ok := node.(ast.MapNode)
	if !ok {
		return nil
	}
	seen := map[string]bool{}
	for at := m.MapRange(); at.Next(); {
		name := at.Key().GetToken().Value
		if seen[name] {
			return f.wrong(at.Key(), "%s is there twice", name)
		}
		seen[name] = true
		if err := f.unique(at.Value()); err != nil {
			return err
		}
	}
	return nil
}

// keyOf returns a key of a mapping, or nil.
func keyOf(node ast.Node, key string) ast.Node {
	m, ok := node.(ast.MapNode)
	if !ok {
		return nil
	}
	for at := m.MapRange(); at.Next(); {
		if at.Key().GetToken().Value == key {
			return at.Key()
		}
	}
	return nil
}

// child returns what stands below keys, one in the other, or nil.
func child(node ast.Node, keys ...string) ast.Node {
next:
	for _, key := range keys {
		m, ok := node.(ast.MapNode)
		if !ok {
			return nil
		}
		for at := m.MapRange(); at.Next(); {
			if at.Key().GetToken().Value == key {
				node = at.Value()
				continue next
			}
		}
		return nil
	}
	return node
}

// lookup returns what stands at a path of keys such as check.path, as far as it leads.
func lookup(node ast.Node, path string) ast.Node {
	first, rest, _ := strings.Cut(path, ".")
	m, ok := node.(ast.MapNode)
	if !ok || first == "" {
		return node
	}
	for at := m.MapRange(); at.Next(); {
		if at.Key().GetToken().Value != first {
			continue
		}
		if _, deeper := at.Value().(ast.MapNode); deeper || rest == "" {
			return lookup(at.Value(), rest)
		}
		return at.Value()
	}
	return node
}

// schemaObject is the JSON schema of an object that has no other properties than these.
func schemaObject(properties map[string]any, required ...string) map[string]any {
	o := map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	if len(required) > 0 {
		o["required"] = required
	}
	return o
}

// checkMembers are the keys of a check, with their defaults.
func checkMembers() []member {
	filled, err := registry.Check{Path: "/health"}.Filled()
	if err != nil {
		panic(err) // its path is one
	}
	text, count, onOff := map[string]any{"type": "string"}, map[string]any{"type": "integer", "minimum": 1}, map[string]any{"type": "boolean"}
	return []member{
		{name: "path", value: filled.Path, help: "It answers a GET of this, below the path of its addr.", schema: text},
		{name: "tcp", value: "true", help: "It accepts a connection, instead of path.", beside: true, schema: onOff},
		{name: "status", value: filled.Status, help: "Statuses that pass.", schema: text},
		{name: "interval", value: filled.Interval.String(), help: "From one check to the next.", schema: text},
		{name: "timeout", value: filled.Timeout.String(), help: "For the whole of one, at most the interval.", schema: text},
		{name: "fall", value: strconv.Itoa(filled.Fall), help: "So many that fail in a row take it out.", schema: count},
		{name: "rise", value: strconv.Itoa(filled.Rise), help: "So many that pass in a row bring it back.", schema: count},
		{name: "keep_alive", value: strconv.FormatBool(filled.KeepAlive), help: "One connection for many checks instead of one for each.", schema: onOff},
		{name: "start", value: string(filled.Start), help: "A new one gets requests after the first check that passes (down), or at once (up).",
			schema: map[string]any{"enum": []registry.CheckStart{registry.StartDown, registry.StartUp}}},
	}
}

// checkSchema is the JSON schema of a check.
func checkSchema() map[string]any { return schemaObject(schemaOfMembers(checkMembers())) }

// instanceMembers are the keys of an instance, with their defaults.
func instanceMembers() []member {
	text := map[string]any{"type": "string"}
	return []member{
		{name: "id", value: "a", help: "Its name within the service; needed.", schema: text},
		{name: "addr", value: "http://127.0.0.1:8081", help: "Where it is, with a path if it has one; needed.", schema: text},
		{name: "weight", value: "0", help: "Its part of the requests, for the weighted strategies; 0 is none.",
			schema: map[string]any{"type": "integer", "minimum": 0, "maximum": registry.MaxWeight}},
		{name: "metadata", value: "{zone: rack-1}", help: "What else is to be known of it.", schema: map[string]any{"type": "object", "additionalProperties": text}},
		{name: "check", value: "{tcp: true}", help: "A check of its own, with the keys above.", schema: checkSchema()},
		{name: "slow_start", value: "0s", help: "How long it takes to get its whole share when it has come.", schema: text},
	}
}

// instanceSchema is the JSON schema of an instance.
func instanceSchema() map[string]any {
	return schemaObject(schemaOfMembers(instanceMembers()), "id", "addr")
}
