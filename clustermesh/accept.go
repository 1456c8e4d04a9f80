package clustermesh

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// put judges an entry and writes its rows, or says why not.
func (f *Follower) put(txn statedb.WriteTxn, key string, value []byte) {
	f.forgetWaiting(key)
	if f.isOwn(key, value) {
		f.own[key] = struct{}{}
		return
	}
	delete(f.own, key)
	err := f.accept(txn, key, value)
	switch {
	case err == nil:
		f.accepted[key] = struct{}{}
		f.Refusals.Clear(f.Cluster, key)
	case errors.Is(err, errWaits):
		f.wait(key, value, err)
	default:
		if f.Refusals.Add(f.Cluster, key, err) {
			f.Log.Warn("entry refused", "cluster", f.Cluster, "key", key, "reason", err)
		}
		// What stood there before was the owner's word; a bad newer one does not remove it.
		f.wait(key, value, nil)
	}
}

// isOwn tells whether an entry is in this node's name: the node itself knows better what is true. An address is
// the node's that its value names, so that a node with a wrong pod range takes nothing for its own.
func (f *Follower) isOwn(key string, value []byte) bool {
	if !f.local {
		return false
	}
	if strings.HasPrefix(key, identity.AddressesPrefix(f.Cluster)) {
		address, err := identity.DecodeAddress(key, value)
		return err == nil && address.Node == f.Self.Node
	}
	node, ok := f.ownerNode(key)
	return ok && node == f.Self.Node
}

// accept writes the rows of an entry that the channel may speak for.
func (f *Follower) accept(txn statedb.WriteTxn, key string, value []byte) error {
	kind, _, _ := strings.Cut(strings.TrimPrefix(key, kvstore.Prefix), "/")
	switch kind {
	case "cluster":
		return f.acceptCluster(txn, key, value)
	case "heartbeat":
		return f.acceptHeartbeat(key, value)
	case "nodes", "identities", "addresses", "services", "slices":
		if f.info == nil {
			return fmt.Errorf("%w: what cluster %s says of itself, key %s", errWaits, f.Cluster, identity.ClusterKey)
		}
	}
	switch kind {
	case "nodes":
		return f.acceptNode(txn, key, value)
	case "identities":
		return f.acceptIdentity(txn, key, value)
	case "addresses":
		return f.acceptAddress(txn, key, value)
	case "services":
		return f.acceptService(txn, key, value)
	case "slices":
		return f.acceptSlice(txn, key, value)
	case "synced":
		if node, ok := f.ownerNode(key); ok {
			f.marks[node] = time.Now()
		}
		return nil
	case "clusterips":
		return nil // the reservations of this cluster's own service addresses: agent/services.go
	}
	return fmt.Errorf("unknown kind of entry %q: written by a newer version, or by hand", kind)
}

func (f *Follower) acceptCluster(txn statedb.ReadTxn, key string, value []byte) error {
	info, err := identity.DecodeCluster(key, value)
	if err != nil {
		return err
	}
	if err := (identity.Channel{Cluster: f.Cluster, ID: f.ID}).CheckCluster(info); err != nil {
		return fmt.Errorf("%w; check which store the configuration names for cluster %s", err, f.Cluster)
	}
	if err := f.checkNobodyLivesIn(txn, info); err != nil {
		return err
	}
	if err := f.Claims.Claim(info); err != nil {
		return err
	}
	f.info, f.changed = &info, true
	return nil
}

// checkNobodyLivesIn refuses ranges that have a node of another cluster in them: its packets would be drawn into the tunnel.
func (f *Follower) checkNobodyLivesIn(txn statedb.ReadTxn, info identity.ClusterInfo) error {
	for row := range f.Tables.Nodes.All(txn) {
		node := row.Object
		if node.Cluster == f.Cluster {
			continue
		}
		for _, p := range slices.Concat(info.PodCIDRs, info.ServiceCIDRs) {
			if p.Contains(node.Address) {
				return fmt.Errorf("cluster %s: range %s has the address %s of node %s in it; give the cluster another range", info.Name, p, node.Address, node.NodeName())
			}
		}
	}
	return nil
}

// channel says what this store may speak for, beside the nodes that are known already.
func (f *Follower) channel(txn statedb.ReadTxn) identity.Channel {
	return identity.Channel{Cluster: f.Cluster, ID: f.ID, PodCIDRs: f.info.PodCIDRs, Nodes: nodesIn{txn, f.Tables}}
}

// owner returns the node that an entry hangs on; an entry that comes before its node waits.
func (f *Follower) owner(txn statedb.ReadTxn, node string) (identity.Node, error) {
	row, _, ok := f.Tables.Nodes.Get(txn, f.Tables.Nodes.ByKey(f.Cluster+"/"+node))
	if !ok {
		return identity.Node{}, fmt.Errorf("%w: that of node %s/%s, which it names", errWaits, f.Cluster, node)
	}
	return row.Object, nil
}

func (f *Follower) acceptNode(txn statedb.WriteTxn, key string, value []byte) error {
	node, err := identity.DecodeNode(key, value)
	if err != nil {
		return err
	}
	if other, prefix, ok := f.Claims.Foreign(f.Cluster, node.Address); ok {
		return fmt.Errorf("node entry %s: address %s lies in the range %s of cluster %s", node.NodeName(), node.Address, prefix, other)
	}
	old, _, had := f.Tables.Nodes.Get(txn, f.Tables.Nodes.ByKey(f.Tables.Nodes.Key(node)))
	if had && f.listing && old.Object.Instance != node.Instance && node.Newer(old.Object.Version) {
		// A listing does not show that the name was free in between; the store gave it to nobody before that.
		if err := f.deleteNode(txn, node.Name); err != nil {
			return err
		}
		had = false
	}
	if err := f.channel(txn).CheckNode(node); err != nil {
		return err
	}
	if had && old.Object.Newer(node.Version) {
		return nil
	}
	if _, err := Put(txn, f.Tables.Nodes, node, equal); err != nil {
		return err
	}
	f.changed = true
	return PutNodeAddresses(txn, f.Tables, node)
}

// PutNodeAddresses writes the address rows that follow from a node: itself, and its pod ranges, whose
// packets go to it even before a pod's own entry arrives.
func PutNodeAddresses(txn statedb.WriteTxn, t *Tables, node identity.Node) error {
	row := identity.Address{
		Cluster: node.Cluster, ClusterID: node.ClusterID, Node: node.Name, NodeAddress: node.Address,
		Version: node.Version, Local: node.Local,
	}
	row.Prefix, row.Identity = netip.PrefixFrom(node.Address, node.Address.BitLen()), identity.RemoteNode
	if node.Local {
		row.Identity = identity.Host
	}
	want := map[string]struct{}{t.Addresses.Key(row): {}}
	if _, err := Put(txn, t.Addresses, row, equal); err != nil {
		return err
	}
	for _, prefix := range node.PodCIDRs {
		row.Prefix, row.Identity = prefix, identity.Unknown
		want[t.Addresses.Key(row)] = struct{}{}
		if _, err := Put(txn, t.Addresses, row, equal); err != nil {
			return err
		}
	}
	// What the node no longer has goes; where its pods are reached follows its address.
	for _, old := range rows(t.Addresses.List(txn, t.addressesByNode.Query(node.Cluster+"/"+node.Name))) {
		address := old.Object
		_, wanted := want[t.Addresses.Key(address)]
		switch {
		case wanted:
		case address.Identity.Reserved(): // of the node itself; pods have identities of the cluster's
			if err := Remove(txn, t.Addresses, t.Addresses.Key(address)); err != nil {
				return err
			}
		case address.NodeAddress != node.Address:
			address.NodeAddress = node.Address
			if _, err := Put(txn, t.Addresses, address, equal); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *Follower) acceptIdentity(txn statedb.WriteTxn, key string, value []byte) error {
	if !strings.HasPrefix(key, identity.IDsPrefix(f.Cluster)) {
		return nil // the allocator's own bookkeeping: labels and references
	}
	id, err := identity.DecodeIdentity(key, value)
	if err != nil {
		return err
	}
	if err := f.channel(txn).CheckIdentity(id); err != nil {
		return err
	}
	_, err = Put(txn, f.Tables.Identities, id, equal)
	return err
}

func (f *Follower) acceptAddress(txn statedb.WriteTxn, key string, value []byte) error {
	address, err := identity.DecodeAddress(key, value)
	if err != nil {
		return err
	}
	owner, err := f.owner(txn, address.Node)
	if err != nil {
		return err
	}
	if err := f.channel(txn).CheckAddress(address, owner); err != nil {
		return err
	}
	address.NodeAddress = owner.Address
	old, _, had := f.Tables.Addresses.Get(txn, f.Tables.Addresses.ByKey(f.Tables.Addresses.Key(address)))
	if had && old.Object.Newer(address.Version) && old.Object.Node == address.Node {
		return nil
	}
	_, err = Put(txn, f.Tables.Addresses, address, equal)
	return err
}

func (f *Follower) acceptService(txn statedb.WriteTxn, key string, value []byte) error {
	service, err := lb.DecodeService(key, value)
	if err != nil {
		return err
	}
	if err := f.channel(txn).CheckService(service); err != nil {
		return err
	}
	if f.elsewhere(key) {
		return nil
	}
	if !f.local && !service.Global {
		// Another cluster's own affair.
		return Remove(txn, f.Tables.Services, f.Tables.Services.Key(service))
	}
	_, err = Put(txn, f.Tables.Services, service, equal)
	return err
}

func (f *Follower) acceptSlice(txn statedb.WriteTxn, key string, value []byte) error {
	slice, err := lb.DecodeSlice(key, value)
	if err != nil {
		return err
	}
	var owner identity.Node
	if !slice.OfCluster() {
		if owner, err = f.owner(txn, slice.Node); err != nil {
			return err
		}
	}
	if err := f.channel(txn).CheckSlice(slice, owner); err != nil {
		return err
	}
	version := identity.Version{Incarnation: slice.Incarnation, Sequence: slice.Sequence}
	if f.slices[key].Newer(version) {
		return nil
	}
	f.mu.Lock()
	f.slices[key] = version
	f.mu.Unlock()
	if f.elsewhere(key) {
		return nil
	}
	early := f.withoutUnknown(txn, &slice)
	if err := PutSlice(txn, f.Tables, slice); err != nil {
		return err
	}
	if early != nil {
		f.accepted[key] = struct{}{} // as far as it goes
	}
	return early
}

// withoutUnknown takes the backends out of a slice that is the cluster's whose nodes have not come yet: one node without an agent keeps nobody
// else's pods from serving. It returns what the slice waits for then.
func (f *Follower) withoutUnknown(txn statedb.ReadTxn, slice *lb.Slice) (early error) {
	if !slice.OfCluster() {
		return nil
	}
	known := make([]lb.SliceBackend, 0, len(slice.Backends))
	for _, b := range slice.Backends {
		if b.Node != "" {
			if _, err := f.owner(txn, b.Node); err != nil {
				early = fmt.Errorf("%w, for its backend %s", err, b.Address)
				continue
			}
		}
		known = append(known, b)
	}
	slice.Backends = known
	return early
}

// PutSlice makes the backends table hold what a slice says, and nothing else of it.
func PutSlice(txn statedb.WriteTxn, t *Tables, slice lb.Slice) error {
	want := map[string]struct{}{}
	for _, backend := range slice.Rows() {
		want[BackendKey(backend)] = struct{}{}
		if _, err := Put(txn, t.Backends, backend, equal); err != nil {
			return err
		}
	}
	return dropSlice(txn, t, sliceKey(slice.Cluster, slice.Service, slice.Slice), want)
}

// DropSlice removes the backends of a slice.
func DropSlice(txn statedb.WriteTxn, t *Tables, slice lb.Slice) error {
	return dropSlice(txn, t, sliceKey(slice.Cluster, slice.Service, slice.Slice), nil)
}

func dropSlice(txn statedb.WriteTxn, t *Tables, slice string, keep map[string]struct{}) error {
	for _, row := range rows(t.Backends.List(txn, t.backendsBySlice.Query(slice))) {
		if _, kept := keep[BackendKey(row.Object)]; kept {
			continue
		}
		if _, _, err := t.Backends.Delete(txn, row); err != nil {
			return err
		}
	}
	return nil
}

func (f *Follower) write() statedb.WriteTxn {
	t := f.Tables
	return t.DB.WriteTxn(t.Nodes, t.Identities, t.Addresses, t.Services, t.Backends)
}

// equal compares rows in full.
func equal[T any](a, b T) bool { return reflect.DeepEqual(a, b) }

// nodesIn answers what a channel asks of the nodes that were accepted, of all clusters.
type nodesIn struct {
	txn    statedb.ReadTxn
	tables *Tables
}

func (n nodesIn) ByName(name identity.NodeName) (identity.Node, bool) {
	row, _, ok := n.tables.Nodes.Get(n.txn, n.tables.Nodes.ByKey(name.String()))
	if !ok {
		return identity.Node{}, false
	}
	return row.Object, true
}

func (n nodesIn) ByAddress(a netip.Addr) (identity.Node, bool) {
	row, _, ok := n.tables.Nodes.Get(n.txn, n.tables.nodesByAddress.Query(a.String()))
	if !ok {
		return identity.Node{}, false
	}
	return row.Object, true
}

func (n nodesIn) ByKey(key identity.WireGuardKey) (identity.Node, bool) {
	row, _, ok := n.tables.Nodes.Get(n.txn, n.tables.nodesByTunnelKey.Query(key.String()))
	if !ok {
		return identity.Node{}, false
	}
	return row.Object, true
}

func (n nodesIn) Overlapping(p netip.Prefix) iter.Seq[identity.Node] {
	return func(yield func(identity.Node) bool) {
		for row := range n.tables.Nodes.All(n.txn) {
			for _, other := range row.Object.PodCIDRs {
				if other.Overlaps(p) && !yield(row.Object) {
					return
				}
			}
		}
	}
}
