// Package standard is the HTTP/2 engine built from golang.org/x/net/http2's server and transport. Nothing but tests uses it: it shows that the engine in the folder
// above, which costs a tenth of its processor time, behaves like the well-known stack.
package standard

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"

	"golang.org/x/net/http2"

	"causeway/lb/l7/exchange"
)

//lint:file-ignore SA1019 net/http serves no single connection, and its client has no hold on one.

// connectionBuffer is what all streams of a client may have unread together, in bytes; one has Limits.Buffer.
const connectionBuffer = 1 << 20

// Serve answers a client's streams, each by a backend that its port chooses, until the connection or ctx ends. It closes the connection.
func Serve(ctx context.Context, env *exchange.Env, client *exchange.Client) {
	conn := &replayed{Conn: client.Conn, read: client.Read}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	base := &http.Server{
		MaxHeaderBytes: env.Limits.HeaderBytes,
		IdleTimeout:    env.Limits.IdleTimeout,
		ErrorLog:       log.New(io.Discard, "", 0), // Clients may say what they like.
	}
	server := &http2.Server{
		MaxConcurrentStreams:         uint32(env.Limits.Streams),
		MaxUploadBufferPerStream:     int32(env.Limits.Buffer),
		MaxUploadBufferPerConnection: connectionBuffer,
		IdleTimeout:                  env.Limits.IdleTimeout,
		WriteByteTimeout:             env.Limits.BodyTimeout,
		PermitProhibitedCipherSuites: true,
	}
	if err := http2.ConfigureServer(base, server); err != nil {
		env.Log.Error("HTTP/2 can't be served", "error", err)
		return
	}
	// The server answers a shutdown with GOAWAY, and ends when its streams have.
	go func() {
		select {
		case <-env.Draining:
		case <-client.Port.Gone():
		case <-ctx.Done():
			return
		}
		_ = base.Shutdown(ctx)
	}()
	server.ServeConn(conn, &http2.ServeConnOpts{
		Context:    ctx,
		BaseConfig: base,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			(&call{env: env, client: client, w: w, r: r}).serve()
		}),
	})
}

// replayed is a connection whose first bytes were read already.
type replayed struct {
	net.Conn
	read []byte
}

func (c *replayed) Read(p []byte) (int, error) {
	if len(c.read) > 0 {
		n := copy(p, c.read)
		c.read = c.read[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
