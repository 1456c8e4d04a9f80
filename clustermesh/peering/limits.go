package peering

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
)

// What anybody who reaches the port can make this node spend. Connections beyond are closed at once, so that a few
// that are held open don't keep peers waiting.
const (
	maxConnections           = 128
	maxConnectionsPerAddress = 16
	maxStreams               = 16 // of a connection
	maxMessage               = 256 << 10
	// firstRequest bounds the TLS handshake and the first request together.
	firstRequest = 5 * time.Second
	idleAfter    = 2 * time.Minute
	// maxAge ends connections that are kept busy by a request that never ends.
	maxAge       = 10 * time.Minute
	maxVerifying = 2
	// maxFailures of tokens in a minute, for each address.
	maxFailures     = 8
	failuresWithin  = time.Minute
	maxFailedSource = 1024 // addresses that are remembered
)

func serverLimits(first *firstRequests) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ConnectionTimeout(firstRequest),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(8 << 10),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: idleAfter, MaxConnectionAge: maxAge, MaxConnectionAgeGrace: 30 * time.Second, Time: 30 * time.Second, Timeout: 10 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			first.came(ctx)
			return handle(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			return handle(srv, &firstMessage{stream, first})
		}),
	}
}

// firstRequests closes connections that no complete request has come over in time.
type firstRequests struct {
	mu      sync.Mutex
	waiting map[string]*time.Timer // by the remote address
}

func newFirstRequests() *firstRequests { return &firstRequests{waiting: map[string]*time.Timer{}} }

func (f *firstRequests) expect(conn net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting[conn.RemoteAddr().String()] = time.AfterFunc(firstRequest, func() { conn.Close() })
}

func (f *firstRequests) forget(remote string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if timer := f.waiting[remote]; timer != nil {
		timer.Stop()
		delete(f.waiting, remote)
	}
}

// came says that a complete request has come over the connection of ctx.
func (f *firstRequests) came(ctx context.Context) {
	if from, ok := peer.FromContext(ctx); ok {
		f.forget(from.Addr.String())
	}
}

// firstMessage is a stream whose request counts when it has been read, not when it has begun.
type firstMessage struct {
	grpc.ServerStream
	first *firstRequests
}

func (m *firstMessage) RecvMsg(message any) error {
	err := m.ServerStream.RecvMsg(message)
	if err == nil {
		m.first.came(m.Context())
	}
	return err
}

// limitedListener closes connections that are too many. netutil.LimitListener would leave them waiting, and does not look at who opens them.
type limitedListener struct {
	net.Listener
	first *firstRequests
	mu    sync.Mutex
	total int
	by    map[netip.Prefix]int
}

func limitListener(l net.Listener, first *firstRequests) *limitedListener {
	return &limitedListener{Listener: l, first: first, by: map[netip.Prefix]int{}}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source := sourceOf(conn.RemoteAddr())
		if !l.take(source) {
			conn.Close()
			continue
		}
		limited := &limitedConn{Conn: conn, release: sync.OnceFunc(func() {
			l.first.forget(conn.RemoteAddr().String())
			l.give(source)
		})}
		l.first.expect(limited)
		return limited, nil
	}
}

func (l *limitedListener) take(source netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConnections || l.by[source] >= maxConnectionsPerAddress {
		return false
	}
	l.total++
	l.by[source]++
	return true
}

func (l *limitedListener) give(source netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.by[source]--; l.by[source] == 0 {
		delete(l.by, source)
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// sourceOf is what limits count by: an IPv4 address, or the /64 that a single machine has of IPv6.
func sourceOf(remote net.Addr) netip.Prefix {
	from, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return netip.Prefix{} // all those together
	}
	address := from.Addr().Unmap().WithZone("")
	bits := 32
	if address.Is6() {
		bits = 64
	}
	prefix, _ := address.Prefix(bits) // the length is valid
	return prefix
}

// attempts counts the tokens of each source that were refused lately.
type attempts struct {
	mu     sync.Mutex
	failed map[netip.Prefix][]time.Time
}

var errTooMany = errors.New("too many tokens were refused that came from this address: wait a minute")

// allowed returns errTooMany for a source that has failed too often.
func (a *attempts) allowed(source netip.Prefix, now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.recent(source, now)) >= maxFailures {
		return errTooMany
	}
	return nil
}

func (a *attempts) fail(source netip.Prefix, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.failed == nil || len(a.failed) >= maxFailedSource {
		a.failed = map[netip.Prefix][]time.Time{} // who has that many addresses is not stopped by counting them
	}
	a.failed[source] = append(a.recent(source, now), now)
}

// recent forgets what is long ago, and returns the rest. The caller holds mu.
func (a *attempts) recent(source netip.Prefix, now time.Time) []time.Time {
	times := a.failed[source]
	for len(times) > 0 && now.Sub(times[0]) > failuresWithin {
		times = times[1:]
	}
	if len(times) == 0 {
		delete(a.failed, source)
	}
	return times
}
