package agent

import (
	"context"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
)

// newFollower returns what follows a channel into the tables.
func (a *agent) newFollower(ctx context.Context, c *channel) *clustermesh.Follower {
	cfg := clustermesh.FollowerConfig{
		Cluster: c.cluster, ID: c.id, Self: identity.NodeName{Cluster: a.cfg.Cluster.Name, Node: a.cfg.Node.Name},
		Store: c.store, Tables: a.tables, Refusals: a.refusals, Claims: a.claims, Log: a.log,
		Synced:   func() { a.storeSynced(ctx, c) },
		Own:      func(keys []string, complete bool) { a.local.Own(ctx, keys, complete) },
		Disputed: func(keys []string) { a.local.Disputed(ctx, keys) },
		Changed:  a.rangesChanged,
	}
	if c.local && a.kubernetes != nil {
		cfg.Exported = a.exported
	}
	return clustermesh.NewFollower(cfg)
}

// followOwn starts following this cluster's store.
func (a *agent) followOwn(ctx context.Context, tasks *errgroup.Group) {
	own := a.own()
	tasks.Go(func() error { return own.follower.Run(ctx) })
	tasks.Go(func() error {
		return clustermesh.Beat(ctx, own.store, a.cfg.Node.Name, a.clock.Now, func() time.Duration {
			state := own.follower.State()
			if state.Info == nil {
				return 0 // not known to be this cluster's store
			}
			return time.Since(state.Heartbeat)
		})
	})
}

// followPeers starts following the peers' stores: those of the agent's earlier life at once, and then as the records have it.
func (a *agent) followPeers(ctx context.Context, tasks *errgroup.Group) error {
	a.own().follower = a.newFollower(ctx, a.own())
	a.peers = &peers{agent: a, dir: filepath.Join(a.cfg.StateDir, "peers"), ctx: ctx, changed: a.peersChanged}
	if err := a.peers.restore(); err != nil {
		return err
	}
	tasks.Go(func() error { return a.peers.Run(ctx) })
	return nil
}

// peersChanged brings what depends on who is a peer into step.
func (a *agent) peersChanged() {
	a.setPeersOfGossip()
	a.rangesChanged()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, prune := range a.prunes {
		prune()
	}
}

func (a *agent) setPeersOfGossip() { a.life.gossip.SetPeers(a.channels.names()) }

// isSynced tells whether a cluster's entries that are in no table are stale. Those of a cluster that is no peer (any
// more) are: nothing will ever come for them.
func (a *agent) isSynced(id identity.ClusterID) bool {
	_, none := a.channels.follows(id)
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.synced[id] || none && id != 0
}

// forgetSynced notes that a cluster is followed no more: what comes when it is followed again is read anew.
func (a *agent) forgetSynced(id identity.ClusterID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.synced, id)
}

// storeSynced notes that a channel's store has been read in full.
func (a *agent) storeSynced(ctx context.Context, c *channel) {
	if c.local {
		a.ownStoreSynced(ctx)
		return
	}
	a.markSynced(ctx, c.id)
}

// markSynced notes that a cluster's entries have been read in full: what is left of it in the kernel from
// before, and not in the tables once all that follows from the entries is in them too, is stale.
func (a *agent) markSynced(ctx context.Context, id identity.ClusterID) {
	a.local.After(ctx, func() {
		a.balancer.After(ctx, func() {
			a.tunnels.After(ctx, func() { a.prune(id) })
		})
	})
}

// prune has what is stale of a cluster removed.
func (a *agent) prune(id identity.ClusterID) {
	a.mu.Lock()
	a.synced[id] = true
	a.mu.Unlock()
	a.pruneAll()
}

// pruneAll has all reconcilers remove what is stale.
func (a *agent) pruneAll() {
	for _, prune := range a.prunes {
		prune()
	}
}

// rangesChanged makes the mesh's ranges unreachable but for what is known in them, and judges again which
// addresses services may have. Until every cluster has said its own, the ranges of the agent's earlier life stay too.
func (a *agent) rangesChanged() {
	a.balancer.Recheck()
	a.ranges.Lock()
	defer a.ranges.Unlock()
	ranges := a.claims.Ranges()
	if slices.ContainsFunc(a.channels.all(), func(c *channel) bool { return c.follower.State().Info == nil }) {
		entries, err := a.datapath.ListAddresses()
		if err != nil {
			a.log.Error("packets to nobody may leave by the default route", "error", err)
			return
		}
		ranges = withBlackholes(ranges, entries)
	}
	if err := a.datapath.SetBlackholes(ranges); err != nil {
		a.log.Error("packets to nobody may leave by the default route", "error", err)
	}
}

// withBlackholes adds to ranges those that the kernel has as unreachable already.
func withBlackholes(ranges []netip.Prefix, entries []datapath.AddressEntry) []netip.Prefix {
	for _, e := range entries {
		if e.Blackhole && !slices.Contains(ranges, e.Prefix) {
			ranges = append(ranges, e.Prefix)
		}
	}
	return ranges
}
