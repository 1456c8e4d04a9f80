package lb

import (
	"net/netip"
	"slices"
)

// Parts distributes backends over slices of at most MaxSliceBackends, numbered from 0, and returns the number of each address's. One that was in a
// slice stays there; others fill the first ones that have room, in the order of the addresses, so that one that comes or goes moves no other.
func Parts(addresses []netip.Addr, was func(netip.Addr) (part int, ok bool)) []int {
	parts := make([]int, len(addresses))
	var held []int // by part
	var fresh []int
	for i, a := range addresses {
		part, ok := was(a)
		if !ok {
			fresh = append(fresh, i)
			continue
		}
		for len(held) <= part {
			held = append(held, 0)
		}
		held[part]++
		parts[i] = part
	}
	slices.SortFunc(fresh, func(i, j int) int { return addresses[i].Compare(addresses[j]) })
	part := 0
	for _, i := range fresh {
		for part < len(held) && held[part] >= MaxSliceBackends {
			part++
		}
		if part == len(held) {
			held = append(held, 0)
		}
		held[part]++
		parts[i] = part
	}
	return parts
}
