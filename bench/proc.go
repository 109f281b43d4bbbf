package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// noCPU means that a process may run anywhere.
const noCPU = -1

// cpus says which CPU each part has for itself.
type cpus struct{ gateway, load int }

func (c cpus) String() string {
	switch {
	case c.gateway == noCPU:
		return "nothing pinned"
	case c.gateway == c.load:
		return fmt.Sprintf("one CPU (%d) for all: gateway, load and origin take turns", c.gateway)
	}
	return fmt.Sprintf("gateway on CPU %d, load and origin on CPU %d", c.gateway, c.load)
}

// usage is what processes used since they started.
type usage struct {
	Total, User, System time.Duration // Total is exact, the other two are sampled
	PeakKiB             int           // largest resident size of one of them, ever
}

// sub returns what was used since an earlier time. The peak is that of all time.
func (u usage) sub(before usage) usage {
	return usage{u.Total - before.Total, u.User - before.User, u.System - before.System, u.PeakKiB}
}

// parseStat returns parent, utime and stime (in ticks) from the text of /proc/PID/stat: proc_pid_stat(5).
func parseStat(text string) (parent int, utime, stime uint64, err error) {
	// The second field is the program's name in parentheses, and may itself contain spaces and parentheses.
	_, rest, found := cutLast(text, ") ")
	f := strings.Fields(rest)
	if !found || len(f) < 13 {
		return 0, 0, 0, fmt.Errorf("malformed stat: %q", text)
	}
	parent, err = strconv.Atoi(f[1])
	if err == nil {
		utime, err = strconv.ParseUint(f[11], 10, 64)
	}
	if err == nil {
		stime, err = strconv.ParseUint(f[12], 10, 64)
	}
	return parent, utime, stime, err
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// parsePeak returns VmHWM from the text of /proc/PID/status, in KiB.
func parsePeak(text string) (int, error) {
	for line := range strings.Lines(text) {
		if v, found := strings.CutPrefix(line, "VmHWM:"); found {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		}
	}
	return 0, fmt.Errorf("no VmHWM")
}
