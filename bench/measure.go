package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// bench is one call of the command: the same tool, gateways and rounds for every load.
type bench struct {
	dir              string // for temporary files
	tool             tool
	gateways         []gateway
	cpus             cpus
	rounds           int
	duration, warmup time.Duration
}

// measure starts origin and gateways for this load, drives them round by round, and ends them.
func (b *bench) measure(ctx context.Context, l load) (*table, error) {
	origin, err := startOrigin(ctx, b.cpus.load, l.Response)
	if err != nil {
		return nil, err
	}
	defer origin.stop()
	t := &table{Load: l}
	var at []*running
	for _, g := range b.gateways {
		s := setup{dir: filepath.Join(b.dir, l.Name, g.name), cpu: b.cpus.gateway, origin: origin.addr, connections: l.Connections}
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return nil, err
		}
		r, err := g.start(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", g.name, err)
		}
		defer r.stop()
		err = r.waitFor(ctx, func(ctx context.Context) error { return checkForwarding(ctx, r.addr, l.Response) })
		if err != nil {
			return nil, err
		}
		at = append(at, r)
		t.Rows = append(t.Rows, &row{Gateway: g.name, Version: g.version})
	}
	if b.warmup > 0 {
		for i := range at {
			if _, err := b.drive(ctx, at[i], origin, l, b.warmup); err != nil {
				return nil, fmt.Errorf("%s, warm-up: %w", b.gateways[i].name, err)
			}
		}
	}
	for round := range b.rounds {
		for n := range at {
			i := (round + n) % len(at) // none is always the one after the same other
			s, err := b.drive(ctx, at[i], origin, l, b.duration)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", b.gateways[i].name, round+1, err)
			}
			t.Rows[i].Rounds = append(t.Rows[i].Rounds, s)
		}
	}
	t.summarize()
	return t, nil
}

// drive puts the load on one gateway for d and counts what it used for it.
func (b *bench) drive(ctx context.Context, r, origin *running, l load, d time.Duration) (sample, error) {
	pids, err := processTree(r.cmd.Process.Pid)
	if err != nil {
		return sample{}, err
	}
	connsBefore, err := accepted(ctx, origin.addr)
	if err != nil {
		return sample{}, err
	}
	before, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	o, err := b.tool.run(ctx, b.cpus.load, l, r.addr, b.dir, d)
	if err != nil {
		return sample{}, err
	}
	after, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	conns, err := accepted(ctx, origin.addr)
	if err != nil {
		return sample{}, err
	}
	return newSample(o, after.sub(before), conns-connsBefore-1), nil // the last one was ours
}

// sample is one gateway in one round.
type sample struct {
	CPU               float64 `json:"cpu_us"` // per request, microseconds; 0 where unknown
	User              float64 `json:"user_us"`
	System            float64 `json:"system_us"`
	RequestsPerSecond float64 `json:"requests_per_second"`
	P50               float64 `json:"p50_us"`
	P99               float64 `json:"p99_us"`
	Busy              float64 `json:"busy"`     // CPU time per time
	PeakKiB           int     `json:"peak_kib"` // so far
	Requests          int     `json:"requests"`
	BadStatus         int     `json:"bad_status"`
	Errors            int     `json:"errors"`
	OriginConns       int     `json:"origin_connections"` // newly made to the origin
}

func newSample(o outcome, u usage, originConns int) sample {
	s := sample{OriginConns: originConns, Requests: o.Requests, BadStatus: o.BadStatus, Errors: o.Errors, PeakKiB: u.PeakKiB,
		P50: micros(o.P50), P99: micros(o.P99)}
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

// summarize fills what the rows say about their rounds, and how they compare.
func (t *table) summarize() {
	for _, r := range t.Rows {
		r.summarize()
	}
	for _, r := range t.Rows {
		r.Ratios = map[string]float64{}
		for _, other := range t.Rows {
			if other != r && other.Median.CPU > 0 {
				r.Ratios[other.Gateway] = r.Median.CPU / other.Median.CPU
			}
		}
	}
}

func (r *row) summarize() {
	of := func(f func(sample) float64) float64 {
		values := make([]float64, len(r.Rounds))
		for i, s := range r.Rounds {
			values[i] = f(s)
		}
		return median(values)
	}
	r.Median = sample{
		CPU:               of(func(s sample) float64 { return s.CPU }),
		User:              of(func(s sample) float64 { return s.User }),
		System:            of(func(s sample) float64 { return s.System }),
		RequestsPerSecond: of(func(s sample) float64 { return s.RequestsPerSecond }),
		P50:               of(func(s sample) float64 { return s.P50 }),
		P99:               of(func(s sample) float64 { return s.P99 }),
		Busy:              of(func(s sample) float64 { return s.Busy }),
	}
	cheapest, dearest := r.Rounds[0].CPU, r.Rounds[0].CPU
	for _, s := range r.Rounds {
		cheapest, dearest = min(cheapest, s.CPU), max(dearest, s.CPU)
		r.Median.PeakKiB = max(r.Median.PeakKiB, s.PeakKiB)
		r.Median.Requests += s.Requests
		r.Median.BadStatus += s.BadStatus
		r.Median.Errors += s.Errors
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
