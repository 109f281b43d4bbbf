// Package cli is the commands beside the gateway itself: those that speak its API from a terminal, a small backend to
// try it with, and a demo of both. It knows the API as any client does, by HTTP.
package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"kerberos/internal/config"
)

// Process is what a command gets of the process that runs it.
type Process struct {
	Context  context.Context // ends when the process is asked to
	Out      io.Writer
	Terminal bool // Out is one
	Start    Start
	Check    func(config.Gateway) error // refuses what Start refuses, and starts nothing
}

// Start runs a gateway in this process; the demo's needs no other.
type Start func(cfg config.Gateway, log *slog.Logger) (Gateway, error)

// Gateway is a running one.
type Gateway struct {
	Data, Admin string // addresses as bound
	Stop        func() // at once
}

// Version prints what this program was built from.
type Version struct{}

// Run prints the version of the module, the commit where one is known, and the Go version.
func (Version) Run(p *Process) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return fmt.Errorf("this program was built without build information")
	}
	line := "kerberos " + info.Main.Version
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if commit := settings["vcs.revision"]; commit != "" {
		line += " commit " + commit
		if settings["vcs.modified"] == "true" {
			line += " with changes"
		}
	}
	_, err := fmt.Fprintf(p.Out, "%s, %s %s/%s\n", line, info.GoVersion, settings["GOOS"], settings["GOARCH"])
	return err
}
