package registry

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

type pair struct{ bucket, key, value string }

func readPairs(data []byte) (all []pair, tx uint64, err error) {
	m := readMetas(data)[0]
	err = readImage(data, m, func(bucket string, key, value []byte) error {
		all = append(all, pair{bucket, string(key), string(value)})
		return nil
	})
	return all, m.tx, err
}

// Files that bbolt writes are sound, and the same is read from them as by bbolt, after every one of many random transactions.
func TestImageOfSoundFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), fileName)
	for round := range 6 {
		os.Remove(path)
		rng := rand.New(rand.NewPCG(uint64(round), 1))
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, FreelistType: bbolt.FreelistMapType})
		if err != nil {
			t.Fatal(err)
		}
		keys := 1 << rng.IntN(12) // from one leaf to a tree of three levels
		for range 60 {
			err := db.Update(func(tx *bbolt.Tx) error {
				for _, name := range []string{"about", "instances"} {
					b, err := tx.CreateBucketIfNotExists([]byte(name))
					if err != nil {
						return err
					}
					for range 1 + rng.IntN(1+keys/4) {
						k := fmt.Sprintf("service-%d\x00%d", rng.IntN(keys), rng.IntN(keys))
						if rng.IntN(3) == 0 {
							err = b.Delete([]byte(k))
						} else {
							err = b.Put([]byte(k), make([]byte, rng.IntN(300)+rng.IntN(50)/49*20_000)) // some overflow their page
						}
						if err != nil {
							return err
						}
						if name == "about" {
							break // it stays small
						}
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got, id, err := readPairs(data)
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			var want []pair
			err = db.View(func(tx *bbolt.Tx) error {
				if tx.ID() != int(id) {
					t.Errorf("transaction %d, want %d", id, tx.ID())
				}
				return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
					return b.ForEach(func(k, v []byte) error {
						want = append(want, pair{string(name), string(k), string(v)})
						return nil
					})
				})
			})
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("round %d: %v; %d pairs, want %d", round, err, len(got), len(want))
			}
		}
		db.Close()
	}
}

// A file in which bits have changed is refused, or holds what it held: bbolt reads and writes it without a fault.
func TestDamagedPages(t *testing.T) {
	dir := t.TempDir()
	r := reopen(t, dir)
	for range 5 { // so that there are free pages
		together(200, func(i int) {
			if err := r.Register(fmt.Sprint("service-", i%7), Instance{ID: fmt.Sprint(i), Addr: "http://127.0.0.1:1", Weight: i}); err != nil {
				t.Error(err)
			}
		})
		together(100, func(i int) {
			if err := r.Unregister(fmt.Sprint("service-", i%7), fmt.Sprint(i), ""); err != nil {
				t.Error(err)
			}
		})
	}
	want, path := all(r), filepath.Join(dir, fileName)
	r.Close()
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused, harmless, late := 0, 0, 0
	rng := rand.New(rand.NewPCG(1, 2))
	damagedDir := t.TempDir()
	path = filepath.Join(damagedDir, fileName)
	rounds := 500
	if testing.Short() {
		rounds = 200
	}
	for range rounds {
		data := slices.Clone(sound)
		at, bit := rng.IntN(len(data)), byte(1)<<rng.IntN(8)
		if rng.IntN(2) == 0 { // where it hurts: the first bytes of a page
			at = at&^4095 + rng.IntN(64)
		}
		for range 1 + rng.IntN(2)*rng.IntN(3) {
			data[at] ^= bit
			at = min(at+rng.IntN(9), len(data)-1)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		found, err := readFile(path)
		if err != nil {
			refused++
			continue
		}
		if got := found.records(); !cmp.Equal(got, want) {
			t.Fatalf("bit %d of byte %d: something else is read:\n%s", bit, at, cmp.Diff(want, got))
		}
		if harmless++; found.late {
			late++ // one of two pages of meta that say the same
		}
		err = guard(func() error {
			db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, FreelistType: bbolt.FreelistMapType})
			if err != nil {
				return err
			}
			defer db.Close()
			return db.Update(func(tx *bbolt.Tx) error {
				for i := range 300 {
					k := key{fmt.Sprint("service-", i%7), fmt.Sprint(i)}.bytes()
					if err := tx.Bucket(instancesBucket).Put(k, make([]byte, 200)); err != nil {
						return err
					}
				}
				return nil
			})
		})
		if err != nil {
			t.Fatalf("bit %d of byte %d: judged sound, and %v", bit, at, err)
		}
	}
	t.Logf("%d refused, %d harmless, %d of these in a page of meta", refused, harmless, late)
	if refused == 0 || harmless == 0 || late == 0 {
		t.Error("that is not all there is")
	}
}
