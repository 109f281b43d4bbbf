package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// A backend whose machine vanishes without a word, FIN or reset, is noticed after 5 s of silence.
func TestHeldMachineVanishes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network of its own")
	}
	id := rand.IntN(200)
	space, here, there := fmt.Sprintf("kerberos%d", id), fmt.Sprintf("krbh%d", id), fmt.Sprintf("krbt%d", id)
	subnet := fmt.Sprintf("10.213.%d.", id)
	ip := func(args string) error {
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
		return err
	}
	if err := ip("netns add " + space); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		_ = ip("link del " + here) // both ends
		_ = ip("netns del " + space)
	})
	for _, args := range []string{
		"link add " + here + " type veth peer name " + there + " netns " + space,
		"addr add " + subnet + "1/24 dev " + here, "link set " + here + " up",
		"-n " + space + " addr add " + subnet + "2/24 dev " + there, "-n " + space + " link set " + there + " up",
	} {
		if err := ip(args); err != nil {
			t.Skip(err)
		}
	}
	g := launch(t, nil, "--admin", subnet+"1:0", "--api-allow", subnet+"0/24,loopback")
	cmd := exec.Command("ip", "netns", "exec", space, binary)
	cmd.Env = append(os.Environ(), asHolder+"="+g.admin, holderHost+"="+subnet+"2")
	p := beginCommand(t, cmd)
	eventually(t, "it is registered", func() bool { return p.stdout.String() == "held\n" })
	eventually(t, "it is asked", func() bool { _, body := g.get("/echo"); return body == "held" })

	if err := ip("-n " + space + " link set " + there + " down"); err != nil {
		t.Fatal(err)
	}
	list := func() string { _, text := exchange(t, g.admin, get("/services/echo")); return text }
	began := time.Now()
	for end := began.Add(50 * time.Second); strings.Contains(list(), `"id":"held"`); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is still there")
		}
	}
	took := time.Since(began)
	if took < 4*time.Second { // the connection was not the reason then
		t.Errorf("gone after %v", took)
	}
	t.Logf("gone after %v", took)
}
