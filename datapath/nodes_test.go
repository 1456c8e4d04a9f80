package datapath_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"causeway/datapath"
	"causeway/identity"
)

// wayTo is a row of a node of the cluster, with a pod range by its number, in mode wireguard with keys in the slots or else plain.
func wayTo(cluster identity.ClusterID, name string, address string, number byte, slots ...uint8) identity.Tunnel {
	t := identity.Tunnel{
		Cluster: "c" + string('0'+rune(cluster)), ClusterID: cluster, Node: name, Address: netip.MustParseAddr(address), MTU: 1400,
		PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, number, 0}), 24)}, Mode: identity.TunnelPlain,
		Local: netip.MustParseAddr("172.29.1.10"), Remote: netip.MustParseAddr(address),
	}
	for _, slot := range slots {
		t.Mode = identity.TunnelWireGuard
		t.Keys = append(t.Keys, identity.TunnelKey{Slot: slot})
		t.Local, t.Remote = netip.MustParseAddr("10.1.0.2"), t.TunnelAddress(slot)
	}
	return t
}

// entries are the map's, by address: the name of the mode, the node and its owner.
func entries(t *testing.T, n *node) map[string]datapath.NodeEntry {
	t.Helper()
	list, err := n.dp.ListNodes()
	must(t, err)
	have := make(map[string]datapath.NodeEntry)
	for _, e := range list {
		have[e.At.String()] = e
	}
	return have
}

func expectAt(t *testing.T, n *node, what string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(entries(t, n))); !slices.Equal(got, want) {
		t.Errorf("%s: the entries are at %v, want %v", what, got, want)
	}
}

// TestTunnelMapFollowsANode: its slots, its address and its mode may change, and nothing of before is left.
func TestTunnelMapFollowsANode(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	m := n.dp.Tunnels()
	update := func(row identity.Tunnel) { t.Helper(); must(t, m.Update(t.Context(), row)) }

	update(wayTo(2, "n", "172.29.2.10", 2))
	expectAt(t, n, "plain", "172.29.2.10")
	update(wayTo(2, "n", "172.29.2.10", 2, 0))
	expectAt(t, n, "one key", "172.29.2.10", "10.9.2.2")
	update(wayTo(2, "n", "172.29.2.10", 2, 1, 0))
	expectAt(t, n, "two keys", "172.29.2.10", "10.9.2.2", "10.9.2.3")
	for at, e := range entries(t, n) {
		want := datapath.NodeEntry{
			At: e.At, Node: netip.MustParseAddr("172.29.2.10"), Owner: 2, Mode: identity.TunnelWireGuard,
			Local: netip.MustParseAddr("10.1.0.2"), Remote: netip.MustParseAddr("10.9.2.2"), MTU: 1400,
		}
		if e != want {
			t.Errorf("at %s is %+v, want %+v", at, e, want)
		}
	}
	update(wayTo(2, "n", "172.29.2.10", 2, 1))
	expectAt(t, n, "the other key", "172.29.2.10", "10.9.2.3")
	update(wayTo(2, "n", "172.29.2.11", 2, 1))
	expectAt(t, n, "another address", "172.29.2.11", "10.9.2.3")
	update(wayTo(2, "n", "172.29.2.11", 3, 1))
	expectAt(t, n, "another range", "172.29.2.11", "10.9.3.3")
	closed := wayTo(2, "n", "172.29.2.11", 3, 1)
	closed.Mode, closed.Local, closed.Remote = identity.TunnelClosed, netip.Addr{}, netip.Addr{}
	update(closed)
	expectAt(t, n, "closed", "172.29.2.11")
	if e := entries(t, n)["172.29.2.11"]; e.Mode != identity.TunnelClosed || e.Remote.IsValid() {
		t.Errorf("closed is %+v", e)
	}
	must(t, m.Delete(t.Context(), closed))
	expectAt(t, n, "deleted")

	own := wayTo(1, "self", n.row.Address.String(), 1)
	update(own)
	own.Address, own.Self = netip.MustParseAddr("172.29.1.99"), true
	update(own)
	expectAt(t, n, "this node itself")

	ipv6 := wayTo(2, "six", "fd00:29::2", 4)
	ipv6.Local = netip.MustParseAddr("fd00:29::1")
	update(ipv6)
	expectAt(t, n, "on an IPv6 underlay", "fd00:29::2")
}

// TestTunnelMapTakeover: an address that has become another node's stays that one's, whatever the former one does.
func TestTunnelMapTakeover(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	m := n.dp.Tunnels()
	former, next := wayTo(2, "old", "172.29.2.10", 2), wayTo(3, "new", "172.29.2.10", 3)
	moved := wayTo(2, "old", "172.29.2.11", 2)
	sibling := wayTo(2, "young", "172.29.2.11", 4)
	for _, step := range []struct {
		what string
		do   func() error
		at   string
		node identity.ClusterID
	}{
		{"first", func() error { return m.Update(t.Context(), former) }, "172.29.2.10", 2},
		{"another cluster's", func() error { return m.Update(t.Context(), next) }, "172.29.2.10", 3},
		{"the former one moves", func() error { return m.Update(t.Context(), moved) }, "172.29.2.10", 3},
		{"a node of the same cluster comes there", func() error { return m.Update(t.Context(), sibling) }, "172.29.2.11", 2},
		{"the former one goes", func() error { return m.Delete(t.Context(), moved) }, "172.29.2.11", 2},
	} {
		must(t, step.do())
		if e := entries(t, n)[step.at]; e.Owner != step.node {
			t.Errorf("%s: at %s is %+v, want one of cluster %d", step.what, step.at, e, step.node)
		}
	}
	n.restart() // Whose entries they are is known by the clusters alone now.
	m = n.dp.Tunnels()
	must(t, m.Delete(t.Context(), former))
	expectAt(t, n, "after a restart", "172.29.2.10", "172.29.2.11")
	desired := slices.Values([]identity.Tunnel{next})
	must(t, m.Prune(t.Context(), desired, func(id identity.ClusterID) bool { return id == 3 }))
	expectAt(t, n, "cluster 3 has synced", "172.29.2.10", "172.29.2.11")
	must(t, m.Prune(t.Context(), desired, all))
	expectAt(t, n, "all have synced", "172.29.2.10")
}

// TestTunnelMapRefuses what makes no way, and leaves the former one.
func TestTunnelMapRefuses(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	good := wayTo(2, "n", "172.29.2.10", 2, 0)
	must(t, n.dp.Tunnels().Update(t.Context(), good))
	before := entries(t, n)
	for what, change := range map[string]func(*identity.Tunnel){
		"without an address":               func(r *identity.Tunnel) { r.Address = netip.Addr{} },
		"without a mode":                   func(r *identity.Tunnel) { r.Mode = "" },
		"of a mode that nobody knows":      func(r *identity.Tunnel) { r.Mode = "pigeon" },
		"without a local address":          func(r *identity.Tunnel) { r.Local = netip.Addr{} },
		"without a remote address":         func(r *identity.Tunnel) { r.Remote = netip.Addr{} },
		"between two families":             func(r *identity.Tunnel) { r.Remote = netip.MustParseAddr("fd00::1") },
		"with an MTU that is none":         func(r *identity.Tunnel) { r.MTU = -1 },
		"with an MTU that no packet has":   func(r *identity.Tunnel) { r.MTU = 1 << 16 },
		"plain, but between two families ": func(r *identity.Tunnel) { r.Mode, r.Local = identity.TunnelPlain, netip.MustParseAddr("fd00::1") },
	} {
		bad := good
		change(&bad)
		if err := n.dp.Tunnels().Update(t.Context(), bad); err == nil {
			t.Errorf("a way %s was taken", what)
		}
		if after := entries(t, n); !maps.Equal(before, after) {
			t.Errorf("%s: the entries became %v", what, after)
		}
	}
	large := good
	large.MTU = 9000
	must(t, n.dp.Tunnels().Update(t.Context(), large))
	if e := entries(t, n)["172.29.2.10"]; e.MTU != podMTU {
		t.Errorf("the MTU is %d, want at most the pods' %d", e.MTU, podMTU)
	}
}
