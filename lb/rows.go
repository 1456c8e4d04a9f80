// Package lb knows services and their backends: how those of several clusters
// merge into one, which backends a frontend may use, and in which order of
// preference. It is pure: rows in, rows out, no I/O.
package lb

import "net/netip"

// Name is a service's namespace and name, which is its identity across clusters.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Protocol of a port.
type Protocol string

const (
	TCP Protocol = "TCP"
	UDP Protocol = "UDP"
)

// Affinity says which clusters' backends a global service prefers.
type Affinity string

const (
	AffinityNone   Affinity = "none"
	AffinityLocal  Affinity = "local"
	AffinityRemote Affinity = "remote"
)

// ServicePort is a port of a service, and what its backends listen on.
type ServicePort struct {
	Name       string   `json:"name,omitempty"`
	Protocol   Protocol `json:"protocol"`
	Port       uint16   `json:"port"`
	TargetPort uint16   `json:"targetPort"`
	// AppProtocol as the user wrote it.
	AppProtocol string `json:"appProtocol,omitempty"`
}

// Service is a row of the services table: one cluster's declaration of a service.
type Service struct {
	Cluster   string `json:"cluster"`
	ClusterID uint8  `json:"clusterID"`
	Name      Name   `json:"service"`
	// Global: merged with the services of the same name in other clusters.
	Global bool `json:"global"`
	// Shared: this cluster's backends are offered to the others; only with Global.
	Shared     bool              `json:"shared"`
	Affinity   Affinity          `json:"affinity"`
	ClusterIPs []netip.Addr      `json:"clusterIPs"`
	Ports      []ServicePort     `json:"ports"`
	Selector   map[string]string `json:"selector,omitempty"`
	// Annotations as the user wrote them.
	Annotations map[string]string `json:"annotations,omitempty"`
}

// BackendPort is a port that a backend listens on, matched to the service's port by name and protocol.
type BackendPort struct {
	Name     string   `json:"name,omitempty"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
}

// Backend is a row of the backends table: one address behind a service of one cluster.
type Backend struct {
	Cluster   string        `json:"cluster"`
	ClusterID uint8         `json:"clusterID"`
	Service   Name          `json:"service"`
	Address   netip.Addr    `json:"address"`
	Node      string        `json:"node"`
	Endpoint  string        `json:"endpoint,omitempty"` // "namespace/name"
	Ports     []BackendPort `json:"ports"`
	// Slice is the stored slice that holds it.
	Slice string `json:"slice"`
}

// PortKey names one port of a service in the mesh, and the family of addresses: what a frontend selects backends of.
type PortKey struct {
	Service  Name     `json:"service"`
	Port     string   `json:"port"` // the port's name, or its number if it has none
	Protocol Protocol `json:"protocol"`
	Family   Family   `json:"family"`
}

// String is also what the kernel's maps know a port by, see datapath's portID. That of IPv4 goes without saying, as in maps of older agents.
func (k PortKey) String() string {
	s := k.Service.String() + ":" + k.Port + "/" + string(k.Protocol)
	if k.Family == IPv6 {
		s += "/" + k.Family.String()
	}
	return s
}

// FrontendKey is what clients connect to.
type FrontendKey struct {
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port"`
	Protocol Protocol   `json:"protocol"`
}

// Frontend is a desired row of the frontends table: an address and port that this node translates.
type Frontend struct {
	FrontendKey
	Target PortKey `json:"target"`
	// Cluster that owns the address.
	Cluster   string   `json:"cluster"`
	ClusterID uint8    `json:"clusterID"`
	Affinity  Affinity `json:"affinity"`
	// L7: connections are the L7 proxy's, as long as there is one.
	L7 bool `json:"l7,omitempty"`
}

// TargetKey identifies a desired backend of a port.
type TargetKey struct {
	Port    PortKey    `json:"port"`
	Address netip.Addr `json:"address"`
	Number  uint16     `json:"number"` // the port that the backend listens on
}

// Target is a desired row of the targets table: a backend that a port's frontends may choose.
type Target struct {
	TargetKey
	Cluster   string `json:"cluster"`
	ClusterID uint8  `json:"clusterID"`
	Node      string `json:"node"`
	// Local is true for a backend of this agent's own cluster (for affinity).
	Local bool `json:"local"`
	// Quarantined backends get no new connections while the port has any other backend; those that they have stay.
	Quarantined bool `json:"quarantined,omitempty"`
}
