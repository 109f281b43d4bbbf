// Command kerberos is an HTTP gateway that owns its service registry. This file joins the packages and obeys flags and
// signals; it decides nothing.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/valyala/fasthttp"
	"github.com/valyala/fasthttp/pprofhandler"
	"golang.org/x/term"

	"kerberos/cb"
	"kerberos/internal/access"
	"kerberos/internal/accesslog"
	"kerberos/internal/admin"
	"kerberos/internal/cli"
	"kerberos/internal/config"
	"kerberos/internal/memory"
	"kerberos/internal/metrics"
	"kerberos/internal/tracing"
	"kerberos/proxy"
	"kerberos/registry"
)

func main() { os.Exit(run(os.Args[1:])) }

// Exit codes beside 0.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // a second signal
)

// run returns the exit code.
func run(args []string) int {
	var commands struct {
		Run        gatewayCommand `cmd:"" default:"withargs" help:"Run the gateway (what happens without a command)."`
		Demo       cli.Demo       `cmd:"" help:"Show it at work: a gateway, three backends, one of which stops and comes back."`
		Backend    cli.Backend    `cmd:"" help:"Run a small backend that answers every path with what it saw."`
		Register   cli.Register   `cmd:"" help:"Register an instance, or change it."`
		Unregister cli.Unregister `cmd:"" help:"Unregister an instance."`
		Services   cli.Services   `cmd:"" help:"List services and their instances."`
		Explain    cli.Explain    `cmd:"" help:"Say what a request would find now: its route, service and instance, or what stands in its way."`
		Config     cli.Config     `cmd:"" help:"Print every setting with where its value comes from."`
		Routes     cli.Routes     `cmd:"" help:"Print the routes in the order in which they count."`
		Check      cli.CheckFile  `cmd:"" help:"Judge a file of settings."`
		Version    cli.Version    `cmd:"" help:"Print the version."`
	}
	command, err := config.Parse(&commands, args, os.LookupEnv,
		kong.Description("An HTTP gateway that owns its service registry: register a backend with one call, and traffic flows to it."))
	if err != nil {
		return fail(fmt.Errorf("%w\nSee kerberos --help", err), exitUsage)
	}
	if err := command.BindToProvider(process); err != nil {
		return fail(err, exitFailed)
	}
	if err := command.Run(); err != nil {
		if errors.As(err, new(usageError)) {
			return fail(err, exitUsage)
		}
		return fail(err, exitFailed)
	}
	return 0
}

// usageError is a flag that could be read and cannot be obeyed.
type usageError struct{ error }

func fail(err error, code int) int {
	fmt.Fprintln(os.Stderr, "kerberos:", err)
	return code
}

// process is what commands other than the gateway run in: the first signal ends their context, a second one them.
func process() *cli.Process {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return &cli.Process{
		Context:  ctx,
		Out:      os.Stdout,
		Terminal: term.IsTerminal(int(os.Stdout.Fd())),
		Start: func(cfg config.Gateway, log *slog.Logger) (cli.Gateway, error) {
			g, err := start(cfg, origin{}, log)
			if err != nil {
				return cli.Gateway{}, err
			}
			return cli.Gateway{Data: g.data.Addr().String(), Admin: g.admin.Addr().String(), Stop: g.stop}, nil
		},
		Check: check,
	}
}

// gatewayCommand is `kerberos run`.
type gatewayCommand struct {
	config.Gateway `embed:""`
}

// Run serves until a signal. Then /readyz fails at once, the listeners stay open for --shutdown-delay, and requests in
// flight have --drain-timeout to end. A second signal ends the process where it is. SIGHUP has the configuration read again.
func (c *gatewayCommand) Run(command *kong.Context, sources *config.Sources) error {
	signals, again := make(chan os.Signal, 2), make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	signal.Notify(again, syscall.SIGHUP)
	reopen := make(chan os.Signal, 1)
	accesslog.NotifyReopen(reopen) // without a log too: it shall not end the process
	log := slog.New(logHandler(os.Stderr))
	memory.Tune()
	g, err := start(c.Gateway, origin{sources: sources, load: func() (config.Gateway, *config.Sources, error) {
		return config.Load(command.Args, os.LookupEnv)
	}}, log)
	if err != nil {
		return err
	}
	go func() {
		for range reopen {
			if g.accessLog != nil {
				g.accessLog.Reopen()
			}
		}
	}()
	for running := true; running; {
		select {
		case <-again:
			_ = g.reload("SIGHUP") // the error is in the log
		case s := <-signals:
			g.reloader.end()
			log.Info("stopping", "signal", s.String(), "shutdown_delay", g.cfg.ShutdownDelay.String(), "drain_timeout", g.cfg.DrainTimeout.String())
			running = false
		case err = <-g.failed:
			running = false
		}
	}
	go func() {
		<-signals
		os.Exit(exitInterrupted)
	}()
	g.stop()
	return err
}

// logHandler writes text for people and JSON for machines.
func logHandler(out *os.File) slog.Handler {
	if term.IsTerminal(int(out.Fd())) {
		return slog.NewTextHandler(out, nil)
	}
	return slog.NewJSONHandler(out, nil)
}

// gateway is one that runs.
type gateway struct {
	cfg         config.Gateway
	log         *slog.Logger
	ready       atomic.Bool
	data, admin net.Listener // admin is nil if off
	registry    *registry.Registry
	proxy       *proxy.Proxy
	api         fasthttp.RequestHandler
	loops       int
	left        sync.Map // admin listeners that another one has replaced
	reloader    reloader
	accessLog   *accesslog.Log  // nil if off
	tracer      *tracing.Tracer // nil if off
	ops         *admin.Server   // nil with admin
	rule        *access.Rule
	tls         *access.TLS // of admin; nil: it has none
	serving     sync.WaitGroup
	failed      chan error // a listener that ended by itself
}

// start opens the listeners and serves. Flags that only the packages themselves can judge end in its error too.
// from says where they come from.
func start(cfg config.Gateway, from origin, log *slog.Logger) (_ *gateway, err error) {
	g := &gateway{cfg: cfg, log: log, loops: runtime.GOMAXPROCS(0), failed: make(chan error, 2)}
	g.reloader.origin, g.reloader.count.Last = from, clock()
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if cfg.File != "" {
		log.Info("settings are read from a file", "file", cfg.File)
	} else if from.load != nil {
		log.Info("no settings are read from a file; flags and the environment only", "looked_for", config.DefaultFile)
	}
	if g.data, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, fmt.Errorf("--listen: %w", err)
	}
	if cfg.Admin != config.Off {
		if g.admin, err = net.Listen("tcp", cfg.Admin); err != nil {
			return nil, fmt.Errorf("--admin: %w", err)
		}
	}

	if g.rule, err = access.New(accessConfig(cfg, log)); err != nil {
		return nil, usageError{fmt.Errorf("--tokens: %w", err)}
	}
	if cfg.AdminCert != "" {
		if g.tls, err = access.NewTLS(tlsConfig(cfg, log)); err != nil {
			return nil, usageError{err}
		}
	}
	var api fasthttp.RequestHandler // describes what the proxy does, which is made with it
	g.api = g.rule.Wrap(func(ctx *fasthttp.RequestCtx) { api(ctx) })

	if cfg.AccessLog != config.Off {
		g.accessLog, err = accesslog.Open(accesslog.Config{
			Path:   cfg.AccessLog,
			Format: accesslog.Format(cfg.AccessLogFormat),
			Share:  float64(cfg.AccessLogSample),
			Loops:  g.loops,
			Log:    log,
		})
		if err != nil {
			return nil, fmt.Errorf("--access-log: %w", err)
		}
	}
	if cfg.OTLPEndpoint != "" {
		g.tracer, err = tracing.New(tracing.Config{Endpoint: cfg.OTLPEndpoint, GRPC: cfg.OTLPProtocol == config.GRPC, Log: log})
		if err != nil {
			return nil, usageError{err}
		}
	}
	registration := registry.Config{Addrs: addresses(cfg, g.data, g.admin), Log: log}
	if cfg.API.OnData() {
		registration.Reserved = registry.ServedNames()
	}
	if cfg.Data == "" {
		g.registry = registry.New(registration)
		log.Info("registrations end with this process; --data keeps them")
	} else if g.registry, err = registry.Open(registration, cfg.Data); err != nil {
		return nil, fmt.Errorf("--data: %w", err)
	}
	if err = g.registry.Pin(cfg.File, cfg.Pinned()); err != nil {
		return nil, usageError{from.sources.At(err)}
	}
	if g.proxy, err = proxy.New(g.forwarding(cfg), nil); err != nil {
		return nil, usageError{from.sources.At(err)}
	}
	api = registry.NewHandler(g.registry, g.proxy)
	g.registry.OnChange(g.proxy.Update)
	for _, name := range g.registry.Names() { // what has changed since proxy.New looked, a lease's end for example
		g.proxy.Update(name)
	}
	if g.admin != nil {
		if g.admin, err = g.proxy.Watched(g.admin); err != nil {
			return nil, fmt.Errorf("--admin: %w", err)
		}
		operation := admin.Config{
			Ready: g.ready.Load, Profiles: g.rule.WrapAdmin(pprofhandler.PprofHandler),
			Explain: g.rule.Wrap(registry.NewExplainHandler(g.registry, g.proxy)), Log: log,
		}
		if cfg.Metrics {
			operation.Metrics = metrics.Handler(metrics.Config{
				Proxy: g.proxy, Registry: g.registry, Ready: g.ready.Load, Reloads: g.reloads, MaxSeries: cfg.MetricsMaxSeries, Unlogged: g.accessLog.Dropped, Log: log,
			})
		}
		if from.load != nil {
			operation.Reload = g.rule.WrapAdmin(g.answerReload)
		}
		if cfg.API.OnAdmin() {
			operation.API = g.api
		}
		g.ops = admin.New(operation)
	}

	g.warnOpen(cfg, g.data)
	g.followFile()
	g.ready.Store(true)
	g.serve("data", g.data, g.proxy.Serve)
	if g.admin != nil {
		g.serve("admin", g.admin, g.serveAdmin)
	}
	return g, nil
}

// check refuses a configuration with which start fails, as far as that can be told without opening, making or starting anything.
// What the packages do not have to be asked about, config has judged when it was read.
func check(cfg config.Gateway) error {
	log := slog.New(slog.DiscardHandler)
	if err := accessConfig(cfg, log).Check(); err != nil {
		return fmt.Errorf("--tokens: %w", err)
	}
	if cfg.AdminCert != "" {
		if err := tlsConfig(cfg, log).Check(); err != nil {
			return err
		}
	}
	if cfg.AccessLog != config.Off {
		if err := accesslog.Check(cfg.AccessLog); err != nil {
			return fmt.Errorf("--access-log: %w", err)
		}
	}
	g := &gateway{cfg: cfg, log: log, registry: registry.New(registry.Config{})}
	return g.forwarding(cfg).Check()
}

// accessConfig is who may use the API.
func accessConfig(cfg config.Gateway, log *slog.Logger) access.Config {
	return access.Config{
		Token:          cfg.Token,
		Tokens:         cfg.Tokens,
		Certificates:   cfg.AdminClientCA != "",
		Allow:          cfg.APIAllow.Networks,
		AllowNone:      cfg.APIAllow.None,
		AllowSet:       cfg.APIAllow.Set,
		TrustedProxies: len(cfg.TrustedProxies) > 0,
		Log:            log,
	}
}

// tlsConfig is how the admin listener speaks TLS, if it does.
func tlsConfig(cfg config.Gateway, log *slog.Logger) access.TLSConfig {
	return access.TLSConfig{Cert: cfg.AdminCert, Key: cfg.AdminKey, ClientCA: cfg.AdminClientCA, Log: log}
}

// forwarding is what the proxy is told. What is no setting is the same each time.
func (g *gateway) forwarding(cfg config.Gateway) proxy.Config {
	forwarding := proxy.Config{
		Registry:       g.registry,
		Strategy:       cfg.Strategy,
		Routes:         cfg.Route,
		Services:       cfg.ServiceSettings(),
		RequestTimeout: limit(cfg.RequestTimeout),
		ConnectTimeout: limit(cfg.ConnectTimeout),
		UpstreamIdle:   limit(cfg.UpstreamIdleTimeout),
		Limits: proxy.Limits{
			FirstByteTimeout: limit(cfg.ClientFirstByteTimeout),
			HeadTimeout:      limit(cfg.ClientHeadTimeout),
			IdleTimeout:      limit(cfg.ClientIdleTimeout),
			BodyTimeout:      limit(cfg.ClientBodyTimeout),
			WriteTimeout:     limit(cfg.ClientWriteTimeout),
			SilenceTimeout:   limit(cfg.ResponseIdleTimeout),
			TunnelIdle:       limit(cfg.TunnelIdleTimeout),
			TotalTimeout:     limit(cfg.TotalTimeout),
			MinUpload:        limit(cfg.ClientMinUpload),
			MinDownload:      limit(cfg.ClientMinDownload),
			Body:             limit(cfg.MaxBody),
			Head:             limit(cfg.MaxHead),
			Fields:           limit(cfg.MaxFields),
			RequestLine:      limit(cfg.MaxRequestLine),

			Connections:          cfg.MaxConnections.Of(config.Descriptors()),
			ConnectionsPerClient: cfg.MaxConnectionsPerClient,
			InFlightPerInstance:  cfg.MaxInFlightPerInstance,
			InFlightPerService:   cfg.MaxInFlightPerService,
			QueueTimeout:         limit(cfg.QueueTimeout),
		},
		IgnoreFIN:        !bool(cfg.AbortOnFin),
		Retries:          limit(cfg.Retries),
		Breaker:          cb.Config{Failures: cfg.BreakerFailures, OpenFor: cfg.BreakerOpen, Probes: cfg.BreakerProbes},
		BreakerStatuses:  cfg.BreakerStatuses,
		Upgrades:         cfg.AllowUpgrades,
		TrustedProxies:   cfg.TrustedProxies,
		UpstreamCA:       cfg.UpstreamCA.Pool,
		UpstreamInsecure: bool(cfg.UpstreamInsecure),
		NoVia:            !bool(cfg.Via),
		HealthPath:       cfg.HealthPath,
		Ready:            g.ready.Load,
		NoMetrics:        !bool(cfg.Metrics),
		RequestIDs:       bool(cfg.RequestID),
		Loops:            g.loops,
		AmbiguousPaths:   proxy.PathPolicy(cfg.AmbiguousPaths),
		AllowMethods:     cfg.AllowMethods,
		Log:              g.log,
	}
	if g.accessLog != nil {
		forwarding.AccessLog = g.accessLog.Write
	}
	if g.tracer != nil {
		forwarding.Trace, forwarding.TraceShare = g.tracer.Trace, float64(cfg.TraceSample)
	}
	if cfg.API.OnData() {
		forwarding.API = g.api
		forwarding.MayRead = g.rule.MayReadAll
	}
	return forwarding
}

// warnOpen warns of an API that is open to more than it may be meant for, or to nobody.
func (g *gateway) warnOpen(cfg config.Gateway, data net.Listener) {
	switch {
	case cfg.Token != "" || cfg.Tokens != "" || cfg.AdminClientCA != "" || cfg.APIAllow.None:
	case len(cfg.TrustedProxies) > 0:
		g.log.Warn("nobody may use the API: with --trusted-proxies it needs a token; set --token or --tokens")
	case cfg.API.OnData() && !bound(data).Addr().IsLoopback():
		g.log.Warn("the API is served on the data listener without a token: whoever passes the rule of --api-allow may change where traffic goes; set --token or --api=admin")
	}
}

// serveAdmin serves the admin listener.
func (g *gateway) serveAdmin(ln net.Listener) error {
	served := ln
	if g.tls != nil {
		served = g.tls.Listener(ln)
	}
	err := g.ops.Serve(served)
	if _, left := g.left.LoadAndDelete(ln); left {
		return nil
	}
	return err
}

// limit is what a package that is configured takes for a flag: there 0 is the default, and less is none.
func limit[T int | int64 | time.Duration](flag T) T {
	if flag == 0 {
		return -1
	}
	return flag
}

func (g *gateway) serve(name string, ln net.Listener, serve func(net.Listener) error) {
	g.log.Info("listening", "listener", name, "addr", ln.Addr().String())
	g.serving.Go(func() {
		if err := serve(ln); err != nil {
			g.failed <- fmt.Errorf("the %s listener ended: %w", name, err)
		}
	})
}

// stop ends the gateway as its flags say.
func (g *gateway) stop() {
	g.reloader.end()
	g.ready.Store(false)
	time.Sleep(g.cfg.ShutdownDelay)
	g.registry.Close() // who waits for a drain is answered, and no lease ends any more
	g.closeAccess()
	if g.ops != nil {
		g.serving.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second) // its requests take milliseconds
			defer cancel()
			_ = g.ops.Shutdown(ctx) // what is left ends with the process
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), g.cfg.DrainTimeout)
	defer cancel()
	cut := g.proxy.Shutdown(ctx)
	if cut > 0 {
		g.log.Warn("requests were cut at the drain timeout", "count", cut, "drain_timeout", g.cfg.DrainTimeout.String())
	}
	g.serving.Wait()
	if cut == 0 {
		g.proxy.Close() // it would wait for those that were cut, which end with the process
	}
	g.closeLogs()
	g.log.Info("stopped")
}

// close takes back what a start that failed has opened.
func (g *gateway) close() {
	for _, c := range []io.Closer{g.data, g.admin} {
		if c != nil {
			_ = c.Close()
		}
	}
	g.closeAccess()
	if g.registry != nil {
		g.registry.Close()
	}
	if g.proxy != nil {
		g.proxy.Close()
	}
	g.closeLogs()
}

// closeLogs writes and sends what there is to say of requests that have ended.
func (g *gateway) closeLogs() {
	if g.accessLog != nil {
		if err := g.accessLog.Close(); err != nil {
			g.log.Warn("the access log was not written to its end", "reason", err.Error())
		}
	}
	if g.tracer != nil {
		ctx, cancel := context.WithTimeout(context.Background(), tracing.CloseTimeout)
		defer cancel()
		if err := g.tracer.Close(ctx); err != nil {
			g.log.Warn("the last traces were not sent", "reason", err.Error())
		}
	}
}

// closeAccess ends what follows the files of tokens and certificates.
func (g *gateway) closeAccess() {
	if g.rule != nil {
		g.rule.Close()
	}
	if g.tls != nil {
		g.tls.Close()
	}
}

// bound is the address that a listener got.
func bound(ln net.Listener) netip.AddrPort {
	ap := ln.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
