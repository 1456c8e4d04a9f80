package peering

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"

	"causeway/identity/pki"
)

// Introductions: who joins a cluster joins its peers too. The cluster that both are connected with gets a token of the one and hands
// it to the other, over connections that are proven on both sides.

// connectPeersOf joins the peers of a cluster that has just been joined.
func (s *Service) connectPeersOf(ctx context.Context, c *connect, lock *connectLock) error {
	if c.isolated {
		return nil
	}
	var failed []string
	var errs []error
	for _, k := range c.issuer.peers {
		name := k.info.Name
		if here, already := c.own.peer(name); !k.introduced || name == s.Self.Cluster || already && !here.replaceable {
			continue
		}
		err := lock.refresh(ctx)
		if err == nil {
			err = s.connectIntroduced(ctx, c, name)
		}
		if err != nil {
			c.report(Event{Stage: StageUndo, Peer: name, Text: plain(err.Error())})
			failed = append(failed, name)
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("connected with %s, but not with %w; try again with a token of %s: clustermesh connect", c.peer.Name(), errors.Join(errs...), strings.Join(failed, " and of "))
	}
	return nil
}

func (s *Service) connectIntroduced(ctx context.Context, by *connect, name string) error {
	var text string
	err := s.call(ctx, by.peer, func(l *link) error {
		ctx, cancel := context.WithTimeout(ctx, joinTimeout)
		defer cancel()
		answer, err := l.Introduce(ctx, &IntroduceRequest{To: name})
		text = answer.GetToken()
		return err
	})
	if err != nil {
		return err
	}
	t, err := ParseToken(text)
	if err != nil {
		return fmt.Errorf("the token that cluster %s has got: %w", by.peer.Name(), err)
	}
	if t.Cluster != name {
		return fmt.Errorf("cluster %s has got a token of cluster %s instead", by.peer.Name(), t.Cluster)
	}
	c := &connect{s: s, token: t, report: by.report, began: by.began}
	return c.run(ctx)
}

// Introduce gets the caller a token of another peer.
func (v *server) Introduce(ctx context.Context, req *IntroduceRequest) (*IntroduceResponse, error) {
	caller, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkClusterName(req.GetTo()); err != nil {
		return nil, refuse(codes.InvalidArgument, Refusal_UNKNOWN, "%s", err)
	}
	to, found, err := v.record(ctx, req.GetTo())
	if err != nil {
		return nil, v.ownStoreFailed(err)
	}
	if !found || to.Name() == caller.Name() || to.State != Connected || to.Isolated || caller.State != Connected || caller.Isolated {
		return nil, refuse(codes.FailedPrecondition, Refusal_UNKNOWN, "cluster %s is not one that it can introduce", req.GetTo())
	}
	text, err := v.invitation(ctx, to.Peer, caller.Name())
	if err != nil {
		return nil, refuse(codes.FailedPrecondition, Refusal_UNKNOWN, "it has no token of cluster %s: %s", to.Name(), err)
	}
	return &IntroduceResponse{Token: text}, nil
}

// invitation asks a peer for a token for another one, and refuses a token that is not the peer's own.
func (s *Service) invitation(ctx context.Context, to Peer, cluster string) (text string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err = s.ask(ctx, to, func(l *link) error {
		answer, err := l.Invite(ctx, &InviteRequest{Cluster: cluster})
		text = answer.GetToken()
		return err
	})
	if err != nil {
		return "", err
	}
	t, err := ParseToken(text)
	if err != nil {
		return "", err
	}
	authority, err := pki.ParseCert([]byte(to.Authority))
	if err != nil {
		return "", err
	}
	if t.Cluster != to.Name() || t.Authority != pki.FingerprintOf(authority) {
		return "", fmt.Errorf("its token is of cluster %s, or of another authority", t.Cluster)
	}
	return text, nil
}

// Invite makes a token for a cluster that a peer introduces.
func (v *server) Invite(ctx context.Context, req *InviteRequest) (*InviteResponse, error) {
	caller, err := v.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkClusterName(req.GetCluster()); err != nil {
		return nil, refuse(codes.InvalidArgument, Refusal_UNKNOWN, "%s", err)
	}
	if caller.State != Connected || caller.Isolated || req.GetCluster() == v.Self.Cluster || req.GetCluster() == caller.Name() {
		return nil, refuse(codes.FailedPrecondition, Refusal_UNKNOWN, "it does not let cluster %s introduce cluster %s", caller.Name(), req.GetCluster())
	}
	t, err := v.makeToken(ctx, TokenOptions{TTL: introductionTTL}, req.GetCluster())
	if err != nil {
		return nil, v.ownStoreFailed(err)
	}
	v.Log.Info("A peer introduces a cluster", "peer", caller.Name(), "cluster", req.GetCluster(), "token", t)
	return &InviteResponse{Token: t.String()}, nil
}
