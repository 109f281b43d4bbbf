package main

import (
	"fmt"
	"io"
	"runtime"
	"strings"
	"text/tabwriter"
)

// result is all that one call of the command found out.
type result struct {
	Machine   machine  `json:"machine"`
	Tool      string   `json:"tool"`
	Missing   []string `json:"not_installed,omitempty"`
	Shortened []string `json:"shortened,omitempty"` // what --quick left out
	Rounds    int      `json:"rounds"`
	Seconds   float64  `json:"seconds_per_round"`
	Tables    []*table `json:"tables"`
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
	Compared figure   `json:"compared"` // what the ratios are of
	Rows     []*row   `json:"rows"`
	Notes    []string `json:"notes,omitempty"`
}

type row struct {
	Gateway string             `json:"gateway"`
	Version string             `json:"version,omitempty"`
	Setting string             `json:"setting,omitempty"`
	Median  sample             `json:"median"`   // of the rounds; counts are summed up
	Spread  float64            `json:"spread"`   // of CPU per request: half of dearest minus cheapest round, by the median
	Ratios  map[string]float64 `json:"ratio_to"` // by the other row's name
	Rounds  []sample           `json:"rounds"`
}

// figure names one measure of a sample, as JSON does.
type figure string

const (
	cpuPerRequest figure = "cpu_us"
	p50           figure = "p50_us"
	p99           figure = "p99_us"
	resident      figure = "rss_mib"
)

func (f figure) of(s sample) float64 {
	switch f {
	case p50:
		return s.P50
	case p99:
		return s.P99
	case resident:
		return s.Resident
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

func (r *row) valid() bool { return r.Median.BadStatus == 0 && r.Median.Errors == 0 }

func (t *table) valid() bool {
	for _, r := range t.Rows {
		if !r.valid() {
			return false
		}
	}
	return true
}

// compare fills the ratios.
func (t *table) compare() {
	for _, r := range t.Rows {
		r.Ratios = map[string]float64{}
		for _, other := range t.Rows {
			if of := t.Compared.of(other.Median); other != r && of > 0 {
				r.Ratios[other.name()] = t.Compared.of(r.Median) / of
			}
		}
	}
}

func thisMachine(c cpus) machine {
	cpu, system := describeMachine()
	return machine{CPU: cpu, CPUs: runtime.NumCPU(), System: system, Go: runtime.Version(), Pinning: c.String()}
}

func (r *result) printHead(w io.Writer) {
	fmt.Fprintf(w, "%s, %d CPUs, %s, %s; %s\n", r.Machine.CPU, r.Machine.CPUs, r.Machine.System, r.Machine.Go, r.Machine.Pinning)
	fmt.Fprintf(w, "medians of %d rounds of %gs, load by %s", r.Rounds, r.Seconds, r.Tool)
	if len(r.Missing) > 0 {
		fmt.Fprintf(w, "; not installed: %s", strings.Join(r.Missing, ", "))
	}
	fmt.Fprintln(w)
	for _, s := range r.Shortened {
		fmt.Fprintln(w, "shortened:", s)
	}
}

func (t *table) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s: %s\n", t.Section, t.Title)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "gateway\tus/req\tuser\tsystem\t±%\treq/s\tp50 us\tp99 us\tbusy\tpeak MiB\t")
	for _, r := range t.Rows {
		fmt.Fprintf(tw, "vs %s\t", r.name())
	}
	fmt.Fprintln(tw)
	for _, r := range t.Rows {
		m := r.Median
		fmt.Fprintf(tw, "%s\t", r.label())
		if m.CPU > 0 {
			fmt.Fprintf(tw, "%.2f\t%.2f\t%.2f\t%.1f\t", m.CPU, m.User, m.System, 100*r.Spread)
		} else {
			fmt.Fprint(tw, "-\t-\t-\t-\t")
		}
		fmt.Fprintf(tw, "%.0f\t%.0f\t%.0f\t", m.RequestsPerSecond, m.P50, m.P99)
		if m.CPU > 0 {
			fmt.Fprintf(tw, "%.0f%%\t%.1f\t", 100*m.Busy, m.Peak)
		} else {
			fmt.Fprint(tw, "-\t-\t")
		}
		for _, other := range t.Rows {
			if ratio, ok := r.Ratios[other.name()]; ok {
				fmt.Fprintf(tw, "%.2f\t", ratio)
			} else {
				fmt.Fprint(tw, "\t")
			}
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
	for _, r := range t.Rows {
		m := r.Median
		if !r.valid() {
			fmt.Fprintf(w, "INVALID: %s: %d of %d answers not as they should be, %d requests failed\n", r.label(), m.BadStatus, m.Requests, m.Errors)
		}
		if t.Load != nil && m.OriginConns > m.Requests/100+t.Load.Connections {
			fmt.Fprintf(w, "NOTE: %s does not keep its connections: %d new ones to the origin for %d requests\n", r.label(), m.OriginConns, m.Requests)
		}
	}
	for _, n := range t.Notes {
		fmt.Fprintln(w, "NOTE:", n)
	}
}
