package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// The flags of the access log, of request ids and of traces are obeyed, and so is SIGUSR1.
func TestLogFlags(t *testing.T) {
	var traces atomic.Int64
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if body, err := io.ReadAll(r.Body); err == nil && strings.Contains(string(body), "/echo/traced") && r.URL.Path == "/v1/traces" {
			traces.Add(1)
		}
	}))
	defer collector.Close()
	path := filepath.Join(t.TempDir(), "access.log")
	g := launch(t, []string{"OTEL_BSP_SCHEDULE_DELAY=20"}, "--access-log", path, "--access-log-format", "combined", "--request-id",
		"--otlp-endpoint", collector.URL, "--trace-sample", "100%")
	g.register("echo", "a", named(t, "a"))
	has := func(file, words string) func() bool {
		return func() bool {
			text, err := os.ReadFile(file)
			return err == nil && strings.Contains(string(text), words)
		}
	}
	if response, _ := exchange(t, g.data, get("/echo/traced")); response.Header.Get("X-Request-Id") == "" {
		t.Errorf("there is no X-Request-Id: %v", response.Header)
	}
	eventually(t, "the request is logged", has(path, `"GET /echo/traced HTTP/1.1" 200 `))
	eventually(t, "the request is traced", func() bool { return traces.Load() > 0 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	g.signal(syscall.SIGUSR1)
	eventually(t, "the file is made anew", func() bool { _, err := os.Stat(path); return err == nil })
	g.get("/echo/last") // and written when the process ends
	g.signal(syscall.SIGTERM)
	if code := g.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if !has(path, "/echo/last")() {
		t.Error("the last line is lost")
	}

	quiet := launch(t, nil)
	quiet.signal(syscall.SIGUSR1) // which does nothing
	if status, _ := quiet.get("/echo"); status != 503 {
		t.Errorf("status %d", status)
	}
	if _, errs, code := command(t, nil, "--listen", "127.0.0.1:0", "--admin", "off", "--access-log", t.TempDir()); code != 1 || !strings.Contains(errs, "--access-log") {
		t.Errorf("a folder as the log: %d %s", code, errs)
	}
}
