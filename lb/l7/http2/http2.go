// Package http2 is the HTTP/2 engine of the L7 proxy, which carries gRPC too (RFC 9113, RFC 7541).
//
// Each connection, of a client or to a backend, has one goroutine that reads. It handles all frames that one read brought, puts what follows from them into the output
// buffers of the connections that it concerns, and then writes those without waiting; only what a socket does not take is left to another goroutine.
package http2

import (
	"context"

	"causeway/lb/l7/exchange"
)

// Preface is what a client with prior knowledge of HTTP/2 begins with.
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Serve answers a client's streams, each by a backend that its port chooses, until the connection or ctx ends. It closes the connection.
func Serve(ctx context.Context, env *exchange.Env, x *exchange.Client) {
	defer x.Conn.Close()
	if err := readPreface(env, x); err != nil {
		return
	}
	c := newClient(ctx, env, x)
	sweeping.add(c)
	defer sweeping.remove(c)
	c.greet()
	err := c.run()
	c.ended(err)
}
