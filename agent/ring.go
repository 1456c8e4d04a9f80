package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"causeway/clustermesh/gossip"
	"causeway/clustermesh/peering"
	"causeway/kvstore"
	"causeway/lb"
)

// storedRing is the mesh's gossip keys as the own store has them, for the cluster's own nodes alone: a node that is new,
// or was away while they were changed, learns them there.
type storedRing struct {
	At   uint64   `json:"at"`
	Keys [][]byte `json:"keys"` // base64
}

// ringInterval is how often it is looked whether the store has the newest ring.
const ringInterval = 30 * time.Second

// syncRing keeps the ring of this node in step with that of the store, until ctx ends. The newer one wins.
func (a *agent) syncRing(ctx context.Context) error {
	store := a.own().store
	watch := store.Watch(ctx, peering.RingKey)
	// What was changed on a node of another cluster came by gossip, and nobody has put it into this store.
	tick := time.NewTicker(ringInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.storeRing(ctx, a.life.gossip.Ring())
		case batch, ok := <-watch:
			if !ok {
				return nil
			}
			a.followRing(ctx, batch)
		case <-a.ringChanged:
			a.storeRing(ctx, a.life.gossip.Ring())
		}
	}
}

func (a *agent) followRing(ctx context.Context, batch kvstore.Batch) {
	if batch.Listed && len(batch.Events) == 0 {
		a.offerRing(ctx) // there is none: this may be the cluster's first node
	}
	for _, ev := range batch.Events {
		if ev.Kind == kvstore.EventDelete {
			a.offerRing(ctx)
			continue
		}
		if err := a.learnRing(ev.Value); err != nil {
			a.log.Error("the mesh's gossip keys are not as the store has them", "error", err)
		}
	}
}

// ringProblems says that the node has no ring yet that its cluster agrees on.
func (a *agent) ringProblems() []string {
	if a.life.gossip.Ring().At > 0 {
		return nil
	}
	return []string{"gossip: this node has not learnt the mesh's keys from its cluster's store yet"}
}

func (a *agent) learnRing(value []byte) error {
	var stored storedRing
	if err := lb.Unmarshal(value, &stored); err != nil {
		return fmt.Errorf("%s: %w", peering.RingKey, err)
	}
	return a.life.gossip.LearnRing(gossip.Ring{At: stored.At, Keys: stored.Keys})
}

// offerRing puts this node's ring into a store that has none.
func (a *agent) offerRing(ctx context.Context) {
	ring := a.life.gossip.Ring()
	if ring.At == 0 {
		ring.At = uint64(time.Now().UnixMilli())
	}
	value, err := json.Marshal(storedRing{At: ring.At, Keys: ring.Keys})
	if err == nil {
		err = a.own().store.Create(ctx, peering.RingKey, value)
	}
	if err != nil && !errors.Is(err, kvstore.ErrConflict) && ctx.Err() == nil {
		a.log.Warn("the mesh's gossip keys are not in the store", "error", err)
	}
	// It comes back by the watch.
}

// ringAttempts bounds how often a changed ring is tried to be stored while others change it too.
const ringAttempts = 5

// storeRing puts a ring that was changed on this node into the store, unless that has a newer one.
func (a *agent) storeRing(ctx context.Context, ring gossip.Ring) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var err error
	for range ringAttempts {
		if err = a.tryStoreRing(ctx, ring); !errors.Is(err, kvstore.ErrConflict) {
			break
		}
	}
	if err != nil && ctx.Err() == nil {
		a.log.Warn("the changed gossip keys are not in the store: nodes that are away now will not find them there", "error", err)
	}
}

func (a *agent) tryStoreRing(ctx context.Context, ring gossip.Ring) error {
	store := a.own().store
	value, err := json.Marshal(storedRing{At: ring.At, Keys: ring.Keys})
	if err != nil {
		return err
	}
	entry, err := store.Get(ctx, peering.RingKey)
	if errors.Is(err, kvstore.ErrNotFound) {
		return store.Create(ctx, peering.RingKey, value)
	}
	if err != nil {
		return err
	}
	var stored storedRing
	if err := lb.Unmarshal(entry.Value, &stored); err == nil && stored.At >= ring.At {
		return nil
	}
	return store.CompareAndSwap(ctx, peering.RingKey, entry.Revision, value)
}
