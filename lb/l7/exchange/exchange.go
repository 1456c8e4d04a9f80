// Package exchange is what the engines (HTTP/1, HTTP/2, TCP) and the proxy around them have in common: a client's connection, the way
// to a backend, the limits, and the record of a request.
package exchange

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/state"
)

// Client is a client's connection, on which some bytes may have been read already to see what it speaks.
type Client struct {
	Conn net.Conn // a *net.TCPConn, but for tests
	// Read are the bytes that were read already.
	Read []byte
	// Port that it is to.
	Port *balance.Port
	// Frontend is the service's address that the client has connected to.
	Frontend netip.AddrPort
	// Address is the client's, Pod who that is.
	Address netip.AddrPort
	Pod     state.Client
	// Observed is what the Observer keeps for the connection, so that it need not look it up for each request; nil: nothing yet.
	Observed any
}

// Env is what engines work with.
type Env struct {
	// Dial connects to a backend in the name of a client: by the source address and mark that the state has. It is bounded by ctx and by Limits.ConnectTimeout.
	Dial func(ctx context.Context, e *balance.Endpoint, pod state.Client) (net.Conn, error)
	// Observer gets a record of every request.
	Observer Observer
	Limits   Limits
	// Draining is closed when this proxy is to finish: HTTP/1 connections end with their next answer ("Connection: close"), HTTP/2's with GOAWAY. Engines look
	// also at the Client's Port.Gone. Idle HTTP/1 connections stay until their next request or until the proxy ends, so that no request meets a closed connection.
	Draining <-chan struct{}
	Log      *slog.Logger
}

// Limits that keep one client or backend from harming others. Zero values are no limits; [DefaultLimits] has all.
type Limits struct {
	// HeaderBytes of a request's or answer's head, and HeaderFields in it.
	HeaderBytes  int
	HeaderFields int
	// HeaderTimeout bounds the time from a request's first byte to the end of its head, IdleTimeout a connection without a request,
	// BodyTimeout the time in which not one byte of a body moves in either direction.
	HeaderTimeout, IdleTimeout, BodyTimeout time.Duration
	ConnectTimeout                          time.Duration
	// UpstreamIdle is how long a connection to a backend is kept without a request.
	UpstreamIdle time.Duration
	// Connections of clients in all; further ones wait in the kernel.
	Connections int
	// Streams of one HTTP/2 client at once, and Resets that it may make in a minute beyond as many as were answered.
	Streams int
	Resets  int
	// Buffer is what is held of a body in each direction, in bytes, besides the kernel's.
	Buffer int
}

// DefaultLimits are those of a proxy.
func DefaultLimits() Limits {
	return Limits{
		HeaderBytes: 64 << 10, HeaderFields: 200,
		HeaderTimeout: 15 * time.Second, IdleTimeout: 10 * time.Minute, BodyTimeout: 5 * time.Minute, ConnectTimeout: 2 * time.Second,
		UpstreamIdle: 60 * time.Second,
		Connections:  50_000,
		Streams:      250, Resets: 200,
		Buffer: 64 << 10,
	}
}

// Protocol of a request.
type Protocol uint8

const (
	TCP Protocol = iota
	HTTP1
	HTTP2
	GRPC // HTTP/2 with content-type application/grpc
)

var protocolNames = [...]string{"tcp", "http/1.1", "http/2", "grpc"}

func (p Protocol) String() string { return protocolNames[p] }

// Record of a request that has ended. The bytes are only good during the call.
type Record struct {
	Protocol Protocol
	Client   *Client
	// Endpoint that has answered, or was tried last; nil: none was.
	Endpoint *balance.Endpoint
	// Method, Path (with its query), Host and TraceParent (the W3C header) of the request.
	Method, Path, Host, TraceParent []byte
	// Status that the client was given: of HTTP (0: none, the connection was cut), and of gRPC (-1: none).
	Status int
	GRPC   int
	// Began is when its first byte was there, Took how long it took until its last one was passed on.
	Began time.Time
	Took  time.Duration
	// In and Out are bytes of bodies from and to the client; of TCP all bytes.
	In, Out int64
	// Retries beyond the first try.
	Retries int
	// Local says why the proxy itself has answered or cut the request: a short constant like "no backend"; "" if the backend's answer was passed on.
	Local string
}

// Observer sees requests. It is called on the hot path, from any goroutine.
type Observer interface {
	// Begin is called with a request's head, or a TCP connection's first byte.
	Begin(*Client, Protocol)
	// End is called once for each Begin.
	End(*Record)
}

// Unobserved ignores all.
type Unobserved struct{}

func (Unobserved) Begin(*Client, Protocol) {}
func (Unobserved) End(*Record)             {}
