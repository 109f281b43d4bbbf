//go:build race

package loop

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// The race detector knows of bytes that pass a socket from Go's own calls only.

func read(fd int, b []byte) (int, error) {
	return again(func() (int, error) { return syscall.Read(fd, b) })
}

func write(fd int, b []byte) (int, error) {
	return again(func() (int, error) { return syscall.Write(fd, b) })
}

func peek(fd int) int {
	n, err := again(func() (int, error) {
		var b [1]byte
		n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return n, err
	})
	if err == ErrAgain {
		return -1
	}
	return n
}

func again(call func() (int, error)) (int, error) {
	for {
		switch n, err := call(); err {
		case nil:
			return n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, ErrAgain
		default:
			return 0, err
		}
	}
}
