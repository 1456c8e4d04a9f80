package balance

import (
	"github.com/cespare/xxhash/v2"
)

// Sizes of Maglev's table: primes, of at least about a hundred entries an endpoint, so that shares are within a few percent.
var maglevSizes = []int{1021, 16381, 65537, 655373}

// maglev makes the lookup table of "Maglev: A Fast and Reliable Software Network Load Balancer" (Eisenbud et al., NSDI 2016), section 3.4: every endpoint
// fills entries in an order of its own, in turns. Each node makes the same one of the same endpoints. Weights decide how often an endpoint has a turn.
func maglev(endpoints []*Endpoint, weights []float64) []uint16 {
	if len(endpoints) == 0 {
		return nil
	}
	size := maglevSizes[0]
	for _, s := range maglevSizes {
		if size = s; size >= 100*len(endpoints) {
			break
		}
	}
	most := 0.0
	for _, w := range weights {
		most = max(most, w)
	}
	type walk struct{ at, skip uint64 }
	walks := make([]walk, len(endpoints))
	for i, e := range endpoints {
		name := e.address.String()
		walks[i] = walk{xxhash.Sum64String(name) % uint64(size), xxhash.Sum64String("skip "+name)%uint64(size-1) + 1}
	}
	const free = maxEndpoints
	table := make([]uint16, size)
	for i := range table {
		table[i] = free
	}
	credit := make([]float64, len(endpoints))
	for filled := 0; ; {
		for i := range walks {
			if credit[i] += weights[i] / most; credit[i] < 1 {
				continue
			}
			credit[i]--
			for table[walks[i].at] != free {
				walks[i].at = (walks[i].at + walks[i].skip) % uint64(size)
			}
			table[walks[i].at] = uint16(i)
			if filled++; filled == size {
				return table
			}
		}
	}
}
