package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	wrkGood = `Running 3s test @ http://127.0.0.1:43605/bench/hello
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.19ms  523.11us  12.66ms   95.65%
    Req/Sec    54.05k     1.32k   57.61k    70.00%
  Latency Distribution
     50%  850.00us
     75%    1.34ms
     90%    1.60ms
     99%    1.02s 
  161366 requests in 3.10s, 23.24MB read
Requests/sec:  52053.55
Transfer/sec:      7.50MB
`
	wrkBad = `  Latency Distribution
     50%   43.89ms
     99%   44.08ms
  92 requests in 1.00s, 11.24KB read
  Socket errors: connect 1, read 20, write 300, timeout 4000
  Non-2xx or 3xx responses: 92
Requests/sec:     91.98
`
	heyGood = `
Summary:
  Total:	1.0239 secs
  Slowest:	0.0480 secs
  Fastest:	0.0018 secs
  Average:	0.0422 secs
  Requests/sec:	93.7612
  
  Total data:	192 bytes
  Size/request:	2 bytes

Response time histogram:
  0.002 [1]	|
  0.048 [89]	|■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■


Latency distribution:
  10%% in 0.0438 secs
  50%% in 0.0440 secs
  99%% in 0.0451 secs

Details (average, fastest, slowest):
  DNS+dialup:	0.0000 secs, 0.0018 secs, 0.0480 secs

Status code distribution:
  [200]	96 responses



`
	heyBad = `
Summary:
  Total:	0.3007 secs

Latency distribution:
  50% in 0.0440 secs
  0% in 0.0000 secs

Status code distribution:
  [200]	5 responses
  [404]	52 responses
  [502]	3 responses

Error distribution:
  [9724]	Get "http://127.0.0.1:43605/": dial tcp 127.0.0.1:43605: connect: connection refused
  [2]	Get "http://127.0.0.1:43605/": EOF
`
)

func TestParse(t *testing.T) {
	const us, ms = time.Microsecond, time.Millisecond
	for _, test := range []struct {
		name  string
		parse func(string) (outcome, error)
		text  string
		want  outcome
		fails bool
	}{
		{"wrk", parseWrk, wrkGood, outcome{161366, 3100 * ms, 850 * us, 1020 * ms, 0, 0}, false},
		{"wrk, errors", parseWrk, wrkBad, outcome{92, time.Second, 43890 * us, 44080 * us, 92, 4321}, false},
		{"wrk, nothing", parseWrk, "  0 requests in 1.00s, 0.00B read\n", outcome{}, true},
		{"wrk, something else", parseWrk, "usage", outcome{}, true},
		{"wrk, garbage", parseWrk, "50% soon\n", outcome{}, true},
		{"hey", parseHey, strings.ReplaceAll(heyGood, "%%", "%"), outcome{96, 1023900 * us, 44 * ms, 45100 * us, 0, 0}, false},
		{"hey, its own percent signs", parseHey, strings.ReplaceAll(heyGood, "50%%", "50%"), outcome{96, 1023900 * us, 44 * ms, 0, 0, 0}, false},
		{"hey, errors", parseHey, heyBad, outcome{60, 300700 * us, 44 * ms, 0, 55, 9726}, false},
		{"hey, something else", parseHey, "usage", outcome{}, true},
		{"builtin", parseBuiltin, `{"requests":5,"elapsed_ns":1000,"p50_ns":1,"p99_ns":2,"bad_status":3,"errors":4}`, outcome{5, 1 * us, 1, 2, 3, 4}, false},
		{"builtin, nothing", parseBuiltin, `{}`, outcome{}, true},
	} {
		got, err := test.parse(test.text)
		if got != test.want || (err != nil) != test.fails {
			t.Errorf("%s: %+v, %v, want %+v", test.name, got, err, test.want)
		}
	}
}

// Every tool sends what the load says, and counts the answers that are not 2xx.
func TestToolsSendTheLoad(t *testing.T) {
	l := load{Method: "POST", Headers: []string{"X-First: one", "Content-Type: application/x-test"},
		Body: []byte("a \"quoted\"\r\n\x00\xff body"), Connections: 3}
	for _, name := range []string{"wrk", "hey", "builtin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tool, err := findTool(t.Context(), name)
			if err != nil {
				t.Skip(err)
			}
			var seen, wrong atomic.Int64
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					return // it was cut off at the end of the time
				}
				if r.Method != l.Method || r.URL.Path != target || r.Header.Get("X-First") != "one" ||
					r.Header.Get("Content-Type") != "application/x-test" || !bytes.Equal(body, l.Body) {
					if wrong.Add(1) == 1 {
						t.Errorf("%s %s %q %q", r.Method, r.URL, r.Header, body)
					}
				}
				if seen.Add(1) <= 5 {
					w.WriteHeader(http.StatusBadGateway)
				}
			}))
			defer srv.Close()
			d := 100 * time.Millisecond
			if tool.wholeSeconds {
				d = time.Second
			}
			o, err := tool.run(t.Context(), noCPU, l, srv.Listener.Addr().String(), t.TempDir(), d)
			if err != nil {
				t.Fatal(err)
			}
			// What is under way when the time is up may be seen but not counted.
			if n := int(seen.Load()); o.Requests > n || o.Requests < n-l.Connections || o.BadStatus != 5 || o.Errors > l.Connections {
				t.Errorf("%+v, but %d were seen", o, n)
			}
		})
	}
}

func TestClosedLoopCountsFailures(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }))
	defer srv.Close()
	l := load{Method: "GET", Connections: 2}
	if o := closedLoop(t.Context(), l, srv.Listener.Addr().String(), 20*time.Millisecond); o.Errors == 0 || o.Requests != 0 {
		t.Errorf("aborted answers: %+v", o)
	}
	srv.Close()
	if o := closedLoop(t.Context(), l, srv.Listener.Addr().String(), 20*time.Millisecond); o.Errors == 0 || o.Requests != 0 {
		t.Errorf("refused connections: %+v", o)
	}
}

func TestQuantile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, test := range []struct {
		sorted []time.Duration
		q      float64
		want   time.Duration
	}{
		{nil, 0.5, 0},
		{hundred[:1], 0.99, 1},
		{hundred[:3], 0.5, 2},
		{hundred, 0.5, 50},
		{hundred, 0.99, 99},
		{hundred, 1, 100},
	} {
		if got := quantile(test.sorted, test.q); got != test.want {
			t.Errorf("%d values, %v: %v, want %v", len(test.sorted), test.q, got, test.want)
		}
	}
}
