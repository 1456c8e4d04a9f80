package agent

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"

	"causeway/agent/api"
	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/lb"
	"causeway/tunnel"
)

// LoadConfig reads and checks an agent's configuration; what is unknown in it is refused.
func LoadConfig(path string) (Config, error) {
	var cfg Config
	data, err := os.ReadFile(path)
	if err != nil {
		return cfg, err
	}
	if err := yaml.UnmarshalStrict(data, &cfg); err != nil {
		return cfg, fmt.Errorf("%s: %w", path, err)
	}
	cfg.setDefaults()
	if err := cfg.check(); err != nil {
		return cfg, fmt.Errorf("%s: %w", path, err)
	}
	return cfg, nil
}

func (c *Config) setDefaults() {
	setDefault(&c.Socket, api.DefaultSocket)
	setDefault(&c.StateDir, "/var/lib/causeway")
	setDefault(&c.BPFFS, "/sys/fs/bpf/causeway")
	setDefault(&c.LogLevel, "info")
	setDefault(&c.Node.VXLANPort, tunnel.DefaultPort)
	setDefault(&c.Gossip.Mesh, "causeway")
	setDefault(&c.Gossip.Port, 7956)
	setDefault(&c.Gossip.MeshPort, 7957)
	setDefault(&c.Gossip.KeyFile, filepath.Join(c.StateDir, "gossip.keys"))
	setDefault(&c.Peering.Port, peering.DefaultPort)
	setDefault(&c.Peering.Quota, 250_000)
	if len(c.Peering.StoreEndpoints) == 0 {
		c.Peering.StoreEndpoints = c.KVStore.Endpoints
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// check refuses what cannot work, before anything is touched.
func (c *Config) check() error {
	info := c.info()
	if info.ID == 0 {
		info.ID = 1 // it is found later
	}
	if err := identity.CheckCluster(info); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if err := lb.CheckName("node.name", c.Node.Name); err != nil {
		return err
	}
	if !c.Node.Address.Is4() {
		return fmt.Errorf("node.address %q: want this node's IPv4 address on the underlay", c.Node.Address)
	}
	if !holds(c.Cluster.PodCIDRs, c.Node.PodCIDR) {
		return fmt.Errorf("node.podCIDR %s: want a range within cluster.podCIDRs %v", c.Node.PodCIDR, c.Cluster.PodCIDRs)
	}
	if bits := c.Node.PodCIDR.Bits(); bits > 29 {
		return fmt.Errorf("node.podCIDR %s: too small, want /29 or larger", c.Node.PodCIDR)
	}
	if err := c.KVStore.check(); err != nil {
		return fmt.Errorf("kvstore: %w", err)
	}
	if err := c.Gossip.check(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	if err := c.Peering.check(); err != nil {
		return fmt.Errorf("peering: %w", err)
	}
	return nil
}

func (g GossipConfig) check() error {
	if err := lb.CheckName("mesh", g.Mesh); err != nil {
		return err
	}
	if g.Port == g.MeshPort {
		return fmt.Errorf("port and meshPort are both %d; each pool needs one of its own", g.Port)
	}
	return nil
}

func (p PeeringConfig) check() error {
	for _, endpoint := range p.Endpoints {
		if _, _, err := net.SplitHostPort(endpoint); err != nil {
			return fmt.Errorf("endpoints: %q: %w; want host:port", endpoint, err)
		}
	}
	if p.Quota < 1000 {
		return fmt.Errorf("quota %d: at least 1000 entries are needed for a small cluster", p.Quota)
	}
	return nil
}

func (k KVStoreConfig) check() error {
	if len(k.Endpoints) == 0 {
		return fmt.Errorf("endpoints are missing, want at least one like https://192.0.2.1:2379")
	}
	for what, path := range map[string]string{"caFile": k.CAFile, "certFile": k.CertFile, "keyFile": k.KeyFile} {
		if path == "" {
			return fmt.Errorf("%s is missing: etcd is only spoken to with certificates on both sides", what)
		}
	}
	return nil
}

func holds(ranges []netip.Prefix, p netip.Prefix) bool {
	for _, r := range ranges {
		if p.IsValid() && r.Contains(p.Addr()) && r.Bits() <= p.Bits() {
			return true
		}
	}
	return false
}

// capabilities of agents of this version, all of which a cluster needs to be joined with another.
var capabilities = []string{"ipv4", "vxlan"}

// info is what the cluster says about itself.
func (c *Config) info() identity.ClusterInfo {
	return identity.ClusterInfo{
		Name: c.Cluster.Name, ID: c.Cluster.ID, PodCIDRs: c.Cluster.PodCIDRs, ServiceCIDR: c.Cluster.ServiceCIDR,
		Version: Version, Capabilities: capabilities,
	}
}
