package proxy

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestPrefersJSON(t *testing.T) {
	for accept, want := range map[string]bool{
		"":                                    false,
		"*/*":                                 false,
		"application/json":                    true,
		"APPLICATION/JSON":                    true,
		"application/problem+json":            true,
		"application/vnd.api+json;version=1":  true,
		"application/json;q=0":                false,
		"application/json;q=0.001":            true,
		"application/json; q=0.9, text/plain": false,
		"text/plain;q=0.5, application/json;q=0.500":       false,
		"text/plain;q=0.5 , application/json ; Q=0.501":    true,
		"application/json, text/plain, */*":                false,
		"application/json, */*":                            true,
		"application/json;q=0.5, */*":                      false,
		"application/json, text/javascript, */*; q=0.01":   true,
		"text/*;q=0.3, application/json;q=0.4":             true,
		"text/html,application/xhtml+xml,*/*;q=0.8":        false,
		"text/html, application/json":                      true,
		"application/*":                                    false,
		"application/xjson":                                false,
		"application/+json":                                false,
		"image/x+json":                                     false,
		"a\r\nAccept: application/json":                    false,
		"text/html\r\nAccept: application/json":            true,
		"application/json\r\nAccept: text/plain":           false,
		", ,application/json":                              true,
		"application/json;q=2":                             false,
		"application/json;q=1.001":                         false,
		"application/json;q=0.1234":                        false,
		"application/json;q=.5":                            false,
		"application/json;q=0,5":                           false,
		"application/json;q=":                              false,
		"application/json;":                                false,
		"application/json;q":                               false,
		"application/json, ???":                            false,
		"application/json, a/b/c":                          false,
		"application/json, /":                              false,
		"application/json;a=\"x, text/plain\"":             false,
		"application/json" + strings.Repeat(", a/b", 1000): true,
	} {
		r := Request{lines: []byte("X-Accept: application/json\r\nAccept: " + accept + "\r\n")}
		if accept == "" {
			r.lines = []byte("X-A: application/json\r\n")
		}
		if got := r.prefersJSON(); got != want {
			t.Errorf("%.60q: %v", accept, got)
		}
	}
}

// Refusals come as the client would have them, and say the same in both forms.
func TestFormsOfRefusals(t *testing.T) {
	g := startGateway(t, func(cfg *Config) {
		cfg.RequestTimeout, cfg.Limits = 200*time.Millisecond, Limits{BodyTimeout: 100 * time.Millisecond, Body: 100}
	}, nil)
	g.register(t, "down", "1", refusedAddr(t))
	g.register(t, "hangs", "1", startActor(t, hangs).url())
	const asks = "Accept: application/json\r\n"
	for _, row := range []struct {
		name, request string
		want          *refusal
		json          bool
	}{
		{"no service", "GET /nobody HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errNoRoute, true},
		{"HEAD", "HEAD /nobody HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errNoRoute, true},
		{"in text", "GET /nobody HTTP/1.1\r\nHost: a\r\n\r\n", errNoRoute, false},
		{"HEAD in text", "HEAD /nobody HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n", errNoRoute, false},
		{"no instance", "GET /echo HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errNoInstance, true},
		{"backend down", "GET /down HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errRefused, true},
		{"backend hangs", "GET /hangs HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errResponseTimeout, true},
		{"body that is too large", "POST /hangs HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n" + asks + "\r\n", errBodyTooLarge, true},
		{"body that stops", "POST /hangs HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n" + asks + "\r\nb", errBodyTimeout, true},
		{"method", "TRACE /down HTTP/1.1\r\nHost: a\r\n" + asks + "\r\n", errMethod, true},
		{"HTTP/1.0", "GET /nobody HTTP/1.0\r\n" + asks + "\r\n", errNoRoute, true},
		{"head that cannot be read", "GET /down HTTP/1.1\r\nHost: a\r\n" + asks + "X A: 1\r\n\r\n", errFieldName, false},
		{"head that is too large", "GET /down HTTP/1.1\r\nHost: a\r\n" + asks + strings.Repeat("X: y\r\n", maxHead/6+1), errHeadTooLarge, false},
		{"head that cannot be read, behind another", "GET /nobody HTTP/1.1\r\nHost: a\r\n" + asks + "\r\nG(T / HTTP/1.1\r\n\r\n", errRequestLine, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := g.dial(t)
			go c.Write([]byte(row.request))
			if strings.HasSuffix(row.name, "another") {
				c.read(false)
			}
			head := strings.HasPrefix(row.request, "HEAD")
			m := c.read(head).refused(t, row.want)
			text := g.cfg().Limits.explain(row.want)
			if row.want == errBodyTooLarge {
				text += " of 100 bytes"
			}
			want, contentType := m.head[len("HTTP/1.1 "):strings.Index(m.head, "\r\n")]+": "+text+"\n", "text/plain; charset=utf-8"
			if row.json {
				contentType = "application/problem+json"
				fields := map[string]any{}
				if err := json.Unmarshal([]byte(m.body), &fields); err != nil && !head {
					t.Fatalf("%v: %q", err, m.body)
				}
				if !head && (fields["type"] != "about:blank" || fields["status"] != float64(row.want.status) || fields["detail"] != text ||
					"HTTP/1.1 "+strconv.Itoa(row.want.status)+" "+fields["title"].(string) != m.head[:strings.Index(m.head, "\r\n")]) {
					t.Errorf("body %s", m.body)
				}
				want = m.body
			}
			if head {
				want = ""
			}
			if m.body != want || m.field("Content-Type") != contentType || m.field("Cache-Control") != "no-store" || m.field("Content-Length") == "0" {
				t.Errorf("%s%s", m.head, m.body)
			}
		})
	}
}

// registered are the error types of RFC 9209 section 2.3.
var registered = strings.Fields(`dns_timeout dns_error destination_not_found destination_unavailable destination_ip_prohibited
	destination_ip_unroutable connection_refused connection_terminated connection_timeout connection_read_timeout
	connection_write_timeout connection_limit_reached tls_protocol_error tls_certificate_error tls_alert_received
	http_request_error http_request_denied http_response_incomplete http_response_header_section_size
	http_response_header_size http_response_body_size http_response_trailer_section_size http_response_trailer_size
	http_response_transfer_coding http_response_content_coding http_response_timeout http_upgrade_failed
	http_protocol_error proxy_internal_response proxy_internal_error proxy_configuration_error proxy_loop_detected`)

// The README has each status with each of its error types, and no others; all of them are registered ones.
func TestReadmeAnswers(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(readme), "\n## What the gateway answers\n")
	if !ok {
		t.Fatal("the README has no section about answers")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var listed []string
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.Contains(cells[2], "`") {
			continue
		}
		kind := strings.Trim(cells[2], " `")
		if !slices.Contains(registered, kind) {
			t.Errorf("%q is no error type", kind)
		}
		if strings.TrimSpace(cells[3]) == "" {
			t.Errorf("%s has no cause", line)
		}
		listed = append(listed, strings.TrimSpace(cells[1])+" "+kind)
	}
	var real []string
	collect := func(n ast.Node) bool {
		literal, ok := n.(*ast.CompositeLit)
		if !ok || len(literal.Elts) != 3 {
			return true
		}
		if name, ok := literal.Type.(*ast.Ident); ok && name.Name == "refusal" {
			kind, _ := strconv.Unquote(literal.Elts[1].(*ast.BasicLit).Value)
			real = append(real, literal.Elts[0].(*ast.BasicLit).Value+" "+kind)
		}
		return true
	}
	for _, name := range []string{"errors.go", "queue.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, collect)
	}
	if len(real) < 30 {
		t.Fatalf("only %d refusals were found", len(real))
	}
	for _, pair := range real {
		if !slices.Contains(listed, pair) {
			t.Errorf("%s is not in the README", pair)
		}
	}
	for i, pair := range listed {
		if !slices.Contains(real, pair) || slices.Contains(listed[:i], pair) {
			t.Errorf("%s is in the README, but not real, or there twice", pair)
		}
	}
}
