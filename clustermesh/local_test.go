package clustermesh

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

func startLocal(t *testing.T, change ...func(*LocalConfig)) (*Local, *Tables) {
	t.Helper()
	tables, err := NewTables()
	if err != nil {
		t.Fatal(err)
	}
	cfg := LocalConfig{
		Tables: tables, Log: slog.New(slog.DiscardHandler),
		Node: identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"), PodCIDRs: prefixes("10.1.1.0/24"),
			Instance: "instance-0123456789", Version: identity.Version{Incarnation: 7, Sequence: 1}},
		Cluster: identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "1"},
	}
	for _, c := range change {
		c(&cfg)
	}
	l, err := NewLocal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	run(t, l.Run)
	return l, tables
}

func insert[T any](t *testing.T, tables *Tables, table Table[T], object T) {
	t.Helper()
	txn := tables.DB.WriteTxn(table)
	defer txn.Abort()
	if _, _, err := table.Insert(txn, NewRow(object)); err != nil {
		t.Fatal(err)
	}
	txn.Commit()
}

func pod(name, ip string, state identity.EndpointState) identity.Endpoint {
	return identity.Endpoint{Namespace: "default", Name: name, Labels: identity.Labels{"app": "shop"}, Identity: identity.Compose(1, 300),
		Address: netip.MustParseAddr(ip), State: state}
}

func eastShop() lb.Service {
	return lb.Service{Cluster: "east", ClusterID: 1, Name: lb.Name{Namespace: "default", Name: "shop"}, Affinity: lb.AffinityNone,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("100.64.64.9")}, Ports: []lb.ServicePort{{Protocol: lb.TCP, Port: 80, TargetPort: 8080}},
		Selector: map[string]string{"app": "shop"}}
}

const (
	podKey   = "causeway/v1/addresses/east/10.1.1.5"
	sliceOf1 = "causeway/v1/slices/east/default/shop/node1"
)

func published(tables *Tables, txn statedb.ReadTxn, key string) (string, bool) {
	row, _, ok := tables.Publications.Get(txn, tables.Publications.ByKey(key))
	if !ok {
		return "", false
	}
	return row.Object.Value, true
}

func TestEndpointsArePublishedAsTheirStateSays(t *testing.T) {
	_, tables := startLocal(t)
	insert(t, tables, tables.Services, eastShop())
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointNotReady))
	untilTables(t, tables, "the address is published, as no backend", func(txn statedb.ReadTxn) bool {
		_, address := published(tables, txn, podKey)
		_, slice := published(tables, txn, sliceOf1)
		return address && !slice && len(tables.BackendsOf(txn, eastShop().Name)) == 0
	})
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointReady))
	untilTables(t, tables, "it is a backend here and elsewhere", func(txn statedb.ReadTxn) bool {
		value, slice := published(tables, txn, sliceOf1)
		return slice && strings.Contains(value, "10.1.1.5") && len(tables.BackendsOf(txn, eastShop().Name)) == 1
	})
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointTerminating))
	untilTables(t, tables, "it is a backend no more, and still reachable", func(txn statedb.ReadTxn) bool {
		_, address := published(tables, txn, podKey)
		_, slice := published(tables, txn, sliceOf1)
		return address && !slice && len(tables.BackendsOf(txn, eastShop().Name)) == 0
	})
	txn := tables.DB.WriteTxn(tables.Endpoints)
	if err := Remove(txn, tables.Endpoints, "default/a"); err != nil {
		t.Fatal(err)
	}
	txn.Commit()
	untilTables(t, tables, "it is withdrawn", func(txn statedb.ReadTxn) bool {
		_, address := published(tables, txn, podKey)
		return !address
	})
}

// TestInKubernetesSelectorsMakeNoBackends: EndpointSlices say who is one, and rows that came from them are nobody's to change here.
func TestInKubernetesSelectorsMakeNoBackends(t *testing.T) {
	l, tables := startLocal(t, func(cfg *LocalConfig) { cfg.Kubernetes = true })
	theirs := lb.Backend{Cluster: "east", ClusterID: 1, Service: eastShop().Name, Address: netip.MustParseAddr("10.1.1.5"), Node: "node1", Slice: "shop-x7k2p",
		Ports: []lb.BackendPort{{Protocol: lb.TCP, Port: 8080}}}
	insert(t, tables, tables.Backends, theirs)
	insert(t, tables, tables.Services, eastShop())
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointReady))
	untilTables(t, tables, "the address is published", func(txn statedb.ReadTxn) bool { _, ok := published(tables, txn, podKey); return ok })
	insert(t, tables, tables.Services, eastShop()) // after the endpoint, too
	seen := make(chan struct{})
	l.After(t.Context(), func() { close(seen) })
	<-seen
	txn := tables.DB.ReadTxn()
	if _, slice := published(tables, txn, sliceOf1); slice {
		t.Error("a slice is published that follows from the selector")
	}
	if backends := tables.BackendsOf(txn, eastShop().Name); len(backends) != 1 || backends[0].Slice != theirs.Slice {
		t.Errorf("backends are %+v, want the one of the EndpointSlice alone", backends)
	}
	change := tables.DB.WriteTxn(tables.Endpoints)
	if err := Remove(change, tables.Endpoints, "default/a"); err != nil {
		t.Fatal(err)
	}
	change.Commit()
	untilTables(t, tables, "the address is withdrawn", func(txn statedb.ReadTxn) bool { _, ok := published(tables, txn, podKey); return !ok })
	if backends := tables.BackendsOf(tables.DB.ReadTxn(), eastShop().Name); len(backends) != 1 {
		t.Error("with the endpoint went a backend of an EndpointSlice")
	}
}

func TestAPodWithTwoAddressesIsPublishedWithBoth(t *testing.T) {
	_, tables := startLocal(t)
	service := eastShop()
	service.ClusterIPs = append(service.ClusterIPs, netip.MustParseAddr("fd00:1::9"))
	insert(t, tables, tables.Services, service)
	is := func(what, addresses, backends string) {
		t.Helper()
		untilTables(t, tables, what, func(txn statedb.ReadTxn) bool {
			var rows, keys, behind []string
			for row := range tables.Addresses.All(txn) {
				if row.Object.Endpoint != "" {
					rows = append(rows, row.Object.Prefix.Addr().String())
				}
			}
			for row := range tables.Publications.All(txn) {
				if ip, ok := strings.CutPrefix(row.Object.Key, identity.AddressesPrefix("east")); ok {
					keys = append(keys, ip)
				}
			}
			for _, b := range tables.BackendsOf(txn, service.Name) {
				behind = append(behind, b.Address.String())
			}
			return strings.Join(rows, " ") == addresses && strings.Join(keys, " ") == addresses && strings.Join(behind, " ") == backends
		})
	}
	ep := pod("a", "10.1.1.5", identity.EndpointReady)
	ep.Address6 = netip.MustParseAddr("fd00:10:0:1::5")
	insert(t, tables, tables.Endpoints, ep)
	is("both addresses are there", "10.1.1.5 fd00:10:0:1::5", "10.1.1.5 fd00:10:0:1::5")

	ep.Address6 = netip.MustParseAddr("fd00:10:0:1::6") // deleted and added again, before anybody saw that
	insert(t, tables, tables.Endpoints, ep)
	is("the former one is withdrawn", "10.1.1.5 fd00:10:0:1::6", "10.1.1.5 fd00:10:0:1::6")

	ep = pod("a", "10.1.1.7", identity.EndpointReady)
	ep.Labels = identity.Labels{"app": "cart"}
	insert(t, tables, tables.Endpoints, ep)
	is("what was a backend is none any more", "10.1.1.7", "")
}

func TestAStatusOfARowIsNotPublishedAgain(t *testing.T) {
	_, tables := startLocal(t)
	ep := pod("a", "10.1.1.5", identity.EndpointReady)
	insert(t, tables, tables.Services, eastShop())
	insert(t, tables, tables.Endpoints, ep)
	untilTables(t, tables, "the slice is published", func(txn statedb.ReadTxn) bool { _, ok := published(tables, txn, sliceOf1); return ok })
	before := tables.Publications.Revision(tables.DB.ReadTxn())
	insert(t, tables, tables.Endpoints, ep) // as a reconciler's answer does
	insert(t, tables, tables.Endpoints, pod("b", "10.1.1.6", identity.EndpointReady))
	untilTables(t, tables, "the second one is published", func(txn statedb.ReadTxn) bool {
		value, _ := published(tables, txn, sliceOf1)
		return strings.Contains(value, "10.1.1.6")
	})
	if writes := tables.Publications.Revision(tables.DB.ReadTxn()) - before; writes != 2 {
		t.Errorf("%d writes for one new endpoint, want its address and its slice", writes)
	}
}

func TestWhatTheStoreLostIsWrittenAgainAndWhatIsLeftOverGoes(t *testing.T) {
	l, tables := startLocal(t)
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointReady))
	untilTables(t, tables, "the address is published", func(txn statedb.ReadTxn) bool { _, ok := published(tables, txn, podKey); return ok })
	txn := tables.DB.WriteTxn(tables.Publications)
	row, _, _ := tables.Publications.Get(txn, tables.Publications.ByKey(podKey))
	if _, _, err := tables.Publications.Insert(txn, &Row[Publication]{Object: row.Object, Status: Status{Kind: Done}}); err != nil {
		t.Fatal(err)
	}
	changes, err := tables.Publications.Changes(txn)
	if err != nil {
		t.Fatal(err)
	}
	txn.Commit()

	stale := "causeway/v1/addresses/east/10.1.1.99"
	l.Own(context.Background(), []string{identity.ClusterKey, identity.NodeKey("east", "node1"), stale}, true)
	removed, again := false, false
	untilTables(t, tables, "both are seen to", func(txn statedb.ReadTxn) bool {
		seq, _ := changes.Next(txn)
		for change := range seq {
			removed = removed || change.Deleted && change.Object.Object.Key == stale
			again = again || !change.Deleted && change.Object.Object.Key == podKey && change.Object.Status.Kind == Pending
		}
		return removed && again
	})
}

func TestWhatIsWrittenAgainBeginsWithTheClusterAndEndsWithTheMark(t *testing.T) {
	l, tables := startLocal(t)
	insert(t, tables, tables.Endpoints, pod("a", "10.1.1.5", identity.EndpointReady))
	untilTables(t, tables, "the address is published", func(txn statedb.ReadTxn) bool { _, ok := published(tables, txn, podKey); return ok })
	again := func() {
		done := make(chan struct{})
		l.Own(context.Background(), nil, true)
		l.After(context.Background(), func() { close(done) })
		<-done
	}
	again()
	txn := tables.DB.WriteTxn(tables.Publications)
	for _, row := range rows(tables.Publications.All(txn)) {
		if _, _, err := tables.Publications.Insert(txn, &Row[Publication]{Object: row.Object, Status: Status{Kind: Done}}); err != nil {
			t.Fatal(err)
		}
	}
	changes, err := tables.Publications.Changes(txn)
	if err != nil {
		t.Fatal(err)
	}
	txn.Commit()
	again()
	var order []string
	seq, _ := changes.Next(tables.DB.ReadTxn())
	for change := range seq {
		if change.Object.Status.Kind == Pending {
			order = append(order, change.Object.Object.Key)
		}
	}
	want := []string{identity.ClusterKey, identity.NodeKey("east", "node1"), podKey, identity.SyncedKey("east", "node1")}
	if !slices.Equal(order, want) {
		t.Errorf("written again are %q, want %q", order, want)
	}
}

func publisher(store kvstore.Store, instance string) *Publisher {
	return &Publisher{Store: store, Node: identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"),
		PodCIDRs: prefixes("10.1.1.0/24"), Instance: instance, Version: identity.Version{Incarnation: 1, Sequence: 1}}}
}

func TestAMachineCannotTakeAnothersName(t *testing.T) {
	ctx, store := context.Background(), kvstore.NewMemory()
	nodeOf := func(p *Publisher) Publication {
		return Publication{Key: identity.NodeKey("east", "node1"), Value: string(identity.EncodeNode(p.Node)), Leased: true}
	}
	first, second, again := publisher(store, "instance-one-0123456789"), publisher(store.Client(), "instance-two-0123456789"), publisher(store.Client(), "instance-one-0123456789")
	info := identity.EncodeCluster(identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "1"})
	for _, p := range []*Publisher{first, second, again} {
		if err := p.Update(ctx, Publication{Key: identity.ClusterKey, Value: string(info)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Update(ctx, Publication{Key: podKey, Value: "x"}); err == nil {
		t.Error("an address was published before the node had its name")
	}
	if err := first.Update(ctx, nodeOf(first)); err != nil {
		t.Fatal(err)
	}
	if err := second.Update(ctx, nodeOf(second)); err == nil || !strings.Contains(err.Error(), "belongs to another machine at 172.29.1.11") {
		t.Errorf("the name was taken from a machine: %v", err)
	}
	if err := second.Update(ctx, Publication{Key: podKey, Value: "x"}); err == nil {
		t.Error("a machine without a name published an address")
	}
	if err := again.Update(ctx, nodeOf(again)); err != nil {
		t.Errorf("a restarted agent did not get its own name back: %v", err)
	}
}

func TestANodeDoesNotWriteIntoAnotherClustersStore(t *testing.T) {
	ctx, store := context.Background(), kvstore.NewMemory()
	west := identity.ClusterInfo{Name: "west", ID: 2, PodCIDRs: prefixes("10.2.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/18")}, Version: "1"}
	if err := store.Put(ctx, identity.ClusterKey, identity.EncodeCluster(west)); err != nil {
		t.Fatal(err)
	}
	p := publisher(store, "instance-one-0123456789")
	err := p.Update(ctx, Publication{Key: identity.ClusterKey, Value: "{}"})
	if err == nil || !strings.Contains(err.Error(), "the store is that of cluster west (ID 2)") {
		t.Errorf("the error is %v", err)
	}
	if entry, err := store.Get(ctx, identity.ClusterKey); err != nil || !strings.Contains(string(entry.Value), "west") {
		t.Error("the cluster's own entry was overwritten")
	}
	if p.Update(ctx, Publication{Key: identity.NodeKey("east", "node1"), Value: string(identity.EncodeNode(p.Node))}) == nil {
		t.Error("the node introduced itself to a cluster that it is not of")
	}
}

func TestANodeTellsOfItsNewKeys(t *testing.T) {
	l, tables := startLocal(t)
	key := identity.TunnelKey{Slot: 1, Key: identity.WireGuardKey{7}, Port: 51872}
	l.SetTunnelKeys(t.Context(), []identity.TunnelKey{key})
	nodeKey := identity.NodeKey("east", "node1")
	untilTables(t, tables, "the node's entry has the key", func(txn statedb.ReadTxn) bool {
		row, _, ok := tables.Publications.Get(txn, tables.Publications.ByKey(nodeKey))
		return ok && strings.Contains(row.Object.Value, key.Key.String())
	})
	row, _, _ := tables.Nodes.Get(tables.DB.ReadTxn(), tables.Nodes.ByKey("east/node1"))
	if !slices.Equal(row.Object.TunnelKeys, []identity.TunnelKey{key}) || !row.Object.Newer(identity.Version{Incarnation: 7, Sequence: 1}) || !row.Object.Local {
		t.Errorf("the node's row is %+v", row.Object)
	}
	l.SetTunnelKeys(t.Context(), []identity.TunnelKey{key}) // nothing has changed
	insert(t, tables, tables.Endpoints, pod("shop-1", "10.1.1.5", identity.EndpointReady))
	untilTables(t, tables, "the endpoint is published", func(txn statedb.ReadTxn) bool {
		_, _, ok := tables.Publications.Get(txn, tables.Publications.ByKey(podKey))
		return ok
	})
	if again, _, _ := tables.Nodes.Get(tables.DB.ReadTxn(), tables.Nodes.ByKey("east/node1")); again.Object.Version != row.Object.Version {
		t.Error("the same keys were told twice")
	}
}
