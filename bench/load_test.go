package main

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
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
)

func TestParseWrk(t *testing.T) {
	const us, ms = time.Microsecond, time.Millisecond
	for _, test := range []struct {
		name  string
		text  string
		want  outcome
		fails bool
	}{
		{"good", wrkGood, outcome{Requests: 161366, Elapsed: 3100 * ms, Latency: latency{P50: 850 * us, P99: 1020 * ms}}, false},
		{"errors", wrkBad, outcome{Requests: 92, Elapsed: time.Second, Latency: latency{P50: 43890 * us, P99: 44080 * us}, BadStatus: 92, Errors: 4321}, false},
		{"nothing", "  0 requests in 1.00s, 0.00B read\n", outcome{}, true},
		{"something else", "usage", outcome{}, true},
		{"garbage", "50% soon\n", outcome{}, true},
	} {
		got, err := parseWrk(test.text)
		if got != test.want || (err != nil) != test.fails {
			t.Errorf("%s: %+v, %v, want %+v", test.name, got, err, test.want)
		}
	}
}

// Every tool sends what the load says, and counts the answers that are not 2xx.
func TestToolsSendTheLoad(t *testing.T) {
	l := load{Method: "POST", Headers: []string{"X-First: one", "Content-Type: application/x-test"},
		Body: []byte("a \"quoted\"\r\n\x00\xff body"), Connections: 3}
	for _, name := range []string{"wrk", "builtin"} {
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
				if n := seen.Add(1); 5 < n && n <= 10 { // after those that are not counted
					w.WriteHeader(http.StatusBadGateway)
				}
			}))
			defer srv.Close()
			d := 100 * time.Millisecond
			if tool.wholeSeconds {
				d = time.Second
			}
			run, err := tool.start(t.Context(), nil, l, srv.Listener.Addr().String(), t.TempDir(), d)
			if err != nil {
				t.Fatal(err)
			}
			defer run.stop()
			o, err := run.run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			// The first on each connection may not be counted; what is under way when the time is up may be seen but not counted.
			if n := int(seen.Load()); o.Requests > n || o.Requests < n-2*l.Connections || o.BadStatus != 5 || o.Errors > l.Connections {
				t.Errorf("%+v, but %d were seen", o, n)
			}
		})
	}
}

// What the origin gets is 1 KiB in 13 fields and the request line, and wrk's own.
func TestBrowserHeaders(t *testing.T) {
	h := browserHeaders()
	request := load{Method: "GET", Headers: h}.requests("127.0.0.1:12345")[0]
	if len(h) != 13 || len(request) < 1000 || len(request) > 1100 {
		t.Errorf("%d fields, %d bytes", len(h), len(request))
	}
	if _, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(request))); err != nil {
		t.Error(err)
	}
}
