package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ticksPerSecond is the unit of utime and stime: USER_HZ, which is 100 on every architecture that Go runs on.
const ticksPerSecond = 100

// pickCPUs takes the first ones that this process may use.
func pickCPUs() cpus {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return cpus{}
	}
	var allowed []int
	for i := range len(set) * strconv.IntSize {
		if set.IsSet(i) {
			allowed = append(allowed, i)
		}
	}
	return dealCPUs(allowed)
}

// startOn starts the command on the given CPUs: a child inherits the affinity of the thread that forks it, so all of its
// threads are there from the first moment on.
func startOn(on cpuSet, cmd *exec.Cmd) error {
	if on == nil {
		return cmd.Start()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, only unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("sched_getaffinity: %w", err)
	}
	for _, cpu := range on {
		only.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &only); err != nil {
		return fmt.Errorf("sched_setaffinity: %w", err)
	}
	defer unix.SchedSetaffinity(0, &before)
	return cmd.Start()
}

// childAttr gives a child its own process group: Ctrl-C reaches only us, and we end the children in order. Should we
// die first, the kernel ends them.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// kill ends a process started with childAttr, and its children, at once.
func kill(p *os.Process) { unix.Kill(-p.Pid, unix.SIGKILL) }

// processTree returns the process and all below it.
func processTree(root int) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it ended
		}
		parent, _, _, err := parseStat(string(text))
		if err != nil {
			return nil, err
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		children[parent] = append(children[parent], pid)
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree, nil
}

// usageOf returns what the processes used, threads that ended included.
func usageOf(pids []int) (usage, error) {
	var all usage
	for _, pid := range pids {
		u, err := usageOfOne(pid)
		if err != nil {
			return usage{}, fmt.Errorf("process %d: %w", pid, err)
		}
		all.Total += u.Total
		all.User += u.User
		all.System += u.System
		all.ResidentKiB = max(all.ResidentKiB, u.ResidentKiB)
		all.PeakKiB = max(all.PeakKiB, u.PeakKiB)
	}
	return all, nil
}

func usageOfOne(pid int) (usage, error) {
	var ts unix.Timespec
	const sched = 2 // CPUCLOCK_SCHED, see clock_getcpuclockid(3): what the scheduler counted, in nanoseconds
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
		return usage{}, fmt.Errorf("clock_gettime: %w", err)
	}
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return usage{}, err
	}
	_, utime, stime, err := parseStat(string(stat))
	if err != nil {
		return usage{}, err
	}
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return usage{}, err
	}
	now, peak, err := parseResident(string(status))
	if err != nil {
		return usage{}, err
	}
	const tick = time.Second / ticksPerSecond
	return usage{time.Duration(ts.Nano()), time.Duration(utime) * tick, time.Duration(stime) * tick, now, peak}, nil
}

// openFiles lets this process, and those that it starts, open as many files as it may, and returns how many.
func openFiles() int {
	const enough = 65_536
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	if l.Max < enough {
		higher := syscall.Rlimit{Cur: enough, Max: enough}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &higher) == nil { // root may
			return enough
		}
	}
	l.Cur = min(l.Max, enough)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil { // with it, our children inherit it: see package os
		return 1024
	}
	return int(l.Cur)
}

// describeMachine names processor and system.
func describeMachine() (cpu, system string) {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "model name" {
			cpu = strings.TrimSpace(value)
			break
		}
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return cpu, "Linux " + strings.TrimSpace(string(release))
}
