//go:build race

package proxy

import "syscall"

// The race detector knows of bytes that pass a socket from Go's own calls only.
const socketsAreRaw = true

func readSocket(fd uintptr, b []byte) (int, error) {
	return again(func() (int, error) { return syscall.Read(int(fd), b) })
}

func writeSocket(fd uintptr, b []byte) (int, error) {
	return again(func() (int, error) { return syscall.Write(int(fd), b) })
}

func peekSocket(fd uintptr) int {
	n, err := again(func() (int, error) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return n, err
	})
	if err == errAgain {
		return -1
	}
	return n
}

func again(call func() (int, error)) (int, error) {
	for {
		switch n, err := call(); err {
		case nil:
			return n, nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, errAgain
		default:
			return 0, err
		}
	}
}
