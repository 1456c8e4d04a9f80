package peering

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// The issuer's part of a connect: Look and Join.

const (
	// probing bounds what an issuer tries before it answers a Look.
	probing = 2 * time.Second
	// undoing bounds taking back what was written, after what it was for has ended.
	undoing = 3 * time.Second
)

// pending holds the keys of requests that this cluster waits for certificates of, in memory only, by the token's ID.
type pending struct {
	mu   sync.Mutex
	keys map[string]pendingKey
}

type pendingKey struct {
	request, key []byte
	expires      time.Time
}

// request returns the request that belongs to a token, and makes it the first time.
func (p *pending) request(t TokenRecord, now time.Time) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, k := range p.keys {
		if now.After(k.expires) {
			delete(p.keys, id)
		}
	}
	if k, ok := p.keys[t.ID]; ok {
		return k.request, nil
	}
	request, key, err := pki.NewRequest()
	if err != nil {
		return nil, err
	}
	if p.keys == nil {
		p.keys = map[string]pendingKey{}
	}
	p.keys[t.ID] = pendingKey{request, key, t.Expires}
	return request, nil
}

func (p *pending) key(id string) (key []byte, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, ok := p.keys[id]
	return k.key, ok
}

func (p *pending) drop(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.keys, id)
}

// errNoRing says that this node has only begun: the gossip keys that it made for itself must not reach others.
var errNoRing = errors.New("this node has not learnt from its cluster's store yet which gossip keys its nodes agree on; try again")

// side says what this cluster is, and what it knows.
func (s *Service) side(ctx context.Context) (side, error) {
	authority, err := s.Authority(ctx)
	if err != nil {
		return side{}, err
	}
	ring := s.Ring()
	if ring.At == 0 {
		return side{}, errNoRing
	}
	store := s.StoreEndpoints
	if s.Resolve != nil {
		if store, err = s.Resolve(ctx, store); err != nil {
			return side{}, err
		}
	}
	me := side{
		protocol: Protocol, mesh: s.Mesh, info: s.Cluster(), authority: authority.Fingerprint(), pem: authority.CertPEM(),
		store: store[:min(len(store), maxEndpoints)], endpoints: s.ownEndpoints(), ring: ringOf(ring), requires: s.Requires,
	}
	entries, err := s.Store.List(ctx, PeersPrefix)
	if err != nil {
		return side{}, fmt.Errorf("list the peers: %w", err)
	}
	for _, e := range entries {
		p, err := DecodePeer(e.Key, e.Value)
		if err != nil {
			return side{}, err // what it says may be in the way
		}
		cert, err := pki.ParseCert([]byte(p.Authority))
		if err != nil {
			return side{}, err
		}
		me.peers = append(me.peers, known{
			info: p.Cluster, state: p.State, since: p.Since, replaceable: replaceable(p, s.Now()), authority: pki.FingerprintOf(cert),
			introduced: p.State == Connected && !p.Isolated,
		})
	}
	return me, nil
}

// greet checks the token and what the joiner says, and returns both sides.
func (v *server) greet(ctx context.Context, c *Credential, m *Side) (t presented, joiner, issuer side, err error) {
	if m.GetProtocol() != Protocol {
		name := plain(m.GetCluster().GetName())
		return t, joiner, issuer, refuse(codes.FailedPrecondition, Refusal_CONFLICT, "%s", protocolConflict(name, m.GetProtocol(), v.Self.Cluster, Protocol))
	}
	if t, err = v.present(ctx, c, m.GetCluster().GetName()); err != nil {
		return t, joiner, issuer, err
	}
	if joiner, err = parseSide(m); err != nil {
		return t, joiner, issuer, refuse(codes.InvalidArgument, Refusal_UNKNOWN, "what the cluster says of itself is refused: %s", plain(err.Error()))
	}
	if issuer, err = v.side(ctx); err != nil {
		return t, joiner, issuer, v.ownStoreFailed(err)
	}
	return t, joiner, issuer, nil
}

// Look says who is here and what is in the way.
func (v *server) Look(ctx context.Context, req *LookRequest) (*LookResponse, error) {
	t, joiner, issuer, err := v.greet(ctx, req.GetToken(), req.GetJoiner())
	if err != nil {
		return nil, err
	}
	if t.Isolated {
		for i := range issuer.peers {
			issuer.peers[i].introduced = false
		}
	}
	request, err := v.pending.request(t.TokenRecord, v.Now())
	if err != nil {
		return nil, v.ownStoreFailed(err)
	}
	answer := &LookResponse{Issuer: issuer.message(), Request: request, Conflicts: conflicts(joiner, issuer), Isolated: t.Isolated}
	if req.GetProbe() {
		answer.Probes = v.probeJoiner(ctx, joiner)
	}
	answer.Clock = v.Now().UnixMilli()
	return answer, nil
}

// probeJoiner tries to reach the joiner's store from here.
func (v *server) probeJoiner(ctx context.Context, joiner side) (results []*CheckResult) {
	ctx, cancel := context.WithTimeout(ctx, probing)
	defer cancel()
	_ = v.probeStore(ctx, v.Self.Cluster, joiner, func(c Check) { results = append(results, checkMessage(c)) })
	return results
}

// Join uses the token, makes the joiner a user, and writes the record.
func (v *server) Join(ctx context.Context, req *JoinRequest) (*JoinResponse, error) {
	t, joiner, issuer, err := v.greet(ctx, req.GetToken(), req.GetJoiner())
	if err != nil {
		return nil, err
	}
	if all := conflicts(joiner, issuer); len(all) > 0 {
		return nil, refuse(codes.FailedPrecondition, Refusal_CONFLICT, "%s", strings.Join(all, "; "))
	}
	key, ok := v.pending.key(t.ID)
	if !ok {
		return nil, refuse(codes.FailedPrecondition, Refusal_LOOK_AGAIN, "node %s has not seen this token before: another one has answered until now", v.Self.Node)
	}
	p, err := v.trusted(joiner, req.GetCertificate(), key)
	if err != nil {
		return nil, refuse(codes.InvalidArgument, Refusal_UNKNOWN, "the certificate that was made for cluster %s is refused: %s", v.Self.Cluster, plain(err.Error()))
	}
	p.Isolated = t.Isolated || req.GetIsolated()
	answer := &JoinResponse{Keys: v.Ring().Keys}
	err = v.administer(ctx, func(access Administrator) error {
		answer.Certificate, err = v.admit(ctx, access, t, p, req.GetRequest())
		return err
	})
	if err != nil {
		return nil, v.joinFailed(ctx, req, joiner.info.Name, err)
	}
	v.pending.drop(t.ID)
	v.Log.Info("A cluster joins", "cluster", joiner.info.Name, "token", t.ID, "from", remoteAddr(ctx))
	return answer, nil
}

// trusted makes a record of a joiner, which has signed a certificate for a key of this cluster.
func (v *server) trusted(joiner side, cert, key []byte) (Peer, error) {
	authority, err := parseAuthority(joiner.pem)
	if err != nil {
		return Peer{}, err
	}
	leaf, err := checkSigned(cert, authority, v.Self.Cluster, v.Now())
	if err != nil {
		return Peer{}, err
	}
	pair := pki.Pair{Cert: certPEM(leaf.Raw), Key: key}
	if _, err := pair.TLS(); err != nil {
		return Peer{}, errors.New("it is for another key than the one that was asked for")
	}
	return Peer{
		Cluster: joiner.info, State: Joining, Since: v.Now(), StoreEndpoints: joiner.store, Endpoints: joiner.endpoints,
		Authority: string(joiner.pem), Cert: string(pair.Cert), Key: string(pair.Key), User: pki.PeerUser(joiner.info.Name),
	}, nil
}

// errBadRequest says that a joiner's request for a certificate was refused.
var errBadRequest = errors.New("the request for a certificate is refused")

// admit gives the joiner its user and certificate, and writes the record of it together with the token's, so that a token is used exactly if
// there is a record. On failure nothing is left.
func (v *server) admit(ctx context.Context, access Administrator, t presented, p Peer, request []byte) (cert []byte, err error) {
	authority, err := v.Authority(ctx)
	if err != nil {
		return nil, err
	}
	cert, err = authority.Sign(request, pki.Request{User: p.User}, v.Now())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	var leaf *x509.Certificate
	if leaf, err = pki.ParseCert(cert); err != nil {
		return nil, err
	}
	p.UserExpires = leaf.NotAfter
	old, replaces, err := v.record(ctx, p.Name())
	if err != nil {
		return nil, err
	}
	if err := access.GrantRead(ctx, p.User, kvstore.Prefix); err != nil {
		return nil, fmt.Errorf("make user %s in the own store: %w", p.User, err)
	}
	used, use := t.usedBy(p.Name(), v.Now())
	err = v.Store.Txn(ctx, []kvstore.Condition{used, {Key: PeerKey(p.Name()), Revision: old.revision}},
		[]kvstore.Op{use, {Kind: kvstore.OpPut, Key: PeerKey(p.Name()), Value: EncodePeer(p)}})
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoing)
	defer cancel()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write the record of peer %s: %w", p.Name(), err), access.Revoke(after, p.User))
	}
	v.forgetUsedBy(after, p.Name(), t.ID)
	if replaces {
		if err := access.Revoke(after, old.User); err != nil {
			v.Log.Error("A user of an earlier connection is left in the own store; remove it with etcdctl", "user", old.User, "error", err)
		}
	}
	return cert, nil
}

// joinFailed says why, to the joiner: mostly that somebody else was quicker.
func (v *server) joinFailed(ctx context.Context, req *JoinRequest, cluster string, err error) error {
	if errors.Is(err, errBadRequest) {
		return refuse(codes.InvalidArgument, Refusal_UNKNOWN, "%s", plain(err.Error()))
	}
	if !errors.Is(err, kvstore.ErrConflict) {
		return v.ownStoreFailed(err)
	}
	if _, err := v.present(ctx, req.GetToken(), cluster); err != nil {
		return err
	}
	return refuse(codes.Aborted, Refusal_CONFLICT, "cluster %s is connected by another command at the same time; try again", cluster)
}
