package gossip

import (
	"maps"
	"slices"
	"time"

	"causeway/identity"
)

// changeRole has this node join or leave the mesh pool, as the choice among its cluster's live nodes has it. Nobody
// decides it for others: who knows the same members chooses the same.
func (g *Gossip) changeRole(now time.Time) {
	if len(g.Peers) == 0 || now.Sub(g.started) < startTime {
		return
	}
	speaker := slices.Contains(speakersOf(g.candidates(now)), g.Self)
	p := g.pools[meshPool]
	switch {
	case speaker && p == nil && !g.closing[meshPool]:
		g.openMesh(now)
	case !speaker && p != nil:
		g.closeMesh(now)
	case speaker && p != nil:
		g.adaptMesh(p, now)
	}
}

// candidates are the live nodes, and those that memberlist has given up just now: most of these are back at once, and
// a speaker should not change for that.
func (g *Gossip) candidates(now time.Time) []identity.NodeName {
	names := g.live()
	for name := range g.book {
		t := g.detector.targets[name]
		if name.Cluster == g.Self.Cluster && name != g.Self && t != nil && !t.member && now.Sub(t.missing) < g.Timing.Patience &&
			now.Sub(g.started) > 2*g.Timing.Patience && g.stateOf(name) == identity.NodeAlive {
			names = append(names, name)
		}
	}
	return slices.DeleteFunc(names, func(n identity.NodeName) bool { return g.facts[n].Stopping })
}

func (g *Gossip) openMesh(now time.Time) {
	p, err := g.open(meshPool, g.MeshPort, MeshProfile(g.farthest()))
	if err != nil {
		// Shown by status, and tried again with the next chores.
		g.problem[meshPool] = err.Error()
		return
	}
	delete(g.problem, meshPool)
	g.pools[meshPool] = p
	g.own.Speaker, g.own.Shared = true, true
	g.tellFacts(now)
	g.joinMissing()
}

func (g *Gossip) closeMesh(now time.Time) {
	p := g.pools[meshPool]
	g.own.Speaker = false
	clear(g.own.Votes)
	clear(g.own.RTTs)
	clear(g.own.Silent)
	g.own.Coordinate, g.own.ClusterKeys = nil, nil
	g.tellFacts(now) // through the mesh too, before it is left
	for cluster := range g.detector.clusters {
		delete(g.detector.clusters, cluster)
	}
	g.closePool(p)
}

// closePool has a pool take its leave in the background.
func (g *Gossip) closePool(p *pool) {
	delete(g.pools, p.name)
	g.closing[p.name] = true
	g.later(func() {
		g.closers.Go(func() {
			if err := p.close(true); err != nil {
				g.Log.Warn("a gossip pool was not closed cleanly", "pool", p.name, "error", err)
			}
			g.mu.Lock()
			defer g.mu.Unlock()
			delete(g.closing, p.name)
		})
	})
}

// adaptMesh opens the mesh pool anew where the round trip has changed so much that its timeouts are wrong.
func (g *Gossip) adaptMesh(p *pool, now time.Time) {
	wanted := MeshProfile(g.farthest())
	if wanted == p.profile {
		g.measured = now
		return
	}
	// Not for a moment's slowness.
	if now.Sub(g.measured) < 10*time.Second {
		return
	}
	g.Log.Info("the mesh's round trips have changed", "probeTimeout", wanted.ProbeTimeout, "before", p.profile.ProbeTimeout)
	g.measured = now
	g.closePool(p) // the chores open it again
}

// farthest is the round trip to the farthest cluster; 0 if none is known.
func (g *Gossip) farthest() (rtt time.Duration) {
	for _, r := range g.detector.clusters {
		rtt = max(rtt, r.rtt)
	}
	return rtt
}

// measureInterval is how often a speaker tells of round trips and coordinates that have changed: they change all the time.
const measureInterval = 30 * time.Second

// measure tells of the keys that are in use and, now and then, of round trips and coordinates.
func (g *Gossip) measure(now time.Time) {
	g.own.Keys = fingerprints(g.keys)
	if g.own.Speaker {
		g.own.ClusterKeys = g.heldByAll()
		g.measureRTTs(now)
	}
	g.tellFacts(now)
}

func (g *Gossip) measureRTTs(now time.Time) {
	due := now.Sub(g.told) >= measureInterval
	for cluster, r := range g.detector.clusters {
		if us := uint32(r.rtt.Microseconds()); us > 0 && (due || g.own.RTTs[cluster] == 0) {
			g.own.RTTs[cluster] = us
		}
	}
	maps.DeleteFunc(g.own.RTTs, func(c string, _ uint32) bool { return g.detector.clusters[c] == nil })
	if due {
		g.told = now
		g.own.Coordinate = wire(g.coord.GetCoordinate())
	}
}
