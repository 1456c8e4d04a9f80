package gossip

import (
	"cmp"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"causeway/identity"
)

// chores are what need not be done at once.
func (g *Gossip) chores(now time.Time) {
	g.joinMissing()
	g.changeRole(now)
	g.dropEarlierLives(now)
	g.ledger.retire(now.Add(-newsTime), func(d *Delta) bool { return g.noNews(d, now) })
	for name := range g.verdicts {
		if _, known := g.book[name]; !known {
			delete(g.verdicts, name)
			g.dirty = true
		}
	}
	for name := range g.facts {
		if _, known := g.book[name]; !known && name != g.Self {
			delete(g.facts, name)
			delete(g.complete, name)
		}
	}
	g.measure(now)
}

func (g *Gossip) noNews(d *Delta, now time.Time) bool {
	switch d.kind() {
	case kindKeyring:
		return false
	case kindFacts, kindVerdict:
		subject, _ := d.subject()
		_, known := g.book[subject]
		alive := d.kind() == kindVerdict && d.Sequence == 0 && now.Sub(time.UnixMilli(int64(d.Incarnation))) > aliveTime
		return (!known || alive) && subject != g.Self
	}
	return g.Settled(d.entry())
}

// dropEarlierLives takes away what nodes had before their agents started again and did not tell anew.
func (g *Gossip) dropEarlierLives(now time.Time) {
	for name, c := range g.complete {
		if now.Sub(c.at) < settleTime {
			continue
		}
		for _, d := range g.ledger.of([]identity.NodeName{name}, func(d *Delta) bool {
			return (d.kind() == kindAddress || d.kind() == kindSlice && !d.ofCluster()) && d.Incarnation < c.incarnation
		}) {
			g.ledger.drop(d.Key)
			if e := d.entry(); !d.Withdrawn && !g.Settled(e) {
				e.Withdrawn, e.Value = true, nil
				g.later(func() { g.Deliver(e) })
			}
		}
	}
}

// joinMissing meets nodes that should be in the pools and are not: a few at a time, so that many do not meet one.
func (g *Gossip) joinMissing() {
	if p := g.pools[clusterPool]; p != nil {
		g.meet(p, g.Port, g.absent(p, func(n identity.NodeName) bool { return n.Cluster == g.Self.Cluster }), 3)
	}
	p := g.pools[meshPool]
	if p == nil {
		return
	}
	members := p.snapshot()
	for _, cluster := range g.Peers {
		met := slices.ContainsFunc(slices.Collect(maps.Keys(members)), func(n identity.NodeName) bool { return n.Cluster == cluster })
		if met {
			continue
		}
		candidates := g.absent(p, func(n identity.NodeName) bool { return n.Cluster == cluster })
		g.meet(p, g.MeshPort, g.speakersFirst(cluster, candidates), 3)
	}
	g.meet(p, g.MeshPort, g.absent(p, func(n identity.NodeName) bool { return n.Cluster == g.Self.Cluster && g.facts[n].Speaker }), 2)
}

// speakersFirst puts the nodes of a cluster first that say that they are speakers, and then those that are if all of its nodes are alive.
func (g *Gossip) speakersFirst(cluster string, names []identity.NodeName) []identity.NodeName {
	var all []identity.NodeName
	for name := range g.book {
		if name.Cluster == cluster {
			all = append(all, name)
		}
	}
	chosen := speakersOf(all)
	rank := func(name identity.NodeName) int {
		switch {
		case g.facts[name].Speaker:
			return 0
		case slices.Contains(chosen, name):
			return 1
		}
		return 2
	}
	slices.SortStableFunc(names, func(a, b identity.NodeName) int { return cmp.Compare(rank(a), rank(b)) })
	return names
}

// absent are the nodes that are no members, in random order; those that are known to be dead are rarely among them.
func (g *Gossip) absent(p *pool, of func(identity.NodeName) bool) (names []identity.NodeName) {
	members := p.snapshot()
	for name := range g.book {
		_, member := members[name]
		state := g.stateOf(name)
		dead := state == identity.NodeSuspect || state == identity.NodeDead
		if !member && of(name) && name != g.Self && (!dead || rand.IntN(5) == 0) {
			names = append(names, name)
		}
	}
	rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

func (g *Gossip) meet(p *pool, port uint16, names []identity.NodeName, atMost int) {
	for _, name := range names[:min(atMost, len(names))] {
		address := g.book[name].Address
		g.later(func() { p.join(address, port) })
	}
}
