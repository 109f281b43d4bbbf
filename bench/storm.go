package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
)

// A storm of registrations: so many callers register so many new instances a second into a service of that many.
const (
	stormCallers   = 16
	stormRate      = 1000
	stormInstances = 10_000
	stormService   = "storm"
)

// storm measures what registrations of one service cost the requests of another, at half the capacity.
func storm(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 64}
	t := &table{Section: "storm", Layout: layoutStorm, Load: &l, Compared: p99, Paired: true}
	subjects, err := b.selves(1, l)
	if err != nil {
		return nil, err
	}
	checked, addr, err := startSelf(ctx, b.cpus.load, "checked")
	if err != nil {
		return nil, err
	}
	defer checked.stop()
	subjects[0].setup = setup{token: true, beside: stormInstances, besideAt: addr, data: b.data}
	g, err := b.start(ctx, t.Section, b.cpus.load, subjects)
	if err != nil {
		return nil, err
	}
	defer g.stop()
	capacity, err := g.capacity(ctx)
	if err != nil {
		return nil, err
	}
	rate := math.Round(capacity[0] / 2)
	t.Title = fmt.Sprintf("GET 12 B at %.0f requests/s (half of %.0f), quiet, and while %d callers register %d new instances a second into another service of %d",
		rate, capacity[0], stormCallers, stormRate, stormInstances)
	if b.data {
		t.Title += ", all with a lease, a check of tcp each 10 s, and --data"
	}
	quiet, busy := g.rows()[0], g.rows()[0]
	quiet.Setting, busy.Setting = "quiet", "storm"
	t.Rows = []*row{quiet, busy}
	next := 0
	err = takeTurns(ctx, t.Rows, b.latencyRounds(), 1, func(ctx context.Context, i int) (measurement, error) { // a storm takes its time
		if i == 0 {
			return g.pace(ctx, 0, rate, b.duration)
		}
		first := next
		m, n, err := g.paceInStorm(ctx, rate, first)
		if err != nil {
			return measurement{}, err
		}
		next += n
		return m, g.calm(ctx, first, next)
	})
	t.compare()
	if busy.Median.Busy > 0.97 {
		t.Notes = append(t.Notes, "the storm takes all of the CPU that the requests leave")
	}
	return []*table{t}, err
}

// paceInStorm is pace while instances are registered, numbered from first; it returns how many were.
func (g *group) paceInStorm(ctx context.Context, rate float64, first int) (measurement, int, error) {
	r := g.at[0]
	body, err := json.Marshal(g.subjects[0].setup.stormed("n-" + counterMark))
	if err != nil {
		return measurement{}, 0, err
	}
	registrations := load{Method: http.MethodPost, Targets: []string{"/register"}, Body: body, Counter: first, Connections: stormCallers,
		Headers: []string{"Content-Type: application/json", "Authorization: Bearer " + apiToken}}
	callers, err := startDrive(ctx, g.cpus.load, registrations, r.admin, stormRate, g.duration)
	if err != nil {
		return measurement{}, 0, err
	}
	defer callers.stop()
	requests, err := startDrive(ctx, g.cpus.load, g.subjects[0].load, r.addr, rate, g.duration)
	if err != nil {
		return measurement{}, 0, err
	}
	defer requests.stop()
	var registered outcome
	ended := make(chan error, 1)
	go func() {
		var err error
		registered, err = callers.run(ctx)
		ended <- err
	}()
	m, err := g.count(ctx, r, requests)
	if err := errors.Join(err, <-ended); err != nil {
		return measurement{}, 0, err
	}
	m.registering = registered.Latency.quantile(0.99)
	m.BadStatus += registered.BadStatus
	m.Errors += registered.Errors
	m.Unanswered += registered.Unanswered
	return m, stormCallers + registered.Requests + registered.Errors + registered.Unanswered, nil
}

// calm unregisters what a storm brought.
func (g *group) calm(ctx context.Context, first, end int) error {
	return callAll(ctx, g.at[0].admin, http.MethodDelete, func(yield func(instance) bool) {
		for n := first; n < end; n++ {
			if !yield(instance{Service: stormService, ID: fmt.Sprintf("n-%0*d", len(counterMark), n)}) {
				return
			}
		}
	})
}
