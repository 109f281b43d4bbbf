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
		c := &client{t: t, Conn: near, r: bufio.NewReader(near)}
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

// A backend that takes the head of a request and nothing of its body is given up after 30 s.
func TestBackendTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, backend := startPiped(t, time.Hour)
		if err := c.SetDeadline(time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		go io.WriteString(c.Conn, "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"+filler(1000000))
		bodyReader(t, bufio.NewReaderSize(backend, 16)) // the head
		c.read(false).refused(t, errWriteTimeout)
		if took := time.Since(began); took < uploadTimeout || took > uploadTimeout+2*time.Second {
			t.Errorf("took %v, want %v", took, uploadTimeout)
		}
	})
}

// A backend that falls silent in mid-response is given up after five minutes, and the client sees that the response is cut.
func TestSilentBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, backend := startPiped(t, 0)
		over := make(chan struct{})
		go func() {
			defer close(over)
			r := bufio.NewReader(backend)
			if _, err := readMessage(r, false); err != nil {
				t.Error(err)
			}
			io.WriteString(backend, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
			_, _ = r.ReadByte() // until the gateway closes
		}()
		if err := c.SetDeadline(time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		c.send("GET /echo HTTP/1.1\r\nHost: a\r\n\r\n")
		m, err := readMessage(c.r, false)
		if took := time.Since(began); err == nil || m.body != "x" || took < silenceTimeout || took > silenceTimeout+2*time.Second {
			t.Errorf("%q and %v after %v, want the beginning and an error after %v", m.body, err, took, silenceTimeout)
		}
		<-over
	})
}
