package clustermesh

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"causeway/identity"
	"causeway/kvstore"
)

// Publication is a row of the publications table: a key that this node keeps in its cluster's store.
type Publication struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	// Leased keys vanish with the node; the cluster's own do not.
	Leased bool `json:"leased"`
}

// ErrNameTaken says that another machine holds this node's name.
var ErrNameTaken = errors.New("node name is taken")

// errUnclaimed holds other entries back until the node's name is known to be this machine's.
var errUnclaimed = errors.New("waits until this node has its name in the store")

// Publisher is the target of the publications table: it makes the cluster's store agree.
type Publisher struct {
	Store kvstore.Store
	// Node that publishes.
	Node identity.Node
	// Assigned: the cluster's ID is not configured but was assigned, which may be done anew. What the store says of another ID
	// of this cluster is of before, then.
	Assigned bool

	// ours: the store is this cluster's; claimed: the node's name in it is this machine's.
	ours, claimed bool
}

// Update writes a key. The cluster's entry comes first, so that nothing is written into another cluster's
// store; then the node's own, if no other machine has the name; then the rest.
func (p *Publisher) Update(ctx context.Context, pub Publication) error {
	if err := available(p.Store); err != nil {
		return err
	}
	switch {
	case pub.Key == identity.ClusterKey:
		err := p.updateCluster(ctx, pub)
		p.ours = err == nil
		return err
	case !p.ours:
		return errUnclaimed
	case pub.Key == identity.NodeKey(p.Node.Cluster, p.Node.Name):
		return p.claim(ctx, pub)
	case !p.claimed:
		return errUnclaimed
	}
	if pub.Leased {
		return p.Store.Put(ctx, pub.Key, []byte(pub.Value), kvstore.Leased)
	}
	return p.Store.Put(ctx, pub.Key, []byte(pub.Value))
}

// available fails at once while the store is not there: each request would wait for it, and the hundreds that a long outage
// gathers would have their say only one after the other.
func available(store kvstore.Store) error {
	if s := store.Status(); !s.Connected {
		return fmt.Errorf("%w: %s", kvstore.ErrUnavailable, s.LastError)
	}
	return nil
}

// claim writes the node's entry, if the name is free or this very machine's from an earlier start. It is written on that
// condition, so that of two machines one gets the name, and one that was away for longer than its lease does not
// take it back.
func (p *Publisher) claim(ctx context.Context, pub Publication) error {
	held, err := p.Store.Get(ctx, pub.Key)
	switch {
	case errors.Is(err, kvstore.ErrNotFound):
		err = p.Store.Create(ctx, pub.Key, []byte(pub.Value), kvstore.Leased)
	case err != nil:
		return err
	default:
		other, decodeErr := identity.DecodeNode(pub.Key, held.Value)
		if decodeErr == nil && other.Instance != p.Node.Instance {
			p.claimed = false
			return fmt.Errorf("%w: %s/%s belongs to another machine at %s; give this one another node.name (if that machine is gone for good, its name is free once its lease has run out)",
				ErrNameTaken, p.Node.Cluster, p.Node.Name, other.Address)
		}
		err = p.Store.CompareAndSwap(ctx, pub.Key, held.Revision, []byte(pub.Value), kvstore.Leased)
	}
	if err == nil {
		p.claimed = true
	}
	return err
}

// updateCluster writes what the cluster says about itself, unless the store is another cluster's.
func (p *Publisher) updateCluster(ctx context.Context, pub Publication) error {
	err := p.Store.Create(ctx, pub.Key, []byte(pub.Value))
	if !errors.Is(err, kvstore.ErrConflict) {
		return err
	}
	held, err := p.Store.Get(ctx, pub.Key)
	if err != nil {
		return err
	}
	if string(held.Value) == pub.Value {
		return nil
	}
	info, err := identity.DecodeCluster(pub.Key, held.Value)
	if err == nil && p.Assigned && info.Name == p.Node.Cluster {
		info.ID = p.Node.ClusterID
	}
	if err == nil && (info.Name != p.Node.Cluster || info.ID != p.Node.ClusterID) {
		return fmt.Errorf("the store is that of cluster %s (ID %d), but this node is configured for %s (ID %d); check kvstore.endpoints and cluster",
			info.Name, info.ID, p.Node.Cluster, p.Node.ClusterID)
	}
	return p.Store.CompareAndSwap(ctx, pub.Key, held.Revision, []byte(pub.Value))
}

// Delete removes a key of this node from the store.
func (p *Publisher) Delete(ctx context.Context, pub Publication) error {
	if err := available(p.Store); err != nil {
		return err
	}
	if !p.claimed {
		return errUnclaimed
	}
	return p.Store.Delete(ctx, pub.Key)
}

// Prune does nothing: what the store holds in this node's name beyond the table is found by
// following the store (Local.Own), not by listing it again.
func (p *Publisher) Prune(context.Context, iter.Seq[Publication], func(identity.ClusterID) bool) error {
	return nil
}
