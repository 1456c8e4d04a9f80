package balance

import (
	"slices"
	"time"

	"causeway/lb"
)

// overprovisioned is how much more than its part each endpoint is trusted to take: a level with 72 % of its endpoints well still gets all of its requests.
// The number, and the way in which what is missing spills over to the next level, are Envoy's ("Priority levels" in its load balancing documentation).
const overprovisioned = 1.4

// leastStart is the part of its share that an endpoint begins with.
const leastStart = 0.1

// sharesOf returns each endpoint's part of the requests, not normalized, and whether some will have more later.
func sharesOf(o *lb.L7Options, all []*Endpoint, own string, near []string, now time.Time) (shares []float64, starting bool) {
	shares = make([]float64, len(all))
	var loads []group
	if len(o.Weights) > 0 {
		loads = weighted(o, all)
	} else {
		loads = spill(levels(o, all, own, near))
	}
	given := false
	for _, g := range loads {
		if g.load <= 0 {
			continue
		}
		given = true
		sum := 0.0
		for _, i := range g.members {
			if all[i].healthy() {
				s, more := all[i].started(o.SlowStart, now)
				shares[i] = s
				starting = starting || more
				sum += s
			}
		}
		for _, i := range g.members {
			shares[i] *= g.load / sum
		}
	}
	if !given {
		// Nobody is well, or so it seems: a request that may fail is better than one that can't succeed.
		for i := range shares {
			shares[i] = 1
		}
	}
	return shares, starting
}

// group is some endpoints and what they get of all requests, together.
type group struct {
	members []int
	well    int
	weight  float64
	load    float64
}

func (g *group) add(i int, e *Endpoint) {
	g.members = append(g.members, i)
	if e.healthy() {
		g.well++
	}
}

// able is the part of its requests that the group can take, at most all.
func (g *group) able() float64 {
	if len(g.members) == 0 {
		return 0
	}
	return min(1, overprovisioned*float64(g.well)/float64(len(g.members)))
}

// spill gives each level what it can take of what those before it have left.
func spill(levels []group) []group {
	left, given := 1.0, 0.0
	for i := range levels {
		levels[i].load = min(left, levels[i].able())
		left -= levels[i].load
		given += levels[i].load
	}
	if given > 0 {
		for i := range levels {
			levels[i].load /= given
		}
	}
	return levels
}

// levels sorts endpoints by how much their clusters are preferred.
func levels(o *lb.L7Options, all []*Endpoint, own string, near []string) []group {
	order := func(*lb.Target) int { return 0 }
	switch {
	case len(o.Failover) > 0:
		order = func(t *lb.Target) int { return indexOf(o.Failover, t.Cluster) }
	case o.Affinity == lb.AffinityLocal:
		order = func(t *lb.Target) int { return indexOf([]string{own}, t.Cluster) }
	case o.Affinity == lb.AffinityRemote:
		order = func(t *lb.Target) int { return 1 - indexOf([]string{own}, t.Cluster) }
	case o.Affinity == lb.AffinityNearest:
		order = func(t *lb.Target) int { return indexOf(near, t.Cluster) }
	}
	var list []group
	for i, e := range all {
		at := order(e.row.Load())
		for len(list) <= at {
			list = append(list, group{})
		}
		list[at].add(i, e)
	}
	return list
}

// indexOf returns len(list) for what is not in it.
func indexOf(list []string, s string) int {
	if i := slices.Index(list, s); i >= 0 {
		return i
	}
	return len(list)
}

// weighted gives clusters their weights, each as far as it is able; what it can't take goes to the others by theirs. Those without a weight are for the case that
// no cluster with one has anybody who is well.
func weighted(o *lb.L7Options, all []*Endpoint) []group {
	groups := make([]group, len(o.Weights)+1)
	for i, w := range o.Weights {
		groups[i].weight = float64(w.Weight)
	}
	rest := len(o.Weights)
	for i, e := range all {
		at := slices.IndexFunc(o.Weights, func(w lb.ClusterWeight) bool { return w.Cluster == e.row.Load().Cluster && w.Weight > 0 })
		if at < 0 {
			at = rest
		}
		groups[at].add(i, e)
	}
	sum := 0.0
	for i := range groups {
		groups[i].load = groups[i].weight * groups[i].able()
		sum += groups[i].load
	}
	if sum == 0 {
		groups[rest].load = groups[rest].able()
		sum = groups[rest].load
	}
	if sum > 0 {
		for i := range groups {
			groups[i].load /= sum
		}
	}
	return groups
}

// nearer is how much shorter a cluster's round trip has to be to come before one that it was behind, so that jitter moves no traffic.
const nearer = 0.8

// nearest orders clusters by their round trips, beginning from the order that was; unknown ones are last.
func nearest(was, clusters []string, trips map[string]held[time.Duration]) []string {
	trip := func(c string) float64 {
		if t := trips[c].it; t > 0 {
			return float64(t)
		}
		return float64(time.Hour)
	}
	var order []string
	for _, c := range slices.Concat(was, clusters) {
		if slices.Contains(clusters, c) && !slices.Contains(order, c) {
			order = append(order, c)
		}
	}
	// Insertion, since "clearly nearer" is no order that could be sorted by.
	for i := range order {
		for k := i; k > 0; k-- {
			known := slices.Contains(was, order[k]) && slices.Contains(was, order[k-1])
			if a, b := trip(order[k]), trip(order[k-1]); a < b*nearer || !known && a < b {
				order[k], order[k-1] = order[k-1], order[k]
			}
		}
	}
	return order
}

func clustersOf(all []*Endpoint) []string {
	var list []string
	for _, e := range all {
		if c := e.row.Load().Cluster; !slices.Contains(list, c) {
			list = append(list, c)
		}
	}
	slices.Sort(list)
	return list
}
