package datapath

import (
	"fmt"
	"math/bits"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"causeway/lb"
)

// addressSpace is the one that all clusters share; see CLUSTER_MESH in bpf/lib/net.h.
const addressSpace = 0

// keyPrefixBits precede the address in an address key; see bpf/lib/addresses.h.
const keyPrefixBits = 32

func toIP(a netip.Addr) bpfIpAddr { return bpfIpAddr{Bytes: a.As16()} }

func (a bpfIpAddr) addr() netip.Addr { return netip.AddrFrom16(a.Bytes).Unmap() }

// toBE16 returns n as it must be in memory for its bytes to be in network order.
func toBE16(n uint16) uint16 { return bits.ReverseBytes16(n) }

func toPrefixKey(p netip.Prefix) bpfAddressKey {
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return bpfAddressKey{PrefixLen: uint32(keyPrefixBits + bits), Cluster: addressSpace, Address: toIP(p.Addr())}
}

func (k bpfAddressKey) prefix() netip.Prefix {
	addr, bits := k.Address.addr(), int(k.PrefixLen)-keyPrefixBits
	if addr.Is4() {
		bits -= 96
	}
	return netip.PrefixFrom(addr, bits)
}

func toProtocol(p lb.Protocol) (uint8, error) {
	switch p {
	case lb.TCP:
		return unix.IPPROTO_TCP, nil
	case lb.UDP:
		return unix.IPPROTO_UDP, nil
	}
	return 0, fmt.Errorf("protocol %q is neither TCP nor UDP", p)
}

func fromProtocol(p uint8) lb.Protocol {
	if p == unix.IPPROTO_UDP {
		return lb.UDP
	}
	return lb.TCP
}

func toAffinity(a lb.Affinity) (uint8, error) {
	switch a {
	case lb.AffinityNone, "":
		return uint8(bpfAffinityAFFINITY_NONE), nil
	case lb.AffinityLocal:
		return uint8(bpfAffinityAFFINITY_LOCAL), nil
	case lb.AffinityRemote:
		return uint8(bpfAffinityAFFINITY_REMOTE), nil
	}
	return 0, fmt.Errorf("affinity %q is none of none, local, remote", a)
}

func fromAffinity(a uint8) lb.Affinity {
	switch bpfAffinity(a) {
	case bpfAffinityAFFINITY_LOCAL:
		return lb.AffinityLocal
	case bpfAffinityAFFINITY_REMOTE:
		return lb.AffinityRemote
	}
	return lb.AffinityNone
}

func toMAC(s string) (mac [6]uint8, err error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(mac) {
		return mac, fmt.Errorf("%q is not an Ethernet address", s)
	}
	return [6]uint8(hw), nil
}
