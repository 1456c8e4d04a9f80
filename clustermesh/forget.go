package clustermesh

import (
	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/lb"
)

// Forget removes all rows of a cluster that is followed no more. Its follower must have ended.
func Forget(t *Tables, cluster string) error {
	txn := t.DB.WriteTxn(t.Nodes, t.Identities, t.Addresses, t.Services, t.Backends, t.Peers)
	defer txn.Abort()
	for _, forget := range []func() error{
		func() error {
			return forgetRows(txn, t.Services, func(s lb.Service) bool { return s.Cluster == cluster })
		},
		func() error {
			return forgetRows(txn, t.Backends, func(b lb.Backend) bool { return b.Cluster == cluster })
		},
		func() error {
			return forgetRows(txn, t.Addresses, func(a identity.Address) bool { return a.Cluster == cluster })
		},
		func() error {
			return forgetRows(txn, t.Identities, func(i identity.Identity) bool { return i.Cluster == cluster })
		},
		func() error {
			return forgetRows(txn, t.Nodes, func(n identity.Node) bool { return n.Cluster == cluster })
		},
		func() error { return forgetRows(txn, t.Peers, func(p Peer) bool { return p.Name == cluster }) },
	} {
		if err := forget(); err != nil {
			return err
		}
	}
	txn.Commit()
	return nil
}

func forgetRows[T any](txn statedb.WriteTxn, table Table[T], of func(T) bool) error {
	var gone []*Row[T]
	for row := range table.All(txn) {
		if of(row.Object) {
			gone = append(gone, row)
		}
	}
	for _, row := range gone {
		if _, _, err := table.Delete(txn, row); err != nil {
			return err
		}
	}
	return nil
}
