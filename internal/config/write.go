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
	b.WriteString("\n##### Routes\n\n# " + routesHelp + "\n# routes: [PREFIX=SERVICE, {host: HOST, prefix: /PREFIX, service: SERVICE}, /*]\n")
	b.WriteString("\n##### Services\n\n# " + servicesHelp + "\n# services:\n#   NAME:\n#     instances: [{id: ID, addr: http://HOST:PORT}]\n")
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
	service := overrides(properties, append([]string{"strategy", "breaker-failures", "breaker-open", "breaker-probes"}, policyKeys...)...)
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

// policyKeys are those that services and routes have in common.
var policyKeys = []string{"request-timeout", "total-timeout", "retries", "max-body"}

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

// routeSchema is the JSON schema of a route that is no text; keys are those that it has in common with services.
func routeSchema(keys map[string]any) map[string]any {
	text := map[string]any{"type": "string"}
	texts := map[string]any{"type": "array", "minItems": 1, "items": text}
	fields := map[string]any{"type": "object", "additionalProperties": map[string]any{"type": []string{"string", "number", "boolean"}}}
	edits := map[string]any{"type": "object", "additionalProperties": false, "properties": map[string]any{"set": fields, "add": fields, "remove": texts}}
	for _, name := range []string{"host", "path", "prefix", "service", "replace-prefix"} {
		keys[name] = text
	}
	keys["strip-prefix"] = map[string]any{"enum": []any{true, false, "on", "off"}}
	keys["methods"], keys["headers"], keys["request-headers"], keys["response-headers"] = texts, fields, edits, edits
	return map[string]any{"type": "object", "additionalProperties": false, "properties": keys, "required": []string{"service"}}
}
