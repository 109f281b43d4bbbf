package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	fileName    = "registry.db"
	fileVersion = "1"
	lockWait    = 500 * time.Millisecond // for another process to let go of the file; it is waited for twice
	saveTimeout = 10 * time.Second       // after which a change that is not on disk yet is told to be late
	savePause   = time.Second            // between attempts to write while they fail
	saveEvery   = 5 * time.Millisecond   // changes that come closer together are written together; as proxy does with its views
)

// generationBlock is how many generations are reserved in the file ahead of their use: after a restart numbers go on behind
// them. It is more than the changes of months, so that a disk that fails meanwhile uses up none; a Registry that is closed gives
// the rest back. 2^53 of them, which is what JavaScript can count, last for millions of crashes.
const generationBlock = 1 << 30

// The buckets of the file. Their names are in the order in which they are read: the version comes before what it is about.
var (
	aboutBucket     = []byte("about")
	instancesBucket = []byte("instances") // key.bytes -> record.encode
	versionKey      = []byte("version")
	generationKey   = []byte("generation")
)

// ErrNotSaved is what a change ends with that is in force, and not on disk: it would be lost in a crash. It is written as soon as
// that is possible.
var ErrNotSaved = errors.New("the change is in force, but not on disk yet: writing fails or is late, and is tried again")

var (
	errForeign = errors.New("written by another version of this program")
	errDamaged = errors.New("damaged")
)

// store keeps the file. Nothing is written to it but what instances are now: a change marks its instance, and whoever writes
// takes all that are marked, with the state that they have by then, in one transaction. So all who came while one was written
// share the next one, and the file cannot but end up with what is in force.
type store struct {
	path string
	db   *bbolt.DB
	log  *slog.Logger

	wake chan struct{} // there may be something to write
	stop chan struct{} // write what there is, and end
	done chan struct{}

	failures atomic.Uint64 // writes that failed

	// Guarded by Registry.mu, which is not held while anything is written.
	next     *batch
	writing  *batch // nil: none
	reserved uint64 // generations below are
}

// key names an instance.
type key struct{ service, id string }

// batch is what is written together.
type batch struct {
	keys map[key]struct{}
	done chan struct{}
	err  error // valid once done is closed
}

func newBatch() *batch { return &batch{keys: map[key]struct{}{}, done: make(chan struct{})} }

// wait returns when a batch is on disk; nil is.
func (b *batch) wait() error {
	if b == nil {
		return nil
	}
	select {
	case <-b.done:
		return b.err
	case <-time.After(saveTimeout):
		return ErrNotSaved
	}
}

// mark has an instance written, if the file keeps another one. The caller holds the registry's mu and has published the change.
func (s *store) mark(service string, before, after *Instance, generation uint64) {
	if s == nil {
		return
	}
	if !sameRecord(before, after) {
		in := before
		if in == nil {
			in = after
		}
		s.next.keys[key{service, in.ID}] = struct{}{}
	} else if generation+generationBlock/2 < s.reserved {
		return
	}
	s.poke()
}

// poke has the writer look whether there is something to do.
func (s *store) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// pending returns the batch that an instance is written with, or nil if the file has it as it is. The caller holds the registry's
// mu.
func (s *store) pending(service, id string) *batch {
	if s == nil {
		return nil
	}
	k := key{service, id}
	for _, b := range []*batch{s.next, s.writing} {
		if b != nil {
			if _, ok := b.keys[k]; ok {
				return b
			}
		}
	}
	return nil
}

// keep writes what is marked, until the store is stopped. A write that fails is repeated, with what was marked meanwhile.
func (r *Registry) keep() {
	s := r.store
	defer close(s.done)
	defer func() { _ = guard(s.db.Close) }()
	failing, began := false, time.Time{}
	write := func(last bool) bool {
		began = time.Now()
		err := r.write(last)
		switch {
		case err != nil && last:
			s.log.Error("changes are lost: they could not be written", slog.String("file", s.path), slog.String("error", err.Error()))
		case err != nil && !failing:
			s.log.Error("registrations cannot be written: what changes from now on would not survive a crash", slog.String("file", s.path), slog.String("error", err.Error()))
		case err == nil && failing:
			s.log.Info("registrations are written again", slog.String("file", s.path))
		}
		if failing = err != nil; failing {
			s.failures.Add(1)
		}
		return !failing
	}
	for {
		select {
		case <-s.wake:
		case <-s.stop:
			write(true)
			return
		}
		for wait := saveEvery - time.Since(began); ; wait = savePause {
			select {
			case <-time.After(wait):
			case <-s.stop:
				write(true)
				return
			}
			if write(false) {
				break
			}
		}
	}
}

// write takes all that is marked and commits it. The last one gives back the generations that were reserved.
func (r *Registry) write(last bool) error {
	s := r.store
	r.mu.Lock()
	b, reserved := s.next, s.reserved
	s.next, s.writing = newBatch(), b
	if last {
		reserved = r.generation
	} else if r.generation+generationBlock/2 >= reserved {
		reserved = r.generation + generationBlock
	}
	r.mu.Unlock()
	err := guard(func() error {
		if len(b.keys) == 0 && reserved == s.reserved { // which nobody else changes
			return nil
		}
		return s.db.Update(func(tx *bbolt.Tx) error { return r.put(tx, b, reserved) })
	})
	r.mu.Lock()
	s.writing = nil
	if err == nil {
		s.reserved = reserved
	} else {
		b.err = ErrNotSaved
		for k := range b.keys {
			s.next.keys[k] = struct{}{}
		}
	}
	r.mu.Unlock()
	close(b.done)
	return err
}

// put writes a batch into a transaction.
func (r *Registry) put(tx *bbolt.Tx, b *batch, reserved uint64) error {
	if reserved != r.store.reserved {
		text := strconv.AppendUint(nil, reserved, 10)
		if err := tx.Bucket(aboutBucket).Put(generationKey, seal(generationKey, text)); err != nil {
			return err
		}
	}
	instances := tx.Bucket(instancesBucket)
	for k := range b.keys {
		at := k.bytes()
		in := kept(r.Snapshot(k.service).Instance(k.id))
		if in == nil {
			if err := instances.Delete(at); err != nil {
				return err
			}
			continue
		}
		rec := recordOf(in)
		value, err := rec.encode(at)
		if err != nil {
			return err
		}
		if err := instances.Put(at, value); err != nil {
			return err
		}
	}
	return nil
}

// guard makes errors of bbolt's panics and of faults in its map of the file: somebody has cut it, or the disk has lost a part.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}

// found is what a file holds.
type found struct {
	generation uint64
	instances  []stored
	half       bool // the last change may be missing
}

// stored is one instance of a file.
type stored struct {
	key
	instance *Instance
	drain    bool // it was about to leave
}

// openFile opens the file in a directory, and makes both if need be. A file that is there is read and judged first, as a whole,
// and nothing is written to it unless all of it is sound.
func openFile(dir string, log *slog.Logger) (*store, *found, error) {
	path := filepath.Join(dir, fileName)
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		if err := createFile(dir, path); err != nil {
			return nil, nil, fmt.Errorf("make %s: %w", path, err)
		}
	case err != nil:
		return nil, nil, err
	case !info.Mode().IsRegular():
		return nil, nil, fmt.Errorf("%s is no file: move it away", path)
	case info.Size() == 0: // bbolt would take it for a new one
		return nil, nil, damaged(path, errors.New("it is empty"))
	}
	all, tx, err := readFile(path)
	if err != nil {
		return nil, nil, err
	}
	db, err := openBolt(path, false)
	if err != nil {
		return nil, nil, err
	}
	err = guard(func() error {
		return db.View(func(now *bbolt.Tx) error {
			if uint64(now.ID()) != tx {
				return fmt.Errorf("%s has just been changed by another gateway: each needs a directory of its own", path)
			}
			return nil
		})
	})
	if err != nil {
		db.Close()
		return nil, nil, err
	}
	return &store{path: path, db: db, log: log, next: newBatch(), reserved: all.generation,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}, all, nil
}

// openBolt opens a file with its lock, which other processes may share if it is to be read only.
func openBolt(path string, readOnly bool) (db *bbolt.DB, err error) {
	err = guard(func() error {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: readOnly, Timeout: lockWait, FreelistType: bbolt.FreelistMapType, NoStatistics: true})
		return err
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%s is in use by another process, which may be another gateway: end that one, or give this one a directory of its own", path)
	case errors.As(err, new(*fs.PathError)):
		return nil, err
	case errors.As(err, new(syscall.Errno)):
		return nil, fmt.Errorf("%s: %w", path, err)
	case err != nil:
		return nil, damaged(path, err)
	}
	return db, nil
}

// readFile judges a file and returns what is in it, and the transaction that has written it last.
func readFile(path string) (*found, uint64, error) {
	db, err := openBolt(path, true) // for its lock
	if err != nil {
		return nil, 0, err
	}
	defer db.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	all := &found{}
	version := ""
	f, err := readImage(data, func(bucket string, at, value []byte) error {
		switch {
		case bucket == string(aboutBucket) && string(at) == string(versionKey):
			if version = string(value); version != fileVersion {
				return fmt.Errorf("%w: it has version %s, this one knows %s", errForeign, clip(version), fileVersion)
			}
		case bucket == string(aboutBucket) && string(at) == string(generationKey):
			text, err := unseal(at, value)
			if err == nil {
				all.generation, err = strconv.ParseUint(string(text), 10, 64)
			}
			return err
		case bucket == string(instancesBucket):
			k, in, drain, err := decodeRecord(at, value)
			if err != nil {
				return err
			}
			all.instances = append(all.instances, stored{k, in, drain})
		default:
			return fmt.Errorf("%w: it has %s in %s", errForeign, clip(string(at)), clip(bucket))
		}
		return nil
	})
	if err == nil && version == "" {
		err = fmt.Errorf("%w: it has no version", errForeign)
	}
	switch {
	case errors.Is(err, errForeign):
		return nil, 0, fmt.Errorf("%s was %w; use that program, or move the file away to begin without its registrations. It was left as it is", path, err)
	case err != nil:
		return nil, 0, damaged(path, err)
	}
	all.half = f.half
	return all, f.tx, nil
}

func damaged(path string, why error) error {
	return fmt.Errorf("%s is damaged (%w): put a copy of it back, or move it away to begin without its registrations. It was left as it is", path, why)
}

// createFile makes a file without instances. It is there as a whole or not at all, also after a loss of power: a file that is
// empty, or half of one, has lost something.
func createFile(dir, path string) error {
	_, there := os.Stat(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(dir, fileName+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	if err := temp.Close(); err != nil {
		return err
	}
	db, err := openBolt(temp.Name(), false)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		about, err := tx.CreateBucket(aboutBucket)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket(instancesBucket); err != nil {
			return err
		}
		return about.Put(versionKey, []byte(fileVersion))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Link(temp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) { // else another gateway was faster
		return err
	}
	if err := syncDir(dir); err != nil || there == nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// syncDir has the names in a directory on disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
