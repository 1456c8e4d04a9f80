package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// proxyMetricsTimeout bounds the question for a proxy's metrics: one that does not answer costs its own metrics, and not the agent's.
const proxyMetricsTimeout = 500 * time.Millisecond

// metrics are those of all proxies of the node, as if they were one.
func (p *proxies) metrics() []*dto.MetricFamily {
	families := map[string]*dto.MetricFamily{}
	for _, proc := range p.snapshot().all() {
		got, err := proc.admin.metrics()
		if err != nil {
			p.log.Debug("a proxy's metrics can't be had", "pid", proc.pid, "error", err)
			continue
		}
		for _, f := range got {
			if known := families[f.GetName()]; known != nil {
				addMetrics(known, f)
			} else {
				families[f.GetName()] = f
			}
		}
	}
	var all []*dto.MetricFamily
	for _, f := range families {
		all = append(all, f)
	}
	return all
}

func (a proxyAdmin) metrics() (families []*dto.MetricFamily, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), proxyMetricsTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://proxy/metrics", http.NoBody)
	if err != nil {
		return nil, err
	}
	format := expfmt.NewFormat(expfmt.TypeProtoDelim) // which keeps exemplars
	req.Header.Set("Accept", string(format))
	resp, err := a.client().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the proxy answers %s", resp.Status)
	}
	for decoder := expfmt.NewDecoder(resp.Body, expfmt.ResponseFormat(resp.Header)); ; {
		f := new(dto.MetricFamily)
		switch err := decoder.Decode(f); {
		case errors.Is(err, io.EOF):
			return families, nil
		case err != nil:
			return nil, err
		}
		families = append(families, f)
	}
}

// addMetrics adds what another proxy says to what one says.
func addMetrics(to, from *dto.MetricFamily) {
	byLabels := map[string]*dto.Metric{}
	for _, m := range to.Metric {
		byLabels[labelsOf(m)] = m
	}
	for _, m := range from.Metric {
		known := byLabels[labelsOf(m)]
		if known == nil {
			to.Metric = append(to.Metric, m)
			continue
		}
		if c := known.Counter; c != nil && m.Counter != nil {
			*c.Value += m.Counter.GetValue()
		}
		if g := known.Gauge; g != nil && m.Gauge != nil {
			*g.Value += m.Gauge.GetValue()
		}
		if h := known.Histogram; h != nil && m.Histogram != nil {
			addHistogram(h, m.Histogram)
		}
	}
}

// addHistogram adds one of the same buckets.
func addHistogram(to, from *dto.Histogram) {
	if len(to.Bucket) != len(from.Bucket) || to.SampleCount == nil || to.SampleSum == nil {
		return
	}
	*to.SampleCount += from.GetSampleCount()
	*to.SampleSum += from.GetSampleSum()
	for i, b := range to.Bucket {
		if b.CumulativeCount != nil {
			*b.CumulativeCount += from.Bucket[i].GetCumulativeCount()
		}
	}
}

func labelsOf(m *dto.Metric) string {
	var labels []string
	for _, l := range m.Label {
		labels = append(labels, l.GetName()+"\x00"+l.GetValue())
	}
	slices.Sort(labels)
	return strings.Join(labels, "\x01")
}
