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
	data             bool // storm: with --data
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

	driven    []time.Time // when each was last
	connected []bool      // see connect
}

// start starts an origin, there, and the subjects before it, and checks that they forward as they should.
func (b *bench) start(ctx context.Context, name string, there cpuSet, subjects []subject) (*group, error) {
	g := &group{bench: b, subjects: subjects, driven: make([]time.Time, len(subjects)), connected: make([]bool, len(subjects))}
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

// slice is how long a subject is driven at a stretch: neighbours of a virtual machine slow it down for some seconds, and
// then all subjects should have a part of that.
const slice = 500 * time.Millisecond

// slices returns how many make up a round, and the time of each.
func (b *bench) slices() (int, time.Duration) {
	n := int(max(b.duration/slice, 1))
	if b.tool.wholeSeconds {
		n = 1
	}
	return n, b.duration / time.Duration(n)
}

// takeTurns measures each row in each round, in so many slices. Each slice begins with another row, so that none is always
// the one after the same other.
func takeTurns(ctx context.Context, rows []*row, rounds, slices int, measure func(ctx context.Context, i int) (measurement, error)) error {
	for round := range rounds {
		sums := make([]measurement, len(rows))
		for s := range slices {
			for n := range rows {
				i := (round + s + n) % len(rows)
				m, err := measure(ctx, i)
				if err != nil {
					return fmt.Errorf("%s, round %d: %w", rows[i].label(), round+1, err)
				}
				if s == 0 {
					sums[i] = m
				} else {
					sums[i].add(m)
				}
			}
		}
		for i, r := range rows {
			r.Rounds = append(r.Rounds, sums[i].sample())
		}
	}
	for _, r := range rows {
		r.summarize()
	}
	return nil
}

// measurement is what a load and its gateway did and used.
type measurement struct {
	outcome
	gateway, load usage         // load: of origin and load together, nothing if unknown
	conns         int           // newly made to the origin
	registering   time.Duration // p99 of registrations meanwhile
}

func (m *measurement) add(later measurement) {
	m.outcome.add(later.outcome)
	m.gateway, m.load = m.gateway.add(later.gateway), m.load.add(later.load)
	m.conns += later.conns
	m.registering = max(m.registering, later.registering)
}

// drive puts its load on one subject for d, as fast as it answers, and counts what it used for it.
func (g *group) drive(ctx context.Context, i int, d time.Duration) (measurement, error) {
	load, err := g.tool.start(ctx, g.loadCPUs(i), g.subjects[i].load, g.at[i].addr, g.dir, d)
	if err != nil {
		return measurement{}, err
	}
	defer load.stop()
	defer func() { g.driven[i] = time.Now() }()
	return g.count(ctx, g.at[i], load)
}

// pace puts its load on one subject for d, at a fixed rate.
func (g *group) pace(ctx context.Context, i int, rate float64, d time.Duration) (measurement, error) {
	load, err := startDrive(ctx, g.loadCPUs(i), g.subjects[i].load, g.at[i].addr, rate, d)
	if err != nil {
		return measurement{}, err
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
func (g *group) count(ctx context.Context, r *running, load driving) (measurement, error) {
	pids, err := processTree(r.cmd.Process.Pid)
	if err != nil {
		return measurement{}, err
	}
	loads := []int{g.origin.cmd.Process.Pid}
	if pid := load.pid(); pid != 0 {
		loads = append(loads, pid)
	}
	connsBefore, err := accepted(ctx, g.origins[0])
	if err != nil {
		return measurement{}, err
	}
	loadBefore, err := usageOf(loads)
	if err != nil {
		return measurement{}, err
	}
	before, err := usageOf(pids)
	if err != nil {
		return measurement{}, err
	}
	o, err := load.run(ctx)
	if err != nil {
		return measurement{}, err
	}
	after, err := usageOf(pids)
	if err != nil {
		return measurement{}, err
	}
	loadAfter, err := usageOf(loads)
	if err != nil {
		return measurement{}, err
	}
	conns, err := accepted(ctx, g.origins[0])
	if err != nil {
		return measurement{}, err
	}
	did := measurement{outcome: o, gateway: after.sub(before), conns: conns - connsBefore - 1} // the last one was ours
	if load.pid() != 0 {
		did.load = loadAfter.sub(loadBefore)
	}
	return did, nil
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

func (m measurement) sample() sample {
	s := sample{OriginConns: m.conns, Requests: m.Requests, BadStatus: m.BadStatus, Errors: m.Errors, Unanswered: m.Unanswered,
		P50: micros(m.Latency.quantile(0.50)), P99: micros(m.Latency.quantile(0.99)), P999: micros(m.Latency.quantile(0.999)),
		Registering: micros(m.registering), Resident: mib(m.gateway.ResidentKiB), Peak: mib(m.gateway.PeakKiB)}
	if m.Late != nil {
		s.Late = micros(m.Late.quantile(0.99))
	}
	s.RequestsPerSecond = float64(m.Requests) / m.Elapsed.Seconds()
	s.Busy = m.gateway.Total.Seconds() / m.Elapsed.Seconds()
	s.LoadBusy = m.load.Total.Seconds() / m.Elapsed.Seconds()
	if m.Requests > 0 {
		s.CPU = micros(m.gateway.Total) / float64(m.Requests)
	}
	if split := m.gateway.User + m.gateway.System; split > 0 {
		s.User = s.CPU * m.gateway.User.Seconds() / split.Seconds()
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
