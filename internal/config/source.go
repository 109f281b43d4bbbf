package config

import (
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/alecthomas/kong"
	"github.com/goccy/go-yaml/ast"

	"kerberos/internal/follow"
	"kerberos/proxy"
	"kerberos/registry"
)

// Sources is where the values of a command line come from. A command whose grammar has a Gateway can have it bound.
type Sources struct {
	env    func(string) (string, bool)
	noFile bool            // none is read
	flags  []*kong.Flag    // of the gateway; none if the command has none
	given  map[string]bool // on the command line
	file   *file           // nil: there is none
	seen   follow.Sum      // of what was read of it
}

// Seen is the fingerprint of File as it was read, or of DefaultFile if there is none; it is there beside an error too.
func (s *Sources) Seen() follow.Sum { return s.seen }

// Empty says that no file was read, or one without a setting.
func (s *Sources) Empty() bool { return s.file == nil || !s.file.filled }

// File is the name of the file that was read, or empty.
func (s *Sources) File() string {
	if s.file == nil {
		return ""
	}
	return s.file.name
}

// Setting is the value of one setting and where it comes from.
type Setting struct{ Name, Value, From string }

// Settings lists what is in force: each setting, and each key that the file has of routes and services. Tokens and values of header
// fields are not in it.
func (s *Sources) Settings() []Setting {
	var all []Setting
	for _, flag := range s.flags {
		if flag.Name == "help" || flag.Tag.Has("nofile") && flag.Name != "config" {
			continue
		}
		if flag.Name == "route" && s.file != nil && s.file.routesCount && s.file.routesAt > 0 {
			all = append(all, s.file.rows("routes")...)
			continue
		}
		from, value := s.from(flag), valueText(flag.Value)
		switch {
		case flag.Name == "config":
			value = s.File()
		case from == fromDefault:
			value = flag.Default
		case isSecret(flag):
			value = notShown
		}
		all = append(all, Setting{flag.Name, value, from})
	}
	if s.file != nil {
		all = append(all, s.file.rows("services")...)
	}
	return all
}

const notShown = "(not shown)"

// rows lists what stands below a key of the file.
func (f *file) rows(key string) []Setting {
	doc, err := f.document([]byte(strings.Join(f.lines, "\n")))
	if err != nil || doc == nil { // it was read before
		return nil
	}
	if node := child(doc, key); node != nil {
		return f.row(nil, key, node, key == "routes", false)
	}
	return nil
}

// row adds a row for each value in node, which is called name. A list of words is one value, unless each is to have its row.
// secret says that they may be secrets.
func (f *file) row(all []Setting, name string, node ast.Node, each, secret bool) []Setting {
	line, _ := place(node)
	value := ""
	switch n := node.(type) {
	case ast.MapNode:
		for at := n.MapRange(); at.Next(); {
			key := at.Key().GetToken().Value
			below := secret && key != "remove" || key == "headers" || key == "request-headers" || key == "response-headers"
			all = f.row(all, name+"."+key, at.Value(), false, below)
		}
		return all
	case *ast.SequenceNode:
		words := make([]string, len(n.Values))
		for i, item := range n.Values {
			word, err := f.scalar(name, item)
			if each = each || err != nil; each {
				break
			}
			words[i] = word
		}
		if each {
			for i, item := range n.Values {
				all = f.row(all, fmt.Sprintf("%s[%d]", name, i), item, false, secret)
			}
			return all
		}
		value = strings.Join(words, ",")
	case *ast.AnchorNode:
		return f.row(all, name, n.Value, each, secret)
	default:
		word, err := f.scalar(name, node)
		if err != nil {
			word = node.String()
		}
		value = word
	}
	switch {
	case secret && value != "*":
		value = notShown
	case strings.ContainsFunc(value, unicode.IsControl):
		value = strconv.Quote(value)
	}
	return append(all, Setting{name, value, fmt.Sprintf("%s:%d", f.name, line)})
}

// isSecret says that nobody is to see what a flag is set to.
func isSecret(flag *kong.Flag) bool { return flag.Tag.Type == "token" }

// At has an error about a route or an instance of the file tell where that stands. Any other is returned as it is.
func (s *Sources) At(err error) error {
	var route *proxy.TableError
	var instance *registry.PinError
	switch {
	case errors.As(err, &route):
		return s.atRoute(route.Index, "", err)
	case errors.As(err, &instance):
		return s.atInstance(instance)
	}
	return err
}

// atRoute is At for a route of the table, and one of its keys if it has that.
func (s *Sources) atRoute(index int, key string, err error) error {
	if s == nil || s.file == nil || !s.file.routesCount {
		return err
	}
	return s.file.at(err, func(doc ast.Node) ast.Node {
		if list, ok := child(doc, "routes").(*ast.SequenceNode); ok && index < len(list.Values) {
			return lookup(list.Values[index], key)
		}
		return nil
	})
}

// atService is At for a service.
func (s *Sources) atService(name string, err error) error {
	if s == nil || s.file == nil {
		return err
	}
	return s.file.at(err, func(doc ast.Node) ast.Node { return keyOf(child(doc, "services"), name) })
}

// atInstance is At for an instance.
func (s *Sources) atInstance(err *registry.PinError) error {
	if s == nil || s.file == nil {
		return err
	}
	return s.file.at(err, func(doc ast.Node) ast.Node {
		for _, service := range s.file.services {
			list, ok := child(child(doc, "services"), service.Name, "instances").(*ast.SequenceNode)
			i := slices.IndexFunc(service.Instances, func(in registry.Instance) bool { return in.ID == err.ID })
			if service.Name != err.Service || !ok || i < 0 || i >= len(list.Values) {
				continue
			}
			var field *registry.FieldError
			if errors.As(err, &field) {
				return lookup(list.Values[i], field.Field)
			}
			return list.Values[i]
		}
		return nil
	})
}

// at adds to an error the place of what find returns. It parses the file anew: what stands where is not kept while all is well.
func (f *file) at(err error, find func(doc ast.Node) ast.Node) error {
	if errors.As(err, new(*FileError)) {
		return err
	}
	doc, failed := f.document([]byte(strings.Join(f.lines, "\n")))
	if failed != nil || doc == nil {
		return err
	}
	node := find(doc)
	if node == nil {
		return err
	}
	return f.wrong(node, "%s", strings.TrimPrefix(err.Error(), "--route: "))
}

// Changes lists the settings that differ between what is in force and what is read next: those that can change while a gateway
// runs, and those that cannot.
func Changes(now, next *Sources) (live, fixed []string) {
	for i, flag := range now.flags {
		a, b := flag.Target.Interface(), next.flags[i].Target.Interface()
		if ca, ok := a.(Authorities); ok { // which are read once
			a, b = ca.File, b.(Authorities).File
		}
		switch {
		case reflect.DeepEqual(a, b):
		case flag.Tag.Has("live"):
			live = append(live, flag.Name)
		default:
			fixed = append(fixed, flag.Name)
		}
	}
	if !reflect.DeepEqual(now.services(), next.services()) {
		live = append(live, "services")
	}
	return live, fixed
}

func (s *Sources) services() []Service {
	if s.file == nil {
		return nil
	}
	return s.file.services
}

// from says where the value of a flag comes from.
func (s *Sources) from(flag *kong.Flag) string {
	if s.given[flag.Name] {
		return "flag"
	}
	if name, _ := s.variable(flag); name != "" {
		return "env " + name
	}
	if s.file != nil {
		if line := s.file.lineOf(flag); line > 0 {
			return fmt.Sprintf("%s:%d", s.file.name, line)
		}
	}
	return fromDefault
}

const fromDefault = "default"

// lineOf is where a file sets a flag; 0 if it does not.
func (f *file) lineOf(flag *kong.Flag) int {
	if flag.Name == "route" {
		return f.routesAt
	}
	return f.values[Key(flag)].line
}

// variable is the variable that sets a flag, and its value.
func (s *Sources) variable(flag *kong.Flag) (name, value string) {
	for _, name := range Variables(flag) {
		if value, _ := s.env(name); value != "" {
			return name, value
		}
	}
	return "", ""
}

// read reads the file of settings for a command that has them.
func (s *Sources) read(ctx *kong.Context) error {
	s.given = map[string]bool{}
	for _, p := range ctx.Path {
		if p.Flag != nil {
			s.given[p.Flag.Name] = true
		}
	}
	named := ""
	for _, flag := range ctx.Flags() {
		if flag.Group == nil { // of the application, or of a command beside the settings
			continue
		}
		s.flags = append(s.flags, flag)
		if flag.Name == "config" {
			named, _ = ctx.FlagValue(flag).(string)
			if name, value := s.variable(flag); named == "" && name != "" {
				named = value
			}
		}
	}
	if s.noFile {
		return nil
	}
	name := named
	if name == "" {
		name = DefaultFile
	}
	data, err := follow.Read(name)
	s.seen = follow.Of(data, err)
	if named == "" && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	s.file, err = parseSettings(name, data, s.flags)
	return err
}

// resolve returns what a flag is set to that the command line leaves out, or nil. A value is decoded here once for nothing but
// its error, which can name the variable only here.
func (s *Sources) resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	if name, value := s.variable(flag); name != "" {
		if err := judge(flag.Value, value); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return value, nil
	}
	if s.file != nil && slices.Contains(s.flags, flag) {
		if set, ok := s.file.values[Key(flag)]; ok {
			return set.text, nil
		}
	}
	return nil, nil
}

// judge decodes a value for nothing but its error.
func judge(v *kong.Value, text string) error {
	scan := kong.Scan().PushTyped(text, kong.FlagValueToken)
	scratch := reflect.New(v.Target.Type()).Elem()
	if err := v.Mapper.Decode(&kong.DecodeContext{Value: v, Scan: scan}, scratch); err != nil {
		return err
	}
	if v.Enum != "" && !slices.Contains(v.EnumSlice(), text) {
		return fmt.Errorf("%q is not one of %s", text, strings.Join(v.EnumSlice(), ", "))
	}
	return nil
}

// isList says that a flag takes several values.
func isList(v *kong.Value) bool {
	return v.Target.Kind() == reflect.Slice || v.Target.Type() == reflect.TypeFor[Allow]()
}

// valueText writes the value of a flag as it could be given.
func valueText(v *kong.Value) string {
	switch {
	case v.Tag.Type == "size":
		return sizeText(v.Target.Int())
	case v.Target.Type() == reflect.TypeFor[[]Route]():
		var words []string
		for _, r := range v.Target.Interface().([]Route) {
			words = append(words, routeText(r))
		}
		return strings.Join(words, ",")
	case v.Target.Kind() == reflect.Slice:
		if v.Target.Len() == 0 {
			return "none"
		}
		words := make([]string, v.Target.Len())
		for i := range words {
			words[i] = fmt.Sprint(v.Target.Index(i).Interface())
		}
		return strings.Join(words, ",")
	}
	return fmt.Sprint(v.Target.Interface())
}
