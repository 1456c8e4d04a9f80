package datapath

import (
	"context"
	"errors"
	"iter"
	"sync"

	"causeway/identity"
)

// NodeMap tells the overlay program which nodes there are, and of which cluster.
// Its methods are safe for concurrent use.
type NodeMap struct {
	mu sync.Mutex
	t  *table[bpfNodeKey, bpfNode]
}

// Update makes the kernel know the node.
func (m *NodeMap) Update(_ context.Context, n identity.Node) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.t.put(nodeKey(n), bpfNode{Cluster: uint8(n.ClusterID)})
}

// Delete makes the kernel refuse what the node sends. If its address has been taken over
// by a node of another cluster, that one stays.
func (m *NodeMap) Delete(_ context.Context, n identity.Node) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v, ok, err := m.t.get(nodeKey(n)); err != nil || !ok || v.Cluster != uint8(n.ClusterID) {
		return err
	}
	return m.t.del(nodeKey(n))
}

// Prune removes the nodes that aren't desired, of clusters that have synced.
func (m *NodeMap) Prune(_ context.Context, desired iter.Seq[identity.Node], synced func(identity.ClusterID) bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	keep := make(map[bpfNodeKey]bool)
	for n := range desired {
		keep[nodeKey(n)] = true
	}
	var err error
	var stale []bpfNodeKey
	for k, v := range m.t.all(&err) {
		if !keep[k] && synced(identity.ClusterID(v.Cluster)) {
			stale = append(stale, k)
		}
	}
	errs := []error{err}
	for _, k := range stale {
		errs = append(errs, m.t.del(k))
	}
	return errors.Join(errs...)
}

func nodeKey(n identity.Node) bpfNodeKey { return bpfNodeKey{Address: toIP(n.Address)} }
