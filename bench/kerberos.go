package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// findKerberos builds the gateway into dir, or takes the binary given.
func findKerberos(ctx context.Context, dir, binary string) (gateway, error) {
	binary, err := findKerberosBinary(ctx, dir, binary)
	if err != nil {
		return gateway{}, err
	}
	g := gateway{name: "kerberos", version: versionWord(ctx, 1, binary, "version")}
	g.start = func(ctx context.Context, s setup) (*running, error) { return startKerberos(ctx, binary, s) }
	return g, nil
}

func findKerberosBinary(ctx context.Context, dir, binary string) (string, error) {
	if binary != "" {
		return binary, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	binary = filepath.Join(dir, "kerberos")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, ".")
	build.Dir = filepath.Dir(strings.TrimSpace(string(mod)))
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build in %s: %w\n%s", build.Dir, err, out)
	}
	return binary, nil
}

// apiToken is set where much is registered: without a token each call has the gateway look through all TCP sockets of the
// machine for the caller's user.
const apiToken = "bench"

// startKerberos starts the gateway with its defaults on free ports and registers the origin's addresses in turn, as
// instances of the service "bench" and of others beside it.
func startKerberos(ctx context.Context, binary string, s setup) (*running, error) {
	cmd := exec.Command(binary, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	cmd.Dir = s.dir
	cmd.Env = environment(fmt.Sprintf("GOMAXPROCS=%d", s.threads))
	if s.hasToken() {
		cmd.Env = append(cmd.Env, "KERBEROS_TOKEN="+apiToken)
	}
	if s.data {
		cmd.Args = append(cmd.Args, "--data", "data") // in its own directory
	}
	if s.plain {
		cmd.Env = append(cmd.Env, "KERBEROS_BREAKER_FAILURES=1000000") // most origins there fail on purpose
	}
	addrs := make(chan [2]string, 16) // listener, address
	p, err := startProcess(s.on, cmd, func(line string) {
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
	r := &running{process: p}
	err = p.waitFor(ctx, func(ctx context.Context) error {
		select {
		case a := <-addrs:
			switch a[0] {
			case "data":
				r.addr = a[1]
			case "admin":
				r.admin = a[1]
			}
		default:
		}
		if r.addr == "" || r.admin == "" {
			return errors.New("no log line tells its addresses")
		}
		return callAPI(ctx, http.DefaultClient, r.admin, http.MethodPost, instance{Service: serviceName(0), ID: "i-0", Addr: "http://" + s.origins[0]})
	})
	if err == nil {
		err = callAll(ctx, r.admin, http.MethodPost, s.all)
	}
	if err != nil {
		p.stop()
		return nil, err
	}
	return r, nil
}

func (s setup) hasToken() bool { return s.token || s.services > 1 }

// serviceName returns the name of the n-th service; the first is the one that target asks for.
func serviceName(n int) string {
	if n == 0 {
		return "bench"
	}
	return fmt.Sprintf("bench-%d", n)
}

// all are the instances that are to be registered.
func (s setup) all(yield func(instance) bool) {
	for service := range s.services {
		for i := range s.instances {
			if !yield(instance{Service: serviceName(service), ID: fmt.Sprintf("i-%d", i), Addr: "http://" + s.origins[i%len(s.origins)]}) {
				return
			}
		}
	}
	for i := range s.beside {
		if !yield(s.stormed(fmt.Sprintf("i-%d", i))) {
			return
		}
	}
}

// callAll makes many calls, some at a time: an answer comes when its change is published, which many share.
func callAll(ctx context.Context, admin, method string, instances iter.Seq[instance]) error {
	const atATime = 64
	all := make(chan instance)
	errs := make(chan error, atATime)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: atATime}}
	defer client.CloseIdleConnections()
	for range atATime {
		go func() {
			var first error
			for in := range all {
				if first == nil {
					first = callAPI(ctx, client, admin, method, in)
				}
			}
			errs <- first
		}()
	}
	for in := range instances {
		all <- in
	}
	close(all)
	var failed error
	for range atATime {
		if err := <-errs; failed == nil {
			failed = err
		}
	}
	return failed
}

// instance is what the API is told.
type instance struct {
	Service string `json:"service"`
	ID      string `json:"id"`
	Addr    string `json:"addr,omitempty"`
	TTL     string `json:"ttl,omitempty"`
	Check   *check `json:"check,omitempty"`
}

type check struct {
	TCP      bool   `json:"tcp"`
	Interval string `json:"interval"`
}

// stormed is an instance of the service with the storm; with data it has all that a gateway can do for it.
func (s setup) stormed(id string) instance {
	in := instance{Service: stormService, ID: id, Addr: "http://" + s.besideAt}
	if s.data {
		in.TTL, in.Check = "1h", &check{true, "10s"}
	}
	return in
}

// callAPI registers an instance (POST) or unregisters it (DELETE).
func callAPI(ctx context.Context, client *http.Client, admin, method string, in instance) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+admin+"/register", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+apiToken) // where there is no token it means nothing
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("%s /register: %d %s", method, resp.StatusCode, text)
	}
	return nil
}
