package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Backend is something to put behind the gateway: it answers every path with what it saw of the request.
type Backend struct {
	Listen   string `default:":8081" type:"listen" placeholder:"ADDR" noenv:"" help:"Where it listens; port 0 takes a free one."`
	Name     string `default:"backend" type:"name" noenv:"" help:"What it calls itself, in its answers and as its id."`
	Register string `type:"url" placeholder:"URL" noenv:"" help:"A gateway's API, to register there and to unregister at the end."`
	Service  string `default:"echo" type:"name" noenv:"" help:"The service it registers for."`
	Token    string `type:"token" placeholder:"SECRET" help:"The gateway's --token, or one of its --tokens."`
	TLS
}

// Run serves until the process is asked to end.
func (c *Backend) Run(p *Process) error {
	b := &backend{name: c.Name}
	if err := b.start(c.Listen); err != nil {
		return err
	}
	defer b.stop()
	fmt.Fprintf(p.Out, "backend %s listens on %s\n", c.Name, b.addr)
	if c.Register != "" {
		api := API{Gateway: c.Register, Token: c.Token, TLS: c.TLS, flag: "--register"}
		addr, err := b.reachable(c.Register)
		if err != nil {
			return err
		}
		if err := b.register(p.Context, &api, c.Service, addr); err != nil {
			return err
		}
		fmt.Fprintf(p.Out, "registered %s/%s at %s\n", c.Service, c.Name, addr)
		<-p.Context.Done()
		// The process was told to end, this call was not. A successor that has its name stays.
		_, err = api.call(context.WithoutCancel(p.Context), http.MethodDelete, "/register", registration{Service: c.Service, ID: c.Name, Addr: addr})
		switch {
		case taken(err):
			fmt.Fprintf(p.Out, "%s/%s is registered with another addr: it stays\n", c.Service, c.Name)
		case err != nil && !gone(err):
			return err
		default:
			fmt.Fprintf(p.Out, "unregistered %s/%s\n", c.Service, c.Name)
		}
	}
	<-p.Context.Done()
	b.drain()
	return nil
}

// backend is one that can be stopped and started again at the same address.
type backend struct {
	name   string
	addr   string // as bound, once started
	server *http.Server
	served sync.WaitGroup
}

func (b *backend) start(listen string) error {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err // names the address
	}
	b.addr = ln.Addr().String()
	b.server = &http.Server{
		Handler:           http.HandlerFunc(b.answer),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	b.served.Go(func() { _ = b.server.Serve(ln) }) // ends with stop or drain
	return nil
}

// stop ends it as a crash would: nothing is answered any more.
func (b *backend) stop() {
	_ = b.server.Close()
	b.served.Wait()
}

// drain lets requests in flight end, for a second. Those that were sent a moment before it unregistered are not here yet, and
// would find that their idle connection closes: they get a moment too.
func (b *backend) drain() {
	time.Sleep(100 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = b.server.Shutdown(ctx)
}

// answer tells who answers, and what of the request a gateway may have changed.
func (b *backend) answer(w http.ResponseWriter, r *http.Request) {
	var text strings.Builder
	fmt.Fprintf(&text, "backend %s\n%s %s\nHost: %s\n", b.name, r.Method, r.RequestURI, r.Host)
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Real-Ip", "Forwarded", "Via"} {
		if values := r.Header.Values(name); len(values) > 0 {
			fmt.Fprintf(&text, "%s: %s\n", name, strings.Join(values, ", "))
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, text.String())
}

func (b *backend) register(ctx context.Context, api *API, service, addr string) error {
	_, err := api.call(ctx, http.MethodPost, "/register", registration{Service: service, ID: b.name, Addr: addr})
	return err
}

// reachable is this backend's address as a gateway sees it: the one it listens on, or, if it listens on all, the one that
// packets to the gateway leave from. Nothing is sent to find out.
func (b *backend) reachable(gateway string) (string, error) {
	host, port, err := net.SplitHostPort(b.addr)
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		u, err := url.Parse(gateway)
		if err != nil {
			return "", err
		}
		conn, err := net.Dial("udp", net.JoinHostPort(u.Hostname(), "9"))
		if err != nil {
			return "", fmt.Errorf("which address leads to %s: %w", gateway, err)
		}
		defer conn.Close()
		local, ok := conn.LocalAddr().(*net.UDPAddr)
		if !ok {
			return "", errors.New("no local address")
		}
		host = local.IP.String()
	}
	return "http://" + net.JoinHostPort(host, port), nil
}
