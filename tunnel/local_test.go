package tunnel

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/identity"
	"causeway/lb"
)

// localRoutes are our routes in the table "local", with their source.
func localRoutes(t *testing.T) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: routeProtocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		must(t, err)
		for _, r := range list {
			if r.Type == unix.RTN_LOCAL {
				got[r.Dst.String()] += fmt.Sprint("from ", r.Src)
			}
		}
	}
	return got
}

func l7Frontend(address string, port uint16, cluster uint8) lb.Frontend {
	return lb.Frontend{
		FrontendKey: lb.FrontendKey{Address: netip.MustParseAddr(address), Port: port, Protocol: lb.TCP}, ClusterID: cluster, L7: true,
	}
}

// TestLocalAddresses: an address is local as long as a frontend there is balanced at L7, whose routes outlive an agent until nobody wants them.
func TestLocalAddresses(t *testing.T) {
	inNode(t, func() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		sides := []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd10:1::1")}
		local, err := NewLocalAddresses(self, sides)
		must(t, err)
		ownFrom := "from " + self.String()
		expect := func(when string, want map[string]string) {
			t.Helper()
			all := map[string]string{"10.1.0.1/32": "from <nil>", "fd10:1::1/128": "from <nil>"}
			maps.Copy(all, want)
			if got := localRoutes(t); !maps.Equal(got, all) {
				t.Errorf("%s: routes are %v, want %v", when, got, all)
			}
		}
		expect("at first", nil)
		web, api, six, other := l7Frontend("100.64.64.1", 80, 1), l7Frontend("100.64.64.1", 81, 1), l7Frontend("fd00:64::1", 80, 1), l7Frontend("100.64.64.2", 80, 2)
		for range 2 {
			for _, f := range []lb.Frontend{web, api, six, other} {
				must(t, local.Update(t.Context(), f))
			}
			expect("with all", map[string]string{"100.64.64.1/32": ownFrom, "fd00:64::1/128": "from <nil>", "100.64.64.2/32": ownFrom})
		}
		web.L7 = false
		must(t, local.Update(t.Context(), web))
		must(t, local.Unused().Update(t.Context(), web))
		expect("one of two at L4", map[string]string{"100.64.64.1/32": ownFrom, "fd00:64::1/128": "from <nil>", "100.64.64.2/32": ownFrom})
		api.L7 = false
		must(t, local.Update(t.Context(), api))
		expect("both at L4, but programs don't know it", map[string]string{"100.64.64.1/32": ownFrom, "fd00:64::1/128": "from <nil>", "100.64.64.2/32": ownFrom})
		must(t, local.Unused().Update(t.Context(), api))
		must(t, local.Delete(t.Context(), six))
		expect("without two", map[string]string{"100.64.64.2/32": ownFrom})
		must(t, local.Update(t.Context(), six))
		must(t, local.Close())
		api.L7 = true

		// Another agent knows nothing of them.
		local, err = NewLocalAddresses(self, sides)
		must(t, err)
		defer local.Close()
		must(t, local.Update(t.Context(), api))
		none := func(func(lb.Frontend) bool) {}
		must(t, local.Prune(t.Context(), none, func(id identity.ClusterID) bool { return id == 1 }))
		expect("pruned of cluster 1", map[string]string{"100.64.64.1/32": ownFrom, "100.64.64.2/32": ownFrom})
		must(t, local.Delete(t.Context(), api))
		must(t, local.Prune(t.Context(), none, func(identity.ClusterID) bool { return true }))
		expect("pruned of all", nil)
	})
}

// TestLocalAddressesOfTheOtherFamily: the node's own clients come from its address on the pods' side, never from the service's.
func TestLocalAddressesOfTheOtherFamily(t *testing.T) {
	inNode(t, func() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		local, err := NewLocalAddresses(netip.MustParseAddr("fd29::1"), []netip.Addr{netip.MustParseAddr("10.1.0.1")})
		must(t, err)
		defer local.Close()
		must(t, local.Update(t.Context(), l7Frontend("100.64.64.1", 80, 1)))
		if got := localRoutes(t)["100.64.64.1/32"]; got != "from 10.1.0.1" {
			t.Errorf("the node's own clients come %s, want from 10.1.0.1", got)
		}
	})
}
