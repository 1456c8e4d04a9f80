package clustermesh

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// stopped returns a mesh whose follower does not run: batches are handed to it one by one.
func stopped(t *testing.T) *mesh {
	t.Helper()
	tables, err := NewTables()
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{t: t, tables: tables, refusals: NewRefusals()}
	east := identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "1"}
	m.follower = NewFollower(FollowerConfig{
		Cluster: "west", ID: 2, Self: identity.NodeName{Cluster: "east", Node: "node1"},
		Tables: m.tables, Refusals: m.refusals, Claims: NewClaims(east), Log: slog.New(slog.DiscardHandler),
	})
	return m
}

func wrote(key string, value []byte) kvstore.Event {
	return kvstore.Event{Kind: kvstore.EventPut, Entry: kvstore.Entry{Key: key, Value: value}}
}

func gone(key string) kvstore.Event {
	return kvstore.Event{Kind: kvstore.EventDelete, Entry: kvstore.Entry{Key: key}}
}

func wroteCluster() kvstore.Event {
	return wrote(identity.ClusterKey, identity.EncodeCluster(identity.ClusterInfo{
		Name: "west", ID: 2, PodCIDRs: prefixes("10.2.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/18")}, Version: "1",
	}))
}

func wroteNode(n identity.Node) kvstore.Event {
	return wrote(identity.NodeKey(n.Cluster, n.Name), identity.EncodeNode(n))
}

func wroteAddress(a identity.Address) kvstore.Event {
	return wrote(identity.AddressKey(a.Cluster, a.Prefix.Addr()), identity.EncodeAddress(a))
}

func (m *mesh) apply(revision int64, listed bool, events ...kvstore.Event) {
	m.follower.apply(kvstore.Batch{Events: events, Listed: listed, Revision: revision})
}

func TestANodeAtAnAddressOfAnotherClustersRangeIsRefused(t *testing.T) {
	m := stopped(t)
	m.apply(5, true, wroteCluster(), wroteNode(node("node1", "10.1.1.5", "10.2.1.0/24")))
	if list := m.refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "10.1.0.0/16 of cluster east") {
		t.Errorf("west's node took an address of east's pods: refusals %+v", list)
	}
}

func TestARangeWithAnotherClustersNodeInItIsRefused(t *testing.T) {
	m := stopped(t)
	insert(t, m.tables, m.tables.Nodes, identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("10.2.3.4"), PodCIDRs: prefixes("10.1.1.0/24")})
	m.apply(5, true, wroteCluster())
	if list := m.refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "node east/node1") {
		t.Errorf("west took a range that a node of east lives in: refusals %+v", list)
	}
}

func TestWhatAnotherClusterStoodAgainstIsJudgedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t)
		north := identity.ClusterInfo{Name: "north", ID: 3, PodCIDRs: prefixes("10.2.0.0/16")}
		if err := m.follower.Claims.Claim(north); err != nil {
			t.Fatal(err)
		}
		m.putCluster()
		m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
		synctest.Wait()
		if len(m.refusals.List()) == 0 {
			t.Fatal("two clusters have one range")
		}
		north.PodCIDRs = prefixes("10.3.0.0/16")
		if err := m.follower.Claims.Claim(north); err != nil {
			t.Fatal(err)
		}
		insert(t, m.tables, m.tables.Nodes, identity.Node{Cluster: "north", ClusterID: 3, Name: "node1", Address: netip.MustParseAddr("172.29.3.11"), PodCIDRs: prefixes("10.3.1.0/24")})
		time.Sleep(2 * waitPatience)
		synctest.Wait()
		if list := m.refusals.List(); len(list) != 0 || !m.follower.State().Synced {
			t.Errorf("west is refused after its rival has gone: %+v", list)
		}
	})
}

func TestAMachineThatTookOverAFreedNameIsTheNode(t *testing.T) {
	m := stopped(t)
	before, after := node("node1", "172.29.2.11", "10.2.1.0/24"), node("node1", "172.29.2.21", "10.2.1.0/24")
	before.Incarnation, after.Incarnation, after.Instance = 9, 5, "another-machine-0123456789" // its clock is behind
	m.apply(5, true, wroteCluster(), wroteNode(before))
	m.apply(9, false, gone(identity.NodeKey("west", "node1")), wroteNode(after))
	if at, ok := m.tables.NodeAt(m.tables.DB.ReadTxn(), after.Address); !ok {
		t.Errorf("the name was free, and the machine that took it is refused: %+v %+v", at, m.refusals.List())
	}

	// A listing after a longer absence shows only the new one.
	again := after
	again.Incarnation, again.Instance, again.Address = 11, "third-machine-0123456789", netip.MustParseAddr("172.29.2.31")
	m.apply(20, true, wroteNode(again))
	if _, ok := m.tables.NodeAt(m.tables.DB.ReadTxn(), again.Address); !ok {
		t.Errorf("the machine that a listing shows is refused: %+v", m.refusals.List())
	}
}

func TestAStoreThatWasEmptiedAndHalfWrittenAgainTakesNothingAway(t *testing.T) {
	m := stopped(t)
	n1, n2 := node("node1", "172.29.2.11", "10.2.1.0/24"), node("node2", "172.29.2.12", "10.2.2.0/24")
	a1, a2 := address("10.2.1.5", "node1", identity.Compose(2, 300)), address("10.2.2.5", "node2", identity.Compose(2, 300))
	m.apply(100, true, wroteCluster(), wroteNode(n1), wroteNode(n2), wroteAddress(a1), wroteAddress(a2))
	// When it is listed again node1 has written the cluster's entry and its own, but node2 has not.
	m.apply(4, true, gone(identity.NodeKey("west", "node2")), gone(identity.AddressKey("west", a2.Prefix.Addr())))
	txn := m.tables.DB.ReadTxn()
	if !m.hasAddress(txn, "10.2.2.5") || !m.hasAddress(txn, "10.2.1.5") {
		t.Error("an emptied store removed what nobody has withdrawn")
	}
	if held := m.follower.State().Held; held != 2 {
		t.Errorf("%d entries are said to be held from memory, want 2", held)
	}
	m.apply(9, false, wroteNode(n2), wroteAddress(a2))
	if held := m.follower.State().Held; held != 0 {
		t.Errorf("%d entries are said to be held from memory, want none", held)
	}
}

func TestAnOlderSliceDoesNotOverwriteANewerOne(t *testing.T) {
	m := stopped(t)
	slice := func(sequence uint64, ip string) kvstore.Event {
		s := lb.Slice{Cluster: "west", ClusterID: 2, Service: lb.Name{Namespace: "default", Name: "shop"}, Slice: "node1", Node: "node1",
			Incarnation: 1, Sequence: sequence, Ports: []lb.BackendPort{{Protocol: lb.TCP, Port: 8080}},
			Backends: []lb.SliceBackend{{Address: netip.MustParseAddr(ip), Endpoint: "default/pod"}}}
		return wrote(s.Key(), lb.EncodeSlice(s))
	}
	has := func(ip string) bool {
		backends := m.tables.BackendsOf(m.tables.DB.ReadTxn(), lb.Name{Namespace: "default", Name: "shop"})
		return len(backends) == 1 && backends[0].Address == netip.MustParseAddr(ip)
	}
	m.apply(5, true, wroteCluster(), wroteNode(node("node1", "172.29.2.11", "10.2.1.0/24")), slice(7, "10.2.1.5"))
	m.apply(3, true, slice(6, "10.2.1.6")) // the store was restored from a copy
	if !has("10.2.1.5") {
		t.Error("a store's older copy has overwritten what its owner said later")
	}
	m.apply(6, false, slice(8, "10.2.1.7"))
	if !has("10.2.1.7") {
		t.Error("the owner's next word was not taken")
	}
	key := lb.SliceKey("west", lb.Name{Namespace: "default", Name: "shop"}, "node1")
	m.apply(9, false, gone(key), slice(1, "10.2.1.8"))
	if !has("10.2.1.8") {
		t.Error("a slice that was withdrawn and made anew was not taken")
	}
}

func TestAnAddressWithoutAnEndpointSurvivesItsNodesNextWord(t *testing.T) {
	m := stopped(t)
	n, a := node("node1", "172.29.2.11", "10.2.1.0/24"), address("10.2.1.5", "node1", identity.Compose(2, 300))
	a.Endpoint = ""
	m.apply(5, true, wroteCluster(), wroteNode(n), wroteAddress(a))
	n.Incarnation++
	m.apply(6, false, wroteNode(n))
	if !m.hasAddress(m.tables.DB.ReadTxn(), "10.2.1.5") {
		t.Error("a node's restart removed an address that is an entry of its own")
	}
}

func TestNothingIsPrunedForAStoreThatHasJustBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := stopped(t)
		var synced atomic.Bool
		m.west = kvstore.NewMemory()
		m.follower.Store, m.follower.Synced = m.west.Client(), func() { synced.Store(true) }
		run(t, m.follower.Run)
		synctest.Wait()
		m.putCluster()
		synctest.Wait()
		if synced.Load() {
			t.Error("a store that was empty a moment ago counts as read in full: what its owners are still writing would be pruned")
		}
		time.Sleep(orphanGrace + waitPatience)
		synctest.Wait()
		if !synced.Load() {
			t.Error("it never counts as read in full")
		}
	})
}

func TestRefusalsAreBoundedInSize(t *testing.T) {
	r := NewRefusals()
	key := kvstore.Prefix + strings.Repeat("k", 1<<20)
	r.Add("west", key, errors.New(strings.Repeat("x", 1<<20)))
	list := r.List()
	if len(list) != 1 || len(list[0].Key) > 1000 || len(list[0].Reason) > 2000 {
		t.Fatal("a refusal holds as much as a peer likes to write")
	}
	r.Clear("west", key)
	if len(r.List()) != 0 {
		t.Error("a refusal with a long key cannot be cleared")
	}
}

func TestWhatOthersDidToTheNodesOwnEntriesIsUndone(t *testing.T) {
	l, tables := startLocal(t)
	store := kvstore.NewMemory()
	f := NewFollower(FollowerConfig{
		Cluster: "east", ID: 1, Self: identity.NodeName{Cluster: "east", Node: "node1"}, Store: store.Client(), Tables: tables, Refusals: NewRefusals(),
		Claims: NewClaims(l.Cluster), Log: slog.New(slog.DiscardHandler),
		Own:      func(keys []string, complete bool) { l.Own(context.Background(), keys, complete) },
		Disputed: func(keys []string) { l.Disputed(context.Background(), keys) },
	})
	run(t, f.Run)
	key := identity.NodeKey("east", "node1")
	settle := func() {
		txn := tables.DB.WriteTxn(tables.Publications)
		for _, row := range rows(tables.Publications.All(txn)) {
			if err := store.Put(context.Background(), row.Object.Key, []byte(row.Object.Value)); err != nil {
				t.Fatal(err)
			}
			_, _, _ = tables.Publications.Insert(txn, &Row[Publication]{Object: row.Object, Status: Status{Kind: Done}})
		}
		txn.Commit()
	}
	again := func(txn statedb.ReadTxn) bool {
		row, _, ok := tables.Publications.Get(txn, tables.Publications.ByKey(key))
		return ok && row.Status.Kind == Pending
	}
	settle()
	if err := store.Delete(context.Background(), key); err != nil {
		t.Fatal(err)
	}
	untilTables(t, tables, "a deleted entry is written again", again)
	settle()
	other := l.Node
	other.Instance = "another-machine-0123456789"
	if err := store.Put(context.Background(), key, identity.EncodeNode(other)); err != nil {
		t.Fatal(err)
	}
	untilTables(t, tables, "an entry that another machine took is claimed again", again)
}

func TestLeftoversGoOnlyOnceTheClusterIsKnown(t *testing.T) {
	l, tables := startLocal(t)
	txn := tables.DB.WriteTxn(tables.Publications)
	changes, err := tables.Publications.Changes(txn)
	if err != nil {
		t.Fatal(err)
	}
	txn.Commit()
	stale := identity.AddressKey("east", netip.MustParseAddr("10.1.1.99"))
	l.Own(context.Background(), []string{stale}, false)
	done := make(chan struct{})
	l.After(context.Background(), func() { close(done) })
	<-done
	seq, _ := changes.Next(tables.DB.ReadTxn())
	for change := range seq {
		if change.Object.Object.Key == stale {
			t.Error("an entry was removed while the services that may need it are not known")
		}
	}
}

func TestAnEndpointThatCameBackElsewhereLeavesNothingBehind(t *testing.T) {
	tables, err := NewTables()
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewLocal(LocalConfig{Tables: tables, Log: slog.New(slog.DiscardHandler),
		Node:    identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"), Version: identity.Version{Incarnation: 7}},
		Cluster: identity.ClusterInfo{Name: "east", ID: 1}})
	if err != nil {
		t.Fatal(err)
	}
	dirty := map[lb.Name]struct{}{}
	for _, ip := range []string{"10.1.1.5", "10.1.1.6"} { // deleted and added again before Local looked
		if err := l.endpoint(tables.DB.ReadTxn(), pod("a", ip, identity.EndpointReady), false, dirty); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := published(tables, tables.DB.ReadTxn(), podKey); ok {
		t.Error("the pod's former address is still published")
	}
}

func TestThePublisherDoesNotWaitForAStoreThatIsAway(t *testing.T) {
	store := kvstore.NewMemory()
	p := publisher(&silent{store}, "instance-one-0123456789")
	store.Disconnect()
	start := time.Now()
	for range 100 {
		if err := p.Update(context.Background(), Publication{Key: identity.ClusterKey, Value: "x"}); !errors.Is(err, kvstore.ErrUnavailable) {
			t.Fatalf("the error is %v", err)
		}
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("a hundred writes to a store that is away took %s", took)
	}
}

// silent is a store that, like etcd's, makes a request wait when it is away.
type silent struct{ *kvstore.Memory }

func (s *silent) Create(ctx context.Context, key string, value []byte, opts ...kvstore.PutOption) error {
	err := s.Memory.Create(ctx, key, value, opts...)
	if errors.Is(err, kvstore.ErrUnavailable) {
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

func TestANameTakenDuringAnOutageIsLeftToItsNewOwner(t *testing.T) {
	ctx, store := context.Background(), kvstore.NewMemory()
	first, second := publisher(store, "instance-one-0123456789"), publisher(store.Client(), "instance-two-0123456789")
	info := Publication{Key: identity.ClusterKey, Value: string(identity.EncodeCluster(identity.ClusterInfo{
		Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "1"}))}
	nodeOf := func(p *Publisher) Publication {
		return Publication{Key: identity.NodeKey("east", "node1"), Value: string(identity.EncodeNode(p.Node)), Leased: true}
	}
	for _, pub := range []Publication{info, nodeOf(first)} {
		if err := first.Update(ctx, pub); err != nil {
			t.Fatal(err)
		}
	}
	store.Disconnect()
	second.Store.(*kvstore.Memory).ExpireLeases()
	for _, pub := range []Publication{info, nodeOf(second)} {
		if err := second.Update(ctx, pub); err != nil {
			t.Fatal(err)
		}
	}
	store.Reconnect()
	held, err := store.Get(ctx, identity.NodeKey("east", "node1"))
	if err != nil || !strings.Contains(string(held.Value), "instance-two") {
		t.Errorf("the machine that was away took the name back: %s %v", held.Value, err)
	}
}

func TestDeletedAndInsertedAtOnceIsOneChange(t *testing.T) {
	tables, err := NewTables()
	if err != nil {
		t.Fatal(err)
	}
	ep := pod("a", "10.1.1.5", identity.EndpointReady)
	txn := tables.DB.WriteTxn(tables.Endpoints)
	changes, err := tables.Endpoints.Changes(txn)
	if err != nil {
		t.Fatal(err)
	}
	_, _, _ = tables.Endpoints.Insert(txn, NewRow(ep))
	txn.Commit()
	seq, _ := changes.Next(tables.DB.ReadTxn())
	for range seq {
	}
	txn = tables.DB.WriteTxn(tables.Endpoints)
	_ = Remove(txn, tables.Endpoints, "default/a")
	_, _, _ = tables.Endpoints.Insert(txn, NewRow(ep))
	txn.Commit()
	seq, _ = changes.Next(tables.DB.ReadTxn())
	var kinds []bool
	for c := range seq {
		kinds = append(kinds, c.Deleted)
	}
	if len(kinds) != 1 || kinds[0] {
		t.Errorf("changes (deleted?) are %v, want one that is no deletion", kinds)
	}
}

func TestQueriesTellNamesApartThatStartAlike(t *testing.T) {
	tables, err := NewTables()
	if err != nil {
		t.Fatal(err)
	}
	n := node("node1", "172.29.2.11", "10.2.1.0/24")
	insert(t, tables, tables.Nodes, n)
	for _, name := range []string{"shop", "shop2", "sho"} {
		insert(t, tables, tables.Backends, lb.Backend{Cluster: "west", Service: lb.Name{Namespace: "default", Name: name}, Address: netip.MustParseAddr("10.2.1.5"), Slice: "node1"})
	}
	txn := tables.DB.ReadTxn()
	if _, ok := tables.NodeAt(txn, netip.MustParseAddr("172.29.2.1")); ok {
		t.Error("172.29.2.1 was taken for 172.29.2.11")
	}
	if got := len(tables.BackendsOf(txn, lb.Name{Namespace: "default", Name: "shop"})); got != 1 {
		t.Errorf("shop has %d backends, want 1", got)
	}
	if got := len(rows(tables.Backends.List(txn, tables.backendsBySlice.Query(sliceKey("west", lb.Name{Namespace: "default", Name: "shop"}, "node"))))); got != 0 {
		t.Errorf("slice node has %d backends of slice node1", got)
	}
}
