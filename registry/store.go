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
	fileName       = "registry.db"
	fileVersion    = "2"
	sumlessVersion = "1"                    // its files have no sum, and are read
	lockWait       = 500 * time.Millisecond // for another process to let go of the file; it is waited for twice
	saveTimeout    = 10 * time.Second       // after which a change that is not on disk yet is told to be late
	savePause      = time.Second            // between attempts to write while they fail
	saveEvery      = 5 * time.Millisecond   // changes that come closer together are written together; as proxy does with its views
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
	sumKey          = []byte("sum") // found.sum
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
//
// A transaction is on disk after one wait, in which nobody is held up: see newSync. bbolt itself would wait twice, for the pages
// and then for the page of meta that makes them count, and each time hold up what runs beside. Without the first wait a loss of
// power may leave the page of meta and only some of the others; so
//   - the file has a sum over all that is in it, by which such a transaction is known: readFile then takes the one before,
//     which is whole, since bbolt writes to no page that the last transaction needs;
//   - a transaction begins when the one before is on disk, and one of which the disk says that it failed is undone;
//   - one that is on disk stands in both pages of meta: a file at rest has no state before to go back to, and is damaged if
//     anything in it is.
type store struct {
	path string
	log  *slog.Logger
	sync func() error // see newSync

	// Of who writes.
	file   *os.File  // for sync and the pages of meta
	end    func()    // of sync
	db     *bbolt.DB // nil: see undo
	last   uint64    // transaction on disk
	sum    uint64    // see found
	toUndo bool      // the transaction behind it

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
	defer s.close()
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
		return s.commit(func(tx *bbolt.Tx) (sum uint64, err error) { return r.put(tx, b, reserved) })
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

// put writes a batch into a transaction, and returns the sum over all that is in the file then.
func (r *Registry) put(tx *bbolt.Tx, b *batch, reserved uint64) (sum uint64, err error) {
	sum = r.store.sum
	set := func(bucket *bbolt.Bucket, at, value []byte) error {
		if old := bucket.Get(at); old != nil {
			sum -= pairSum(at, old)
		}
		if value == nil {
			return bucket.Delete(at)
		}
		sum += pairSum(at, value)
		return bucket.Put(at, value)
	}
	if reserved != r.store.reserved {
		text := strconv.AppendUint(nil, reserved, 10)
		if err := set(tx.Bucket(aboutBucket), generationKey, seal(generationKey, text)); err != nil {
			return 0, err
		}
	}
	instances := tx.Bucket(instancesBucket)
	for k := range b.keys {
		at := k.bytes()
		var value []byte
		if in := kept(r.Snapshot(k.service).Instance(k.id)); in != nil {
			rec := recordOf(in)
			if value, err = rec.encode(at); err != nil {
				return 0, err
			}
		}
		if err := set(instances, at, value); err != nil {
			return 0, err
		}
	}
	return sum, nil
}

// commit makes a transaction, and returns when it is on disk. If it ends with an error the file is as it was before.
func (s *store) commit(put func(*bbolt.Tx) (sum uint64, err error)) error {
	if s.toUndo {
		if err := s.undo(); err != nil {
			return err
		}
	}
	var sum uint64
	err := s.db.Update(func(tx *bbolt.Tx) (err error) {
		if sum, err = put(tx); err != nil {
			return err
		}
		return putSum(tx, sum)
	})
	if err != nil {
		return err
	}
	if err := s.sync(); err != nil {
		s.toUndo = true
		return errors.Join(err, s.undo())
	}
	s.last++
	s.sum = sum
	return copyMeta(s.file, s.db.Info().PageSize, s.last%2)
}

// putSum has a transaction say what it holds, and which it is: its first page may be missing where that of an earlier one stood.
func putSum(tx *bbolt.Tx, sum uint64) error {
	return tx.Bucket(aboutBucket).Put(sumKey, seal(sumKey, fmt.Appendf(nil, "%d %d", tx.ID(), sum)))
}

// undo makes the file what it was before the transaction that has not reached the disk: a second attempt to bring the same pages
// there may succeed without them, since the system takes them for written. bbolt knows of no way back, and begins anew.
func (s *store) undo() error {
	if s.db != nil {
		if err := copyMeta(s.file, s.db.Info().PageSize, s.last%2); err != nil {
			return err
		}
		db := s.db
		s.db = nil
		if err := guard(db.Close); err != nil {
			return err
		}
	}
	if err := s.open(); err != nil {
		return err
	}
	s.toUndo = false
	return nil
}

// open has bbolt open the file, and finds the transaction last there.
func (s *store) open() error {
	db, err := openBolt(s.path, false)
	if err != nil {
		return err
	}
	err = guard(func() error {
		return db.View(func(tx *bbolt.Tx) error {
			if uint64(tx.ID()) != s.last {
				return fmt.Errorf("%s has just been changed by another gateway: each needs a directory of its own", s.path)
			}
			return nil
		})
	})
	if err != nil {
		db.Close()
		return err
	}
	db.NoSync = true
	s.db = db
	return nil
}

// close leaves the file to others.
func (s *store) close() {
	if s.db != nil {
		_ = guard(s.db.Close)
	}
	s.end()
	s.file.Close()
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
	meta
	version    string
	generation uint64
	sum        uint64 // of pairSum, over the generation and all instances
	instances  []stored
	late       bool // the last change may be missing
	settled    bool // both pages of meta say the same
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
	others, err := openBolt(path, true) // who may read it, and not write
	if err != nil {
		return nil, nil, err
	}
	all, err := readFile(path)
	if err == nil && !all.settled {
		err = settle(path, all.meta)
	}
	others.Close()
	if err != nil {
		return nil, nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	s := &store{path: path, log: log, file: file, last: all.tx, sum: all.sum, reserved: all.generation,
		next: newBatch(), wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	s.sync, s.end = newSync(file)
	if err = s.open(); err == nil && all.version != fileVersion {
		err = s.adopt()
	}
	if err != nil {
		s.close()
		return nil, nil, err
	}
	return s, all, nil
}

// settle brings a file that is sound to the disk, if it ended in the midst of a change, and leaves no other state in it.
func settle(path string, m meta) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	if err := copyMeta(f, int(m.size), m.page); err != nil {
		return err
	}
	return f.Sync()
}

// adopt gives a file of the version before its sum.
func (s *store) adopt() error {
	s.db.NoSync = false
	defer func() { s.db.NoSync = true }()
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			if err := tx.Bucket(aboutBucket).Put(versionKey, []byte(fileVersion)); err != nil {
				return err
			}
			return putSum(tx, s.sum)
		})
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	s.last++
	return copyMeta(s.file, s.db.Info().PageSize, s.last%2)
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

// readFile judges a file, and returns what is in it.
func readFile(path string) (*found, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	metas := readMetas(data)
	if len(metas) == 0 {
		return nil, damaged(path, errors.New("it is no file of this gateway, or its first pages are lost"))
	}
	all, err := readState(data, metas[0])
	if err != nil && !errors.Is(err, errForeign) && len(metas) == 2 && metas[1].tx < metas[0].tx {
		// The last transaction did not reach the disk as a whole; one of the version before did, in an order of its own.
		if before, err := readState(data, metas[1]); err == nil && before.version == fileVersion {
			before.late = true
			return before, nil
		}
	}
	switch {
	case errors.Is(err, errForeign):
		return nil, fmt.Errorf("%s was %w; use that program, or move the file away to begin without its registrations. It was left as it is", path, err)
	case err != nil:
		return nil, damaged(path, err)
	}
	all.late = len(metas) == 1
	if len(metas) == 2 {
		metas[1].page = metas[0].page
		all.settled = metas[0] == metas[1]
	}
	return all, nil
}

// readState returns what is in a file according to a page of meta.
func readState(data []byte, m meta) (*found, error) {
	all := &found{meta: m}
	var total, tx uint64
	err := readImage(data, m, func(bucket string, at, value []byte) error {
		switch {
		case bucket == string(aboutBucket) && string(at) == string(versionKey):
			if all.version = string(value); all.version != fileVersion && all.version != sumlessVersion {
				return fmt.Errorf("%w: it has version %s, this one knows %s", errForeign, clip(all.version), fileVersion)
			}
		case bucket == string(aboutBucket) && string(at) == string(generationKey):
			text, err := unseal(at, value)
			if err == nil {
				all.generation, err = strconv.ParseUint(string(text), 10, 64)
			}
			total += pairSum(at, value)
			return err
		case bucket == string(aboutBucket) && string(at) == string(sumKey):
			text, err := unseal(at, value)
			if err == nil {
				_, err = fmt.Sscanf(string(text), "%d %d", &tx, &all.sum)
			}
			return err
		case bucket == string(instancesBucket):
			k, in, drain, err := decodeRecord(at, value)
			if err != nil {
				return err
			}
			all.instances = append(all.instances, stored{k, in, drain})
			total += pairSum(at, value)
		default:
			return fmt.Errorf("%w: it has %s in %s", errForeign, clip(string(at)), clip(bucket))
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case all.version == "":
		return nil, fmt.Errorf("%w: it has no version", errForeign)
	case all.version == sumlessVersion && tx == 0:
		all.sum = total
	case tx != m.tx || all.sum != total:
		return nil, errors.New("what it holds does not add up")
	}
	return all, nil
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
		if err := about.Put(versionKey, []byte(fileVersion)); err != nil {
			return err
		}
		return putSum(tx, 0)
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
