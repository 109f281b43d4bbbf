package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"kerberos/cb"
	"kerberos/lb"
	"kerberos/proxy"
	"kerberos/registry"
)

// written writes a file of settings and returns its name.
func written(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "kerberos.yaml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// load loads a file, with more arguments and only env as environment.
func load(t *testing.T, text string, env map[string]string, args ...string) (Gateway, *Sources, error) {
	t.Helper()
	return Load(append([]string{"--config", written(t, text)}, args...), func(name string) (string, bool) { v, ok := env[name]; return v, ok })
}

func TestFile(t *testing.T) {
	got, sources, err := load(t, `
# a comment
listen: "127.0.0.1:0"
retries: 3
breaker-failures: 7
request-timeout: 90s
request-id: true
via: off
strategy: ip-hash
trusted-proxies: [10.0.0.0/8, "::1"]
breaker-statuses: 500,503
allow-methods:
- TRACE
- CONNECT
max-body: 2MiB
routes: [/a=b, /*]
`, map[string]string{"KERBEROS_RETRIES": "4", "BREAKER_FAILURES": "8"}, "--breaker-failures=9")
	if err != nil {
		t.Fatal(err)
	}
	want, err := Defaults()
	if err != nil {
		t.Fatal(err)
	}
	want.File = got.Config
	want.Config, want.Listen, want.Retries, want.BreakerFailures, want.RequestTimeout = got.Config, "127.0.0.1:0", 4, 9, 90*time.Second
	want.RequestID, want.Via, want.Strategy, want.TrustedProxies = true, false, lb.IPHash, prefixes("10.0.0.0/8", "::1/128")
	want.BreakerStatuses, want.AllowMethods, want.MaxBody = []int{500, 503}, []string{"TRACE", "CONNECT"}, 2<<20
	want.Route = []Route{{Prefix: "/a", Service: "b"}, {Prefix: "/*", Service: ""}}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(prefixes("::/0")[0])); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	from := map[string]string{}
	for _, s := range sources.Settings() {
		from[s.Name] = s.Value + " from " + strings.Replace(s.From, got.Config, "FILE", 1)
	}
	for name, want := range map[string]string{
		"config": got.Config + " from flag", "retries": "4 from env KERBEROS_RETRIES", "breaker-failures": "9 from flag", "max-fields": "200 from default",
		"request-timeout": "1m30s from FILE:6", "via": "off from FILE:8", "trusted-proxies": "10.0.0.0/8,::1/128 from FILE:10",
		"allow-methods": "TRACE,CONNECT from FILE:13", "max-body": "2MiB from FILE:15", "routes[0]": "/a=b from FILE:16", "routes[1]": "/* from FILE:16",
	} {
		if from[name] != want {
			t.Errorf("%s: %q, want %q", name, from[name], want)
		}
	}
}

// A file may say nothing.
func TestFileEmpty(t *testing.T) {
	for _, text := range []string{"", "\n", "# a comment\n", "---\n", "null", "---\n---\nvia: on"} {
		if got, sources, err := load(t, text, nil); err != nil || got.Retries != 2 || len(sources.Settings()) < 50 {
			t.Errorf("%q: %d retries, %v", text, got.Retries, err)
		}
	}
}

func TestFileRoutesAndFlags(t *testing.T) {
	got, _, err := load(t, "routes: [/a=b]", nil, "--route", "/c=d")
	if err != nil || !cmp.Equal(got.Route, []Route{{Prefix: "/c", Service: "d"}}) {
		t.Errorf("%v, %v, want the route of the flag", got.Route, err)
	}
}

func TestFileOfWorkingDirectory(t *testing.T) {
	none := func(string) (string, bool) { return "", false }
	t.Chdir(t.TempDir())
	if got, sources, err := Load(nil, none); err != nil || got.Retries != 2 || sources.File() != "" {
		t.Errorf("without a file: %d retries, file %q, %v", got.Retries, sources.File(), err)
	}
	if err := os.WriteFile(DefaultFile, []byte("retries: 5"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, sources, err := Load(nil, none); err != nil || got.Retries != 5 || sources.File() != DefaultFile {
		t.Errorf("with one: %d retries, file %q, %v", got.Retries, sources.File(), err)
	}
	if got, err := Defaults(); err != nil || got.Retries != 2 {
		t.Errorf("Defaults: %d retries, %v", got.Retries, err)
	}
	other := written(t, "retries: 6")
	variable := func(name string) (string, bool) {
		v, ok := map[string]string{"KERBEROS_CONFIG": other}[name]
		return v, ok
	}
	if got, sources, err := Load(nil, variable); err != nil || got.Retries != 6 || sources.File() != other {
		t.Errorf("with another in the variable: %d retries, file %q, %v", got.Retries, sources.File(), err)
	}
	if _, _, err := Load([]string{"--config", "nowhere.yaml"}, none); err == nil || !strings.Contains(err.Error(), "--config: ") || !strings.Contains(err.Error(), "nowhere.yaml") {
		t.Errorf("one that is not there: %v", err)
	}
	if _, _, err := Load([]string{"--config", "."}, none); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a directory: %v", err)
	}
}

func TestFileRefused(t *testing.T) {
	for _, test := range []struct {
		text string
		want string // behind the name of the file
	}{
		{"retries: two", ":1:10: retries: \"two\" is not a whole number of at least 0\n  1 | retries: two\n    |          ^"},
		{"\nrequest-timout: 5s", ":2:1: \"request-timout\" is no setting; there is request-timeout\n  2 | request-timout: 5s\n    | ^"},
		{"timeout: 5s", ":1:1: \"timeout\" is no setting; there is client-body-timeout, "},
		{"speed: 5", ":1:1: \"speed\" is no setting; kerberos config --default lists all\n"},
		{"config: other.yaml", ":1:1: \"config\" is no setting; "},
		{"route: /a=b", ":1:1: \"route\" is no setting; there is routes\n"},
		{"retries: 1\nvia: on\nretries: 2", ":3:1: retries is there twice\n"},
		{"token: &x\nvia: 2", ":1:"},
		{"routes: [{service: a, headers: {x: &y }}]", ":1:3"},
		{"retries:", ":1:1: retries has no value: give it one, or leave it out\n"},
		{"retries: [1, 2]", ":1:10: retries must be one value\n"},
		{"retries: {a: b}", ":1:11: retries must be one word or a string in quotes\n"},
		{"allow-methods: []", ":1:16: allow-methods is an empty list"},
		{"allow-methods: [TRACE, GET]", ":1:24: allow-methods: \"GET\" is neither CONNECT nor TRACE, the methods that need it\n  1 | allow-methods: [TRACE, GET]\n    |                        ^"},
		{"api-allow: [none, \"::1\"]", ":1:12: api-allow: \"none,::1\": none stands alone\n"},
		{"ambiguous-paths: allow", ":1:18: ambiguous-paths: \"allow\" is not one of refuse, pass, normalize\n"},
		{"- retries: 1", ":1:1: the file must have keys and values\n"},
		{"word", ":1:1: the file must have keys and values\n"},
		{"retries: 1\n---\nretries: 2", ":3:1: there is a second document: the file must be one\n"},
		{"retries: 1\n  via: on", ":1:10: not YAML: "},
		{"routes: [{}]", ":1:10: service: is missing"},
		{"routes: [{service: a, speed: 1}]", ":1:23: \"speed\" is no key of a route; allowed are headers, host, max-body, methods, path, prefix, replace-prefix, request-headers, request-timeout, response-headers, retries, service, strip-prefix, total-timeout\n"},
		{"routes:\n- prefix: api\n  service: a", ":2:11: prefix: \"api\" is not a path: it starts with /\n  2 | - prefix: api\n    |           ^"},
		{"routes: [{service: a, path: /a/../b}]", ":1:29: path: \"/a/../b\" has the segment .."},
		{"routes: [{service: a, path: /a, prefix: /a}]", ":1:29: path: there is a prefix too"},
		{"routes: [{service: a, host: \"a:80\"}]", ":1:29: host: \"a:80\" is neither a name"},
		{"routes: [{service: a, methods: GET}]", ":1:32: methods must be a list"},
		{"routes: [{service: a, retries: -1}]", ":1:32: retries: \"-1\" is not a whole number of at least 0"},
		{"routes: [{service: a, strip-prefix: maybe}]", ":1:37: strip-prefix: \"maybe\" is neither on nor off"},
		{"routes: [{service: a, headers: [x]}]", ":1:32: headers must have names and values"},
		{"routes: [{service: a, headers: {x: 1, X: 2}}]", ":1:39: X is there twice"},
		{"routes: [{service: a, request-headers: {drop: [x]}}]", ":1:41: \"drop\" is no key of request-headers; allowed are add, remove, set"},
		{"routes: [{service: a, request-headers: {remove: [Via]}}]", ":1:50: request-headers: Via is left to the gateway"},
		{"routes: [{service: a/b}]", ":1:20: service: \"a/b\" has a character"},
		{"services: {a: {strategy: fastest}}", ":1:26: strategy: "},
		{"services: {a: {breaker-probes: 0}}", ":1:32: breaker-probes: \"0\" is not a whole number of at least 1"},
		{"services: [a]", ":1:11: services must have the names of services as keys\n"},
		{"services: {a/b: {}}", ":1:12: the name of a service \"a/b\" has a character that is not allowed"},
		{"services:\n  a:", ":2:3: service a has nothing in it"},
		{"services:\n  a: {speed: 1}", ":2:7: \"speed\" is no key of a service; allowed are breaker-failures, breaker-open, breaker-probes, check, instances, max-body, request-timeout, retries, strategy, total-timeout"},
		{"services:\n  a:\n    check: {path: /, rise: 0}", ":3:28: check.rise: must be an integer from 1 to 100, not 0"},
		{"services:\n  a:\n    check: /health", ":3:12: check: must be an object with a path"},
		{"services:\n  a:\n    check: {tcp: true, tcp: true}", ":3:24: tcp is there twice\n"},
		{"services:\n  a:\n    instances: []", ":3:16: instances must be a list of at least one"},
		{"services:\n  a:\n    instances: [x]", ":3:17: an instance must have keys and values"},
		{"services:\n  a: {instances: [{id: x, addr: x}]}", ":2:33: addr: \"x\" is not an http or https URL"},
		{"services:\n  a: {instances: [{id: x, id: y}]}", ":2:27: id is there twice\n"},
		{"services:\n  a: {instances: [{id: x, addr: http://h, ttl: 5s}]}", ":2:48: ttl: unknown member \"ttl\"; allowed here: id, addr, weight, metadata, check, slow_start"},
		{"services:\n  a: {instances: [{id: x, addr: http://h, check: {path: /, fall: 0}}]}", ":2:66: check.fall: must be an integer from 1 to 100, not 0"},
		{"services:\n  a: {instances: [{id: x, addr: http://h}, {id: x, addr: http://i}]}", ":2:45: instance x of service a is there twice\n"},
		{"routes: /a=b", ":1:9: routes must be a list of at least one, such as [/api=echo, /*]\n"},
		{"routes:\n- a=b", ":2:3: routes: \"a=b\" is not PREFIX=SERVICE"},
	} {
		_, _, err := load(t, test.text, nil)
		if err == nil || !strings.Contains(err.Error(), "kerberos.yaml"+test.want) {
			t.Errorf("%q: %v, want %s", test.text, err, test.want)
		}
	}
	// A flag covers the setting, and not the mistake.
	if _, _, err := load(t, "retries: two", nil, "--retries=2"); err == nil {
		t.Error("a mistake is not seen behind a flag")
	}
	if _, _, err := load(t, "admin: off\napi: admin", nil); err == nil || !strings.Contains(err.Error(), "--api=admin with --admin=off") {
		t.Errorf("what no single setting knows: %v", err)
	}
}

func TestFileShowsNoToken(t *testing.T) {
	for _, text := range []string{
		"token: se cret", "token: [secret]", "token: {secret: x}", "'token': se cret", "token:\n  secret: x", "token: secret\n  via: on", "{token: se cret}", "token: \"se cret",
		"token: secret\ntoken: secret", "token: &x se cret",
	} {
		_, _, err := load(t, text, nil)
		if err == nil || strings.Contains(err.Error(), "cret") && !strings.Contains(err.Error(), "a token is") {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, sources, err := load(t, "token: s3cret-s3cret", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sources.Settings() {
		if strings.Contains(s.Value, "s3cret") {
			t.Errorf("shown: %v", s)
		}
	}
}

// The file of defaults sets what is so anyway.
func TestWriteDefaults(t *testing.T) {
	var text strings.Builder
	if err := WriteDefaults(&text); err != nil {
		t.Fatal(err)
	}
	got, sources, err := load(t, text.String(), nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, text.String())
	}
	want, err := Defaults()
	if err != nil {
		t.Fatal(err)
	}
	want.Config, want.File = got.Config, got.File
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("defaults -, file +:\n%s", diff)
	}
	set := 0
	for _, flag := range sources.flags {
		if key := Key(flag); key != "" && strings.Contains(text.String(), "\n"+key+": ") {
			set++
		} else if key != "" && !strings.Contains(text.String(), "\n# "+key+": ") {
			t.Errorf("%s is missing", key)
		}
	}
	if set != len(sources.file.values) {
		t.Errorf("%d settings were read, and %d written", len(sources.file.values), set)
	}
}

// What the file of defaults says of routes and services as comments can be taken out of them, and has all keys of the schema.
func TestWriteDefaultsOfRoutesAndServices(t *testing.T) {
	var text strings.Builder
	if err := WriteDefaults(&text); err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(text.String(), "##### Routes\n")
	var lines []string
	for line := range strings.Lines(block) {
		if line, comment := strings.CutPrefix(line, "# "); comment {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	lines = slices.DeleteFunc(lines, func(line string) bool { return line == routesHelp || line == servicesHelp })
	block = strings.Join(lines, "\n")
	got, _, err := load(t, block, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, block)
	}
	if len(got.Route) != 1 || len(got.Services) != 1 || len(got.Services[0].Instances) != 1 {
		t.Fatalf("%+v %+v", got.Route, got.Services)
	}
	defaults, err := registry.Check{Path: "/health"}.Filled()
	if err != nil {
		t.Fatal(err)
	}
	users := got.Services[0].Settings
	if *users.Check != *defaults || users.Strategy != lb.RoundRobin || users.Retries != 2 || users.Breaker.OpenFor != 30*time.Second || users.MaxBody != -1 {
		t.Errorf("these are no defaults: %+v %+v", users, users.Check)
	}
	for _, at := range [][]string{
		{"routes", "items", "anyOf", "1"}, {"services", "additionalProperties"}, {"services", "additionalProperties", "check"},
		{"services", "additionalProperties", "instances", "items"},
	} {
		keys := schemaKeys(t, at...)
		if len(keys) < 6 {
			t.Errorf("%v: the schema has the keys %v", at, keys)
		}
		for _, key := range keys {
			if !strings.Contains(block, " "+key+":") {
				t.Errorf("%v: %s is missing in\n%s", at, key, block)
			}
		}
	}
}

// schemaKeys are the properties of a part of the schema.
func schemaKeys(t *testing.T, path ...string) []string {
	t.Helper()
	var text strings.Builder
	if err := WriteSchema(&text); err != nil {
		t.Fatal(err)
	}
	var at any
	if err := json.Unmarshal([]byte(text.String()), &at); err != nil {
		t.Fatal(err)
	}
	for _, step := range path {
		switch now := at.(type) {
		case map[string]any:
			if properties, ok := now["properties"].(map[string]any); ok {
				now = properties
			}
			at = now[step]
		case []any:
			i, _ := strconv.Atoi(step)
			at = now[i]
		}
	}
	properties, _ := at.(map[string]any)["properties"].(map[string]any)
	return slices.Sorted(maps.Keys(properties))
}

// Each key of routes and services is listed with its line, but for what a flag covers; values of header fields are not shown.
func TestSettingsOfRoutesAndServices(t *testing.T) {
	const text = `
routes:
- /b=c
- prefix: /v1
  methods: [GET, POST]
  headers: {X-Env: s3cret, X-Any: "*"}
  service: users
  request-headers:
    set: {X-A: s3cret}
    remove: [Cookie, Server]
services:
  users:
    retries: 5
    check: {path: /health, fall: 5}
    instances:
    - id: a
      addr: http://10.0.0.6
      metadata: {zone: x}
`
	want := `routes[0]|/b=c|FILE:3
routes[1].prefix|/v1|FILE:4
routes[1].methods|GET,POST|FILE:5
routes[1].headers.X-Env|(not shown)|FILE:6
routes[1].headers.X-Any|*|FILE:6
routes[1].service|users|FILE:7
routes[1].request-headers.set.X-A|(not shown)|FILE:9
routes[1].request-headers.remove|Cookie,Server|FILE:10
services.users.retries|5|FILE:13
services.users.check.path|/health|FILE:14
services.users.check.fall|5|FILE:14
services.users.instances[0].id|a|FILE:16
services.users.instances[0].addr|http://10.0.0.6|FILE:17
services.users.instances[0].metadata.zone|x|FILE:18
`
	listed := func(args ...string) string {
		g, sources, err := load(t, text, nil, args...)
		if err != nil {
			t.Fatal(err)
		}
		var rows strings.Builder
		for _, s := range sources.Settings() {
			if strings.HasPrefix(s.Name, "route") || strings.HasPrefix(s.Name, "services") {
				fmt.Fprintf(&rows, "%s|%s|%s\n", s.Name, s.Value, strings.Replace(s.From, g.Config, "FILE", 1))
			}
		}
		return rows.String()
	}
	if diff := cmp.Diff(want, listed()); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	_, services, _ := strings.Cut(want, "\nservices.")
	if diff := cmp.Diff("route|/c=d|flag\nservices."+services, listed("--route=/c=d")); diff != "" {
		t.Errorf("with a flag: want -, got +:\n%s", diff)
	}
}

// The schema knows all settings, and is one.
func TestWriteSchema(t *testing.T) {
	var text strings.Builder
	if err := WriteSchema(&text); err != nil {
		t.Fatal(err)
	}
	var schema struct {
		AdditionalProperties *bool
		Properties           map[string]struct {
			Description string
			Minimum     *int
		}
	}
	if err := json.Unmarshal([]byte(text.String()), &schema); err != nil {
		t.Fatal(err)
	}
	flags, err := gatewayFlags()
	if err != nil {
		t.Fatal(err)
	}
	keys := 2 // routes and services
	for _, flag := range flags {
		if key := Key(flag); key != "" {
			keys++
			if !strings.HasPrefix(schema.Properties[key].Description, flag.Help) {
				t.Errorf("%s is described as %q", key, schema.Properties[key].Description)
			}
		}
	}
	if len(schema.Properties) != keys || *schema.AdditionalProperties || *schema.Properties["breaker-failures"].Minimum != 1 {
		t.Errorf("the schema: %s", text.String())
	}
}

func FuzzFile(f *testing.F) {
	for _, seed := range []string{"retries: 3", "routes: [/a=b, /*]", "services:\n  a: {instances: [{id: x, addr: http://h, check: {tcp: true}}]}", "a: &b\n  c: *b", "? [a]: b", "token: >\n  x", "- {", "retries: !!int 3",
		"routes: [{service: a, methods: [GET], request-headers: {set: {A: b}, remove: [c]}}]", "services: {a: {instances: [{id: &x a, addr: http://h, metadata: {z: *x}}]}}",
		"\"\\u0000\": |\n  x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		g, sources, err := load(t, text, nil)
		if err == nil {
			sources.Settings()
		}
		if err == nil && (g.Retries < 0 || g.BreakerFailures < 1) {
			t.Errorf("%q is let through: %+v", text, g)
		}
	})
}

func TestFileServices(t *testing.T) {
	got, _, err := load(t, `
services:
  users:
    instances:
    - id: a
      addr: http://10.0.0.5:8080
      weight: 3
      metadata: {zone: rack-2}
      check: {path: /health, interval: 5s}
      slow_start: 30s
    - {id: b, addr: "https://users.example.org"}
    check: {tcp: true, fall: 5}
  orders:
    instances: [{id: a, addr: "http://10.0.0.6"}]
`, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range got.Pinned() {
		names = append(names, p.Service+"/"+p.Instance.ID+" "+p.Instance.Addr)
	}
	if want := []string{"users/a http://10.0.0.5:8080", "users/b https://users.example.org", "orders/a http://10.0.0.6"}; !cmp.Equal(names, want) {
		t.Errorf("instances: %v, want %v", names, want)
	}
	a := got.Services[0].Instances[0]
	if a.Weight != 3 || a.Metadata["zone"] != "rack-2" || a.Check.Path != "/health" || a.Check.Interval != 5*time.Second || a.Check.Fall != 3 || a.SlowStart != 30*time.Second {
		t.Errorf("users/a: %+v %+v", a, a.Check)
	}
	if c := got.ServiceSettings()["users"].Check; c == nil || !c.TCP || c.Fall != 5 || c.Interval != 2*time.Second {
		t.Errorf("the check of users: %+v", c)
	}
	if _, _, err := load(t, "services: {register: {instances: [{id: a, addr: http://h}]}}", nil); err == nil || !strings.Contains(err.Error(), `services: "register" cannot be a service`) {
		t.Errorf("a name of the API: %v", err)
	}
}

func TestFileRoutes(t *testing.T) {
	got, _, err := load(t, `
routes:
- /api=echo
- host: "*.example.com"
  prefix: /v1
  methods: [GET, POST]
  headers: {X-Env: test, X-Any: "*", X-Number: 1}
  service: users
  replace-prefix: /v2
  request-headers:
    set: {X-A: a, Host: inner}
    add: {X-B: "b c"}
    remove: [Cookie]
  response-headers: {remove: [Server]}
  request-timeout: 5s
  total-timeout: 0
  retries: 0
  max-body: 1MiB
- {path: /exact, strip-prefix: true, service: users}
- /*
services:
  users:
    strategy: ip-hash
    breaker-failures: 7
    breaker-open: 5s
    breaker-probes: 1
    request-timeout: 0s
    retries: 5
`, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Route{
		{Prefix: "/api", Service: "echo"},
		{
			Host: "*.example.com", Prefix: "/v1", Methods: []string{"GET", "POST"}, Headers: []proxy.Field{{Name: "X-Env", Value: "test"}, {Name: "X-Any"}, {Name: "X-Number", Value: "1"}},
			Service: "users", ReplacePrefix: "/v2",
			Request:  proxy.Edits{Set: []proxy.Field{{Name: "X-A", Value: "a"}, {Name: "Host", Value: "inner"}}, Add: []proxy.Field{{Name: "X-B", Value: "b c"}}, Remove: []string{"Cookie"}},
			Response: proxy.Edits{Remove: []string{"Server"}}, Policy: proxy.Policy{RequestTimeout: 5 * time.Second, TotalTimeout: -1, Retries: -1, MaxBody: 1 << 20},
		},
		{Path: "/exact", StripPrefix: true, Service: "users"},
		{Prefix: "/*"},
	}
	if diff := cmp.Diff(want, got.Route); diff != "" {
		t.Errorf("routes: want -, got +:\n%s", diff)
	}
	users := proxy.Service{Policy: proxy.Policy{RequestTimeout: -1, Retries: 5}, Strategy: lb.IPHash, Breaker: cb.Config{Failures: 7, OpenFor: 5 * time.Second, Probes: 1}}
	if diff := cmp.Diff(map[string]proxy.Service{"users": users}, got.ServiceSettings()); diff != "" {
		t.Errorf("services: want -, got +:\n%s", diff)
	}
}

// The value of a header field may be a secret.
func TestFileShowsNoHeader(t *testing.T) {
	for _, text := range []string{
		"routes:\n- service: a\n  request-headers:\n    set:\n      X-Key: \"s3cret\\n\"",
		"routes:\n- {service: a, request-headers: {set: {X-Key: \"s3cret\\n\"}}}",
		"routes:\n- service: a\n  headers:\n    X-Key: [s3cret]",
		"routes:\n- service: a\n  headers: {X-Key: s3cret\n  via",
		"routes:\n- service: a\n  request-headers:\n    set: {Via: s3cret}",
		"routes:\n- service: a\n  request-headers:\n    set:\n      Via: \"a\n       s3cret\"\n    speed: 1",
		"routes:\n- service: a\n  request-headers:\n    set:\n      X-A: a\n       s3cret\n       \n      Via: 1",
		"routes:\n- service: a\n  request-headers:\n    add:\n      Via: >\n       s3cret",
		"routes:\n- service: a\n  request-headers:\n    add: &x\n      Via: !!str s3cret",
		"routes:\n- {service: a, request-headers: {add: [X-Key: s3cret]}}",
		"routes:\n- {service: a, request-headers: 's3cret'}",
		"access-log: \"a\r\n  b\"\r\nroutes:\r\n- service: a\r\n  request-headers:\r\n    set:\r\n      X-A: s3cret\r\n    speed: 1",
		"access-log: \"a\r\n  b\"\r\ntoken: s3cret-s3cret\r\nretries: two",
		"access-log: \"a\r\n  b\"\r\nretries: two\r\ntoken: s3cret-s3cret",
		"via: on\rretries: two\rtoken: s3cret-s3cret",
		"routes:\n- {service: a, request-haeders: {set: {X-Key: s3cret}}}",
		"routes:\n- {service: a, headers: {X-Key: s3cret}, retries: two}",
	} {
		if _, _, err := load(t, text, nil); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A line is shown unless it has a secret, and the place of a wrong name is where that stands.
func TestFileShowsLines(t *testing.T) {
	block := "routes:\n- service: a\n  request-headers:\n    set:\n      X-A: s3cret\n      %s: x\n    remove:\n    - %s\n  request-timeout: %s"
	for _, test := range []struct{ text, want string }{
		{"routes: [{prefix: /e, service: echo, headers: {X-A: \"*\"}, request-timeout: 5}]", ":1:76: request-timeout: \"5\" is not a time of at least 0s, written like 30s, 1m30s or 250ms\n  1 | routes: [{prefix: /e, "},
		{"routes: [{service: a, headers: {X-A: \"*\", Bad Name: \"*\"}}]", ":1:43: headers: \"Bad Name\" is no name of a header field\n  1 | routes: "},
		{"routes: [{service: a, methods: [GET, \"a b\"]}]", ":1:38: methods: \"a b\" is no method\n  1 | routes: "},
		{"routes: [{service: a, methods: [GET, post]}]", ":1:38: methods: \"post\" never matches POST: methods are case-sensitive\n  1 | routes: "},
		{fmt.Sprintf(block, "Content-Length", "X-B", "5s"), ":6:7: request-headers: Content-Length is left to the gateway"},
		{fmt.Sprintf(block, "Bad Name", "X-B", "5s"), ":6:7: request-headers: \"Bad Name\" is no name of a header field"},
		{fmt.Sprintf(block, "X-B", "Via", "5s"), ":8:7: request-headers: Via is left to the gateway\n  8 |     - Via\n    |       ^"},
		{fmt.Sprintf(block, "X-B", "Host", "5s"), ":8:7: request-headers: a Host cannot be removed: set it\n  8 |     - Host\n"},
		{fmt.Sprintf(block, "X-B", "X-C", "5"), ":9:20: request-timeout: \"5\" is not a time of at least 0s, written like 30s, 1m30s or 250ms\n  9 |   request-timeout: 5\n"},
		{"metrics: \"o\r\n  n\"\r\nretries: two", ":1:10: metrics: "},
		{"access-log: \"a\r\n  b\"\r\nretries: two\r\n", ":3:10: retries: \"two\" is not a whole number of at least 0\n  3 | retries: two\n"},
		{"{retries: two}", ":1:11: retries: \"two\" is not a whole number of at least 0\n  1 | {retries: two}\n"},
	} {
		_, _, err := load(t, test.text, nil)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v, want %s", test.text, err, test.want)
		}
	}
}

// BenchmarkLoad is what a reload takes to read and judge a file, with so many instances.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{1, 1000} {
		var text strings.Builder
		text.WriteString("services:\n  users:\n    instances:\n")
		for i := range n {
			fmt.Fprintf(&text, "    - {id: i%d, addr: http://10.0.0.%d:8080}\n", i, i%250)
		}
		name := filepath.Join(b.TempDir(), "kerberos.yaml")
		if err := os.WriteFile(name, []byte(text.String()), 0o600); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := Load([]string{"--config", name}, func(string) (string, bool) { return "", false }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
