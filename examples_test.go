package main

import (
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Each example registers itself, outlives its lease, answers through the gateway, and has left before it ends.
func TestExamples(t *testing.T) {
	program := filepath.Join(t.TempDir(), "go")
	if out, err := exec.Command("go", "build", "-o", program, "./examples/go").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, row := range []struct {
		name  string
		needs []string
		start func(api, free string) *exec.Cmd
		says  string
	}{
		{"go", nil, func(api, _ string) *exec.Cmd { return exec.Command(program, "--gateway", api) }, "hello from Go\n"},
		{"python", []string{"python3"}, func(api, _ string) *exec.Cmd { return exec.Command("python3", "examples/python/service.py", api) }, "hello from Python\n"},
		{"shell", []string{"sh", "curl"}, func(api, free string) *exec.Cmd {
			cmd := exec.Command("sh", "examples/shell/service.sh", "hello", "http://"+free, binary, "backend", "--listen", free, "--name", "shell")
			cmd.Env = environment("GATEWAY=" + api)
			return cmd
		}, "backend shell\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for _, tool := range row.needs {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skip(err)
				}
			}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ln.Close()
			g := launch(t, nil)
			p := beginCommand(t, row.start("http://"+g.admin, ln.Addr().String()))
			answers := func() bool {
				status, body := g.get("/hello")
				return status == http.StatusOK && strings.HasPrefix(body, row.says)
			}
			eventually(t, "it answers", answers)
			for began := time.Now(); time.Since(began) < 7*time.Second; time.Sleep(100 * time.Millisecond) { // longer than its lease
				if !answers() {
					t.Fatalf("no answer after %v", time.Since(began))
				}
			}
			p.signal(syscall.SIGTERM)
			if code := p.wait(); code != 0 {
				t.Errorf("it ended with %d", code)
			}
			if !g.logged(`"action":"drain"`, `"instance":"hello/`) {
				t.Error("it did not drain")
			}
			if status, _ := g.get("/hello"); status != http.StatusServiceUnavailable {
				t.Errorf("status %d once it has ended", status)
			}
			if _, text := exchange(t, g.admin, get("/services")); text != fmt.Sprintf("{%q:[]}\n", "services") {
				t.Error(text) // nothing left, nothing expired
			}
		})
	}
}
