package lb

import (
	"cmp"
	"net/netip"
	"strings"
)

// MaxSliceBackends bounds the backends of one slice, so that one backend's change writes a few
// kilobytes however large the service is.
const MaxSliceBackends = 100

// Slice is the stored form of a part of a service's backends, at most MaxSliceBackends. There are two kinds: those of one node, which only that
// node writes; and those of the cluster, which come from Kubernetes' EndpointSlices, may have backends of several nodes and of none, and are
// written by whichever agent the cluster has elected for it (clustermesh.Exporter).
type Slice struct {
	Cluster   string `json:"cluster"`
	ClusterID uint8  `json:"clusterID"`
	Service   Name   `json:"service"`
	// Slice names it within the service: the node's name, or "_" and Kubernetes' name for it, which is never a node's; for further ones followed by
	// "." and 1, 2, …
	Slice string `json:"slice"`
	// Node whose it is; "" if it is the cluster's.
	Node string `json:"node,omitempty"`
	// Incarnation and Sequence order the writings of its owner; see identity.Version.
	Incarnation uint64 `json:"incarnation"`
	Sequence    uint64 `json:"sequence"`
	// Ports that all backends of the slice listen on.
	Ports    []BackendPort  `json:"ports"`
	Backends []SliceBackend `json:"backends"`
}

// SliceBackend is one backend of a slice. A pod with two addresses is two backends.
type SliceBackend struct {
	Address  netip.Addr `json:"ip"`
	Endpoint string     `json:"endpoint,omitempty"` // "namespace/name"
	// Node that it is on, in a slice that is the cluster's; "" is none. In a node's slice it is that node.
	Node string `json:"node,omitempty"`
	// Terminating and Hostname as in Backend.
	Terminating bool   `json:"terminating,omitempty"`
	Hostname    string `json:"hostname,omitempty"`
}

// OfCluster tells whether the slice is the cluster's, not a node's.
func (s *Slice) OfCluster() bool { return s.Node == "" }

// clusterSliceMark begins the names of slices that are the cluster's, and never that of a node.
const clusterSliceMark = "_"

// ClusterSliceName returns what the cluster's slice is called that Kubernetes, and so the rows of the own cluster, know by name.
func ClusterSliceName(name string) string { return clusterSliceMark + name }

// OfClusterKey tells whether a key is that of a slice that is the cluster's.
func OfClusterKey(key string) bool {
	parts, err := splitKey(key, "slices", 4)
	return err == nil && strings.HasPrefix(parts[3], clusterSliceMark)
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
			Node:      cmp.Or(s.Node, b.Node),
			Endpoint:  b.Endpoint,
			Ports:     s.Ports,
			Slice:     s.Slice,

			Terminating: b.Terminating,
			Hostname:    b.Hostname,
		}
	}
	return rows
}
