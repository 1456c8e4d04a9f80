package agent

import "net/netip"

// addressPool gives out the addresses of a node's pod range. Not safe for concurrent use.
type addressPool struct {
	cidr netip.Prefix
	used map[netip.Addr]bool
	// last is the address taken last: one that was given back rests as long as possible, so that packets
	// still under way to its former owner find nobody.
	last netip.Addr
}

func newAddressPool(cidr netip.Prefix) *addressPool {
	cidr = cidr.Masked()
	return &addressPool{cidr: cidr, used: map[netip.Addr]bool{}, last: cidr.Addr()}
}

// next returns the next address that nobody has. The range's first two and its last are never given: the
// network's own, what many take for its gateway, and the broadcast address.
func (p *addressPool) next() (netip.Addr, error) {
	gateway := p.cidr.Addr().Next()
	candidate := p.last
	for range 1 << min(16, p.cidr.Addr().BitLen()-p.cidr.Bits()) {
		candidate = candidate.Next()
		if !p.cidr.Contains(candidate) || !p.cidr.Contains(candidate.Next()) {
			candidate = gateway
		}
		if !p.used[candidate] && candidate != gateway {
			return candidate, nil
		}
	}
	return netip.Addr{}, conflict("all addresses of this node's pod range %s are taken; delete endpoints or give the node a larger node.podCIDR", p.cidr)
}

func (p *addressPool) take(a netip.Addr) { p.used[a], p.last = true, a }

func (p *addressPool) give(a netip.Addr) { delete(p.used, a) }
