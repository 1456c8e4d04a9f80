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
	// Node is the agent's node, and NodeAddresses are those that it has on the underlay: node ports are answered there.
	Node          string
	NodeAddresses []netip.Addr
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

// affinity is the local declaration's: who calls decides, as "local" is where the caller is.
func (v ServiceView) affinity() Affinity {
	if local := v.local(); local != nil {
		return l4Affinity(local.Affinity)
	}
	return AffinityNone
}

// internalLocal tells whether clients of this node get backends of this node alone. It is the local declaration's: what another cluster says of its
// nodes would leave clients here without any backend.
func (v ServiceView) internalLocal() bool {
	local := v.local()
	return local != nil && local.InternalLocal
}

// sessionAffinity is that of the governing declaration, in seconds: other than an affinity to clusters it says the same everywhere.
func (v ServiceView) sessionAffinity() uint32 {
	if s := v.governing(); s != nil {
		return s.SessionAffinity
	}
	return 0
}

// nodeLocal tells whether a backend is one of those that node-local ports lead to, if there are such ports.
func (v ServiceView) nodeLocal(b Backend) bool {
	local := v.local()
	return b.Cluster == v.Self && b.Node == v.Node && b.Node != "" && local != nil && (local.InternalLocal || local.ExternalLocal)
}

// Targets returns what one backend adds to the service, for frontends of its address's family: a target for each port that it
// listens on and that its own cluster's declaration has; none if this cluster's nodes may not use it. One that is on this node is a target of the
// node-local port besides, if the own declaration has such. A target is quarantined if the backend's node is down, or, as long as there are better
// ones, if it is terminating: neither is known here. It costs the same however many backends there are.
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
		target := Target{
			TargetKey:   TargetKey{Port: portKey(owner.Name, owner.Ports[i], b.Address), Address: b.Address, Number: listen.Port},
			Cluster:     b.Cluster,
			ClusterID:   b.ClusterID,
			Node:        b.Node,
			Local:       own,
			Terminating: b.Terminating,
		}
		targets = append(targets, target)
		if view.nodeLocal(b) {
			target.Port.NodeLocal = true
			targets = append(targets, target)
		}
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
// declare has the number that the lowest cluster ID gives it. Each leads to backends of its IP's family, and to those on this node alone if the own
// declaration wants that of internal traffic. Node ports and external IPs are the own declaration's alone; see publish. A headless
// declaration has nothing to connect to. Refused are remote IPs that guard objects to (nil objects to none), unless the local declaration has the
// same IP, and numbers that the service itself uses twice. Several services may still claim the same frontend: Elect decides.
func Frontends(view ServiceView, guard Guard) ([]Frontend, []Refusal) {
	declared := view.takingPart()
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
		if owner.Cluster == view.Self && !owner.Headless {
			c.publish(owner)
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
			key.NodeLocal = c.view.internalLocal()
			f := c.frontend(owner, FrontendKey{Address: ip, Port: p.Port, Protocol: p.Protocol}, key)
			f.L7 = c.l7 && p.Protocol == TCP
			c.add(f, reason)
		}
	}
	add(owner)
	for _, s := range byID(declared) {
		add(s)
	}
}

// publish adds what the own declaration says of clients outside of the cluster: its node ports at this node's addresses and its ports at external
// IPs, of the families that it has cluster IPs of. Each is two frontends. Sockets of processes on the node are clients within the
// cluster, as in Kubernetes, whatever is said of those outside: all backends serve them. L7 concerns cluster IPs alone.
func (c *claims) publish(own *Service) {
	families := own.families()
	add := func(ip netip.Addr, port uint16, p ServicePort, reason string) {
		inside := c.frontend(own, FrontendKey{Address: ip, Port: port, Protocol: p.Protocol}, portKey(own.Name, p, ip))
		outside := inside
		outside.Outside, outside.Target.NodeLocal = true, own.ExternalLocal
		c.add(inside, reason)
		c.add(outside, reason)
	}
	for _, p := range own.Ports {
		for _, ip := range c.view.NodeAddresses {
			if p.NodePort != 0 && slices.Contains(families, FamilyOf(ip)) {
				add(ip, p.NodePort, p, "")
			}
		}
		for _, ip := range own.ExternalIPs {
			reason := ""
			if !slices.Contains(families, FamilyOf(ip)) {
				reason = fmt.Sprintf("external IP %s: the service has no %s cluster IP, so it has no backends of that family; add the family to its ipFamilies", ip, FamilyOf(ip))
			}
			add(ip, p.Port, p, reason)
		}
	}
}

// frontend returns what leads to a port, as the service's attributes are.
func (c *claims) frontend(owner *Service, key FrontendKey, target PortKey) Frontend {
	return Frontend{
		FrontendKey: key, Target: target, Cluster: owner.Cluster, ClusterID: owner.ClusterID,
		Affinity: c.view.affinity(), SessionAffinity: c.view.sessionAffinity(),
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
	s := netip.AddrPortFrom(k.Address, k.Port).String() + "/" + string(k.Protocol)
	if k.Outside {
		s += "/outside"
	}
	return s
}
