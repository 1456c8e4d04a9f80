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

// AllocateClusterIP chooses an address of cidr (IPv4, at most /30) for a service, one that used says false to. It depends
// on the name and on what is in use only: a service that is deleted and declared again tends to get its address back. It
// never returns the first and the last address of cidr. Without a free one it returns ErrNoClusterIP.
func AllocateClusterIP(cidr netip.Prefix, service Name, used func(netip.Addr) bool) (netip.Addr, error) {
	if !cidr.IsValid() || !cidr.Addr().Is4() || cidr.Bits() > 30 {
		return netip.Addr{}, fmt.Errorf("service CIDR %s is not IPv4 of at most /30", cidr)
	}
	base := cidr.Masked().Addr().As4()
	network := uint64(binary.BigEndian.Uint32(base[:]))
	size := uint64(1)<<(32-cidr.Bits()) - 2
	hash := fnv.New64a()
	hash.Write([]byte(service.String()))
	start := hash.Sum64() % size
	for i := range size {
		var ip [4]byte
		binary.BigEndian.PutUint32(ip[:], uint32(network+1+(start+i)%size))
		if a := netip.AddrFrom4(ip); !used(a) {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%w: all %d of %s are in use", ErrNoClusterIP, size, cidr)
}
