package main

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// startPump starts the pump in front of an address, as the command does: as a process of its own.
func startPump(t *testing.T, name, origin string) string {
	t.Helper()
	g, err := findPump(name)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.start(t.Context(), setup{origins: []string{origin}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r.addr
}

var pumps = []string{"pump", "pump-splice"}

// sink listens; serve has each connection.
func sink(t *testing.T, serve func(c *net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(20 * time.Second))
				serve(c.(*net.TCPConn))
			})
		}
	})
	return ln.Addr().String()
}

// Both ways at once, more than sockets hold, with readers that are slow at first: every byte arrives, once and in order,
// and so do both ends.
func TestPumpIsExact(t *testing.T) {
	const size = 12<<20 + 345
	there, back := make([]byte, size), make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(there)
	r.Read(back)
	for _, name := range pumps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			exchange := func(c *net.TCPConn, sends []byte) [sha256.Size]byte {
				var wg sync.WaitGroup
				wg.Go(func() {
					for rest := sends; len(rest) > 0; {
						n := min(len(rest), 1+rand.IntN(300<<10))
						if _, err := c.Write(rest[:n]); err != nil {
							t.Errorf("%d bytes before the end: %v", len(rest), err)
							return
						}
						rest = rest[n:]
					}
					c.CloseWrite()
				})
				time.Sleep(100 * time.Millisecond) // for the writes to find no room
				h := sha256.New()
				buf := make([]byte, 100<<10)
				for {
					n, err := c.Read(buf[:1+rand.IntN(len(buf))])
					h.Write(buf[:n])
					if err != nil {
						if err != io.EOF {
							t.Error(err)
						}
						break
					}
				}
				wg.Wait()
				return [sha256.Size]byte(h.Sum(nil))
			}
			came := make(chan [sha256.Size]byte, 1)
			addr := startPump(t, name, sink(t, func(c *net.TCPConn) { came <- exchange(c, back) }))
			for range 2 {
				c := dial(t, addr).(*net.TCPConn)
				c.SetDeadline(time.Now().Add(20 * time.Second))
				if exchange(c, there) != sha256.Sum256(back) {
					t.Error("what came from the origin is not what it sent")
				}
				if <-came != sha256.Sum256(there) { // before the pump is ended, which may still hold a part
					t.Error("what came from the client is not what it sent")
				}
			}
		})
	}
}

// The end of one side reaches the other, and what that still says comes back.
func TestPumpEnds(t *testing.T) {
	for _, name := range pumps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ended := make(chan error, 1)
			addr := startPump(t, name, sink(t, func(c *net.TCPConn) {
				b, err := io.ReadAll(c)
				if string(b) == "wait" {
					ended <- err
					return
				}
				c.Write(append([]byte("got "), b...))
			}))
			half := dial(t, addr).(*net.TCPConn)
			send(t, half, "this")
			half.CloseWrite()
			if b, err := io.ReadAll(half); string(b) != "got this" || err != nil {
				t.Errorf("%q %v", b, err)
			}
			reset := dial(t, addr).(*net.TCPConn)
			send(t, reset, "wait")
			time.Sleep(20 * time.Millisecond)
			reset.SetLinger(0)
			reset.Close()
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				t.Error("the origin never hears of it")
			}
		})
	}
}

// Others are served while one takes nothing.
func TestPumpHasNoQueue(t *testing.T) {
	for _, name := range pumps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			large := bytes.Repeat([]byte("l"), 16<<20)
			addr := startPump(t, name, sink(t, func(c *net.TCPConn) {
				b := make([]byte, 1)
				for {
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					if b[0] == 'l' {
						c.Write(large)
					} else {
						c.Write(b)
					}
				}
			}))
			stuck := dial(t, addr)
			send(t, stuck, "l")
			for range 3 {
				c := dial(t, addr)
				for range 100 {
					send(t, c, "s")
					if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if _, err := io.CopyN(io.Discard, stuck, int64(len(large))); err != nil {
				t.Error(err)
			}
		})
	}
}
