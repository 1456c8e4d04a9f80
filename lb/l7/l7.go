// Package l7 is the L7 proxy of a node: a process of its own that balances requests, where L4 balances connections. It is told what to do by
// the node's agent, and outlives it.
package l7

import (
	"context"
	"log/slog"
	"net"
	"time"

	"causeway/lb/l7/exchange"
)

// Config of a proxy.
type Config struct {
	// Listeners are handed to it, open. Which service a connection is to says the connection's own address. Run closes them.
	Listeners []net.Listener
	// Agent is the unix socket of the local API that the desired state is read from. Or else File has it: lines of JSON, as the agent would send.
	Agent string
	File  string
	// Standalone opens listeners on each frontend's own address and port, where there is no agent that hands listeners on.
	Standalone bool
	// Admin is the unix socket that it answers at: see admin.go. Empty: at none.
	Admin  string
	Limits exchange.Limits
	// DrainTime bounds how long connections may go on after POST /v1/drain, StopTime how long after ctx has ended (SIGTERM). 0 is the default of each.
	DrainTime, StopTime time.Duration
	// AccessLog is how many of all requests are logged, in percent.
	AccessLog float64
	// OTLP is the collector that spans are sent to, by gRPC: "http://HOST:PORT", "https://…", or HOST:PORT without TLS. Empty: there are no spans.
	OTLP string
	// TracePercent of the requests that come without a traceparent get a span; of those with one its flag decides.
	TracePercent float64
	// Version is that of the program, for ProxyStatus.
	Version string
	Log     *slog.Logger
}

const (
	// DefaultDrainTime is long, for streams that go on: the next proxy serves meanwhile.
	DefaultDrainTime = time.Hour
	// DefaultStopTime is what Kubernetes gives a pod, too.
	DefaultStopTime = 30 * time.Second
)

func (cfg *Config) defaults() {
	if cfg.DrainTime == 0 {
		cfg.DrainTime = DefaultDrainTime
	}
	if cfg.StopTime == 0 {
		cfg.StopTime = DefaultStopTime
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
}

// Run is the proxy, until ctx ends (it drains then, for as long as StopTime) or it is told to drain (for as long as DrainTime). Its error says what kept it from starting.
func Run(ctx context.Context, cfg Config) error {
	cfg.defaults()
	p, err := newProxy(cfg)
	if err != nil {
		return err
	}
	return p.run(ctx)
}
