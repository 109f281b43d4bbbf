package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kerberos/bench/wire"
)

// wireGateways are those that the table is run against, unless others are named.
var wireGateways = []string{"kerberos", "nginx", "haproxy", "caddy"}

// wireCmd runs the table of bench/wire.
type wireCmd struct {
	Only     []string `placeholder:"ID" help:"Cases to run. All, if none is named."`
	Gateways []string `placeholder:"GATEWAY" help:"Which to run them against: kerberos, nginx, haproxy, caddy. All that are installed, if none is named."`
	Kerberos string   `type:"existingfile" placeholder:"FILE" help:"Run this binary instead of building one."`
	Markdown string   `type:"path" placeholder:"FILE" help:"Write the tables for a page to this file too."`
	At       string   `placeholder:"HOST:PORT" help:"Start no gateway: one that is there already forwards what is below /wire/, and /other/, to --origin, which needs a port then."`
	Origin   string   `default:"127.0.0.1:0" placeholder:"HOST:PORT" help:"Where the origin listens. Port 0: a free one."`
	List     bool     `help:"Run nothing: list the cases."`
}

// Validate is called by kong.
func (w *wireCmd) Validate() error {
	for _, name := range w.Gateways {
		if !slices.Contains(wireGateways, name) {
			return fmt.Errorf("--gateways %s: one of %s", name, strings.Join(wireGateways, ", "))
		}
	}
	if _, port, err := net.SplitHostPort(w.Origin); err != nil {
		return fmt.Errorf("--origin %s: %w", w.Origin, err)
	} else if w.At != "" && strings.Trim(port, "0") == "" {
		return fmt.Errorf("--at %s: it has to forward to --origin, which needs a port: %s", w.At, w.Origin)
	}
	known := map[string]bool{}
	for _, c := range wire.Cases() {
		known[c.ID] = true
	}
	for _, id := range w.Only {
		if !known[id] {
			return fmt.Errorf("--only %s: no such case; see --list", id)
		}
	}
	return nil
}

// Run runs the table and prints it. It fails if kerberos, or the gateway of --at, does not what it must.
func (w *wireCmd) Run(ctx context.Context) error {
	if w.List {
		for _, c := range wire.Cases() {
			fmt.Printf("%s\t%s\t%s\t%s\t%s\n", c.ID, c.Section, c.Level, c.Source, c.Says)
		}
		return nil
	}
	columns, err := w.columns(ctx)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := wire.Print(os.Stdout, columns); err != nil {
		return err
	}
	if w.Markdown != "" {
		if err := os.WriteFile(w.Markdown, wire.Markdown(columns), 0o644); err != nil {
			return err
		}
	}
	for _, c := range columns {
		if n := c.Failed(wire.Must); n > 0 && (w.At != "" || strings.HasPrefix(c.Gateway, "kerberos")) {
			return fmt.Errorf("%s: %d cases that must pass did not", c.Gateway, n)
		}
	}
	return nil
}

// columns runs the cases against each gateway.
func (w *wireCmd) columns(ctx context.Context) ([]wire.Column, error) {
	origin, err := wire.ListenOrigin(w.Origin)
	if err != nil {
		return nil, err
	}
	defer origin.Close()
	if w.At != "" {
		return []wire.Column{{Gateway: w.At, Results: (&wire.Runner{Gateway: w.At, Origin: origin, Only: w.Only}).Run(ctx)}}, nil
	}
	dir, err := os.MkdirTemp("", "kerberos-wire-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	names := w.Gateways
	if len(names) == 0 {
		names = wireGateways
	}
	var columns []wire.Column
	for _, name := range names {
		g, err := findGateway(ctx, name, dir, w.Kerberos)
		if errors.Is(err, errNotInstalled) {
			fmt.Printf("%s is not installed\n", name)
			continue
		}
		if err != nil {
			return nil, err
		}
		start := time.Now()
		results, err := wireResults(ctx, g, filepath.Join(dir, "of-"+name), origin, w.Only)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("%s %s: %d cases in %.0f s\n", g.name, g.version, len(results), time.Since(start).Seconds())
		columns = append(columns, wire.Column{Gateway: strings.TrimSpace(g.name + " " + g.version), Results: results})
	}
	return columns, nil
}

// wireResults starts a gateway in front of the origin and runs the cases.
func wireResults(ctx context.Context, g gateway, dir string, origin *wire.Origin, only []string) ([]wire.Result, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	r, err := g.start(ctx, setup{dir: dir, threads: 1, origins: []string{origin.Addr()}, connections: 64, plain: true})
	if err != nil {
		return nil, err
	}
	defer r.stop()
	err = r.waitFor(ctx, func(ctx context.Context) error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", r.addr)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		return nil, err
	}
	if r.admin != "" {
		for _, service := range []string{"wire", "other"} {
			if err := callAPI(ctx, http.DefaultClient, r.admin, http.MethodPost, instance{Service: service, ID: "i-0", Addr: "http://" + origin.Addr()}); err != nil {
				return nil, err
			}
		}
	}
	return (&wire.Runner{Gateway: r.addr, Origin: origin, Only: only}).Run(ctx), nil
}

// plainConfigs are what these gateways are started with for the wire, in the place of what makes them fast: reverse
// proxies with their defaults, which know WebSocket. A failure of the origin keeps none of them from asking it again.
var plainConfigs = map[string]string{
	"nginx": `
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
%[1]s
events { worker_connections %[2]d; }
http {
	access_log off;
` + nginxPaths + `
	map $http_upgrade $connection_upgrade {
		default upgrade;
		'' '';
	}
	upstream origin {
		server %[3]s max_fails=0;
		keepalive %[4]d;
	}
	server {
		listen %[5]s;
		server_name wire.test;
		client_max_body_size 0;
		location / {
			proxy_pass http://origin;
			proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade;
			proxy_set_header Connection $connection_upgrade;
			proxy_set_header Host $host;
			proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
			proxy_set_header X-Forwarded-Proto $scheme;
		}
	}
}
`,
	"haproxy": `
global
	nbthread 1
	maxconn %[1]d
defaults
	mode http
	option forwardfor
	timeout connect 2s
	timeout client 60s
	timeout server 30s
	timeout tunnel 60s
frontend clients
	bind fd@3
	default_backend origin
backend origin
	server origin %[2]s
`,
	"caddy": `
{
	admin off
	auto_https off
	log {
		level FATAL
	}
	servers {
		protocols h1
	}
}
http://:%[1]s {
	bind 127.0.0.1
	reverse_proxy %[2]s
}
`,
}

// config returns the one that a gateway is started with.
func (s setup) config(name, fast string) string {
	if s.plain {
		return plainConfigs[name]
	}
	return fast
}
