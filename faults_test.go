package main

import (
	"bufio"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// backendProcess is `kerberos backend` in a process of its own.
type backendProcess struct {
	*child
	id, addr string
}

// startBackend starts one at an address, and waits until it is registered, if it registers itself.
func (g *running) startBackend(id, listen string, registers bool) *backendProcess {
	g.t.Helper()
	args := []string{"backend", "--listen", listen, "--name", id}
	if registers {
		args = append(args, "--register", "http://"+g.admin)
	}
	b := &backendProcess{child: begin(g.t, nil, args...), id: id}
	eventually(g.t, "the backend "+id+" has begun", func() bool {
		select {
		case <-b.ended:
			g.t.Fatalf("the backend ended: %s", b.stderr.String())
		default:
		}
		text := b.stdout.String()
		_, rest, _ := strings.Cut(text, " listens on ")
		b.addr, _, _ = strings.Cut(rest, "\n")
		return strings.HasSuffix(text, "\n") && (!registers || strings.Contains(text, "registered echo/"+id))
	})
	return b
}

// load is requests that come to a gateway at a steady rate, on connections that are kept.
type load struct {
	stop     func() // and wait for the last answer
	answered atomic.Int64
	mu       sync.Mutex      // guards what follows
	failed   map[string]int  // by method and what came instead of a 200
	took     []time.Duration // from when a request was due to its answer
}

const clients = 24 // of a load

// beginLoad sends rate requests a second, GET and POST in turn, until stop is called. A request is due whether or not those
// before it were answered in time.
func beginLoad(t *testing.T, addr string, rate int) *load {
	l := &load{failed: map[string]int{}}
	over := make(chan struct{})
	var clientsOver sync.WaitGroup
	for n := range clients {
		clientsOver.Go(func() {
			due := time.Now()
			var conn net.Conn
			var r *bufio.Reader
			for i := n; ; i += clients {
				at := due.Add(time.Duration(i) * time.Second / time.Duration(rate))
				select {
				case <-over:
					if conn != nil {
						conn.Close()
					}
					return
				case <-time.After(time.Until(at)):
				}
				if conn == nil {
					var err error
					if conn, err = net.Dial("tcp", addr); err != nil {
						l.fails(err.Error())
						continue
					}
					r = bufio.NewReader(conn)
				}
				method := []string{"GET", "POST"}[i/clients%2]
				keep, err := ask(conn, r, method, fmt.Sprint(method, " ", i))
				l.notes(time.Since(at))
				if err != nil {
					l.fails(method + ": " + err.Error())
				} else {
					l.answered.Add(1)
				}
				if !keep {
					conn.Close()
					conn = nil
				}
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		close(over)
		clientsOver.Wait()
	})
	t.Cleanup(l.stop)
	return l
}

func (l *load) fails(how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed[how]++
}

func (l *load) notes(took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took = append(l.took, took)
}

// p99 is the time that one of a hundred requests has exceeded, of the last n.
func (l *load) p99(n int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := slices.Clone(l.took[max(0, len(l.took)-n):])
	slices.Sort(last)
	return last[len(last)*99/100]
}

// failures is what has failed so far.
func (l *load) failures() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.failed)
}

// more waits until n more requests were answered.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	from := l.answered.Load()
	eventually(t, "traffic", func() bool { return l.answered.Load() >= from+n })
}

// ask sends a request of the load, with a name of its own; the error says what came if that is not 200.
func ask(conn net.Conn, r *bufio.Reader, method, id string) (keep bool, err error) {
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return false, err
	}
	if _, err := fmt.Fprintf(conn, "%s /echo HTTP/1.1\r\nHost: localhost\r\nX-Id: %s\r\nContent-Length: 5\r\n\r\nhello", method, id); err != nil {
		return false, err
	}
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return false, err
	}
	_, err = io.Copy(io.Discard, response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%d %s", response.StatusCode, response.Header.Get("Proxy-Status"))
	}
	return err == nil && !response.Close, err
}

// Backends are killed under load, and come back where they were: no GET fails, and of the POSTs only those that were at the
// backend at that moment, with one 502 and no second delivery. With all of them killed the answer is a 503 at once, until
// they are back.
//
// What is killed is other gateways, in front of a handler that takes its time: so there are requests under way, and somebody
// who has seen them.
func TestKilledBackends(t *testing.T) {
	var mu sync.Mutex // guards seen
	seen := map[string]int{}
	handler := backend(t, func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Header.Get("X-Id")]++
		mu.Unlock()
		time.Sleep(25 * time.Millisecond) // what makes it slow
	})
	relay := func(listen string) *running {
		g := launch(t, nil, "--listen", listen)
		g.register("echo", "handler", handler)
		return g
	}
	g := launch(t, nil, "--breaker-open", "300ms")
	var relays []*running
	for i := range 3 {
		relays = append(relays, relay("127.0.0.1:0"))
		g.register("echo", fmt.Sprint(i), "http://"+relays[i].data)
	}
	const rate = 400
	l := beginLoad(t, g.data, rate)
	for range 2 {
		for i, r := range relays {
			l.more(t, rate/4)
			r.signal(syscall.SIGKILL)
			r.wait()
			l.more(t, rate/4)
			relays[i] = relay(r.data)
		}
	}
	l.more(t, rate/4)
	l.stop()
	const cut = "POST: 502 kerberos; error=connection_terminated"
	failures := l.failures()
	mu.Lock()
	repeated := 0
	for id, n := range seen {
		if n > 1 && strings.HasPrefix(id, "POST") {
			t.Errorf("%s was delivered %d times", id, n)
		}
		repeated += n - 1
	}
	mu.Unlock()
	t.Logf("%d answered, %d of them by a second delivery; failed: %v", l.answered.Load(), repeated, failures)
	if failures[cut] > 6*clients/2 { // of 6 kills, what was under way there
		t.Errorf("%d POSTs were cut", failures[cut])
	}
	delete(failures, cut)
	if len(failures) > 0 {
		t.Errorf("failed: %v", failures)
	}

	for _, r := range relays {
		r.signal(syscall.SIGKILL)
		r.wait()
	}
	eventually(t, "a 503", func() bool {
		began := time.Now()
		response, _ := exchange(t, g.data, get("/echo"))
		if took := time.Since(began); took > time.Second {
			t.Errorf("%d took %v with no backend", response.StatusCode, took)
		}
		if response.StatusCode != http.StatusServiceUnavailable {
			return false
		}
		if response.Header.Get("Retry-After") == "" || response.Header.Get("Proxy-Status") != "kerberos; error=destination_unavailable" {
			t.Errorf("503 with %v", response.Header)
		}
		return true
	})
	for _, r := range relays {
		relay(r.data)
	}
	eventually(t, "all are asked again", func() bool {
		g.get("/echo")
		_, text := exchange(t, g.admin, get("/services/echo"))
		return strings.Count(text, `"ready":true`) == len(relays)
	})
	for range 12 {
		if status, body := g.get("/echo"); status != http.StatusOK {
			t.Errorf("once all are back: %d %s", status, body)
		}
	}
}

// Every backend is replaced under load, one after the other, each unregistering before it ends: no request fails.
func TestRollingRestart(t *testing.T) {
	for _, row := range []struct {
		name      string
		registers bool // and unregisters itself
		drain     string
	}{{"by itself", true, "0s"}, {"by the API", false, "0s"}, {"drained", false, "20s"}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := launch(t, nil)
			begin := func(id string) *backendProcess {
				b := g.startBackend(id, "127.0.0.1:0", row.registers)
				if !row.registers {
					g.register("echo", id, "http://"+b.addr)
				}
				return b
			}
			backends := map[string]*backendProcess{}
			for _, id := range []string{"a", "b", "c"} {
				backends[id] = begin(id)
			}
			const rate = 300
			l := beginLoad(t, g.data, rate)
			for range 2 {
				for id, b := range backends {
					l.more(t, rate/4)
					if !row.registers {
						raw := strings.Replace(post(fmt.Sprintf(`{"service":"echo","id":%q,"drain":%q}`, id, row.drain)), "POST", "DELETE", 1)
						if response, text := exchange(t, g.admin, raw); response.StatusCode/100 != 2 || row.drain != "0s" && !strings.HasPrefix(text, `{"cut":0,`) {
							t.Fatalf("unregistering: %d %s", response.StatusCode, text)
						}
					}
					if row.drain != "0s" { // it has nothing under way any more
						b.signal(syscall.SIGKILL)
						b.wait()
					} else {
						b.signal(syscall.SIGTERM)
						if code := b.wait(); code != 0 {
							t.Errorf("backend %s ended with %d", id, code)
						}
					}
					backends[id] = begin(id)
				}
			}
			l.more(t, rate/4)
			l.stop()
			if failures := l.failures(); len(failures) > 0 {
				t.Errorf("failed: %v", failures)
			}
			t.Logf("%d answered", l.answered.Load())
		})
	}
}

// A gateway that is out of descriptors goes on: connections that it has are served, new ones wait or are refused with a 503
// that says so, and it recovers when some are free.
func TestOutOfDescriptors(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("counts descriptors in /proc")
	}
	const limit = 64
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, limit), binary, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	cmd.Env = environment()
	g := &running{child: beginCommand(t, cmd)}
	g.listening()
	g.register("echo", "a", named(t, "a"))
	release := make(chan struct{})
	g.register("slow", "a", backend(t, func(w http.ResponseWriter, _ *http.Request) { <-release }))
	free := sync.OnceFunc(func() { close(release) })
	defer free()
	if status, _ := g.get("/echo"); status != http.StatusOK {
		t.Fatalf("status %d", status)
	}
	first, err := net.Dial("tcp", g.data)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	r := bufio.NewReader(first)
	if keep, err := ask(first, r, "GET", ""); err != nil || !keep {
		t.Fatalf("keep %v, %v", keep, err)
	}
	open := func() int { return openFiles(t, g.cmd.Process.Pid) }
	idle := open()

	// Each of these takes one descriptor, and one more for the backend as long as there are any.
	var waiting []net.Conn
	for range limit {
		conn, err := net.Dial("tcp", g.data)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, get("/slow")); err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, conn)
	}
	eventually(t, "nearly all descriptors are taken", func() bool { return open() >= limit*8/10 })
	for range 20 {
		if _, err := ask(first, r, "GET", ""); err != nil {
			t.Errorf("on a connection that was there: %v", err)
		}
	}
	free()
	answers := map[string]int{}
	for _, conn := range waiting { // those in the backlog are served when others have ended
		if err := conn.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		switch {
		case err != nil: // one over a limit may be closed without a word
			answers[errorOf(err)]++
		case response.StatusCode == http.StatusServiceUnavailable && response.Header.Get("Retry-After") == "":
			answers["503 without Retry-After"]++
		default:
			answers[strings.TrimSpace(fmt.Sprint(response.StatusCode, " ", response.Header.Get("Proxy-Status")))]++
		}
		conn.Close()
	}
	t.Logf("%d idle, %d of %d descriptors; answers: %v", idle, open(), limit, answers)
	for answer := range answers {
		switch answer {
		case "200", "503 kerberos; error=connection_limit_reached":
		default:
			t.Errorf("%d answers: %s", answers[answer], answer)
		}
	}
	eventually(t, "as before", func() bool { return open() <= idle+2 }) // connections to the two backends
	for range limit {
		if status, body := g.get("/echo"); status != http.StatusOK {
			t.Errorf("with descriptors free again: %d %s", status, body)
		}
	}
	if _, err := ask(first, r, "POST", ""); err != nil {
		t.Error(err)
	}
}

// errorOf is what an error of a connection is, without its addresses.
func errorOf(err error) string {
	for _, known := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, os.ErrDeadlineExceeded} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return err.Error()
}

// openFiles counts the open descriptors of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	if info, err := os.Stat(dir); err == nil && info.Size() > 0 { // since Linux 6.2: to read it takes 10 ms where there are 10,000
		return int(info.Size())
	}
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// A clock that is set must not end a request or keep it: times are compared by their monotonic part, which every time.Now
// has. What drops it may only be for people to read. TestClockSteps sets a clock, where there is a machine to do so with; this
// looks at the code, all of it.
func TestTimesAreMonotonic(t *testing.T) {
	drops := map[string]bool{} // methods that give a time without it, or a number; and functions of package time
	for _, name := range strings.Fields("Unix UnixNano UnixMilli UnixMicro UTC Local In AddDate") {
		drops[name] = true
	}
	forPeople := map[string]bool{"proxy/answer.go appendDate": true, "registry/http.go seconds": true, "registry/record.go recordOf": true,
		"reload.go clock": true, "internal/accesslog/encoder.go json": true, "internal/accesslog/encoder.go combined": true, "proxy/marks.go putUUID": true}
	looked := 0
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if entry.IsDir() && (entry.Name() == "bench" || entry.Name() == "testdata") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		looked++
		for _, declaration := range file.Decls {
			within := filepath.ToSlash(path)
			if f, ok := declaration.(*ast.FuncDecl); ok {
				within += " " + f.Name.Name
			}
			ast.Inspect(declaration, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				method, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || !drops[method.Sel.Name] || forPeople[within] || alwaysPast(call, method) {
					return true
				}
				if on, ok := method.X.(*ast.Ident); ok && on.Name != "time" && importedAs(file, on.Name) {
					return true // another package's
				}
				t.Errorf("%s: %s drops the monotonic part of a time", files.Position(call.Pos()), method.Sel.Name)
				return true
			})
		}
		return nil
	})
	if err != nil || looked < 30 {
		t.Errorf("looked at %d files, %v", looked, err)
	}
}

// alwaysPast says that a call is time.Unix(1, 0): a deadline that has passed whatever the clock says.
func alwaysPast(call *ast.CallExpr, method *ast.SelectorExpr) bool {
	if method.Sel.Name != "Unix" || len(call.Args) != 2 {
		return false
	}
	seconds, ok := call.Args[0].(*ast.BasicLit)
	return ok && seconds.Value == "1"
}

func importedAs(file *ast.File, name string) bool {
	for _, i := range file.Imports {
		path := strings.Trim(i.Path.Value, `"`)
		if i.Name != nil && i.Name.Name == name || i.Name == nil && path[strings.LastIndexByte(path, '/')+1:] == name {
			return true
		}
	}
	return false
}
