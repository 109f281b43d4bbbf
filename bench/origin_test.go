package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// newOrigin starts an origin as the command does: as a process of its own.
func newOrigin(t *testing.T, size int) *running {
	t.Helper()
	p, addrs, err := startOrigin(t.Context(), nil, size, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	return &running{process: p, addr: addrs[0]}
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func send(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

// expect reads n answers with a body of that size.
func expect(t *testing.T, br *bufio.Reader, n, size int) {
	t.Helper()
	for i := range n {
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatalf("answer %d of %d: %v", i+1, n, err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 || resp.Header.Get("Date") == "" || !bytes.Equal(body, bytes.Repeat([]byte("x"), size)) {
			t.Fatalf("answer %d of %d: %d %v, %d bytes, %v", i+1, n, resp.StatusCode, resp.Header, len(body), err)
		}
	}
}

const (
	get  = "GET /bench/hello HTTP/1.1\r\nHost: a\r\n\r\n"
	post = "POST /bench/hello HTTP/1.1\r\nHost: a\r\ncontent-length:  10 \r\nX-Other: b\r\n\r\n0123\r\n\r\n89"
)

func TestOriginAnswers(t *testing.T) {
	t.Parallel()
	o := newOrigin(t, 12)
	for _, test := range []struct {
		name  string
		sends []string
		want  int
	}{
		{"one after the other", []string{get, get, post, get}, 4},
		{"pipelined", []string{strings.Repeat(get+post, 50)}, 100},
		{"in single bytes", strings.Split(get+post+get, ""), 3},
		{"body apart", []string{post[:len(post)-10], post[len(post)-10:] + get}, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, o.addr)
			for _, s := range test.sends {
				send(t, c, s)
			}
			br := bufio.NewReader(c)
			expect(t, br, test.want, 12)
			send(t, c, get) // nothing was answered twice, and the connection is still good
			expect(t, br, 1, 12)
			if br.Buffered() > 0 {
				t.Error("more answers than requests")
			}
		})
	}
}

func TestOriginWaitsForTheWholeRequest(t *testing.T) {
	t.Parallel()
	o := newOrigin(t, 12)
	for _, part := range []string{get[:len(get)-1], post[:len(post)-1]} {
		c := dial(t, o.addr)
		send(t, c, part)
		c.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%q: answered before it was complete", part)
		}
	}
}

func TestOriginRefuses(t *testing.T) {
	t.Parallel()
	o := newOrigin(t, 12)
	for name, s := range map[string]string{
		"chunked":         "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":     "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n0",
		"negative length": "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
		"endless head":    "GET / HTTP/1.1\r\nA: " + strings.Repeat("a", maxHead+1),
	} {
		c := dial(t, o.addr)
		io.WriteString(c, s) // may be refused half-way
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%s: answered", name)
		} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Errorf("%s: not closed", name)
		}
	}
	c := dial(t, o.addr)
	send(t, c, get)
	expect(t, bufio.NewReader(c), 1, 12)
}

// Responses that do not fit into the socket are written when there is room, and in full.
func TestOriginLargeResponses(t *testing.T) {
	t.Parallel()
	const size = 3<<20 + 7
	o := newOrigin(t, size)
	slow, other := dial(t, o.addr), dial(t, o.addr)
	send(t, slow, strings.Repeat(get, 5))
	send(t, other, get) // does not wait for the slow one
	expect(t, bufio.NewReader(other), 1, size)
	br := bufio.NewReader(slow)
	expect(t, br, 5, size)
	send(t, slow, get+get) // and reads again
	expect(t, br, 2, size)
}

func TestOriginManyConnections(t *testing.T) {
	t.Parallel()
	o := newOrigin(t, 12)
	conns := make([]net.Conn, 2000)
	for i := range conns {
		conns[i] = dial(t, o.addr)
	}
	for _, c := range conns {
		send(t, c, get[:7])
	}
	for _, c := range conns {
		send(t, c, get[7:])
	}
	for i, c := range conns {
		expect(t, bufio.NewReader(c), 1, 12)
		if i%2 == 0 {
			c.Close() // their numbers are given to others
		}
	}
	c := dial(t, o.addr)
	send(t, c, get)
	expect(t, bufio.NewReader(c), 1, 12)
	n, err := accepted(t.Context(), o.addr)
	if err != nil || n != len(conns)+2 {
		t.Errorf("%d connections counted, %v, want %d", n, err, len(conns)+2)
	}
}

func TestOriginAddresses(t *testing.T) {
	t.Parallel()
	p, addrs, err := startOrigin(t.Context(), nil, 12, 3)
	if err != nil || len(addrs) != 3 {
		t.Fatalf("%q %v", addrs, err)
	}
	defer p.stop()
	for _, addr := range addrs {
		c := dial(t, addr)
		send(t, c, get)
		expect(t, bufio.NewReader(c), 1, 12)
	}
	if n, err := accepted(t.Context(), addrs[0]); err != nil || n != 4 {
		t.Errorf("%d connections counted, %v, want 4", n, err)
	}
}

func TestOriginMirrors(t *testing.T) {
	t.Parallel()
	o := newOrigin(t, 12)
	c := dial(t, o.addr)
	head := "GET /x" + mirrorQuery + " HTTP/1.1\r\nHost: a\r\nX-Some-Thing: b\r\n\r\n"
	send(t, c, head)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(body), "X-Some-Thing: b\r\n") || resp.Header.Get(acceptedHeader) != "1" {
		t.Errorf("%q %q %v", body, resp.Header, err)
	}
}

// However the bytes are cut into pieces, the same requests come out.
func FuzzRequests(f *testing.F) {
	for _, s := range []string{get, post, get + post + get, post + post[:20], "\r\n\r\n\r\n\r\n", "A: b\r\nContent-Length: 3\r\n\r\nab",
		"Content-Length: 1\r\n\r\n\r\r\n\r\n", "Transfer-Encoding: x\r\n\r\n", "Content-Length: 0\r\n\r\n" + get, "Content-Length: 99999999999\r\n\r\n"} {
		f.Add([]byte(s), uint8(1), uint8(3))
		f.Add([]byte(s), uint8(17), uint8(2))
	}
	f.Fuzz(func(t *testing.T, stream []byte, first, then uint8) {
		var whole, pieces []string
		var a, b requests
		errA := a.feed(stream, func(head []byte) { whole = append(whole, string(head)) })
		var errB error
		size := int(first)
		for rest := stream; len(rest) > 0 && errB == nil; size = int(then) {
			n := min(max(size, 1), len(rest))
			errB = b.feed(slices.Clone(rest[:n]), func(head []byte) { pieces = append(pieces, string(head)) })
			rest = rest[n:]
		}
		if !slices.Equal(whole, pieces) || fmt.Sprint(errA) != fmt.Sprint(errB) {
			t.Fatalf("whole: %q %v; in pieces: %q %v", whole, errA, pieces, errB)
		}
		for _, head := range whole {
			if !strings.HasSuffix(head, "\r\n\r\n") || strings.Count(head, "\r\n\r\n") != 1 || !bytes.Contains(stream, []byte(head)) {
				t.Fatalf("not a head: %q", head)
			}
		}
		if a.body != b.body || errA == nil && !bytes.Equal(a.head, b.head) {
			t.Fatalf("left over: %q %d, %q %d", a.head, a.body, b.head, b.body)
		}
	})
}
