package agent

import (
	"context"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
)

// tunnels derives the tunnels table from the nodes table.
type tunnels struct {
	tables *clustermesh.Tables
	self   identity.NodeName
	mtu    int
}

// Run derives until ctx ends.
func (t *tunnels) Run(ctx context.Context) error {
	txn := t.tables.DB.WriteTxn(t.tables.Nodes)
	changes, err := t.tables.Nodes.Changes(txn)
	txn.Commit()
	if err != nil {
		return err
	}
	for {
		w := t.tables.DB.WriteTxn(t.tables.Tunnels)
		next, watch := changes.Next(w)
		for change := range next {
			if err := t.apply(w, change); err != nil {
				w.Abort()
				return err
			}
		}
		w.Commit()
		select {
		case <-watch:
		case <-ctx.Done():
			return nil
		}
	}
}

func (t *tunnels) apply(txn statedb.WriteTxn, change statedb.Change[*clustermesh.Row[identity.Node]]) error {
	n := change.Object.Object
	if change.Deleted {
		return clustermesh.Remove(txn, t.tables.Tunnels, n.NodeName().String())
	}
	row := identity.Tunnel{
		Cluster: n.Cluster, ClusterID: n.ClusterID, Node: n.Name, Mode: identity.TunnelPlain, Address: n.Address, PodCIDRs: n.PodCIDRs,
		Keys: n.TunnelKeys, Remote: n.Address, MTU: t.mtu, Self: n.NodeName() == t.self,
	}
	_, err := clustermesh.Put(txn, t.tables.Tunnels, row, identity.Tunnel.Equal)
	return err
}
