package identity

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"causeway/lb"
)

func prefixes(list ...string) []netip.Prefix {
	var parsed []netip.Prefix
	for _, p := range list {
		parsed = append(parsed, netip.MustParsePrefix(p))
	}
	return parsed
}

// eastChannel may speak for east, beside a node of west and node2 of its own.
func eastChannel() Channel {
	return Channel{Cluster: "east", ID: 1, PodCIDRs: prefixes("10.1.0.0/16"), Nodes: NodeList{
		{Cluster: "east", ClusterID: 1, Name: "node2", Address: netip.MustParseAddr("172.29.1.12"), PodCIDRs: prefixes("10.1.2.0/24"), Instance: "two",
			TunnelKeys: []TunnelKey{{Slot: 0, Key: WireGuardKey{0: 7}, Port: 51871}}},
		{Cluster: "west", ClusterID: 2, Name: "node1", Address: netip.MustParseAddr("172.29.2.11"), PodCIDRs: prefixes("10.2.1.0/24", "10.1.9.0/24"), Instance: "three",
			TunnelKeys: []TunnelKey{{Slot: 0, Key: WireGuardKey{0: 8}, Port: 51871}, {Slot: 1, Key: WireGuardKey{0: 9}, Port: 51872}}},
	}}
}

// refusal checks an error against what it must say; empty means none.
func refusal(t *testing.T, name string, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || err.Error() != want) {
		t.Errorf("%s:\n got %v\nwant %s", name, err, want)
	}
}

func TestCheckNode(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Channel, *Node)
		want   string
	}{
		{"a new node", func(*Channel, *Node) {}, ""},
		{"the first node", func(c *Channel, _ *Node) { c.Nodes = nil }, ""},
		{"the same node again", func(c *Channel, n *Node) { c.Nodes = append(c.Nodes.(NodeList), *n) }, ""},
		{"the same node at a new address", func(c *Channel, n *Node) {
			c.Nodes = append(c.Nodes.(NodeList), *n)
			n.Address = netip.MustParseAddr("172.29.1.99")
		}, ""},
		{"of another cluster", func(_ *Channel, n *Node) { n.Cluster = "west" }, "node entry west/node1: it is of cluster west, but came from cluster east"},
		{"with another cluster's ID", func(_ *Channel, n *Node) { n.ClusterID = 2 }, "node entry east/node1: cluster east has ID 1 here, not 2"},
		{"outside of the cluster's range", func(_ *Channel, n *Node) { n.PodCIDRs = prefixes("10.2.7.0/24") },
			"node entry east/node1: pod CIDR 10.2.7.0/24 is outside of cluster east's [10.1.0.0/16]"},
		{"wider than the cluster's range", func(c *Channel, n *Node) { c.PodCIDRs, n.PodCIDRs = prefixes("10.4.0.0/16"), prefixes("10.4.0.0/15") },
			"node entry east/node1: pod CIDR 10.4.0.0/15 is outside of cluster east's [10.4.0.0/16]"},
		{"one range of two outside", func(_ *Channel, n *Node) { n.PodCIDRs = append(n.PodCIDRs, prefixes("10.3.0.0/24")...) },
			"node entry east/node1: pod CIDR 10.3.0.0/24 is outside of cluster east's [10.1.0.0/16]"},
		{"no range is announced", func(c *Channel, _ *Node) { c.PodCIDRs = nil }, "node entry east/node1: pod CIDR 10.1.1.0/24 is outside of cluster east's []"},
		{"another machine's name", func(c *Channel, n *Node) { n.Name = "node2"; n.PodCIDRs = prefixes("10.1.2.0/24") },
			"node entry east/node2: the name belongs to another machine (address 172.29.1.12, instance two; this one is 172.29.1.11, instance 0b1e-42): give one of them another name"},
		{"another node's address", func(_ *Channel, n *Node) { n.Address = netip.MustParseAddr("172.29.2.11") }, "node entry east/node1: address 172.29.2.11 is node west/node1's already"},
		{"an address among pods", func(_ *Channel, n *Node) { n.Address = netip.MustParseAddr("10.1.2.2") },
			"node entry east/node1: address 10.1.2.2 lies in the pod CIDRs of its cluster, [10.1.0.0/16]"},
		{"keys of its own", func(_ *Channel, n *Node) { n.TunnelKeys = []TunnelKey{{0, key1, 51871}, {1, key2, 51872}} }, ""},
		{"its own keys again", func(c *Channel, n *Node) {
			n.TunnelKeys = []TunnelKey{{0, key1, 51871}}
			c.Nodes = append(c.Nodes.(NodeList), *n)
			n.TunnelKeys = []TunnelKey{{1, key2, 51872}, {0, key1, 51871}}
		}, ""},
		{"another node's key", func(_ *Channel, n *Node) { n.TunnelKeys = []TunnelKey{{1, WireGuardKey{0: 7}, 51872}} },
			"node entry east/node1: tunnel key " + WireGuardKey{0: 7}.String() + " is node east/node2's already; a node that was made from a copy of another's state directory needs an empty one"},
		{"another cluster's node's second key, as its second", func(_ *Channel, n *Node) {
			n.TunnelKeys = []TunnelKey{{1, key1, 51872}, {0, WireGuardKey{0: 9}, 51871}}
		},
			"node entry east/node1: tunnel key " + WireGuardKey{0: 9}.String() + " is node west/node1's already; a node that was made from a copy of another's state directory needs an empty one"},
		{"another node's pods", func(_ *Channel, n *Node) { n.PodCIDRs = prefixes("10.1.2.128/25") }, "node entry east/node1: pod CIDR 10.1.2.128/25 overlaps node east/node2's [10.1.2.0/24]"},
		{"another cluster's pods", func(_ *Channel, n *Node) { n.PodCIDRs = prefixes("10.1.8.0/21") }, "node entry east/node1: pod CIDR 10.1.8.0/21 overlaps node west/node1's [10.2.1.0/24 10.1.9.0/24]"},
	} {
		c, n := eastChannel(), node1
		n.PodCIDRs = slices.Clone(n.PodCIDRs)
		test.change(&c, &n)
		refusal(t, test.name, c.CheckNode(n), test.want)
	}
}

func TestCheckAddress(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Address, *Node)
		want   string
	}{
		{"its own", func(*Address, *Node) {}, ""},
		{"another cluster's", func(a *Address, _ *Node) { a.Cluster = "west" }, "address entry 10.1.1.5: it is of cluster west, but came from cluster east"},
		{"with another cluster's identity", func(a *Address, _ *Node) { a.Identity = Compose(2, 256) }, "address entry 10.1.1.5: identity 131328 belongs to cluster 2, not 1"},
		{"with a reserved identity", func(a *Address, _ *Node) { a.Identity = Host }, "address entry 10.1.1.5: identity 1 belongs to cluster 0, not 1"},
		{"with another cluster's ID", func(a *Address, _ *Node) { a.ClusterID = 2 }, "address entry 10.1.1.5: cluster ID is 2, not 1"},
		{"outside of its node's range", func(a *Address, _ *Node) { a.Prefix = netip.MustParsePrefix("10.1.2.5/32") },
			"address entry 10.1.2.5: address 10.1.2.5 is outside of node east/node1's pod CIDRs [10.1.1.0/24]"},
		{"without its node", func(_ *Address, n *Node) { *n = Node{} }, "address entry 10.1.1.5: its node east/node1 is not known"},
		{"with another node", func(_ *Address, n *Node) { n.Name = "node2" }, "address entry 10.1.1.5: its node east/node1 is not known"},
		{"with another cluster's node", func(_ *Address, n *Node) { n.Cluster = "west" }, "address entry 10.1.1.5: its node east/node1 is not known"},
	} {
		a, n := shopAddress, node1
		test.change(&a, &n)
		refusal(t, test.name, eastChannel().CheckAddress(a, n), test.want)
	}
}

func TestCheckOtherEntries(t *testing.T) {
	c := eastChannel()
	westNode := NodeList(c.Nodes.(NodeList))[1]
	service := lb.Service{Cluster: "east", ClusterID: 1, Name: lb.Name{Namespace: "web", Name: "shop"}}
	slice := lb.Slice{Cluster: "east", ClusterID: 1, Service: service.Name, Slice: "node1", Node: "node1",
		Backends: []lb.SliceBackend{{Address: netip.MustParseAddr("10.1.1.5")}, {Address: netip.MustParseAddr("10.1.1.6")}}}
	westSlice, far, west := slice, slice, service
	westSlice.Cluster, west.ClusterID = "west", 2
	far.Backends = append(slices.Clone(slice.Backends), lb.SliceBackend{Address: netip.MustParseAddr("10.2.1.5")})

	refusal(t, "cluster", c.CheckCluster(east), "")
	refusal(t, "cluster name", c.CheckCluster(ClusterInfo{Name: "west", ID: 2}), "cluster entry: it is of cluster west, but came from cluster east")
	refusal(t, "cluster ID", c.CheckCluster(ClusterInfo{Name: "east", ID: 2}), "cluster entry: cluster east has ID 1 here, not 2")
	refusal(t, "identity", c.CheckIdentity(shopIdentity), "")
	refusal(t, "identity of another", c.CheckIdentity(Identity{"east", Compose(2, 300), shopLabels}), "identity entry 131372: identity 131372 belongs to cluster 2, not 1")
	refusal(t, "identity in another", c.CheckIdentity(Identity{"west", 65792, shopLabels}), "identity entry 65792: it is of cluster west, but came from cluster east")
	refusal(t, "service", c.CheckService(service), "")
	refusal(t, "service of another", c.CheckService(west), "service entry web/shop: cluster east has ID 1 here, not 2")
	refusal(t, "slice", c.CheckSlice(slice, node1), "")
	refusal(t, "slice of another", c.CheckSlice(westSlice, westNode), "slice entry web/shop/node1: it is of cluster west, but came from cluster east")
	refusal(t, "slice of an unknown node", c.CheckSlice(slice, Node{}), "slice entry web/shop/node1: its node east/node1 is not known")
	refusal(t, "slice with another's backend", c.CheckSlice(far, node1), "slice entry web/shop/node1: address 10.2.1.5 is outside of node east/node1's pod CIDRs [10.1.1.0/24]")
}

// TestCheckClustersSlice: a slice that no node vouches for leads to the cluster's pods alone, each on the node that it names.
func TestCheckClustersSlice(t *testing.T) {
	c := eastChannel()
	c.Nodes = NodeList{node1}
	for _, test := range []struct{ name, address, node, want string }{
		{"its node's", "10.1.1.5", "node1", ""},
		{"no node's that is named", "10.1.9.5", "", ""},
		{"a node's that is not known", "10.1.9.5", "node9", ""}, // for the caller to leave out
		{"another node's", "10.1.2.5", "node1", "address 10.1.2.5 is outside of node east/node1's pod CIDRs [10.1.1.0/24]"},
		{"another cluster's", "10.2.1.5", "", "address 10.2.1.5 is outside of cluster east's pod CIDRs [10.1.0.0/16]: only its pods can be backends for other clusters"},
		{"another cluster's, on its node", "10.2.1.5", "node1", "outside of cluster east's pod CIDRs"},
		{"the node's own", "172.29.1.11", "node1", "outside of cluster east's pod CIDRs"},
		{"the world's", "203.0.113.9", "", "outside of cluster east's pod CIDRs"},
	} {
		a := netip.MustParseAddr(test.address)
		s := lb.Slice{Cluster: "east", ClusterID: 1, Service: lb.Name{Namespace: "web", Name: "shop"}, Slice: "_shop-a", Backends: []lb.SliceBackend{{Address: a, Node: test.node}}}
		want := test.want
		if want != "" && want[0] != 'o' {
			want = "slice entry web/shop/_shop-a: " + want
		}
		err := c.CheckSlice(s, Node{})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", test.name, err, want)
		}
		row := lb.Backend{Cluster: "east", Address: a, Node: test.node, Slice: "shop-a"}
		if own := c.CheckBackend(row); (own == nil) != (err == nil) {
			t.Errorf("%s: others say %v, and its own cluster %v", test.name, err, own)
		}
	}
}

func TestVersionOf(t *testing.T) {
	slice := lb.Slice{Cluster: "east", ClusterID: 1, Incarnation: 7, Sequence: 8}
	ofNode := slice
	ofNode.Node = "node1"
	for name, value := range map[string][]byte{"address": EncodeAddress(shopAddress), "slice": lb.EncodeSlice(ofNode), "cluster's slice": lb.EncodeSlice(slice)} {
		want := Version{7, 8}
		if name == "address" {
			want = shopAddress.Version
		}
		if v, ok := VersionOf(value); !ok || v != want {
			t.Errorf("%s: %v, %v", name, v, ok)
		}
		if _, ok := VersionOf(value[:len(value)-3]); ok {
			t.Errorf("%s: a part of it has a version", name)
		}
	}
}

func TestVersionNewer(t *testing.T) {
	for _, test := range []struct {
		v, w Version
		want bool
	}{
		{Version{1, 2}, Version{1, 1}, true},
		{Version{1, 1}, Version{1, 1}, false},
		{Version{2, 0}, Version{1, 9}, true},
		{Version{1, 9}, Version{2, 0}, false},
	} {
		if got := test.v.Newer(test.w); got != test.want {
			t.Errorf("%v newer than %v: %v", test.v, test.w, got)
		}
	}
}

func TestNumbers(t *testing.T) {
	for n, want := range map[Number]string{
		0: "unknown, reserved", 1: "host, reserved", 7: "7, reserved", 255: "255, reserved",
		256: "256", 65536: "65536", 65536 + 255: "65791", 65792: "65792, valid", 1<<24 - 1: "16777215, valid", 1 << 24: "16777216", 1<<32 - 1: "4294967295",
	} {
		got := n.String()
		if n.Reserved() {
			got += ", reserved"
		}
		if n.Valid() {
			got += ", valid"
		}
		if got != want {
			t.Errorf("%d is %s, want %s", uint32(n), got, want)
		}
	}
	if n := Compose(255, 65535); n != Max || n.Cluster() != 255 || !strings.Contains(n.Detail(), "cluster 255, local 65535") {
		t.Errorf("the last identity is %s", n.Detail())
	}
}

func TestLabels(t *testing.T) {
	labels := Labels{"b": "2", "a": "1"}
	if labels.String() != "a=1,b=2" {
		t.Error(labels.String())
	}
	for _, test := range []struct {
		selector map[string]string
		want     bool
	}{
		{nil, false}, {map[string]string{"a": "1"}, true}, {map[string]string{"a": "1", "b": "2"}, true},
		{map[string]string{"a": "2"}, false}, {map[string]string{"a": "1", "c": ""}, false},
	} {
		if got := labels.Matches(test.selector); got != test.want {
			t.Errorf("%v matches %v: %v", labels, test.selector, got)
		}
	}
}

// TestTunnelAddressesAreTheNodesOwn: they lie in its range, which overlaps nobody's; a range that has no room for them has none.
func TestTunnelAddressesAreTheNodesOwn(t *testing.T) {
	for _, test := range []struct {
		cidr string
		want [3]string // on the pods' side, and of the slots
	}{
		{"10.1.1.0/24", [3]string{"10.1.1.1", "10.1.1.2", "10.1.1.3"}},
		{"fd01:0:0:1::/64", [3]string{"fd01:0:0:1::1", "fd01:0:0:1::2", "fd01:0:0:1::3"}},
		{"10.1.1.4/30", [3]string{"10.1.1.5", "10.1.1.6", "10.1.1.7"}},
		{"10.1.1.4/31", [3]string{"10.1.1.5", "invalid IP", "invalid IP"}},
		{"10.1.1.4/32", [3]string{"invalid IP", "invalid IP", "invalid IP"}},
	} {
		n := Node{PodCIDRs: prefixes(test.cidr)}
		if got := [3]string{n.PodSide().String(), n.TunnelAddress(0).String(), n.TunnelAddress(1).String()}; got != test.want {
			t.Errorf("%s: %v, want %v", test.cidr, got, test.want)
		}
	}
	if a := node1.TunnelAddress(2); a.IsValid() {
		t.Errorf("a third slot has %s", a)
	}
}

// TestPodSides: one of each range that has room for it, the first of them PodSide.
func TestPodSides(t *testing.T) {
	for _, test := range []struct {
		cidrs []string
		want  string
	}{
		{nil, "[]"},
		{[]string{"10.1.1.0/24"}, "[10.1.1.1]"},
		{[]string{"10.1.1.0/24", "fd01:0:0:1::/64"}, "[10.1.1.1 fd01:0:0:1::1]"},
		{[]string{"10.1.1.4/32", "fd01:0:0:1::/64"}, "[fd01:0:0:1::1]"},
	} {
		n := Node{PodCIDRs: prefixes(test.cidrs...)}
		if got := fmt.Sprint(n.PodSides()); got != test.want {
			t.Errorf("%v: %s, want %s", test.cidrs, got, test.want)
		}
	}
}
