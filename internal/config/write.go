package config

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"kerberos/lb"
)

// gatewayFlags are the flags of a gateway, with their defaults.
func gatewayFlags() ([]*kong.Flag, error) {
	sources := &Sources{env: func(string) (string, bool) { return "", false }, noFile: true}
	var grammar struct {
		Run Gateway `cmd:"" default:"withargs"`
	}
	_, err := parseWith(&grammar, nil, sources)
	return sources.flags, err
}

// WriteDefaults writes a file that sets nothing: every setting with what it does and its default, those without one as comments.
func WriteDefaults(w io.Writer) error {
	flags, err := gatewayFlags()
	if err != nil {
		return err
	}
	var b strings.Builder
	group := ""
	for _, flag := range flags {
		key := Key(flag)
		if key == "" {
			continue
		}
		if flag.Group.Title != group {
			group = flag.Group.Title
			fmt.Fprintf(&b, "\n##### %s\n", strings.TrimSuffix(group, ":"))
		}
		fmt.Fprintf(&b, "\n# %s\n", flag.Help)
		if !flag.Tag.Has("live") {
			b.WriteString("# A change needs a restart.\n")
		}
		if flag.HasDefault {
			fmt.Fprintf(&b, "%s: %s\n", key, yamlValue(flag.Value))
		} else {
			fmt.Fprintf(&b, "# %s: %s\n", key, flag.FormatPlaceHolder())
		}
	}
	policy := flagMembers(flags, policyKeys...)
	fmt.Fprintf(&b, "\n##### Routes\n\n# %s\n# routes:\n", routesHelp)
	writeMembers(&b, "", true, append(routeMembers(), policy...))
	fmt.Fprintf(&b, "\n##### Services\n\n# %s\n# services:\n#   echo:\n", servicesHelp)
	writeMembers(&b, "    ", false, append(flagMembers(flags, serviceKeys...), policy...))
	b.WriteString("#     # How those instances are checked that have no check of their own.\n#     check:\n")
	writeMembers(&b, "      ", false, checkMembers())
	b.WriteString("#     instances:\n")
	writeMembers(&b, "    ", true, instanceMembers())
	_, err = io.WriteString(w, strings.TrimPrefix(b.String(), "\n"))
	return err
}

// yamlValue writes a default.
func yamlValue(v *kong.Value) string {
	text := v.Default
	if isList(v) {
		return "[" + strings.ReplaceAll(text, ",", ", ") + "]"
	}
	if strings.HasPrefix(text, ":") {
		return strconv.Quote(text)
	}
	return text
}

// WriteSchema writes a JSON schema of the file, for editors.
func WriteSchema(w io.Writer) error {
	flags, err := gatewayFlags()
	if err != nil {
		return err
	}
	properties := map[string]any{}
	for _, flag := range flags {
		if key := Key(flag); key != "" {
			properties[key] = schemaOf(flag)
		}
	}
	properties["routes"] = map[string]any{"description": routesHelp, "type": "array", "minItems": 1, "items": map[string]any{"anyOf": []any{
		map[string]any{"type": "string"}, routeSchema(overrides(properties, policyKeys...)),
	}}}
	service := overrides(properties, append(slices.Clone(serviceKeys), policyKeys...)...)
	service["check"] = checkSchema()
	service["instances"] = map[string]any{"type": "array", "minItems": 1, "items": instanceSchema()}
	properties["services"] = map[string]any{"description": servicesHelp, "type": "object", "additionalProperties": map[string]any{
		"type": "object", "additionalProperties": false, "properties": service,
	}}
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	return out.Encode(map[string]any{
		"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Settings of a kerberos gateway",
		"type": "object", "additionalProperties": false, "properties": properties,
	})
}

// schemaOf is the schema of one setting. What it lets through the gateway may still refuse.
func schemaOf(flag *kong.Flag) map[string]any {
	one := map[string]any{"type": []string{"string", "number"}} // YAML takes some words for numbers
	element := flag.Target.Type()
	if element.Kind() == reflect.Slice {
		element = element.Elem()
	}
	switch {
	case flag.Enum != "":
		one["enum"] = flag.EnumSlice()
	case element == reflect.TypeFor[lb.Strategy]():
		one["enum"] = lb.Strategies()
	case element == reflect.TypeFor[API]():
		one["enum"] = []API{APIData, APIAdmin, APIBoth}
	case element == reflect.TypeFor[Switch]():
		one = map[string]any{"enum": []any{true, false, "on", "off"}}
	case element == reflect.TypeFor[time.Duration]():
		one["pattern"] = `^([0-9.]+(ns|us|µs|ms|s|m|h))+$|^0$`
	case flag.Tag.Type == "size":
		one = map[string]any{"type": []string{"integer", "string"}, "pattern": "^[0-9]+(KiB|MiB|GiB)?$", "minimum": 0}
	case element == reflect.TypeFor[Share]():
		one = map[string]any{"type": []string{"integer", "string"}, "pattern": "^[0-9]+%?$", "minimum": 0}
	case element.Kind() == reflect.Int:
		one = map[string]any{"type": "integer"}
		if least, err := strconv.Atoi(flag.Tag.Get("min")); err == nil {
			one["minimum"] = least
		}
	}
	if isList(flag.Value) {
		one = map[string]any{"anyOf": []any{one, map[string]any{"type": "array", "minItems": 1, "items": one}}}
	}
	one["description"] = flag.Help
	if !flag.Tag.Has("live") {
		one["description"] = flag.Help + " A change needs a restart."
	}
	if flag.HasDefault {
		one["default"] = defaultOf(flag.Value)
	}
	return one
}

// defaultOf is a default as JSON has it.
func defaultOf(v *kong.Value) any {
	if isList(v) {
		return strings.Split(v.Default, ",")
	}
	if n, err := strconv.Atoi(v.Default); err == nil && slices.Contains([]reflect.Kind{reflect.Int, reflect.Int64}, v.Target.Kind()) {
		return n
	}
	return v.Default
}

// policyKeys are those that services and routes have in common, and serviceKeys those that services have besides. All are settings too.
var (
	policyKeys  = []string{"request-timeout", "total-timeout", "retries", "max-body"}
	serviceKeys = []string{"strategy", "breaker-failures", "breaker-open", "breaker-probes"}
)

// member is a key of a route, a service, a check or an instance.
type member struct {
	name   string
	value  string // its default, or an example
	help   string
	beside bool // it stands for another one: both exclude each other
	schema map[string]any
}

// flagMembers are settings as keys.
func flagMembers(flags []*kong.Flag, names ...string) []member {
	var all []member
	for _, name := range names {
		i := slices.IndexFunc(flags, func(flag *kong.Flag) bool { return flag.Name == name })
		all = append(all, member{name: name, value: yamlValue(flags[i].Value), help: flags[i].Help})
	}
	return all
}

// writeMembers writes keys as comments, each below what it is for. item says that they are an element of a list.
func writeMembers(b *strings.Builder, indent string, item bool, all []member) {
	for i, m := range all {
		begin := indent
		if item {
			begin += "  "
		}
		note := begin
		switch {
		case item && i == 0:
			note, begin = indent, indent+"- "
		case m.beside:
			begin += "# "
		}
		fmt.Fprintf(b, "# %s# %s\n# %s%s: %s\n", note, m.help, begin, m.name, m.value)
	}
}

// schemaOfMembers are their properties.
func schemaOfMembers(all []member) map[string]any {
	properties := map[string]any{}
	for _, m := range all {
		one := maps.Clone(m.schema)
		one["description"] = m.help
		properties[m.name] = one
	}
	return properties
}

// overrides are the schemas of settings without their defaults, for where they are set for a part of the traffic.
func overrides(properties map[string]any, names ...string) map[string]any {
	all := map[string]any{}
	for _, name := range names {
		one := maps.Clone(properties[name].(map[string]any))
		delete(one, "default")
		all[name] = one
	}
	return all
}

// routeMembers are the keys that only a route has.
func routeMembers() []member {
	text := map[string]any{"type": "string"}
	texts := map[string]any{"type": "array", "minItems": 1, "items": text}
	fields := map[string]any{"type": "object", "additionalProperties": map[string]any{"type": []string{"string", "number", "boolean"}}}
	edits := map[string]any{"type": "object", "additionalProperties": false, "properties": map[string]any{"set": fields, "add": fields, "remove": texts}}
	onOff := map[string]any{"enum": []any{true, false, "on", "off"}}
	return []member{
		{name: "service", value: "echo", help: "Where requests go that match; needed.", schema: text},
		{name: "host", value: `"*.example.com"`, help: "A name without a port, or *. and a name for all that end so; any without it.", schema: text},
		{name: "prefix", value: "/v1", help: "Whole segments with which the path begins; any path without it.", schema: text},
		{name: "path", value: "/v1/login", help: "All of the path, instead of prefix.", beside: true, schema: text},
		{name: "methods", value: "[GET, POST]", help: "Any of these, which are case-sensitive; all without it.", schema: texts},
		{name: "headers", value: `{X-Env: test, X-Debug: "*"}`, help: "Fields that must be there with this value, or any (\"*\").", schema: fields},
		{name: "strip-prefix", value: "off", help: "What prefix or path has matched is not sent.", schema: onOff},
		{name: "replace-prefix", value: "/v2", help: "But this is, in its place.", schema: text},
		{name: "request-headers", value: "{set: {X-Env: test}, add: {X-Tag: a}, remove: [Cookie]}", help: "What is done to the fields that a backend gets.", schema: edits},
		{name: "response-headers", value: "{remove: [Server]}", help: "What is done to the fields of a backend's response.", schema: edits},
	}
}

// routeSchema is the JSON schema of a route that is no text; keys are those that it has in common with services.
func routeSchema(keys map[string]any) map[string]any {
	maps.Copy(keys, schemaOfMembers(routeMembers()))
	return schemaObject(keys, "service")
}
