package registry

import (
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newSync returns what brings all that was written to a file before to the disk, as fdatasync(2) does, and what ends it, which
// leaves the file open. It holds up nothing else meanwhile.
//
// Go's scheduler does not know which calls of the system wait. One that does keeps its P until the runtime's monitor has seen it
// twice, which takes up to 20 ms; with one CPU, and a write for every few registrations, requests would wait for a tenth of all
// time. So the kernel is asked to do it beside (io_submit(2), since Linux 4.18), and from time to time whether it has. Where it
// refuses (its limit aio-max-nr, a sandbox), fdatasync is called.
func newSync(f *os.File) (sync func() error, end func()) {
	q := &queue{file: f}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&q.context)), 0); errno != 0 {
		return q.wait, func() {}
	}
	return q.sync, func() { unix.Syscall(unix.SYS_IO_DESTROY, q.context, 0, 0) }
}

// queue is where the kernel puts what it has done.
type queue struct {
	file    *os.File
	context uintptr
}

// The kernel is asked first after firstLook whether it is done, then after each quarter more of the time that has passed.
const (
	firstLook   = 100 * time.Microsecond
	longestLook = 10 * time.Millisecond
)

// iocb and ioEvent are the kernel's, of linux/aio_abi.h.
type iocb struct {
	_      [2]uint64
	opcode uint16
	_      int16
	fd     uint32
	_      [5]uint64
}

type ioEvent struct {
	_, _   uint64
	result int64
	_      int64
}

const iocbFdsync = 3

func (q *queue) sync() error {
	if !q.submit() {
		return q.wait()
	}
	began := time.Now()
	for pause := firstLook; ; pause = min(max(time.Since(began)/4, firstLook), longestLook) {
		time.Sleep(pause)
		var done ioEvent
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, q.context, 0, 1, uintptr(unsafe.Pointer(&done)), 0, 0)
		switch {
		case errno != 0 && errno != unix.EINTR:
			return os.NewSyscallError("io_getevents", errno)
		case errno == 0 && n == 1 && done.result < 0:
			return os.NewSyscallError("fdatasync", unix.Errno(-done.result))
		case errno == 0 && n == 1:
			return nil
		}
	}
}

// submit asks the kernel to begin.
func (q *queue) submit() bool {
	job := &iocb{opcode: iocbFdsync, fd: uint32(q.file.Fd())}
	n, _, _ := unix.Syscall(unix.SYS_IO_SUBMIT, q.context, 1, uintptr(unsafe.Pointer(&job)))
	return n == 1
}

func (q *queue) wait() error {
	return os.NewSyscallError("fdatasync", unix.Fdatasync(int(q.file.Fd())))
}
