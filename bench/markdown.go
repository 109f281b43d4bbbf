package main

import (
	"bytes"
	"fmt"
	"strings"
)

// markdown is what a page shows of the result: cost, latency, memory, and what must hold.
func (r *result) markdown() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s; %s; %s.\n", r.Machine, strings.Join(r.Gateways, ", "), r.how())
	for _, s := range r.Shortened {
		fmt.Fprintf(&b, "Shortened: %s.\n", s)
	}
	r.markdownTable(&b, "CPU microseconds per request", (*table).isCost, func(s sample) string { return microsText(s.CPU) })
	r.markdownTable(&b, "p50 / p99 / p99.9 in microseconds", func(t *table) bool { return t.Layout == layoutOpen }, func(s sample) string {
		return fmt.Sprintf("%.0f / %.0f / %.0f", s.P50, s.P99, s.P999)
	})
	r.markdownTable(&b, "MiB", func(t *table) bool { return t.Layout == layoutMemory }, func(s sample) string { return fmt.Sprintf("%.1f", s.Resident) })
	r.markdownTable(&b, "KiB", func(t *table) bool { return t.Layout == layoutIdle }, func(s sample) string { return fmt.Sprintf("%.1f", s.PerConn) })
	fmt.Fprint(&b, "\n| what must hold | figure | accepted | goal | |\n| --- | --- | --- | --- | --- |\n")
	for _, v := range r.Summary {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", v.title(), v.figure(), v.Accepted, v.Goal, v.Word)
	}
	return b.Bytes()
}

// markdownTable has a line for each table of that kind, and a column for each gateway that is in one of them.
func (r *result) markdownTable(b *bytes.Buffer, head string, is func(*table) bool, text func(sample) string) {
	var tables []*table
	var names []string
	for _, name := range gatewayNames {
		for _, t := range r.Tables {
			if is(t) && t.row(name) != nil {
				names = append(names, name)
				break
			}
		}
	}
	for _, t := range r.Tables {
		if is(t) && len(t.Rows) > 0 {
			tables = append(tables, t)
		}
	}
	if len(tables) == 0 {
		return
	}
	fmt.Fprintf(b, "\n| %s | %s |\n| --- |%s\n", head, strings.Join(names, " | "), strings.Repeat(" --- |", len(names)))
	for _, t := range tables {
		fmt.Fprintf(b, "| %s |", t.Title)
		for _, name := range names {
			if row := t.row(name); row != nil {
				fmt.Fprintf(b, " %s |", text(row.Median))
			} else {
				b.WriteString(" |")
			}
		}
		b.WriteString("\n")
	}
}
