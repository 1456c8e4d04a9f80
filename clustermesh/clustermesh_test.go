package clustermesh

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// patience bounds every wait; a wait that needs it has failed.
const patience = 10 * time.Second

// mesh is an agent's view of a peer cluster "west" (ID 2), seen from "east" (ID 1).
type mesh struct {
	t        *testing.T
	west     *kvstore.Memory
	tables   *Tables
	refusals *Refusals
	follower *Follower
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{t: t, west: kvstore.NewMemory(), refusals: NewRefusals()}
	var err error
	if m.tables, err = NewTables(); err != nil {
		t.Fatal(err)
	}
	east := identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "1"}
	m.follower = NewFollower(FollowerConfig{
		Cluster: "west", ID: 2, Self: identity.NodeName{Cluster: "east", Node: "node1"},
		Store: m.west.Client(), Tables: m.tables, Refusals: m.refusals, Claims: NewClaims(east), Log: slog.New(slog.DiscardHandler),
	})
	run(t, m.follower.Run)
	return m
}

// run runs a task until the test ends.
func run(t *testing.T, task func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- task(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func prefixes(text ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range text {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func (m *mesh) put(key string, value []byte) {
	m.t.Helper()
	if err := m.west.Put(context.Background(), key, value); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mesh) putCluster() {
	m.put(identity.ClusterKey, identity.EncodeCluster(identity.ClusterInfo{
		Name: "west", ID: 2, PodCIDRs: prefixes("10.2.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/18")}, Version: "1",
	}))
}

func node(name, address, podCIDR string) identity.Node {
	return identity.Node{
		Cluster: "west", ClusterID: 2, Name: name, Address: netip.MustParseAddr(address), PodCIDRs: prefixes(podCIDR),
		Instance: "instance-" + name + "-0123456789", Version: identity.Version{Incarnation: 1, Sequence: 1},
	}
}

func (m *mesh) putNode(n identity.Node) {
	m.put(identity.NodeKey(n.Cluster, n.Name), identity.EncodeNode(n))
}

func address(ip, owner string, id identity.Number) identity.Address {
	a := netip.MustParseAddr(ip)
	return identity.Address{
		Cluster: "west", ClusterID: 2, Prefix: netip.PrefixFrom(a, a.BitLen()), Identity: id, Node: owner,
		Endpoint: "default/pod", Version: identity.Version{Incarnation: 1, Sequence: 1},
	}
}

func (m *mesh) putAddress(a identity.Address) {
	m.put(identity.AddressKey(a.Cluster, a.Prefix.Addr()), identity.EncodeAddress(a))
}

// until waits for a condition on the tables, looking again whenever one of them changes.
func (m *mesh) until(what string, condition func(statedb.ReadTxn) bool) {
	m.t.Helper()
	untilTables(m.t, m.tables, what, condition)
}

func untilTables(t *testing.T, tables *Tables, what string, condition func(statedb.ReadTxn) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		txn := tables.DB.ReadTxn()
		set := statedb.NewWatchSet()
		add := func(_ any, c <-chan struct{}) { set.Add(c) }
		add(tables.Nodes.AllWatch(txn))
		add(tables.Addresses.AllWatch(txn))
		add(tables.Backends.AllWatch(txn))
		add(tables.Services.AllWatch(txn))
		add(tables.Identities.AllWatch(txn))
		add(tables.Publications.AllWatch(txn))
		if condition(txn) {
			return
		}
		// A refusal changes no table: look again after a moment all the same.
		wait, done := context.WithTimeout(ctx, 20*time.Millisecond)
		_, _ = set.Wait(wait, 0)
		done()
		if ctx.Err() != nil {
			t.Fatalf("%s: not so after %s", what, patience)
		}
	}
}

func (m *mesh) hasAddress(txn statedb.ReadTxn, ip string) bool {
	_, _, ok := m.tables.Addresses.Get(txn, m.tables.Addresses.ByKey("west/"+ip+"/32"))
	return ok
}

func (m *mesh) refused(key, reason string) {
	m.t.Helper()
	m.until(fmt.Sprintf("%s is refused because %q", key, reason), func(statedb.ReadTxn) bool {
		for _, r := range m.refusals.List() {
			if strings.HasSuffix(r.Key, key) {
				if !strings.Contains(r.Reason, reason) {
					m.t.Fatalf("%s is refused with %q, want %q", r.Key, r.Reason, reason)
				}
				return true
			}
		}
		return false
	})
}

func TestEntriesWaitForWhatTheyHangOn(t *testing.T) {
	m := newMesh(t)
	// In the worst order: the address before its node, both before the cluster.
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.putCluster()
	m.until("the address leads to its node", func(txn statedb.ReadTxn) bool {
		row, _, ok := m.tables.Addresses.Get(txn, m.tables.Addresses.ByKey("west/10.2.1.5/32"))
		return ok && row.Object.NodeAddress == netip.MustParseAddr("172.29.2.11")
	})
	m.until("the node's pod range leads to it", func(txn statedb.ReadTxn) bool {
		row, _, ok := m.tables.Addresses.Get(txn, m.tables.Addresses.ByKey("west/10.2.1.0/24"))
		return ok && row.Object.NodeAddress == netip.MustParseAddr("172.29.2.11")
	})
	if refusals := m.refusals.List(); len(refusals) != 0 {
		t.Errorf("waiting was shown as refusal: %+v", refusals)
	}
}

func TestWhatWaitsForLongIsShown(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	m.putAddress(address("10.2.7.5", "node7", identity.Compose(2, 300)))
	m.refused("addresses/west/10.2.7.5", "has not come: that of node west/node7")
	m.putNode(node("node7", "172.29.2.17", "10.2.7.0/24"))
	m.until("it is accepted when its node comes", func(txn statedb.ReadTxn) bool {
		return m.hasAddress(txn, "10.2.7.5") && len(m.refusals.List()) == 0
	})
}

func TestAddressesFollowTheirNode(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	n := node("node1", "172.29.2.11", "10.2.1.0/24")
	m.putNode(n)
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.until("the address is there", func(txn statedb.ReadTxn) bool { return m.hasAddress(txn, "10.2.1.5") })
	n.Address, n.Sequence = netip.MustParseAddr("172.29.2.99"), 2
	m.putNode(n)
	m.until("the address leads to where the node is now", func(txn statedb.ReadTxn) bool {
		row, _, ok := m.tables.Addresses.Get(txn, m.tables.Addresses.ByKey("west/10.2.1.5/32"))
		return ok && row.Object.NodeAddress == n.Address && !m.hasAddress(txn, "172.29.2.11")
	})
}

func TestRefusals(t *testing.T) {
	good := func(m *mesh) {
		m.putCluster()
		m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	}
	foreign := node("node9", "172.29.2.19", "10.1.7.0/24")
	twin := node("node2", "172.29.2.11", "10.2.2.0/24")
	greedy := node("node3", "172.29.2.13", "10.2.1.0/25")
	other := node("node1", "172.29.2.11", "10.2.1.0/24")
	other.Cluster, other.ClusterID = "east", 1
	slice := lb.Slice{Cluster: "west", ClusterID: 2, Service: lb.Name{Namespace: "default", Name: "shop"}, Slice: "node1", Node: "node1",
		Incarnation: 1, Sequence: 1, Ports: []lb.BackendPort{{Protocol: lb.TCP, Port: 80}},
		Backends: []lb.SliceBackend{{Address: netip.MustParseAddr("10.1.1.7")}}}
	for _, test := range []struct {
		name, key, reason string
		value             []byte
	}{
		{"pod range of another cluster", "nodes/west/node9", "outside of cluster west's", identity.EncodeNode(foreign)},
		{"address of another node", "nodes/west/node2", "is node west/node1's already", identity.EncodeNode(twin)},
		{"pod range of another node", "nodes/west/node3", "overlaps node west/node1's", identity.EncodeNode(greedy)},
		{"another cluster's node", "nodes/east/node1", "came from cluster west", identity.EncodeNode(other)},
		{"another cluster's identity", "addresses/west/10.2.1.5", "belongs to cluster 1", identity.EncodeAddress(address("10.2.1.5", "node1", identity.Compose(1, 300)))},
		{"address outside of its node", "addresses/west/10.2.9.5", "outside of node west/node1's", identity.EncodeAddress(address("10.2.9.5", "node1", identity.Compose(2, 300)))},
		{"another cluster's pod as backend", "slices/west/default/shop/node1", "outside of node west/node1's", lb.EncodeSlice(slice)},
		{"not JSON", "nodes/west/node4", "node entry", []byte("}{")},
		{"unknown kind", "planets/west/mars", "unknown kind", []byte("{}")},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMesh(t)
			good(m)
			m.put(kvstore.Prefix+test.key, test.value)
			m.refused(test.key, test.reason)
			m.putAddress(address("10.2.1.77", "node1", identity.Compose(2, 301)))
			m.until("nothing else is disturbed", func(txn statedb.ReadTxn) bool { return m.hasAddress(txn, "10.2.1.77") })
			if err := m.west.Delete(context.Background(), kvstore.Prefix+test.key); err != nil {
				t.Fatal(err)
			}
			m.until("what is gone is no longer shown as refused", func(statedb.ReadTxn) bool { return len(m.refusals.List()) == 0 })
		})
	}
}

func TestABadEntryDoesNotRemoveTheGoodOneBefore(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.until("the address is there", func(txn statedb.ReadTxn) bool { return m.hasAddress(txn, "10.2.1.5") })
	m.put(identity.AddressKey("west", netip.MustParseAddr("10.2.1.5")), []byte("garbage"))
	m.refused("addresses/west/10.2.1.5", "address entry")
	if !m.hasAddress(m.tables.DB.ReadTxn(), "10.2.1.5") {
		t.Error("garbage removed an address")
	}
}

func TestAnotherClustersStoreIsRefused(t *testing.T) {
	m := newMesh(t)
	m.put(identity.ClusterKey, identity.EncodeCluster(identity.ClusterInfo{
		Name: "north", ID: 3, PodCIDRs: prefixes("10.3.0.0/16"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.192.0/18")}, Version: "1",
	}))
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.refused("cluster", "came from cluster west")
	if m.follower.State().Synced {
		t.Error("a wrong store counts as synced")
	}
}

func TestOverlappingPodRangesAreRefused(t *testing.T) {
	m := newMesh(t)
	m.put(identity.ClusterKey, identity.EncodeCluster(identity.ClusterInfo{
		Name: "west", ID: 2, PodCIDRs: prefixes("10.1.128.0/17"), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/18")}, Version: "1",
	}))
	m.refused("cluster", "overlaps 10.1.0.0/16 of cluster east")
}

// TestMixedEncryptionIsRefused: a cluster that was configured anew after it was joined is not taken in, so nothing is sent to it in the clear.
func TestMixedEncryptionIsRefused(t *testing.T) {
	m := newMesh(t)
	info := identity.ClusterInfo{
		Name: "west", ID: 2, PodCIDRs: prefixes("10.2.0.0/16"), ServiceCIDRs: prefixes("100.64.128.0/18"), Version: "1", Encryption: identity.EncryptAll,
	}
	m.put(identity.ClusterKey, identity.EncodeCluster(info))
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.refused("cluster", "cluster west: its encryption.mode is all and that of cluster east is off; give both all or inter-cluster, or both off")
	if m.tables.Nodes.NumObjects(m.tables.DB.ReadTxn()) != 0 {
		t.Error("its node was accepted")
	}
	info.Encryption = identity.EncryptOff
	m.put(identity.ClusterKey, identity.EncodeCluster(info))
	m.until("its node is there once both agree", func(txn statedb.ReadTxn) bool { return m.tables.Nodes.NumObjects(txn) == 1 })
}

func TestALostStoreTakesNothingAway(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.until("the address is there", func(txn statedb.ReadTxn) bool { return m.hasAddress(txn, "10.2.1.5") })

	m.west.Wipe()
	m.until("the loss is seen", func(statedb.ReadTxn) bool { return m.follower.State().Lost })
	if !m.hasAddress(m.tables.DB.ReadTxn(), "10.2.1.5") {
		t.Error("an emptied store removed an address that nobody withdrew")
	}
	m.putCluster()
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.until("all is found again", func(statedb.ReadTxn) bool { s := m.follower.State(); return !s.Lost && s.Held == 0 })

	if err := m.west.Delete(context.Background(), identity.AddressKey("west", netip.MustParseAddr("10.2.1.5"))); err != nil {
		t.Fatal(err)
	}
	m.until("a withdrawn address goes", func(txn statedb.ReadTxn) bool { return !m.hasAddress(txn, "10.2.1.5") })
}

func TestANodeTakesOnlyItsOwnEntriesForItsOwn(t *testing.T) {
	m := newMesh(t)
	own := make(chan []string, 1)
	m.putCluster()
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	m.putNode(node("node2", "172.29.2.12", "10.2.2.0/24"))
	m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
	m.putAddress(address("10.2.2.5", "node2", identity.Compose(2, 300)))
	inWest := NewFollower(FollowerConfig{
		Cluster: "west", ID: 2, Self: identity.NodeName{Cluster: "west", Node: "node1"}, Store: m.west.Client(), Tables: m.tables, Refusals: m.refusals,
		Claims: m.follower.Claims, Own: func(keys []string, _ bool) { own <- keys }, Log: slog.New(slog.DiscardHandler),
	})
	run(t, inWest.Run)
	want := []string{identity.AddressKey("west", netip.MustParseAddr("10.2.1.5")), identity.NodeKey("west", "node1"), identity.ClusterKey}
	if got := <-own; !slices.Equal(got, want) {
		t.Errorf("its own are %q, want %q", got, want)
	}
}

func TestOnlyWhatANodeDidNotPublishAgainGoesAfterALoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t)
		node1, node2 := node("node1", "172.29.2.11", "10.2.1.0/24"), node("node2", "172.29.2.12", "10.2.2.0/24")
		m.putCluster()
		m.putNode(node1)
		m.putNode(node2)
		m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
		m.putAddress(address("10.2.1.6", "node1", identity.Compose(2, 300)))
		m.putAddress(address("10.2.2.5", "node2", identity.Compose(2, 300)))
		synctest.Wait()
		m.west.Wipe()
		synctest.Wait()
		// node1 comes back with one of its two pods; of node2 nothing is heard.
		m.putCluster()
		m.putNode(node1)
		m.putAddress(address("10.2.1.5", "node1", identity.Compose(2, 300)))
		m.put(identity.SyncedKey("west", "node1"), identity.EncodeHeartbeat(identity.Heartbeat{At: time.Now(), Node: "node1"}))
		has := func(when string, want map[string]bool) {
			t.Helper()
			synctest.Wait()
			for ip, want := range want {
				if got := m.hasAddress(m.tables.DB.ReadTxn(), ip); got != want {
					t.Errorf("%s: address %s known: %v, want %v", when, ip, got, want)
				}
			}
		}
		has("at once", map[string]bool{"10.2.1.5": true, "10.2.1.6": true, "10.2.2.5": true})
		time.Sleep(orphanGrace + waitPatience)
		has("after the grace", map[string]bool{"10.2.1.5": true, "10.2.1.6": false, "10.2.2.5": true})
	})
}

func TestServicesOfOthersAreFollowedOnlyIfGlobal(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	service := lb.Service{Cluster: "west", ClusterID: 2, Name: lb.Name{Namespace: "default", Name: "shop"}, Global: true, Shared: true, Affinity: lb.AffinityNone,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("100.64.128.9")}, Ports: []lb.ServicePort{{Protocol: lb.TCP, Port: 80, TargetPort: 8080}}, Selector: map[string]string{"app": "shop"}}
	m.put(lb.ServiceKey("west", service.Name), lb.EncodeService(service))
	has := func(txn statedb.ReadTxn) bool { return len(m.tables.ServicesNamed(txn, service.Name)) == 1 }
	m.until("the global service is there", has)
	service.Global, service.Shared = false, false
	m.put(lb.ServiceKey("west", service.Name), lb.EncodeService(service))
	m.until("it goes when it is global no more", func(txn statedb.ReadTxn) bool { return !has(txn) })
}
