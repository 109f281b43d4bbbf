package soak

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
)

// What a client reads becomes an outcome, and the outcome is judged.
func TestJudge(t *testing.T) {
	const uri = "/steady/get/7"
	body := shortBody("GET", uri)
	answered := func(path, body string) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", pathField, path, len(body), body)
	}
	refused := "HTTP/1.1 502 Bad Gateway\r\nProxy-Status: kerberos; error=connection_refused; next-hop=x\r\nContent-Length: 3\r\n\r\nno\n"
	tests := []struct {
		name, wire string
		allowed    []string
		outcome    string
		right      bool
	}{
		{"right", answered(uri, body), []string{"200"}, "200", true},
		{"right, but not allowed", answered(uri, body), []string{"408 *"}, "200", false},
		{"another's answer", answered("/steady/get/8", body), []string{"200"}, "wrong", false},
		{"another's body", answered(uri, shortBody("GET", "/steady/get/8")), []string{"200"}, "wrong", false},
		{"nothing allows wrong bytes", answered(uri, "x"+body[1:]), []string{"*", "wrong"}, "wrong", false},
		{"too short, and not to be seen", answered(uri, body[:20]), []string{"200"}, "wrong", false},
		{"too long", answered(uri, body+"x"), []string{"200"}, "wrong", false},
		{"cut", answered(uri, body)[:120], []string{"200", "cut 200"}, "cut 200", true},
		{"cut, and not allowed", answered(uri, body)[:120], []string{"200"}, "cut 200", false},
		{"refused", refused, []string{"200", "502 *"}, "502 connection_refused", true},
		{"refused for another reason", refused, []string{"200", "502 connection_terminated"}, "502 connection_refused", false},
		{"closed", "", []string{"closed"}, "closed", true},
		{"closed within the head", "HTTP/1.1 200", []string{"200"}, "closed", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r, a := response(bufio.NewReader(strings.NewReader(test.wire)), "GET", uri)
			if r != nil {
				a = verifyShort(r.Body, a, "GET", uri)
			}
			if a.outcome() != test.outcome || right(test.allowed, a) != test.right {
				t.Errorf("%q, right %v; want %q, %v (%+v)", a.outcome(), right(test.allowed, a), test.outcome, test.right, a)
			}
		})
	}
}

func TestBackendAnswer(t *testing.T) {
	for body, want := range map[string]string{
		"backend a\nGET /killed/get/7\nHost: x\n":  "200",
		"backend a\nGET /killed/get/77\nHost: x\n": "wrong",
		"backend a\nPOST /killed/get/7\n":          "wrong",
	} {
		if a := verifyBackend(strings.NewReader(body), answer{status: 200}, "GET", "/killed/get/7"); a.outcome() != want {
			t.Errorf("%q: %s, want %s", body, a.outcome(), want)
		}
	}
}

// A hang is another thing than an end.
func TestEnding(t *testing.T) {
	for err, want := range map[error]string{
		io.EOF:                                   "closed",
		fmt.Errorf("x: %w", io.ErrUnexpectedEOF): "closed",
		syscall.ECONNRESET:                       "reset",
		syscall.EPIPE:                            "reset",
		syscall.ETIMEDOUT:                        "timeout",
		fmt.Errorf("something else"):             "something else",
	} {
		if got := ending(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
	if got := (answer{status: 200, ended: true, cause: "timeout"}).outcome(); got != "hung 200" || right([]string{"cut 200"}, answer{status: 200, ended: true, cause: "timeout"}) {
		t.Error(got)
	}
}

func TestTally(t *testing.T) {
	logged := 0
	ta := tally{log: func(string, ...any) { logged++ }}
	ta.add("GET", []string{"200"}, "/a", answer{status: 200})
	if ta.found != 0 || ta.outcomes["GET"]["200"] != 1 {
		t.Errorf("%+v", ta.outcomes)
	}
	for range maxTold + 10 {
		ta.add("GET", []string{"200"}, "/a", answer{status: 503, cause: "destination_unavailable"})
	}
	if ta.found != maxTold+10 || len(ta.told) != maxTold || logged != maxTold || ta.told[0] != "GET: /a: 503 destination_unavailable" {
		t.Errorf("%d found, %d told, %d logged: %q", ta.found, len(ta.told), logged, ta.told[0])
	}
}

// A stream is the same on both sides, another one for each request, and known from its prefix, its end and other bytes.
func TestStream(t *testing.T) {
	pattern := newPattern(1)
	if bytes.Equal(pattern, newPattern(2)) {
		t.Error("the seed does not matter")
	}
	const n = 3*patternSize + 5
	whole, err := io.ReadAll(newStream(pattern, 7, n))
	if err != nil || len(whole) != n {
		t.Fatal(len(whole), err)
	}
	if s := newStream(pattern, 7, n); !s.matches(whole[:1000]) || !s.matches(whole[1000:]) || s.left != 0 {
		t.Error("not the same bytes on both sides")
	}
	if newStream(pattern, 8, n).matches(whole[:100]) {
		t.Error("another request has the same bytes")
	}
	if newStream(pattern, 7, n).matches(append(whole, 'x')) {
		t.Error("bytes behind the end match")
	}
	whole[n-1]++
	if newStream(pattern, 7, n).matches(whole) {
		t.Error("a changed byte matches")
	}
}

func TestLeaks(t *testing.T) {
	for _, test := range []struct {
		from, to int
		leak     bool
	}{{20 << 10, 116 << 10, false}, {20 << 10, 117 << 10, true}, {40 << 10, 20 << 10, false}} {
		if got := leaks(test.from, test.to); got != test.leak {
			t.Errorf("%d to %d KiB: %v", test.from, test.to, got)
		}
	}
}

// All kinds have a name of their own, and can run.
func TestKinds(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range kinds(100) {
		if seen[k.name] || k.run == nil || k.rate <= 0 || k.width < 1 || len(k.right) == 0 {
			t.Errorf("%+v", k)
		}
		seen[k.name] = true
	}
}
