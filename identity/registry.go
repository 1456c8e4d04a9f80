package identity

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"causeway/kvstore"
)

// ErrExhausted says that all numbers of a cluster are in use.
var ErrExhausted = errors.New("no identity is free: all 65280 of the cluster are in use; use fewer distinct sets of labels")

// maxAttempts bounds how often a write is tried again because somebody else was faster. Each lost race
// means that another node got its number, so that this many in a row mean something else.
const maxAttempts = 64

// locals is how many numbers a cluster has.
const locals = uint32(MaxLocal - MinLocal + 1)

// registry is a cluster's identities in its store, as one node reads and changes them. It has no state
// of its own. Three kinds of keys make an identity, and only transactions change them:
//
//	ids/NUMBER         → labels, for those who follow the cluster
//	labels/HASH        → number, for those who look for theirs
//	refs/NUMBER/NODE   a node uses it; leased
type registry struct {
	store   kvstore.Store
	cluster string
	id      ClusterID
	node    string
}

// settle finds the number of labels or gives them one, preferably preferred (0: no wish), and stores
// the node's reference. With an error it may return a number too: the node may have a reference to it.
func (r registry) settle(ctx context.Context, labels Labels, preferred Number) (Number, error) {
	candidate, held := preferred, preferred != 0
	if !held {
		candidate = r.first(labels)
	}
	taken := false
	for range maxAttempts {
		n, err := r.join(ctx, labels)
		if errors.Is(err, kvstore.ErrConflict) {
			continue
		}
		if !errors.Is(err, kvstore.ErrNotFound) {
			return n, err
		}
		if taken {
			if candidate, err = r.free(ctx, labels); err != nil {
				return 0, err
			}
			held = false
		}
		err = r.create(ctx, labels, candidate, held)
		if !errors.Is(err, kvstore.ErrConflict) {
			return candidate, err
		}
		taken = true // or the labels got a number meanwhile, then join will do
	}
	return 0, fmt.Errorf("gave up after %d conflicts in the store", maxAttempts)
}

// join adds the node's reference to the number that the labels have: ErrNotFound if they have none, ErrConflict
// if that changed in between.
func (r registry) join(ctx context.Context, labels Labels) (Number, error) {
	entry, found, err := r.lookup(ctx, labels)
	if err != nil {
		return 0, err
	}
	err = r.store.Txn(ctx,
		[]kvstore.Condition{{Key: entry.Key, Revision: entry.Revision}},
		[]kvstore.Op{r.ref(found.Number)})
	return found.Number, err
}

// lookup reads the number that labels have.
func (r registry) lookup(ctx context.Context, labels Labels) (kvstore.Entry, Identity, error) {
	entry, err := r.store.Get(ctx, LabelsKey(r.cluster, labels))
	if err != nil {
		return entry, Identity{}, err
	}
	found, err := decodeLabels(entry.Key, entry.Value)
	switch {
	case err != nil:
		return entry, found, err
	case !maps.Equal(found.Labels, labels):
		return entry, found, fmt.Errorf("key %s holds other labels (%s): two labels with one hash, or somebody wrote there", entry.Key, found.Labels)
	case found.Number.Cluster() != r.id:
		return entry, found, fmt.Errorf("key %s: identity %d belongs to cluster %d, not %d", entry.Key, uint32(found.Number), found.Number.Cluster(), r.id)
	}
	return entry, found, nil
}

// create gives labels the number n: ErrConflict if they have one or n is taken. References to a number that
// nobody has are those of nodes that are about to store it again, after the store lost it; so who
// does not hold n itself leaves it to them.
func (r registry) create(ctx context.Context, labels Labels, n Number, held bool) error {
	value := EncodeIdentity(Identity{Number: n, Labels: labels})
	conditions := []kvstore.Condition{
		{Key: LabelsKey(r.cluster, labels)},
		{Key: IdentityKey(r.cluster, n)},
	}
	if !held {
		conditions = append(conditions, kvstore.Condition{Key: RefsPrefix(r.cluster, n), Prefix: true})
	}
	return r.store.Txn(ctx, conditions, []kvstore.Op{
		{Kind: kvstore.OpPut, Key: LabelsKey(r.cluster, labels), Value: value},
		{Kind: kvstore.OpPut, Key: IdentityKey(r.cluster, n), Value: value},
		r.ref(n),
	})
}

func (r registry) ref(n Number) kvstore.Op {
	value := encode(struct {
		Node string `json:"node"`
	}{r.node})
	return kvstore.Op{Kind: kvstore.OpPut, Key: RefKey(r.cluster, n, r.node), Value: value, Leased: true}
}

// first is the number that labels get unless it is taken. It depends on them alone, so that labels which
// come back, even after the store lost everything, tend to get the number that they had.
func (r registry) first(labels Labels) Number {
	sum := sha256.Sum256([]byte(labels.String()))
	return r.nth(binary.BigEndian.Uint32(sum[:]) % locals)
}

func (r registry) nth(i uint32) Number { return Compose(r.id, uint16(MinLocal)+uint16(i%locals)) }

// free looks for a number that nobody has or refers to, from the labels' first one on.
func (r registry) free(ctx context.Context, labels Labels) (Number, error) {
	entries, err := r.store.List(ctx, IdentitiesPrefix(r.cluster))
	if err != nil {
		return 0, err
	}
	taken := make(map[Number]bool, len(entries))
	for _, e := range entries {
		if n, ok := r.numberOf(e.Key); ok {
			taken[n] = true
		}
	}
	start := uint32(r.first(labels)&0xffff - MinLocal)
	for i := range locals {
		if n := r.nth(start + i); !taken[n] {
			return n, nil
		}
	}
	return 0, ErrExhausted
}

// numberOf returns the number in an ids/ or refs/ key.
func (r registry) numberOf(key string) (Number, bool) {
	rest, ok := strings.CutPrefix(key, IDsPrefix(r.cluster))
	if !ok {
		if rest, ok = strings.CutPrefix(key, refsPrefix(r.cluster)); !ok {
			return 0, false
		}
		rest, _, _ = strings.Cut(rest, "/")
	}
	n, err := strconv.ParseUint(rest, 10, 24)
	return Number(n), err == nil
}

// agrees tells whether the store has labels under number n, with the node's reference.
func (r registry) agrees(ctx context.Context, labels Labels, n Number) (bool, error) {
	_, found, err := r.lookup(ctx, labels)
	if err == nil && found.Number == n {
		_, err = r.store.Get(ctx, RefKey(r.cluster, n, r.node))
	}
	if errors.Is(err, kvstore.ErrNotFound) {
		return false, nil
	}
	return found.Number == n, err
}

// unref removes the node's reference to n.
func (r registry) unref(ctx context.Context, n Number) error {
	return r.store.Delete(ctx, RefKey(r.cluster, n, r.node))
}

// collect removes labels and their number n if no node refers to it.
func (r registry) collect(ctx context.Context, labels Labels, n Number) error {
	entry, found, err := r.lookup(ctx, labels)
	if errors.Is(err, kvstore.ErrNotFound) || err == nil && found.Number != n {
		return nil
	}
	if err != nil {
		return err
	}
	err = r.store.Txn(ctx,
		[]kvstore.Condition{r.unreferenced(n), {Key: entry.Key, Revision: entry.Revision}},
		[]kvstore.Op{
			{Kind: kvstore.OpDelete, Key: entry.Key},
			{Kind: kvstore.OpDelete, Key: IdentityKey(r.cluster, n)},
		})
	if errors.Is(err, kvstore.ErrConflict) {
		return nil // somebody uses it
	}
	return err
}

func (r registry) unreferenced(n Number) kvstore.Condition {
	return kvstore.Condition{Key: RefsPrefix(r.cluster, n), Prefix: true}
}

// orphan is an identity without references.
type orphan struct {
	Identity
	revision       int64 // of its ids/ key
	labelsRevision int64 // of its labels/ key; 0 if that is missing or leads to another number
}

// orphans lists the identities without references, by number.
func (r registry) orphans(ctx context.Context) ([]orphan, error) {
	entries, err := r.store.List(ctx, IdentitiesPrefix(r.cluster))
	if err != nil {
		return nil, err
	}
	referred := map[Number]bool{}
	byKey := make(map[string]kvstore.Entry, len(entries))
	for _, e := range entries {
		byKey[e.Key] = e
		if n, ok := r.numberOf(e.Key); ok && strings.HasPrefix(e.Key, refsPrefix(r.cluster)) {
			referred[n] = true
		}
	}
	var found []orphan
	for _, e := range entries {
		i, err := DecodeIdentity(e.Key, e.Value)
		if err != nil || referred[i.Number] {
			continue // who follows the store reports what doesn't decode
		}
		o := orphan{Identity: i, revision: e.Revision}
		if l, ok := byKey[LabelsKey(r.cluster, i.Labels)]; ok {
			if there, err := decodeLabels(l.Key, l.Value); err == nil && there.Number == i.Number {
				o.labelsRevision = l.Revision
			}
		}
		found = append(found, o)
	}
	slices.SortFunc(found, func(a, b orphan) int { return int(a.Number) - int(b.Number) })
	return found, nil
}

// remove deletes an orphan; false if it isn't one any more.
func (r registry) remove(ctx context.Context, o orphan) (bool, error) {
	conditions := []kvstore.Condition{r.unreferenced(o.Number), {Key: IdentityKey(r.cluster, o.Number), Revision: o.revision}}
	ops := []kvstore.Op{{Kind: kvstore.OpDelete, Key: IdentityKey(r.cluster, o.Number)}}
	if o.labelsRevision != 0 {
		key := LabelsKey(r.cluster, o.Labels)
		conditions = append(conditions, kvstore.Condition{Key: key, Revision: o.labelsRevision})
		ops = append(ops, kvstore.Op{Kind: kvstore.OpDelete, Key: key})
	}
	err := r.store.Txn(ctx, conditions, ops)
	if errors.Is(err, kvstore.ErrConflict) {
		return false, nil
	}
	return err == nil, err
}
