//go:build unix

package proxy

import "syscall"

// peekSocket looks at what has come in on a socket without taking it: the number of bytes (1 means one or more), 0 at the
// end of the stream or on an error, -1 if there is nothing to read yet.
func peekSocket(fd uintptr) int {
	var b [1]byte
	for {
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		switch err {
		case nil:
			return n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return -1
		}
		return 0
	}
}
