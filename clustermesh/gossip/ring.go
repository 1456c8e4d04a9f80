package gossip

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"
)

// Ring is the mesh's gossip keys, the first encrypts, with the time of the change that made them so, in milliseconds since 1970.
type Ring struct {
	At   uint64
	Keys [][]byte
}

// clone keeps the ring's keys from whoever it is handed to.
func (r Ring) clone() Ring {
	keys := make([][]byte, len(r.Keys))
	for i, key := range r.Keys {
		keys[i] = slices.Clone(key)
	}
	return Ring{At: r.At, Keys: keys}
}

// maxRingAt is the end of the year 9999. A ring from later could never be changed again.
const maxRingAt = 253402300799999

func (r Ring) check() error {
	if r.At > maxRingAt {
		return fmt.Errorf("gossip keys: they were changed at %d, which is no time in milliseconds since 1970", r.At)
	}
	return checkKeys(r.Keys)
}

// Ring returns the keys that this node has now. At is 0 if they were made here and never changed.
func (g *Gossip) Ring() Ring {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Ring{g.ringAt, g.keys}.clone()
}

// LearnRing takes over a newer ring, which came by another way than gossip: a node that was away while keys were changed has it from
// its cluster's store. An older one changes nothing.
func (g *Gossip) LearnRing(r Ring) error {
	if err := r.check(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.At <= g.ringAt {
		return nil
	}
	if err := g.setRing(r.clone()); err != nil {
		g.problem["keyring"] = err.Error()
		return err
	}
	delete(g.problem, "keyring")
	if old := g.ledger.get(kindKeyring); old != nil && old.Incarnation < r.At {
		g.ledger.drop(kindKeyring)
	}
	g.measure(time.Now())
	g.chored = time.Time{} // who could not be understood may be now
	g.wakeUp()
	return nil
}

// AdoptRing has the own cluster change to another mesh's keys, without a moment in which its nodes do not understand each
// other: first all accept them, then all encrypt with the first of them, then all forget their own. It returns when all live nodes of the
// cluster encrypt with it; nodes that are down have the ring from their store later. On failure the own keys stay in use, and the
// error names a node that the change waited for.
func (g *Gossip) AdoptRing(ctx context.Context, keys [][]byte) error {
	if err := checkKeys(keys); err != nil {
		return err
	}
	wanted := Ring{Keys: keys}.clone().Keys
	own := g.Ring().Keys
	if equalKeys(own, wanted) {
		return nil
	}
	added := minus(wanted, own)
	err := g.changeKeys(func(now [][]byte) ([][]byte, error) { return append(slices.Clone(now), minus(wanted, now)...), nil })
	if err != nil {
		return err
	}
	err = g.changeKeysWhen(ctx, "have the new keys", g.lacksKeys(wanted), func(now [][]byte) ([][]byte, error) {
		return append(slices.Clone(wanted), minus(now, wanted)...), nil
	})
	if err != nil {
		return g.takeBack(err, func(now [][]byte) ([][]byte, error) { return minus(now, added), nil })
	}
	err = g.changeKeysWhen(ctx, "encrypt with the new key", g.usesOther(wanted[0]), func([][]byte) ([][]byte, error) { return wanted, nil })
	if err != nil {
		// Some may encrypt with the new key already, and must be understood until they have heard of this.
		return g.takeBack(err, func([][]byte) ([][]byte, error) { return append(slices.Clone(own), added...), nil })
	}
	return nil
}

// takeBack undoes a change of keys that failed.
func (g *Gossip) takeBack(reason error, change func([][]byte) ([][]byte, error)) error {
	if err := g.changeKeys(change); err != nil {
		return fmt.Errorf("%w; and the own keys could not be put back: %w", reason, err)
	}
	return reason
}

// lacksKeys and usesOther name a live node of the own cluster that does not have all of these keys, or does not encrypt with this one.
func (g *Gossip) lacksKeys(keys [][]byte) func() string {
	wanted := fingerprints(keys)
	return func() string {
		return g.liveWithout(func(held []string) bool {
			return !slices.ContainsFunc(wanted, func(fp string) bool { return !slices.Contains(held, fp) })
		})
	}
}

func (g *Gossip) usesOther(key []byte) func() string {
	first := Fingerprint(key)
	return func() string {
		return g.liveWithout(func(held []string) bool { return len(held) > 0 && held[0] == first })
	}
}

// changeKeysWhen changes the ring as soon as lacking names nobody any more.
func (g *Gossip) changeKeysWhen(ctx context.Context, what string, lacking func() string, change func([][]byte) ([][]byte, error)) error {
	for {
		g.mu.Lock()
		news, who := g.ringNews, lacking()
		if who == "" {
			changed, err := g.changeKeysLocked(change)
			g.mu.Unlock()
			g.ringChanged(changed)
			return err
		}
		g.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("gossip keys: node %s does not %s: %w; see there: clustermesh status", who, what, ctx.Err())
		}
	}
}

// toldRing wakes whoever waits for other nodes' keys.
func (g *Gossip) toldRing() {
	close(g.ringNews)
	g.ringNews = make(chan struct{})
}

// ringChanged tells of a change that was made here; nil is none.
func (g *Gossip) ringChanged(r *Ring) {
	if r != nil && g.RingChanged != nil {
		g.RingChanged(*r)
	}
}

func equalKeys(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

// minus returns the keys that others lacks.
func minus(keys, others [][]byte) (rest [][]byte) {
	for _, key := range keys {
		if !slices.ContainsFunc(others, func(other []byte) bool { return bytes.Equal(other, key) }) {
			rest = append(rest, key)
		}
	}
	return rest
}
