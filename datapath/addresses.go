package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"sync"

	"causeway/identity"
)

// AddressMap tells the pod program who is behind an address, and where.
// Its methods are safe for concurrent use.
type AddressMap struct {
	mu sync.Mutex
	t  *table[bpfAddressKey, bpfAddress]
	// node is this node's address, owner its cluster.
	node  netip.Addr
	owner identity.ClusterID
	// blackholes as last set; where an address has the same prefix, the address wins.
	blackholes map[bpfAddressKey]bool
}

// Update makes the prefix reachable.
func (m *AddressMap) Update(_ context.Context, a identity.Address) error {
	if !a.Prefix.IsValid() {
		return fmt.Errorf("address of endpoint %q of cluster %s has no valid prefix", a.Endpoint, a.Cluster)
	}
	key := toPrefixKey(a.Prefix)
	value := bpfAddress{Identity: uint32(a.Identity), Owner: uint8(a.ClusterID), PrefixLen: uint8(key.PrefixLen)}
	switch {
	case a.Local || a.NodeAddress == m.node:
		value.Kind = uint8(bpfAddressKindADDRESS_LOCAL)
	case a.NodeAddress.IsValid():
		value.Kind, value.Tunnel = uint8(bpfAddressKindADDRESS_REMOTE), toIP(a.NodeAddress)
	default:
		return fmt.Errorf("address %s is behind node %s/%s, which has no address", a.Prefix, a.Cluster, a.Node)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.t.put(key, value)
}

// Delete makes the prefix unreachable, unless another cluster has taken it over.
func (m *AddressMap) Delete(_ context.Context, a identity.Address) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := toPrefixKey(a.Prefix)
	value, ok, err := m.t.get(key)
	if err != nil || !ok || uint32(value.PrefixLen) != key.PrefixLen || value.Owner != uint8(a.ClusterID) {
		return err
	}
	return m.remove(key)
}

// Prune removes the prefixes that aren't desired, of clusters that have synced. Blackholes stay.
func (m *AddressMap) Prune(_ context.Context, desired iter.Seq[identity.Address], synced func(identity.ClusterID) bool) error {
	keep := make(map[bpfAddressKey]bool)
	for a := range desired {
		keep[toPrefixKey(a.Prefix)] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.removeAll(func(k bpfAddressKey, v bpfAddress) bool {
		return !v.blackhole() && !keep[k] && synced(identity.ClusterID(v.Owner))
	})
}

// SetBlackholes makes the prefixes unreachable but for the longer prefixes within them: the mesh's pod and
// service ranges, so that packets to nobody are dropped with a reason instead of leaving by the node's default route.
// Blackholes that were set before and aren't among the prefixes are removed.
func (d *Datapath) SetBlackholes(prefixes []netip.Prefix) error {
	return d.addresses.setBlackholes(prefixes)
}

func (m *AddressMap) setBlackholes(prefixes []netip.Prefix) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blackholes = make(map[bpfAddressKey]bool, len(prefixes))
	var errs []error
	for _, p := range prefixes {
		key := toPrefixKey(p)
		m.blackholes[key] = true
		old, ok, err := m.t.get(key)
		if err == nil && ok && uint32(old.PrefixLen) == key.PrefixLen && !old.blackhole() {
			continue
		}
		errs = append(errs, err, m.t.put(key, m.blackhole(key)))
	}
	errs = append(errs, m.removeAll(func(k bpfAddressKey, v bpfAddress) bool {
		return v.blackhole() && !m.blackholes[k]
	}))
	return errors.Join(errs...)
}

func (m *AddressMap) removeAll(stale func(bpfAddressKey, bpfAddress) bool) error {
	var err error
	var keys []bpfAddressKey
	for k, v := range m.t.all(&err) {
		if stale(k, v) {
			keys = append(keys, k)
		}
	}
	errs := []error{err}
	for _, k := range keys {
		errs = append(errs, m.remove(k))
	}
	return errors.Join(errs...)
}

func (m *AddressMap) remove(key bpfAddressKey) error {
	if m.blackholes[key] {
		return m.t.put(key, m.blackhole(key))
	}
	return m.t.del(key)
}

func (m *AddressMap) blackhole(key bpfAddressKey) bpfAddress {
	return bpfAddress{Owner: uint8(m.owner), Kind: uint8(bpfAddressKindADDRESS_BLACKHOLE), PrefixLen: uint8(key.PrefixLen)}
}

func (a bpfAddress) blackhole() bool {
	return bpfAddressKind(a.Kind) == bpfAddressKindADDRESS_BLACKHOLE
}
