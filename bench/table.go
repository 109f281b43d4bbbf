package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// result is all that one call of the command found out.
type result struct {
	Machine   machine   `json:"machine"`
	Tool      string    `json:"tool"`
	Gateways  []string  `json:"gateways"` // with their versions
	Missing   []string  `json:"not_installed,omitempty"`
	Shortened []string  `json:"shortened,omitempty"` // what --quick left out
	Rounds    int       `json:"rounds"`
	Seconds   float64   `json:"seconds_per_round"`
	Tables    []*table  `json:"tables"`
	Summary   []verdict `json:"summary"`
}

type machine struct {
	CPU     string `json:"cpu"`
	CPUs    int    `json:"cpus"`
	System  string `json:"system"`
	Go      string `json:"go"`
	Pinning string `json:"pinning"`
}

// table is what one section found out, or a part of it.
type table struct {
	Section  string   `json:"section"`
	Title    string   `json:"title"`
	Load     *load    `json:"load,omitempty"`
	Layout   layout   `json:"layout,omitempty"`
	Compared figure   `json:"compared"`         // what the ratios are of
	Paired   bool     `json:"paired,omitempty"` // ratios round by round matter, too: all rows are the same gateway
	Rows     []*row   `json:"rows"`
	Notes    []string `json:"notes,omitempty"`
}

type row struct {
	Gateway string             `json:"gateway"`
	Version string             `json:"version,omitempty"`
	Setting string             `json:"setting,omitempty"`
	Median  sample             `json:"median"`                 // of the rounds; counts are summed up
	Spread  float64            `json:"spread"`                 // of CPU per request: half of dearest minus cheapest round, by the median
	Ratios  map[string]float64 `json:"ratio_to"`               // by the other row's name
	Paired  float64            `json:"paired_ratio,omitempty"` // to the first row: the median of the ratios of each round
	Rounds  []sample           `json:"rounds"`
}

// figure names one measure of a sample, as JSON does.
type figure string

const (
	cpuPerRequest figure = "cpu_us"
	p50           figure = "p50_us"
	p99           figure = "p99_us"
	resident      figure = "rss_mib"
	perConn       figure = "per_connection_kib"
)

func (f figure) of(s sample) float64 {
	switch f {
	case p50:
		return s.P50
	case p99:
		return s.P99
	case resident:
		return s.Resident
	case perConn:
		return s.PerConn
	}
	return s.CPU
}

// name is what the row is called in ratios.
func (r *row) name() string {
	if r.Setting != "" {
		return r.Setting
	}
	return r.Gateway
}

func (r *row) label() string {
	return strings.Join(strings.Fields(r.Gateway+" "+r.Version+" "+r.Setting), " ")
}

// valid tells whether the figures mean something. Where requests are due at a fixed rate, one that is not answered in
// time is slow, not wrong; a closed loop asks for no more than is answered.
func (t *table) valid(r *row) bool {
	return r.Median.BadStatus == 0 && r.Median.Errors == 0 && (t.paced() || r.Median.Unanswered == 0)
}

// paced tells whether requests were due at a fixed rate.
func (t *table) paced() bool { return t.Layout == layoutOpen || t.Layout == layoutStorm }

func (t *table) allValid() bool {
	for _, r := range t.Rows {
		if !t.valid(r) {
			return false
		}
	}
	return true
}

// compare fills the ratios.
func (t *table) compare() {
	for i, r := range t.Rows {
		if t.Paired && i > 0 {
			r.Paired = pairedRatio(t.Compared, r.Rounds, t.Rows[0].Rounds)
		}
		r.Ratios = map[string]float64{}
		for _, other := range t.Rows {
			if of := t.Compared.of(other.Median); other != r && of > 0 {
				r.Ratios[other.name()] = t.Compared.of(r.Median) / of
			}
		}
	}
}

// pairedRatio is the median of the ratios of each round, 0 if there is none.
func pairedRatio(f figure, rounds, to []sample) float64 {
	var ratios []float64
	for i := range rounds {
		if of := f.of(to[i]); of > 0 {
			ratios = append(ratios, f.of(rounds[i])/of)
		}
	}
	if len(ratios) == 0 {
		return 0
	}
	return median(ratios)
}

func thisMachine(c cpus) machine {
	cpu, system := describeMachine()
	return machine{CPU: cpu, CPUs: runtime.NumCPU(), System: system, Go: runtime.Version(), Pinning: c.String()}
}

func (m machine) String() string {
	return fmt.Sprintf("%s, %d CPUs, %s, %s; %s", m.CPU, m.CPUs, m.System, m.Go, m.Pinning)
}

// add puts tables in, in place of those that it has of the same section.
func (r *result) add(tables ...*table) {
	for _, t := range tables {
		i := slices.IndexFunc(r.Tables, func(old *table) bool { return old.Section == t.Section })
		if i < 0 {
			r.Tables = append(r.Tables, t)
		} else {
			r.Tables[i] = t
		}
	}
}

// how says how it was measured.
func (r *result) how() string {
	if r.Rounds == 1 {
		return fmt.Sprintf("one round of %g s", r.Seconds)
	}
	return fmt.Sprintf("medians of %d rounds of %g s", r.Rounds, r.Seconds)
}

func (r *result) printHead(w io.Writer) {
	fmt.Fprintln(w, r.Machine)
	fmt.Fprintln(w, strings.Join(r.Gateways, ", "))
	fmt.Fprintf(w, "%s, load by %s", r.how(), r.Tool)
	if len(r.Missing) > 0 {
		fmt.Fprintf(w, "; not installed: %s", strings.Join(r.Missing, ", "))
	}
	fmt.Fprintln(w)
	for _, s := range r.Shortened {
		fmt.Fprintln(w, "shortened:", s)
	}
}

// layout says which columns a table has; "" is that of cost.
type layout string

const (
	layoutOpen   layout = "open"
	layoutMemory layout = "memory"
	layoutIdle   layout = "idle"
	layoutStorm  layout = "storm"
)

// column is a figure of a row as text.
type column struct {
	head string
	text func(r *row) string
}

// columns returns those of a layout, without the ratios.
func (l layout) columns() []column {
	number := func(head, format string, of func(s sample) float64) column {
		return column{head, func(r *row) string {
			if v := of(r.Median); v != 0 {
				return fmt.Sprintf(format, v)
			}
			return "-" // unknown here
		}}
	}
	var (
		cpu      = number("us/req", "%.2f", func(s sample) float64 { return s.CPU })
		user     = number("user", "%.2f", func(s sample) float64 { return s.User })
		system   = number("system", "%.2f", func(s sample) float64 { return s.System })
		spread   = column{"±%", func(r *row) string { return fmt.Sprintf("%.1f", 100*r.Spread) }}
		perSec   = number("req/s", "%.0f", func(s sample) float64 { return s.RequestsPerSecond })
		p50      = number("p50 us", "%.0f", func(s sample) float64 { return s.P50 })
		p99      = number("p99 us", "%.0f", func(s sample) float64 { return s.P99 })
		p999     = number("p99.9 us", "%.0f", func(s sample) float64 { return s.P999 })
		late     = number("late us", "%.0f", func(s sample) float64 { return s.Late })
		busy     = number("busy", "%.0f%%", func(s sample) float64 { return 100 * s.Busy })
		load     = number("load", "%.0f%%", func(s sample) float64 { return 100 * s.LoadBusy })
		resident = number("MiB", "%.1f", func(s sample) float64 { return s.Resident })
		peak     = number("peak MiB", "%.1f", func(s sample) float64 { return s.Peak })
		each     = number("KiB each", "%.2f", func(s sample) float64 { return s.PerConn })
		register = number("registering p99 us", "%.0f", func(s sample) float64 { return s.Registering })
	)
	switch l {
	case layoutOpen:
		return []column{p50, p99, p999, late, cpu, busy, load}
	case layoutMemory:
		return []column{resident, peak, cpu, perSec, busy}
	case layoutIdle:
		return []column{each, resident, peak}
	case layoutStorm:
		return []column{p50, p99, p999, late, cpu, busy, load, register}
	}
	return []column{cpu, user, system, spread, perSec, p50, p99, busy, load, peak}
}

func (t *table) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s: %s\n", t.Section, t.Title)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	columns := t.Layout.columns()
	if len(t.Rows) > 0 {
		fmt.Fprint(tw, "gateway\t")
		for _, c := range columns {
			fmt.Fprintf(tw, "%s\t", c.head)
		}
		if t.Paired {
			fmt.Fprint(tw, "paired\t")
		}
		for _, r := range t.Rows {
			fmt.Fprintf(tw, "vs %s\t", r.name())
		}
		fmt.Fprintln(tw)
	}
	for _, r := range t.Rows {
		fmt.Fprintf(tw, "%s\t", r.label())
		for _, c := range columns {
			fmt.Fprintf(tw, "%s\t", c.text(r))
		}
		if t.Paired {
			fmt.Fprintf(tw, "%s\t", ratioText(r.Paired))
		}
		for _, other := range t.Rows {
			fmt.Fprintf(tw, "%s\t", ratioText(r.Ratios[other.name()]))
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
	for _, r := range t.Rows {
		m := r.Median
		if !t.valid(r) {
			fmt.Fprintf(w, "INVALID: %s: %d of %d answers not as they should be, %d requests failed\n", r.label(), m.BadStatus, m.Requests, m.Errors+m.Unanswered)
		}
		if t.paced() && m.LoadBusy > 0.9 {
			fmt.Fprintf(w, "NOTE: with %s, load and origin had hardly any time left on their CPU: the latencies are theirs, too\n", r.label())
		}
		if m.Unanswered > 0 {
			fmt.Fprintf(w, "NOTE: %s left %d requests unanswered for more than %s after the end\n", r.label(), m.Unanswered, lastWait)
		}
		if t.Load != nil && m.OriginConns > m.Requests/100+t.Load.Connections*len(r.Rounds) {
			fmt.Fprintf(w, "NOTE: %s does not keep its connections: %d new ones to the origin for %d requests\n", r.label(), m.OriginConns, m.Requests)
		}
	}
	for _, n := range t.Notes {
		fmt.Fprintln(w, "NOTE:", n)
	}
}

// ratioText is nothing for a ratio that there is not.
func ratioText(r float64) string {
	if r == 0 {
		return ""
	}
	return fmt.Sprintf("%.3f", r)
}
