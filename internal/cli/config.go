package cli

import (
	"fmt"
	"text/tabwriter"

	"kerberos/internal/config"
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
	if _, _, err := config.Load([]string{"--config=" + c.File}, func(string) (string, bool) { return "", false }); err != nil {
		return err
	}
	_, err := fmt.Fprintf(p.Out, "%s: fine\n", c.File)
	return err
}
