package datapath

import (
	"context"
	"errors"
	"iter"

	"causeway/identity"
	"causeway/lb"
)

// TargetMap holds the backends that frontends choose from. It shares its state with
// a FrontendMap: the targets of a port that no frontend has are kept in memory until one
// comes. Its methods are safe for concurrent use.
type TargetMap struct{ b *balancer }

// Update makes the target available to new connections.
func (m *TargetMap) Update(_ context.Context, t lb.Target) error {
	want, err := newTarget(t)
	if err != nil {
		return err
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	return m.b.setTarget(newPortID(t.Port), want)
}

// Delete takes the target away from new connections; those that it has stay.
func (m *TargetMap) Delete(_ context.Context, t lb.Target) error {
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	return m.b.deleteTarget(newPortID(t.Port), targetKey(t))
}

// Prune deletes the targets that aren't desired, of clusters that have synced.
func (m *TargetMap) Prune(_ context.Context, desired iter.Seq[lb.Target], synced func(identity.ClusterID) bool) error {
	keep := make(map[portID]map[backendKey]bool)
	for t := range desired {
		port := newPortID(t.Port)
		if keep[port] == nil {
			keep[port] = make(map[backendKey]bool)
		}
		keep[port][targetKey(t)] = true
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	var errs []error
	for port, svc := range m.b.services {
		for key, be := range svc.backends {
			if !keep[port][key] && synced(identity.ClusterID(be.value.Owner)) {
				errs = append(errs, m.b.deleteTarget(port, key))
			}
		}
	}
	return errors.Join(errs...)
}

func targetKey(t lb.Target) backendKey {
	return backendKey{address: t.Address.Unmap(), port: t.Number}
}
