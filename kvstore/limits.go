package kvstore

import (
	"context"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	// maxCalls is how many requests and streams a connection may have at a time, whoever it is of.
	maxCalls = 512
	// limitedCalls is the same for a limited user, and limitedWatches how many watches of etcd one of its streams may have begun. An agent needs
	// one stream with a watch or two, and a few requests.
	limitedCalls   = 32
	limitedWatches = 64
	// limitedKey bounds a key that a limited user asks for, in bytes; Causeway's have 700 at most.
	limitedKey = 2048
)

// limits keeps users that may only read from everything else that etcd offers, such as leases, which need no right at all and would cost memory.
type limits struct {
	limited func(user string) bool

	mu    sync.Mutex
	calls map[string]int // of limited users, by connection
}

func newLimits(limited func(user string) bool) *limits {
	return &limits{limited: limited, calls: make(map[string]int)}
}

// caller says who calls.
type caller struct {
	user       string // the common name of its certificate
	connection string
}

func callerOf(ctx context.Context) (c caller) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return c
	}
	c.connection = p.Addr.String()
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
		c.user = info.State.VerifiedChains[0][0].Subject.CommonName
	}
	return c
}

// call serves a request if the caller may make it.
func (l *limits) call(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	c := callerOf(ctx)
	if !l.limits(c.user) {
		return handler(ctx, req)
	}
	if info.FullMethod != pb.KV_Range_FullMethodName {
		return nil, notFor(c.user, info.FullMethod)
	}
	if r, ok := req.(*pb.RangeRequest); !ok || len(r.GetKey()) > limitedKey || len(r.GetRangeEnd()) > limitedKey {
		return nil, keyTooLong()
	}
	if err := l.enter(c); err != nil {
		return nil, err
	}
	defer l.leave(c)
	return handler(ctx, req)
}

// stream serves a stream if the caller may have it.
func (l *limits) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	c := callerOf(stream.Context())
	if !l.limits(c.user) {
		return handler(srv, stream)
	}
	if info.FullMethod != pb.Watch_Watch_FullMethodName {
		return notFor(c.user, info.FullMethod)
	}
	if err := l.enter(c); err != nil {
		return err
	}
	defer l.leave(c)
	return handler(srv, &limitedStream{ServerStream: stream})
}

func (l *limits) limits(user string) bool { return l.limited != nil && l.limited(user) }

func (l *limits) enter(c caller) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls[c.connection] >= limitedCalls {
		return status.Errorf(codes.ResourceExhausted, "the user %q may make %d requests at a time on one connection: wait for some to end", c.user, limitedCalls)
	}
	l.calls[c.connection]++
	return nil
}

func (l *limits) leave(c caller) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls[c.connection]--; l.calls[c.connection] == 0 {
		delete(l.calls, c.connection)
	}
}

// limitedStream is a limited user's stream of watches.
type limitedStream struct {
	grpc.ServerStream
	watches int
}

// RecvMsg takes the user's next message, if it may send that.
func (s *limitedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	r, ok := m.(*pb.WatchRequest)
	if !ok {
		return nil
	}
	create := r.GetCreateRequest()
	if create == nil {
		return nil
	}
	if len(create.GetKey()) > limitedKey || len(create.GetRangeEnd()) > limitedKey {
		return keyTooLong()
	}
	if s.watches++; s.watches > limitedWatches {
		return status.Errorf(codes.ResourceExhausted, "%d watches were begun on one stream, which is what this user may: begin another stream", limitedWatches)
	}
	return nil
}

func notFor(user, method string) error {
	return status.Errorf(codes.PermissionDenied, "etcdserver: permission denied: the user %q may read and watch, and not call %s", user, method)
}

func keyTooLong() error {
	return status.Errorf(codes.InvalidArgument, "the key has more than %d bytes, which no key has that this user may read", limitedKey)
}
