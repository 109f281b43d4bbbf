package accesslog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"kerberos/proxy"
)

// bytewise is the string that a field of JSON stands for: each byte is one character.
func bytewise(b []byte) string {
	runes := make([]rune, min(len(b), maxField))
	for i := range runes {
		runes[i] = rune(b[i])
	}
	return string(runes)
}

// Whatever a client sends: a line is one line in visible ASCII, and says exactly that.
func FuzzEncoder(f *testing.F) {
	f.Add([]byte("GET"), []byte("/a?b=\"c\\"), []byte("Mozilla/5.0"), []byte("http://a/\r\n{\"x\":1}"), []byte("id"), int64(1), int64(2))
	f.Add([]byte("\x00"), []byte("\xff\x80\x7f\x1f "), []byte("12345678\x7f"), []byte("1234567\xe9"), []byte{}, int64(-1), int64(1<<62))
	f.Add([]byte("M"), bytes.Repeat([]byte("\""), 10_000), bytes.Repeat([]byte("a"), 10_000), []byte{}, []byte{}, int64(0), int64(0))
	f.Add(bytes.Repeat([]byte("M"), maxField+1), []byte("/"), []byte{}, []byte{}, []byte{}, int64(0), int64(1))
	e := &encoder{format: JSON} // keeps what it has seen
	f.Fuzz(func(t *testing.T, method, target, agent, referer, id []byte, began, took int64) {
		r := &proxy.Record{
			Began: time.Unix(began%1e11, began%1e9), Took: time.Duration(took & (1<<62 - 1)), Client: netip.MustParseAddr("::1"),
			Method: method, Target: target, Host: target, UserAgent: agent, Referer: referer, RequestID: id, Reason: string(id),
			Route: string(target), Status: 200,
		}
		line := e.append(nil, r)
		if again := e.append(nil, r); string(again) != string(line) {
			t.Fatalf("%q, and again %q", line, again)
		}
		oneLine(t, line)
		var got map[string]any
		if err := json.Unmarshal(line, &got); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		wanted := map[string][]byte{"user_agent": agent, "referer": referer, "request_id": id, "reason": id, "route": target}
		if len(method) > 0 {
			wanted["method"], wanted["path"], wanted["host"] = method, target, target
		}
		for name, want := range wanted {
			if s, _ := got[name].(string); s != bytewise(want) {
				t.Errorf("%s is %q, want %q", name, s, bytewise(want))
			}
		}
		line = (&encoder{format: Combined}).append(nil, r)
		oneLine(t, line)
		if n := bytes.Count(line, []byte{'"'}); n != 6 {
			t.Errorf("%d quotes in %q", n, line)
		}
	})
}

// plain sees each byte at each place, also beside others that are to be seen.
func TestPlain(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for length := range 80 {
		for at := range length {
			for c := range 256 {
				s := make([]byte, length)
				for i := range s {
					s[i] = " azAZ09!#[]~"[random.IntN(12)]
				}
				s[at] = byte(c)
				if other := random.IntN(2 * length); other < length {
					s[other] = byte(random.IntN(256))
				}
				want := bytes.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' })
				if want < 0 {
					want = length
				}
				if got := plain(s); got != want {
					t.Fatalf("%d of %q, want %d", got, s, want)
				}
			}
		}
	}
}

func oneLine(t *testing.T, line []byte) {
	t.Helper()
	for i, c := range line {
		if last := i == len(line)-1; last != (c == '\n') || !last && (c < ' ' || c > '~') {
			t.Fatalf("byte %d of %q", i, line)
		}
	}
}

// Lines that pass through a ring stay whole and in order, and those that find no room are not there at all.
func TestRing(t *testing.T) {
	var r ring
	var wg sync.WaitGroup
	const lines = 200_000
	lost := map[int]bool{}
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		random := rand.New(rand.NewPCG(1, 2))
		for i := range lines {
			room := r.room()
			if room == nil {
				lost[i] = true
				continue
			}
			n := random.IntN(100) + 1
			if i%2000 == 0 { // longer than what it must find
				n = random.IntN(ringSize/2) + 1
			}
			lost[i] = !r.put(room, fmt.Appendf(room, "%d %0*d\n", i, n, 0))
		}
	})
	var got []byte
	for over := false; !over; {
		select {
		case <-done:
			over = true
		default:
		}
		parts, upTo := r.waiting()
		for _, part := range parts {
			if len(part) > 0 && part[len(part)-1] != '\n' {
				t.Fatal("a part that ends within a line")
			}
			got = append(got, part...)
		}
		r.took(upTo)
	}
	wg.Wait()
	n := 0
	for i := range lines {
		if lost[i] {
			continue
		}
		end := bytes.IndexByte(got, '\n')
		var number, zero int
		if _, err := fmt.Sscanf(string(got[:end]), "%d %d", &number, &zero); err != nil || number != i || zero != 0 {
			t.Fatalf("line %d is %q", i, got[:end])
		}
		got = got[end+1:]
		n++
	}
	if len(got) > 0 || n < lines/100 {
		t.Errorf("%d lines, and %q", n, got)
	}
}

// Loops write their first lines while the writer is at work for others.
func TestFirstLines(t *testing.T) {
	const loops, each = 16, 200
	l, err := Open(Config{Path: filepath.Join(t.TempDir(), "a"), Share: 1, Loops: loops, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for loop := range loops {
		all.Go(func() {
			r := sample()
			r.Loop = loop
			for range each {
				l.Write(r)
				select {
				case l.wake <- struct{}{}: // it shall look as often as it can
				default:
				}
			}
		})
	}
	all.Wait()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(l.cfg.Path); err != nil || count(b) != loops*each || l.Dropped() > 0 {
		t.Errorf("%v, %d lines, %d dropped", err, count(b), l.Dropped())
	}
}

// A line that a full disk tore is ended before the next one, in the same file; a new file begins with a line.
func TestTornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	for name, rename := range map[string]bool{"the same": false, "a new one": true} {
		if err := os.WriteFile(path, []byte("{torn"), 0o600); err != nil {
			t.Fatal(err)
		}
		l := &Log{cfg: Config{Path: path, Log: slog.New(slog.DiscardHandler)}, torn: true}
		var err error
		if l.file, err = l.open(); err != nil {
			t.Fatal(err)
		}
		want := "{torn\n{}\n"
		if rename {
			want = "{}\n"
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
		}
		l.change()
		if err := l.append([]byte("{}\n")); err != nil {
			t.Fatal(err)
		}
		l.file.Close()
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

// sample is what a browser's request leaves.
func sample() *proxy.Record {
	return &proxy.Record{
		Loop: 0, Began: time.Now(), Took: 123456 * time.Nanosecond, Gateway: 23456, Backend: 100_000, Client: netip.MustParseAddr("192.0.2.17"),
		Method: []byte("GET"), Host: []byte("www.example.com"), Target: []byte("/users/1234/profile?tab=settings"), Minor: 1,
		Service: "users", Instance: "users-7d9f-1", Status: 200, Attempts: 1, Sent: 5120,
		RequestID: []byte("0197fd2c-2f3a-7c4e-9d0b-3a1f5f6e7d8c"), Referer: []byte("https://www.example.com/users/1234"),
		UserAgent: []byte("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36"),
	}
}

// A line costs no allocation.
func TestLinesAllocateNothing(t *testing.T) {
	for _, format := range []Format{JSON, Combined} {
		l := &Log{cfg: Config{Share: 1}, shards: []*shard{{encoder: encoder{format: format}}}, wake: make(chan struct{}, 1)}
		r, s := sample(), l.shards[0]
		l.Write(r)
		if n := testing.AllocsPerRun(10_000, func() {
			l.Write(r)
			_, upTo := s.waiting()
			s.took(upTo)
		}); n != 0 {
			t.Errorf("%s: %v allocations", format, n)
		}
	}
}

// BenchmarkLine is what a line costs the loop, beside the same fields by zerolog, which escapes less.
func BenchmarkLine(b *testing.B) {
	r := sample()
	for _, format := range []Format{JSON, Combined} {
		b.Run(string(format), func(b *testing.B) {
			l := &Log{cfg: Config{Share: 1}, shards: []*shard{{encoder: encoder{format: format}}}, wake: make(chan struct{}, 1)}
			s := l.shards[0]
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				l.Write(r)
				if i%256 == 0 {
					_, upTo := s.waiting()
					s.took(upTo)
				}
			}
		})
	}
	b.Run("zerolog", func(b *testing.B) {
		l := zerolog.New(io.Discard)
		b.ReportAllocs()
		for b.Loop() {
			l.Log().Time("time", r.Began).IPAddr("client", r.Client.AsSlice()).Bytes("method", r.Method).Bytes("host", r.Host).
				Bytes("path", r.Target).Str("protocol", "HTTP/1.1").Str("service", r.Service).Str("instance", r.Instance).
				Int("status", r.Status).Int64("bytes_in", r.Received).Int64("bytes_out", r.Sent).Int("attempts", r.Attempts).
				Dur("duration", r.Took).Dur("gateway", r.Gateway).Dur("backend", r.Backend).Bytes("request_id", r.RequestID).
				Bytes("user_agent", r.UserAgent).Bytes("referer", r.Referer).Send()
		}
	})
	b.Run("slog", func(b *testing.B) {
		l := slog.New(slog.NewJSONHandler(io.Discard, nil))
		b.ReportAllocs()
		for b.Loop() {
			l.Info("request", slog.String("client", r.Client.String()), slog.String("method", string(r.Method)), slog.String("path", string(r.Target)),
				slog.Int("status", r.Status), slog.String("service", r.Service), slog.String("instance", r.Instance), slog.Duration("duration", r.Took))
		}
	})
}
