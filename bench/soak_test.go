package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kerberos/bench/soak"
)

// The real gateway bears some seconds of it, and everything has its turn.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "soak.json")
	out, err := command(t, dir, "soak", "--for", "5s", "--rate", "100", "--json", file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	isEmpty(t, dir)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r soak.Report
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	if r.Found != 0 || len(r.Kinds) < 20 || r.Requests < 1000 || len(r.Events) != 4 {
		t.Errorf("%s", b)
	}
	for _, k := range r.Kinds {
		if k.Sessions == 0 {
			t.Errorf("%s: no session", k.Kind)
		}
	}
	if soak.CanGauge {
		if n := len(r.Gauges); n != 3 || r.Gauges[1].Goroutines == 0 || r.Gauges[2].Goroutines == 0 || r.Gauges[1].Clients == 0 || r.Gauges[2].Clients != 0 {
			t.Errorf("%+v", r.Gauges)
		}
	}
}

func TestSoakUsage(t *testing.T) {
	for _, args := range [][]string{{"--for", "10ms"}, {"--rate", "0"}} {
		out, err := command(t, t.TempDir(), append([]string{"soak"}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), args[0]) {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
}
