//go:build !linux

package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// drive is the built-in load: see drive_linux.go. This one is simple and dear, and only a closed loop.
func drive(l load, addr string, rate float64, d time.Duration, begin func() error, done func(outcome) error) error {
	if rate > 0 {
		return errors.New("an open loop needs Linux")
	}
	if err := begin(); err != nil {
		return err
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards o
		o     = outcome{Latency: latency{All: &histogram{}}, Late: &histogram{}}
		start = time.Now()
	)
	request := l.requests(addr)[0]
	for range l.Connections {
		wg.Go(func() {
			var c client
			for time.Since(start) < d {
				c.run(start.Add(d), addr, l, request)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, t := range c.times {
				o.Latency.All.add(int64(t))
			}
			o.BadStatus += c.badStatus
			o.Errors += c.errors
		})
	}
	wg.Wait()
	o.Requests, o.Elapsed = o.Latency.All.n, time.Since(start)
	return done(o)
}

// client is one connection, and what it saw.
type client struct {
	times             []time.Duration // of each answer
	badStatus, errors int
}

// run uses one connection until then or until the connection ends. The request that is under way then is still waited
// for, 2 s at most.
func (c *client) run(until time.Time, addr string, l load, request []byte) {
	conn, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		c.errors++
		time.Sleep(10 * time.Millisecond) // what refuses once refuses again: no need to ask as fast as we can
		return
	}
	defer conn.Close()
	br := bufio.NewReader(conn)
	for time.Now().Before(until) {
		start := time.Now()
		conn.SetDeadline(start.Add(2 * time.Second))
		var n int64
		_, err := conn.Write(request)
		var resp *http.Response
		if err == nil {
			resp, err = http.ReadResponse(br, &http.Request{Method: l.Method})
		}
		if err == nil {
			n, err = io.Copy(io.Discard, resp.Body)
		}
		if err != nil {
			c.errors++
			return
		}
		c.times = append(c.times, time.Since(start))
		if resp.StatusCode/100 != 2 || n != int64(l.Response) {
			c.badStatus++
		}
		if resp.Close {
			return
		}
	}
}
