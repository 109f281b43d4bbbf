package soak

import (
	"net"
	"os"
	"testing"
)

// This test is a gateway with one client.
func TestGauges(t *testing.T) {
	var addrs []string
	var accepted []net.Listener
	for range 2 {
		ln, err := listen()
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		addrs, accepted = append(addrs, ln.Addr().String()), append(accepted, ln)
	}
	gauges := func() Gauges {
		g, err := GaugesOf(os.Getpid(), addrs[0], addrs[1])
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	before := gauges()
	if before.Clients != 0 || before.Descriptors < 5 || before.ResidentKiB < 100 || before.Threads < 1 {
		t.Errorf("before: %+v", before)
	}
	for i, addr := range addrs {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := accepted[i].Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
	}
	after := gauges() // the connection of the API is no client; what was dialled looks like two to backends
	if after.Clients != 1 || after.Upstreams != before.Upstreams+2 || after.Descriptors < before.Descriptors+4 {
		t.Errorf("before: %+v\nafter:  %+v", before, after)
	}
}
