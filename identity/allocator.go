package identity

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"causeway/kvstore"
)

// Allocator gives labels their number, in the store of the cluster, so that the same labels have the
// same number on all of its nodes. It counts the local users of each number; a node's use is a
// reference in the store that hangs on the node's lease, and a number without references is free again.
//
// Every write is conditional on what was read, so that any number of nodes may race. Safe for concurrent use.
type Allocator struct {
	registry registry
	log      *slog.Logger

	mu   sync.Mutex // guards uses and each use's waiting; never held during a request
	uses map[string]*use

	sweep   sync.Mutex       // serializes Sweep, guards orphans
	orphans map[Number]int64 // without references at the last pass, with the revision of their key
}

// use is this node's use of one set of labels.
type use struct {
	labels  Labels
	turn    chan struct{} // capacity 1; who fills it may do requests for these labels, and change what follows
	waiting int           // who has the turn or wants it; guarded by Allocator.mu

	number Number // 0 before it is known and after it was given back; without users: to be given back
	count  int    // local users
	stored bool   // this process has written the reference
}

// NewAllocator returns the allocator of a node. It does no requests yet.
func NewAllocator(store kvstore.Store, cluster string, id ClusterID, node string, log *slog.Logger) *Allocator {
	return &Allocator{
		registry: registry{store: store, cluster: cluster, id: id, node: node},
		log:      log,
		uses:     map[string]*use{},
	}
}

// Allocate returns the number of labels and counts one more user of it on this node. While the node
// uses the labels already it asks nobody; otherwise it returns ErrUnavailable if
// the store does not answer, and ErrExhausted if the cluster has no number left.
func (a *Allocator) Allocate(ctx context.Context, labels Labels) (Number, error) {
	u, err := a.take(ctx, labels)
	if err != nil {
		return 0, err
	}
	defer a.leave(u)
	if u.count == 0 {
		n, err := a.registry.settle(ctx, labels, u.number)
		u.number, u.stored = n, err == nil
		if err != nil {
			return 0, fmt.Errorf("allocating an identity for %s: %w", labels, err)
		}
	}
	u.count++
	return u.number, nil
}

// Adopt counts one more user of labels that is known to have number n: an endpoint restored from disk after a
// restart, or a new one whose labels another node has while the store is away. It asks nobody, so
// that such endpoints work without the store; Reconcile makes the store agree. It returns the number to use, which
// differs from n if this node uses the labels under another one.
func (a *Allocator) Adopt(ctx context.Context, labels Labels, n Number) (Number, error) {
	if !n.Valid() || n.Cluster() != a.registry.id {
		return 0, fmt.Errorf("adopting identity %d for %s: it is not one of cluster %d", uint32(n), labels, a.registry.id)
	}
	u, err := a.take(ctx, labels)
	if err != nil {
		return 0, err
	}
	defer a.leave(u)
	if u.count == 0 {
		u.number, u.stored = n, false
	}
	u.count++
	return u.number, nil
}

// Release counts one user of labels less. With the last one the node's reference goes, and the number too if
// no other node has one. An error says that the store did not answer: the user is gone all the same,
// and Reconcile tries again.
func (a *Allocator) Release(ctx context.Context, labels Labels) error {
	u, err := a.take(ctx, labels)
	if err != nil {
		return err
	}
	defer a.leave(u)
	if u.count == 0 {
		return fmt.Errorf("releasing the identity of %s: this node does not use it", labels)
	}
	u.count--
	if u.count > 0 {
		return nil
	}
	return a.giveBack(ctx, u)
}

// giveBack removes the node's reference. The number of what it couldn't give back stays set, for Reconcile.
func (a *Allocator) giveBack(ctx context.Context, u *use) error {
	if err := a.registry.unref(ctx, u.number); err != nil {
		return fmt.Errorf("releasing identity %d of %s: %w", uint32(u.number), u.labels, err)
	}
	n := u.number
	u.number, u.stored = 0, false
	if err := a.registry.collect(ctx, u.labels, n); err != nil {
		a.log.Debug("identity without references is left to a sweep", "identity", n, "error", err)
	}
	return nil
}

// Renumbered says that labels in use have another number than before: the store gave theirs away or
// another one to their labels, while this node could not reach it.
type Renumbered struct {
	Labels   Labels
	Old, New Number
}

// Reconcile makes the store agree with what this node uses: it stores references of adopted numbers,
// those that the store lost, and takes back what Release could not. Call it once the store answers after a start or an
// outage, and now and then. The endpoints of what it returns must take the new number. It stops at the first request
// that fails, and returns what has changed until then.
func (a *Allocator) Reconcile(ctx context.Context) ([]Renumbered, error) {
	a.mu.Lock()
	known := make([]Labels, 0, len(a.uses))
	for _, key := range slices.Sorted(maps.Keys(a.uses)) {
		known = append(known, a.uses[key].labels)
	}
	a.mu.Unlock()

	var changes []Renumbered
	for _, labels := range known {
		change, err := a.reconcile(ctx, labels)
		if change != nil {
			changes = append(changes, *change)
		}
		if err != nil {
			return changes, fmt.Errorf("reconciling the identity of %s: %w", labels, err)
		}
	}
	return changes, nil
}

func (a *Allocator) reconcile(ctx context.Context, labels Labels) (*Renumbered, error) {
	u, err := a.take(ctx, labels)
	if err != nil {
		return nil, err
	}
	defer a.leave(u)
	switch {
	case u.number == 0:
		return nil, nil
	case u.count == 0:
		return nil, a.giveBack(ctx, u)
	case u.stored:
		if ok, err := a.registry.agrees(ctx, labels, u.number); ok || err != nil {
			return nil, err
		}
	}
	old := u.number
	u.stored = false
	n, err := a.registry.settle(ctx, labels, old)
	if err != nil {
		return nil, err
	}
	u.number, u.stored = n, true
	if n == old {
		return nil, nil
	}
	a.log.Warn("identity has changed", "labels", labels, "old", old, "new", n)
	if err := a.registry.unref(ctx, old); err != nil {
		a.log.Debug("reference to the former identity is left to its lease", "identity", old, "error", err)
	}
	return &Renumbered{Labels: labels, Old: old, New: n}, nil
}

// Sweep collects the numbers that no node has a reference to, left by nodes that crashed before they could. A
// number must have been without references at the last pass too, so call it at intervals that are longer than
// an outage that nodes should survive without being renumbered. It returns how many it collected.
func (a *Allocator) Sweep(ctx context.Context) (int, error) {
	a.sweep.Lock()
	defer a.sweep.Unlock()
	found, err := a.registry.orphans(ctx)
	if err != nil {
		return 0, fmt.Errorf("sweeping identities of cluster %s: %w", a.registry.cluster, err)
	}
	seen := a.orphans
	a.orphans = make(map[Number]int64, len(found))
	collected := 0
	for _, o := range found {
		if revision, ok := seen[o.Number]; !ok || revision != o.revision {
			a.orphans[o.Number] = o.revision
			continue
		}
		ok, err := a.registry.remove(ctx, o)
		if err != nil {
			return collected, fmt.Errorf("sweeping identity %d: %w", uint32(o.Number), err)
		}
		if ok {
			collected++
		}
	}
	return collected, nil
}

// take waits for the turn to work on labels; leave must follow.
func (a *Allocator) take(ctx context.Context, labels Labels) (*use, error) {
	if err := CheckLabels(labels); err != nil {
		return nil, fmt.Errorf("identity of %s: %w", quote(labels.String()), err)
	}
	key := labels.String()
	a.mu.Lock()
	u, ok := a.uses[key]
	if !ok {
		u = &use{labels: maps.Clone(labels), turn: make(chan struct{}, 1)}
		a.uses[key] = u
	}
	u.waiting++
	a.mu.Unlock()

	select {
	case u.turn <- struct{}{}:
		return u, nil
	case <-ctx.Done():
		a.mu.Lock()
		a.forget(u)
		a.mu.Unlock()
		return nil, fmt.Errorf("waiting for the identity of %s: %w", labels, ctx.Err())
	}
}

// leave passes the turn on.
func (a *Allocator) leave(u *use) {
	a.mu.Lock()
	defer a.mu.Unlock()
	<-u.turn
	a.forget(u)
}

// forget counts one less who waits, and drops a use that nobody needs. A use that somebody waits for is never
// dropped, so number may be read without the turn once nobody waits. Needs mu.
func (a *Allocator) forget(u *use) {
	u.waiting--
	if u.waiting == 0 && u.count == 0 && u.number == 0 {
		delete(a.uses, u.labels.String())
	}
}
