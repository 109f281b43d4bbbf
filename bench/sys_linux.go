package main

import (
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The pump and the load are one thread each that nothing else in their process waits for, so their system calls need not
// tell Go's scheduler, which costs as much as a tenth of the smallest of them. The collector cannot stop such a thread:
// it is off (see alone), and they allocate nothing once their connections are there.

func rawRead(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}

func rawWrite(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}

// rawDiscard takes up to len(b) bytes from a TCP socket without copying them anywhere: see MSG_TRUNC in tcp(7).
func rawDiscard(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_TRUNC, 0, 0)
	return int(n), errno
}

// rawSplice moves up to n bytes between a socket and a pipe.
func rawSplice(from, to, n int) (int, syscall.Errno) {
	moved, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	return int(moved), errno
}

// rawWait waits for events, at most until the timeout if there is one.
func rawWait(epoll int, events []unix.EpollEvent, timeout *unix.Timespec) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)),
		uintptr(unsafe.Pointer(timeout)), 0, 0)
	return int(n), errno
}

// listenOn opens a listening socket on a free loopback port.
func listenOn() (fd int, addr netip.AddrPort, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, addr, fmt.Errorf("socket: %w", err)
	}
	loopback := [4]byte{127, 0, 0, 1}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback}); err != nil {
		return 0, addr, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return 0, addr, fmt.Errorf("listen: %w", err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, addr, fmt.Errorf("getsockname: %w", err)
	}
	return fd, netip.AddrPortFrom(netip.AddrFrom4(loopback), uint16(name.(*unix.SockaddrInet4).Port)), nil
}

// dialTo connects to addr, waits for that 2 s at most, and returns a socket that does not block.
func dialTo(addr netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 2})
	if err == nil {
		to := &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
		for err = unix.EINTR; err == unix.EINTR; { // a call with a timeout is not restarted behind a signal (signal(7))
			err = unix.Connect(fd, to)
		}
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("connect to %s: %w", addr, err)
	}
	return fd, nil
}

// acceptOn takes a connection that waits, EAGAIN if none does.
func acceptOn(listener int) (int, error) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			return fd, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		case unix.EINTR, unix.ECONNABORTED:
		default:
			return 0, err
		}
	}
}

// watch tells an epoll instance what to report of a socket.
func watch(epoll, op, fd int, events uint32) error {
	if err := unix.EpollCtl(epoll, op, fd, &unix.EpollEvent{Fd: int32(fd), Events: events}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}
