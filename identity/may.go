package identity

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"causeway/lb"
)

// Channel is where entries come from, and what it may speak for: one cluster's store (or gossip)
// speaks for that cluster alone. Its methods return nil, or in a sentence why the entry is refused;
// the entries have been decoded, so each is well-formed by itself.
type Channel struct {
	Cluster string
	ID      ClusterID
	// PodCIDRs that the cluster announces; its nodes' must lie in them.
	PodCIDRs []netip.Prefix
	// Nodes accepted so far, of all clusters; nil if there are none yet.
	Nodes Nodes
}

// Nodes is what a Channel asks of the nodes that were accepted already.
type Nodes interface {
	// ByName returns the node of that name.
	ByName(NodeName) (Node, bool)
	// ByAddress returns the node with that underlay address.
	ByAddress(netip.Addr) (Node, bool)
	// ByKey returns the node that has the key, in whichever slot.
	ByKey(WireGuardKey) (Node, bool)
	// Overlapping returns the nodes that have a pod CIDR which overlaps p.
	Overlapping(p netip.Prefix) iter.Seq[Node]
}

// CheckCluster tells why the channel's store is not that of the cluster which was expected.
func (c Channel) CheckCluster(info ClusterInfo) error {
	return c.owns("cluster entry", info.Name, info.ID)
}

// CheckNode tells why the channel may not introduce this node: another cluster's, pod CIDRs that aren't its
// cluster's, an address within the cluster's pod CIDRs, or a name, address, tunnel key or pod CIDR that another machine has. Tunnel addresses lie in
// pod CIDRs, so those are nobody else's either.
func (c Channel) CheckNode(n Node) error {
	what := "node entry " + n.NodeName().String()
	if err := c.owns(what, n.Cluster, n.ClusterID); err != nil {
		return err
	}
	for _, p := range n.PodCIDRs {
		if !containsPrefix(c.PodCIDRs, p) {
			return fmt.Errorf("%s: pod CIDR %s is outside of cluster %s's %v", what, p, c.Cluster, c.PodCIDRs)
		}
	}
	if containsAddr(c.PodCIDRs, n.Address) {
		return fmt.Errorf("%s: address %s lies in the pod CIDRs of its cluster, %v", what, n.Address, c.PodCIDRs)
	}
	if c.Nodes == nil {
		return nil
	}
	if err := c.checkRivals(n); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// checkRivals looks for other nodes that have what n claims.
func (c Channel) checkRivals(n Node) error {
	if same, ok := c.Nodes.ByName(n.NodeName()); ok && same.Instance != n.Instance {
		return fmt.Errorf("the name belongs to another machine (address %s, instance %s; this one is %s, instance %s): give one of them another name",
			same.Address, same.Instance, n.Address, n.Instance)
	}
	if rival, ok := c.Nodes.ByAddress(n.Address); ok && rival.NodeName() != n.NodeName() {
		return fmt.Errorf("address %s is node %s's already", n.Address, rival.NodeName())
	}
	for _, k := range n.TunnelKeys {
		if rival, ok := c.Nodes.ByKey(k.Key); ok && rival.NodeName() != n.NodeName() {
			return fmt.Errorf("tunnel key %s is node %s's already; a node that was made from a copy of another's state directory needs an empty one", k.Key, rival.NodeName())
		}
	}
	for _, p := range n.PodCIDRs {
		for rival := range c.Nodes.Overlapping(p) {
			if rival.NodeName() != n.NodeName() {
				return fmt.Errorf("pod CIDR %s overlaps node %s's %v", p, rival.NodeName(), rival.PodCIDRs)
			}
		}
	}
	return nil
}

// CheckAddress tells why the channel may not say who is behind an address. The owner is the node that a.Node names, as accepted before.
func (c Channel) CheckAddress(a Address, owner Node) error {
	what := fmt.Sprintf("address entry %s", a.Prefix.Addr())
	if err := c.owns(what, a.Cluster, c.ID); err != nil {
		return err
	}
	if err := c.checkNumber(what, a.Identity); err != nil {
		return err
	}
	if a.ClusterID != c.ID {
		return fmt.Errorf("%s: cluster ID is %d, not %d", what, a.ClusterID, c.ID)
	}
	return checkOwner(what, a.Prefix.Addr(), a.Cluster, a.Node, owner)
}

// CheckIdentity tells why the channel may not give this number a meaning.
func (c Channel) CheckIdentity(i Identity) error {
	what := fmt.Sprintf("identity entry %d", uint32(i.Number))
	if err := c.owns(what, i.Cluster, c.ID); err != nil {
		return err
	}
	return c.checkNumber(what, i.Number)
}

// CheckService tells why the channel may not declare this service.
func (c Channel) CheckService(s lb.Service) error {
	return c.owns("service entry "+s.Name.String(), s.Cluster, ClusterID(s.ClusterID))
}

// CheckSlice tells why the channel may not offer these backends. The owner is the node that s.Node names, as accepted before; a slice that is the
// cluster's has none, and is judged by its backends' nodes: those that are not accepted yet are for the caller to leave out.
func (c Channel) CheckSlice(s lb.Slice, owner Node) error {
	what := fmt.Sprintf("slice entry %s/%s", s.Service, s.Slice)
	if err := c.owns(what, s.Cluster, ClusterID(s.ClusterID)); err != nil {
		return err
	}
	for _, b := range s.Backends {
		err := error(nil)
		if s.OfCluster() {
			err = c.checkBackend(what, b.Address, b.Node)
		} else {
			err = checkOwner(what, b.Address, s.Cluster, s.Node, owner)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkBackend holds a backend that its cluster, and no node, vouches for to what a node could have said: it is a pod's address of that cluster and, if it
// names a node, one of that node's. So a peer's service leads to nothing but the peer's own pods: not to another cluster's, nor to any machine that
// only this cluster can reach.
func (c Channel) checkBackend(what string, address netip.Addr, node string) error {
	if !containsAddr(c.PodCIDRs, address) {
		return fmt.Errorf("%s: address %s is outside of cluster %s's pod CIDRs %v: only its pods can be backends for other clusters", what, address, c.Cluster, c.PodCIDRs)
	}
	if node == "" || c.Nodes == nil {
		return nil
	}
	if owner, ok := c.Nodes.ByName(NodeName{c.Cluster, node}); ok {
		return checkOwner(what, address, c.Cluster, node, owner)
	}
	return nil
}

// CheckBackend tells why other clusters would refuse a slice of this cluster's that has the backend.
func (c Channel) CheckBackend(b lb.Backend) error {
	return c.checkBackend(fmt.Sprintf("slice %s", b.Slice), b.Address, b.Node)
}

// owns checks that an entry's cluster is the channel's, by name and by ID.
func (c Channel) owns(what, cluster string, id ClusterID) error {
	if cluster != c.Cluster {
		return fmt.Errorf("%s: it is of cluster %s, but came from cluster %s", what, cluster, c.Cluster)
	}
	if id != c.ID {
		return fmt.Errorf("%s: cluster %s has ID %d here, not %d", what, cluster, c.ID, id)
	}
	return nil
}

func (c Channel) checkNumber(what string, n Number) error {
	if n.Cluster() != c.ID {
		return fmt.Errorf("%s: identity %d belongs to cluster %d, not %d", what, uint32(n), n.Cluster(), c.ID)
	}
	return nil
}

// checkOwner checks that the owner is the node which an entry names, and may give out the address.
func checkOwner(what string, a netip.Addr, cluster, node string, owner Node) error {
	if want := (NodeName{cluster, node}); owner.NodeName() != want {
		return fmt.Errorf("%s: its node %s is not known", what, want)
	}
	if !containsAddr(owner.PodCIDRs, a) {
		return fmt.Errorf("%s: address %s is outside of node %s's pod CIDRs %v", what, a, owner.NodeName(), owner.PodCIDRs)
	}
	return nil
}

// NodeName returns the node's name in the mesh.
func (n *Node) NodeName() NodeName { return NodeName{n.Cluster, n.Name} }

// PodSides returns the node's own addresses on the pods' side: the second one of each of its pod ranges, which no pod gets. The
// first is PodSide; from all of them its L7 proxy connects.
func (n *Node) PodSides() (sides []netip.Addr) {
	for _, p := range n.PodCIDRs {
		if a := p.Masked().Addr().Next(); p.Contains(a) {
			sides = append(sides, a)
		}
	}
	return sides
}

// PodSide returns the address on the pods' side that the node itself answers echoes at: the second one of its first pod
// range, which is never given to a pod. It is invalid if the node has none.
func (n *Node) PodSide() netip.Addr {
	if len(n.PodCIDRs) == 0 {
		return netip.Addr{}
	}
	if a := n.PodCIDRs[0].Masked().Addr().Next(); n.PodCIDRs[0].Contains(a) {
		return a
	}
	return netip.Addr{}
}

// NodeList is a Nodes of a few: a slice.
type NodeList []Node

// ByName implements Nodes.
func (l NodeList) ByName(name NodeName) (Node, bool) {
	return l.find(func(n *Node) bool { return n.NodeName() == name })
}

// ByAddress implements Nodes.
func (l NodeList) ByAddress(a netip.Addr) (Node, bool) {
	return l.find(func(n *Node) bool { return n.Address == a })
}

// ByKey implements Nodes.
func (l NodeList) ByKey(key WireGuardKey) (Node, bool) {
	return l.find(func(n *Node) bool {
		return slices.ContainsFunc(n.TunnelKeys, func(k TunnelKey) bool { return k.Key == key })
	})
}

// Overlapping implements Nodes.
func (l NodeList) Overlapping(p netip.Prefix) iter.Seq[Node] {
	return func(yield func(Node) bool) {
		for _, n := range l {
			if slices.ContainsFunc(n.PodCIDRs, p.Overlaps) && !yield(n) {
				return
			}
		}
	}
}

func (l NodeList) find(match func(*Node) bool) (Node, bool) {
	for i := range l {
		if match(&l[i]) {
			return l[i], true
		}
	}
	return Node{}, false
}
