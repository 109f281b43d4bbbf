package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// cpuSet is where a process may run: anywhere, if it is nil.
type cpuSet []int

// cpus says which CPU each part has for itself.
type cpus struct {
	gateway, load cpuSet
	gateways      cpuSet // for a gateway that has two
	loads         cpuSet // for the load beside that one; if there are only two CPUs, the same ones
}

func (c cpus) String() string {
	switch {
	case c.gateway == nil:
		return "nothing pinned"
	case c.gateway[0] == c.load[0]:
		return fmt.Sprintf("one CPU (%d) for all: gateway, load and origin take turns", c.gateway[0])
	}
	return fmt.Sprintf("gateway on CPU %d, load and origin on CPU %d", c.gateway[0], c.load[0])
}

// dealCPUs deals out the CPUs that may be used.
func dealCPUs(allowed []int) cpus {
	second := min(1, len(allowed)-1)
	c := cpus{gateway: allowed[:1], load: allowed[second : second+1], gateways: allowed[:second+1], loads: allowed[:second+1]}
	if len(allowed) >= 4 {
		c.loads = allowed[2:4]
	}
	return c
}

// usage is what processes used since they started.
type usage struct {
	Total, User, System  time.Duration // Total is exact, the other two are sampled
	ResidentKiB, PeakKiB int           // largest resident size of one of them, now and ever
}

// sub returns what was used since an earlier time. The sizes stay as they are.
func (u usage) sub(before usage) usage {
	return usage{u.Total - before.Total, u.User - before.User, u.System - before.System, u.ResidentKiB, u.PeakKiB}
}

// add adds what was used later.
func (u usage) add(later usage) usage {
	return usage{u.Total + later.Total, u.User + later.User, u.System + later.System, later.ResidentKiB, later.PeakKiB}
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

// parseResident returns VmRSS and VmHWM from the text of /proc/PID/status, in KiB.
func parseResident(text string) (now, peak int, err error) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		var to *int
		switch name {
		case "VmRSS":
			to = &now
		case "VmHWM":
			to = &peak
		default:
			continue
		}
		if *to, err = strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB")); err != nil {
			return 0, 0, err
		}
	}
	if now == 0 || peak == 0 {
		return 0, 0, errors.New("no VmRSS and VmHWM")
	}
	return now, peak, nil
}
