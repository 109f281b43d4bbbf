package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// Origin is the backend of all cases. It answers as the case that runs now wants, and keeps what it got.
type Origin struct {
	ln   net.Listener
	done sync.WaitGroup // a goroutine each connection, and the one that accepts

	mu    sync.Mutex // guards the fields below
	run   *run       // nil: none runs
	conns map[*conn]struct{}
}

// ListenOrigin starts the origin at an address, host:port.
func ListenOrigin(addr string) (*Origin, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // with it the end of a connection may be sent 200 ms late, and stale ones do not look it
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	o := &Origin{ln: ln, conns: map[*conn]struct{}{}}
	o.done.Go(o.accept)
	return o, nil
}

// Addr returns host:port.
func (o *Origin) Addr() string { return o.ln.Addr().String() }

// Close ends all connections and waits for them.
func (o *Origin) Close() {
	o.ln.Close()
	o.drop()
	o.done.Wait()
}

// drop closes all connections.
func (o *Origin) drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		c.Close()
	}
}

func (o *Origin) accept() {
	for {
		c, err := o.ln.Accept()
		if err != nil {
			return
		}
		nc := newConn(c)
		o.mu.Lock()
		o.conns[nc] = struct{}{}
		o.mu.Unlock()
		o.done.Go(func() {
			defer func() {
				o.mu.Lock()
				delete(o.conns, nc)
				o.mu.Unlock()
			}()
			if !o.serve(nc) {
				nc.Close()
			}
		})
	}
}

// serve answers the requests of one connection, one after the other. It reports whether a script has closed it.
func (o *Origin) serve(c *conn) bool {
	for at := 0; ; {
		end := -1
		c.until(context.Background(), func(in []byte, ended bool) bool {
			end = headEnd(in[at:])
			return end >= 0 || ended
		})
		c.mu.Lock()
		in := c.in[at:]
		c.mu.Unlock()
		run := o.current()
		if run == nil || end < 0 && len(in) == 0 {
			return false
		}
		if end < 0 {
			run.add(&request{settled: true})
			return false
		}
		req, err := parseRequest(in[:end])
		if err != nil {
			req.settled = true
			run.add(req)
			send("HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")(run.ctx, &peer{conn: c, run: run})
			return false
		}
		p := &peer{conn: c, run: run, req: req, from: at + end, body: at + end}
		for _, s := range run.script(req) {
			if err := s(run.ctx, p); err != nil || p.gone {
				c.mu.Lock()
				all := c.in
				c.mu.Unlock()
				p.take(all, true)
				return err == nil
			}
		}
		if readAll(run.ctx, p) != nil {
			return false
		}
		at = p.from
	}
}

func (o *Origin) current() *run {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.run
}

func (o *Origin) set(r *run) {
	o.mu.Lock()
	o.run = r
	o.mu.Unlock()
}

// run is a case while it runs.
type run struct {
	c   *Case
	ctx context.Context

	mu       sync.Mutex // guards the fields below and the requests
	requests []*request
	events   map[string]chan struct{}
}

// prefix is where a case's paths begin. Gateways that route by a path have to send it to the origin.
const prefix = "/wire/"

func (r *run) expand(text string) string { return strings.ReplaceAll(text, "{p}", prefix+r.c.ID) }

func (r *run) told(what string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events[what] == nil {
		r.events[what] = make(chan struct{})
	}
	return r.events[what]
}

func (r *run) tell(what string) {
	ch := r.told(what)
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-ch:
	default:
		close(ch)
	}
}

func (r *run) add(req *request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, req)
}

// script says how a request is answered: a probe, and what is not the case's, in the ordinary way. It keeps the request.
func (r *run) script(req *request) []step {
	if strings.Contains(req.target, prefix+r.c.ID+"/probe") || strings.Contains(req.target, prefix) && !strings.Contains(req.target, prefix+r.c.ID+"/") {
		return []step{readAll, answer}
	}
	r.mu.Lock()
	n := len(r.requests)
	r.requests = append(r.requests, req)
	r.mu.Unlock()
	if n >= len(r.c.Origin) {
		n = len(r.c.Origin) - 1
	}
	if n < 0 {
		return []step{readAll, answer}
	}
	return r.c.Origin[n]
}

// settle waits until no more comes of the requests that came, but not longer than d.
func (r *run) settle(d time.Duration) {
	for start := time.Now(); time.Since(start) < d; time.Sleep(5 * time.Millisecond) {
		settled := true
		r.mu.Lock()
		for _, req := range r.requests {
			settled = settled && req.settled
		}
		r.mu.Unlock()
		if settled {
			return
		}
	}
}

// answer is the ordinary answer: its body is the last segment of the path.
func answer(ctx context.Context, p *peer) error {
	if p.req == nil {
		return errors.New("nothing to answer")
	}
	path, _, _ := strings.Cut(p.req.target, "?")
	body := path[strings.LastIndexByte(path, '/')+1:]
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nX-Wire: %s\r\nContent-Length: %d\r\n\r\n", p.run.c.ID, len(body))
	if p.req.method == "HEAD" {
		body = ""
	}
	return send(head+body)(ctx, p)
}

// proceeds sends 100 to a request that expects it.
func proceeds(ctx context.Context, p *peer) error {
	if !strings.EqualFold(p.req.value("Expect"), "100-continue") {
		return nil
	}
	return send("HTTP/1.1 100 Continue\r\n\r\n")(ctx, p)
}
