//go:build !race

package loop

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls do not tell the scheduler: a socket that never blocks has nothing to wait for, and telling costs a tenth of
// the call.

// read is read(2): 0 at the end of the stream.
func read(fd int, b []byte) (int, error) { return call(unix.SYS_READ, fd, b, 0) }

// write is write(2).
func write(fd int, b []byte) (int, error) { return call(unix.SYS_WRITE, fd, b, 0) }

func peek(fd int) int {
	var b [1]byte
	n, err := call(unix.SYS_RECVFROM, fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err == ErrAgain {
		return -1
	}
	return n
}

// call makes one of the three calls, of which only recvfrom looks at flags.
func call(trap uintptr, fd int, b []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, ErrAgain
		default:
			return 0, errno
		}
	}
}
