package wire

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Column is what came of all cases at one gateway.
type Column struct {
	Gateway string // name and version
	Results []Result
}

// Failed returns how many rows of a level did not pass.
func (c *Column) Failed(l Level) (n int) {
	for _, r := range c.Results {
		if r.Case.Level == l && r.Err != nil {
			n++
		}
	}
	return n
}

// grid is a table as rows of cells, the first of which is its head.
type grid [][]string

// counts has a row a section: passed and all, of what must be and of what should be.
func counts(columns []Column) grid {
	head := []string{"passed of all"}
	for _, c := range columns {
		head = append(head, c.Gateway)
	}
	g := grid{head}
	add := func(title string, counted func(*Case) bool) {
		row, any := []string{title}, false
		for _, c := range columns {
			passed, all := 0, 0
			for _, r := range c.Results {
				if !counted(r.Case) {
					continue
				}
				all++
				if r.Err == nil {
					passed++
				}
			}
			any = any || all > 0
			row = append(row, fmt.Sprintf("%d of %d", passed, all))
		}
		if any {
			g = append(g, row)
		}
	}
	for _, s := range Sections() {
		for _, l := range []Level{Must, Should} {
			add(fmt.Sprintf("%s, %s", s, l), func(c *Case) bool { return c.Section == s && c.Level == l })
		}
	}
	for _, l := range []Level{Must, Should} {
		add(fmt.Sprintf("All, %s", l), func(c *Case) bool { return c.Level == l })
	}
	return g
}

// failures has a row for each case that at least one gateway fails: what must happen, and what happened instead.
func failures(columns []Column) grid {
	head := []string{"case", "source", "what must happen"}
	for _, c := range columns {
		name, _, _ := strings.Cut(c.Gateway, " ")
		head = append(head, name)
	}
	g := grid{head}
	if len(columns) == 0 {
		return g
	}
	for i, first := range columns[0].Results {
		says := first.Case.Says
		if first.Case.Level == Should {
			says += " (should)"
		}
		row, failed := []string{first.Case.ID, first.Case.Source, says}, false
		for _, c := range columns {
			cell := ""
			if i < len(c.Results) && c.Results[i].Err != nil {
				cell, failed = c.Results[i].Err.Error(), true
			}
			row = append(row, cell)
		}
		if failed {
			g = append(g, row)
		}
	}
	return g
}

// Print writes the tables as text.
func Print(w io.Writer, columns []Column) error {
	for _, g := range []grid{counts(columns), failures(columns)} {
		tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		for _, row := range g {
			for i, cell := range row {
				row[i] = clean(cell)
			}
			fmt.Fprintln(tw, strings.Join(row, "\t"))
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	return nil
}

// Markdown returns the tables for a page.
func Markdown(columns []Column) []byte {
	var b bytes.Buffer
	for i, g := range []grid{counts(columns), failures(columns)} {
		if i > 0 {
			b.WriteString("\n")
		}
		for n, row := range g {
			for i, cell := range row {
				row[i] = strings.NewReplacer("|", `\|`, "<", "&lt;", "`", "&#96;").Replace(clean(cell))
			}
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
			if n == 0 {
				b.WriteString(strings.Repeat("| --- ", len(row)) + "|\n")
			}
		}
	}
	return b.Bytes()
}

// clean keeps a cell on its line.
func clean(s string) string { return strings.Join(strings.Fields(s), " ") }
