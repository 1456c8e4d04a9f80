package observe

import (
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"causeway/lb/l7/exchange"
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("causeway_l7_"+name, help, labels, nil)
}

var (
	requestsDesc  = desc("requests_total", "Requests that have ended.", "service", "port", "cluster", "protocol", "code")
	inFlightDesc  = desc("in_flight", "Requests under way.", "service", "port")
	durationDesc  = desc("request_duration_seconds", "Time from a request's first byte to its answer's last.", "service", "port", "cluster")
	retriesDesc   = desc("retries_total", "Tries beyond the first.", "service", "port", "cluster")
	ejectionsDesc = desc("ejections_total", "Backends ejected for their failures.", "service", "port", "cluster")
	inDesc        = desc("received_bytes_total", "Bytes of bodies from clients; of TCP all.", "service", "port", "cluster")
	outDesc       = desc("sent_bytes_total", "Bytes of bodies to clients; of TCP all.", "service", "port", "cluster")
	tcpDesc       = desc("tcp_connections_total", "Connections passed on unread that have ended.", "service", "port", "cluster")
	tcpOpenDesc   = desc("tcp_connections", "Connections passed on unread now.", "service", "port")
	localDesc     = desc("local_answers_total", "Answers of the proxy's own, by reason.", "service", "port", "reason")
	unknownDesc   = desc("unknown_frontend_total", "Connections to addresses of no service.")
)

// Describe implements prometheus.Collector.
func (o *Observer) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{requestsDesc, inFlightDesc, durationDesc, retriesDesc, ejectionsDesc, inDesc, outDesc, tcpDesc, tcpOpenDesc, localDesc, unknownDesc} {
		to <- d
	}
}

// Collect implements prometheus.Collector. A port's two families of addresses are one to those who look, so they are added up.
func (o *Observer) Collect(to chan<- prometheus.Metric) {
	to <- prometheus.MustNewConstMetric(unknownDesc, prometheus.CounterValue, float64(o.unknown.Load()))
	s := sums{values: map[sumKey]float64{}, took: map[[3]string]*tookSum{}}
	for _, p := range o.livePorts() {
		s.addPort(p)
	}
	s.send(to)
}

type sumKey struct {
	desc   *prometheus.Desc
	labels string // joined by 0
}

type sums struct {
	values map[sumKey]float64
	took   map[[3]string]*tookSum
}

type tookSum struct {
	counts    [buckets]uint64
	seconds   float64
	exemplars []prometheus.Exemplar
}

func (s *sums) add(d *prometheus.Desc, value float64, labels ...string) {
	s.values[sumKey{d, strings.Join(labels, "\x00")}] += value
}

func (s *sums) addPort(p *portCounters) {
	key := p.of.Key()
	service, port := key.Service.String(), key.Port
	s.add(inFlightDesc, float64(p.requests.Load()), service, port)
	s.add(tcpOpenDesc, float64(p.tcp.Load()), service, port)
	p.reasons.Range(func(reason, n any) bool {
		s.add(localDesc, float64(n.(*atomic.Uint64).Load()), service, port, reason.(string))
		return true
	})
	for _, e := range p.of.Endpoints() {
		s.add(ejectionsDesc, float64(e.Health().Ejections), service, port, e.Target().Cluster)
	}
	p.clusters.Range(func(name, value any) bool {
		s.addCluster(service, port, name.(string), value.(*clusterCounters))
		return true
	})
}

func (s *sums) addCluster(service, port, cluster string, c *clusterCounters) {
	for protocol := range c.codes {
		codes := c.codes[protocol].Load()
		if codes == nil {
			continue
		}
		codes.each(func(code string, n uint64) {
			if p := exchange.Protocol(protocol); p == exchange.TCP {
				s.add(tcpDesc, float64(n), service, port, cluster)
			} else {
				s.add(requestsDesc, float64(n), service, port, cluster, p.String(), code)
			}
		})
	}
	s.add(retriesDesc, float64(c.retries.Load()), service, port, cluster)
	s.add(inDesc, float64(c.in.Load()), service, port, cluster)
	s.add(outDesc, float64(c.out.Load()), service, port, cluster)
	key := [3]string{service, port, cluster}
	took := s.took[key]
	if took == nil {
		took = &tookSum{}
		s.took[key] = took
	}
	took.seconds += float64(c.took.sum.Load()) / 1e9
	for b := range c.took.counts {
		took.counts[b] += c.took.counts[b].Load()
	}
	for i := range c.took.exemplars {
		if x := c.took.exemplars[i].Load(); x != nil {
			took.exemplars = append(took.exemplars, prometheus.Exemplar{Value: x.took.Seconds(), Timestamp: x.at, Labels: prometheus.Labels{"trace_id": x.trace}})
		}
	}
}

// Of the buckets those at a doubling are shown, from 256 µs to 16.8 s.
const firstShown, lastShown = 4*7 - 1, 4*23 - 1

func (s *sums) send(to chan<- prometheus.Metric) {
	for k, v := range s.values {
		kind := prometheus.CounterValue
		if k.desc == inFlightDesc || k.desc == tcpOpenDesc {
			kind = prometheus.GaugeValue
		}
		to <- prometheus.MustNewConstMetric(k.desc, kind, v, strings.Split(k.labels, "\x00")...)
	}
	for labels, took := range s.took {
		shown, all := map[float64]uint64{}, uint64(0)
		for b, n := range took.counts {
			all += n
			if b%4 == 3 && b >= firstShown && b <= lastShown {
				shown[bound(b)/1e6] = all
			}
		}
		m := prometheus.MustNewConstHistogram(durationDesc, all, took.seconds, shown, labels[:]...)
		if len(took.exemplars) > 0 {
			if with, err := prometheus.NewMetricWithExemplars(m, took.exemplars...); err == nil {
				m = with
			}
		}
		to <- m
	}
}
