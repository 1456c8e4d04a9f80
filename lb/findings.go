package lb

import (
	"fmt"
	"iter"
	"slices"
	"strings"
)

// NoHealthyBackend says in a sentence that no cluster has a backend for a global service that clients of the own cluster would get a new connection to; "" if one has, or if
// there is nothing to connect to: the own cluster does not declare the service as global, or it has no ports. It looks at targets, which are the service's, until one is healthy.
func NoHealthyBackend(view ServiceView, targets iter.Seq[Target]) string {
	local := view.local()
	if local == nil || !local.Global || len(local.Ports) == 0 {
		return ""
	}
	for t := range targets {
		if !t.Terminating && !t.Quarantined {
			return ""
		}
	}
	var clusters []string
	for _, s := range byID(view.takingPart()) {
		if s.Cluster == view.Self || s.Shared {
			clusters = append(clusters, s.Cluster)
		}
	}
	if len(clusters) == 1 {
		return fmt.Sprintf("cluster %s has no healthy backend, and no other cluster shares any", clusters[0])
	}
	return fmt.Sprintf("none of the clusters %s has a healthy backend", strings.Join(clusters, ", "))
}

// Conflicts says, one sentence each, in what the clusters' declarations of a global service contradict each other, so that part of it does not work as its authors mean: ports
// of one name with different protocols or numbers, a port without a name that has different numbers, and numbers that are different ports'. What
// each cluster may say for its own clients, as affinity is, is no conflict. There are none unless the own cluster declares the service as global.
func Conflicts(view ServiceView) []string {
	local := view.local()
	if local == nil || !local.Global {
		return nil
	}
	declared := byID(view.takingPart())
	var conflicts []string
	type declaration struct {
		cluster string
		port    ServicePort
	}
	first := map[string]declaration{}
	for _, s := range declared {
		for _, p := range s.Ports {
			if p.Name == "" && len(s.Ports) > 1 {
				continue // its number is its name
			}
			before, known := first[p.Name]
			switch {
			case !known:
				first[p.Name] = declaration{s.Cluster, p}
			case before.cluster != s.Cluster && (before.port.Protocol != p.Protocol || before.port.Port != p.Port):
				conflicts = append(conflicts, fmt.Sprintf("%s is %d/%s in cluster %s and %d/%s in cluster %s%s", portTitle(p),
					before.port.Port, before.port.Protocol, before.cluster, p.Port, p.Protocol, s.Cluster, unmerged(before.port, p)))
			}
		}
	}
	_, refused := Frontends(view, nil)
	for _, r := range refused {
		if slices.ContainsFunc(declared, func(s *Service) bool { return slices.Contains(s.ClusterIPs, r.Address) }) {
			conflicts = append(conflicts, fmt.Sprintf("port %s has no frontend: %s", r.Target.Port, r.Reason))
		}
	}
	return conflicts
}

// takingPart are the declarations that make up the service in the own cluster.
func (v ServiceView) takingPart() []*Service {
	var declared []*Service
	for i := range v.Declared {
		if v.merged(&v.Declared[i]) {
			declared = append(declared, &v.Declared[i])
		}
	}
	return declared
}

func portTitle(p ServicePort) string {
	if p.Name == "" {
		return "the port without a name"
	}
	return "port " + p.Name
}

// unmerged says what comes of two ports not being one to Targets.
func unmerged(a, b ServicePort) string {
	if a.Protocol != b.Protocol || a.Name == "" {
		return ", so neither has the other's backends"
	}
	return ""
}
