package registry

import (
	"crypto/tls"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// given is a connection as fasthttp gives it away.
type given struct{ net.Conn }

func (g given) UnsafeConn() net.Conn { return g.Conn }

func TestUserTimeout(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, wrap := range map[string]func(net.Conn) net.Conn{
		"plain":           func(c net.Conn) net.Conn { return c },
		"given":           func(c net.Conn) net.Conn { return given{c} },
		"given, with TLS": func(c net.Conn) net.Conn { return given{tls.Client(c, nil)} },
	} {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		setUserTimeout(wrap(conn), holdSilent)
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		if err := raw.Control(func(fd uintptr) { got, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT) }); err != nil {
			t.Fatal(err)
		}
		if got != int(holdSilent.Milliseconds()) {
			t.Errorf("%s: %d ms", name, got)
		}
		conn.Close()
	}
}
