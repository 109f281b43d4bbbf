package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// binary is the program under test: this one, which runs as kerberos where the variable says so. So it is built as the test
// is, with the race detector if that is on, and a change of any package makes a cached result of the test invalid.
var binary string

const asKerberos = "TEST_RUNS_AS_KERBEROS"

func TestMain(m *testing.M) {
	if os.Getenv(asKerberos) != "" {
		os.Exit(run(os.Args[1:]))
	}
	if api := os.Getenv(asHolder); api != "" {
		os.Exit(holder(api))
	}
	if os.Getenv(asBulk) != "" {
		go endWithParent()
		os.Exit(serveBulk())
	}
	if text := os.Getenv(asSlow); text != "" {
		go endWithParent()
		os.Exit(serveSlow(text))
	}
	var err error
	if binary, err = os.Executable(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// endWithParent ends this program when the test that has started it is gone without a word.
func endWithParent() {
	for parent := os.Getppid(); os.Getppid() == parent; {
		time.Sleep(time.Second)
	}
	os.Exit(1)
}

// environment is that of this test without what would configure a gateway, with extra added, for a process that runs as
// kerberos.
func environment(extra ...string) []string {
	second := []string{"BALANCER_STRATEGY", "REQUEST_TIMEOUT", "RETRY_MAX", "BREAKER_FAILURES", "BREAKER_OPEN", "BREAKER_PROBES"}
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return strings.HasPrefix(name, "KERBEROS_") || slices.Contains(second, name)
	})
	// The race detector reports at once; it need not wait a second at each exit.
	return append(append(env, asKerberos+"=1", "GORACE=atexit_sleep_ms=0"), extra...)
}

// command runs the binary to its end, which must come within a while.
func command(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = environment(env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// transcript is what a process has printed so far.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *transcript) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *transcript) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// child is one of the binary's that runs beside the test.
type child struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr transcript
	ended          chan struct{} // closed once it has
}

func begin(t *testing.T, env []string, args ...string) *child {
	t.Helper()
	cmd := exec.Command(binary, args...)
	cmd.Env = environment(env...)
	return beginCommand(t, cmd)
}

func beginCommand(t *testing.T, cmd *exec.Cmd) *child {
	t.Helper()
	p := &child{t: t, cmd: cmd, ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("%v printed\n%s%s", cmd.Args, p.stdout.String(), p.stderr.String())
		}
		if strings.Contains(p.stderr.String(), "DATA RACE") {
			t.Errorf("a data race in %v:\n%s", cmd.Args, p.stderr.String())
		}
	})
	return p
}

func (p *child) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wait returns the exit code, for which it waits a while.
func (p *child) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatal("does not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

// running is a gateway on free ports.
type running struct {
	*child
	data, admin string // addresses
}

// launch starts a gateway on free ports of loopback and waits until it listens. Flags in args come after those.
func launch(t *testing.T, env []string, args ...string) *running {
	t.Helper()
	g := &running{child: begin(t, env, append([]string{"--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"}, args...)...)}
	g.listening()
	return g
}

// listening waits for the log lines that tell the ports.
func (g *running) listening() {
	g.t.Helper()
	eventually(g.t, "the gateway listens", func() bool {
		select {
		case <-g.ended:
			g.t.Fatalf("the gateway ended: %s", g.stderr.String())
		default:
		}
		for _, line := range g.log() {
			if line["msg"] == "listening" {
				switch line["listener"] {
				case "data":
					g.data = line["addr"].(string)
				case "admin":
					g.admin = line["addr"].(string)
				}
			}
		}
		return g.data != "" && g.admin != ""
	})
}

// log is the lines logged so far. Each must be JSON, as its output is no terminal.
func (g *running) log() []map[string]any {
	g.t.Helper()
	var all []map[string]any
	text := g.stderr.String()
	for line := range strings.Lines(text[:strings.LastIndexByte(text, '\n')+1]) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			g.t.Fatalf("log line %q: %v", line, err)
		}
		all = append(all, fields)
	}
	return all
}

// logged tells whether there is a line whose text has all words.
func (g *running) logged(words ...string) bool {
next:
	for line := range strings.Lines(g.stderr.String()) {
		for _, word := range words {
			if !strings.Contains(line, word) {
				continue next
			}
		}
		return true
	}
	return false
}

// register adds an instance by the admin listener.
func (g *running) register(service, id, addr string) {
	g.t.Helper()
	status, body := g.post(fmt.Sprintf(`{"service":%q,"id":%q,"addr":%q}`, service, id, addr))
	if status != http.StatusNoContent {
		g.t.Fatalf("registering %s/%s: %d %s", service, id, status, body)
	}
}

// post is POST /register on the admin listener.
func (g *running) post(body string) (status int, answer string) {
	g.t.Helper()
	response, text := exchange(g.t, g.admin, post(body))
	return response.StatusCode, text
}

// get is a GET on the data listener.
func (g *running) get(path string) (status int, body string) {
	g.t.Helper()
	response, text := exchange(g.t, g.data, get(path))
	return response.StatusCode, text
}

func get(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
}

// post is the request of a registration with more fields, each ended by CRLF.
func post(body string, fields ...string) string {
	return "POST /register HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n" +
		strings.Join(fields, "") + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
}

// exchange sends raw bytes on a connection of its own and reads the response to them.
func exchange(t *testing.T, addr, raw string) (*http.Response, string) {
	t.Helper()
	response, body, err := converse(&net.Dialer{}, addr, raw)
	if err != nil {
		t.Fatal(err)
	}
	return response, body
}

func converse(dialer *net.Dialer, addr, raw string) (*http.Response, string, error) {
	conn, err := dialer.Dial("tcp", addr)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return nil, "", err
	}
	if _, err := io.WriteString(conn, raw); err != nil {
		return nil, "", err
	}
	method, _, _ := strings.Cut(raw, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return nil, "", fmt.Errorf("the answer to %q: %w", raw, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response, string(body), err
}

// eventually polls until condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}
