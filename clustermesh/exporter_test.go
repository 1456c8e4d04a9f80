package clustermesh

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// kube is an agent of cluster "east", which is one of Kubernetes, with the part of it that publishes.
type kube struct {
	t        testing.TB
	tables   *Tables
	store    kvstore.Store
	exporter *Exporter
	follower *Follower
	synced   chan struct{}
	told     chan News
	stop     context.CancelFunc
	done     chan error
}

var eastInfo = identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: prefixes("100.64.64.0/18"), Version: "1"}

// newKube returns an agent that runs once it is started, with two nodes in its tables.
func newKube(t testing.TB, node string, store kvstore.Store) *kube {
	t.Helper()
	k := &kube{t: t, store: store, synced: make(chan struct{}), told: make(chan News, 1000)}
	var err error
	if k.tables, err = NewTables(); err != nil {
		t.Fatal(err)
	}
	k.exporter = NewExporter(ExporterConfig{Cluster: eastInfo, Node: node, Store: store, Tables: k.tables, Synced: k.synced, Tell: func(n News) { k.told <- n }, Log: slog.New(slog.DiscardHandler)})
	txn := k.tables.DB.WriteTxn(k.tables.Nodes)
	for i, name := range []string{"node1", "node2"} {
		n := identity.Node{Cluster: "east", ClusterID: 1, Name: name, Address: netip.AddrFrom4([4]byte{172, 29, 1, byte(11 + i)}), PodCIDRs: prefixes(fmt.Sprintf("10.1.%d.0/24", i+1))}
		if _, err := Put(txn, k.tables.Nodes, n, equal); err != nil {
			t.Fatal(err)
		}
	}
	txn.Commit()
	return k
}

// start runs the exporter beside the follower that tells it what becomes of its keys.
func (k *kube) start() *kube {
	ctx, stop := context.WithCancel(context.Background())
	k.stop, k.done = stop, make(chan error, 2)
	k.follower = NewFollower(FollowerConfig{
		Cluster: "east", ID: 1, Self: identity.NodeName{Cluster: "east", Node: k.exporter.Node}, Store: k.store, Tables: k.tables, Refusals: NewRefusals(),
		Claims: NewClaims(eastInfo), Exported: k.exporter.Observe, Log: slog.New(slog.DiscardHandler),
	})
	go func() { k.done <- k.exporter.Run(ctx) }()
	go func() { k.done <- k.follower.Run(ctx) }()
	k.t.Cleanup(k.end)
	return k
}

// end stops the agent in an orderly way.
func (k *kube) end() {
	k.stop()
	for range cap(k.done) {
		if err := <-k.done; err != nil {
			k.t.Error(err)
		}
	}
	k.done = make(chan error)
}

func shop(global, shared bool) lb.Service {
	return lb.Service{
		Cluster: "east", ClusterID: 1, Name: lb.Name{Namespace: "web", Name: "shop"}, Global: global, Shared: shared, Affinity: lb.AffinityNone,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("100.64.64.10")}, Ports: []lb.ServicePort{{Name: "http", Protocol: lb.TCP, Port: 80, TargetPort: 8080, NodePort: 30080}},
	}
}

// shopPod is a backend of the shop on node 1 or 2.
func shopPod(node, number int, slice string) lb.Backend {
	return lb.Backend{
		Cluster: "east", ClusterID: 1, Service: shop(true, true).Name, Address: netip.AddrFrom4([4]byte{10, 1, byte(node), byte(number)}), Node: fmt.Sprintf("node%d", node),
		Endpoint: fmt.Sprintf("web/shop-%d-%d", node, number), Ports: []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 8080}}, Slice: slice,
	}
}

// apply writes rows as Kubernetes' informers do, in one transaction.
func (k *kube) apply(rows ...any) {
	k.t.Helper()
	txn := k.tables.DB.WriteTxn(k.tables.Services, k.tables.Backends)
	var err error
	for _, row := range rows {
		switch row := row.(type) {
		case lb.Service:
			_, err = Put(txn, k.tables.Services, row, equal)
		case lb.Backend:
			_, err = Put(txn, k.tables.Backends, row, equal)
		case without[lb.Service]:
			err = Remove(txn, k.tables.Services, k.tables.Services.Key(row.row))
		case without[lb.Backend]:
			err = Remove(txn, k.tables.Backends, BackendKey(row.row))
		}
		if err != nil {
			k.t.Fatal(err)
		}
	}
	txn.Commit()
}

type without[T any] struct{ row T }

const (
	shopKey  = kvstore.Prefix + "services/east/web/shop"
	sliceOne = kvstore.Prefix + "slices/east/web/shop/_shop-a"
	sliceTwo = kvstore.Prefix + "slices/east/web/shop/_shop-b"
)

// exportedIn is what a store has for other clusters, as KEY: ADDRESS@NODE….
func exportedIn(t testing.TB, s kvstore.Store) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, prefix := range []string{lb.ServicesPrefix("east"), lb.SlicesPrefix("east")} {
		entries, err := s.List(context.Background(), prefix)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			out[e.Key] = describeEntry(t, e)
		}
	}
	return out
}

func describeEntry(t testing.TB, e kvstore.Entry) string {
	t.Helper()
	if !lb.OfClusterKey(e.Key) {
		if _, err := lb.DecodeService(e.Key, e.Value); err != nil {
			return "refused"
		}
		return "service"
	}
	slice, err := lb.DecodeSlice(e.Key, e.Value)
	if err != nil {
		return "refused"
	}
	var backends []string
	for _, b := range slice.Backends {
		backends = append(backends, b.Address.String()+"@"+b.Node)
	}
	return strings.Join(backends, " ")
}

func wantPublished(t testing.TB, s kvstore.Store, when string, want map[string]string) {
	t.Helper()
	if got := exportedIn(t, s); !maps.Equal(got, want) {
		t.Errorf("%s: the store has\n%v\nwant\n%v", when, got, want)
	}
}

// newEast returns a store that is east's.
func newEast(t testing.TB) *kvstore.Memory {
	t.Helper()
	s := kvstore.NewMemory()
	t.Cleanup(func() { s.Close() })
	putEast(t, s)
	return s
}

func putEast(t testing.TB, s kvstore.Store) {
	t.Helper()
	if err := s.Put(context.Background(), identity.ClusterKey, identity.EncodeCluster(eastInfo)); err != nil {
		t.Fatal(err)
	}
}

// soon lets everything happen that does without a store failing.
func soon() {
	time.Sleep(campaignPause + maxCampaignSpread)
	synctest.Wait()
}

func TestWhatIsForOthersIsPublished(t *testing.T) {
	private, alone := shop(false, false), shop(true, false)
	for name, c := range map[string]struct {
		rows []any
		want map[string]string
	}{
		"of its cluster alone":              {[]any{private, shopPod(1, 5, "shop-a")}, map[string]string{}},
		"global but not shared":             {[]any{alone, shopPod(1, 5, "shop-a")}, map[string]string{shopKey: "service"}},
		"shared":                            {[]any{shop(true, true), shopPod(1, 5, "shop-a"), shopPod(2, 6, "shop-a"), shopPod(2, 7, "shop-b")}, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1 10.1.2.6@node2", sliceTwo: "10.1.2.7@node2"}},
		"without backends":                  {[]any{shop(true, true)}, map[string]string{shopKey: "service"}},
		"backends without their service":    {[]any{shopPod(1, 5, "shop-a")}, map[string]string{}},
		"private, then shared":              {[]any{private, shopPod(1, 5, "shop-a"), shop(true, true)}, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}},
		"shared, then gone":                 {[]any{shop(true, true), shopPod(1, 5, "shop-a"), nil, without[lb.Service]{shop(true, true)}}, map[string]string{}},
		"shared, then not":                  {[]any{shop(true, true), shopPod(1, 5, "shop-a"), nil, alone}, map[string]string{shopKey: "service"}},
		"its last backend has gone":         {[]any{shop(true, true), shopPod(1, 5, "shop-a"), nil, without[lb.Backend]{shopPod(1, 5, "")}}, map[string]string{shopKey: "service"}},
		"a backend that has moved":          {[]any{shop(true, true), shopPod(1, 5, "shop-a"), shopPod(1, 6, "shop-a"), nil, shopPod(1, 5, "shop-b")}, map[string]string{shopKey: "service", sliceOne: "10.1.1.6@node1", sliceTwo: "10.1.1.5@node1"}},
		"the last backend has moved":        {[]any{shop(true, true), shopPod(1, 5, "shop-a"), nil, shopPod(1, 5, "shop-b")}, map[string]string{shopKey: "service", sliceTwo: "10.1.1.5@node1"}},
		"another cluster's are not its own": {[]any{shop(true, true), inWest(shopPod(1, 5, "shop-a")), inWest(shop(true, true))}, map[string]string{shopKey: "service"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newEast(t)
				k := newKube(t, "node1", store.Client()).start()
				close(k.synced)
				soon()
				for _, rows := range slices.Collect(splitAtNil(c.rows)) {
					k.apply(rows...)
					soon()
				}
				wantPublished(t, store, "in the end", c.want)
				if state := k.exporter.State(); !state.Self || state.Leader != "node1" || state.LastError != "" || state.Keys != len(c.want) {
					t.Errorf("state %+v", state)
				}
			})
		})
	}
}

func inWest[T lb.Service | lb.Backend](row T) any {
	switch row := any(row).(type) {
	case lb.Service:
		row.Cluster, row.ClusterID = "west", 2
		return row
	case lb.Backend:
		row.Cluster, row.ClusterID = "west", 2
		return row
	}
	return nil
}

func splitAtNil(rows []any) func(func([]any) bool) {
	return func(yield func([]any) bool) {
		for len(rows) > 0 {
			n := slices.Index(rows, nil)
			if n < 0 {
				yield(rows)
				return
			}
			if !yield(rows[:n]) {
				return
			}
			rows = rows[n+1:]
		}
	}
}

// TestWhatOthersWouldRefuseIsLeftOut: and the rest of its slice is published, and it is said why.
func TestWhatOthersWouldRefuseIsLeftOut(t *testing.T) {
	external, elsewhere, nobody := shopPod(1, 7, "shop-a"), shopPod(2, 8, "shop-a"), shop(true, true)
	external.Address, external.Node = netip.MustParseAddr("203.0.113.9"), ""
	elsewhere.Node = "node1"
	nobody.Name.Name, nobody.Ports = "nobody", nil
	for name, c := range map[string]struct {
		row any
		why string
	}{
		"an address outside of the cluster": {external, "203.0.113.9 is outside of cluster east's pod CIDRs"},
		"another node's address":            {elsewhere, "10.1.2.8 is outside of node east/node1's pod CIDRs"},
		"a service that nobody can read":    {nobody, "service web/nobody cannot be told to other clusters: 0 ports"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newEast(t)
				k := newKube(t, "node1", store.Client()).start()
				k.apply(shop(true, true), shopPod(1, 5, "shop-a"), c.row)
				close(k.synced)
				soon()
				want := map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}
				wantPublished(t, store, "with it", want)
				if state := k.exporter.State(); !strings.Contains(state.LastError, c.why) {
					t.Errorf("it is said that %q", state.LastError)
				}
				if b, ok := c.row.(lb.Backend); ok {
					k.apply(without[lb.Backend]{b})
				} else {
					k.apply(without[lb.Service]{c.row.(lb.Service)})
				}
				soon()
				wantPublished(t, store, "without it", want)
				if state := k.exporter.State(); state.LastError != "" {
					t.Errorf("it is still said that %q", state.LastError)
				}
			})
		})
	}
}

// TestNothingIsTakenForGoneBeforeKubernetesHasSaidAll: and then what is left over goes, slices first.
func TestNothingIsTakenForGoneBeforeKubernetesHasSaidAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		old := newKube(t, "node1", store.Client()).start()
		old.apply(shop(true, true), shopPod(1, 5, "shop-a"), shopPod(1, 6, "shop-b"))
		close(old.synced)
		soon()
		all := map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1", sliceTwo: "10.1.1.6@node1"}
		wantPublished(t, store, "at first", all)
		old.end()

		k := newKube(t, "node1", store.Client()).start()
		k.apply(shop(true, true))
		soon()
		wantPublished(t, store, "while it is not synced", all)
		k.apply(shopPod(1, 6, "shop-b"))
		close(k.synced)
		soon()
		wantPublished(t, store, "once it is", map[string]string{shopKey: "service", sliceTwo: "10.1.1.6@node1"})
	})
}

// TestAForeignStoreIsNotWrittenTo: a configuration that names another cluster's store does no harm there.
func TestAForeignStoreIsNotWrittenTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := kvstore.NewMemory()
		defer store.Close()
		west := eastInfo
		west.Name = "west"
		if err := store.Put(t.Context(), identity.ClusterKey, identity.EncodeCluster(west)); err != nil {
			t.Fatal(err)
		}
		k := newKube(t, "node1", store.Client()).start()
		k.apply(shop(true, true))
		close(k.synced)
		soon()
		if state := k.exporter.State(); state.Self || !strings.Contains(state.LastError, "it is of cluster west") {
			t.Errorf("state %+v", state)
		}
		wantPublished(t, store, "of another cluster", map[string]string{})
	})
}

// TestWhatSomebodyElseHasChangedIsPutRight at once, and nothing else is written for it.
func TestWhatSomebodyElseHasChangedIsPutRight(t *testing.T) {
	want := map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}
	for name, change := range map[string]func(ctx context.Context, s kvstore.Store) error{
		"a slice was deleted":     func(ctx context.Context, s kvstore.Store) error { return s.Delete(ctx, sliceOne) },
		"a slice was overwritten": func(ctx context.Context, s kvstore.Store) error { return s.Put(ctx, sliceOne, []byte("x")) },
		"a service was deleted":   func(ctx context.Context, s kvstore.Store) error { return s.Delete(ctx, shopKey) },
		"a service was written":   func(ctx context.Context, s kvstore.Store) error { return s.Put(ctx, shopKey, []byte("{}")) },
		"a service was declared": func(ctx context.Context, s kvstore.Store) error {
			return s.Put(ctx, lb.ServicesPrefix("east")+"web/cart", []byte("{}"))
		},
		"a slice was added": func(ctx context.Context, s kvstore.Store) error { return s.Put(ctx, sliceTwo, []byte("{}")) },
		"an older slice came back": func(ctx context.Context, s kvstore.Store) error {
			return s.Put(ctx, sliceOne, inTermOne(1, shopPod(1, 9, "shop-a")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newEast(t)
				k := newKube(t, "node1", store.Client()).start()
				k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
				close(k.synced)
				soon()
				before := store.Status().Revision
				if err := change(t.Context(), store); err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // no time passes
				wantPublished(t, store, "at once", want)
				if writes := store.Status().Revision - before; writes != 2 {
					t.Errorf("%d writes: one was somebody else's, and one is enough to put it right", writes)
				}
			})
		})
	}
}

// TestNodesSlicesAreLeftAlone: they are others', also where nothing else is known of them.
func TestNodesSlicesAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		key := lb.SlicesPrefix("east") + "web/shop/node1"
		if err := store.Put(t.Context(), key, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		k := newKube(t, "node1", store.Client()).start()
		close(k.synced)
		soon()
		wantPublished(t, store, "in the end", map[string]string{key: "refused"})
	})
}

// TestAWipedOrRestoredStoreIsWrittenAnew: all of it, with versions that are newer than all before, and the mark last.
func TestAWipedOrRestoredStoreIsWrittenAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		k := newKube(t, "node1", store.Client()).start()
		k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
		close(k.synced)
		soon()
		want := map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}
		wantPublished(t, store, "before", want)
		before := sliceIn(t, store, sliceOne)

		store.Wipe()
		soon()
		wantPublished(t, store, "while it is not known whose store it is", map[string]string{})
		putEast(t, store)
		soon()
		wantPublished(t, store, "after the wipe", want)
		if after := sliceIn(t, store, sliceOne); after.Incarnation <= before.Incarnation {
			t.Errorf("written in the term %d after %d: who remembers the former would not take it", after.Incarnation, before.Incarnation)
		}
		mark, err := store.Get(t.Context(), identity.SyncedKey("east", identity.ServicesMark))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := identity.DecodeSynced(mark.Key, mark.Value); err != nil {
			t.Error(err)
		}
		slice, err := store.Get(t.Context(), sliceOne)
		if err != nil || mark.Revision < slice.Revision {
			t.Errorf("the mark came at revision %d, before the slice at %d, %v", mark.Revision, slice.Revision, err)
		}
	})
}

func sliceIn(t testing.TB, s kvstore.Store, key string) lb.Slice {
	t.Helper()
	e, err := s.Get(context.Background(), key)
	if err != nil {
		t.Fatal(err)
	}
	slice, err := lb.DecodeSlice(e.Key, e.Value)
	if err != nil {
		t.Fatal(err)
	}
	return slice
}

// TestWhatChangedWhileTheStoreWasAwayIsWrittenThen: and nothing that did not.
func TestWhatChangedWhileTheStoreWasAwayIsWrittenThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		client := store.Client()
		k := newKube(t, "node1", client).start()
		k.apply(shop(true, true), shopPod(1, 5, "shop-a"), shopPod(1, 6, "shop-b"))
		close(k.synced)
		soon()
		untouched, err := store.Get(t.Context(), sliceTwo)
		if err != nil {
			t.Fatal(err)
		}
		client.Disconnect()
		k.apply(shopPod(1, 7, "shop-a"))
		soon()
		if state := k.exporter.State(); !strings.Contains(state.LastError, "disconnected") {
			t.Errorf("it is said that %q", state.LastError)
		}
		client.Reconnect()
		soon()
		wantPublished(t, store, "after", map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1 10.1.1.7@node1", sliceTwo: "10.1.1.6@node1"})
		if now, err := store.Get(t.Context(), sliceTwo); err != nil || now.Revision != untouched.Revision {
			t.Errorf("a slice that did not change was written: revision %d, %v", now.Revision, err)
		}
	})
}

// TestOneIsElected: of several agents one publishes, and when it ends, another does at once.
func TestOneIsElected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		agents := map[string]*kube{}
		var busy sync.Map
		for i := range 5 {
			name := fmt.Sprintf("node%d", i+1)
			k := newKube(t, name, store.Client())
			k.exporter.Meanwhile = func(ctx context.Context) {
				busy.Store(name, true)
				<-ctx.Done()
				busy.Delete(name)
			}
			k.start()
			k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
			close(k.synced)
			agents[name] = k
		}
		for range 4 {
			soon()
			first := leaderOf(t, agents)
			busy.Range(func(name, _ any) bool {
				if name != first {
					t.Errorf("%s leads, and %s does what the leader does besides", first, name)
				}
				return true
			})
			if _, does := busy.Load(first); !does {
				t.Errorf("%s leads, and does nothing besides", first)
			}
			wantPublished(t, store, "with "+first, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"})
			agents[first].end()
			delete(agents, first)
		}
		soon()
		leaderOf(t, agents)
	})
}

// leaderOf returns who publishes, as all agents say.
func leaderOf(t *testing.T, agents map[string]*kube) string {
	t.Helper()
	said := map[string]int{}
	var self []string
	for name, k := range agents {
		state := k.exporter.State()
		said[state.Leader]++
		if state.Self {
			self = append(self, name)
		}
		if state.LastError != "" {
			t.Errorf("%s: %s", name, state.LastError)
		}
	}
	if len(said) != 1 || len(self) != 1 || said[self[0]] != len(agents) {
		t.Fatalf("%v publish, and the agents say it is %v", self, said)
	}
	return self[0]
}

// TestGossipsWordReplacesTheLeader before its lease has ended, if it says that the leader can do nothing more.
func TestGossipsWordReplacesTheLeader(t *testing.T) {
	for state, want := range map[identity.LivenessState]string{
		identity.NodeDead: "node2", identity.NodeAgentDown: "node2", identity.NodeLeft: "node2", identity.NodeSuspect: "node1", identity.NodeAlive: "node1",
	} {
		t.Run(string(state), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newEast(t)
				// node1 was elected, and hangs: its key is there, and it does nothing.
				hung := leadership{Node: "node1", Term: 1, Since: time.Now()}
				if _, err := store.Client().Hold(t.Context(), leaderKey, hung.encode(), leaderTTL); err != nil {
					t.Fatal(err)
				}
				k := newKube(t, "node2", store.Client()).start()
				close(k.synced)
				soon()
				if got := k.exporter.State().Leader; got != "node1" {
					t.Fatalf("%q publishes before anything has happened", got)
				}
				insert(t, k.tables, k.tables.Liveness, identity.Liveness{Cluster: "east", Node: "node1", State: state})
				soon()
				if got := k.exporter.State().Leader; got != want {
					t.Errorf("%q publishes, want %s", got, want)
				}
			})
		})
	}
}

// TestAnEarlierLifesKeyIsNotWaitedFor: an agent that was killed while it published goes on when it is back.
func TestAnEarlierLifesKeyIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		before := leadership{Node: "node1", Term: uint64(time.Now().Add(time.Hour).UnixNano()), Since: time.Now()}
		for _, key := range []string{leaderKey, termKey} {
			if err := store.Put(t.Context(), key, before.encode()); err != nil {
				t.Fatal(err)
			}
		}
		k := newKube(t, "node1", store.Client()).start()
		k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
		close(k.synced)
		soon()
		if state := k.exporter.State(); !state.Self {
			t.Fatalf("state %+v", state)
		}
		if s := sliceIn(t, store, sliceOne); s.Incarnation != before.Term+1 {
			t.Errorf("it writes in the term %d, want the one after %d: its clock went back", s.Incarnation, before.Term)
		}
	})
}

// TestNobodyCanBlockTheElectionWithNonsense: nor for longer than until it is seen.
func TestNobodyCanBlockTheElectionWithNonsense(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		if err := store.Put(t.Context(), leaderKey, []byte("me")); err != nil {
			t.Fatal(err)
		}
		k := newKube(t, "node1", store.Client()).start()
		close(k.synced)
		soon()
		if !k.exporter.State().Self {
			t.Error("nobody publishes")
		}
	})
}

// pausable is a store whose transactions can be held up, as those of a process that was stopped just before it sent them.
type pausable struct {
	kvstore.Store
	mu   sync.Mutex
	gate chan struct{} // nil: open
	at   chan struct{} // gets a token for each that waits
}

func (p *pausable) pause() (waiting <-chan struct{}, resume func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	gate := make(chan struct{})
	p.gate, p.at = gate, make(chan struct{}, 100)
	return p.at, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.gate = nil
		close(gate)
	}
}

func (p *pausable) Txn(ctx context.Context, conds []kvstore.Condition, ops []kvstore.Op) error {
	p.mu.Lock()
	gate, at := p.gate, p.at
	p.mu.Unlock()
	if gate != nil {
		at <- struct{}{}
		<-gate
	}
	return p.Store.Txn(ctx, conds, ops)
}

// eventually waits for a condition, looking again whenever the store has changed under a prefix.
func eventually(t testing.TB, s kvstore.Store, what string, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	watch := s.Watch(ctx, "")
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-watch:
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not so after %s", what, 3*patience)
		}
	}
}

func publishedIs(t testing.TB, s kvstore.Store, want map[string]string) func() bool {
	return func() bool { return maps.Equal(exportedIn(t, s), want) }
}

// TestAPausedLeaderCannotOverwrite, in a real etcd: another agent has been elected and has written when the first one's write arrives.
func TestAPausedLeaderCannotOverwrite(t *testing.T) {
	server := startEtcd(t)
	look := server.open(t, nil)
	putEast(t, look)
	paused := &pausable{Store: server.open(t, nil)}
	first := newKube(t, "node1", paused).start()
	first.apply(shop(true, true), shopPod(1, 5, "shop-a"))
	close(first.synced)
	eventually(t, look, "the first one publishes", publishedIs(t, look, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}))

	waiting, resume := paused.pause()
	first.apply(shopPod(1, 66, "shop-a")) // what it believes, and nobody else
	<-waiting
	second := newKube(t, "node2", server.open(t, nil)).start()
	second.apply(shop(true, true), shopPod(2, 7, "shop-a"))
	insert(t, second.tables, second.tables.Liveness, identity.Liveness{Cluster: "east", Node: "node1", State: identity.NodeAgentDown})
	close(second.synced)
	want := map[string]string{shopKey: "service", sliceOne: "10.1.2.7@node2"}
	eventually(t, look, "the second one publishes", publishedIs(t, look, want))
	before := sliceIn(t, look, sliceOne)

	resume()
	eventually(t, look, "the first one knows that it was replaced", func() bool { s := first.exporter.State(); return !s.Self && s.Leader == "node2" })
	wantPublished(t, look, "after the first one's write", want)
	if after := sliceIn(t, look, sliceOne); after.Incarnation != before.Incarnation || after.Sequence != before.Sequence {
		t.Errorf("the slice was written again: %+v, before %+v", after, before)
	}
}

// TestTakeover, in a real etcd: when the leader ends the next one goes on, and writes nothing that is there already.
func TestTakeover(t *testing.T) {
	server := startEtcd(t)
	look := server.open(t, nil)
	putEast(t, look)
	var agents []*kube
	for i := range 2 {
		k := newKube(t, fmt.Sprintf("node%d", i+1), server.open(t, nil)).start()
		k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
		close(k.synced)
		agents = append(agents, k)
		eventually(t, look, "the first one publishes", func() bool { return agents[0].exporter.State().Self })
	}
	eventually(t, look, "it is published", publishedIs(t, look, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}))
	before := sliceIn(t, look, sliceOne)
	agents[0].end()
	eventually(t, look, "the second one publishes", func() bool { return agents[1].exporter.State().Self })
	agents[1].apply(shopPod(1, 6, "shop-b"))
	eventually(t, look, "what is new is published", func() bool { return exportedIn(t, look)[sliceTwo] == "10.1.1.6@node1" })
	if after := sliceIn(t, look, sliceOne); after.Incarnation != before.Incarnation || after.Sequence != before.Sequence {
		t.Errorf("what did not change was written again: %+v, before %+v", after, before)
	}
	if s := sliceIn(t, look, sliceTwo); s.Incarnation <= before.Incarnation {
		t.Errorf("written in the term %d, after %d", s.Incarnation, before.Incarnation)
	}
}

// TestAWipedEtcdIsWrittenAnew, with a real one that is killed, loses its data and comes back.
func TestAWipedEtcdIsWrittenAnew(t *testing.T) {
	server := startEtcd(t)
	look := server.open(t, nil)
	putEast(t, look)
	k := newKube(t, "node1", server.open(t, nil)).start()
	k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
	close(k.synced)
	eventually(t, look, "it is published", publishedIs(t, look, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"}))
	before := sliceIn(t, look, sliceOne)
	server.kill()
	k.apply(shopPod(1, 6, "shop-a"))
	server.wipe(t)
	server.start(t)
	putEast(t, look)
	eventually(t, look, "it is published anew", publishedIs(t, look, map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1 10.1.1.6@node1"}))
	if after := sliceIn(t, look, sliceOne); after.Incarnation <= before.Incarnation {
		t.Errorf("in the term %d, after %d", after.Incarnation, before.Incarnation)
	}
}

// counting is a connection that counts the bytes that are sent, as TCP's payload.
type counting struct {
	net.Conn
	sent *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// largeService is a service of 10,000 pods on 100 nodes, in slices of 100, as Kubernetes names them.
func largeService(k *kube) []lb.Backend {
	const letters = "bcdfghjklmnpqrstvwxz2456789"
	backends := make([]lb.Backend, 10_000)
	rows := []any{shop(true, true)}
	for i := range backends {
		// Digits of a product with a large prime stand for the random ones that pods have.
		suffix, x := make([]byte, 5), uint64(i+1)*0x9e3779b97f4a7c15
		for j := range suffix {
			suffix[j] = letters[x%uint64(len(letters))]
			x /= 27
		}
		node := int(x % 100)
		backends[i] = lb.Backend{
			Cluster: "east", ClusterID: 1, Service: shop(true, true).Name, Address: netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), Node: fmt.Sprintf("worker-%d", node),
			Endpoint: fmt.Sprintf("web/shop-6d4b75cb6d-%s", suffix), Ports: []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 8080}}, Slice: fmt.Sprintf("shop-%d", i/100),
		}
		rows = append(rows, backends[i])
	}
	k.apply(rows...)
	return backends
}

// TestTheCostOfOneEndpointsChange in a service of 10,000: one key, and at most 4 KiB on the way to a real etcd, with TLS and all else that is sent meanwhile.
func TestTheCostOfOneEndpointsChange(t *testing.T) {
	server := startEtcd(t)
	look := server.open(t, nil)
	putEast(t, look)
	var sent atomic.Int64
	store := server.open(t, func(ctx context.Context, address string) (net.Conn, error) {
		c, err := kvstore.NewDialer().DialContext(ctx, "tcp", address)
		return counting{c, &sent}, err
	})
	k := newKube(t, "node1", store).start()
	backends := largeService(k)
	close(k.synced)
	watch := look.Watch(t.Context(), lb.SlicesPrefix("east"))
	for slices := 0; slices < 100; {
		slices += len((<-watch).Events)
	}
	// What the initial writing has left to do is done: the mark comes last.
	eventually(t, look, "all is published", func() bool {
		_, err := look.Get(context.Background(), identity.SyncedKey("east", identity.ServicesMark))
		return err == nil
	})
	const changes = 20
	before := sent.Load()
	for i := range changes {
		b := backends[i*450]
		b.Terminating = true
		k.apply(b)
		batch := <-watch
		if len(batch.Events) != 1 || batch.Events[0].Key != lb.SliceKey("east", b.Service, lb.ClusterSliceName(b.Slice)) {
			t.Fatalf("the change of one endpoint wrote %d keys, the first %s", len(batch.Events), batch.Events[0].Key)
		}
	}
	per := (sent.Load() - before) / changes
	t.Logf("%d bytes sent for each change", per)
	if per > 4096 {
		t.Errorf("%d bytes sent for each change, more than 4096", per)
	}
}

// BenchmarkOneEndpointsChange in a service of 10,000, from the row to the transaction: the agent's own part.
func BenchmarkOneEndpointsChange(b *testing.B) {
	store := newEast(b)
	k := newKube(b, "node1", store.Client())
	backends := largeService(k)
	x, err := newExport(k.exporter, 0, 1)
	if err != nil {
		b.Fatal(err)
	}
	defer x.close()
	x.fence = kvstore.Condition{Key: leaderKey}
	x.limit.SetLimit(1e9)
	if _, err := x.step(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		backend := backends[i*457%len(backends)]
		backend.Terminating = i/len(backends)%2 == 0
		k.apply(backend)
		if _, err := x.step(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
