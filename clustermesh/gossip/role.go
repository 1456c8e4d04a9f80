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
	if now.Sub(g.started) < startTime {
		return
	}
	speaker := len(g.Peers) > 0 && slices.Contains(speakersOf(g.candidates(now)), g.Self)
	if !speaker {
		delete(g.problem, meshPool)
	}
	p := g.pools[meshPool]
	switch {
	case speaker && p == nil && !g.closing[meshPool]:
		g.openMesh(now)
	case !speaker && (p != nil || g.own.Speaker):
		g.closeMesh(now)
	case speaker && p != nil && p.holds(g.ours):
		g.renewMesh(p)
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
	for cluster := range g.detector.clusters {
		g.detector.meshMembers(cluster, 0, false, now) // an earlier pool's do not count
	}
	g.joinMissing()
}

// renewMesh opens the mesh pool anew, without the members of a cluster that is no peer any more. memberlist has no way to drop
// a member but to call it dead, which it would tell everybody, the others' peers too. Nothing is announced: others
// have lost a few packets when this node is back, long before they miss it. The members that are left out are refused from now on.
func (g *Gossip) renewMesh(p *pool) {
	g.Log.Info("the mesh's gossip pool is opened anew, since a cluster has left")
	g.closePool(p, false)
}

func (g *Gossip) closeMesh(now time.Time) {
	p := g.pools[meshPool]
	g.own.Speaker = false
	clear(g.own.Votes)
	clear(g.own.RTTs)
	clear(g.own.Silent)
	g.own.Coordinate, g.own.ClusterKeys, g.own.Blocked = nil, nil, nil
	g.tellFacts(now) // through the mesh too, before it is left
	clear(g.detector.clusters)
	if p != nil {
		g.closePool(p, true)
	}
}

// closePool leaves a pool in the background, which takes up to a second if it is announced.
func (g *Gossip) closePool(p *pool, announce bool) {
	delete(g.pools, p.name)
	g.closing[p.name] = true
	g.later(func() {
		g.closers.Go(func() {
			if err := p.close(announce); err != nil {
				g.Log.Warn("a gossip pool was not closed cleanly", "pool", p.name, "error", err)
			}
			g.closed(p.name)
			p.busy.Wait()
		})
	})
}

// closed lets another pool take the port.
func (g *Gossip) closed(pool string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.closing, pool)
	g.chored = time.Time{}
	g.wakeUp()
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
	g.closePool(p, true) // the chores open it again
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
		g.own.Blocked = g.blockedClusters(now)
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

// blockedClusters are those that have members in the mesh pool of which none answers this node over UDP.
func (g *Gossip) blockedClusters(now time.Time) (clusters []string) {
	p := g.pools[meshPool]
	if p == nil {
		return nil
	}
	blocked := p.udpBlocked(now)
	heard := map[string]bool{}
	for name := range p.snapshot() {
		heard[name.Cluster] = heard[name.Cluster] || !slices.Contains(blocked, name)
	}
	for cluster, ok := range heard {
		if !ok && cluster != g.Self.Cluster && g.ours(cluster) {
			clusters = append(clusters, cluster)
		}
	}
	slices.Sort(clusters)
	return clusters
}
