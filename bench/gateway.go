package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
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
	on          cpuSet
	threads     int      // that do its work
	origins     []string // host:port; all but kerberos take the first
	connections int      // clients at a time
	services    int      // kerberos: registered, the one that is asked for included
	instances   int      // kerberos: of each service
	beside      int      // kerberos: instances of one more service
	besideAt    string   // kerberos: their host:port
	token       bool     // kerberos: its API wants apiToken
	data        bool     // kerberos: it keeps registrations on disk, and those beside have a lease and a check
	plain       bool     // with defaults, and WebSocket: for what it does, not for what that costs
}

// running is a gateway that forwards to the origin.
type running struct {
	*process
	addr  string // where clients go
	admin string // kerberos: where its API is
}

// gatewayNames are all gateways that are known, in the order of the tables.
var gatewayNames = []string{"kerberos", "nginx", "haproxy", "caddy", "traefik", "traefik-fast", "envoy", "pump", "pump-splice"}

// isPump tells the floor from what is compared with it: it forwards bytes, and adds nothing to them.
func isPump(name string) bool { return strings.HasPrefix(name, "pump") }

// findGateway returns the gateway of that name, or errNotInstalled.
func findGateway(ctx context.Context, name, dir, kerberos string) (gateway, error) {
	switch name {
	case "kerberos":
		return findKerberos(ctx, dir, kerberos)
	case "nginx":
		return findPeer(ctx, name, 2, "nginx/", startNginx, "-v")
	case "haproxy":
		return findPeer(ctx, name, 2, "", startHAProxy, "-v")
	case "caddy":
		return findPeer(ctx, name, 0, "v", startCaddy, "version")
	case "traefik":
		return findPeer(ctx, name, 1, "", startTraefik, "version")
	case "traefik-fast":
		return findPeer(ctx, name, 1, "", startTraefikFast, "version")
	case "envoy":
		return findPeer(ctx, name, 2, "", startEnvoy, "--version")
	default:
		return findPump(name)
	}
}

// findPeer looks for a program; the n-th word that it says about its version, without the prefix, is the version.
func findPeer(ctx context.Context, name string, n int, prefix string, start func(context.Context, string, setup) (*running, error), version string) (gateway, error) {
	program, _, _ := strings.Cut(name, "-")
	path, err := lookPath(program)
	if err != nil {
		return gateway{}, err
	}
	g := gateway{name: name, version: strings.TrimPrefix(versionWord(ctx, n, path, version), prefix)}
	if part := strings.Split(g.version, "/"); len(part) > 2 {
		g.version = part[1] // Envoy: commit/version/...
	}
	g.start = func(ctx context.Context, s setup) (*running, error) { return start(ctx, path, s) }
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

// startOrigin starts the origin as a process of its own. It answers with bodies of that size at so many addresses.
func startOrigin(ctx context.Context, on cpuSet, size, addrs int) (p *process, at []string, err error) {
	p, line, err := startSelf(ctx, on, "origin", "--size", fmt.Sprint(size), "--addrs", fmt.Sprint(addrs))
	return p, strings.Fields(line), err
}

// findPump returns the floor: this command itself, which needs Linux for it.
func findPump(name string) (gateway, error) {
	if !canPump {
		return gateway{}, fmt.Errorf("%s: %w", name, errNotInstalled)
	}
	return gateway{name: name, version: "", start: func(ctx context.Context, s setup) (*running, error) {
		args := []string{"pump", s.origins[0]}
		if name == "pump-splice" {
			args = append(args, "--splice")
		}
		p, addr, err := startSelf(ctx, s.on, args...)
		if err != nil {
			return nil, err
		}
		return &running{process: p, addr: addr}, nil
	}}, nil
}

// startSelf starts a hidden command of ours and returns the first line that it prints.
func startSelf(ctx context.Context, on cpuSet, args ...string) (p *process, line string, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	cmd := exec.Command(self, args...)
	cmd.Env = environment("GOMAXPROCS=1")
	lines := make(chan string, 1)
	p, err = startProcess(on, cmd, func(line string) {
		select {
		case lines <- line:
		default:
		}
	})
	if err != nil {
		return nil, "", err
	}
	err = p.waitFor(ctx, func(context.Context) error {
		select {
		case line = <-lines:
			return nil
		default:
			return errors.New("it tells no address")
		}
	})
	if err != nil {
		p.stop()
		return nil, "", err
	}
	return p, line, nil
}

// checkForwarding asks once whether the origin is reached, answers as it should, and sees the fields that every gateway
// but the pump is to set: they cost something, so a gateway without them would be compared unfairly.
func checkForwarding(ctx context.Context, addr string, size int, pump bool) error {
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
	if !bytes.Equal(a.body, bytes.Repeat([]byte("x"), size)) {
		return fmt.Errorf("GET %s: a body of %d bytes, not %d of x", target, len(a.body), size)
	}
	if a, err = get(mirrorQuery); err != nil {
		return err
	}
	seen := strings.ToLower(string(a.body))
	want := []string{"get " + target, "host: " + host}
	if !pump {
		want = append(want, "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: "+host)
	}
	for _, want := range want {
		if !strings.Contains(seen, want) {
			return fmt.Errorf("the origin does not see %q but\n%s", want, a.body)
		}
	}
	if !pump && strings.Contains(seen, "connection: close") { // the pump's client says so
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
