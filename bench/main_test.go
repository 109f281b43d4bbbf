package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// asCommand is set for a process that is the command, not its test. The command starts itself as origin and load, and a
// stand-in for the gateway is started as the gateway would be: these are told by their arguments.
const asCommand = "KERBEROS_BENCH_AS_COMMAND"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asCommand) != "", len(os.Args) > 1 && slices.Contains([]string{"origin", "checked", "pump", "load"}, os.Args[1]):
		main()
	case len(os.Args) > 1 && os.Args[1] == "version":
		fmt.Println("stand-in 1.0, for tests")
	case slices.Equal(os.Args[1:], []string{"--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"}):
		standIn()
	default:
		os.Exit(m.Run())
	}
}

// standIn is a gateway as far as the bench sees one: its log lines, its API, its forwarding.
func standIn() {
	if n := os.Getenv("GOMAXPROCS"); n != "1" && n != "2" || os.Getenv("BALANCER_STRATEGY") != "" {
		fmt.Println("started with the wrong settings:", os.Environ())
		os.Exit(1)
	}
	listen := func(name string) net.Listener {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		fmt.Printf(`{"time":"2026-11-23T17:00:00Z","level":"INFO","msg":"listening","listener":%q,"addr":%q}`+"\n", name, ln.Addr())
		return ln
	}
	fmt.Println(`{"msg":"starting"}`)
	admin, data := listen("admin"), listen("data")
	var mu sync.Mutex
	origin := ""
	go http.Serve(admin, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Service, ID, Addr string }
		err := json.NewDecoder(r.Body).Decode(&in)
		if err != nil || r.Method != "POST" && r.Method != "DELETE" || r.URL.Path != "/register" || in.Service == "" || in.ID == "" || r.Header.Get("Content-Type") != "application/json" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mu.Lock()
		if origin == "" {
			origin = in.Addr
		}
		mu.Unlock()
		w.WriteHeader(http.StatusNoContent)
	}))
	proxy := &httputil.ReverseProxy{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}, Rewrite: func(r *httputil.ProxyRequest) {
		mu.Lock()
		u, _ := url.Parse(origin)
		mu.Unlock()
		r.SetURL(u)
		r.Out.Host = r.In.Host
		r.SetXForwarded()
	}}
	http.Serve(data, proxy)
}

// command is this command as a process of its own, with its temporary files in dir. Its settings for the gateway are
// there to be kept from it.
func command(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asCommand+"=1", "TMPDIR="+dir, "BALANCER_STRATEGY=random")
	return cmd
}

func isEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(dir + "/*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// The loads, with every gateway that is installed.
func TestRun(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ tool, only string }{
		{"builtin", "get-64"},
		{"builtin", "browser-16"},
		{"builtin", "post,1m"},
		{"builtin", "one"},
		{"wrk", "post"},
	} {
		t.Run(test.tool+" "+test.only, func(t *testing.T) {
			t.Parallel()
			if _, err := findTool(t.Context(), test.tool); errors.Is(err, errNotInstalled) {
				t.Skip(err)
			}
			duration := "300ms"
			if test.tool == "wrk" {
				duration = "1s"
			}
			res, out := run(t, "--kerberos", self, "--tool", test.tool, "--only", test.only, "--duration", duration, "--warmup", "0s", "--rounds", "1")
			if len(res.Tables) != strings.Count(test.only, ",")+1 {
				t.Fatalf("%d tables for %s", len(res.Tables), test.only)
			}
			for _, table := range res.Tables {
				want := len(gatewayNames) - len(res.Missing)
				if canPump && table.Load.Response < 64<<10 {
					want-- // pump-splice
				}
				if len(table.Rows) != want {
					t.Errorf("%s: %d rows, not %d", table.Section, len(table.Rows), want)
				}
				for _, r := range table.Rows {
					m := r.Median
					if m.Requests < 1 || m.RequestsPerSecond <= 0 || m.P50 <= 0 || m.P99 < m.P50 {
						t.Errorf("%s: no figures: %+v", r.Gateway, m)
					}
					if pickCPUs().gateway != nil && (m.CPU <= 0 || m.Peak < 1 || m.Resident < 1 || m.Busy <= 0) {
						t.Errorf("%s: no CPU or memory: %+v", r.Gateway, m)
					}
					if m.Requests > 200 && m.OriginConns > m.Requests/2 {
						t.Errorf("%s: its connections to the origin are not kept: %+v", r.Gateway, m)
					}
					if !strings.Contains(out, r.label()) {
						t.Errorf("%s is not in the table:\n%s", r.label(), out)
					}
				}
			}
		})
	}
}

// The sections that are not closed loops of all gateways, with a stand-in for the one that they are about.
func TestRunOtherSections(t *testing.T) {
	if !canPump {
		t.Skip("they need Linux")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		only string
		rows map[string]int      // of each table
		ok   func(s sample) bool // of each row, beside CPU
	}{
		{"open", map[string]int{"open-50": 2, "open-80": 2}, func(s sample) bool { return s.P50 > 0 && s.P999 >= s.P99 }},
		{"memory-busy", map[string]int{"memory-busy": 2}, func(s sample) bool { return s.Resident > 1 }},
		{"memory-idle", map[string]int{"memory-idle": 1}, func(s sample) bool { return s.PerConn > 0.1 }},
		{"cores,scale-connections", map[string]int{"cores": 2, "scale-connections": 6}, func(s sample) bool { return s.P50 > 0 }},
		{"services,scale-instances", map[string]int{"services": 3, "scale-instances": 4}, func(s sample) bool { return s.P50 > 0 }},
		{"storm", map[string]int{"storm": 2}, func(s sample) bool { return s.P50 > 0 && s.Requests > 10 }},
	} {
		t.Run(test.only, func(t *testing.T) {
			t.Parallel()
			res, out := run(t, "--kerberos", self, "--gateways", "kerberos,pump", "--only", test.only, "--duration", "100ms", "--warmup", "50ms", "--rounds", "1", "--files", "3000")
			seen := map[string]int{}
			for _, table := range res.Tables {
				seen[table.Section] = len(table.Rows)
				if table.Section == "cores" && len(pickCPUs().gateways) < 2 {
					seen["cores"] = 2 // it says that it cannot
				}
				for _, r := range table.Rows {
					if !test.ok(r.Median) || r.Median.CPU <= 0 && test.only != "memory-idle" {
						t.Errorf("%s, %s: %+v", table.Section, r.label(), r.Median)
					}
				}
			}
			for _, want := range map[string][]string{
				"memory-idle":              {"not 10000 connections: a process may open only 3000 files", "2744 idle"},
				"services,scale-instances": {"not 10000 instances: a process may open only 3000 files"},
			}[test.only] {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if !maps.Equal(seen, test.rows) {
				t.Errorf("tables and rows: %v, want %v\n%s", seen, test.rows, out)
			}
		})
	}
}

// run runs the command to its end and returns what it found out.
func run(t *testing.T, args ...string) (result, string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "result.json")
	out, err := command(t, dir, append(args, "--json", file)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var res result
	if err := json.Unmarshal(b, &res); err != nil {
		t.Fatal(err)
	}
	isEmpty(t, dir)
	return res, string(out)
}

func TestHelp(t *testing.T) {
	out, err := command(t, t.TempDir(), "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, flag := range []string{"--only", "--rounds", "--duration", "--warmup", "--quick", "--gateways", "--kerberos", "--tool", "--json", "--svg", "--markdown", "--from"} {
		if strings.Count(string(out), "\n      "+flag) != 1 {
			t.Errorf("%s is not listed once:\n%s", flag, out)
		}
	}
}

func TestRunFails(t *testing.T) {
	false_, err := exec.LookPath("false")
	if err != nil {
		t.Skip(err)
	}
	for _, test := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"a gateway that does not start", []string{"--gateways", "kerberos", "--kerberos", false_}, 1, "kerberos: false ended"},
		{"no rounds", []string{"--rounds", "0"}, 2, "--rounds 0: at least 1"},
		{"an unknown gateway", []string{"--gateways", "apache"}, 2, "--gateways apache: one of kerberos, nginx"},
		{"an unknown section", []string{"--only", "get-64,put"}, 2, "--only put: one of get-16, get-64"},
		{"nothing to compare with itself", []string{"--gateways", "pump", "--only", "cores"}, 1, "cores: it is about kerberos"},
		{"not a result", []string{"--from", false_}, 1, "false: "},
		{"no such binary", []string{"--kerberos", "/nonexistent"}, 2, "nonexistent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			out, err := command(t, dir, test.args...).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != test.code || !strings.Contains(string(out), test.want) {
				t.Errorf("%v, want exit code %d and %q:\n%s", err, test.code, test.want, out)
			}
			isEmpty(t, dir)
		})
	}
}

func TestVersionWord(t *testing.T) {
	for _, test := range []struct {
		says string
		n    int
		want string
	}{
		{"nginx version: nginx/1.22.1", 2, "nginx/1.22.1"},
		{"HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/\nStatus: long-term", 2, "2.6.12-1+deb12u4"},
		{"kerberos (devel), go1.26.8 linux/amd64", 1, "devel"},
		{"", 1, "unknown"},
	} {
		if got := versionWord(t.Context(), test.n, "echo", test.says); got != test.want {
			t.Errorf("%q: %q, want %q", test.says, got, test.want)
		}
	}
}

func TestCheckForwarding(t *testing.T) {
	complete := map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "client-asked-for.example"}
	for _, test := range []struct {
		name, without, want string
		size                int
		pump                bool
	}{
		{"complete", "", "", 12, false},
		{"no proto", "X-Forwarded-Proto", "x-forwarded-proto", 12, false},
		{"no host", "X-Forwarded-Host", "x-forwarded-host", 12, false},
		{"no client", "X-Forwarded-For", "x-forwarded-for", 12, false},
		{"wrong size", "", "a body of 12 bytes, not 13 of x", 13, false},
		{"the pump", "X-Forwarded-For", "", 12, true},
		{"not kept", "", "told to close", 12, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			origin := newOrigin(t, 12)
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(&url.URL{Scheme: "http", Host: origin.addr})
				r.Out.Host = r.In.Host
				for name, value := range complete {
					if name != test.without {
						r.Out.Header.Set(name, value)
					}
				}
				r.Out.Close = test.name == "not kept"
			}}
			srv := &http.Server{Handler: proxy}
			go srv.Serve(ln)
			defer srv.Close()
			err = checkForwarding(t.Context(), ln.Addr().String(), test.size, test.pump)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1}, 5},
		{[]float64{100, 1, 3}, 3},
		{[]float64{4, 100, 1, 2}, 3},
	} {
		given := slices.Clone(test.values)
		if got := median(test.values); got != test.want || !slices.Equal(given, test.values) {
			t.Errorf("%v: %v, want %v; left as %v", given, got, test.want, test.values)
		}
	}
}

func TestTable(t *testing.T) {
	second := func(n int, cpu time.Duration) sample {
		return measurement{outcome: outcome{Requests: n, Elapsed: time.Second, Latency: latency{P50: time.Millisecond, P99: 2 * time.Millisecond}},
			gateway: usage{Total: cpu, User: 100 * time.Millisecond, System: 300 * time.Millisecond, ResidentKiB: 1024, PeakKiB: 2048}}.sample()
	}
	a := &row{Gateway: "a", Version: "1", Rounds: []sample{second(10_000, 90*time.Millisecond), second(10_000, 300*time.Millisecond), second(10_000, 110*time.Millisecond)}}
	b := &row{Gateway: "b", Version: "2", Rounds: []sample{second(10_000, 220*time.Millisecond), second(10_000, 220*time.Millisecond), second(10_000, 220*time.Millisecond)}}
	tab := &table{Section: "get-64", Title: "GET 12 B", Load: &load{Connections: 64}, Compared: cpuPerRequest, Rows: []*row{a, b}}
	summarize := func() {
		a.summarize()
		b.summarize()
		tab.compare()
	}
	summarize()
	if a.Median.CPU != 11 || a.Median.User != 2.75 || a.Median.System != 8.25 || a.Ratios["b"] != 0.5 || b.Ratios["a"] != 2 || !tab.allValid() {
		t.Errorf("medians: %+v, %+v", a, b)
	}
	var out bytes.Buffer
	tab.print(&out)
	for _, want := range []string{"a 1   11.00  2.75    8.25", "10000    1000    2000", "2.0         0.500", "2.000", "get-64: GET 12 B"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	b.Rounds[1].BadStatus, b.Rounds[2].Errors, a.Rounds[0].OriginConns = 3, 4, 9_000
	summarize()
	out.Reset()
	tab.print(&out)
	if tab.allValid() || !strings.Contains(out.String(), "INVALID: b 2: 3 of 30000 answers not as they should be, 4 requests failed") ||
		!strings.Contains(out.String(), "NOTE: a 1 does not keep its connections: 9000 new ones") {
		t.Errorf("no word about what went wrong:\n%s", out.String())
	}
}

// Each row is measured once a slice, none always after the same other, and the slices of a round are one sample.
func TestTakeTurns(t *testing.T) {
	rows := []*row{{Gateway: "a"}, {Gateway: "b"}, {Gateway: "c"}}
	var order []int
	err := takeTurns(t.Context(), rows, 2, 2, func(_ context.Context, i int) (measurement, error) {
		order = append(order, i)
		m := measurement{outcome: outcome{Requests: 100, Elapsed: time.Second, BadStatus: 1, Latency: latency{All: &histogram{}}, Late: &histogram{}},
			gateway: usage{Total: time.Duration(len(order)) * time.Millisecond, ResidentKiB: 1024 * len(order), PeakKiB: 2048}, conns: 2}
		m.Latency.All.add(int64(len(order)) * 1000)
		return m, nil
	})
	if want := []int{0, 1, 2, 1, 2, 0, 1, 2, 0, 2, 0, 1}; err != nil || !slices.Equal(order, want) {
		t.Errorf("%v, %v, want %v", order, err, want)
	}
	// The first one was measured 1st and 6th, then 9th and 11th.
	r := rows[0].Rounds
	if len(r) != 2 || r[0].CPU != 35 || r[1].CPU != 100 || r[0].RequestsPerSecond != 100 || r[0].Requests != 200 || r[0].BadStatus != 2 ||
		r[0].OriginConns != 4 || r[0].Resident != 6 || int(r[0].P50) != 1 || int(r[0].P99) != 6 {
		t.Errorf("%+v", r)
	}
	err = takeTurns(t.Context(), rows, 1, 1, func(context.Context, int) (measurement, error) { return measurement{}, io.ErrUnexpectedEOF })
	if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "a, round 1") {
		t.Error(err)
	}
}

func TestLineLog(t *testing.T) {
	var lines []string
	l := lineLog{onLine: func(s string) { lines = append(lines, s) }}
	for _, piece := range []string{"one\ntw", "o\n\nthr", "ee"} {
		io.WriteString(&l, piece)
	}
	if want := []string{"one", "two", ""}; !slices.Equal(lines, want) || l.String() != "one\ntwo\n\nthree" {
		t.Errorf("%q %q, want %q", lines, l.String(), want)
	}
	io.WriteString(&l, strings.Repeat("x", 2*maxTail)+"\nlast\n")
	if s := l.String(); len(s) > maxTail || !strings.HasSuffix(s, "x\nlast") {
		t.Errorf("%d bytes kept, of them %q", len(s), s[len(s)-10:])
	}
}

// What a process prints and what it logs are both kept, up to its end.
func TestProcessLog(t *testing.T) {
	t.Parallel()
	lines := make(chan string, 4)
	cmd := exec.Command("sh", "-c", "echo printed; echo logged >&2; read wait; echo last >&2")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := startProcess(nil, cmd, func(line string) { lines <- line })
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	next := func() string {
		select {
		case line := <-lines:
			return line
		case <-time.After(10 * time.Second):
			t.Fatalf("it says no more than %q", p.log)
			return ""
		}
	}
	said := []string{next(), next()}
	if slices.Sort(said); !slices.Equal(said, []string{"logged", "printed"}) {
		t.Errorf("while it runs it says %q", said)
	}
	in.Close()
	<-p.exited
	if last := next(); last != "last" || !strings.HasSuffix(p.log.String(), "last") {
		t.Errorf("in the end it says %q, of %q", last, p.log)
	}
}
