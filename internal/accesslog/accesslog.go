// Package accesslog writes a line for each request to a file or the standard output. Lines are made where requests end, and
// written by one goroutine, so that a disk that is slow, or a pipe that nobody reads, holds up nobody: what it cannot keep up
// with is dropped and counted. It does not know flags or signals.
package accesslog

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"kerberos/proxy"
)

// Stdout is the path that stands for the standard output.
const Stdout = "stdout"

const (
	ringSize    = 1 << 20                // bytes of lines that wait to be written, for each loop, and for all goroutines together
	gather      = 100 * time.Millisecond // how long lines wait for others, so that there are few writes
	tellEvery   = 10 * time.Second       // how often the log is told of lines that were dropped
	closeWithin = time.Second            // how long Close waits for a reader that takes nothing
)

// Format is how a line looks.
type Format string

const (
	JSON     Format = "json"
	Combined Format = "combined" // that of Apache and nginx
)

// Config is what a Log is made of.
type Config struct {
	Path   string       // of a file, which is made if need be and appended to; or Stdout
	Format Format       // JSON if empty
	Share  float64      // 0 to 1: of the requests, those that are logged. What failed always is: see Log.Write
	Loops  int          // of the proxy.Proxy
	Log    *slog.Logger // what goes wrong with it
}

// Log is an access log.
type Log struct {
	cfg     Config
	shards  []*shard // one for each loop, and behind them one that goroutines share
	shared  sync.Mutex
	dropped atomic.Uint64 // lines
	told    uint64        // of dropped, in the log; belongs to tell
	telling atomic.Bool   // tell is going to run

	asleep  atomic.Bool   // the writer waits for wake
	wake    chan struct{} // holds one
	reopen  chan struct{} // holds one
	stop    chan struct{}
	closing sync.Once     // closes stop
	ended   chan struct{} // closed when the writer has ended
	file    *os.File      // belongs to the writer
	torn    bool          // the file ends within a line; belongs to the writer
}

// shard is where the lines of one loop wait.
type shard struct {
	ring
	encoder
}

// Open opens the file and starts the goroutine that writes. The error names the file.
func Open(cfg Config) (*Log, error) {
	if cfg.Format == "" {
		cfg.Format = JSON
	}
	l := &Log{
		cfg: cfg, wake: make(chan struct{}, 1), reopen: make(chan struct{}, 1), stop: make(chan struct{}), ended: make(chan struct{}),
	}
	if err := Check(cfg.Path); err != nil {
		return nil, err
	}
	var err error
	if l.file, err = l.open(); err != nil {
		return nil, err
	}
	for range cfg.Loops + 1 {
		l.shards = append(l.shards, &shard{encoder: encoder{format: cfg.Format}})
	}
	go l.run()
	return l, nil
}

// Check refuses a path at which Open could not open or make a file, as far as that can be told without doing it.
func Check(path string) error {
	if path == Stdout {
		return nil
	}
	if info, err := os.Stat(path); err == nil {
		if info.IsDir() {
			return fmt.Errorf("%s is a directory: it must be a file", path)
		}
		return nil
	}
	dir := filepath.Dir(path)
	switch info, err := os.Stat(dir); {
	case err != nil:
		return fmt.Errorf("%s cannot be made: %w", path, err)
	case !info.IsDir():
		return fmt.Errorf("%s cannot be made: %s is no directory", path, dir)
	}
	return nil
}

// Write has a request logged, if it is in the share; what failed always is: a status from 500, or a response that broke off.
// It is a function for proxy.Config.AccessLog: it never waits for the file.
func (l *Log) Write(r *proxy.Record) {
	if l.cfg.Share < 1 && r.Status < 500 && !r.Cut && rand.Float64() >= l.cfg.Share {
		return
	}
	s := l.shards[len(l.shards)-1]
	if r.Loop >= 0 {
		s = l.shards[r.Loop]
	} else {
		l.shared.Lock() // by goroutines only, for less than a microsecond
		defer l.shared.Unlock()
	}
	room := s.room()
	if room == nil || !s.put(room, s.append(room, r)) {
		l.drop(1)
		return
	}
	// The writer sets asleep and then looks for lines: one of the two sees what the other has done.
	if l.asleep.Load() && l.asleep.CompareAndSwap(true, false) || s.crowded() {
		select {
		case l.wake <- struct{}{}:
		default: // it is going to wake
		}
	}
}

// Dropped is how many lines were lost, since the start, to a file that could not take them. Without a Log (nil) it is none.
func (l *Log) Dropped() uint64 {
	if l == nil {
		return 0
	}
	return l.dropped.Load()
}

// drop counts lines that are lost, and has the log told of them once in a while.
func (l *Log) drop(lines uint64) {
	l.dropped.Add(lines)
	if l.telling.CompareAndSwap(false, true) {
		time.AfterFunc(tellEvery/10, l.tell)
	}
}

// tell tells the log how many lines were dropped. Only one runs at a time.
func (l *Log) tell() {
	n := l.dropped.Load()
	l.cfg.Log.Warn("lines of the access log were dropped", slog.Uint64("count", n-l.told), slog.Uint64("total", n),
		slog.String("access_log", l.cfg.Path))
	l.told = n
	time.AfterFunc(tellEvery, func() {
		if l.dropped.Load() > l.told {
			l.tell()
			return
		}
		l.telling.Store(false)
		if l.dropped.Load() > l.told && l.telling.CompareAndSwap(false, true) { // one was lost just now
			l.tell()
		}
	})
}

// Reopen has the file opened anew: call it when the file was renamed. Each line is in the old one or in the new one. Where
// that fails the old one stays in use, and the log says why.
func (l *Log) Reopen() {
	select {
	case l.reopen <- struct{}{}:
	default: // it is going to be
	}
}

// Close writes what waits to be written, for a second at most, and ends. Call it when nothing calls Write any more.
func (l *Log) Close() error {
	l.closing.Do(func() { close(l.stop) })
	select {
	case <-l.ended:
		return nil
	case <-time.After(closeWithin):
		return fmt.Errorf("--access-log %s: nobody takes the last lines", l.cfg.Path)
	}
}

func (l *Log) open() (*os.File, error) {
	if l.cfg.Path == Stdout {
		return stdout()
	}
	// A pipe without a reader is an error at once, instead of a wait for one.
	return os.OpenFile(l.cfg.Path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|nonblock, 0o640)
}

// run is the goroutine that writes.
func (l *Log) run() {
	defer close(l.ended)
	defer func() { _ = l.file.Close() }()
	timer := time.NewTimer(gather)
	defer timer.Stop()
	for failing := false; ; {
		wrote, err := l.write()
		if err != nil && !failing {
			l.cfg.Log.Error("the access log cannot be written", slog.String("access_log", l.cfg.Path), slog.String("reason", err.Error()))
		}
		failing = err != nil || failing && !wrote
		if !wrote && !l.sleep() {
			_, _ = l.write()
			return
		}
		timer.Reset(gather) // more lines will come
		select {
		case <-timer.C:
		case <-l.wake: // there are many
		case <-l.reopen:
			l.change()
		case <-l.stop:
			_, _ = l.write()
			return
		}
	}
}

// sleep waits for a line, or for something else to do. It reports false if that is to end.
func (l *Log) sleep() bool {
	l.asleep.Store(true)
	defer l.asleep.Store(false)
	for _, s := range l.shards {
		if !s.empty() {
			return true
		}
	}
	select {
	case <-l.wake:
	case <-l.reopen:
		l.change()
	case <-l.stop:
		return false
	}
	return true
}

// change opens the file anew.
func (l *Log) change() {
	file, err := l.open()
	if err != nil {
		l.cfg.Log.Error("the access log cannot be opened anew", slog.String("access_log", l.cfg.Path), slog.String("reason", err.Error()))
		return
	}
	if before, err := l.file.Stat(); err == nil && l.torn {
		now, err := file.Stat()
		l.torn = err == nil && os.SameFile(before, now)
	}
	_ = l.file.Close()
	l.file = file
}

// write writes what waits, and reports whether there was anything.
func (l *Log) write() (wrote bool, err error) {
	for _, s := range l.shards {
		lines, upTo := s.waiting()
		for _, b := range lines {
			if len(b) == 0 {
				continue
			}
			wrote = true
			if failed := l.append(b); failed != nil {
				err = errors.Join(err, failed)
			}
		}
		s.took(upTo)
	}
	return wrote, err
}

// append writes whole lines to the file.
func (l *Log) append(b []byte) error {
	if l.torn {
		if _, err := l.file.Write([]byte{'\n'}); err != nil {
			l.drop(count(b))
			return err
		}
		l.torn = false
	}
	n, err := l.file.Write(b)
	if err != nil {
		l.torn = n > 0 && b[n-1] != '\n'
		l.drop(count(b[n:]))
	}
	return err
}
