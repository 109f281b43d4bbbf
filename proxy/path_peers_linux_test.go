package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peersEnv tells a process that it is the peers of a load, by its index in pathLoads.
const peersEnv = "KERBEROS_PATH_PEERS"

// TestPathPeers is no test but the other process of BenchmarkPath.
func TestPathPeers(t *testing.T) {
	index, err := strconv.Atoi(os.Getenv(peersEnv))
	if err != nil {
		t.Skip("the other process of BenchmarkPath")
	}
	if err := servePeers(&pathLoads[index]); err != nil {
		t.Fatal(err)
	}
}

// peers are the clients and the origin of one load: one thread, one epoll instance, and one read and one write for each
// small request at each of them. They are told what to do on stdin, a line each, and answer with a line on stdout:
//
//	connect ADDRESS LENGTH   make the connections to the gateway; its responses have that length
//	run N                    N requests, each connection's next one once it has its response; the answer is the time in ns
//
// The first line on stdout is the origin's address. They end with stdin.
type peers struct {
	load     *pathLoad
	request  []byte
	body     int // of the request
	response []byte
	length   int // of a response at the client; of a chunked one it may vary

	epoll, listener int
	byFD            []*peer
	clients         []*peer
	in              []byte // what was just read, of whichever connection
	discarded       []byte // never written: its size says how much is to be dropped
	due             []due  // responses that the origin holds back, the next one first
	unsent          int    // requests of this run that no client has sent yet
	pending         int    // and those that are not answered
	began           time.Time
}

// peer is one connection.
type peer struct {
	fd     int
	client bool
	n      int    // bytes of the message so far
	head   []byte // of the origin: the request so far
	tail   [5]byte
	unsent []byte // of the origin: the rest of the response
}

type due struct {
	at time.Time
	to *peer
}

const (
	peersStall = 5 * time.Second // with a request under way and nothing happening: something is wrong
	peersHead  = 4 << 10
)

var chunksEnd = []byte("0\r\n\r\n")

func servePeers(l *pathLoad) error {
	runtime.LockOSThread()
	ps := &peers{load: l, request: []byte(l.request), response: []byte(l.response()), in: make([]byte, 64<<10), discarded: make([]byte, 1<<20)}
	_, body, _ := strings.Cut(l.request, "\r\n\r\n")
	ps.body = len(body)
	var err error
	if ps.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if ps.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(ps.listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(ps.listener, 1024); err != nil {
		return os.NewSyscallError("listen", err)
	}
	name, err := unix.Getsockname(ps.listener)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	for _, fd := range []int{0, ps.listener} {
		if err := ps.watch(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
	say("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	for {
		if over, err := ps.turn(); err != nil || over {
			return err
		}
	}
}

// say writes a line to stdout, which is a pipe with room for it.
func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func (ps *peers) watch(fd int, events uint32) error {
	err := unix.EpollCtl(ps.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Fd: int32(fd), Events: events})
	return os.NewSyscallError("epoll_ctl", err)
}

func (ps *peers) add(fd int, client bool) (*peer, error) {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	p := &peer{fd: fd, client: client}
	if !client {
		p.head = make([]byte, 0, peersHead)
	}
	for fd >= len(ps.byFD) {
		ps.byFD = append(ps.byFD, nil)
	}
	ps.byFD[fd] = p
	return p, ps.watch(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET&(1<<32-1))
}

// turn does what there is to do, and waits for it. It is over when stdin is.
func (ps *peers) turn() (over bool, _ error) {
	wait := -1
	if ps.pending > 0 {
		wait = int(peersStall.Milliseconds())
	}
	for len(ps.due) > 0 {
		if left := time.Until(ps.due[0].at); left > 0 {
			wait = int((left + time.Millisecond - 1).Milliseconds())
			break
		}
		p := ps.due[0].to
		ps.due = ps.due[1:]
		if err := ps.flush(p); err != nil {
			return false, err
		}
	}
	var events [512]unix.EpollEvent
	n, err := unix.EpollWait(ps.epoll, events[:], wait)
	if err == unix.EINTR {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("epoll_wait", err)
	}
	if n == 0 && len(ps.due) == 0 && ps.pending > 0 {
		return false, fmt.Errorf("%d requests are not answered after %v", ps.pending, peersStall)
	}
	for _, e := range events[:n] {
		switch fd := int(e.Fd); {
		case fd == 0:
			over, err = ps.obey()
		case fd == ps.listener:
			err = ps.accept()
		case ps.byFD[fd] == nil: // closed since
		case ps.byFD[fd].client:
			err = ps.receive(ps.byFD[fd])
		default:
			err = ps.answer(ps.byFD[fd])
		}
		if over || err != nil {
			return over, err
		}
	}
	return false, nil
}

func (ps *peers) accept() error {
	for {
		fd, _, err := unix.Accept4(ps.listener, unix.SOCK_CLOEXEC)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return os.NewSyscallError("accept4", err)
		}
		if _, err := ps.add(fd, false); err != nil {
			return err
		}
	}
}

// obey does what a line on stdin says: it is whole, as it was written at once.
func (ps *peers) obey() (over bool, _ error) {
	n, err := unix.Read(0, ps.in)
	if err != nil || n == 0 {
		return true, err
	}
	words := strings.Fields(string(ps.in[:n]))
	switch {
	case len(words) == 3 && words[0] == "connect":
		if ps.length, err = strconv.Atoi(words[2]); err != nil {
			return false, err
		}
		to, err := netip.ParseAddrPort(words[1])
		if err != nil {
			return false, err
		}
		for range ps.load.connections {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return false, os.NewSyscallError("socket", err)
			}
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
				return false, os.NewSyscallError("connect", err)
			}
			p, err := ps.add(fd, true)
			if err != nil {
				return false, err
			}
			ps.clients = append(ps.clients, p)
		}
		say("connected")
	case len(words) == 2 && words[0] == "run":
		if ps.unsent, err = strconv.Atoi(words[1]); err != nil {
			return false, err
		}
		ps.pending, ps.began = ps.unsent, time.Now()
		for _, p := range ps.clients {
			if err := ps.send(p); err != nil {
				return false, err
			}
		}
	default:
		return false, fmt.Errorf("what is %q", words)
	}
	return false, nil
}

// send sends a client's next request, if there is one.
func (ps *peers) send(p *peer) error {
	if ps.unsent == 0 {
		return nil
	}
	ps.unsent--
	p.n = 0
	if n, err := peerCall(unix.SYS_WRITE, p.fd, ps.request, 0); n != len(ps.request) {
		return fmt.Errorf("%d of %d bytes of a request are sent: %w", n, len(ps.request), err)
	}
	return nil
}

// receive reads what there is of a client's response.
func (ps *peers) receive(p *peer) error {
	for {
		into, trap, flags := ps.in, uintptr(unix.SYS_READ), uintptr(0)
		if p.n > 0 && !ps.load.chunked {
			// Bytes that nobody looks at need not be copied: see MSG_TRUNC in tcp(7).
			into, trap, flags = ps.discarded, unix.SYS_RECVFROM, unix.MSG_TRUNC
		}
		n, err := peerCall(trap, p.fd, into, flags)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil || n == 0 {
			return fmt.Errorf("the gateway has closed a connection: %w", err)
		}
		if p.n == 0 && !bytes.HasPrefix(into[:n], []byte("HTTP/1.1 200 ")) {
			return fmt.Errorf("the gateway answers %q", into[:min(n, 200)])
		}
		p.n += n
		over := p.n == ps.length
		if ps.load.chunked {
			if n >= len(p.tail) {
				copy(p.tail[:], into[n-len(p.tail):n])
			} else {
				copy(p.tail[:], p.tail[n:])
				copy(p.tail[len(p.tail)-n:], into[:n])
			}
			over = bytes.Equal(p.tail[:], chunksEnd)
		} else if p.n > ps.length {
			return errors.New("a response is longer than it was")
		}
		if over {
			if ps.pending--; ps.pending == 0 {
				say("%d", time.Since(ps.began))
				return nil
			}
			return ps.send(p)
		}
		if n < len(into) {
			return nil
		}
	}
}

// answer reads a request, and sends the response to one that is complete.
func (ps *peers) answer(p *peer) error {
	if len(p.unsent) > 0 {
		return ps.write(p)
	}
	n, err := peerCall(unix.SYS_READ, p.fd, p.head[len(p.head):cap(p.head)], 0)
	switch {
	case err == unix.EAGAIN:
		return nil
	case err != nil || n == 0: // or there was no room, which shows in what misses its answer
		ps.byFD[p.fd] = nil
		unix.Close(p.fd)
		return nil
	}
	p.head = p.head[:len(p.head)+n]
	end := bytes.Index(p.head, headEnd)
	if end < 0 || len(p.head) < end+len(headEnd)+ps.body {
		return nil
	}
	p.head = p.head[:0]
	if ps.load.delay > 0 {
		ps.due = append(ps.due, due{time.Now().Add(ps.load.delay), p})
		return nil
	}
	return ps.flush(p)
}

func (ps *peers) flush(p *peer) error {
	p.unsent = ps.response
	return ps.write(p)
}

// write writes what there is room for.
func (ps *peers) write(p *peer) error {
	for len(p.unsent) > 0 {
		n, err := peerCall(unix.SYS_WRITE, p.fd, p.unsent, 0)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the gateway takes no response: %w", err)
		}
		p.unsent = p.unsent[n:]
	}
	return nil
}

// peerCall does not tell the scheduler: nothing else runs in this process.
func peerCall(trap uintptr, fd int, b []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
