package identity

import (
	"net/netip"
	"time"

	"causeway/lb"
)

// Version orders the writings of one owner: a newer incarnation (start of
// the owner's agent, Unix nanoseconds) beats an older one, within one the higher
// sequence wins, whichever channel brought it.
type Version struct {
	Incarnation uint64 `json:"incarnation"`
	Sequence    uint64 `json:"sequence"`
}

// Newer tells whether v was written after w.
func (v Version) Newer(w Version) bool {
	if v.Incarnation != w.Incarnation {
		return v.Incarnation > w.Incarnation
	}
	return v.Sequence > w.Sequence
}

// VersionOf reads the version of a stored address or slice; false if the value can't be read.
func VersionOf(value []byte) (v Version, ok bool) {
	value, err := lb.Expand(value)
	return v, err == nil && lb.Unmarshal(value, &v) == nil
}

// NodeName names a node in the mesh.
type NodeName struct {
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
}

func (n NodeName) String() string { return n.Cluster + "/" + n.Node }

// Node is a row of the nodes table: a machine that owns addresses.
type Node struct {
	Cluster   string    `json:"cluster"`
	ClusterID ClusterID `json:"clusterID"`
	Name      string    `json:"name"`
	// Address on the underlay: where tunnels end.
	Address netip.Addr `json:"address"`
	// PodCIDRs that the node gives addresses from.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	// Instance is made once per node and kept in its state directory; a second
	// machine that claims the same name has another one and is refused.
	Instance string `json:"instance"`
	// GossipKey is the Ed25519 key that the node signs its gossip with; empty if it has none.
	GossipKey []byte `json:"gossipKey,omitempty"`
	// TunnelKeys that the node can be reached with by WireGuard, the one that it prefers first; none if it does not encrypt.
	TunnelKeys []TunnelKey `json:"tunnelKeys,omitempty"`
	// MTU of the node's pods, in bytes; 0 if it does not say.
	MTU int `json:"mtu,omitempty"`
	Version
	// Local is true for the node that the agent runs on.
	Local bool `json:"local,omitempty"`
}

// Identity is a row of the identities table.
type Identity struct {
	Cluster string `json:"cluster"`
	Number  Number `json:"id"`
	Labels  Labels `json:"labels"`
}

// Address is a row of the addresses table: who is behind a prefix, and where.
type Address struct {
	Cluster   string       `json:"cluster"`
	ClusterID ClusterID    `json:"clusterID"`
	Prefix    netip.Prefix `json:"prefix"`
	Identity  Number       `json:"identity"`
	// Node that owns the prefix, and its underlay address: where packets go.
	Node        string     `json:"node"`
	NodeAddress netip.Addr `json:"nodeAddress"`
	// Endpoint is "namespace/name" of the pod; empty for a node's own address or its pod CIDR.
	Endpoint string `json:"endpoint,omitempty"`
	Version
	Local bool `json:"local,omitempty"`
}

// EndpointState is what an endpoint is good for.
type EndpointState string

const (
	EndpointReady       EndpointState = "ready"
	EndpointNotReady    EndpointState = "not-ready"   // reachable, but no backend of any service
	EndpointTerminating EndpointState = "terminating" // as above, on its way out
)

// Endpoint is a row of the endpoints table: a pod of this node.
type Endpoint struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Labels    Labels `json:"labels"`
	Identity  Number `json:"identity"`
	// Address is the pod's first one, IPv4 if the node has an IPv4 range; Address6 its IPv6 address beside an IPv4 one.
	Address  netip.Addr    `json:"address"`
	Address6 netip.Addr    `json:"address6,omitzero"`
	State    EndpointState `json:"state"`
	// NetNS is the path of the pod's network namespace.
	NetNS string `json:"netns"`
	// HostLink is the node's end of the pod's veth; IfIndex and the MACs belong to it and to the pod's end.
	HostLink string    `json:"hostLink"`
	IfIndex  int       `json:"ifindex"`
	HostMAC  string    `json:"hostMAC"`
	MAC      string    `json:"mac"`
	MTU      int       `json:"mtu"`
	Created  time.Time `json:"created"`
	// Sandbox is the container runtime's ID of the pod's sandbox, and UID the pod's in Kubernetes; both are empty for a pod that the local API made.
	Sandbox string `json:"sandbox,omitempty"`
	UID     string `json:"uid,omitempty"`
	// Interface in the pod; "" is "eth0".
	Interface string `json:"interface,omitempty"`
}

// ID returns "namespace/name".
func (e *Endpoint) ID() string { return e.Namespace + "/" + e.Name }

// Addresses returns all addresses of the pod.
func (e *Endpoint) Addresses() []netip.Addr {
	addresses := []netip.Addr{e.Address}
	if e.Address6.IsValid() {
		addresses = append(addresses, e.Address6)
	}
	return addresses
}
