package gossip

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// tell signs a delta of this node's, keeps it and spreads it.
func (g *Gossip) tell(d Delta, urgent bool, now time.Time) {
	d.Cluster, d.Node = g.Self.Cluster, g.Self.Node
	d.sign(g.SigningKey)
	if !g.ledger.news(&d) {
		return
	}
	if err := g.ledger.put(d, now); err != nil {
		g.Log.Warn("not told by gossip", "error", err)
		return
	}
	g.spread(d, "", urgent)
}

// tellFacts tells what this node says of itself, if that has changed.
func (g *Gossip) tellFacts(now time.Time) {
	value := encode(&g.own)
	if old := g.ledger.get(factsKey(g.Self)); old != nil && string(old.Value) == string(value) {
		return
	}
	g.sequence++
	urgent := urgentFacts(g.facts[g.Self].facts, g.own)
	g.facts[g.Self] = factsOf{cloneFacts(g.own), g.Incarnation}
	g.dirty = true
	g.tell(Delta{Key: factsKey(g.Self), Incarnation: g.Incarnation, Sequence: g.sequence, Value: value}, urgent, now)
}

// urgentFacts tells whether something has changed that backends' being in service follows from, or the next step of changing keys.
func urgentFacts(old, now facts) bool {
	return old.Draining != now.Draining || old.Stopping != now.Stopping || old.Speaker != now.Speaker || !slices.Equal(old.Keys, now.Keys) ||
		!maps.Equal(old.Votes, now.Votes) || !maps.EqualFunc(old.Silent, now.Silent, slices.Equal)
}

func cloneFacts(f facts) facts {
	f.Votes, f.RTTs, f.Silent = maps.Clone(f.Votes), maps.Clone(f.RTTs), maps.Clone(f.Silent)
	return f
}

// spread sends a delta on: by gossip in both tiers, and what is urgent at once to some of those that it did not come from.
func (g *Gossip) spread(d Delta, via string, urgent bool) {
	msg := message(msgDeltas, []Delta{d})
	for name, p := range g.pools {
		if !g.share(name)(&d) {
			continue
		}
		g.later(func() {
			p.broadcast(d.Key, msg)
			if urgent && via != name {
				p.push(msg, urgentMembers)
			}
		})
	}
}

// share tells which deltas a pool's members exchange.
func (g *Gossip) share(pool string) func(*Delta) bool {
	return func(d *Delta) bool {
		if pool == clusterPool || d.kind() != kindFacts {
			return true
		}
		f, err := decodeFacts(d)
		return err == nil && f.Shared
	}
}

// state is this node's side of a full exchange.
func (g *Gossip) state(pool string) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return encode(&state{Back: g.back(pool), Digests: g.ledger.digests(g.share(pool))})
}

// back is where this node gets messages of a pool.
func (g *Gossip) back(pool string) string {
	port := g.Port
	if pool == meshPool {
		port = g.MeshPort
	}
	return netip.AddrPortFrom(g.Address, port).String()
}

// issue says what the cluster makes of a node, or what this node alone does.
func (g *Gossip) issue(i issue, now time.Time) {
	g.dirty = true
	v := verdict{State: i.state, Reason: i.reason, Since: now.UnixMilli()}
	if len(v.Reason) > maxReason {
		v.Reason = v.Reason[:maxReason]
	}
	if i.alone {
		delete(g.private, i.subject)
		if g.publicState(i.subject) != i.state {
			g.private[i.subject] = v
		}
		return
	}
	delete(g.private, i.subject)
	if g.publicState(i.subject) == i.state {
		return
	}
	g.verdicts[i.subject] = v
	g.tell(newVerdict(i.subject, g.ledger.get(verdictKey(i.subject)), v, now), true, now)
}
