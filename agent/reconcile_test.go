package agent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/kvstore"
)

// nodeTarget holds nodes by their address, as the kernel does.
type nodeTarget struct {
	mu      sync.Mutex
	held    map[netip.Addr]string
	failing func(what string) error
	changed chan struct{}
}

func newNodeTarget() *nodeTarget {
	return &nodeTarget{held: map[netip.Addr]string{}, failing: func(string) error { return nil }, changed: make(chan struct{}, 100000)}
}

func (n *nodeTarget) do(what string, f func()) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() { n.changed <- struct{}{} }()
	if err := n.failing(what); err != nil {
		return err
	}
	f()
	return nil
}

func (n *nodeTarget) Update(_ context.Context, node identity.Node) error {
	return n.do("update", func() { n.held[node.Address] = node.Name })
}

func (n *nodeTarget) Delete(_ context.Context, node identity.Node) error {
	return n.do("delete", func() { delete(n.held, node.Address) })
}

func (n *nodeTarget) Prune(context.Context, iter.Seq[identity.Node], func(identity.ClusterID) bool) error {
	return n.do("prune", func() {})
}

func (n *nodeTarget) fail(f func(what string) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failing = f
}

func (n *nodeTarget) until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		n.mu.Lock()
		ok := condition()
		n.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-n.changed:
		case <-deadline:
			t.Fatalf("%s: not so after %s", what, patience)
		}
	}
}

func startNodes(t *testing.T) (*clustermesh.Tables, *nodeTarget, *reconciler[identity.Node]) {
	tables, target := newTables(t), newNodeTarget()
	r := newReconciler("nodes", tables, tables.Nodes, target, func(identity.ClusterID) bool { return true }, slog.New(slog.DiscardHandler))
	r.moved = func(old, now identity.Node) bool { return old.Address != now.Address }
	run(t, r.Run)
	return tables, target, r
}

func testNode(name, ip string) identity.Node {
	return identity.Node{Cluster: "west", ClusterID: 2, Name: name, Address: netip.MustParseAddr(ip)}
}

func TestWhatMovesLeavesItsFormerPlace(t *testing.T) {
	tables, target, _ := startNodes(t)
	put(t, tables, tables.Nodes, testNode("node1", "172.29.2.11"))
	target.until(t, "the node is there", func() bool { return len(target.held) == 1 })
	put(t, tables, tables.Nodes, testNode("node1", "172.29.2.21"))
	target.until(t, "it is at its new address, and no more at the old one", func() bool {
		return len(target.held) == 1 && target.held[netip.MustParseAddr("172.29.2.21")] == "node1"
	})

	// A deletion that fails is not forgotten when the row comes back elsewhere.
	target.fail(func(what string) error { return errors.New("busy") })
	remove(t, tables, tables.Nodes, "west/node1")
	put(t, tables, tables.Nodes, testNode("node1", "172.29.2.31"))
	target.fail(func(string) error { return nil })
	target.until(t, "only the newest place is left", func() bool {
		return len(target.held) == 1 && target.held[netip.MustParseAddr("172.29.2.31")] == "node1"
	})
}

func TestFailedDeletionsAreSaid(t *testing.T) {
	tables, target, r := startNodes(t)
	put(t, tables, tables.Nodes, testNode("node1", "172.29.2.11"))
	target.until(t, "the node is there", func() bool { return len(target.held) == 1 })
	target.fail(func(what string) error {
		if what == "update" {
			return nil
		}
		return errors.New("busy")
	})
	remove(t, tables, tables.Nodes, "west/node1")
	r.Prune()
	said := func(want int) func() bool {
		return func() bool { return len(r.problems()) == want }
	}
	target.until(t, "both are said", said(2))
	if all := strings.Join(r.problems(), "\n"); !strings.Contains(all, "west/node1") || !strings.Contains(all, "busy") {
		t.Errorf("the problems are %q", all)
	}
	target.fail(func(string) error { return nil })
	deadline := time.Now().Add(patience)
	for ; len(r.problems()) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("what was repaired is still said: %q", r.problems())
		}
	}
}

func TestTenThousandFailingRowsAreRetriedTogether(t *testing.T) {
	const rows = 10000
	tables, target, _ := startNodes(t)
	target.fail(func(string) error { return errors.New("full") })
	nodes := make([]identity.Node, rows)
	for i := range nodes {
		nodes[i] = testNode(fmt.Sprintf("node%d", i), fmt.Sprintf("10.9.%d.%d", i/250, i%250+1))
	}
	start := time.Now()
	put(t, tables, tables.Nodes, nodes...)
	until(t, tables, tables.Nodes, "all have failed", func(txn statedb.ReadTxn) bool { return count(txn, tables, clustermesh.Failed) == rows })
	target.fail(func(string) error { return nil })
	until(t, tables, tables.Nodes, "all are in force", func(txn statedb.ReadTxn) bool { return count(txn, tables, clustermesh.Done) == rows })
	t.Logf("%d rows failed and recovered in %s", rows, time.Since(start))
}

func count(txn statedb.ReadTxn, tables *clustermesh.Tables, kind clustermesh.StatusKind) int {
	n := 0
	for row := range tables.Nodes.All(txn) {
		if row.Status.Kind == kind {
			n++
		}
	}
	return n
}

func TestABacklogOfPublicationsIsWrittenSoonAfterAnOutage(t *testing.T) {
	const backlog = 500
	tables, store := newTables(t), kvstore.NewMemory()
	node := identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"), Instance: "instance-0123456789",
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}, Version: identity.Version{Incarnation: 1}}
	store.Disconnect()
	r := newReconciler("publications", tables, tables.Publications, &clustermesh.Publisher{Store: slow{store}, Node: node}, func(identity.ClusterID) bool { return true }, slog.New(slog.DiscardHandler))
	publications := []clustermesh.Publication{
		{Key: identity.ClusterKey, Value: "cluster"}, {Key: identity.NodeKey("east", "node1"), Value: string(identity.EncodeNode(node)), Leased: true},
	}
	for i := range backlog {
		publications = append(publications, clustermesh.Publication{Key: fmt.Sprintf("%saddresses/east/10.1.%d.%d", kvstore.Prefix, i/250, i%250), Value: "x", Leased: true})
	}
	put(t, tables, tables.Publications, publications...)
	run(t, r.Run)
	all := func(kind clustermesh.StatusKind) func(statedb.ReadTxn) bool {
		return func(txn statedb.ReadTxn) bool {
			for row := range tables.Publications.All(txn) {
				if row.Status.Kind != kind {
					return false
				}
			}
			return true
		}
	}
	until(t, tables, tables.Publications, "status shows that nothing is in the store", all(clustermesh.Failed))
	time.Sleep(4 * time.Second) // an outage, until the pauses are at their longest
	store.Reconnect()
	start := time.Now()
	until(t, tables, tables.Publications, "all are in the store", all(clustermesh.Done))
	if took := time.Since(start); took > longestRetry+time.Second {
		t.Errorf("%d publications were written %s after the outage", backlog, took)
	} else {
		t.Logf("%d publications were written %s after the outage", backlog, took)
	}
}

func TestClustersThatAreFollowedNoMoreAreStale(t *testing.T) {
	follows := &channels{own: &channel{cluster: "east", id: 1}, peers: map[string]*channel{"west": {cluster: "west", id: 2}}}
	a := &agent{channels: follows, synced: map[identity.ClusterID]bool{1: true}}
	if a.isSynced(3) {
		t.Error("what is left of a cluster may go before the records of peers have been read")
	}
	follows.known = true
	for id, want := range map[identity.ClusterID]bool{1: true, 2: false, 3: true, 0: false} {
		if got := a.isSynced(id); got != want {
			t.Errorf("what is left of cluster %d may go: %v, want %v", id, got, want)
		}
	}
}
