package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

var errNotInstalled = errors.New("not installed")

// lookPath finds a program in PATH, or where daemons are: other users than root often lack that in their PATH.
func lookPath(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, errNotInstalled)
}

// environment is all that the processes see of ours: nothing that would change a setting.
func environment(more ...string) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return append(env, more...)
}

// output runs a program on the given CPUs to its end and returns its stdout. When ctx ends, so does the program.
func output(ctx context.Context, on cpuSet, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out, errOut bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = environment(), &out, &errOut
	cmd.SysProcAttr = childAttr()
	cmd.WaitDelay = time.Second
	err := startOn(on, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", filepath.Base(args[0]), err, out.String(), errOut.String())
	}
	return out.String(), nil
}

// process is a server that was started and runs until it is stopped.
type process struct {
	cmd    *exec.Cmd
	log    *lineLog
	exited chan struct{} // closed once it has ended
}

// startProcess starts a server on the given CPUs. onLine, if not nil, sees each line that it prints, and may be called by
// two goroutines.
//
// What it prints to stderr, its log, goes into a file, which is looked at the less often the longer it runs, in the end each
// second. A pipe would wake us for each line: an audit line a millisecond then costs as much as 2,000 requests a second do,
// and takes it from the CPU of who is measured. The file grows by 250 KB in a second of a storm, and goes with the process.
func startProcess(on cpuSet, cmd *exec.Cmd, onLine func(string)) (*process, error) {
	log, err := os.CreateTemp("", "bench-")
	if err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, log: &lineLog{onLine: onLine}, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.log, log
	cmd.SysProcAttr = childAttr()
	cmd.WaitDelay = time.Second
	err = os.Remove(log.Name())
	if err == nil {
		err = startOn(on, cmd)
	}
	if err != nil {
		log.Close()
		return nil, err
	}
	ended, began := make(chan struct{}), time.Now()
	go func() {
		cmd.Wait() // how it ended is told by its log
		close(ended)
	}()
	go func() {
		defer close(p.exited)
		defer log.Close()
		for from, over := int64(0), false; !over; {
			select {
			case <-ended:
				over = true
			case <-time.After(min(time.Since(began)/10+time.Millisecond, time.Second)):
			}
			n, _ := io.Copy(p.log, io.NewSectionReader(log, from, math.MaxInt64-from))
			from += n
		}
	}()
	return p, nil
}

// stop asks the process to end, insists after 3 s, and returns when it has ended.
func (p *process) stop() {
	if p.cmd.Process.Signal(syscall.SIGTERM) == nil {
		select {
		case <-p.exited:
			return
		case <-time.After(3 * time.Second):
		}
	}
	kill(p.cmd.Process)
	<-p.exited
}

// waitFor polls ok until it returns nil, the process ends, or 10 s are over.
func (p *process) waitFor(ctx context.Context, ok func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	name := filepath.Base(p.cmd.Path)
	for {
		err := ok(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("%s ended:\n%s", name, p.log)
		case <-ctx.Done():
			return fmt.Errorf("%s: %w\n%s", name, err, p.log)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// lineLog keeps the end of what a process prints and hands on each line.
type lineLog struct {
	onLine func(string)

	mu   sync.Mutex // guards the fields below
	tail []byte     // the last complete lines, at most maxTail bytes
	rest []byte     // of a line that has not ended
}

const maxTail = 4 << 10

// Write is called with what stdout or stderr brings: a process of ours has its lines in one of them.
func (l *lineLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	l.rest = append(l.rest, b...)
	var lines []string
	for {
		line, rest, found := bytes.Cut(l.rest, []byte("\n"))
		if !found {
			break
		}
		lines = append(lines, string(line))
		l.tail = append(append(l.tail, line...), '\n')
		l.rest = rest
	}
	l.tail = l.tail[max(0, len(l.tail)-maxTail):]
	l.mu.Unlock()
	for _, line := range lines {
		if l.onLine != nil {
			l.onLine(line)
		}
	}
	return len(b), nil
}

func (l *lineLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(string(l.tail) + string(l.rest))
}

// listen opens a free port for a server that cannot say which one it chose: it inherits the socket, so nobody else can
// get the port in between. Plain TCP, as the server itself would open it.
func listen(ctx context.Context) (addr string, socket *os.File, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	defer ln.Close()
	socket, err = ln.(*net.TCPListener).File()
	return ln.Addr().String(), socket, err
}
