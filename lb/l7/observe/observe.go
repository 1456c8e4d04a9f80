// Package observe counts and shows what the engines of the L7 proxy did: metrics, statistics, the access log, tap, and spans.
//
// Counters are atomics, found once for each connection and backend: a request takes no lock and allocates nothing unless it is logged, tapped or traced.
package observe

import (
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

// Config of an Observer.
type Config struct {
	Log *slog.Logger
	// AccessLog is how many of all requests are logged, in percent.
	AccessLog float64
	// OTLP is the collector of spans: a URL, or HOST:PORT without TLS; empty: there are none. TracePercent are traced of those without a parent.
	OTLP         string
	TracePercent float64
	Version      string
}

// Observer implements exchange.Observer.
type Observer struct {
	cfg     Config
	unknown atomic.Uint64
	tracing *tracing // nil: there are no spans

	mu    sync.RWMutex
	ports map[*balance.Port]*portCounters

	tapMu sync.Mutex
	taps  atomic.Pointer[[]*Tap] // nil: none
}

var _ exchange.Observer = (*Observer)(nil)

// New returns an observer; its user owes it a Close.
func New(cfg Config) (*Observer, error) {
	o := &Observer{cfg: cfg, ports: map[*balance.Port]*portCounters{}}
	if cfg.OTLP != "" {
		var err error
		if o.tracing, err = newTracing(cfg); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// Close sends what spans are left, for a few seconds at most.
func (o *Observer) Close() {
	if o.tracing != nil {
		o.tracing.close()
	}
}

// Port returns what is kept of a port, for exchange.Client.Observed. What is kept of ports that are gone is dropped by Keep.
func (o *Observer) Port(p *balance.Port) any { return o.port(p) }

func (o *Observer) port(p *balance.Port) *portCounters {
	o.mu.RLock()
	c := o.ports[p]
	o.mu.RUnlock()
	if c != nil {
		return c
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if c = o.ports[p]; c == nil {
		c = &portCounters{of: p}
		o.ports[p] = c
	}
	return c
}

func (o *Observer) of(client *exchange.Client) *portCounters {
	if c, ok := client.Observed.(*portCounters); ok {
		return c
	}
	return o.port(client.Port)
}

// Unknown counts a connection to an address that no service has.
func (o *Observer) Unknown() { o.unknown.Add(1) }

// Begin counts what is under way.
func (o *Observer) Begin(client *exchange.Client, protocol exchange.Protocol) {
	o.of(client).underWay(protocol).Add(1)
}

// End counts what was, and shows it to who wants to see it.
func (o *Observer) End(r *exchange.Record) {
	port := o.of(r.Client)
	port.underWay(r.Protocol).Add(-1)
	port.count(r)
	if o.cfg.AccessLog > 0 && rand.Float64()*100 < o.cfg.AccessLog {
		o.log(r)
	}
	if taps := o.taps.Load(); taps != nil {
		show(*taps, r)
	}
	if o.tracing != nil {
		o.tracing.span(r)
	}
}

// InFlight is the number of requests under way.
func (o *Observer) InFlight() (n int) {
	for _, p := range o.livePorts() {
		n += int(p.requests.Load())
	}
	return n
}

// livePorts drops what is kept of ports that are gone, and returns the others.
func (o *Observer) livePorts() (list []*portCounters) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for p, c := range o.ports {
		select {
		case <-p.Gone():
			delete(o.ports, p)
		default:
			list = append(list, c)
		}
	}
	return list
}
