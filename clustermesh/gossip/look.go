package gossip

import (
	"cmp"
	"net/netip"
	"time"

	"causeway/identity"
)

// publicState is the verdict on a node; without any, all is well.
func (g *Gossip) publicState(name identity.NodeName) identity.LivenessState {
	return cmp.Or(g.verdicts[name].State, identity.NodeAlive)
}

func (g *Gossip) stateOf(name identity.NodeName) identity.LivenessState {
	return cmp.Or(g.private[name].State, g.publicState(name))
}

// step lets the detector look at who does not answer. It tells whether there is anybody.
func (g *Gossip) step(now time.Time) bool {
	if now.Sub(g.stepped) < stepInterval/2 {
		return true
	}
	g.stepped = now
	w := g.world(now)
	actions := g.detector.tick(w, now)
	for _, action := range actions {
		g.act(action, now)
	}
	return g.detector.busy(w, now)
}

func (g *Gossip) act(action any, now time.Time) {
	switch a := action.(type) {
	case sendEcho:
		g.later(func() {
			if err := g.Echo(a.to, a.nonce); err != nil {
				g.Log.Debug("echo not sent", "to", a.to, "error", err)
			}
		})
	case askFor:
		g.askFor(a)
	case tell:
		a.observation.sign(g.SigningKey)
		msg := message(msgObservation, &a.observation)
		if p := g.poolOf(a.back); p != nil && g.knownAddress(a.back) {
			g.later(func() { p.send(a.back, msg) })
		}
	case issue:
		g.issue(a, now)
		g.Log.Info("node", "subject", a.subject, "state", a.state, "reason", a.reason, "alone", a.alone)
	case voteOn:
		g.own.Votes[a.cluster] = a.state
		delete(g.sampled, a.cluster)
		delete(g.own.Silent, a.cluster)
		if len(a.lost) > 0 {
			g.own.Silent[a.cluster] = a.lost
		}
		g.tellFacts(now)
		g.Log.Info("cluster", "subject", a.cluster, "state", a.state)
	}
}

// poolOf returns the pool that an address is of, by its port.
func (g *Gossip) poolOf(address string) *pool {
	if at, err := netip.ParseAddrPort(address); err == nil && at.Port() == g.MeshPort {
		return g.pools[meshPool]
	}
	return g.pools[clusterPool]
}

func (g *Gossip) askFor(a askFor) {
	name, port := clusterPool, g.Port
	if a.of.Cluster != g.Self.Cluster {
		name, port = meshPool, g.MeshPort
	}
	p, n := g.pools[name], g.book[a.of]
	if p == nil || !n.Address.IsValid() {
		return
	}
	msg := message(msgAsk, &ask{From: g.Self, Subject: a.about, Back: g.back(name)})
	g.later(func() { p.send(netip.AddrPortFrom(n.Address, port).String(), msg) })
}

// world is what the detector needs to know of the rest.
func (g *Gossip) world(now time.Time) world {
	w := world{nodes: map[identity.NodeName]nodeInfo{}, live: g.live()}
	for name, n := range g.book {
		if name.Cluster != g.Self.Cluster || n.GossipKey == nil {
			continue
		}
		f := g.facts[name]
		w.nodes[name] = nodeInfo{
			address: n.Address, verdict: g.publicState(name), since: time.UnixMilli(g.current(name).Since),
			private: g.private[name].State, draining: f.Draining, stopping: f.Stopping,
		}
	}
	if now.Sub(g.started) < startTime {
		w.nodes = nil // who is not in the pool yet may be about to join
	}
	p := g.pools[meshPool]
	if p == nil {
		return w
	}
	for name := range p.snapshot() {
		if name.Cluster != g.Self.Cluster {
			w.helpers = append(w.helpers, name)
		}
	}
	w.samples = make(map[string]map[identity.NodeName]netip.Addr, len(g.Peers))
	for _, cluster := range g.Peers {
		w.samples[cluster] = g.samples(cluster)
	}
	return w
}

func (g *Gossip) current(name identity.NodeName) verdict {
	if v, ok := g.private[name]; ok {
		return v
	}
	return g.verdicts[name]
}

// live are the members of the own cluster's pool, this node included.
func (g *Gossip) live() []identity.NodeName {
	live := []identity.NodeName{g.Self}
	if p := g.pools[clusterPool]; p != nil {
		for name := range p.snapshot() {
			if name != g.Self {
				live = append(live, name)
			}
		}
	}
	return live
}

// sampleSize is how many nodes of another cluster get an echo: its speakers, and some that have another fate; all of them, up to
// a bound, get one if the cluster has no agent left that would notice when one of them dies.
const (
	sampleSize = 5
	sampleAll  = 256
)

// samples are the nodes of another cluster whose data path stands for the whole of it.
func (g *Gossip) samples(cluster string) map[identity.NodeName]netip.Addr {
	if known, ok := g.sampled[cluster]; ok {
		return known
	}
	var speakers, others []identity.NodeName
	for name := range g.book {
		switch {
		case name.Cluster != cluster:
		case g.facts[name].Speaker:
			speakers = append(speakers, name)
		default:
			others = append(others, name)
		}
	}
	out := map[identity.NodeName]netip.Addr{}
	chosen, size := speakersOf(speakers), sampleSize
	if g.own.Votes[cluster] == identity.ReachControlPlaneDown {
		size = sampleAll
	}
	for _, name := range append(chosen, choose("sample", others, size-len(chosen))...) {
		out[name] = g.book[name].Address
	}
	if g.sampled == nil {
		g.sampled = map[string]map[identity.NodeName]netip.Addr{}
	}
	g.sampled[cluster] = out
	return out
}
