package clustermesh

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"reflect"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// maxWaiting bounds the values kept of entries that were not accepted, in bytes for each channel,
// so that a peer cannot fill an agent's memory with entries that nobody will ever accept.
const maxWaiting = 16 << 20

// errWaits says that an entry cannot be judged yet: what it depends on has not been seen.
var errWaits = errors.New("waits")

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
		f.wait(key, value)
	default:
		f.Refusals.Add(f.Cluster, key, err)
		f.Log.Warn("entry refused", "cluster", f.Cluster, "key", key, "reason", err)
		// What stood there before was the owner's word; a bad newer one does not remove it.
		f.wait(key, value)
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
		return f.acceptCluster(key, value)
	case "heartbeat":
		return f.acceptHeartbeat(key, value)
	case "nodes", "identities", "addresses", "services", "slices":
		if f.info == nil {
			return errWaits
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

func (f *Follower) acceptCluster(key string, value []byte) error {
	info, err := identity.DecodeCluster(key, value)
	if err != nil {
		return err
	}
	if err := (identity.Channel{Cluster: f.Cluster, ID: f.ID}).CheckCluster(info); err != nil {
		return fmt.Errorf("%w; check which store the configuration names for cluster %s", err, f.Cluster)
	}
	if err := f.Claims.Claim(info); err != nil {
		return err
	}
	f.info, f.changed = &info, true
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
		return identity.Node{}, errWaits
	}
	return row.Object, nil
}

func (f *Follower) acceptNode(txn statedb.WriteTxn, key string, value []byte) error {
	node, err := identity.DecodeNode(key, value)
	if err != nil {
		return err
	}
	if err := f.channel(txn).CheckNode(node); err != nil {
		return err
	}
	old, _, had := f.Tables.Nodes.Get(txn, f.Tables.Nodes.ByKey(f.Tables.Nodes.Key(node)))
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
		case address.Endpoint == "":
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
	owner, err := f.owner(txn, slice.Node)
	if err != nil {
		return err
	}
	if err := f.channel(txn).CheckSlice(slice, owner); err != nil {
		return err
	}
	return PutSlice(txn, f.Tables, slice)
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

// delete removes the rows of a key that its owner withdrew.
func (f *Follower) delete(txn statedb.WriteTxn, key string) {
	f.forgetWaiting(key)
	f.Refusals.Clear(f.Cluster, key)
	delete(f.own, key)
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
	for _, row := range rows(f.Tables.Addresses.List(txn, f.Tables.addressesByNode.Query(f.Cluster+"/"+node))) {
		if row.Object.Endpoint != "" {
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

// wait keeps an entry that was not accepted, to be judged again.
func (f *Follower) wait(key string, value []byte) {
	if f.waitingBytes+len(key)+len(value) > maxWaiting {
		f.Refusals.Add(f.Cluster, key, fmt.Errorf("more than %d MiB of entries of this channel are refused or wait; this one is judged again when it changes", maxWaiting>>20))
		return
	}
	f.waiting[key] = value
	f.waitingBytes += len(key) + len(value)
}

func (f *Follower) forgetWaiting(key string) {
	if value, ok := f.waiting[key]; ok {
		f.waitingBytes -= len(key) + len(value)
		delete(f.waiting, key)
	}
}

// judgeAgain looks once more at what was not accepted, if something that it may depend on has changed.
func (f *Follower) judgeAgain(txn statedb.WriteTxn) {
	if !f.changed {
		return
	}
	f.changed = false
	events := make([]kvstore.Event, 0, len(f.waiting))
	for key, value := range f.waiting {
		events = append(events, kvstore.Event{Kind: kvstore.EventPut, Entry: kvstore.Entry{Key: key, Value: value}})
	}
	for _, ev := range newest(events) {
		f.put(txn, ev.Key, ev.Value)
	}
	f.changed = false
}

// ownerNode returns the node that owns a key: those of nodes, addresses, slices and marks.
// An address's node is only in its value, and looked up among the rows.
func (f *Follower) ownerNode(key string) (string, bool) {
	parts := strings.Split(strings.TrimPrefix(key, kvstore.Prefix), "/")
	switch {
	case (parts[0] == "nodes" || parts[0] == "synced") && len(parts) == 3 && parts[1] == f.Cluster:
		return parts[2], true
	case parts[0] == "slices" && len(parts) == 5 && parts[1] == f.Cluster:
		node, _, _ := strings.Cut(parts[4], ".")
		return node, true
	case parts[0] == "addresses" && len(parts) == 3 && parts[1] == f.Cluster:
		return f.addressOwner(parts[2])
	}
	return "", false
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
