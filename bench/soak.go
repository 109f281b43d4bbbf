package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"kerberos/bench/soak"
)

// soakCmd runs bench/soak.
type soakCmd struct {
	For      time.Duration `default:"10m" help:"How long."`
	Rate     float64       `default:"1000" help:"Plain GETs a second. Some hundreds of other requests a second come on top of them."`
	Seed     uint64        `default:"1" help:"Of what is chosen at random."`
	Kerberos string        `type:"existingfile" placeholder:"FILE" help:"Soak this binary instead of building one."`
	JSON     string        `name:"json" type:"path" placeholder:"FILE" help:"Write what came of it to this file too."`
}

// Validate is called by kong.
func (c *soakCmd) Validate() error {
	switch {
	case c.For < time.Second:
		return fmt.Errorf("--for %s: at least 1s", c.For)
	case c.Rate < 1:
		return fmt.Errorf("--rate %g: at least 1", c.Rate)
	}
	return nil
}

// soakLimit is the time limit for heads, bodies and responses of clients in a soak: small, so that many run out.
const soakLimit = 2 * time.Second

// soakFlags make the gateway's limits small.
func soakFlags() []string {
	limit := soakLimit.String()
	return []string{"--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0",
		"--client-first-byte-timeout", limit, "--client-head-timeout", limit, "--client-idle-timeout", limit, "--client-body-timeout", limit,
		"--client-write-timeout", limit, "--upstream-idle-timeout", limit, "--request-timeout", "4s", "--response-idle-timeout", "4s",
		"--breaker-open", "1s", "--max-in-flight-per-instance", "200"}
}

// twinFor is how long the twin is soaked, whose goroutines are those of the start.
const twinFor = 10 * time.Second

// Run soaks a twin for a moment, and then the gateway. It fails if anything was not as it must be.
func (c *soakCmd) Run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "kerberos-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	openFiles()
	g, err := findKerberosBinary(ctx, dir, c.Kerberos)
	if err != nil {
		return err
	}
	fmt.Printf("kerberos %s, seed %d: a twin for the goroutines at the start, then the soak of %s\n", versionWord(ctx, 1, g, "version"), c.Seed, c.For)
	_, atStart, err := c.soak(ctx, dir, g, min(twinFor, c.For))
	if err != nil {
		return fmt.Errorf("the twin: %w", err)
	}
	r, atEnd, err := c.soak(ctx, dir, g, c.For)
	if err != nil {
		return err
	}
	if n := len(r.Gauges); n > 1 {
		r.Gauges[1].Goroutines, r.Gauges[n-1].Goroutines = atStart, atEnd
	}
	if atEnd > atStart+goroutineMargin {
		r.Violation("%d goroutines at the end, %d at the end of a twin's %s", atEnd, atStart, min(twinFor, c.For))
	}
	r.Print(os.Stdout)
	if c.JSON != "" {
		if err := writeJSON(c.JSON, r); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if r.Found > 0 {
		return fmt.Errorf("%d violations", r.Found)
	}
	return nil
}

// goroutineMargin is for those of the runtime and of the standard library, which come and go.
const goroutineMargin = 4

// soak starts a gateway, soaks it, and ends it with SIGQUIT, which has it print its goroutines.
func (c *soakCmd) soak(ctx context.Context, dir, binary string, d time.Duration) (*soak.Report, int, error) {
	cmd := exec.Command(binary, soakFlags()...)
	cmd.Dir = dir
	cmd.Env = environment("KERBEROS_TOKEN="+apiToken, "GOTRACEBACK=all")
	addrs := make(chan [2]string, 16) // listener, address
	var goroutines, errs atomic.Int64
	p, err := startProcess(nil, cmd, func(line string) {
		var l struct{ Level, Msg, Listener, Addr string }
		switch {
		case strings.HasPrefix(line, "goroutine "):
			goroutines.Add(1)
		case json.Unmarshal([]byte(line), &l) != nil:
		case l.Level == "ERROR":
			errs.Add(1)
			fmt.Println(line)
		case l.Msg == "listening":
			select {
			case addrs <- [2]string{l.Listener, l.Addr}:
			default: // more listeners than we asked for
			}
		}
	})
	if err != nil {
		return nil, 0, err
	}
	defer p.stop()
	at := map[string]string{}
	err = p.waitFor(ctx, func(context.Context) error {
		select {
		case a := <-addrs:
			at[a[0]] = a[1]
		default:
		}
		if at["data"] == "" || at["admin"] == "" {
			return errors.New("no log line tells its addresses")
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	config := soak.Config{Gateway: at["data"], Admin: at["admin"], Token: apiToken, Limit: soakLimit, For: d, Rate: c.Rate, Seed: c.Seed,
		Backend: func(ctx context.Context, service, id string) (soak.Backend, error) {
			return startBackend(ctx, binary, at["admin"], service, id)
		},
		Log: func(format string, args ...any) {
			fmt.Printf("%4.0f s  "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
		}}
	if soak.CanGauge {
		config.Gauges = func() (soak.Gauges, error) { return soak.GaugesOf(p.cmd.Process.Pid, at["data"], at["admin"]) }
	}
	r, err := soak.Run(ctx, config)
	if err != nil {
		return nil, 0, fmt.Errorf("%w\n%s", err, p.log)
	}
	select {
	case <-p.exited:
		r.Violation("the gateway ended by itself: %s", p.log)
	default:
		if p.cmd.Process.Signal(syscall.SIGQUIT) == nil {
			select {
			case <-p.exited:
			case <-time.After(10 * time.Second):
				return nil, 0, errors.New("the gateway does not end with SIGQUIT")
			}
		}
	}
	if n := errs.Load(); n > 0 { // all that it logged was read
		r.Violation("the gateway logged %d errors", n)
	}
	return r, int(goroutines.Load()), nil
}

// soakBackend is `kerberos backend`.
type soakBackend struct{ *process }

func (b soakBackend) Stop() { b.stop() }

func (b soakBackend) Kill() {
	kill(b.cmd.Process)
	<-b.exited
}

// startBackend starts one and waits until it is registered.
func startBackend(ctx context.Context, binary, admin, service, id string) (soak.Backend, error) {
	cmd := exec.Command(binary, "backend", "--listen", "127.0.0.1:0", "--name", id, "--service", service, "--register", "http://"+admin)
	cmd.Env = environment("KERBEROS_TOKEN="+apiToken, "GOMAXPROCS=1")
	registered := make(chan struct{}, 1)
	p, err := startProcess(nil, cmd, func(line string) {
		if strings.HasPrefix(line, "registered ") {
			registered <- struct{}{}
		}
	})
	if err != nil {
		return nil, err
	}
	err = p.waitFor(ctx, func(context.Context) error {
		select {
		case <-registered:
			return nil
		default:
			return errors.New("it is not registered")
		}
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	return soakBackend{p}, nil
}
