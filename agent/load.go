package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

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
	setDefault(&c.Encryption.Mode, identity.EncryptAll)
	setDefault(&c.Encryption.Kind, tunnel.KindAuto)
	setDefault(&c.Encryption.RotateEvery, "720h")
	setDefault(&c.Encryption.Keepalive, "0")
	setDefault(&c.Encryption.DeviceName, tunnel.DefaultWireGuardName)
	if len(c.Encryption.Ports) == 0 {
		c.Encryption.Ports = []uint16{tunnel.DefaultWireGuardPort, tunnel.DefaultWireGuardPort + 1}
	}
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
	if err := c.checkAddress(); err != nil {
		return err
	}
	if err := c.checkPodCIDRs(); err != nil {
		return err
	}
	if err := c.Encryption.check(); err != nil {
		return fmt.Errorf("encryption: %w", err)
	}
	if listen := c.Metrics.Listen; listen != "" {
		if _, err := netip.ParseAddrPort(listen); err != nil {
			return fmt.Errorf("metrics.listen %q: want an address and a port, like 127.0.0.1:9464", listen)
		}
	}
	if c.Kubernetes.InCluster && c.Kubernetes.Kubeconfig != "" {
		return errors.New("kubernetes: both inCluster and kubeconfig are given; remove one")
	}
	if c.Kubernetes.Context != "" && c.Kubernetes.Kubeconfig == "" {
		return errors.New("kubernetes.context is given without kubeconfig; give the file that has it")
	}
	if err := c.checkProxy(); err != nil {
		return err
	}
	if listen := c.XDS.Listen; listen != "" {
		if _, err := netip.ParseAddrPort(listen); err != nil {
			return fmt.Errorf("xds.listen %q: want an address and a port, like 172.29.1.11:7960", listen)
		}
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

// checkAddress wants an address, of either family, that is nobody's but the node's.
func (c *Config) checkAddress() error {
	if err := lb.CheckAddress(c.Node.Address); err != nil {
		return fmt.Errorf("node.address: %w; want this node's IPv4 or IPv6 address on the underlay", err)
	}
	for _, p := range slices.Concat(c.Cluster.PodCIDRs, c.Cluster.ServiceCIDRs) {
		if p.Contains(c.Node.Address) {
			return fmt.Errorf("node.address %s lies in the cluster's own range %s; want this node's address on the underlay", c.Node.Address, p)
		}
	}
	return nil
}

// checkPodCIDRs wants one range, or one of each family, in the cluster's.
func (c *Config) checkPodCIDRs() error {
	if len(c.Node.PodCIDRs) == 0 || len(c.Node.PodCIDRs) > 2 {
		return fmt.Errorf("node.podCIDRs: %d ranges, want one, or one of IPv4 and one of IPv6", len(c.Node.PodCIDRs))
	}
	for i, p := range c.Node.PodCIDRs {
		if !holds(c.Cluster.PodCIDRs, p) {
			return fmt.Errorf("node.podCIDRs %s: want a range within cluster.podCIDRs %v", p, c.Cluster.PodCIDRs)
		}
		if p != p.Masked() {
			return fmt.Errorf("node.podCIDRs %s: has host bits, write %s", p, p.Masked())
		}
		if size := p.Addr().BitLen() - p.Bits(); size < 3 {
			return fmt.Errorf("node.podCIDRs %s: too small, want 8 addresses or more", p)
		}
		if i == 1 && p.Addr().Is4() == c.Node.PodCIDRs[0].Addr().Is4() {
			return fmt.Errorf("node.podCIDRs %s and %s are of the same address family", c.Node.PodCIDRs[0], p)
		}
	}
	return nil
}

func (e EncryptionConfig) check() error {
	if _, err := identity.ParseEncryption(string(e.Mode)); err != nil {
		return err
	}
	switch e.Kind {
	case tunnel.KindAuto, tunnel.KindKernel, tunnel.KindUserspace:
	default:
		return fmt.Errorf("kind %q is not one of auto, kernel and userspace", e.Kind)
	}
	if len(e.Ports) != identity.TunnelSlots || e.Ports[0] == e.Ports[1] || e.Ports[0] == 0 || e.Ports[1] == 0 {
		return fmt.Errorf("ports %v: want %d different ones", e.Ports, identity.TunnelSlots)
	}
	if d, err := time.ParseDuration(e.Keepalive); err != nil || d != 0 && (d < time.Second || d > time.Hour) {
		return fmt.Errorf("keepalive %q: want 1s to 1h, or 0 for none", e.Keepalive)
	}
	every, err := time.ParseDuration(e.RotateEvery)
	if err != nil {
		return fmt.Errorf("rotateEvery %q is no duration, write one like 720h", e.RotateEvery)
	}
	if every != 0 && every < time.Minute {
		return fmt.Errorf("rotateEvery %s: want at least a minute, or 0 for never", every)
	}
	return nil
}

func (c *Config) checkProxy() error {
	if p := c.Proxy.AccessLog; !(p >= 0 && p <= 100) {
		return fmt.Errorf("proxy.accessLog %v: want a percentage from 0 to 100", p)
	}
	return proxySockets{c.proxyDir()}.check()
}

// proxyDir is where the proxy's sockets and its log are.
func (c *Config) proxyDir() string { return filepath.Join(c.StateDir, "proxy") }

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

// capabilities of agents of this version, for other clusters to require.
var capabilities = []string{"ipv4", capabilityIPv6, "vxlan", capabilityWireGuard}

const (
	// capabilityIPv6 is that of agents which carry IPv6 packets of pods, over either family, and translate services' IPv6 addresses.
	capabilityIPv6 = "ipv6"
	// capabilityWireGuard is that of agents which have keys, and send and take packets in WireGuard.
	capabilityWireGuard = "wireguard"
)

// requires are the capabilities that a cluster must have to be joined with this one: no more than this one makes use of, so that older
// clusters can be joined with those that are like them.
func (c *Config) requires() []string {
	all := []string{"ipv4", "vxlan"}
	used := slices.Concat(c.Cluster.PodCIDRs, c.Cluster.ServiceCIDRs, []netip.Prefix{host(c.Node.Address)})
	if slices.ContainsFunc(used, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		all = append(all, capabilityIPv6)
	}
	if c.Encryption.Mode.Covers(false) {
		all = append(all, capabilityWireGuard)
	}
	return all
}

// info is what the cluster says about itself.
func (c *Config) info() identity.ClusterInfo {
	return identity.ClusterInfo{
		Name: c.Cluster.Name, ID: c.Cluster.ID, PodCIDRs: c.Cluster.PodCIDRs, ServiceCIDRs: c.Cluster.ServiceCIDRs, Encryption: c.Encryption.Mode,
		Version: Version, Capabilities: capabilities,
	}
}
