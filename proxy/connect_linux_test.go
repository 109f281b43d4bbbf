package proxy

import (
	"errors"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kerberos/cb"
)

// deaf is a listener whose queue is full: what connects to it waits, until accept makes room.
type deaf struct {
	fd   int
	port int
}

func startDeaf(t *testing.T) *deaf {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		t.Cleanup(func() { unix.Close(fd) })
		err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	d := &deaf{fd, name.(*unix.SockaddrInet4).Port}
	for range 3 {
		if conn, err := net.DialTimeout("tcp", d.addr(), 100*time.Millisecond); err == nil {
			t.Cleanup(func() { conn.Close() })
		}
	}
	return d
}

func (d *deaf) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(d.port)) }

// hear takes what waits, and answers what is sent on the latest connection.
func (d *deaf) hear(t *testing.T, answer string) {
	t.Helper()
	go func() {
		for {
			fd, _, err := unix.Accept4(d.fd, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			go func() {
				defer unix.Close(fd)
				if n, err := unix.Read(fd, make([]byte, 4096)); n > 0 && err == nil {
					_, _ = unix.Write(fd, []byte(answer))
				}
			}()
		}
	}()
}

// A connection that takes its time to come about is waited for on the loop, and in a goroutine when that takes long.
func TestSlowConnect(t *testing.T) {
	for name, patience := range map[string]time.Duration{"on the loop": time.Minute, "in a goroutine": 20 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startLoops(t, 1, func(cfg *Config) { cfg.ConnectTimeout = 20 * time.Second }, nil)
			g.waits(patience)
			d := startDeaf(t)
			g.register(t, "echo", "a", "http://"+d.addr())
			c := g.dial(t)
			c.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
			if patience == time.Minute {
				eventually(t, "it waits", func() bool { return g.atBackends() == 1 })
			} else {
				eventually(t, "a goroutine waits", func() bool { return g.handedOver() == 1 })
			}
			if s := g.DescribeInstance("echo", "a"); s.InFlight != 1 || s.Failure != 0 {
				t.Errorf("%+v", s)
			}
			d.hear(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if m := c.read(false).want(t, 200); m.body != "ok" {
				t.Errorf("got %q", m.body)
			}
			c.Close()
			g.quiet(t, "echo", "a")
		})
	}
}

// One that does not come about fails after the connect timeout, and the request goes elsewhere: nothing of it was sent.
func TestConnectTimeoutOnALoop(t *testing.T) {
	const timeout = 200 * time.Millisecond
	for name, patience := range map[string]time.Duration{"long": 100 * time.Millisecond, "short": 5 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startLoops(t, 2, func(cfg *Config) { cfg.ConnectTimeout = timeout; cfg.Breaker = cb.Config{Failures: 100} }, nil)
			g.waits(patience)
			d := startDeaf(t)
			g.register(t, "echo", "a", "http://"+d.addr())
			c := g.dial(t)
			began := time.Now()
			c.post("/echo", "x").refused(t, errConnectTimeout)
			if took := time.Since(began); took < timeout || took > 10*timeout {
				t.Errorf("took %v", took)
			}
			b := startActor(t, says("b"))
			g.register(t, "echo", "b", b.url())
			for range 4 {
				if m := c.post("/echo", "x").want(t, 200); m.body != "b" {
					t.Errorf("got %q", m.body)
				}
			}
			if seen := b.count(); seen != 4 {
				t.Errorf("the other was asked %d times", seen)
			}
			if s := g.DescribeInstance("echo", "a"); s.Failure < 2 {
				t.Errorf("%+v", s)
			}
			c.Close()
			g.quiet(t, "echo", "a")
		})
	}
}
