// Package config is what the gateway can be told: its flags, their environment variables and their defaults. Every value
// is judged where it is decoded, so that an error names the flag, the variable it came from, the value and what is
// allowed. It knows nothing of how the values are used, and no package that is configured imports it.
package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"kerberos/lb"
	"kerberos/proxy"
	"kerberos/registry"
)

// Gateway is the configuration of one gateway, as flags. Every flag --x-y is read from KERBEROS_X_Y too, then from the
// second name in its `also` tag, then as x-y from a file; an empty variable counts as not set.
// Default < file < environment < flag. What has a `live` tag can change while the gateway runs.
type Gateway struct {
	Config string `type:"file" placeholder:"FILE" nofile:"" group:"listeners" help:"YAML file of settings, routes and services; without it kerberos.yaml of the working directory, if it is there."`

	Listen        string        `live:"" default:":8080" type:"listen" placeholder:"ADDR" group:"listeners" help:"Where clients are served; port 0 takes a free one."`
	Admin         string        `live:"" default:"127.0.0.1:9901" type:"listen-or-off" placeholder:"ADDR" group:"listeners" help:"Where /healthz, /readyz, /metrics, /debug/pprof/, /explain, /reload and the API are served, or off."`
	HealthPath    string        `live:"" type:"path" placeholder:"PATH" group:"listeners" help:"A path answered on --listen by the gateway itself, for a load balancer in front: 200 while ready, else 503."`
	Metrics       Switch        `default:"on" negatable:"" group:"listeners" help:"Count and time requests, and serve /metrics on --admin."`
	DrainTimeout  time.Duration `live:"" default:"30s" min:"0s" group:"listeners" help:"How long requests in flight may take to end at a shutdown."`
	ShutdownDelay time.Duration `live:"" default:"0s" min:"0s" group:"listeners" help:"How long the listeners stay open at a shutdown, with /readyz failing."`

	Data string `type:"directory" placeholder:"DIR" group:"registry" help:"Keep registrations in DIR, so that they are there again after a restart; without it they end with the process."`

	API            API            `default:"both" group:"access" help:"Which listeners serve the API: data (--listen), admin or both."`
	APIAllow       Allow          `placeholder:"loopback" group:"access" help:"Who may use the API while neither --token, --tokens nor --admin-client-ca is set: networks, loopback (the default), or none."`
	Token          string         `type:"token" placeholder:"SECRET" group:"access" help:"Whoever sends it as a bearer token may use all of the API, and nobody may without a token."`
	Tokens         string         `type:"file" placeholder:"FILE" group:"access" help:"YAML file of tokens and names in client certificates, and the rights of each; read again when it changes."`
	AdminCert      string         `type:"file" placeholder:"FILE" group:"access" help:"PEM file of the certificate with which --admin speaks TLS; read again when it changes, as the next two are."`
	AdminKey       string         `type:"file" placeholder:"FILE" group:"access" help:"PEM file of its key."`
	AdminClientCA  string         `type:"file" placeholder:"FILE" group:"access" help:"PEM file of the authorities of client certificates, which then stand for a token. Without --tokens each has all rights."`
	AddrAllow      []netip.Prefix `live:"" placeholder:"NETWORK" group:"access" help:"Where registered addresses may point, loopback included; all others are refused."`
	AddrDeny       []netip.Prefix `live:"" placeholder:"NETWORK" group:"access" help:"Where registered addresses may not point."`
	TrustedProxies []netip.Prefix `placeholder:"NETWORK" group:"access" help:"Proxies in front whose X-Forwarded-* and Forwarded fields are believed. The API then needs a token."`

	Strategy lb.Strategy `live:"" default:"round-robin" also:"BALANCER_STRATEGY" group:"traffic" help:"How requests spread: ${strategies}."`
	Route    []Route     `live:"" placeholder:"PREFIX=SERVICE" group:"traffic" help:"Send paths under PREFIX to SERVICE; repeatable. '/*' keeps the rule without routes, that the first path segment names the service, as the last resort."`
	Retries  int         `live:"" default:"2" min:"0" also:"RETRY_MAX" group:"traffic" help:"Further attempts once an instance may have seen the request. What was not written at all is always tried elsewhere, at up to ${most_tried} instances."`

	AllowUpgrades []string `live:"" default:"websocket" type:"protocols" placeholder:"PROTOCOL" group:"traffic" help:"Protocols to which clients may upgrade, a name such as websocket or with a version such as foo/2, or none."`

	BreakerFailures int           `live:"" default:"5" min:"1" also:"BREAKER_FAILURES" group:"traffic" help:"Failures in a row that open the breaker of an instance."`
	BreakerOpen     time.Duration `live:"" default:"30s" min:"1ms" also:"BREAKER_OPEN" group:"traffic" help:"How long a breaker stays open before it is probed."`
	BreakerProbes   int           `live:"" default:"3" min:"1" also:"BREAKER_PROBES" group:"traffic" help:"Probes that must all succeed to close a breaker."`
	BreakerStatuses []int         `live:"" default:"502,503,504" type:"status" group:"traffic" help:"Statuses of a backend that count as its failure."`

	AmbiguousPaths string   `live:"" default:"refuse" enum:"refuse,pass,normalize" group:"traffic" help:"Paths that a backend may read in another way: refuse (400), pass (as they came) or normalize (routed and sent as they are read)."`
	AllowMethods   []string `live:"" type:"methods" placeholder:"METHOD" group:"traffic" help:"Pass on CONNECT or TRACE, which are refused with 405 otherwise."`

	UpstreamCA       Authorities `placeholder:"FILE" group:"traffic" help:"PEM file of the certificate authorities for https backends, instead of the system's."`
	UpstreamInsecure Switch      `default:"off" group:"traffic" help:"Do not verify https backends. For trials only."`
	Via              Switch      `live:"" default:"on" negatable:"" group:"traffic" help:"Add Via to what is passed on, so that loops are found."`

	AccessLog       string  `default:"off" type:"access-log" placeholder:"FILE" group:"logs" help:"Write a line for each request to stdout or a file; or off. SIGUSR1 opens the file anew."`
	AccessLogFormat string  `default:"json" enum:"json,combined" group:"logs" help:"How a line looks: json, or combined as Apache and nginx write it."`
	AccessLogSample Portion `default:"100%" group:"logs" help:"Of the requests, those that are logged, such as 1%; statuses from 500 and responses that broke off always are."`
	RequestID       Switch  `default:"off" group:"logs" help:"Give each request an X-Request-Id, for the backend and on the response; one from --trusted-proxies is kept."`
	OTLPEndpoint    string  `type:"otlp" placeholder:"URL" group:"logs" help:"Send traces to this OpenTelemetry collector, such as http://127.0.0.1:4318."`
	OTLPProtocol    string  `default:"http" enum:"http,grpc" group:"logs" help:"How it is spoken to: http or grpc."`
	TraceSample     Portion `live:"" default:"1%" group:"logs" help:"Of the requests, those that are traced, unless one of --trusted-proxies has decided."`

	ClientFirstByteTimeout time.Duration `live:"" default:"30s" min:"0s" group:"limits" help:"A new connection that sends nothing is closed."`
	ClientHeadTimeout      time.Duration `live:"" default:"10s" min:"0s" group:"limits" help:"From the first byte of a request head to its end."`
	ClientIdleTimeout      time.Duration `live:"" default:"75s" min:"0s" group:"limits" help:"A kept-alive connection between requests."`
	ClientBodyTimeout      time.Duration `live:"" default:"30s" min:"0s" group:"limits" help:"A client that sends no byte of its request body."`
	ClientWriteTimeout     time.Duration `live:"" default:"60s" min:"0s" group:"limits" help:"A client that takes no byte of its response."`
	ClientMinUpload        int64         `live:"" default:"0" type:"size" placeholder:"SIZE" group:"limits" help:"Bytes a second that a client must send of a request body, over the time that it is waited for."`
	ClientMinDownload      int64         `live:"" default:"0" type:"size" placeholder:"SIZE" group:"limits" help:"Bytes a second that a client must take of a response, over the time that it is waited for."`
	AbortOnFin             Switch        `live:"" default:"on" negatable:"" group:"limits" help:"A client that ends its stream behind its request is taken for gone after 1s; off waits on."`
	RequestTimeout         time.Duration `live:"" default:"30s" min:"0s" also:"REQUEST_TIMEOUT" group:"limits" help:"From the last byte of a request to the head of its response, all attempts together."`
	ConnectTimeout         time.Duration `live:"" default:"2s" min:"0s" group:"limits" help:"For one connection to one address."`
	ResponseIdleTimeout    time.Duration `live:"" default:"5m" min:"0s" group:"limits" help:"A backend that sends no byte in the middle of a response."`
	TunnelIdleTimeout      time.Duration `live:"" default:"1h" min:"0s" group:"limits" help:"How long nothing may move on an upgraded connection."`
	UpstreamIdleTimeout    time.Duration `default:"4s" min:"0s" group:"limits" help:"How long a connection to a backend is kept without a request."`
	TotalTimeout           time.Duration `live:"" default:"0s" min:"0s" group:"limits" help:"From the end of a request head to the end of the response."`
	MaxBody                int64         `live:"" default:"0" type:"size" placeholder:"SIZE" group:"limits" help:"Bytes of a request body."`
	MaxHead                int           `live:"" default:"32KiB" type:"size" max:"1MiB" placeholder:"SIZE" group:"limits" help:"Start line and fields of a request (431) or a response (502); 0 for 1MiB."`
	MaxFields              int           `live:"" default:"200" min:"0" group:"limits" help:"Field lines of a request (431) or a response (502)."`
	MaxRequestLine         int           `live:"" default:"16KiB" type:"size" placeholder:"SIZE" group:"limits" help:"The first line of a request (414)."`

	MaxConnections          Share         `live:"" default:"90%" group:"limits" help:"Connections of clients at once: a number, or a percentage of the descriptors that the process may open."`
	MaxConnectionsPerClient int           `live:"" default:"0" min:"0" group:"limits" help:"Connections of one client address at once, but for trusted proxies."`
	MaxInFlightPerInstance  int           `live:"" default:"0" min:"0" group:"limits" help:"Requests at one instance at once."`
	MaxInFlightPerService   int           `live:"" default:"0" min:"0" group:"limits" help:"Requests of one service at once."`
	QueueTimeout            time.Duration `live:"" default:"1s" min:"0s" group:"limits" help:"How long a request may wait for a place below the limits of requests; 0s is not at all."`
	MetricsMaxSeries        int           `default:"100000" min:"0" group:"limits" help:"Series of services and instances in /metrics."`

	File     string    `kong:"-"` // that was read; empty: none
	Services []Service `kong:"-"` // of it
}

// Service is what a file says of one service.
type Service struct {
	Name      string
	Instances []registry.Instance // that the file holds
	Settings  proxy.Service
}

// ServiceSettings is what the file sets for services, by name.
func (g *Gateway) ServiceSettings() map[string]proxy.Service {
	all := map[string]proxy.Service{}
	for _, s := range g.Services {
		all[s.Name] = s.Settings
	}
	return all
}

// Pinned are the instances that the file holds.
func (g *Gateway) Pinned() []registry.Pinned {
	var all []registry.Pinned
	for _, s := range g.Services {
		for _, in := range s.Instances {
			all = append(all, registry.Pinned{Service: s.Name, Instance: in})
		}
	}
	return all
}

// BeforeResolve reads the file.
func (g *Gateway) BeforeResolve(ctx *kong.Context, sources *Sources) error { return sources.read(ctx) }

// AfterApply takes over what only a file can say, and checks what no single flag can know.
func (g *Gateway) AfterApply(sources *Sources) error {
	if f := sources.file; f != nil {
		if len(g.Route) == 0 {
			g.Route, f.routesCount = f.routes, true
		}
		g.File, g.Services = f.name, f.services
	}
	if err := g.checkListeners(); err != nil {
		return err
	}
	if g.API == APIAdmin && g.Admin == Off {
		return errors.New("--api=admin with --admin=off would leave the API nowhere: give --admin an address")
	}
	switch {
	case (g.AdminCert == "") != (g.AdminKey == ""):
		return errors.New("--admin-cert and --admin-key belong together: give both or none")
	case g.AdminClientCA != "" && g.AdminCert == "":
		return errors.New("--admin-client-ca asks for certificates by TLS: give --admin-cert and --admin-key too")
	case g.AdminCert != "" && g.Admin == Off:
		return errors.New("--admin-cert with --admin=off has nothing to secure: give --admin an address, or drop it")
	case g.AdminClientCA != "" && !g.API.OnAdmin():
		return errors.New("--admin-client-ca is about the API on --admin, which --api=data does not serve there: drop one of them")
	}
	if g.UpstreamCA.Pool != nil && g.UpstreamInsecure {
		return errors.New("--upstream-ca and --upstream-insecure exclude each other: drop one of them")
	}
	if slices.ContainsFunc(g.Route, isAll) && slices.ContainsFunc(g.Route, isFirstSegment) {
		return fmt.Errorf("--route: beside / nothing is left for %s: drop one of them", proxy.FirstSegmentRule)
	}
	if g.API.OnData() {
		if err := g.checkNames(sources); err != nil {
			return err
		}
	}
	if err := proxy.CheckRoutes(g.Route); err != nil {
		return sources.At(err)
	}
	policy := registry.AddrPolicy{Allow: g.AddrAllow, Deny: g.AddrDeny, Own: g.own()}
	return sources.At(registry.CheckPinned(registry.Config{Addrs: policy}, g.Pinned()))
}

// checkListeners refuses one address for both listeners.
func (g *Gateway) checkListeners() error {
	if g.Admin == Off {
		return nil
	}
	host, port := splitAddr(g.Listen)
	adminHost, adminPort := splitAddr(g.Admin)
	if port == 0 || port != adminPort {
		return nil
	}
	any := func(host string) bool {
		ip, err := netip.ParseAddr(host)
		return host == "" || err == nil && ip.IsUnspecified()
	}
	if host == adminHost || any(host) || any(adminHost) {
		return fmt.Errorf("--listen %s and --admin %s are the same address: give one of them another port", g.Listen, g.Admin)
	}
	return nil
}

// own are the addresses of the listeners as far as they are known before these are opened: not those with port 0, nor with names
// other than localhost.
func (g *Gateway) own() []netip.AddrPort {
	own := []netip.AddrPort{}
	for _, addr := range []string{g.Listen, g.Admin} {
		host, port := splitAddr(addr)
		switch host {
		case "":
			host = "::"
		case "localhost":
			host = "127.0.0.1"
		}
		if ip, err := netip.ParseAddr(host); err == nil && port != 0 {
			own = append(own, netip.AddrPortFrom(ip.Unmap(), port))
		}
	}
	return own
}

// splitAddr splits what parseListen has judged. The port of off is 0.
func splitAddr(addr string) (host string, port uint16) {
	host, digits, err := net.SplitHostPort(addr)
	if err != nil {
		return addr, 0
	}
	n, _ := strconv.ParseUint(digits, 10, 16)
	return host, uint16(n)
}

// checkNames refuses what the API on --listen has the names of.
func (g *Gateway) checkNames(sources *Sources) error {
	const why = "which the API answers on --listen: choose another, or --api=admin"
	if registry.Serves(g.HealthPath) {
		return fmt.Errorf("--health-path: %q is a path %s", g.HealthPath, why)
	}
	for _, s := range g.Services {
		if slices.Contains(registry.ServedNames(), s.Name) {
			return sources.atService(s.Name, fmt.Errorf("services: %q cannot be a service: its name is that of a path %s", s.Name, why))
		}
	}
	for i, route := range g.Route {
		if registry.Serves(strings.TrimSuffix(route.Prefix, "/")) {
			return sources.atRoute(i, "prefix", fmt.Errorf("--route: %q is a prefix of paths %s", route.Prefix, why))
		}
		if registry.Serves(route.Path) {
			return sources.atRoute(i, "path", fmt.Errorf("--route: %q is a path %s", route.Path, why))
		}
		if slices.Contains(registry.ServedNames(), route.Service) {
			return sources.atRoute(i, "service", fmt.Errorf("--route: %q cannot be a service: its name is that of a path %s", route.Service, why))
		}
	}
	return nil
}
