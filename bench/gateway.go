package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// gateway is one of those that are compared.
type gateway struct {
	name, version string
	start         func(ctx context.Context, s setup) (*running, error)
}

// setup is what a gateway is started with.
type setup struct {
	dir         string // for its files; its own
	cpu         int
	origin      string // host:port
	connections int    // clients at a time
}

// running is a gateway that forwards to the origin.
type running struct {
	*process
	addr string // where clients go
}

// findKerberos builds the gateway into dir, or takes the binary given.
func findKerberos(ctx context.Context, dir, binary string) (gateway, error) {
	if binary == "" {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
		if err != nil {
			return gateway{}, fmt.Errorf("go env GOMOD: %w", err)
		}
		binary = filepath.Join(dir, "kerberos")
		build := exec.CommandContext(ctx, "go", "build", "-o", binary, ".")
		build.Dir = filepath.Dir(strings.TrimSpace(string(mod)))
		if out, err := build.CombinedOutput(); err != nil {
			return gateway{}, fmt.Errorf("go build in %s: %w\n%s", build.Dir, err, out)
		}
	}
	g := gateway{name: "kerberos", version: versionWord(ctx, 1, binary, "version")}
	g.start = func(ctx context.Context, s setup) (*running, error) { return startKerberos(ctx, binary, s) }
	return g, nil
}

// versionWord returns the n-th word (from 0) of what a program says first.
func versionWord(ctx context.Context, n int, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = environment()
	out, _ := cmd.CombinedOutput() // nginx tells stderr, wrk exits with 1
	line, _, _ := strings.Cut(string(out), "\n")
	words := strings.Fields(line)
	if n >= len(words) {
		return "unknown"
	}
	return strings.Trim(words[n], "(),")
}

// startKerberos starts the gateway with its defaults on free ports and registers the origin as service "bench".
func startKerberos(ctx context.Context, binary string, s setup) (*running, error) {
	cmd := exec.Command(binary, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	cmd.Dir = s.dir
	cmd.Env = environment("GOMAXPROCS=1")
	addrs := make(chan [2]string, 16) // listener, address
	p, err := startProcess(s.cpu, cmd, func(line string) {
		var l struct{ Msg, Listener, Addr string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "listening" {
			select {
			case addrs <- [2]string{l.Listener, l.Addr}:
			default: // more listeners than we asked for
			}
		}
	})
	if err != nil {
		return nil, err
	}
	var data, admin string
	err = p.waitFor(ctx, func(ctx context.Context) error {
		select {
		case a := <-addrs:
			switch a[0] {
			case "data":
				data = a[1]
			case "admin":
				admin = a[1]
			}
		default:
		}
		if data == "" || admin == "" {
			return fmt.Errorf("no log line tells its addresses")
		}
		return register(ctx, admin, s.origin)
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	return &running{p, data}, nil
}

// register tells the gateway of the origin.
func register(ctx context.Context, admin, origin string) error {
	body, err := json.Marshal(map[string]string{"service": "bench", "id": "origin", "addr": "http://" + origin})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+admin+"/register", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	answer, err := fetch(req)
	if err != nil {
		return err
	}
	if answer.status != http.StatusNoContent {
		return fmt.Errorf("POST /register: %d %s", answer.status, answer.body)
	}
	return nil
}

func findNginx(ctx context.Context) (gateway, error) {
	path, err := lookPath("nginx")
	if err != nil {
		return gateway{}, err
	}
	g := gateway{name: "nginx", version: strings.TrimPrefix(versionWord(ctx, 2, path, "-v"), "nginx/")}
	g.start = func(ctx context.Context, s setup) (*running, error) { return startNginx(ctx, path, s) }
	return g, nil
}

// nginxConfig: what matters is that connections are kept on both sides and that the same fields are forwarded.
const nginxConfig = `
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
%[1]s
events { worker_connections %[2]d; }
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	keepalive_requests 1000000000;
	upstream origin {
		server %[3]s;
		keepalive %[4]d;
		keepalive_requests 1000000000;
	}
	server {
		listen %[5]s;
		location / {
			proxy_pass http://origin;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host $http_host;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_set_header X-Forwarded-Proto $scheme;
			proxy_set_header X-Forwarded-Host $http_host;
		}
	}
}
`

func startNginx(ctx context.Context, path string, s setup) (*running, error) {
	addr, socket, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;" // another user could not enter the directory of its temporary files
	}
	file := filepath.Join(s.dir, "nginx.conf")
	text := fmt.Sprintf(nginxConfig, user, 2*s.connections+64, s.origin, s.connections, addr)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "-p", s.dir, "-c", file)
	cmd.Env = environment("NGINX=3;") // the listening sockets it inherits, by number
	cmd.ExtraFiles = []*os.File{socket}
	p, err := startProcess(s.cpu, cmd, nil)
	if err != nil {
		return nil, err
	}
	return &running{p, addr}, nil
}

func findHAProxy(ctx context.Context) (gateway, error) {
	path, err := lookPath("haproxy")
	if err != nil {
		return gateway{}, err
	}
	g := gateway{name: "haproxy", version: versionWord(ctx, 2, path, "-v")}
	g.start = func(ctx context.Context, s setup) (*running, error) { return startHAProxy(ctx, path, s) }
	return g, nil
}

// haproxyConfig: by default idle server connections are closed as soon as a quarter of all file descriptors that maxconn
// allows is in use; then a connection is made for each request, which costs five times as much.
const haproxyConfig = `
global
	nbthread 1
	maxconn %[1]d
	tune.pool-high-fd-ratio 95
	tune.pool-low-fd-ratio 90
defaults
	mode http
	http-reuse always
	option http-keep-alive
	option forwardfor
	timeout connect 2s
	timeout client 60s
	timeout server 30s
frontend clients
	bind fd@3
	http-request set-header X-Forwarded-Proto http
	http-request set-header X-Forwarded-Host %%[req.hdr(Host)]
	default_backend origin
backend origin
	server origin %[2]s
`

func startHAProxy(ctx context.Context, path string, s setup) (*running, error) {
	addr, socket, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	file := filepath.Join(s.dir, "haproxy.cfg")
	if err := os.WriteFile(file, fmt.Appendf(nil, haproxyConfig, 2*s.connections+64, s.origin), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "-db", "-f", file)
	cmd.Dir = s.dir
	cmd.Env = environment()
	cmd.ExtraFiles = []*os.File{socket}
	p, err := startProcess(s.cpu, cmd, nil)
	if err != nil {
		return nil, err
	}
	return &running{p, addr}, nil
}

// startOrigin starts the origin as a process of its own.
func startOrigin(ctx context.Context, cpu, size int) (*running, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "origin", "--size", fmt.Sprint(size))
	cmd.Env = environment("GOMAXPROCS=1")
	addrs := make(chan string, 1)
	p, err := startProcess(cpu, cmd, func(line string) {
		select {
		case addrs <- line:
		default:
		}
	})
	if err != nil {
		return nil, err
	}
	r := &running{process: p}
	err = p.waitFor(ctx, func(context.Context) error {
		select {
		case r.addr = <-addrs:
			return nil
		default:
			return fmt.Errorf("it tells no address")
		}
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	return r, nil
}

// checkForwarding asks once whether the origin is reached, answers as it should, and sees the fields that every gateway
// is to set: they cost something, so a gateway without them would be compared unfairly.
func checkForwarding(ctx context.Context, addr string, size int) error {
	const host = "client-asked-for.example"
	get := func(query string) (answer, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+target+query, nil)
		if err != nil {
			return answer{}, err
		}
		req.Host = host
		a, err := fetch(req)
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("GET %s%s: %d %s", target, query, a.status, a.body)
		}
		return a, err
	}
	a, err := get("")
	if err != nil {
		return err
	}
	if len(a.body) != size {
		return fmt.Errorf("GET %s: a body of %d bytes, not %d", target, len(a.body), size)
	}
	if a, err = get(mirrorQuery); err != nil {
		return err
	}
	seen := strings.ToLower(string(a.body))
	for _, want := range []string{"get " + target, "host: " + host, "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: " + host} {
		if !strings.Contains(seen, want) {
			return fmt.Errorf("the origin does not see %q but\n%s", want, a.body)
		}
	}
	if strings.Contains(seen, "connection: close") {
		return fmt.Errorf("the origin is told to close the connection:\n%s", a.body)
	}
	return nil
}

// accepted asks the origin how many connections it took so far.
func accepted(ctx context.Context, origin string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+origin+"/"+mirrorQuery, nil)
	if err != nil {
		return 0, err
	}
	a, err := fetch(req)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(a.header.Get(acceptedHeader))
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

// fetch makes one request on a connection of its own.
func fetch(req *http.Request) (answer, error) {
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body}, err
}
