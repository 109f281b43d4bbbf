package soak

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// CanGauge says whether this system tells what a process holds.
const CanGauge = true

// GaugesOf returns what a gateway holds that listens at these two addresses, for clients and for its API.
func GaugesOf(pid int, data, admin string) (Gauges, error) {
	var g Gauges
	dir := "/proc/" + strconv.Itoa(pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return g, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSuffix(strings.TrimSpace(value), " kB")
		switch name {
		case "VmRSS":
			g.ResidentKiB, err = strconv.Atoi(value)
		case "Threads":
			g.Threads, err = strconv.Atoi(value)
		}
		if err != nil {
			return g, err
		}
	}
	own, err := sockets(dir + "/fd")
	if err != nil {
		return g, err
	}
	g.Descriptors, g.Pipes = own.descriptors, own.pipes
	ports := map[string]*int{}
	for addr, to := range map[string]*int{data: &g.Clients, admin: new(int)} {
		a, err := netip.ParseAddrPort(addr)
		if err != nil {
			return g, err
		}
		ports[fmt.Sprintf("%04X", a.Port())] = to
	}
	table, err := os.ReadFile(dir + "/net/tcp")
	if err != nil {
		return g, err
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line) // proc_pid_net(5): number, local address, remote address, state, ..., inode
		const listening = "0A"
		if len(f) < 10 || !own.inodes[f[9]] || f[3] == listening {
			continue
		}
		delete(own.inodes, f[9]) // while others come and go, the table may tell of one twice
		_, port, _ := strings.Cut(f[1], ":")
		if to := ports[port]; to != nil {
			*to++
		} else {
			g.Upstreams++
		}
	}
	return g, nil
}

type opened struct {
	descriptors int
	pipes       int             // ends of pipes
	inodes      map[string]bool // of sockets
}

func sockets(dir string) (opened, error) {
	o := opened{inodes: map[string]bool{}}
	files, err := os.ReadDir(dir)
	if err != nil {
		return o, err
	}
	o.descriptors = len(files)
	for _, file := range files {
		to, err := os.Readlink(dir + "/" + file.Name())
		if err != nil {
			continue // closed meanwhile
		}
		if strings.HasPrefix(to, "pipe:") {
			o.pipes++
		}
		if inode, ok := strings.CutPrefix(to, "socket:["); ok {
			o.inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	return o, nil
}

// kernelAborts is how many connections the kernel has aborted for lack of TCP memory since it started, 0 if it does not tell.
func kernelAborts() int {
	text, err := os.ReadFile("/proc/net/netstat")
	if err != nil {
		return 0
	}
	lines := strings.Split(string(text), "\n")
	for i := 0; i+1 < len(lines); i += 2 { // names, and then values
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if at := slices.Index(names, "TCPAbortOnMemory"); at >= 0 && at < len(values) {
			n, _ := strconv.Atoi(values[at])
			return n
		}
	}
	return 0
}
