// Package http1 is the HTTP/1.1 engine of the L7 proxy (RFC 9110, RFC 9112).
//
// One goroutine serves a client's connection: it waits without a buffer, reads a request's head where it lies, sends it to a backend over a kept
// connection in one write, and passes the answer on in one write. A second one copies the request's body if that is not there as a whole. It
// is code of its own because a reverse proxy of net/http costs more than twice the CPU that haproxy does; what it takes for HTTP is what net/http does, less
// all that is ambiguous, and its tests compare the two.
package http1

import (
	"context"

	"causeway/lb/l7/exchange"
)

// Serve answers a client's requests one after the other, each by a backend that its port chooses, until the connection or ctx ends. It closes the connection.
func Serve(ctx context.Context, env *exchange.Env, client *exchange.Client) {
	c := &conn{link: newLink(client.Conn), ctx: ctx, env: env, client: client}
	c.step = c.readable
	sweeper := sweeperOf(env)
	sweeper.add(c)
	defer sweeper.remove(c)
	defer context.AfterFunc(ctx, c.cut)()
	c.serve()
}
