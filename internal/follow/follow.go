// Package follow tells when files have changed.
package follow

import (
	"crypto/sha256"
	"errors"
	"fmt"
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
	f := &Follower{stop: make(chan struct{})}
	f.done.Go(func() {
		ticker := time.NewTicker(Every)
		defer ticker.Stop()
		for last := seen; ; {
			select {
			case <-ticker.C:
			case <-f.stop:
				return
			}
			now := Fingerprint(files...)
			if now == last && now != seen {
				seen = now
				changed()
			}
			last = now
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
		fmt.Fprintf(h, "%d %v\n", len(data), err)
		h.Write(data)
	}
	return Sum(h.Sum(nil))
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
