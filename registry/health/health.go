// Package health asks instances, over and over, whether they can serve: whether they accept a connection, or answer a GET with a
// status that they should. It knows neither services nor requests, and shares no connection with them.
//
// One goroutine has all checks in heaps by when they are due, and runs those over plain TCP on sockets that never block, looked
// at every few milliseconds while any is under way: health.go has the order and the verdicts, sockets_linux.go the sockets. What
// does TLS, and everything on other systems, is run by a goroutine for each check: blocking.go. http.go is what is written and
// read in both.
package health

import (
	"container/heap"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"time"

	"kerberos/registry"
)

const (
	// tick is how often checks start, and answers are looked at. To wake for one costs more than the check, and ten that run
	// together find the way warm.
	tick  = 50 * time.Millisecond
	eager = 2 * time.Millisecond // in the place of tick while a new instance waits for its first check
	turn  = 64                   // checks that start before answers are looked at again

	// Checks go on that long at most before requests have the CPU, and as long as the requests then had it, if that is less: where
	// many wait, checks have their part.
	longest = 150 * time.Microsecond

	recentTurn = 2 * time.Second // those that are up since before a restart have their first checks within it
)

// Instance is what is checked, and where.
type Instance struct {
	Owner  Owner
	Check  *registry.Check  // as a Registry has it, without gaps
	Target *registry.Target // which path and Host to ask for
	TLS    *tls.Config      // nil: plain TCP
	Up     bool             // it is taken to be up until checks say otherwise; else it is unknown until the first one has ended
	Recent bool             // it was up not long ago, and is taken to be until the first check, in its turn, whose word is enough
}

// Owner is who has an instance checked.
type Owner interface {
	Addrs() []netip.AddrPort      // where it is now, in the order to try them; none: it is not checked until there is one (see Soon)
	Allowed(netip.AddrPort) error // judges each address a moment before it is dialled
	HealthChanged(Status)         // is told each change of State, on the goroutine of all checks: it must not wait
}

// State is what is thought of an instance.
type State string

// The states. Unknown is that of a new instance of which no check has ended.
const (
	Unknown State = "unknown"
	Up      State = "up"
	Down    State = "down"
)

// Status is how an instance is doing.
type Status struct {
	State   State
	Since   time.Time // when it came to that state
	Error   string    // why the latest check failed; empty if it passed, or there was none
	Checked time.Time // when that ended; zero: there was none
}

// class is how much an instance is expected to answer soon.
type class int

const (
	passing  class = iota // its last check passed
	untested              // it had none
	failing               // it failed
	running               // a check is under way
	classes
)

// atOnce is how many checks of a class may be under way. Those that hang leave the room of those that answered the last time
// alone, and that of new ones; five hundred would have to begin to hang at once for others to wait until their time is up.
var atOnce = [running]int{passing: 512, untested: 256, failing: 256}

// Checker runs checks.
type Checker struct {
	sockets *sockets // nil: each check has its own goroutine
	ctx     context.Context
	cancel  context.CancelFunc
	ended   sync.WaitGroup
	began   time.Time
	awake   chan struct{} // holds one token for: something is due earlier, or has ended

	resumed time.Time     // when requests last had the CPU, since the checks woke; theirs, as stretch is
	stretch time.Duration // how long checks go on from then

	mu      sync.Mutex // guards what follows
	started bool
	closed  bool
	queues  [classes]queue // by due: when the next check starts, or the one under way has taken too long
	under   [running]int   // checks under way, by the class before
	results []result       // of goroutines
	stopped []*Watch       // their sockets are to be closed
}

// Watch is an instance that is checked.
type Watch struct {
	Instance
	checker *Checker
	request []byte

	statusMu sync.Mutex
	status   Status // changed by the goroutine of all checks only

	due   time.Time // guarded by Checker.mu, as what follows is
	phase time.Time // when its latest check was to begin
	class class
	place int   // in the queue of that class; -1: none
	was   class // before running
	over  bool  // it was stopped
	soon  bool  // an address may have come while a check is under way

	// What follows is for whoever runs the check; there is one at a time.
	passed, failed int    // in a row
	been           bool   // it was up by a check, or by setting
	conn           socket // under way, or kept

	// And these are a goroutine's, guarded by Checker.mu.
	kept   net.Conn           // for the next check
	cancel context.CancelFunc // ends the one under way
}

// result is how a check ended that a goroutine ran.
type result struct {
	watch *Watch
	err   error
}

// New makes a Checker. It starts with its first Watch.
func New() *Checker {
	c := &Checker{began: time.Now(), awake: make(chan struct{}, 1)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Close ends all checks and their connections.
func (c *Checker) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wake()
	c.ended.Wait()
}

// Watch begins to check an instance, at once if it can: later checks are at a random time of its interval, so that those who came
// together do not stay together. One that is Recent has its first check within recentTurn: all that there are come together, and none
// waits for it. After Close nothing is checked.
func (c *Checker) Watch(in Instance) *Watch {
	now := time.Now()
	w := &Watch{Instance: in, checker: c, class: untested, place: -1, been: in.Up, status: Status{State: Unknown, Since: now}}
	if in.Up || in.Recent {
		w.status.State = Up
	}
	if !in.Check.TCP {
		w.request = request(&in)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return w
	}
	if !c.started {
		c.started = true
		c.sockets = newSockets(c)
		c.ended.Go(c.run)
	}
	w.phase = now
	if in.Recent {
		w.phase = now.Add(rand.N(min(in.Check.Interval, recentTurn)))
	}
	w.due = w.phase
	c.push(w, untested)
	c.wake()
	return w
}

// Stop ends the checks of an instance; what it was told before may still be on its way.
func (w *Watch) Stop() {
	c := w.checker
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.over {
		return
	}
	w.over = true
	if w.place >= 0 {
		c.pull(w)
	}
	if w.cancel != nil {
		w.cancel()
	}
	w.dropKept()
	if !c.closed {
		c.stopped = append(c.stopped, w)
		c.wake()
	}
}

// Soon has the next check come at once: there may be an address now. One that is under way may have found none a moment before; any
// other has the last word. The first one of a Recent instance still waits for its turn.
func (w *Watch) Soon() {
	c := w.checker
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case w.over || w.place < 0, w.Recent && w.class != running:
	case w.class == running:
		w.soon = true
	default:
		w.phase = time.Now()
		c.move(w, w.phase)
		c.wake()
	}
}

// Status is what the checks say.
func (w *Watch) Status() Status {
	w.statusMu.Lock()
	defer w.statusMu.Unlock()
	return w.status
}

// Verdict is what is thought of the instance, and if that is not Up, why.
func (w *Watch) Verdict() (State, string) {
	switch s := w.Status(); s.State {
	case Up:
		return Up, ""
	case Down:
		if s.Error == "" {
			return Down, fmt.Sprintf("check failing: it passes, but not %d times in a row yet", w.Check.Rise)
		}
		return Down, "check failing: " + s.Error
	}
	return Unknown, "not checked yet"
}

// wake has the goroutine of all checks look around.
func (c *Checker) wake() {
	select {
	case c.awake <- struct{}{}:
	default:
	}
}

// push puts a watch into a queue. The caller holds mu.
func (c *Checker) push(w *Watch, to class) {
	w.class = to
	heap.Push(&c.queues[to], w)
}

// move changes when a watch in a queue is due. The caller holds mu.
func (c *Checker) move(w *Watch, due time.Time) {
	w.due = due
	q := &c.queues[w.class]
	(*q)[w.place].due = int64(due.Sub(c.began))
	heap.Fix(q, w.place)
}

// pull takes a watch out of its queue. The caller holds mu.
func (c *Checker) pull(w *Watch) {
	heap.Remove(&c.queues[w.class], w.place)
	if w.class == running {
		c.under[w.was]--
	}
}

// run is the goroutine of all checks.
func (c *Checker) run() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	batch := make([]*Watch, 0, turn)
	var round time.Time // when others than new ones may start again
	for {
		c.sockets.poll() // before anything is found to be late: this goroutine may be
		c.collect()
		now := time.Now()
		c.resumed = now
		every := !now.Before(round)
		if every {
			round = now.Add(tick)
		}
		for {
			batch = c.next(batch[:0], every)
			for _, w := range batch {
				c.start(w)
				c.giveWay()
			}
			c.sockets.poll()
			if len(batch) < turn {
				break
			}
		}
		select {
		case <-c.ctx.Done():
			c.shut()
			return
		default:
		}
		timer.Reset(c.rest(round))
		select {
		case <-timer.C:
		case <-c.awake:
		case <-c.ctx.Done():
		}
	}
}

// giveWay lets requests have the CPU between two checks now and then: a turn of them takes milliseconds.
func (c *Checker) giveWay() {
	before := time.Now()
	if before.Sub(c.resumed) < c.stretch {
		return
	}
	runtime.Gosched()
	c.resumed = time.Now()
	c.stretch = min(c.resumed.Sub(before), longest)
}

// shut closes all connections.
func (c *Checker) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.queues {
		for _, e := range q {
			e.watch.dropKept()
		}
	}
	c.sockets.close()
}

// collect takes the results of goroutines, closes the sockets of who was stopped, and ends checks that have taken too long.
func (c *Checker) collect() {
	c.mu.Lock()
	results, stopped := c.results, c.stopped
	c.results, c.stopped = nil, nil
	c.mu.Unlock()
	for _, w := range stopped {
		c.sockets.drop(w)
	}
	for _, r := range results {
		c.finish(r.watch, r.err)
	}
	for {
		c.mu.Lock()
		var late *Watch
		if q := c.queues[running]; len(q) > 0 && q[0].due <= int64(time.Since(c.began)) {
			late = q[0].watch
			c.move(late, late.due.Add(time.Hour)) // a goroutine ends by itself; a socket is ended or has another time below
		}
		c.mu.Unlock()
		if late == nil {
			return
		}
		c.sockets.late(late)
	}
}

// next takes up to a turn of checks that are due, of new instances only unless every is set.
func (c *Checker) next(batch []*Watch, every bool) []*Watch {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for of := range running {
		if of != untested && !every {
			continue
		}
		q := &c.queues[of]
		for len(*q) > 0 && len(batch) < cap(batch) && c.under[of] < atOnce[of] && (*q)[0].due <= int64(now.Sub(c.began)) {
			w := heap.Pop(q).(*Watch)
			w.due, w.was = now.Add(w.Check.Timeout), of
			c.under[of]++
			c.push(w, running)
			batch = append(batch, w)
		}
	}
	return batch
}

// rest is how long there is nothing to do. Those that are not new start no earlier than round.
func (c *Checker) rest(round time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	wait, all := time.Duration(math.MaxInt64), 0
	for of := range classes {
		q := c.queues[of]
		all += len(q)
		if len(q) == 0 || of != running && c.under[of] >= atOnce[of] { // then one under way has to end first
			continue
		}
		at := q[0].watch.due
		if of != untested && at.Before(round) {
			at = round
		}
		wait = min(wait, at.Sub(now))
	}
	switch {
	case all == 0:
		c.sockets.trim()
	case c.sockets.busy() && c.under[untested] > 0:
		wait = min(wait, eager)
	case c.sockets.busy():
		wait = min(wait, round.Sub(now))
	}
	return max(wait, time.Millisecond)
}

// limit gives a check under way that much time from now on.
func (c *Checker) limit(w *Watch, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.class == running && w.place >= 0 {
		c.move(w, time.Now().Add(d))
	}
}

// start begins a check.
func (c *Checker) start(w *Watch) {
	addrs := w.Owner.Addrs()
	switch {
	case len(addrs) == 0:
		c.finish(w, errNowhere)
	case c.sockets != nil && w.TLS == nil:
		c.sockets.start(w, addrs)
	default:
		ctx, cancel := context.WithTimeout(c.ctx, w.Check.Timeout)
		c.mu.Lock()
		w.cancel = cancel
		if w.over {
			cancel()
		}
		c.mu.Unlock()
		c.ended.Go(func() {
			err := w.check(ctx, addrs)
			cancel()
			c.mu.Lock()
			c.results = append(c.results, result{w, err})
			c.mu.Unlock()
			c.wake()
		})
	}
}

// errNowhere is for an instance that has no address now, which its name's resolution tells better.
var errNowhere = errors.New("it has no address")

// ours says of an error that it does not tell anything of the instance: this process lacks something.
func ours(err error) bool {
	if err == errNowhere {
		return true
	}
	for _, lack := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, lack) {
			return true
		}
	}
	return false
}

// finish notes how a check ended; err nil: it passed.
func (c *Checker) finish(w *Watch, err error) {
	now := time.Now()
	c.mu.Lock()
	w.cancel = nil
	if w.over || c.closed {
		c.mu.Unlock()
		return
	}
	c.pull(w)
	w.plan(now)
	if w.soon && err == errNowhere {
		w.phase, w.due = now, now
	}
	w.soon = false
	to := passing
	if err != nil {
		to = failing
	}
	if err == errNowhere && w.status.Checked.IsZero() {
		to = untested
	}
	c.push(w, to)
	c.mu.Unlock()

	if err == errNowhere {
		return
	}
	before := w.status.State
	next := Status{State: w.judge(before, err), Since: w.status.Since, Checked: now}
	if err != nil {
		next.Error = err.Error()
	}
	if next.State != before {
		next.Since = now
	}
	w.statusMu.Lock()
	w.status = next
	w.statusMu.Unlock()
	if next.State != before {
		w.Owner.HealthChanged(next)
	}
}

// plan says when the next check is due. Usually it is one interval after the last one was; the second, and one that is far
// behind, are at random so that those who are together do not stay it.
func (w *Watch) plan(now time.Time) {
	first := w.status.Checked.IsZero()
	w.Recent = false // it has had its turn
	w.phase = w.phase.Add(w.Check.Interval)
	if first || w.phase.Before(now) {
		w.phase = now.Add(rand.N(w.Check.Interval))
	}
	w.due = w.phase
}

// judge counts a check and returns the state that follows.
func (w *Watch) judge(state State, err error) State {
	switch {
	case err == nil:
		w.passed, w.failed = w.passed+1, 0
		if state != Up && w.been && w.passed < w.Check.Rise {
			return state
		}
		w.been = true
		return Up
	case !ours(err):
		w.passed, w.failed = 0, w.failed+1
		if state != Down && (!w.been || w.failed >= w.Check.Fall) {
			return Down
		}
	}
	return state
}

// queue is a heap by due, which stands in it too: of ten thousand watches none has to be looked at to find the next one.
type queue []entry

type entry struct {
	due   int64 // nanoseconds of Checker.began
	watch *Watch
}

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due < q[j].due }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].watch.place, q[j].watch.place = i, j
}

func (q *queue) Push(x any) {
	w := x.(*Watch)
	w.place = len(*q)
	*q = append(*q, entry{int64(w.due.Sub(w.checker.began)), w})
}

func (q *queue) Pop() any {
	last := len(*q) - 1
	w := (*q)[last].watch
	w.place = -1
	(*q)[last] = entry{}
	*q = (*q)[:last]
	return w
}
