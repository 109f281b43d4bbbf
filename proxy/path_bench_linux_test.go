package proxy

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pathLoad is what a number of clients ask a gateway for, over and over.
type pathLoad struct {
	name        string
	connections int
	request     string
	size        int // of the response's body
	chunked     bool
	delay       time.Duration // of the origin
	counted     int           // requests whose system calls are counted
}

var pathLoads = []pathLoad{
	{name: "GET", connections: 1, request: smallGet, size: 12, counted: 4000},
	{name: "GET", connections: 16, request: smallGet, size: 12, counted: 4000},
	{name: "GET", connections: 64, request: smallGet, size: 12, counted: 4000},
	{name: "GET", connections: 256, request: smallGet, size: 12, counted: 4000},
	{name: "GET of a browser", connections: 64, request: browserGet, size: 12, counted: 4000},
	{name: "POST of 1 KiB", connections: 64, request: smallPost, size: 12, counted: 4000},
	{name: "response of 16 KiB", connections: 64, request: smallGet, size: 16 << 10, counted: 4000},
	{name: "response of 1 MiB", connections: 16, request: smallGet, size: 1 << 20, counted: 512}, // by splice
	{name: "response in chunks", connections: 64, request: smallGet, size: 2 << 10, chunked: true, counted: 4000},
	{name: "response after 150 ms", connections: 64, request: smallGet, size: 12, delay: 150 * time.Millisecond, counted: 256}, // no loop waits so long
}

// response is what the origin sends.
func (l *pathLoad) response() string {
	if !l.chunked {
		return ok(l.size)
	}
	half := strings.Repeat("r", l.size/2)
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nDate: Mon, 23 Nov 2026 17:00:00 GMT\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n", len(half), half, len(half), half)
}

// least is how many requests make a load.
func (l *pathLoad) least() int {
	if l.delay > 0 {
		return 2 * l.connections // that is twice the delay
	}
	return 8 * l.connections
}

// path is a gateway as the binary serves it, between clients and an origin in a process of their own: what this process
// spends is the gateway's.
type path struct {
	load *pathLoad
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.ReadCloser
	line [256]byte // what the peers said last
}

// startPath starts all three, connected and warm.
func startPath(t testing.TB, index int) *path {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &path{load: &pathLoads[index], cmd: exec.Command(self, "-test.run=^TestPathPeers$")}
	p.cmd.Env = append(os.Environ(), peersEnv+"="+strconv.Itoa(index), "GOMAXPROCS=1")
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if p.out, err = p.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.in.Close() // which ends it
		io.Copy(io.Discard, p.out)
		p.cmd.Wait()
	})
	origin := p.reply(t)

	g := startGateway(t, asServed, nil)
	g.register(t, "echo", "a", "http://"+origin)
	c := g.dial(t)
	c.send(p.load.request)
	m := c.read(false).want(t, 200)
	c.Close()
	if m.chunked != p.load.chunked || m.body != strings.Repeat("r", p.load.size) {
		t.Fatalf("the response is not the origin's: %s%d bytes", m.head, len(m.body))
	}
	p.tell(t, fmt.Appendf(nil, "connect %s %d\n", g.addr, len(m.head)+len(m.body)))
	p.reply(t)
	p.run(t, p.load.least())
	return p
}

func (p *path) tell(t testing.TB, line []byte) {
	if _, err := p.in.Write(line); err != nil {
		t.Fatal(err)
	}
}

// reply returns what the peers say.
func (p *path) reply(t testing.TB) string {
	n, err := p.out.Read(p.line[:])
	line := string(p.line[:n])
	if err != nil || !strings.HasSuffix(line, "\n") || strings.HasPrefix(line, "---") {
		rest, _ := io.ReadAll(p.out)
		t.Fatalf("the peers say %s%s (%v)", line, rest, err)
	}
	return line[:n-1]
}

// spent is what a run took.
type spent struct {
	elapsed, cpu time.Duration
	allocs       uint64
}

// run has n requests served. Nothing but the gateway allocates meanwhile.
func (p *path) run(t testing.TB, n int) spent {
	line := fmt.Appendf(nil, "run %d\n", n)
	var before, after runtime.MemStats
	var began, ended syscall.Rusage
	runtime.ReadMemStats(&before)
	mustRusage(t, &began)
	p.tell(t, line)
	k, err := p.out.Read(p.line[:])
	mustRusage(t, &ended)
	runtime.ReadMemStats(&after)
	ns, parseErr := strconv.ParseInt(strings.TrimSpace(string(p.line[:k])), 10, 64)
	if err != nil || parseErr != nil {
		rest, _ := io.ReadAll(p.out)
		t.Fatalf("the peers say %s%s (%v)", p.line[:k], rest, err)
	}
	cpu := ended.Utime.Nano() + ended.Stime.Nano() - began.Utime.Nano() - began.Stime.Nano()
	return spent{time.Duration(ns), time.Duration(cpu), after.Mallocs - before.Mallocs}
}

func mustRusage(t testing.TB, u *syscall.Rusage) {
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, u); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkPath is the whole of a request through the gateway, over the loopback: its CPU time (user and system), its
// allocations, and its system calls, where counting them is permitted (to root, as a rule). -cpu 1 leaves one CPU of two
// to the peers.
//
// Fewer requests than a few on each connection are no load, so there are at least as many, and ns/op is the time of one
// of those that there were.
func BenchmarkPath(b *testing.B) {
	var once sync.Once
	for i := range pathLoads {
		l := &pathLoads[i]
		var counted calls
		var err error
		b.Run(fmt.Sprintf("%s/%d", l.name, l.connections), func(b *testing.B) {
			p := startPath(b, i)
			if b.N == 1 { // which is the first of some runs, always: once is enough, and not while time is taken
				counted, err = countCalls(true, func() { p.run(b, l.counted) })
			}
			n := max(b.N, l.least())
			b.ResetTimer()
			s := p.run(b, n)
			b.StopTimer()
			b.ReportMetric(float64(s.elapsed.Nanoseconds())/float64(n), "ns/op")
			b.ReportMetric(float64(s.cpu.Nanoseconds())/1e3/float64(n), "cpu-us/request")
			b.ReportMetric(float64(s.allocs)/float64(n), "allocs/request")
			if err != nil {
				once.Do(func() { b.Logf("system calls are not counted: %v", err) })
				return
			}
			b.ReportMetric(float64(counted.all)/float64(l.counted), "syscalls/request")
			for i, n := range counted.kinds {
				if each := float64(n) / float64(l.counted); each >= 0.005 {
					b.ReportMetric(each, callKinds[i].name+"/request")
				}
			}
		})
	}
}

// A small request that a loop serves takes two reads, two writes and a look at whether the backend's connection is still
// there, and its share of waiting. More than two calls for that would be a read that finds nothing, or a wake-up.
func TestRequestsCostFewCalls(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // one loop, which the peers keep busy
	index := slices.IndexFunc(pathLoads, func(l pathLoad) bool {
		return l.request == smallGet && l.size == 12 && l.connections == 64 && l.delay == 0
	})
	p := startPath(t, index)
	const requests, most = 2000, 7
	// The best of some runs: where other programs take the peers' CPU, the loop waits often.
	var best calls
	for i := 0; i == 0 || i < 10 && best.all > most*requests; i++ {
		n, err := countCalls(true, func() { p.run(t, requests) })
		if err != nil {
			t.Skipf("system calls are not counted: %v", err)
		}
		if i == 0 || n.all < best.all {
			best = n
		}
	}
	if best.all > most*requests {
		t.Errorf("%d system calls for %d requests, want %d a request at most; of each kind:", best.all, requests, most)
		for i, n := range best.kinds {
			t.Logf("%s: %d", callKinds[i].name, n)
		}
	}
}
