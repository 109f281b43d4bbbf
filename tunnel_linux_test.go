package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A client, a gateway with no flags and an instance: thousands of WebSockets that are silent cost little, and work.
func TestIdleTunnels(t *testing.T) {
	tunnels := 4000
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if need := uint64(2*tunnels + 200); limit.Max < need {
		t.Skipf("needs %d descriptors in each of two processes; the hard limit is %d", need, limit.Max)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var ends []net.Conn
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			ends = append(ends, c)
			mu.Unlock()
			serving.Go(func() { // an echo
				defer c.Close()
				r := bufio.NewReaderSize(c, 512)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				io.Copy(c, struct{ io.Reader }{r})
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range ends {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})

	g := launch(t, nil, "--drain-timeout", "100ms")
	g.register("ws", "a", "http://"+ln.Addr().String())
	const handshake = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	open := func() net.Conn {
		c, err := net.Dial("tcp", g.data)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
		io.WriteString(c, handshake)
		head := make([]byte, 0, 256)
		for one := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); {
			if _, err := c.Read(one); err != nil {
				t.Fatalf("got %q, %v", head, err)
			}
			head = append(head, one[0])
		}
		if !bytes.HasPrefix(head, []byte("HTTP/1.1 101 ")) {
			t.Fatalf("got %q", head)
		}
		return c
	}
	echo := func(c net.Conn, i int) {
		want := fmt.Sprint("message ", i)
		io.WriteString(c, want)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Fatalf("tunnel %d: got %q, %v", i, got, err)
		}
	}
	for i := range 100 { // what starts late has started
		c := open()
		echo(c, i)
		defer c.Close()
	}
	before := resident(t, g.cmd.Process.Pid, "VmRSS")
	var near []net.Conn
	for i := range tunnels {
		c := open()
		defer c.Close()
		echo(c, i)
		near = append(near, c)
	}
	listed := fmt.Sprintf(`"in_flight":0,"tunnels":%d,`, tunnels+100)
	if _, body := exchange(t, g.admin, get("/services/ws/a")); !strings.Contains(body, listed) {
		t.Errorf("%s is not in %s", listed, body)
	}
	each := float64(resident(t, g.cmd.Process.Pid, "VmRSS")-before) / float64(tunnels) / 1024
	t.Logf("%.1f KiB a tunnel", each)
	if most := 24.0; each > most && !raceDetector {
		t.Errorf("%.1f KiB a tunnel, want at most %.0f", each, most)
	}
	for i, c := range near {
		echo(c, i)
	}

	g.signal(syscall.SIGTERM) // they are cut when the drain time is over
	for _, c := range near {
		io.Copy(io.Discard, c)
	}
	if code := g.wait(); code != 0 || !g.logged("requests were cut", `"count":4100`) {
		t.Errorf("exit code %d, %s", code, g.stderr.String())
	}
}
