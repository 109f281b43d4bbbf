// Package client keeps a program registered with Kerberos gateways for as long as it runs. It needs the standard library only:
// the file can be copied into any project.
//
//	registration, err := client.Start(ctx, client.Config{Service: "users", Addr: "http://10.0.0.5:8080"})
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer registration.Close()
//
// A lease is renewed three times in its time. A gateway that does not answer is asked again, and one that has forgotten the
// instance, as it does when it restarts, is told again.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// Config says who is registered, and where. Fields that are left zero get the default.
type Config struct {
	Gateways []string // where their APIs are: http://127.0.0.1:9901; every one of them is told
	Token    string   // none

	Service string        // needed
	ID      string        // the name of the machine
	Addr    string        // where the program listens, as the gateways reach it: http://10.0.0.5:8080; needed
	Weight  int           // none
	TTL     time.Duration // 15 s: how long a gateway sends requests to a program that it hears nothing of
	Drain   time.Duration // 30 s: how long Close waits for requests to end; negative: not at all

	Metadata  map[string]string // none: what others should know about it
	Check     map[string]any    // none: how the gateways ask the program whether it can serve, such as {"path": "/health"}
	SlowStart time.Duration     // none: how long its share grows when it comes

	// For the calls; its Timeout must leave room for Drain. The default has none, each call has its own. Gateways with an
	// authority or client certificates of your own need one with a Transport that has these in its TLSClientConfig.
	HTTP *http.Client
	Log  *slog.Logger // what goes wrong while the program runs; default: nothing
}

const (
	retryAfter = 500 * time.Millisecond // between two attempts to reach a gateway
	leaveAgain = 3 * time.Second        // how long Close tries it at one that restarts
)

// Registration is a program that is registered.
type Registration struct {
	cfg  Config
	stop context.CancelFunc
	kept sync.WaitGroup
}

// Start registers the program with every gateway that can be reached, and keeps at it with the others. The error is what a
// gateway has against the registration, or that none could be reached before ctx ended. ctx is for the start alone.
func Start(ctx context.Context, cfg Config) (*Registration, error) {
	if len(cfg.Gateways) == 0 {
		cfg.Gateways = []string{"http://127.0.0.1:9901"}
	}
	if cfg.ID == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("client: Config.ID is empty, and the machine has no name: %w", err)
		}
		cfg.ID = name
	}
	if cfg.TTL == 0 {
		cfg.TTL = 15 * time.Second
	}
	if cfg.Drain == 0 {
		cfg.Drain = 30 * time.Second
	}
	if cfg.HTTP == nil {
		cfg.HTTP = &http.Client{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	for {
		errs := make([]error, len(cfg.Gateways))
		var asked sync.WaitGroup
		for i, gateway := range cfg.Gateways {
			asked.Go(func() { errs[i] = cfg.register(ctx, gateway) })
		}
		asked.Wait()
		reached := false
		for _, err := range errs {
			if statusOf(err)/100 == 4 {
				cfg.Drain = -1
				_ = (&Registration{cfg: cfg}).leave(0) // where others have taken it
				return nil, err
			}
			reached = reached || err == nil
		}
		if reached {
			running, stop := context.WithCancel(context.Background())
			r := &Registration{cfg: cfg, stop: stop}
			for i, gateway := range cfg.Gateways {
				r.kept.Go(func() { r.keep(running, gateway, errs[i] == nil) })
			}
			return r, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(errs...)
		case <-time.After(retryAfter):
		}
	}
}

// Close unregisters the program at every gateway, and returns when its requests have ended or Drain is over. Call it before the
// program stops to listen. The error says at which gateways it did not work, tried for 3 s: there the lease ends.
func (r *Registration) Close() error {
	r.stop()
	r.kept.Wait()
	return r.leave(leaveAgain)
}

// leave unregisters it; where that fails it tries again for so long.
func (r *Registration) leave(again time.Duration) error {
	query := url.Values{"addr": {r.cfg.Addr}} // a successor that has the same id stays
	wait := 10 * time.Second
	if r.cfg.Drain > 0 {
		query.Set("drain", r.cfg.Drain.String()) // in which it needs no lease
		wait += r.cfg.Drain
	}
	errs := make([]error, len(r.cfg.Gateways))
	var left sync.WaitGroup
	for i, gateway := range r.cfg.Gateways {
		left.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), wait)
			defer cancel()
			var failing time.Time // since
			for {
				err := r.cfg.call(ctx, http.MethodDelete, gateway, r.cfg.path()+"?"+query.Encode(), nil)
				status := statusOf(err)
				if status == http.StatusNotFound || status == http.StatusConflict { // not there any more
					err = nil
				}
				if err != nil && failing.IsZero() {
					failing = time.Now()
				}
				if err == nil || status/100 == 4 || ctx.Err() != nil || time.Since(failing) >= again {
					errs[i] = err
					return
				}
				time.Sleep(retryAfter)
			}
		})
	}
	left.Wait()
	return errors.Join(errs...)
}

// keep renews the lease at one gateway, until ctx ends.
func (r *Registration) keep(ctx context.Context, gateway string, registered bool) {
	renewal := r.cfg.path() + "/heartbeat?" + url.Values{"addr": {r.cfg.Addr}}.Encode()
	var err error
	for {
		pause := r.cfg.TTL / 3
		if err != nil || !registered {
			pause = min(pause, retryAfter)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		if registered {
			err = r.cfg.call(ctx, http.MethodPost, gateway, renewal, nil)
			registered = statusOf(err) != http.StatusNotFound
		}
		if !registered { // never, or the gateway has forgotten it
			err = r.cfg.register(ctx, gateway)
			registered = err == nil
		}
		if err != nil && ctx.Err() == nil {
			r.cfg.Log.Warn("not registered with a gateway", slog.String("gateway", gateway), slog.String("reason", err.Error()))
		}
	}
}

func (c *Config) register(ctx context.Context, gateway string) error {
	body := map[string]any{"addr": c.Addr, "weight": c.Weight, "ttl": c.TTL.String(), "slow_start": c.SlowStart.String()}
	if c.Metadata != nil {
		body["metadata"] = c.Metadata
	}
	if c.Check != nil {
		body["check"] = c.Check
	}
	return c.call(ctx, http.MethodPut, gateway, c.path(), body)
}

func (c *Config) path() string {
	return "/services/" + url.PathEscape(c.Service) + "/" + url.PathEscape(c.ID)
}

// Refusal is an answer that is no success.
type Refusal struct {
	Gateway string
	Status  int
	Field   string // that is wrong, if one is
	Detail  string
}

func (e *Refusal) Error() string {
	return fmt.Sprintf("client: %s: %s (%d)", e.Gateway, e.Detail, e.Status)
}

// statusOf is the status of a Refusal, or 0.
func statusOf(err error) int {
	var refused *Refusal
	if errors.As(err, &refused) {
		return refused.Status
	}
	return 0
}

func (c *Config) call(ctx context.Context, method, gateway, path string, body any) error {
	if method != http.MethodDelete { // which waits for requests to end
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, min(c.TTL/3, 10*time.Second)) // a lease outlives a call that hangs
		defer cancel()
	}
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(gateway, "/")+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if c.Token != "" {
		request.Header.Set("Authorization", "Bearer "+c.Token)
	}
	response, err := c.HTTP.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	if err != nil {
		return err
	}
	if response.StatusCode/100 == 2 {
		return nil
	}
	refused := &Refusal{Gateway: gateway, Status: response.StatusCode, Detail: response.Status}
	_ = json.Unmarshal(answer, refused) // its field and detail, if it has these
	refused.Gateway, refused.Status = gateway, response.StatusCode
	return refused
}
