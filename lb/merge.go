package lb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// ServiceView is one service as an agent sees it: what every cluster declares under the same namespace and name.
type ServiceView struct {
	// Self and SelfID are the agent's own cluster.
	Self   string
	SelfID uint8
	// Declared by each cluster, at most once, in any order.
	Declared []Service
}

// Guard tells why an address must not be a service's of the given cluster, like "it is node east/node1's"; "" if it may.
type Guard func(cluster string, address netip.Addr) (reason string)

// Refusal is a frontend that is not programmed, and why.
type Refusal struct {
	Frontend
	Reason string `json:"reason"`
}

// local returns the own cluster's declaration, or nil.
func (v ServiceView) local() *Service { return v.of(v.Self) }

func (v ServiceView) of(cluster string) *Service {
	for i := range v.Declared {
		if v.Declared[i].Cluster == cluster {
			return &v.Declared[i]
		}
	}
	return nil
}

// merged tells whether s takes part in the service on this cluster's nodes. A service that isn't
// global is its cluster's alone: a local one shuts the others out, a remote one stays out.
func (v ServiceView) merged(s *Service) bool {
	if s.Cluster == v.Self {
		return true
	}
	local := v.local()
	return s.Global && (local == nil || local.Global)
}

// affinity is the local declaration's: who calls decides.
func (v ServiceView) affinity() Affinity {
	if local := v.local(); local != nil {
		return l4Affinity(local.Affinity)
	}
	return AffinityNone
}

// Targets returns what one backend adds to the service, for frontends of its address's family: a target for each port that it
// listens on and that its own cluster's declaration has; none if this cluster's nodes may not use it. It costs the same however many
// backends there are.
func Targets(view ServiceView, b Backend) []Target {
	owner := view.of(b.Cluster)
	if owner == nil || owner.Name != b.Service || !view.merged(owner) {
		return nil
	}
	own := b.Cluster == view.Self
	if !own && !owner.Shared {
		return nil
	}
	targets := make([]Target, 0, len(b.Ports))
	for _, listen := range b.Ports {
		i := slices.IndexFunc(owner.Ports, func(p ServicePort) bool { return p.Name == listen.Name && p.Protocol == listen.Protocol })
		if i < 0 {
			continue
		}
		targets = append(targets, Target{
			TargetKey: TargetKey{Port: portKey(owner.Name, owner.Ports[i], b.Address), Address: b.Address, Number: listen.Port},
			Cluster:   b.Cluster,
			ClusterID: b.ClusterID,
			Node:      b.Node,
			Local:     own,
		})
	}
	return targets
}

// portKey names a port across clusters, at addresses of a's family: by its name, or by its number if it has none.
func portKey(service Name, p ServicePort, a netip.Addr) PortKey {
	return PortKey{Service: service, Port: p.key(), Protocol: p.Protocol, Family: FamilyOf(a)}
}

func (p ServicePort) key() string {
	if p.Name == "" {
		return strconv.Itoa(int(p.Port))
	}
	return p.Name
}

// Frontends returns what clients of this cluster may connect to for this service: each cluster IP of every cluster
// that takes part, with each port that any of them declares. A port that the IP's own cluster doesn't
// declare has the number that the lowest cluster ID gives it. Each leads to backends of its IP's family. Refused are remote IPs that guard
// objects to (nil objects to none), unless the local declaration has the same IP, and numbers that the service itself uses twice. Several
// services may still claim the same frontend: Elect decides.
func Frontends(view ServiceView, guard Guard) ([]Frontend, []Refusal) {
	var declared []*Service
	for i := range view.Declared {
		if view.merged(&view.Declared[i]) {
			declared = append(declared, &view.Declared[i])
		}
	}
	slices.SortFunc(declared, func(a, b *Service) int {
		return compareOwners(view.Self, a.ClusterID, a.Cluster, b.ClusterID, b.Cluster)
	})

	_, l7, _ := view.L7()
	c := claims{view: view, l7: l7, byKey: map[FrontendKey]Frontend{}}
	for _, owner := range declared {
		for _, ip := range owner.ClusterIPs {
			reason := ""
			if guard != nil && owner.Cluster != view.Self && !view.declaresHere(ip) {
				reason = guard(owner.Cluster, ip)
			}
			if reason != "" {
				reason = fmt.Sprintf("cluster IP %s: %s", ip, reason)
			}
			c.claim(owner, ip, declared, reason)
		}
	}
	return c.accepted, c.refused
}

// declaresHere tells whether the own cluster gives the service that cluster IP.
func (v ServiceView) declaresHere(ip netip.Addr) bool {
	local := v.local()
	return local != nil && slices.Contains(local.ClusterIPs, ip)
}

// claims collects the frontends of one service.
type claims struct {
	view     ServiceView
	l7       bool // the service is balanced at L7, as far as it is TCP
	byKey    map[FrontendKey]Frontend
	accepted []Frontend
	refused  []Refusal
}

// claim adds a cluster IP with the ports of its owner, then with those that only others declare.
func (c *claims) claim(owner *Service, ip netip.Addr, declared []*Service, reason string) {
	done := map[PortKey]bool{}
	add := func(s *Service) {
		for _, p := range s.Ports {
			key := portKey(s.Name, p, ip)
			if done[key] {
				continue
			}
			done[key] = true
			c.add(Frontend{
				FrontendKey: FrontendKey{Address: ip, Port: p.Port, Protocol: p.Protocol},
				Target:      key,
				Cluster:     owner.Cluster,
				ClusterID:   owner.ClusterID,
				Affinity:    c.view.affinity(),
				L7:          c.l7 && p.Protocol == TCP,
			}, reason)
		}
	}
	add(owner)
	for _, s := range byID(declared) {
		add(s)
	}
}

func (c *claims) add(f Frontend, reason string) {
	if reason != "" {
		c.refused = append(c.refused, Refusal{f, reason})
		return
	}
	before, taken := c.byKey[f.FrontendKey]
	switch {
	case !taken:
		c.byKey[f.FrontendKey] = f
		c.accepted = append(c.accepted, f)
	case before.Target != f.Target:
		c.refused = append(c.refused, Refusal{f, fmt.Sprintf("%s leads to port %s of the same service already, as cluster %s declares it", f.FrontendKey, before.Target.Port, before.Cluster)})
	}
}

// byID returns the declarations by cluster ID, which every cluster orders the same.
func byID(declared []*Service) []*Service {
	sorted := slices.Clone(declared)
	slices.SortFunc(sorted, func(a, b *Service) int {
		return cmp.Or(cmp.Compare(a.ClusterID, b.ClusterID), cmp.Compare(a.Cluster, b.Cluster))
	})
	return sorted
}

// Elect decides between the frontends, of one key, that several services claim: the local cluster's
// is first, then the lowest cluster ID's, then the first by name. It panics without claims.
func Elect(self string, claims []Frontend) (Frontend, []Refusal) {
	sorted := slices.Clone(claims)
	slices.SortFunc(sorted, func(a, b Frontend) int { return compareFrontends(self, a, b) })
	winner := sorted[0]
	var refused []Refusal
	for _, f := range sorted[1:] {
		refused = append(refused, lost(f, winner))
	}
	return winner, refused
}

func lost(f, winner Frontend) Refusal {
	return Refusal{f, fmt.Sprintf("%s is taken by service %s of cluster %s", f.FrontendKey, winner.Target.Service, winner.Cluster)}
}

func compareFrontends(self string, a, b Frontend) int {
	return cmp.Or(
		compareOwners(self, a.ClusterID, a.Cluster, b.ClusterID, b.Cluster),
		cmp.Compare(a.Target.Service.Namespace, b.Target.Service.Namespace),
		cmp.Compare(a.Target.Service.Name, b.Target.Service.Name),
		cmp.Compare(a.Target.Port, b.Target.Port),
	)
}

// compareOwners orders clusters by who wins a frontend: self, then by ID.
func compareOwners(self string, aID uint8, a string, bID uint8, b string) int {
	switch {
	case a == b:
		return 0
	case a == self:
		return -1
	case b == self:
		return 1
	}
	return cmp.Or(cmp.Compare(aID, bID), cmp.Compare(a, b))
}

func (k FrontendKey) String() string {
	return netip.AddrPortFrom(k.Address, k.Port).String() + "/" + string(k.Protocol)
}
