// Package metrics makes what the gateway counts readable for Prometheus. It counts nothing itself: what the proxy and the
// registry hold is read when somebody asks.
package metrics

import (
	"cmp"
	"log/slog"
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
	serviceSeries  = 70
	instanceSeries = 20
)

// Config is what metrics are read from.
type Config struct {
	Proxy     *proxy.Proxy
	Registry  *registry.Registry
	Ready     func() bool
	MaxSeries int // of services and instances; less than 1 is no limit
	Log       *slog.Logger
}

// Handler answers scrapes: in the text format, OpenMetrics or protobuf, which alone has native histograms.
func Handler(cfg Config) fasthttp.RequestHandler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
		&collector{cfg},
	)
	return fasthttp.CompressHandlerLevel(fasthttpadaptor.NewFastHTTPHandler(promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(cfg.Log.Handler(), slog.LevelError),
		MaxRequestsInFlight: maxScrapes,
		EnableOpenMetrics:   true,
		DisableCompression:  true, // its own takes longer than all the rest
	})), fasthttp.CompressBestSpeed)
}

// collector reads a gateway.
type collector struct{ cfg Config }

// metric is one that the gateway has.
type metric struct {
	desc   *prometheus.Desc
	kind   dto.MetricType
	bounds []int // of the classic buckets of a histogram, as indices of native ones
}

func newMetric(kind dto.MetricType, name, help string, labels ...string) *metric {
	return &metric{desc: prometheus.NewDesc("kerberos_"+name, help, labels, nil), kind: kind}
}

func counter(name, help string, labels ...string) *metric {
	return newMetric(dto.MetricType_COUNTER, name, help, labels...)
}

func gauge(name, help string, labels ...string) *metric {
	return newMetric(dto.MetricType_GAUGE, name, help, labels...)
}

// histogram has the classic buckets that end at these powers of two seconds, so that they too are exact.
func histogram(name, help string, powers ...int) *metric {
	m := newMetric(dto.MetricType_HISTOGRAM, name, help, "service")
	for _, power := range powers {
		m.bounds = append(m.bounds, power<<proxy.HistogramSchema)
	}
	return m
}

// The metrics of the gateway.
var (
	ready       = gauge("ready", "Whether /readyz says so.")
	unrouted    = counter("unrouted_requests_total", "Requests that ended without a service: calls of the API, and those that were refused before they had one.", "outcome")
	refusals    = counter("refusals_total", "Answers of the gateway's own, by their status and the error type in Proxy-Status.", "status", "error")
	connections = gauge("client_connections", "Open connections of clients.")
	accepted    = counter("client_connections_accepted_total", "Connections of clients that were let in.")
	surplus     = counter("client_connections_refused_total", "Connections of clients that were refused, by the limit: of all connections, or of one client.", "limit")
	socketless  = counter("socket_shortages_total", "How often the system had no socket for the gateway: to accept a client, to connect to an instance.", "when")
	services    = gauge("services", "Services that are known.")
	leases      = gauge("leases", "Leases that are held.")
	holds       = gauge("holds", "Connections that keep instances registered.")
	expired     = counter("expired_instances_total", "Instances that left without a word: their lease ended, or the connection that held them.")
	omitted     = gauge("metrics_omitted", "Services and instances that have no metrics because of --metrics-max-series.", "what")
)

// The metrics of a service.
var (
	requests      = counter("requests_total", "Requests that have ended, by the class of the status that an instance or (refused_) the gateway answered with, cut if the answer broke off, gone if the client had left.", "service", "outcome")
	received      = counter("received_bytes_total", "Heads and bodies of requests, and what came through tunnels, from clients.", "service")
	sent          = counter("sent_bytes_total", "Heads and bodies of responses, and what went through tunnels, to clients.", "service")
	whole         = histogram("request_duration_seconds", "From the end of a request's head to the end of its response.", -12, -10, -8, -6, -5, -4, -3, -2, 0, 2, 4)
	own           = histogram("gateway_duration_seconds", "What the gateway itself took of a request, the queue included: not the pace of clients and instances.", -16, -15, -14, -13, -12, -11, -10, -8, -6, -4, 0)
	backend       = histogram("backend_duration_seconds", "From the first attempt of a request to the head of the answer, which comes with a small body.", -12, -10, -8, -6, -5, -4, -3, -2, 0, 2, 4)
	retries       = counter("retries_total", "Attempts beyond the first of a request.", "service")
	retriesDenied = counter("retries_denied_total", "Attempts beyond the first that the retry budget did not allow.", "service")
	retryBudget   = gauge("retry_budget", "Attempts beyond the first that the retry budget would allow now.", "service")
	queue         = gauge("queue_requests", "Requests that wait for a place below the limits of requests in flight.", "service")
	queueRefused  = counter("queue_refused_total", "Requests that found no place below these limits, at once or in time.", "service")
	instances     = gauge("instances", "Instances, by what they are: ready for requests, or why not.", "service", "state")
	stale         = gauge("stale_instances", "Instances that fell silent along with too many others to be believed: they stay while they accept connections.", "service")
)

// The metrics of an instance.
var (
	instanceRequests = counter("instance_requests_total", "Attempts that have ended, by what they say of the instance; ignored is nobody's or the client's fault.", "service", "id", "outcome")
	inFlight         = gauge("instance_requests_in_flight", "Requests at the instance now.", "service", "id")
	tunnels          = gauge("instance_tunnels", "Upgraded connections to the instance.", "service", "id")
	instanceReady    = gauge("instance_ready", "Whether requests may go to the instance.", "service", "id")
	breaker          = gauge("instance_breaker_state", "1 for the state that the instance's breaker is in, 0 for the others.", "service", "id", "state")
	breakerChanges   = counter("instance_breaker_changes_total", "How often the instance's breaker has changed, by the state that it came to.", "service", "id", "state")
	pool             = gauge("instance_connections", "Open connections to the instance, idle or not.", "service", "id")
	pooled           = counter("instance_connections_opened_total", "Connections to the instance that were made.", "service", "id")
)

// all is what a scrape may have.
var all = []*metric{
	ready, unrouted, refusals, connections, accepted, surplus, socketless, services, leases, holds, expired, omitted,
	requests, received, sent, whole, own, backend, retries, retriesDenied, retryBudget, queue, queueRefused, instances, stale,
	instanceRequests, inFlight, tunnels, instanceReady, breaker, breakerChanges, pool, pooled,
}

// Describe makes collector a prometheus.Collector, as Collect does.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range all {
		out <- m.desc
	}
}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	send := func(m *metric, value float64, labels []*dto.LabelPair) { out <- &sample{m, labels, value} }
	gateway := c.cfg.Proxy.Stats()
	send(ready, flag(c.cfg.Ready()), nil)
	for _, n := range gateway.Unrouted {
		send(unrouted, float64(n.Times), pairs("outcome", n.What))
	}
	for _, r := range gateway.Refusals {
		send(refusals, float64(r.Times), pairs("error", r.Error, "status", strconv.Itoa(r.Status)))
	}
	send(connections, float64(gateway.Connections), nil)
	send(accepted, float64(gateway.Accepted), nil)
	for _, n := range gateway.Surplus {
		send(surplus, float64(n.Times), pairs("limit", n.What))
	}
	for _, n := range gateway.Socketless {
		send(socketless, float64(n.Times), pairs("when", n.What))
	}
	registered := c.cfg.Registry.Stats()
	send(leases, float64(registered.Leases), nil)
	send(holds, float64(registered.Holds), nil)
	send(expired, float64(registered.Expired), nil)

	known := slices.SortedFunc(c.cfg.Proxy.Services(), func(a, b proxy.ServiceStats) int { return cmp.Compare(a.Name, b.Name) })
	send(services, float64(len(known)), nil)
	left := c.cfg.MaxSeries
	if left < 1 {
		left = math.MaxInt
	}
	shown := min(len(known), left/serviceSeries)
	left -= shown * serviceSeries
	without := 0
	for i := range known {
		s := &known[i]
		if i < shown {
			c.service(s, out)
		}
		if cost := s.Instances * instanceSeries; i < shown && cost <= left {
			left -= cost
			c.instances(s, out)
		} else {
			without += s.Instances
		}
	}
	send(omitted, float64(len(known)-shown), pairs("what", "services"))
	send(omitted, float64(without), pairs("what", "instances"))
}
