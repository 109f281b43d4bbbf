//go:build unix

package accesslog

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

const nonblock = unix.O_NONBLOCK

// stdout is the standard output under another descriptor: if its reader goes, that is an error of a write, and not the end of
// the process by a signal.
func stdout() (*os.File, error) {
	fd, err := unix.FcntlInt(os.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), Stdout), nil
}

// NotifyReopen has c told when somebody asks for Log.Reopen: by SIGUSR1, where there is one.
func NotifyReopen(c chan<- os.Signal) { signal.Notify(c, unix.SIGUSR1) }
