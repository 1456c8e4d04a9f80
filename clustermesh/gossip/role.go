package gossip

import (
	"fmt"
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

// heldByAll are the keys that every live node of the cluster holds, the first being the one that all encrypt with, if they do.
func (g *Gossip) heldByAll() []string {
	held := fingerprints(g.keys)
	for _, name := range g.live() {
		f, known := g.facts[name]
		if !known {
			continue
		}
		held = slices.DeleteFunc(held, func(fp string) bool { return !slices.Contains(f.Keys, fp) })
		if len(held) > 0 && len(f.Keys) > 0 && f.Keys[0] != held[0] {
			held = append([]string{mixed}, slices.DeleteFunc(held, func(fp string) bool { return fp == mixed })...)
		}
	}
	return held
}

// mixed stands where nodes of a cluster do not all encrypt with the same key.
const mixed = "mixed"

// Drain has the whole mesh take this node's backends out of service, or back into it. It returns how many members
// have taken the news; the others get it by gossip.
func (g *Gossip) Drain(on bool) (told int) {
	g.mu.Lock()
	now := time.Now()
	g.own.Draining = on
	g.own.Shared = g.own.Shared || on
	g.tellFacts(now)
	d := *g.ledger.get(factsKey(g.Self))
	pools := maps.Clone(g.pools)
	g.mu.Unlock()
	g.wakeUp()
	msg := message(msgDeltas, []Delta{d})
	took := make(chan bool)
	sent := 0
	for _, p := range pools {
		for _, address := range p.some(drainMembers) {
			sent++
			p.busy.Go(func() { took <- p.reliable(address, msg) })
		}
	}
	for range sent {
		if <-took {
			told++
		}
	}
	return told
}

// drainMembers bounds the members of each pool that are told of a drain directly.
const drainMembers = 64

// Errors of changing keys.
var (
	errKeyUnknown = "no key %s in the ring"
	errKeyMissing = "not all nodes have key %s yet: %s; wait, or see: clustermesh members"
)

// AddKey has every node of the mesh accept what is encrypted with a key too. It is the first step of changing keys: add,
// use, remove.
func (g *Gossip) AddKey(key []byte) error {
	return g.changeKeys(func(keys [][]byte) ([][]byte, error) {
		keys = append(slices.Clone(keys), key)
		return keys, checkKeys(keys)
	})
}

// UseKey has every node encrypt with a key that all hold.
func (g *Gossip) UseKey(fingerprint string) error {
	return g.changeKeys(func(keys [][]byte) ([][]byte, error) {
		i, err := indexOf(keys, fingerprint)
		if err != nil {
			return nil, err
		}
		if lacking := g.without(func(held []string) bool { return slices.Contains(held, fingerprint) }); lacking != "" {
			return nil, fmt.Errorf(errKeyMissing, fingerprint, lacking)
		}
		used := keys[i]
		return append([][]byte{used}, slices.Delete(slices.Clone(keys), i, i+1)...), nil
	})
}

// RemoveKey has every node forget a key that none encrypts with.
func (g *Gossip) RemoveKey(fingerprint string) error {
	return g.changeKeys(func(keys [][]byte) ([][]byte, error) {
		i, err := indexOf(keys, fingerprint)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			return nil, fmt.Errorf("key %s encrypts; use another one first", fingerprint)
		}
		first := Fingerprint(keys[0])
		if using := g.without(func(held []string) bool { return len(held) > 0 && held[0] == first }); using != "" {
			return nil, fmt.Errorf("not all nodes encrypt with %s yet: %s; wait, or see: clustermesh members", first, using)
		}
		return slices.Delete(slices.Clone(keys), i, i+1), nil
	})
}

func indexOf(keys [][]byte, fingerprint string) (int, error) {
	i := slices.IndexFunc(keys, func(key []byte) bool { return Fingerprint(key) == fingerprint })
	if i < 0 {
		return 0, fmt.Errorf(errKeyUnknown, fingerprint)
	}
	return i, nil
}

// without names the live nodes whose keys do not satisfy ok: those of the own cluster, and other clusters by their speakers.
func (g *Gossip) without(ok func(held []string) bool) string {
	for _, name := range g.live() {
		if !ok(g.facts[name].Keys) {
			return name.String()
		}
	}
	for name, f := range g.facts {
		if name.Cluster != g.Self.Cluster && f.Speaker && g.stateOf(name) == identity.NodeAlive && !ok(f.ClusterKeys) {
			return "cluster " + name.Cluster
		}
	}
	return ""
}

// changeKeys changes the ring here, and by gossip everywhere.
func (g *Gossip) changeKeys(change func([][]byte) ([][]byte, error)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	keys, err := change(g.keys)
	if err != nil {
		return err
	}
	// First what tells the others, which is still encrypted with the key that they know.
	d := Delta{Key: kindKeyring, Incarnation: uint64(time.Now().UnixMilli()), Value: encode(keys)}
	if old := g.ledger.get(kindKeyring); old != nil {
		d.Incarnation = max(d.Incarnation, old.Incarnation+1)
	}
	if err := g.setKeys(keys); err != nil {
		return err
	}
	g.tell(d, false, time.Now())
	g.measure(time.Now())
	g.wakeUp()
	return nil
}

func (g *Gossip) setKeys(keys [][]byte) error {
	if err := keyFile(g.KeyFile).write(keys); err != nil {
		return err
	}
	if err := applyKeys(g.ring, keys); err != nil {
		return fmt.Errorf("gossip keys: %w", err)
	}
	g.keys = keys
	return nil
}

// acceptKeys takes over the ring that another node has changed.
func (g *Gossip) acceptKeys(d Delta) error {
	var keys [][]byte
	if err := decode(d.Value, &keys); err != nil {
		return err
	}
	if err := checkKeys(keys); err != nil {
		return err
	}
	if err := g.setKeys(keys); err != nil {
		g.problem["keyring"] = err.Error()
		return err
	}
	delete(g.problem, "keyring")
	g.own.Keys = fingerprints(keys)
	g.later(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.measure(time.Now())
	})
	return nil
}
