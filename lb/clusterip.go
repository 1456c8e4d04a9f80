package lb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
)

// ErrNoClusterIP says that the service CIDR has no address left.
var ErrNoClusterIP = errors.New("no cluster IP is free")

// ClusterIPs chooses the addresses of a cluster's services. It holds no state: what is in use is an input.
type ClusterIPs struct {
	// CIDR that addresses are allocated from: IPv4, at most /30.
	CIDR netip.Prefix
	// Used returns which of the cluster's services has the address.
	Used func(netip.Addr) (Name, bool)
	// Guard refuses addresses that mean something else: in pod CIDRs, of nodes; nil refuses none.
	Guard Guard
}

// Allocate returns a free address for a service. It depends on the name and on what is in use only, so a service
// that is deleted and declared again tends to get its address back, and two clusters choose alike.
func (c ClusterIPs) Allocate(service Name) (netip.Addr, error) {
	if !c.CIDR.IsValid() || !c.CIDR.Addr().Is4() || c.CIDR.Bits() > 30 {
		return netip.Addr{}, fmt.Errorf("service CIDR %s is not IPv4 of at most /30", c.CIDR)
	}
	base := c.CIDR.Masked().Addr().As4()
	size := uint32(1)<<(32-c.CIDR.Bits()) - 2 // without the network's and the broadcast address
	hash := fnv.New32a()
	hash.Write([]byte(service.String()))
	start := hash.Sum32() % size
	for i := range size {
		var ip [4]byte
		offset := uint32((uint64(start) + uint64(i)) % uint64(size))
		binary.BigEndian.PutUint32(ip[:], binary.BigEndian.Uint32(base[:])+1+offset)
		if a := netip.AddrFrom4(ip); c.Check(service, a) == nil {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%w: all %d of %s are in use", ErrNoClusterIP, size, c.CIDR)
}

// Check tells why service cannot have the address that its manifest asks for. It may lie outside of the CIDR, because
// manifests are applied unchanged to clusters whose service CIDRs differ.
func (c ClusterIPs) Check(service Name, requested netip.Addr) error {
	if err := CheckAddress(requested); err != nil {
		return fmt.Errorf("cluster IP: %w", err)
	}
	if !requested.Is4() {
		return fmt.Errorf("cluster IP %s is not IPv4", requested)
	}
	if c.Used != nil {
		if holder, ok := c.Used(requested); ok && holder != service {
			return fmt.Errorf("cluster IP %s is in use by service %s", requested, holder)
		}
	}
	if c.Guard != nil {
		if reason := c.Guard(requested); reason != "" {
			return fmt.Errorf("cluster IP %s %s", requested, reason)
		}
	}
	return nil
}
