package proxy

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"kerberos/cb"
)

// script is what a client sends on one connection, in which segments.
type script struct {
	requests []string
	segments []string
	heads    []bool // which requests are HEAD
}

// newScript makes a script up from a seed. What would depend on time is left out: what is sent behind a request that ends
// the connection, bodies that nobody reads, 100-continue.
func newScript(seed uint64) *script {
	r := rand.New(rand.NewPCG(seed, 0))
	s := &script{}
	for n := 1 + r.IntN(6); len(s.requests) < n; {
		method := pick(r, "GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
		path := pick(r,
			"/echo/length/0", "/echo/length/5", "/echo/length/1000", fmt.Sprint("/echo/length/", r.IntN(70_000)), fmt.Sprint("/echo/length/", maxWhole+r.IntN(3)-1), fmt.Sprint("/echo/length/", r.IntN(400_000)),
			"/echo/chunked/0", "/echo/chunked/700", fmt.Sprint("/echo/chunked/", r.IntN(100_000)), "/echo/until/300", "/echo/until10/300", "/echo/204", "/echo/304", "/echo/interim", "/echo/503",
			"/echo/extra", "/echo/last", "/echo/bad", "/echo/10", "/echo/10keep", "/echo/slow", "/echo/split", "/echo/split/chunked", "/echo/tall", "/echo/toohigh",
			"/echo/query?a=b&c", "http://other.test/echo/absolute", "/echo/%7e/a%20b", "/nowhere", "/", "*", "/echo/../nowhere")
		version, last, body := "1.1", false, ""
		lines := []string{"Host: " + pick(r, "a", "a.test:8080", "[::1]:80")}
		switch r.IntN(12) {
		case 0:
			version, path = "1.0", "/echo/length/80000" // an answer without a length would end the connection
			lines = append(lines, "Connection: keep-alive")
		case 1:
			if len(s.requests) == n-1 {
				version, last = "1.0", true
			}
		case 2:
			if len(s.requests) == n-1 {
				lines, last = append(lines, "Connection: close"), true
			}
		}
		for range r.IntN(3) {
			lines = append(lines, pick(r, "X-A: b", "Connection: x-a, keep-alive", "TE: trailers", "Accept-Encoding: gzip", "X-Forwarded-For: 10.0.0.1", "Via: 1.1 b", "X_A: c",
				"Forwarded: for=10.0.0.1", "Proxy-Connection: x", "Keep-Alive: timeout=5", "Cookie: "+strings.Repeat("c", r.IntN(6000)), "Upgrade: h2c", "Max-Forwards: 5"))
		}
		if forwarded := strings.Contains(path, "/echo/") && !strings.Contains(path, ".."); forwarded && method != "GET" && method != "HEAD" {
			body = filler([]int{0, 1, 300, firstBuffer, firstBuffer + 1, 5000, 40_000, 70_000, 150_000}[r.IntN(9)])
			if version == "1.1" && r.IntN(3) == 0 {
				lines = append(lines, "Transfer-Encoding: chunked")
				body = inChunks(body, 1+r.IntN(9000))
			} else {
				lines = append(lines, fmt.Sprint("Content-Length: ", len(body)))
			}
		}
		broken := r.IntN(25) == 0
		if broken {
			lines = append(lines, pick(r, "X A: b", "Content-Length: 5x", "Host: twice", "X-A: b\r\n folded", "X-A: \x01"))
			body = ""
		}
		request := pick(r, "", "", "", "", "\r\n") + method + " " + path + " HTTP/" + version + "\r\n" + fieldLines(lines) + "\r\n" + body
		s.requests = append(s.requests, request)
		s.heads = append(s.heads, method == "HEAD")
		if last || broken {
			break
		}
	}
	all := strings.Join(s.requests, "")
	for segments := []int{1, 1, 2, 5, 20}[r.IntN(5)]; segments > 1 && len(all) > 1; segments-- {
		n := 1 + r.IntN(min(len(all)-1, 2*len(all)/segments))
		s.segments = append(s.segments, all[:n])
		all = all[n:]
	}
	s.segments = append(s.segments, all)
	return s
}

func pick(r *rand.Rand, list ...string) string { return list[r.IntN(len(list))] }

// answersScripts answers by the path.
func answersScripts(o *origin, c net.Conn, r *bufio.Reader) {
	for {
		m, err := o.next(r)
		if err != nil {
			return
		}
		parts := strings.Split(strings.Fields(m.head)[1]+"///", "/")
		size := 0
		fmt.Sscan(parts[3], &size)
		body := filler(size)
		method := strings.Fields(m.head)[0]
		of := fmt.Sprintf("X-Of: %s %d\r\n", method, len(m.body))
		if method == "HEAD" {
			body = ""
		}
		var out []string // the parts that are sent apart
		keep := true
		switch parts[2] {
		case "length":
			out = []string{fmt.Sprintf("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", of, size, body)}
		case "chunked":
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "Transfer-Encoding: chunked\r\n\r\n", inChunks(body, 5000)}
			if method == "HEAD" {
				out = out[:1]
			}
		case "until":
			out, keep = []string{"HTTP/1.1 200 OK\r\n" + of + "Connection: close\r\n\r\n" + body}, false
		case "until10":
			out, keep = []string{"HTTP/1.0 200 OK\r\n" + of + "\r\n", body}, false
		case "204", "304":
			out = []string{"HTTP/1.1 " + parts[2] + " None\r\n" + of + "\r\n"}
		case "interim":
			out = []string{"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", "HTTP/1.1 200 OK\r\n" + of + "Content-Length: 0\r\n\r\n"}
		case "503":
			out = []string{"HTTP/1.1 503 Not Now\r\n" + of + "Retry-After: 7\r\nContent-Length: 0\r\n\r\n"}
		case "extra":
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "Content-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"}
		case "last":
			out, keep = []string{"HTTP/1.1 200 OK\r\n" + of + "Content-Length: 0\r\nConnection: close\r\n\r\n"}, false
		case "bad":
			out, keep = []string{"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n"}, false
		case "10":
			out, keep = []string{"HTTP/1.0 200 OK\r\n" + of + "Content-Length: 0\r\n\r\n"}, false
		case "10keep":
			out = []string{"HTTP/1.0 200 OK\r\n" + of + "Content-Length: 0\r\nConnection: keep-alive\r\n\r\n"}
		case "slow":
			time.Sleep(4 * time.Millisecond)
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "Content-Length: 0\r\n\r\n"}
		case "split":
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "Content-", "Length: 0\r\n\r", "\n"}
			if parts[3] == "chunked" {
				out = []string{"HTTP/1.1 200 OK\r\n" + of + "Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n5\r", "\nhello\r\n0\r\n", "X-T: u\r\n\r\n"}
				if method == "HEAD" {
					out = []string{"HTTP/1.1 200 OK\r\n" + of + "Transfer-Encoding: chunked\r\n\r\n"}
				}
			}
		case "tall":
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "X-A: " + strings.Repeat("a", 25_000) + "\r\nConnection: x-b\r\nX-B: c\r\nContent-Length: 0\r\n\r\n"}
		case "toohigh":
			out, keep = []string{"HTTP/1.1 200 OK\r\n" + of + "X-A: " + strings.Repeat("a", 33_000) + "\r\nContent-Length: 0\r\n\r\n"}, false
		default:
			out = []string{"HTTP/1.1 200 OK\r\n" + of + "Content-Length: 0\r\n\r\n"}
		}
		for i, part := range out {
			if i > 0 {
				time.Sleep(300 * time.Microsecond)
			}
			if _, err := io.WriteString(c, part); err != nil {
				return
			}
		}
		if !keep {
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, r) // a reset could overtake the answer
			return
		}
	}
}

var dateField = regexp.MustCompile(`(?m)^Date: .*\r\n`)

// play plays a script, and returns what the client has read and what the backend has.
func (s *script) play(t testing.TB, c *client, o *origin) (got, seen []string) {
	t.Helper()
	o.mu.Lock()
	o.seen = nil
	o.mu.Unlock()
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		for i, segment := range s.segments {
			if i > 0 {
				time.Sleep(100 * time.Microsecond)
				runtime.Gosched()
			}
			if _, err := io.WriteString(c.Conn, segment); err != nil {
				return
			}
		}
		c.Conn.(*net.TCPConn).CloseWrite()
	}()
	for finals := 0; ; {
		m, err := readMessage(c.r, finals < len(s.heads) && s.heads[finals])
		if err != nil && m.head == "" {
			if err != io.EOF {
				got = append(got, err.Error())
			}
			break
		}
		got = append(got, fmt.Sprintf("%s%d bytes %s, trailer %q, %v", dateField.ReplaceAllString(m.head, ""), len(m.body), shortened(m.body), m.trailer, err))
		if err != nil {
			break
		}
		if m.status() >= 200 {
			finals++
		}
	}
	<-wrote
	c.Close()
	for _, m := range o.requests() {
		seen = append(seen, fmt.Sprintf("%s%d bytes %s, trailer %q", m.head, len(m.body), shortened(m.body), m.trailer))
	}
	return got, seen
}

func shortened(body string) string {
	if len(body) < 100 {
		return body
	}
	if body == filler(len(body)) {
		return "filler"
	}
	return body
}

// What a client gets and what a backend sees is the same whether loops serve a connection or goroutines do.
func FuzzLoopsAgainstGoroutines(f *testing.F) {
	for seed := range uint64(150) {
		f.Add(seed)
	}
	g := startLoops(f, 1, func(cfg *Config) { cfg.Breaker = cb.Config{Failures: 1 << 20} }, nil)
	g.waits(2 * time.Millisecond)
	o := startOrigin(f, answersScripts)
	g.register(f, "echo", "a", o.url())
	f.Fuzz(func(t *testing.T, seed uint64) {
		s := newScript(seed)
		c, _ := g.dialCounted(t)
		got, seen := s.play(t, c, o)
		for range 2 { // of which the first may have to connect
			gotLoop, seenLoop := s.play(t, g.dial(t), o)
			for what, lists := range map[string][2][]string{"the client got": {gotLoop, got}, "the backend saw": {seenLoop, seen}} {
				for i := range max(len(lists[0]), len(lists[1])) {
					a, b := "nothing", "nothing"
					if i < len(lists[0]) {
						a = lists[0][i]
					}
					if i < len(lists[1]) {
						b = lists[1][i]
					}
					if a != b {
						t.Errorf("message %d of %d that %s:\n%.3000s\nwith goroutines:\n%.3000s", i, len(s.requests), what, a, b)
					}
				}
			}
		}
		if len(got) == 0 {
			t.Error("no answer at all")
		}
		if s := g.DescribeInstance("echo", "a"); s.InFlight != 0 {
			eventually(t, "nothing is under way", func() bool { return g.DescribeInstance("echo", "a").InFlight == 0 })
		}
		g.sound(t)
	})
}
