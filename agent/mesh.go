package agent

import (
	"context"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"

	"causeway/clustermesh"
	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/kvstore"
)

// channel is one followed store.
type channel struct {
	cluster  string
	id       identity.ClusterID
	local    bool
	store    kvstore.Store
	follower *clustermesh.Follower

	// What follows is a peer's alone. end stops the follower, and done closes when it has ended.
	end  context.CancelFunc
	done chan struct{}
	link *link

	mu     sync.Mutex
	record peering.Peer
}

// peer returns the peer's record as it is now.
func (c *channel) peer() peering.Peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.record
}

func (c *channel) setPeer(p peering.Peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.record = p
}

// channels are the stores that this node follows: its cluster's, and those of the peers that the records name now. Safe for
// concurrent use.
type channels struct {
	mu    sync.Mutex
	own   *channel
	peers map[string]*channel
	// left are the records of peers that have disconnected this cluster: nothing of them is followed.
	left map[string]peering.Peer
	// known: the records have been read, from the store or from what was kept of it, so that a cluster that is not among the
	// peers is none.
	known bool
	// stores are the addresses of the stores that are followed, and whose they are.
	stores map[netip.Addr]string
}

func newChannels(own *channel) *channels {
	c := &channels{own: own, peers: map[string]*channel{}, left: map[string]peering.Peer{}}
	c.noteStores()
	return c
}

// all returns the own channel and then the peers', by name.
func (c *channels) all() []*channel {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]*channel, 0, len(c.peers)+1)
	for _, p := range c.peers {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *channel) int { return strings.Compare(a.cluster, b.cluster) })
	return slices.Insert(out, 0, c.own)
}

// ofPeers returns the peers' channels by name.
func (c *channels) ofPeers() []*channel {
	return slices.DeleteFunc(c.all(), func(ch *channel) bool { return ch.local })
}

// get returns the channel of a cluster, or nil.
func (c *channels) get(cluster string) *channel {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.own.cluster == cluster {
		return c.own
	}
	return c.peers[cluster]
}

// follows tells whether a cluster is followed; not is true only if it surely is not.
func (c *channels) follows(id identity.ClusterID) (yes, not bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.own.id == id {
		return true, false
	}
	for _, p := range c.peers {
		if p.id == id {
			return true, false
		}
	}
	return false, c.known
}

// noPeer tells whether a cluster surely is not followed.
func (c *channels) noPeer(cluster string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known && c.peers[cluster] == nil && c.own.cluster != cluster
}

func (c *channels) put(p *channel) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peers[p.cluster] = p
	c.noteStores()
}

func (c *channels) remove(cluster string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.peers, cluster)
	c.noteStores()
}

// noteStores gathers the stores' addresses anew.
func (c *channels) noteStores() {
	c.stores = map[netip.Addr]string{}
	note := func(ch *channel) {
		for _, endpoint := range ch.store.Status().Endpoints {
			u, err := url.Parse(endpoint)
			if err != nil {
				continue
			}
			if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
				c.stores[ip] = ch.cluster
			}
		}
	}
	note(c.own)
	for _, p := range c.peers {
		note(p)
	}
}

// storeAt returns whose store has an address, if it is one that is followed.
func (c *channels) storeAt(ip netip.Addr) (cluster string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cluster, ok = c.stores[ip]
	return cluster, ok
}

// setLeft notes which peers have left, and that the records are known.
func (c *channels) setLeft(left map[string]peering.Peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left, c.known = left, true
}

// leftPeers returns the records of those that have left, by name.
func (c *channels) leftPeers() []peering.Peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]peering.Peer, 0, len(c.left))
	for _, p := range c.left {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b peering.Peer) int { return strings.Compare(a.Name(), b.Name()) })
	return out
}
