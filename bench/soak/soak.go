// Package soak has a gateway bear loads, faults and restarts side by side for as long as it is told, and says what came of
// it. For each kind of client it is known which outcomes are right: anything else is a violation, and so is what the
// gateway still holds once all is over.
package soak

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Backend is a backend that runs as a process of its own.
type Backend interface {
	Stop() // asks it to end, which it does after it has unregistered, and waits for that
	Kill() // kill -9
}

// Gauges say what the gateway holds.
type Gauges struct {
	At          string `json:"at"`
	ResidentKiB int    `json:"resident_kib"`
	Descriptors int    `json:"descriptors"`
	Pipes       int    `json:"pipes"` // of these, ends of pipes: the gateway keeps some, through which it moves bodies
	Clients     int    `json:"client_connections"`
	Upstreams   int    `json:"backend_connections"`
	Threads     int    `json:"threads"`
	Goroutines  int    `json:"goroutines,omitempty"` // 0: not known while it runs
}

// Config says what is soaked, and how.
type Config struct {
	Gateway string                                                         // host:port of its clients
	Admin   string                                                         // host:port of its API
	Token   string                                                         // of the API
	Limit   time.Duration                                                  // its time limits for heads, bodies and responses of clients
	Backend func(ctx context.Context, service, id string) (Backend, error) // starts one, and returns when it is registered
	Gauges  func() (Gauges, error)                                         // nil: not known on this system
	For     time.Duration
	Rate    float64 // plain GETs a second; all else comes on top of it
	Seed    uint64
	Log     func(format string, args ...any) // what happens meanwhile
}

// Report is what came of it.
type Report struct {
	Seed       uint64         `json:"seed"`
	Seconds    float64        `json:"seconds"`
	Requests   int            `json:"requests"`
	Kinds      []Row          `json:"kinds"`
	Causes     map[string]int `json:"failures_by_cause"`
	Events     map[string]int `json:"events"` // what was done to the backends
	Gauges     []Gauges       `json:"gauges"`
	Aborts     int            `json:"aborted_by_kernel"` // connections of the whole machine, for lack of TCP memory
	Found      int            `json:"violations"`
	Violations []string       `json:"violations_told,omitempty"` // the first ones
}

// Row is what came of a kind of client.
type Row struct {
	Kind     string         `json:"kind"`
	Sessions int            `json:"sessions"`
	Outcomes map[string]int `json:"outcomes"`
}

// soak is one run.
type soak struct {
	Config
	tally    tally
	pattern  []byte
	requests atomic.Uint64 // numbers them
	forged   atomic.Int64
	flaky    *faulty
	broken   *faulty

	mu     sync.Mutex // guards events
	events map[string]int
}

const (
	warmUp      = 10 * time.Second // until the figures of the start
	minute      = time.Minute
	longPhase   = 5 * time.Second // of the faults
	perService  = 3               // instances
	stormNames  = 100             // services that come and go; few, as the gateway remembers names for an hour
	settleLimit = 40 * time.Second
)

// Run soaks the gateway and returns what came of it. It ends early, without an error, with ctx.
func Run(ctx context.Context, c Config) (*Report, error) {
	s := &soak{Config: c, tally: tally{log: c.Log}, pattern: newPattern(c.Seed), events: map[string]int{}}
	backends, stop, err := s.register(ctx)
	defer stop()
	if err != nil {
		return nil, err
	}
	r := &Report{Seed: c.Seed}
	if err := s.measure(r, "before"); err != nil {
		return nil, err
	}
	aborts := kernelAborts()
	began := time.Now()
	load, end := context.WithTimeout(ctx, c.For)
	defer end()
	faults, over := context.WithCancel(ctx)
	defer over()
	var clients, others sync.WaitGroup
	all := kinds(c.Rate)
	for i := range all {
		for j := range all[i].width {
			clients.Go(func() { s.drive(load, &all[i], i, j) })
		}
	}
	others.Go(func() { s.faults(faults) })
	others.Go(func() { s.kill(faults, backends["killed"]) })
	others.Go(func() { s.roll(faults, backends["rolling"]) })
	others.Go(func() { s.storm(faults) })
	err = s.watch(load, r, began)
	end()
	clients.Wait()
	over()
	others.Wait()
	if err != nil {
		return nil, err
	}
	r.Seconds = time.Since(began).Seconds()
	s.settle(ctx, r)
	r.Aborts = kernelAborts() - aborts
	s.judge(r, all)
	return r, nil
}

// register starts and registers the backends.
func (s *soak) register(ctx context.Context) (children map[string][]*child, stop func(), err error) {
	var ends []func()
	stop = func() {
		for _, end := range slices.Backward(ends) {
			end()
		}
	}
	for service, idle := range map[string]time.Duration{"steady": 0, "closing": 20 * time.Millisecond} {
		for i := range perService {
			o, err := startOrigin(s.pattern, &s.forged, idle)
			if err != nil {
				return nil, stop, err
			}
			ends = append(ends, func() { o.server.Close() })
			if err := s.call(ctx, http.MethodPost, service, fmt.Sprint("i-", i), o.addr); err != nil {
				return nil, stop, err
			}
		}
	}
	for service, to := range map[string]**faulty{"flaky": &s.flaky, "broken": &s.broken} {
		for i := range perService {
			f, err := startFaulty()
			if err != nil {
				return nil, stop, err
			}
			ends = append(ends, f.close)
			*to = f // the last one gets the faults
			if err := s.call(ctx, http.MethodPost, service, fmt.Sprint("i-", i), f.ln.Addr().String()); err != nil {
				return nil, stop, err
			}
		}
	}
	children = map[string][]*child{}
	for _, service := range []string{"killed", "rolling"} {
		for i := range perService {
			c := &child{service: service, id: fmt.Sprint("i-", i)}
			if err := c.start(ctx, s.Backend); err != nil {
				return nil, stop, err
			}
			ends = append(ends, c.stop)
			children[service] = append(children[service], c)
		}
	}
	return children, stop, nil
}

// drive runs the sessions of one client.
func (s *soak) drive(ctx context.Context, k *kind, number, of int) {
	c := &client{soak: s, rng: rand.New(rand.NewPCG(s.Seed, uint64(number)<<32|uint64(of)))}
	defer c.hangUp()
	every := time.Duration(float64(k.width) / k.rate * float64(time.Second))
	for due := time.Now().Add(every * time.Duration(of) / time.Duration(k.width)); sleep(ctx, time.Until(due)); due = due.Add(every) {
		c.uri = "" // a session that fails before its request names none
		began := time.Now()
		a := k.run(c)
		s.tally.add(k.name, k.right, fmt.Sprintf("%s, %.1f s", c.uri, time.Since(began).Seconds()), a)
	}
}

// sleep reports whether it was not ctx that ended it.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// phase is how long a fault lasts.
func (s *soak) phase() time.Duration { return min(longPhase, max(s.For/10, 300*time.Millisecond)) }

func (s *soak) happened(what string) {
	s.mu.Lock()
	s.events[what]++
	s.mu.Unlock()
}

// faults changes what the faulty instances do.
func (s *soak) faults(ctx context.Context) {
	rng := rand.New(rand.NewPCG(s.Seed, 1))
	for ok := true; ok; ok = sleep(ctx, s.phase()) {
		s.flaky.set(fine + mode(rng.IntN(int(hanging))))
		s.broken.set(hanging + mode(rng.IntN(int(modes-hanging))))
		s.happened("changes of faults")
	}
	s.flaky.set(fine)
	s.broken.set(fine)
}

// child is a backend that is started again and again.
type child struct {
	service, id string
	runs        Backend // nil: it does not
}

func (c *child) start(ctx context.Context, start func(context.Context, string, string) (Backend, error)) (err error) {
	c.runs, err = start(ctx, c.service, c.id)
	return err
}

func (c *child) stop() {
	if c.runs != nil {
		c.runs.Stop()
		c.runs = nil
	}
}

// kill kills one after the other, and starts it again after a while; it registers itself, at another address.
func (s *soak) kill(ctx context.Context, all []*child) {
	rng := rand.New(rand.NewPCG(s.Seed, 2))
	for sleep(ctx, s.phase()/2) {
		c := all[rng.IntN(len(all))]
		c.runs.Kill()
		c.runs = nil
		sleep(ctx, time.Duration(rng.Int64N(int64(s.phase()/2))))
		if !s.again(ctx, c) {
			return
		}
		s.happened("kill -9 and start")
	}
}

// roll restarts one after the other in an orderly way.
func (s *soak) roll(ctx context.Context, all []*child) {
	for i := 0; sleep(ctx, s.phase()/4); i++ {
		c := all[i%len(all)]
		c.stop()
		if !s.again(ctx, c) {
			return
		}
		s.happened("rolling restarts")
	}
}

func (s *soak) again(ctx context.Context, c *child) bool {
	err := c.start(ctx, s.Backend)
	if err != nil && ctx.Err() == nil {
		s.tally.violation("%s/%s does not start again: %v", c.service, c.id, err)
	}
	return err == nil
}

// storm registers and unregisters instances of other services, some at once.
func (s *soak) storm(ctx context.Context) {
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(s.Seed, 3<<32|uint64(worker)))
			for sleep(ctx, time.Duration(rng.IntN(80))*time.Millisecond) {
				service, id := fmt.Sprintf("storm-%d", rng.IntN(stormNames)), fmt.Sprint("of-", worker)
				for _, method := range []string{http.MethodPost, http.MethodDelete} {
					if err := s.call(context.WithoutCancel(ctx), method, service, id, "127.0.0.1:1"); err != nil {
						s.tally.violation("%v", err)
					}
					s.happened("registrations and unregistrations")
				}
			}
		})
	}
	all.Wait()
}

// call registers an instance (POST) or unregisters it (DELETE).
func (s *soak) call(ctx context.Context, method, service, id, addr string) error {
	in := map[string]string{"service": service, "id": id}
	if method == http.MethodPost {
		in["addr"] = "http://" + addr
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	resp, err := s.api(ctx, method, "/register", body)
	if err != nil {
		return fmt.Errorf("%s %s/%s: %w", method, service, id, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("%s %s/%s: %d %s", method, service, id, resp.StatusCode, text)
	}
	return nil
}

// api makes a call on a connection of its own: one that is kept would be a descriptor of the gateway's.
func (s *soak) api(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.Admin+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Close = true
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+s.Token)
	return (&http.Client{Timeout: patience}).Do(req)
}

// watch measures after the warm-up and every minute, until ctx ends.
func (s *soak) watch(ctx context.Context, r *Report, began time.Time) error {
	if !sleep(ctx, min(warmUp, s.For/2)) {
		return nil
	}
	if err := s.measure(r, "start"); err != nil {
		return err
	}
	for n := 1; sleep(ctx, time.Until(began.Add(time.Duration(n)*minute))); n++ {
		if err := s.measure(r, fmt.Sprint(n, " min")); err != nil {
			return err
		}
	}
	return nil
}

func (s *soak) measure(r *Report, at string) error {
	if s.Gauges == nil {
		return nil
	}
	g, err := s.Config.Gauges()
	if err != nil {
		return fmt.Errorf("the gateway's figures: %w", err)
	}
	g.At = at
	r.Gauges = append(r.Gauges, g)
	s.Log("%-7s %6.1f MiB resident, %4d descriptors, %4d client and %4d backend connections", at, float64(g.ResidentKiB)/1024, g.Descriptors, g.Clients, g.Upstreams)
	return nil
}

// settle waits until the gateway has let go of all that was under way, and measures what is left.
func (s *soak) settle(ctx context.Context, r *Report) {
	deadline := time.Now().Add(settleLimit)
	for {
		err := s.idle(ctx, r)
		if err == nil {
			break
		}
		if !time.Now().Before(deadline) || !sleep(ctx, 100*time.Millisecond) {
			s.tally.violation("%s after the load: %v", settleLimit, err)
			break
		}
	}
	if err := s.measure(r, "end"); err != nil {
		s.tally.violation("%v", err)
	}
}

// descriptorMargin is for what the runtime may have opened meanwhile; pipeMargin is for both ends of the 64 pipes that the
// gateway keeps.
const (
	descriptorMargin = 4
	pipeMargin       = 2 * 64
)

// idle returns an error that says what the gateway still holds.
func (s *soak) idle(ctx context.Context, r *Report) error {
	resp, err := s.api(ctx, http.MethodGet, "/services", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var services struct {
		Services []struct {
			Service   string
			Instances []struct {
				ID       string
				InFlight int `json:"in_flight"`
				Tunnels  int
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&services); err != nil {
		return err
	}
	var errs []error
	for _, service := range services.Services {
		for _, in := range service.Instances {
			if in.InFlight != 0 || in.Tunnels != 0 {
				errs = append(errs, fmt.Errorf("%s/%s has %d requests in flight and %d tunnels", service.Service, in.ID, in.InFlight, in.Tunnels))
			}
		}
	}
	if s.Gauges != nil {
		g, err := s.Config.Gauges()
		if err != nil {
			return err
		}
		before := r.Gauges[0]
		if g.Clients+g.Upstreams > 0 || g.Descriptors-g.Pipes > before.Descriptors-before.Pipes+descriptorMargin || g.Pipes > before.Pipes+pipeMargin {
			errs = append(errs, fmt.Errorf("%d client and %d backend connections, %d descriptors with %d of pipes; before %d with %d", g.Clients, g.Upstreams, g.Descriptors, g.Pipes, before.Descriptors, before.Pipes))
		}
	}
	return errors.Join(errs...)
}

// judge fills the report.
func (s *soak) judge(r *Report, all []kind) {
	if n := s.forged.Load(); n > 0 {
		s.tally.violation("%d malformed requests reached a backend", n)
	}
	if n := len(r.Gauges); n > 2 {
		if from, to := r.Gauges[1].ResidentKiB, r.Gauges[n-1].ResidentKiB; leaks(from, to) {
			s.tally.violation("resident memory grew from %d to %d KiB", from, to)
		}
	}
	r.Requests = int(s.requests.Load())
	r.Events = s.events
	r.Causes = map[string]int{}
	s.tally.mu.Lock()
	defer s.tally.mu.Unlock()
	for _, k := range all {
		row := Row{Kind: k.name, Outcomes: s.tally.outcomes[k.name]}
		for outcome, n := range row.Outcomes {
			row.Sessions += n
			if failed(outcome) {
				r.Causes[outcome] += n
			}
		}
		r.Kinds = append(r.Kinds, row)
	}
	r.Found, r.Violations = s.tally.found, s.tally.told
}

// Violation adds what was found out behind the run.
func (r *Report) Violation(format string, args ...any) {
	r.Found++
	r.Violations = append(r.Violations, fmt.Sprintf(format, args...))
}

// leaks tells whether resident memory, in KiB, grew by more than what the gateway lets its heap grow between two collections,
// which is 64 MiB, and a half of that for the collector's moods. The start may be before the first one.
func leaks(from, to int) bool { return to > from+96<<10 }

// Print writes the tables.
func (r *Report) Print(w io.Writer) {
	fmt.Fprintf(w, "\n%.0f s, seed %d, %d requests\n\n", r.Seconds, r.Seed, r.Requests)
	fmt.Fprintf(w, "| clients | sessions | outcomes |\n| --- | --- | --- |\n")
	for _, row := range r.Kinds {
		fmt.Fprintf(w, "| %s | %d | %s |\n", row.Kind, row.Sessions, counts(row.Outcomes))
	}
	fmt.Fprintf(w, "\nfailures by cause: %s\nwhat was done: %s\n", counts(r.Causes), counts(r.Events))
	if len(r.Gauges) > 0 {
		fmt.Fprintf(w, "\n| at | resident MiB | descriptors | of these pipes | client connections | backend connections | threads | goroutines |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n")
	}
	for _, g := range r.Gauges {
		goroutines := ""
		if g.Goroutines > 0 {
			goroutines = fmt.Sprint(g.Goroutines)
		}
		fmt.Fprintf(w, "| %s | %.1f | %d | %d | %d | %d | %d | %s |\n", g.At, float64(g.ResidentKiB)/1024, g.Descriptors, g.Pipes, g.Clients, g.Upstreams, g.Threads, goroutines)
	}
	if r.Aborts > 0 {
		fmt.Fprintf(w, "\nThe kernel had no memory for TCP and aborted %d connections of this machine, maybe of this soak: it may be why some were cut.\n", r.Aborts)
	}
	fmt.Fprintf(w, "\n%d violations\n", r.Found)
	for _, v := range r.Violations {
		fmt.Fprintln(w, " ", v)
	}
}

// counts writes them in order, the largest first.
func counts(of map[string]int) string {
	names := make([]string, 0, len(of))
	for name := range of {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if of[a] != of[b] {
			return of[b] - of[a]
		}
		return strings.Compare(a, b)
	})
	for i, name := range names {
		names[i] = fmt.Sprintf("%s: %d", name, of[name])
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
