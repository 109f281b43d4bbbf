// Package follow tells when files have changed.
package follow

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"time"
)

// Every is how often files are looked at.
const Every = 500 * time.Millisecond

// MaxFile is the largest file that is read, in bytes.
const MaxFile = 1 << 20

// Sum is another for other contents.
type Sum = [sha256.Size]byte

// Follower looks again and again whether files have changed. It reads them, however they came to be others: rewritten in place,
// renamed over, behind a symbolic link or several, as Kubernetes has them, or on a file system that tells nobody. A watch by
// inotify would have to follow each of these, and fails where a system's instances of it are used up.
type Follower struct {
	stop chan struct{}
	done sync.WaitGroup
}

// Files calls changed each time that the files are others than before, and have not changed any more for Every: one that is being
// written is not half read. seen is what Fingerprint returned before they were read first.
func Files(seen Sum, changed func(), files ...string) *Follower {
	return Settled(func() Sum { return seen }, Every, func(now Sum) { seen = now; changed() }, files...)
}

// Settled calls changed with the fingerprint of the files when it is another than the known one and has been the same for quiet,
// which is at least Every. Who reads them then may find that they have changed again: as long as known does not return what was
// settled, changed is called again after each quiet. That is told by this process's own clock, since a file's times are another's.
func Settled(known func() Sum, quiet time.Duration, changed func(Sum), files ...string) *Follower {
	f := &Follower{stop: make(chan struct{})}
	f.done.Go(func() {
		last, since := Fingerprint(files...), time.Now()
		for {
			select {
			case <-time.After(Every): // counted from the last look, so that no two are closer
			case <-f.stop:
				return
			}
			now := Fingerprint(files...)
			if now != last {
				last, since = now, time.Now()
			} else if time.Since(since) >= quiet && now != known() {
				changed(now)
				since = time.Now()
			}
		}
	})
	return f
}

// Close ends it. A nil Follower has ended.
func (f *Follower) Close() {
	if f != nil {
		close(f.stop)
		f.done.Wait()
	}
}

// Fingerprint is another for other contents, or if a file cannot be read.
func Fingerprint(files ...string) Sum {
	h := sha256.New()
	for _, name := range files {
		data, err := Read(name)
		add(h, data, err)
	}
	return Sum(h.Sum(nil))
}

// Of is the Fingerprint of one file for which Read has returned this.
func Of(data []byte, err error) Sum {
	h := sha256.New()
	add(h, data, err)
	return Sum(h.Sum(nil))
}

func add(h hash.Hash, data []byte, err error) {
	fmt.Fprintf(h, "%d %v\n", len(data), err)
	h.Write(data)
}

// Read reads a regular file of at most MaxFile bytes. Its errors name it.
func Read(name string) ([]byte, error) {
	if info, err := os.Stat(name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() { // a pipe would be waited for, and can be read once
		return nil, fmt.Errorf("%s is no regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err == nil && len(data) > MaxFile {
		err = errors.New(name + " has more than 1 MiB")
	}
	return data, err
}
