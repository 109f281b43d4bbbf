package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kerberos/internal/follow"
)

// inMachine is set where this program is the first process of a machine of its own, whose clock it may set.
const inMachine = "TEST_IN_MACHINE"

// passed is the last line on the console of a machine in which all went well.
const passed = "the machine's test has passed"

// The clock of a machine is set by a day and by a year, forward and back, while a gateway serves: nothing of it ends early, and
// nothing late. That machine is User-mode Linux, a kernel that runs as a process. It has the files of this one, to read only, and
// a clock and a loopback of its own; its first process is this program, with this test alone.
func TestClockSteps(t *testing.T) {
	if os.Getenv(inMachine) == "" {
		testInMachine(t)
		return
	}
	becomeMachine(t)
	if t.Run("machine", testClockSteps) {
		fmt.Println(passed)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// testInMachine runs the calling test again in a machine, and fails with what that has printed.
func testInMachine(t *testing.T) {
	t.Helper()
	linux, err := exec.LookPath("linux.uml")
	switch {
	case err != nil:
		t.Skip("linux.uml is not installed")
	case raceDetector:
		t.Skip("the race detector needs more addresses than User-mode Linux has")
	case testing.Short():
		t.Skip("takes half a minute")
	}
	t.Parallel()
	dir := t.TempDir() // for what it writes itself: its memory, and a socket to control it
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, linux, "mem=512M", "quiet", "con=null", "con0=null,fd:1",
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "init="+binary,
		inMachine+"=1", "TMPDIR=/dev", // which is in its memory
		"--", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=100s")
	cmd.Env = []string{"HOME=" + dir, "TMPDIR=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}       // at which it ends its own
	everyProcess := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // a process in there is one out here
	cmd.Cancel, cmd.WaitDelay = everyProcess, 5*time.Second
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		_ = everyProcess()
	}
	_, console, begun := strings.Cut(string(out), "=== RUN")
	if !begun || err != nil || !strings.Contains(console, passed) {
		t.Fatalf("%v, %v; the console:\n%s", cmd.Args, err, out)
	}
	t.Log(console)
}

// becomeMachine does what the first process of a machine has to: there is nothing yet but a kernel and files.
func becomeMachine(t *testing.T) {
	if os.Getpid() != 1 { // the variable was set by mistake
		t.Fatal("this is no machine of its own")
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	// Nobody's clock is to be set by a variable that is set by mistake.
	if cpu, err := os.ReadFile("/proc/cpuinfo"); err != nil || !strings.Contains(string(cpu), "User Mode Linux") {
		t.Fatalf("this is no machine to be tested with: %v %s", err, cpu)
	}
	binary = os.Args[0] // there was no /proc yet when it was asked for
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	loopback.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, loopback); err != nil {
		t.Fatal(err)
	}
}

// stepClock sets the clock of the machine, and sees that it was set.
func stepClock(t *testing.T, by time.Duration) {
	t.Helper()
	before := time.Now()
	next := unix.NsecToTimespec(before.Add(by).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &next); err != nil {
		t.Fatal(err)
	}
	after := time.Now()
	if off := after.Round(0).Sub(before.Round(0)) - after.Sub(before) - by; off.Abs() > time.Second {
		t.Fatalf("the clock went from %v to %v, and not by %v", before, after, by)
	}
}

// byTheClock tells whether a time is that of the machine's clock, and was written a moment ago.
func byTheClock(written time.Time, err error) bool {
	return err == nil && time.Now().Round(0).Sub(written).Abs() < 5*time.Second
}

// lasts sends a request over and over while its answer is from, and sees that it becomes to when clockWait has passed since then:
// not before, and not after ten times that. From 0 it is sent once.
func lasts(t *testing.T, what string, since time.Time, addr, raw string, from, to int) {
	for {
		response, _, err := converse(&net.Dialer{}, addr, raw)
		took := time.Since(since)
		switch late := took > 10*clockWait; {
		case err != nil:
			t.Errorf("%s: %v after %v", what, err, took)
		case response.StatusCode == from && !late:
			time.Sleep(10 * time.Millisecond)
			continue
		case response.StatusCode != to || late || took < clockWait:
			t.Errorf("%s: %d after %v, want %d after %v", what, response.StatusCode, took, to, clockWait)
		}
		return
	}
}

// clocked is a gateway and its instances while the clock is set.
type clocked struct {
	*running
	file, access string            // its settings, and its access log
	addr         map[string]string // of instances, by the service
	waits        chan struct{}     // what slow waits for
	fails        atomic.Bool       // whether the next request to frail fails
	checks       atomic.Int64      // that have come to checked
}

const (
	clockWait    = 2 * time.Second // of timeouts, leases and the breaker
	clockCheck   = 200 * time.Millisecond
	clockPiece   = 100 * time.Millisecond // from one piece of the stream to the next
	clockSilence = 5 * time.Second        // after which a stream is cut, and one goes who is to renew all the time
	day, year    = 24 * time.Hour, 365 * 24 * time.Hour

	lease = `,"ttl":"2s"` // of a registration: clockWait
)

func testClockSteps(t *testing.T) {
	dir := t.TempDir()
	c := &clocked{addr: map[string]string{}, waits: make(chan struct{})}
	c.file, c.access = filepath.Join(dir, "kerberos.yaml"), filepath.Join(dir, "access.log")
	for service, handler := range c.handlers() {
		c.addr[service] = backend(t, handler)
	}
	c.configure(t, 0)
	start := func() {
		c.running = launch(t, nil, "--config", c.file, "--data", filepath.Join(dir, "data"), "--access-log", c.access,
			"--drain-timeout", "1s")
	}
	start()
	for service := range c.addr {
		fields := ""
		switch service {
		case "checked": // a machine in a machine may stand still for longer than the usual three checks
			fields = fmt.Sprintf(`,"check":{"path":"/health","interval":"%v","timeout":"%[1]v","fall":10}`, clockCheck)
		case "renewed":
			fields = fmt.Sprintf(`,"ttl":"%v"`, clockSilence)
		}
		c.add(t, service, "a", fields)
	}
	c.register("echo", "b", named(t, "b"))
	c.steps(t)

	// At another time each, what was registered is there, with a lease that begins.
	for _, by := range []time.Duration{-year, 2 * year, -10 * year} {
		what := fmt.Sprintf("a start %v later", by)
		c.add(t, "leased", "kept", lease)
		c.signal(syscall.SIGKILL)
		<-c.ended
		stepClock(t, by)
		began := time.Now()
		start()
		for _, instance := range []string{"echo/a", "echo/b", "slow/a", "leased/kept"} {
			if text := c.listed(t, instance); !strings.Contains(text, `"ready":true`) {
				t.Errorf("%s: %s is %q after %v", what, instance, text, time.Since(began))
			}
		}
		if status, text := c.get("/echo"); status != http.StatusOK {
			t.Errorf("%s: %d %s", what, status, text)
		}
		lasts(t, "a lease, "+what, began, c.admin, get("/services/leased/kept"), http.StatusOK, http.StatusNotFound)
	}
	c.signal(syscall.SIGTERM)
	if code := c.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// handlers are what the instances do, by the service.
func (c *clocked) handlers() map[string]http.HandlerFunc {
	answers := func(http.ResponseWriter, *http.Request) {}
	return map[string]http.HandlerFunc{
		"echo": answers, "leased": answers, "renewed": answers,
		"checked": func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				c.checks.Add(1)
			}
		},
		"slow": func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-c.waits:
			case <-r.Context().Done():
			}
		},
		"hang": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"frail": func(w http.ResponseWriter, _ *http.Request) {
			if c.fails.Swap(false) {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		},
		"stream": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				io.WriteString(w, "piece\n")
				w.(http.Flusher).Flush()
				time.Sleep(clockPiece)
			}
		},
		"tunnel": func(w http.ResponseWriter, _ *http.Request) {
			conn, buffered, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(conn, buffered)
		},
	}
}

// configure writes the settings, which are others each round.
func (c *clocked) configure(t *testing.T, round int) {
	t.Helper()
	text := fmt.Sprintf(`
request-timeout: 90s
client-head-timeout: %[1]v
response-idle-timeout: %[2]v
services:
  hang: {request-timeout: %[1]v}
  frail: {breaker-failures: 1, breaker-open: %[1]v, breaker-probes: 1, retries: 0}
  pinned:
    instances: [{id: round-%[3]d, addr: %[4]q}]
`, clockWait, clockSilence, round, c.addr["echo"])
	if err := os.WriteFile(c.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// add registers an instance of a service, with more fields.
func (c *clocked) add(t *testing.T, service, id, fields string) {
	t.Helper()
	body := fmt.Sprintf(`{"service":%q,"id":%q,"addr":%q%s}`, service, id, c.addr[service], fields)
	if status, answer := c.post(body); status != http.StatusNoContent {
		t.Fatalf("registering %s/%s: %d %s", service, id, status, answer)
	}
}

// listed is what the API says of an instance; it is empty if there is none.
func (c *clocked) listed(t *testing.T, instance string) string {
	t.Helper()
	response, text := exchange(t, c.admin, get("/services/"+instance))
	if response.StatusCode == http.StatusNotFound {
		return ""
	}
	return text
}

// reloads counts how often the settings were read again; the last time was at that time, according to the log.
func (c *clocked) reloads() (n int, last time.Time) {
	for _, line := range c.log() {
		if line["msg"] == "the configuration has been read again" {
			n++
			last, _ = time.Parse(time.RFC3339, line["time"].(string))
		}
	}
	return n, last
}

// steps sets the clock again and again under a load, while a response, a stream, a tunnel and more go on that began before.
func (c *clocked) steps(t *testing.T) {
	var beside sync.WaitGroup
	over := make(chan struct{})
	end := sync.OnceFunc(func() {
		close(over)
		beside.Wait()
	})
	t.Cleanup(end)
	beside.Go(func() { // heartbeats
		for {
			select {
			case <-over:
				return
			case <-time.After(clockSilence / 10):
			}
			raw := strings.Replace(get("/services/renewed/a/heartbeat"), "GET", "POST", 1)
			if response, text, err := converse(&net.Dialer{}, c.admin, raw); err != nil || response.StatusCode != http.StatusNoContent {
				t.Errorf("a heartbeat: %v %s %v", response, text, err)
			}
		}
	})
	opened := time.Now()
	open := func(raw string) (net.Conn, *bufio.Reader) {
		conn, err := net.Dial("tcp", c.data)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		io.WriteString(conn, raw)
		return conn, bufio.NewReader(conn)
	}
	head := func(r *bufio.Reader, want int) *http.Response {
		t.Helper()
		response, err := http.ReadResponse(r, nil)
		if err != nil || response.StatusCode != want {
			t.Fatalf("%v, %v, want %d", response, err, want)
		}
		return response
	}
	_, slow := open(get("/slow"))
	kept, keptReader := open("")
	tunnel, echoed := open("GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
	head(echoed, http.StatusSwitchingProtocols)
	stream, pieces := open(get("/stream"))
	streamed := head(pieces, http.StatusOK).Body
	holder := exec.Command(binary)
	holder.Env = append(os.Environ(), asHolder+"="+c.admin)
	held := beginCommand(t, holder)
	eventually(t, "one holds its registration", func() bool { return held.stdout.String() == "held\n" })

	var came atomic.Int64 // bytes of the stream
	beside.Go(func() {
		buffer := make([]byte, 4096)
		for {
			n, err := streamed.Read(buffer)
			came.Add(int64(n))
			if err != nil {
				if !errors.Is(err, net.ErrClosed) { // it is closed when the test ends
					t.Errorf("the stream has ended: %v", err)
				}
				return
			}
		}
	})
	l := beginLoad(t, c.data, 100)

	// goesOn sees that what is open can be used on, who is registered stays, and the hour is the new one.
	goesOn := func(what string) {
		t.Helper()
		message := "over " + what + "\n"
		io.WriteString(tunnel, message)
		_ = tunnel.SetReadDeadline(time.Now().Add(10 * time.Second))
		if text, err := echoed.ReadString('\n'); text != message || err != nil {
			t.Errorf("%s: the tunnel echoes %q, %v", what, text, err)
		}
		if keep, err := ask(kept, keptReader, "GET", what); err != nil || !keep {
			t.Errorf("%s: on a connection that was kept: %v, %v", what, keep, err)
		}
		stepped, before := time.Now(), came.Load()
		eventually(t, "the Date field has followed the clock", func() bool {
			response, _ := exchange(t, c.data, get("/nobody")) // which the gateway answers itself
			return byTheClock(http.ParseTime(response.Header.Get("Date")))
		})
		if took := time.Since(stepped); took > 3*time.Second {
			t.Errorf("%s: the Date field needed %v", what, took)
		}
		l.more(t, 10)
		eventually(t, "the stream goes on", func() bool { return came.Load() > before })
		for _, instance := range []string{"renewed/a", "echo/held", "echo/a", "checked/a"} {
			if text := c.listed(t, instance); !strings.Contains(text, `"ready":true`) {
				t.Errorf("%s: %s is %q", what, instance, text)
			}
		}
	}
	goesOn("before any")
	for i, by := range [][2]time.Duration{
		{day, -2 * day}, {year, -2 * year}, {-year, 3 * year}, {-3 * time.Second, 0}, {3 * time.Second, -3 * time.Second},
	} {
		c.round(t, i+1, by, goesOn)
	}

	close(c.waits)
	head(slow, http.StatusOK)
	stream.Close()
	tunnel.Close()
	end()
	l.stop()
	if failures := l.failures(); len(failures) > 0 {
		t.Errorf("failed: %v", failures)
	}
	t.Logf("%d requests were answered", l.answered.Load())
	eventually(t, "the access log has how long they took", func() bool {
		longest := map[string]float64{}
		for _, line := range c.accessed(t) {
			longest[line.Path] = max(longest[line.Path], line.Duration)
		}
		whole := time.Since(opened).Seconds()
		for path, took := range longest {
			if took > whole {
				t.Fatalf("of %v seconds a request to %s took %v, according to the access log", whole, path, took)
			}
		}
		return min(longest["/slow"], longest["/stream"], longest["/tunnel"]) > whole/2
	})
	held.signal(syscall.SIGKILL)
	eventually(t, "who held its registration is gone", func() bool { return c.listed(t, "echo/held") == "" })
}

// round sets the clock twice, while several things wait for their time. goesOn is called behind each.
func (c *clocked) round(t *testing.T, n int, by [2]time.Duration, goesOn func(what string)) {
	what := fmt.Sprintf("steps by %v and %v", by[0], by[1])
	began, checksBefore := time.Now(), c.checks.Load()
	reloaded, _ := c.reloads()
	c.configure(t, n)
	var waiting sync.WaitGroup
	t.Cleanup(waiting.Wait)
	wait := func(name, addr, raw string, from, to int) {
		waiting.Go(func() { lasts(t, name+", "+what, began, addr, raw, from, to) })
	}
	wait("a backend that hangs", c.data, get("/hang"), 0, http.StatusGatewayTimeout)
	wait("half a request head", c.data, "GET /echo HTTP/1.1\r\nHost:", 0, http.StatusRequestTimeout)
	c.add(t, "leased", fmt.Sprint(n), lease)
	wait("a lease", c.admin, get("/services/leased/"+fmt.Sprint(n)), http.StatusOK, http.StatusNotFound)
	c.fails.Store(true)
	if status, text := c.get("/frail"); status != http.StatusServiceUnavailable {
		t.Errorf("%s: what opens the breaker is %d %s", what, status, text)
	}
	wait("an open breaker", c.data, get("/frail"), http.StatusServiceUnavailable, http.StatusOK)
	time.Sleep(time.Until(began.Add(follow.Every + 100*time.Millisecond))) // all of this has begun, and the file was looked at

	stepClock(t, by[0])
	first := time.Now().Round(0)
	goesOn(what + ", the first")
	stepClock(t, by[1])
	goesOn(what + ", the second")
	eventually(t, "the file is read again", func() bool { now, _ := c.reloads(); return now > reloaded })
	took := time.Since(began)
	_, at := c.reloads()
	between := at.Sub(first) >= 0 && at.Sub(first) < took // the two steps: a slow machine takes its time for what goes on
	if !byTheClock(at, nil) && !between || took < quiet || c.listed(t, fmt.Sprint("pinned/round-", n)) == "" {
		t.Errorf("%s: the file was read again after %v, at %v according to the log: %s", what, took, at, c.listed(t, "pinned"))
	}
	waiting.Wait()
	eventually(t, "the access log follows the clock", func() bool {
		lines := c.accessed(t)
		return byTheClock(lines[len(lines)-1].Time, nil)
	})
	took = time.Since(began)
	due, checks := int64(took/clockCheck), c.checks.Load()-checksBefore
	if checks < due/3 || checks > due*2 {
		t.Errorf("%s: %d checks in %v, want about %d", what, checks, took, due)
	}
	t.Logf("%s took %v, with %d checks", what, took, checks)
}

// accessLine is what a line of the access log says of times; a duration is in seconds.
type accessLine struct {
	Time     time.Time
	Path     string
	Duration float64
}

// accessed reads the whole lines of the access log, of which there is one at least.
func (c *clocked) accessed(t *testing.T) (all []accessLine) {
	t.Helper()
	text, err := os.ReadFile(c.access)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if !strings.HasSuffix(line, "\n") {
			break
		}
		var next accessLine
		if err := json.Unmarshal([]byte(line), &next); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, next)
	}
	if len(all) == 0 {
		t.Fatal("the access log is empty")
	}
	return all
}
