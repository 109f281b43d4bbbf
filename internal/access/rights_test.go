package access

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kerberos/internal/admin"
	"kerberos/internal/follow"
	"kerberos/registry"
)

// guarded is an admin listener behind a rule, as a gateway has it.
type guarded struct {
	t    *testing.T
	addr string
	reg  *registry.Registry
	log  *transcript
}

type transcript struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *transcript) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *transcript) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// guard serves; at its end no token may stand in its log.
func guard(t *testing.T, cfg Config, tlsCfg *TLSConfig) *guarded {
	t.Helper()
	g := &guarded{t: t, log: &transcript{}}
	log := slog.New(slog.NewJSONHandler(g.log, nil))
	cfg.Log = log
	g.reg = registry.New(registry.Config{Log: log})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.addr = ln.Addr().String()
	server := admin.New(admin.Config{Ready: func() bool { return true }, Log: log, API: newRule(t, cfg).Wrap(registry.NewHandler(g.reg, nil))})
	if tlsCfg != nil {
		tlsCfg.Log = log
		s, err := NewTLS(*tlsCfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		ln = s.Listener(ln)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	t.Cleanup(func() {
		g.reg.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Error(err)
		}
		if text := g.log.String(); strings.Contains(text, "token-token") || strings.Contains(text, hashOf(token("a"))) {
			t.Errorf("a token is in the log:\n%s", text)
		}
	})
	return g
}

// token is that of an entry.
func token(name string) string { return "token-token-token-" + name }

// file writes a tokens file. It is complete at once.
func file(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// ask makes one call with a token, none if it is empty.
func (g *guarded) ask(client *http.Client, token, method, target, body string) (int, string, http.Header) {
	g.t.Helper()
	scheme := "http://"
	if client == nil {
		client = http.DefaultClient
	} else {
		scheme = "https://"
	}
	request, err := http.NewRequest(method, scheme+g.addr+target, strings.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := client.Do(request)
	if err != nil {
		g.t.Fatal(err)
	}
	defer response.Body.Close()
	text := []byte("it goes on")
	if !strings.Contains(target, "hold") || response.StatusCode != 200 {
		if text, err = io.ReadAll(response.Body); err != nil {
			g.t.Fatal(err)
		}
	}
	if strings.Contains(string(text), "token-token") {
		g.t.Errorf("%s %s: a token is in the answer %s", method, target, text)
	}
	return response.StatusCode, string(text), response.Header
}

const entries = `
- {name: admin, token: token-token-token-admin, admin: true}
- {name: read, token: token-token-token-read, read: true}
- {name: mine, token: token-token-token-mine, register: [mine]}
- {name: prefix, token: token-token-token-prefix, register: [mi*]}
- {name: both, token: token-token-token-both, register: [mine], read: true}
- {name: others, token: token-token-token-others, register: ["other*"]}
`

// What each kind of token may do with a service of its own and with another.
func TestRights(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	file(t, path, entries)
	g := guard(t, Config{Tokens: path, Token: "token-token-token-flag"}, nil)
	for service, may := range map[string]struct{ change, read string }{ // which tokens
		"mine":    {"flag admin mine prefix both", "flag admin mine prefix both read"},
		"mine-eu": {"flag admin prefix", "flag admin prefix both read"},
		"unknown": {"flag admin", "flag admin both read"}, // nobody has registered it
	} {
		for _, name := range strings.Fields("flag admin read mine prefix both others nobody") {
			for _, call := range []struct {
				right, method, target, body string
				status                      int // with the right, on a service that is there
			}{
				{"read", "GET", "/services/" + service, "", 200},
				{"read", "GET", "/services/" + service + "/a", "", 200},
				{"change", "PUT", "/services/" + service + "/a", `{"addr":"http://127.0.0.1:9"}`, 204},
				{"change", "POST", "/register", `{"service":"` + service + `","id":"a","addr":"http://127.0.0.1:9"}`, 204},
				{"change", "POST", "/register?hold", `{"service":"` + service + `","id":"b","addr":"http://127.0.0.1:9"}`, 200},
				{"change", "PATCH", "/services/" + service + "/a", `{"state":"drain"}`, 204},
				{"change", "POST", "/services/" + service + "/a/heartbeat", "", 204},
				{"change", "DELETE", "/services/" + service + "/a", "", 204},
				{"change", "DELETE", "/register", `{"service":"` + service + `","id":"a"}`, 204},
				{"change", "DELETE", "/services/" + service + "/a?drain=1s", "", 200},
			} {
				if service != "unknown" {
					if err := g.reg.Register(service, registry.Instance{ID: "a", Addr: "http://127.0.0.1:9"}); err != nil {
						t.Fatal(err)
					}
				}
				before := g.reg.Snapshot(service)
				names := may.read
				if call.right == "change" {
					names = may.change
				}
				want := call.status
				switch {
				case name == "nobody":
					want = 401
				case !strings.Contains(" "+names+" ", " "+name+" "):
					want = 403
				}
				status, text, header := g.ask(nil, token(name), call.method, call.target, call.body)
				if want == 401 && status == 429 { // there are many of them
					want = 429
				}
				what := fmt.Sprintf("%s: %s %s", name, call.method, call.target)
				if status != want && !(service == "unknown" && want < 400 && status == 404) {
					t.Errorf("%s: %d %s; want %d", what, status, text, want)
				}
				if want >= 400 && g.reg.Snapshot(service) != before {
					t.Errorf("%s: %d, but something has changed", what, status)
				}
				if (header.Get("WWW-Authenticate") != "") != (status == 401) || (header.Get("Retry-After") == "1") != (status == 429) {
					t.Errorf("%s: %d %v", what, status, header)
				}
				if status == 403 && (!strings.Contains(text, "token "+name+" has no right to") || !strings.Contains(text, service)) {
					t.Errorf("%s: %s", what, text)
				}
				if service == "unknown" {
					_ = g.reg.Unregister(service, "a", "")
				}
				_ = g.reg.Unregister(service, "b", "")
			}
		}
		_ = g.reg.Unregister(service, "a", "")
	}

	for _, service := range []string{"mine", "mine-eu", "orders"} {
		if err := g.reg.Register(service, registry.Instance{ID: "a", Addr: "http://127.0.0.1:9"}); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"flag": "mine mine-eu orders", "admin": "mine mine-eu orders", "read": "mine mine-eu orders", "both": "mine mine-eu orders",
		"mine": "mine", "prefix": "mine mine-eu", "others": "",
	} {
		_, text, _ := g.ask(nil, token(name), "GET", "/services", "")
		var list struct{ Services []struct{ Name string } }
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range list.Services {
			got = append(got, s.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s sees %q, want %q", name, got, want)
		}
	}
	// Of what has no right some lines are enough; this one is the first after a while without any.
	eventually(t, "the log says what was tried, by whom and how many more were", func() bool {
		g.ask(nil, token("others"), "GET", "/services/mine", "")
		return regexp.MustCompile(`"msg":"API call refused","by":"token others","peer":"127.0.0.1:\d+","call":"GET /services/mine","reason":"its rights do not cover the call","more":\d`).MatchString(g.log.String())
	})
}

// Rights change with the file, and nobody whose entry stays notices.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "tokens.yaml")
	with, without := "- {name: a, token: token-token-token-a, admin: true}\n- {name: b, token: token-token-token-b, register: [mine]}\n", "- {name: a, token: token-token-token-a, read: true, register: [mine]}\n"
	file(t, path, with)
	g := guard(t, Config{Tokens: path}, nil)
	stop := make(chan struct{})
	var load sync.WaitGroup
	var asked atomic.Int64
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				asked.Add(1)
				if status, text, _ := g.ask(nil, token("a"), "PUT", "/services/mine/a", `{"addr":"http://127.0.0.1:9"}`); status != 204 {
					t.Errorf("a: %d %s", status, text)
				}
				if status, text, _ := g.ask(nil, token("c"), "PUT", "/services/mine/c", `{"addr":"http://127.0.0.1:9"}`); status != 401 && status != 429 {
					t.Errorf("c: %d %s", status, text)
				}
			}
		})
	}
	b := func() int {
		status, _, _ := g.ask(nil, token("b"), "PUT", "/services/mine/b", `{"addr":"http://127.0.0.1:9"}`)
		return status
	}
	become := func(what string, status int) {
		t.Helper()
		eventually(t, what, func() bool {
			got := b()
			return got == status || status == 401 && got == 429
		})
	}
	become("b may", 204)
	file(t, path, without)
	become("b is gone", 401)

	// What cannot be used changes nothing, and is said once.
	for _, broken := range []string{with + "- {name: a}\n", "", "- {name: b, token: token-token-token-b"} {
		before := strings.Count(g.log.String(), "cannot be used")
		file(t, path, broken)
		eventually(t, "the file is refused", func() bool { return strings.Count(g.log.String(), "cannot be used") == before+1 })
		become("nothing has changed", 401)
	}
	if !strings.Contains(g.log.String(), path+":3:") {
		t.Errorf("no place in the file in\n%s", g.log.String())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is noticed that the file is gone", func() bool { return strings.Contains(g.log.String(), "no such file") })
	become("nothing has changed", 401)
	file(t, path, with)
	become("b may again", 204)
	if status, _, _ := g.ask(nil, token("a"), "GET", "/services/other", ""); status != 404 {
		t.Errorf("a is admin again, but reads with %d", status)
	}
	// In place, not renamed.
	if err := os.WriteFile(path, []byte(without), 0o600); err != nil {
		t.Fatal(err)
	}
	become("b is gone again", 401)
	close(stop)
	load.Wait()
	if n := asked.Load(); n < 50 {
		t.Errorf("only %d calls", n)
	}
	if n := strings.Count(g.log.String(), "cannot be used"); n != 4 {
		t.Errorf("%d times", n)
	}
}

// A mounted secret is a symbolic link to a file below a link that is replaced as a whole.
func TestReloadOfLinks(t *testing.T) {
	dir := t.TempDir()
	version := func(name, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		file(t, filepath.Join(dir, name, "tokens.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", "- {name: a, token: token-token-token-a, admin: true}\n")
	path := filepath.Join(dir, "tokens.yaml")
	if err := os.Symlink("..data/tokens.yaml", path); err != nil {
		t.Fatal(err)
	}
	g := guard(t, Config{Tokens: path}, nil)
	if status, _, _ := g.ask(nil, token("a"), "GET", "/services", ""); status != 200 {
		t.Fatal(status)
	}
	version("..2", "- {name: b, token: token-token-token-b, admin: true}\n")
	eventually(t, "b may", func() bool { status, _, _ := g.ask(nil, token("b"), "GET", "/services", ""); return status == 200 })
	if status, _, _ := g.ask(nil, token("a"), "GET", "/services", ""); status != 401 && status != 429 {
		t.Errorf("a still may: %d", status)
	}
}

// hold registers mine/held by a connection that it returns, with what has to be read of it.
func (g *guarded) hold(name string, dial func() (net.Conn, error)) (net.Conn, *bufio.Reader) {
	g.t.Helper()
	conn, err := dial()
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { conn.Close() })
	body := `{"service":"mine","id":"held","addr":"http://` + g.addr + `","ttl":"1m"}` // something that accepts connections
	auth := ""
	if name != "" {
		auth = "Authorization: Bearer " + token(name) + "\r\n"
	}
	fmt.Fprintf(conn, "POST /register?hold HTTP/1.1\r\nHost: x\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", auth, len(body), body)
	r := bufio.NewReader(conn)
	response, err := http.ReadResponse(r, nil)
	if err != nil || response.StatusCode != 200 {
		g.t.Fatalf("%v, %v", response, err)
	}
	if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, `{"registered":true`) {
		g.t.Fatalf("%q, %v", line, err)
	}
	return conn, r
}

// A connection that holds a lease ends when its token loses the right; the instance then has the time of its lease.
func TestHoldWithoutRight(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	file(t, path, entries)
	g := guard(t, Config{Tokens: path}, nil)
	_, r := g.hold("mine", func() (net.Conn, error) { return net.Dial("tcp", g.addr) })
	_, kept := g.hold("prefix", func() (net.Conn, error) { return net.Dial("tcp", g.addr) }) // in the place of it
	if _, err := io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	file(t, path, strings.ReplaceAll(entries, "mi*", "x*"))
	rest, err := io.ReadAll(kept)
	if lines := strings.Split(strings.TrimSpace(string(rest)), "\n"); err != nil || lines[len(lines)-1] != `{"registered":false,"reason":"who registered it may not do so any more"}` {
		t.Errorf("%q, %v", rest, err)
	}
	eventually(t, "it is on a lease", func() bool {
		in := g.reg.Snapshot("mine").Instance("held")
		if in == nil {
			t.Fatal("it is gone")
		}
		_, lent := g.reg.ExpiresIn(in)
		return lent && in.State() == registry.Up
	})
}

// Networks of an entry are those of what it registers. What they refuse is logged: who tried it, from where, and what.
func TestEntryNetworks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	file(t, path, "- {name: a, token: token-token-token-a, register: [mine], networks: [10.0.0.0/8]}\n- {name: b, token: token-token-token-b, admin: true}\n")
	g := guard(t, Config{Tokens: path}, nil)
	const outside = "http://11.1.2.3"
	lines := 0
	for _, row := range []struct {
		name, method, target, body string
		status                     int
	}{
		{"a", "PUT", "/services/mine/a", `{"addr":"http://10.1.2.3"}`, 204},
		{"a", "PUT", "/services/mine/a", `{"addr":"` + outside + `"}`, 400},
		{"a", "POST", "/register", `{"service":"mine","id":"a","addr":"` + outside + `"}`, 400},
		{"a", "POST", "/register?hold", `{"service":"mine","id":"a","addr":"` + outside + `"}`, 400},
		{"b", "PUT", "/services/mine/a", `{"addr":"` + outside + `"}`, 204},
		{"b", "PUT", "/services/mine/a", `{"addr":"http://169.254.1.1"}`, 400}, // to everybody
		{"a", "PUT", "/services/mine/a", `{"addr":"nowhere"}`, 400},
	} {
		what := row.name + ": " + row.method + " " + row.target + " " + row.body
		status, text, _ := g.ask(nil, token(row.name), row.method, row.target, row.body)
		refused := row.name == "a" && strings.Contains(row.body, outside)
		if status != row.status || strings.Contains(text, "in none of the networks of who registers it") != refused {
			t.Errorf("%s: %d %s", what, status, text)
		}
		if refused {
			lines++
			call, _, _ := strings.Cut(row.method+" "+row.target, "?")
			line := `"level":"WARN","msg":"API call refused","by":"token a","peer":"127\.0\.0\.1:\d+","call":"` + call +
				`","reason":"its networks do not cover the addr","instance":"mine/a","addr":"` + outside + `"}`
			if found := regexp.MustCompile(line).FindAllString(g.log.String(), -1); len(found) == 0 {
				t.Errorf("%s: no line such as %s in\n%s", what, line, g.log)
			}
		}
		if n := strings.Count(g.log.String(), "API call refused"); n != lines {
			t.Fatalf("%s: %d lines, want %d", what, n, lines)
		}
	}

	// Nobody can fill a disk with them.
	for range 50 {
		g.ask(nil, token("a"), "PUT", "/services/mine/a", `{"addr":"`+outside+`"}`)
	}
	if n := strings.Count(g.log.String(), "API call refused"); n > 40 {
		t.Errorf("%d lines", n)
	}
	eventually(t, "the log says that there were more", func() bool {
		g.ask(nil, token("a"), "PUT", "/services/mine/a", `{"addr":"`+outside+`"}`)
		return strings.Contains(g.log.String(), `"addr":"`+outside+`","more":`)
	})
}

// Failed attempts are held up, those of one address at a time; one that does not fail is not. The log has the first of them, and
// how many were left out.
func TestFailuresAreLimited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	file(t, path, entries)
	g := guard(t, Config{Tokens: path}, nil)
	count := map[int]int{}
	began := time.Now()
	for i := range 100 {
		name := "nobody"
		if i%2 == 0 {
			name = ""
		}
		status, _, header := g.ask(nil, map[string]string{"": "", "nobody": token("nobody")}[name], "GET", "/services?x="+token("x"), "")
		if count[status]++; status == 429 && header.Get("Retry-After") != "1" {
			t.Errorf("%v", header)
		}
		if status, text, _ := g.ask(nil, token("admin"), "GET", "/services", ""); status != 200 {
			t.Errorf("a right token from the same address: %d %s", status, text)
		}
	}
	most := failedAtOnce + int(time.Since(began)/failedEvery) + 1
	if count[401] < failedAtOnce || count[401] > most || count[401]+count[429] != 100 {
		t.Errorf("%v, at most %d", count, most)
	}
	if n := strings.Count(g.log.String(), "API call refused"); n < failedAtOnce || n > most {
		t.Errorf("%d lines", n)
	}
	eventually(t, "the log says that there were more", func() bool {
		g.ask(nil, token("nobody"), "GET", "/services", "")
		return strings.Contains(g.log.String(), `"more":`)
	})
}

// Who has many addresses takes no more memory than who has some, and who has one is held up all the same.
func TestLimiterIsBounded(t *testing.T) {
	var l limiter
	now := time.Now()
	most := 0
	for i := range 100_000 {
		now = now.Add(time.Millisecond)
		l.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
		most = max(most, len(l.quiet))
	}
	if most > mostPeers {
		t.Errorf("%d addresses are remembered", most)
	}
	network := netip.MustParseAddr("2001:db8::1")
	let := 0
	for range 1000 {
		if l.allow(network, now) {
			let++
		}
		network = network.Next() // which is of the same 64 bits
	}
	if let != failedAtOnce {
		t.Errorf("%d attempts at once", let)
	}
	if !l.allow(network, now.Add(failedEvery)) || l.allow(network, now.Add(failedEvery)) {
		t.Error("not one more after a while")
	}
	let = 0
	for range 1000 {
		if l.allow(network, now.Add(time.Hour)) {
			let++
		}
	}
	if let != failedAtOnce {
		t.Errorf("%d attempts at once after an hour", let)
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	for what, row := range map[string]struct {
		name string
		make func(path string) error
		want string
	}{
		"none":     {"none", func(string) error { return nil }, "no such file"},
		"a folder": {"folder", func(path string) error { return os.Mkdir(path, 0o700) }, "is no regular file"},
		"large":    {"large", func(path string) error { return os.WriteFile(path, make([]byte, follow.MaxFile+1), 0o600) }, "more than 1 MiB"},
		"wrong":    {"wrong", func(path string) error { return os.WriteFile(path, []byte("- {name: a}\n"), 0o600) }, "wrong:1:4: the entry must have one of"},
		"a token of --token": {"taken", func(path string) error {
			return os.WriteFile(path, []byte("- {name: a, token: token-token-token-flag, read: true}\n"), 0o600)
		}, "another entry, or --token"},
	} {
		path := filepath.Join(dir, row.name)
		if err := row.make(path); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Config{Tokens: path, Token: "token-token-token-flag"}); err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// An entry that nobody can use is told of.
func TestCertificatesOfNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	file(t, path, "- {name: a, certificate: x, admin: true}\n")
	for _, asked := range []bool{false, true} {
		log := &transcript{}
		newRule(t, Config{Tokens: path, Certificates: asked, Log: slog.New(slog.NewTextHandler(log, nil))})
		if told := strings.Contains(log.String(), "--admin-client-ca"); told == asked {
			t.Errorf("asked for: %v; %s", asked, log.String())
		}
	}
}

func TestFileModes(t *testing.T) {
	for mode, want := range map[os.FileMode][2]string{ // with a token, and with a hash only
		0o600: {"", ""}, 0o400: {"", ""}, 0o640: {"may read", ""}, 0o604: {"may read", ""}, 0o660: {"may write", "may write"}, 0o602: {"may write", "may write"},
	} {
		for i, text := range []string{"- {name: a, token: token-token-token-a, read: true}\n", "- {name: a, sha256: " + hashOf("x") + ", read: true}\n"} {
			path := filepath.Join(t.TempDir(), "tokens.yaml")
			file(t, path, text)
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			log := &transcript{}
			newRule(t, Config{Tokens: path, Log: slog.New(slog.NewTextHandler(log, nil))})
			if got := log.String(); (got == "") != (want[i] == "") || !strings.Contains(got, want[i]) {
				t.Errorf("%v, %d: %q", mode, i, got)
			}
		}
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}
