// Command bench compares the gateway with nginx and HAProxy, as far as these are installed:
//
//	go run ./bench                      # five rounds of 3 s each, about a minute
//	go run ./bench --quick              # two rounds of 1 s: a look, or CI
//	go run ./bench --json result.json   # the same figures, and those of every round
//
// It builds the gateway, starts a cheap origin written for this purpose, puts each gateway in turn in front of that
// origin with the same forwarded headers (one request checks that they arrive), and drives it with wrk, else hey, else
// a small load of its own. The gateway has one CPU for itself; load and origin share the next one. These are the first
// two CPUs that the command itself may use: `taskset -c 2,6 go run ./bench` chooses others. Within a round the gateways
// take turns, each round starts with another one, and the table shows medians over the rounds. Everything stays on
// loopback; what was started is ended, also on Ctrl-C.
//
// # How to read the table
//
//   - us/req: CPU microseconds of the gateway's processes per answered request, the figure that matters here. The total
//     is the kernel's process CPU clock (nanoseconds); how it splits into user and system comes from utime and stime in
//     /proc/PID/stat, which the kernel samples at its tick: good to about 2 % of the total over 3 s.
//   - ±%: half the distance between the dearest and the cheapest round, against the median. Differences below it are noise.
//   - busy: how much of its CPU the gateway used. Well below 100 % the load was the limit, or other programs wanted these
//     CPUs: then req/s is not the gateway's capacity, and us/req contains more sleeping, waking and cold caches.
//   - p50, p99: of a closed loop at full speed, in microseconds, as the load tool reports them: they follow from req/s
//     and the number of connections more than from the gateway, and p99 differs much from run to run.
//   - peak MiB: VmHWM of the largest process since its start (of nginx: the worker).
//   - vs X: us/req divided by that of X. Below 1 is cheaper than X.
//
// A note says when a gateway made connections to the origin anew all the time, which makes it several times dearer.
// A row with an answer other than 2xx or with a failed request is marked invalid, and the exit code is 1.
//
// # What it does not show
//
// Loopback has no network card: a part of TCP's work is charged to whoever sends, equally for all. One CPU says nothing
// about scaling over several, and a virtual machine's neighbours move every figure; ratios within one run are steadier
// than figures of two runs. TLS, logging and bodies of other sizes cost other amounts. nginx and HAProxy are tuned as
// far as this comparison needs it (kept-alive connections on both sides, no access log), and no further.
//
// Without Linux it runs too, but shows no CPU or memory and pins nothing.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

// Exit codes, beside 0: everything measured and every row valid.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

type cli struct {
	Run    runCmd    `cmd:"" default:"withargs" help:"Compare the gateways (what happens without a command)."`
	Origin originCmd `cmd:"" hidden:"" help:"Serve as the origin."`
	Load   loadCmd   `cmd:"" hidden:"" help:"Be the built-in load."`
}

func main() {
	var c cli
	parser, err := kong.New(&c, kong.Name("bench"), kong.Help(help),
		kong.Description("Compares what a request costs: kerberos, nginx and HAProxy in front of the same origin."))
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitFailed)
	}
	k, err := parser.Parse(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the command at once; the kernel then ends what it started
	k.BindTo(ctx, (*context.Context)(nil))
	if err := k.Run(); err != nil {
		if ctx.Err() != nil {
			fmt.Fprintln(os.Stderr, "bench: interrupted")
			os.Exit(exitInterrupted)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitFailed)
	}
}

// help shows the default command's flags on the first page too.
func help(options kong.HelpOptions, ctx *kong.Context) error {
	if ctx.Selected() == nil {
		ctx.Model.Flags = append(ctx.Model.Flags, ctx.Model.DefaultCmd.Flags...)
	}
	return kong.DefaultHelpPrinter(options, ctx)
}

type runCmd struct {
	Rounds      int           `default:"5" help:"Rounds; in each, every gateway is driven once."`
	Duration    time.Duration `default:"3s" help:"Time of each gateway in a round."`
	Warmup      time.Duration `default:"1s" help:"Time of each gateway before the first round, not counted."`
	Quick       bool          `help:"Two rounds of 1 s: --rounds 2 --duration 1s."`
	Connections int           `default:"64" help:"Connections that are kept busy."`
	Gateways    []string      `default:"kerberos,nginx,haproxy" enum:"kerberos,nginx,haproxy" help:"Which to compare; one that is not installed is left out."`
	Kerberos    string        `type:"existingfile" placeholder:"FILE" help:"Measure this binary instead of building one."`
	Tool        string        `default:"auto" enum:"auto,wrk,hey,builtin" help:"What makes the load: ${enum}."`
	JSON        string        `name:"json" type:"path" placeholder:"FILE" help:"Write the figures, those of every round included, to this file too."`
}

// Validate is called by kong.
func (r *runCmd) Validate() error {
	switch {
	case r.Rounds < 1:
		return fmt.Errorf("--rounds %d: at least 1", r.Rounds)
	case r.Connections < 1 || r.Connections > 10_000:
		return fmt.Errorf("--connections %d: 1 to 10000", r.Connections)
	case r.Duration <= 0 || r.Duration > time.Minute:
		return fmt.Errorf("--duration %s: more than 0, at most 1m", r.Duration)
	case r.Warmup < 0 || r.Warmup > time.Minute:
		return fmt.Errorf("--warmup %s: 0 to 1m", r.Warmup)
	}
	return nil
}

// Run measures every load and prints its table.
func (r *runCmd) Run(ctx context.Context) error {
	if r.Quick {
		r.Rounds, r.Duration = 2, time.Second
	}
	tool, err := findTool(ctx, r.Tool)
	if err != nil {
		return err
	}
	if tool.wholeSeconds && (r.Duration%time.Second != 0 || r.Warmup%time.Second != 0) {
		return fmt.Errorf("--duration %s, --warmup %s: %s takes whole seconds", r.Duration, r.Warmup, tool.name)
	}
	dir, err := os.MkdirTemp("", "kerberos-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	gateways, missing, err := r.gateways(ctx, dir)
	if err != nil {
		return err
	}
	b := &bench{dir: dir, tool: tool, gateways: gateways, cpus: pickCPUs(), rounds: r.Rounds, duration: r.Duration, warmup: r.Warmup}
	res := result{Machine: thisMachine(b.cpus), Tool: strings.TrimSpace(tool.name + " " + tool.version), Missing: missing, Rounds: r.Rounds, Seconds: r.Duration.Seconds()}
	res.printHead(os.Stdout)
	valid := true
	for _, l := range loads(r.Connections) {
		t, err := b.measure(ctx, l)
		if err != nil {
			return fmt.Errorf("%s: %w", l.Name, err)
		}
		t.print(os.Stdout)
		valid = valid && t.valid()
		res.Tables = append(res.Tables, t)
	}
	if r.JSON != "" {
		if err := writeJSON(r.JSON, res); err != nil {
			return err
		}
	}
	if !valid {
		return errors.New("some answers were not 2xx, or some requests failed: those rows say nothing about cost")
	}
	return nil
}

// gateways finds what is to be compared. missing names what is not installed.
func (r *runCmd) gateways(ctx context.Context, dir string) (found []gateway, missing []string, err error) {
	for _, name := range r.Gateways {
		var g gateway
		switch name {
		case "kerberos":
			g, err = findKerberos(ctx, dir, r.Kerberos)
		case "nginx":
			g, err = findNginx(ctx)
		case "haproxy":
			g, err = findHAProxy(ctx)
		}
		switch {
		case errors.Is(err, errNotInstalled):
			missing = append(missing, name)
		case err != nil:
			return nil, nil, err
		default:
			found = append(found, g)
		}
	}
	if len(found) == 0 {
		return nil, nil, fmt.Errorf("nothing to measure: %s not installed", strings.Join(missing, ", "))
	}
	return found, missing, nil
}

func writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// originCmd is the origin as a process of its own, so that it can have a CPU of its own.
type originCmd struct {
	Size int `default:"12" help:"Bytes of the response's body."`
}

// Run prints the address it listens on and serves until ctx ends.
func (o *originCmd) Run(ctx context.Context) error {
	failed := make(chan error, 1)
	go func() {
		failed <- serveOrigin(o.Size, func(addr string) { fmt.Println(addr) })
	}()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil // its thread ends with the process
	}
}

// loadCmd is the built-in load as a process of its own: the load as JSON on stdin, the outcome as JSON on stdout.
type loadCmd struct {
	Addr     string        `arg:""`
	Duration time.Duration `arg:""`
}

// Run drives the address for the duration.
func (c *loadCmd) Run(ctx context.Context) error {
	var l load
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(in, &l); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(closedLoop(ctx, l, c.Addr, c.Duration))
}
