package health

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kerberos/registry"
)

// serverVariable has the test's binary be the server of the benchmark, so that what it takes is not counted.
const serverVariable = "KERBEROS_HEALTH_SERVER"

func TestMain(m *testing.M) {
	if os.Getenv(serverVariable) != "" {
		serve()
	}
	goleak.VerifyTestMain(m)
}

// serve answers plain HTTP on one port and HTTPS on another until its input ends.
func serve() {
	plain := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }))
	plain.Start()
	secure := httptest.NewTLSServer(plain.Config.Handler)
	fmt.Println(plain.Listener.Addr(), secure.Listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// startServer starts it; it ends with the test.
func startServer(t testing.TB) (plain, secure netip.AddrPort) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	ports := strings.Fields(line)
	return netip.MustParseAddrPort(ports[0]), netip.MustParseAddrPort(ports[1])
}

// cpu is what this process has used, in the kernel and outside.
func cpu(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// 10,000 instances are checked every 10 s: what a check costs of this process's time, and all of them of one CPU.
func BenchmarkChecks(b *testing.B) {
	const window = 5 * time.Second
	plain, secure := startServer(b)
	for _, row := range []struct {
		name  string
		check registry.Check
		tls   bool
	}{
		{"tcp", registry.Check{TCP: true}, false},
		{"http", registry.Check{Path: "/"}, false},
		{"http-kept", registry.Check{Path: "/", KeepAlive: true}, false},
		{"https", registry.Check{Path: "/"}, true},
	} {
		b.Run(row.name, func(b *testing.B) {
			c := New()
			defer c.Close()
			instances, interval := 10_000, 10*time.Second
			if row.tls { // one is a hundred others, and the server is on this machine
				instances = 1000
			}
			row.check.Interval = interval
			in := instance(b, plain, row.check)
			if row.tls {
				in = instance(b, secure, row.check)
				in.TLS = &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
			}
			var up, down atomic.Int64
			ownerOf(in).changed = func(s Status) {
				if s.State == Up {
					up.Add(1)
				} else {
					down.Add(1)
				}
			}
			all := make([]*Watch, instances)
			for i := range all {
				all[i] = c.Watch(in)
			}
			eventually(b, "all are up", func() bool { return up.Load() == int64(instances) })
			for b.Loop() {
				began, used := time.Now(), cpu(b)
				time.Sleep(window)
				used = cpu(b) - used
				n := 0
				for _, w := range all {
					if w.Status().Checked.After(began) {
						n++
					}
				}
				b.ReportMetric(float64(used.Microseconds())/float64(n), "cpu-us/check")
				b.ReportMetric(100*used.Seconds()/window.Seconds(), "%core")
				b.ReportMetric(float64(n)/window.Seconds(), "checks/s")
			}
			if n := down.Load(); n > 0 { // of the first, all at once, the server has not answered these in time
				b.Logf("%d were down at times", n)
			}
		})
	}
}

// instance is one to be checked at an address.
func instance(t testing.TB, ap netip.AddrPort, check registry.Check) Instance {
	t.Helper()
	in, err := instanceAt(ap, check)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func instanceAt(ap netip.AddrPort, check registry.Check) (Instance, error) {
	r := registry.New(registry.Config{})
	defer r.Close()
	if err := r.Register("s", registry.Instance{ID: "a", Addr: "http://" + ap.String(), Check: &check}); err != nil {
		return Instance{}, err
	}
	in := r.Snapshot("s").Instance("a")
	target := in.Target()
	return Instance{Owner: &owner{
		addrs:   func() []netip.AddrPort { return []netip.AddrPort{ap} },
		allowed: func(netip.AddrPort) error { return nil },
		changed: func(Status) {},
	}, Check: in.Check, Target: &target, Up: check.Start == registry.StartUp}, nil
}

// owner is one made of functions.
type owner struct {
	addrs   func() []netip.AddrPort
	allowed func(netip.AddrPort) error
	changed func(Status)
}

func (o *owner) Addrs() []netip.AddrPort         { return o.addrs() }
func (o *owner) Allowed(ap netip.AddrPort) error { return o.allowed(ap) }
func (o *owner) HealthChanged(s Status)          { o.changed(s) }

// ownerOf is that of what instance returns.
func ownerOf(in Instance) *owner { return in.Owner.(*owner) }

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
