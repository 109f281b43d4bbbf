package config

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// DefaultFile is read where neither --config nor its variable names another, if it is there.
const DefaultFile = "kerberos.yaml"

// file is a file of settings that was read, and what it holds by key.
type file struct {
	name   string // as it was given
	lines  []string
	flags  map[string]*kong.Flag // by key
	values map[string]setting
	filled bool // there is a setting, routes or services

	routes      []Route
	routesAt    int  // the line; 0: it has none
	routesCount bool // no flag or variable has others
	services    []Service

	hidden map[int]bool // lines that may show a secret; nil: nobody knows, the file is not YAML
}

// setting is what a file says of one flag.
type setting struct {
	line int
	text string // as a flag would have it
}

// FileError is what is wrong with a file of settings. It shows the line, unless that may hold a secret: a token, or the value of
// a header field.
type FileError struct {
	File         string
	Line, Column int // from 1
	Text         string
	Message      string // what is wrong, and what is allowed
}

func (e *FileError) Error() string {
	place := fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
	if strings.TrimSpace(e.Text) == "" {
		return place
	}
	number := fmt.Sprint(e.Line)
	text := strings.ReplaceAll(e.Text, "\t", " ")
	return fmt.Sprintf("%s\n  %s | %s\n  %*s | %*s^", place, number, text, len(number), "", max(e.Column-1, 0), "")
}

// parseSettings judges all of a file: a setting that a flag or a variable covers must be right too.
func parseSettings(name string, data []byte, flags []*kong.Flag) (*file, error) {
	// All line ends are one, as in YAML (section 5.4): the parser counts \r\n twice within quotes, and the lines would not be those that
	// hide has noted.
	data = []byte(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(string(data)))
	f := &file{name: name, lines: strings.Split(string(data), "\n"), flags: map[string]*kong.Flag{}, values: map[string]setting{}}
	doc, err := f.document(data)
	if err != nil || doc == nil {
		return f, err
	}
	keys := map[string]func(ast.Node) error{}
	for _, flag := range flags {
		if key := Key(flag); key != "" {
			f.flags[key] = flag
			keys[key] = func(node ast.Node) error { return f.setting(flag, key, node) }
		}
	}
	keys["routes"] = f.readRoutes
	keys["services"] = f.readServices
	if m, ok := doc.(ast.MapNode); ok {
		f.filled = m.MapRange().Next()
	}
	return f, f.mapping(doc, "the file", "setting", keys)
}

// Key is the name of a flag in a file; empty if it has none.
func Key(flag *kong.Flag) string {
	if flag.Name == "help" || flag.Name == "route" || flag.Tag.Has("nofile") {
		return ""
	}
	return flag.Name
}

// document returns what a file of one document holds; nil for nothing.
func (f *file) document(data []byte) (doc ast.Node, err error) {
	defer func() {
		if recover() != nil { // whatever the parser meets, a gateway that reads the file again goes on
			doc, err = nil, fmt.Errorf("%s is not YAML", f.name)
		}
	}()
	parsed, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, f.syntax(err)
	}
	for _, d := range parsed.Docs {
		switch {
		case d.Body == nil:
		case doc != nil:
			return nil, f.wrong(d.Body, "there is a second document: the file must be one")
		default:
			doc = d.Body
		}
	}
	if _, null := doc.(*ast.NullNode); null {
		return nil, nil
	}
	f.hidden = map[int]bool{}
	f.hide(doc, true, false)
	return doc, nil
}

// hide notes the lines on which a token stands, or the value of a header field. top says that node is all of the file, and secret
// that what is in it may be one, but for its keys.
func (f *file) hide(node ast.Node, top, secret bool) {
	switch n := node.(type) {
	case nil: // the file is empty
	case ast.MapNode:
		for at := n.MapRange(); at.Next(); {
			name := strings.ToLower(at.Key().GetToken().Value)
			if top && strings.HasPrefix(name, "token") {
				f.hideAll(at.Value(), at.Key())
				continue
			}
			below := strings.Contains(name, "header") || name == "set" || name == "add" // of request-haeders too
			f.hide(at.Value(), false, below || secret && name != "remove")
		}
	case *ast.AnchorNode:
		f.hide(n.Value, top, secret)
	case *ast.TagNode:
		f.hide(n.Value, top, secret)
	case *ast.SequenceNode:
		for _, item := range n.Values {
			f.hide(item, false, secret)
		}
	default:
		if t := node.GetToken(); secret && (t == nil || t.Value != "*") { // which is any value
			f.hideAll(node, node)
		}
	}
}

// hideAll notes the lines from one node to the end of another. The lines of what stands before and behind it are among them where
// it has several: how the parser counts those is not relied on.
func (f *file) hideAll(node, from ast.Node) {
	if node == nil {
		node = from
	}
	first, last := from.GetToken(), lastToken(node)
	if first == nil || first.Position == nil || last == nil || last.Position == nil { // whatever it is, nothing is shown
		for line := range f.lines {
			f.hidden[line+1] = true
		}
		return
	}
	begin, end := first.Position.Line, last.Position.Line
	if begin != end || strings.Contains(strings.TrimSpace(last.Origin), "\n") {
		if first.Prev != nil {
			begin = min(begin, first.Prev.Position.Line)
		}
		end = len(f.lines)
		if last.Next != nil {
			end = max(last.Position.Line, last.Next.Position.Line)
		}
	}
	for line := begin; line <= end; line++ {
		f.hidden[line] = true
	}
}

// lastToken is the last one of a node.
func lastToken(node ast.Node) *token.Token {
	switch n := node.(type) {
	case ast.MapNode:
		last := node.GetToken()
		for at := n.MapRange(); at.Next(); {
			last = lastToken(at.Value())
		}
		return last
	case *ast.SequenceNode:
		if len(n.Values) > 0 {
			return lastToken(n.Values[len(n.Values)-1])
		}
	case *ast.LiteralNode:
		return n.Value.GetToken()
	case *ast.AnchorNode:
		return lastToken(n.Value)
	case *ast.TagNode:
		return lastToken(n.Value)
	}
	return node.GetToken()
}

// syntax is what the parser says, without what it repeats of the file.
func (f *file) syntax(err error) error {
	var e yaml.Error
	if !errors.As(err, &e) || e.GetToken() == nil || e.GetToken().Position == nil {
		return fmt.Errorf("%s is not YAML", f.name)
	}
	message, _, _ := strings.Cut(e.GetMessage(), `"`)
	at := e.GetToken().Position
	return f.wrongAt(at.Line, at.Column, "not YAML: "+strings.TrimRight(message, ": "))
}

// wrong is an error about what stands at a place of the file.
func (f *file) wrong(at ast.Node, format string, args ...any) error {
	line, column := place(at)
	return f.wrongAt(line, column, fmt.Sprintf(format, args...))
}

func (f *file) wrongAt(line, column int, message string) error {
	e := &FileError{File: f.name, Line: line, Column: column, Message: message}
	if line <= len(f.lines) && !f.secret(line) {
		e.Text = f.lines[line-1]
	}
	return e
}

// secret says that a line may be part of a token, or of the value of a header field. In a file that is not YAML those lines below
// which it stands tell.
func (f *file) secret(line int) bool {
	if f.hidden != nil {
		return f.hidden[line]
	}
	for indent := math.MaxInt; line > 0 && indent > 0; line-- {
		text := strings.TrimLeft(f.lines[line-1], " -")
		own := len(f.lines[line-1]) - len(text)
		if own >= indent || strings.TrimSpace(text) == "" || text[0] == '#' {
			continue
		}
		indent = own
		text = strings.TrimLeft(text, `"'`)
		if own == 0 && (strings.HasPrefix(text, "token") || strings.ContainsRune("{?", rune(text[0]))) || strings.Contains(text, "headers") {
			return true
		}
	}
	return false
}

func place(at ast.Node) (line, column int) {
	if m, ok := at.(ast.MapNode); ok {
		if first := m.MapRange(); first.Next() {
			at = first.Key() // and not the colon behind it
		}
	}
	if t := at.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line, t.Position.Column
	}
	return 1, 1
}

// mapping reads keys and values, each key once. what is the whole, and one of it is called each.
func (f *file) mapping(node ast.Node, what, each string, keys map[string]func(ast.Node) error) error {
	m, ok := node.(ast.MapNode)
	if !ok {
		return f.wrong(node, "%s must have keys and values", what)
	}
	seen := map[string]bool{}
	for at := m.MapRange(); at.Next(); {
		name := at.Key().GetToken().Value
		read := keys[name]
		switch {
		case read == nil:
			return f.wrong(at.Key(), "%q is no %s; %s", name, each, allowed(name, keys))
		case seen[name]:
			return f.wrong(at.Key(), "%s is there twice", name)
		}
		seen[name] = true
		if _, null := at.Value().(*ast.NullNode); null {
			return f.wrong(at.Key(), "%s has no value: give it one, or leave it out", name)
		}
		if err := read(at.Value()); err != nil {
			return err
		}
	}
	return nil
}

// allowed names the keys that there are, or if there are too many to read, those that a mistyped one may stand for.
func allowed[T any](name string, keys map[string]T) string {
	var all, near []string
	for key := range keys {
		all = append(all, key)
		if distance(name, key) <= 2 || len(name) > 2 && strings.Contains(key, name) {
			near = append(near, key)
		}
	}
	slices.Sort(all)
	slices.Sort(near)
	switch {
	case len(all) <= 24:
		return "allowed are " + strings.Join(all, ", ")
	case len(near) > 0:
		return "there is " + strings.Join(near, ", ")
	}
	return "kerberos config --default lists all"
}

// distance is how many characters have to be added, dropped or replaced to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0] // of the row above, one to the left
		row[0] = i + 1
		for j := range len(b) {
			cost := before
			if a[i] != b[j] {
				cost++
			}
			before = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// setting reads the value of a flag, judged as that is.
func (f *file) setting(flag *kong.Flag, key string, node ast.Node) error {
	line, _ := place(node)
	items := []ast.Node{node}
	if list, ok := node.(*ast.SequenceNode); ok {
		if !isList(flag.Value) {
			return f.wrong(node, "%s must be one value", key)
		}
		if items = list.Values; len(items) == 0 {
			return f.wrong(node, "%s is an empty list: leave it out for the default", key)
		}
	}
	words := make([]string, len(items))
	for i, item := range items {
		text, err := f.judged(flag, key, item)
		if err != nil {
			return err
		}
		words[i] = text
	}
	text := words[0]
	if len(items) > 1 {
		text = strings.Join(words, ",")
		if err := judge(flag.Value, text); err != nil { // together they may exclude each other
			return f.wrong(node, "%s: %v", key, err)
		}
	}
	f.values[key] = setting{line, text}
	return nil
}

// judged reads one value as a flag takes it.
func (f *file) judged(flag *kong.Flag, key string, node ast.Node) (string, error) {
	text, err := f.scalar(key, node)
	if err != nil {
		return "", err
	}
	if err := judge(flag.Value, text); err != nil {
		return "", f.wrong(node, "%s: %v", key, err)
	}
	return text, nil
}

// scalar reads a value that is one word. What YAML takes for a number or a switch is one too.
func (f *file) scalar(key string, node ast.Node) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.LiteralNode:
		return n.Value.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, nil
	}
	return "", f.wrong(node, "%s must be one word or a string in quotes", key)
}
