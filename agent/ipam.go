package agent

import (
	"net/netip"
	"slices"

	"causeway/identity"
)

// addressPool gives out the addresses of one of a node's pod ranges. Not safe for concurrent use.
type addressPool struct {
	cidr netip.Prefix
	// first is the first address that a pod may get: those before it are the network's and the node's own.
	first netip.Addr
	used  map[netip.Addr]bool
	// last is the address taken last: one that was given back rests as long as possible, so that packets
	// still under way to its former owner find nobody.
	last netip.Addr
}

func newAddressPool(cidr netip.Prefix, reserved int) *addressPool {
	cidr = cidr.Masked()
	first := cidr.Addr()
	for range reserved {
		first = first.Next()
	}
	return &addressPool{cidr: cidr, first: first, used: map[netip.Addr]bool{}, last: cidr.Addr()}
}

// next returns the next address that nobody has. The reserved ones and the range's last, which is IPv4's broadcast
// address, are never given. It looks at no more addresses than are taken, however large the range is.
func (p *addressPool) next() (netip.Addr, error) {
	candidate := p.last
	for range len(p.used) + 1 {
		candidate = candidate.Next()
		if candidate.Less(p.first) || !p.cidr.Contains(candidate) || !p.cidr.Contains(candidate.Next()) {
			candidate = p.first
		}
		if !p.used[candidate] {
			return candidate, nil
		}
	}
	return netip.Addr{}, conflict("all addresses of this node's pod range %s are taken; delete endpoints or give the node a larger one in node.podCIDRs", p.cidr)
}

func (p *addressPool) take(a netip.Addr) { p.used[a], p.last = true, a }

// reserves tells whether an address of the range is one that no pod gets any more.
func (p *addressPool) reserves(a netip.Addr) bool { return p.cidr.Contains(a) && a.Less(p.first) }

// addressPools has a pool for each of a node's pod ranges, which are of different families; a pod gets an address of each.
type addressPools []*addressPool

// newAddressPools reserves the addresses at which the node itself is on the pods' side. Those are all in the first range; in the second
// one only the first two are left out, which many take for the network's own and its gateway.
func newAddressPools(cidrs []netip.Prefix) addressPools {
	var pools addressPools
	for i, cidr := range cidrs {
		reserved := 2
		if i == 0 {
			reserved = identity.ReservedPodAddresses
		}
		pools = append(pools, newAddressPool(cidr, reserved))
	}
	return pools
}

// next gives an endpoint an address of each range. They are free for others until take.
func (p addressPools) next(ep *identity.Endpoint) error {
	var addresses []netip.Addr
	for _, pool := range p {
		a, err := pool.next()
		if err != nil {
			return err
		}
		addresses = append(addresses, a)
	}
	slices.SortFunc(addresses, netip.Addr.Compare) // IPv4 before IPv6
	ep.Address, ep.Address6 = addresses[0], netip.Addr{}
	if len(addresses) > 1 {
		ep.Address6 = addresses[1]
	}
	return nil
}

func (p addressPools) take(addresses []netip.Addr) {
	for _, a := range addresses {
		if pool := p.of(a); pool != nil {
			pool.take(a)
		}
	}
}

func (p addressPools) give(addresses []netip.Addr) {
	for _, a := range addresses {
		if pool := p.of(a); pool != nil {
			delete(pool.used, a)
		}
	}
}

// of returns the pool whose range has the address, or nil.
func (p addressPools) of(a netip.Addr) *addressPool {
	for _, pool := range p {
		if pool.cidr.Contains(a) {
			return pool
		}
	}
	return nil
}
