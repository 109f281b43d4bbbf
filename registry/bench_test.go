package registry

import (
	"cmp"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

func filled(b *testing.B, services, instances int) *Registry {
	b.Helper()
	r := New(Config{})
	for s := range services {
		for i := range instances {
			register(b, r, "service-"+strconv.Itoa(s), "instance-"+strconv.Itoa(i), "http://10.0.0.1:8080", 1)
		}
	}
	return r
}

func unregister(b *testing.B, r *Registry, service, id string) {
	b.Helper()
	if err := r.Unregister(service, id, ""); err != nil {
		b.Fatal(err)
	}
}

// One instance joins a service of that size and leaves it again: the cost of two changes.
func BenchmarkRegisterInto(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		r := filled(b, 1, n)
		b.Run(fmt.Sprintf("instances=%d/join+leave", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				register(b, r, "service-0", "instance-00", "http://10.0.0.1:8080", 1)
				unregister(b, r, "service-0", "instance-00")
			}
		})
		b.Run(fmt.Sprintf("instances=%d/update", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				register(b, r, "service-0", "instance-0", "http://10.0.0.1:8080", 2)
			}
		})
	}
}

// The cost of a change must not depend on how many other services there are. "same" changes one service again and again;
// "another" a different one each time, so that none is in the processor's cache because of the change before.
func BenchmarkRegisterBeside(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		r := filled(b, n, 1)
		for _, spread := range []string{"same", "another"} {
			old, fresh := make([]string, n), make([]string, n)
			for i := range n {
				at := i * 7919 % n
				if spread == "same" {
					at = 5
				}
				old[i], fresh[i] = "service-"+strconv.Itoa(at), "new-"+strconv.Itoa(at)
			}
			bench := func(name string, change func(i int)) {
				b.Run(fmt.Sprintf("%s/%s/services=%d", spread, name, n), func(b *testing.B) {
					b.ReportAllocs()
					i := 0
					for b.Loop() {
						change(i)
						if i++; i == n {
							i = 0
						}
					}
				})
			}
			bench("update", func(i int) { register(b, r, old[i], "instance-0", "http://10.0.0.1:8080", 2) })
			bench("join+leave", func(i int) {
				register(b, r, old[i], "z", "http://10.0.0.1:8080", 1)
				unregister(b, r, old[i], "z")
			})
			bench("first+last", func(i int) { // of a new service
				register(b, r, fresh[i], "a", "http://10.0.0.1:8080", 1)
				unregister(b, r, fresh[i], "a")
			})
			bench("last+first", func(i int) { // of an old one
				unregister(b, r, old[i], "instance-0")
				register(b, r, old[i], "instance-0", "http://10.0.0.1:8080", 1)
			})
		}
	}
}

// From nothing to 100,000 services of one instance each.
func BenchmarkFill100000(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if r := filled(b, 100_000, 1); len(r.Names()) != 100_000 {
			b.Fatal("services are missing")
		}
	}
}

// The one read of the registry that is made for others' changes.
func BenchmarkSnapshot(b *testing.B) {
	r := filled(b, 100_000, 1)
	b.ReportAllocs()
	for b.Loop() {
		if r.Snapshot("service-77777") == nil {
			b.Fatal("missing")
		}
	}
}

// GET /services: ten times the services must cost about ten times as much.
func BenchmarkGetServices(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		h := NewHandler(filled(b, n, 3), nil)
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			var ctx fasthttp.RequestCtx
			for b.Loop() {
				ctx.Request.Reset()
				ctx.Response.Reset()
				ctx.Request.SetRequestURI("/services")
				h(&ctx)
			}
			if ctx.Response.StatusCode() != fasthttp.StatusOK {
				b.Fatal(ctx.Response.String())
			}
			b.ReportMetric(float64(len(ctx.Response.Body())), "B/body")
		})
	}
}

// Leases cost what changes, not what there is: a tick at which none ends, one at which one does (which has to be registered first;
// expire/op is without that), and a renewal. Only where one has ended are the others of its service looked at, once a tick, to find
// out whether it is doubted: "in one" is that at its worst.
func BenchmarkLeases(b *testing.B) {
	for _, spread := range []struct {
		name string
		each int // instances of a service; 0: all
	}{{"services of 10", 10}, {"in one", 0}} {
		for _, n := range []int{100, 10_000, 100_000} {
			each := cmp.Or(spread.each, n)
			r := New(Config{})
			b.Cleanup(r.Close)
			type name struct{ service, id string }
			names := make([]name, n)
			for i := range names {
				names[i] = name{"service-" + strconv.Itoa(i/each), "instance-" + strconv.Itoa(i%each)}
				lend(b, r, names[i].service, names[i].id, MaxTTL)
			}
			bench := func(what string, f func(b *testing.B)) {
				b.Run(fmt.Sprintf("%s/%s/leases=%d", what, spread.name, n), func(b *testing.B) {
					b.ReportAllocs()
					f(b)
				})
			}
			bench("none ends", func(b *testing.B) {
				for b.Loop() {
					if due, left := r.expire(r.now()); due || !left {
						b.Fatal("something has ended")
					}
				}
			})
			bench("one ends", func(b *testing.B) {
				var took time.Duration
				lost, i := r.lost, 0
				for b.Loop() {
					lend(b, r, names[i*7919%n].service, "z", MinTTL)
					i++
					began := time.Now()
					r.expire(r.now() + int64(MinTTL))
					took += time.Since(began)
				}
				if r.lost != lost+uint64(i) {
					b.Fatalf("%d have ended of %d", r.lost-lost, i)
				}
				b.ReportMetric(float64(took)/float64(i), "ns-expire/op")
			})
			bench("renew", func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					at := &names[i*7919%n]
					if err := r.Renew(at.service, at.id, ""); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkParseAddr(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseAddr("http://backend-7.example:8080/base"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	body := []byte(`{"service":"echo","id":"inst-1","addr":"http://localhost:8081","weight":2,"ttl":"15s","check":{"path":"/health","interval":"10s"}}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeMembers(body, "service", "id", "addr", "weight", "ttl", "check"); err != nil {
			b.Fatal(err)
		}
	}
}
