package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// callKinds are the system calls that are told apart; epoll is both of those that programs in Go use.
var callKinds = []struct {
	name    string
	numbers []int
}{
	{"read", []int{unix.SYS_READ}},
	{"write", []int{unix.SYS_WRITE}},
	{"recvfrom", []int{unix.SYS_RECVFROM}},
	{"epoll", []int{unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2}},
	{"splice", []int{unix.SYS_SPLICE}},
	{"futex", []int{unix.SYS_FUTEX}},
}

// callCounter counts the system calls of this process, by perf_event_open(2) on the tracepoint that all of them pass. It
// makes each of them dearer: what is timed must not be counted. One thread opens, starts and stops it: see
// PR_TASK_PERF_EVENTS_ENABLE in prctl(2).
type callCounter struct {
	all   []int   // descriptors, one for each thread
	kinds [][]int // the same of each of callKinds; empty unless asked for
}

// calls are counts: all, and each of callKinds if asked for.
type calls struct {
	all   uint64
	kinds []uint64
}

// countCalls returns what f does, threads that it makes included. The error says why that is not known here.
func countCalls(byKind bool, f func()) (calls, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c, err := openCounters(byKind)
	if err != nil {
		return calls{}, err
	}
	defer c.close()
	if err := unix.Prctl(unix.PR_TASK_PERF_EVENTS_ENABLE, 0, 0, 0, 0); err != nil {
		return calls{}, os.NewSyscallError("prctl", err)
	}
	f()
	if err := unix.Prctl(unix.PR_TASK_PERF_EVENTS_DISABLE, 0, 0, 0, 0); err != nil {
		return calls{}, os.NewSyscallError("prctl", err)
	}
	return c.read()
}

// openCounters opens one of all threads that there are, and of those that they make from then on.
func openCounters(byKind bool) (*callCounter, error) {
	id, err := tracepoint("raw_syscalls/sys_enter")
	if err != nil {
		return nil, err
	}
	for range 100 {
		before, err := threads()
		if err != nil {
			return nil, err
		}
		c := &callCounter{}
		if err := c.attach(id, before, byKind); err != nil && !errors.Is(err, unix.ESRCH) {
			c.close()
			return nil, err
		}
		// A thread that was made meanwhile may be counted already, with the one that made it, or not.
		if after, err := threads(); err == nil && slices.Equal(before, after) {
			return c, nil
		}
		c.close()
	}
	return nil, errors.New("threads come and go")
}

func (c *callCounter) attach(id uint64, threads []int, byKind bool) error {
	for _, thread := range threads {
		fd, err := openCounter(id, thread, nil)
		if err != nil {
			return err
		}
		c.all = append(c.all, fd)
	}
	if !byKind {
		return nil
	}
	c.kinds = make([][]int, len(callKinds))
	for i, kind := range callKinds {
		for _, thread := range threads {
			fd, err := openCounter(id, thread, kind.numbers)
			if err != nil {
				return err
			}
			c.kinds[i] = append(c.kinds[i], fd)
		}
	}
	return nil
}

// openCounter opens the counter of one thread, of these system calls only unless there are none.
func openCounter(id uint64, thread int, numbers []int) (int, error) {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Bits: unix.PerfBitDisabled | unix.PerfBitInherit}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, thread, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("perf_event_open", err)
	}
	if len(numbers) == 0 {
		return fd, nil
	}
	var terms []string
	for _, n := range numbers {
		terms = append(terms, fmt.Sprintf("id==%d", n))
	}
	filter, err := unix.BytePtrFromString(strings.Join(terms, "||"))
	if err != nil {
		unix.Close(fd)
		return 0, err
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(filter)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		unix.Close(fd)
		return 0, os.NewSyscallError("ioctl", errno)
	}
	return fd, nil
}

// read returns what was counted.
func (c *callCounter) read() (calls, error) {
	all, err := sum(c.all)
	n := calls{all: all}
	for _, fds := range c.kinds {
		k, kindErr := sum(fds)
		n.kinds = append(n.kinds, k)
		err = errors.Join(err, kindErr)
	}
	return n, err
}

func sum(fds []int) (n uint64, _ error) {
	for _, fd := range fds {
		var b [8]byte
		if _, err := unix.Read(fd, b[:]); err != nil {
			return 0, os.NewSyscallError("read", err)
		}
		n += binary.NativeEndian.Uint64(b[:])
	}
	return n, nil
}

func (c *callCounter) close() {
	for _, fds := range append(c.kinds, c.all) {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

// tracepoint returns the number of a tracepoint.
func tracepoint(name string) (uint64, error) {
	var errs error
	for _, dir := range []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"} {
		b, err := os.ReadFile(dir + "/events/" + name + "/id")
		if err == nil {
			return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		}
		errs = errors.Join(errs, err)
	}
	return 0, errs
}

// threads returns those of this process, in order.
func threads() ([]int, error) {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var ids []int
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}
