package clustermesh

import (
	"context"
	"strings"
	"testing"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// heard hands the follower news of an address, or of its withdrawal, and has it looked at.
func (m *mesh) heard(a identity.Address, withdrawn bool) {
	n := News{Node: a.Node, Key: identity.AddressKey("west", a.Prefix.Addr()), Version: a.Version, Withdrawn: withdrawn}
	if !withdrawn {
		n.Value = identity.EncodeAddress(a)
	}
	m.follower.Offer(n)
	m.follower.applyNews(time.Now())
}

// withNews is a mesh whose follower has synced with a store that names two nodes.
func withNews(t *testing.T) *mesh {
	m := stopped(t)
	m.west = kvstore.NewMemory()
	t.Cleanup(func() { m.west.Close() })
	m.follower.Store = m.west
	m.apply(5, true, wroteCluster(), wroteNode(node("node1", "172.29.2.11", "10.2.1.0/24")), wroteNode(node("node2", "172.29.2.12", "10.2.2.0/24")))
	return m
}

func version(a identity.Address, sequence uint64) identity.Address {
	a.Sequence = sequence
	return a
}

// TestNewsAndStore: gossip and the store bring the same entries in any order; the newest wins, nothing is doubled, and
// nothing that is gone comes back.
func TestNewsAndStore(t *testing.T) {
	pod := address("10.2.1.5", "node1", identity.Compose(2, 300))
	key := identity.AddressKey("west", pod.Prefix.Addr())
	store := func(s uint64) func(*mesh) { return func(m *mesh) { m.apply(9, false, wroteAddress(version(pod, s))) } }
	deleted := func(m *mesh) { m.apply(9, false, gone(key)) }
	hears := func(s uint64) func(*mesh) { return func(m *mesh) { m.heard(version(pod, s), false) } }
	withdrawn := func(s uint64) func(*mesh) { return func(m *mesh) { m.heard(version(pod, s), true) } }
	for _, c := range []struct {
		name  string
		steps []func(*mesh)
		want  uint64 // the sequence that is in the table; 0: none
	}{
		{"gossip alone", []func(*mesh){hears(5)}, 5},
		{"gossip first, the store after", []func(*mesh){hears(5), store(5)}, 5},
		{"the store first, gossip after", []func(*mesh){store(5), hears(5)}, 5},
		{"old news", []func(*mesh){store(7), hears(5)}, 7},
		{"the store is behind", []func(*mesh){hears(7), store(5)}, 7},
		{"withdrawn by gossip before the store knows", []func(*mesh){store(5), withdrawn(5)}, 0},
		{"and the store says the old thing again", []func(*mesh){store(5), withdrawn(5), store(5)}, 0},
		{"and the store agrees", []func(*mesh){store(5), withdrawn(5), deleted}, 0},
		{"and then it is there anew", []func(*mesh){store(5), withdrawn(5), deleted, store(6)}, 6},
		{"late news of what the store has deleted", []func(*mesh){store(5), deleted, hears(5)}, 0},
		{"late news of an older one that was deleted", []func(*mesh){store(5), deleted, hears(4)}, 0},
		{"newer news after a deletion", []func(*mesh){store(5), deleted, hears(6)}, 6},
		{"deleted and made anew: gossip is ahead of both", []func(*mesh){store(5), hears(7), deleted}, 7},
		{"and the store follows", []func(*mesh){store(5), hears(7), deleted, store(7)}, 7},
		{"and deletes that too", []func(*mesh){store(5), hears(7), deleted, store(7), deleted}, 0},
		{"a late withdrawal of an older one", []func(*mesh){store(7), withdrawn(5)}, 7},
		{"a withdrawal that comes before what it withdraws", []func(*mesh){withdrawn(5), hears(5)}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := withNews(t)
			for _, step := range c.steps {
				step(m)
			}
			row, _, ok := m.tables.Addresses.Get(m.tables.DB.ReadTxn(), m.tables.Addresses.ByKey("west/10.2.1.5/32"))
			switch {
			case ok != (c.want > 0):
				t.Errorf("the address is there: %v", ok)
			case ok && row.Object.Sequence != c.want:
				t.Errorf("it has sequence %d, want %d", row.Object.Sequence, c.want)
			}
			if list := m.refusals.List(); len(list) > 0 {
				t.Errorf("refused: %+v", list)
			}
		})
	}
}

// TestNewsAreKeptUntilTheStoreHasThem tells gossip how long it has to keep them.
func TestNewsAreKeptUntilTheStoreHasThem(t *testing.T) {
	m := withNews(t)
	pod := address("10.2.1.5", "node1", identity.Compose(2, 300))
	key := identity.AddressKey("west", pod.Prefix.Addr())
	if known, _ := m.follower.Known(key, pod.Version, false); known {
		t.Error("known before it was told")
	}
	m.heard(pod, false)
	if known, _ := m.follower.Known(key, pod.Version, false); !known || m.follower.Settled(key) {
		t.Error("gossip has brought it, and the store has not")
	}
	m.apply(9, false, wroteAddress(pod))
	if !m.follower.Settled(key) {
		t.Error("the store has it")
	}
	m.apply(10, false, gone(key))
	if known, gone := m.follower.Known(key, pod.Version, false); !known || !gone {
		t.Error("it was deleted, and is told again as if it were new")
	}
}

// TestNewsOfOthersAreRefused: a node speaks for itself, in values too.
func TestNewsOfOthersAreRefused(t *testing.T) {
	m := withNews(t)
	pod := address("10.2.1.5", "node1", identity.Compose(2, 300))
	m.apply(9, false, wroteAddress(pod))
	key := identity.AddressKey("west", pod.Prefix.Addr())
	liar := func(n News) {
		n.Node, n.Key, n.Version = "node2", key, identity.Version{Incarnation: 9, Sequence: 9}
		m.follower.Offer(n)
		m.follower.applyNews(time.Now())
	}
	liar(News{Withdrawn: true})
	liar(News{Value: identity.EncodeAddress(version(pod, 9))})
	liar(News{Value: []byte("nonsense")})
	row, _, ok := m.tables.Addresses.Get(m.tables.DB.ReadTxn(), m.tables.Addresses.ByKey("west/10.2.1.5/32"))
	if !ok || row.Object.Sequence != 1 {
		t.Errorf("a liar's word counted: %v %+v", ok, row)
	}
	if list := m.refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "by gossip") {
		t.Errorf("refusals %+v", list)
	}
}

// TestNewsGoWithTheirNode: what no store ever had is removed with the node that told it.
func TestNewsGoWithTheirNode(t *testing.T) {
	m := withNews(t)
	m.heard(address("10.2.1.5", "node1", identity.Compose(2, 300)), false)
	m.apply(9, false, gone(identity.NodeKey("west", "node1")))
	if _, _, ok := m.tables.Addresses.Get(m.tables.DB.ReadTxn(), m.tables.Addresses.ByKey("west/10.2.1.5/32")); ok {
		t.Error("the address of a node that is gone remains")
	}
}

// TestSlicesByGossip: backends come and go with the slice that has them.
func TestSlicesByGossip(t *testing.T) {
	m := withNews(t)
	slice := lb.Slice{
		Cluster: "west", ClusterID: 2, Service: lb.Name{Namespace: "web", Name: "shop"}, Slice: "node1", Node: "node1", Incarnation: 1, Sequence: 3,
		Ports: []lb.BackendPort{{Protocol: lb.TCP, Port: 8080}}, Backends: []lb.SliceBackend{{Address: address("10.2.1.5", "", 0).Prefix.Addr()}},
	}
	tell := func(withdrawn bool) {
		n := News{Node: "node1", Key: slice.Key(), Version: identity.Version{Incarnation: 1, Sequence: slice.Sequence}, Withdrawn: withdrawn}
		if !withdrawn {
			n.Value = lb.EncodeSlice(slice)
		}
		m.follower.Offer(n)
		m.follower.applyNews(time.Now())
	}
	count := func() int { return len(m.tables.BackendsOf(m.tables.DB.ReadTxn(), slice.Service)) }
	tell(false)
	if count() != 1 {
		t.Errorf("%d backends: %+v", count(), m.refusals.List())
	}
	m.apply(9, false, wrote(slice.Key(), lb.EncodeSlice(slice)))
	if count() != 1 || !m.follower.Settled(slice.Key()) {
		t.Errorf("%d backends after the store has it too", count())
	}
	tell(true)
	if count() != 0 {
		t.Errorf("%d backends of a slice that is gone", count())
	}
}

// TestOfferReachesTheLoop: the follower's own goroutine looks at what is offered.
func TestOfferReachesTheLoop(t *testing.T) {
	m := newMesh(t)
	m.putCluster()
	m.putNode(node("node1", "172.29.2.11", "10.2.1.0/24"))
	pod := address("10.2.1.5", "node1", identity.Compose(2, 300))
	m.follower.Offer(News{Node: "node1", Key: identity.AddressKey("west", pod.Prefix.Addr()), Version: pod.Version, Value: identity.EncodeAddress(pod)})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for ctx.Err() == nil {
		_, changed := m.tables.Addresses.AllWatch(m.tables.DB.ReadTxn())
		if m.hasAddress(m.tables.DB.ReadTxn(), "10.2.1.5") {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	t.Error("the address never came")
}
