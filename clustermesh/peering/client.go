package peering

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"causeway/identity"
)

const (
	// askTimeout bounds a question to a peer.
	askTimeout = 3 * time.Second
	// stagger is how long an endpoint gets before the next one is tried beside it.
	stagger = 100 * time.Millisecond
	// maxVerify bounds a round of checks that a peer is asked for.
	maxVerify = time.Minute
)

// link is a connection to a node of another cluster.
type link struct {
	PeeringClient
	conn    *grpc.ClientConn
	secured net.Conn
	cluster string
}

// over speaks gRPC over a connection that is secured already. There is no other: when it ends, requests fail.
func over(secured *tls.Conn, cluster string) (*link, error) {
	var once sync.Once
	conn, err := grpc.NewClient("passthrough:///"+secured.RemoteAddr().String(),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			taken := net.Conn(nil)
			once.Do(func() { taken = secured })
			if taken == nil {
				return nil, errors.New("the connection has ended")
			}
			return taken, nil
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is there already: the caller has checked who it is
		grpc.WithAuthority(serverName(cluster)), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		secured.Close()
		return nil, fmt.Errorf("peering with cluster %s: %w", cluster, err)
	}
	return &link{PeeringClient: NewPeeringClient(conn), conn: conn, secured: secured, cluster: cluster}, nil
}

func (l *link) Close() {
	l.conn.Close()
	l.secured.Close() // it never became gRPC's if nothing was asked
}

// inOneLine joins errors as one sentence has them.
func inOneLine(errs []error) error {
	all := errs[0]
	for _, err := range errs[1:] {
		all = fmt.Errorf("%w; %w", all, err)
	}
	return all
}

// reach opens a connection to the first endpoint that answers as who it should be. One that hangs costs no more than stagger.
func (s *Service) reach(ctx context.Context, who pinned, endpoints []string) (*link, error) {
	if len(endpoints) == 0 {
		return nil, fmt.Errorf("no endpoint of cluster %s is known", who.cluster)
	}
	ctx, cancel := context.WithCancel(ctx)
	var tries sync.WaitGroup
	defer tries.Wait()
	defer cancel()
	type result struct {
		conn *tls.Conn
		err  error
	}
	results := make(chan result, len(endpoints))
	next := 0
	try := func() {
		endpoint := endpoints[next]
		next++
		tries.Go(func() {
			conn, err := s.dialTLS(ctx, who, endpoint)
			results <- result{conn, err}
		})
	}
	try()
	var failed []error
	timer := time.NewTicker(stagger)
	defer timer.Stop()
	for {
		select {
		case r := <-results:
			if r.err == nil {
				defer func() { // of those that came second
					cancel()
					tries.Wait()
					for len(results) > 0 {
						if late := <-results; late.conn != nil {
							late.conn.Close()
						}
					}
				}()
				return over(r.conn, who.cluster)
			}
			if failed = append(failed, r.err); len(failed) == len(endpoints) {
				return nil, fmt.Errorf("cluster %s cannot be reached: %w", who.cluster, inOneLine(failed))
			}
			if next < len(endpoints) {
				try()
			}
		case <-timer.C:
			if next < len(endpoints) {
				try()
			}
		}
	}
}

func (s *Service) dialTLS(ctx context.Context, who pinned, endpoint string) (*tls.Conn, error) {
	conn, err := s.dialer(ctx, "tcp", endpoint)
	if err != nil {
		return nil, err
	}
	secured := tls.Client(conn, who.tls(endpoint, s.Now))
	if err := secured.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", endpoint, err)
	}
	return secured, nil
}

// endpointsOf a peer: those of the record first, then where else it has been seen.
func (s *Service) endpointsOf(p Peer) []string {
	endpoints := slices.Clone(p.Endpoints)
	if s.Known != nil {
		for _, e := range s.Known(p.Name()) {
			if !slices.Contains(endpoints, e) && checkEndpoint(e) == nil {
				endpoints = append(endpoints, e)
			}
		}
	}
	return endpoints[:min(len(endpoints), 2*maxEndpoints)]
}

// call asks a peer something, with the certificate of its record.
func (s *Service) call(ctx context.Context, p Peer, ask func(*link) error) error {
	who, err := pinOf(p)
	if err != nil {
		return err
	}
	if end := who.cert.Leaf.NotAfter; s.Now().After(end) {
		// The peer would only end the connection.
		return fmt.Errorf("this cluster's certificate at cluster %s has expired at %s: connect anew with a token of %s", p.Name(), stamp(end), p.Name())
	}
	l, err := s.reach(ctx, who, s.endpointsOf(p))
	if err != nil {
		return err
	}
	defer l.Close()
	return fromPeer(p.Name(), ask(l))
}

// ask is call, and believes a peer that says it has disconnected this cluster.
func (s *Service) ask(ctx context.Context, p Peer, ask func(*link) error) error {
	err := s.call(ctx, p, ask)
	if errors.Is(err, ErrLeft) {
		s.peerLeft(ctx, p)
	}
	return err
}

// peerLeft takes the rights of a peer that has disconnected this cluster. If that fails, whoever asks next does it.
func (s *Service) peerLeft(ctx context.Context, p Peer) {
	now, found, err := s.record(ctx, p.Name())
	if err != nil || !found || now.State == Left || now.User != p.User {
		return // it is of another connection by now
	}
	if err := s.left(ctx, now); err != nil {
		s.Log.Warn("A peer has disconnected this cluster, but could not be marked so", "cluster", p.Name(), "error", err)
	}
}

// Ask asks a peer how it sees the link. ErrLeft says that the peer has disconnected this cluster.
func (s *Service) Ask(ctx context.Context, peer Peer) (report Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err = s.ask(ctx, peer, func(l *link) error {
		r, err := l.Report(ctx, &ReportRequest{})
		if err != nil {
			return err
		}
		report = Report{
			At: time.UnixMilli(r.GetAt()).UTC(), Node: identity.NodeName{Cluster: peer.Name(), Node: plain(r.GetNode())},
			RTT: max(0, time.Duration(r.GetRtt())), Last: max(0, time.Duration(r.GetLast())), Loss: min(100, max(0, r.GetLoss())),
			MTU: int(min(1<<16, max(0, r.GetMtu()))), State: State(plain(r.GetState())),
		}
		for _, problem := range r.GetProblems()[:min(len(r.GetProblems()), 16)] {
			report.Problems = append(report.Problems, plain(problem))
		}
		return nil
	})
	return report, err
}

// AskChecks has a peer make every check toward this cluster once, and passes on what it reports.
func (s *Service) AskChecks(ctx context.Context, peer Peer, report func(Check)) error {
	return s.ask(ctx, peer, func(l *link) error { return s.remoteVerify(ctx, l, false, report) })
}

// remoteVerify has the other side make its checks. With wait it goes on until all are well or ctx is about to end.
func (s *Service) remoteVerify(ctx context.Context, l *link, wait bool, report func(Check)) error {
	req := &VerifyRequest{Wait: wait}
	if deadline, ok := ctx.Deadline(); ok {
		req.Timeout = max(1, (time.Until(deadline) - time.Second/2).Milliseconds()) // so that it can say what it has found
	}
	stream, err := l.Verify(ctx, req)
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return fmt.Errorf("cluster %s ended its checks without a result", l.cluster)
		case err != nil:
			return err
		case event.GetCheck() != nil:
			report(event.GetCheck().check(l.cluster, s.Self.Cluster))
		case event.GetFailure() != "":
			return fmt.Errorf("as seen from cluster %s: %s", l.cluster, plain(event.GetFailure()))
		default:
			return nil
		}
	}
}
