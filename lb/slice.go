package lb

import "net/netip"

// MaxSliceBackends bounds the backends of one slice, so that one backend's change writes a few
// kilobytes however large the service is.
const MaxSliceBackends = 100

// Slice is the stored form of a part of a service's backends: those of one node, at most
// MaxSliceBackends. Only that node writes it.
type Slice struct {
	Cluster   string `json:"cluster"`
	ClusterID uint8  `json:"clusterID"`
	Service   Name   `json:"service"`
	// Slice names it within the service: the node's name, for further ones followed by "." and 1, 2, …
	Slice string `json:"slice"`
	Node  string `json:"node"`
	// Incarnation and Sequence order the node's writings; see identity.Version.
	Incarnation uint64 `json:"incarnation"`
	Sequence    uint64 `json:"sequence"`
	// Ports that all backends of the slice listen on.
	Ports    []BackendPort  `json:"ports"`
	Backends []SliceBackend `json:"backends"`
}

// SliceBackend is one backend of a slice; its node is the slice's. A pod with two addresses is two backends.
type SliceBackend struct {
	Address  netip.Addr `json:"ip"`
	Endpoint string     `json:"endpoint,omitempty"` // "namespace/name"
}

// Key returns where the slice is stored.
func (s *Slice) Key() string { return SliceKey(s.Cluster, s.Service, s.Slice) }

// Rows returns the slice's backends as rows of the backends table, in the slice's order. They share its Ports.
func (s *Slice) Rows() []Backend {
	rows := make([]Backend, len(s.Backends))
	for i, b := range s.Backends {
		rows[i] = Backend{
			Cluster:   s.Cluster,
			ClusterID: s.ClusterID,
			Service:   s.Service,
			Address:   b.Address,
			Node:      s.Node,
			Endpoint:  b.Endpoint,
			Ports:     s.Ports,
			Slice:     s.Slice,
		}
	}
	return rows
}
