package registry

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestCheckJSON(t *testing.T) {
	full := Check{Path: "/h?x=%20", Status: "200-299,404", Interval: 5 * time.Second, Timeout: 500 * time.Millisecond, Fall: 2, Rise: 1, KeepAlive: true, Start: StartUp}
	for _, row := range []struct {
		json  string
		want  Check  // without gaps
		field string // that is refused
		text  string // in the refusal
	}{
		{`{"path":"/health"}`, Check{Path: "/health", Status: "200-399", Interval: 2 * time.Second, Timeout: time.Second, Fall: 3, Rise: 2, Start: StartDown}, "", ""},
		{`{"tcp":true,"interval":"300ms"}`, Check{TCP: true, Interval: 300 * time.Millisecond, Timeout: 300 * time.Millisecond, Fall: 3, Rise: 2, Start: StartDown}, "", ""},
		{`{"path":"/h?x=%20","interval":"5s","timeout":"500ms","fall":2,"rise":1,"status":"200-299,404","keep_alive":true,"start":"up"}`, full, "", ""},
		{`{"path":"/h","tcp":false,"interval":"1h","timeout":"1m","fall":100,"rise":100}`, Check{Path: "/h", Status: "200-399", Interval: time.Hour, Timeout: time.Minute, Fall: 100, Rise: 100, Start: StartDown}, "", ""},
		{`{"path":"/h","interval":"100ms","timeout":"100ms","fall":1,"rise":1,"status":"599"}`, Check{Path: "/h", Status: "599", Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, Fall: 1, Rise: 1, Start: StartDown}, "", ""},

		{`true`, Check{}, "check", "must be an object"},
		{`[]`, Check{}, "check", "not an array"},
		{`{}`, Check{}, "check", `a path such as "/health", or "tcp":true`},
		{`{"tcp":false}`, Check{}, "check", "path"},
		{`{"tcp":1}`, Check{}, "check.tcp", "true or false, not 1"},
		{`{"tcp":true,"path":"/h"}`, Check{}, "check.tcp", "either"},
		{`{"tcp":true,"status":"200"}`, Check{}, "check.status", "with a path"},
		{`{"tcp":true,"keep_alive":true}`, Check{}, "check.keep_alive", "with a path"},
		{`{"path":""}`, Check{}, "check.path", "such as /health"},
		{`{"path":null}`, Check{}, "check.path", "not null"},
		{`{"path":"health"}`, Check{}, "check.path", "slash"},
		{`{"path":"/a b"}`, Check{}, "check.path", "byte 3"},
		{`{"path":"/a\r\nX: y"}`, Check{}, "check.path", "byte 3"},
		{`{"path":"/é"}`, Check{}, "check.path", "byte 2"},
		{`{"path":"/%2"}`, Check{}, "check.path", "hexadecimal"},
		{`{"path":"/%2g"}`, Check{}, "check.path", "hexadecimal"},
		{`{"path":"/a#b"}`, Check{}, "check.path", "fragment"},
		{`{"path":"/` + strings.Repeat("x", maxCheckPath) + `"}`, Check{}, "check.path", "at most 1024"},
		{`{"path":"/h","path":"/h"}`, Check{}, "check.path", "twice"},
		{`{"path":"/h","Interval":"2s"}`, Check{}, "check.Interval", "unknown; allowed here: path, tcp, interval"},
		{`{"path":"/h","interval":2}`, Check{}, "check.interval", "100ms to 1h, such as 2s, not 2"},
		{`{"path":"/h","interval":"2"}`, Check{}, "check.interval", `not the string "2"`},
		{`{"path":"/h","interval":"0s"}`, Check{}, "check.interval", "100ms to 1h"},
		{`{"path":"/h","interval":"-2s"}`, Check{}, "check.interval", "100ms to 1h"},
		{`{"path":"/h","interval":"99ms"}`, Check{}, "check.interval", "not 99ms"},
		{`{"path":"/h","interval":"61m"}`, Check{}, "check.interval", "not 1h1m0s"},
		{`{"path":"/h","timeout":"99ms"}`, Check{}, "check.timeout", "100ms to 1m"},
		{`{"path":"/h","interval":"10m","timeout":"61s"}`, Check{}, "check.timeout", "100ms to 1m"},
		{`{"path":"/h","interval":"1s","timeout":"2s"}`, Check{}, "check.timeout", "no longer than the interval"},
		{`{"path":"/h","fall":0}`, Check{}, "check.fall", "1 to 100, not 0"},
		{`{"path":"/h","fall":101}`, Check{}, "check.fall", "1 to 100, not 101"},
		{`{"path":"/h","fall":1.5}`, Check{}, "check.fall", "not 1.5"},
		{`{"path":"/h","fall":"3"}`, Check{}, "check.fall", "integer"},
		{`{"path":"/h","rise":-1}`, Check{}, "check.rise", "1 to 100, not -1"},
		{`{"path":"/h","status":200}`, Check{}, "check.status", "200-399,404, not 200"},
		{`{"path":"/h","status":"200-"}`, Check{}, "check.status", "200-399,404"},
		{`{"path":"/h","status":"399-200"}`, Check{}, "check.status", "200-399,404"},
		{`{"path":"/h","status":"101"}`, Check{}, "check.status", "from 200 to 599"},
		{`{"path":"/h","status":"200, 204"}`, Check{}, "check.status", "200-399,404"},
		{`{"path":"/h","status":"` + strings.Repeat("200,", maxStatusRanges) + `200"}`, Check{}, "check.status", "at most 16"},
		{`{"path":"/h","start":"UP"}`, Check{}, "check.start", "down (until its first check passes) or up"},
		{`{"path":"/h","start":{}}`, Check{}, "check.start", "not an object"},
		{`{"path":"/h","keep_alive":"yes"}`, Check{}, "check.keep_alive", "true or false"},
	} {
		var got Check
		err := json.Unmarshal([]byte(row.json), &got)
		if row.field != "" {
			var refused *FieldError
			if !errors.As(err, &refused) || refused.Field != row.field || !strings.Contains(refused.Error(), row.text) || got != (Check{}) {
				t.Errorf("%.80s: %v, want %s refused with %q", row.json, err, row.field, row.text)
			}
			continue
		}
		want, wrong := row.want.Filled()
		if err != nil || wrong != nil || got != *want {
			t.Errorf("%s: %+v %v, want %+v %v", row.json, got, err, row.want, wrong)
			continue
		}
		text, err := json.Marshal(got)
		var again Check
		if err != nil || json.Unmarshal(text, &again) != nil || again != got {
			t.Errorf("%s: written as %s %v, read again as %+v", row.json, text, err, again)
		}
	}
}

func TestCheckAccepts(t *testing.T) {
	check, err := (&Check{Path: "/", Status: "200-299,404,500-599"}).Filled()
	if err != nil {
		t.Fatal(err)
	}
	for status := -1; status < 1100; status++ {
		want := status >= 200 && status <= 299 || status == 404 || status >= 500 && status <= 599
		if check.Accepts(status) != want {
			t.Errorf("status %d: %t", status, !want)
		}
	}
}

// A check is the registration's: it stays through what an operator sets, and goes with a registration that has none.
func TestCheckStays(t *testing.T) {
	r := New(Config{})
	defer r.Close()
	in := Instance{ID: "a", Addr: "http://10.0.0.1", Check: &Check{Path: "/health"}, SlowStart: time.Second}
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	if *in.Check != (Check{Path: "/health"}) {
		t.Errorf("the caller's check became %+v", in.Check)
	}
	if err := r.Patch("echo", "a", Patch{SetState: true, State: Drain}); err != nil {
		t.Fatal(err)
	}
	if now := r.Snapshot("echo").Instance("a"); now.Check == nil || now.Check.Interval != checkInterval || now.SlowStart != time.Second {
		t.Errorf("it has %+v", now)
	}
	in.Check, in.SlowStart = nil, 0
	if err := r.Register("echo", in); err != nil {
		t.Fatal(err)
	}
	if now := r.Snapshot("echo").Instance("a"); now.Check != nil || now.SlowStart != 0 {
		t.Errorf("it has %+v", now)
	}
	for field, in := range map[string]Instance{
		"check.fall": {ID: "a", Addr: "http://10.0.0.1", Check: &Check{Path: "/", Fall: -1}},
		"slow_start": {ID: "a", Addr: "http://10.0.0.1", SlowStart: MaxSlowStart + 1},
	} {
		var refused *FieldError
		if err := r.Register("echo", in); !errors.As(err, &refused) || refused.Field != field {
			t.Errorf("%v, want %s refused", err, field)
		}
	}
}

// The decoder never panics, and what it accepts is written and read again as it was.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{`{"path":"/health"}`, `{"tcp":true,"interval":"1m","rise":7}`, `{"path":"/a?b=%20","status":"200-299,404","keep_alive":true,"start":"up"}`,
		`{"path":{"a":[]}}`, `{"fall":1e2,"path":"/"}`, `[]`, `null`, `{"tcp":true,"tcp":true}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var c, again Check
		if json.Unmarshal(text, &c) != nil || c == (Check{}) { // null leaves it alone
			return
		}
		written, err := json.Marshal(c)
		if err != nil || json.Unmarshal(written, &again) != nil || again != c {
			t.Fatalf("%s became %+v %v, then %+v", text, c, err, again)
		}
	})
}
