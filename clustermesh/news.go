package clustermesh

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// News is an entry of a node's, or a slice that is the cluster's, which came by gossip, ahead of the store or instead of it. Its signature was checked.
type News struct {
	// Node that wrote it, of the follower's cluster. A slice that is the cluster's may come from any.
	Node string
	// Key is that of the store.
	Key string
	identity.Version
	// Withdrawn entries have no value.
	Withdrawn bool
	Value     []byte
}

// goneTime is how long the version of a deleted entry is remembered, so that late news of it is not taken for new. Gossip
// keeps no entry for longer that the store has.
const goneTime = 10 * time.Minute

// maxGone bounds the deleted entries that are remembered of a channel; beyond, the oldest may come back until their owner
// hears of it.
const maxGone = 100_000

// pendingNews is what gossip has brought and the store has not shown yet.
type pendingNews struct {
	node string // whose it is; "" if it is the cluster's
	identity.Version
	withdrawn bool
	at        time.Time
}

// goneEntry is the version of an entry that was deleted.
type goneEntry struct {
	identity.Version
	at time.Time
}

// Offer hands the follower news of its cluster. It never blocks: what is offered is bounded by who keeps the news.
func (f *Follower) Offer(n News) {
	f.mu.Lock()
	f.offered = append(f.offered, n)
	f.mu.Unlock()
	select {
	case f.news <- struct{}{}:
	default:
	}
}

// Settled tells whether the store has shown what this news says or something newer, so that it need not be kept.
func (f *Follower) Settled(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, pending := f.pending[key]
	return !pending && f.synced
}

// Known tells whether an entry of this version, or a newer one, is in the tables already; and whether it was withdrawn since.
func (f *Follower) Known(key string, v identity.Version, withdrawn bool) (known, gone bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g, ok := f.gone[key]; ok && !v.Newer(g.Version) {
		return true, true
	}
	held, ok := f.version(f.Tables.DB.ReadTxn(), key)
	if withdrawn {
		return ok && held.Newer(v), false
	}
	return ok && !v.Newer(held), false
}

// version returns that of the rows that the tables have of a key. Needs mu.
func (f *Follower) version(txn statedb.ReadTxn, key string) (identity.Version, bool) {
	if v, ok := f.slices[key]; ok {
		return v, true
	}
	ip, ok := strings.CutPrefix(key, identity.AddressesPrefix(f.Cluster))
	if !ok {
		return identity.Version{}, false
	}
	address, err := netip.ParseAddr(ip)
	if err != nil {
		return identity.Version{}, false
	}
	row, _, ok := f.Tables.Addresses.Get(txn, f.Tables.Addresses.ByKey(f.Cluster+"/"+netip.PrefixFrom(address, address.BitLen()).String()))
	if !ok {
		return identity.Version{}, false
	}
	return row.Object.Version, true
}

// applyNews brings the tables to what gossip says, as far as that is newer.
func (f *Follower) applyNews(now time.Time) {
	f.mu.Lock()
	offered := f.offered
	f.offered = nil
	f.mu.Unlock()
	if len(offered) == 0 {
		return
	}
	txn := f.write()
	defer txn.Abort()
	for _, n := range offered {
		if err := f.applyOne(txn, n, now); err != nil {
			f.Refusals.Add(f.Cluster, n.Key, fmt.Errorf("by gossip: %w", err))
		}
	}
	f.judgeAgain(txn)
	txn.Commit()
	f.report(kvstore.Batch{})
}

func (f *Follower) applyOne(txn statedb.WriteTxn, n News, now time.Time) error {
	if f.local && n.Node == f.Self.Node {
		return nil // the node itself knows better
	}
	if known, _ := f.Known(n.Key, n.Version, n.Withdrawn); known {
		return nil
	}
	if n.Withdrawn {
		if owner, ok := f.ownerNode(n.Key); ok && owner != n.Node {
			return fmt.Errorf("node %s withdraws what is node %s's", n.Node, owner)
		}
		held := f.holds(n.Key)
		f.delete(txn, n.Key)
		f.remember(n.Key, n.Version, now)
		if !held {
			return nil
		}
	} else {
		if err := n.check(); err != nil {
			return err
		}
		f.put(txn, n.Key, n.Value)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := pendingNews{n.Node, n.Version, n.Withdrawn, now}
	if lb.OfClusterKey(n.Key) {
		p.node = "" // it does not go with the node that told it
	}
	f.pending[n.Key] = p
	return nil
}

// check tells whether the value is what the news says it is: the entry of the node that signed, of that version.
func (n News) check() error {
	var node string
	var v identity.Version
	if strings.HasPrefix(n.Key, kvstore.Prefix+"addresses/") {
		a, err := identity.DecodeAddress(n.Key, n.Value)
		if err != nil {
			return err
		}
		node, v = a.Node, a.Version
	} else {
		s, err := lb.DecodeSlice(n.Key, n.Value)
		if err != nil {
			return err
		}
		node, v = cmp.Or(s.Node, n.Node), identity.Version{Incarnation: s.Incarnation, Sequence: s.Sequence}
	}
	if node != n.Node || v != n.Version {
		return errors.New("the entry is another node's, or of another version, than the message says")
	}
	return nil
}

// storePut tells whether an entry that the store shows shall be taken: not if gossip has already said that it is gone.
func (f *Follower) storePut(key string, value []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, pending := f.pending[key]
	g, gone := f.gone[key]
	if !pending && !gone {
		return true
	}
	stored, ok := identity.VersionOf(value)
	if !ok {
		return true // it is refused with the reason
	}
	if pending && p.withdrawn && !stored.Newer(p.Version) {
		return false
	}
	if pending && !p.Newer(stored) {
		delete(f.pending, key)
	}
	if gone && stored.Newer(g.Version) {
		delete(f.gone, key)
	}
	return true
}

// storeDelete tells whether an entry that the store has no more shall go: not if gossip has brought a newer one, which
// the store is about to get.
func (f *Follower) storeDelete(key string, now time.Time) bool {
	f.mu.Lock()
	p, pending := f.pending[key]
	if pending && p.withdrawn {
		delete(f.pending, key)
	}
	v, held := f.version(f.Tables.DB.ReadTxn(), key)
	f.mu.Unlock()
	if pending && !p.withdrawn {
		return false
	}
	if held {
		f.remember(key, v, now)
	}
	return true
}

// remember notes that an entry of this version is gone.
func (f *Follower) remember(key string, v identity.Version, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.gone) < maxGone {
		f.gone[key] = goneEntry{v, now}
	}
}

// forget drops what need not be remembered any more: old deletions, and those of entries that the store never had.
func (f *Follower) forget(now time.Time) {
	connected := f.Store.Status().Connected
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.gone, func(_ string, g goneEntry) bool { return now.Sub(g.at) > goneTime })
	maps.DeleteFunc(f.pending, func(_ string, p pendingNews) bool {
		return p.withdrawn && connected && f.synced && now.Sub(p.at) > orphanGrace
	})
}

// newsOf lists the entries of a node that only gossip has brought.
func (f *Follower) newsOf(node string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var keys []string
	for key, p := range f.pending {
		if p.node == node {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// dropNews removes the entries of a node that the store never had: they go with the node.
func (f *Follower) dropNews(txn statedb.WriteTxn, node string) {
	for _, key := range f.newsOf(node) {
		f.delete(txn, key)
		f.mu.Lock()
		delete(f.pending, key)
		f.mu.Unlock()
	}
}
