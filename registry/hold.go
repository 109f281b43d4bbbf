package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"
)

const (
	holdBeat     = time.Second           // between the lines of a connection that holds a lease
	holdSilent   = 5 * time.Second       // after so long a peer that acknowledges nothing has vanished
	holdBytes    = 64 << 10              // that a client may send on it: they mean nothing
	heldTTL      = 15 * time.Second      // the lease of an instance that answers though its connection was lost, if it has none
	probeTimeout = time.Second           // for an instance to accept a connection,
	probeLook    = 50 * time.Millisecond // and not to end it at once, as the kernel does for a process that was killed just now
	mostProbes   = 128                   // at once, of lost holds and of stale instances each
	mostHolds    = 10_000                // at once
)

// hold is what keeps an instance registered instead of a lease. Each connection has its own, which is at no other's address.
type hold struct{ _ byte }

// Held is an instance that a connection keeps registered.
type Held struct {
	Generation  uint64
	registry    *Registry
	service, id string
	hold        *hold
	now, before *Instance   // as it was registered, and what stood in its place
	may         func() bool // whether who registered it still may; nil: yes
}

// errHolds refuses a connection too many.
var errHolds = errors.New("the gateway holds as many connections as it may")

// Hold is Register for an instance that stays for as long as a connection. The caller says when that is Lost.
func (r *Registry) Hold(service string, in Instance) (*Held, error) {
	if r.holds.Load() >= mostHolds {
		return nil, errHolds
	}
	h := &Held{registry: r, service: service, id: in.ID, hold: new(hold)}
	var err error
	h.now, h.before, err = r.register(service, in, h.hold)
	if h.now != nil {
		h.Generation = h.now.Generation
	}
	if errors.Is(err, ErrNotSaved) {
		h.Lost() // it is registered, and nobody would hold it
	}
	return h, err
}

// Current reports whether the instance is still the one that the connection has registered.
func (h *Held) Current() bool {
	in := h.registry.Snapshot(h.service).Instance(h.id)
	return in != nil && in.hold == h.hold
}

// Lost says that the connection is no more: the instance gets nothing new until it is known whether it accepts connections. If it
// does it stays, on a lease of its ttl or 15 s; otherwise it is removed and listed as expired. Nothing happens if the id has
// another registration by now.
func (h *Held) Lost() {
	r := h.registry
	select {
	case <-r.closing:
		return
	default:
	}
	var suspect *Instance
	_ = r.edit(h.service, h.id, "", func(at *slot, in *Instance) {
		if in.hold == h.hold {
			suspect = in.copy()
			suspect.suspect = true
			r.replace(at, suspect)
		}
	})
	if suspect == nil {
		return
	}
	alive, gone := r.probe(suspect, r.probes[1]), false
	_ = r.edit(h.service, h.id, "", func(at *slot, in *Instance) {
		switch {
		case in.hold != h.hold:
			return
		case !alive:
			r.lose(at, in)
			gone = true
			return
		}
		next := in.copy()
		next.hold, next.suspect = nil, false
		if next.TTL == 0 {
			next.TTL = heldTTL
		}
		if next.drain == nil { // else that has its own limit
			r.grant(h.service, next)
		}
		r.replace(at, next)
	})
	if gone {
		r.cfg.Log.Warn("instance has ended: it is not held any more", slog.String("instance", h.service+"/"+h.id))
	}
}

// probe reports whether an instance accepts a connection, when it is its turn.
func (r *Registry) probe(in *Instance, turns chan struct{}) bool {
	select {
	case turns <- struct{}{}:
		defer func() { <-turns }()
	case <-r.closing:
		return true
	}
	conn, err := r.dial(context.Background(), in)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(probeLook))
	_, err = conn.Read(make([]byte, 1))
	return err == nil || errors.Is(err, os.ErrDeadlineExceeded)
}

// dial connects to an instance for a probe, where it may point.
func (r *Registry) dial(ctx context.Context, in *Instance) (net.Conn, error) {
	dialer := net.Dialer{Timeout: probeTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		ap, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		return r.CheckAddr(in, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
	}}
	return dialer.DialContext(ctx, "tcp", net.JoinHostPort(in.target.Host, strconv.Itoa(int(in.target.Port))))
}

// serve keeps the instance registered for as long as the client keeps the connection: a line of JSON that says so, and then one
// every second.
func (h *Held) serve(conn net.Conn) {
	defer h.Lost()
	h.registry.holds.Add(1)
	defer h.registry.holds.Add(-1)
	setUserTimeout(conn, holdSilent)
	say := func(text string) bool {
		if conn.SetWriteDeadline(time.Now().Add(holdSilent)) != nil {
			return false
		}
		_, err := conn.Write([]byte(text))
		return err == nil
	}
	text := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"+
		"{\"registered\":true,\"generation\":%d}\n", h.Generation)
	buf := make([]byte, 512)
	for got := 0; say(text); text = "{\"heartbeat\":true}\n" {
		for beat := time.Now().Add(holdBeat); ; {
			if conn.SetReadDeadline(beat) != nil {
				return
			}
			n, err := conn.Read(buf)
			if got += n; got > holdBytes || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			if err != nil || !time.Now().Before(beat) {
				break
			}
		}
		select {
		case <-h.registry.closing:
			say("{\"registered\":false,\"reason\":\"the gateway stops\"}\n")
			return
		default:
		}
		if !h.Current() {
			say("{\"registered\":false,\"reason\":\"it was unregistered, or registered anew\"}\n")
			return
		}
		if h.may != nil && !h.may() { // a line is a renewal: without the right there is none, as with a heartbeat
			say("{\"registered\":false,\"reason\":\"who registered it may not do so any more\"}\n")
			return
		}
	}
}
