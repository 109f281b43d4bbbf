package registry

import (
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
	names := func() string { return strings.ReplaceAll(strings.Join(allowed, ", "), "?", "") }
	if !utf8.Valid(body) {
		return bad("", "the body is not UTF-8; must be one JSON object with %s", names())
	}
	if !json.Valid(body) { // once and for all; what follows only walks it
		err := json.Unmarshal(body, new(json.RawMessage)) // which says why
		return bad("", "the body is not JSON: %v; must be one JSON object with %s", err, names())
	}
	s := &scanner{body}
	if s.next().kind != '{' {
		return bad("", "the body must be one JSON object with %s", names())
	}
	var m members
	for t := s.next(); t.kind != '}'; t = s.next() {
		at := slices.IndexFunc(allowed, func(name string) bool { return strings.TrimSuffix(name, "?") == string(t.text) })
		if at < 0 {
			return bad(short(string(t.text)), "unknown member %s; allowed here: %s", clip(string(t.text)), names())
		}
		name, nullable := strings.CutSuffix(allowed[at], "?")
		if m.seen.has(name) {
			return bad(name, "%s is there twice", name)
		}
		m.seen |= member(name)
		value := s.next()
		if value.kind == 'n' && nullable {
			m.null |= member(name)
			continue
		}
		var err error
		if name == "weight" {
			if m.weight, err = strconv.Atoi(string(value.text)); value.kind != '0' || err != nil || m.weight < 0 || m.weight > MaxWeight {
				return bad(name, "%s %s, not %s", name, weightRule, value.describe())
			}
			continue
		}
		if name == "metadata" {
			if value.kind != '{' {
				return bad(name, "metadata must be an object of strings, not %s", value.describe())
			}
			if m.metadata, err = readMetadata(s, nullable); err != nil {
				return members{}, err
			}
			continue
		}
		if name == "check" {
			if m.check, err = decodeCheck(s, value); err != nil {
				return members{}, err
			}
			continue
		}
		if value.kind != '"' {
			return bad(name, "%s must be a string, not %s", name, value.describe())
		}
		text := string(value.text)
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
