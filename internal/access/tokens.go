package access

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"kerberos/registry"
)

// minToken is the shortest token in a file, in bytes: so many at random are guessed by nobody.
const minToken = 16

// grant is one entry of a tokens file: who it is for, and what they may do. It never changes.
type grant struct {
	name     string // of the entry
	admin    bool
	read     bool
	register []pattern
	networks []netip.Prefix
}

// may tells whether the rights of an entry cover a call.
func (g *grant) may(right registry.Right, service string) bool {
	return g.admin || right == registry.RightRead && g.read || right != registry.RightAdmin &&
		slices.ContainsFunc(g.register, func(p pattern) bool { return p.matches(service) })
}

// pattern is the name of a service, or how names begin.
type pattern struct {
	text   string
	prefix bool
}

func (p pattern) matches(service string) bool {
	return service == p.text || p.prefix && strings.HasPrefix(service, p.text)
}

// grants is a tokens file, ready to be asked. It never changes.
type grants struct {
	tokens       map[sum]*grant    // by the lookup sum of the token
	certificates map[string]*grant // by a name in a client's certificate
	secrets      bool              // there are tokens in it and not only their hashes
}

// ofCertificate is the entry for the first of a certificate's names that has one.
func (g *grants) ofCertificate(names []string) *grant {
	for _, name := range names {
		if found := g.certificates[name]; found != nil {
			return found
		}
	}
	return nil
}

// sum is a SHA-256.
type sum = [sha256.Size]byte

// keyring makes of tokens what they are looked up by: a hash of their SHA-256 and a key that this process draws at its start. The
// time that a look-up takes may tell something of how far two of these hashes agree; but who sends tokens cannot know the hash of
// any, and so learns nothing of another. So many tokens cost no more than one.
type keyring sum

func (k keyring) ofToken(token []byte) sum { return k.ofHash(sha256.Sum256(token)) }

func (k keyring) ofHash(hash sum) sum {
	return sha256.Sum256(append(append(make([]byte, 0, 2*sha256.Size), k[:]...), hash[:]...))
}

// What an entry may hold.
const entryKeys = "name, token, sha256, certificate, admin, read, register, networks"

// parseTokens reads a tokens file. Its errors say where in the file, what is wrong and what is allowed; they do not repeat what
// could be a token. taken are tokens that are no entry's.
func parseTokens(data []byte, k keyring, taken ...sum) (*grants, error) {
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, syntax(err)
	}
	docs := slices.DeleteFunc(file.Docs, func(d *ast.DocumentNode) bool { return d.Body == nil })
	if len(docs) == 0 {
		return nil, errors.New("1:1: the file is empty: it must be a list of entries")
	}
	if len(docs) > 1 {
		return nil, wrong(docs[1].Body, "there is a second document: the file must be one list of entries")
	}
	list, ok := docs[0].Body.(*ast.SequenceNode)
	if !ok || len(list.Values) == 0 {
		return nil, wrong(docs[0].Body, "the file must be a list of entries, each with a name: - name: NAME")
	}
	p := &parsing{
		grants: &grants{tokens: map[sum]*grant{}, certificates: map[string]*grant{}},
		key:    k, taken: taken, names: map[string]bool{},
	}
	for _, node := range list.Values {
		if err := p.entry(node); err != nil {
			return nil, err
		}
	}
	return p.grants, nil
}

// wrong is an error about what stands at a place of the file.
func wrong(at ast.Node, format string, args ...any) error {
	line, column := 1, 1
	if m, ok := at.(ast.MapNode); ok {
		if first := m.MapRange(); first.Next() {
			at = first.Key() // and not the colon behind it
		}
	}
	if t := at.GetToken(); t != nil && t.Position != nil {
		line, column = t.Position.Line, t.Position.Column
	}
	return fmt.Errorf("%d:%d: %w", line, column, fmt.Errorf(format, args...))
}

// syntax is what the parser says, without what it repeats of the file.
func syntax(err error) error {
	var e yaml.Error
	if !errors.As(err, &e) || e.GetToken() == nil || e.GetToken().Position == nil {
		return errors.New("the file is not YAML")
	}
	message, _, _ := strings.Cut(e.GetMessage(), `"`)
	return fmt.Errorf("%d:%d: not YAML: %s", e.GetToken().Position.Line, e.GetToken().Position.Column, strings.TrimRight(message, ": "))
}

// parsing is a tokens file while it is read.
type parsing struct {
	*grants
	key   keyring
	taken []sum
	names map[string]bool
}

func (p *parsing) entry(node ast.Node) error {
	m, ok := node.(ast.MapNode)
	if !ok {
		return wrong(node, "an entry must have keys and values; the keys are %s", entryKeys)
	}
	g := &grant{}
	seen := map[string]bool{}
	var who []string // token, sha256 and certificate, as far as they are there
	for at := m.MapRange(); at.Next(); {
		key, value := at.Key(), at.Value()
		name := key.GetToken().Value
		if !slices.Contains(strings.Split(entryKeys, ", "), name) {
			return wrong(key, "this is no key of an entry; allowed are %s", entryKeys)
		}
		if seen[name] {
			return wrong(key, "%s is there twice", name)
		}
		seen[name] = true
		var err error
		switch name {
		case "name":
			err = p.name(g, value)
		case "token", "sha256", "certificate":
			who = append(who, name)
			err = p.who(g, name, value)
		case "admin":
			g.admin, err = boolean(name, value)
		case "read":
			g.read, err = boolean(name, value)
		case "register":
			g.register, err = list(name, value, parsePattern)
		case "networks":
			g.networks, err = list(name, value, parseNetwork)
		}
		if err != nil {
			return err
		}
	}
	switch {
	case g.name == "":
		return wrong(node, "the entry has no name")
	case len(who) != 1:
		return wrong(node, "the entry must have one of token, sha256 and certificate, not %d of them", len(who))
	case !g.admin && !g.read && len(g.register) == 0:
		return wrong(node, "the entry has no right: give it admin: true, read: true or register: [SERVICE, PREFIX*]")
	case len(g.networks) > 0 && !g.admin && len(g.register) == 0:
		return wrong(node, "the entry has networks, but registers nothing that could point there")
	}
	return nil
}

func (p *parsing) name(g *grant, node ast.Node) error {
	text, err := scalar("name", node)
	if err != nil {
		return err
	}
	if registry.ValidName(text) != nil {
		return wrong(node, "name must be 1 to 128 of A-Z a-z 0-9 . _ ~ : -")
	}
	if p.names[text] {
		return wrong(node, "another entry has this name")
	}
	p.names[text] = true
	g.name = text
	return nil
}

// who reads what an entry is known by.
func (p *parsing) who(g *grant, key string, node ast.Node) error {
	text, err := scalar(key, node)
	if err != nil {
		return err
	}
	var hash sum
	switch key {
	case "certificate":
		if text == "" || len(text) > 255 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return wrong(node, "certificate must be a name as it stands in a client's certificate, of 1 to 255 bytes")
		}
		if p.certificates[text] != nil {
			return wrong(node, "another entry has this certificate")
		}
		p.certificates[text] = g
		return nil
	case "token":
		if len(text) < minToken || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return wrong(node, "token must be at least %d bytes of visible ASCII without spaces, as from: openssl rand -hex 32", minToken)
		}
		hash = sha256.Sum256([]byte(text))
		p.secrets = true
	case "sha256":
		raw, err := hex.DecodeString(text)
		if err != nil || len(raw) != len(hash) {
			return wrong(node, `sha256 must be 64 hexadecimal digits, as from: printf %%s "$TOKEN" | sha256sum`)
		}
		if hash = sum(raw); hash == sha256.Sum256(nil) {
			return wrong(node, "sha256 is that of nothing: the token was empty when it was made")
		}
	}
	at := p.key.ofHash(hash)
	if p.tokens[at] != nil || slices.Contains(p.taken, at) {
		return wrong(node, "another entry, or --token, has this token")
	}
	p.tokens[at] = g
	return nil
}

// scalar reads a value that is one word. What YAML takes for a number is one too: a hash may be all digits.
func scalar(key string, node ast.Node) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, nil
	}
	return "", wrong(node, "%s must be one word or a string in quotes", key)
}

func boolean(key string, node ast.Node) (bool, error) {
	if b, ok := node.(*ast.BoolNode); ok {
		return b.Value, nil
	}
	return false, wrong(node, "%s must be true or false", key)
}

// list reads a value that is a list of what parse reads.
func list[T any](key string, node ast.Node, parse func(string) (T, error)) ([]T, error) {
	sequence, ok := node.(*ast.SequenceNode)
	if !ok || len(sequence.Values) == 0 {
		return nil, wrong(node, "%s must be a list of at least one, such as [a, b]", key)
	}
	var all []T
	for _, item := range sequence.Values {
		text, err := scalar(key, item)
		if err != nil {
			return nil, err
		}
		value, err := parse(text)
		if err != nil {
			return nil, wrong(item, "%s: %w", key, err)
		}
		all = append(all, value)
	}
	return all, nil
}

// parsePattern reads the name of a service, or the beginning of names with a * behind it; * alone stands for all.
func parsePattern(text string) (pattern, error) {
	name, prefix := strings.CutSuffix(text, "*")
	if prefix && name == "" {
		return pattern{"", true}, nil
	}
	if registry.ValidName(name) != nil {
		return pattern{}, fmt.Errorf("%q must be the name of a service (1 to 128 of A-Z a-z 0-9 . _ ~ : -), or the beginning of names and a *", text)
	}
	return pattern{name, prefix}, nil
}

// parseNetwork reads a network or an address.
func parseNetwork(text string) (netip.Prefix, error) {
	if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	network, err := netip.ParsePrefix(text)
	if err != nil || network != network.Masked() {
		return netip.Prefix{}, fmt.Errorf("%q is neither a network (10.0.0.0/8, fd00::/8) nor an address (10.1.2.3, ::1)", text)
	}
	return network, nil
}
