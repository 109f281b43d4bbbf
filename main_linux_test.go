package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

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
	eventually(t, "two lines are shown", func() bool { return strings.Count(shown.String(), "\n") >= 2 })
	if lines := shown.String(); !strings.HasPrefix(lines, "time=") || !strings.Contains(lines, " level=INFO msg=listening listener=data addr=127.0.0.1:") {
		t.Errorf("shown: %q", lines)
	}
}

// By default there may be as many connections of clients as leave a tenth of the descriptors for what they ask for.
func TestConnectionsLeaveDescriptors(t *testing.T) {
	const descriptors, connections = 400, 360
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, descriptors), binary, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	cmd.Env = environment()
	g := &running{child: beginCommand(t, cmd)}
	g.listening()
	g.register("echo", "a", named(t, "a"))
	var clients []net.Conn
	ask := func(conn net.Conn) int {
		t.Helper()
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		return response.StatusCode
	}
	open := func() net.Conn {
		conn, err := net.Dial("tcp", g.data)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	for range connections {
		clients = append(clients, open())
	}
	began := time.Now() // each has its request after this
	for i, c := range clients {
		if status := ask(c); status != 200 {
			t.Fatalf("connection %d of %d got %d", i+1, connections, status)
		}
	}
	status := ask(open())
	// One that was idle for two of the gateway's seconds makes room, and the first of them may have been nearly over.
	if took := time.Since(began); took > time.Second {
		t.Logf("one more got %d, %v after the first request: too late to tell", status, took)
	} else if status != 503 {
		t.Errorf("one more got %d", status)
	}
	clients[0].Close()
	eventually(t, "there is room again", func() bool { return ask(open()) == 200 })
}
