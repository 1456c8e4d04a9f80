package xds

import (
	"cmp"
	"slices"
	"time"

	"causeway/lb"
)

// Rows are what resources are made of, as one node has them.
type Rows struct {
	// Self is the node's own cluster, for affinities.
	Self    string
	Routes  []lb.Route
	Targets []lb.Target
	// RTT is the round trip to each other cluster that is known, for the affinity nearest.
	RTT map[string]time.Duration
}

// locality is a cluster's part of a port's backends. Priorities count from 0 without a gap, as gRPC wants them.
type locality struct {
	cluster  string
	priority int
	weight   int
	targets  []lb.Target
}

// localities puts backends into an order of use: a client takes those of the first priority that has healthy ones.
func localities(rows *Rows, o lb.L7Options, targets []lb.Target) []locality {
	byCluster := map[string][]lb.Target{}
	for _, t := range targets {
		byCluster[t.Cluster] = append(byCluster[t.Cluster], t)
	}
	var out []locality
	for cluster, its := range byCluster {
		slices.SortFunc(its, func(a, b lb.Target) int {
			return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Number, b.Number))
		})
		out = append(out, locality{cluster: cluster, priority: rank(rows, o, cluster), weight: weight(o, cluster, its), targets: its})
	}
	slices.SortFunc(out, func(a, b locality) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.cluster, b.cluster))
	})
	next, last := -1, -1
	for i := range out {
		if i == 0 || out[i].priority != last {
			next, last = next+1, out[i].priority
		}
		out[i].priority = next
	}
	return out
}

// rank orders clusters; those of the same rank share the requests.
func rank(rows *Rows, o lb.L7Options, cluster string) int {
	own := cluster == rows.Self
	switch {
	case len(o.Weights) > 0:
		if named(o, cluster) > 0 {
			return 0
		}
		return 1
	case len(o.Failover) > 0:
		if i := slices.Index(o.Failover, cluster); i >= 0 {
			return i
		}
		return len(o.Failover)
	case o.Affinity == lb.AffinityLocal && !own, o.Affinity == lb.AffinityRemote && own:
		return 1
	case o.Affinity == lb.AffinityNearest && !own:
		return nearness(rows, cluster)
	}
	return 0
}

// nearness is how many clusters are nearer, the own one among them; those of which nothing is known are last.
func nearness(rows *Rows, cluster string) int {
	rtt, known := rows.RTT[cluster]
	if !known {
		return len(rows.RTT) + 1
	}
	nearer := 1
	for other, r := range rows.RTT {
		if other != cluster && (r < rtt || r == rtt && other < cluster) {
			nearer++
		}
	}
	return nearer
}

// weight of a cluster among those of its rank: as the service has it, else by its backends that may be used, so that each of them gets the same.
func weight(o lb.L7Options, cluster string, targets []lb.Target) int {
	if w := named(o, cluster); w > 0 {
		return w
	}
	n := 0
	for _, t := range targets {
		if !t.Quarantined {
			n++
		}
	}
	return max(n, 1)
}

func named(o lb.L7Options, cluster string) int {
	for _, w := range o.Weights {
		if w.Cluster == cluster {
			return w.Weight
		}
	}
	return 0
}
