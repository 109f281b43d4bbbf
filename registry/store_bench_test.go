package registry

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

// What the disk can do: a write of a few pages that is on disk, as a transaction is; and what share of the time something else
// that is ready waits longer than 200 us for the only CPU meanwhile. "blocking" is a call of the system that waits.
func BenchmarkSync(b *testing.B) {
	for _, how := range []string{"beside", "blocking"} {
		b.Run(how, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
			f, err := os.Create(filepath.Join(b.TempDir(), "x"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			bring, end := newSync(f)
			defer end()
			if how == "blocking" {
				bring = f.Sync
			}
			var held time.Duration
			var ended atomic.Bool
			var other sync.WaitGroup
			other.Go(func() {
				for last := time.Now(); !ended.Load(); {
					runtime.Gosched()
					now := time.Now()
					if wait := now.Sub(last); wait > 200*time.Microsecond {
						held += wait
					}
					last = now
				}
			})
			pages := make([]byte, 16<<10)
			for b.Loop() {
				if _, err := f.WriteAt(pages, 0); err != nil {
					b.Fatal(err)
				}
				if err := bring(); err != nil {
					b.Fatal(err)
				}
			}
			ended.Store(true)
			other.Wait()
			b.ReportMetric(100*held.Seconds()/b.Elapsed().Seconds(), "held-%")
		})
	}
}

// Registrations over HTTP that are answered when they are on disk, by so many callers at once.
func BenchmarkRegisterOnDisk(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			r := reopen(b, b.TempDir())
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			server := &fasthttp.Server{Handler: NewHandler(r, nil)}
			go server.Serve(ln)
			defer server.Shutdown()
			client := &fasthttp.HostClient{Addr: ln.Addr().String(), MaxConns: callers}
			took := make([]time.Duration, b.N)
			var next atomic.Int64
			var working sync.WaitGroup
			b.ResetTimer()
			for range callers {
				working.Go(func() {
					var req fasthttp.Request
					var resp fasthttp.Response
					req.SetRequestURI("http://" + client.Addr + "/register")
					req.Header.SetMethod(fasthttp.MethodPost)
					req.Header.SetContentType("application/json")
					for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
						req.SetBodyString(fmt.Sprintf(`{"service":"service-%d","id":"%d","addr":"http://127.0.0.1:1","ttl":"1h"}`, i%100, i))
						began := time.Now()
						if err := client.Do(&req, &resp); err != nil || resp.StatusCode() != fasthttp.StatusNoContent {
							b.Error(err, resp.String())
							return
						}
						took[i] = time.Since(began)
					}
				})
			}
			working.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "registrations/s")
			b.ReportMetric(float64(took[b.N/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(took[b.N*99/100].Microseconds()), "p99-us")
		})
	}
}

// A start with so many instances in the file, at addresses that refuse connections.
func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("instances=%d", n), func(b *testing.B) {
			dir, addr := b.TempDir(), refuser(b)
			r := reopen(b, dir)
			together(n, func(i int) {
				if err := r.Register(fmt.Sprint("service-", i%1000), Instance{ID: fmt.Sprint(i), Addr: addr, Weight: 1, TTL: time.Hour}); err != nil {
					b.Error(err)
				}
			})
			r.Close()
			var reading, opening time.Duration
			for b.Loop() {
				began := time.Now()
				if _, err := readFile(filepath.Join(dir, fileName)); err != nil {
					b.Fatal(err)
				}
				reading += time.Since(began)
				began = time.Now()
				r := reopen(b, dir)
				opening += time.Since(began)
				if len(all(r)) != n {
					b.Fatal("instances are missing")
				}
				r.Close()
			}
			b.ReportMetric(float64(reading.Milliseconds())/float64(b.N), "ms/read")
			b.ReportMetric(float64(opening.Milliseconds())/float64(b.N), "ms/open")
		})
	}
}
