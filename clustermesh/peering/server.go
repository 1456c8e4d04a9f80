package peering

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// server is the API as other clusters see it.
type server struct {
	UnimplementedPeeringServer
	*Service
}

// serve serves the API until ctx ends.
func (s *Service) serve(ctx context.Context, listener net.Listener) error {
	first := newFirstRequests()
	secure := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: s.serverTLS})
	g := grpc.NewServer(append(serverLimits(first), grpc.Creds(secure))...)
	RegisterPeeringServer(g, &server{Service: s})
	stop := context.AfterFunc(ctx, g.Stop) // which waits for handlers, whose contexts it ends
	err := g.Serve(limitListener(listener, first))
	if !stop() || err == nil {
		g.Stop() // AfterFunc's may not have ended yet
		return nil
	}
	return fmt.Errorf("serve the peering API at %s: %w", listener.Addr(), err)
}

// remoteAddr returns who has sent the request of ctx.
func remoteAddr(ctx context.Context) net.Addr {
	if from, ok := peer.FromContext(ctx); ok {
		return from.Addr
	}
	return &net.TCPAddr{}
}

// ownStoreFailed is for requests that this cluster cannot answer, whoever asks. What is in the store is not the peer's business.
func (s *Service) ownStoreFailed(err error) error {
	s.Log.Warn("Could not answer a peer", "error", err)
	if errors.Is(err, errNoRing) {
		return refuse(codes.Unavailable, Refusal_UNKNOWN, "%s", errNoRing)
	}
	if errors.Is(err, kvstore.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		return refuse(codes.Unavailable, Refusal_UNKNOWN, "its own store does not answer; try again")
	}
	return refuse(codes.Internal, Refusal_UNKNOWN, "it could not do that; its agent's log has the reason")
}

// stored is a record with its revision, for compare-and-swap.
type stored struct {
	Peer
	revision int64
}

// record returns what is known of a peer; found is false if nothing is.
func (s *Service) record(ctx context.Context, cluster string) (p stored, found bool, err error) {
	entry, err := s.Store.Get(ctx, PeerKey(cluster))
	if errors.Is(err, kvstore.ErrNotFound) {
		return p, false, nil
	}
	if err != nil {
		return p, false, fmt.Errorf("read the record of peer %s: %w", cluster, err)
	}
	p.revision = entry.Revision
	p.Peer, err = DecodePeer(entry.Key, entry.Value)
	return p, err == nil, err
}

// swap writes a record if it is still the one that was read.
func (s *Service) swap(ctx context.Context, p stored) error {
	if err := s.Store.CompareAndSwap(ctx, PeerKey(p.Name()), p.revision, EncodePeer(p.Peer)); err != nil {
		return fmt.Errorf("write the record of peer %s: %w", p.Name(), err)
	}
	return nil
}

// caller returns the record of the peer that a request is from, by the certificate that this cluster's authority has signed for it.
func (v *server) caller(ctx context.Context) (stored, error) {
	from, _ := peer.FromContext(ctx)
	var user string
	if from != nil {
		if info, ok := from.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
			user = info.State.VerifiedChains[0][0].Subject.CommonName
		}
	}
	if user == "" {
		return stored{}, refuse(codes.Unauthenticated, Refusal_UNKNOWN, "the request needs a certificate that cluster %s has signed", v.Self.Cluster)
	}
	left := refuse(codes.PermissionDenied, Refusal_LEFT, "it is not connected with this cluster any more: disconnect it here too, or connect it anew with a token")
	cluster, ok := pki.ClusterOf(user)
	if !ok {
		return stored{}, left
	}
	p, found, err := v.record(ctx, cluster)
	if err != nil {
		return stored{}, v.ownStoreFailed(err)
	}
	if !found && v.Follows != nil && v.Follows(cluster, user) {
		return stored{}, refuse(codes.Unavailable, Refusal_UNKNOWN, "its own store has no record of this cluster at the moment; try again")
	}
	if !found || p.User != user || p.State == Left {
		return stored{}, left
	}
	return p, nil
}

// Confirm makes a joining peer a connected one.
func (v *server) Confirm(ctx context.Context, _ *ConfirmRequest) (*ConfirmResponse, error) {
	p, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := v.connected(ctx, p); err != nil {
		return nil, v.ownStoreFailed(err)
	}
	return &ConfirmResponse{}, nil
}

// connected says in a record that the peer is.
func (s *Service) connected(ctx context.Context, p stored) error {
	if p.State == Connected {
		return nil
	}
	p.State, p.Since = Connected, s.Now()
	if err := s.swap(ctx, p); err != nil {
		return err
	}
	s.Log.Info("Connected", "cluster", p.Name())
	return nil
}

// Verify makes all checks toward the caller.
func (v *server) Verify(req *VerifyRequest, stream grpc.ServerStreamingServer[VerifyEvent]) error {
	p, err := v.caller(stream.Context())
	if err != nil {
		return err
	}
	timeout := time.Duration(min(req.GetTimeout(), maxVerify.Milliseconds())) * time.Millisecond
	if timeout <= 0 {
		timeout = maxVerify
	}
	ctx, cancel := context.WithTimeout(stream.Context(), timeout)
	defer cancel()
	select {
	case v.verifying <- struct{}{}:
		defer func() { <-v.verifying }()
	case <-ctx.Done():
		return refuse(codes.ResourceExhausted, Refusal_UNKNOWN, "it makes checks for others already; try again")
	}
	var sending sync.Mutex // a stream takes one message at a time
	failed := v.Service.Verify(ctx, p.Peer, req.GetWait(), func(c Check) {
		sending.Lock()
		defer sending.Unlock()
		_ = stream.Send(&VerifyEvent{Check: checkMessage(c)}) // if nobody listens, ctx ends
	})
	sending.Lock()
	defer sending.Unlock()
	last := &VerifyEvent{}
	if failed != nil {
		last.Failure = plain(failed.Error())
	}
	return stream.Send(last)
}

// Report says how this node sees the link to the caller.
func (v *server) Report(ctx context.Context, _ *ReportRequest) (*ReportResponse, error) {
	p, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	r := v.Service.Report(p.Name())
	return &ReportResponse{
		At: r.At.UnixMilli(), Cluster: r.Node.Cluster, Node: r.Node.Node, Problems: r.Problems, Rtt: int64(r.RTT), Last: int64(r.Last),
		Loss: r.Loss, Mtu: int64(r.MTU), State: string(p.State),
	}, nil
}

// Renew signs a new certificate for the caller's user.
func (v *server) Renew(ctx context.Context, req *RenewRequest) (*RenewResponse, error) {
	p, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	authority, err := v.Authority(ctx)
	if err != nil {
		return nil, v.ownStoreFailed(err)
	}
	cert, err := authority.Sign(req.GetRequest(), pki.Request{User: p.User}, v.Now())
	if err != nil {
		return nil, refuse(codes.InvalidArgument, Refusal_UNKNOWN, "the request for a certificate is refused: %s", err)
	}
	leaf, err := pki.ParseCert(cert)
	if err != nil {
		return nil, v.ownStoreFailed(err)
	}
	p.UserExpires = leaf.NotAfter
	if err := v.swap(ctx, p); err != nil {
		return nil, v.ownStoreFailed(err)
	}
	return &RenewResponse{Certificate: cert}, nil
}

// Leave revokes the caller's user, and remembers that it has left.
func (v *server) Leave(ctx context.Context, req *LeaveRequest) (*LeaveResponse, error) {
	p, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	if req.GetUndo() {
		p.State = Joining // nothing has to be remembered
	}
	if err := v.left(ctx, p); err != nil {
		return nil, v.ownStoreFailed(err)
	}
	return &LeaveResponse{}, nil
}

// left takes a peer's rights, and says in the record that it has left; one that was never connected is forgotten.
func (s *Service) left(ctx context.Context, p stored) error {
	// First, so that a record which says so is never wrong.
	if err := s.revoke(ctx, p.User); err != nil {
		return err
	}
	s.Log.Info("A peer has left", "cluster", p.Name())
	if p.State == Joining {
		key := PeerKey(p.Name())
		return s.Store.Txn(ctx, []kvstore.Condition{{Key: key, Revision: p.revision}}, []kvstore.Op{{Kind: kvstore.OpDelete, Key: key}})
	}
	p.State, p.Since = Left, s.Now()
	return s.swap(ctx, p)
}

// administer does something in the own store as root.
func (s *Service) administer(ctx context.Context, do func(Administrator) error) error {
	authority, err := s.Authority(ctx)
	if err != nil {
		return err
	}
	access, err := s.Administer(ctx, authority)
	if err != nil {
		return fmt.Errorf("administer the own store: %w", err)
	}
	defer access.Close()
	return do(access)
}

func (s *Service) revoke(ctx context.Context, user string) error {
	return s.administer(ctx, func(a Administrator) error {
		if err := a.Revoke(ctx, user); err != nil {
			return fmt.Errorf("revoke user %s in the own store: %w", user, err)
		}
		return nil
	})
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
