package main

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kerberos/internal/config"
	"kerberos/internal/follow"
)

// settings writes a file of settings and returns its name.
func settings(t *testing.T, lines ...string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "kerberos.yaml")
	if err := os.WriteFile(name, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestConfigFile(t *testing.T) {
	file := settings(t, "routes: [/api=users]", "max-body: 10", "via: off")
	g := launch(t, []string{"KERBEROS_CONFIG=" + file}, "--max-body=20")
	g.register("users", "a", named(t, "a"))
	if status, body := g.get("/api/x"); status != 200 || body != "a" {
		t.Errorf("by the route of the file: %d %q", status, body)
	}
	if status, _ := g.get("/users"); status != 404 {
		t.Errorf("by the first segment: %d", status)
	}
	for size, want := range map[int]int{20: 200, 21: 413} { // the flag wins
		raw := fmt.Sprintf("POST /api HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size))
		if response, _ := exchange(t, g.data, raw); response.StatusCode != want {
			t.Errorf("a body of %d: %d, want %d", size, response.StatusCode, want)
		}
	}
	if !g.logged("settings are read from a file", file) {
		t.Error("the log does not name the file")
	}
}

func TestConfigFileRefused(t *testing.T) {
	file := settings(t, "via: on", "retries: two")
	for _, test := range []struct {
		args []string
		code int
	}{
		{[]string{"--config", file}, exitUsage},
		{[]string{"config", "--config", file}, exitUsage},
		{[]string{"check", file}, exitFailed},
	} {
		out, errs, code := command(t, nil, test.args...)
		if want := file + ":2:10: retries: \"two\" is not a whole number of at least 0\n  2 | retries: two\n    |          ^\n"; code != test.code || !strings.Contains(errs, want) {
			t.Errorf("%v: %d\n%s%s", test.args, code, out, errs)
		}
	}
	if out, errs, code := command(t, []string{"KERBEROS_RETRIES=two"}, "check", settings(t, "retries: 2")); code != 0 || !strings.HasSuffix(out, ": fine\n") {
		t.Errorf("a file that is fine, whatever the environment: %d\n%s%s", code, out, errs)
	}
}

// What the start refuses of a file, check refuses with the same words.
func TestCheckIsAsTheStart(t *testing.T) {
	bad := settings(t, "- name: x", "  admin: perhaps")
	dir := t.TempDir()
	service := func(addr string) string {
		return "services:\n  users:\n    instances:\n    - {id: ok, addr: http://10.9.9.9}\n    - id: a\n      addr: " + addr
	}
	for _, test := range []struct{ name, text, want string }{
		{"two routes for the same", "routes: [/a=users, /a/=other]", ":1:20: route /a: the same leads to users already\n  1 | routes: [/a=users, /a/=other]\n    |                    ^\n"},
		{"and as mappings", "routes:\n- {prefix: /a, service: users}\n- service: other\n  prefix: /a", ":3:3: route /a: the same leads to users already\n  3 | - service: other\n    |   ^\n"},
		{"a path of the API", "routes:\n- /b=b\n- {prefix: /services, service: b}", ":3:12: \"/services\" is a prefix of paths which the API answers"},
		{"a service of the API", "services:\n  register: {retries: 1}", ":2:3: services: \"register\" cannot be a service"},
		{"an address that is refused", "addr-deny: 10.0.0.0/8\naddr-allow: 10.9.9.9\n" + strings.Replace(service("http://10.0.0.1"), "10.9.9.9", "192.0.2.1", 1), ":6:22: instance \"ok\" of service \"users\": addr: 192.0.2.1 is in none"},
		{"and another", "addr-deny: 10.0.0.0/24\n" + service("http://10.0.0.1"), ":7:13: instance \"a\" of service \"users\": addr: 10.0.0.1 is in 10.0.0.0/24, which --addr-deny refuses\n  7 |       addr: http://10.0.0.1\n"},
		{"the gateway itself", "listen: 127.0.0.1:18080\n" + service("http://127.0.0.1:18080"), ":7:13: instance \"a\" of service \"users\": addr: 127.0.0.1:18080 is one of the gateway's own listeners\n"},
		{"and at all addresses", "listen: \":18080\"\n" + service("http://127.0.0.7:18080"), "127.0.0.7:18080 is one of the gateway's own listeners\n"},
		{"one address for both", "listen: 127.0.0.1:18080\nadmin: 127.0.0.1:18080", "--listen 127.0.0.1:18080 and --admin 127.0.0.1:18080 are the same address"},
		{"and a part of the other", "listen: \":18080\"\nadmin: 127.0.0.1:18080", "are the same address"},
		{"no tokens", "tokens: " + filepath.Join(dir, "none"), "--tokens: stat " + filepath.Join(dir, "none")},
		{"wrong tokens", "tokens: " + bad, "--tokens: " + bad + ":2:10: "},
		{"a certificate without a key", "admin-cert: " + bad, "--admin-cert and --admin-key belong together"},
		{"no certificate", "admin-cert: " + bad + "\nadmin-key: " + bad, "--admin-cert " + bad + " and --admin-key " + bad + ": "},
		{"no access log", "access-log: " + filepath.Join(dir, "none", "x.log"), "--access-log: " + filepath.Join(dir, "none", "x.log") + " cannot be made: "},
		{"an access log in a file", "access-log: " + filepath.Join(bad, "x.log"), " cannot be made: "},
		{"an access log that is a directory", "access-log: " + dir, "--access-log: " + dir + " is a directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := test.text
			if strings.HasPrefix(test.want, ":") {
				test.want = "kerberos.yaml" + test.want
			}
			file := settings(t, text)
			_, errs, code := command(t, nil, "check", file)
			if code != exitFailed || !strings.Contains(errs, test.want) {
				t.Errorf("check: %d %s, want %s", code, errs, test.want)
			}
			args := []string{"--config", file}
			if !strings.Contains(text, "listen:") {
				args = append(args, "--listen=127.0.0.1:0")
			}
			if !strings.Contains(text, "admin") {
				args = append(args, "--admin=127.0.0.1:0")
			}
			if _, started, code := command(t, nil, args...); code == 0 || !strings.Contains(started, test.want) {
				t.Errorf("the start: %d %s, want %s", code, started, test.want)
			}
		})
	}
	log := filepath.Join(dir, "x.log")
	if out, errs, code := command(t, nil, "check", settings(t, "access-log: "+log, "data: "+filepath.Join(dir, "data"))); code != 0 {
		t.Errorf("a file that is fine: %d %s%s", code, out, errs)
	}
	if made, err := os.ReadDir(dir); err != nil || len(made) > 0 {
		t.Errorf("check has made %v, %v", made, err)
	}
}

// What the program prints of its settings, it takes.
func TestConfigDefault(t *testing.T) {
	text, errs, code := command(t, nil, "config", "--default")
	if code != 0 {
		t.Fatalf("%d %s", code, errs)
	}
	file := settings(t, text)
	if out, errs, code := command(t, nil, "check", file); code != 0 {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	schema, _, code := command(t, nil, "config", "--schema")
	if code != 0 || !strings.Contains(schema, `"$schema"`) {
		t.Errorf("the schema: %d %s", code, schema)
	}
	out, _, _ := command(t, []string{"KERBEROS_TOKEN=s3cret-s3cret"}, "config")
	if strings.Contains(out, "s3cret") || !strings.Contains(out, "env KERBEROS_TOKEN") {
		t.Errorf("the token: %s", out)
	}
}

func TestConfigServices(t *testing.T) {
	file := settings(t, "services:", "  users:", "    instances:", "    - {id: a, addr: "+named(t, "a")+"}")
	g := launch(t, nil, "--config", file)
	if status, body := g.get("/users"); status != 200 || body != "a" {
		t.Errorf("the instance of the file: %d %q", status, body)
	}
	g.register("users", "b", named(t, "b"))
	seen := map[string]bool{}
	for range 4 {
		_, body := g.get("/users")
		seen[body] = true
	}
	if !seen["a"] || !seen["b"] {
		t.Errorf("answers of %v, want a and b", seen)
	}
	if status, body := g.post(`{"service":"users","id":"a","addr":"http://127.0.0.1:1"}`); status != 409 || !strings.Contains(body, file) {
		t.Errorf("registering what the file holds: %d %s", status, body)
	}
	// Where an instance may point is known to the gateway only.
	file = settings(t, "services:", "  users:", "    instances:", "    - {id: a, addr: http://169.254.1.1}")
	if _, errs, code := command(t, nil, "--config", file, "--listen=127.0.0.1:0", "--admin=off"); code != exitUsage || !strings.Contains(errs, file) || !strings.Contains(errs, "169.254.1.1") {
		t.Errorf("an address that is refused: %d %s", code, errs)
	}
}

func TestConfigRoutes(t *testing.T) {
	seen := func(t *testing.T) string {
		return backend(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Secret", "1")
			fmt.Fprintf(w, "%s %s %s %s", r.Method, r.Host, r.URL, r.Header.Get("X-Env"))
		})
	}
	file := settings(t,
		"routes:",
		"- {host: api.example.com, prefix: /v1, service: users, strip-prefix: on, request-headers: {set: {X-Env: test}}, response-headers: {remove: [X-Secret]}}",
		"- {host: api.example.com, prefix: /v1, methods: [POST], service: users, max-body: 3}",
		"- /*",
		"services:",
		"  users:",
		"    strategy: ip-hash",
		"    instances: [{id: a, addr: "+seen(t)+"}]",
	)
	g := launch(t, nil, "--config", file)
	ask := func(method, path, body string) (*http.Response, string) {
		return exchange(t, g.data, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: API.example.com:80\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", method, path, len(body), body))
	}
	if response, body := ask("GET", "/v1/a?x=1", ""); body != "GET API.example.com:80 /a?x=1 test" || response.Header.Get("X-Secret") != "" {
		t.Errorf("GET: %q, %v", body, response.Header)
	}
	if response, body := ask("POST", "/v1/a", "123"); body != "POST API.example.com:80 /v1/a " || response.Header.Get("X-Secret") != "1" {
		t.Errorf("POST: %q, %v", body, response.Header)
	}
	if response, _ := ask("POST", "/v1/a", "1234"); response.StatusCode != 413 {
		t.Errorf("a body that is too large for the route: %d", response.StatusCode)
	}
	if status, body := g.get("/users"); status != 200 || !strings.HasPrefix(body, "GET localhost /users") {
		t.Errorf("the first segment: %d %q", status, body)
	}
	if _, body := exchange(t, g.admin, get("/services/users")); !strings.Contains(body, `"in_force":"ip-hash"`) {
		t.Errorf("the service: %s", body)
	}
	out, errs, code := command(t, nil, "routes", "--config", file)
	want := `HOST             PATH   METHODS  HEADERS  SERVICE              SENT AS
api.example.com  /v1/*  POST     *        users                as it came
api.example.com  /v1/*  *        *        users                /*
*                /*     *        *        (the first segment)  as it came
`
	if out != want || code != 0 {
		t.Errorf("routes: %d %s\n%s", code, errs, out)
	}
}

// rewrite puts other settings in the place of a file, as editors do.
func rewrite(t *testing.T, file string, lines ...string) {
	t.Helper()
	if err := os.Rename(settings(t, lines...), file); err != nil {
		t.Fatal(err)
	}
}

// reload is POST /reload.
func (g *running) reload() (status int, body string) {
	g.t.Helper()
	response, body := exchange(g.t, g.admin, "POST /reload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	return response.StatusCode, body
}

// The configuration is read again when the file changes, by a signal, and by a call.
func TestReload(t *testing.T) {
	a, b := named(t, "a"), named(t, "b")
	at := func(path, addr string) []string {
		return []string{"routes: [" + path + "=users]", "services:", "  users:", "    instances: [{id: x, addr: " + addr + "}]"}
	}
	file := settings(t, at("/1", a)...)
	g := launch(t, nil, "--config", file, "--max-body=3")
	answers := func(path string, want int, body string) func() bool {
		return func() bool {
			status, got := g.get(path)
			return status == want && (body == "" || got == body)
		}
	}
	if !answers("/1", 200, "a")() {
		t.Error("at the start")
	}
	rewrite(t, file, at("/2", b)...)
	eventually(t, "the change of the file is in force", answers("/2", 200, "b"))
	if !answers("/1", 404, "")() {
		t.Error("the route before is still there")
	}
	if !g.logged("the configuration has been read again", "a change of the file", "route, services") {
		t.Error("the log does not tell")
	}
	rewrite(t, file, at("/3", a)...)
	g.signal(syscall.SIGHUP)
	eventually(t, "the signal was heard", answers("/3", 200, "a"))
	rewrite(t, file, append(at("/4", a), "max-body: 1")...)
	if status, body := g.reload(); status != 204 {
		t.Errorf("POST /reload: %d %s", status, body)
	}
	if !answers("/4", 200, "a")() {
		t.Error("the call has not changed what is in force")
	}
	if response, _ := exchange(t, g.data, "POST /4 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"); response.StatusCode != 200 {
		t.Errorf("the flag does not win any more: %d", response.StatusCode)
	}
	if response, _ := exchange(t, g.admin, get("/reload")); response.StatusCode != 405 {
		t.Errorf("GET /reload: %d", response.StatusCode)
	}
	if response, _ := exchange(t, g.admin, "POST /reload HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"); response.StatusCode != 403 {
		t.Errorf("POST /reload by a page: %d", response.StatusCode)
	}
	if now := g.scrape(); now.reloads("failure") != 0 || now.inForce() != 1 {
		t.Errorf("%.0f failures, %.0f", now.reloads("failure"), now.inForce())
	}
	g.signal(os.Interrupt)
	if code := g.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// What cannot be used changes nothing, and is told.
func TestReloadRefused(t *testing.T) {
	good := []string{"routes: [/good=users]", "services: {users: {instances: [{id: x, addr: " + named(t, "x") + "}]}}"}
	file := settings(t, good...)
	g := launch(t, nil, "--config", file, "--addr-deny=192.0.2.0/24")
	if g.scrape().inForce() != 1 {
		t.Error("at the start")
	}
	for name, test := range map[string]struct {
		lines []string
		want  string
	}{
		"a mistake":            {[]string{"routes: [/a=users]", "retries: two"}, "kerberos.yaml:2:10: retries: "},
		"what cannot change":   {[]string{"routes: [/a=users]", "data: " + filepath.Join(t.TempDir(), "d"), "upstream-idle-timeout: 1s"}, "data, upstream-idle-timeout cannot change while the gateway runs"},
		"an address of nobody": {[]string{"routes: [/a=users]", "services: {users: {instances: [{id: y, addr: http://192.0.2.1}]}}"}, "192.0.2.1"},
		"two for the same":     {[]string{"routes: [/a=users, /a/=other]"}, "the same leads to users already"},
		"nothing at all":       {nil, "kerberos.yaml has no setting any more"},
		"a comment":            {[]string{"# routes: [/a=users]", "---"}, "kerberos.yaml has no setting any more"},
		"no settings":          {[]string{"{}"}, "kerberos.yaml has no setting any more"},
	} {
		rewrite(t, file, test.lines...)
		if status, body := g.reload(); status != 422 || !strings.Contains(body, test.want) {
			t.Errorf("%s: %d %s, want %s", name, status, body, test.want)
		}
		if status, body := g.get("/good"); status != 200 || body != "x" {
			t.Errorf("%s: what was before answers %d %q", name, status, body)
		}
		if status, _ := g.get("/a"); status != 404 {
			t.Errorf("%s: something of it is in force", name)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if status, body := g.reload(); status != 422 || !strings.Contains(body, file) {
		t.Errorf("without the file: %d %s", status, body)
	}
	if !g.logged("the configuration cannot be used", "retries") {
		t.Error("the log does not tell")
	}
	if now := g.scrape(); now.reloads("failure") == 0 || now.inForce() != 0 {
		t.Errorf("%.0f failures, %.0f", now.reloads("failure"), now.inForce())
	}
	rewrite(t, file, good...)
	if status, body := g.reload(); status != 204 {
		t.Errorf("what is right again: %d %s", status, body)
	}
	if g.scrape().inForce() != 1 {
		t.Error("what is right again is not in the metrics")
	}
}

func (s scraped) reloads(outcome string) float64 {
	return s.value("kerberos_config_reloads_total", "outcome="+outcome)
}

func (s scraped) inForce() float64 { return s.value("kerberos_config_last_reload_successful") }

// A file that is being written is not put in force before it is whole: not while it is empty, and not half of it.
func TestReloadOfPart(t *testing.T) {
	x := named(t, "x")
	text := func(route string) string {
		return "routes: [" + route + "=users]\nservices: {users: {instances: [{id: x, addr: " + x + "}]}}\n"
	}
	file := settings(t, text("/old"))
	g := launch(t, nil, "--config", file)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	eventually(t, "the empty file is refused", func() bool { return g.logged("cannot be used", "a change of the file", "no setting any more") })
	g.signal(syscall.SIGHUP)
	eventually(t, "by a signal too", func() bool { return g.logged("cannot be used", "SIGHUP", "no setting any more") })
	if status, _ := g.get("/old"); status != 200 || g.scrape().inForce() != 0 {
		t.Errorf("what was before: %d", status)
	}
	// What was in force is taken over again, which ends the alert.
	write(text("/old"))
	eventually(t, "it is well again", func() bool { return g.scrape().inForce() == 1 })
	before := g.scrape()
	head, rest, _ := strings.Cut(text("/new"), "services")
	write("")
	time.Sleep(1500 * time.Millisecond) // these pauses are what is tested
	write(head)
	time.Sleep(1500 * time.Millisecond)
	write(head + "services" + rest)
	eventually(t, "all of it is in force", func() bool {
		status, _ := g.get("/new")
		return status == 200
	})
	if now := g.scrape(); now.reloads("success") != before.reloads("success")+1 || now.reloads("failure") != before.reloads("failure") {
		t.Errorf("%.0f more reloads and %.0f more failures, want 1 and 0",
			now.reloads("success")-before.reloads("success"), now.reloads("failure")-before.reloads("failure"))
	}
}

// What is read again for a change of the file is what was seen to be still. A file that changes just then is left for later.
func TestReloadOfMovingFile(t *testing.T) {
	x := named(t, "x")
	text := func(route string) string {
		return "routes: [" + route + "=users]\nservices: {users: {instances: [{id: x, addr: " + x + "}]}}\n"
	}
	file := settings(t, text("/old"))
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	read := func() (config.Gateway, *config.Sources, error) {
		return config.Load([]string{"--listen=127.0.0.1:0", "--admin=off", "--config", file}, func(string) (string, bool) { return "", false })
	}
	cfg, sources, err := read()
	if err != nil {
		t.Fatal(err)
	}
	var loads atomic.Int32
	load := func() (config.Gateway, *config.Sources, error) {
		switch loads.Add(1) {
		case 1:
			write(text("/half"))
		case 2:
			write("routes: [/ha")
		}
		defer write(text("/new"))
		return read()
	}
	var log transcript
	g, err := start(cfg, origin{load: load, sources: sources}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer g.stop()
	write(text("/new"))
	eventually(t, "it is read again", func() bool { return g.reloads().Done > 0 })
	if count := g.reloads(); loads.Load() != 3 || count.Done != 1 || count.Failed != 0 || strings.Contains(log.String(), "cannot be used") {
		t.Errorf("read %d times, %+v\n%s", loads.Load(), count, log.String())
	}
	if response, body := exchange(t, g.data.Addr().String(), get("/new")); response.StatusCode != 200 {
		t.Errorf("%d %s", response.StatusCode, body)
	}
}

// A change that was read again by a call is not read another time because the file has changed, be it right or wrong.
func TestReloadOnce(t *testing.T) {
	file := settings(t, "max-body: 1")
	g := launch(t, nil, "--config", file)
	for _, test := range []struct {
		line             string
		success, failure float64
	}{{"max-body: 2", 1, 0}, {"max-body: two", 1, 1}} {
		rewrite(t, file, test.line)
		g.reload()
		for until := time.Now().Add(quiet + 3*follow.Every); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
			if now := g.scrape(); now.reloads("success") != test.success || now.reloads("failure") != test.failure {
				t.Fatalf("%s: %.0f reloads and %.0f failures, want %.0f and %.0f", test.line, now.reloads("success"), now.reloads("failure"), test.success, test.failure)
			}
		}
	}
	if g.logged("a change of the file") {
		t.Error("it is in the log")
	}
}

// The file of the working directory is followed where there was none at the start.
func TestReloadOfFileThatComes(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(binary, "--listen=127.0.0.1:0", "--admin=127.0.0.1:0")
	cmd.Dir, cmd.Env = dir, environment()
	g := &running{child: beginCommand(t, cmd)}
	g.listening()
	if !g.logged("no settings are read from a file", "kerberos.yaml") {
		t.Error("the log does not say that there is none")
	}
	x := named(t, "x")
	for _, route := range []string{"/1", "/2"} {
		rewrite(t, filepath.Join(dir, "kerberos.yaml"), "routes: ["+route+"=users]", "services: {users: {instances: [{id: x, addr: "+x+"}]}}")
		eventually(t, route+" is in force", func() bool {
			status, _ := g.get(route)
			return status == 200
		})
	}
}

// Another address is opened before the one before is closed; one that cannot be opened leaves all as it was. Connections stay.
func TestReloadListeners(t *testing.T) {
	x := named(t, "x")
	lines := func(listen, admin string) []string {
		return []string{"listen: " + listen, "admin: " + admin, "services: {users: {instances: [{id: x, addr: " + x + "}]}}"}
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := settings(t, lines("127.0.0.1:0", "127.0.0.1:0")...)
	g := &running{child: begin(t, nil, "--config", file)}
	g.listening()
	conn, err := net.Dial("tcp", g.data)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	ask := func() {
		t.Helper()
		fmt.Fprint(conn, "GET /users HTTP/1.1\r\nHost: h\r\n\r\n")
		response, err := http.ReadResponse(reader, nil)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("the connection that was open: %v %v", response, err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
	}
	ask()
	for _, bad := range [][]string{lines(taken.Addr().String(), "127.0.0.1:0"), lines("localhost:0", taken.Addr().String()), lines("127.0.0.1:0", "off")} {
		rewrite(t, file, bad...)
		if status, body := g.reload(); status != 422 {
			t.Errorf("%v: %d %s", bad, status, body)
		}
		if status, _ := g.get("/users"); status != 200 {
			t.Errorf("%v: what was before answers %d", bad, status)
		}
	}
	before, adminBefore := g.data, g.admin
	rewrite(t, file, lines("localhost:0", "localhost:0")...)
	if status, body := g.reload(); status != 204 {
		t.Fatalf("%d %s", status, body)
	}
	eventually(t, "others are opened", func() bool {
		g.listening()
		return g.data != before && g.admin != adminBefore
	})
	if status, _ := g.get("/users"); status != 200 {
		t.Errorf("the new one: %d", status)
	}
	if response, _ := exchange(t, g.admin, get("/healthz")); response.StatusCode != 200 {
		t.Errorf("the new admin: %d", response.StatusCode)
	}
	for _, old := range []string{before, adminBefore} {
		if conn, err := net.Dial("tcp", old); err == nil {
			conn.Close()
			t.Errorf("%s still accepts", old)
		}
	}
	ask()
	if status, body := g.post(`{"service":"users","id":"loop","addr":"http://` + g.data + `"}`); status != 400 || !strings.Contains(body, "listen") {
		t.Errorf("an instance at the gateway's own new address: %d %s", status, body)
	}
	conn.Close()
	g.signal(os.Interrupt)
	if code := g.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Another name of where the gateway listens changes nothing. What its own listeners stand in the way of is refused, and says so.
func TestReloadListenersOwn(t *testing.T) {
	file := settings(t, "listen: 127.0.0.1:0", "admin: 127.0.0.1:0")
	g := &running{child: begin(t, nil, "--config", file)}
	g.listening()
	port := func(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
	for _, test := range []struct{ listen, admin, refused string }{
		{g.data, g.admin, ""},
		{"localhost:" + port(g.data), "localhost:" + port(g.admin), ""},
		{":" + port(g.data), g.admin, "listen: :" + port(g.data) + " cannot be opened while the gateway itself listens on " + g.data},
		{"0.0.0.0:" + port(g.data), g.admin, "listens on " + g.data},
		{g.admin, g.data, "listen: " + g.admin + " cannot be opened while the gateway itself listens on " + g.admin},
		{"127.0.0.1:0", g.data, "admin: " + g.data + " cannot be opened while the gateway itself listens on " + g.data},
	} {
		rewrite(t, file, "listen: "+test.listen, "admin: "+test.admin, "health-path: /up")
		status, body := g.reload()
		if test.refused == "" && status != 204 || test.refused != "" && (status != 422 || !strings.Contains(body, test.refused) || !strings.Contains(body, "restart")) {
			t.Errorf("%s and %s: %d %s", test.listen, test.admin, status, body)
		}
		if status, _ := g.get("/up"); status != 200 {
			t.Errorf("%s: %d", test.listen, status)
		}
	}
	if g.logged("no longer listening") {
		t.Error("a listener was closed")
	}
	// All addresses are the same ones, however they are written.
	for _, addr := range []string{":9", "0.0.0.0:9", "[::]:9"} {
		all := placed{addr: &net.TCPAddr{IP: net.IPv6unspecified, Port: 9}}
		if ln, err := (&gateway{}).listenInstead(all, addr); ln != all || err != nil {
			t.Errorf("%s: %v %v", addr, ln, err)
		}
	}
}

// placed is a listener that only has an address.
type placed struct {
	net.Listener
	addr net.Addr
}

func (p placed) Addr() net.Addr { return p.addr }

// echo is an instance that makes a tunnel of each request, and sends back what comes through it. It returns its address.
func echo(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				_, _ = io.Copy(conn, r)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		serving.Wait()
	})
	return "http://" + ln.Addr().String()
}

// Many reloads under load, with a tunnel and a slow response through them: nothing fails, and nothing is left of them.
func TestReloadUnderLoad(t *testing.T) {
	reloads := 300
	if testing.Short() || raceDetector {
		reloads = 50
	}
	release := make(chan struct{})
	slow := backend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "begun ")
		w.(http.Flusher).Flush()
		<-release
		_, _ = io.WriteString(w, "ended")
	})
	a, b, far := named(t, "a"), named(t, "b"), echo(t)
	lines := func(i int) []string {
		text := []string{
			"routes:", "- {prefix: /x, service: " + []string{"one", "two"}[i%2] + ", retries: 1}", "- /*", "services:",
			"  one: {strategy: " + []string{"random", "round-robin"}[i/2%2] + ", instances: [{id: a, addr: " + a + "}]}",
			"  slow: {instances: [{id: s, addr: " + slow + "}]}",
			"  two: {instances: [{id: a, addr: " + a + "}",
		}
		if i%2 == 0 {
			text[len(text)-1] += ", {id: b, addr: " + b + "}"
		}
		text[len(text)-1] += "]}"
		if i == 0 {
			text = append(text, "  ws: {instances: [{id: w, addr: "+far+"}]}") // only at first
		}
		return append(text, fmt.Sprintf("max-body: %d", 1000+i))
	}
	file := settings(t, lines(0)...)
	g := launch(t, nil, "--config", file)
	response, err := http.Get("http://" + g.data + "/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	tunnel, err := net.Dial("tcp", g.data)
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	_ = tunnel.SetDeadline(time.Now().Add(3 * time.Minute))
	fmt.Fprint(tunnel, "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
	through := bufio.NewReader(tunnel)
	if answer, err := http.ReadResponse(through, nil); err != nil || answer.StatusCode != 101 {
		t.Fatalf("the handshake: %v %v", answer, err)
	}
	echoes := func(text string) {
		t.Helper()
		fmt.Fprint(tunnel, text)
		got := make([]byte, len(text))
		if _, err := io.ReadFull(through, got); err != nil || string(got) != text {
			t.Fatalf("the tunnel: %q %v, want %q", got, err, text)
		}
	}
	echoes("before the reloads")
	alive := func() (goroutines, bytes float64) {
		exchange(t, g.admin, get("/debug/pprof/heap?gc=1")) // collects garbage
		now := g.scrape()
		return now.value("go_goroutines"), now.value("go_memstats_heap_alloc_bytes")
	}
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 2 {
		load.Go(func() {
			client := &http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			for {
				select {
				case <-stop:
					return
				default:
				}
				response, err := client.Get("http://" + g.data + "/x")
				if err != nil || response.StatusCode != 200 {
					t.Errorf("a request: %v %v", response, err)
					return
				}
				_, _ = io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
		})
	}
	change := func(i int) {
		t.Helper()
		rewrite(t, file, lines(i)...)
		if status, body := g.reload(); status != 204 {
			t.Fatalf("reload %d: %d %s", i, status, body)
		}
	}
	for i := range reloads / 5 {
		change(i + 1)
		if i == 0 {
			if status, body := g.get("/ws"); status < 400 {
				t.Errorf("the instance of the tunnel has not left: %d %s", status, body)
			}
		}
		echoes("after another reload")
	}
	goroutines, bytes := alive()
	for i := range reloads * 4 / 5 {
		change(i + 1)
	}
	// The connections to an instance that has left have --upstream-idle-timeout, 4 s, to end.
	var goroutinesNow, bytesNow float64
	eventually(t, "no more goroutines and memory are there than after a fifth of the reloads", func() bool {
		goroutinesNow, bytesNow = alive()
		return goroutinesNow <= goroutines+5 && bytesNow <= bytes+4*mib
	})
	t.Logf("%d reloads: %.0f goroutines and %.1f MiB, after a fifth %.0f and %.1f", reloads, goroutinesNow, bytesNow/mib, goroutines, bytes/mib)
	close(stop)
	load.Wait()
	echoes("after all reloads")
	close(release)
	if body, err := io.ReadAll(response.Body); err != nil || string(body) != "begun ended" {
		t.Errorf("the response that ran through all of it: %q %v", body, err)
	}
}
