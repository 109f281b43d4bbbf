package proxy

import (
	"bufio"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"kerberos/registry"
)

// A client that asks and then takes nothing of the response, on a clock that does not wait: its connection is a pipe.
func TestClientTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := New(Config{Registry: registry.New(registry.Config{})}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		near, far := net.Pipe()
		defer near.Close()
		p.accepted(far)
		c := &client{t, near, bufio.NewReader(near)}
		c.send("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
		open := func() int {
			synctest.Wait()
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.conns)
		}
		time.Sleep(writeTimeout - time.Second)
		if open() != 1 {
			t.Error("closed early")
		}
		time.Sleep(2 * time.Second)
		if open() != 0 {
			t.Error("still open")
		}
		if n, err := near.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read %d, %v", n, err)
		}
	})
}
