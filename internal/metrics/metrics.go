// Package metrics makes what the gateway counts readable for Prometheus. It counts nothing itself: what the proxy and the
// registry hold is read when somebody asks.
package metrics

import (
	"cmp"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/valyala/fasthttp"
	"github.com/valyala/fasthttp/fasthttpadaptor"

	"kerberos/proxy"
	"kerberos/registry"
)

// maxScrapes is how many scrapes are answered at once; more get 503.
const maxScrapes = 4

// What a service and an instance cost of Config.MaxSeries: a little more than they have, so that it stays when they get
// another one.
const (
	serviceSeries  = 80
	instanceSeries = 20
)

// Config is what metrics are read from.
type Config struct {
	Proxy     *proxy.Proxy
	Registry  *registry.Registry
	Ready     func() bool
	Reloads   func() Reloads
	MaxSeries int           // of services and instances; less than 1 is no limit
	Unlogged  func() uint64 // lines that the access log has dropped
	Log       *slog.Logger
}

// Reloads is how often the configuration was read again.
type Reloads struct {
	Done, Failed uint64
	Last         int64 // when it was taken over, in Unix milliseconds; at the start too
	Refused      bool  // the latest attempt has failed
}

// Handler answers scrapes: in the text format, OpenMetrics or protobuf, which alone has native histograms.
func Handler(cfg Config) fasthttp.RequestHandler {
	process := prometheus.NewRegistry()
	process.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
	)
	return fasthttp.CompressHandlerLevel(fasthttpadaptor.NewFastHTTPHandler(promhttp.HandlerFor(&gateway{cfg, process}, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(cfg.Log.Handler(), slog.LevelError),
		MaxRequestsInFlight: maxScrapes,
		EnableOpenMetrics:   true,
		DisableCompression:  true, // its own takes longer than all the rest
	})), fasthttp.CompressBestSpeed)
}

// gateway reads what there is. Its own metrics do not go through a prometheus.Registry, which would look at each for what
// cannot be, and sort them all: half of the time that a scrape takes.
type gateway struct {
	cfg     Config
	process prometheus.Gatherer
}

// metric is one that the gateway has.
type metric struct {
	name, help string
	kind       dto.MetricType
	bounds     []int // of the classic buckets of a histogram, as indices of native ones
}

func counter(name, help string) *metric {
	return &metric{name: "kerberos_" + name, help: help, kind: dto.MetricType_COUNTER}
}

func gauge(name, help string) *metric {
	return &metric{name: "kerberos_" + name, help: help, kind: dto.MetricType_GAUGE}
}

// histogram has the classic buckets that end at these powers of two seconds, so that they too are exact.
func histogram(name, help string, powers ...int) *metric {
	m := &metric{name: "kerberos_" + name, help: help, kind: dto.MetricType_HISTOGRAM}
	for _, power := range powers {
		m.bounds = append(m.bounds, power<<proxy.HistogramSchema)
	}
	return m
}

// The metrics of the gateway.
var (
	ready       = gauge("ready", "Whether /readyz says so.")
	unrouted    = counter("unrouted_requests_total", "Requests that ended without a service: calls of the API, and those that were refused before they had one.")
	refusals    = counter("refusals_total", "Answers of the gateway's own, by their status and the error type in Proxy-Status.")
	connections = gauge("client_connections", "Open connections of clients.")
	accepted    = counter("client_connections_accepted_total", "Connections of clients that were let in.")
	surplus     = counter("client_connections_refused_total", "Connections of clients that were refused, by the limit: of all connections, or of one client.")
	socketless  = counter("socket_shortages_total", "How often the system had no socket for the gateway: to accept a client, to connect to an instance.")
	services    = gauge("services", "Services that are known.")
	leases      = gauge("leases", "Leases that are held.")
	holds       = gauge("holds", "Connections that keep instances registered.")
	expired     = counter("expired_instances_total", "Instances that left without a word: their lease ended, or the connection that held them.")
	unwritten   = counter("registry_write_failures_total", "How often registrations could not be written to --data.")
	reloads     = counter("config_reloads_total", "How often the configuration was read again, by what came of it; a failure has changed nothing.")
	reloaded    = gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was read.")
	inForce     = gauge("config_last_reload_successful", "Whether the latest attempt to read the configuration went well; the start is one.")
	unlogged    = counter("access_log_dropped_lines_total", "Lines of the access log that were dropped because its file or reader did not take them.")
	omitted     = gauge("metrics_omitted", "Services and instances that have no metrics because of --metrics-max-series.")
)

// The metrics of a service.
var (
	requests      = counter("requests_total", "Requests that have ended, by the class of the status that an instance or (refused_) the gateway answered with, cut if the answer broke off, gone if the client had left.")
	received      = counter("received_bytes_total", "Heads and bodies of requests, and what came through tunnels, from clients.")
	sent          = counter("sent_bytes_total", "Heads and bodies of responses, and what went through tunnels, to clients.")
	whole         = histogram("request_duration_seconds", "From the end of a request's head to the end of its response.", -12, -10, -8, -6, -5, -4, -3, -2, 0, 2, 4)
	own           = histogram("gateway_duration_seconds", "What the gateway itself took of a request, the queue included: not the pace of clients and instances.", -16, -15, -14, -13, -12, -11, -10, -8, -6, -4, 0)
	backend       = histogram("backend_duration_seconds", "From the first attempt of a request to the head of the answer, which comes with a small body.", -12, -10, -8, -6, -5, -4, -3, -2, 0, 2, 4)
	retries       = counter("retries_total", "Attempts beyond the first of a request.")
	retriesDenied = counter("retries_denied_total", "Attempts beyond the first that the retry budget did not allow.")
	retryBudget   = gauge("retry_budget", "Attempts beyond the first that the retry budget would allow now.")
	serviceFlight = gauge("requests_in_flight", "Requests at the instances now.")
	queue         = gauge("queue_requests", "Requests that wait for a place below the limits of requests in flight.")
	queueRefused  = counter("queue_refused_total", "Requests that found no place below these limits, at once or in time.")
	instances     = gauge("instances", "Instances, by what they are: ready for requests, or why not.")
	stale         = gauge("stale_instances", "Instances that fell silent along with too many others to be believed: they stay while they accept connections.")
)

// The metrics of an instance.
var (
	instanceRequests = counter("instance_requests_total", "Attempts that have ended, by what they say of the instance; ignored is nobody's or the client's fault.")
	instanceReceived = counter("instance_received_bytes_total", "Heads and bodies of requests that went to the instance, each attempt's, and what went through tunnels to it.")
	instanceSent     = counter("instance_sent_bytes_total", "Heads and bodies of responses that came from the instance, and what came through tunnels from it.")
	instanceRetries  = counter("instance_retries_total", "Attempts at the instance beyond the first of a request: what it got because others had failed. Those are the outcome failure of instance_requests_total.")
	inFlight         = gauge("instance_requests_in_flight", "Requests at the instance now.")
	tunnels          = gauge("instance_tunnels", "Upgraded connections to the instance.")
	instanceReady    = gauge("instance_ready", "Whether requests may go to the instance.")
	healthy          = gauge("instance_healthy", "Whether the instance's health check passes; there is none for one that is not checked.")
	breaker          = gauge("instance_breaker_state", "1 for the state that the instance's breaker is in, 0 for the others.")
	breakerChanges   = counter("instance_breaker_changes_total", "How often the instance's breaker has changed, by the state that it came to.")
	pool             = gauge("instance_connections", "Open connections to the instance, idle or not.")
	pooled           = counter("instance_connections_opened_total", "Connections to the instance that were made.")
)

// Gather makes gateway a prometheus.Gatherer.
func (g *gateway) Gather() ([]*dto.MetricFamily, error) {
	out := families{}
	proxied := g.cfg.Proxy.Stats()
	out.add(ready, flag(g.cfg.Ready()), nil)
	for _, n := range proxied.Unrouted {
		out.add(unrouted, float64(n.Times), pairs("outcome", n.What))
	}
	for _, r := range proxied.Refusals {
		out.add(refusals, float64(r.Times), pairs("status", strconv.Itoa(r.Status), "error", r.Error))
	}
	out.add(connections, float64(proxied.Connections), nil)
	out.add(accepted, float64(proxied.Accepted), nil)
	for _, n := range proxied.Surplus {
		out.add(surplus, float64(n.Times), pairs("limit", n.What))
	}
	for _, n := range proxied.Socketless {
		out.add(socketless, float64(n.Times), pairs("when", n.What))
	}
	registered := g.cfg.Registry.Stats()
	out.add(leases, float64(registered.Leases), nil)
	out.add(holds, float64(registered.Holds), nil)
	out.add(expired, float64(registered.Expired), nil)
	out.add(unwritten, float64(registered.WriteFailures), nil)
	read := g.cfg.Reloads()
	out.add(reloads, float64(read.Done), pairs("outcome", "success"))
	out.add(reloads, float64(read.Failed), pairs("outcome", "failure"))
	out.add(reloaded, float64(read.Last)/1e3, nil)
	out.add(inForce, flag(!read.Refused), nil)
	out.add(unlogged, float64(g.cfg.Unlogged()), nil)
	g.services(out)

	all, err := g.process.Gather()
	all = slices.AppendSeq(all, maps.Values(out))
	slices.SortFunc(all, func(a, b *dto.MetricFamily) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return all, err
}

// services adds the services in the order of their names, and then the instances of those whose instances all have room.
func (g *gateway) services(out families) {
	known := slices.SortedFunc(g.cfg.Proxy.Services(), func(a, b proxy.ServiceStats) int { return cmp.Compare(a.Name, b.Name) })
	out.add(services, float64(len(known)), nil)
	left := g.cfg.MaxSeries
	if left < 1 {
		left = math.MaxInt
	}
	shown := min(len(known), left/serviceSeries)
	left -= shown * serviceSeries
	without := 0
	for i := range known {
		s := &known[i]
		if i < shown {
			out.service(s)
		}
		if cost := s.Instances * instanceSeries; i < shown && cost <= left {
			left -= cost
			out.instances(s)
		} else {
			without += s.Instances
		}
	}
	out.add(omitted, float64(len(known)-shown), pairs("what", "services"))
	out.add(omitted, float64(without), pairs("what", "instances"))
}
