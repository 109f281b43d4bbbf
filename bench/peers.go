package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// nginxPaths keeps nginx from writing outside its directory.
const nginxPaths = `	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;`

// nginxConfig: what matters is that connections are kept on both sides and that the same fields are forwarded. When a
// sixteenth of worker_connections is left, it closes kept-alive ones, and requests are lost that are on their way to them.
const nginxConfig = `
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
%[1]s
events { worker_connections %[2]d; }
http {
	access_log off;
` + nginxPaths + `
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
	text := fmt.Sprintf(s.config("nginx", nginxConfig), user, 3*s.connections+512, s.origins[0], s.connections, addr)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "-p", s.dir, "-c", file)
	cmd.Env = environment("NGINX=3;") // the listening sockets it inherits, by number
	cmd.ExtraFiles = []*os.File{socket}
	p, err := startProcess(s.on, cmd, nil)
	if err != nil {
		return nil, err
	}
	return &running{process: p, addr: addr}, nil
}

// haproxyConfig: by default idle server connections are closed as soon as a quarter of all file descriptors that maxconn
// allows is in use; then a connection is made for each request, which costs five times as much. And it would not start if
// it might not open twice as many files as connections, although nearly all of these are idle when there are many.
const haproxyConfig = `
global
	nbthread 1
	maxconn %[1]d
	no strict-limits
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
	if err := os.WriteFile(file, fmt.Appendf(nil, s.config("haproxy", haproxyConfig), 2*s.connections+64, s.origins[0]), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "-db", "-f", file)
	cmd.Dir = s.dir
	cmd.Env = environment()
	cmd.ExtraFiles = []*os.File{socket}
	p, err := startProcess(s.on, cmd, nil)
	if err != nil {
		return nil, err
	}
	return &running{process: p, addr: addr}, nil
}

// caddyConfig: of itself it forwards the same fields, but asks for gzip where the client does not, and keeps few connections.
const caddyConfig = `
{
	admin off
	auto_https off
	log {
		level ERROR
	}
	servers {
		protocols h1
	}
}
http://:%[1]s {
	bind 127.0.0.1
	reverse_proxy %[2]s {
		transport http {
			compression off
			keepalive_idle_conns_per_host %[3]d
		}
	}
}
`

func startCaddy(ctx context.Context, path string, s setup) (*running, error) {
	addr, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf(s.config("caddy", caddyConfig), portOf(addr), s.origins[0], s.connections)
	return startWith(s, addr, path, map[string]string{"Caddyfile": config},
		"run", "--config", "Caddyfile", "--adapter", "caddyfile")
}

const (
	traefikConfig = `
global:
  checkNewVersion: false
  sendAnonymousUsage: false
log:
  level: ERROR
entryPoints:
  web:
    address: %q
providers:
  file:
    filename: routes.yml
serversTransport:
  maxIdleConnsPerHost: %d
`
	traefikFast = `
experimental:
  fastProxy: {}
`
	traefikRoutes = `
http:
  routers:
    all:
      rule: PathPrefix(` + "`/`" + `)
      service: origin
  services:
    origin:
      loadBalancer:
        servers:
          - url: http://%s
`
)

func startTraefik(ctx context.Context, path string, s setup) (*running, error) {
	return startTraefikWith(ctx, path, s, traefikConfig)
}

// startTraefikFast has its experimental forwarding on top of fasthttp.
func startTraefikFast(ctx context.Context, path string, s setup) (*running, error) {
	return startTraefikWith(ctx, path, s, traefikConfig+traefikFast)
}

func startTraefikWith(ctx context.Context, path string, s setup, config string) (*running, error) {
	addr, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	return startWith(s, addr, path, map[string]string{
		"traefik.yml": fmt.Sprintf(config, addr, s.connections),
		"routes.yml":  fmt.Sprintf(traefikRoutes, s.origins[0]),
	}, "--configFile=traefik.yml")
}

// envoyConfig: the circuit breakers would refuse more than 1024 requests.
const envoyConfig = `
static_resources:
  listeners:
    - address: {socket_address: {address: 127.0.0.1, port_value: %[1]s}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: clients
                codec_type: HTTP1
                use_remote_address: true
                generate_request_id: false
                route_config:
                  virtual_hosts:
                    - name: all
                      domains: ["*"]
                      request_headers_to_add:
                        - header: {key: X-Forwarded-Host, value: "%%REQ(:AUTHORITY)%%"}
                      routes:
                        - match: {prefix: /}
                          route: {cluster: origin, timeout: 30s}
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
                      suppress_envoy_headers: true
  clusters:
    - name: origin
      type: STATIC
      connect_timeout: 2s
      circuit_breakers: {thresholds: [{max_connections: %[3]d, max_pending_requests: %[3]d, max_requests: %[3]d}]}
      load_assignment:
        cluster_name: origin
        endpoints:
          - lb_endpoints:
              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %[2]s}}}
`

func startEnvoy(ctx context.Context, path string, s setup) (*running, error) {
	addr, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf(envoyConfig, portOf(addr), portOf(s.origins[0]), 2*s.connections+64)
	return startWith(s, addr, path, map[string]string{"envoy.yml": text},
		"-c", "envoy.yml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
}

// startWith writes the files and starts the program among them.
func startWith(s setup, addr, path string, files map[string]string, args ...string) (*running, error) {
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = s.dir
	cmd.Env = environment(fmt.Sprintf("GOMAXPROCS=%d", s.threads))
	p, err := startProcess(s.on, cmd, nil)
	if err != nil {
		return nil, err
	}
	return &running{process: p, addr: addr}, nil
}

// freeAddr returns a loopback address whose port is free, for a server that can neither inherit a socket nor say which
// port it took. Should another program get it in between, the server says so and ends.
func freeAddr(ctx context.Context) (string, error) {
	addr, socket, err := listen(ctx)
	if err != nil {
		return "", err
	}
	return addr, socket.Close()
}

func portOf(addr string) string {
	_, port, _ := strings.Cut(addr, ":")
	return port
}
