package wire

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// verdict judges an outcome. Its error says in a few words what happened instead.
type verdict func(*Case, *outcome) error

// refused: answered with one of the statuses, and closed; nothing reached the origin.
func refused(statuses ...int) verdict {
	return func(c *Case, o *outcome) error {
		if err := denied(statuses...)(c, o); err != nil {
			return err
		}
		if !o.closed {
			return fmt.Errorf("%d, but the connection goes on", o.first().status)
		}
		return nil
	}
}

// denied: answered with one of the statuses; nothing reached the origin; the connection may go on.
func denied(statuses ...int) verdict {
	return func(_ *Case, o *outcome) error {
		if len(o.requests) > 0 {
			return errors.New("forwarded " + o.forms())
		}
		return o.answered(statuses)
	}
}

// stopped: the fault was in the body, a part of which may have reached the origin, but never as if it were a request.
func stopped(_ *Case, o *outcome) error {
	for _, r := range o.requests {
		if r.complete {
			return fmt.Errorf("forwarded with a body of %d bytes", len(r.body))
		}
	}
	if s := o.first().status; s != 0 && s < 400 {
		return fmt.Errorf("answered %d", s)
	}
	if !o.closed {
		if o.first().status == 0 {
			return errors.New("no answer")
		}
		return fmt.Errorf("%d, but the connection goes on", o.first().status)
	}
	return nil
}

// answered wants one of the statuses of the first response.
func (o *outcome) answered(statuses []int) error {
	r := o.first()
	switch {
	case r.status == 0 && o.closed:
		return errors.New("closed without an answer")
	case r.status == 0:
		return errors.New("no answer")
	case !slices.Contains(statuses, r.status):
		return fmt.Errorf("answered %d", r.status)
	case !r.complete:
		return fmt.Errorf("%d broken off", r.status)
	}
	return nil
}

// forms tells what the origin got, for errors.
func (o *outcome) forms() string {
	switch r := o.requests[0]; {
	case strings.Contains(o.requests[len(o.requests)-1].target, "smuggled"):
		return "with what follows"
	case len(o.requests) > 1:
		return fmt.Sprintf("as %d requests", len(o.requests))
	case !r.complete:
		return "and broken off"
	case r.chunked:
		return fmt.Sprintf("as %s, chunked", r.method)
	case r.length > 0:
		return fmt.Sprintf("as %s, Content-Length %d", r.method, r.length)
	default:
		return fmt.Sprintf("as %s", r.method)
	}
}

// check judges the one request that reached the origin.
type check func(c *Case, r *request) error

// forwarded: one request reached the origin, in a form that passes the checks, and its answer the client.
func forwarded(checks ...check) verdict {
	return func(c *Case, o *outcome) error {
		if err := reached(checks...)(c, o); err != nil {
			return err
		}
		if err := o.answered([]int{200}); err != nil {
			return fmt.Errorf("forwarded, but %w", err)
		}
		return nil
	}
}

// reached: as forwarded, whatever the answer was.
func reached(checks ...check) verdict {
	return func(c *Case, o *outcome) error {
		if len(o.requests) == 0 {
			if err := o.answered(nil); err != nil {
				return err
			}
		}
		if len(o.requests) != 1 || !o.requests[0].complete {
			return errors.New("forwarded " + o.forms())
		}
		for _, check := range checks {
			if err := check(c, &o.requests[0]); err != nil {
				return err
			}
		}
		return nil
	}
}

// target wants it to the byte; {p} is the case's path.
func target(want string) check {
	return func(c *Case, r *request) error {
		if want := (&run{c: c}).expand(want); r.target != want {
			return fmt.Errorf("forwarded as %q", shorten(strings.TrimPrefix(r.target, prefix+c.ID)))
		}
		return nil
	}
}

func method(want string) check {
	return func(_ *Case, r *request) error {
		if r.method != want {
			return fmt.Errorf("forwarded as %s", r.method)
		}
		return nil
	}
}

func body(want string) check {
	return func(_ *Case, r *request) error {
		if string(r.body) != want {
			return fmt.Errorf("forwarded with the body %q", shorten(string(r.body)))
		}
		return nil
	}
}

// has wants exactly one field of that name, with that value.
func has(name, value string) check {
	return func(_ *Case, r *request) error {
		if got := r.values(name); len(got) != 1 || got[0] != value {
			return fmt.Errorf("forwarded with %s %q", name, got)
		}
		return nil
	}
}

// lacks wants no field of any of the names, nor a trailer.
func lacks(names ...string) check {
	return func(_ *Case, r *request) error {
		for _, f := range slices.Concat(r.fields, r.trailers) {
			for _, name := range names {
				if strings.EqualFold(f.Name, name) {
					return fmt.Errorf("forwarded with %s: %s", f.Name, shorten(f.Value))
				}
			}
		}
		return nil
	}
}

// without wants no field with that value.
func without(value string) check {
	return func(_ *Case, r *request) error {
		for _, f := range r.fields {
			if strings.Contains(f.Value, value) {
				return fmt.Errorf("forwarded with %s: %s", f.Name, shorten(f.Value))
			}
		}
		return nil
	}
}

// trailer wants it behind the body.
func trailer(name, value string) check {
	return func(_ *Case, r *request) error {
		if !slices.Contains(r.trailers, Field{name, value}) {
			return fmt.Errorf("forwarded without the trailer")
		}
		return nil
	}
}

// closes wants the client's connection closed.
func closes(_ *Case, o *outcome) error {
	if !o.closed {
		return fmt.Errorf("%d, but the connection goes on", o.first().status)
	}
	return nil
}

// stays wants the connection to go on.
func stays(_ *Case, o *outcome) error {
	if o.closed {
		return fmt.Errorf("%d, but the connection is closed", o.first().status)
	}
	return nil
}

// both wants all of the verdicts.
func both(all ...verdict) verdict {
	return func(c *Case, o *outcome) error {
		for _, v := range all {
			if err := v(c, o); err != nil {
				return err
			}
		}
		return nil
	}
}

// either wants one of two verdicts, which tell apart whether the request was forwarded, and names what failed of that one.
func either(kept, sent verdict) verdict {
	return func(c *Case, o *outcome) error {
		if len(o.requests) > 0 {
			return sent(c, o)
		}
		return kept(c, o)
	}
}

// anyOf wants one of the verdicts, and tells of the last.
func anyOf(all ...verdict) verdict {
	return func(c *Case, o *outcome) error {
		var err error
		for _, v := range all {
			if err = v(c, o); err == nil {
				return nil
			}
		}
		return err
	}
}

// status wants the first response to have one of these, and to be whole.
func status(statuses ...int) verdict {
	return func(_ *Case, o *outcome) error { return o.answered(statuses) }
}

// judged is a check of the first response.
type judged func(r *response) error

// passed wants the origin's response to reach the client as a whole: status, body and what else is asked.
func passed(code int, body string, checks ...judged) verdict {
	return func(_ *Case, o *outcome) error {
		if err := o.answered([]int{code}); err != nil {
			return err
		}
		r := o.first()
		if string(r.body) != body {
			return fmt.Errorf("%d with the body %q", code, shorten(string(r.body)))
		}
		for _, check := range checks {
			if err := check(r); err != nil {
				return err
			}
		}
		return nil
	}
}

// field wants exactly one of that name and value.
func field(name, value string) judged {
	return func(r *response) error {
		if got := r.values(name); len(got) != 1 || got[0] != value {
			return fmt.Errorf("%d with %s %q", r.status, name, got)
		}
		return nil
	}
}

// no wants no field of that name, nor a trailer.
func no(name string) judged {
	return func(r *response) error {
		for _, f := range slices.Concat(r.fields, r.trailers) {
			if strings.EqualFold(f.Name, name) {
				return fmt.Errorf("%d with %s: %s", r.status, f.Name, shorten(f.Value))
			}
		}
		return nil
	}
}

func unchunked(r *response) error {
	if r.chunked {
		return errors.New("answered in chunks")
	}
	return nil
}

// interim wants exactly these before the response.
func interim(statuses ...int) judged {
	return func(r *response) error {
		if !slices.Equal(r.interim, statuses) {
			return fmt.Errorf("%d behind the interim responses %v", r.status, r.interim)
		}
		return nil
	}
}

func withTrailer(name, value string) judged {
	return func(r *response) error {
		if !slices.Contains(r.trailers, Field{name, value}) {
			return fmt.Errorf("%d without the trailer", r.status)
		}
		return nil
	}
}

// truncated wants the client to see that its response is not whole: 502 instead, or one that visibly breaks off.
func truncated(_ *Case, o *outcome) error {
	r := o.first()
	switch {
	case r.status == 502 && r.complete:
		return nil
	case r.complete:
		return fmt.Errorf("%d that looks whole, of %d bytes", r.status, len(r.body))
	case !o.closed:
		return fmt.Errorf("%d, and the connection stays open", r.status)
	}
	return nil
}

// deliveries wants so many requests at the origin that are not probes.
func deliveries(least, most int) verdict {
	return func(_ *Case, o *outcome) error {
		if n := len(o.requests); n < least || n > most {
			return fmt.Errorf("%d requests reached the origin", n)
		}
		return nil
	}
}

// bodies wants the responses' bodies to be these, in order.
func bodies(want ...string) verdict {
	return func(_ *Case, o *outcome) error {
		var got []string
		for _, r := range o.responses {
			if r.complete {
				got = append(got, string(r.body))
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("the bodies %q", got)
		}
		return nil
	}
}
