package health

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kerberos/registry"
)

// An address that swallows what is sent to it has only its part of the time.
func TestAddressThatHangs(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		b := startBackend(t, always(ok))
		in := instance(t, b.addr, registry.Check{Path: "/", Interval: time.Hour, Timeout: 4 * time.Second})
		full := fullBacklog(t)
		ownerOf(in).addrs = func() []netip.AddrPort { return []netip.AddrPort{full, b.addr} }
		w := c.Watch(in)
		eventually(t, "it is up", func() bool { return w.Status().State == Up })
		w = c.Watch(instance(t, full, registry.Check{Path: "/", Interval: time.Hour, Timeout: 100 * time.Millisecond}))
		eventually(t, "it is down", func() bool { return w.Status().Error == "no connection in time" })
	})
}

// fullBacklog is an address at which connections are neither accepted nor refused.
func fullBacklog(t *testing.T) netip.AddrPort {
	t.Helper()
	ln := listenOne(t)
	for { // until one is not answered
		conn, err := net.DialTimeout("tcp", ln.String(), 200*time.Millisecond)
		if err != nil {
			return ln
		}
		t.Cleanup(func() { conn.Close() })
	}
}

// Ten thousand come and go, some in the middle of a check, and leave nothing.
func TestNothingIsLeft(t *testing.T) {
	both(t, func(t *testing.T, c *Checker) {
		kept, slow := startBackend(t, always(ok)), startBackend(t, hang)
		baseline := descriptors(t) // with the listeners
		for i := range 10_000 {
			check := registry.Check{Path: "/", KeepAlive: i%2 == 0}
			at := kept.addr
			if i%5 == 0 {
				at = slow.addr
			}
			w := c.Watch(instance(t, at, check))
			if i%100 == 0 {
				eventually(t, "it was checked or is under way", func() bool { return w.Status().State != Unknown || i%5 == 0 })
			}
			w.Stop()
			w.Stop()
		}
		eventually(t, "no connection is left", func() bool { return kept.open.Load() == 0 && slow.open.Load() == 0 })
		c.mu.Lock()
		for of, q := range c.queues {
			if len(q) > 0 {
				t.Errorf("%d are left in queue %d", len(q), of)
			}
		}
		c.mu.Unlock()
		eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= baseline+1 }) // the epoll
	})
}

// listenOne listens with room for one connection.
func listenOne(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := name.(*unix.SockaddrInet4)
	return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port))
}

// descriptors is how many this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
