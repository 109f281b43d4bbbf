package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"
)

// section is a part of the comparison that can be asked for by its name.
type section struct {
	name string
	run  func(ctx context.Context, b *bench) ([]*table, error)
}

// sections are all of them, in order.
func sections() []section {
	browser := browserHeaders()
	json := []string{"Content-Type: application/json"}
	return []section{
		cost("get-16", "GET 12 B", load{Method: http.MethodGet, Response: 12, Connections: 16}),
		cost("get-64", "GET 12 B", load{Method: http.MethodGet, Response: 12, Connections: 64}),
		cost("get-256", "GET 12 B", load{Method: http.MethodGet, Response: 12, Connections: 256}),
		cost("browser-16", "GET by a browser", load{Method: http.MethodGet, Headers: browser, Response: 12, Connections: 16}),
		cost("browser-64", "GET by a browser", load{Method: http.MethodGet, Headers: browser, Response: 12, Connections: 64}),
		cost("browser-256", "GET by a browser", load{Method: http.MethodGet, Headers: browser, Response: 12, Connections: 256}),
		cost("post", "POST 1 KiB", load{Method: http.MethodPost, Headers: json, Body: bytes.Repeat([]byte("y"), 1<<10), Response: 12, Connections: 64}),
		cost("16k", "GET 16 KiB", load{Method: http.MethodGet, Response: 16 << 10, Connections: 64}),
		cost("1m", "GET 1 MiB", load{Method: http.MethodGet, Response: 1 << 20, Connections: 16}),
		{"one", one},
		{"open", open},
		{"memory-busy", busyMemory},
		{"memory-idle", idleMemory},
		{"cores", cores},
		{"services", services},
		{"storm", storm},
		{"scale-connections", scaleConnections},
		{"scale-instances", scaleInstances},
	}
}

func sectionNames() []string {
	var names []string
	for _, s := range sections() {
		names = append(names, s.name)
	}
	return names
}

// browserHeaders are what Chrome sends with a fetch from a page, beside Host: 13 lines, and 1 KiB with the request line.
func browserHeaders() []string {
	return []string{
		"Connection: keep-alive",
		`sec-ch-ua-platform: "Windows"`,
		"User-Agent: Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36",
		`sec-ch-ua: "Google Chrome";v="141", "Not?A_Brand";v="8", "Chromium";v="141"`,
		"Accept: application/json, text/plain, */*",
		"sec-ch-ua-mobile: ?0",
		"Sec-Fetch-Site: same-origin",
		"Sec-Fetch-Mode: cors",
		"Sec-Fetch-Dest: empty",
		"Referer: https://shop.example.com/catalogue/shoes/running?colour=blue&size=43&sort=price&page=2",
		"Accept-Encoding: gzip, deflate, br, zstd",
		"Accept-Language: en-GB,en-US;q=0.9,en;q=0.8,de;q=0.7",
		"Cookie: session=8f0e2c6a1b7d4953a2c1e8f7b6d5049383f1c2ab9e7d6f50; csrf=Zm9vYmFyYmF6cXV4cXV1eGNvcmdlZ3JhdWx0; " +
			"consent=v2.1.0.analytics-yes.ads-no.2026-11-02; theme=dark; currency=EUR; " +
			"_ga=GA1.2.1693874520.1762041600; _ga_5XK7QJ9W2P=GS1.1.1762041600.7.1.1762043512.0.0.0; " +
			"cart=eyJpZCI6IjQ3MTEiLCJuIjozLCJ0b3RhbCI6MTI5OTAsImN1ciI6IkVVUiJ9; ab=checkout-b.search-a.header-c",
	}
}

// cost is a closed loop at full speed: what a request costs.
func cost(name, title string, l load) section {
	return section{name, func(ctx context.Context, b *bench) ([]*table, error) {
		t := &table{Section: name, Title: fmt.Sprintf("%s, %d connections", title, l.Connections), Load: &l, Compared: cpuPerRequest}
		return []*table{t}, b.closedLoops(ctx, t, b.cpus.load, b.everybody(l), b.rounds)
	}}
}

// one asks for the latency of a single connection: nothing waits for anything but its answer.
func one(ctx context.Context, b *bench) ([]*table, error) {
	l := load{Method: http.MethodGet, Response: 12, Connections: 1}
	t := &table{Section: "one", Title: "GET 12 B, one connection: latency", Load: &l, Compared: p50}
	return []*table{t}, b.closedLoops(ctx, t, b.cpus.load, b.everybody(l), b.rounds)
}

// everybody is each gateway under the same load.
func (b *bench) everybody(l load) []subject {
	var all []subject
	for _, g := range b.gateways {
		if g.name == "pump-splice" && l.Response < 64<<10 {
			continue // a pipe more for each connection, and nothing gained
		}
		all = append(all, subject{gateway: g, load: l})
	}
	return all
}

// closedLoops fills a table: the subjects are driven as fast as they answer, in turn.
func (b *bench) closedLoops(ctx context.Context, t *table, origin cpuSet, subjects []subject, rounds int) error {
	g, err := b.start(ctx, t.Section, origin, subjects)
	if err != nil {
		return err
	}
	defer g.stop()
	if err := g.warm(ctx, b.warmup); err != nil {
		return err
	}
	t.Rows = g.rows()
	n, d := b.slices()
	err = takeTurns(ctx, t.Rows, rounds, n, func(ctx context.Context, i int) (measurement, error) {
		if err := g.connect(ctx, i); err != nil {
			return measurement{}, err
		}
		return g.drive(ctx, i, d)
	})
	t.compare()
	return err
}

// connect drives a subject with many instances, or one that is compared with such, until there are connections to all:
// those that rested for long in the other subjects' turns may be closed. Connecting is not what is to be measured.
func (g *group) connect(ctx context.Context, i int) error {
	const long = 5 * time.Second
	if !g.subjects[i].setup.hasToken() || time.Since(g.driven[i]) < long && g.connected[i] {
		return nil
	}
	for range 20 {
		m, err := g.drive(ctx, i, min(g.duration, slice))
		if err != nil {
			return err
		}
		if m.conns < m.Requests/100 {
			break // else a note will say that it goes on
		}
	}
	g.connected[i] = true
	return nil
}

// warm drives each subject once, so that no first round is unlike the others.
func (g *group) warm(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	for i, s := range g.subjects {
		if _, err := g.drive(ctx, i, d); err != nil {
			return fmt.Errorf("%s, warm-up: %w", s.name, err)
		}
	}
	return nil
}
