//go:build !linux

package main

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"sync/atomic"
)

// serveOrigin answers every request with a body of that size, at so many addresses. It returns only with an error.
func serveOrigin(size, addrs int, ready func(addrs []string)) error {
	body := bytes.Repeat([]byte("x"), size)
	var accepted atomic.Int64
	srv := http.Server{
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				accepted.Add(1)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			answer := body
			if "?"+r.URL.RawQuery == mirrorQuery {
				answer, _ = httputil.DumpRequest(r, false)
				w.Header().Set(acceptedHeader, strconv.FormatInt(accepted.Load(), 10))
			}
			w.Header().Set("Content-Type", "text/plain")
			w.Write(answer)
		}),
	}
	var names []string
	failed := make(chan error, addrs)
	for range addrs {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		names = append(names, ln.Addr().String())
		go func() { failed <- srv.Serve(ln) }()
	}
	ready(names)
	return <-failed
}

// serveChecked is what only checks connect to. It returns only with an error.
func serveChecked(ready func(addr string)) error {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ready(ln.Addr().String())
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		c.Close()
	}
}
