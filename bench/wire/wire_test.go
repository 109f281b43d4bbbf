package wire

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// toy is a gateway that does nearly nothing right.
type toy struct {
	net.Listener
	serving sync.WaitGroup
}

func startToy(t *testing.T, serve func(net.Conn)) *toy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &toy{Listener: ln}
	g.serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			g.serving.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	return g
}

func (g *toy) stop() {
	g.Close()
	g.serving.Wait()
}

// pump forwards bytes: whatever the client sends reaches the origin, and the other way round.
func pump(origin string) func(net.Conn) {
	return func(c net.Conn) {
		o, err := net.Dial("tcp", origin)
		if err != nil {
			return
		}
		defer o.Close()
		var up sync.WaitGroup
		up.Go(func() {
			io.Copy(o, c)
			o.(*net.TCPConn).CloseWrite()
		})
		io.Copy(c, o)
		c.Close()
		up.Wait()
	}
}

// always answers whatever comes in one way, and asks nobody.
func always(answer string, closes bool) func(net.Conn) {
	return func(c net.Conn) {
		var in []byte
		buf := make([]byte, 64<<10)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			for in = append(in, buf[:n]...); ; {
				end := headEnd(in)
				if end < 0 {
					break
				}
				in = in[end:]
				io.WriteString(c, answer)
				if closes {
					return
				}
			}
		}
	}
}

const (
	refusal = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
	yes     = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"
)

// runToy runs cases against a toy, many at once, each with an origin and a toy of its own.
func runToy(t *testing.T, only []string, serve func(origin string) func(net.Conn)) map[string]error {
	t.Helper()
	ids := make(chan string)
	var mu sync.Mutex // guards failed
	failed := map[string]error{}
	var lanes sync.WaitGroup
	for range 16 {
		lanes.Go(func() {
			for id := range ids {
				origin, err := ListenOrigin("127.0.0.1:0")
				if err != nil {
					t.Error(err)
					continue
				}
				g := startToy(t, serve(origin.Addr()))
				r := Runner{Gateway: g.Addr().String(), Origin: origin, Only: []string{id}}
				results := r.Run(context.Background())
				origin.Close()
				g.stop()
				mu.Lock()
				for _, r := range results {
					failed[r.Case.ID] = r.Err
				}
				mu.Unlock()
			}
		})
	}
	for _, id := range only {
		ids <- id
	}
	close(ids)
	lanes.Wait()
	return failed
}

// Every row can fail: one of these gateways, which forward everything, refuse everything or make everything up, does not
// pass it.
func TestEveryRowCanFail(t *testing.T) {
	var left []string // those that all have passed so far
	for _, c := range Cases() {
		left = append(left, c.ID)
	}
	for _, serve := range []func(string) func(net.Conn){
		func(string) func(net.Conn) { return always(refusal, true) },
		func(string) func(net.Conn) { return always(yes, false) },
		pump,
	} {
		failed := runToy(t, left, serve)
		left = nil
		for id, err := range failed {
			if err == nil {
				left = append(left, id)
			}
		}
	}
	for _, id := range left {
		t.Errorf("%s: nobody fails", id)
	}
}

// What a gateway that only moves bytes does wrong is seen for what it is.
func TestPumpFails(t *testing.T) {
	rows := map[string]string{
		"cl-te":                  "Content-Length and Transfer-Encoding",
		"te-cl":                  "Content-Length and Transfer-Encoding",
		"cl-two":                 "two Content-Length",
		"cl-plus":                `Content-Length "+3"`,
		"te-twice":               "two Transfer-Encoding",
		"te-10":                  "HTTP/1.0",
		"lf-head":                "bare CR or LF",
		"cr-value":               "bare CR or LF",
		"fold":                   "field line",
		"space-colon":            "field line",
		"name-nul":               "field line",
		"value-nul":              "field value",
		"version-2.0":            "version",
		"host-none":              "0 Host fields",
		"host-two":               "2 Host fields",
		"host-userinfo":          "Host",
		"target-fragment":        "target",
		"absolute":               "target",
		"hop-nominated":          "X-Hop",
		"shadow-content-length":  "Content_Length",
		"chunk-lf-size":          "bare LF",
		"chunk-minus":            "chunk size",
		"chunk-longer":           "longer than its size",
		"trailer-framing":        "trailer",
		"status-garbage":         "status line",
		"response-fold":          "field line",
		"response-cl-te":         "Content-Length and Transfer-Encoding",
		"response-nominated":     "X-Hop",
		"chunk-bad-size":         "chunk size",
		"behind-length":          "EVIL",
		"behind-head":            "EVIL",
		"behind-204-late":        "EVIL",
		"unasked":                "EVIL",
		"101-unasked":            "101",
		"date-added":             "0 Date fields",
		"204-length":             "204",
		"http10-chunks":          "chunks",
		"http10-103":             "[103]",
		"websocket-10":           "Upgrade",
		"upgrade-h2c":            "h2c",
		"1xx-flood":              "200",
		"connect-path":           "CONNECT",
		"trace":                  "TRACE",
		"max-forwards-2":         `Max-Forwards ["2"]`,
		"stale-get":              "first",
		"close-pipelined":        "2 requests|what follows",
		"path-elsewhere-encoded": "",
		"keep-alive":             "",
		"pipeline-20":            "",
		"chunks":                 "",
		"trailer-forwarded":      "",
		"103-early":              "",
		"both-ways":              "",
		"sse-chunks":             "",
		"websocket":              "",
		"early-413":              "",
		"cut-length":             "",
		"client-leaves":          "",
	}
	var only []string
	for id := range rows {
		only = append(only, id)
	}
	failed := runToy(t, only, pump)
	for id, want := range rows {
		err, ran := failed[id]
		switch {
		case !ran:
			t.Errorf("there is no %s", id)
		case want == "" && err != nil:
			t.Errorf("%s failed: %v", id, err)
		case want != "" && err == nil:
			t.Errorf("%s passed, want %q", id, want)
		case want != "":
			found := false
			for word := range strings.SplitSeq(want, "|") {
				found = found || strings.Contains(err.Error(), word)
			}
			if !found {
				t.Errorf("%s: %q, want %q", id, err, want)
			}
		}
	}
}

// The table says what it must of each row, and nothing twice.
func TestCases(t *testing.T) {
	seen := map[string]bool{}
	sections := map[string]int{}
	for _, c := range Cases() {
		if seen[c.ID] {
			t.Errorf("%s is there twice", c.ID)
		}
		seen[c.ID] = true
		sections[c.Section]++
		if c.Source == "" || c.Says == "" || c.Want == nil || len(c.Client) == 0 || !isToken(c.ID) {
			t.Errorf("%s: %+v", c.ID, c)
		}
	}
	for _, s := range Sections() {
		if sections[s] == 0 {
			t.Errorf("%s is empty", s)
		}
		delete(sections, s)
	}
	if len(sections) > 0 || len(seen) < 400 {
		t.Errorf("%d rows; sections that are not listed: %v", len(seen), sections)
	}
}

func TestTables(t *testing.T) {
	a := &Case{ID: "a", Section: heads, Source: "RFC 1", Level: Must, Says: "x"}
	b := &Case{ID: "b", Section: limits, Source: "RFC 2", Level: Should, Says: "y"}
	columns := []Column{
		{"one 1.0", []Result{{a, nil}, {b, nil}}},
		{"two 2.0", []Result{{a, errShort}, {b, nil}}},
	}
	want := "| passed of all | one 1.0 | two 2.0 |\n| --- | --- | --- |\n" +
		"| Request heads, must | 1 of 1 | 0 of 1 |\n| Limits, should | 1 of 1 | 1 of 1 |\n| All, must | 1 of 1 | 0 of 1 |\n| All, should | 1 of 1 | 1 of 1 |\n" +
		"\n| case | source | what must happen | one | two |\n| --- | --- | --- | --- | --- |\n| a | RFC 1 | x |  | not all of it is there |\n"
	if got := string(Markdown(columns)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	var text bytes.Buffer
	if err := Print(&text, columns); err != nil || !strings.Contains(text.String(), "not all of it is there") {
		t.Errorf("%v\n%s", err, &text)
	}
	if columns[1].Failed(Must) != 1 || columns[1].Failed(Should) != 0 || columns[0].Failed(Must) != 0 {
		t.Error("failures are miscounted")
	}
}
