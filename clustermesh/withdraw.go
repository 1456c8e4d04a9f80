package clustermesh

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// delete removes the rows of a key that its owner withdrew.
func (f *Follower) delete(txn statedb.WriteTxn, key string) {
	f.forgetWaiting(key)
	f.Refusals.Clear(f.Cluster, key)
	delete(f.own, key)
	f.mu.Lock()
	delete(f.slices, key)
	f.mu.Unlock()
	_, held := f.accepted[key]
	delete(f.accepted, key)
	if !held {
		return
	}
	parts := strings.Split(strings.TrimPrefix(key, kvstore.Prefix), "/")
	var err error
	switch {
	case parts[0] == "nodes" && len(parts) == 3:
		err = f.deleteNode(txn, parts[2])
	case parts[0] == "identities" && len(parts) == 4 && parts[2] == "ids":
		var number identity.Number
		if _, e := fmt.Sscan(parts[3], &number); e == nil {
			err = Remove(txn, f.Tables.Identities, f.Tables.Identities.Key(identity.Identity{Number: number}))
		}
	case parts[0] == "addresses" && len(parts) == 3:
		err = f.deleteAddress(txn, parts[2])
	case f.elsewhere(key):
	case parts[0] == "services" && len(parts) == 4:
		err = Remove(txn, f.Tables.Services, f.Cluster+"/"+parts[2]+"/"+parts[3])
	case parts[0] == "slices" && len(parts) == 5:
		err = dropSlice(txn, f.Tables, sliceKey(f.Cluster, lb.Name{Namespace: parts[2], Name: parts[3]}, parts[4]), nil)
	case parts[0] == "synced" && len(parts) == 3:
		delete(f.marks, parts[2])
	}
	if err != nil {
		f.Log.Error("rows of a withdrawn entry remain", "cluster", f.Cluster, "key", key, "error", err)
	}
}

// deleteNode removes a node with what follows from it. Its pods' addresses are entries of their own.
func (f *Follower) deleteNode(txn statedb.WriteTxn, node string) error {
	f.changed = true
	f.dropNews(txn, node)
	for _, row := range rows(f.Tables.Addresses.List(txn, f.Tables.addressesByNode.Query(f.Cluster+"/"+node))) {
		if !row.Object.Identity.Reserved() {
			continue
		}
		if _, _, err := f.Tables.Addresses.Delete(txn, row); err != nil {
			return err
		}
	}
	return Remove(txn, f.Tables.Nodes, f.Cluster+"/"+node)
}

func (f *Follower) deleteAddress(txn statedb.WriteTxn, text string) error {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return err
	}
	row := identity.Address{Cluster: f.Cluster, Prefix: netip.PrefixFrom(ip, ip.BitLen())}
	return Remove(txn, f.Tables.Addresses, f.Tables.Addresses.Key(row))
}

// ownerNode returns the node that owns a key: those of nodes, addresses, slices that are not the cluster's, and marks.
// An address's node is only in its value, and looked up among the rows.
func (f *Follower) ownerNode(key string) (string, bool) {
	parts := strings.Split(strings.TrimPrefix(key, kvstore.Prefix), "/")
	switch {
	case (parts[0] == "nodes" || parts[0] == "synced") && len(parts) == 3 && parts[1] == f.Cluster:
		return parts[2], true
	case lb.OfClusterKey(key):
		return "", false
	case parts[0] == "slices" && len(parts) == 5 && parts[1] == f.Cluster:
		node, _, _ := strings.Cut(parts[4], ".")
		return node, true
	case parts[0] == "addresses" && len(parts) == 3 && parts[1] == f.Cluster:
		return f.addressOwner(parts[2])
	}
	return "", false
}

// markOf returns the name in the mark whose writer says that it has written all of its entries, the key's among them: a node, or
// whoever publishes the cluster's services.
func (f *Follower) markOf(key string) (string, bool) {
	if lb.OfClusterKey(key) || strings.HasPrefix(key, lb.ServicesPrefix(f.Cluster)) {
		return identity.ServicesMark, true
	}
	return f.ownerNode(key)
}

// elsewhere tells whether what the key is of comes into the tables by another way than the store.
func (f *Follower) elsewhere(key string) bool {
	return f.Exported != nil && exported(f.Cluster, key)
}

// exported tells whether a key is of what a cluster of Kubernetes has in its store for others: services, and slices that are the cluster's.
func exported(cluster, key string) bool {
	return strings.HasPrefix(key, lb.ServicesPrefix(cluster)) || strings.HasPrefix(key, lb.SlicesPrefix(cluster)) && lb.OfClusterKey(key)
}

// addressOwner returns the node that an accepted address belongs to.
func (f *Follower) addressOwner(text string) (string, bool) {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return "", false
	}
	row, _, ok := f.Tables.Addresses.Get(f.Tables.DB.ReadTxn(), f.Tables.Addresses.ByKey(f.Cluster+"/"+netip.PrefixFrom(ip, ip.BitLen()).String()))
	if !ok {
		return "", false
	}
	return row.Object.Node, true
}
