package tunnel

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Bytes that the tunnel adds to a pod's IP packet: outer IP, UDP (8), VXLAN (8, RFC 7348) and
// the inner Ethernet header (14).
const (
	OverheadIPv4 = 20 + 8 + 8 + 14
	OverheadIPv6 = 40 + 8 + 8 + 14
)

// PodMTU returns the largest IP packet of a pod, in bytes, that fits into one packet of the underlay
// when the tunnel ends at underlay addresses of the given one's family.
func PodMTU(underlayMTU int, node netip.Addr) int {
	if node.Unmap().Is4() {
		return underlayMTU - OverheadIPv4
	}
	return underlayMTU - OverheadIPv6
}

// UnderlayMTU returns the MTU of the link that has the node's address.
func UnderlayMTU(node netip.Addr) (int, error) {
	link, err := underlayLink(node)
	if err != nil {
		return 0, err
	}
	return link.Attrs().MTU, nil
}

func underlayLink(node netip.Addr) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	for _, link := range links {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("listing the addresses of %s: %w", link.Attrs().Name, err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == node.Unmap() {
				return link, nil
			}
		}
	}
	return nil, fmt.Errorf("no link has the node's address %s: check the node's address in the configuration", node)
}
