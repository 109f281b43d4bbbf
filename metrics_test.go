package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// scraped is what Prometheus reads at once.
type scraped map[string]*dto.MetricFamily

// scrape reads /metrics in the text format.
func (g *running) scrape() scraped {
	g.t.Helper()
	families, _ := g.scrapeText()
	return families
}

func (g *running) scrapeText() (scraped, string) {
	g.t.Helper()
	// By another name and through a proxy, as a Prometheus may be.
	response, text := exchange(g.t, g.admin, strings.Replace(get("/metrics"), "Host: localhost", "Host: gateway.example\r\nX-Forwarded-For: 192.0.2.1", 1))
	if response.StatusCode != 200 {
		g.t.Fatalf("/metrics: %d %s", response.StatusCode, text)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		g.t.Fatal(err)
	}
	return families, text
}

// value adds up the counters and gauges of a name that have all of these labels, written name=value.
func (s scraped) value(name string, labels ...string) (sum float64) {
next:
	for _, m := range s[name].GetMetric() {
		for _, label := range labels {
			if !slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName()+"="+l.GetValue() == label }) {
				continue next
			}
		}
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

// What is scraped is what was sent, exactly.
func TestMetrics(t *testing.T) {
	g := launch(t, nil)
	g.register("users", "a.b~c:d-e_f", named(t, "a"))
	g.register("users", "b", named(t, "b"))
	g.register("bad", "a", backend(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }))
	const requests, clients = 300, 3
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			conn, err := net.Dial("tcp", g.data)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			r := bufio.NewReader(conn)
			for n := range requests {
				path := "/users"
				if (i+n)%3 == 0 {
					path = "/bad"
				}
				if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Error(err)
					return
				}
				response, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, response.Body)
			}
		})
	}
	before := g.scrape()
	all.Wait()
	for range 5 {
		g.get("/nowhere")
	}
	const good, bad = requests * clients * 2 / 3, requests * clients / 3
	var s scraped
	eventually(t, "the last one is counted", func() bool {
		s = g.scrape()
		return s.value("kerberos_requests_total") == good+bad && s.value("kerberos_unrouted_requests_total") == 5 && s.value("kerberos_client_connections") == 0
	})
	for _, test := range []struct {
		want   float64
		name   string
		labels []string
	}{
		{good, "kerberos_requests_total", []string{"service=users", "outcome=2xx"}},
		{bad, "kerberos_requests_total", []string{"service=bad", "outcome=5xx"}},
		{good, "kerberos_instance_requests_total", []string{"service=users", "outcome=success"}},
		{good / 2, "kerberos_instance_requests_total", []string{"service=users", "id=a.b~c:d-e_f", "outcome=success"}},
		{bad, "kerberos_instance_requests_total", []string{"service=bad", "id=a", "outcome=success"}}, // to the breaker 500 is none
		{good, "kerberos_request_duration_seconds", []string{"service=users"}},
		{good, "kerberos_gateway_duration_seconds", []string{"service=users"}},
		{good, "kerberos_backend_duration_seconds", []string{"service=users"}},
		{good * float64(len("GET /users HTTP/1.1\r\nHost: x\r\n\r\n")), "kerberos_received_bytes_total", []string{"service=users"}},
		{0, "kerberos_instance_retries_total", nil},
		{5, "kerberos_refusals_total", []string{"status=404", "error=destination_not_found"}},
		{2, "kerberos_instances", []string{"service=users", "state=ready"}},
		{0, "kerberos_instances", []string{"service=echo"}},
		{2, "kerberos_instance_ready", []string{"service=users"}},
		{0, "kerberos_instance_requests_in_flight", nil},
		{0, "kerberos_instance_healthy", nil},
		{3, "kerberos_services", nil}, // and echo
		{1, "kerberos_ready", nil},
		{3, "kerberos_instance_breaker_state", []string{"state=closed"}},
		{clients + 5, "kerberos_client_connections_accepted_total", nil},
	} {
		if got := s.value(test.name, test.labels...); got != test.want {
			t.Errorf("%s%q is %v, want %v", test.name, test.labels, got, test.want)
		}
	}
	for _, direction := range []string{"received", "sent"} { // of a and b each half, but for the name in the Host of one
		a, b := s.value("kerberos_instance_"+direction+"_bytes_total", "id=a.b~c:d-e_f"), s.value("kerberos_instance_"+direction+"_bytes_total", "service=users", "id=b")
		if a < good/2*20 || math.Abs(a-b) > good/2*10 {
			t.Errorf("%s by one instance %v bytes, by the other %v", direction, a, b)
		}
	}
	if n := before.value("kerberos_requests_total"); n > good+bad {
		t.Errorf("%v requests before the end", n)
	}
	if s["go_goroutines"] == nil || s["go_build_info"] == nil {
		t.Error("nothing of the Go runtime")
	}
}

// Requests that instances have not answered yet are counted, for each and for the service.
func TestMetricsInFlight(t *testing.T) {
	g := launch(t, nil)
	release := make(chan struct{})
	for _, id := range []string{"a", "b"} {
		g.register("users", id, backend(t, func(http.ResponseWriter, *http.Request) { <-release }))
	}
	var asked sync.WaitGroup
	for range 4 {
		asked.Go(func() { g.get("/users") })
	}
	eventually(t, "four are in flight", func() bool {
		s := g.scrape()
		return s.value("kerberos_requests_in_flight", "service=users") == 4 && s.value("kerberos_instance_requests_in_flight", "id=a") == 2
	})
	close(release)
	asked.Wait()
	eventually(t, "none is", func() bool { return g.scrape().value("kerberos_requests_in_flight", "service=users") == 0 })
}

// Instances that fell silent all at once, and are not believed to be gone, are seen in /services, in the metrics and in the log.
func TestStaleIsShown(t *testing.T) {
	g := launch(t, nil)
	addr := named(t, "a")
	for i := range 5 {
		if status, body := g.post(fmt.Sprintf(`{"service":"users","id":"i-%d","addr":%q,"ttl":"1s"}`, i, addr)); status != 204 {
			t.Fatalf("%d %s", status, body)
		}
	}
	eventually(t, "they are stale", func() bool { return g.scrape().value("kerberos_stale_instances", "service=users") == 5 })
	if _, body := exchange(t, g.admin, get("/services/users")); strings.Count(body, `"stale":true`) != 5 {
		t.Error(body)
	}
	for i := range 5 {
		if !g.logged("too many of its service are silent", fmt.Sprintf(`"instance":"users/i-%d"`, i)) {
			t.Errorf("the log does not have i-%d", i)
		}
	}
}

// No counter of a service ever falls, whatever comes and goes.
func TestMetricsOnlyGrow(t *testing.T) {
	g := launch(t, nil)
	g.register("users", "stays", named(t, "stays"))
	addr := named(t, "comes and goes")
	done := make(chan struct{})
	var traffic sync.WaitGroup
	traffic.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				g.get("/users")
			}
		}
	})
	last := map[string]float64{}
	for i := range 30 {
		id := fmt.Sprint("i", i%3)
		if i%2 == 0 {
			g.register("users", id, addr)
		} else {
			response, _ := exchange(t, g.admin, "DELETE /services/users/i0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
			_ = response
		}
		s := g.scrape()
		for name, family := range s {
			if family.GetType() == dto.MetricType_GAUGE || strings.HasPrefix(name, "kerberos_instance_") {
				continue
			}
			if now := s.value(name); now < last[name] {
				t.Errorf("%s fell from %v to %v", name, last[name], now)
			} else {
				last[name] = now
			}
		}
	}
	close(done)
	traffic.Wait()
	if last["kerberos_requests_total"] == 0 {
		t.Error("there was no traffic")
	}
}

// Who may read what of the admin listener.
func TestMetricsAccess(t *testing.T) {
	g := launch(t, []string{"KERBEROS_TOKEN=s3cret"}, "--metrics-max-series", "1")
	if s := g.scrape(); s.value("kerberos_metrics_omitted", "what=services") != 1 {
		t.Error("--metrics-max-series is not obeyed")
	}
	profile := get("/debug/pprof/goroutine?debug=1")
	if response, _ := exchange(t, g.admin, profile); response.StatusCode != 401 {
		t.Errorf("a profile without the token: %d", response.StatusCode)
	}
	profile = strings.Replace(profile, "Host:", "Authorization: Bearer s3cret\r\nHost:", 1)
	if response, text := exchange(t, g.admin, profile); response.StatusCode != 200 || !strings.Contains(text, "goroutine profile:") {
		t.Errorf("a profile: %d %.200s", response.StatusCode, text)
	}
	tokens := filepath.Join(t.TempDir(), "tokens.yaml")
	if err := os.WriteFile(tokens, []byte("- {name: all-services, token: all-services-token, register: ['*']}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	shared := launch(t, []string{"KERBEROS_TOKENS=" + tokens})
	response, text := exchange(t, shared.admin, strings.Replace(profile, "s3cret", "all-services-token", 1))
	if response.StatusCode != 403 || !strings.Contains(text, "the right admin") {
		t.Errorf("a profile for who may only register: %d %s", response.StatusCode, text)
	}
	if status, _ := g.get("/metrics"); status != 404 {
		t.Errorf("/metrics for clients: %d", status)
	}
	off := launch(t, nil, "--no-metrics")
	if response, text := exchange(t, off.admin, get("/metrics")); response.StatusCode != 404 || strings.Contains(text, "/metrics and") {
		t.Errorf("/metrics when it is off: %d %s", response.StatusCode, text)
	}
}

// observed is a gateway in which each metric has a value.
func observed(t *testing.T) (scraped, string) {
	g := launch(t, nil)
	if status, text := g.post(fmt.Sprintf(`{"service":"users","id":"a","addr":%q,"check":{"path":"/"}}`, named(t, "a"))); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	eventually(t, "it is healthy", func() bool { status, _ := g.get("/users"); return status == 200 })
	g.get("/nowhere")
	eventually(t, "all is counted", func() bool {
		s := g.scrape()
		return s.value("kerberos_requests_total", "outcome=2xx") == 1 && s.value("kerberos_refusals_total", "status=404") == 1
	})
	return g.scrapeText()
}

var metricPattern = regexp.MustCompile(`\b(?:kerberos|go|process)_[a-z0-9_]+\b`)

// What the dashboard, the alerts and the README speak of is there.
func TestMetricNames(t *testing.T) {
	there, _ := observed(t)
	for _, file := range []string{"deploy/dashboard.json", "deploy/alerts.yml", "deploy/alerts_test.yml", "README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range metricPattern.FindAllString(string(text), -1) {
			base := name
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if cut, ok := strings.CutSuffix(name, suffix); ok && there[cut].GetType() == dto.MetricType_HISTOGRAM {
					base = cut
				}
			}
			if there[base] == nil {
				t.Errorf("%s: there is no %s", file, name)
			}
		}
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Type    string
			Targets []struct{ Expr string }
		}
	}
	text, err := os.ReadFile("deploy/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	if !toolIsThere("promtool") {
		t.Skip("promtool is not installed")
	}
	for _, panel := range dashboard.Panels {
		if panel.Type != "row" && len(panel.Targets) == 0 {
			t.Errorf("%s shows nothing", panel.Title)
		}
	}
	// promtool reads no dashboards, but it reads their queries as rules.
	rules := "groups:\n- name: dashboard\n  rules:\n"
	for _, panel := range dashboard.Panels {
		for i, target := range panel.Targets {
			expr := strings.NewReplacer("$__rate_interval", "5m", "$service", ".*", "$gateway", ".*", "$job", ".*").Replace(target.Expr)
			rules += fmt.Sprintf("  - record: panel:%s:%d\n    expr: %q\n", regexp.MustCompile(`[^a-z]`).ReplaceAllString(strings.ToLower(panel.Title), "_"), i, expr)
		}
	}
	promtool(t, rules, "check", "rules", "/dev/stdin")
}

// The README has each metric, with its labels and what it is.
func TestReadmeMetrics(t *testing.T) {
	there, _ := observed(t)
	var want, got []string
	for name, family := range there {
		if !strings.HasPrefix(name, "kerberos_") {
			continue
		}
		labels := []string{}
		for _, label := range family.Metric[0].Label {
			labels = append(labels, "`"+label.GetName()+"`")
		}
		slices.Sort(labels)
		want = append(want, fmt.Sprintf("`%s` %s %s", name, strings.ToLower(family.GetType().String()), strings.Join(labels, ", ")))
	}
	for _, row := range rows(t, "Metrics") {
		labels := strings.Split(row[2], ", ")
		slices.Sort(labels)
		got = append(got, row[0]+" "+row[1]+" "+strings.Join(labels, ", "))
		if row[3] == "" {
			t.Errorf("%s is not explained", row[0])
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("real -, README +:\n%s", diff)
	}
}

func toolIsThere(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}

// promtool has a look at something, and finds nothing wrong.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	if !toolIsThere("promtool") {
		t.Skip("promtool is not installed")
	}
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "no help text") {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// What Prometheus would not like, promtool says.
func TestPromtool(t *testing.T) {
	_, text := observed(t)
	promtool(t, text, "check", "metrics")
	promtool(t, "", "check", "rules", "deploy/alerts.yml")
	promtool(t, "", "test", "rules", "deploy/alerts_test.yml")
	alerts, err := os.ReadFile("deploy/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("deploy/alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(string(alerts), -1) {
		if n := strings.Count(string(tests), "alertname: "+name[1]+"\n"); n != 2 {
			t.Errorf("%s has %d tests, want one where it fires and one where it does not", name[1], n)
		}
		if !strings.Contains(readme(t), "`"+name[1]+"`") {
			t.Errorf("the README does not say what to do about %s", name[1])
		}
	}
}
