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

// maxTries bounds how many addresses of a service CIDR are looked at. A smaller range is looked through in full; in a larger one the
// names' hashes spread the services so far that nobody meets as many in a row.
const maxTries = 1 << 16

// AllocateClusterIP chooses an address of cidr (IPv4 of at most /30, IPv6 of at most /126) for a service, one that used says false to.
// It depends on the name and on what is in use only: a service that is deleted and declared again tends to get its address back. It
// never returns the first and the last address of cidr. Without a free one it returns ErrNoClusterIP.
func AllocateClusterIP(cidr netip.Prefix, service Name, used func(netip.Addr) bool) (netip.Addr, error) {
	if !cidr.IsValid() || cidr.Addr().Is4In6() || hostBits(cidr) < 2 {
		return netip.Addr{}, fmt.Errorf("service CIDR %s is neither IPv4 of at most /30 nor IPv6 of at most /126", cidr)
	}
	// Of an IPv6 range of more than 2^63 addresses those count whose upper host bits are 0.
	size := uint64(1)<<min(63, hostBits(cidr)) - 2
	hash := fnv.New64a()
	hash.Write([]byte(service.String()))
	start := hash.Sum64() % size
	tries := min(size, maxTries)
	for i := range tries {
		if a := nth(cidr, 1+(start+i)%size); !used(a) {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%w in %s: %d were looked at, and all are in use", ErrNoClusterIP, cidr, tries)
}

func hostBits(p netip.Prefix) int { return p.Addr().BitLen() - p.Bits() }

// nth returns the nth address of a range, counted from 0, the network's own. n must be less than the range has.
func nth(p netip.Prefix, n uint64) netip.Addr {
	base := p.Masked().Addr().As16()
	low := binary.BigEndian.Uint64(base[8:])
	binary.BigEndian.PutUint64(base[8:], low+n)
	a := netip.AddrFrom16(base)
	if p.Addr().Is4() {
		a = a.Unmap()
	}
	return a
}
