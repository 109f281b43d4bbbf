package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kerberos/internal/config"
	"kerberos/lb"
	"kerberos/registry"
)

// block is a fenced part of the README.
type block struct {
	language string
	text     string
	line     int
}

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func blocks(t *testing.T) []block {
	t.Helper()
	var all []block
	inside := false
	n := 0
	for line := range strings.Lines(readme(t)) {
		n++
		if language, fence := strings.CutPrefix(line, "```"); fence {
			if !inside {
				all = append(all, block{language: strings.TrimSpace(language), line: n})
			}
			inside = !inside
		} else if inside {
			all[len(all)-1].text += line
		}
	}
	return all
}

// session runs the README's commands in their order, as its reader would: in this folder, the servers beside the rest.
// The ports are others, and `go run .` is the binary under test.
type session struct {
	t       *testing.T
	ports   map[string]string // of the README -> of this test
	file    string            // where the Go program is saved
	program string            // what it was built to
	servers map[string]*child // by the command that replaces them
}

var (
	portPattern = regexp.MustCompile(`\b(8080|9901|8081|8082|8083|8090)\b`)
	timePattern = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
	viaPattern  = regexp.MustCompile(`kerberos-[0-9a-f]{12}`)
	gapPattern  = regexp.MustCompile(`  +`) // columns are wider where ports are longer
	server      = regexp.MustCompile(`^(?:\w+=\S+ )?go run (?:(/tmp/gateway\.go)|\.)( backend.*| --.*)?$`)
)

const savedAs = "/tmp/gateway.go"

func newSession(t *testing.T) *session {
	s := &session{t: t, ports: map[string]string{}, servers: map[string]*child{}}
	free := 20_000 + rand.IntN(10_000) // no port that systems give to outgoing connections: tests beside this one have thousands
	for _, port := range []string{"8080", "9901", "8081", "8082", "8083", "8090"} {
		for tries := 0; ; tries++ {
			free++
			ln, err := net.Listen("tcp", fmt.Sprintf(":%d", free))
			if err == nil {
				ln.Close()
				break
			}
			if tries == 100 {
				t.Fatal(err)
			}
		}
		s.ports[port] = strconv.Itoa(free)
	}
	dir := t.TempDir()
	s.file, s.program = filepath.Join(dir, "gateway.go"), filepath.Join(dir, "gateway")
	return s
}

// here makes what the README says what is true in this test; there is the other way round, without what differs each time.
func (s *session) here(text string) string {
	text = strings.ReplaceAll(text, "/tmp", filepath.Dir(s.file))
	return portPattern.ReplaceAllStringFunc(text, func(port string) string { return s.ports[port] })
}

func (s *session) there(text string) string {
	text = strings.ReplaceAll(text, filepath.Dir(s.file), "/tmp")
	for port, here := range s.ports {
		text = strings.ReplaceAll(text, here, port)
	}
	text = timePattern.ReplaceAllString(text, "TIME")
	text = viaPattern.ReplaceAllString(text, "kerberos-ID")
	return gapPattern.ReplaceAllString(text, "  ")
}

func (s *session) env() []string {
	return environment(
		"KERBEROS_LISTEN=:"+s.ports["8080"], "KERBEROS_ADMIN=127.0.0.1:"+s.ports["9901"],
		"KERBEROS_GATEWAY=http://127.0.0.1:"+s.ports["9901"], "KERBEROS="+binary)
}

// functions stands for go in the README's commands.
const functions = `set -eu
go() {
	case "$*" in
	"run . demo") "$KERBEROS" demo --for=1s >&2 ;;                # TestDemo sees a whole cycle
	"run . "*) shift 2; "$KERBEROS" "$@" ;;
	"run ./bench "*) command go run ./bench --help >&2 ;;         # the real one takes half an hour
	"test "*) shift; command go test -n "$@" >/dev/null 2>&1 ;;    # this very test is one of those
	*) echo "the test of the README does not know: go $*" >&2; return 1 ;;
	esac
}
`

// unchanged is behind each block: its reader goes on in the same shell, in this folder.
const unchanged = `
after=$(export -p)
[ "$before" = "$after" ] || { echo "the block changes the shell of its reader: $(diff <(echo "$before") <(echo "$after"))" >&2; exit 1; }
`

// run executes a block and returns what it printed.
func (s *session) run(b block) string {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), "bash", "-c", functions+"before=$(export -p)\n"+s.here(b.text)+unchanged)
	cmd.Env = s.env()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("line %d: %v\n%s\nprinted %s\n%s", b.line, err, b.text, out, stderr.Bytes())
	}
	return string(out)
}

// serve starts a block that is one server, in the place of one that the reader would have had to end first.
func (s *session) serve(b block, want string) {
	s.t.Helper()
	line := strings.TrimSpace(b.text)
	parts := server.FindStringSubmatch(line)
	kind, port := "gateway", "9901"
	switch {
	case parts[1] != "":
		kind, port = "program", "8090"
	case strings.HasPrefix(parts[2], " backend"):
		kind, port = line, portPattern.FindString(parts[2])
	}
	if old := s.servers[kind]; old != nil {
		old.signal(os.Interrupt)
		old.wait()
	}
	line = strings.Replace(line, "go run "+savedAs, "exec "+strings.TrimSuffix(savedAs, ".go"), 1) // which here makes s.program
	line = strings.Replace(line, "go run .", `exec "$KERBEROS"`, 1)
	cmd := exec.Command("bash", "-c", s.here(line))
	cmd.Env = s.env()
	c := beginCommand(s.t, cmd)
	s.servers[kind] = c
	eventually(s.t, fmt.Sprintf("line %d: %s has started", b.line, b.text), func() bool {
		select {
		case <-c.ended:
			s.t.Fatalf("line %d: %s ended: %s", b.line, b.text, c.stderr.String())
		default:
		}
		conn, err := net.Dial("tcp", "127.0.0.1:"+s.ports[port])
		if err == nil {
			conn.Close()
		}
		return err == nil && (want == "" || strings.Count(c.stdout.String(), "\n") >= strings.Count(want, "\n"))
	})
	if want != "" {
		s.compare(b, want, c.stdout.String())
	}
}

func (s *session) compare(b block, want, got string) {
	s.t.Helper()
	if diff := cmp.Diff(s.there(want), s.there(got)); diff != "" {
		s.t.Errorf("line %d: README -, real +:\n%s", b.line, diff)
	}
}

func (s *session) save(b block) {
	s.t.Helper()
	if err := os.WriteFile(s.file, []byte(s.here(b.text)), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if out, err := exec.Command("gofmt", "-l", s.file).CombinedOutput(); err != nil || len(out) > 0 {
		s.t.Errorf("line %d: the program is not formatted: %v %s", b.line, err, out)
	}
	if out, err := exec.Command("go", "build", "-o", s.program, s.file).CombinedOutput(); err != nil {
		s.t.Fatalf("line %d: %v\n%s", b.line, err, out)
	}
}

// Every command of the README is run, and every output compared.
func TestReadme(t *testing.T) {
	for _, tool := range []string{"bash", "curl", "openssl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the README's commands need %s", tool)
		}
	}
	s := newSession(t)
	all := blocks(t)
	commands := 0
	for i, b := range all {
		want := ""
		if i+1 < len(all) && all[i+1].language == "text" {
			want = all[i+1].text
		}
		switch b.language {
		case "sh":
			commands++
			if server.MatchString(strings.TrimSpace(b.text)) {
				s.serve(b, want)
			} else if got := s.run(b); want != "" || got != "" {
				s.compare(b, want, got)
			}
		case "go":
			s.save(b)
		case "text":
			if i == 0 || all[i-1].language != "sh" {
				t.Errorf("line %d: an output of no command", b.line)
			}
		case "", "nginx", "haproxy", "ini", "yaml", "json": // a picture; what TestClientBehindTrustedFront, TestReadmeUnits and TestReadmeAccessLog run
		default:
			t.Errorf("line %d: nothing tests a block of %s", b.line, b.language)
		}
	}
	if commands < 10 {
		t.Errorf("only %d blocks of commands were found", commands)
	}
}

// What the README has a service manager do, is done.
func TestReadmeUnits(t *testing.T) {
	g := launch(t, nil)
	names := strings.NewReplacer("%H", "host", "$HOSTNAME", "host", `"`, "", "]", "")
	line := regexp.MustCompile(`kerberos ((?:un)?register .*)`)
	var did []string
	for _, b := range blocks(t) {
		if b.language != "ini" && b.language != "yaml" {
			continue
		}
		for _, match := range line.FindAllStringSubmatch(b.text, -1) {
			args := strings.Fields(names.Replace(match[1]))
			if out, errs, code := command(t, nil, append(args, "--gateway", "http://"+g.admin)...); code != 0 {
				t.Errorf("%v: %d\n%s%s", args, code, out, errs)
			}
			did = append(did, args[0])
		}
	}
	if !slices.Equal(did, []string{"register", "unregister", "unregister"}) {
		t.Errorf("commands: %v", did)
	}
}

// The line that the README shows has the fields of a real one, in their order.
func TestReadmeAccessLog(t *testing.T) {
	g := launch(t, nil, "--access-log", "stdout", "--request-id", "--route", "/users=users")
	g.register("users", "a", named(t, "a"))
	exchange(t, g.data, strings.Replace(get("/users/7?tab=a"), "\r\n\r\n", "\r\nUser-Agent: curl\r\nReferer: http://a/\r\n"+
		"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n", 1))
	eventually(t, "the line is there", func() bool { return strings.HasSuffix(g.stdout.String(), "}\n") })
	key := regexp.MustCompile(`"(\w+)":`)
	for _, b := range blocks(t) {
		if b.language != "json" {
			continue
		}
		want, got := key.FindAllString(b.text, -1), key.FindAllString(g.stdout.String(), -1)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("README -, real +:\n%s", diff)
		}
		return
	}
	t.Error("the README has no line")
}

// rows are the cells of the table below a heading, without its head.
func rows(t *testing.T, heading string) [][]string {
	t.Helper()
	_, section, ok := strings.Cut(readme(t), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var all [][]string
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		all = append(all, cells)
	}
	if len(all) < 3 {
		t.Fatalf("no table in section %q", heading)
	}
	return all[2:]
}

// The table of flags has each flag once, with its default.
func TestReadmeFlags(t *testing.T) {
	var grammar struct {
		Run config.Gateway `cmd:"" default:"withargs"`
	}
	ctx, err := config.Parse(&grammar, nil, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	text := readme(t)
	for _, flag := range ctx.Model.DefaultCmd.Flags {
		value := ""
		if flag.HasDefault {
			value = "`" + flag.Default + "`"
		}
		want = append(want, "`--"+flag.Name+"` "+value)
		for _, name := range config.Variables(flag)[1:] {
			if !strings.Contains(text, "`"+name+"`") {
				t.Errorf("the second name %s is not mentioned", name)
			}
		}
	}
	for _, row := range append(rows(t, "Flags"), rows(t, "Limits")...) {
		flag, _, _ := strings.Cut(row[0], ":")
		if !strings.HasPrefix(flag, "`--") {
			continue // a limit that is fixed
		}
		got = append(got, flag+" "+row[1])
		if row[2] == "" {
			t.Errorf("%s is not explained", row[0])
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("flags and defaults: real -, README +:\n%s", diff)
	}
}

// The table of calls has those of the API, each with the status that it has where it is obeyed.
func TestReadmeAPI(t *testing.T) {
	g := launch(t, nil)
	bodies := map[string]string{
		"POST /register":                 `{"service":"echo","id":"a","addr":"http://127.0.0.1:1"}`,
		"DELETE /register":               `{"service":"echo","id":"a"}`,
		"PUT /services/{service}/{id}":   `{"addr":"http://127.0.0.1:1"}`,
		"PATCH /services/{service}/{id}": `{"state":"down"}`,
	}
	names := strings.NewReplacer("{service}", "echo", "{id}", "a")
	calls := 0
	for _, row := range rows(t, "The API") {
		call := strings.Trim(row[0], "`")
		if len(row) == 2 || strings.HasSuffix(call, "?hold") { // the table of refusals; what TestReadme does
			continue
		}
		calls++
		g.register("echo", "a", "http://127.0.0.1:1")
		response, body := exchange(t, g.admin, strings.Replace(post(bodies[call]), "POST /register", names.Replace(call), 1))
		if status := strconv.Itoa(response.StatusCode); !strings.HasPrefix(row[2], status) {
			t.Errorf("%s: README %q, real %s %s", call, row[2], status, body)
		}
	}
	if calls != 9 {
		t.Errorf("%d calls", calls)
	}
}

func TestReadmeStrategies(t *testing.T) {
	var want, got []string
	for _, strategy := range lb.Strategies() {
		want = append(want, "`"+string(strategy)+"`")
	}
	for _, row := range rows(t, "Strategies") {
		got = append(got, row[0])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("real -, README +:\n%s", diff)
	}
}

// The limits that have a number are met at it and not past it. Those that are flags are set in TestLimitFlags, and have their
// tests in proxy, as those of time do.
func TestReadmeLimits(t *testing.T) {
	limits, flags := map[string]string{}, map[string]bool{}
	for _, row := range rows(t, "Limits") {
		what, isFlag := strings.CutPrefix(row[0], "`--")
		if isFlag {
			_, what, _ = strings.Cut(what, ": ")
			row[1] = strings.Trim(row[1], "`")
		}
		limits[what] = row[1] + " -> " + row[2]
		flags[what] = isFlag
	}
	g := launch(t, nil)
	g.register("echo", "a", named(t, "a"))
	register := func(id string, weight int, padding int) int {
		status, _ := g.post(fmt.Sprintf(`{"service":"echo","id":%q,"addr":"http://127.0.0.1:1","weight":%d}%s`, id, weight, strings.Repeat(" ", padding)))
		return status
	}
	long := func(size int) int {
		const addr = "http://127.0.0.1:1/"
		status, _ := g.post(fmt.Sprintf(`{"service":"long","id":"a","addr":%q}`, addr+strings.Repeat("x", size-len(addr))))
		return status
	}
	lend := func(ttl string) int {
		status, _ := g.post(fmt.Sprintf(`{"service":"echo","id":"lent","addr":"http://127.0.0.1:1","ttl":%q}`, ttl))
		return status
	}
	metadata := func(pairs, bytes int) int {
		all := map[string]string{}
		for i := range pairs {
			all[strconv.Itoa(i)] = strings.Repeat("v", bytes)
		}
		text, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		status, _ := g.post(`{"service":"echo","id":"m","addr":"http://127.0.0.1:1","metadata":` + string(text) + `}`)
		return status
	}
	drained := func(limit string) int {
		register("drained", 1, 0)
		response, _ := exchange(t, g.admin, strings.Replace(post(fmt.Sprintf(`{"service":"echo","id":"drained","drain":%q}`, limit)), "POST", "DELETE", 1))
		return response.StatusCode
	}
	checked := func(members string) int {
		status, _ := g.post(`{"service":"echo","id":"k","addr":"http://127.0.0.1:1",` + members + `}`)
		return status
	}
	interval := func(d string) int { return checked(`"check":{"tcp":true,"interval":"` + d + `"}`) }
	timeout := func(d string) int { return checked(`"check":{"tcp":true,"interval":"1h","timeout":"` + d + `"}`) }
	counts := func(n int) int { return checked(fmt.Sprintf(`"check":{"tcp":true,"fall":%d,"rise":%[1]d}`, n)) }
	path := func(size int) int { return checked(`"check":{"path":"/` + strings.Repeat("x", size-1) + `"}`) }
	ranges := func(n int) int {
		return checked(`"check":{"path":"/","status":"200` + strings.Repeat(",200", n-1) + `"}`)
	}
	slow := func(d string) int { return checked(`"slow_start":"` + d + `"`) }
	head := func(size int) int {
		raw := get("/echo")
		raw = strings.Replace(raw, "\r\n\r\n", "\r\nX: "+strings.Repeat("x", size-len(raw)-len("X: \r\n"))+"\r\n\r\n", 1)
		response, _ := exchange(t, g.data, raw)
		return response.StatusCode
	}
	answer := func(size int) int { // with a head of about that many bytes
		g.register("wide", "a", backend(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", size-200)) }))
		status, _ := g.get("/wide")
		return status
	}
	interim := func(n int) int {
		g.register("early", "a", backend(t, func(w http.ResponseWriter, _ *http.Request) {
			for range n {
				w.WriteHeader(http.StatusEarlyHints)
			}
		}))
		response, _ := exchange(t, g.data, strings.Replace(get("/early"), "HTTP/1.1", "HTTP/1.0", 1)) // which gets none of them
		return response.StatusCode
	}
	raw := func(request string) int {
		response, _ := exchange(t, g.data, request)
		return response.StatusCode
	}
	nominated := func(n int) int {
		return raw(strings.Replace(get("/echo"), "\r\n\r\n", "\r\nConnection: "+strings.Repeat("x, ", n)+"\r\n\r\n", 1))
	}
	fields := func(n int) int {
		plain := get("/echo")
		return raw(strings.Replace(plain, "\r\n\r\n", strings.Repeat("\r\nX: y", n-strings.Count(plain, "\r\n")+2)+"\r\n\r\n", 1))
	}
	line := func(size int) int {
		plain := get("/echo")
		return raw(strings.Replace(plain, "/echo", "/echo?"+strings.Repeat("x", size-strings.Index(plain, "\n")-2), 1))
	}
	chunked := func(extension, trailer int) int {
		request := strings.Replace(get("/echo"), "\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n", 1)
		for line := "T: " + strings.Repeat("t", 1019) + "\r\n"; trailer > 0; trailer-- { // 1 KiB each
			request += line
		}
		return raw(strings.Replace(request, "chunked\r\n\r\n", "chunked\r\n\r\n0;"+strings.Repeat("e", extension)+"\r\n", 1) + "\r\n")
	}
	if within, past := answer(32<<10), answer(33<<10); within != 200 || past != 502 {
		t.Errorf("response heads: status %d at the limit, %d past it", within, past)
	}
	for what, test := range map[string]struct {
		want         string
		within, past int
	}{
		"fields that a `Connection` field names":      {"32 -> 400", nominated(32), nominated(33)},
		"size line of a chunk":                        {"4 KiB -> 400", chunked(4000, 0), chunked(4<<10, 0)},
		"trailer section":                             {"16 KiB -> 400", chunked(0, 15), chunked(0, 17)},
		"a service's name, an instance's id":          {"128 characters of `A-Z a-z 0-9 . _ ~ : -` -> 400", register(strings.Repeat("x", 128), 1, 0), register(strings.Repeat("x", 129), 1, 0)},
		"`addr`, in bytes":                            {"2048 -> 400", long(2048), long(2049)},
		"connections that hold a lease":               {"10000 -> 503 with `Retry-After`", 0, 0}, // TestTooManyHolds in registry
		"weight":                                      {fmt.Sprintf("%d -> 400", registry.MaxWeight), register("w", registry.MaxWeight, 0), register("w", registry.MaxWeight+1, 0)},
		"`ttl` of a lease, from 1 s on":               {"24 h -> 400", lend("24h"), lend("24h1s")},
		"drain":                                       {"1 h -> 400", drained("1h"), drained("61m")},
		"instances listed as expired, for 10 minutes": {"1000 -> the oldest are forgotten", 0, 0}, // TestManyExpire in registry
		"body of an API call":                         {fmt.Sprintf("%d KiB -> 413", registry.MaxBody>>10), register("b", 1, 60<<10), register("b", 1, 64<<10)},
		"interim responses (1xx) before a response":   {"16 -> 502", interim(16), interim(17)},
		"backend that takes nothing of a request":     {"30 s -> 504", 0, 0}, // TestBackendTakesNothing in proxy
		"metadata of an instance":                     {"64 -> 400", metadata(64, 1), metadata(65, 1)},
		"value in metadata, in bytes":                 {"512 -> 400", metadata(1, 512), metadata(1, 513)},
		"instances asked for one request":             {fmt.Sprintf("%d -> the last one's error", lb.MaxTried), 0, 0},
		"HTTP/2, TLS to clients":                      {"not yet -> 505 for HTTP/2", 0, raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")},
		"request body that can be sent again":         {"64 KiB -> it is streamed and sent once", upload(g, 3<<20), 0},
		"registrations without `--data`":              {"in memory -> gone with the process", 0, 0},
		"with it: a change waits for the disk":        {"10 s -> 503; it is in force, and written later", 0, 0}, // TestNotSaved and TestLateWrite in registry
		"a start waits for an instance of the file to accept a connection":       {"2 s -> it is `unreachable` until it does, or is heard of", 0, 0}, // TestUnreachable in registry
		"`interval` of a check, from 100 ms on":                                  {"1 h -> 400", interval("1h"), interval("61m")},
		"`timeout` of a check, from 100 ms on":                                   {"1 m -> 400", timeout("1m"), timeout("61s")},
		"`fall` and `rise` of a check":                                           {"100 -> 400", counts(100), counts(101)},
		"`path` of a check, in bytes":                                            {"1024 -> 400", path(1024), path(1025)},
		"ranges in `status` of a check":                                          {"16 -> 400", ranges(16), ranges(17)},
		"head of an answer to a check":                                           {"16 KiB -> the check fails", 0, 0},                                                           // TestVerdicts in registry/health
		"checks under way":                                                       {"1024 -> they wait; 256 at most are of new instances, and 256 of such as have failed", 0, 0}, // TestHangingOnes there
		"`slow_start`":                                                           {"1 h -> 400", slow("1h"), slow("61m")},
		"start line and fields of a request or a response, in bytes; 0 is 1 MiB": {"32KiB -> 431; 502 for a backend's", head(32 << 10), head(32<<10 + 1)},
		"field lines of a request or a response":                                 {"200 -> 431; 502 for a backend's", fields(200), fields(201)},
		"first line of a request":                                                {"16KiB -> 414", line(16 << 10), line(16<<10 + 1)},
		"attempts on the API that failed, of one address (IPv6: of one /64)":     {"10 at once, then 1 a second -> 429 with `Retry-After`, but to those who have a right", 0, guess(t, 100)},
		"file of `--config` or `--tokens`, and those of certificates":            {"1 MiB -> it is refused, or what it was stays in force", 0, 0}, // TestNewRefuses in internal/access
	} {
		if limits[what] != test.want {
			t.Errorf("%s: README %q, real %q", what, limits[what], test.want)
		}
		delete(limits, what)
		if test.within != 0 && test.within/100 != 2 {
			t.Errorf("%s: status %d at the limit", what, test.within)
		}
		_, beyond, _ := strings.Cut(test.want, " -> ")
		if test.past != 0 && !strings.HasPrefix(beyond, strconv.Itoa(test.past)) {
			t.Errorf("%s: status %d past the limit, want %s", what, test.past, beyond)
		}
	}
	for what := range limits {
		if !flags[what] {
			t.Errorf("%s: nothing tests this limit", what)
		}
	}
}

// The limits of what is at once, with the flags that set them: one request or connection is served, the next is not.
func TestReadmeLimitsAtOnce(t *testing.T) {
	for _, test := range []struct {
		flags []string
		want  int
	}{
		{[]string{"--max-connections=1"}, 503},
		{[]string{"--max-connections-per-client=1"}, 429},
		{[]string{"--max-in-flight-per-instance=1", "--queue-timeout=10ms"}, 503},
		{[]string{"--max-in-flight-per-service=1", "--queue-timeout=0s"}, 503},
	} {
		g := launch(t, nil, test.flags...)
		came, answered := make(chan struct{}), make(chan struct{})
		g.register("echo", "a", backend(t, func(http.ResponseWriter, *http.Request) {
			close(came)
			<-answered
		}))
		first := make(chan error)
		go func() {
			response, _, err := converse(&net.Dialer{}, g.data, get("/echo"))
			if err == nil && response.StatusCode != 200 {
				err = errors.New(response.Status)
			}
			first <- err
		}()
		<-came
		if response, body := exchange(t, g.data, get("/echo")); response.StatusCode != test.want || response.Header.Get("Retry-After") != "1" {
			t.Errorf("%v: %d %q past the limit", test.flags, response.StatusCode, body)
		}
		close(answered)
		if err := <-first; err != nil {
			t.Errorf("%v: %v at the limit", test.flags, err)
		}
	}
}

// guess is the status of the last of so many attempts with a wrong token.
func guess(t *testing.T, n int) (status int) {
	g := launch(t, nil, "--token=s3cret")
	for range n {
		response, _ := exchange(t, g.admin, strings.Replace(get("/services"), "\r\n\r\n", "\r\nAuthorization: Bearer wrong\r\n\r\n", 1))
		status = response.StatusCode
	}
	return status
}

// upload sends a body to a backend that reads all of it: one that answers before could have the client find a reset.
func upload(g *running, size int) int {
	g.register("upload", "a", backend(g.t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	response, err := http.Post("http://"+g.data+"/upload", "text/plain", strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		g.t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}
