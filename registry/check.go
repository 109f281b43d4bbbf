package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of a Check and of a slow start.
const (
	MinCheckInterval = 100 * time.Millisecond
	MaxCheckInterval = time.Hour
	MinCheckTimeout  = 100 * time.Millisecond
	MaxCheckTimeout  = time.Minute
	MaxCheckCount    = 100
	MaxSlowStart     = time.Hour
	maxCheckPath     = 1024 // bytes
	maxStatusRanges  = 16
)

// The defaults of a Check.
const (
	checkInterval = 2 * time.Second
	checkTimeout  = time.Second
	checkFall     = 3
	checkRise     = 2
	checkStatus   = "200-399"
)

const (
	slowStartRule = "must be a time from 0s (none) to 1h, such as 30s"
	intervalRule  = "must be a time from 100ms to 1h, such as 2s"
	timeoutRule   = "must be a time from 100ms to 1m, no longer than the interval, such as 1s"
	countRule     = "must be an integer from 1 to 100"
	statusRule    = "must be statuses and ranges from 200 to 599 such as 200-399,404"
	startRule     = "must be down (until its first check passes) or up"
)

// Check is how an instance is asked, over and over, whether it can serve. Registered, it has no gaps and never changes; two of
// them that are equal (==) ask the same. In JSON its times are texts like 2s.
type Check struct {
	TCP       bool          // it accepts a connection; or else
	Path      string        // it answers a GET of this below its base path, in origin form, with a status
	Status    string        // of these: numbers and ranges of 200 to 599 with commas between; 200-399
	Interval  time.Duration // from one check to the next, MinCheckInterval to MaxCheckInterval; 2 s
	Timeout   time.Duration // for the whole of one, MinCheckTimeout to MaxCheckTimeout, at most Interval; 1 s, or Interval
	Fall      int           // so many that fail in a row take it out, 1 to MaxCheckCount; 3
	Rise      int           // so many that pass in a row bring it back, 1 to MaxCheckCount; 2
	KeepAlive bool          // one connection for many checks instead of one for each
	Start     CheckStart    // StartDown

	statuses [8]uint64 // a bit for each status from 100 on
}

// CheckStart is what a new instance is taken for before its first check has ended.
type CheckStart string

// A new instance gets requests after the first check that passes, or at once.
const (
	StartDown CheckStart = "down"
	StartUp   CheckStart = "up"
)

// Accepts says whether a status passes.
func (c *Check) Accepts(status int) bool {
	bit := uint(status - 100)
	return bit < 500 && c.statuses[bit/64]>>(bit%64)&1 != 0
}

// Filled returns a check without gaps. The error is a *FieldError.
func (c Check) Filled() (*Check, error) {
	bad := func(field, format string, args ...any) (*Check, error) {
		return nil, &FieldError{"check." + field, fmt.Sprintf(format, args...)}
	}
	if c.Interval == 0 {
		c.Interval = checkInterval
	}
	if c.Timeout == 0 {
		c.Timeout = min(checkTimeout, c.Interval)
	}
	if c.Fall == 0 {
		c.Fall = checkFall
	}
	if c.Rise == 0 {
		c.Rise = checkRise
	}
	if c.Start == "" {
		c.Start = StartDown
	}
	switch {
	case c.TCP && c.Path != "":
		return bad("tcp", "cannot be beside path: a check is either of the two")
	case c.TCP && c.Status != "":
		return bad("status", "is for a check with a path, not for one with tcp")
	case c.TCP && c.KeepAlive:
		return bad("keep_alive", "is for a check with a path, not for one with tcp")
	case !c.TCP && c.Path == "":
		return nil, &FieldError{"check", `must have a path such as "/health", or "tcp":true`}
	case c.Interval < MinCheckInterval || c.Interval > MaxCheckInterval:
		return bad("interval", "%s, not %s", intervalRule, c.Interval)
	case c.Timeout < MinCheckTimeout || c.Timeout > min(MaxCheckTimeout, c.Interval):
		return bad("timeout", "%s, not %s", timeoutRule, c.Timeout)
	case c.Fall < 1 || c.Fall > MaxCheckCount:
		return bad("fall", "%s, not %d", countRule, c.Fall)
	case c.Rise < 1 || c.Rise > MaxCheckCount:
		return bad("rise", "%s, not %d", countRule, c.Rise)
	case c.Start != StartDown && c.Start != StartUp:
		return bad("start", "%s, not %s", startRule, clip(string(c.Start)))
	}
	c.statuses = [8]uint64{}
	if c.TCP {
		return &c, nil
	}
	if err := checkPath(c.Path); err != nil {
		return bad("path", "%v", err)
	}
	if c.Status == "" {
		c.Status = checkStatus
	}
	if err := c.setStatuses(); err != nil {
		return bad("status", "%v", err)
	}
	return &c, nil
}

// setStatuses reads Status.
func (c *Check) setStatuses() error {
	list := strings.Split(c.Status, ",")
	if len(list) > maxStatusRanges {
		return fmt.Errorf("has %d ranges: at most %d are allowed", len(list), maxStatusRanges)
	}
	for _, item := range list {
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		from, err := status(first)
		to, err2 := status(last)
		if err != nil || err2 != nil || from > to {
			return errors.New(statusRule + ", not " + clip(c.Status))
		}
		for s := uint(from - 100); s <= uint(to-100); s++ {
			c.statuses[s/64] |= 1 << (s % 64)
		}
	}
	return nil
}

// status reads a final status.
func status(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || len(text) != 3 || n < 200 || n > 599 {
		return 0, errors.New("not a final status")
	}
	return n, nil
}

// checkPath refuses what is no request-target in origin form (RFC 9112 section 3.2.1).
func checkPath(path string) error {
	switch {
	case len(path) > maxCheckPath:
		return fmt.Errorf("has %d bytes: at most %d are allowed", len(path), maxCheckPath)
	case path[0] != '/':
		return fmt.Errorf("%s must begin with a slash", clip(path))
	}
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c == '%' && (i+2 >= len(path) || !hexadecimal(path[i+1]) || !hexadecimal(path[i+2])):
			return fmt.Errorf("%s: %% must be followed by two hexadecimal digits", clip(path))
		case c == '#':
			return fmt.Errorf("%s has a fragment: only path and query are sent", clip(path))
		case c != '%' && !alphanumeric(c) && strings.IndexByte("/?-._~!$&'()*+,;=:@", c) < 0:
			return fmt.Errorf("%s: byte %d must be percent-encoded", clip(path), i+1)
		}
	}
	return nil
}

func hexadecimal(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f'
}

// checkMembers are what the JSON of a Check may hold.
var checkMembers = [...]string{"path", "tcp", "interval", "timeout", "fall", "rise", "status", "keep_alive", "start"}

// checkJSON is a Check without gaps in JSON.
type checkJSON struct {
	Path      string     `json:"path,omitempty"`
	TCP       bool       `json:"tcp,omitempty"`
	Interval  string     `json:"interval"`
	Timeout   string     `json:"timeout"`
	Fall      int        `json:"fall"`
	Rise      int        `json:"rise"`
	Status    string     `json:"status,omitempty"`
	KeepAlive bool       `json:"keep_alive,omitempty"`
	Start     CheckStart `json:"start"`
}

// MarshalJSON writes what UnmarshalJSON and the API read.
func (c Check) MarshalJSON() ([]byte, error) {
	return json.Marshal(checkJSON{c.Path, c.TCP, c.Interval.String(), c.Timeout.String(), c.Fall, c.Rise, c.Status, c.KeepAlive, c.Start})
}

// UnmarshalJSON reads a check as the API does, and fills its gaps. It is for json.Unmarshal, which knows that the syntax is right.
func (c *Check) UnmarshalJSON(data []byte) error {
	s := &scanner{data}
	read, err := decodeCheck(s, s.next())
	if err == nil {
		*c = *read
	}
	return err
}

// decodeCheck reads the object that follows first, strictly: a member that is unknown, comes twice or has the wrong type is refused
// by its name. The error is a *FieldError; the gaps are filled.
func decodeCheck(s *scanner, first token) (*Check, error) {
	if first.kind != '{' {
		return nil, &FieldError{"check", `must be an object with a path such as "/health", or "tcp":true, not ` + first.describe()}
	}
	var c Check
	var seen [len(checkMembers)]bool
	for t := s.next(); t.kind != '}'; t = s.next() {
		bad := func(detail string) (*Check, error) {
			return nil, &FieldError{"check." + short(string(t.text)), detail}
		}
		at := slices.Index(checkMembers[:], string(t.text))
		if at < 0 {
			return bad("is unknown; allowed here: " + strings.Join(checkMembers[:], ", "))
		}
		if seen[at] {
			return bad("is there twice")
		}
		seen[at] = true
		var err error
		value := s.next()
		switch checkMembers[at] {
		case "path":
			c.Path, err = value.asText("must be a path such as /health")
		case "status":
			c.Status, err = value.asText(statusRule)
		case "start":
			var start string
			start, err = value.asText(startRule)
			c.Start = CheckStart(start)
		case "interval":
			c.Interval, err = value.asTime(intervalRule)
		case "timeout":
			c.Timeout, err = value.asTime(timeoutRule)
		case "fall":
			c.Fall, err = value.asCount()
		case "rise":
			c.Rise, err = value.asCount()
		case "tcp":
			c.TCP, err = value.asBool()
		case "keep_alive":
			c.KeepAlive, err = value.asBool()
		}
		if err != nil {
			return bad(err.Error())
		}
	}
	return c.Filled()
}

// What follows reads one value. A zero is refused like any other that is wrong: it is there, and is no gap to be filled.

func (t token) asText(rule string) (string, error) {
	if t.kind == '"' && len(t.text) > 0 {
		return string(t.text), nil
	}
	return "", errors.New(rule + ", not " + t.describe())
}

func (t token) asTime(rule string) (time.Duration, error) {
	if t.kind == '"' {
		if d, err := time.ParseDuration(string(t.text)); err == nil && d != 0 {
			return d, nil
		}
	}
	return 0, errors.New(rule + ", not " + t.describe())
}

func (t token) asCount() (int, error) {
	if t.kind == '0' {
		if n, err := strconv.Atoi(string(t.text)); err == nil && n != 0 {
			return n, nil
		}
	}
	return 0, errors.New(countRule + ", not " + t.describe())
}

func (t token) asBool() (bool, error) {
	if t.kind == 't' || t.kind == 'f' {
		return t.kind == 't', nil
	}
	return false, errors.New("must be true or false, not " + t.describe())
}
