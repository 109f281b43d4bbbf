package main

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"
	"time"
)

// busyMemory is what a gateway has in memory while 1,000 connections are busy.
func busyMemory(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 1000}
	t := &table{Section: "memory-busy", Layout: layoutMemory, Load: &l, Compared: resident,
		Title: fmt.Sprintf("resident memory while %d connections GET 12 B", l.Connections)}
	g, err := b.start(ctx, t.Section, b.cpus.load, b.everybody(l))
	if err != nil {
		return nil, err
	}
	defer g.stop()
	t.Rows = g.rows()
	err = takeTurns(ctx, t.Rows, b.fewRounds(), 1, g.watched)
	t.compare()
	return []*table{t}, err
}

// watched drives a subject as fast as it answers. Its resident size is the median of what it had meanwhile: at the end of a load
// some give a part back at once.
func (g *group) watched(ctx context.Context, i int) (measurement, error) {
	pids, err := processTree(g.at[i].cmd.Process.Pid)
	if err != nil {
		return measurement{}, err
	}
	ended := make(chan struct{})
	var seen []float64
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-ended:
				return
			case <-time.After(g.duration / 20):
			}
			if u, err := usageOf(pids); err == nil {
				seen = append(seen, float64(u.ResidentKiB))
			}
		}
	})
	m, err := g.pace(ctx, i, 0, g.duration)
	close(ended)
	watching.Wait()
	if len(seen) > 0 {
		m.gateway.ResidentKiB = int(median(seen))
	}
	return m, err
}

// idleConnections are so many because a gateway in front of browsers has many more connections than requests.
const idleConnections = 10_000

// settle is how long connections have been idle when their memory is counted.
const settle = 2 * time.Second

// idleMemory is what a connection costs that had one request like a browser's and is kept alive.
func idleMemory(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Headers: browserHeaders(), Response: 12, Connections: min(idleConnections, b.files-spareFiles)}
	t := &table{Section: "memory-idle", Layout: layoutIdle, Load: &l, Compared: perConn,
		Title: fmt.Sprintf("resident memory for each of %d idle connections, after a browser's GET on each", l.Connections)}
	if l.Connections < idleConnections {
		t.Notes = append(t.Notes, fmt.Sprintf("not %d connections: a process may open only %d files", idleConnections, b.files))
	}
	var subjects []subject
	for _, s := range b.everybody(l) {
		if !isPump(s.name) { // which has a second connection for each
			subjects = append(subjects, s)
		}
	}
	for round := range b.fewRounds() {
		g, err := b.start(ctx, filepath.Join(t.Section, fmt.Sprint(round)), b.cpus.load, subjects) // anew: what was freed is used again
		if err != nil {
			return nil, err
		}
		if round == 0 {
			t.Rows = g.rows()
		}
		for i := range subjects {
			s, err := g.idle(ctx, i)
			if err != nil {
				g.stop()
				return nil, fmt.Errorf("%s: %w", subjects[i].name, err)
			}
			t.Rows[i].Rounds = append(t.Rows[i].Rounds, s)
		}
		g.stop()
	}
	for _, r := range t.Rows {
		r.summarize()
	}
	t.compare()
	return []*table{t}, nil
}

// spareFiles are those that a process has open beside the connections in question.
const spareFiles = 256

// fewRounds are enough for what hardly differs from round to round.
func (b *bench) fewRounds() int { return min(3, b.rounds) }

// idle makes the connections, waits, and counts.
func (g *group) idle(ctx context.Context, i int) (sample, error) {
	pids, err := processTree(g.at[i].cmd.Process.Pid)
	if err != nil {
		return sample{}, err
	}
	before, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	l := g.subjects[i].load
	load, err := startDrive(ctx, g.cpus.load, l, g.at[i].addr, 0, time.Second) // it has one request answered on each
	if err != nil {
		return sample{}, err
	}
	defer load.stop()
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return sample{}, ctx.Err()
	}
	after, err := usageOf(pids)
	if err != nil {
		return sample{}, err
	}
	return sample{Requests: l.Connections, Resident: mib(after.ResidentKiB), Peak: mib(after.PeakKiB),
		PerConn: float64(after.ResidentKiB-before.ResidentKiB) / float64(l.Connections)}, nil
}
