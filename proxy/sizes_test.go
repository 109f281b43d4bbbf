package proxy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"kerberos/registry"
)

// wide returns a request with that many field lines.
func wide(fields int) string {
	return toHTTP11[:len(toHTTP11)-2] + strings.Repeat("X-A: 1\r\n", fields-1) + "\r\n"
}

// lined returns a request whose first line has n bytes.
func lined(n int) string {
	const start, end = "GET /echo?", " HTTP/1.1\r\n"
	return start + strings.Repeat("x", n-len(start)-len(end)) + end + "Host: a\r\n\r\n"
}

// What is at a limit passes, what is past it is refused, and the text names the limit in force.
func TestRequestLimits(t *testing.T) {
	huge := Limits{Head: -1, Fields: -1, RequestLine: -1}
	for _, row := range []struct {
		name   string
		limits Limits
		within string
		past   string // closed behind the answer
		status int
		limit  string // as the text has it
	}{
		{"head", Limits{}, sized(maxHead), sized(maxHead + 1), 431, "32 KiB"},
		{"small head", Limits{Head: 100}, sized(100), sized(101), 431, "100 bytes"},
		{"head smaller than the first buffer", Limits{Head: 600}, sized(600), sized(900), 431, "600 bytes"},
		{"large head", Limits{Head: 200 << 10}, sized(200 << 10), sized(200<<10 + 1), 431, "200 KiB"},
		{"no head limit", huge, sized(MaxHead), sized(MaxHead + 1), 431, "1 MiB"},
		{"half a head", Limits{Head: 5000}, sized(5000), sized(7000)[:5000], 431, "5000 bytes"},
		{"fields", Limits{}, wide(maxFields), wide(maxFields + 1), 431, "200"},
		{"few fields", Limits{Fields: 1}, wide(1), wide(2), 431, "1"},
		{"request line", Limits{}, lined(maxRequestLine), lined(maxRequestLine + 1), 414, "16 KiB"},
		{"short request line", Limits{RequestLine: 100}, lined(100), lined(101), 414, "100 bytes"},
		{"half a request line", Limits{}, lined(maxRequestLine), lined(maxRequestLine + 1)[:maxRequestLine], 414, "16 KiB"},
		{"half a request line behind empty lines", Limits{}, "\r\n" + lined(maxRequestLine), "\r\n\r\n" + lined(maxRequestLine + 1)[:maxRequestLine], 414, "16 KiB"},
		{"request line and head", Limits{Head: 1 << 10}, sized(1 << 10), lined(2 << 10), 431, "1 KiB"},
		{"request line in a larger head", Limits{Head: 1 << 10, RequestLine: 512}, sized(1 << 10), lined(513), 414, "512 bytes"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) { cfg.Limits = row.limits }, nil)
			o := naming(t, "ok")
			g.register(t, "echo", "1", o.url())
			c := g.dial(t)
			for _, request := range []string{row.within, row.within + row.within, toHTTP11 + row.within + toHTTP11} {
				go c.Write([]byte(request))
				for range strings.Count(request, " HTTP/1.1\r\n") {
					c.read(false).want(t, 200)
				}
			}
			before := len(o.requests())
			for _, first := range []string{"", toHTTP11} {
				c := g.dial(t)
				began := time.Now()
				go c.Write([]byte(first + row.past)) // not all of what is refused is read
				if first != "" {
					c.read(false).want(t, 200)
					before++
				}
				m := c.read(false).want(t, row.status)
				if m.field("Proxy-Status") != "kerberos; error=http_request_error" || m.field("Connection") != "close" ||
					!strings.HasSuffix(m.body, " the limit of "+row.limit+"\n") {
					t.Errorf("%s%s", m.head, m.body)
				}
				if took := time.Since(began); took > headTimeout/2 {
					t.Errorf("waited for: %v", took)
				}
				c.closed()
			}
			if n := len(o.requests()); n != before {
				t.Errorf("%d requests went on", n-before)
			}
		})
	}

	// Without limits what is far past the defaults passes.
	g := startGateway(t, func(cfg *Config) { cfg.Limits = huge }, nil)
	g.register(t, "echo", "1", naming(t, "ok").url())
	c := g.dial(t)
	for _, request := range []string{wide(20_000), lined(600 << 10)} {
		go c.Write([]byte(request))
		c.read(false).want(t, 200)
	}
}

func TestResponseLimits(t *testing.T) {
	const end = "Content-Length: 2\r\n\r\n"
	head := func(n int) string {
		const start = "HTTP/1.1 200 OK\r\nX-A: "
		return start + strings.Repeat("x", n-len(start)-2-len(end)) + "\r\n" + end
	}
	fields := func(n int) string { return "HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: 1\r\n", n-1) + end }
	for _, row := range []struct {
		name         string
		limits       Limits
		within, past string
		limit        string
	}{
		{"head", Limits{}, head(maxHead), head(maxHead + 1), "32 KiB"},
		{"small head", Limits{Head: 200}, head(200), head(201), "200 bytes"},
		{"large head", Limits{Head: 200 << 10}, head(200 << 10), head(200<<10 + 1), "200 KiB"},
		{"no head limit", Limits{Head: -1}, head(MaxHead), head(MaxHead + 1), "1 MiB"},
		{"no end of a head", Limits{}, head(maxHead), head(maxHead + 10)[:maxHead+1], "32 KiB"},
		{"fields", Limits{}, fields(maxFields), fields(maxFields + 1), "200"},
		{"few fields", Limits{Fields: 2}, fields(2), fields(3), "2"},
		{"interim head", Limits{Head: 200}, head(200), strings.Replace(head(201), "200 OK", "103 OK", 1), "200 bytes"},
		{"status line", Limits{Head: 1000}, head(1000), "HTTP/1.1 200 " + strings.Repeat("x", 1000), "1000 bytes"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := startGateway(t, func(cfg *Config) {
				steady(cfg)
				cfg.Limits, cfg.UpstreamIdle = row.limits, time.Minute // a head of 1 MiB takes its time
			}, nil)
			within, came := scripted(t, row.within+"ok", false)
			g.register(t, "echo", "1", within.url())
			past, _ := scripted(t, row.past+"ok", true)
			g.register(t, "past", "1", past.url())
			c := g.dial(t)
			for range 3 {
				if m := c.get("/echo").want(t, 200); m.body != "ok" {
					t.Errorf("body %q", m.body)
				}
				m := c.get("/past").want(t, 502)
				if m.field("Proxy-Status") != "kerberos; error=http_response_header_section_size" || !strings.HasSuffix(m.body, " the limit of "+row.limit+"\n") {
					t.Errorf("%s%s", m.head, m.body)
				}
			}
			if n := came.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

func TestLimitsConfig(t *testing.T) {
	if _, err := New(Config{Registry: registry.New(registry.Config{}), Limits: Limits{Head: MaxHead + 1}}, nil); err == nil || !strings.Contains(err.Error(), "Config.Limits.Head is "+fmt.Sprint(MaxHead+1)) {
		t.Errorf("a head of more than MaxHead: %v", err)
	}
	for n, want := range map[int]string{1: "1 bytes", 1000: "1000 bytes", 1024: "1 KiB", 1025: "1025 bytes", 16 << 10: "16 KiB", 1 << 20: "1 MiB", 3 << 19: "1536 KiB"} {
		if got := bytesText(int64(n)); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
