package registry

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// setUserTimeout has a connection fail when what was sent is not acknowledged for so long (tcp(7)).
func setUserTimeout(conn net.Conn, d time.Duration) {
	if own, ok := conn.(interface{ UnsafeConn() net.Conn }); ok { // one that fasthttp has given away
		conn = own.UnsafeConn()
	}
	if inner, ok := conn.(interface{ NetConn() net.Conn }); ok { // below TLS
		conn = inner.NetConn()
	}
	c, ok := conn.(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
		})
	}
}
