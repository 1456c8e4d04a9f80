package datapath

import (
	"net/netip"
	"slices"

	"causeway/identity"
)

// NodeEntry is an entry of the map that says how packets get to a node.
type NodeEntry struct {
	// At is the address that the entry is of: the node's on the underlay, or one of its tunnel addresses.
	At netip.Addr
	// Node is the node's address on the underlay.
	Node  netip.Addr
	Owner identity.ClusterID
	Mode  identity.TunnelMode
	// Local and Remote are the outer addresses of what is sent there; invalid if nothing is.
	Local, Remote netip.Addr
	// MTU is the largest IP packet of pods that gets there, in bytes.
	MTU int
}

var nodeModes = map[bpfNodeMode]identity.TunnelMode{
	bpfNodeModeNODE_PLAIN: identity.TunnelPlain, bpfNodeModeNODE_WIREGUARD: identity.TunnelWireGuard, bpfNodeModeNODE_CLOSED: identity.TunnelClosed,
}

// ListNodes returns all entries of nodes, ordered by address.
func (m *Maps) ListNodes() (entries []NodeEntry, err error) {
	for k, v := range m.nodes.all(&err) {
		e := NodeEntry{
			At: k.Address.addr(), Node: v.Address.addr(), Owner: identity.ClusterID(v.Cluster), Mode: nodeModes[bpfNodeMode(v.Mode)], MTU: int(v.Mtu),
		}
		if v.Remote != (bpfIpAddr{}) {
			e.Local, e.Remote = v.Local.addr(), v.Remote.addr()
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b NodeEntry) int { return a.At.Compare(b.At) })
	return entries, err
}
