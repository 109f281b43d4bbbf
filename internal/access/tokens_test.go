package access

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"kerberos/registry"
)

const secret = "0123456789abcdef-secret"

func hashOf(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

func TestParseTokens(t *testing.T) {
	g, err := parseTokens([]byte(`# who may do what
- name: ops   # with all rights
  token: "`+secret+`"
  admin: true
- {name: board, sha256: `+strings.ToUpper(hashOf("board-board-board"))+`, read: true, admin: false}
- name: users-team
  sha256: '`+hashOf("users-users-users")+`'
  register: [users, users-*]
  networks:
  - 10.0.0.0/8
  - 192.0.2.1
  - ::ffff:10.0.0.1
- name: 007
  token: 1234567890123456
  register: ["*"]
- name: ci
  certificate: spiffe://example.org/ci
  read: true
`), keyring{})
	if err != nil {
		t.Fatal(err)
	}
	find := func(token string) *grant { return g.tokens[keyring{}.ofToken([]byte(token))] }
	ops, board, users, all, ci := find(secret), find("board-board-board"), find("users-users-users"), find("1234567890123456"), g.ofCertificate([]string{"x", "spiffe://example.org/ci"})
	for name, g := range map[string]*grant{"ops": ops, "board": board, "users-team": users, "007": all, "ci": ci} {
		if g == nil || g.name != name {
			t.Fatalf("%s is %+v", name, g)
		}
	}
	if len(g.tokens) != 4 || !g.secrets || find("x") != nil || g.ofCertificate([]string{"ci", ""}) != nil {
		t.Errorf("%+v", g)
	}
	if fmt.Sprint(users.networks) != "[10.0.0.0/8 192.0.2.1/32 10.0.0.1/32]" {
		t.Error(users.networks)
	}
	for _, row := range []struct {
		g              *grant
		read, register string // services that it may, of those below
	}{
		{ops, "users users- users-eu user orders", "users users- users-eu user orders"},
		{board, "users users- users-eu user orders", ""},
		{users, "users users- users-eu", "users users- users-eu"},
		{all, "users users- users-eu user orders", "users users- users-eu user orders"},
		{ci, "users users- users-eu user orders", ""},
	} {
		for right, want := range map[registry.Right]string{registry.RightRead: row.read, registry.RightRegister: row.register} {
			var got []string
			for _, service := range strings.Fields("users users- users-eu user orders") {
				if row.g.may(right, service) {
					got = append(got, service)
				}
			}
			if strings.Join(got, " ") != want {
				t.Errorf("%s may %s %q, want %q", row.g.name, right, got, want)
			}
		}
		if row.g.may(registry.RightAdmin, "") != (row.g == ops) { // not who may register everything, either
			t.Errorf("%s may %s", row.g.name, registry.RightAdmin)
		}
	}
}

func TestTokensAreWrong(t *testing.T) {
	entry := func(lines ...string) string {
		return "- name: a\n  token: " + secret + "\n  admin: true\n- name: b\n  " + strings.Join(lines, "\n  ") + "\n"
	}
	good := "token: other-other-other"
	for _, row := range []struct{ name, text, want string }{
		{"empty", "", "1:1: the file is empty"},
		{"comments", "# nothing\n", "1:1: the file is empty"},
		{"null", "~", "1:1: the file must be a list"},
		{"an empty list", "[]", "1:1: the file must be a list"},
		{"a map", "name: a\n", "1:1: the file must be a list of entries"},
		{"a word", secret, "1:1: the file must be a list"},
		{"two documents", entry(good, "read: true") + "---\n- name: c\n", "8:1: there is a second document"},
		{"a word in the list", entry(good, "read: true") + "- " + secret, "7:3: an entry must have keys"},
		{"no YAML", "- name: a\n  token: \"" + secret + "\n", "2:10: not YAML: could not find end character of double-quoted text"},
		{"a token in the place of a key", entry(secret + ": x"), "5:3: this is no key of an entry; allowed are name, token, sha256,"},
		{"a key in capitals", entry("Token: x"), "5:3: this is no key"},
		{"no name", "- token: " + secret + "\n  admin: true\n", "1:3: the entry has no name"},
		{"no value", "- name:\n", "1:9: name must be one word"},
		{"name with a space", "- name: a b\n", "1:9: name must be 1 to 128 of"},
		{"the same name", "- name: a\n  admin: true\n  token: " + secret + "\n- name: a\n", "4:9: another entry has this name"},
		{"a key twice", entry("admin: true", "admin: true"), "6:3: admin is there twice"},
		{"no token", entry("admin: true"), "4:3: the entry must have one of token, sha256 and certificate, not 0"},
		{"two tokens", entry(good, "sha256: "+hashOf("x"), "admin: true"), "not 2 of them"},
		{"token and certificate", entry(good, "certificate: x", "admin: true"), "not 2 of them"},
		{"no right", entry(good), "4:3: the entry has no right: give it"},
		{"no right either", entry(good, "admin: false"), "has no right"},
		{"an empty token", entry(`token: ""`), "5:10: token must be at least 16 bytes"},
		{"a null token", entry("token:"), "token must be one word"},
		{"a short token", entry("token: 123456789012345"), "5:10: token must be at least 16 bytes"},
		{"a token with spaces", entry("token: 0123456789abcdef 0123"), "without spaces"},
		{"a token on lines", entry("token: |", "  0123456789abcdef"), "token must be one word"},
		{"a token with ü", entry("token: 0123456789abcdefü"), "visible ASCII"},
		{"the same token", entry("token: "+secret, "read: true"), "5:10: another entry, or --token, has this token"},
		{"the same token by its hash", entry("sha256: "+hashOf(secret), "read: true"), "5:11: another entry, or --token, has this token"},
		{"the token of --token", entry("token: taken-taken-taken", "read: true"), "5:10: another entry, or --token, has this token"},
		{"a short hash", entry("sha256: abcd"), "5:11: sha256 must be 64 hexadecimal digits"},
		{"a hash that is none", entry("sha256: " + strings.Repeat("x", 64)), "64 hexadecimal digits"},
		{"the hash of nothing", entry("sha256: " + hashOf("")), "that of nothing"},
		{"an empty certificate", entry(`certificate: ""`), "5:16: certificate must be a name"},
		{"a long certificate", entry("certificate: " + strings.Repeat("x", 256)), "255 bytes"},
		{"the same certificate", "- {name: a, certificate: x, read: true}\n- {name: b, certificate: x, read: true}\n", "2:26: another entry has this certificate"},
		{"admin is a word", entry(good, "admin: yes"), "6:10: admin must be true or false"},
		{"read is a list", entry(good, "read: [users]"), "6:9: read must be true or false"},
		{"register is a word", entry(good, "register: users"), "6:13: register must be a list of at least one"},
		{"register is empty", entry(good, "register: []"), "register must be a list of at least one"},
		{"a star in the middle", entry(good, "register: [users, a*b]"), `6:21: register: "a*b" must be the name of a service`},
		{"two stars", entry(good, "register: [users**]"), `"users**" must be`},
		{"a slash", entry(good, "register: [a/b]"), `"a/b" must be`},
		{"a list in the list", entry(good, "register: [[a]]"), "register must be one word"},
		{"a star without quotes", entry(good, "register: [*]"), "not YAML"},
		{"an alias", entry("token: &x other-other-other", "register: [*x]"), "token must be one word"},
		{"a tag", entry("token: !!str other-other-other"), "token must be one word"},
		{"a merge", entry("<<: {admin: true}"), "this is no key"},
		{"networks without a right to register", entry(good, "read: true", "networks: [10.0.0.0/8]"), "registers nothing"},
		{"a bad network", entry(good, "admin: true", "networks: [10.0.0/8]"), `7:14: networks: "10.0.0/8" is neither a network (10.0.0.0/8`},
		{"a network with bits behind its length", entry(good, "admin: true", "networks: [10.0.0.1/8]"), `"10.0.0.1/8" is neither`},
	} {
		_, err := parseTokens([]byte(row.text), keyring{}, keyring{}.ofToken([]byte("taken-taken-taken")))
		if err == nil || !strings.Contains(err.Error(), row.want) || !place.MatchString(err.Error()) {
			t.Errorf("%s: %v; want %q", row.name, err, row.want)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: a token is in %q", row.name, err)
		}
	}
}

var place = regexp.MustCompile(`^\d+:\d+: `)

// Whatever stands in a file, it is read or refused with a place in it, nobody has a right that it does not say, and no error
// repeats what could be a token.
func FuzzTokens(f *testing.F) {
	for _, text := range []string{
		"- name: a\n  token: SECRET\n  admin: true\n", "- {name: a, sha256: SECRET, read: true}", "- SECRET", "SECRET: SECRET", "- token: |SECRET\n",
		"- name: SECRET SECRET\n", "- name: a\n  certificate: SECRET\n  register: [\"*\"]\n  networks: [10.0.0.0/8]", "- &SECRET x\n- *SECRET\n", "%SECRET\n---\n",
		"- ! SECRET", "? SECRET\n: x", "- SECRET: x\n  SECRET: y\n", "- \"SECRET", "- [SECRET", "- {SECRET", "a: b\n\tSECRET", "- <<: SECRET", "--- |SECRET\n---\n- x", "- !<SECRET> x",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		text = strings.ReplaceAll(text, "SECRET", secret)
		g, err := parseTokens([]byte(text), keyring{})
		if err != nil {
			repeated := strings.Contains(err.Error(), secret) && !strings.Contains(text, "register") && !strings.Contains(text, "networks") // which say what is wrong
			if repeated || !place.MatchString(err.Error()) && err.Error() != "the file is not YAML" {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		if len(g.tokens)+len(g.certificates) == 0 {
			t.Fatalf("%q has no entry", text)
		}
		for _, g := range g.tokens {
			if g.name == "" || !g.admin && !g.read && len(g.register) == 0 {
				t.Fatalf("%q: %+v", text, g)
			}
			for _, n := range g.networks {
				if n == (netip.Prefix{}) {
					t.Fatalf("%q: %+v", text, g)
				}
			}
		}
	})
}

// A look-up does not become dearer with the number of tokens.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1, 10_000} {
		var text strings.Builder
		for i := range n {
			fmt.Fprintf(&text, "- {name: n%d, token: token-token-%05d, register: [users]}\n", i, i)
		}
		var k keyring
		g, err := parseTokens([]byte(text.String()), k)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint("tokens=", n), func(b *testing.B) {
			b.ReportAllocs()
			token := []byte("token-token-00000")
			for b.Loop() {
				if g.tokens[k.ofToken(token)] == nil {
					b.Fatal("not found")
				}
			}
		})
	}
}
