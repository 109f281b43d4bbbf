//go:build !race

package loop

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls do not tell the scheduler: a socket that never blocks has nothing to wait for, and telling costs a tenth of
// the call.

// read is recv(2): 0 at the end of the stream. It and send know that they have a socket, and so cost less than read(2) and
// write(2), which ask the file system's layer first.
func read(fd int, b []byte) (int, error) { return call(unix.SYS_RECVFROM, fd, b, 0) }

// write is send(2).
func write(fd int, b []byte) (int, error) { return call(unix.SYS_SENDTO, fd, b, unix.MSG_NOSIGNAL) }

func peek(fd int) int {
	var b [1]byte
	n, err := call(unix.SYS_RECVFROM, fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err == ErrAgain {
		return -1
	}
	return n
}

// call makes one of the two calls; neither names an address.
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
