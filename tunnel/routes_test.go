package tunnel

import (
	"fmt"
	"maps"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestRoutesOfBothFamilies: a node's routes have the MTU of its row, those of IPv6 not less than IPv6 allows, and follow it.
func TestRoutesOfBothFamilies(t *testing.T) {
	inNode(t, func() {
		device, err := EnsureVXLAN(Config{Address: self, IPv6: true})
		must(t, err)
		link, err := netlink.LinkByIndex(device.Index)
		must(t, err)
		routes, err := NewRoutes(device, self)
		must(t, err)
		defer routes.Close()
		expect := func(when string, want map[string]string) {
			t.Helper()
			got := map[string]string{}
			for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				list, err := netlink.RouteList(link, family)
				must(t, err)
				for _, r := range list {
					if r.Protocol == routeProtocol {
						got[r.Dst.String()] = fmt.Sprint(r.MTU, " from ", r.Src)
					}
				}
			}
			if !maps.Equal(got, want) {
				t.Errorf("%s: routes are %v, want %v", when, got, want)
			}
		}
		near, far := testNode(1, 1, "10.1.1.0/24", "fd10:1:1::/64"), testNode(2, 0, "10.2.0.0/24", "fd10:2::/64")
		near.MTU, far.MTU = 1390, 1100
		must(t, routes.Update(t.Context(), near))
		must(t, routes.Update(t.Context(), far))
		expect("told of both", map[string]string{
			"10.1.1.0/24": "1390 from 172.29.1.10", "fd10:1:1::/64": "1390 from <nil>",
			"10.2.0.0/24": "1100 from 172.29.1.10", "fd10:2::/64": "1280 from <nil>",
		})
		near.MTU, far.MTU = 9000, 1350 // more than the device has, and a path that is wider again
		must(t, routes.Update(t.Context(), near))
		must(t, routes.Update(t.Context(), far))
		expect("with other MTUs", map[string]string{
			"10.1.1.0/24": "1450 from 172.29.1.10", "fd10:1:1::/64": "1450 from <nil>",
			"10.2.0.0/24": "1350 from 172.29.1.10", "fd10:2::/64": "1350 from <nil>",
		})
		must(t, routes.Delete(t.Context(), far))
		must(t, routes.Delete(t.Context(), near))
		expect("without them", map[string]string{})
	})
}
