package clustermesh

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/lb"
)

// LocalConfig says what this node is.
type LocalConfig struct {
	Tables  *Tables
	Node    identity.Node
	Cluster identity.ClusterInfo
	// Kubernetes: services' backends are what the EndpointSlices of the cluster's API server say, and not what their selectors match among this node's endpoints.
	Kubernetes bool
	Log        *slog.Logger
}

// Local is the source for what this node owns. From the endpoints table and the cluster's services it
// writes this node's own rows (addresses and backends work without any store) and the publications
// that make them known to everybody else.
type Local struct {
	LocalConfig
	sequence uint64
	// slices are those that this node offers now, by service.
	slices map[lb.Name][]lb.Slice
	// addresses that endpoints were seen with, by their IDs.
	addresses map[string][]netip.Addr
	after     chan func()
}

// NewLocal returns a source that writes nothing until Run, except for the node itself.
func NewLocal(cfg LocalConfig) (*Local, error) {
	l := &Local{LocalConfig: cfg, slices: map[lb.Name][]lb.Slice{}, addresses: map[string][]netip.Addr{}, after: make(chan func(), 1)}
	l.Node.Local, l.sequence = true, cfg.Node.Sequence
	return l, l.putNode()
}

// putNode writes the node's own rows and its first publications.
func (l *Local) putNode() error {
	t := l.Tables
	txn := t.DB.WriteTxn(t.Nodes, t.Addresses, t.Publications)
	defer txn.Abort()
	if _, err := Put(txn, t.Nodes, l.Node, equal); err != nil {
		return err
	}
	if err := PutNodeAddresses(txn, t, l.Node); err != nil {
		return err
	}
	if err := l.publish(txn, identity.ClusterKey, identity.EncodeCluster(l.Cluster), false); err != nil {
		return err
	}
	if err := l.publish(txn, identity.NodeKey(l.Node.Cluster, l.Node.Name), identity.EncodeNode(l.Node), true); err != nil {
		return err
	}
	txn.Commit()
	return nil
}

// Own tells the source what the store holds in this node's name, after a listing of it; see FollowerConfig.
func (l *Local) Own(ctx context.Context, keys []string, complete bool) {
	l.After(ctx, func() {
		if err := l.repair(keys, complete); err != nil {
			l.Log.Error("this node's entries in the store are not compared with what they should be", "error", err)
		}
	})
}

// Disputed has entries of this node's that somebody else has changed in the store written again. The node's
// own is only written if the name is still free: see Publisher.
func (l *Local) Disputed(ctx context.Context, keys []string) {
	l.After(ctx, func() {
		if err := l.publishAgain(keys); err != nil {
			l.Log.Error("this node's entries in the store are not as they should be", "keys", keys, "error", err)
		}
	})
}

func (l *Local) publishAgain(keys []string) error {
	t := l.Tables
	txn := t.DB.WriteTxn(t.Publications)
	defer txn.Abort()
	for _, key := range keys {
		row, _, ok := t.Publications.Get(txn, t.Publications.ByKey(key))
		if !ok {
			continue // withdrawn meanwhile
		}
		if _, _, err := t.Publications.Insert(txn, NewRow(row.Object)); err != nil {
			return err
		}
	}
	txn.Commit()
	return nil
}

// After runs f once everything that is in the tables now has had its effect on this node's own rows.
func (l *Local) After(ctx context.Context, f func()) {
	select {
	case l.after <- f:
	case <-ctx.Done():
	}
}

// Run keeps rows and publications in step with endpoints and services until ctx ends.
func (l *Local) Run(ctx context.Context) error {
	t := l.Tables
	txn := t.DB.WriteTxn(t.Endpoints, t.Services)
	endpoints, err := t.Endpoints.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	services, err := t.Services.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()

	var after []func()
	for {
		read := t.DB.ReadTxn()
		dirty := map[lb.Name]struct{}{}
		changed, moreEndpoints := endpoints.Next(read)
		for change := range changed {
			if err := l.endpoint(read, change.Object.Object, change.Deleted, dirty); err != nil {
				return err
			}
		}
		declared, moreServices := services.Next(read)
		for change := range declared {
			if change.Object.Object.Cluster == l.Node.Cluster && !l.Kubernetes {
				dirty[change.Object.Object.Name] = struct{}{}
			}
		}
		for name := range dirty {
			if err := l.service(read, name); err != nil {
				return err
			}
		}
		for _, f := range after {
			f()
		}
		after = nil
		select {
		case <-moreEndpoints:
		case <-moreServices:
		case f := <-l.after:
			after = append(after, f) // not before what was committed until now has been seen
		case <-ctx.Done():
			return nil
		}
	}
}

// endpoint brings the address rows and publications of one endpoint up to date, and notes the services
// that it concerns.
func (l *Local) endpoint(read statedb.ReadTxn, ep identity.Endpoint, gone bool, dirty map[lb.Name]struct{}) error {
	former, now := l.addresses[ep.ID()], validAddresses(ep)
	for name, held := range l.slices {
		if name.Namespace == ep.Namespace && (holdsBackend(held, former) || holdsBackend(held, now)) {
			dirty[name] = struct{}{}
		}
	}
	if !l.Kubernetes {
		l.noteMatching(read, ep, dirty)
	}
	if gone {
		delete(l.addresses, ep.ID())
	} else {
		l.addresses[ep.ID()] = now
	}
	txn := l.Tables.DB.WriteTxn(l.Tables.Addresses, l.Tables.Publications)
	defer txn.Abort()
	for _, a := range slices.Concat(former, now) {
		if !gone && slices.Contains(now, a) {
			continue
		}
		// Also what it had before, if it was deleted and added again before that was seen.
		if err := l.withdraw(txn, ep, a); err != nil {
			return err
		}
	}
	if !gone {
		for _, a := range now {
			if err := l.offer(txn, ep, a); err != nil {
				return err
			}
		}
	}
	txn.Commit()
	return nil
}

// noteMatching notes the services whose selector an endpoint matches.
func (l *Local) noteMatching(read statedb.ReadTxn, ep identity.Endpoint, dirty map[lb.Name]struct{}) {
	for row := range l.Tables.Services.Prefix(read, l.Tables.Services.ByKey(l.Node.Cluster+"/"+ep.Namespace+"/")) {
		if ep.Labels.Matches(row.Object.Selector) {
			dirty[row.Object.Name] = struct{}{}
		}
	}
}

func validAddresses(ep identity.Endpoint) []netip.Addr {
	return slices.DeleteFunc(ep.Addresses(), func(a netip.Addr) bool { return !a.IsValid() })
}

// offer writes the row and the publication of an endpoint's address, unless they are as they should be: a status of the
// endpoint's may have changed, and not the endpoint.
func (l *Local) offer(txn statedb.WriteTxn, ep identity.Endpoint, a netip.Addr) error {
	t := l.Tables
	row := identity.Address{
		Cluster: l.Node.Cluster, ClusterID: l.Node.ClusterID,
		Prefix:   netip.PrefixFrom(a, a.BitLen()),
		Identity: ep.Identity, Node: l.Node.Name, NodeAddress: l.Node.Address, Endpoint: ep.ID(), Local: true,
	}
	if old, _, had := t.Addresses.Get(txn, t.Addresses.ByKey(t.Addresses.Key(row))); had {
		row.Version = old.Object.Version
		if equal(old.Object, row) {
			return nil
		}
	}
	row.Version = l.next()
	if _, err := Put(txn, t.Addresses, row, equal); err != nil {
		return err
	}
	return l.publish(txn, identity.AddressKey(l.Node.Cluster, a), identity.EncodeAddress(row), true)
}

// withdraw takes back what offer wrote, unless the address is another endpoint's by now.
func (l *Local) withdraw(txn statedb.WriteTxn, ep identity.Endpoint, a netip.Addr) error {
	t := l.Tables
	row, _, ok := t.Addresses.Get(txn, t.Addresses.ByKey(l.Node.Cluster+"/"+netip.PrefixFrom(a, a.BitLen()).String()))
	if !ok || row.Object.Endpoint != ep.ID() {
		return nil
	}
	if _, _, err := t.Addresses.Delete(txn, row); err != nil {
		return err
	}
	return Remove(txn, t.Publications, identity.AddressKey(l.Node.Cluster, a))
}

// holdsBackend tells whether one of the addresses is a backend of the slices.
func holdsBackend(held []lb.Slice, addresses []netip.Addr) bool {
	for _, slice := range held {
		for _, backend := range slice.Backends {
			if slices.Contains(addresses, backend.Address) {
				return true
			}
		}
	}
	return false
}

// service brings this node's slices of one service up to date.
func (l *Local) service(read statedb.ReadTxn, name lb.Name) error {
	t := l.Tables
	var want []lb.Slice
	if row, _, ok := t.Services.Get(read, t.Services.ByKey(l.Node.Cluster+"/"+name.String())); ok {
		want = lb.SlicesFor(l.Node.Name, row.Object, l.endpointViews(read, row.Object), l.slices[name])
	}
	txn := t.DB.WriteTxn(t.Backends, t.Publications)
	defer txn.Abort()
	had := map[string]lb.Slice{}
	for _, slice := range l.slices[name] {
		had[slice.Slice] = slice
	}
	for i, slice := range want {
		delete(had, slice.Slice)
		if slice.Incarnation != 0 {
			continue // as it was
		}
		version := l.next()
		slice.Incarnation, slice.Sequence = version.Incarnation, version.Sequence
		want[i] = slice
		if err := PutSlice(txn, t, slice); err != nil {
			return err
		}
		if err := l.publish(txn, slice.Key(), lb.EncodeSlice(slice), true); err != nil {
			return err
		}
	}
	for _, slice := range had {
		if err := DropSlice(txn, t, slice); err != nil {
			return err
		}
		if err := Remove(txn, t.Publications, slice.Key()); err != nil {
			return err
		}
	}
	txn.Commit()
	if len(want) == 0 {
		delete(l.slices, name)
	} else {
		l.slices[name] = want
	}
	return nil
}

// endpointViews lists this node's endpoints in the service's namespace.
func (l *Local) endpointViews(read statedb.ReadTxn, service lb.Service) []lb.EndpointView {
	var views []lb.EndpointView
	for row := range l.Tables.Endpoints.Prefix(read, l.Tables.Endpoints.ByKey(service.Name.Namespace+"/")) {
		ep := row.Object
		views = append(views, lb.EndpointView{
			Addresses: validAddresses(ep), ID: ep.ID(), Labels: ep.Labels, Ready: ep.State == identity.EndpointReady,
		})
	}
	return views
}

// repair compares what the store holds in this node's name with what it should: what is missing is
// written again; what is left over from before goes, once it is complete what should be.
func (l *Local) repair(keys []string, complete bool) error {
	t := l.Tables
	txn := t.DB.WriteTxn(t.Publications)
	defer txn.Abort()
	stored := map[string]struct{}{}
	for _, key := range keys {
		stored[key] = struct{}{}
	}
	for _, row := range inOrder(rows(t.Publications.All(txn))) {
		if _, ok := stored[row.Object.Key]; !ok && row.Status.Kind == Done {
			if _, _, err := t.Publications.Insert(txn, NewRow(row.Object)); err != nil {
				return err
			}
		}
		delete(stored, row.Object.Key)
	}
	mark := identity.SyncedKey(l.Node.Cluster, l.Node.Name)
	delete(stored, mark)
	if err := l.publish(txn, mark, identity.EncodeHeartbeat(identity.Heartbeat{At: time.Unix(0, int64(l.Node.Incarnation)), Node: l.Node.Name}), true); err != nil {
		return err
	}
	if !complete {
		clear(stored)
	}
	for _, key := range slices.Sorted(maps.Keys(stored)) {
		l.Log.Info("an entry of this node's earlier life is removed", "key", key)
		// Inserted and deleted at once, so that the table's reconciler sees the deletion and retries it.
		if _, err := Put(txn, t.Publications, Publication{Key: key}, equal); err != nil {
			return err
		}
		if err := Remove(txn, t.Publications, key); err != nil {
			return err
		}
	}
	txn.Commit()
	return nil
}

// inOrder puts the cluster's entry first, so that a store that is another cluster's gets no other, and the node's mark,
// which says that everything is there, last.
func inOrder(publications []*Row[Publication]) []*Row[Publication] {
	slices.SortStableFunc(publications, func(a, b *Row[Publication]) int { return rankKey(a.Object.Key) - rankKey(b.Object.Key) })
	return publications
}

func (l *Local) publish(txn statedb.WriteTxn, key string, value []byte, leased bool) error {
	_, err := Put(txn, l.Tables.Publications, Publication{Key: key, Value: string(value), Leased: leased}, equal)
	return err
}

// next returns the version of the node's next writing.
func (l *Local) next() identity.Version {
	l.sequence++
	return identity.Version{Incarnation: l.Node.Incarnation, Sequence: l.sequence}
}
