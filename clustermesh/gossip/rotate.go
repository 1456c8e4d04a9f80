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
