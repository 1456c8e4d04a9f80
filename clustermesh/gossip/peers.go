package gossip

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"causeway/identity"
)

// SetPeers says which the other clusters are now. What is known of others is forgotten: their nodes' states and verdicts,
// and what they have said. Nodes of clusters that are no peers are not looked at, whatever SetNodes has told of them.
func (g *Gossip) SetPeers(clusters []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	peers := slices.Compact(slices.Sorted(slices.Values(clusters)))
	peers = slices.DeleteFunc(peers, func(c string) bool { return c == g.Self.Cluster || c == "" })
	old, now := g.Peers, time.Now()
	g.Peers = peers
	for _, cluster := range old {
		if !slices.Contains(peers, cluster) {
			g.forget(cluster, now)
		}
	}
	g.knowNodes()
	if slices.ContainsFunc(peers, func(c string) bool { return !slices.Contains(old, c) }) {
		g.hurried = now.Add(hurryTime)
		g.catchUp()
	}
	g.tellFacts(now)
	g.chored = time.Time{} // a pool may have to be opened or left
	g.dirty = true
	g.wakeUp()
}

// hurryTime is how long after a cluster has become a peer this node looks for a way into its pool more often.
const hurryTime = 10 * time.Second

// ours tells whether what a cluster's nodes say counts: it is the own one or a peer.
func (g *Gossip) ours(cluster string) bool {
	return cluster == g.Self.Cluster || slices.Contains(g.Peers, cluster)
}

func (g *Gossip) isPeer(cluster string) bool { return cluster != g.Self.Cluster && g.ours(cluster) }

// admission is which nodes there are, for what is asked with memberlist's locks held.
type admission struct {
	// nodes that pools may hold: of the own cluster and its peers.
	nodes map[identity.NodeName]netip.Addr
	// addresses of all nodes that any store names, whose questions are answered (probe.go).
	addresses map[netip.Addr]bool
}

// knowNodes derives from the nodes in the stores those that count, since they are of the own cluster or a peer's.
func (g *Gossip) knowNodes() {
	a := &admission{nodes: make(map[identity.NodeName]netip.Addr, len(g.nodes)), addresses: make(map[netip.Addr]bool, len(g.nodes))}
	clear(g.book)
	g.sampled = nil
	for _, n := range g.nodes {
		a.addresses[n.Address] = true
		if g.ours(n.Cluster) {
			g.book[n.NodeName()], a.nodes[n.NodeName()] = n, n.Address
		}
	}
	a.nodes[g.Self] = g.Address
	g.admitted.Store(a)
}

// forget drops all that is known of a cluster that is no peer any more, so that it starts anew if it comes back.
func (g *Gossip) forget(cluster string, now time.Time) {
	for name := range g.book {
		if name.Cluster == cluster {
			g.coord.ForgetNode(name.String())
		}
	}
	for name := range g.facts {
		if name.Cluster == cluster {
			g.coord.ForgetNode(name.String())
		}
	}
	dropOf(g.facts, cluster)
	dropOf(g.verdicts, cluster)
	dropOf(g.private, cluster)
	dropOf(g.complete, cluster)
	dropOf(g.rows, cluster)
	maps.DeleteFunc(g.early, func(_ string, d Delta) bool { return d.Cluster == cluster })
	delete(g.reaches, cluster)
	delete(g.own.Votes, cluster)
	delete(g.unvoted, cluster)
	delete(g.own.RTTs, cluster)
	delete(g.own.Silent, cluster)
	g.own.Blocked = slices.DeleteFunc(slices.Clone(g.own.Blocked), func(c string) bool { return c == cluster })
	for name, f := range g.facts { // what the own speakers said of it; they say nothing of it any more
		if name.Cluster == g.Self.Cluster {
			delete(f.Votes, cluster)
			delete(f.RTTs, cluster)
			delete(f.Silent, cluster)
		}
	}
	g.ledger.forget(cluster)
	g.detector.forget(cluster, now)
	if p := g.pools[meshPool]; p != nil {
		for _, name := range p.forget(cluster) {
			g.coord.ForgetNode(name.String())
		}
	}
	g.forgot = true
}

// dropOf removes the nodes of a cluster.
func dropOf[V any](m map[identity.NodeName]V, cluster string) {
	maps.DeleteFunc(m, func(n identity.NodeName, _ V) bool { return n.Cluster == cluster })
}

// catchUp exchanges states with some of the own cluster: what they have heard of a new peer before this node knew that it is one was not listened to.
func (g *Gossip) catchUp() {
	p := g.pools[clusterPool]
	if p == nil {
		return
	}
	var others []identity.NodeName
	for _, name := range g.live() {
		if name != g.Self {
			others = append(others, name)
		}
	}
	g.meet(p, g.Port, speakersOf(others), Speakers)
}
