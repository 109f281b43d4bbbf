package proxy

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"time"
)

// Record is what there is to say of a request that has ended, or of what was no request and got an answer. It and its
// slices are valid during the call only. Bytes are as they came: who prints them must escape them.
type Record struct {
	Loop int // calls of one loop come one after the other; -1: from any goroutine

	Began   time.Time     // when the head of the request was there
	Took    time.Duration // from then to the end of the response, or of the tunnel
	Gateway time.Duration // of that, what the gateway itself took: neither clients nor instances were waited for
	Backend time.Duration // from the first attempt, or the end of an upload, to the head of the answer; 0: none was asked

	Client             netip.Addr // the peer, or whom a trusted proxy names
	Peer               netip.Addr
	Method             []byte // empty if no request could be read, as all that follow it
	Host               []byte
	Target             []byte // path and query
	Minor              byte   // of HTTP/1.x
	Referer, UserAgent []byte

	Route    string // what of Config.Routes matched (Route.String); empty without any, or with a RouteFunc
	Service  string
	Instance string // the last that was asked
	Attempts int
	Status   int    // of the answer; 499: the client left or took nothing; 0: there was none
	Reason   string // why the gateway answered itself or broke off: an error type of RFC 9209, client_gone or client_slow
	Cut      bool   // the response broke off behind its head
	Tunnel   bool   // it became one: Received and Sent are what went through

	Received, Sent int64 // bytes of the bodies, as far as they came

	RequestID []byte   // X-Request-Id; nil without Config.RequestIDs
	TraceID   [16]byte // zero: it belongs to no trace
	Trace     *Trace   // nil: it is not sampled
}

// The reasons of a Record beside those of RFC 9209: nobody was there to be told.
const (
	reasonGone = "client_gone"
	reasonSlow = "client_slow"
)

// record tells Config.AccessLog and Config.Trace of the request that has ended.
func (c *conn) record(took times) {
	var r *Record
	if c.scratch != nil {
		r = &c.scratch.record
		r.Loop = -1
	} else {
		r = &c.worker.record
		r.Loop = c.worker.index
	}
	c.fill(r, took)
	c.p.tell(r)
}

func (p *Proxy) tell(r *Record) {
	if p.cfg().AccessLog != nil {
		p.cfg().AccessLog(r)
	}
	if r.Trace != nil {
		p.cfg().Trace(r)
	}
}

// fill fills a Record, which may have been another request's, but for its Loop. Tunnel is tunnelRecord's.
func (c *conn) fill(to *Record, took times) {
	r, x := &c.req, &c.x
	to.Began = x.began
	to.Took, to.Gateway, to.Backend = took.whole, took.gateway, took.backend
	to.Client, to.Peer = r.Client, c.peer
	to.Method, to.Host, to.Target, to.Minor = r.Method, r.Host, r.target, r.minor
	to.Attempts, to.Status, to.Reason, to.Cut = x.attempts, x.status, x.tally.reason, x.tally.by == byHalf
	to.Received, to.Sent = x.tally.received, max(0, x.tally.sent-x.tally.head)
	to.Service, to.Route, to.Instance = "", "", ""
	if x.service != nil {
		to.Service = x.service.name
		to.Route = x.route.name
	}
	if x.upstream != nil {
		to.Instance = x.upstream.id
	}
	to.Referer, to.UserAgent = nil, nil
	to.RequestID, to.TraceID, to.Trace = x.id, x.trace.id, x.trace.spans
	x.fillFields(to)
}

// fillFields looks for the fields of the request that a Record has.
func (x *exchange) fillFields(to *Record) {
	parents := 0
	for lines := x.c.req.lines; ; {
		nl := bytes.IndexByte(lines, '\n')
		if nl < 0 {
			break
		}
		line := lines[:nl]
		lines = lines[nl+1:]
		switch {
		case nl > 7 && line[7] == ':' && is(line[:7], "referer"):
			to.Referer = trim(line[8 : nl-1])
		case nl < len("traceparent:"):
		case line[10] == ':' && is(line[:10], "user-agent"):
			to.UserAgent = trim(line[11 : nl-1])
		case line[11] == ':' && !x.p().traced && is(line[:11], "traceparent"):
			id, _, _, ok := parseTraceparent(trim(line[12 : nl-1]))
			if parents++; ok && parents == 1 {
				to.TraceID = id
			} else {
				to.TraceID = [16]byte{}
			}
		}
	}
}

// clone copies a Record with its bytes.
func (r *Record) clone() *Record {
	c := *r
	for _, b := range []*[]byte{&c.Method, &c.Host, &c.Target, &c.Referer, &c.UserAgent, &c.RequestID} {
		*b = bytes.Clone(*b)
	}
	return &c
}

// tunnelRecord is the Record of a request that has become a tunnel, to be told when that ends.
func (c *conn) tunnelRecord(took times) *Record {
	r := &Record{}
	c.fill(r, took)
	r = r.clone()
	r.Loop, r.Tunnel = -1, true
	return r
}

// kindOf is the Reason of an error.
func kindOf(err error) string {
	var own *refusal
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errClientGone):
		return reasonGone
	case errors.Is(err, errClientSlow):
		return reasonSlow
	case errors.Is(err, errStale):
		return errTerminated.kind
	case errors.As(err, &own):
		return own.kind
	}
	return "" // a status says it
}

// Trace is the spans of a request that is sampled: one of its own, and one for each attempt.
type Trace struct {
	Span     [8]byte
	Parent   [8]byte // zero: the trace begins here
	State    string  // tracestate as it came
	Attempts []Attempt
}

// Attempt is what was asked of one instance. Times are by the same clock as Record.Began.
type Attempt struct {
	Span         [8]byte
	Instance     string
	Addr         string // http://10.0.0.5:8080 and its path, if it has one
	Host         string // of Addr
	Port         uint16
	Began, Ended time.Time // of a tunnel: when it was opened
	Status       int       // 0: there was no answer
	Reason       string    // as in Record; empty: it was answered to its end
}

// beginAttempt notes an attempt at an instance.
func (t *Trace) beginAttempt(u *upstream) {
	t.Attempts = append(t.Attempts, Attempt{
		Span: newSpanID(), Instance: u.id, Addr: u.instance.Load().Addr, Host: u.target.Host, Port: u.target.Port, Began: time.Now(),
	})
}

// endAttempt notes its end.
func (t *Trace) endAttempt(status int, err error) {
	a := &t.Attempts[len(t.Attempts)-1]
	if status < 200 && status != 101 { // there was no more than an interim response
		status = 0
	}
	a.Ended, a.Status, a.Reason = time.Now(), status, kindOf(err)
}

// spanOfAttempt is what a backend is told to be called by.
func (t *Trace) spanOfAttempt() [8]byte {
	if n := len(t.Attempts); n > 0 {
		return t.Attempts[n-1].Span
	}
	return t.Span
}

// dropped reports whether what begins at from is in one of the spans.
func dropped(spans []span, from int) bool {
	for _, s := range spans {
		if s.to > from {
			return s.from <= from
		}
	}
	return false
}

// insertSpan puts a span among others in their order, unless it is in one of them already.
func insertSpan(spans []span, from, to int) []span {
	i := 0
	for i < len(spans) && spans[i].to <= from {
		i++
	}
	if i < len(spans) && spans[i].from <= from {
		return spans
	}
	return slices.Insert(spans, i, span{from, to})
}
