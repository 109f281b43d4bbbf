// Command go is a service that keeps itself registered, and drains itself before it ends.
//
//	go run ./examples/go --gateway http://127.0.0.1:9901 --listen 127.0.0.1:8081
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"kerberos/registry/client"
)

func main() {
	gateway := flag.String("gateway", "http://127.0.0.1:9901", "where the gateway's API is")
	listen := flag.String("listen", "127.0.0.1:0", "where to listen; port 0 takes a free one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello from Go") })}
	go func() { _ = server.Serve(listener) }()

	registration, err := client.Start(ctx, client.Config{
		Gateways: []string{*gateway},
		Token:    os.Getenv("KERBEROS_TOKEN"),
		Service:  "hello",
		ID:       fmt.Sprintf("go-%d", os.Getpid()),
		Addr:     "http://" + listener.Addr().String(),
		TTL:      5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	log.Print("registered")
	<-ctx.Done()
	if err := registration.Close(); err != nil { // returns when no request is under way any more
		log.Print(err)
	}
	_ = server.Close()
}
