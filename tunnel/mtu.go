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

// Bytes that WireGuard adds to a packet: outer IP, UDP (8), and its header and authentication tag (32, "WireGuard: Next Generation Kernel
// Network Tunnel", section 5.4.6). What is inside is padded to a multiple of 16 bytes.
const (
	wireGuardOverheadIPv4 = 20 + 8 + 32
	wireGuardOverheadIPv6 = 40 + 8 + 32
	wireGuardPadding      = 16
)

// WireGuardMTU returns the MTU of a WireGuard device over an underlay of the given MTU and family, in bytes: a multiple of 16, so that
// padding never makes a packet larger than what fits. 1440 on an IPv4 underlay of 1500.
func WireGuardMTU(underlayMTU int, node netip.Addr) int {
	overhead := wireGuardOverheadIPv6
	if node.Unmap().Is4() {
		overhead = wireGuardOverheadIPv4
	}
	return (underlayMTU - overhead) / wireGuardPadding * wireGuardPadding
}

// EncryptedPodMTU returns the largest IP packet of a pod, in bytes, that fits into one packet of the underlay in VXLAN between
// the tunnel addresses inside of WireGuard: 1390 on an IPv4 underlay of 1500.
func EncryptedPodMTU(underlayMTU int, node, tunnel netip.Addr) int {
	return PodMTU(WireGuardMTU(underlayMTU, node), tunnel)
}

// PodMTU returns the largest IP packet of a pod, in bytes, that fits into one packet of the underlay
// when the tunnel ends at underlay addresses of the given one's family.
func PodMTU(underlayMTU int, node netip.Addr) int {
	if node.Unmap().Is4() {
		return underlayMTU - OverheadIPv4
	}
	return underlayMTU - OverheadIPv6
}

// FindUnderlay returns the interface index and the MTU, in bytes, of the link that has the node's address.
func FindUnderlay(node netip.Addr) (index, mtu int, err error) {
	link, err := underlayLink(node)
	if err != nil {
		return 0, 0, err
	}
	return link.Attrs().Index, link.Attrs().MTU, nil
}

func underlayLink(node netip.Addr) (netlink.Link, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	for _, link := range links {
		addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
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
