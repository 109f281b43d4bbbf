package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
