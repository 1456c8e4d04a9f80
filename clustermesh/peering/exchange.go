package peering

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// The joiner's part of exchanging trust: what is written, and how it is taken back.

// undo takes back what was written, the newest first.
type undo []func(context.Context) error

func (u *undo) add(back func(context.Context) error) { *u = append(*u, back) }

// takeBack leaves nothing of a connect that failed.
func (c *connect) takeBack(ctx context.Context, why error) {
	if len(c.undo) == 0 {
		return
	}
	c.say(StageUndo, "it failed (%s), so what was written is taken back", plain(why.Error()))
	for i := len(c.undo) - 1; i >= 0; i-- {
		// Each has time of its own: that the peer does not answer must not keep the own store from being cleaned.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoing)
		if err := c.undo[i](ctx); err != nil {
			c.s.Log.Warn("Could not take back all of a connect that failed", "cluster", c.token.Cluster, "error", err)
			c.say(StageUndo, "%s", plain(err.Error()))
		}
		cancel()
	}
	c.undo = nil
}

// join exchanges trust: the peer gets a user here, this cluster one there.
func (c *connect) join(ctx context.Context) error {
	old, replaces, err := c.s.record(ctx, c.token.Cluster)
	if err != nil {
		return err
	}
	authority, err := c.s.Authority(ctx)
	if err != nil {
		return err
	}
	user := pki.PeerUser(c.issuer.info.Name)
	err = c.s.administer(ctx, func(access Administrator) error {
		c.undo.add(func(ctx context.Context) error { return c.s.revoke(ctx, user) }) // even if it is not known whether it was made
		return access.GrantRead(ctx, user, kvstore.Prefix)
	})
	if err != nil {
		return fmt.Errorf("make user %s in the own store: %w", user, err)
	}
	c.say(StageJoin, "%s has a user here, which may read and nothing else", c.issuer.info.Name)
	answer, key, err := c.exchange(ctx, authority, user)
	if err != nil {
		return err
	}
	if err := c.trust(answer, key, user); err != nil {
		return err
	}
	c.undo.add(func(ctx context.Context) error { return c.s.tellLeave(ctx, c.peer, true) })
	c.say(StageJoin, "exchanged certificates with %s", c.issuer.info.Name)
	if err := c.write(ctx, old, replaces); err != nil {
		return err
	}
	return c.adopt(ctx, answer.GetKeys())
}

// exchange signs what the issuer has asked for, and asks for the own certificate. If the node that answers is not the one that was
// looked at, it is looked at once more.
func (c *connect) exchange(ctx context.Context, authority *pki.Authority, user string) (answer *JoinResponse, key []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	request, key, err := pki.NewRequest()
	if err != nil {
		return nil, nil, err
	}
	for again := true; ; again = false {
		cert, err := authority.Sign(c.request, pki.Request{User: user}, c.s.Now())
		if err != nil {
			return nil, nil, fmt.Errorf("cluster %s: %w", c.token.Cluster, err)
		}
		if leaf, err := pki.ParseCert(cert); err == nil {
			c.peer.UserExpires = leaf.NotAfter
		}
		answer, err = c.link.Join(ctx, &JoinRequest{
			Token: c.credential(), Joiner: c.own.message(), Certificate: cert, Request: request, Isolated: c.isolated,
		})
		if err == nil {
			return answer, key, nil
		}
		if err = fromPeer(c.token.Cluster, err); !again || reasonIn(err) != Refusal_LOOK_AGAIN {
			return nil, nil, err
		}
		look, err := c.ask(ctx, false)
		if err != nil {
			return nil, nil, err
		}
		c.request = look.GetRequest()
	}
}

// trust makes the record of what the issuer has answered.
func (c *connect) trust(answer *JoinResponse, key []byte, user string) error {
	authority, err := parseAuthority(c.issuer.pem)
	if err != nil {
		return err
	}
	leaf, err := checkSigned(answer.GetCertificate(), authority, c.s.Self.Cluster, c.s.Now())
	if err != nil {
		return fmt.Errorf("the certificate that cluster %s has made for this one is refused: %w", c.token.Cluster, err)
	}
	pair := pki.Pair{Cert: certPEM(leaf.Raw), Key: key}
	if _, err := pair.TLS(); err != nil {
		return fmt.Errorf("the certificate that cluster %s has made is for another key", c.token.Cluster)
	}
	if err := checkKeys(answer.GetKeys()); err != nil {
		return fmt.Errorf("cluster %s: %w", c.token.Cluster, err)
	}
	c.peer = Peer{
		Cluster: c.issuer.info, State: Joining, Since: c.s.Now(), StoreEndpoints: c.issuer.store, Endpoints: c.issuer.endpoints,
		Authority: string(c.issuer.pem), Cert: string(pair.Cert), Key: string(pair.Key), User: user, UserExpires: c.peer.UserExpires, Isolated: c.isolated,
	}
	return nil
}

// write writes the own record, unless another command has written one meanwhile.
func (c *connect) write(ctx context.Context, old stored, replaces bool) error {
	key := PeerKey(c.peer.Name())
	err := c.s.Store.Txn(ctx, []kvstore.Condition{{Key: key, Revision: old.revision}}, []kvstore.Op{{Kind: kvstore.OpPut, Key: key, Value: EncodePeer(c.peer)}})
	if errors.Is(err, kvstore.ErrConflict) {
		return fmt.Errorf("peer %s is being connected or disconnected by another command at the same time; try again with a new token", c.peer.Name())
	}
	c.undo.add(func(ctx context.Context) error { return c.s.deleteRecord(ctx, c.peer) })
	if err != nil {
		return fmt.Errorf("write the record of peer %s: %w", c.peer.Name(), err)
	}
	if replaces {
		return c.s.revoke(ctx, old.User)
	}
	return nil
}

// deleteRecord deletes the record of a connection, if it is still of that one.
func (s *Service) deleteRecord(ctx context.Context, of Peer) error {
	p, found, err := s.record(ctx, of.Name())
	if err != nil || !found || p.User != of.User {
		return err
	}
	key := PeerKey(of.Name())
	err = s.Store.Txn(ctx, []kvstore.Condition{{Key: key, Revision: p.revision}}, []kvstore.Op{{Kind: kvstore.OpDelete, Key: key}})
	if errors.Is(err, kvstore.ErrConflict) { // a renewal came in between
		return s.deleteRecord(ctx, of)
	}
	return err
}

// adopt takes over the gossip keys of the mesh.
func (c *connect) adopt(ctx context.Context, keys [][]byte) error {
	own := c.s.Ring().Keys
	if len(own) > 0 && string(own[0]) == string(keys[0]) {
		return nil
	}
	if err := c.s.Adopt(ctx, keys); err != nil {
		return fmt.Errorf("change to the gossip keys of %s's mesh: %w", c.peer.Name(), err)
	}
	c.say(StageJoin, "changed to the gossip keys of %s's mesh", c.peer.Name())
	return nil
}

func reasonIn(err error) Refusal_Reason {
	var e *remoteError
	if errors.As(err, &e) {
		return e.reason
	}
	return Refusal_UNKNOWN
}

// codeOf returns what kind of answer a peer has given; OK if err is none.
func codeOf(err error) codes.Code {
	var e *remoteError
	if errors.As(err, &e) {
		return e.code
	}
	return codes.OK
}
