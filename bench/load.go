package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// target is the path that is requested: the service's name is its first segment, and every gateway passes it on whole.
const target = "/bench/hello"

// load is what clients ask for, over and over: each connection sends its next request once the answer is there.
type load struct {
	Name        string   `json:"name"`
	Method      string   `json:"method"`
	Headers     []string `json:"headers,omitempty"` // "Name: value", beside Host
	Body        []byte   `json:"body,omitempty"`
	Response    int      `json:"response_bytes"` // body of each response
	Connections int      `json:"connections"`
}

// loads are the tables to be made, in order.
func loads(connections int) []load {
	return []load{
		{Name: "GET 12 B", Method: http.MethodGet, Response: 12, Connections: connections},
	}
}

// outcome is what a load tool counted in one run.
type outcome struct {
	Requests  int           `json:"requests"` // answered, with whatever status
	Elapsed   time.Duration `json:"elapsed_ns"`
	P50       time.Duration `json:"p50_ns"`
	P99       time.Duration `json:"p99_ns"`
	BadStatus int           `json:"bad_status"` // answers other than 2xx (wrk: and 3xx)
	Errors    int           `json:"errors"`     // requests without an answer: refused, reset, timed out
}

// tool makes a load from a process of its own.
type tool struct {
	name, version string
	wholeSeconds  bool // its durations have no finer unit
	// command returns the program that puts the load on addr, its input, and how to read its output. dir is for files.
	command func(l load, addr, dir string, d time.Duration) (args []string, stdin []byte, err error)
	parse   func(out string) (outcome, error)
}

// findTool returns the tool of that name; "auto" is the first of wrk, hey and builtin that is there.
func findTool(ctx context.Context, name string) (tool, error) {
	if path, err := exec.LookPath("wrk"); err == nil && (name == "auto" || name == "wrk") {
		return tool{"wrk", versionWord(ctx, 1, path, "-v"), true, wrkCommand(path), parseWrk}, nil
	}
	if path, err := exec.LookPath("hey"); err == nil && (name == "auto" || name == "hey") {
		return tool{"hey", "", false, heyCommand(path), parseHey}, nil
	}
	if name == "wrk" || name == "hey" {
		return tool{}, fmt.Errorf("--tool %s: %w", name, errNotInstalled)
	}
	self, err := os.Executable()
	return tool{"builtin", "", false, builtinCommand(self), parseBuiltin}, err
}

// run puts the load on addr for d, on the given CPU.
func (t tool) run(ctx context.Context, cpu int, l load, addr, dir string, d time.Duration) (outcome, error) {
	args, stdin, err := t.command(l, addr, dir, d)
	if err != nil {
		return outcome{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, d+15*time.Second) // wrk may take some seconds to give up on what hangs
	defer cancel()
	out, err := output(ctx, cpu, stdin, args...)
	if err != nil {
		return outcome{}, err
	}
	o, err := t.parse(out)
	if err != nil {
		return outcome{}, fmt.Errorf("%s: %w in its output:\n%s", t.name, err, out)
	}
	return o, nil
}

func wrkCommand(path string) func(load, string, string, time.Duration) ([]string, []byte, error) {
	return func(l load, addr, dir string, d time.Duration) ([]string, []byte, error) {
		args := []string{path, "-t1", "-c", strconv.Itoa(l.Connections), "-d", strconv.Itoa(int(d.Seconds())) + "s", "--latency"}
		for _, h := range l.Headers {
			args = append(args, "-H", h)
		}
		if l.Method != http.MethodGet || len(l.Body) > 0 {
			script := filepath.Join(dir, "wrk.lua")
			text := fmt.Sprintf("wrk.method = %s\nwrk.body = %s\n", luaString([]byte(l.Method)), luaString(l.Body))
			if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
				return nil, nil, err
			}
			args = append(args, "-s", script)
		}
		return append(args, "http://"+addr+target), nil, nil
	}
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
			o.P50, err = time.ParseDuration(f[1])
		case len(f) == 2 && f[0] == "99%":
			o.P99, err = time.ParseDuration(f[1])
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

func heyCommand(path string) func(load, string, string, time.Duration) ([]string, []byte, error) {
	return func(l load, addr, dir string, d time.Duration) ([]string, []byte, error) {
		args := []string{path, "-z", d.String(), "-c", strconv.Itoa(l.Connections), "-cpus", "1", "-disable-compression", "-m", l.Method}
		for _, h := range l.Headers {
			args = append(args, "-H", h)
		}
		if len(l.Body) > 0 {
			file := filepath.Join(dir, "hey.body")
			if err := os.WriteFile(file, l.Body, 0o600); err != nil {
				return nil, nil, err
			}
			args = append(args, "-D", file)
		}
		return append(args, "http://"+addr+target), nil, nil
	}
}

// parseHey reads what hey prints. Its latencies have a resolution of 0.1 ms.
func parseHey(out string) (outcome, error) {
	var o outcome
	section := ""
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		f := strings.Fields(line)
		var err error
		switch {
		case strings.HasSuffix(line, ":"):
			section = line
		case len(f) == 3 && f[0] == "Total:":
			o.Elapsed, err = seconds(f[1])
		case len(f) == 4 && f[0] == "50%":
			o.P50, err = seconds(f[2])
		case len(f) == 4 && f[0] == "99%":
			o.P99, err = seconds(f[2])
		case len(f) > 1 && section == "Status code distribution:":
			var status, n int
			_, err = fmt.Sscanf(line, "[%d] %d responses", &status, &n)
			o.Requests += n
			if status/100 != 2 {
				o.BadStatus += n
			}
		case len(f) > 1 && section == "Error distribution:":
			var n int
			_, err = fmt.Sscanf(line, "[%d]", &n)
			o.Errors += n
		}
		if err != nil {
			return outcome{}, err
		}
	}
	return o.checked()
}

func seconds(s string) (time.Duration, error) { return time.ParseDuration(s + "s") }

func builtinCommand(self string) func(load, string, string, time.Duration) ([]string, []byte, error) {
	return func(l load, addr, _ string, d time.Duration) ([]string, []byte, error) {
		stdin, err := json.Marshal(l)
		return []string{self, "load", addr, d.String()}, stdin, err
	}
}

func parseBuiltin(out string) (outcome, error) {
	var o outcome
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		return outcome{}, err
	}
	return o.checked()
}

// checked refuses an outcome that would make a row of zeros.
func (o outcome) checked() (outcome, error) {
	if o.Elapsed <= 0 || o.Requests == 0 && o.Errors == 0 {
		return outcome{}, errors.New("no count of requests")
	}
	return o, nil
}

// closedLoop is the built-in load: simple, and dearer per request than wrk.
func closedLoop(ctx context.Context, l load, addr string, d time.Duration) outcome {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards o and all
		o     outcome
		all   []time.Duration
		start = time.Now()
	)
	ctx, cancel := context.WithDeadline(ctx, start.Add(d))
	defer cancel()
	request := l.request(addr)
	for range l.Connections {
		wg.Go(func() {
			var c client
			for ctx.Err() == nil {
				c.run(ctx, addr, l.Method, request)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, c.times...)
			o.BadStatus += c.badStatus
			o.Errors += c.errors
		})
	}
	wg.Wait()
	slices.Sort(all)
	o.Requests, o.Elapsed = len(all), time.Since(start)
	o.P50, o.P99 = quantile(all, 0.50), quantile(all, 0.99)
	return o
}

// request is the load's request as bytes.
func (l load) request(addr string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", l.Method, target, addr)
	for _, h := range l.Headers {
		fmt.Fprintf(&b, "%s\r\n", h)
	}
	if len(l.Body) > 0 {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(l.Body))
	}
	b.WriteString("\r\n")
	b.Write(l.Body)
	return b.Bytes()
}

// client is one connection of the built-in load, and what it saw.
type client struct {
	times             []time.Duration // of each answer
	badStatus, errors int
}

// run uses one connection until ctx ends or the connection does. The request that is under way when ctx ends is still
// waited for, 2 s at most.
func (c *client) run(ctx context.Context, addr, method string, request []byte) {
	conn, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		c.errors++
		time.Sleep(10 * time.Millisecond) // what refuses once refuses again: no need to ask as fast as we can
		return
	}
	defer conn.Close()
	br := bufio.NewReader(conn)
	for ctx.Err() == nil {
		start := time.Now()
		conn.SetDeadline(start.Add(2 * time.Second))
		if _, err := conn.Write(request); err != nil {
			c.errors++
			return
		}
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		if err != nil {
			c.errors++
			return
		}
		c.times = append(c.times, time.Since(start))
		if resp.StatusCode/100 != 2 {
			c.badStatus++
		}
		if resp.Close {
			return
		}
	}
}

// quantile returns the smallest value that at least the share q of all is not above. sorted is in ascending order.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}
