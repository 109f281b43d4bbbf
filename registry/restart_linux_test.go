package registry

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// voidAddr is an address that neither accepts nor refuses connections: nobody takes those that wait for it.
func voidAddr(t *testing.T) (addr string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr = fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 10 {
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return "http://" + addr
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Skip("the system takes connections all the same")
	return ""
}

// However many instances do not answer at all, a start takes a few seconds, those that answer are up then, names resolved.
func TestOpenIsBounded(t *testing.T) {
	dir, never, alive := t.TempDir(), voidAddr(t), listener(t)
	r := reopen(t, dir)
	together(2*mostKnocks, func(i int) {
		if err := r.Register("beside", Instance{ID: fmt.Sprint(i), Addr: never}); err != nil {
			t.Error(err)
		}
	})
	for id, addr := range map[string]string{"address": alive, "name": strings.Replace(alive, "127.0.0.1", "localhost", 1)} {
		if err := r.Register("echo", Instance{ID: id, Addr: addr}); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	began := time.Now()
	r = reopen(t, dir)
	took := time.Since(began)
	t.Logf("%v", took)
	if took > 10*firstKnock {
		t.Errorf("it took %v", took)
	}
	for _, in := range r.Snapshot("echo").Instances() {
		if in.State() != Up {
			t.Errorf("%s is %s", in.ID, in.State())
		}
	}
	for _, in := range r.Snapshot("beside").Instances() {
		if in.State() != Unreachable {
			t.Fatalf("%s is %s", in.ID, in.State())
		}
	}
	began = time.Now()
	r.Close()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("closing took %v", took)
	}
}
