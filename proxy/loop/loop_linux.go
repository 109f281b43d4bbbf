package loop

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Supported says whether there are loops on this system.
const Supported = true

// The events of a Socket.
const (
	Readable Events = unix.EPOLLIN
	Writable Events = unix.EPOLLOUT
	HangUp   Events = unix.EPOLLRDHUP | Over        // the peer has ended its stream, or all is over
	Over     Events = unix.EPOLLHUP | unix.EPOLLERR // both directions have ended, or the connection is reset

	watched = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET&(1<<32-1)
)

const (
	maxEvents = 256 // taken from the kernel at a time
	busyFrom  = 4   // so many events at a time make it likely that there are more behind them

	// yieldEvery is how long a busy loop keeps its CPU from other goroutines: of API calls, streams, timers.
	yieldEvery = 200 * time.Microsecond

	// wakeTurn is how many goroutines a loop makes ready before it lets others run. Go's scheduler knows no ranks: a loop that
	// does so comes back behind all that are ready, be it thousands.
	wakeTurn = 4

	// nap is how long a loop on which nothing happens keeps its P, or twice that behind the last event, and how long others may
	// wait for it then: goroutines that another thread has made ready, and timers; what Go's own poller watches for longer, where
	// something happens in each nap. Telling Go's scheduler of each wait has its monitor take the P away and wake a thread for
	// it, while most waits of a loop with traffic are shorter.
	nap = time.Millisecond

	// A loop does not nap while others have something to do: while letting them run takes longer than idleYield, it looks for
	// events and lets them run again, so many times.
	idleYield = 5 * time.Microsecond
	maxYields = 8
)

// Group is the loops of a program.
type Group struct {
	Loops []*Loop
	table table
	pipes pipes
	waits sync.Pool     // of *waits
	last  atomic.Uint32 // generation of a socket
}

// New starts n loops. Their sockets are told apart by tick's argument and Handler: tick, if not nil, is called on a loop
// when the time that its last call returned, or an earlier one given to Within, has passed.
func New(n int, tick func(loop int, now time.Time) time.Duration) (*Group, error) {
	g := &Group{}
	g.waits.New = func() any { return newWaits() }
	reserveDescriptors()
	for i := range n {
		l, err := g.newLoop(i, tick)
		if err != nil {
			g.Close()
			return nil, err
		}
		g.Loops = append(g.Loops, l)
		go l.run()
	}
	return g, nil
}

// reserved is how many descriptors the kernel's table of a program has room for from its start. 512 KiB.
const reserved = 64 << 10

// reserveDescriptors has the kernel make that table so large now. It starts with 64 and is doubled when it is full, for which
// the kernel waits until each CPU has been elsewhere (synchronize_rcu in expand_fdtable), and whoever opens a descriptor
// meanwhile with it: 5 to 17 ms in which a loop answers nobody. The table does not shrink.
func reserveDescriptors() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return // New will meet it too
	}
	defer unix.Close(fd)
	if last, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, int(min(limit.Cur, reserved))-1); err == nil {
		unix.Close(last)
	}
}

// Close ends the loops and waits for them. Sockets stay as they are, unwatched: close them before.
func (g *Group) Close() {
	for _, l := range g.Loops {
		l.Do(func() { l.stopping = true })
		<-l.ended
	}
	g.pipes.close()
}

// Loop is one epoll instance and the goroutine that waits on it.
type Loop struct {
	group    *Group
	epoll    int
	eventfd  int
	timerfd  int  // tells of the end of a nap
	timed    bool // it is set, and what it tells was not taken yet
	events   [maxEvents]unix.EpollEvent
	now      time.Time
	yielded  time.Time // when other goroutines last had a chance
	woken    bool      // a goroutine was made ready
	turn     int       // how many more may be, before others run
	later    []waiting // those that it is not the turn of yet
	busy     bool      // the last wait brought many events, or others had something to do
	yields   int       // how often they had, one after the other
	again    []*Socket // whose handlers have more to do
	recalled []*Socket // the slice that again was before
	stopping bool
	tick     func(now time.Time) time.Duration
	tickAt   time.Time // zero: never
	running  Handler   // whose Ready is running
	ended    chan struct{}

	parked  atomic.Bool // waits, or is about to: who leaves something in the inbox must wake it
	pending atomic.Bool // the inbox is not empty
	mu      sync.Mutex  // guards what follows
	inbox   []func()
	over    bool
}

func (g *Group) newLoop(i int, tick func(int, time.Time) time.Duration) (*Loop, error) {
	l := &Loop{group: g, epoll: -1, eventfd: -1, timerfd: -1, ended: make(chan struct{}), now: time.Now()}
	if err := l.open(); err != nil {
		l.release()
		return nil, err
	}
	if tick != nil {
		l.tick = func(now time.Time) time.Duration { return tick(i, now) }
	}
	return l, nil
}

func (l *Loop) open() (err error) {
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	if l.eventfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	if l.timerfd, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return fmt.Errorf("timerfd_create: %w", err)
	}
	for _, fd := range []int{l.eventfd, l.timerfd} {
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET&(1<<32-1), Fd: int32(fd)}
		if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
			return fmt.Errorf("epoll_ctl: %w", err)
		}
	}
	return nil
}

func (l *Loop) release() {
	for _, fd := range []int{l.epoll, l.eventfd, l.timerfd} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Now is when the events at hand were taken from the kernel: a clock for what runs on the loop.
func (l *Loop) Now() time.Time { return l.now }

// Within has the next tick come after d at the latest. Call it on the loop.
func (l *Loop) Within(d time.Duration) {
	if at := l.now.Add(d); l.tickAt.IsZero() || at.Before(l.tickAt) {
		l.tickAt = at
	}
}

// Do has f run on the loop, soon. It reports false, and f does not run, if the loop has ended.
func (l *Loop) Do(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock() // behind the write: the loop may end a moment later, and its descriptor become another's
	if l.over {
		return false
	}
	l.inbox = append(l.inbox, f)
	l.pending.Store(true)
	if l.parked.Swap(false) {
		one := [8]byte{1}
		unix.Write(l.eventfd, one[:]) // cannot fail: the counter is far from full
	}
	return true
}

// Call has f run on the loop and waits for it; not to be called on the loop.
func (l *Loop) Call(f func()) bool {
	done := make(chan struct{})
	if !l.Do(func() { defer close(done); f() }) {
		return false
	}
	<-done
	return true
}

func (l *Loop) run() {
	defer close(l.ended)
	for !l.stopping {
		n := l.wait()
		l.now = time.Now()
		for done := 0; done < n; {
			done = l.dispatch(done, n)
		}
		if len(l.again) > 0 {
			l.recall()
		}
		if l.pending.Load() {
			l.runInbox()
		}
		if !l.tickAt.IsZero() && !l.now.Before(l.tickAt) {
			l.tickAt = time.Time{}
			l.safely(func() {
				if d := l.tick(l.now); d != Never {
					l.Within(d)
				}
			})
		}
		if l.woken || l.now.Sub(l.yielded) > yieldEvery {
			l.yield()
		}
	}
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	l.runInbox() // what came before over
	for len(l.later) > 0 {
		l.begin()
	}
	l.release()
}

// yield lets goroutines run, and then makes those ready whose turn it is.
func (l *Loop) yield() {
	l.woken, l.yielded = false, l.now
	runtime.Gosched()
	l.turn = wakeTurn
	for ; len(l.later) > 0 && l.turn > 0; l.turn-- {
		l.begin()
	}
}

// waiting is a goroutine that is made ready in its turn: the one that holds a socket, or a new one.
type waiting struct {
	socket *Socket
	f      func()
}

// begin makes the first of those ready.
func (l *Loop) begin() {
	next := l.later[0]
	l.later[0] = waiting{}
	l.later = l.later[1:]
	l.woken = true
	if next.f != nil {
		go next.f()
		return
	}
	s := next.socket
	e := s.due
	s.due = 0
	if s.held.Load() && !s.closed.Load() {
		s.waits.wake(e)
	}
}

// Go has a new goroutine run f, soon. For the loop.
func (l *Loop) Go(f func()) { l.queue(waiting{f: f}) }

// rouse tells the goroutine that holds a socket of events.
func (l *Loop) rouse(s *Socket, e Events) {
	queued := s.due != 0
	if s.due |= e; !queued {
		l.queue(waiting{socket: s})
	}
}

func (l *Loop) queue(w waiting) {
	l.later = append(l.later, w)
	if len(l.later) == 1 && l.turn > 0 {
		l.turn--
		l.begin()
	}
}

// wait takes events from the kernel; it returns none when there is something else to do.
func (l *Loop) wait() int {
	if l.busy || len(l.again) > 0 || len(l.later) > 0 { // or the look would be one in vain: a call more for each wait of a loop with little to do
		n := l.poll(0)
		l.busy = n >= busyFrom
		if n > 0 || len(l.again) > 0 || len(l.later) > 0 || l.pending.Load() {
			return n
		}
	}
	before := time.Now()
	if l.yield(); len(l.later) > 0 {
		return 0
	}
	if time.Since(before) > idleYield && l.yields < maxYields { // who let the loop go first has more to do
		l.yields++
		l.busy = true
		return 0
	}
	l.yields = 0
	rest := Never
	if !l.tickAt.IsZero() {
		if rest = time.Until(l.tickAt); rest <= 0 {
			return 0
		}
	}
	n := 0
	l.parked.Store(true)
	if !l.pending.Load() {
		n = l.sleep(rest)
	}
	l.parked.Store(false)
	l.busy = n >= busyFrom
	return n
}

// sleep waits for events, at first without telling the scheduler. A timeout of the kernel's for each wait would be set and
// taken back each time, which on a virtual machine may cost 10 µs, a third of a request: one timer runs beside all waits of a
// nap. It is not set while a loop never waits.
func (l *Loop) sleep(rest time.Duration) int {
	quiet := !l.timed // nothing has happened since it was set
	if quiet {
		l.timed = true
		after := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(nap))}
		unix.TimerfdSettime(l.timerfd, 0, &after, nil) // cannot fail with these arguments
	}
	n := l.poll(-1)
	if !quiet || n != 1 || int(l.events[0].Fd) != l.timerfd {
		return n
	}
	l.timed = false
	ms := -1
	if rest != Never {
		if rest = time.Until(l.tickAt); rest <= 0 {
			return 0
		}
		ms = int((rest + time.Millisecond - 1) / time.Millisecond)
	}
	n, err := unix.EpollWait(l.epoll, l.events[:], ms)
	if err != nil { // EINTR: nothing else can be wrong with these arguments
		return 0
	}
	return n
}

// poll takes events, within ms or whenever they come (-1), without telling the scheduler that it waits.
func (l *Loop) poll(ms int) int {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events[0])), maxEvents, uintptr(ms), 0, 0)
	if errno != 0 { // EINTR, of the scheduler's signal for example: it wants the loop to let others run
		return 0
	}
	return int(n)
}

// dispatch hands out the events from i on, and returns how far it came: to n, unless a handler panicked.
func (l *Loop) dispatch(i, n int) (done int) {
	defer l.recover()
	for done = i; done < n; {
		ev := &l.events[done]
		done++
		switch int(ev.Fd) {
		case l.eventfd: // its counter is never read: each write is an edge
			continue
		case l.timerfd:
			l.timed = false
			continue
		}
		s := l.group.table.find(int(ev.Fd))
		if s == nil || s.generation != uint32(ev.Pad) {
			continue // closed since
		}
		e := Events(ev.Events)
		if e&HangUp != 0 {
			s.hangUp()
		}
		if s.held.Load() {
			l.rouse(s, e)
			continue
		}
		l.running = s.handler
		s.handler.Ready(e)
		l.running = nil
	}
	return done
}

// recall calls the handlers of the sockets that asked for it.
func (l *Loop) recall() {
	due := l.again
	l.again = l.recalled[:0]
	for i, s := range due {
		due[i] = nil
		s.again = false
		if !s.closed.Load() && !s.held.Load() {
			l.Guard(s.handler, func() { s.handler.Ready(Readable) })
		}
	}
	l.recalled = due
}

// Blame has Failed of h called, instead of that of the handler whose Ready is running, if that panics.
func (l *Loop) Blame(h Handler) { l.running = h }

// Guard runs f on the loop as if it were called by the handler's Ready: if it panics, Failed is called.
func (l *Loop) Guard(h Handler, f func()) {
	defer l.recover()
	l.running = h
	f()
	l.running = nil
}

// recover is deferred; it tells the handler that was running of its panic.
func (l *Loop) recover() {
	if h := l.running; h != nil {
		l.running = nil
		failure := recover()
		l.safely(func() { h.Failed(failure) })
	}
}

// safely runs f; a panic there is told to nobody, because f is what would tell it.
func (l *Loop) safely(f func()) {
	defer func() {
		if failure := recover(); failure != nil {
			fmt.Fprintf(os.Stderr, "panic on a loop: %v\n", failure)
		}
	}()
	f()
}

func (l *Loop) runInbox() {
	l.mu.Lock()
	fs := l.inbox
	l.inbox = nil
	l.pending.Store(false)
	l.mu.Unlock()
	for _, f := range fs {
		l.safely(f)
	}
	l.woken = true // who left something there may be waiting for it
}

// table finds sockets by descriptor. Its parts are made when needed.
type table [1 << 10]atomic.Pointer[[1 << 10]atomic.Pointer[Socket]]

func (t *table) find(fd int) *Socket {
	part := t[fd>>10].Load()
	if part == nil {
		return nil
	}
	return part[fd&(1<<10-1)].Load()
}

// set is called by whoever owns the descriptor. It reports false for one beyond the table (1,048,575).
func (t *table) set(fd int, s *Socket) bool {
	if fd>>10 >= len(t) {
		return false
	}
	part := t[fd>>10].Load()
	if part == nil {
		t[fd>>10].CompareAndSwap(nil, new([1 << 10]atomic.Pointer[Socket]))
		part = t[fd>>10].Load()
	}
	part[fd&(1<<10-1)].Store(s)
	return true
}
