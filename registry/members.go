package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// members are what a body may hold. A missing string is empty, a missing weight or ttl 0: none.
type members struct {
	service, id, addr string
	state             string
	weight            int
	ttl, drain        time.Duration
	metadata          map[string]*string // nil: null, in a patch
	check             *Check
	slowStart         time.Duration
	seen, null        memberSet // which there were, and were null
}

// memberSet is a set of memberNames.
type memberSet uint16

var memberNames = []string{"service", "id", "addr", "weight", "ttl", "drain", "state", "metadata", "check", "slow_start"}

func (s memberSet) has(name string) bool { return s&member(name) != 0 }

func member(name string) memberSet { return 1 << slices.Index(memberNames, name) }

// decodeMembers reads one JSON object strictly; a name with a ? behind it may be null: a member that is unknown, comes twice or
// has the wrong type is refused by its name, and so is anything after the object. encoding/json alone lets all of that pass, and
// names in other case.
func decodeMembers(body []byte, allowed ...string) (members, error) {
	bad := func(field, format string, args ...any) (members, error) {
		return members{}, &refusal{http.StatusBadRequest, field, fmt.Sprintf(format, args...)}
	}
	allowed = slices.Clone(allowed)
	var nullable memberSet
	for i, name := range allowed {
		if base, ok := strings.CutSuffix(name, "?"); ok {
			allowed[i] = base
			nullable |= member(base)
		}
	}
	expected := "one JSON object with " + strings.Join(allowed, ", ")
	if !utf8.Valid(body) {
		return bad("", "the body is not UTF-8; must be %s", expected)
	}
	if !json.Valid(body) { // once and for all; what follows only walks it
		err := json.Unmarshal(body, new(json.RawMessage)) // which says why
		return bad("", "the body is not JSON: %v; must be %s", err, expected)
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return bad("", "the body must be %s", expected)
	}
	var m members
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return bad("", "the body must be %s", expected)
		}
		if !slices.Contains(allowed, name) {
			return bad(short(name), "unknown member %s; allowed here: %s", clip(name), strings.Join(allowed, ", "))
		}
		if m.seen.has(name) {
			return bad(name, "%s is there twice", name)
		}
		m.seen |= member(name)
		value, err := dec.Token()
		if err != nil {
			return bad(name, "%s cannot be read: %v", name, err)
		}
		if value == nil && nullable.has(name) {
			m.null |= member(name)
			continue
		}
		if name == "weight" {
			number, ok := value.(json.Number)
			if m.weight, err = strconv.Atoi(number.String()); !ok || err != nil || m.weight < 0 || m.weight > MaxWeight {
				return bad(name, "%s %s, not %s", name, weightRule, describe(value))
			}
			continue
		}
		if name == "metadata" {
			if value != json.Delim('{') {
				return bad(name, "metadata must be an object of strings, not %s", describe(value))
			}
			if m.metadata, err = readMetadata(dec, nullable.has(name)); err != nil {
				return members{}, err
			}
			continue
		}
		if name == "check" {
			if m.check, err = decodeCheck(dec, value); err != nil {
				return members{}, err
			}
			continue
		}
		text, ok := value.(string)
		if !ok {
			return bad(name, "%s must be a string, not %s", name, describe(value))
		}
		switch name {
		case "service":
			m.service = text
		case "id":
			m.id = text
		case "addr":
			m.addr = text
		case "state":
			m.state = text
		case "drain":
			if m.drain, err = parseDrain(text); err != nil {
				return members{}, err
			}
		case "slow_start":
			if m.slowStart, err = time.ParseDuration(text); err != nil {
				return bad(name, "%s %s, not %s", name, slowStartRule, clip(text))
			}
		case "ttl":
			if m.ttl, err = time.ParseDuration(text); err != nil {
				return bad(name, "%s %s, not %s", name, ttlRule, clip(text))
			}
		}
	}
	return m, nil
}

// describe says what a JSON value is, for a message.
func describe(value json.Token) string {
	switch v := value.(type) {
	case nil:
		return "null"
	case string:
		return "the string " + clip(v)
	case json.Number:
		return short(v.String())
	case json.Delim:
		if v == '[' {
			return "an array"
		}
		return "an object"
	}
	return fmt.Sprint(value)
}
