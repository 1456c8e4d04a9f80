// Package http1 is the HTTP/1.1 engine of the L7 proxy (RFC 9110, RFC 9112).
package http1

import (
	"context"

	"causeway/lb/l7/exchange"
)

// Serve answers a client's requests one after the other, each by a backend that its port chooses, until the connection or ctx ends. It closes the connection.
func Serve(ctx context.Context, env *exchange.Env, client *exchange.Client) {
	client.Conn.Close()
}
