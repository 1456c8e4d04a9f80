package xds

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"
)

// Bounds of what clients may ask of a server.
const (
	maxRequest = 1 << 20 // bytes of one request, which may list resources by name
	maxStreams = 16      // of one connection; a client needs one
)

// Server tells clients the newest resources, each as it changes. Set is for one goroutine at a time.
type Server struct {
	caches map[resource.Type]*cache.LinearCache
	mux    *cache.MuxCache
	now    Set
}

// NewServer returns a server of nothing.
func NewServer() *Server {
	s := &Server{caches: map[resource.Type]*cache.LinearCache{}, now: Set{}}
	s.mux = &cache.MuxCache{
		Classify:      func(r *cache.Request) string { return r.GetTypeUrl() },
		ClassifyDelta: func(r *cache.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        map[string]cache.Cache{},
	}
	for _, kind := range kinds {
		s.caches[kind] = cache.NewLinearCache(kind)
		s.mux.Caches[kind] = s.caches[kind]
	}
	return s
}

// Set makes a set known: what is the same as before is not sent again. New resources come before those that refer to them, and go after them.
func (s *Server) Set(set Set) error {
	for _, kind := range kinds {
		changed := map[string]types.Resource{}
		for name, r := range set[kind] {
			if old, ok := s.now[kind][name]; !ok || !proto.Equal(old, r) {
				changed[name] = r
			}
		}
		if len(changed) > 0 {
			if err := s.caches[kind].UpdateResources(changed, nil); err != nil {
				return err
			}
		}
	}
	for _, kind := range slices.Backward(kinds) {
		var gone []string
		for name := range s.now[kind] {
			if _, ok := set[kind][name]; !ok {
				gone = append(gone, name)
			}
		}
		if len(gone) > 0 {
			if err := s.caches[kind].UpdateResources(nil, gone); err != nil {
				return err
			}
		}
	}
	s.now = set
	return nil
}

// Serve answers clients at the listener until ctx ends.
func (s *Server) Serve(ctx context.Context, listener net.Listener, config *tls.Config) error {
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.MaxRecvMsgSize(maxRequest), grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, server.NewServer(ctx, s.mux, nil))
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	err := g.Serve(listener)
	if ctx.Err() != nil {
		return nil
	}
	return err
}
