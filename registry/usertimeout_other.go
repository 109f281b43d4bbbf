//go:build !linux

package registry

import (
	"net"
	"time"
)

func setUserTimeout(net.Conn, time.Duration) {}
