// Package api is what a node's agent answers on its unix socket, and the
// client for it. HTTP with JSON bodies; a list is watched with ?watch=true, which
// streams the whole list again, one JSON document a line, whenever it changed.
package api

import (
	"net/netip"
	"time"

	"causeway/identity"
	"causeway/lb"
)

// SocketEnv names the environment variable that holds the socket's path for the command line.
const SocketEnv = "CAUSEWAY_SOCKET"

// DefaultSocket is where an agent listens if its configuration doesn't say otherwise.
const DefaultSocket = "/run/causeway/agent.sock"

// Paths of the API.
const (
	PathStatus     = "/v1/status"
	PathNodes      = "/v1/nodes"
	PathEndpoints  = "/v1/endpoints" // POST EndpointRequest; PATCH …/NAMESPACE/NAME; DELETE …/NAMESPACE/NAME[?sandbox=ID]
	PathCNI        = "/v1/cni"
	PathIdentities = "/v1/identities"
	PathAddresses  = "/v1/addresses"
	PathServices   = "/v1/services" // POST: Kubernetes manifests as YAML; DELETE …/NAMESPACE/NAME
	PathBPFLB      = "/v1/bpf/lb"
	PathBPFAddr    = "/v1/bpf/addresses"
	PathBPFDrops   = "/v1/bpf/drops"
	PathMembers    = "/v1/members"
	PathDrain      = "/v1/drain"   // POST: take this node's backends out of service; DELETE: back
	PathKeyring    = "/v1/keyring" // POST KeyringRequest
)

// Error is the body of every answer that isn't 2xx.
type Error struct {
	Message string `json:"error"`
	Status  int    `json:"-"`
}

func (e *Error) Error() string { return e.Message }

// EndpointRequest asks the agent to connect a network namespace as a pod.
type EndpointRequest struct {
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
	// NetNS is the path of the namespace; the agent makes Interface in it.
	NetNS string `json:"netns"`
	// State the endpoint starts in; empty is ready.
	State identity.EndpointState `json:"state,omitempty"`
	// Sandbox is set by the CNI plugin: the container runtime's ID of the pod's sandbox. Then the pod is Kubernetes', which knows its labels (Labels
	// must be empty), a sandbox that has the same name already is replaced, and the same request again gets the same answer.
	Sandbox string `json:"sandbox,omitempty"`
	// UID of the pod in Kubernetes, with Sandbox; a pod of another UID is not taken for it. Optional.
	UID string `json:"uid,omitempty"`
	// Interface to make in the namespace; empty is "eth0".
	Interface string `json:"interface,omitempty"`
}

// CNI tells whether a CNI plugin can add pods now.
type CNI struct {
	Ready bool `json:"ready"`
	// Reason why not.
	Reason string `json:"reason,omitempty"`
}

// EndpointPatch changes an endpoint's state.
type EndpointPatch struct {
	State identity.EndpointState `json:"state"`
}

// RowStatus is how far a row has got into the kernel.
type RowStatus struct {
	Kind  string    `json:"kind"` // pending, done, error
	Error string    `json:"error,omitempty"`
	At    time.Time `json:"at,omitzero"`
}

// Node, Endpoint, Identity, Address: rows with their status.
type (
	Node struct {
		identity.Node
		Status RowStatus `json:"status"`
	}
	Endpoint struct {
		identity.Endpoint
		Status RowStatus `json:"status"`
		// Gateways are the next hops of the pod's default routes, one for each of its addresses; in the answer to an EndpointRequest.
		Gateways []netip.Addr `json:"gateways,omitempty"`
	}
	Identity struct {
		identity.Identity
	}
	Address struct {
		identity.Address
		Status RowStatus `json:"status"`
	}
)

// Service is one service as this node sees it: merged over clusters.
type Service struct {
	Name lb.Name `json:"service"`
	// Declared by these clusters, with what each says.
	Declared []lb.Service `json:"declared"`
	// Frontends that this node translates, with the status of each.
	Frontends []Frontend `json:"frontends"`
	// Backends that are chosen from, with the status of each.
	Backends []Backend `json:"backends"`
	// Routes say how its ports are balanced at L7; none if it is not.
	Routes []lb.Route `json:"routes,omitempty"`
}

// Frontend of a Service.
type Frontend struct {
	lb.Frontend
	Status RowStatus `json:"status"`
}

// Backend of a Service.
type Backend struct {
	lb.Target
	Status RowStatus `json:"status"`
}

// ServiceResult tells what became of one manifest.
type ServiceResult struct {
	Service    lb.Name  `json:"service"`
	Action     string   `json:"action"` // created, configured, unchanged, deleted
	ClusterIPs []string `json:"clusterIPs,omitempty"`
}

// Store is the state of one channel: this cluster's store, or a peer's.
type Store struct {
	Cluster     string             `json:"cluster"`
	ClusterID   identity.ClusterID `json:"clusterID"`
	Local       bool               `json:"local"`
	Endpoints   []string           `json:"endpoints"`
	Connected   bool               `json:"connected"`
	Synced      bool               `json:"synced"` // a complete listing has been applied
	LastContact time.Time          `json:"lastContact,omitzero"`
	LastError   string             `json:"lastError,omitempty"`
	Revision    int64              `json:"revision"`
	Reconnects  int                `json:"reconnects"`
	Entries     int                `json:"entries"` // accepted entries held from this channel
	Refused     int                `json:"refused"` // how many entries were refused since the start
	// HeartbeatAge is the age of the newest heartbeat read through the channel, in milliseconds; -1 before the first.
	HeartbeatAge int64 `json:"heartbeatAgeMs"`
}

// Refusal is an entry that was refused, and why.
type Refusal struct {
	Cluster string    `json:"cluster"` // the channel
	Key     string    `json:"key"`
	Reason  string    `json:"reason"`
	Count   int       `json:"count"`
	Last    time.Time `json:"last"`
}

// Status is the agent's account of itself.
type Status struct {
	OK        bool               `json:"ok"`
	Problems  []string           `json:"problems"` // what is wrong, one sentence each; empty if OK
	Version   string             `json:"version"`
	Cluster   string             `json:"cluster"`
	ClusterID identity.ClusterID `json:"clusterID"`
	Node      string             `json:"node"`
	Address   string             `json:"address"`
	PodCIDR   string             `json:"podCIDR"`
	Started   time.Time          `json:"started"`
	Datapath  Datapath           `json:"datapath"`
	// Encryption in short; see PathEncryption.
	Encryption EncryptionSummary `json:"encryption"`
	// L7 in short; see PathL7.
	L7     L7Summary `json:"l7,omitzero"`
	Gossip Members   `json:"gossip"`
	Stores []Store   `json:"stores"`
	// Kubernetes is where services and pods come from; nil if the local API is told of them.
	Kubernetes *Kubernetes      `json:"kubernetes,omitempty"`
	Peers      []Peer           `json:"peers"`
	Tables     map[string]Table `json:"tables"`
	Refusals   []Refusal        `json:"refusals"`
}

// Kubernetes is the state of the connection with this cluster's API server.
type Kubernetes struct {
	Connected bool   `json:"connected"` // it answered the last request
	Synced    bool   `json:"synced"`    // all Services and EndpointSlices have been read
	Server    string `json:"server"`
	Version   string `json:"version,omitempty"`
	// LastError is why it is not connected, or what it refuses.
	LastError string `json:"lastError,omitempty"`
}

// Datapath says what is loaded.
type Datapath struct {
	Attach string `json:"attach"` // tcx or clsact
	Device string `json:"device"` // the VXLAN device
	PodMTU int    `json:"podMTU"`
	Drops  uint64 `json:"drops"` // packets dropped, all reasons but the harmless ones
}

// Table counts a table's rows by status.
type Table struct {
	Rows    int `json:"rows"`
	Pending int `json:"pending"`
	Errors  int `json:"errors"`
}

// BPFBackend is a backend as it stands in the kernel.
type BPFBackend struct {
	ID       uint32 `json:"id"`
	Slot     uint32 `json:"slot"`
	Group    string `json:"group"` // local or remote
	Address  string `json:"address"`
	Port     uint16 `json:"port"`
	Cluster  string `json:"cluster"`
	Node     string `json:"node,omitempty"`
	Endpoint string `json:"endpoint,omitempty"`
}

// BPFFrontend is a frontend as it stands in the kernel, with the names that the tables know.
type BPFFrontend struct {
	Address   string `json:"address"`
	Port      uint16 `json:"port"`
	Protocol  string `json:"protocol"`
	ServiceID uint32 `json:"serviceID"`
	Service   string `json:"service,omitempty"`
	Affinity  string `json:"affinity"`
	// Outside: for packets from outside of the cluster, as against sockets on the node.
	Outside bool `json:"outside,omitempty"`
	// L7: connections are the node's L7 proxy's, as long as it listens; otherwise they go to the backends below.
	L7 bool `json:"l7,omitempty"`
	// SessionAffinity is for how many seconds after its last connection a client gets the same backend.
	SessionAffinity uint32 `json:"sessionAffinity,omitempty"`
	// Backends that new connections choose from.
	Backends []BPFBackend `json:"backends"`
	// Quarantined backends keep their connections and get no new ones. If all of them would be, none is: FailOpen.
	Quarantined []BPFBackend `json:"quarantined"`
	FailOpen    bool         `json:"failOpen,omitempty"`
}

// BPFAddress is an address entry as it stands in the kernel.
type BPFAddress struct {
	Prefix   string          `json:"prefix"`
	Identity identity.Number `json:"identity"`
	Labels   string          `json:"labels,omitempty"`
	Node     string          `json:"node,omitempty"`
	Tunnel   string          `json:"tunnel,omitempty"` // where packets go; empty: this node
	Cluster  string          `json:"cluster,omitempty"`
	Endpoint string          `json:"endpoint,omitempty"`
	// Blackhole: a range of the mesh in which only longer prefixes can be reached.
	Blackhole bool `json:"blackhole,omitempty"`
}

// BPFDrop is a drop counter.
type BPFDrop struct {
	Reason    string `json:"reason"`
	Direction string `json:"direction"`
	Packets   uint64 `json:"packets"`
	Bytes     uint64 `json:"bytes"`
}
