// Package l7 is the L7 proxy of a node: a process of its own that balances requests, where L4 balances connections. It is told what to do by
// the node's agent, and outlives it.
package l7

import (
	"context"
	"log/slog"
	"net"

	"causeway/lb/l7/exchange"
)

// Config of a proxy.
type Config struct {
	// Listeners are handed to it, open. Which service a connection is to says the connection's own address.
	Listeners []net.Listener
	// Agent is the unix socket of the local API that the desired state is read from. Or else File has it: lines of JSON, as the agent would send.
	Agent string
	File  string
	// Admin is the unix socket that it answers at: see admin.go.
	Admin  string
	Limits exchange.Limits
	Log    *slog.Logger
}

// Run is the proxy, until ctx ends (it drains then, for as long as DrainTime) or it is told to drain.
func Run(ctx context.Context, cfg Config) error {
	<-ctx.Done()
	return nil
}
