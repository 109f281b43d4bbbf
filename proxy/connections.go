package proxy

import (
	"log/slog"
	"net"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"kerberos/proxy/loop"
)

const (
	spareAfter = 2  // whole seconds without a byte, after which a connection may make room for a new one
	spareLooks = 64 // at so many connections at most, to find one
	maxLeaving = 64 // refused connections of a loop that are kept until their clients have left,
	leavingFor = 2  // so many seconds at most
	warnEvery  = time.Second
)

// add notes a connection. The error is net.ErrClosed once Shutdown has begun, or the refusal of a limit.
func (p *Proxy) add(c *conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.refuses(c); err != nil {
		return err
	}
	if c.isCounted() {
		p.clients[c.peer]++
	}
	p.conns[c] = struct{}{}
	p.connected++
	return nil
}

// refuses is why add would not take a connection now. The lock is held.
func (p *Proxy) refuses(c *conn) error {
	limits := &p.cfg().Limits
	switch {
	case p.closing.Load():
		return net.ErrClosed
	case limits.ConnectionsPerClient > 0 && c.isCounted() && p.clients[c.peer] >= limits.ConnectionsPerClient:
		return errClientFull
	case limits.Connections > 0 && len(p.conns) >= limits.Connections:
		return errGatewayFull
	}
	return nil
}

// crowded says that there is room for a connection only if another one makes it.
func (p *Proxy) crowded(c *conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refuses(c) == error(errGatewayFull)
}

// remove may be called again.
func (p *Proxy) remove(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, there := p.conns[c]; !there {
		return
	}
	delete(p.conns, c)
	if c.isCounted() {
		if p.clients[c.peer]--; p.clients[c.peer] == 0 {
			delete(p.clients, c.peer)
		}
	}
	if len(p.conns) == 0 {
		p.noConns.Broadcast()
	}
}

// isCounted says whether the connection counts for its client's address. Of a proxy that is trusted it does not.
func (c *conn) isCounted() bool {
	return !c.trusted && c.peer.IsValid()
}

// spare returns a connection of the loop that can make room for a new one, or nil: one on which nothing has come for a
// while, and of those the one that would be closed first. It does not look far.
func (w *worker) spare() *conn {
	now := w.seconds(w.loop.Now())
	looks := 0
	for second := w.second + 1; second <= w.second+wheelSize; second++ {
		bucket := w.wheel[second%wheelSize]
		for i := len(bucket) - 1; i >= 0; i-- {
			if looks++; looks > spareLooks {
				return nil
			}
			switch c := bucket[i]; {
			case c.sock.Held() || c.slot >= 0 || c.tunnel != nil, c.expires > second && c.expires <= w.second+wheelSize:
				w.reshelve(c, second) // where it is not in the way of the next look
			case now-c.since > spareAfter && c.sock.Peek() < 0:
				return c
			}
		}
	}
	return nil
}

// parting is a connection that was refused. It is answered when its client has sent something, as some take an answer
// before their request for one to nothing. Then what the client still sends is read and dropped for a moment: closing at
// once would reset the connection, and the answer could be lost on its way.
type parting struct {
	worker *worker
	sock   *loop.Socket
	answer *refusal // nil: sent, or the connection is closed
	until  int64    // the second of the wheel in which it is closed
	read   int
}

// turnAway refuses a connection. On the loop.
func (w *worker) turnAway(sock *loop.Socket, err error) {
	own, ok := err.(*refusal)
	if !ok {
		sock.Close()
		return
	}
	w.p.logTurnAway(own)
	if len(w.leaving) == maxLeaving {
		w.leaving[0].close()
		w.leaving = w.leaving[1:]
	}
	d := &parting{worker: w, sock: sock, answer: own, until: w.seconds(w.loop.Now()) + leavingFor}
	sock.SetHandler(d)
	w.leaving = append(w.leaving, d)
	w.loop.Within(time.Second)
	d.Ready(loop.Readable)
}

// part closes the refused connections whose time is up.
func (w *worker) part(second int64) {
	for len(w.leaving) > 0 && w.leaving[0].until <= second {
		w.leaving[0].close()
		w.leaving = w.leaving[1:]
	}
}

// Ready is called by the loop.
func (d *parting) Ready(loop.Events) {
	for d.read < lingerBytes {
		n, err := d.sock.TryRead(d.worker.request)
		if err == loop.ErrAgain {
			return
		}
		if n <= 0 || err != nil {
			d.answer = nil
			break
		}
		d.read += n
		d.send()
	}
	d.close()
}

// Failed is called by the loop after a panic.
func (d *parting) Failed(any) { d.close() }

func (d *parting) send() {
	if d.answer == nil {
		return
	}
	w := d.worker
	w.out = w.p.appendTurnAway(w.out[:0], d.answer)
	d.answer = nil
	_, _ = d.sock.TryWrite(w.out) // there is room in a new socket
	_ = d.sock.CloseWrite()
}

// close may be called again.
func (d *parting) close() {
	d.send()
	d.sock.Close()
}

// turnAway refuses a connection that no loop watches.
func (c *conn) turnAway(err error) {
	if own, ok := err.(*refusal); ok {
		c.p.logTurnAway(own)
		if c.nc.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
			_, _ = c.nc.Write(c.p.appendTurnAway(nil, own)) // there is room in a new socket
		}
	}
	c.nc.Close()
}

// appendTurnAway appends the whole answer to whatever the client asks for.
func (p *Proxy) appendTurnAway(dst []byte, r *refusal) []byte {
	body := strconv.Itoa(r.status) + " " + fasthttp.StatusMessage(r.status) + ": " + p.cfg().Limits.explain(r) + "\n"
	dst = p.appendOwnHead(dst, r.status, plainText)
	dst = append(dst, "Cache-Control: no-store\r\nProxy-Status: kerberos; error="+r.kind+"\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: "...)
	dst = strconv.AppendInt(dst, int64(len(body)), 10)
	return append(dst, "\r\n\r\n"+body...)
}

// logTurnAway writes one line a second at most, however many are refused.
func (p *Proxy) logTurnAway(r *refusal) {
	now := time.Now()
	p.mu.Lock()
	p.turnedAway[r]++
	p.refused++
	n := p.refused
	if now.Sub(p.refusedAt) < warnEvery {
		n = 0
	} else {
		p.refused, p.refusedAt = 0, now
	}
	p.mu.Unlock()
	if n > 0 {
		p.log.Warn("connections refused", slog.Int("count", n), slog.String("latest", p.cfg().Limits.explain(r)))
	}
}
