package kvstore

import (
	"context"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// streams knows the streams (watches, keepalives) that a gRPC server serves, and whose they are. It ends all when the server is to stop, since
// a graceful stop would wait for them, which last for as long as their clients, until it times out after 5 s. And it ends those of a
// user whose rights were taken: etcd asks for the right to watch only when a watch begins.
type streams struct {
	ctx context.Context
	end context.CancelFunc

	mu     sync.Mutex
	byUser map[string]map[*openStream]bool
	// holders returns the users that have a role; nil until the server has started.
	holders func(role string) []string
}

// openStream is a stream that is being served.
type openStream struct {
	grpc.ServerStream
	ctx context.Context
	cut context.CancelCauseFunc
}

// Context implements grpc.ServerStream.
func (s *openStream) Context() context.Context { return s.ctx }

// errRevoked is what a client is told whose stream was ended.
var errRevoked = status.Error(codes.PermissionDenied, "etcdserver: permission denied: the rights of the certificate's user have changed")

// errRightsChanged is what a client is told that may still have its rights: it comes again, and is let in or not.
var errRightsChanged = status.Error(codes.Unavailable, "etcdserver: rights of users have changed at another member: try again")

func newStreams() *streams {
	ctx, end := context.WithCancel(context.Background())
	return &streams{ctx: ctx, end: end, byUser: make(map[string]map[*openStream]bool)}
}

// stream serves a stream until it ends or is ended. It is known before etcd looks at the user's rights, so none is missed whose rights are taken meanwhile.
func (s *streams) stream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cut := context.WithCancelCause(stream.Context())
	defer cut(nil)
	defer context.AfterFunc(s.ctx, func() { cut(nil) })()
	open := &openStream{ServerStream: stream, ctx: ctx, cut: cut}
	user := callerOf(ctx).user
	s.add(user, open)
	defer s.remove(user, open)
	err := handler(srv, open)
	if cause := context.Cause(ctx); cause == errRevoked || cause == errRightsChanged {
		return cause
	}
	return err
}

// call serves a request, and ends the streams of whoever has lost rights by it.
func (s *streams) call(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	users, all := s.losers(req)
	resp, err := handler(ctx, req)
	if err == nil {
		s.revoke(users, all, errRevoked)
	}
	return resp, err
}

// losers returns the users that may lose rights by a request; with all it is everybody.
func (s *streams) losers(req any) (users []string, all bool) {
	switch r := req.(type) {
	case *pb.AuthUserDeleteRequest:
		return []string{r.GetName()}, false
	case *pb.AuthUserRevokeRoleRequest:
		return []string{r.GetName()}, false
	case *pb.AuthRoleDeleteRequest:
		return s.having(r.GetRole())
	case *pb.AuthRoleRevokePermissionRequest:
		return s.having(r.GetRole())
	case *pb.AuthRoleGrantPermissionRequest: // it may replace a permission by a lesser one
		return s.having(r.GetName())
	case *pb.AuthEnableRequest:
		return nil, true
	}
	return nil, false
}

func (s *streams) having(role string) (users []string, all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holders == nil {
		return nil, true
	}
	return s.holders(role), false
}

func (s *streams) setHolders(holders func(role string) []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holders = holders
}

// revoke ends the streams of these users, or of all, who are told why.
func (s *streams) revoke(users []string, all bool, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if all {
		users = nil
		for user := range s.byUser {
			users = append(users, user)
		}
	}
	for _, user := range users {
		for open := range s.byUser[user] {
			open.cut(why)
		}
	}
}

func (s *streams) add(user string, open *openStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byUser[user] == nil {
		s.byUser[user] = make(map[*openStream]bool)
	}
	s.byUser[user][open] = true
}

func (s *streams) remove(user string, open *openStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byUser[user], open)
	if len(s.byUser[user]) == 0 {
		delete(s.byUser, user)
	}
}
