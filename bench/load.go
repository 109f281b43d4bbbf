package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// target is the path that is requested: the service's name is its first segment, and every gateway passes it on whole.
const target = "/bench/hello"

// counterMark, in a load's body, is replaced by a number of as many digits, another one for each request.
const counterMark = "########"

// lastWait is how long requests that are under way at the end are waited for.
const lastWait = 5 * time.Second

// load is what clients ask for, over and over.
type load struct {
	Method      string   `json:"method"`
	Targets     []string `json:"targets,omitempty"` // asked for in turn; none: target
	Headers     []string `json:"headers,omitempty"` // "Name: value", beside Host
	Body        []byte   `json:"body,omitempty"`
	Counter     int      `json:"counter,omitempty"` // the first number for counterMark
	Response    int      `json:"response_bytes"`    // body of each response
	Connections int      `json:"connections"`
}

// requests returns the load's requests as bytes, one for each target.
func (l load) requests(host string) [][]byte {
	targets := l.Targets
	if len(targets) == 0 {
		targets = []string{target}
	}
	var all [][]byte
	for _, t := range targets {
		var b bytes.Buffer
		fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", l.Method, t, host)
		for _, h := range l.Headers {
			fmt.Fprintf(&b, "%s\r\n", h)
		}
		if len(l.Body) > 0 {
			fmt.Fprintf(&b, "Content-Length: %d\r\n", len(l.Body))
		}
		b.WriteString("\r\n")
		b.Write(l.Body)
		all = append(all, b.Bytes())
	}
	return all
}

// outcome is what a load counted in one run.
type outcome struct {
	Requests   int           `json:"requests"` // answered, with whatever status
	Elapsed    time.Duration `json:"elapsed_ns"`
	Latency    latency       `json:"latency"`
	Late       *histogram    `json:"late,omitempty"` // how much too late an open loop itself sent
	BadStatus  int           `json:"bad_status"`     // answers other than 2xx or of another length (wrk: other than 2xx and 3xx)
	Errors     int           `json:"errors"`         // requests that failed: reset, malformed, wrk: not in time
	Unanswered int           `json:"unanswered"`     // within lastWait; their latencies count as what they had waited by then
}

// latency is a histogram, or what wrk says instead.
type latency struct {
	All      *histogram    `json:"all,omitempty"`
	P50, P99 time.Duration `json:",omitempty"`
}

func (l latency) quantile(q float64) time.Duration {
	switch {
	case l.All != nil:
		return l.All.quantile(q)
	case q == 0.50:
		return l.P50
	case q == 0.99:
		return l.P99
	}
	return 0 // unknown
}

// add adds what was counted in another run. Both have histograms.
func (o *outcome) add(other outcome) {
	o.Requests += other.Requests
	o.Elapsed += other.Elapsed
	o.BadStatus += other.BadStatus
	o.Errors += other.Errors
	o.Unanswered += other.Unanswered
	o.Latency.All.merge(other.Latency.All)
	o.Late.merge(other.Late)
}

// checked refuses an outcome that would make a row of zeros.
func (o outcome) checked() (outcome, error) {
	if o.Elapsed <= 0 || o.Requests+o.Errors+o.Unanswered == 0 {
		return outcome{}, errors.New("no count of requests")
	}
	return o, nil
}

// tool makes closed loops from a process of its own.
type tool struct {
	name, version string
	wholeSeconds  bool // its durations have no finer unit
	start         func(ctx context.Context, on cpuSet, l load, addr, dir string, d time.Duration) (driving, error)
}

// driving is a load that is about to begin.
type driving interface {
	run(ctx context.Context) (outcome, error) // to its end
	pid() int                                 // 0: unknown
	stop()
}

// findTool returns the tool of that name.
func findTool(ctx context.Context, name string) (tool, error) {
	if name == "wrk" {
		path, err := exec.LookPath("wrk")
		if err != nil {
			return tool{}, fmt.Errorf("--tool wrk: %w", errNotInstalled)
		}
		return tool{"wrk", versionWord(ctx, 1, path, "-v"), true, func(_ context.Context, on cpuSet, l load, addr, dir string, d time.Duration) (driving, error) {
			return &wrk{path, on, l, addr, dir, d}, nil
		}}, nil
	}
	return tool{"builtin", "", false, func(ctx context.Context, on cpuSet, l load, addr, _ string, d time.Duration) (driving, error) {
		return startDrive(ctx, on, l, addr, 0, d)
	}}, nil
}

// builtin is this command's own load, in a process of its own.
type builtin struct {
	*process
	in    io.WriteCloser
	lines chan string
	limit time.Duration // for a run
}

// startDrive starts the built-in load and waits until it could begin. A rate of 0 is a closed loop: see drive.
func startDrive(ctx context.Context, on cpuSet, l load, addr string, rate float64, d time.Duration) (*builtin, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "load", addr, d.String(), "--rate", fmt.Sprint(rate))
	cmd.Env = environment("GOMAXPROCS=1")
	b := &builtin{lines: make(chan string, 16), limit: d + 15*time.Second}
	if b.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	b.process, err = startProcess(on, cmd, func(line string) {
		select {
		case b.lines <- line:
		default: // more than it has to say
		}
	})
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(b.in).Encode(l); err != nil {
		b.stop()
		return nil, fmt.Errorf("load: %w\n%s", err, b.log)
	}
	if line, err := b.line(ctx, time.Minute); err != nil || line != loadReady {
		b.stop()
		return nil, fmt.Errorf("load: %q, %w\n%s", line, err, b.log)
	}
	return b, nil
}

func (b *builtin) pid() int { return b.cmd.Process.Pid }

// What the load's process says when it is ready, and is told then.
const (
	loadReady = "ready"
	loadGo    = "go"
)

func (b *builtin) run(ctx context.Context) (outcome, error) {
	if _, err := io.WriteString(b.in, loadGo+"\n"); err != nil {
		return outcome{}, fmt.Errorf("load: %w\n%s", err, b.log)
	}
	line, err := b.line(ctx, b.limit)
	if err != nil {
		return outcome{}, fmt.Errorf("load: %w\n%s", err, b.log)
	}
	var o outcome
	if err := json.Unmarshal([]byte(line), &o); err != nil {
		return outcome{}, fmt.Errorf("load: %w\n%s", err, b.log)
	}
	if o.Latency.All == nil || o.Late == nil {
		return outcome{}, fmt.Errorf("load: no latencies\n%s", b.log)
	}
	return o.checked()
}

// line returns what the process says next.
func (b *builtin) line(ctx context.Context, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case line := <-b.lines:
		return line, nil
	case <-b.exited:
		return "", errors.New("it ended")
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// loadCmd is the built-in load as a process of its own: the load as JSON on stdin, the outcome as JSON on stdout. Its
// connections stay until stdin ends.
type loadCmd struct {
	Addr     string        `arg:""`
	Duration time.Duration `arg:""`
	Rate     float64
}

// Run drives the address for the duration.
func (c *loadCmd) Run() error {
	dieOfSignals()
	in := bufio.NewReader(os.Stdin)
	text, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var l load
	if err := json.Unmarshal(text, &l); err != nil {
		return err
	}
	return drive(l, c.Addr, c.Rate, c.Duration, func() error {
		fmt.Println(loadReady)
		_, err := in.ReadString('\n')
		return err
	}, func(o outcome) error {
		if err := json.NewEncoder(os.Stdout).Encode(o); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, in)
		return err
	})
}

// wrk is the load made by another program, as a check of ours: github.com/wg/wrk.
type wrk struct {
	path      string
	on        cpuSet
	l         load
	addr, dir string // dir for its script
	d         time.Duration
}

func (w *wrk) stop()    {}
func (w *wrk) pid() int { return 0 } // it is not there before it begins

func (w *wrk) run(ctx context.Context) (outcome, error) {
	args := []string{w.path, "-t1", "-c", strconv.Itoa(w.l.Connections), "-d", strconv.Itoa(int(w.d.Seconds())) + "s", "--latency"}
	for _, h := range w.l.Headers {
		args = append(args, "-H", h)
	}
	if w.l.Method != http.MethodGet || len(w.l.Body) > 0 {
		script := filepath.Join(w.dir, "wrk.lua")
		text := fmt.Sprintf("wrk.method = %s\nwrk.body = %s\n", luaString([]byte(w.l.Method)), luaString(w.l.Body))
		if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
			return outcome{}, err
		}
		args = append(args, "-s", script)
	}
	ctx, cancel := context.WithTimeout(ctx, w.d+15*time.Second) // it may take some seconds to give up on what hangs
	defer cancel()
	out, err := output(ctx, w.on, append(args, "http://"+w.addr+target)...)
	if err != nil {
		return outcome{}, err
	}
	o, err := parseWrk(out)
	if err != nil {
		return outcome{}, fmt.Errorf("wrk: %w in its output:\n%s", err, out)
	}
	return o, nil
}

// luaString quotes any bytes for Lua: all of them in decimal.
func luaString(b []byte) string {
	var s strings.Builder
	s.WriteByte('"')
	for _, c := range b {
		fmt.Fprintf(&s, `\%03d`, c)
	}
	s.WriteByte('"')
	return s.String()
}

// parseWrk reads what `wrk --latency` prints.
func parseWrk(out string) (outcome, error) {
	var o outcome
	var err error
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "50%":
			o.Latency.P50, err = time.ParseDuration(f[1])
		case len(f) == 2 && f[0] == "99%":
			o.Latency.P99, err = time.ParseDuration(f[1])
		case len(f) > 3 && f[1] == "requests" && f[2] == "in":
			o.Requests, err = strconv.Atoi(f[0])
			if d, perr := time.ParseDuration(strings.TrimSuffix(f[3], ",")); perr == nil {
				o.Elapsed = d
			}
		case strings.HasPrefix(line, "Non-2xx or 3xx responses:"):
			o.BadStatus, err = strconv.Atoi(f[len(f)-1])
		case strings.HasPrefix(line, "Socket errors:"):
			var connect, read, write, timeout int
			_, err = fmt.Sscanf(line, "Socket errors: connect %d, read %d, write %d, timeout %d", &connect, &read, &write, &timeout)
			o.Errors = connect + read + write + timeout
		}
		if err != nil {
			return outcome{}, err
		}
	}
	return o.checked()
}
