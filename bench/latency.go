package main

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
)

// shares are the fractions of the capacity at which latency is measured.
var shares = [...]float64{0.5, 0.8}

// open measures latency where requests are due at a fixed rate, the same for all: shares of what the slower one of the
// gateway and the best other can do.
func open(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 64}
	subjects := b.everybody(l)
	g, err := b.start(ctx, "open", b.cpus.load, subjects)
	if err != nil {
		return nil, err
	}
	defer g.stop()
	capacity, err := g.capacity(ctx)
	if err != nil {
		return nil, err
	}
	base := slowerOfBest(subjects, capacity)
	var tables []*table
	for _, share := range shares {
		rate := math.Round(share * base)
		t := &table{Section: fmt.Sprintf("open-%.0f", 100*share), Layout: layoutOpen, Load: &l, Compared: p99,
			Title: fmt.Sprintf("GET 12 B, %d connections, open loop at %.0f requests/s: %.0f %% of %.0f", l.Connections, rate, 100*share, base)}
		able := *g
		able.subjects, able.at = nil, nil
		for i, s := range g.subjects {
			if capacity[i] < rate {
				t.Notes = append(t.Notes, fmt.Sprintf("%s is left out: it can do %.0f/s", s.name, capacity[i]))
				continue
			}
			able.subjects, able.at = append(able.subjects, s), append(able.at, g.at[i])
		}
		t.Rows = able.rows()
		n, d := b.slices()
		err := takeTurns(ctx, t.Rows, b.latencyRounds(), n, func(ctx context.Context, i int) (measurement, error) { return able.pace(ctx, i, rate, d) })
		if err != nil {
			return nil, err
		}
		t.compare()
		tables = append(tables, t)
	}
	return tables, nil
}

// latencyRounds are twice as many as for cost: 10 where that has 5. A tail differs more from round to round.
func (b *bench) latencyRounds() int {
	if b.quick {
		return 1
	}
	return 2 * b.rounds
}

// capacity returns the requests per second that each subject can answer: the median of three rounds.
func (g *group) capacity(ctx context.Context) ([]float64, error) {
	if err := g.warm(ctx, g.warmup); err != nil {
		return nil, err
	}
	rows, rounds := g.rows(), 3
	if g.quick {
		rounds = 1
	}
	n, d := g.slices()
	err := takeTurns(ctx, rows, rounds, n, func(ctx context.Context, i int) (measurement, error) { return g.drive(ctx, i, d) })
	var all []float64
	for _, r := range rows {
		all = append(all, r.Median.RequestsPerSecond)
	}
	return all, err
}

// slowerOfBest returns the capacity of the slower one of kerberos and the best other that is no pump. Where there is
// only one of the two it is that one's, where there is none the slowest pump's.
func slowerOfBest(subjects []subject, capacity []float64) float64 {
	kerberos, best := math.Inf(1), 0.0
	for i, s := range subjects {
		switch {
		case s.name == "kerberos":
			kerberos = capacity[i]
		case !isPump(s.name):
			best = max(best, capacity[i])
		}
	}
	if best == 0 {
		best = kerberos
	}
	if base := min(kerberos, best); !math.IsInf(base, 1) {
		return base
	}
	return slices.Min(capacity)
}
