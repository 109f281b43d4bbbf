package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"kerberos/internal/config"
)

// Demo shows the gateway at work: three backends, a little traffic, and what happens as one backend stops and comes back.
type Demo struct {
	For   time.Duration `default:"0s" min:"0s" noenv:"" help:"How long it runs; 0s: until Ctrl-C."`
	Cycle time.Duration `default:"20s" min:"2s" noenv:"" help:"How long one round of a backend that stops and comes back takes."`
}

const (
	demoRate = 50 // requests a second

	// The script, in parts of a cycle. The breaker's open time ends once while b is away, so that a probe is seen to
	// fail, and once after it is back.
	demoStop = 0.25
	demoBack = 0.55
	demoOpen = 0.2 // --breaker-open
)

// Run plays it. Its error says how many requests failed, if any did: none should.
func (c *Demo) Run(p *Process) error {
	ctx := p.Context
	if c.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.For)
		defer cancel()
	}
	part := func(x float64) time.Duration { return time.Duration(x * float64(c.Cycle)) }

	s := &stage{start: time.Now(), lines: !p.Terminal, out: p.Out, perBackend: map[string]*share{}}
	cfg, err := config.Defaults()
	if err != nil {
		return err
	}
	cfg.Listen, cfg.Admin = "127.0.0.1:0", "127.0.0.1:0"
	cfg.BreakerOpen = part(demoOpen)
	if cfg.Data, err = os.MkdirTemp("", "kerberos-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(cfg.Data)
	gateway, err := p.Start(cfg, s.logger())
	if err != nil {
		return err
	}
	defer gateway.Stop()
	s.title = fmt.Sprintf("gateway http://%s, its API http://%s/services, %s, %d requests a second", gateway.Data, gateway.Admin, cfg.Strategy, demoRate)

	s.say(s.title)

	api := &API{Gateway: "http://" + gateway.Admin}
	backends := make([]*backend, 3)
	for i, name := range []string{"a", "b", "c"} {
		b := &backend{name: name}
		if err := b.start("127.0.0.1:0"); err != nil {
			return err
		}
		defer func() { b.stop() }()
		if err := b.register(ctx, api, "echo", "http://"+b.addr); err != nil {
			return err
		}
		backends[i] = b
		s.perBackend[name] = &share{}
		s.order = append(s.order, name)
	}
	s.say("a, b and c have registered themselves for the service echo")

	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	running.Go(func() { s.traffic(ctx, "http://"+gateway.Data+"/echo/hello") })
	running.Go(func() { s.watch(ctx, api) })
	running.Go(func() { s.show(ctx, part(0.05)) })

	for round := 0.0; ; round++ {
		for _, scene := range []struct {
			at   float64
			play func()
		}{
			{demoStop, func() { s.say("b stops, as if it had crashed"); backends[1].stop() }},
			{demoBack, func() { backends[1].restart(ctx); s.say("b is back") }},
		} {
			select {
			case <-ctx.Done():
				running.Wait() // the last answers
				return s.end()
			case <-time.After(time.Until(s.start.Add(part(round + scene.at)))):
				scene.play()
			}
		}
	}
}

// restart listens at the address b had. Another socket may hold it for a moment.
func (b *backend) restart(ctx context.Context) {
	for b.start(b.addr) != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stage is what the demo knows and shows.
type stage struct {
	start time.Time
	title string
	lines bool // no terminal: one line after the other
	out   io.Writer
	order []string

	mu         sync.Mutex // guards what follows, and out
	perBackend map[string]*share
	requests   int
	failed     int
	lastError  string
	events     []string // the last shownEvents
	over       bool     // nothing is said any more
}

const shownEvents = 10

// share is what one backend got.
type share struct {
	all     int
	recent  []time.Time // of the last second
	breaker string
	until   *time.Time
}

// traffic sends requests at a steady rate, as one client of several connections.
func (s *stage) traffic(ctx context.Context, url string) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: demoRate}}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(time.Second / demoRate)
	defer tick.Stop()
	var sent sync.WaitGroup
	defer sent.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			sent.Go(func() { s.request(client, url) })
		}
	}
}

// request sends one and counts who answered. It is not cut short when the demo ends: that would look like an error.
func (s *stage) request(client *http.Client, url string) {
	name, err := ask(client, url)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests++
	got := s.perBackend[name]
	if err != nil || got == nil {
		s.failed++
		s.lastError = fmt.Sprint(err)
		return
	}
	got.all++
	got.recent = append(got.recent, time.Now())
}

// ask returns the name of the backend that answered.
func ask(client *http.Client, url string) (string, error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", response.Status, strings.TrimSpace(string(body)))
	}
	line, _, _ := strings.Cut(string(body), "\n")
	name, ok := strings.CutPrefix(line, "backend ")
	if !ok {
		return "", errors.New("an answer of no backend: " + line)
	}
	return name, nil
}

// watch keeps the breakers' states as the API tells them.
func (s *stage) watch(ctx context.Context, api *API) {
	for {
		answer, err := api.call(ctx, http.MethodGet, "/services/echo", nil)
		if err == nil {
			if services, _, err := decode(answer, true); err == nil {
				s.mu.Lock()
				for _, in := range services[0].Instances {
					if got := s.perBackend[in.ID]; got != nil {
						got.breaker, got.until = in.Breaker.State, in.Breaker.Until
					}
				}
				s.mu.Unlock()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// say notes an event, and prints it at once where there is no terminal.
func (s *stage) say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	line := fmt.Sprintf("%5.1f s  %s", time.Since(s.start).Seconds(), text)
	s.events = append(s.events, line)
	s.events = s.events[max(0, len(s.events)-shownEvents):]
	if s.lines {
		fmt.Fprintln(s.out, line)
	}
}

// logger makes events of the gateway's own log.
func (s *stage) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(events{s}, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

type events struct{ stage *stage }

func (e events) Write(line []byte) (int, error) {
	e.stage.say("gateway: " + strings.TrimSpace(string(line)))
	return len(line), nil
}

// show draws the state until ctx ends: often on a terminal, else a line every now and then.
func (s *stage) show(ctx context.Context, every time.Duration) {
	draw := s.line
	if !s.lines {
		every, draw = 100*time.Millisecond, s.frame
		fmt.Fprint(s.out, "\x1b[?25l\x1b[?7l\x1b[2J") // no cursor, no wrapped lines, clear
		defer fmt.Fprint(s.out, "\x1b[?7h\x1b[?25h")
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		s.mu.Lock()
		_, err := io.WriteString(s.out, draw(time.Now()))
		s.mu.Unlock()
		if err != nil {
			return // nobody looks any more
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// last is how many requests of the last second b got.
func (b *share) last(now time.Time) int {
	for len(b.recent) > 0 && now.Sub(b.recent[0]) > time.Second {
		b.recent = b.recent[1:]
	}
	return len(b.recent)
}

// line is the state in one line: the last second's requests of each backend.
func (s *stage) line(now time.Time) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%5.1f s ", now.Sub(s.start).Seconds())
	for _, name := range s.order {
		b := s.perBackend[name]
		fmt.Fprintf(&text, "  %s %2d/s %-9s", name, b.last(now), b.breaker)
	}
	fmt.Fprintf(&text, "  %d requests, %d errors\n", s.requests, s.failed)
	return text.String()
}

const (
	clear = "\x1b[K\n" // the rest of the line, left over from the last frame
	green = "\x1b[32m"
	red   = "\x1b[31m"
	plain = "\x1b[0m"
)

// frame is the state as a picture that replaces the last one.
func (s *stage) frame(now time.Time) string {
	var text strings.Builder
	text.WriteString("\x1b[H" + s.title + clear + clear)
	fmt.Fprintf(&text, "  %-8s %-17s %-30s %10s"+clear, "backend", "breaker", "requests of the last second", "all")
	for _, name := range s.order {
		b := s.perBackend[name]
		state, color := b.breaker, green
		if b.until != nil {
			state += fmt.Sprintf(", %.1f s left", max(0, b.until.Sub(now).Seconds()))
		}
		if b.breaker != "closed" {
			color = red
		}
		n := b.last(now)
		fmt.Fprintf(&text, "  %-8s %s%-17s%s %-30s %10d"+clear, name, color, state, plain, strings.Repeat("■", min(n, demoRate)/2)+fmt.Sprintf(" %d", n), b.all)
	}
	fmt.Fprintf(&text, clear+"  %.1f s, %d requests, %d errors"+clear+clear, now.Sub(s.start).Seconds(), s.requests, s.failed)
	for _, event := range s.events {
		text.WriteString(event + clear)
	}
	text.WriteString(clear + "Ctrl-C ends it" + clear + "\x1b[J")
	return text.String()
}

// end sums up.
func (s *stage) end() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	fmt.Fprintf(s.out, "%d requests, %d errors:", s.requests, s.failed)
	for _, name := range s.order {
		fmt.Fprintf(s.out, " %s %d", name, s.perBackend[name].all)
	}
	fmt.Fprintln(s.out)
	if s.failed > 0 {
		return fmt.Errorf("%d of %d requests failed, the last one: %s", s.failed, s.requests, s.lastError)
	}
	return nil
}
