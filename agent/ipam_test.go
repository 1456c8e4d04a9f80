package agent

import (
	"net/netip"
	"strings"
	"testing"

	"causeway/identity"
)

func TestNodesRunOutOfAddresses(t *testing.T) {
	for _, test := range []struct {
		cidr     string
		reserved int
		want     string
	}{
		{"10.1.1.0/29", identity.ReservedPodAddresses, "10.1.1.4 10.1.1.5 10.1.1.6"},
		{"10.1.1.0/29", 2, "10.1.1.2 10.1.1.3 10.1.1.4 10.1.1.5 10.1.1.6"},
		{"fd00:1::/125", identity.ReservedPodAddresses, "fd00:1::4 fd00:1::5 fd00:1::6"},
		{"fd00:1::ff8/125", 2, "fd00:1::ffa fd00:1::ffb fd00:1::ffc fd00:1::ffd fd00:1::ffe"},
		{"255.255.255.248/29", identity.ReservedPodAddresses, "255.255.255.252 255.255.255.253 255.255.255.254"},
	} {
		pool := newAddressPool(netip.MustParsePrefix(test.cidr), test.reserved)
		var given []string
		for {
			a, err := pool.next()
			if err != nil {
				if !strings.Contains(err.Error(), test.cidr+" are taken") {
					t.Errorf("the error does not name the range %s: %v", test.cidr, err)
				}
				break
			}
			given = append(given, a.String())
			pool.take(a)
		}
		if got := strings.Join(given, " "); got != test.want {
			t.Errorf("%s gave %s, want %s", test.cidr, got, test.want)
		}
		free := netip.MustParseAddr(given[1])
		addressPools{pool}.give([]netip.Addr{free})
		if a, err := pool.next(); err != nil || a != free {
			t.Errorf("the free one is %s (%v), want %s", a, err, free)
		}
	}
}

// TestPodsGetAnAddressOfEachRange holds for any ranges that a node may have: a pod gets an address of each family, and none of those that the
// node is known by on the pods' side.
func TestPodsGetAnAddressOfEachRange(t *testing.T) {
	for _, test := range []struct{ ranges, first, second string }{
		{"10.1.1.0/24", "10.1.1.4", ""},
		{"fd00:1::/64", "fd00:1::4", ""},
		{"10.1.1.0/24 fd00:1::/64", "10.1.1.4", "fd00:1::2"},
		{"fd00:1::/64 10.1.1.0/24", "10.1.1.2", "fd00:1::4"},
	} {
		var ranges []netip.Prefix
		for _, r := range strings.Fields(test.ranges) {
			ranges = append(ranges, netip.MustParsePrefix(r))
		}
		pools, node := newAddressPools(ranges), identity.Node{PodCIDRs: ranges}
		var ep identity.Endpoint
		if err := pools.next(&ep); err != nil {
			t.Fatal(err)
		}
		second := ""
		if ep.Address6.IsValid() {
			second = ep.Address6.String()
		}
		if ep.Address.String() != test.first || second != test.second {
			t.Errorf("of %s a pod gets %s and %q, want %s and %q", test.ranges, ep.Address, second, test.first, test.second)
		}
		for _, own := range []netip.Addr{node.PodSide(), node.TunnelAddress(0), node.TunnelAddress(1)} {
			if pool := pools.of(own); pool == nil || !pool.reserves(own) {
				t.Errorf("of %s a pod may get the node's own %s", test.ranges, own)
			}
		}
	}
}

func TestARangeThatIsTakenInPartIsNotSearched(t *testing.T) {
	pool := newAddressPool(netip.MustParsePrefix("fd00:1::/64"), 2)
	for range 70_000 { // more than IPv4's widest ranges of a node have
		a, err := pool.next()
		if err != nil {
			t.Fatal(err)
		}
		pool.take(a)
	}
}
