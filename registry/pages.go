package registry

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"slices"
)

// bbolt believes the pages that it maps into memory: one that leads to itself has it run out of stack, one that leads out of the
// file ends the process with a fault, and neither can be caught where its own check runs. So a file is judged here before bbolt
// reads it, page by page: what is in use, what is free, that nothing is both or neither, and that every key is where it is looked
// for.

// meta is what one of the two pages says that describe a file: that of its last transaction, or of the one before.
type meta struct {
	size uint64 // of a page
	high uint64 // pages from this one on are not in use yet
	root uint64 // page of the bucket of buckets
	free uint64 // page of the list of free pages
	tx   uint64 // the transaction whose state it is
	page uint64 // which it is; bbolt gives them to its transactions in turn
}

// image is all bytes of a file that bbolt has written, as a page of meta describes it.
type image struct {
	meta
	data    []byte
	claimed []bool // by page: it has its place
}

// The layout of bbolt's pages: a header of id, flags, count and overflow, then as many elements, then what these point to. An
// element is 16 bytes: in a branch where its key is, the size of that, and a page; in a leaf its flags, where its key is, and the
// sizes of key and value.
const (
	pageHeader = 16
	pageElem   = 16
	metaSize   = 64 // of what a page of meta says, its checksum included

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketElem   = 0x01

	boltMagic   = 0xED0CDAED
	boltVersion = 2
)

var (
	u16 = binary.NativeEndian.Uint16 // bbolt writes as the machine does
	u32 = binary.NativeEndian.Uint32
	u64 = binary.NativeEndian.Uint64
)

// readMetas returns what the pages of meta say that are sound, the later one first.
func readMetas(data []byte) (all []meta) {
	for size := uint64(1 << 10); size <= 64<<10 && len(all) == 0; size <<= 1 {
		for n := range uint64(2) {
			at := n*size + pageHeader
			if uint64(len(data)) < at+metaSize {
				continue
			}
			m := data[at:]
			sum := fnv.New64a()
			sum.Write(m[:metaSize-8])
			if u32(m) == boltMagic && u32(m[4:]) == boltVersion && u64(m[metaSize-8:]) == sum.Sum64() && uint64(u32(m[8:])) == size {
				all = append(all, meta{size: size, root: u64(m[16:]), free: u64(m[32:]), high: u64(m[40:]), tx: u64(m[48:]), page: n})
			}
		}
	}
	slices.SortFunc(all, func(a, b meta) int { return cmp.Compare(b.tx, a.tx) })
	return all
}

// copyMeta has the other page of meta say what one does.
func copyMeta(f *os.File, size int, from uint64) error {
	var m [metaSize]byte
	if _, err := f.ReadAt(m[:], int64(from)*int64(size)+pageHeader); err != nil {
		return err
	}
	_, err := f.WriteAt(m[:], int64(1-from)*int64(size)+pageHeader)
	return err
}

// readImage judges a file, as a page of meta describes it, and calls each with every pair of every bucket, in order. Its error
// says what is damaged.
func readImage(data []byte, m meta, each func(bucket string, key, value []byte) error) error {
	switch {
	case m.high < 4:
		return errors.New("its first pages are damaged")
	case uint64(len(data))/m.size < m.high:
		return fmt.Errorf("its end is missing: it has %d bytes of %d", len(data), m.high*m.size)
	}
	f := &image{meta: m, data: data, claimed: make([]bool, m.high)}
	f.claimed[0], f.claimed[1] = true, true
	err := f.tree(f.root, nil, nil, func(flags uint32, name, value []byte) error {
		if flags != bucketElem || len(value) < pageHeader {
			return errors.New("a bucket is damaged")
		}
		pair := func(flags uint32, key, value []byte) error {
			if flags != 0 {
				return errors.New("a bucket is in a bucket")
			}
			return each(string(name), key, value)
		}
		if root := u64(value); root != 0 {
			return f.tree(root, nil, nil, pair)
		}
		return f.elements(value[pageHeader:], nil, nil, pair) // a small one stands in its leaf
	})
	if err != nil {
		return err
	}
	if err := f.freelist(); err != nil {
		return err
	}
	for id, ok := range f.claimed {
		if !ok {
			return fmt.Errorf("page %d is neither in use nor free", id)
		}
	}
	return nil
}

// page returns a page with those that it overflows into. Each can be had once.
func (f *image) page(id uint64) ([]byte, error) {
	if id < 2 || id >= f.high {
		return nil, fmt.Errorf("there is no page %d", id)
	}
	p := f.data[id*f.size:]
	n := uint64(u32(p[12:])) + 1
	if u64(p) != id || n > f.high-id {
		return nil, fmt.Errorf("page %d is damaged", id)
	}
	for i := id; i < id+n; i++ {
		if err := f.claim(i); err != nil {
			return nil, err
		}
	}
	return p[:n*f.size], nil
}

func (f *image) claim(id uint64) error {
	if id < 2 || id >= f.high || f.claimed[id] {
		return fmt.Errorf("page %d does not exist, or is used twice", id)
	}
	f.claimed[id] = true
	return nil
}

// tree walks the pages of a bucket, whose keys must be from low on and below high; nil is no bound.
func (f *image) tree(id uint64, low, high []byte, leaf func(flags uint32, key, value []byte) error) error {
	p, err := f.page(id)
	if err != nil {
		return err
	}
	if err := f.elements(p, low, high, leaf); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// elements walks those of one page, and the pages below it.
func (f *image) elements(p, low, high []byte, leaf func(flags uint32, key, value []byte) error) error {
	if len(p) < pageHeader {
		return errors.New("it is damaged")
	}
	kind, count := u16(p[8:]), int(u16(p[10:]))
	if kind != leafPage && (kind != branchPage || count == 0) || pageHeader+count*pageElem > len(p) {
		return errors.New("it is damaged")
	}
	// pair returns the i-th key and value. They stand one behind the other, from the end of the elements on: so a count that has
	// changed is found.
	end := uint64(pageHeader + count*pageElem)
	pair := func(i int, from uint64) (key, value []byte, err error) {
		at := pageHeader + i*pageElem
		e := p[at:]
		pos, keySize, valueSize := u32(e), u32(e[4:]), uint32(0)
		if kind == leafPage {
			pos, keySize, valueSize = u32(e[4:]), u32(e[8:]), u32(e[12:])
		}
		middle := from + uint64(keySize)
		to := middle + uint64(valueSize)
		if uint64(at)+uint64(pos) != from || to > uint64(len(p)) {
			return nil, nil, errors.New("it is damaged")
		}
		return p[from:middle], p[middle:to], nil
	}
	if count == 0 && bytes.ContainsFunc(p[pageHeader:], func(c rune) bool { return c != 0 }) {
		return errors.New("it is damaged")
	}
	for i := range count {
		k, v, err := pair(i, end)
		if err != nil {
			return err
		}
		end += uint64(len(k) + len(v))
		if low != nil && (bytes.Compare(k, low) < 0 || i > 0 && bytes.Equal(k, low)) || high != nil && bytes.Compare(k, high) >= 0 {
			return fmt.Errorf("key %q is in the wrong place", k)
		}
		low = k
		e := p[pageHeader+i*pageElem:]
		if kind == leafPage {
			if err := leaf(u32(e), k, v); err != nil {
				return err
			}
			continue
		}
		next := high
		if i+1 < count {
			if next, _, err = pair(i+1, end); err != nil {
				return err
			}
		}
		if err := f.tree(u64(e[8:]), k, next, leaf); err != nil {
			return err
		}
	}
	return nil
}

// freelist claims the pages that are free.
func (f *image) freelist() error {
	p, err := f.page(f.free)
	if err != nil {
		return fmt.Errorf("the list of free pages: %w", err)
	}
	ids, count := p[pageHeader:], uint64(u16(p[10:]))
	if count == 0xFFFF { // then the count stands before the pages
		ids, count = ids[8:], u64(ids)
	}
	if u16(p[8:]) != freelistPage || count > uint64(len(ids)/8) {
		return errors.New("the list of free pages is damaged")
	}
	for i := range count {
		if err := f.claim(u64(ids[8*i:])); err != nil {
			return fmt.Errorf("the list of free pages: %w", err)
		}
	}
	return nil
}
