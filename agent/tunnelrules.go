package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"causeway/identity"
)

// pair are the slots of the keys that packets go between: this node's, and the other's.
type pair struct{ local, remote uint8 }

// tunnelRules is what the tunnels to all nodes follow from. It is a value, and pure.
type tunnelRules struct {
	self identity.Node
	mode identity.Encryption
	// slots of this node's keys, the one that tunnels are to use first; none if it has no WireGuard device.
	slots []uint8
	// missing says why it has none, where it should have one.
	missing string
	mtu     podMTUs
}

// podMTUs are the largest packets of this node's pods, in bytes, by what they are put into, and those of the underlay.
type podMTUs struct{ underlay, plain, encrypted int }

// of returns the MTU of the devices of a node's pods in a mode: the largest that is needed.
func (m podMTUs) of(mode identity.Encryption) int {
	if mode == identity.EncryptAll {
		return m.encrypted
	}
	return m.plain
}

// between returns the MTU of packets to other clusters.
func (m podMTUs) between(mode identity.Encryption) int {
	if mode.Covers(false) {
		return m.encrypted
	}
	return m.plain
}

// derive returns the row of a node: how packets get there. before is its row as it is, or nil; path is the largest packet that gets to its
// cluster, 0 if not known; shaken tells whether there is a session between two slots.
func (r *tunnelRules) derive(n identity.Node, before *identity.Tunnel, path int, shaken func(pair) bool) identity.Tunnel {
	row := identity.Tunnel{
		Cluster: n.Cluster, ClusterID: n.ClusterID, Node: n.Name, Mode: identity.TunnelPlain, Address: n.Address, PodCIDRs: n.PodCIDRs, Keys: n.TunnelKeys,
		Local: r.self.Address, Remote: n.Address, MTU: r.mtu.of(r.mode), Self: n.NodeName() == r.self.NodeName(),
	}
	if row.Self {
		return row
	}
	encrypted := r.mode.Covers(n.Cluster == r.self.Cluster)
	row.MTU = r.mtu.plain
	if encrypted {
		row.MTU, row.Mode = r.mtu.encrypted, identity.TunnelWireGuard
	}
	for _, limit := range []int{n.MTU, path} {
		if limit > 0 {
			row.MTU = min(row.MTU, limit)
		}
	}
	if row.Why = r.closed(n, encrypted); row.Why != "" {
		row.Mode, row.Local, row.Remote = identity.TunnelClosed, netip.Addr{}, netip.Addr{}
	} else if encrypted {
		p := choose(r.slots, slotsOf(n.TunnelKeys), r.pairOf(n, before), shaken)
		row.Local, row.Remote = r.self.TunnelAddress(p.local), n.TunnelAddress(p.remote)
	}
	return row
}

// closed says why nothing may be sent to a node; empty if it may.
func (r *tunnelRules) closed(n identity.Node, encrypted bool) string {
	switch {
	case !encrypted && n.Cluster != r.self.Cluster && len(n.TunnelKeys) > 0:
		return fmt.Sprintf("cluster %s encrypts and this one does not: give both the same encryption.mode", n.Cluster)
	case !encrypted && n.Address.Is4() != r.self.Address.Is4():
		return fmt.Sprintf("node %s is at %s and this one at %s, of another address family: give all nodes a node.address of the same one", n.NodeName(), n.Address, r.self.Address)
	case !encrypted:
		return ""
	case len(r.slots) == 0:
		return "this node's WireGuard device is not there: " + r.missing
	case len(n.TunnelKeys) == 0:
		return fmt.Sprintf("node %s has published no WireGuard key: its encryption.mode is another, or its agent is older", n.NodeName())
	case !n.TunnelAddress(0).IsValid() || n.TunnelAddress(0).Is4() != r.self.TunnelAddress(0).Is4():
		return fmt.Sprintf("the first pod range of node %s is of another address family than this node's: list both clusters' podCIDRs in the same order", n.NodeName())
	}
	return ""
}

// pairOf returns the slots that a node's row goes between, or nil.
func (r *tunnelRules) pairOf(n identity.Node, row *identity.Tunnel) *pair {
	if row == nil || row.Mode != identity.TunnelWireGuard {
		return nil
	}
	for local := range uint8(identity.TunnelSlots) {
		for remote := range uint8(identity.TunnelSlots) {
			if row.Local == r.self.TunnelAddress(local) && row.Remote == n.TunnelAddress(remote) {
				return &pair{local, remote}
			}
		}
	}
	return nil
}

// choose returns the slots to send between: those that both sides prefer (the first ones) as soon as they have a session, and until then those
// in use, as long as there is one between them; then any that have one. Without any session it stays as it is, so that what waits for one
// does not move to and fro.
func choose(locals, remotes []uint8, current *pair, shaken func(pair) bool) pair {
	preferred := pair{locals[0], remotes[0]}
	if current != nil && !(slices.Contains(locals, current.local) && slices.Contains(remotes, current.remote)) {
		current = nil // a key of it is gone
	}
	switch {
	case current == nil && len(locals) == 1 && len(remotes) == 1, shaken(preferred):
		return preferred
	case current != nil && shaken(*current):
		return *current
	}
	for _, local := range locals {
		for _, remote := range remotes {
			if p := (pair{local, remote}); shaken(p) {
				return p
			}
		}
	}
	if current != nil {
		return *current
	}
	return preferred
}

func slotsOf(keys []identity.TunnelKey) []uint8 {
	slots := make([]uint8, len(keys))
	for i, k := range keys {
		slots[i] = k.Slot
	}
	return slots
}
