package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const mib = 1 << 20

// heavy skips what takes seconds of the processor, and measures what the race detector makes different.
func heavy(t *testing.T) {
	if testing.Short() || raceDetector || runtime.GOOS != "linux" {
		t.Skip("measures a process, by /proc")
	}
}

// resident is a line of /proc/PID/status, in bytes: VmRSS is what a process holds, VmHWM the most it has held.
func resident(t *testing.T, pid int, line string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "\n"+line+":")
	fields := strings.Fields(rest)
	if len(fields) < 2 || fields[1] != "kB" {
		t.Fatalf("%s is not in %s", line, status)
	}
	n, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// growth is by how much the memory of a process peaks above what it holds now while f runs.
func growth(t *testing.T, pid int, f func()) int {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Skip("the peak cannot be reset: ", err)
	}
	before := resident(t, pid, "VmRSS")
	f()
	return resident(t, pid, "VmHWM") - before
}

// pace is how fast a peer reads or sends: bytes a second; 0: as fast as it can.
type pace int

// wait returns when n bytes are due, of what began then.
func (p pace) wait(began time.Time, n int64) {
	if p > 0 {
		time.Sleep(time.Until(began.Add(time.Duration(n) * time.Second / time.Duration(p))))
	}
}

// copy reads n bytes at that pace; small buffers make the sender feel it.
func (p pace) copy(r io.Reader, n int64) (int64, error) {
	const piece = 64 << 10
	if p == 0 {
		return io.CopyN(io.Discard, r, n)
	}
	began, got := time.Now(), int64(0)
	for got < n {
		m, err := io.CopyN(io.Discard, r, min(piece, n-got))
		if got += m; err != nil {
			return got, err
		}
		p.wait(began, got)
	}
	return got, nil
}

// bulk is a backend of large bodies: to GET /echo/length/N and /echo/chunks/N it sends N bytes, and it reads what is sent to it,
// each at its pace.
type bulk struct {
	net.Listener
	reads, sends pace
	block        []byte // what is sent
	sent         atomic.Int64
	got          atomic.Int64
}

func startBulk(t *testing.T, reads, sends pace) *bulk {
	t.Helper()
	b, err := newBulk(reads, sends, asOnEthernet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	go b.run()
	return b
}

func newBulk(reads, sends pace, options func(network, address string, c syscall.RawConn) error) (*bulk, error) {
	ln, err := (&net.ListenConfig{Control: options}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	return &bulk{Listener: ln, reads: reads, sends: sends, block: make([]byte, 256<<10)}, err
}

func (b *bulk) run() {
	for {
		c, err := b.Accept()
		if err != nil {
			return
		}
		_ = c.(*net.TCPConn).SetWriteBuffer(128 << 10) // see dialed
		if b.reads > 0 {
			_ = c.(*net.TCPConn).SetReadBuffer(64 << 10)
		}
		go b.serve(c)
	}
}

// asBulk has this program run as a bulk whose connections keep little in the kernel.
const asBulk = "TEST_BULK"

// leftovers runs this program with what CPU nobody else wants: who is slow, or serves those who are, has a machine of its own
// elsewhere. nice is not enough: the kernel lets it end its turn of 3 ms first.
func leftovers() *exec.Cmd { return exec.Command("chrt", "-i", "0", binary) }

// bulkApart starts that, and returns its address.
func bulkApart(t *testing.T) string {
	t.Helper()
	cmd := leftovers()
	cmd.Env = append(os.Environ(), asBulk+"=1")
	p := beginCommand(t, cmd)
	eventually(t, "the backend listens", func() bool { return strings.HasSuffix(p.stdout.String(), "\n") })
	return strings.TrimSpace(p.stdout.String())
}

// serveBulk is what that program does.
func serveBulk() int {
	b, err := newBulk(0, 0, keepsLittle)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	b.block = b.block[:16<<10] // a call to the kernel is not interrupted
	fmt.Println(b.Addr())
	b.run()
	return 0
}

func (b *bulk) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	for {
		request, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if request.Method != "GET" {
			n, err := b.reads.copy(request.Body, request.ContentLength)
			b.got.Add(n)
			if err != nil {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			continue
		}
		parts := strings.Split(request.URL.Path, "/")
		size, err := strconv.Atoi(parts[3])
		if err != nil {
			return
		}
		var w io.Writer = c
		if parts[2] == "chunks" {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			w = httputil.NewChunkedWriter(c)
		} else {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
		}
		began := time.Now()
		for left := size; left > 0; left -= len(b.block) {
			n, err := w.Write(b.block[:min(left, len(b.block))])
			b.sent.Add(int64(n))
			if err != nil {
				return
			}
			b.sends.wait(began, int64(size-left+n))
		}
		if parts[2] == "chunks" {
			fmt.Fprintf(c, "0\r\n\r\n")
		}
	}
}

// asOnEthernet makes the segments of a connection as large as they are on a network. On the loopback they are 64 KiB, and for
// those the kernel begins with buffers of 2.5 MiB a connection.
func asOnEthernet(_, _ string, c syscall.RawConn) (err error) {
	return errors.Join(c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1460)
	}), err)
}

// keepsLittle is asOnEthernet, with buffers of a few KiB in the kernel. The one that receives has to be small before there is a
// connection: a window that shrinks loses what was sent into it.
func keepsLittle(network, addr string, c syscall.RawConn) (err error) {
	return errors.Join(asOnEthernet(network, addr, c), c.Control(func(fd uintptr) {
		err = errors.Join(syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10),
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 4<<10))
	}), err)
}

// dialed is a connection with a deadline far off and small buffers, for a slow reader on both sides: so it is the gateway that
// waits, not the kernel that keeps it all.
func dialed(addr string, slow bool) (net.Conn, error) {
	var dialer net.Dialer
	if slow {
		dialer.Control = asOnEthernet
	}
	conn, err := dialer.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	_ = conn.(*net.TCPConn).SetWriteBuffer(128 << 10)
	if slow {
		_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	}
	return conn, conn.SetDeadline(time.Now().Add(2 * time.Minute))
}

// takeBody takes a body of size bytes at a pace.
func takeBody(addr, framing string, size int64, reads pace) error {
	conn, err := dialed(addr, reads > 0)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /echo/%s/%d HTTP/1.1\r\nHost: a\r\n\r\n", framing, size); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReaderSize(conn, 64<<10), nil)
	if err != nil {
		return err
	}
	n, err := reads.copy(response.Body, size)
	if err != nil || response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d, %d bytes of %d: %w", response.StatusCode, n, size, err)
	}
	return nil
}

// sendBody sends a body of size bytes at a pace.
func sendBody(addr string, size int64, sends pace) error {
	conn, err := dialed(addr, false)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size); err != nil {
		return err
	}
	block, began := make([]byte, 256<<10), time.Now()
	for left := size; left > 0; left -= int64(len(block)) {
		n, err := conn.Write(block[:min(left, int64(len(block)))])
		if err != nil {
			return err
		}
		sends.wait(began, size-left+int64(n))
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", response.StatusCode)
	}
	return nil
}

// together runs f n times at once.
func together(t *testing.T, n int, f func() error) {
	t.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Bodies of any size flow with bounded memory, and a slow peer is waited for, not stored for.
func TestMemoryOfStreams(t *testing.T) {
	heavy(t)
	t.Parallel()
	const streams, size = 64, 16 * mib
	// A second. At full speed the kernel would take more of so many streams than it has memory for; then it drops what comes, and
	// its senders take minutes to recover.
	const slow, faster = pace(mib), pace(4 * mib)
	const once, each = 8 * mib, 64 << 10
	var all sync.WaitGroup
	defer all.Wait()
	for _, row := range []struct {
		name         string
		streams      int
		limit        int
		reads, sends pace // of the backend
		f            func(addr string) error
	}{
		{"1 GiB down, with a length", 1, once, 0, 0, func(addr string) error { return takeBody(addr, "length", 1<<30, 0) }},
		{"1 GiB down, in chunks", 1, once, 0, 0, func(addr string) error { return takeBody(addr, "chunks", 1<<30, 0) }},
		{"1 GiB up", 1, once, 0, 0, func(addr string) error { return sendBody(addr, 1<<30, 0) }},
		{"slow readers, with a length", streams, once + streams*each, 0, faster, func(addr string) error { return takeBody(addr, "length", size, slow) }},
		{"slow readers, in chunks", streams, once + streams*each, 0, faster, func(addr string) error { return takeBody(addr, "chunks", size, slow) }},
		{"uploads to a slow backend", streams, once + streams*each, slow, 0, func(addr string) error { return sendBody(addr, size, faster) }},
	} {
		all.Go(func() { // at once, not by t.Parallel, which lets as many run as there are processors: the slow ones wait
			t.Run(row.name, func(t *testing.T) {
				g := launch(t, nil)
				g.register("echo", "a", "http://"+startBulk(t, row.reads, row.sends).Addr().String())
				if err := takeBody(g.data, "chunks", mib, 0); err != nil { // what starts late has started
					t.Fatal(err)
				}
				began := time.Now()
				grown := growth(t, g.cmd.Process.Pid, func() { together(t, row.streams, func() error { return row.f(g.data) }) })
				t.Logf("the peak grew by %.1f MiB, in %v", float64(grown)/mib, time.Since(began).Round(time.Millisecond))
				if grown >= row.limit {
					t.Errorf("want less than %d MiB", row.limit/mib)
				}
			})
		})
	}
}

// A reader that takes nothing holds up its own backend connection, and nobody else.
func TestStalledReadersHoldUpNobody(t *testing.T) {
	heavy(t)
	const stalled, size, others = 64, 64 * mib, 256 * mib
	g := launch(t, nil)
	held, well := startBulk(t, 0, 0), startBulk(t, 0, 0)
	g.register("held", "a", "http://"+held.Addr().String())
	g.register("echo", "a", "http://"+well.Addr().String())
	timed := func() time.Duration {
		began := time.Now()
		if err := takeBody(g.data, "chunks", others, 0); err != nil {
			t.Error(err)
		}
		return time.Since(began)
	}
	alone := timed()
	var conns []net.Conn
	for i := range stalled {
		conn, err := dialed(g.data, true)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		framing := []string{"length", "chunks"}[i%2]
		if _, err := fmt.Fprintf(conn, "GET /held/%s/%d HTTP/1.1\r\nHost: a\r\n\r\n", framing, size); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	eventually(t, "their backends wait", func() bool {
		before := held.sent.Load()
		time.Sleep(50 * time.Millisecond)
		return before > stalled && held.sent.Load() == before
	})
	sent, beside := held.sent.Load(), timed()
	t.Logf("%v alone, %v beside readers that stall; their backends could send %.1f MiB each", alone, beside, float64(sent)/stalled/mib)
	if beside > 10*alone+time.Second {
		t.Error("a reader that stalls holds up others")
	}
	if sent > stalled*size/2 {
		t.Errorf("nobody reads, and backends could send %d bytes of %d", sent, stalled*size)
	}
	for _, conn := range conns { // they are late, not lost
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, response.Body); err != nil || n != size {
			t.Errorf("%d bytes, %v", n, err)
		}
		conn.Close()
	}
}

// What a backend flushes arrives soon. The medians are asked to be within ten times what is aimed at: 5 ms, and 20 ms for the
// head and the first bytes of a small body with a length, which is waited for.
func TestFlushedBytesArriveSoon(t *testing.T) {
	const rounds, events = 15, 5
	for _, row := range []struct {
		name, length string
		first        time.Duration
	}{
		{"chunks", "", 5 * time.Millisecond},
		{"a large body with a length", "1000000", 5 * time.Millisecond},
		{"a small body with a length", "1000", 20 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			turn := make(chan chan<- time.Time)
			g := launch(t, nil)
			g.register("echo", "a", backend(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				if row.length != "" {
					w.Header().Set("Content-Length", row.length)
				}
				for range events + 1 { // the head alone is the first
					select {
					case at := <-turn:
						at <- time.Now()
					case <-r.Context().Done():
						return
					}
					w.(http.Flusher).Flush()
					_, _ = io.WriteString(w, "data: 12\n\n") // flushed by the next turn
				}
				<-r.Context().Done()
			}))
			var heads, rest []time.Duration
			next := func() chan time.Time {
				at := make(chan time.Time, 1)
				select {
				case turn <- at:
				case <-time.After(10 * time.Second):
					t.Fatal("the request did not arrive")
				}
				return at
			}
			for range rounds {
				conn, err := dialed(g.data, false)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(conn, "GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				r := bufio.NewReader(conn)
				at := next()
				response, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				heads = append(heads, time.Since(<-at))
				event := make([]byte, len("data: 12\n\n"))
				for range events {
					at := next()
					if _, err := io.ReadFull(response.Body, event); err != nil {
						t.Fatal(err)
					}
					rest = append(rest, time.Since(<-at))
				}
				conn.Close()
			}
			slices.Sort(heads)
			slices.Sort(rest)
			head, later := heads[len(heads)/2], rest[len(rest)/2]
			t.Logf("medians: head %v, what follows %v", head, later)
			if head > 10*row.first {
				t.Errorf("the head takes %v", head)
			}
			if later > 50*time.Millisecond {
				t.Errorf("what follows takes %v", later)
			}
		})
	}
}

// used is the CPU time that a process has taken.
func used(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))
	var ticks int
	for _, field := range fields[12:14] { // user and system, in hundredths of a second
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// curl, as people use it, with the defaults.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip(err)
	}
	g := launch(t, nil)
	g.register("echo", "a", backend(t, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%s %s %s %d %v", r.Proto, r.Method, r.URL, n, err)
	}))
	large := t.TempDir() + "/large"
	if err := os.WriteFile(large, bytes.Repeat([]byte("x"), 3*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	url := "http://" + g.data + "/echo"
	for _, row := range []struct {
		args []string
		want string
	}{
		{[]string{url}, "HTTP/1.1 GET /echo 0 <nil>"},
		{[]string{"--http1.0", url}, "HTTP/1.1 GET /echo 0 <nil>"},
		{[]string{"--http2", url}, "HTTP/1.1 GET /echo 0 <nil>"}, // an Upgrade to h2c that is not taken up
		{[]string{"-G", "-d", "a=b+c", url}, "HTTP/1.1 GET /echo?a=b+c 0 <nil>"},
		{[]string{"-d", "a=b", url}, "HTTP/1.1 POST /echo 3 <nil>"},
		{[]string{"--path-as-is", url + "/a/../b"}, "HTTP/1.1 GET /echo/a/../b 0 <nil>"},
		{[]string{"-T", large, url}, fmt.Sprintf("HTTP/1.1 PUT /echo %d <nil>", 3*mib)},
		{[]string{"-H", "Expect: 100-continue", "-T", large, url}, fmt.Sprintf("HTTP/1.1 PUT /echo %d <nil>", 3*mib)},
		{[]string{"-H", "Transfer-Encoding: chunked", "-T", large, url}, fmt.Sprintf("HTTP/1.1 PUT /echo %d <nil>", 3*mib)},
		{[]string{"-F", "file=@" + large, "-o", "/dev/null", "-w", "%{http_code}", url}, "200"},
		{[]string{"-I", "-o", "/dev/null", "-w", "%{http_code}", url}, "200"},
		{[]string{url, url}, strings.Repeat("HTTP/1.1 GET /echo 0 <nil>", 2)},
		{[]string{"-x", "http://" + g.data, "http://example.test/echo"}, "HTTP/1.1 GET /echo 0 <nil>"}, // absolute form
	} {
		began := time.Now()
		out, err := exec.CommandContext(t.Context(), curl, append([]string{"-sS", "--max-time", "20"}, row.args...)...).CombinedOutput()
		if err != nil || string(out) != row.want {
			t.Errorf("curl %q: %v, %q", row.args, err, out)
		}
		if took := time.Since(began); took > 900*time.Millisecond { // curl itself goes on after a second without 100-continue
			t.Logf("curl %q took %v", row.args, took)
		}
	}
}

// kernelTCP is what the kernel keeps for the connections of the whole machine, in bytes, and how many of them no program has
// any more.
func kernelTCP(t *testing.T) (memory, orphans int) {
	t.Helper()
	stat, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		t.Fatal(err)
	}
	_, tcp, _ := strings.Cut(string(stat), "\nTCP: ")
	var inUse, inTimeWait, allocated, pages int
	if _, err := fmt.Sscanf(tcp, "inuse %d orphan %d tw %d alloc %d mem %d", &inUse, &orphans, &inTimeWait, &allocated, &pages); err != nil {
		t.Fatalf("%v: %s", err, stat)
	}
	return pages * os.Getpagesize(), orphans
}

// asSlow has this program run as so many slow clients.
const asSlow = "TEST_SLOW"

// slowClients are clients that connect one after the other, send a request at once, in part, and then take their time.
type slowClients struct {
	Addr, Request string
	Drips         bool // each sends on, a byte in two seconds
	N             int
	Rate          int // that many connect in a second

	accepts string // a gateway that is to answer also where they are too slow
}

// apart starts them in a process of their own, so that others wait for the gateway and not for their test, and returns that
// process when all have connected.
func (s slowClients) apart(t *testing.T) *child {
	t.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	cmd := leftovers()
	cmd.Env = append(os.Environ(), asSlow+"="+string(text))
	p := beginCommand(t, cmd)
	late := time.After(time.Duration(s.N/s.Rate)*time.Second + 4*time.Second)
	for !strings.HasSuffix(p.stdout.String(), "connected\n") {
		select {
		case <-p.ended:
			t.Fatalf("the slow clients have not all connected: %s", p.stdout.String())
		case <-late:
			if s.accepts != "" {
				exchange(t, s.accepts, get("/")) // it is not that the gateway takes nobody any more
			}
			t.Skip("the slow clients have not all connected: the machine is busy, and they get what CPU nobody else wants")
		case <-time.After(10 * time.Millisecond):
		}
	}
	return p
}

// serveSlow is what that program does, until it is killed.
func serveSlow(text string) int {
	var s slowClients
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		fmt.Println(err)
		return 1
	}
	conns := make([]net.Conn, s.N)
	// What the kernel remembers of an address makes its buffers larger (ip tcp_metrics: 2 MiB where it has seen segments
	// out of order), so theirs is one of which it knows nothing.
	own := net.IPv4(127, byte(1+rand.IntN(250)), byte(rand.IntN(250)), 1)
	dialer := &net.Dialer{Control: keepsLittle, LocalAddr: &net.TCPAddr{IP: own}}
	var opening sync.WaitGroup
	var failed atomic.Pointer[error]
	began := time.Now()
	for part := range slices.Chunk(conns, s.N/8) {
		opening.Go(func() {
			for i := range part {
				time.Sleep(time.Until(began.Add(time.Duration(8*i) * time.Second / time.Duration(s.Rate))))
				conn, err := dialer.Dial("tcp", s.Addr)
				if err == nil {
					part[i] = conn
					_, err = io.WriteString(conn, s.Request)
				}
				if err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	opening.Wait()
	if err := failed.Load(); err != nil {
		fmt.Println(*err)
		return 1
	}
	fmt.Println("connected")
	for n := 0; ; {
		time.Sleep(20 * time.Millisecond)
		for range s.N / 100 {
			if s.Drips {
				_, _ = conns[n%s.N].Write([]byte("x")) // fails once it is closed
			}
			n++
		}
	}
}

// Thousands of clients that are slow on purpose cost the others nothing that these notice, and are gone when their time is up.
func TestSlowClients(t *testing.T) {
	heavy(t)
	if _, err := exec.LookPath("chrt"); err != nil {
		t.Skip(err)
	}
	const slow, arriving, rate, seconds = 5000, 500, 500, 2 // clients, and so many of them a second; requests of others a second
	// Of a reader's body the kernel takes 80 KB from the gateway, which holds 32 KiB more and then waits. What is beyond that
	// fills the kernel on the way to the gateway, so there is not much of it.
	const size, kept = 256 << 10, 280 << 10 // kept is what the kernel needs for it: in its buffers a byte can take two
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 2*slow+1000 {
		t.Skipf("needs %d descriptors for each of two processes, has %d, %v", 2*slow+1000, limit.Cur, err)
	}
	for _, row := range []struct {
		name, request string
		drips         bool // sends on
		sent          int  // 1 if it gets to the backend, on a connection of its own
	}{
		{"heads", "GET /held/ HTTP/1.1\r\nHost: a\r\nX-A: ", true, 0},
		{"bodies", "POST /held/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx", false, 0},
		{"large bodies", "POST /held/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nx", false, 1},
		{"readers", fmt.Sprintf("GET /held/chunks/%d HTTP/1.1\r\nHost: a\r\n\r\n", size), false, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.name == "readers" {
				var low, pressure int // pages; beyond that all connections of the machine get less
				text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_mem")
				if _, _ = fmt.Sscan(string(text), &low, &pressure); pressure*os.Getpagesize() < slow*kept {
					t.Skipf("needs %d MiB of the kernel, tcp_mem is %q, %v", slow*kept/mib, text, err)
				}
			}
			// A backend of one process has a limit of its own to the connections it takes at a time: none shall fail for that.
			g := launch(t, nil, "--client-head-timeout", "16s", "--client-body-timeout", "16s", "--client-write-timeout", "18s",
				"--client-idle-timeout", "19s", "--connect-timeout", "20s", "--breaker-failures", "100000")
			pid := g.cmd.Process.Pid
			g.register("held", "a", "http://"+bulkApart(t))
			g.register("echo", "a", named(t, "a"))
			g.get("/none") // the first request starts what stays
			alone := openFiles(t, pid)
			l := beginLoad(t, g.data, rate)
			l.more(t, rate*seconds)
			before, held, open := l.p99(rate*seconds), resident(t, pid, "VmRSS"), openFiles(t, pid)
			answered := l.answered.Load()
			kernelBefore, orphansBefore := kernelTCP(t)

			those := slowClients{Request: row.request, Drips: row.drips, N: slow / 2, Rate: arriving, Addr: bulkApart(t)}
			elsewhere := those.apart(t) // what it costs others that so many connect to anything on this machine
			l.more(t, rate/2)
			floor := l.p99(1 + int(l.answered.Load()-answered))
			elsewhere.signal(syscall.SIGKILL)
			elsewhere.wait()
			l.more(t, rate*seconds)

			answered = l.answered.Load()
			those.Addr, those.N, those.accepts = g.data, slow, g.data
			first := time.Now()
			client := those.apart(t)
			began := time.Now()
			there := func() int { return (openFiles(t, pid) - open) / (1 + row.sent) }
			for there() < slow-clients { // so many connections of the load's may have been idle, and gone
				if time.Sleep(50 * time.Millisecond); time.Since(began) > 20*time.Second {
					t.Fatalf("%d are there", there())
				}
			}
			for busy, end := 1.0, time.Now().Add(3*time.Second); busy > 0.2 && time.Now().Before(end); {
				before := used(t, pid) // until what they do not read was sent
				time.Sleep(300 * time.Millisecond)
				busy = (used(t, pid) - before).Seconds() / 0.3
			}
			coming := l.p99(1 + int(l.answered.Load()-answered))
			l.more(t, rate*seconds)
			during, beside, soon := l.p99(rate*seconds), min(slow, there()), time.Since(first) < 16*time.Second
			each := (resident(t, pid, "VmRSS") - held) / slow
			kernelBeside, _ := kernelTCP(t)
			for openFiles(t, pid) > open+slow/100 {
				if time.Sleep(20 * time.Millisecond); time.Since(began) > time.Minute {
					t.Fatalf("%d are still there", there())
				}
			}
			gone, leaving := time.Since(began), l.p99(rate*seconds)
			client.signal(syscall.SIGKILL)
			client.wait()
			l.stop()
			eventually(t, "the last is gone", func() bool { return openFiles(t, pid) <= alone })
			kernelAfter, orphansAfter := kernelTCP(t)
			want := fmt.Sprintf(`"in_flight":0,"tunnels":0,"success":0,"failure":0,"ignored":%d,`, slow*row.sent)
			if _, body := exchange(t, g.admin, get("/services/held/a")); !strings.Contains(body, want) {
				t.Errorf("%s is not in %s", want, body)
			}
			times := func(d time.Duration) string { return fmt.Sprintf("%v (x %.1f)", d, float64(d)/float64(before)) }
			t.Logf("p99 of others: %v before, %s while half as many come to another server, %s while they come, %s beside %d of them, %s while they are closed; %d KiB each; 99 of 100 are gone after %v",
				before, times(floor), times(coming), times(during), beside, times(leaving), each>>10, gone.Round(10*time.Millisecond))
			t.Logf("the machine's kernel has for TCP: %d MiB before, %d MiB beside them, and when they are gone %d MiB and %d orphans more than before",
				kernelBefore/mib, kernelBeside/mib, kernelAfter/mib, orphansAfter-orphansBefore)
			if failures := l.failures(); len(failures) > 0 {
				t.Errorf("of %d others failed: %v", l.answered.Load(), failures)
			}
			if beside < slow-slow/100 && soon {
				t.Errorf("only %d were there, and it was nobody's time yet", beside)
			} else if beside < slow-slow/100 {
				t.Skipf("some had been there for too long: the machine is busy, and the figures are those of %d", beside)
			}
			const bound = 64 << 10 // a reader has a goroutine with a buffer of 32 KiB
			if each > bound {
				t.Errorf("%d KiB each, want at most %d", each>>10, bound>>10)
			}
		})
	}
}
