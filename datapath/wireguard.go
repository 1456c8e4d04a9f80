package datapath

import (
	"context"
	"iter"

	"causeway/identity"
)

// TunnelMap tells the programs how packets get to each node, and what may come from it. It is the kernel's target of the tunnels
// table. Its methods are safe for concurrent use.
type TunnelMap struct{ nodes *NodeMap }

// Tunnels returns the map of nodes.
func (d *Datapath) Tunnels() *TunnelMap { return &TunnelMap{d.nodes} }

// Update makes the kernel know the way to a node.
func (m *TunnelMap) Update(ctx context.Context, t identity.Tunnel) error {
	v := bpfNode{Cluster: uint8(t.ClusterID), Mode: map[identity.TunnelMode]uint8{identity.TunnelPlain: 1, identity.TunnelWireGuard: 2, identity.TunnelClosed: 3}[t.Mode], Mtu: uint16(t.MTU), Address: toIP(t.Address)}
	if t.Local.IsValid() {
		v.Local, v.Remote = toIP(t.Local), toIP(t.Remote)
	}
	return m.nodes.t.put(bpfNodeKey{Address: toIP(t.Address)}, v)
}

// Delete makes the kernel refuse what the node sends, and what is sent to it.
func (m *TunnelMap) Delete(ctx context.Context, t identity.Tunnel) error {
	return m.nodes.Delete(ctx, identity.Node{Cluster: t.Cluster, ClusterID: t.ClusterID, Name: t.Node, Address: t.Address})
}

// Prune removes the nodes that aren't desired, of clusters that have synced.
func (m *TunnelMap) Prune(ctx context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	return m.nodes.Prune(ctx, func(yield func(identity.Node) bool) {
		for t := range desired {
			if !yield(identity.Node{ClusterID: t.ClusterID, Address: t.Address}) {
				return
			}
		}
	}, synced)
}
