package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// bench is one call of the command.
type bench struct {
	dir              string // for temporary files
	tool             tool
	gateways         []gateway
	cpus             cpus
	files            int // that a process may have open
	quick            bool
	rounds           int
	duration, warmup time.Duration
}

// subject is what a row of a table is about: a gateway, as it is set up and driven for it.
type subject struct {
	gateway
	setting string // tells it from others of the same gateway
	load    load
	from    cpuSet // where the load runs, if not where it usually does
	setup   setup  // what differs from the usual
}

// group is subjects that take turns before the same origin.
type group struct {
	*bench
	subjects []subject
	origin   *process
	origins  []string // its addresses
	at       []*running
}

// start starts an origin, there, and the subjects before it, and checks that they forward as they should.
func (b *bench) start(ctx context.Context, name string, there cpuSet, subjects []subject) (*group, error) {
	g := &group{bench: b, subjects: subjects}
	var err error
	if g.origin, g.origins, err = startOrigin(ctx, there, subjects[0].load.Response, originAddrs); err != nil {
		return nil, err
	}
	for i, s := range subjects {
		if err := g.add(ctx, filepath.Join(b.dir, name, fmt.Sprint(i)), s); err != nil {
			g.stop()
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return g, nil
}

// originAddrs are the addresses that the origin has: instances are spread over them.
const originAddrs = 10

func (g *group) add(ctx context.Context, dir string, s subject) error {
	with := s.setup
	with.dir, with.origins, with.connections = dir, g.origins, s.load.Connections
	with.threads, with.services, with.instances = max(1, with.threads), max(1, with.services), max(1, with.instances)
	if with.on == nil {
		with.on = g.cpus.gateway
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	r, err := s.gateway.start(ctx, with)
	if err != nil {
		return err
	}
	g.at = append(g.at, r)
	return r.waitFor(ctx, func(ctx context.Context) error {
		return checkForwarding(ctx, r.addr, s.load.Response, isPump(s.name))
	})
}

func (g *group) stop() {
	for _, r := range g.at {
		r.stop()
	}
	g.origin.stop()
}

// rows returns an empty row for each subject.
func (g *group) rows() []*row {
	var rows []*row
	for _, s := range g.subjects {
		rows = append(rows, &row{Gateway: s.name, Version: s.version, Setting: s.setting})
	}
	return rows
}

// takeTurns measures each row once a round. Each round begins with another one, so that none is always the one after the
// same other.
func takeTurns(ctx context.Context, rows []*row, rounds int, measure func(ctx context.Context, i int) (sample, error)) error {
	for round := range rounds {
		for n := range rows {
			i := (round + n) % len(rows)
			s, err := measure(ctx, i)
			if err != nil {
				return fmt.Errorf("%s, round %d: %w", rows[i].label(), round+1, err)
			}
			rows[i].Rounds = append(rows[i].Rounds, s)
		}
	}
	for _, r := range rows {
		r.summarize()
	}
	return nil
}

// drive puts its load on one subject for d, as fast as it answers, and counts what it used for it.
func (g *group) drive(ctx context.Context, i int, d time.Duration) (sample, error) {
	load, err := g.tool.start(ctx, g.loadCPUs(i), g.subjects[i].load, g.at[i].addr, g.dir, d)
	if err != nil {
		return sample{}, err
	}
	defer load.stop()
	return g.count(ctx, g.at[i], load)
}

// pace puts its load on one subject for d, at a fixed rate.
func (g *group) pace(ctx context.Context, i int, rate float64, d time.Duration) (sample, error) {
	load, err := startDrive(ctx, g.loadCPUs(i), g.subjects[i].load, g.at[i].addr, rate, d)
	if err != nil {
		return sample{}, err
	}
	defer load.stop()
	return g.count(ctx, g.at[i], load)
}

func (g *group) loadCPUs(i int) cpuSet {
	if from := g.subjects[i].from; from != nil {
		return from
	}
	return g.cpus.load
}

// count runs a load and counts what the gateway used meanwhile.
func (g *group) count(ctx context.Context, r *running, load driving) (sample, error) {
	pids, err := processTree(r.cmd.Process.Pid)
	if err != nil {
		return sample{}, err
	}
	loads := []int{g.origin.cmd.Process.Pid}
	if pid := load.pid(); pid != 0 {
		loads = append(loads, pid)
	}
	connsBefore, err := accepted(ctx, g.origins[0])
	if err != nil {
		return sample{}, err
	}
	loadBefore, err := usageOf(loads)
	if err != nil {
		return sample{}, err
	}
	before, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	o, err := load.run(ctx)
	if err != nil {
		return sample{}, err
	}
	after, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	loadAfter, err := usageOf(loads)
	if err != nil {
		return sample{}, err
	}
	conns, err := accepted(ctx, g.origins[0])
	if err != nil {
		return sample{}, err
	}
	s := newSample(o, after.sub(before), conns-connsBefore-1) // the last one was ours
	if load.pid() != 0 {
		s.LoadBusy = loadAfter.sub(loadBefore).Total.Seconds() / o.Elapsed.Seconds()
	}
	return s, nil
}

// sample is one row in one round.
type sample struct {
	CPU               float64 `json:"cpu_us"` // per request, microseconds; 0 where unknown, as all of these
	User              float64 `json:"user_us"`
	System            float64 `json:"system_us"`
	RequestsPerSecond float64 `json:"requests_per_second"`
	P50               float64 `json:"p50_us"`
	P99               float64 `json:"p99_us"`
	P999              float64 `json:"p999_us"`
	Late              float64 `json:"late_us"`   // p99 of how much too late an open loop sent by its own fault
	Busy              float64 `json:"busy"`      // CPU time per time
	LoadBusy          float64 `json:"load_busy"` // of load and origin together
	Resident          float64 `json:"rss_mib"`   // of the largest process, at the end
	Peak              float64 `json:"peak_mib"`  // likewise, the highest so far
	PerConn           float64 `json:"per_connection_kib"`
	Registering       float64 `json:"registering_p99_us"` // of registrations meanwhile
	Requests          int     `json:"requests"`
	BadStatus         int     `json:"bad_status"`
	Errors            int     `json:"errors"`
	Unanswered        int     `json:"unanswered"`
	OriginConns       int     `json:"origin_connections"` // newly made to the origin
}

func newSample(o outcome, u usage, originConns int) sample {
	s := sample{OriginConns: originConns, Requests: o.Requests, BadStatus: o.BadStatus, Errors: o.Errors, Unanswered: o.Unanswered,
		P50: micros(o.P50), P99: micros(o.P99), P999: micros(o.P999), Late: micros(o.Late), Resident: mib(u.ResidentKiB), Peak: mib(u.PeakKiB)}
	s.RequestsPerSecond = float64(o.Requests) / o.Elapsed.Seconds()
	s.Busy = u.Total.Seconds() / o.Elapsed.Seconds()
	if o.Requests > 0 {
		s.CPU = micros(u.Total) / float64(o.Requests)
	}
	if split := u.User + u.System; split > 0 {
		s.User = s.CPU * u.User.Seconds() / split.Seconds()
		s.System = s.CPU - s.User
	}
	return s
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func mib(kib int) float64 { return float64(kib) / 1024 }

// measures are the sample's figures of which a row has medians.
func (s *sample) measures() []*float64 {
	return []*float64{&s.CPU, &s.User, &s.System, &s.RequestsPerSecond, &s.P50, &s.P99, &s.P999, &s.Late, &s.Busy, &s.LoadBusy, &s.Resident, &s.Peak, &s.PerConn, &s.Registering}
}

// summarize fills what the row says about its rounds.
func (r *row) summarize() {
	r.Median = sample{}
	for i, m := range r.Median.measures() {
		var values []float64
		for k := range r.Rounds {
			values = append(values, *r.Rounds[k].measures()[i])
		}
		*m = median(values)
	}
	cheapest, dearest := r.Rounds[0].CPU, r.Rounds[0].CPU
	for _, s := range r.Rounds {
		cheapest, dearest = min(cheapest, s.CPU), max(dearest, s.CPU)
		r.Median.Requests += s.Requests
		r.Median.BadStatus += s.BadStatus
		r.Median.Errors += s.Errors
		r.Median.Unanswered += s.Unanswered
		r.Median.OriginConns += s.OriginConns
	}
	if r.Median.CPU > 0 {
		r.Spread = (dearest - cheapest) / 2 / r.Median.CPU
	}
}

// median of at least one value; of an even number, the mean of the two in the middle.
func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
