package main

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"kerberos/bench/wire"
)

// Every row of the table passes with the real gateway.
func TestWireKerberos(t *testing.T) {
	t.Parallel()
	for _, r := range wireRun(t, "kerberos", nil) {
		if r.Err != nil {
			t.Errorf("%s (%s, %s): %s, but %v", r.Case.ID, r.Case.Source, r.Case.Level, r.Case.Says, r.Err)
		}
	}
}

// The others forward what is ordinary: they are started as they should be.
func TestWireOthers(t *testing.T) {
	for _, name := range wireGateways[1:] {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, r := range wireRun(t, name, []string{"keep-alive", "chunks", "cl-0", "pipeline", "response-4m", "websocket", "head", "expect"}) {
				if r.Err != nil {
					t.Errorf("%s: %s, but %v", r.Case.ID, r.Case.Says, r.Err)
				}
			}
		})
	}
}

func wireRun(t *testing.T, name string, only []string) []wire.Result {
	t.Helper()
	dir := t.TempDir()
	g, err := findGateway(t.Context(), name, dir, "")
	if errors.Is(err, errNotInstalled) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	origin, err := wire.ListenOrigin("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	results, err := wireResults(t.Context(), g, filepath.Join(dir, "of-"+name), origin, only)
	if err != nil {
		t.Fatal(err)
	}
	if len(results) == 0 {
		t.Error("no row was run")
	}
	return results
}

// A gateway that is there already, by its address: here it is one that does not answer.
func TestWireAt(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	dir := t.TempDir()
	at := []string{"wire", "--at", ln.Addr().String(), "--only", "keep-alive", "--markdown", filepath.Join(dir, "wire.md")}
	out, err := command(t, dir, append(at, "--origin", free.Addr().String())...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "1 cases that must pass did not") || !strings.Contains(string(out), "0 of 1") {
		t.Errorf("%v:\n%s", err, out)
	}
	for origin, says := range map[string]string{"127.0.0.1:0": "needs a port", "127.0.0.1:": "needs a port", "127.0.0.1": "missing port"} {
		if out, err := command(t, dir, append(at, "--origin", origin)...).CombinedOutput(); err == nil || !strings.Contains(string(out), says) {
			t.Errorf("--origin %s: %v:\n%s", origin, err, out)
		}
	}
	if out, err := command(t, dir, at...).CombinedOutput(); err == nil || !strings.Contains(string(out), "needs a port") {
		t.Errorf("%v:\n%s", err, out)
	}
	if out, err := command(t, dir, "wire", "--only", "nothing").CombinedOutput(); err == nil || !strings.Contains(string(out), "--only nothing") {
		t.Errorf("%v:\n%s", err, out)
	}
	if out, err := command(t, dir, "wire", "--list").Output(); err != nil || strings.Count(string(out), "\n") != len(wire.Cases()) {
		t.Errorf("%v:\n%s", err, out)
	}
}
