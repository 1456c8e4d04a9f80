package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
)

// tunnelNode is a node CLUSTER/NAME with keys in slots, the preferred one first.
func tunnelNode(cluster string, number int, slots ...uint8) identity.Node {
	id := map[string]identity.ClusterID{"east": 1, "west": 2, "north": 3}[cluster]
	n := identity.Node{
		Cluster: cluster, ClusterID: id, Name: fmt.Sprintf("node%d", number), Address: netip.AddrFrom4([4]byte{172, 29, byte(id), byte(10 + number)}),
		PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(id), byte(number), 0}), 24)},
	}
	for _, slot := range slots {
		n.TunnelKeys = append(n.TunnelKeys, identity.TunnelKey{Slot: slot, Key: identity.WireGuardKey{byte(id), byte(number), slot}, Port: 51871 + uint16(slot)})
	}
	return n
}

var testMTUs = podMTUs{underlay: 1500, plain: 1450, encrypted: 1390}

func none(pair) bool { return false }

func only(pairs ...pair) func(pair) bool {
	return func(p pair) bool {
		for _, q := range pairs {
			if p == q {
				return true
			}
		}
		return false
	}
}

func TestWhichKeysATunnelUses(t *testing.T) {
	old, next, theirs, both := pair{0, 0}, pair{1, 0}, pair{0, 1}, pair{1, 1}
	for _, tc := range []struct {
		name            string
		locals, remotes []uint8
		current         *pair
		shaken          func(pair) bool
		want            pair
	}{
		{"at first, without any session", []uint8{0}, []uint8{0}, nil, none, old},
		{"only one pair", []uint8{1}, []uint8{0}, &next, only(next), next},
		{"a new key of this node has no session yet", []uint8{1, 0}, []uint8{0}, &old, only(old), old},
		{"and then one", []uint8{1, 0}, []uint8{0}, &old, only(old, next), next},
		{"the other prefers its new key, without a session", []uint8{0}, []uint8{1, 0}, &old, only(old), old},
		{"and with one", []uint8{0}, []uint8{1, 0}, &old, only(old, theirs), theirs},
		{"both change at once, half of the way", []uint8{1, 0}, []uint8{1, 0}, &old, only(old, next, theirs), old},
		{"both change at once, all of the way", []uint8{1, 0}, []uint8{1, 0}, &old, only(old, next, theirs, both), both},
		{"the other's old key is gone, the new one has no session", []uint8{0}, []uint8{1}, &old, none, theirs},
		{"this node's old key is gone, any that has a session", []uint8{1}, []uint8{1, 0}, &old, only(next), next},
		{"the session in use is lost, another one is there", []uint8{1, 0}, []uint8{0}, &next, only(old), old},
		{"all sessions are lost", []uint8{1, 0}, []uint8{0}, &old, none, old},
		{"an agent that begins anew amid a change", []uint8{1, 0}, []uint8{0}, nil, only(old), old},
	} {
		if got := choose(tc.locals, tc.remotes, tc.current, tc.shaken); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestHowPacketsGetToANode(t *testing.T) {
	self := tunnelNode("east", 1, 0)
	six := tunnelNode("west", 1, 0)
	six.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("fd00:2:1::/64")}
	six.Address = netip.MustParseAddr("fd00::21")
	narrow := tunnelNode("west", 1, 0)
	narrow.MTU = 1300
	all, inter, off := identity.EncryptAll, identity.EncryptInterCluster, identity.EncryptOff
	for _, tc := range []struct {
		name        string
		mode        identity.Encryption
		node        identity.Node
		slots       []uint8
		path        int
		want        identity.TunnelMode
		outer       string // local>remote
		mtu         int
		whyContains string
	}{
		{"itself", all, self, []uint8{0}, 0, identity.TunnelPlain, "172.29.1.11>172.29.1.11", 1390, ""},
		{"all, same cluster", all, tunnelNode("east", 2, 0), []uint8{0}, 0, identity.TunnelWireGuard, "10.1.1.2>10.1.2.2", 1390, ""},
		{"all, another cluster", all, tunnelNode("west", 1, 1), []uint8{0}, 0, identity.TunnelWireGuard, "10.1.1.2>10.2.1.3", 1390, ""},
		{"inter-cluster, same cluster", inter, tunnelNode("east", 2, 0), []uint8{0}, 0, identity.TunnelPlain, "172.29.1.11>172.29.1.12", 1450, ""},
		{"inter-cluster, another cluster", inter, tunnelNode("west", 1, 0), []uint8{0}, 0, identity.TunnelWireGuard, "10.1.1.2>10.2.1.2", 1390, ""},
		{"off, same cluster", off, tunnelNode("east", 2), nil, 0, identity.TunnelPlain, "172.29.1.11>172.29.1.12", 1450, ""},
		{"off, another cluster that is off too", off, tunnelNode("west", 1), nil, 0, identity.TunnelPlain, "172.29.1.11>172.29.2.11", 1450, ""},
		{"off, another cluster that encrypts", off, tunnelNode("west", 1, 0), nil, 0, identity.TunnelClosed, "", 1450,
			"cluster west encrypts and this one does not: give both the same encryption.mode"},
		{"the other has no key", all, tunnelNode("west", 1), []uint8{0}, 0, identity.TunnelClosed, "", 1390, "node west/node1 has published no WireGuard key"},
		{"this node has no device", all, tunnelNode("west", 1, 0), nil, 0, identity.TunnelClosed, "", 1390, "this node's WireGuard device is not there: no TUN here"},
		{"pod ranges of different families", all, six, []uint8{0}, 0, identity.TunnelClosed, "", 1390, "another address family"},
		{"nodes of different families, in the clear", off, tunnelNodeAt("east", "fd00::12"), nil, 0, identity.TunnelClosed, "", 1450, "node east/node9 is at fd00::12"},
		{"the other's pods take less", all, narrow, []uint8{0}, 0, identity.TunnelWireGuard, "10.1.1.2>10.2.1.2", 1300, ""},
		{"the path takes less", all, narrow, []uint8{0}, 1290, identity.TunnelWireGuard, "10.1.1.2>10.2.1.2", 1290, ""},
		{"the path takes more", all, tunnelNode("west", 1, 0), []uint8{0}, 1400, identity.TunnelWireGuard, "10.1.1.2>10.2.1.2", 1390, ""},
	} {
		rules := tunnelRules{self: self, mode: tc.mode, slots: tc.slots, missing: "no TUN here", mtu: testMTUs}
		row := rules.derive(tc.node, nil, tc.path, none)
		outer := ""
		if row.Local.IsValid() || row.Remote.IsValid() {
			outer = row.Local.String() + ">" + row.Remote.String()
		}
		if row.Mode != tc.want || outer != tc.outer || row.MTU != tc.mtu || !strings.Contains(row.Why, tc.whyContains) || (row.Why == "") != (tc.whyContains == "") {
			t.Errorf("%s: got %s %s MTU %d %q", tc.name, row.Mode, outer, row.MTU, row.Why)
		}
		if row.Self != (tc.node.NodeName() == self.NodeName()) || row.Address != tc.node.Address {
			t.Errorf("%s: the row is %+v", tc.name, row)
		}
	}
}

func tunnelNodeAt(cluster, address string) identity.Node {
	n := tunnelNode(cluster, 9)
	n.Address = netip.MustParseAddr(address)
	return n
}

// newTestEncryption is node east/node1's, with this WireGuard.
func newTestEncryption(tables *clustermesh.Tables, wg *fakeWireGuard) *encryption {
	e := newEncryption(tables, tunnelNode("east", 1), identity.EncryptAll, slog.New(slog.DiscardHandler))
	e.mtu = testMTUs
	e.open = func(context.Context) (wireGuard, error) { return wg, nil }
	return e
}

func tunnelRow(txn statedb.ReadTxn, tables *clustermesh.Tables, node string) identity.Tunnel {
	if row, _, ok := tables.Tunnels.Get(txn, tables.Tunnels.ByKey(node)); ok {
		return row.Object
	}
	return identity.Tunnel{}
}

func TestTunnelsFollowNodesKeysSessionsAndPaths(t *testing.T) {
	tables, wg := newTables(t), newFakeWireGuard(0)
	e := newTestEncryption(tables, wg)
	e.Open(t.Context())
	tunnels := newTunnels(tables, e)
	run(t, tunnels.Run)
	const west = "west/node1"
	is := func(what string, condition func(identity.Tunnel) bool) {
		t.Helper()
		until(t, tables, tables.Tunnels, what, func(txn statedb.ReadTxn) bool { return condition(tunnelRow(txn, tables, west)) })
	}
	uses := func(outer string) func(identity.Tunnel) bool {
		return func(row identity.Tunnel) bool { return row.Local.String()+">"+row.Remote.String() == outer }
	}
	put(t, tables, tables.Nodes, tunnelNode("west", 1, 0), tunnelNode("west", 2, 0), tunnelNode("north", 1, 0))
	is("there is a tunnel", uses("10.1.1.2>10.2.1.2"))

	name := identity.NodeName{Cluster: "west", Node: "node1"}
	wg.shake(name, true, pair{0, 0})
	put(t, tables, tables.Nodes, tunnelNode("west", 1, 1, 0))
	is("the other's new key is known, and not used without a session", func(row identity.Tunnel) bool { return len(row.Keys) == 2 && uses("10.1.1.2>10.2.1.2")(row) })
	wg.shake(name, true, pair{0, 1})
	is("it is used as soon as there is one", uses("10.1.1.2>10.2.1.3"))
	put(t, tables, tables.Nodes, tunnelNode("west", 1, 1))
	is("the old key is gone", func(row identity.Tunnel) bool { return len(row.Keys) == 1 && uses("10.1.1.2>10.2.1.3")(row) })

	tunnels.setMTU("west", 1290)
	is("the path is narrower", func(row identity.Tunnel) bool { return row.MTU == 1290 })
	if row := tunnelRow(tables.DB.ReadTxn(), tables, "north/node1"); row.MTU != 1390 {
		t.Errorf("the MTU toward another cluster is %d too", row.MTU)
	}
	tunnels.setMTU("west", 0)
	is("the path is as it was", func(row identity.Tunnel) bool { return row.MTU == 1390 })

	remove(t, tables, tables.Nodes, west)
	is("the node is gone", func(row identity.Tunnel) bool { return row.Node == "" })
}

func TestTunnelsAreClosedUntilThereIsADevice(t *testing.T) {
	tables, wg := newTables(t), newFakeWireGuard(0)
	e := newTestEncryption(tables, wg)
	broken := true
	e.open = func(context.Context) (wireGuard, error) {
		if broken {
			return nil, errors.New("UDP port 51871 is taken")
		}
		return wg, nil
	}
	e.Open(t.Context())
	run(t, newTunnels(tables, e).Run)
	put(t, tables, tables.Nodes, tunnelNode("west", 1, 0))
	until(t, tables, tables.Tunnels, "it is closed, with the reason", func(txn statedb.ReadTxn) bool {
		row := tunnelRow(txn, tables, "west/node1")
		return row.Mode == identity.TunnelClosed && strings.Contains(row.Why, "UDP port 51871 is taken")
	})
	broken = false
	e.Open(t.Context())
	until(t, tables, tables.Tunnels, "it is open", func(txn statedb.ReadTxn) bool {
		return tunnelRow(txn, tables, "west/node1").Mode == identity.TunnelWireGuard
	})
}

// TestOneNodesChangeLooksAtThatNodeAlone counts, among many nodes.
func TestOneNodesChangeLooksAtThatNodeAlone(t *testing.T) {
	tables, wg := newTables(t), newFakeWireGuard(0, 1)
	e := newTestEncryption(tables, wg)
	e.Open(t.Context())
	tunnels := newTunnels(tables, e)
	txn := tables.DB.WriteTxn(tables.Nodes)
	changes, err := tables.Nodes.Changes(txn)
	txn.Commit()
	if err != nil {
		t.Fatal(err)
	}
	defer changes.Close()
	for i := range 200 {
		put(t, tables, tables.Nodes, tunnelNode("west", i, 0))
	}
	if _, err := tunnels.step(changes); err != nil {
		t.Fatal(err)
	}
	wg.asked = 0
	put(t, tables, tables.Nodes, tunnelNode("west", 7, 1, 0))
	if _, err := tunnels.step(changes); err != nil {
		t.Fatal(err)
	}
	if wg.asked == 0 || wg.asked > 8 {
		t.Errorf("%d sessions were asked for, because one node of 200 has changed", wg.asked)
	}
}
