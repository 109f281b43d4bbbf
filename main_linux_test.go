package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// terminal is a new one: what a process writes to tty is read from screen.
func terminal(t *testing.T) (screen, tty *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { screen.Close() })
	if err := unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { tty.Close() })
	return screen, tty
}

// On a terminal the log is text; launch sees that it is JSON elsewhere.
func TestLogOnTerminal(t *testing.T) {
	screen, tty := terminal(t)
	cmd := exec.Command(binary, "--listen", "127.0.0.1:0", "--admin", "off")
	cmd.Env = environment()
	cmd.Stderr = tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	var shown transcript
	go func() { // until the terminal is closed
		buffer := make([]byte, 4096)
		for {
			n, err := screen.Read(buffer)
			if err != nil {
				return
			}
			_, _ = shown.Write(buffer[:n])
		}
	}()
	eventually(t, "a line is shown", func() bool { return strings.Contains(shown.String(), "\n") })
	if line := shown.String(); !strings.HasPrefix(line, "time=") || !strings.Contains(line, " level=INFO msg=listening listener=data addr=127.0.0.1:") {
		t.Errorf("shown: %q", line)
	}
}
