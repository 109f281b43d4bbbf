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
	Machine machine  `json:"machine"`
	Tool    string   `json:"tool"`
	Missing []string `json:"not_installed,omitempty"`
	Rounds  int      `json:"rounds"`
	Seconds float64  `json:"seconds_per_round"`
	Tables  []*table `json:"tables"`
}

type machine struct {
	CPU     string `json:"cpu"`
	CPUs    int    `json:"cpus"`
	System  string `json:"system"`
	Go      string `json:"go"`
	Pinning string `json:"pinning"`
}

// table compares the gateways under one load.
type table struct {
	Load load   `json:"load"`
	Rows []*row `json:"rows"`
}

type row struct {
	Gateway string             `json:"gateway"`
	Version string             `json:"version"`
	Median  sample             `json:"median"` // of the rounds; counts are summed up, the peak is the highest
	Spread  float64            `json:"spread"` // of CPU per request: half of dearest minus cheapest round, by the median
	Ratios  map[string]float64 `json:"cpu_ratio_to"`
	Rounds  []sample           `json:"rounds"`
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
}

func (t *table) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s, %d connections\n", t.Load.Name, t.Load.Connections)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "gateway\tus/req\tuser\tsystem\t±%\treq/s\tp50 us\tp99 us\tbusy\tpeak MiB\t")
	for _, r := range t.Rows {
		fmt.Fprintf(tw, "vs %s\t", r.Gateway)
	}
	fmt.Fprintln(tw)
	for _, r := range t.Rows {
		m := r.Median
		fmt.Fprintf(tw, "%s %s\t", r.Gateway, r.Version)
		if m.CPU > 0 {
			fmt.Fprintf(tw, "%.2f\t%.2f\t%.2f\t%.1f\t", m.CPU, m.User, m.System, 100*r.Spread)
		} else {
			fmt.Fprint(tw, "-\t-\t-\t-\t")
		}
		fmt.Fprintf(tw, "%.0f\t%.0f\t%.0f\t", m.RequestsPerSecond, m.P50, m.P99)
		if m.CPU > 0 {
			fmt.Fprintf(tw, "%.0f%%\t%.1f\t", 100*m.Busy, float64(m.PeakKiB)/1024)
		} else {
			fmt.Fprint(tw, "-\t-\t")
		}
		for _, other := range t.Rows {
			if ratio, ok := r.Ratios[other.Gateway]; ok {
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
			fmt.Fprintf(w, "INVALID: %s: %d of %d answers not 2xx, %d requests failed\n", r.Gateway, m.BadStatus, m.Requests, m.Errors)
		}
		if m.OriginConns > m.Requests/100+t.Load.Connections {
			fmt.Fprintf(w, "NOTE: %s does not keep its connections: %d new ones to the origin for %d requests\n", r.Gateway, m.OriginConns, m.Requests)
		}
	}
}
