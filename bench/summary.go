package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// requirement is a line of what must hold.
type requirement struct {
	what           string
	accepted, goal float64
	atLeast        bool // else at most
	unit           string
	figure         func(r *result) (value float64, against string)
}

// requirements are those that this command can judge, in the order of its sections.
func requirements() []requirement {
	var all []requirement
	cost := func(section, what string, accepted, goal float64, against func(string) bool) {
		all = append(all, requirement{what: what, accepted: accepted, goal: goal, figure: func(r *result) (float64, string) {
			return r.table(section).toBest(cpuPerRequest, against)
		}})
	}
	for _, n := range []string{"16", "64", "256"} {
		cost("get-"+n, "GET 12 B, "+n+" connections", 0.90, 0.85, isC)
	}
	for _, n := range []string{"16", "64", "256"} {
		cost("browser-"+n, "browser's headers, "+n+" connections", 0.90, 0.82, isC)
	}
	cost("post", "POST 1 KiB", 0.90, 0.85, isC)
	cost("16k", "16 KiB response", 0.95, 0.88, isC)
	cost("1m", "1 MiB response", 0.85, 0.75, isPeer)
	cost("get-64", "GET 12 B, 64 connections", 1.30, 1.22, func(name string) bool { return name == "pump" })
	return append(all,
		requirement{"p50 of one connection", 1.0, 0.9, false, "", func(r *result) (float64, string) {
			return r.table("one").toBest(p50, isNginx)
		}},
		requirement{"p99 at half the capacity", 1.25, 1.0, false, "", func(r *result) (float64, string) {
			return r.table("open-50").toBest(p99, isPeer)
		}},
		requirement{"memory with 1,000 busy connections", 2.0, 1.5, false, "", func(r *result) (float64, string) {
			return r.table("memory-busy").toBest(resident, isNginx)
		}},
		requirement{"memory of an idle connection", 12, 6, false, " KiB", func(r *result) (float64, string) {
			if row := r.table("memory-idle").row("kerberos"); row != nil {
				return row.Median.PerConn, ""
			}
			return 0, ""
		}},
		requirement{"requests per CPU second with 2 CPUs", 0.85, 0.95, true, "", func(r *result) (float64, string) {
			if row := r.table("cores").row("2 CPUs"); row != nil && row.Paired > 0 {
				return 1 / row.Paired, "1 CPU"
			}
			return 0, ""
		}},
		requirement{"100 services of 10 instances", 1.03, 1.0, false, "", func(r *result) (float64, string) {
			return r.table("services").paired("one of 100 asked")
		}},
		requirement{"p99 while 1,000/s are registered", 1.5, 1.2, false, "", func(r *result) (float64, string) {
			return r.table("storm").toBest(p99, func(name string) bool { return name == "quiet" })
		}},
		requirement{"CPU for registering 1,000/s", 15, math.NaN(), false, " %", func(r *result) (float64, string) {
			return r.table("storm").registering()
		}},
	)
}

// Which rows a requirement compares with. The issue says which.
func isNginx(name string) bool { return name == "nginx" }
func isC(name string) bool     { return name == "nginx" || name == "haproxy" }
func isPeer(name string) bool  { return name != "kerberos" && !isPump(name) }

// table returns a section's table, nil if there is none; the methods below take nil as a table without rows.
func (r *result) table(section string) *table {
	for _, t := range r.Tables {
		if t.Section == section {
			return t
		}
	}
	return nil
}

func (t *table) row(name string) *row {
	if t != nil {
		for _, r := range t.Rows {
			if r.name() == name {
				return r
			}
		}
	}
	return nil
}

// toBest returns the figure of the row that is judged, kerberos or the storm, by the least of those to compare with.
func (t *table) toBest(f figure, against func(name string) bool) (ratio float64, best string) {
	ours := t.row("kerberos")
	if ours == nil {
		ours = t.row("storm")
	}
	if ours == nil {
		return 0, ""
	}
	least := math.Inf(1)
	for _, r := range t.Rows {
		if v := f.of(r.Median); against(r.name()) && v > 0 && v < least {
			least, best = v, r.name()
		}
	}
	return f.of(ours.Median) / least, best
}

func (t *table) paired(name string) (float64, string) {
	if r := t.row(name); r != nil {
		return r.Paired, t.Rows[0].name()
	}
	return 0, ""
}

// registering returns the percentage of one CPU that a storm costs: what requests cost more in it, round by round, at the
// rate that they have. How busy the gateway is would say less, where it has no time left.
func (t *table) registering() (float64, string) {
	quiet, storm := t.row("quiet"), t.row("storm")
	if quiet == nil || storm == nil {
		return 0, ""
	}
	var shares []float64
	for i, s := range storm.Rounds {
		q := quiet.Rounds[i]
		shares = append(shares, 100*(s.CPU-q.CPU)*q.RequestsPerSecond/1e6)
	}
	return median(shares), ""
}

// verdict is a requirement and how it is met.
type verdict struct {
	What     string  `json:"what"`
	Against  string  `json:"against,omitempty"`
	Figure   float64 `json:"figure"` // 0: not measured
	Unit     string  `json:"unit,omitempty"`
	Accepted string  `json:"accepted"`
	Goal     string  `json:"goal"`
	Word     string  `json:"verdict"`
}

const (
	wordNot    = "not measured"
	wordGoal   = "goal"   // even the goal is met
	wordOK     = "ok"     // accepted
	wordMissed = "missed" // not accepted
)

// judge compares a figure, as exactly as it is shown.
func (q requirement) judge(value float64) string {
	shown := math.Round(value*1000) / 1000
	within := func(limit float64) bool {
		if q.atLeast {
			return shown >= limit
		}
		return shown <= limit
	}
	switch {
	case within(q.goal):
		return wordGoal
	case within(q.accepted):
		return wordOK
	}
	return wordMissed
}

// summarize judges what was measured.
func (r *result) summarize() {
	r.Summary = nil
	for _, q := range requirements() {
		sign := "<="
		if q.atLeast {
			sign = ">="
		}
		v := verdict{What: q.what, Unit: q.unit, Accepted: fmt.Sprintf("%s %g%s", sign, q.accepted, q.unit), Word: wordNot}
		if !math.IsNaN(q.goal) {
			v.Goal = fmt.Sprintf("%s %g%s", sign, q.goal, q.unit)
		}
		if value, against := q.figure(r); value != 0 && !math.IsInf(value, 0) && !math.IsNaN(value) {
			v.Figure, v.Against, v.Word = value, against, q.judge(value)
		}
		r.Summary = append(r.Summary, v)
	}
}

func (v verdict) figure() string {
	if v.Figure == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f%s", v.Figure, v.Unit)
}

func (v verdict) title() string {
	if v.Against != "" {
		return v.What + ", against " + v.Against
	}
	return v.What
}

func (r *result) printSummary(w io.Writer) {
	fmt.Fprintln(w, "\nwhat must hold of kerberos")
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\tfigure\taccepted\tgoal\t")
	var not []string
	for _, v := range r.Summary {
		if v.Word == wordNot {
			not = append(not, v.What)
			continue
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", v.title(), v.figure(), v.Accepted, v.Goal, v.Word)
	}
	tw.Flush()
	if len(not) > 0 {
		fmt.Fprintf(w, "not measured: %s\n", strings.Join(not, "; "))
	}
	fmt.Fprintln(w, "elsewhere: allocations per request, go test -bench . ./proxy")
}
