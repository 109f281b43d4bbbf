//go:build !race

package proxy

import (
	"syscall"
	"unsafe"
)

// Reading and writing inside a readiness wait (see conn.ready and backendConn.turn) needs sockets that never block, which
// Go's are. The calls do not tell the scheduler: there is nothing to wait for, and telling costs a tenth of the call.
const socketsAreRaw = true

// readSocket is read(2): 0 at the end of the stream, errAgain if there is nothing to read yet.
func readSocket(fd uintptr, b []byte) (int, error) { return call(syscall.SYS_READ, fd, b, 0) }

// writeSocket is write(2): errAgain if there is no room.
func writeSocket(fd uintptr, b []byte) (int, error) { return call(syscall.SYS_WRITE, fd, b, 0) }

// peekSocket looks at what has come in without taking it: the number of bytes (1 means one or more), 0 at the end of the
// stream or on an error, -1 if there is nothing to read yet.
func peekSocket(fd uintptr) int {
	var b [1]byte
	n, err := call(syscall.SYS_RECVFROM, fd, b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	if err == errAgain {
		return -1
	}
	return n
}

// call makes one of the three calls, of which only recvfrom looks at flags.
func call(trap, fd uintptr, b []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, errAgain
		default:
			return 0, errno
		}
	}
}
