package agent

import (
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
)

// fakePath is a data path that loses what is larger than it carries.
type fakePath struct {
	mu      sync.Mutex
	links   *links
	carries int // bytes; 0: nothing gets through
	rtt     time.Duration
	// lose is asked for each packet whether it is lost beyond that; it may be nil.
	lose func(to netip.Addr, size int) bool
	sent map[netip.Addr]int
}

func (f *fakePath) Send(node netip.Addr, nonce uint64) error { return f.SendPods(node, nonce, 0) }

func (f *fakePath) SendPods(to netip.Addr, nonce uint64, size int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent[to]++
	if f.carries > 0 && size <= f.carries && (f.lose == nil || !f.lose(to, size)) {
		time.AfterFunc(f.rtt, func() { f.links.answered(datapath.EchoAnswer{Nonce: nonce, At: time.Now()}) })
	}
	return nil
}

func (f *fakePath) carry(bytes int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.carries = bytes
}

// told is what links have said of MTUs.
type told struct {
	mu  sync.Mutex
	mtu []int
	at  time.Time
}

func (x *told) narrowed(cluster string, mtu int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mtu, x.at = append(x.mtu, mtu), time.Now()
}

// take returns what was told since, and when last.
func (x *told) take() ([]int, time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	mtu := x.mtu
	x.mtu = nil
	return mtu, x.at
}

// watched opens a link to west over a fake path that carries 1390 bytes, pods' packets.
func watched(tables *clustermesh.Tables, path *fakePath) (*links, *link, *told) {
	path.carries, path.sent = 1390, map[netip.Addr]int{}
	if path.rtt == 0 {
		path.rtt = 3 * time.Millisecond
	}
	x := &told{}
	path.links = newLinks(tables, identity.NodeName{Cluster: "east", Node: "node1"}, path, 1390)
	path.links.narrowed = x.narrowed
	return path.links, path.links.open(&channel{cluster: "west"}), x
}

func westNode(n int) identity.Node {
	return identity.Node{
		Cluster: "west", ClusterID: 2, Name: "node" + string(rune('0'+n)), Address: netip.AddrFrom4([4]byte{172, 29, 2, byte(10 + n)}),
		PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(n), 0}), 24)},
	}
}

// TestLinkSaysWhatThePathDoes: a link is well while echoes come back, silent soon after they do not, and too narrow when only
// small ones do.
func TestLinkSaysWhatThePathDoes(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1), westNode(2), westNode(3))
	synctest.Test(t, func(t *testing.T) {
		path := &fakePath{}
		ls, l, _ := watched(tables, path)
		defer ls.close(l)

		time.Sleep(100 * time.Millisecond)
		if s := l.snapshot(); s.mtu != 1390 {
			t.Errorf("the MTU is not known soon: %+v", s)
		}
		time.Sleep(10 * time.Second)
		s := l.snapshot()
		if s.silent(time.Now()) || s.limit != 0 || s.tooNarrow || s.loss() != 0 || s.rtt != 3*time.Millisecond || s.mtu != 1390 {
			t.Errorf("all is well, and the link is %+v", s)
		}
		if len(path.sent) != echoNodes {
			t.Errorf("%d of 3 nodes are asked, want %d", len(path.sent), echoNodes)
		}
		path.carry(500)
		time.Sleep(2 * time.Second)
		if s = l.snapshot(); s.silent(time.Now()) || !s.tooNarrow {
			t.Errorf("packets above 500 bytes are lost, and the link is %+v", s)
		}
		path.carry(0)
		time.Sleep(6 * time.Second)
		if s = l.snapshot(); !s.silent(time.Now()) || s.loss() == 0 {
			t.Errorf("nothing gets through, and the link is %+v", s)
		}
		path.carry(1390)
		time.Sleep(5 * time.Second)
		if s = l.snapshot(); s.silent(time.Now()) || s.limit != 0 || s.tooNarrow || s.mtu != 1390 {
			t.Errorf("all is well again, and the link is %+v", s)
		}
	})
}

// TestLinkAsksWhoIsAlive: dead nodes are not asked while there are others, so that their death is not the link's.
func TestLinkAsksWhoIsAlive(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1), westNode(2), westNode(3))
	ls := newLinks(tables, identity.NodeName{Cluster: "east", Node: "node1"}, nil, 1450)
	asked := ls.nodesToAsk("west")
	put(t, tables, tables.Liveness, dead("west", asked[0].Name, true))
	until(t, tables, tables.Liveness, "it is dead", func(txn statedb.ReadTxn) bool { return tables.Liveness.NumObjects(txn) == 1 })
	for _, n := range ls.nodesToAsk("west") {
		if n.Name == asked[0].Name {
			t.Errorf("the dead %s is asked, and two others live", n.Name)
		}
	}
}

// TestJoiningPeersGetNothingNew: backends of a cluster that is being joined are out of service until packets went both ways.
func TestJoiningPeersGetNothingNew(t *testing.T) {
	tables := newTables(t)
	startBalance(t, tables, nil)
	put(t, tables, tables.Peers, clustermesh.Peer{Name: "west", ID: 2, Joining: true})
	put(t, tables, tables.Nodes, westNode(1))
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"), shop("west", 2, "100.64.128.9"))
	put(t, tables, tables.Backends, at(backend("east", 1, "10.1.1.2"), "node1"), at(backend("west", 2, "10.2.1.2"), "node1"))
	quarantined := func(want int) func(statedb.ReadTxn) bool {
		return func(txn statedb.ReadTxn) bool {
			n := 0
			for row := range tables.Targets.All(txn) {
				if row.Object.Quarantined {
					n++
				}
			}
			return tables.Targets.NumObjects(txn) == 2 && n == want
		}
	}
	until(t, tables, tables.Targets, "the joining cluster's backend is out of service", quarantined(1))
	put(t, tables, tables.Peers, clustermesh.Peer{Name: "west", ID: 2})
	until(t, tables, tables.Targets, "it is in service once the cluster is connected", quarantined(0))
}
