package loop

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The kernel's table of descriptors is large before there are connections. Another test may have made that of this process so.
func TestReservedDescriptors(t *testing.T) {
	const child = "TEST_RESERVED"
	if os.Getenv(child) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestReservedDescriptors$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	g, err := New(1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "FDSize:")
	var size uint64
	want := min(limit.Cur, reserved)
	if _, err := fmt.Sscan(after, &size); err != nil || size < want {
		t.Errorf("it has room for %d, %v, want %d", size, err, want)
	}
}

// What is left with a loop runs once and in order, whatever the loop does; of what comes too late, nothing runs.
func TestDo(t *testing.T) {
	for _, state := range []string{"parked", "busy", "stopping"} {
		t.Run(state, func(t *testing.T) {
			g, err := New(1, nil)
			if err != nil {
				t.Fatal(err)
			}
			l := g.Loops[0]
			if state == "busy" {
				pingPong(t, l, 2)
			}
			const callers, each = 8, 400
			var over atomic.Bool
			var wg sync.WaitGroup
			for i := range callers {
				wg.Go(func() {
					ran := 0 // only the loop touches it
					accepted := 0
					for n := range each {
						if state == "parked" && n%50 == 0 {
							time.Sleep(3 * nap) // let it park
						}
						ok := l.Do(func() {
							if over.Load() {
								t.Error("it runs after Close")
							}
							if n != ran {
								t.Errorf("call %d of %d runs as number %d", n, i, ran)
							}
							ran++
						})
						if !ok {
							break
						}
						accepted++
						if n%10 == 0 {
							got := -1
							if l.Call(func() { got = ran }) && got != accepted {
								t.Errorf("%d of %d have run before Call", got, accepted)
							}
						}
					}
					if state == "stopping" {
						<-l.ended
					} else if !l.Call(func() {}) {
						t.Error("the loop has ended")
						return
					}
					if ran != accepted {
						t.Errorf("%d of %d ran", ran, accepted)
					}
				})
			}
			if state == "stopping" {
				time.Sleep(time.Millisecond)
			} else {
				wg.Wait()
			}
			g.Close()
			over.Store(true)
			wg.Wait()
			if l.Do(func() { t.Error("it runs after Close") }) || l.Call(func() { t.Error("it runs after Close") }) {
				t.Error("a loop that has ended takes calls")
			}
			g.Close() // again
		})
	}
}

// Who is late to leave something with a loop that ends writes to no descriptor that has become somebody else's.
func TestDoWhileItEnds(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(16)) // more threads than CPUs: one may stop between any two instructions
	end := time.Now().Add(2 * time.Second)
	var rounds sync.WaitGroup
	for range 4 {
		rounds.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				endWithCallers(t)
			}
		})
	}
	rounds.Wait()
}

func endWithCallers(t *testing.T) {
	g, err := New(1, nil)
	if err != nil {
		t.Error(err)
		return
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for g.Loops[0].Do(func() {}) {
				time.Sleep(20 * time.Microsecond) // it parks in between
			}
		})
	}
	time.Sleep(100 * time.Microsecond)
	g.Close()
	var pipes [8][2]int
	for i := range pipes {
		if err := unix.Pipe2(pipes[i][:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Error(err)
			return
		}
	}
	wg.Wait()
	for _, p := range pipes {
		b := make([]byte, 8)
		if n, err := unix.Read(p[0], b); n > 0 || err != unix.EAGAIN {
			t.Errorf("%d bytes %x, %v in a pipe that nobody wrote to", n, b[:max(n, 0)], err)
		}
		unix.Close(p[0])
		unix.Close(p[1])
	}
}

// pingPong saturates a loop: both ends of n connections belong to it, and what comes in on one goes back.
func pingPong(t testing.TB, l *Loop, n int) (rounds *atomic.Int64) {
	t.Helper()
	rounds = &atomic.Int64{}
	for range n {
		near, far := tcpPair(t)
		for _, conn := range []*net.TCPConn{near, far} {
			s, err := take(l, conn)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 16)
			s.SetHandler(&handler{ready: func(e Events) {
				if m, err := s.TryRead(b); err == nil && m > 0 {
					rounds.Add(1)
					s.TryWrite(b[:m])
				}
			}})
			t.Cleanup(func() { s.Close() })
			l.Call(s.Forget)
			if conn == far {
				l.Call(func() { s.TryWrite([]byte("x")) })
			}
		}
	}
	return rounds
}

// Ticks come in time, whether the loop has nothing to do or never has nothing to do.
func TestTicks(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprint("busy: ", busy), func(t *testing.T) {
			type tick struct{ asked, came time.Time }
			var ticks []tick
			var asked time.Time
			var next time.Duration
			done := make(chan struct{})
			g, err := New(1, func(i int, now time.Time) time.Duration {
				if i != 0 {
					t.Errorf("the tick of loop %d", i)
				}
				ticks = append(ticks, tick{asked, time.Now()})
				if len(ticks) == 20 {
					close(done)
					return Never
				}
				next = time.Duration(len(ticks)%4) * 2 * time.Millisecond // 0, too
				asked = now.Add(next)
				return next
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(g.Close)
			l := g.Loops[0]
			if busy {
				rounds := pingPong(t, l, 4)
				eventually(t, "traffic", func() bool { return rounds.Load() > 100 })
			}
			l.Call(func() {
				l.Within(time.Hour)
				asked = l.Now().Add(5 * time.Millisecond)
				l.Within(5 * time.Millisecond)
				l.Within(time.Minute) // the earliest counts
			})
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				t.Fatal("ticks have stopped")
			}
			l.Call(func() {
				for i, tick := range ticks {
					if late := tick.came.Sub(tick.asked); late < 0 || late > 200*time.Millisecond {
						t.Errorf("tick %d came %v late", i, late)
					}
				}
			})
			n := 0
			time.Sleep(20 * time.Millisecond) // Never
			if l.Call(func() { n = len(ticks) }); n != 20 {
				t.Errorf("%d ticks although none is needed", n)
			}
		})
	}
}

// A tick asked for while the loop is parked, by what is left with it, comes too; one that panics ends nothing.
func TestTickAfterAPanic(t *testing.T) {
	var n atomic.Int64
	g, err := New(1, func(int, time.Time) time.Duration {
		if n.Add(1) == 1 {
			panic("a bug in a tick")
		}
		return Never
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	for want := int64(1); want <= 2; want++ {
		time.Sleep(3 * nap) // it parks
		g.Loops[0].Do(func() { g.Loops[0].Within(time.Millisecond) })
		eventually(t, "a tick", func() bool { return n.Load() == want })
	}
}

// A handler that panics is told once, and costs nobody else an event.
func TestPanic(t *testing.T) {
	l := startGroup(t, 1).Loops[0]
	const sockets = 30
	var ready, failed [sockets]int // only the loop touches them
	var blamed []any
	other := &handler{failed: func(failure any) { blamed = append(blamed, failure) }}
	var peers []*net.TCPConn
	for i := range sockets {
		var s *Socket
		var far *net.TCPConn
		h := &handler{failed: func(failure any) {
			failed[i]++
			if failure != fmt.Sprint("bug ", i) {
				t.Errorf("%d failed with %v", i, failure)
			}
			if i%3 == 2 {
				panic("a bug in Failed")
			}
		}}
		s, far = pair(t, l)
		s.SetHandler(h)
		h.ready = func(e Events) {
			if e&Readable == 0 {
				return
			}
			ready[i]++
			if n, err := s.TryRead(make([]byte, 10)); n != 1 || err != nil {
				t.Errorf("%d reads %d, %v", i, n, err)
			}
			switch {
			case i%5 == 4:
				l.Blame(other)
				panic(i)
			case i%3 != 0:
				panic(fmt.Sprint("bug ", i))
			}
		}
		s.Let()
		peers = append(peers, far)
	}
	for round := 1; round <= 3; round++ {
		busy := make(chan struct{})
		l.Do(func() { <-busy })
		for _, far := range peers { // all of them in one batch
			far.Write([]byte("x"))
		}
		close(busy)
		eventually(t, "all are served", func() (all bool) {
			l.Call(func() { all = slices.Min(ready[:]) == round })
			return all
		})
		l.Call(func() {
			for i := range sockets {
				want := 0
				if i%5 != 4 && i%3 != 0 {
					want = round
				}
				if ready[i] != round || failed[i] != want {
					t.Errorf("round %d: %d was ready %d times and failed %d times, want %d", round, i, ready[i], failed[i], want)
				}
			}
			if len(blamed) != round*sockets/5 {
				t.Errorf("round %d: the blamed one was told of %d", round, len(blamed))
			}
		})
	}
	l.Call(func() { // outside of Ready
		blamed = nil
		l.Guard(other, func() { panic("guarded") })
		l.Guard(other, func() {})
		if len(blamed) != 1 || blamed[0] != "guarded" {
			t.Errorf("Guard told of %v", blamed)
		}
	})
	l.Do(func() { panic("a bug in what was left") })
	if !l.Call(func() { panic("another") }) || !l.Call(func() {}) {
		t.Error("the loop has ended")
	}
}

// A loop that is never idle leaves CPU to goroutines, where there is only one: those that run, those that sleep, and those
// that wait for sockets in Go's own poller.
func TestBusyLoopLeavesTime(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	l := startGroup(t, 1).Loops[0]
	rounds := pingPong(t, l, 8)
	eventually(t, "traffic", func() bool { return rounds.Load() > 100 })

	const turns = 50
	took := func(what string, within time.Duration, turn func()) {
		t.Helper()
		began := time.Now()
		for range turns {
			turn()
		}
		if each := time.Since(began) / turns; each > within {
			t.Errorf("%s: %v a turn, want %v", what, each, within)
		}
	}
	took("runs", 10*time.Millisecond, runtime.Gosched)
	took("sleeps", 20*time.Millisecond, func() { time.Sleep(time.Millisecond) })
	took("calls", 10*time.Millisecond, func() { l.Call(func() {}) })
	near, far := tcpPair(t)
	defer near.Close()
	defer far.Close()
	go io.Copy(far, far)
	one := make([]byte, 1)
	took("uses a socket", 50*time.Millisecond, func() {
		near.Write(one)
		near.Read(one)
	})
	s, peer := pair(t, l)
	go io.Copy(peer, peer)
	took("uses a socket of the loop", 50*time.Millisecond, func() {
		s.Write(one)
		s.Read(one)
	})
	collected := time.Now()
	debug.FreeOSMemory() // stops the world
	if d := time.Since(collected); d > time.Second {
		t.Errorf("collecting garbage took %v", d)
	}
	if rounds.Load() < 1000 {
		t.Error("the loop was not busy")
	}
}

// A goroutine that never yields does not stop a loop for good.
func TestLoopGetsTime(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	l := startGroup(t, 1).Loops[0]
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
			}
		})
	}
	s, far := pair(t, l)
	s.SetHandler(&handler{ready: func(Events) {
		b := make([]byte, 10)
		if n, err := s.TryRead(b); err == nil {
			s.TryWrite(b[:n])
		}
	}})
	s.Let()
	for range 5 {
		far.Write([]byte("x"))
		if _, err := far.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	stop.Store(true)
	wg.Wait()
}

// A group that is closed leaves no goroutine and no descriptor, nor do its sockets.
func TestCloseLeavesNothing(t *testing.T) {
	ignored := goleak.IgnoreCurrent()
	eventually(t, "the tests before have ended", func() bool { return parked() == 0 })
	before := descriptors(t)
	for range 20 {
		g, err := New(3, func(int, time.Time) time.Duration { return time.Millisecond })
		if err != nil {
			t.Fatal(err)
		}
		var sockets []io.Closer
		for i := range 30 {
			near, far := tcpPair(t)
			s, err := take(g.Loops[i%3], near)
			if err != nil {
				t.Fatal(err)
			}
			s.SetDeadline(time.Now().Add(time.Minute))
			sockets = append(sockets, s, far)
		}
		for i, s := range sockets {
			if i%4 < 2 { // some before, some after
				s.Close()
			}
		}
		g.Close()
		for i, s := range sockets {
			if i%4 >= 2 {
				s.Close()
			}
		}
	}
	if after := descriptors(t); after > before { // tests before may still give theirs back
		t.Errorf("%d descriptors, before %d", after, before)
	}
	if err := goleak.Find(ignored); err != nil {
		t.Error(err)
	}
}

// New that fails leaves nothing.
func TestNewOutOfDescriptors(t *testing.T) {
	ignored := goleak.IgnoreCurrent()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	highest := 0
	names, _ := os.ReadDir("/proc/self/fd")
	for _, name := range names {
		var fd int
		fmt.Sscan(name.Name(), &fd)
		highest = max(highest, fd)
	}
	for { // no gaps below
		fd, err := unix.Open(os.DevNull, unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if fd > highest {
			highest = fd
			break
		}
	}
	before := descriptors(t)
	low := limit
	for room := range 8 {
		low.Cur = uint64(highest + 1 + room)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
			t.Fatal(err)
		}
		if g, err := New(100, nil); err == nil {
			t.Error("enough for 100 loops")
			g.Close()
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		if after := descriptors(t); after > before { // tests before may still give theirs back
			t.Errorf("%d descriptors, before %d", after, before)
		}
	}
	if err := goleak.Find(ignored); err != nil {
		t.Error(err)
	}
}

// The table finds what was put there, in all of its parts, and takes nothing beyond them; a descriptor that does not fit is
// closed.
func TestTable(t *testing.T) {
	var tab table
	for _, fd := range []int{0, 1, 1023, 1024, 1025, 2047, 2048, 500_000, 1<<20 - 1} {
		s := &Socket{fd: fd}
		if tab.find(fd) != nil {
			t.Errorf("%d is there before", fd)
		}
		if !tab.set(fd, s) || tab.find(fd) != s {
			t.Errorf("%d is not found", fd)
		}
		if !tab.set(fd, nil) || tab.find(fd) != nil {
			t.Errorf("%d is still there", fd)
		}
	}
	if tab.set(1<<20, &Socket{}) {
		t.Error("one beyond was taken")
	}

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	high := limit
	high.Cur, high.Max = 1<<20+10, max(limit.Max, 1<<20+10)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &high); err != nil {
		t.Skipf("no descriptor is that high here: %v", err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	l := startGroup(t, 1).Loops[0]
	near, far := tcpPair(t)
	defer near.Close()
	defer far.Close()
	file, err := near.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, fd := range []int{1<<20 - 1, 1 << 20} {
		at, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, fd)
		if err != nil || at != fd {
			t.Skipf("%d, %v", at, err)
		}
		s, err := l.Watch(fd, netip.AddrPort{}, nil, true)
		if fits := fd < 1<<20; fits != (err == nil) {
			t.Errorf("%d: %v", fd, err)
		}
		if err == nil {
			s.Write([]byte("x"))
			if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
				t.Error(err)
			}
			s.Close()
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
			t.Errorf("%d was left open: %v", fd, err)
		}
	}
}

// Watch owns the descriptor also where it fails.
func TestWatchFails(t *testing.T) {
	g := startGroup(t, 1)
	f, err := os.CreateTemp(t.TempDir(), "") // a file is always ready: epoll does not take it
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := g.Loops[0].Watch(fd, netip.AddrPort{}, &handler{}, false); err == nil {
		t.Errorf("%v is watched", s)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor was left open: %v", err)
	}
	if g.table.find(fd) != nil {
		t.Error("the table still has it")
	}
}

// asking is a handler that asks to be called again, so many times.
type asking struct {
	s     *Socket
	left  int
	calls atomic.Int64
	fails atomic.Int64
}

func (h *asking) Ready(e Events) {
	if h.calls.Add(1); e&Readable == 0 {
		return
	}
	if h.left--; h.left > 0 {
		h.s.Again()
	} else if h.left < 0 {
		panic("called once more")
	}
}

func (h *asking) Failed(any) { h.fails.Add(1) }

// A handler that asks for it is called again, one that always does so keeps no others waiting, and none is called for a
// socket that was closed meanwhile.
func TestAgain(t *testing.T) {
	g := startGroup(t, 1)
	l := g.Loops[0]
	greedy, busy := pair(t, l)
	others, peer := pair(t, l)
	always := &asking{s: greedy, left: 1 << 60}
	few := &asking{s: others, left: 5}
	for s, h := range map[*Socket]*asking{greedy: always, others: few} {
		l.Call(func() {
			s.SetHandler(h)
			s.Forget()
		})
	}
	busy.Write([]byte("x"))
	eventually(t, "called again and again", func() bool { return always.calls.Load() > 1000 })
	peer.Write([]byte("x"))
	eventually(t, "the other one five times", func() bool { return few.calls.Load() == 5 })
	l.Call(func() {}) // an inbox has its turn too
	peer.Write([]byte("x"))
	eventually(t, "a panic is told", func() bool { return few.fails.Load() == 1 })
	n := int64(0)
	l.Call(func() {
		greedy.Close()
		n = always.calls.Load()
	})
	for range 3 {
		l.Call(func() {})
	}
	if always.calls.Load() != n {
		t.Error("called for a closed socket")
	}
}

// A loop on which something happens now and then keeps its P for a nap at most, and one that has told the scheduler of its
// wait has no timer.
func TestNap(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	l := startGroup(t, 1).Loops[0]
	s, peer := pair(t, l)
	came := make(chan struct{}, 1)
	l.Call(func() {
		s.SetHandler(&handler{ready: func(Events) {
			s.TryRead(make([]byte, 16))
			came <- struct{}{}
		}})
		s.Forget()
	})
	const short = 100 * time.Microsecond
	var late []time.Duration
	for range 101 {
		peer.Write([]byte("x"))
		<-came
		began := time.Now()
		time.Sleep(short)
		late = append(late, time.Since(began)-short)
	}
	slices.Sort(late)
	if median := late[len(late)/2]; median > 10*nap { // Go's monitor comes after up to 20 ms
		t.Errorf("a timer is %v late, want %v at most", median, nap)
	}
	runtime.GOMAXPROCS(before) // with one the loop has just yielded, and has yet to set it
	eventually(t, "no timer runs", func() bool {
		for range 20 {
			info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", l.timerfd))
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(info), "it_value: (0, 0)") {
				return false
			}
			time.Sleep(nap / 3)
		}
		return true
	})
}

// BenchmarkAccept is from a connection's begin to its being accepted, beside a loop that may have the only P.
func BenchmarkAccept(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	l, err := startGroup(b, 1).Loops[0].Listen(tcp.(*net.TCPListener))
	if err != nil {
		b.Fatal(err)
	}
	accepted := make(chan int)
	go func() {
		defer close(accepted)
		for {
			fd, _, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- fd
		}
	}()
	to := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: l.Addr().(*net.TCPAddr).Port}
	for b.Loop() {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			b.Fatal(err)
		}
		if err := syscall.Connect(fd, to); err != nil {
			b.Fatal(err)
		}
		Discard(<-accepted)
		syscall.Close(fd)
	}
	l.Close()
	<-accepted
}

// A loop does not nap while those who let it go first have something to do.
func TestNoNapBeforeOthers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l := startGroup(t, 1).Loops[0]
	var took []time.Duration
	for range 101 {
		done := make(chan time.Duration)
		l.Do(func() {
			l.Go(func() {
				began := time.Now()
				for range 4 {
					for part := time.Now(); time.Since(part) < 20*time.Microsecond; {
					}
					runtime.Gosched()
				}
				done <- time.Since(began)
			})
		})
		took = append(took, <-done)
	}
	slices.Sort(took)
	if median := took[len(took)/2]; median > nap {
		t.Errorf("80 µs of work in four parts take %v", median)
	}
}
