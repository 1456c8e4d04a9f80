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
	Name     string   `json:"name,omitempty"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
	// TargetPort is what backends that the selector finds listen on; 0 if that is a name, which slices say the number of.
	TargetPort uint16 `json:"targetPort,omitempty"`
	// NodePort is answered at the addresses of the cluster's nodes; 0 is none. It concerns the own cluster alone.
	NodePort uint16 `json:"nodePort,omitempty"`
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
	// Headless services have no cluster IP, and may have no ports: names lead to the backends themselves.
	Headless bool `json:"headless,omitempty"`
	// ExternalIPs are those that the cluster's nodes answer for it besides cluster IPs and node ports: its load balancer's, and what
	// Kubernetes calls external IPs. They concern the own cluster alone.
	ExternalIPs []netip.Addr `json:"externalIPs,omitempty"`
	// InternalLocal: clients on a node only get backends of that node (internalTrafficPolicy Local), whatever else the service says.
	InternalLocal bool `json:"internalLocal,omitempty"`
	// ExternalLocal is the same for clients from outside (externalTrafficPolicy Local), whose address their backend then sees.
	ExternalLocal bool `json:"externalLocal,omitempty"`
	// HealthCheckNodePort says by HTTP whether a node has backends, for load balancers; 0 is none.
	HealthCheckNodePort uint16 `json:"healthCheckNodePort,omitempty"`
	// SessionAffinity is for how many seconds after its last connection a client gets the same backend; 0 is not at all.
	SessionAffinity uint32 `json:"sessionAffinity,omitempty"`
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
	Node      string        `json:"node"`               // "": it is on none of the cluster's nodes
	Endpoint  string        `json:"endpoint,omitempty"` // "namespace/name"
	Ports     []BackendPort `json:"ports"`
	// Terminating backends still serve, but shall get no new connections while the service has others.
	Terminating bool `json:"terminating,omitempty"`
	// Hostname that it has below a headless service's name.
	Hostname string `json:"hostname,omitempty"`
	// Slice is the stored slice that holds it.
	Slice string `json:"slice"`
}

// PortKey names one port of a service in the mesh, and the family of addresses: what a frontend selects backends of.
type PortKey struct {
	Service  Name     `json:"service"`
	Port     string   `json:"port"` // the port's name, or its number if it has none
	Protocol Protocol `json:"protocol"`
	Family   Family   `json:"family"`
	// NodeLocal: of the backends only those on this node.
	NodeLocal bool `json:"nodeLocal,omitempty"`
}

// String is also what the kernel's maps know a port by, see datapath's portID. That of IPv4 goes without saying, as in maps of older agents.
func (k PortKey) String() string {
	s := k.Service.String() + ":" + k.Port + "/" + string(k.Protocol)
	if k.Family == IPv6 {
		s += "/" + k.Family.String()
	}
	if k.NodeLocal {
		s += "/node-local"
	}
	return s
}

// FrontendKey is what clients connect to.
type FrontendKey struct {
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port"`
	Protocol Protocol   `json:"protocol"`
	// Outside: for packets that come to the node from outside of the cluster; without it, for sockets of processes on the node.
	Outside bool `json:"outside,omitempty"`
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
	// SessionAffinity as the service has it, in seconds.
	SessionAffinity uint32 `json:"sessionAffinity,omitempty"`
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
	// Terminating as the backend is.
	Terminating bool `json:"terminating,omitempty"`
	// Quarantined backends get no new connections while the port has any other backend; those that they have stay. Quarantined are those
	// of nodes that are not alive, and terminating ones while the port has one that is neither.
	Quarantined bool `json:"quarantined,omitempty"`
}
