package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Who may import whom: main -> proxy -> lb, cb, registry, registry/health, which import nothing of ours above them; internal is
// main's; nothing imports bench; examples are as programs of others.
func TestArrows(t *testing.T) {
	allowed := func(from, to string) bool {
		switch {
		case to == "bench" || strings.HasPrefix(to, "bench/"):
			return from == "bench" || strings.HasPrefix(from, "bench/")
		case from == "":
			return true
		case from == "bench" || strings.HasPrefix(from, "bench/"):
			return !strings.HasPrefix(to, "internal/")
		case from == "proxy" || strings.HasPrefix(from, "proxy/"):
			return to == "lb" || to == "cb" || to == "registry" || to == "registry/health" || strings.HasPrefix(to, "proxy/")
		case from == "registry/client": // which is copied into other projects
			return false
		case strings.HasPrefix(from, "examples/"):
			return to == "registry/client"
		case from == "internal/metrics" && to == "proxy": // it reads what that counts
			return true
		case (from == "internal/config" || from == "internal/cli") && to == "proxy": // they read and print its routes
			return true
		case strings.HasPrefix(from, "internal/"):
			told := from == "internal/accesslog" || from == "internal/tracing" // what becomes of requests
			return to == "registry" || to == "lb" || strings.HasPrefix(to, "internal/") || told && to == "proxy"
		default: // lb, cb, registry and what is below them
			top, _, _ := strings.Cut(from, "/")
			return to == top || strings.HasPrefix(to, top+"/")
		}
	}
	tops := []string{"", "proxy", "lb", "registry", "cb", "bench", "internal", "examples"}
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	ours := func(path string) (string, bool) {
		if path == "kerberos" {
			return "", true
		}
		return strings.CutPrefix(path, "kerberos/")
	}
	seen := 0
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath, Dir  string
			Imports, GoFiles []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadDir(p.Dir); err != nil { // so that a cached result is not used when a file there changes
			t.Fatal(err)
		}
		from, _ := ours(p.ImportPath)
		if top, _, _ := strings.Cut(from, "/"); !slices.Contains(tops, top) {
			t.Errorf("%s is at the top level, where there are only %q", p.ImportPath, tops)
		}
		if from == "registry/client" && len(p.GoFiles) != 1 {
			t.Errorf("%s, which is copied into other projects, is %q", p.ImportPath, p.GoFiles)
		}
		for _, path := range p.Imports {
			if first, _, _ := strings.Cut(path, "/"); from == "registry/client" && strings.Contains(first, ".") {
				t.Errorf("%s, which is copied into other projects, imports %s", p.ImportPath, path)
			}
			if to, is := ours(path); is {
				seen++
				if !allowed(from, to) {
					t.Errorf("%s imports %s", p.ImportPath, path)
				}
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d imports were looked at", seen)
	}
}

func TestExitCodes(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tests := []struct {
		name string
		env  []string
		args []string
		code int
		want []string // on stderr
	}{
		{"unknown strategy", nil, []string{"--strategy", "fastest"}, 2, []string{"--strategy", "fastest", "round-robin", "weighted-random", "ip-hash", "--help"}},
		{"unknown strategy in the environment", []string{"BALANCER_STRATEGY=fastest"}, nil, 2, []string{"BALANCER_STRATEGY", "fastest", "ip-hash"}},
		{"bad value", nil, []string{"--request-timeout", "soon"}, 2, []string{"--request-timeout", "soon", "30s"}},
		{"bad file", nil, []string{"--upstream-ca", "/does/not/exist"}, 2, []string{"--upstream-ca", "/does/not/exist"}},
		{"a tokens file that is none", nil, []string{"--listen", "127.0.0.1:0", "--admin", "off", "--tokens", "go.mod"}, 2, []string{"--tokens: go.mod:1:1: the file must be a list of entries"}},
		{"a certificate that is none", nil, []string{"--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--admin-cert", "go.mod", "--admin-key", "go.mod"}, 2, []string{"--admin-cert go.mod"}},
		{"how to check, and not what", nil, []string{"register", "echo", "a", "http://127.0.0.1:1", "--check-interval", "5s"}, 2, []string{"--check-interval", "--check-path", "--check-tcp"}},
		{"half of who calls", nil, []string{"services", "--cert", "go.mod"}, 2, []string{"--cert and --key belong together"}},
		{"nothing of who calls", nil, []string{"services", "--cert", "go.mod", "--key", "go.mod"}, 1, []string{"--cert go.mod and --key go.mod", "PEM"}},
		{"unknown flag", nil, []string{"--verbose"}, 2, []string{"--verbose"}},
		{"unknown command", nil, []string{"serve"}, 2, []string{"serve"}},
		{"missing argument", nil, []string{"register", "echo"}, 2, []string{"<id>"}},
		{"a route twice", nil, []string{"--listen", "127.0.0.1:0", "--admin", "off", "--route", "/a=a", "--route", "/a=b"}, 2, []string{"/a"}},
		{"data address in use", nil, []string{"--listen", taken.Addr().String(), "--admin", "off"}, 1, []string{"--listen", taken.Addr().String(), "in use"}},
		{"admin address in use", nil, []string{"--listen", "127.0.0.1:0", "--admin", taken.Addr().String()}, 1, []string{"--admin", taken.Addr().String(), "in use"}},
		{"a health path of the API", nil, []string{"--listen", "127.0.0.1:0", "--admin", "off", "--health-path", "/services"}, 2, []string{"--health-path", "/services"}},
		{"a route of the API", nil, []string{"--listen", "127.0.0.1:0", "--admin", "off", "--route", "/register=a"}, 2, []string{"--route", "/register"}},
		{"a route that is empty", nil, []string{"--listen", "127.0.0.1:0", "--admin", "off", "--route", ""}, 2, []string{"--route", "PREFIX=SERVICE"}},
		{"less than no retries", nil, []string{"--retries", "-1"}, 2, []string{"--retries", "at least 0"}},
		{"less than no weight", nil, []string{"register", "echo", "a", "http://127.0.0.1:1", "--weight", "-1"}, 2, []string{"--weight", "at least 0"}},
		{"a demo for less than no time", nil, []string{"demo", "--for", "-1s"}, 2, []string{"--for", "at least 0s"}},
		{"a switch with its value beside it", nil, []string{"--via", "off"}, 2, []string{"--via=off"}},
		{"a backend without a name", nil, []string{"backend", "--name", "a/b"}, 2, []string{"--name", "a/b", "A-Z a-z"}},
		{"nobody to ask", nil, []string{"services", "--gateway", "http://127.0.0.1:1"}, 1, []string{"127.0.0.1:1", "refused", "is a gateway running there? see --gateway"}},
		{"bad gateway", nil, []string{"services", "--gateway", "localhost"}, 2, []string{"--gateway", "localhost", "http://"}},
		{"backend's address in use", nil, []string{"backend", "--listen", taken.Addr().String()}, 1, []string{taken.Addr().String(), "in use"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr, code := command(t, test.env, test.args...)
			if code != test.code || stdout != "" {
				t.Errorf("exit code %d, want %d; printed %q", code, test.code, stdout)
			}
			for _, want := range test.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("%q is not in %q", want, stderr)
				}
			}
		})
	}
}

func TestHelp(t *testing.T) {
	stdout, stderr, code := command(t, nil, "--help")
	if code != 0 || stderr != "" {
		t.Fatalf("exit code %d, %s", code, stderr)
	}
	if !strings.Contains(stdout, "\n  --listen=ADDR ") { // and so all the others: TestHelp in internal/config
		t.Error("the gateway's flags are not in the help")
	}
	for _, name := range strings.Fields("demo backend register unregister services explain config routes check version") {
		if !strings.Contains(stdout, "\n  "+name+" ") {
			t.Errorf("the command %s is not in the help", name)
		}
		if stdout, _, code := command(t, nil, name, "--help"); code != 0 || !strings.Contains(stdout, "Usage: kerberos "+name) {
			t.Errorf("kerberos %s --help: exit code %d, %q", name, code, stdout)
		}
	}
}

func TestVersion(t *testing.T) {
	stdout, _, code := command(t, nil, "version")
	if code != 0 || !strings.HasPrefix(stdout, "kerberos ") || !strings.Contains(stdout, "go1.") {
		t.Errorf("exit code %d, %q", code, stdout)
	}
}

// backend is an HTTP server of this test, by which a gateway can be seen from behind.
func backend(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

// named answers with its name.
func named(t *testing.T, name string) string {
	return backend(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })
}

func TestRegisterTrafficUnregister(t *testing.T) {
	g := launch(t, nil)
	if status, _ := g.get("/users/1"); status != 404 {
		t.Errorf("a name never seen: %d, want 404", status)
	}
	if status, _ := g.get("/echo"); status != 503 {
		t.Errorf("echo without an instance: %d, want 503", status)
	}
	for _, listener := range []string{g.data, g.admin} { // the API is on both
		for _, id := range []string{"a", "b"} {
			body := fmt.Sprintf(`{"service":"users","id":%q,"addr":%q}`, id, named(t, id))
			if response, text := exchange(t, listener, post(body)); response.StatusCode != 204 || text != "" {
				t.Fatalf("registering: %d %q", response.StatusCode, text)
			}
		}
		got := map[string]int{}
		for range 10 {
			status, body := g.get("/users/1")
			if status != 200 {
				t.Fatalf("status %d, %s", status, body)
			}
			got[body]++
		}
		if got["a"] != 5 || got["b"] != 5 {
			t.Errorf("10 requests went to %v, want 5 each", got)
		}
		response, body := exchange(t, listener, get("/services/users"))
		var service struct {
			Strategy  string
			InForce   string `json:"in_force"`
			Instances []struct {
				ID      string
				Ready   bool
				Breaker struct{ State string }
			}
		}
		if err := json.Unmarshal([]byte(body), &service); err != nil || response.StatusCode != 200 {
			t.Fatalf("%d, %v in %s", response.StatusCode, err, body)
		}
		if service.Strategy != "round-robin" || service.InForce != "round-robin" || len(service.Instances) != 2 ||
			!service.Instances[0].Ready || service.Instances[1].Breaker.State != "closed" {
			t.Errorf("GET /services/users: %s", body)
		}
		for _, id := range []string{"a", "b"} {
			raw := strings.Replace(post(fmt.Sprintf(`{"service":"users","id":%q}`, id)), "POST", "DELETE", 1)
			if response, text := exchange(t, listener, raw); response.StatusCode != 204 {
				t.Fatalf("unregistering: %d %q", response.StatusCode, text)
			}
			if response, text := exchange(t, listener, raw); response.StatusCode != 404 {
				t.Errorf("unregistering twice: %d %q", response.StatusCode, text)
			}
		}
		if status, _ := g.get("/users/1"); status != 503 {
			t.Errorf("after the last instance left: %d, want 503", status)
		}
	}
	// Neither listener may be registered behind itself.
	for _, addr := range []string{g.data, g.admin} {
		if status, body := g.post(fmt.Sprintf(`{"service":"echo","id":"x","addr":"http://%s"}`, addr)); status != 400 || !strings.Contains(body, `"field":"addr"`) {
			t.Errorf("the gateway's own %s: %d %s", addr, status, body)
		}
	}
}

// Each flag reaches the package that it is for.
func TestFlagsAreWired(t *testing.T) {
	failing := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }
	services := func(g *running, path string) string {
		_, body := exchange(g.t, g.admin, get("/services"+path))
		return body
	}

	t.Run("strategy by its second name, breaker by its flags", func(t *testing.T) {
		g := launch(t, []string{"BALANCER_STRATEGY=ip-hash", "BREAKER_FAILURES=2", "BREAKER_OPEN=1h", "RETRY_MAX=0"}, "--breaker-statuses", "418")
		g.register("echo", "a", backend(t, failing))
		for range 2 {
			if status, _ := g.get("/echo"); status != http.StatusTeapot {
				t.Errorf("status %d", status)
			}
		}
		eventually(t, "the breaker opens", func() bool { return strings.Contains(services(g, "/echo/a"), `"state":"open"`) })
		var instance struct {
			Breaker struct{ Since, Until time.Time }
		}
		if err := json.Unmarshal([]byte(services(g, "/echo/a")), &instance); err != nil {
			t.Error(err)
		}
		if open := instance.Breaker.Until.Sub(instance.Breaker.Since); open < 59*time.Minute || open > 61*time.Minute {
			t.Errorf("the breaker is open for %v, want 1h", open)
		}
		if !g.logged("echo", `"a"`, "open") {
			t.Error("the log does not tell")
		}
		if status, _ := g.get("/echo"); status != 503 {
			t.Errorf("with the only breaker open: %d", status)
		}
		if !strings.Contains(services(g, ""), `"strategy":"ip-hash"`) {
			t.Error("the strategy is not the one of the environment")
		}
	})
	t.Run("probes", func(t *testing.T) {
		var well atomic.Bool
		g := launch(t, []string{"BREAKER_FAILURES=1", "BREAKER_OPEN=50ms", "BREAKER_PROBES=1", "KERBEROS_BREAKER_STATUSES=418"})
		g.register("echo", "a", backend(t, func(w http.ResponseWriter, r *http.Request) {
			if !well.Load() {
				failing(w, r)
			}
		}))
		if status, _ := g.get("/echo"); status != http.StatusTeapot {
			t.Errorf("status %d", status)
		}
		well.Store(true)
		eventually(t, "a probe is answered", func() bool { status, _ := g.get("/echo"); return status == 200 })
		eventually(t, "one is enough", func() bool { return strings.Contains(services(g, "/echo/a"), `"state":"closed"`) })
	})
	t.Run("a flag wins over the environment, KERBEROS_ over the second name", func(t *testing.T) {
		g := launch(t, []string{"BALANCER_STRATEGY=ip-hash", "KERBEROS_STRATEGY=random"})
		g.register("echo", "a", named(t, "a"))
		if !strings.Contains(services(g, ""), `"strategy":"random"`) {
			t.Error("KERBEROS_STRATEGY does not win")
		}
		g = launch(t, []string{"BALANCER_STRATEGY=ip-hash", "KERBEROS_STRATEGY=random"}, "--strategy=weighted-random")
		g.register("echo", "a", named(t, "a"))
		if !strings.Contains(services(g, ""), `"strategy":"weighted-random"`) {
			t.Error("--strategy does not win")
		}
	})
	t.Run("routes", func(t *testing.T) {
		g := launch(t, []string{"KERBEROS_ROUTE=/api=users,/*"})
		g.register("users", "a", named(t, "users"))
		g.register("shop", "a", named(t, "shop"))
		for path, want := range map[string]string{"/api/1": "users", "/shop/1": "shop"} {
			if _, body := g.get(path); body != want {
				t.Errorf("%s answered %q, want %q", path, body, want)
			}
		}
		g = launch(t, nil, "--route", "/api=users")
		g.register("shop", "a", named(t, "shop"))
		if status, _ := g.get("/shop"); status != 404 {
			t.Errorf("beside a table without /*: %d", status)
		}
	})
	t.Run("retries", func(t *testing.T) {
		broken := func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) } // no answer
		for env, want := range map[string]int{"RETRY_MAX=0": 1, "RETRY_MAX=1": 2} {
			g := launch(t, []string{env})
			g.register("echo", "a", backend(t, broken))
			g.register("echo", "b", named(t, "b"))
			answered := 0
			for range 2 {
				if status, _ := g.get("/echo"); status == 200 {
					answered++
				}
			}
			if answered != want {
				t.Errorf("%s: %d of 2 requests were answered, want %d", env, answered, want)
			}
		}
	})
	t.Run("via, health path, request log", func(t *testing.T) {
		echo := func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "via %q", r.Header.Get("Via")) }
		g := launch(t, nil, "--health-path", "/up", "--access-log", "stdout")
		g.register("echo", "a", backend(t, echo))
		if _, body := g.get("/echo"); !strings.Contains(body, `via "1.1 `) {
			t.Errorf("by default: %s", body)
		}
		if status, _ := g.get("/up"); status != 200 {
			t.Errorf("the health path: %d", status)
		}
		eventually(t, "the request is logged", func() bool {
			return strings.Contains(g.stdout.String(), `"path":"/echo"`) && strings.Contains(g.stdout.String(), `"status":200`)
		})
		g = launch(t, nil, "--no-via")
		g.register("echo", "a", backend(t, echo))
		if _, body := g.get("/echo"); body != `via ""` {
			t.Errorf("with --no-via: %s", body)
		}
		if strings.Contains(g.stdout.String(), "/echo") {
			t.Error("requests are logged without being asked for")
		}
	})
	t.Run("where instances may point", func(t *testing.T) {
		g := launch(t, nil, "--addr-deny", "127.0.0.0/8")
		if status, body := g.post(`{"service":"echo","id":"a","addr":"http://127.0.0.1:1"}`); status != 400 || !strings.Contains(body, `"field":"addr"`) {
			t.Errorf("denied: %d %s", status, body)
		}
		g = launch(t, nil, "--addr-allow", "10.0.0.0/8,127.0.0.1")
		for addr, want := range map[string]int{"http://127.0.0.1:1": 204, "http://10.1.2.3": 204, "http://192.0.2.1": 400} {
			if status, body := g.post(fmt.Sprintf(`{"service":"echo","id":"a","addr":%q}`, addr)); status != want {
				t.Errorf("%s: %d %s, want %d", addr, status, body, want)
			}
		}
	})
	t.Run("upstream certificates", func(t *testing.T) {
		server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "secret") }))
		server.Config.ErrorLog = nil
		defer server.Close()
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			args   []string
			status int
		}{{nil, 502}, {[]string{"--upstream-ca", file}, 200}, {[]string{"--upstream-insecure"}, 200}} {
			g := launch(t, nil, test.args...)
			g.register("echo", "a", server.URL)
			if status, body := g.get("/echo"); status != test.status {
				t.Errorf("%q: %d %s, want %d", test.args, status, body, test.status)
			}
		}
	})
}

// deaf is an address that neither takes nor refuses a connection: its queue is full.
func deaf(t *testing.T) string {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("a full queue refuses connections here")
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 10 {
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the queue does not fill")
	return ""
}

func TestWhoMayUseTheAPI(t *testing.T) {
	const body = `{"service":"echo","id":"a","addr":"http://127.0.0.1:1"}`
	t.Run("token", func(t *testing.T) {
		g := launch(t, []string{"KERBEROS_TOKEN=s3cret"})
		for _, listener := range []string{g.data, g.admin} {
			response, text := exchange(t, listener, post(body))
			if response.StatusCode != 401 || !strings.HasPrefix(response.Header.Get("Www-Authenticate"), "Bearer") {
				t.Errorf("without: %d %v %s", response.StatusCode, response.Header, text)
			}
			if response, text := exchange(t, listener, get("/services")); response.StatusCode != 401 {
				t.Errorf("reading without: %d %s", response.StatusCode, text)
			}
			if response, text := exchange(t, listener, post(body, "Authorization: Bearer s3cret2\r\n")); response.StatusCode != 401 {
				t.Errorf("with another: %d %s", response.StatusCode, text)
			}
			if response, text := exchange(t, listener, post(body, "Authorization: Bearer s3cret\r\n")); response.StatusCode != 204 {
				t.Errorf("with it: %d %s", response.StatusCode, text)
			}
		}
		// Only who may read /services is told which routes there are.
		if response, text := exchange(t, g.data, get("/nothing")); response.StatusCode != 404 || strings.Contains(text, "/echo") {
			t.Errorf("a path of no service: %d %s", response.StatusCode, text)
		}
		may := strings.Replace(get("/nothing"), "\r\n\r\n", "\r\nAuthorization: Bearer s3cret\r\n\r\n", 1)
		if response, text := exchange(t, g.data, may); response.StatusCode != 404 || !strings.Contains(text, "/echo") {
			t.Errorf("the same for who may read: %d %s", response.StatusCode, text)
		}
		if response, _ := exchange(t, g.admin, get("/readyz")); response.StatusCode != 200 {
			t.Errorf("/readyz: %d", response.StatusCode)
		}
		if strings.Contains(g.stderr.String(), "s3cret") {
			t.Error("the log shows the token")
		}
	})
	t.Run("nobody", func(t *testing.T) {
		g := launch(t, nil, "--api-allow=none")
		if status, text := g.post(body); status != 403 || !strings.Contains(text, "--api-allow") || !strings.Contains(text, "--token") {
			t.Errorf("%d %s", status, text)
		}
	})
	t.Run("networks", func(t *testing.T) {
		g := launch(t, nil, "--api-allow=192.0.2.0/24")
		if status, text := g.post(body); status != 403 {
			t.Errorf("another network: %d %s", status, text)
		}
		g = launch(t, nil, "--api-allow=127.0.0.1")
		if status, text := g.post(body); status != 204 {
			t.Errorf("this network: %d %s", status, text)
		}
	})
	t.Run("trusted proxies", func(t *testing.T) {
		g := launch(t, nil, "--trusted-proxies=192.0.2.1")
		if status, text := g.post(body); status != 403 || !strings.Contains(text, "--trusted-proxies") {
			t.Errorf("%d %s", status, text)
		}
	})
	t.Run("admin only", func(t *testing.T) {
		g := launch(t, nil, "--api=admin")
		if response, text := exchange(t, g.data, post(body)); response.StatusCode != 404 {
			t.Errorf("/register on the data listener: %d %s", response.StatusCode, text)
		}
		g.register("register", "a", named(t, "a service of that name"))
		if response, text := exchange(t, g.data, post(body)); response.StatusCode != 200 || text != "a service of that name" {
			t.Errorf("/register is a service's path now: %d %s", response.StatusCode, text)
		}
	})
	t.Run("data only", func(t *testing.T) {
		g := launch(t, nil, "--api=data")
		if status, text := g.post(body); status != 404 {
			t.Errorf("/register on the admin listener: %d %s", status, text)
		}
		if response, text := exchange(t, g.data, post(strings.Replace(body, "echo", "register", 1))); response.StatusCode != 400 {
			t.Errorf("a service named register: %d %s", response.StatusCode, text)
		}
	})
}

// One warning tells that others may reach the API, or that nobody may.
func TestWarning(t *testing.T) {
	others := []string{"whoever passes", "--token", "--api=admin"}
	nobody := []string{"nobody may use the API", "--trusted-proxies", "--token"}
	for _, test := range []struct {
		args []string
		want []string // what the warning has; nil: there is none
	}{
		{[]string{"--listen", ":0"}, others},
		{[]string{"--listen", ":0", "--api=data"}, others},
		{[]string{"--listen", ":0", "--token=s3cret"}, nil},
		{[]string{"--listen", ":0", "--api=admin"}, nil},
		{[]string{"--listen", ":0", "--api-allow=none"}, nil},
		{[]string{"--listen", "127.0.0.1:0"}, nil},
		{[]string{"--listen", ":0", "--trusted-proxies=10.0.0.1"}, nobody},
		{[]string{"--listen", "127.0.0.1:0", "--api=admin", "--trusted-proxies=10.0.0.1"}, nobody},
		{[]string{"--listen", ":0", "--trusted-proxies=10.0.0.1", "--token=s3cret"}, nil},
		{[]string{"--listen", ":0", "--trusted-proxies=10.0.0.1", "--api-allow=none"}, nil},
	} {
		g := launch(t, nil, test.args...)
		warnings := 0
		for _, line := range g.log() {
			if line["level"] == "WARN" {
				warnings++
				for _, want := range test.want {
					if !strings.Contains(fmt.Sprint(line["msg"]), want) {
						t.Errorf("%q: the warning does not say %s: %v", test.args, want, line)
					}
				}
			}
		}
		if (warnings == 1) != (test.want != nil) || warnings > 1 {
			t.Errorf("%q: %d warnings", test.args, warnings)
		}
	}
}

// A backend that holds requests until it is told to let go.
type holding struct {
	url     string
	held    atomic.Int32
	release chan struct{}
}

func hold(t *testing.T) *holding {
	h := &holding{release: make(chan struct{})}
	h.url = backend(t, func(w http.ResponseWriter, r *http.Request) {
		h.held.Add(1)
		select {
		case <-h.release:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, "done")
	})
	return h
}

// request sends one that is held, and tells its end.
func (h *holding) request(t *testing.T, g *running) <-chan string {
	t.Helper()
	before := h.held.Load()
	answer := make(chan string, 1)
	go func() {
		_, body, err := converse(&net.Dialer{}, g.data, get("/echo"))
		if err != nil {
			body = err.Error()
		}
		answer <- body
	}()
	eventually(t, "the request is in flight", func() bool { return h.held.Load() > before })
	return answer
}

func TestShutdown(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(s.String(), func(t *testing.T) {
			h := hold(t)
			g := launch(t, nil, "--shutdown-delay", "1s", "--drain-timeout", "20s", "--health-path", "/up")
			g.register("echo", "a", h.url)
			g.register("fast", "a", named(t, "fast"))
			answer := h.request(t, g)
			if response, _ := exchange(t, g.admin, get("/readyz")); response.StatusCode != 200 {
				t.Fatalf("/readyz before: %d", response.StatusCode)
			}
			g.signal(s)
			eventually(t, "/readyz fails", func() bool {
				response, _ := exchange(t, g.admin, get("/readyz")) // the listener is still open
				return response.StatusCode == 503
			})
			if status, _ := g.get("/up"); status != 503 {
				t.Errorf("the health path during the delay: %d", status)
			}
			if response, _ := exchange(t, g.admin, get("/healthz")); response.StatusCode != 200 {
				t.Errorf("/healthz during the delay: %d", response.StatusCode)
			}
			if status, body := g.get("/fast"); status != 200 || body != "fast" {
				t.Errorf("a request during the delay: %d %s", status, body)
			}
			eventually(t, "the data listener is closed", func() bool {
				conn, err := net.Dial("tcp", g.data)
				if err == nil {
					conn.Close()
				}
				return errors.Is(err, syscall.ECONNREFUSED)
			})
			select {
			case got := <-answer:
				t.Errorf("the request in flight ended early: %q", got)
			default:
			}
			close(h.release)
			if got := <-answer; got != "done" {
				t.Errorf("the request in flight got %q", got)
			}
			if code := g.wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if g.logged("cut at the drain timeout") {
				t.Error("a request is said to be cut")
			}
		})
	}
}

func TestDrainTimeout(t *testing.T) {
	h := hold(t)
	g := launch(t, nil, "--drain-timeout", "100ms")
	g.register("echo", "a", h.url)
	first, second := h.request(t, g), h.request(t, g)
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, answer := range []<-chan string{first, second} {
		if got := <-answer; got == "done" {
			t.Error("a request outlived the drain timeout")
		}
	}
	counted := false
	for _, line := range g.log() {
		if line["count"] == 2.0 {
			counted = true
		}
	}
	if !counted {
		t.Error("the log does not count the 2 requests that were cut")
	}
}

func TestSecondSignal(t *testing.T) {
	h := hold(t)
	g := launch(t, nil, "--drain-timeout", "1h")
	g.register("echo", "a", h.url)
	answer := h.request(t, g)
	g.signal(syscall.SIGTERM)
	eventually(t, "it stops", func() bool { return g.logged("stopping") })
	begun := time.Now()
	g.signal(syscall.SIGINT)
	if code := g.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
	<-answer
}

func TestCommands(t *testing.T) {
	g := launch(t, []string{"KERBEROS_TOKEN=s3cret"})
	env := []string{"KERBEROS_TOKEN=s3cret", "KERBEROS_GATEWAY=http://" + g.admin}
	b := begin(t, env, "backend", "--listen", "127.0.0.1:0", "--name", "b", "--register", "http://"+g.admin)
	eventually(t, "the backend is registered", func() bool { return strings.Contains(b.stdout.String(), "registered echo/b at http://127.0.0.1:") })
	if status, body := g.get("/echo/x?y=1"); status != 200 || !strings.Contains(body, "backend b\nGET /echo/x?y=1\nHost: localhost\n") ||
		!strings.Contains(body, "X-Forwarded-For: 127.0.0.1\n") || !strings.Contains(body, "\nVia: 1.1 ") {
		t.Errorf("%d %s", status, body)
	}

	steps := []struct {
		args   string
		code   int
		stdout string // all of it, or a part if it ends in ...
		stderr string // a part
	}{
		{"register shop a http://127.0.0.1:1 --weight 3", 0, "registered shop/a at http://127.0.0.1:1\n", ""},
		{"register shop a http://127.0.0.1:1 --weight 1000001", 1, "", "weight"},
		{"register shop a ftp://x", 1, "", "addr"},
		{"register shop a ftp://x --token wrong", 1, "", "401"},
		{"services shop", 0, "SERVICE  STRATEGY     INSTANCE  ADDR                WEIGHT  READY  BREAKER...", ""},
		{"services --json", 0, `{"services":[{"name":"echo",...`, ""},
		{"services nobody", 1, "", "nobody"},
		{"unregister shop a", 0, "unregistered shop/a\n", ""},
		{"unregister shop a", 0, "shop/a was not registered\n", ""},
		{"unregister shop a --token wrong", 1, "", "401"},
	}
	for _, step := range steps {
		stdout, stderr, code := command(t, env, strings.Fields(step.args)...)
		part, isPart := strings.CutSuffix(step.stdout, "...")
		if code != step.code || stdout != step.stdout && !(isPart && strings.HasPrefix(stdout, part)) || !strings.Contains(stderr, step.stderr) || (stderr == "") != (step.stderr == "") {
			t.Errorf("kerberos %s: exit code %d, printed %q and %q", step.args, code, stdout, stderr)
		}
	}

	b.signal(syscall.SIGTERM)
	if code := b.wait(); code != 0 || !strings.HasSuffix(b.stdout.String(), "unregistered echo/b\n") {
		t.Errorf("exit code %d, printed %q", code, b.stdout.String())
	}
	if stdout, _, _ := command(t, env, "services"); stdout != "no services are registered\n" {
		t.Errorf("left: %s", stdout)
	}
}

// One cycle of the demo, in 5 s instead of 20.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	stdout, stderr, code := command(t, nil, "demo", "--for=5s", "--cycle=5s")
	if code != 0 || stderr != "" {
		t.Fatalf("exit code %d: %s%s", code, stdout, stderr)
	}
	rest := stdout
	for _, want := range []string{"gateway http://127.0.0.1:", "b stops", `"breaker open"`, "from=half-open", "b is back", `"breaker half-open"`, `"breaker closed"`, " requests, 0 errors: a "} {
		_, after, ok := strings.Cut(rest, want)
		if !ok {
			t.Fatalf("%q does not come, or not in its turn, in\n%s", want, stdout)
		}
		rest = after
	}
}

// The demo keeps its registrations on disk while it runs, and nothing behind it.
func TestDemoInterrupted(t *testing.T) {
	dir := t.TempDir()
	p := begin(t, []string{"TMPDIR=" + dir}, "demo")
	eventually(t, "it shows something", func() bool { return strings.Contains(p.stdout.String(), " requests, ") })
	eventually(t, "its backends are on disk", func() bool {
		files, err := filepath.Glob(filepath.Join(dir, "*", "registry.db"))
		if err != nil || len(files) != 1 {
			return false
		}
		kept, err := os.ReadFile(files[0])
		return err == nil && bytes.Contains(kept, []byte(`"registered_at"`))
	})
	p.signal(syscall.SIGINT)
	if code := p.wait(); code != 0 || !strings.Contains(p.stdout.String(), "errors: a ") {
		t.Errorf("exit code %d:\n%s", code, p.stdout.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
