// Command bench says what a request costs in the gateway and in others, as far as these are installed: nginx, HAProxy,
// Caddy, Traefik (as it is, and with its experimental fastProxy) and Envoy. The floor for all of them is a byte pump that
// is part of this command.
//
//	go run ./bench                        # all sections, five rounds of 3 s each: half an hour and more
//	go run ./bench --quick                # each section once, short, in a minute and a half: a look, or CI
//	go run ./bench --only get-64,post     # some sections
//	go run ./bench --json all.json --svg cost.svg --markdown tables.md
//	go run ./bench --from all.json --svg cost.svg      # from an earlier run, or several: nothing is measured
//	go run ./bench wire --markdown wire.md             # what they do with requests and responses that are not as they should be
//	go run ./bench wire --at 127.0.0.1:8080 --origin 127.0.0.1:9000
//	go run ./bench soak --for 10m --json soak.json     # kerberos under loads, faults and restarts at once
//
// It builds the gateway, starts a cheap origin written for this purpose, puts each gateway in turn in front of that
// origin with the same forwarded headers (one request checks that they arrive), and drives it with a load of its own, or
// with wrk as a check of that (--tool). The gateway has one CPU for itself; load and origin share the next one. These are
// the first two CPUs that the command itself may use: `taskset -c 2,6 go run ./bench` chooses others. Within a round the
// gateways take turns every 500 ms, so that all have a part of what slows the machine down for some seconds (wrk can only
// whole rounds, and a storm of registrations is not cut); the tables show medians over the rounds. Everything stays on
// loopback; what was started is ended, also on Ctrl-C.
//
// # Sections
//
//   - get-16, get-64, get-256: GET of 12 bytes on so many connections, each of which asks again once it has its answer.
//   - browser-16, -64, -256: the same with the 13 header fields of a browser, 1 KiB.
//   - post, 16k, 1m: a body of 1 KiB; responses of 16 KiB, and of 1 MiB on 16 connections.
//   - one: the latency of one connection.
//   - open: the latency where requests are due at a fixed rate, 50 and 80 % of what the slower one of kerberos and the best
//     other can do (three rounds of a closed loop in the same section), twice as many rounds. Gateways that can do less
//     are left out, and named.
//   - memory-busy: resident memory while 1,000 connections are busy, looked at 20 times a round.
//   - memory-idle: what 10,000 kept-alive connections add to it, 2 s after each had its one request like a browser's, 64
//     at a time, each round with a new process.
//   - cores: kerberos with GOMAXPROCS 1 and 2. With fewer than four CPUs the second one is shared with load and origin.
//   - services: kerberos with one instance, and with 100 services of 10; requests ask for one of them, or for all in turn.
//     The instances are ten addresses of one origin. Short rounds, four times as many; "paired" is the median of each
//     round's ratio.
//   - storm: kerberos at half of what it can do, quiet, and while 16 callers register 1,000 new instances a second (at a
//     fixed rate, too) into another service of 10,000; after a round they are unregistered, which is not counted. The
//     service that is asked stays as it is: in the other, every request would go to an instance that was never connected.
//     With --data each has a check, which connects to a process that does nothing else.
//   - scale-connections, scale-instances: kerberos with 1 to 1,000 connections and 1 to 10,000 instances.
//
// Then comes what must hold of kerberos, as far as these figures say: "goal" is met, "ok" is accepted, or "missed". None
// of these is an error. A row with an answer other than 2xx, of another length, or with a failed request is marked
// invalid, and makes the exit code 1.
//
// # How to read the tables
//
//   - us/req: CPU microseconds of the gateway's processes per answered request, the figure that matters here. The total
//     is the kernel's process CPU clock (nanoseconds); how it splits into user and system comes from utime and stime in
//     /proc/PID/stat, which the kernel samples at its tick: good to about 2 % of the total over 3 s.
//   - ±%: half the distance between the dearest and the cheapest round, against the median. Differences below it are noise.
//   - busy: how much of its CPU the gateway used. Well below 100 % the load was the limit, or other programs wanted these
//     CPUs: then req/s is not the gateway's capacity, and us/req contains more sleeping, waking and cold caches.
//   - load: how much of their CPU load and origin used together. Near 100 % in an open loop the latencies are theirs, too,
//     and a note says so.
//   - p50, p99, p99.9: in microseconds. Of a closed loop at full speed they follow from req/s and the number of
//     connections more than from the gateway. Of an open loop they count from when a request was due, not from when it
//     was sent, so that a stall shows in all requests that it delayed; buckets are less than 1 % wide.
//   - late: p99 of how much too late the load itself sent. Where it is as large as the latencies, these say little.
//   - MiB: VmRSS of the largest process (of nginx: the worker); peak is VmHWM. What the kernel holds for sockets, several
//     KiB each, is in neither.
//   - vs X: us/req divided by that of X; in one, open, storm and memory their p50, p99 and memory. Below 1 is better than X.
//
// A note says when a gateway made connections to the origin anew all the time, which makes it several times dearer.
//
// The pump knows no HTTP: it moves bytes between a client's connection and one to the origin, with the four system calls
// for data that nobody can avoid. pump-splice leaves what the origin sends in the kernel, and is there for 1 MiB.
//
// # Soak
//
// soak starts kerberos with small limits in front of in-process origins and of child processes. 25 kinds of clients run
// side by side: plain GETs (--rate), bodies, streams, events and tunnels, slow, stopping, resetting and malformed clients.
// Meanwhile backends are killed and started again, restarted in turn, made to reset, hang, drip and break off, and other
// services come and go. Faults change every few seconds, by --seed. For each kind it is known which outcomes are right; any
// other, and any byte that was not sent, is a violation. So is what is left once the load is over and the idle timeouts
// have passed: connections, descriptors, requests in flight, goroutines (read from a SIGQUIT, those at the start from a
// twin that was soaked for a moment) and grown memory. The exit code is 1 if there is a violation. It shows what breaks,
// not what is fast: load, origins and gateway share all CPUs.
//
// # What it does not show
//
// Loopback has no network card: a part of TCP's work is charged to whoever sends, equally for all. One CPU says nothing
// about scaling over many, and a virtual machine's neighbours move every figure, by half within seconds where they are
// busy; ratios within one run are steadier than figures of two runs. TLS, logging and bodies of other sizes cost other
// amounts. In an open loop load and origin share a CPU, so tails contain their waiting for each other, equally for all;
// without batches they need more of it than in a closed loop, and at 80 % may be what is slow.
// The others are tuned as far as this comparison needs it (kept-alive connections on both sides, no access log, room for
// the connections), and no further.
//
// Without Linux it runs too, but shows no CPU or memory, has no pump and no open loop, and pins nothing.
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
	Run     runCmd     `cmd:"" default:"withargs" help:"Compare the gateways (what happens without a command)."`
	Wire    wireCmd    `cmd:"" help:"Run a table of what a gateway must do on the wire: what it refuses, and what it passes on as it is."`
	Soak    soakCmd    `cmd:"" help:"Have kerberos bear loads, faults and restarts side by side, and say what came of it."`
	Origin  originCmd  `cmd:"" hidden:"" help:"Serve as the origin."`
	Checked checkedCmd `cmd:"" hidden:"" help:"Be what only checks connect to."`
	Pump    pumpCmd    `cmd:"" hidden:"" help:"Be the byte pump."`
	Load    loadCmd    `cmd:"" hidden:"" help:"Be the built-in load."`
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
	Quick    bool          `help:"Each section once, short, and against nginx and HAProxy only."`
	Files    int           `hidden:"" default:"65536" help:"Files that a process may have open; where there are few, sections that open thousands are smaller."`
	Gateways []string      `placeholder:"GATEWAY" help:"Which to compare: ${gateways}. All that are installed, if none is named."`
	Kerberos string        `type:"existingfile" placeholder:"FILE" help:"Measure this binary instead of building one."`
	Data     bool          `help:"In the section storm instances have a lease and a check, and kerberos keeps them on disk (its --data), in the directory for temporary files."`
	Tool     string        `default:"builtin" enum:"builtin,wrk" help:"What makes the closed loops: ${enum}."`
	JSON     string        `name:"json" type:"path" placeholder:"FILE" help:"Write the figures, those of every round included, to this file too."`
	SVG      string        `name:"svg" type:"path" placeholder:"FILE" help:"Draw what requests cost to this file."`
	Markdown string        `type:"path" placeholder:"FILE" help:"Write the tables for a page to this file."`
	From     []string      `type:"existingfile" placeholder:"FILE" help:"Measure nothing: print, draw and write from the JSON of an earlier run, or of several that had different sections."`
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
	if len(r.From) > 0 {
		return r.again()
	}
	if r.Quick {
		r.Rounds, r.Duration, r.Warmup = 1, 500*time.Millisecond, 150*time.Millisecond
		r.Gateways = quickGateways
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
	b := &bench{dir: dir, tool: tool, gateways: gateways, cpus: pickCPUs(), files: min(openFiles(), r.Files), quick: r.Quick,
		rounds: r.Rounds, duration: r.Duration, warmup: r.Warmup, data: r.Data}
	res := &result{Machine: thisMachine(b.cpus), Tool: strings.TrimSpace(tool.name + " " + tool.version), Missing: missing, Rounds: r.Rounds, Seconds: r.Duration.Seconds()}
	for _, g := range gateways {
		res.Gateways = append(res.Gateways, strings.TrimSpace(g.name+" "+g.version))
	}
	if r.Quick {
		res.Shortened = []string{
			"one round of 500 ms instead of five of 3 s, two of pairs instead of twenty, one of latency instead of ten: differences of 20 % are noise",
			"of the gateways only " + strings.Join(quickGateways, ", "),
		}
	}
	res.printHead(os.Stdout)
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
		}
		res.add(tables...)
		if r.JSON != "" { // after each: a run takes long, and may be interrupted
			if err := writeJSON(r.JSON, res); err != nil {
				return err
			}
		}
	}
	return r.finish(res)
}

// again does what Run does after measuring.
func (r *runCmd) again() error {
	var all *result
	for _, file := range r.From {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var res result
		if err := json.Unmarshal(b, &res); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if all == nil {
			all = &res
			continue
		}
		if res.Machine != all.Machine || !slices.Equal(res.Gateways, all.Gateways) || res.Rounds != all.Rounds || res.Seconds != all.Seconds || res.Tool != all.Tool {
			return fmt.Errorf("%s: another machine, other gateways, or measured in another way than %s", file, r.From[0])
		}
		all.add(res.Tables...)
	}
	all.printHead(os.Stdout)
	for _, t := range all.Tables {
		t.print(os.Stdout)
	}
	return r.finish(all)
}

// finish judges the result and writes what was asked for.
func (r *runCmd) finish(res *result) error {
	res.summarize()
	res.printSummary(os.Stdout)
	if r.JSON != "" {
		if err := writeJSON(r.JSON, res); err != nil {
			return err
		}
	}
	if r.SVG != "" {
		if err := os.WriteFile(r.SVG, res.svg(), 0o644); err != nil {
			return err
		}
	}
	if r.Markdown != "" {
		if err := os.WriteFile(r.Markdown, res.markdown(), 0o644); err != nil {
			return err
		}
	}
	for _, t := range res.Tables {
		if !t.allValid() {
			return errors.New("some answers were not as they should be, or some requests failed: those rows say nothing about cost")
		}
	}
	return nil
}

// quickGateways are those that --quick compares: Go programs take several times as long to warm up.
var quickGateways = []string{"kerberos", "nginx", "haproxy", "pump", "pump-splice"}

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

// checkedCmd is what only checks connect to as a process of its own. It prints its address.
type checkedCmd struct{}

// Run serves until a signal comes.
func (*checkedCmd) Run() error {
	dieOfSignals()
	return serveChecked(func(addr string) { fmt.Println(addr) })
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
