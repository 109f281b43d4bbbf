package registry

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"reflect"
	"time"

	"github.com/cespare/xxhash/v2"
)

// record is what the file keeps of an instance: all that is to be there after a restart. Lease, probes and breaker begin anew
// then. A field that is added must mean with its zero value what was true before it came; a program that does not know it refuses
// the file. Anything else needs another fileVersion.
type record struct {
	Addr         string            `json:"addr"`
	Weight       int               `json:"weight,omitempty"` // that it registers, as its metadata
	Metadata     map[string]string `json:"metadata,omitempty"`
	TTL          time.Duration     `json:"ttl,omitempty"` // nanoseconds
	Check        *Check            `json:"check,omitempty"`
	SlowStart    time.Duration     `json:"slow_start,omitempty"` // nanoseconds
	RegisteredAt time.Time         `json:"registered_at"`
	Remote       bool              `json:"remote,omitempty"`
	Held         bool              `json:"held,omitempty"`  // by a connection
	Drain        bool              `json:"drain,omitempty"` // it was about to leave
	Override     *Override         `json:"override,omitempty"`
	Networks     []netip.Prefix    `json:"networks,omitempty"` // to which who has registered it may point
}

func recordOf(in *Instance) record {
	rec := record{
		Addr:         in.Addr,
		Weight:       in.registered.weight,
		Metadata:     in.registered.metadata,
		TTL:          in.TTL,
		Check:        in.Check,
		SlowStart:    in.SlowStart,
		RegisteredAt: in.RegisteredAt.UTC().Round(0),
		Remote:       in.remote,
		Held:         in.hold != nil,
		Drain:        in.drain != nil,
		Networks:     in.networks,
	}
	if !in.Override.none() {
		rec.Override = &in.Override
	}
	return rec
}

// kept is an instance that belongs in the file, or nil: what the configuration holds is there already.
func kept(in *Instance) *Instance {
	if in == nil || in.pinned != "" {
		return nil
	}
	return in
}

// sameRecord reports whether the file keeps the same of two instances, of which one may be nil.
func sameRecord(a, b *Instance) bool {
	a, b = kept(a), kept(b)
	if a == nil || b == nil {
		return a == b
	}
	return reflect.DeepEqual(recordOf(a), recordOf(b))
}

// instance returns what a record was made of, as it is after a restart. The error says what no instance can have.
func (rec *record) instance(service, id string) (*Instance, error) {
	in := &Instance{ID: id, Addr: rec.Addr, Weight: rec.Weight, Metadata: rec.Metadata, TTL: rec.TTL, Check: rec.Check, SlowStart: rec.SlowStart,
		RegisteredAt: rec.RegisteredAt, remote: rec.Remote, networks: rec.Networks, restored: true}
	for _, network := range rec.Networks {
		if !network.IsValid() {
			return nil, errors.New("networks: one is none")
		}
	}
	if err := validate(service, in); err != nil {
		return nil, err
	}
	if rec.Held && in.TTL == 0 {
		in.TTL = heldTTL
	}
	in.registered = registered{in.Weight, in.Metadata}
	if o := rec.Override; o != nil {
		switch {
		case o.Weight != nil && (*o.Weight < 1 || *o.Weight > MaxWeight):
			return nil, errors.New("override: weight " + weightRule)
		case o.State != "" && o.State != Up && o.State != Drain && o.State != Down:
			return nil, errors.New("override: state " + stateRule)
		}
		if err := checkMetadata(o.Metadata); err != nil {
			return nil, fmt.Errorf("override: %w", err)
		}
		in.Override = *o
	}
	in.settle()
	return in, nil
}

// A value in the file stands behind a sum over it and its key: bbolt has none, and a bit that has changed must not become an
// address.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(key, value []byte) []byte {
	sum := crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(value)), sum), value...)
}

func unseal(key, sealed []byte) ([]byte, error) {
	if len(sealed) < 4 || !bytes.Equal(seal(key, sealed[4:]), sealed) {
		return nil, fmt.Errorf("the value of %q is damaged", key)
	}
	return sealed[4:], nil
}

// pairSum is one pair's part in the sum over all that the file holds.
func pairSum(key, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	d.Write(key)
	d.Write(value)
	return d.Sum64()
}

func (k key) bytes() []byte { return []byte(k.service + "\x00" + k.id) } // no name has a NUL

func (rec *record) encode(key []byte) ([]byte, error) {
	text, err := json.Marshal(rec)
	if err != nil {
		return nil, err
	}
	return seal(key, text), nil
}

// decodeRecord reads what encode has written.
func decodeRecord(at, sealed []byte) (key, *Instance, bool, error) {
	text, err := unseal(at, sealed)
	if err != nil {
		return key{}, nil, false, err
	}
	service, id, _ := bytes.Cut(at, []byte{0})
	k := key{string(service), string(id)}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	var rec record
	if err := dec.Decode(&rec); err != nil {
		return k, nil, false, fmt.Errorf("%w: instance %s of service %s: %v", errForeign, clip(k.id), clip(k.service), err)
	}
	in, err := rec.instance(k.service, k.id)
	if err != nil {
		return k, nil, false, fmt.Errorf("%w: instance %s of service %s: %v", errForeign, clip(k.id), clip(k.service), err)
	}
	return k, in, rec.Drain, nil
}
