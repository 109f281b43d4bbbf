package metrics

import (
	"math"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"kerberos/proxy"
)

// service sends the metrics of a service.
func (c *collector) service(s *proxy.ServiceStats, out chan<- prometheus.Metric) {
	name := pairs("service", s.Name)
	send := func(m *metric, value float64) { out <- &sample{m, name, value} }
	for _, n := range s.Requests {
		out <- &sample{requests, with(name, "outcome", n.What), float64(n.Times)}
	}
	send(received, float64(s.Received))
	send(sent, float64(s.Sent))
	out <- &distribution{whole, name, &s.Whole}
	out <- &distribution{own, name, &s.Gateway}
	out <- &distribution{backend, name, &s.Backend}
	send(retries, float64(s.Retries))
	send(retriesDenied, float64(s.RetriesDenied))
	send(retryBudget, s.RetryBudget)
	send(queue, float64(s.Waiting))
	send(queueRefused, float64(s.QueueRefused))
	for _, n := range s.States {
		out <- &sample{instances, with(name, "state", n.What), float64(n.Times)}
	}
	send(stale, float64(s.Stale))
}

// instances sends the metrics of a service's instances.
func (c *collector) instances(s *proxy.ServiceStats, out chan<- prometheus.Metric) {
	for u := range s.Upstreams() {
		names := pairs("id", u.ID, "service", s.Name)
		send := func(m *metric, value float64) { out <- &sample{m, names, value} }
		for _, n := range u.Requests {
			out <- &sample{instanceRequests, with(names, "outcome", n.What), float64(n.Times)}
		}
		send(inFlight, float64(u.InFlight))
		send(tunnels, float64(u.Tunnels))
		send(instanceReady, flag(u.Ready))
		for _, b := range u.Breaker {
			labels := with(names, "state", b.State)
			out <- &sample{breaker, labels, flag(b.Now)}
			out <- &sample{breakerChanges, labels, float64(b.Changes)}
		}
		send(pool, float64(u.Connections))
		send(pooled, float64(u.Connected))
	}
}

// pairs are labels, sorted by name.
func pairs(namesAndValues ...string) []*dto.LabelPair {
	labels := make([]*dto.LabelPair, len(namesAndValues)/2)
	for i := range labels {
		labels[i] = &dto.LabelPair{Name: &namesAndValues[2*i], Value: &namesAndValues[2*i+1]}
	}
	return labels
}

// with adds a label where it belongs.
func with(labels []*dto.LabelPair, name, value string) []*dto.LabelPair {
	all := make([]*dto.LabelPair, 0, len(labels)+1)
	added := &dto.LabelPair{Name: &name, Value: &value}
	for _, label := range labels {
		if added != nil && *label.Name > name {
			all, added = append(all, added), nil
		}
		all = append(all, label)
	}
	if added != nil {
		all = append(all, added)
	}
	return all
}

func flag(on bool) float64 {
	if on {
		return 1
	}
	return 0
}

// sample is the value of a counter or a gauge.
type sample struct {
	*metric
	labels []*dto.LabelPair
	value  float64
}

// Desc makes sample a prometheus.Metric, as Write does. Its labels are used for several: client_golang's own metrics would
// take them apart and put them together for each.
func (s *sample) Desc() *prometheus.Desc { return s.desc }

func (s *sample) Write(out *dto.Metric) error {
	out.Label = s.labels
	if s.kind == dto.MetricType_COUNTER {
		out.Counter = &dto.Counter{Value: &s.value}
	} else {
		out.Gauge = &dto.Gauge{Value: &s.value}
	}
	return nil
}

// distribution is the value of a histogram.
type distribution struct {
	*metric
	labels []*dto.LabelPair
	value  *proxy.Histogram
}

// Desc makes distribution a prometheus.Metric, as Write does: client_golang's constant histograms are either classic or
// native, and these are both.
func (d *distribution) Desc() *prometheus.Desc { return d.desc }

func (d *distribution) Write(out *dto.Metric) error {
	v := d.value
	count, sum, under := v.Under, v.Sum.Seconds(), v.Under
	schema, threshold := int32(proxy.HistogramSchema), math.Exp2(proxy.HistogramUnder)
	h := &dto.Histogram{SampleSum: &sum, Schema: &schema, ZeroThreshold: &threshold, ZeroCount: &under}

	// Classic: how many there are up to each bound.
	bounds := d.bounds
	classic := func(index int) {
		for len(bounds) > 0 && bounds[0] < index {
			upTo, bound := count, math.Exp2(float64(bounds[0])/(1<<proxy.HistogramSchema))
			h.Bucket = append(h.Bucket, &dto.Bucket{CumulativeCount: &upTo, UpperBound: &bound})
			bounds = bounds[1:]
		}
	}
	// Native: spans of buckets that are not empty, each bucket as its difference from the one before.
	next, before := 0, int64(0)
	for i, n := range v.Counts {
		index := v.First + i
		classic(index)
		count += n
		if n == 0 {
			continue
		}
		if len(h.PositiveSpan) == 0 || index > next {
			offset, length := int32(index-next), uint32(0)
			h.PositiveSpan = append(h.PositiveSpan, &dto.BucketSpan{Offset: &offset, Length: &length})
		}
		*h.PositiveSpan[len(h.PositiveSpan)-1].Length++
		h.PositiveDelta = append(h.PositiveDelta, int64(n)-before)
		next, before = index+1, int64(n)
	}
	classic(math.MaxInt)
	h.SampleCount = &count
	if len(h.PositiveSpan) == 0 { // else nobody could tell it from a classic one
		none := uint32(0)
		h.PositiveSpan = []*dto.BucketSpan{{Offset: new(int32), Length: &none}}
	}
	out.Label, out.Histogram = d.labels, h
	return nil
}
