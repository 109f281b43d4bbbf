package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	const rest = " S 41 4242 4242 0 -1 4194560 100 0 0 0 1234 567 8 9 20 0 1 0 100 1000 50"
	for _, name := range []string{"(nginx)", "(a b)", "(a) R 1 (b)", "()"} {
		parent, user, system, err := parseStat("4242 " + name + rest)
		if parent != 41 || user != 1234 || system != 567 || err != nil {
			t.Errorf("%s: %d %d %d %v", name, parent, user, system, err)
		}
	}
	for _, text := range []string{"", "1 (a", "1 (a) S 1", "1 (a)" + strings.Replace(rest, "567", "x", 1)} {
		if _, _, _, err := parseStat(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

func TestParseResident(t *testing.T) {
	if now, peak, err := parseResident("Name:\ta\nVmPeak:\t  9999 kB\nVmHWM:\t    6840 kB\nVmRSS:\t 12 kB\n"); now != 12 || peak != 6840 || err != nil {
		t.Errorf("%d %d %v", now, peak, err)
	}
	for _, text := range []string{"Name:\tkthread\n", "VmHWM:\t1 kB\n", "VmHWM:\t1 kB\nVmRSS:\tx kB\n"} {
		if _, _, err := parseResident(text); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

func TestDealCPUs(t *testing.T) {
	for _, test := range []struct {
		allowed []int
		want    cpus
	}{
		{[]int{3}, cpus{cpuSet{3}, cpuSet{3}, cpuSet{3}, cpuSet{3}}},
		{[]int{2, 6}, cpus{cpuSet{2}, cpuSet{6}, cpuSet{2, 6}, cpuSet{2, 6}}},
		{[]int{1, 2, 3}, cpus{cpuSet{1}, cpuSet{2}, cpuSet{1, 2}, cpuSet{1, 2}}},
		{[]int{0, 1, 2, 3, 4}, cpus{cpuSet{0}, cpuSet{1}, cpuSet{0, 1}, cpuSet{2, 3}}},
	} {
		if got := dealCPUs(test.allowed); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%v: %v, want %v", test.allowed, got, test.want)
		}
	}
}

// What a process burns is what is counted for it, and no other process's.
func TestUsage(t *testing.T) {
	before, err := usageOf([]int{os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	burn := func(d time.Duration) {
		var r syscall.Rusage
		spent := func() time.Duration {
			syscall.Getrusage(syscall.RUSAGE_SELF, &r)
			return time.Duration(r.Utime.Nano() + r.Stime.Nano())
		}
		for start := spent(); spent()-start < d; {
		}
	}
	burn(100 * time.Millisecond)
	after, err := usageOf([]int{os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	u := after.sub(before)
	if u.Total < 90*time.Millisecond || u.Total > 500*time.Millisecond || u.PeakKiB < 1000 {
		t.Errorf("burnt 100 ms: %+v", u)
	}
	if diff := u.Total - u.User - u.System; diff < -30*time.Millisecond || diff > 30*time.Millisecond {
		t.Errorf("user and system do not add up: %+v", u)
	}
	both, err := usageOf([]int{os.Getpid(), os.Getpid()})
	if err != nil || both.Total < 2*after.Total || both.PeakKiB > 2*after.PeakKiB {
		t.Errorf("two processes: %+v, one: %+v, %v", both, after, err)
	}
	if _, err := usageOf([]int{1 << 22}); err == nil {
		t.Error("no such process: no error")
	}
}

// A child is on its CPU from the start, its own children are found, and all end, even if they don't want to.
func TestProcess(t *testing.T) {
	t.Parallel()
	c := pickCPUs()
	cmd := exec.Command("sh", "-c", `trap "" TERM; sleep 60 & grep Cpus_allowed_list /proc/self/status; wait; sleep 60`)
	p, err := startProcess(c.load, cmd, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	var said []string
	var tree []int
	if err := p.waitFor(t.Context(), func(context.Context) error {
		said = strings.Fields(p.log.String())
		if tree, err = processTree(cmd.Process.Pid); err != nil || len(said) != 2 || len(tree) != 2 {
			return fmt.Errorf("%v %v", tree, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if said[1] != strconv.Itoa(c.load[0]) {
		t.Errorf("wanted on CPU %v, is on %s", c.load, said[1])
	}
	p.stop()
	gone(t, tree)
}

// Whether the command is interrupted or killed, what it started ends.
func TestInterrupted(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cmd := command(t, dir, "--kerberos", self, "--gateways", "kerberos", "--only", "get-16", "--duration", "50s")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			cmd.WaitDelay = 5 * time.Second
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			var tree []int
			eventually(t, "origin, gateway and load", func() bool {
				var err error
				tree, err = processTree(cmd.Process.Pid)
				return err == nil && slices.ContainsFunc(tree, func(pid int) bool {
					line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
					return bytes.Contains(line, []byte("\x00load\x00"))
				})
			})
			if len(tree) < 4 {
				t.Errorf("only %d processes", len(tree))
			}
			cmd.Process.Signal(sig)
			cmd.Wait()
			gone(t, tree)
			if sig == syscall.SIGKILL {
				return // nobody was left to tidy up
			}
			if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
				t.Errorf("exit code %d\n%s", code, &out)
			}
			isEmpty(t, dir)
		})
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain for:", what)
		}
	}
}

// gone waits until none of the processes runs.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		eventually(t, fmt.Sprintf("the end of process %d", pid), func() bool {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			_, rest, _ := cutLast(string(text), ") ")
			return err != nil || strings.HasPrefix(rest, "Z") // ended; whoever inherited it has not looked yet
		})
	}
}
