// Package wire says what a gateway does with what it should refuse, and with what it should pass on as it is: a table of
// cases that are run over raw sockets, with any gateway between a client and an origin that keep to the case's script.
//
// A case is judged by what the origin got, byte for byte, by what the client got, and by what came of the next request on
// that connection and of other clients' requests: these must get their own answers. Both are read by a parser that allows
// no leniency. Where an RFC leaves a choice the table allows all of it, so that it is fair to every gateway.
package wire

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Level says how bad a failure is.
type Level uint8

const (
	Should Level = iota // a SHOULD, or what is good for users although no RFC asks for it
	Must                // a MUST, or the safety of others
)

func (l Level) String() string {
	if l == Must {
		return "must"
	}
	return "should"
}

// Case is a row of the table.
type Case struct {
	ID      string // stable, and a part of its paths: /wire/ID/
	Section string
	Source  string // RFC section, CVE, paper
	Level   Level
	Says    string // what must happen

	Client  []step        // what the client does; then it reads its answers
	Origin  [][]step      // how the origin answers the first request, the second, ...; the last also those that follow
	Methods []string      // of the requests whose answers are read; nil: one GET, or what has answers like it
	Open    bool          // the connection is no place for another request then: it is a tunnel, or an upload goes on
	Time    time.Duration // for all that the client does, if it needs more than others
	Want    verdict
}

// Result is what came of a case.
type Result struct {
	Case *Case
	Err  error // what happened instead; nil: passed
}

// Runner runs cases, one after the other.
type Runner struct {
	Gateway string // host:port; it forwards what is below /wire/, and /other/, to the origin
	Origin  *Origin
	Only    []string      // IDs of the cases to run; all, if there are none
	Time    time.Duration // that a client waits for what does not come: 2.5 s. Only cases that fail take so long.
}

// Run runs the cases until ctx is over.
func (r *Runner) Run(ctx context.Context) []Result {
	if r.Time == 0 {
		r.Time = 2500 * time.Millisecond
	}
	var results []Result
	for _, c := range Cases() {
		if ctx.Err() != nil {
			break
		}
		if len(r.Only) > 0 && !slices.Contains(r.Only, c.ID) {
			continue
		}
		results = append(results, Result{&c, r.one(ctx, &c)})
	}
	return results
}

// outcome is what is judged.
type outcome struct {
	requests  []request   // what the origin got, without probes
	responses []*response // what the client got, without the probe's; the last one may be a part
	rest      []byte      // what the client got behind them
	closed    bool        // the gateway closed the client's connection
	malformed error       // a response that the client cannot read
	stuck     error       // a step of the client that did not succeed
	probe     error       // what is wrong with the answer to the next request on that connection, if it goes on
	others    error       // ... to requests of other clients
}

func (r *Runner) one(ctx context.Context, c *Case) error {
	ctx, cancel := context.WithTimeout(ctx, 4*max(r.Time, c.Time))
	defer cancel()
	run := &run{c: c, ctx: ctx, events: map[string]chan struct{}{}}
	r.Origin.set(run)
	defer r.Origin.set(nil)
	nc, err := net.Dial("tcp", r.Gateway)
	if err != nil {
		return err
	}
	p := &peer{conn: newConn(nc), run: run}
	defer p.Close()
	out := &outcome{}
	r.play(ctx, p, out)
	if out.malformed == nil && !out.closed && !c.Open && len(out.responses) == len(c.methods()) && out.last().complete {
		r.probeSame(ctx, p, out)
	}
	for n := range 2 {
		if err := r.probeOther(ctx, run, n); err != nil && out.others == nil {
			out.others = err
		}
	}
	run.settle(r.Time / 5)
	run.mu.Lock()
	for _, req := range run.requests {
		out.requests = append(out.requests, *req)
	}
	run.mu.Unlock()
	return c.judge(out)
}

func (c *Case) methods() []string {
	if c.Methods == nil {
		return []string{"GET"}
	}
	return c.Methods
}

// play follows the client's script and reads its answers.
func (r *Runner) play(ctx context.Context, p *peer, out *outcome) {
	c := p.run.c
	ctx, cancel := context.WithTimeout(ctx, max(r.Time, c.Time))
	defer cancel()
	for _, s := range c.Client {
		if err := s(ctx, p); err != nil && !isClosed(err) {
			out.stuck = err
			break
		}
	}
	p.until(ctx, func(in []byte, ended bool) bool {
		out.read(in, c.methods(), ended)
		return out.malformed != nil || ended || len(out.responses) == len(c.methods()) && out.last().complete
	})
}

// isClosed tells that the gateway did not want to read all, which is seen from what it answered.
func isClosed(err error) bool {
	_, is := err.(*net.OpError)
	return is
}

// read reads all responses there are.
func (out *outcome) read(in []byte, methods []string, ended bool) {
	out.responses, out.rest, out.closed = nil, in, ended
	for _, method := range methods {
		r, err := parseResponse(out.rest, method, ended)
		if r != nil {
			out.responses, out.rest = append(out.responses, r), out.rest[r.size:]
		}
		if err != nil && err != errShort {
			out.malformed = err
		}
		if err != nil || r.status == 101 {
			return
		}
	}
}

func (out *outcome) last() *response { return out.responses[len(out.responses)-1] }

// first returns the first response; one of status 0 if there is none.
func (out *outcome) first() *response {
	if len(out.responses) == 0 {
		return &response{}
	}
	return out.responses[0]
}

// probeSame sends another request on the case's connection, if that goes on.
func (r *Runner) probeSame(ctx context.Context, p *peer, out *outcome) {
	ctx, cancel := context.WithTimeout(ctx, r.Time)
	defer cancel()
	at := 0
	for _, resp := range out.responses {
		at += resp.size
	}
	if err := send("GET {p}/probe-same HTTP/1.1\r\nHost: wire.test\r\n\r\n")(ctx, p); err != nil {
		out.closed = true
		return
	}
	var got *response
	answered := p.until(ctx, func(in []byte, ended bool) bool {
		var err error
		got, err = parseResponse(in[at:], "GET", ended)
		out.rest, out.closed = in[at:], ended
		if err != nil && err != errShort {
			out.probe = fmt.Errorf("the next request got %w", err)
			return true
		}
		return err == nil
	})
	switch {
	case out.probe != nil:
	case answered && string(got.body) == "probe-same":
		out.closed = false // it may end now
	case answered:
		out.probe = fmt.Errorf("the next request got another's answer: %d %q", got.status, shorten(string(got.body)))
	case !out.closed:
		out.probe = fmt.Errorf("the next request got no answer")
	}
}

// probeOther is another client's request.
func (r *Runner) probeOther(ctx context.Context, run *run, n int) error {
	ctx, cancel := context.WithTimeout(ctx, r.Time)
	defer cancel()
	nc, err := net.Dial("tcp", r.Gateway)
	if err != nil {
		return err
	}
	p := &peer{conn: newConn(nc), run: run}
	defer p.Close()
	want := fmt.Sprintf("probe-other-%d", n)
	if err := send("GET {p}/"+want+" HTTP/1.1\r\nHost: wire.test\r\nConnection: close\r\n\r\n")(ctx, p); err != nil {
		return err
	}
	var got *response
	p.until(ctx, func(in []byte, ended bool) bool {
		got, err = parseResponse(in, "GET", ended)
		return err != errShort
	})
	switch {
	case err != nil:
		return fmt.Errorf("another client got no answer: %w", err)
	case string(got.body) != want:
		return fmt.Errorf("another client got %d %q", got.status, shorten(string(got.body)))
	}
	return nil
}

// judge says what went wrong: first what must not be in any case, then what this one wants.
func (c *Case) judge(out *outcome) error {
	for _, r := range out.requests {
		if r.err != nil {
			return fmt.Errorf("forwarded with %w", r.err)
		}
	}
	if out.malformed != nil {
		return fmt.Errorf("answered with %w", out.malformed)
	}
	if out.others != nil {
		return out.others
	}
	if err := c.Want(c, out); err != nil {
		return err
	}
	for _, r := range out.requests {
		if strings.Contains(r.target, "smuggled") {
			return fmt.Errorf("what followed reached the origin as a request")
		}
	}
	if out.closed && len(out.rest) > 0 && !c.Open && len(out.responses) == len(c.methods()) {
		return fmt.Errorf("%d bytes behind the response", len(out.rest))
	}
	if out.stuck != nil {
		return out.stuck
	}
	return out.probe
}
