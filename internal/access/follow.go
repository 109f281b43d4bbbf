package access

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

const (
	maxFile   = 1 << 20                // bytes of a file
	lookEvery = 500 * time.Millisecond // at files that may change
)

// follower looks again and again whether files have changed. It reads them, however they came to be others: rewritten in place,
// renamed over, behind a symbolic link or several, as Kubernetes has them, or on a file system that tells nobody. A watch by
// inotify would have to follow each of these, and fails where a system's instances of it are used up.
type follower struct {
	stop chan struct{}
	done sync.WaitGroup
}

// follow calls changed each time that the files are others than before, and have not changed any more for lookEvery: one that is
// being written is not half read. seen is what fingerprint returned before they were read first.
func follow(seen sum, changed func(), files ...string) *follower {
	f := &follower{stop: make(chan struct{})}
	f.done.Go(func() {
		ticker := time.NewTicker(lookEvery)
		defer ticker.Stop()
		for last := seen; ; {
			select {
			case <-ticker.C:
			case <-f.stop:
				return
			}
			now := fingerprint(files...)
			if now == last && now != seen {
				seen = now
				changed()
			}
			last = now
		}
	})
	return f
}

// close ends it. A nil follower has ended.
func (f *follower) close() {
	if f != nil {
		close(f.stop)
		f.done.Wait()
	}
}

// fingerprint is another for other contents, or if a file cannot be read.
func fingerprint(files ...string) sum {
	h := sha256.New()
	for _, name := range files {
		data, err := readFile(name)
		fmt.Fprintf(h, "%d %v\n", len(data), err)
		h.Write(data)
	}
	return sum(h.Sum(nil))
}

// readFile reads a regular file of at most maxFile bytes. Its errors name it.
func readFile(name string) ([]byte, error) {
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
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = errors.New(name + " has more than 1 MiB")
	}
	return data, err
}
