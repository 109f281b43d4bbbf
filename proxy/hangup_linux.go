package proxy

import "golang.org/x/sys/unix"

// hungUp reports whether a socket was reset or closed in both directions. Bytes that wait to be read hide that from a peek.
func hungUp(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}} // POLLERR and POLLHUP are always looked for
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
}
