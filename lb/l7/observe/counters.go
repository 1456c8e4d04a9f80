package observe

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

const (
	// maxCodes bounds the status codes that are told apart, of one cluster and protocol: a backend could make up 500.
	maxCodes = 40
	// maxStatus is the first number that is no HTTP status; it counts "other".
	maxStatus = 600
	// grpcCodes are those there are, 0 to 16; the one behind counts "other".
	grpcCodes = 17
	// maxReasons bounds the reasons of the proxy's own answers.
	maxReasons = 32
)

// portCounters is what is kept of a port.
type portCounters struct {
	of       *balance.Port
	requests atomic.Int64 // under way
	tcp      atomic.Int64
	clusters sync.Map // name → *clusterCounters
	reasons  sync.Map // reason → *atomic.Uint64
	known    atomic.Int32
}

// clusterCounters is what is kept of a port's requests to one cluster; that named "" is of those which went to none.
type clusterCounters struct {
	codes            [4]atomic.Pointer[codes] // by protocol
	took             histogram
	retries, in, out atomic.Uint64
}

// codes counts answers.
type codes struct {
	known atomic.Int32
	http  [maxStatus + 1]atomic.Uint64
	grpc  [grpcCodes + 1]atomic.Uint64
}

// backendCounters is what is kept of an endpoint.
type backendCounters struct {
	requests, failures atomic.Uint64
	cluster            atomic.Pointer[namedCluster]
}

type namedCluster struct {
	name string
	port *portCounters
	*clusterCounters
}

func (p *portCounters) underWay(protocol exchange.Protocol) *atomic.Int64 {
	if protocol == exchange.TCP {
		return &p.tcp
	}
	return &p.requests
}

func newBackendCounters() any { return &backendCounters{} }

func backend(e *balance.Endpoint) *backendCounters {
	return e.Keep(balance.KeepCounts, newBackendCounters).(*backendCounters)
}

func (p *portCounters) cluster(name string) *clusterCounters {
	if c, ok := p.clusters.Load(name); ok {
		return c.(*clusterCounters)
	}
	c, _ := p.clusters.LoadOrStore(name, &clusterCounters{})
	return c.(*clusterCounters)
}

// clusterOf finds the counters of a backend's cluster where they were left at the last request.
func (p *portCounters) clusterOf(e *balance.Endpoint, b *backendCounters) *clusterCounters {
	name := e.Target().Cluster
	if c := b.cluster.Load(); c != nil && c.port == p && c.name == name {
		return c.clusterCounters
	}
	c := p.cluster(name)
	b.cluster.Store(&namedCluster{name, p, c})
	return c
}

func (p *portCounters) count(r *exchange.Record) {
	var c *clusterCounters
	if r.Endpoint != nil {
		b := backend(r.Endpoint)
		b.requests.Add(1)
		if failed(r) {
			b.failures.Add(1)
		}
		c = p.clusterOf(r.Endpoint, b)
	} else {
		c = p.cluster("")
	}
	c.ofProtocol(r.Protocol).count(r)
	if r.Protocol != exchange.TCP { // How long a connection lasts says nothing of its server.
		c.took.add(r)
	}
	if r.Retries > 0 {
		c.retries.Add(uint64(r.Retries))
	}
	c.in.Add(uint64(r.In))
	c.out.Add(uint64(r.Out))
	if r.Local != "" {
		p.reason(r.Local).Add(1)
	}
}

// failed by the backend, as far as one sees that by the answer.
func failed(r *exchange.Record) bool {
	return r.Protocol != exchange.TCP && (r.Status == 0 || r.Status >= 500 || r.GRPC == 14)
}

func (p *portCounters) reason(name string) *atomic.Uint64 {
	if c, ok := p.reasons.Load(name); ok {
		return c.(*atomic.Uint64)
	}
	if p.known.Add(1) > maxReasons {
		name = "other"
	}
	c, _ := p.reasons.LoadOrStore(name, &atomic.Uint64{})
	return c.(*atomic.Uint64)
}

func (c *clusterCounters) ofProtocol(protocol exchange.Protocol) *codes {
	at := &c.codes[protocol]
	if there := at.Load(); there != nil {
		return there
	}
	at.CompareAndSwap(nil, &codes{})
	return at.Load()
}

func (c *codes) count(r *exchange.Record) {
	if r.Protocol == exchange.GRPC && r.GRPC >= 0 {
		c.grpc[min(r.GRPC, grpcCodes)].Add(1)
		return
	}
	status := r.Status
	if status < 0 || status >= maxStatus {
		status = maxStatus
	}
	if c.http[status].Load() == 0 && c.known.Add(1) > maxCodes {
		status = maxStatus
	}
	c.http[status].Add(1)
}

// each counter that is not 0, by its name: see state.PortStats.Codes.
func (c *codes) each(do func(code string, n uint64)) {
	for status := range c.http {
		if n := c.http[status].Load(); n > 0 {
			do(codeName(status), n)
		}
	}
	for code := range c.grpc {
		n := c.grpc[code].Load()
		switch {
		case n == 0:
		case code == 0:
			do("200", n)
		case code == grpcCodes:
			do("grpc:other", n)
		default:
			do(fmt.Sprintf("grpc:%d", code), n)
		}
	}
}

func codeName(status int) string {
	switch status {
	case 0:
		return "cut"
	case maxStatus:
		return "other"
	}
	return fmt.Sprint(status)
}

// buckets of latencies: four for each doubling of a microsecond, so that a quantile is right within 19 %. The last one is without end.
const buckets = 4 * 28

// histogram counts latencies.
type histogram struct {
	counts    [buckets]atomic.Uint64
	sum       atomic.Int64 // nanoseconds
	exemplars [buckets / 4]atomic.Pointer[exemplar]
}

// exemplar is one request of those in a doubling.
type exemplar struct {
	trace string
	took  time.Duration
	at    time.Time
}

// bucket of a latency. Those below 4 µs are in the first ones.
func bucket(took time.Duration) int {
	us := uint64(max(took, 0) / time.Microsecond)
	if us < 4 {
		return int(us)
	}
	n := bits.Len64(us)
	return min((n-2)*4+int(us>>(n-3)&3), buckets-1)
}

// bound is a bucket's upper end, in microseconds.
func bound(bucket int) float64 {
	if bucket < 4 {
		return float64(bucket + 1)
	}
	return float64(uint64(5+bucket%4) << (bucket/4 - 1))
}

func (h *histogram) add(r *exchange.Record) {
	b := bucket(r.Took)
	h.counts[b].Add(1)
	h.sum.Add(int64(r.Took))
	if trace, sampled := traceID(r.TraceParent); sampled {
		// One a second of each is enough, and spares allocations.
		if old := h.exemplars[b/4].Load(); old == nil || r.Began.Sub(old.at) > time.Second {
			h.exemplars[b/4].Store(&exemplar{string(trace), r.Took, r.Began})
		}
	}
}

// quantile of all that h has counted, in milliseconds.
func quantile(counts *[buckets]uint64, q float64) float64 {
	var all uint64
	for _, n := range counts {
		all += n
	}
	if all == 0 {
		return 0
	}
	rank, seen := uint64(q*float64(all)), uint64(0)
	for b, n := range counts {
		if seen += n; seen > rank {
			return bound(b) / 1000
		}
	}
	return bound(buckets-1) / 1000
}

// Stats of a port.
func (o *Observer) Stats(p *balance.Port) state.PortStats {
	c := o.port(p)
	s := state.PortStats{InFlight: int(c.requests.Load()), Codes: map[string]uint64{}, Clusters: map[string]uint64{}, Local: map[string]uint64{}}
	var took [buckets]uint64
	c.clusters.Range(func(name, value any) bool {
		cluster := value.(*clusterCounters)
		for protocol := range cluster.codes {
			codes := cluster.codes[protocol].Load()
			if codes == nil {
				continue
			}
			codes.each(func(code string, n uint64) {
				if exchange.Protocol(protocol) == exchange.TCP {
					s.TCP += n
					return
				}
				s.Requests += n
				s.Codes[code] += n
				if name != "" {
					s.Clusters[name.(string)] += n
				}
			})
		}
		for b := range took {
			n := cluster.took.counts[b].Load()
			took[b] += n
			s.Sample += int(n)
		}
		s.Retries += cluster.retries.Load()
		s.In += cluster.in.Load()
		s.Out += cluster.out.Load()
		return true
	})
	c.reasons.Range(func(name, n any) bool {
		s.Local[name.(string)] = n.(*atomic.Uint64).Load()
		return true
	})
	s.P50MS, s.P99MS = quantile(&took, 0.5), quantile(&took, 0.99)
	return s
}

// Backend tells how many requests an endpoint has ended, and how many of them in vain.
func (o *Observer) Backend(e *balance.Endpoint) (requests, failures uint64) {
	b := backend(e)
	return b.requests.Load(), b.failures.Load()
}
