package metrics

import (
	"math"
	"slices"

	dto "github.com/prometheus/client_model/go"

	"kerberos/proxy"
)

// families are the metrics of one scrape.
type families map[*metric]*dto.MetricFamily

func (f families) family(m *metric) *dto.MetricFamily {
	if f[m] == nil {
		f[m] = &dto.MetricFamily{Name: &m.name, Help: &m.help, Type: &m.kind}
	}
	return f[m]
}

// add adds the value of a counter or a gauge. The labels may be used for several.
func (f families) add(m *metric, value float64, labels []*dto.LabelPair) {
	family, one := f.family(m), &dto.Metric{Label: labels}
	if m.kind == dto.MetricType_COUNTER {
		one.Counter = &dto.Counter{Value: &value}
	} else {
		one.Gauge = &dto.Gauge{Value: &value}
	}
	family.Metric = append(family.Metric, one)
}

func (f families) addHistogram(m *metric, v *proxy.Histogram, labels []*dto.LabelPair) {
	family := f.family(m)
	family.Metric = append(family.Metric, &dto.Metric{Label: labels, Histogram: m.histogram(v)})
}

// service adds the metrics of a service.
func (f families) service(s *proxy.ServiceStats) {
	name := pairs("service", s.Name)
	for _, n := range s.Requests {
		f.add(requests, float64(n.Times), with(name, "outcome", n.What))
	}
	f.add(received, float64(s.Received), name)
	f.add(sent, float64(s.Sent), name)
	f.addHistogram(whole, &s.Whole, name)
	f.addHistogram(own, &s.Gateway, name)
	f.addHistogram(backend, &s.Backend, name)
	f.add(retries, float64(s.Retries), name)
	f.add(retriesDenied, float64(s.RetriesDenied), name)
	f.add(retryBudget, s.RetryBudget, name)
	f.add(serviceFlight, float64(s.InFlight), name)
	f.add(queue, float64(s.Waiting), name)
	f.add(queueRefused, float64(s.QueueRefused), name)
	for _, n := range s.States {
		f.add(instances, float64(n.Times), with(name, "state", n.What))
	}
	f.add(stale, float64(s.Stale), name)
}

// instances adds the metrics of a service's instances.
func (f families) instances(s *proxy.ServiceStats) {
	for u := range s.Upstreams() {
		names := pairs("service", s.Name, "id", u.ID)
		for _, n := range u.Requests {
			f.add(instanceRequests, float64(n.Times), with(names, "outcome", n.What))
		}
		f.add(instanceReceived, float64(u.Received), names)
		f.add(instanceSent, float64(u.Sent), names)
		f.add(instanceRetries, float64(u.Retries), names)
		f.add(inFlight, float64(u.InFlight), names)
		f.add(tunnels, float64(u.Tunnels), names)
		f.add(instanceReady, flag(u.Ready), names)
		if u.Checked {
			f.add(healthy, flag(u.Healthy), names)
		}
		for _, b := range u.Breaker {
			labels := with(names, "state", b.State)
			f.add(breaker, flag(b.Now), labels)
			f.add(breakerChanges, float64(b.Changes), labels)
		}
		f.add(pool, float64(u.Connections), names)
		f.add(pooled, float64(u.Connected), names)
	}
}

// pairs are labels.
func pairs(namesAndValues ...string) []*dto.LabelPair {
	labels := make([]*dto.LabelPair, len(namesAndValues)/2)
	for i := range labels {
		labels[i] = &dto.LabelPair{Name: &namesAndValues[2*i], Value: &namesAndValues[2*i+1]}
	}
	return labels
}

// with are labels and another one.
func with(labels []*dto.LabelPair, name, value string) []*dto.LabelPair {
	return append(slices.Clip(labels), &dto.LabelPair{Name: &name, Value: &value})
}

func flag(on bool) float64 {
	if on {
		return 1
	}
	return 0
}

// histogram is one both classic and native.
func (m *metric) histogram(v *proxy.Histogram) *dto.Histogram {
	count, sum, under := v.Under, v.Sum.Seconds(), v.Under
	schema, threshold := int32(proxy.HistogramSchema), math.Exp2(proxy.HistogramUnder)
	h := &dto.Histogram{SampleSum: &sum, Schema: &schema, ZeroThreshold: &threshold, ZeroCount: &under}

	// Classic: how many there are up to each bound.
	bounds := m.bounds
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
	return h
}
