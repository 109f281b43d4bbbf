package soak

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// pathField of a response says which request it answers.
const pathField = "Soak-Path"

// listen is plain TCP: with Multipath TCP the end of a connection may be sent 200 ms late.
func listen() (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
}

// shortBody answers requests for something short. It tells them apart.
func shortBody(method, uri string) string { return strings.Repeat(method+" "+uri+"\n", 20) }

// origin is a backend that does what it is asked. The second segment of a path says what, the third is the request's
// number, and the query a size.
type origin struct {
	pattern []byte
	forged  *atomic.Int64 // requests that no gateway should have let through
	server  *http.Server
	addr    string
}

// startOrigin starts one that closes kept-alive connections after that time, 0 for never.
func startOrigin(pattern []byte, forged *atomic.Int64, idle time.Duration) (*origin, error) {
	ln, err := listen()
	if err != nil {
		return nil, err
	}
	o := &origin{pattern: pattern, forged: forged, addr: ln.Addr().String()}
	o.server = &http.Server{Handler: o, IdleTimeout: idle, ErrorLog: log.New(io.Discard, "", 0)}
	go o.server.Serve(ln)
	return o, nil
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(pathField, r.RequestURI)
	what, id, n := parsePath(r)
	switch what {
	case "big":
		w.Header().Set("Content-Length", strconv.Itoa(n))
		io.Copy(w, newStream(o.pattern, id, n))
	case "echo":
		o.echo(w, r)
	case "sse":
		o.events(w, r, id, n)
	case "wait":
		select {
		case <-time.After(time.Duration(n) * time.Millisecond):
		case <-r.Context().Done():
		}
		io.WriteString(w, shortBody(r.Method, r.RequestURI))
	case "ws":
		o.tunnel(w, r)
	case "malformed":
		o.forged.Add(1)
	default:
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, shortBody(r.Method, r.RequestURI))
	}
}

func parsePath(r *http.Request) (what string, id uint64, n int) {
	part := strings.Split(r.URL.Path, "/")
	if len(part) < 4 {
		return "", 0, 0
	}
	id, _ = strconv.ParseUint(part[3], 10, 64)
	n, _ = strconv.Atoi(r.URL.RawQuery)
	return part[2], id, n
}

// echo sends back what comes, while it comes.
func (o *origin) echo(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.EnableFullDuplex()
	if r.ContentLength >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(r.ContentLength, 10))
	}
	b := make([]byte, 16<<10)
	for {
		n, err := r.Body.Read(b)
		if n > 0 {
			if _, err := w.Write(b[:n]); err != nil {
				return
			}
			control.Flush()
		}
		switch {
		case err == io.EOF:
			return
		case err != nil:
			panic(http.ErrAbortHandler)
		}
	}
}

func event(id uint64, i int) string { return fmt.Sprintf("id: %d\ndata: event %d of %d\n\n", i, i, id) }

// events sends n events, one each 10 ms.
func (o *origin) events(w http.ResponseWriter, r *http.Request, id uint64, n int) {
	w.Header().Set("Content-Type", "text/event-stream")
	control := http.NewResponseController(w)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := range n {
		if _, err := io.WriteString(w, event(id, i)); err != nil || control.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// tunnel switches to WebSocket as far as its handshake goes, and echoes whatever comes then.
func (o *origin) tunnel(w http.ResponseWriter, r *http.Request) {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	defer c.Close()
	fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n%s: %s\r\n\r\n",
		acceptKey(r.Header.Get("Sec-WebSocket-Key")), pathField, r.RequestURI)
	if rw.Flush() == nil {
		io.Copy(c, rw)
	}
}

// acceptKey is RFC 6455 section 4.2.2.
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// mode is what a faulty origin does with requests.
type mode int32

const (
	fine         mode = iota
	resetting         // the connection is reset instead of an answer
	terminating       // it is closed
	malforming        // the answer is none
	hanging           // there is none
	dripping          // it comes a byte at a time
	cutting           // its body ends early
	cuttingChunk      // the same, in chunks
	modes
)

// faulty is a backend that does not what it should.
type faulty struct {
	ln   net.Listener
	mode atomic.Int32
	done sync.WaitGroup

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
}

func startFaulty() (*faulty, error) {
	ln, err := listen()
	if err != nil {
		return nil, err
	}
	f := &faulty{ln: ln, conns: map[net.Conn]struct{}{}}
	f.done.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[c] = struct{}{}
			f.mu.Unlock()
			f.done.Go(func() { f.serve(c) })
		}
	})
	return f, nil
}

// set has all requests from now on be answered in that way.
func (f *faulty) set(m mode) { f.mode.Store(int32(m)) }

func (f *faulty) close() {
	f.ln.Close()
	f.mu.Lock()
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.done.Wait()
}

func (f *faulty) serve(c net.Conn) {
	defer func() {
		c.Close()
		f.mu.Lock()
		delete(f.conns, c)
		f.mu.Unlock()
	}()
	in := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		io.Copy(io.Discard, r.Body)
		if !f.answer(c, in, r) {
			return
		}
	}
}

// malformedAnswers are none that a gateway may pass on.
var malformedAnswers = []string{
	"HTTP/1.1 2OO OK\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nab",
	"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nab",
	"SSH-2.0-OpenSSH_9.2\r\n\r\n",
	"\x00\x00\x00\x00\r\n\r\n",
}

// answer reports whether the connection is good for another request.
func (f *faulty) answer(c net.Conn, in *bufio.Reader, r *http.Request) bool {
	body := shortBody(r.Method, r.RequestURI)
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\n%s: %s\r\n", pathField, r.RequestURI)
	whole := fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
	half := len(body) / 2
	switch mode(f.mode.Load()) {
	case resetting:
		c.(*net.TCPConn).SetLinger(0)
	case terminating:
	case malforming:
		io.WriteString(c, malformedAnswers[rand.IntN(len(malformedAnswers))])
	case hanging:
		in.Peek(1) // until the gateway gives up
	case dripping:
		cut := len(whole) - 30
		io.WriteString(c, whole[:cut])
		for _, b := range []byte(whole[cut:]) {
			time.Sleep(20 * time.Millisecond)
			if _, err := c.Write([]byte{b}); err != nil {
				return false
			}
		}
		return true
	case cutting:
		io.WriteString(c, whole[:len(whole)-half])
	case cuttingChunk:
		fmt.Fprintf(c, "%sTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", head, half, body[:half])
	default:
		_, err := io.WriteString(c, whole)
		return err == nil
	}
	return false
}
