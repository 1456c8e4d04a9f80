package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"slices"
	"sync"

	"causeway/identity"
)

// TunnelMap tells the programs how packets get to each node, and what may come from it. It is the kernel's target of the tunnels
// table. Its methods are safe for concurrent use.
//
// A node has an entry at its underlay address, and in mode wireguard one at each of its tunnel addresses; see bpf/lib/nodes.h.
type TunnelMap struct {
	mu sync.Mutex
	t  *table[bpfNodeKey, bpfNode]
	// node is this node's address, mtu that of its pods.
	node netip.Addr
	mtu  int
	// owners has whose the entries are that were set since the start. Those of former agents are told by their cluster alone.
	owners map[bpfNodeKey]identity.NodeName
	// nodes has the keys of each node that were set since the start.
	nodes map[identity.NodeName][]bpfNodeKey
}

func newTunnelMap(t *table[bpfNodeKey, bpfNode], node netip.Addr, mtu int) *TunnelMap {
	return &TunnelMap{
		t: t, node: node, mtu: mtu,
		owners: make(map[bpfNodeKey]identity.NodeName), nodes: make(map[identity.NodeName][]bpfNodeKey),
	}
}

// Tunnels returns the map of nodes.
func (d *Datapath) Tunnels() *TunnelMap { return d.tunnels }

// Update makes the kernel know the way to a node, and forget the addresses that it had before. This node itself has no entry: nothing
// is sent to it, and nothing in its name comes from elsewhere.
func (m *TunnelMap) Update(_ context.Context, t identity.Tunnel) error {
	value, err := m.entry(t)
	if err != nil {
		return fmt.Errorf("tunnel to node %s: %w", t.NodeName(), err)
	}
	keys := tunnelKeys(t)
	if t.Self || t.Address.Unmap() == m.node {
		keys = nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	name := t.NodeName()
	// The last key is that of the underlay address, by which packets are sent: before that, their answers can come.
	for _, key := range keys {
		if err := m.t.put(key, value); err != nil {
			return err
		}
		if m.owners[key] != name {
			m.owners[key] = name
			m.nodes[name] = append(m.nodes[name], key)
		}
	}
	return m.keep(name, t.ClusterID, keys)
}

// Delete makes the kernel refuse what the node sends, and what is sent to it. An address that another node has taken
// over stays.
func (m *TunnelMap) Delete(_ context.Context, t identity.Tunnel) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	errs := []error{m.keep(t.NodeName(), t.ClusterID, nil)}
	for _, key := range tunnelKeys(t) {
		errs = append(errs, m.remove(key, t.NodeName(), t.ClusterID))
	}
	return errors.Join(errs...)
}

// Prune removes the nodes that aren't desired, of clusters that have synced.
func (m *TunnelMap) Prune(_ context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	keep := make(map[bpfNodeKey]bool)
	for t := range desired {
		for _, key := range tunnelKeys(t) {
			keep[key] = true
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	var stale []bpfNodeKey
	for k, v := range m.t.all(&err) {
		if !keep[k] && synced(identity.ClusterID(v.Cluster)) {
			stale = append(stale, k)
		}
	}
	errs := []error{err}
	for _, k := range stale {
		delete(m.owners, k)
		errs = append(errs, m.t.del(k))
	}
	return errors.Join(errs...)
}

// keep removes all keys of a node but those given.
func (m *TunnelMap) keep(name identity.NodeName, cluster identity.ClusterID, keys []bpfNodeKey) error {
	wanted := make(map[bpfNodeKey]bool)
	for _, key := range keys {
		wanted[key] = true
	}
	var left []bpfNodeKey
	var errs []error
	for _, key := range m.nodes[name] {
		if m.owners[key] != name || slices.Contains(left, key) {
			continue // Another node has taken it over, or has had it for a time.
		}
		if wanted[key] {
			left = append(left, key)
		} else if err := m.remove(key, name, cluster); err != nil {
			left, errs = append(left, key), append(errs, err)
		}
	}
	m.nodes[name] = left
	if len(left) == 0 {
		delete(m.nodes, name)
	}
	return errors.Join(errs...)
}

// remove takes a node's entry away, unless it is another's by now.
func (m *TunnelMap) remove(key bpfNodeKey, name identity.NodeName, cluster identity.ClusterID) error {
	if owner, ok := m.owners[key]; ok && owner != name {
		return nil
	}
	value, ok, err := m.t.get(key)
	if err != nil {
		return err
	}
	if ok && value.Cluster == uint8(cluster) {
		if err := m.t.del(key); err != nil {
			return err
		}
	}
	delete(m.owners, key)
	return nil
}

// entry returns what the kernel shall know of the node.
func (m *TunnelMap) entry(t identity.Tunnel) (bpfNode, error) {
	if !t.Address.IsValid() {
		return bpfNode{}, errors.New("it has no address on the underlay")
	}
	if t.MTU < 0 || t.MTU > math.MaxUint16 {
		return bpfNode{}, fmt.Errorf("an MTU of %d bytes is not between 0 and %d", t.MTU, math.MaxUint16)
	}
	value := bpfNode{Cluster: uint8(t.ClusterID), Mtu: uint16(m.mtu), Address: toIP(t.Address)}
	if t.MTU != 0 {
		value.Mtu = uint16(min(t.MTU, m.mtu))
	}
	switch t.Mode {
	case identity.TunnelPlain:
		value.Mode = uint8(bpfNodeModeNODE_PLAIN)
		t.Local, t.Remote = orElse(t.Local, m.node), orElse(t.Remote, t.Address)
	case identity.TunnelWireGuard:
		value.Mode = uint8(bpfNodeModeNODE_WIREGUARD)
	case identity.TunnelClosed:
		value.Mode = uint8(bpfNodeModeNODE_CLOSED)
		return value, nil
	default:
		return bpfNode{}, fmt.Errorf("mode %q is none of plain, wireguard and closed", t.Mode)
	}
	if !t.Local.IsValid() || !t.Remote.IsValid() || t.Local.Unmap().Is4() != t.Remote.Unmap().Is4() {
		return bpfNode{}, fmt.Errorf("its outer addresses must be two of one family, not %q and %q", t.Local, t.Remote)
	}
	value.Local, value.Remote = toIP(t.Local), toIP(t.Remote)
	return value, nil
}

func orElse(a, b netip.Addr) netip.Addr {
	if a.IsValid() {
		return a
	}
	return b
}

// tunnelKeys returns the keys of a node: its tunnel addresses in mode wireguard, and at last its underlay address.
func tunnelKeys(t identity.Tunnel) (keys []bpfNodeKey) {
	if !t.Address.IsValid() {
		return nil
	}
	if t.Mode == identity.TunnelWireGuard {
		for _, k := range t.Keys {
			if a := t.TunnelAddress(k.Slot); a.IsValid() {
				keys = append(keys, bpfNodeKey{Address: toIP(a)})
			}
		}
	}
	return append(keys, bpfNodeKey{Address: toIP(t.Address)})
}
