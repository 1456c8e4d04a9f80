package clustermesh

import (
	"context"
	"testing"
	"time"

	"github.com/cilium/statedb"

	"causeway/identity"
)

func withKeys(n identity.Node, sequence uint64, keys ...byte) identity.Node {
	n.TunnelKeys = nil
	for slot, k := range keys {
		n.TunnelKeys = append(n.TunnelKeys, identity.TunnelKey{Slot: uint8(slot), Key: identity.WireGuardKey{0: k}, Port: 51871 + uint16(slot)})
	}
	n.Sequence = sequence
	return n
}

func (m *mesh) putRow(n identity.Node) {
	m.t.Helper()
	txn := m.tables.DB.WriteTxn(m.tables.Nodes)
	if _, err := Put(txn, m.tables.Nodes, n, equal); err != nil {
		m.t.Fatal(err)
	}
	txn.Commit()
}

// keysOf returns the first bytes of a node's keys; nil if there is no such node.
func (m *mesh) keysOf(txn statedb.ReadTxn, name string) (keys []byte) {
	row, _, ok := m.tables.Nodes.Get(txn, m.tables.Nodes.ByKey("west/"+name))
	if !ok {
		return nil
	}
	for _, k := range row.Object.TunnelKeys {
		keys = append(keys, k.Key[0])
	}
	return keys
}

// TestAnotherNodesKeyIsRefused: whichever slot and cluster it is of, and until who has it goes or has another one.
func TestAnotherNodesKeyIsRefused(t *testing.T) {
	m := newMesh(t)
	own := node("node1", "172.29.1.11", "10.1.1.0/24")
	own.Cluster, own.ClusterID = "east", 1
	own = withKeys(own, 1, 10, 11)
	m.putRow(own)
	m.putCluster()
	node1, node2 := node("node1", "172.29.2.11", "10.2.1.0/24"), node("node2", "172.29.2.12", "10.2.2.0/24")

	m.putNode(withKeys(node1, 1, 20))
	m.until("a key of its own is taken", func(txn statedb.ReadTxn) bool { return string(m.keysOf(txn, "node1")) == "\x14" })
	m.putNode(withKeys(node2, 1, 30, 20))
	m.refused("nodes/west/node2", "is node west/node1's already")
	m.putNode(withKeys(node1, 2, 21, 11))
	m.refused("nodes/west/node1", "is node east/node1's already")
	if keys := m.keysOf(m.tables.DB.ReadTxn(), "node1"); string(keys) != "\x14" {
		t.Errorf("a bad entry took the place of a good one: the keys are %v", keys)
	}

	// The owners change: east's node gives up the key, then west's its own.
	m.putRow(withKeys(own, 2, 10))
	m.until("a key that was given up may be had", func(txn statedb.ReadTxn) bool { return string(m.keysOf(txn, "node1")) == "\x15\x0b" })
	m.until("and so may that which was given up for it", func(txn statedb.ReadTxn) bool { return string(m.keysOf(txn, "node2")) == "\x1e\x14" })
	m.until("nothing is refused any more", func(statedb.ReadTxn) bool { return len(m.refusals.List()) == 0 })

	// The owner goes.
	m.putNode(withKeys(node1, 3, 20))
	m.refused("nodes/west/node1", "is node west/node2's already")
	if err := m.west.Delete(context.Background(), identity.NodeKey("west", "node2")); err != nil {
		t.Fatal(err)
	}
	m.until("the key of a node that is gone may be had", func(txn statedb.ReadTxn) bool { return string(m.keysOf(txn, "node1")) == "\x14" })
}

// TestNodesAreNotIntroducedByGossip: a node signs for its addresses and backends; who it is, and its key, its cluster's store says.
func TestNodesAreNotIntroducedByGossip(t *testing.T) {
	m := withNews(t)
	n := withKeys(node("node3", "172.29.2.13", "10.2.3.0/24"), 1, 20)
	m.follower.Offer(News{Node: "node3", Key: identity.NodeKey("west", "node3"), Version: n.Version, Value: identity.EncodeNode(n)})
	m.follower.applyNews(time.Now())
	if list := m.refusals.List(); len(list) != 1 || m.keysOf(m.tables.DB.ReadTxn(), "node3") != nil {
		t.Errorf("refused are %+v", list)
	}
}
