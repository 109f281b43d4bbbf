package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// What follows compares the gateway with itself.

var errNoKerberos = errors.New("it is about kerberos, which is not among the gateways")

// selves returns the gateway as so many subjects.
func (b *bench) selves(n int, l load) ([]subject, error) {
	for _, g := range b.gateways {
		if g.name == "kerberos" {
			all := make([]subject, n)
			for i := range all {
				all[i] = subject{gateway: g, load: l}
			}
			return all, nil
		}
	}
	return nil, errNoKerberos
}

// cores compares one CPU with two, which the load then shares unless there are four.
func cores(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 64}
	t := &table{Section: "cores", Title: "GET 12 B, 64 connections: kerberos with GOMAXPROCS 1 and 2", Load: &l, Compared: cpuPerRequest, Paired: true}
	subjects, err := b.selves(2, l)
	if err != nil {
		return nil, err
	}
	if b.cpus.gateway == nil || len(b.cpus.gateways) < 2 {
		t.Notes = append(t.Notes, "not measured: it needs two CPUs")
		return []*table{t}, nil
	}
	subjects[0].setting = "1 CPU"
	subjects[1].setting = "2 CPUs"
	subjects[1].setup = setup{threads: 2, on: b.cpus.gateways}
	subjects[1].from = b.cpus.loads
	origin := b.cpus.load
	if b.cpus.loads[0] != b.cpus.gateways[0] {
		origin = b.cpus.loads // not on the gateway's second one
	} else {
		t.Notes = append(t.Notes, "there are no further CPUs: with 2 CPUs the gateway shares them with load and origin")
	}
	return []*table{t}, b.closedLoops(ctx, t, origin, subjects, b.rounds)
}

// services compares one instance with many services of several.
func services(ctx context.Context, b *bench) ([]*table, error) {
	const services, instances = 100, 10
	l := load{Method: http.MethodGet, Response: 12, Connections: 64}
	t := &table{Section: "services", Load: &l, Compared: cpuPerRequest, Paired: true,
		Title: fmt.Sprintf("GET 12 B, 64 connections: kerberos with one instance, and with %d services of %d instances", services, instances)}
	subjects, err := b.selves(3, l)
	if err != nil {
		return nil, err
	}
	many := setup{services: services, instances: instances}
	subjects[0].setting, subjects[0].setup = "one instance", setup{services: 1, instances: 1, token: true}
	subjects[1].setting, subjects[1].setup = "one of 100 asked", many
	subjects[2].setting, subjects[2].setup = "all 100 asked", many
	for i := range services {
		subjects[2].load.Targets = append(subjects[2].load.Targets, "/"+serviceName(i)+"/hello")
	}
	t.Notes = append(t.Notes, fmt.Sprintf("the instances are spread over %d addresses of one origin; with all services asked, %d connections to it are in use instead of %d",
		originAddrs, services*instances, l.Connections))
	short := *b
	short.duration = max(b.duration/3, min(b.duration, 500*time.Millisecond))
	return []*table{t}, short.closedLoops(ctx, t, b.cpus.load, subjects, b.pairedRounds())
}

// pairedRounds are many and short: 20 where cost has 5.
func (b *bench) pairedRounds() int {
	if b.quick {
		return 2
	}
	return 4 * b.rounds
}

// scaleConnections shows how the cost of a request grows with the connections.
func scaleConnections(ctx context.Context, b *bench) ([]*table, error) {
	counts := []int{1, 4, 16, 64, 256, 1000}
	t := &table{Section: "scale-connections", Title: "GET 12 B: kerberos at 1 to 1,000 connections", Compared: cpuPerRequest}
	subjects, err := b.selves(len(counts), load{Method: http.MethodGet, Response: 12})
	if err != nil {
		return nil, err
	}
	for i, n := range counts {
		subjects[i].setting, subjects[i].load.Connections = fmt.Sprint(n), n
	}
	return []*table{t}, b.closedLoops(ctx, t, b.cpus.load, subjects, b.fewRounds())
}

// scaleInstances shows how the cost of a request grows with the instances of the service. Each has connections of its
// own, so that most of the growth is the kernel's, with sockets that are cold.
func scaleInstances(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 64}
	t := &table{Section: "scale-instances", Title: "GET 12 B, 64 connections: kerberos with 1 to 10,000 instances", Load: &l, Compared: cpuPerRequest}
	counts := []int{1, 10, 100, 1000, 10_000}
	for counts[len(counts)-1] > b.files-spareFiles {
		t.Notes = append(t.Notes, fmt.Sprintf("not %d instances: a process may open only %d files", counts[len(counts)-1], b.files))
		counts = counts[:len(counts)-1]
	}
	subjects, err := b.selves(len(counts), l)
	if err != nil {
		return nil, err
	}
	for i, n := range counts {
		subjects[i].setting, subjects[i].setup = fmt.Sprint(n), setup{instances: n, token: true}
	}
	warmer := *b
	warmer.warmup = max(b.warmup, time.Second) // each instance is asked at least once
	return []*table{t}, warmer.closedLoops(ctx, t, b.cpus.load, subjects, b.fewRounds())
}
