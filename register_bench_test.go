package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kerberos/internal/config"
)

// crowd is a gateway with a service of many instances, all with a lease and a check, and clients that register more. They
// allocate nothing themselves.
type crowd struct {
	*gateway
	clients [64]struct {
		net.Conn
		request, response []byte
	}
	next atomic.Int64 // the number of the next instance
}

func startCrowd(b *testing.B, instances int) *crowd {
	cfg, sources, err := config.Load([]string{"--listen=127.0.0.1:0", "--admin=127.0.0.1:0", "--token=bench"}, func(string) (string, bool) { return "", false })
	if err != nil {
		b.Fatal(err)
	}
	g, err := start(cfg, origin{sources: sources}, slog.New(slog.NewJSONHandler(io.Discard, nil)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(g.stop)
	accepts, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { accepts.Close() })
	k := &crowd{gateway: g}
	for i := range k.clients {
		c := &k.clients[i]
		if c.Conn, err = net.Dial("tcp", g.admin.Addr().String()); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		body := fmt.Sprintf(`{"service":"storm","id":"n-0000000000","addr":"http://%s","ttl":"1h","check":{"tcp":true,"interval":"10s"}}`, accepts.Addr())
		c.request = fmt.Appendf(nil, "POST /register HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		c.response = make([]byte, 1<<10)
	}
	k.register(b, instances, len(k.clients))
	return k
}

// register has some of the clients register so many instances together.
func (k *crowd) register(b *testing.B, n, clients int) {
	end := k.next.Load() + int64(n)
	var all sync.WaitGroup
	for i := range clients {
		c := &k.clients[i]
		all.Go(func() {
			for rest := k.next.Add(1); rest <= end; rest = k.next.Add(1) {
				at := bytes.Index(c.request, []byte(`"n-`)) + len(`"n-`)
				for digit := at + 9; digit >= at; digit-- {
					c.request[digit], rest = byte('0'+rest%10), rest/10
				}
				if _, err := c.Write(c.request); err != nil {
					b.Error(err)
					return
				}
				if n, err := c.Read(c.response); err != nil || string(c.response[:len("HTTP/1.1 204")]) != "HTTP/1.1 204" {
					b.Errorf("%v: %s", err, c.response[:n])
					return
				}
			}
		})
	}
	all.Wait()
	k.next.Store(end)
}

// BenchmarkRegister is a registration into a service of 10,000 instances through the admin listener, with everything that an
// instance can have; a few clients do it at once, and share views. Their own part is in cpu-us/op, and no allocation is.
func BenchmarkRegister(b *testing.B) {
	k := startCrowd(b, 10_000)
	var began, ended syscall.Rusage
	b.ReportAllocs()
	b.ResetTimer()
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &began)
	k.register(b, b.N, 5)
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ended)
	cpu := ended.Utime.Nano() + ended.Stime.Nano() - began.Utime.Nano() - began.Stime.Nano()
	b.ReportMetric(float64(cpu)/1e3/float64(b.N), "cpu-us/op")
}

// BenchmarkInstances is a collection of the garbage with 20,000 instances on the heap: the CPU time that it takes to mark them, and
// how much of the heap each is.
func BenchmarkInstances(b *testing.B) {
	const instances = 20_000
	read := func(names ...string) (sum float64) {
		for _, name := range names {
			s := []metrics.Sample{{Name: name}}
			metrics.Read(s)
			if s[0].Value.Kind() == metrics.KindUint64 {
				sum += float64(s[0].Value.Uint64())
			} else {
				sum += s[0].Value.Float64()
			}
		}
		return sum
	}
	heap := func() (objects, bytes float64) {
		time.Sleep(100 * time.Millisecond)
		runtime.GC()
		runtime.GC()
		return read("/gc/heap/objects:objects"), read("/memory/classes/heap/objects:bytes")
	}
	mark := func() float64 {
		return read("/cpu/classes/gc/mark/assist:cpu-seconds", "/cpu/classes/gc/mark/dedicated:cpu-seconds", "/cpu/classes/gc/mark/idle:cpu-seconds")
	}
	k := startCrowd(b, 100)
	objects, bytes := heap()
	k.register(b, instances, len(k.clients))
	more, larger := heap()
	began := mark()
	for b.Loop() {
		runtime.GC()
	}
	b.ReportMetric((mark()-began)*1e3/float64(b.N), "mark-ms/op")
	b.ReportMetric((more-objects)/instances, "objects/instance")
	b.ReportMetric((larger-bytes)/instances, "B/instance")
}
