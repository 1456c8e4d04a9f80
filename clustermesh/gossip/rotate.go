package gossip

import (
	"fmt"
	"slices"
	"time"

	"causeway/identity"
)

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
			return nil, fmt.Errorf("not all nodes have key %s yet: %s; wait, or see: clustermesh members", fingerprint, lacking)
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
		return 0, fmt.Errorf("no key %s in the ring; see: clustermesh keyring list", fingerprint)
	}
	return i, nil
}

// without names the live nodes whose keys do not satisfy ok: those of the own cluster, and other clusters by their speakers.
func (g *Gossip) without(ok func(held []string) bool) string {
	if name := g.liveWithout(ok); name != "" {
		return name
	}
	for name, f := range g.facts {
		if name.Cluster != g.Self.Cluster && f.Speaker && g.stateOf(name) == identity.NodeAlive && !ok(f.ClusterKeys) {
			return "cluster " + name.Cluster
		}
	}
	return ""
}

// liveWithout names a live node of the own cluster whose keys do not satisfy ok.
func (g *Gossip) liveWithout(ok func(held []string) bool) string {
	for _, name := range g.live() {
		if !ok(g.facts[name].Keys) {
			return name.String()
		}
	}
	return ""
}

// changeKeys changes the ring here, and by gossip everywhere.
func (g *Gossip) changeKeys(change func([][]byte) ([][]byte, error)) error {
	g.mu.Lock()
	changed, err := g.changeKeysLocked(change)
	g.mu.Unlock()
	g.ringChanged(changed)
	return err
}

// changeKeysLocked returns the new ring, or nil if nothing has changed.
func (g *Gossip) changeKeysLocked(change func([][]byte) ([][]byte, error)) (*Ring, error) {
	keys, err := change(g.keys)
	if err != nil || equalKeys(keys, g.keys) {
		return nil, err
	}
	r := Ring{At: max(uint64(time.Now().UnixMilli()), g.ringAt+1), Keys: keys}
	if old := g.ledger.get(kindKeyring); old != nil {
		r.At = max(r.At, old.Incarnation+1)
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	if err := g.setRing(r); err != nil {
		return nil, err
	}
	g.tell(Delta{Key: kindKeyring, Incarnation: r.At, Value: encode(keys)}, true, time.Now())
	g.measure(time.Now())
	g.wakeUp()
	r = r.clone()
	return &r, nil
}

func (g *Gossip) setRing(r Ring) error {
	if err := keyFile(g.KeyFile).write(r); err != nil {
		return err
	}
	if err := applyKeys(g.ring, r.Keys); err != nil {
		return fmt.Errorf("gossip keys: %w", err)
	}
	g.keys, g.ringAt = r.Keys, r.At
	return nil
}

// acceptKeys takes over the ring that another node has changed, unless this node's is newer.
func (g *Gossip) acceptKeys(d Delta) error {
	var keys [][]byte
	if err := decode(d.Value, &keys); err != nil {
		return err
	}
	r := Ring{At: d.Incarnation, Keys: keys}
	if err := r.check(); err != nil {
		return err
	}
	switch {
	case r.At < g.ringAt:
		return errNoNews // this node has a newer one, from its file or the store
	case r.At == g.ringAt:
		return nil
	}
	if err := g.setRing(r); err != nil {
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
