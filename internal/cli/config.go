package cli

import (
	"cmp"
	"fmt"
	"strings"
	"text/tabwriter"

	"kerberos/internal/config"
	"kerberos/proxy"
)

// Config prints settings: those that a gateway with the same flags, environment and file would have.
type Config struct {
	Default bool `noenv:"" xor:"what" help:"Print a file with every setting, its default and what it does."`
	Schema  bool `noenv:"" xor:"what" help:"Print a JSON schema of the file, for editors."`

	config.Gateway `embed:""`
}

// Run prints each value with where it comes from. Tokens are not shown.
func (c *Config) Run(p *Process, sources *config.Sources) error {
	switch {
	case c.Default:
		return config.WriteDefaults(p.Out)
	case c.Schema:
		return config.WriteSchema(p.Out)
	}
	w := tabwriter.NewWriter(p.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SETTING\tVALUE\tFROM")
	for _, s := range sources.Settings() {
		fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, s.Value, s.From)
	}
	return w.Flush()
}

// CheckFile judges a file of settings as a gateway without flags and variables would.
type CheckFile struct {
	File string `arg:"" type:"file" placeholder:"FILE" help:"The file."`
}

// Run says that the file can be used, or why not.
func (c *CheckFile) Run(p *Process) error {
	cfg, sources, err := config.Load([]string{"--config=" + c.File}, func(string) (string, bool) { return "", false })
	if err != nil {
		return err
	}
	if err := p.Check(cfg); err != nil {
		return sources.At(err)
	}
	_, err = fmt.Fprintf(p.Out, "%s: fine\n", c.File)
	return err
}

// Routes prints the routes that a gateway with the same flags, environment and file would have, in the order in which they count.
type Routes struct {
	config.Gateway `embed:""`
}

// Run prints a line for each. Values of header fields are not shown.
func (c *Routes) Run(p *Process) error {
	w := tabwriter.NewWriter(p.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tPATH\tMETHODS\tHEADERS\tSERVICE\tSENT AS")
	routes := c.Gateway.Route
	if len(routes) == 0 {
		routes = []config.Route{{Prefix: proxy.FirstSegmentRule}}
	}
	for _, r := range proxy.Order(routes) {
		path, service := cmp.Or(r.Path, r.Prefix, "/"), r.Service
		switch {
		case r.Prefix == proxy.FirstSegmentRule:
			service = "(the first segment)"
		case r.Path == "":
			path = strings.TrimSuffix(path, "/") + "/*"
		}
		var headers []string
		for _, h := range r.Headers {
			headers = append(headers, h.Name)
		}
		sent := ""
		if r.StripPrefix || r.ReplacePrefix != "" {
			sent = strings.TrimSuffix(r.ReplacePrefix, "/")
			if r.Path == "" {
				sent += "/*"
			}
			sent = cmp.Or(sent, "/")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", cmp.Or(r.Host, "*"), path, cmp.Or(strings.Join(r.Methods, ","), "*"), cmp.Or(strings.Join(headers, ","), "*"), service, cmp.Or(sent, "as it came"))
	}
	return w.Flush()
}
