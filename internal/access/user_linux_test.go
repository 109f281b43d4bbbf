package access

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nobody is a user that neither runs the tests nor is root.
const nobody = 65534

// pair makes a connection over a listener and returns both ends.
func pair(t testing.TB, listen string, dial func(port int) net.Conn) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Skipf("cannot listen on %s: %v", listen, err)
	}
	defer ln.Close()
	client = dial(ln.Addr().(*net.TCPAddr).Port)
	_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(5 * time.Second))
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func dialer(t testing.TB, host string) func(int) net.Conn {
	return func(port int) net.Conn {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(port)), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

// dialMapped connects an IPv6 socket to 127.0.0.1, as programs do that know IPv6 sockets only.
func dialMapped(t testing.TB) func(int) net.Conn {
	return func(port int) net.Conn {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Skipf("no IPv6: %v", err)
		}
		to := &unix.SockaddrInet6{Port: port, Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
		if err := unix.Connect(fd, to); err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "mapped")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

func ends(t testing.TB, server net.Conn) (peer, here netip.AddrPort) {
	t.Helper()
	peer, ok := addrPort(server.RemoteAddr())
	here, ok2 := addrPort(server.LocalAddr())
	if !ok || !ok2 {
		t.Fatalf("no addresses: %v, %v", server.RemoteAddr(), server.LocalAddr())
	}
	return peer, here
}

// The user of the socket at the other end is found for every family, and our own is let in.
func TestSocketUser(t *testing.T) {
	for name, c := range map[string]struct {
		listen string
		dial   func(int) net.Conn
	}{
		"IPv4":                            {"127.0.0.1:0", dialer(t, "127.0.0.1")},
		"IPv6":                            {"[::1]:0", dialer(t, "::1")},
		"IPv4 to a listener for both":     {"[::]:0", dialer(t, "127.0.0.1")},
		"IPv6 socket to an IPv4 listener": {"127.0.0.1:0", dialMapped(t)},
		"IPv6 socket, both":               {"[::]:0", dialMapped(t)},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t, c.listen, c.dial)
			peer, here := ends(t, server)
			for how, user := range map[string]func(peer, here netip.AddrPort) (int, error){"asked": askSocket, "found": findSocket} {
				if uid, err := user(peer, here); err != nil || uid != os.Geteuid() {
					t.Errorf("%s (%v, %v) = %d, %v; we are %d", how, peer, here, uid, err, os.Geteuid())
				}
				if uid, err := user(here, peer); err != nil || uid != os.Geteuid() {
					t.Errorf("%s, the other way round: %d, %v", how, uid, err)
				}
				if uid, err := user(peer, netip.AddrPortFrom(here.Addr(), here.Port()-1)); err == nil {
					t.Errorf("%s: the user of a connection that is not there is %d", how, uid)
				}
			}
			if why := otherUser(peer, here); why != "" {
				t.Errorf("our own socket: %s", why)
			}
			// The pair is what counts: the same socket is not the peer of another connection.
			elsewhere := netip.AddrPortFrom(here.Addr(), here.Port()-1)
			if why := otherUser(peer, elsewhere); !strings.Contains(why, "cannot be told") {
				t.Errorf("a connection that is not there: %q", why)
			}
			_ = client
		})
	}
}

// A socket that its process has closed is shown as root's, whoever it was: it must not be let in.
func TestClosedSocket(t *testing.T) {
	client, server := pair(t, "127.0.0.1:0", dialer(t, "127.0.0.1"))
	peer, here := ends(t, server)
	if err := client.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if why := otherUser(peer, here); why != "" {
		t.Errorf("a client that only has no more to send: %s", why)
	}
	client.Close()
	if why := otherUser(peer, here); !strings.Contains(why, "no open socket") {
		t.Errorf("a closed socket: %q", why)
	}
}

// Who listens where a connection would have come from is not its peer.
func TestListenerIsNoPeer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	peer, _ := addrPort(ln.Addr())
	here := netip.AddrPortFrom(peer.Addr(), 1)
	if uid, err := askSocket(peer, here); err == nil {
		t.Errorf("asked: user %d", uid)
	}
	if uid, err := findSocket(peer, here); err == nil {
		t.Errorf("found: user %d", uid)
	}
}

// A process of another user on this machine is refused, unless loopback was allowed explicitly.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run a process as another user")
	}
	program := copyOfMe(t)
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		for _, tt := range []struct {
			name string
			cfg  Config
			uid  uint32
			says string
		}{
			{"root", Config{}, 0, ""},
			{"nobody", Config{}, nobody, "belongs to user id 65534"},
			{"nobody, loopback allowed explicitly", Config{AllowSet: true}, nobody, ""},
		} {
			g := newGateway(t, tt.cfg, listen)
			cmd := exec.Command(program)
			cmd.Dir = "/"
			cmd.Env = append(os.Environ(), "ACCESS_TEST_SEND_TO="+g.addr)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}}
			cmd.Stdin = strings.NewReader(post("Host: localhost"))
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			g.want(t, listen+" "+tt.name, readAnswer(t, bytes.NewReader(out)), tt.says)
		}
	}
}

// copyOfMe puts this test program where every user may run it.
func copyOfMe(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "access")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	me, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer me.Close()
	path := filepath.Join(dir, "access")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, me); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, path} { // whatever the umask is
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func FuzzParseSocket(f *testing.F) {
	f.Add("0100007F:1F90")
	f.Add("00000000000000000000000001000000:0050")
	f.Add("0000000000000000FFFF00000100007F:FFFF")
	f.Add("0100007F")
	f.Add("0100007G:1F90")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		got := parseSocket(s)
		if !got.IsValid() {
			return
		}
		if got.Addr().Is4In6() {
			t.Fatalf("%q = %v, still mapped", s, got)
		}
		// Written as the kernel writes it, in the length that was read, it is the same.
		b := got.Addr().AsSlice()
		if words, _, _ := strings.Cut(s, ":"); len(words) == 32 {
			b16 := got.Addr().As16()
			b = b16[:]
		}
		var text strings.Builder
		for ; len(b) > 0; b = b[4:] {
			fmt.Fprintf(&text, "%08X", binary.NativeEndian.Uint32(b))
		}
		fmt.Fprintf(&text, ":%04X", got.Port())
		if again := parseSocket(text.String()); again != got {
			t.Fatalf("%q = %v; written %s and read again %v", s, got, &text, again)
		}
	})
}

// What an API call without a token costs among that many other sockets.
func BenchmarkOtherUser(b *testing.B) {
	for _, n := range []int{1, 1000} {
		var server net.Conn
		for range n {
			_, server = pair(b, "127.0.0.1:0", dialer(b, "127.0.0.1"))
		}
		peer, here := ends(b, server)
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if why := otherUser(peer, here); why != "" {
					b.Fatal(why)
				}
			}
		})
	}
}
