package clustermesh

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// ofWest is a slice that is cluster west's, with backends written as ADDRESS@NODE.
func ofWest(sequence uint64, backends ...string) lb.Slice {
	s := lb.Slice{
		Cluster: "west", ClusterID: 2, Service: lb.Name{Namespace: "web", Name: "shop"}, Slice: "_shop-a", Incarnation: 1, Sequence: sequence,
		Ports: []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 8080}},
	}
	for _, b := range backends {
		ip, node, _ := strings.Cut(b, "@")
		s.Backends = append(s.Backends, lb.SliceBackend{Address: netip.MustParseAddr(ip), Node: node})
	}
	return s
}

// shopA is where that is stored.
const shopA = kvstore.Prefix + "slices/west/web/shop/_shop-a"

func wroteSlice(s lb.Slice) kvstore.Event { return wrote(s.Key(), lb.EncodeSlice(s)) }

// backends are those of the shop, as ADDRESS@NODE.
func (m *mesh) backends() []string {
	var out []string
	for _, b := range m.tables.BackendsOf(m.tables.DB.ReadTxn(), lb.Name{Namespace: "web", Name: "shop"}) {
		out = append(out, b.Address.String()+"@"+b.Node)
	}
	slices.Sort(out)
	return out
}

// TestAClustersSliceIsJudgedByItsBackendsNodes: what a cluster says of its pods counts, and it can lead nobody anywhere else.
func TestAClustersSliceIsJudgedByItsBackendsNodes(t *testing.T) {
	otherID, otherCluster := ofWest(1, "10.2.1.5@node1"), ofWest(1, "10.2.1.5@node1")
	otherID.ClusterID = 1
	otherCluster.Cluster, otherCluster.ClusterID = "east", 1
	for name, c := range map[string]struct {
		slice  lb.Slice
		reason string // "": it is accepted
	}{
		"pods of its nodes":                 {ofWest(1, "10.2.1.5@node1", "10.2.2.6@node2"), ""},
		"a pod of no node that is named":    {ofWest(1, "10.2.9.9@"), ""},
		"another node's pod":                {ofWest(1, "10.2.1.5@node1", "10.2.2.6@node1"), "10.2.2.6 is outside of node west/node1's pod CIDRs [10.2.1.0/24]"},
		"another cluster's pod":             {ofWest(1, "10.1.1.5@"), "10.1.1.5 is outside of cluster west's pod CIDRs [10.2.0.0/16]: only its pods can be backends for other clusters"},
		"another cluster's pod on a node":   {ofWest(1, "10.1.1.5@node1"), "only its pods can be backends"},
		"a pod of a node that is unknown":   {ofWest(1, "10.1.1.5@node7"), "only its pods can be backends"},
		"a node of this cluster":            {ofWest(1, "172.29.1.11@"), "only its pods can be backends"},
		"a node of its own":                 {ofWest(1, "172.29.2.11@node1"), "only its pods can be backends"},
		"a machine in this one's network":   {ofWest(1, "192.168.7.1@"), "only its pods can be backends"},
		"a machine in the world":            {ofWest(1, "203.0.113.9@"), "only its pods can be backends"},
		"one bad backend among good ones":   {ofWest(1, "10.2.1.5@node1", "100.64.64.10@"), "only its pods can be backends"},
		"another cluster's ID":              {otherID, "cluster west has ID 2 here, not 1"},
		"a slice that is another cluster's": {otherCluster, "it is of cluster east, but came from cluster west"},
	} {
		t.Run(name, func(t *testing.T) {
			m := withNews(t)
			m.apply(9, false, wroteSlice(c.slice))
			list := m.refusals.List()
			if c.reason == "" {
				if len(list) > 0 || len(m.backends()) != len(c.slice.Backends) {
					t.Errorf("backends %v, refusals %+v", m.backends(), list)
				}
				return
			}
			if len(list) != 1 || !strings.Contains(list[0].Reason, c.reason) || len(m.backends()) > 0 {
				t.Errorf("backends %v, refusals %+v, want %q", m.backends(), list, c.reason)
			}
		})
	}
}

// TestABadSliceDoesNotRemoveTheGoodOneBefore.
func TestABadSliceOfAClusterDoesNotRemoveTheGoodOneBefore(t *testing.T) {
	m := withNews(t)
	m.apply(9, false, wroteSlice(ofWest(1, "10.2.1.5@node1")))
	m.apply(10, false, wroteSlice(ofWest(2, "10.2.1.5@node1", "10.2.2.6@node1")))
	if got := m.backends(); !slices.Equal(got, []string{"10.2.1.5@node1"}) || len(m.refusals.List()) != 1 {
		t.Errorf("backends %v, refusals %+v", got, m.refusals.List())
	}
}

// TestOneNodeThatIsNotKnownHoldsUpNobodyElse: its pods are backends when it comes, and nobody else's pods wait for that.
func TestOneNodeThatIsNotKnownHoldsUpNobodyElse(t *testing.T) {
	m := withNews(t)
	m.apply(9, false, wroteSlice(ofWest(1, "10.2.1.5@node1", "10.2.3.7@node3")))
	if got := m.backends(); !slices.Equal(got, []string{"10.2.1.5@node1"}) {
		t.Errorf("before it has come the backends are %v", got)
	}
	m.follower.showWaiting(time.Now().Add(waitPatience))
	if list := m.refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "that of node west/node3, which it names, for its backend 10.2.3.7") {
		t.Errorf("it is not said what is waited for: %+v", list)
	}
	m.apply(10, false, wroteNode(node("node3", "172.29.2.13", "10.2.3.0/24")))
	if got := m.backends(); !slices.Equal(got, []string{"10.2.1.5@node1", "10.2.3.7@node3"}) || len(m.refusals.List()) > 0 {
		t.Errorf("after it has come the backends are %v, refusals %+v", got, m.refusals.List())
	}
	m.apply(11, false, wroteSlice(ofWest(2, "10.2.3.7@node3", "10.2.4.8@node4")), gone(shopA))
	if got := m.backends(); len(got) > 0 {
		t.Errorf("the slice has gone, and of its backends stay %v", got)
	}
}

// TestAClustersSliceIsNoNodes, whatever the nodes are called: a node's slice of the same name is another.
func TestAClustersSliceIsNoNodes(t *testing.T) {
	m := withNews(t)
	ofNode := ofWest(1, "10.2.1.9@")
	ofNode.Slice, ofNode.Node = "node1", "node1"
	ofCluster := ofWest(1, "10.2.1.5@node1")
	ofCluster.Slice = lb.ClusterSliceName("node1")
	m.apply(9, false, wroteSlice(ofNode), wroteSlice(ofCluster))
	m.apply(10, false, gone(ofCluster.Key()))
	if got := m.backends(); !slices.Equal(got, []string{"10.2.1.9@node1"}) {
		t.Errorf("backends %v", got)
	}
}

// TestTheClustersMarkEndsWhatItDidNotPublishAgain after its store was wiped: of services and slices that are the cluster's, not of nodes.
func TestTheClustersMarkEndsWhatItDidNotPublishAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t)
		service := shop(true, true)
		service.Cluster, service.ClusterID = "west", 2
		cart := service
		cart.Name.Name = "cart"
		kept, lost := ofWest(1, "10.2.1.5@node1"), ofWest(1, "10.2.1.6@node1")
		lost.Slice = "_shop-b"
		mark := func(name string) {
			m.put(identity.SyncedKey("west", name), identity.EncodeHeartbeat(identity.Heartbeat{At: time.Now(), Node: "node1"}))
		}
		again := func() {
			m.putCluster()
			m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
			m.put(lb.ServiceKey("west", service.Name), lb.EncodeService(service))
			m.put(kept.Key(), lb.EncodeSlice(kept))
		}
		again()
		m.put(lb.ServiceKey("west", cart.Name), lb.EncodeService(cart))
		m.put(lost.Key(), lb.EncodeSlice(lost))
		mark(identity.ServicesMark)
		synctest.Wait()
		has := func(when string, want map[string]bool) {
			t.Helper()
			synctest.Wait()
			got := map[string]bool{"cart": len(m.tables.ServicesNamed(m.tables.DB.ReadTxn(), cart.Name)) == 1, "shop": len(m.tables.ServicesNamed(m.tables.DB.ReadTxn(), service.Name)) == 1}
			for _, b := range m.backends() {
				got[b] = true
			}
			if !maps.Equal(got, want) {
				t.Errorf("%s: %v, want %v", when, got, want)
			}
		}
		all := map[string]bool{"cart": true, "shop": true, "10.2.1.5@node1": true, "10.2.1.6@node1": true}
		has("before", all)
		m.west.Wipe()
		has("when the store was wiped", all)
		again()
		mark("node1")
		time.Sleep(2 * orphanGrace)
		has("when a node has published again, and not the cluster", all)
		mark(identity.ServicesMark)
		time.Sleep(orphanGrace / 2)
		has("within the grace", all)
		time.Sleep(orphanGrace)
		has("after the grace", map[string]bool{"cart": false, "shop": true, "10.2.1.5@node1": true})
	})
}

// TestWhatKubernetesSaysIsNotTakenFromTheStore: neither its coming there nor its going changes a row, and the exporter hears of both.
func TestWhatKubernetesSaysIsNotTakenFromTheStore(t *testing.T) {
	m := stopped(t)
	var told []string
	m.follower = NewFollower(FollowerConfig{
		Cluster: "west", ID: 2, Self: identity.NodeName{Cluster: "west", Node: "node1"}, Tables: m.tables, Refusals: m.refusals, Claims: m.follower.Claims, Log: slog.New(slog.DiscardHandler),
		Exported: func(b kvstore.Batch) {
			for _, ev := range b.Events {
				told = append(told, ev.Key)
			}
		},
	})
	service := shop(true, true)
	service.Cluster, service.ClusterID = "west", 2
	slice := ofWest(1, "10.2.2.5@node2")
	row := slice.Rows()[0]
	row.Slice = "shop-a"
	txn := m.tables.DB.WriteTxn(m.tables.Services, m.tables.Backends)
	for _, err := range []error{second(Put(txn, m.tables.Services, service, equal)), second(Put(txn, m.tables.Backends, row, equal))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	txn.Commit()
	other := service
	other.Shared = false
	ofNode := ofWest(1, "10.2.2.9@")
	ofNode.Slice, ofNode.Node = "node2", "node2"
	rowsAre := func(when string, want ...string) {
		t.Helper()
		if got := m.backends(); !slices.Equal(got, want) {
			t.Errorf("%s: backends %v, want %v", when, got, want)
		}
		if named := m.tables.ServicesNamed(m.tables.DB.ReadTxn(), service.Name); len(named) != 1 || !named[0].Shared {
			t.Errorf("%s: services %+v", when, named)
		}
	}
	m.apply(5, true, wroteCluster(), wroteNode(node("node2", "172.29.2.12", "10.2.2.0/24")), wrote(lb.ServiceKey("west", service.Name), lb.EncodeService(other)),
		wroteSlice(ofWest(2, "10.2.2.6@node2")), wroteSlice(ofNode))
	rowsAre("they have come", "10.2.2.5@node2", "10.2.2.9@node2")
	m.apply(6, false, gone(lb.ServiceKey("west", service.Name)), gone(slice.Key()))
	rowsAre("they have gone", "10.2.2.5@node2", "10.2.2.9@node2")
	want := []string{lb.ServiceKey("west", service.Name), slice.Key()}
	if want = append(want, want...); !slices.Equal(told, want) {
		t.Errorf("the exporter was told of %v, want %v", told, want)
	}
	if known, gone := m.follower.Known(slice.Key(), identity.Version{Incarnation: 1, Sequence: 2}, false); !known || !gone {
		t.Error("late news of it would be taken for new")
	}
}

func second[T any](_ T, err error) error { return err }

// TestNewsOfAClustersSlice: any of its nodes may tell them, and they do not go with that node.
func TestNewsOfAClustersSlice(t *testing.T) {
	m := withNews(t)
	tell := func(node string, s lb.Slice, withdrawn bool) {
		n := News{Node: node, Key: s.Key(), Version: identity.Version{Incarnation: s.Incarnation, Sequence: s.Sequence}, Withdrawn: withdrawn}
		if !withdrawn {
			n.Value = lb.EncodeSlice(s)
		}
		m.follower.Offer(n)
		m.follower.applyNews(time.Now())
	}
	is := func(when string, want ...string) {
		t.Helper()
		if got := m.backends(); !slices.Equal(got, want) {
			t.Errorf("%s: backends %v, want %v; refusals %+v", when, got, want, m.refusals.List())
		}
	}
	m.apply(9, false, wroteSlice(ofWest(1, "10.2.1.5@node1")))
	tell("node2", ofWest(2, "10.2.1.5@node1", "10.2.2.6@node2"), false)
	is("node2 has told it", "10.2.1.5@node1", "10.2.2.6@node2")
	tell("node1", ofWest(1, "10.2.1.5@node1"), false)
	is("node1 has told something older", "10.2.1.5@node1", "10.2.2.6@node2")
	m.apply(10, false, gone(identity.NodeKey("west", "node2")))
	is("node2 is gone", "10.2.1.5@node1", "10.2.2.6@node2")
	m.apply(11, false, wroteSlice(ofWest(2, "10.2.1.5@node1", "10.2.2.6@node2")))
	if !m.follower.Settled(shopA) {
		t.Error("the store has it, and gossip keeps it")
	}
	tell("node1", ofWest(3, "10.2.1.7@node1"), false)
	is("node1 has told something newer", "10.2.1.7@node1")
	tell("node1", ofWest(3), true)
	is("node1 has withdrawn it")
	if _, ok := m.follower.version(m.tables.DB.ReadTxn(), shopA); ok {
		t.Error("it is still known")
	}
}
