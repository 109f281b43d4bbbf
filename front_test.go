package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A front is a reverse proxy of another make before the data listener.
type front struct {
	program string
	// config is a whole configuration that leaves all defaults alone.
	config func(listen, backend, dir string) string
	args   func(file string) []string
}

var nginx = front{
	program: "nginx",
	config: func(listen, backend, dir string) string {
		return nginxConfig(listen, dir, "location / { proxy_pass http://"+backend+"; }")
	},
	args: func(file string) []string { return []string{"-c", file, "-p", filepath.Dir(file), "-e", "stderr"} },
}

// nginxConfig has what keeps a second nginx apart from the machine's own, and a location.
func nginxConfig(listen, dir, location string) string {
	return fmt.Sprintf(`
daemon off;
pid %[2]s/nginx.pid;
events {}
http {
	access_log off;
	client_body_temp_path %[2]s/body;
	proxy_temp_path %[2]s/proxy;
	fastcgi_temp_path %[2]s/fastcgi;
	uwsgi_temp_path %[2]s/uwsgi;
	scgi_temp_path %[2]s/scgi;
	server {
		listen %[1]s;
		%[3]s
	}
}
`, listen, dir, location)
}

// haproxy runs as the user its package makes for it.
var haproxy = front{
	program: "haproxy",
	config: func(listen, backend, _ string) string {
		return haproxyConfig("frontend f\n\tbind " + listen + "\n\tdefault_backend b\nbackend b\n\tserver s " + backend + "\n")
	},
	args: func(file string) []string { return []string{"-db", "-f", file} },
}

func haproxyConfig(sections string) string {
	return `
global
	user haproxy
	group haproxy
defaults
	mode http
	timeout connect 5s
	timeout client 50s
	timeout server 50s
` + sections
}

// trusting is the front as the README configures it.
func trusting(t *testing.T, f front) front {
	t.Helper()
	for _, b := range blocks(t) {
		if b.language == f.program {
			f.config = func(listen, backend, dir string) string {
				text := strings.NewReplacer("127.0.0.1:8080", backend, "bind :80\n", "bind "+listen+"\n").Replace(b.text)
				if f.program == "nginx" {
					return nginxConfig(listen, dir, text)
				}
				return haproxyConfig(text)
			}
			return f
		}
	}
	t.Fatalf("the README does not configure %s", f.program)
	return f
}

// start runs the front on a free port before backend and returns its address. Another process may take the port between
// it being found and it being bound; then it is tried again.
func (f front) start(t *testing.T, backend string) string {
	t.Helper()
	if _, err := exec.LookPath(f.program); err != nil {
		t.Skipf("%s is not installed", f.program)
	}
	// Without root a front runs as the same user as the gateway, and on HTTP/1.1 with no trace in its requests there is
	// nothing left to tell it by.
	if os.Geteuid() != 0 {
		t.Skipf("%s can run as a user of its own only if root starts it", f.program)
	}
	for range 5 {
		if addr, ok := f.try(t, backend); ok {
			return addr
		}
	}
	t.Fatalf("%s does not start", f.program)
	return ""
}

func (f front) try(t *testing.T, backend string) (addr string, ok bool) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr = ln.Addr().String()
	ln.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, f.program+".conf")
	if err := os.WriteFile(file, []byte(f.config(addr, backend, dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	var output transcript
	cmd := exec.Command(f.program, f.args(file)...)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt) // a master ends its workers
		<-ended
		if t.Failed() {
			t.Logf("%s printed\n%s", f.program, output.String())
		}
	})
	eventually(t, f.program+" listens", func() bool {
		select {
		case <-ended:
			return true
		default:
		}
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			ok = true
		}
		return ok
	})
	return addr, ok
}

// Whatever a client forges, a registration that comes through a reverse proxy on the same machine is refused, with the
// defaults of both sides.
func TestRegistrationThroughAFront(t *testing.T) {
	const body = `{"service":"echo","id":"forged","addr":"http://192.0.2.66"}`
	hosts := []string{"localhost", "127.0.0.1", "127.0.0.1:8080", "[::1]", "localhost:9901", "evil.example", "front.example"}
	fields := []string{
		"",
		"X-Forwarded-For: 127.0.0.1\r\n",
		"X-Forwarded-For: \r\n",
		"X-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1;host=localhost\r\n",
		"Connection: X-Forwarded-For, X-Real-IP, Forwarded, Via\r\nX-Forwarded-For: 127.0.0.1\r\nVia: 1.1 x\r\n",
		"Via: 1.1 localhost\r\n",
		"Origin: http://localhost\r\nSec-Fetch-Site: same-origin\r\n",
		"Authorization: Bearer guess\r\n",
		"X-Forwarded-Host: localhost\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Port: 9901\r\n",
		"X_Forwarded_For: 127.0.0.1\r\n",
	}
	for _, f := range []front{nginx, haproxy} {
		t.Run(f.program, func(t *testing.T) {
			g := launch(t, nil)
			g.register("shop", "a", named(t, "shop"))
			addr := f.start(t, g.data)
			if response, text := exchange(t, addr, get("/shop")); response.StatusCode != 200 || text != "shop" {
				t.Fatalf("traffic: %d %s", response.StatusCode, text)
			}
			for _, host := range hosts {
				for _, field := range fields {
					for _, raw := range []string{
						post(body, field),
						strings.Replace(post(body, field), " HTTP/1.1", " HTTP/1.0", 1),
						strings.Replace(post(`{"service":"shop","id":"a"}`, field), "POST", "DELETE", 1),
						strings.Replace(strings.Replace(post(`{"addr":"http://192.0.2.66"}`, field), "POST", "PUT", 1), "/register", "/services/shop/a", 1),
						strings.Replace(get("/services"), "\r\n\r\n", "\r\n"+field+"\r\n", 1),
					} {
						raw = strings.Replace(raw, "Host: localhost", "Host: "+host, 1)
						if strings.Contains(field, "Connection:") {
							raw = strings.Replace(raw, "Connection: close\r\n", "", 1)
						}
						response, text := exchange(t, addr, raw)
						if response.StatusCode != http.StatusForbidden {
							t.Errorf("status %d to\n%s\n%s", response.StatusCode, raw, text)
						}
					}
				}
			}
			_, text := exchange(t, g.admin, get("/services"))
			if strings.Contains(text, "forged") || strings.Contains(text, "192.0.2.66") || !strings.Contains(text, `"name":"shop"`) {
				t.Errorf("something changed: %s", text)
			}
		})
	}
}

// Whoever names the networks that may use the API is taken at his word, other users of this machine included.
func TestAPIAllowGivenExplicitly(t *testing.T) {
	g := launch(t, nil, "--api-allow=loopback")
	addr := haproxy.start(t, g.data)
	if response, text := exchange(t, addr, get("/services")); response.StatusCode != http.StatusOK {
		t.Errorf("through HAProxy: %d %s", response.StatusCode, text)
	}
}

// Behind a front that is trusted, the client is who the front says it is, however much the client forges before that.
func TestClientBehindTrustedFront(t *testing.T) {
	for _, f := range []front{nginx, haproxy} {
		t.Run(f.program, func(t *testing.T) { testTrusted(t, trusting(t, f)) })
	}
}

func testTrusted(t *testing.T, f front) {
	me := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}} // not the front's own address, which is trusted
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	if conn, err := me.Dial("tcp", probe.Addr().String()); err != nil {
		t.Skipf("a second loopback address: %v", err)
	} else {
		conn.Close()
	}

	g := launch(t, []string{"KERBEROS_TOKEN=s3cret"}, "--trusted-proxies=127.0.0.1", "--strategy=ip-hash")
	for i := range 5 {
		url := backend(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%d|%s|%s|%s", i, strings.Join(r.Header.Values("X-Forwarded-For"), ", "), r.Header.Get("X-Real-Ip"), r.Host)
		})
		body := fmt.Sprintf(`{"service":"echo","id":"i%d","addr":%q}`, i, url)
		if response, text := exchange(t, g.admin, post(body, "Authorization: Bearer s3cret\r\n")); response.StatusCode != 204 {
			t.Fatalf("registering: %d %s", response.StatusCode, text)
		}
	}
	addr := f.start(t, g.data)

	chosen := map[string]bool{}
	for range 20 {
		forged := fmt.Sprintf("%d.%d.%d.%d, 10.0.0.%d, 127.0.0.1", 1+rand.IntN(223), rand.IntN(256), rand.IntN(256), rand.IntN(256), rand.IntN(256))
		raw := strings.Replace(get("/echo"), "\r\n\r\n", "\r\nX-Forwarded-For: "+forged+"\r\nX-Real-IP: 198.51.100.1\r\n\r\n", 1)
		response, text, err := converse(me, addr, raw)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("%v %s", err, text)
		}
		parts := strings.Split(text, "|")
		if len(parts) != 4 {
			t.Fatalf("answer %q", text)
		}
		chosen[parts[0]] = true
		if want := forged + ", 127.0.0.2, 127.0.0.1"; parts[1] != want {
			t.Errorf("X-Forwarded-For at the backend: %q, want %q", parts[1], want)
		}
		if parts[2] != "127.0.0.2" {
			t.Errorf("X-Real-IP at the backend: %q, want the client's 127.0.0.2", parts[2])
		}
		if parts[3] != "localhost" {
			t.Errorf("Host at the backend: %q", parts[3])
		}
	}
	if len(chosen) != 1 {
		t.Errorf("one client was sent to %d instances", len(chosen))
	}
	// Other clients are told apart.
	for last := byte(3); last < 40; last++ {
		other := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, last)}}
		_, text, err := converse(other, addr, get("/echo"))
		if err != nil {
			t.Fatal(err)
		}
		chosen[text[:1]] = true
	}
	if len(chosen) < 3 {
		t.Errorf("38 clients were sent to %d of 5 instances", len(chosen))
	}
	// A trusted proxy in front may speak for anybody, so nobody registers through it without the token.
	if response, text := exchange(t, addr, post(`{"service":"echo","id":"x","addr":"http://192.0.2.66"}`)); response.StatusCode != 401 {
		t.Errorf("registering through it: %d %s", response.StatusCode, text)
	}
}
