package access

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// freePort returns a port of loopback that was free a moment ago.
func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// start runs a proxy until the test ends, and returns when it answers at all ports.
func start(t *testing.T, ports []int, command string, args ...string) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command(command, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	deadline := time.Now().Add(10 * time.Second)
	for _, port := range ports {
		for {
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err == nil {
				c.Close()
				break
			}
			select {
			case err := <-ended:
				ended <- err
				t.Fatalf("%s ended: %v\n%s", command, err, &out)
			case <-time.After(10 * time.Millisecond):
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s does not answer at port %d", command, port)
			}
		}
	}
}

func lookup(t *testing.T, command string) string {
	t.Helper()
	for _, path := range []string{command, "/usr/sbin/" + command, "/usr/local/sbin/" + command} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	t.Skipf("%s is not installed", command)
	return ""
}

// asUser returns the name if there is such a user, so that a proxy can run as what its package makes for it.
func asUser(t *testing.T, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("only root can start a proxy that runs as %s", name)
	}
	if _, err := user.Lookup(name); err != nil {
		t.Skip(err)
	}
	return name
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// forged are the heads with which a client behind a proxy would pass for a local one. The first is the most promising: it
// has no field that tells, so that only what the proxy itself cannot hide is left.
var forged = [][]string{
	{"Host: localhost"},
	{"Host: localhost:8080", "User-Agent: curl/8.0", "Accept: */*"},
	{"Host: 127.0.0.1"},
	{"Host: [::1]"},
	{"Host: localhost", "X-Forwarded-For: 127.0.0.1"},
	{"Host: localhost", "X-Forwarded-For: 127.0.0.1, 127.0.0.1, ::1", "X-Real-IP: 127.0.0.1"},
	{"Host: localhost", "Forwarded: for=127.0.0.1;host=localhost"},
	{"Host: localhost", "Connection: X-Forwarded-For, X-Real-IP, Via, Forwarded, Host"},
	{"Host: localhost", "Via:", "X-Forwarded-For:"},
	{"Host: localhost", "Authorization: Bearer x"},
	{"Host: gateway.example"},
}

// attack sends every forged head, as HTTP/1.1 and 1.0, with a path and with an absolute target. All must be refused.
func attack(t *testing.T, g gateway, port int) {
	t.Helper()
	for _, lines := range forged {
		host := strings.TrimPrefix(lines[0], "Host: ") // HAProxy refuses an absolute target of another host itself
		for _, target := range []string{"/register", "http://" + host + "/register"} {
			for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
				request := post(lines...)
				request = strings.Replace(request, "/register", target, 1)
				request = strings.Replace(request, "HTTP/1.1", version, 1)
				got := send(t, fmt.Sprintf("127.0.0.1:%d", port), request)
				g.want(t, fmt.Sprint(version, " ", target, " ", lines), got, "; set a token")
			}
		}
	}
	// Two requests on one connection, of which the second hides behind the first.
	two := strings.Replace(post("Host: localhost"), "Connection: close\r\n", "", 1) + post("Host: localhost")
	g.want(t, "pipelined", send(t, fmt.Sprintf("127.0.0.1:%d", port), two), "; set a token")
}

// nginx as it is installed speaks HTTP/1.0 to its upstreams, which refuses it. Tuned to be as quiet as it can, it is still
// another user's process.
func TestBehindNginx(t *testing.T) {
	nginx := lookup(t, "nginx")
	g := newGateway(t, Config{}, "127.0.0.1:0")
	open := newGateway(t, Config{AllowSet: true}, "127.0.0.1:0")
	plain, tuned, allowed := freePort(t), freePort(t), freePort(t)
	asRoot, worker := os.Geteuid() == 0, ""
	if asRoot {
		worker = "user " + asUser(t, "www-data") + ";"
	}
	dir := t.TempDir()
	server := func(port int, to, quiet string) string {
		return fmt.Sprintf("server { listen 127.0.0.1:%d; location / { proxy_pass http://%s; %s } }\n", port, to, quiet)
	}
	const quiet = `proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_set_header Connection "";`
	conf := write(t, "nginx.conf", fmt.Sprintf(`%s
daemon off; worker_processes 1; pid %[2]s/pid; error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path %[2]s/body; proxy_temp_path %[2]s/proxy; fastcgi_temp_path %[2]s/fastcgi; uwsgi_temp_path %[2]s/uwsgi; scgi_temp_path %[2]s/scgi;
	%s
}`, worker, dir, server(plain, g.addr, "")+server(tuned, g.addr, quiet)+server(allowed, open.addr, quiet)))
	start(t, []int{plain, tuned, allowed}, nginx, "-e", "stderr", "-p", dir, "-c", conf)

	attack(t, g, plain)
	g.want(t, "as installed", send(t, fmt.Sprintf("127.0.0.1:%d", plain), post("Host: localhost")), "HTTP/1.0")
	g.want(t, "not through nginx", send(t, g.addr, post("Host: localhost")), "")
	if !asRoot {
		t.Log("the rest needs root: nginx runs as the user who runs the tests")
		return
	}
	attack(t, g, tuned)
	g.want(t, "tuned", send(t, fmt.Sprintf("127.0.0.1:%d", tuned), post("Host: localhost")), "belongs to user id")
	// So it is the user alone that refuses this one.
	open.want(t, "tuned, loopback allowed explicitly", send(t, fmt.Sprintf("127.0.0.1:%d", allowed), post("Host: localhost")), "")
}

// HAProxy with nothing set passes the request on as it came: only its user tells it from curl.
func TestBehindHAProxy(t *testing.T) {
	haproxy := lookup(t, "haproxy")
	name := asUser(t, "haproxy")
	g := newGateway(t, Config{}, "127.0.0.1:0")
	open := newGateway(t, Config{AllowSet: true}, "127.0.0.1:0")
	plain, allowed := freePort(t), freePort(t)
	conf := write(t, "haproxy.cfg", fmt.Sprintf(`global
	user %s
defaults
	mode http
	timeout connect 5s
	timeout client 5s
	timeout server 5s
listen plain
	bind 127.0.0.1:%d
	server gateway %s
listen allowed
	bind 127.0.0.1:%d
	server gateway %s
`, name, plain, g.addr, allowed, open.addr))
	start(t, []int{plain, allowed}, haproxy, "-db", "-f", conf)

	attack(t, g, plain)
	g.want(t, "as installed", send(t, fmt.Sprintf("127.0.0.1:%d", plain), post("Host: localhost")), "belongs to user id")
	open.want(t, "loopback allowed explicitly", send(t, fmt.Sprintf("127.0.0.1:%d", allowed), post("Host: localhost")), "")
	g.want(t, "not through HAProxy", send(t, g.addr, post("Host: localhost")), "")
}
