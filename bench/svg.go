package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
)

// The picture: a panel for each load, a bar for each gateway. It has a ground of its own, so it can be read on any page.
const (
	svgPanels = 3   // beside each other
	svgPanel  = 330 // width of one
	svgName   = 92  // width of the gateways' names
	svgBar    = 160 // longest bar
	svgLine   = 18  // height of a bar with its distance to the next
	svgTop    = 92  // height of the head
	svgMargin = 20
)

const svgStyle = `
text{font:12px system-ui,sans-serif;fill:#1f2328}.h{font-size:17px;font-weight:600}.t{font-weight:600}.s{fill:#59636e}
.ground{fill:#fff}.kerberos{fill:#1f6feb}.peer{fill:#b1bac4}.pump{fill:#fff;stroke:#8c959f;stroke-dasharray:3 2}.cut{stroke:#fff;stroke-width:3}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9198a1}.ground{fill:#0d1117}.kerberos{fill:#4493f8}.peer{fill:#545d68}
.pump{fill:#0d1117;stroke:#7d8590}.cut{stroke:#0d1117}}
`

// svg draws the cost tables. Shorter is cheaper; each panel has a scale of its own.
func (r *result) svg() []byte {
	var tables []*table
	lines := 1
	for _, t := range r.Tables {
		if t.isCost() {
			tables = append(tables, t)
			lines = max(lines, len(t.Rows))
		}
	}
	row := lines*svgLine + 46 // height of panels beside each other
	height := (len(tables)+svgPanels-1)/svgPanels*row + svgTop + svgMargin
	width := svgPanels*svgPanel + svgMargin

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`, width, height, width, height)
	fmt.Fprintf(&b, "\n<title>CPU time per request</title>\n<style>%s</style>\n", svgStyle)
	fmt.Fprintf(&b, `<rect class="ground" width="%d" height="%d" rx="8"/>`+"\n", width, height)
	svgText(&b, svgMargin, 30, "h", "CPU time per request, in microseconds: shorter is cheaper")
	svgText(&b, svgMargin, 50, "s", r.Machine.String())
	svgText(&b, svgMargin, 67, "s", strings.Join(r.Gateways, ", "))
	for i, t := range tables {
		x := svgMargin + i%svgPanels*svgPanel
		y := svgTop + i/svgPanels*row
		svgText(&b, x, y+12, "t", t.Title)
		limit := t.longest()
		for k, r := range t.Rows {
			y := y + 22 + k*svgLine
			class := "peer"
			if r.Gateway == "kerberos" || isPump(r.Gateway) {
				class, _, _ = strings.Cut(r.Gateway, "-")
			}
			length := min(r.Median.CPU/limit, 1) * svgBar
			svgText(&b, x, y+11, "", r.Gateway)
			fmt.Fprintf(&b, `<rect class="%s" x="%d" y="%d" width="%.1f" height="13"/>`+"\n", class, x+svgName, y, length)
			if r.Median.CPU > limit { // it goes on
				fmt.Fprintf(&b, `<path class="cut" d="M%d %dl-6 17"/>`+"\n", x+svgName+svgBar-12, y-2)
			}
			svgText(&b, x+svgName+int(length)+6, y+11, "", microsText(r.Median.CPU))
		}
	}
	svgText(&b, svgMargin, height-svgMargin, "s", "pump: moves bytes and knows no HTTP, the floor for all. A bar that is cut goes on; each load has its own scale.")
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func svgText(b *bytes.Buffer, x, y int, class, text string) {
	fmt.Fprintf(b, `<text x="%d" y="%d"`, x, y)
	if class != "" {
		fmt.Fprintf(b, ` class="%s"`, class)
	}
	b.WriteString(">")
	xml.EscapeText(b, []byte(text))
	b.WriteString("</text>\n")
}

// longest is the cost that has the longest bar: what is more than 2.5 times as dear as the cheapest that speaks HTTP is
// cut off, for the others' differences would not be seen.
func (t *table) longest() float64 {
	var costs []float64
	for _, r := range t.Rows {
		if !isPump(r.Gateway) {
			costs = append(costs, r.Median.CPU)
		}
	}
	if len(costs) == 0 {
		for _, r := range t.Rows {
			costs = append(costs, r.Median.CPU)
		}
	}
	limit := 2.5 * slices.Min(costs)
	longest := 0.0
	for _, r := range t.Rows {
		if r.Median.CPU <= limit {
			longest = max(longest, r.Median.CPU)
		}
	}
	return longest
}

// isCost tells whether the table compares what a request costs in several gateways.
func (t *table) isCost() bool {
	return t.Layout == "" && t.Compared == cpuPerRequest && len(t.Rows) > 0 && t.Rows[0].Setting == "" && t.Rows[0].Median.CPU > 0
}

func microsText(us float64) string {
	if us < 100 {
		return fmt.Sprintf("%.1f", us)
	}
	return fmt.Sprintf("%.0f", us)
}
