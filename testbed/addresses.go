package testbed

import (
	"fmt"
	"net/netip"

	"causeway/identity"
)

// Underlay is the address family of the network between the nodes; empty is [UnderlayIPv4].
type Underlay string

const (
	UnderlayIPv4 Underlay = "ipv4"
	UnderlayIPv6 Underlay = "ipv6"
)

func (u Underlay) validate() error {
	switch u {
	case "", UnderlayIPv4, UnderlayIPv6:
		return nil
	}
	return fmt.Errorf("underlay %q is neither ipv4 nor ipv6", string(u))
}

// bits of the underlay's prefix, which all of its addresses share.
func (u Underlay) bits() int {
	if u == UnderlayIPv6 {
		return 48
	}
	return 16
}

// kvstoreAddress and nodeAddress are 172.29.C.2 and 172.29.C.(10+N), or fd00:172:29:C::2 and fd00:172:29:C::(10+N).
func (u Underlay) kvstoreAddress(c identity.ClusterID) netip.Addr { return u.address(c, 2) }

func (u Underlay) nodeAddress(c identity.ClusterID, n int) netip.Addr { return u.address(c, 10+n) }

func (u Underlay) address(c identity.ClusterID, host int) netip.Addr {
	if u == UnderlayIPv6 {
		return ipv6(172, 29, int(c), host)
	}
	return netip.AddrFrom4([4]byte{172, 29, byte(c), byte(host)})
}

// ipv6 is fd00:A:B:C::HOST, of numbers up to 999 that are written as in IPv4, so that one sees of what an address is.
func ipv6(a, b, c, host int) netip.Addr {
	var raw [16]byte
	raw[0] = 0xfd
	for i, n := range []int{a, b, c} {
		putDecimal(raw[2+2*i:], n)
	}
	putDecimal(raw[14:], host)
	return netip.AddrFrom16(raw)
}

// putDecimal writes a number so that its hexadecimal digits look like its decimal ones.
func putDecimal(to []byte, n int) {
	to[0], to[1] = byte(n/100%10), byte(n/10%10<<4|n%10)
}

// clusterPodCIDRs are 10.C.0.0/16 and fd00:10:C::/48.
func clusterPodCIDRs(c identity.ClusterID) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(c), 0, 0}), 16),
		netip.PrefixFrom(ipv6(10, int(c), 0, 0), 48),
	}
}

// nodePodCIDRs are 10.C.N.0/24 and fd00:10:C:N::/64.
func nodePodCIDRs(c identity.ClusterID, n int) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(c), byte(n), 0}), 24),
		netip.PrefixFrom(ipv6(10, int(c), n, 0), 64),
	}
}

// clusterServiceCIDRs are the c-th /18 of 100.64.0.0/10 (RFC 6598), and fd00:100:C::/112.
func clusterServiceCIDRs(c identity.ClusterID) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64 + byte(c)>>2, byte(c) << 6, 0}), 18),
		netip.PrefixFrom(ipv6(100, int(c), 0, 0), 112),
	}
}
