// Command bench compares what a request costs in the gateway and in others, as far as these are installed: nginx,
// HAProxy, Caddy, Traefik (as it is, and with its experimental fastProxy) and Envoy. The floor for all of them is a byte
// pump that is part of this command.
//
//	go run ./bench                           # all sections, five rounds of 3 s each
//	go run ./bench --quick                   # each section once, short: a look, or CI
//	go run ./bench --only get-64,post        # some sections
//	go run ./bench --json result.json        # the same figures, and those of every round
//
// It builds the gateway, starts a cheap origin written for this purpose, puts each gateway in turn in front of that
// origin with the same forwarded headers (one request checks that they arrive), and drives it with a load of its own, or
// with wrk as a check of that (--tool). The gateway has one CPU for itself; load and origin share the next one. These are
// the first two CPUs that the command itself may use: `taskset -c 2,6 go run ./bench` chooses others. Within a round the
// gateways take turns, each round starts with another one, and the table shows medians over the rounds. Everything stays
// on loopback; what was started is ended, also on Ctrl-C.
//
// # How to read the table
//
//   - us/req: CPU microseconds of the gateway's processes per answered request, the figure that matters here. The total
//     is the kernel's process CPU clock (nanoseconds); how it splits into user and system comes from utime and stime in
//     /proc/PID/stat, which the kernel samples at its tick: good to about 2 % of the total over 3 s.
//   - ±%: half the distance between the dearest and the cheapest round, against the median. Differences below it are noise.
//   - busy: how much of its CPU the gateway used. Well below 100 % the load was the limit, or other programs wanted these
//     CPUs: then req/s is not the gateway's capacity, and us/req contains more sleeping, waking and cold caches.
//   - p50, p99: of a closed loop at full speed, in microseconds: they follow from req/s and the number of connections
//     more than from the gateway, and p99 differs much from run to run.
//   - peak MiB: VmHWM of the largest process since its start (of nginx: the worker).
//   - vs X: us/req divided by that of X; with one connection, p50 divided by that of X. Below 1 is better than X.
//
// A note says when a gateway made connections to the origin anew all the time, which makes it several times dearer.
// A row with an answer other than 2xx or with a failed request is marked invalid, and the exit code is 1.
//
// The pump knows no HTTP: it moves bytes between a client's connection and one to the origin, with the four system calls
// for data that nobody can avoid; pump-splice leaves the bytes of large responses in the kernel.
//
// # What it does not show
//
// Loopback has no network card: a part of TCP's work is charged to whoever sends, equally for all. One CPU says nothing
// about scaling over several, and a virtual machine's neighbours move every figure; ratios within one run are steadier
// than figures of two runs. TLS, logging and bodies of other sizes cost other amounts. The others are tuned as far as
// this comparison needs it (kept-alive connections on both sides, no access log), and no further.
//
// Without Linux it runs too, but shows no CPU or memory, has no pump, and pins nothing.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
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
	Pump   pumpCmd   `cmd:"" hidden:"" help:"Be the byte pump."`
	Load   loadCmd   `cmd:"" hidden:"" help:"Be the built-in load."`
}

func main() {
	var c cli
	parser, err := kong.New(&c, kong.Name("bench"), kong.Help(help),
		kong.Vars{"sections": strings.Join(sectionNames(), ", "), "gateways": strings.Join(gatewayNames, ", ")},
		kong.Description("Compares what a request costs: kerberos and others in front of the same origin."))
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
	Only     []string      `placeholder:"SECTION" help:"Sections to run: ${sections}. All, if none is named."`
	Rounds   int           `default:"5" help:"Rounds; in each, every gateway is driven once."`
	Duration time.Duration `default:"3s" help:"Time of each gateway in a round."`
	Warmup   time.Duration `default:"1s" help:"Time of each gateway before the first round, not counted."`
	Quick    bool          `help:"One round of 1 s, and the C programs only: --rounds 1 --duration 1s --warmup 200ms --gateways kerberos,nginx,haproxy,pump,pump-splice."`
	Gateways []string      `placeholder:"GATEWAY" help:"Which to compare: ${gateways}. All that are installed, if none is named."`
	Kerberos string        `type:"existingfile" placeholder:"FILE" help:"Measure this binary instead of building one."`
	Tool     string        `default:"builtin" enum:"builtin,wrk" help:"What makes the closed loops: ${enum}."`
	JSON     string        `name:"json" type:"path" placeholder:"FILE" help:"Write the figures, those of every round included, to this file too."`
}

// Validate is called by kong.
func (r *runCmd) Validate() error {
	switch {
	case r.Rounds < 1:
		return fmt.Errorf("--rounds %d: at least 1", r.Rounds)
	case r.Duration <= 0 || r.Duration > time.Minute:
		return fmt.Errorf("--duration %s: more than 0, at most 1m", r.Duration)
	case r.Warmup < 0 || r.Warmup > time.Minute:
		return fmt.Errorf("--warmup %s: 0 to 1m", r.Warmup)
	}
	for _, name := range r.Only {
		if !slices.Contains(sectionNames(), name) {
			return fmt.Errorf("--only %s: one of %s", name, strings.Join(sectionNames(), ", "))
		}
	}
	for _, name := range r.Gateways {
		if !slices.Contains(gatewayNames, name) {
			return fmt.Errorf("--gateways %s: one of %s", name, strings.Join(gatewayNames, ", "))
		}
	}
	return nil
}

// Run measures and prints section after section.
func (r *runCmd) Run(ctx context.Context) error {
	if r.Quick {
		r.Rounds, r.Duration, r.Warmup = 1, time.Second, 200*time.Millisecond
		r.Gateways = []string{"kerberos", "nginx", "haproxy", "pump", "pump-splice"}
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
	for _, s := range sections() {
		if len(r.Only) > 0 && !slices.Contains(r.Only, s.name) {
			continue
		}
		tables, err := s.run(ctx, b)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		for _, t := range tables {
			t.print(os.Stdout)
			valid = valid && t.valid()
		}
		res.Tables = append(res.Tables, tables...)
		if r.JSON != "" { // after each: a run takes long, and may be interrupted
			if err := writeJSON(r.JSON, res); err != nil {
				return err
			}
		}
	}
	if !valid {
		return errors.New("some answers were not as they should be, or some requests failed: those rows say nothing about cost")
	}
	return nil
}

// gateways finds what is to be compared. missing names what is not installed.
func (r *runCmd) gateways(ctx context.Context, dir string) (found []gateway, missing []string, err error) {
	for _, name := range gatewayNames {
		if len(r.Gateways) > 0 && !slices.Contains(r.Gateways, name) {
			continue
		}
		g, err := findGateway(ctx, name, dir, r.Kerberos)
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

// originCmd is the origin as a process of its own. It prints its addresses.
type originCmd struct {
	Size  int `default:"12"`
	Addrs int `default:"1"`
}

// Run serves until a signal comes.
func (o *originCmd) Run() error {
	dieOfSignals()
	return serveOrigin(o.Size, o.Addrs, func(addrs []string) { fmt.Println(strings.Join(addrs, " ")) })
}

// pumpCmd is the byte pump as a process of its own. It prints its address.
type pumpCmd struct {
	Origin string `arg:""`
	Splice bool
}

// Run serves until a signal comes.
func (p *pumpCmd) Run() error {
	dieOfSignals()
	origin, err := netip.ParseAddrPort(p.Origin)
	if err != nil {
		return err
	}
	return servePump(origin, p.Splice, func(addr string) { fmt.Println(addr) })
}

// dieOfSignals is for processes whose one thread never looks at a context.
func dieOfSignals() { signal.Reset(os.Interrupt, syscall.SIGTERM) }
