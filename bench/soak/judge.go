package soak

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// answer is what a client got.
type answer struct {
	status int    // 0: none
	cause  string // with a status, the error of Proxy-Status; without, or if ended is set, how the connection ended
	ended  bool   // the response began, but did not come to its end
	wrong  string // what of it is not what was sent; always a violation
}

// outcome is what answers are counted by: "200", "502 connection_refused", "cut 200" for a response that ended early, or
// how the connection ended without one: "closed", "reset", "timeout".
func (a answer) outcome() string {
	switch {
	case a.wrong != "":
		return "wrong"
	case a.ended && a.cause == "timeout":
		return fmt.Sprintf("hung %d", a.status)
	case a.ended:
		return fmt.Sprintf("cut %d", a.status)
	case a.status == 0:
		return a.cause
	case a.cause != "":
		return fmt.Sprintf("%d %s", a.status, a.cause)
	}
	return fmt.Sprint(a.status)
}

// failed tells whether an outcome is none that a client hopes for.
func failed(outcome string) bool {
	return !slices.Contains([]string{"101", "200", "204", left}, outcome)
}

// left is the outcome where the client went away by itself.
const left = "left"

// right reports whether an answer is one of those allowed. An outcome that ends in * stands for all that begin like it.
func right(allowed []string, a answer) bool {
	got := a.outcome()
	return got != "wrong" && slices.ContainsFunc(allowed, func(want string) bool {
		prefix, open := strings.CutSuffix(want, "*")
		return got == want || open && strings.HasPrefix(got, prefix)
	})
}

// ending names how a connection ended.
func ending(err error) string {
	var ne net.Error
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "closed"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.As(err, &ne) && ne.Timeout():
		return "timeout"
	}
	return err.Error()
}

// maxTold is how many violations are told in full.
const maxTold = 50

// tally counts answers and keeps what is wrong.
type tally struct {
	log func(format string, args ...any)

	mu       sync.Mutex // guards the fields below
	outcomes map[string]map[string]int
	found    int // violations
	told     []string
}

// add judges an answer to a kind of client.
func (t *tally) add(kind string, allowed []string, what string, a answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.outcomes == nil {
		t.outcomes = map[string]map[string]int{}
	}
	if t.outcomes[kind] == nil {
		t.outcomes[kind] = map[string]int{}
	}
	t.outcomes[kind][a.outcome()]++
	if !right(allowed, a) {
		how := a.wrong
		if a.ended {
			how = a.cause
		}
		t.report("%s: %s: %s %s", kind, what, a.outcome(), how)
	}
}

// violation keeps what is wrong beside the answers.
func (t *tally) violation(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.report(format, args...)
}

// report is called with mu held.
func (t *tally) report(format string, args ...any) {
	if t.found++; t.found <= maxTold {
		what := strings.TrimSpace(fmt.Sprintf(format, args...))
		t.told = append(t.told, what)
		t.log("%s", what)
	}
}
