// Package agent is the node agent: the one visible place where everything is
// wired together. agent.go reads from top to bottom as the wiring.
package agent

import (
	"net/netip"

	"causeway/identity"
)

// Config of an agent, read from YAML by "clustermesh agent --config FILE".
type Config struct {
	Cluster ClusterConfig `json:"cluster"`
	Node    NodeConfig    `json:"node"`
	// KVStore is this cluster's etcd.
	KVStore KVStoreConfig `json:"kvstore"`
	// Encryption says what is encrypted between nodes.
	Encryption EncryptionConfig `json:"encryption,omitzero"`
	// Metrics of the agent, for Prometheus.
	Metrics MetricsConfig `json:"metrics,omitzero"`
	// XDS tells Envoys and gRPC's clients how services are balanced at L7.
	XDS XDSConfig `json:"xds,omitzero"`
	// Gossip says who is alive.
	Gossip GossipConfig `json:"gossip,omitzero"`
	// Peering is how clusters are joined: the clusters that this one is joined with are in its store, not here.
	Peering PeeringConfig `json:"peering,omitzero"`
	// Proxy is what balances requests, where services are balanced at L7.
	Proxy ProxyConfig `json:"proxy,omitzero"`
	// Kubernetes is whose services and pods this node serves; without it, those that the local API is told of.
	Kubernetes KubernetesConfig `json:"kubernetes,omitzero"`
	// Socket that the local API listens on; default api.DefaultSocket.
	Socket string `json:"socket,omitempty"`
	// StateDir keeps what must survive the agent: its instance and endpoints; default /var/lib/causeway.
	StateDir string `json:"stateDir,omitempty"`
	// BPFFS is the directory that programs and maps are pinned in, on a bpf file system; default /sys/fs/bpf/causeway.
	BPFFS string `json:"bpffs,omitempty"`
	// Cgroup is the cgroup v2 directory whose processes get service translation; default: the root of the cgroup2 mount.
	Cgroup string `json:"cgroup,omitempty"`
	// LogLevel: debug, info, warn, error; default info.
	LogLevel string `json:"logLevel,omitempty"`
}

// ClusterConfig is the same on every node of a cluster.
type ClusterConfig struct {
	Name string `json:"name"`
	// ID is 1 to 255 and unique in the mesh. Without one the cluster takes one that is free, and keeps it in its store.
	ID identity.ClusterID `json:"id,omitempty"`
	// PodCIDRs, of IPv4, of IPv6, or of both, which makes its pods dual-stack.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	// ServiceCIDRs, at most one of each family.
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs"`
}

// NodeConfig is this node's own. With [KubernetesConfig] what is missing is asked for: the name of the environment's NODE_NAME, the others of the Node of that name.
type NodeConfig struct {
	Name string `json:"name"`
	// Address on the underlay, where the other nodes send their tunnel packets.
	Address netip.Addr `json:"address"`
	// PodCIDRs that this node gives pod addresses from, within the cluster's, at most one of each family.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	// VXLANPort is the UDP port of the tunnel; default 4789 (RFC 7348).
	VXLANPort uint16 `json:"vxlanPort,omitempty"`
}

// EncryptionConfig says what is encrypted between nodes, by WireGuard.
type EncryptionConfig struct {
	// Mode is the same on all nodes of a cluster: all (default), inter-cluster, off.
	Mode identity.Encryption `json:"mode,omitempty"`
	// Kind of device: auto (default: the kernel's where it has WireGuard), kernel, userspace.
	Kind string `json:"kind,omitempty"`
	// Ports are the two UDP ports at the node's address, one a slot; default 51871 and 51872.
	Ports []uint16 `json:"ports,omitempty"`
	// RotateEvery is the time after which the node's key is changed, as in "720h"; default 720h (30 days), "0" is never.
	RotateEvery string `json:"rotateEvery,omitempty"`
	// Keepalive is how often something is sent to every node, as in "25s", so that a NAT in front of this node does not forget the way back; default
	// "0", nothing is sent: right for nodes that the others reach at their address.
	Keepalive string `json:"keepalive,omitempty"`
	// Cgroup v2 directory that a process in user space is put into, so that it outlives the agent where what supervises the
	// agent kills its cgroup; default: it stays in the agent's.
	Cgroup string `json:"cgroup,omitempty"`
	// DeviceName of the WireGuard devices, less the slot's number; default causeway-wg.
	DeviceName string `json:"deviceName,omitempty"`
}

// MetricsConfig says where the agent's metrics are, besides the local API.
type MetricsConfig struct {
	// Listen is the host:port that GET /metrics is answered at, without any protection: give it an address that only who may see them
	// reaches, as in 127.0.0.1:9464. Default: none.
	Listen string `json:"listen,omitempty"`
}

// ProxyConfig says how this node's L7 proxy is run.
type ProxyConfig struct {
	// Cgroup v2 directory that the proxy is put into, so that it outlives the agent where what supervises the agent kills its cgroup; default: it
	// stays in the agent's.
	Cgroup string `json:"cgroup,omitempty"`
	// AccessLog is how many of all requests are logged, in percent; default 0.
	AccessLog float64 `json:"accessLog,omitempty"`
	// OTLPEndpoint is the collector that spans are sent to, by gRPC: http://HOST:PORT, https://HOST:PORT. Default: there are no spans.
	OTLPEndpoint string `json:"otlpEndpoint,omitempty"`
}

// KubernetesConfig says how the API server of this cluster is reached. Its Node of the name node.name is this node.
type KubernetesConfig struct {
	// Kubeconfig is a file that says where the API server is and who this agent is.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// Context of that file; default: its current one.
	Context string `json:"context,omitempty"`
	// InCluster: the agent is a pod, and has that from its service account. Not with Kubeconfig.
	InCluster bool `json:"inCluster,omitempty"`
}

// Enabled tells whether the node is one of a Kubernetes cluster.
func (k KubernetesConfig) Enabled() bool { return k.InCluster || k.Kubeconfig != "" }

// XDSConfig says where Envoy's discovery protocol is served.
type XDSConfig struct {
	// Listen is the host:port at which clients with a certificate of the cluster's authority are answered, as in 172.29.1.11:7960. Default: none.
	Listen string `json:"listen,omitempty"`
}

// GossipConfig says how this node gossips with the others of its cluster and, as a speaker, of the mesh.
type GossipConfig struct {
	// KeyFile holds this node's copy of the mesh's gossip keys: base64 of 32 bytes each, one a line, the first one encrypts. It is
	// made if missing, from what the cluster's store has, and rewritten when keys are rotated. Default gossip.keys in the state directory.
	KeyFile string `json:"keyFile,omitempty"`
	// Mesh names the mesh; what other meshes say is not listened to. Default "causeway".
	Mesh string `json:"mesh,omitempty"`
	// Port of the cluster's pool and MeshPort of that of all clusters' speakers, UDP and TCP, at the node's address;
	// default 7956 and 7957, beside memberlist's 7946, which MetalLB has on many nodes. They are the same on all nodes.
	Port     uint16 `json:"port,omitempty"`
	MeshPort uint16 `json:"meshPort,omitempty"`
}

// KVStoreConfig says how to reach an etcd; client certificates are required.
type KVStoreConfig struct {
	Endpoints []string `json:"endpoints"`
	CAFile    string   `json:"caFile"`
	CertFile  string   `json:"certFile"`
	KeyFile   string   `json:"keyFile"`
}

// PeeringConfig says how this cluster is joined with others.
type PeeringConfig struct {
	// Port of the API between clusters, TCP, at the node's address; default 7958.
	Port uint16 `json:"port,omitempty"`
	// Endpoints (host:port) at which other clusters reach the API, if not at the nodes' addresses.
	Endpoints []string `json:"endpoints,omitempty"`
	// StoreEndpoints at which other clusters reach this cluster's etcd; default kvstore.endpoints.
	StoreEndpoints []string `json:"storeEndpoints,omitempty"`
	// Quota is how many entries are accepted of a peer at most, so that it cannot fill this node's memory; default 250000.
	Quota int `json:"quota,omitempty"`
}
