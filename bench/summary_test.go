package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// aRow has so many rounds as values, each with that value wherever a figure may be looked for.
func aRow(gateway, setting string, values ...float64) *row {
	r := &row{Gateway: gateway, Version: "1.0", Setting: setting}
	for _, v := range values {
		r.Rounds = append(r.Rounds, sample{CPU: v, P50: v, P99: v, P999: v, Resident: v, PerConn: v, Busy: v, RequestsPerSecond: v, Requests: 1000})
	}
	r.summarize()
	return r
}

func aTable(section string, compared figure, rows ...*row) *table {
	t := &table{Section: section, Title: "the load <" + section + "> & more", Compared: compared, Rows: rows}
	t.compare()
	return t
}

func verdictOf(t *testing.T, r *result, what string) verdict {
	t.Helper()
	r.summarize()
	i := slices.IndexFunc(r.Summary, func(v verdict) bool { return v.title() == what })
	if i < 0 {
		t.Fatalf("no verdict on %q in %+v", what, r.Summary)
	}
	return r.Summary[i]
}

func TestVerdicts(t *testing.T) {
	for _, test := range []struct {
		name   string
		table  *table
		what   string
		figure float64
		word   string
	}{
		{"the cheaper one of nginx and haproxy, no other", aTable("get-64", cpuPerRequest, aRow("kerberos", "", 8), aRow("nginx", "", 11), aRow("haproxy", "", 10), aRow("caddy", "", 9)),
			"GET 12 B, 64 connections, against haproxy", 0.8, "goal"},
		{"accepted", aTable("get-16", cpuPerRequest, aRow("kerberos", "", 8.9), aRow("nginx", "", 10)),
			"GET 12 B, 16 connections, against nginx", 0.89, "ok"},
		{"on the line, as it is shown", aTable("get-16", cpuPerRequest, aRow("kerberos", "", 9.0004), aRow("nginx", "", 10)),
			"GET 12 B, 16 connections, against nginx", 0.90004, "ok"},
		{"just not", aTable("get-16", cpuPerRequest, aRow("kerberos", "", 9.01), aRow("nginx", "", 10)),
			"GET 12 B, 16 connections, against nginx", 0.901, "missed"},
		{"nobody to compare with", aTable("get-16", cpuPerRequest, aRow("kerberos", "", 9)), "GET 12 B, 16 connections", 0, "not measured"},
		{"not measured", aTable("other", cpuPerRequest, aRow("kerberos", "", 9)), "16 KiB response", 0, "not measured"},
		{"the cheapest of all peers", aTable("1m", cpuPerRequest, aRow("kerberos", "", 300), aRow("nginx", "", 440), aRow("traefik", "", 320), aRow("pump-splice", "", 100)),
			"1 MiB response, against traefik", 300.0 / 320, "missed"},
		{"the pump", aTable("get-64", cpuPerRequest, aRow("kerberos", "", 9), aRow("nginx", "", 5), aRow("pump", "", 7.5)),
			"GET 12 B, 64 connections, against pump", 1.2, "goal"},
		{"one connection", aTable("one", p50, aRow("kerberos", "", 95), aRow("haproxy", "", 10), aRow("nginx", "", 100)),
			"p50 of one connection, against nginx", 0.95, "ok"},
		{"medians of rounds", aTable("open-50", p99, aRow("kerberos", "", 1, 120, 9000), aRow("nginx", "", 100, 100, 1), aRow("haproxy", "", 101, 102, 103)),
			"p99 at half the capacity, against nginx", 1.2, "ok"},
		{"memory", aTable("memory-busy", resident, aRow("kerberos", "", 30), aRow("nginx", "", 10), aRow("haproxy", "", 30)),
			"memory with 1,000 busy connections, against nginx", 3, "missed"},
		{"idle", aTable("memory-idle", perConn, aRow("kerberos", "", 7)), "memory of an idle connection", 7, "ok"},
		{"at least", paired(aTable("cores", cpuPerRequest, aRow("kerberos", "1 CPU", 9, 18, 10), aRow("kerberos", "2 CPUs", 10, 20, 10))),
			"requests per CPU second with 2 CPUs, against 1 CPU", 0.9, "ok"},
		{"pairs, not medians", paired(aTable("services", cpuPerRequest, aRow("kerberos", "one instance", 10, 20, 30), aRow("kerberos", "one of 100 asked", 10, 10, 60))),
			"100 services of 10 instances, against one instance", 1, "goal"},
		{"storm", aTable("storm", p99, aRow("kerberos", "quiet", 0.5, 0.5, 0.5), aRow("kerberos", "storm", 0.6, 0.7, 0.5)),
			"p99 while 1,000/s are registered, against quiet", 1.2, "goal"},
		{"registering", aTable("storm", p99, aRow("kerberos", "quiet", 1000, 1000, 1000), aRow("kerberos", "storm", 1100, 1500, 1050)),
			"CPU for registering 1,000/s", 10, "ok"}, // 100 us more for each of 1000 requests a second
	} {
		v := verdictOf(t, &result{Tables: []*table{test.table}}, test.what)
		if math.Abs(v.Figure-test.figure) > 1e-9 || v.Word != test.word {
			t.Errorf("%s: %+v, want %v, %s", test.name, v, test.figure, test.word)
		}
	}
}

func paired(t *table) *table {
	t.Paired = true
	t.compare()
	return t
}

func aResult() *result {
	return &result{Machine: machine{CPU: "Some <CPU> & more", CPUs: 2, System: "Linux 6", Go: "go1.26"}, Tool: "builtin", Gateways: []string{"kerberos 1.0", "nginx 1.0"}, Rounds: 3, Seconds: 2, Tables: []*table{
		aTable("get-64", cpuPerRequest, aRow("kerberos", "", 9, 9, 9), aRow("nginx", "", 10, 10, 10), aRow("caddy", "", 60, 60, 60), aRow("pump", "", 7, 7, 7)),
		aTable("1m", cpuPerRequest, aRow("kerberos", "", 300, 300, 300), aRow("nginx", "", 400, 400, 400), aRow("pump-splice", "", 200, 200, 200)),
		aTable("cores", cpuPerRequest, aRow("kerberos", "1 CPU", 9), aRow("kerberos", "2 CPUs", 10)),
		{Section: "open-50", Title: "open", Layout: layoutOpen, Compared: p99, Rows: []*row{aRow("kerberos", "", 120), aRow("nginx", "", 100)}},
	}}
}

// The picture is XML, names machine and versions, and its bars are as long as the figures say.
func TestSVG(t *testing.T) {
	picture := aResult().svg()
	d := xml.NewDecoder(bytes.NewReader(picture))
	var texts []string
	widths := map[string][]string{}
	cut := 0
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, picture)
		}
		switch token := token.(type) {
		case xml.CharData:
			texts = append(texts, string(token))
		case xml.StartElement:
			attr := map[string]string{}
			for _, a := range token.Attr {
				attr[a.Name.Local] = a.Value
			}
			switch token.Name.Local {
			case "rect":
				widths[attr["class"]] = append(widths[attr["class"]], attr["width"])
			case "path":
				cut++
			}
		}
	}
	all := strings.Join(texts, "\n")
	for _, want := range []string{"Some <CPU> & more, 2 CPUs, Linux 6, go1.26", "kerberos 1.0, nginx 1.0", "the load <get-64> & more", "9.0", "60.0", "300"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in\n%s", want, all)
		}
	}
	if strings.Contains(all, "<cores>") || strings.Contains(all, "\nopen\n") {
		t.Error("it shows what is not about the cost of a load")
	}
	// In the first panel the bar of nginx is the longest that is not cut, 160 wide.
	if got := strings.Join(widths["kerberos"], " "); got != "144.0 120.0" {
		t.Errorf("kerberos: %s", got)
	}
	if got := strings.Join(widths["peer"], " "); got != "160.0 160.0 160.0" || cut != 1 {
		t.Errorf("peers: %s, %d of them cut", got, cut)
	}
	if got := strings.Join(widths["pump"], " "); got != "112.0 80.0" {
		t.Errorf("pumps: %s", got)
	}
}

func TestMarkdown(t *testing.T) {
	r := aResult()
	r.summarize()
	text := string(r.markdown())
	for _, want := range []string{
		"Some <CPU> & more, 2 CPUs, Linux 6, go1.26",
		"medians of 3 rounds of 2 s",
		"\n| CPU microseconds per request | kerberos | nginx | caddy | pump | pump-splice |\n| --- | --- | --- | --- | --- | --- |\n| the load <get-64> & more | 9.0 | 10.0 | 60.0 | 7.0 | |\n",
		"| the load <1m> & more | 300 | 400 | | | 200 |\n",
		"| open | 120 / 120 / 120 | 100 / 100 / 100 |\n",
		"| GET 12 B, 64 connections, against nginx | 0.900 | <= 0.9 | <= 0.85 | ok |\n",
		"| POST 1 KiB | - | <= 0.9 | <= 0.85 | not measured |\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for line := range strings.Lines(text) {
		if n := strings.Count(line, "|"); n != 0 && n != 7 && n != 4 && n != 6 {
			t.Errorf("%d columns: %s", n-1, line)
		}
	}
}

// What was measured before is shown again; sections measured apart are put together.
func TestFrom(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, r *result) string {
		file := filepath.Join(dir, name)
		if err := writeJSON(file, r); err != nil {
			t.Fatal(err)
		}
		return file
	}
	first, second, other := aResult(), aResult(), aResult()
	first.Tables = first.Tables[:2]
	second.Tables = []*table{second.Tables[2], aTable("1m", cpuPerRequest, aRow("kerberos", "", 200), aRow("nginx", "", 400))}
	other.Machine.CPU = "another"
	a, b, c := write("a", first), write("b", second), write("c", other)
	svg, md, all := filepath.Join(dir, "svg"), filepath.Join(dir, "md"), filepath.Join(dir, "all")
	out, err := command(t, dir, "--from", a, "--from", b, "--svg", svg, "--markdown", md, "--json", all).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"get-64: the load", "cores: the load", "1 MiB response, against nginx", "0.500", "goal"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	var res result
	text, err := os.ReadFile(all)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &res); err != nil || len(res.Tables) != 3 || len(res.Summary) != len(requirements()) {
		t.Errorf("%d tables, %d verdicts, %v", len(res.Tables), len(res.Summary), err)
	}
	for file, want := range map[string][]byte{svg: res.svg(), md: res.markdown()} {
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v\n%s", file, err, got)
		}
	}
	if out, err := command(t, dir, "--from", a, "--from", c).CombinedOutput(); err == nil || !strings.Contains(string(out), "another machine") {
		t.Errorf("results of two machines: %v\n%s", err, out)
	}
}
