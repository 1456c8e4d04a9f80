package clustermesh

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"causeway/identity"
)

// Claims knows which cluster holds which ID and pod ranges, over all channels: the first to claim
// holds, and this agent's own cluster always was first. Safe for concurrent use.
type Claims struct {
	self     identity.ClusterInfo
	mu       sync.Mutex
	clusters map[string]identity.ClusterInfo
	changes  int
}

// NewClaims returns claims that this agent's own cluster holds.
func NewClaims(self identity.ClusterInfo) *Claims {
	return &Claims{self: self, clusters: map[string]identity.ClusterInfo{self.Name: self}}
}

// Claim lets a cluster have what it announces, or says which other cluster has it already. A cluster that encrypts what goes between clusters, while this
// one does not, or the other way round, gets nothing: the one would send in the clear what the other wants encrypted.
func (c *Claims) Claim(info identity.ClusterInfo) error {
	if ours, theirs := c.self.EncryptionMode(), info.EncryptionMode(); info.Name != c.self.Name && ours.Covers(false) != theirs.Covers(false) {
		return fmt.Errorf("cluster %s: its encryption.mode is %s and that of cluster %s is %s; give both all or inter-cluster, or both off", info.Name, theirs, c.self.Name, ours)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, other := range c.clusters {
		if name == info.Name {
			continue
		}
		if other.ID == info.ID {
			return fmt.Errorf("cluster %s: ID %d is cluster %s's; give one of them another ID", info.Name, info.ID, name)
		}
		if a, b, ok := overlap(info.PodCIDRs, other.PodCIDRs); ok {
			return fmt.Errorf("cluster %s: pod range %s overlaps %s of cluster %s; give one of them another range", info.Name, a, b, name)
		}
	}
	c.clusters[info.Name] = info
	c.changes++
	return nil
}

// Release gives up what a cluster holds that is followed no more.
func (c *Claims) Release(cluster string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.clusters[cluster]; ok {
		delete(c.clusters, cluster)
		c.changes++
	}
}

// Changes counts what was claimed and released, so that who was refused knows when it is worth asking again.
func (c *Claims) Changes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changes
}

// Foreign returns the pod or service range of another cluster that holds an address, and whose it is.
func (c *Claims) Foreign(cluster string, ip netip.Addr) (other string, prefix netip.Prefix, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, info := range c.clusters {
		if name == cluster {
			continue
		}
		for _, p := range slices.Concat(info.PodCIDRs, info.ServiceCIDRs) {
			if p.Contains(ip) {
				return name, p, true
			}
		}
	}
	return "", netip.Prefix{}, false
}

// Own tells whether an address lies in the cluster's own service range.
func (c *Claims) Own(cluster string, ip netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, ok := c.clusters[cluster]
	return ok && slices.ContainsFunc(info.ServiceCIDRs, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// Ranges returns every pod and service range that any cluster announces: addresses there are of the
// mesh, and of nobody else.
func (c *Claims) Ranges() []netip.Prefix {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []netip.Prefix
	for _, info := range c.clusters {
		out = append(out, info.PodCIDRs...)
		out = append(out, info.ServiceCIDRs...)
	}
	return out
}

// PodRange returns the pod range that holds an address, and whose it is.
func (c *Claims) PodRange(ip netip.Addr) (cluster string, prefix netip.Prefix, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, info := range c.clusters {
		for _, p := range info.PodCIDRs {
			if p.Contains(ip) {
				return name, p, true
			}
		}
	}
	return "", netip.Prefix{}, false
}

func overlap(a, b []netip.Prefix) (netip.Prefix, netip.Prefix, bool) {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return x, y, true
			}
		}
	}
	return netip.Prefix{}, netip.Prefix{}, false
}
