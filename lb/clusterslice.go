package lb

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Exported returns what other clusters are told of a service: not what concerns its own cluster's nodes alone, and of its annotations only those
// that have a meaning to Causeway. It shares the rest with s.
func (s Service) Exported() Service {
	s.Ports = slices.Clone(s.Ports)
	for i := range s.Ports {
		s.Ports[i].NodePort = 0
	}
	s.Selector, s.ExternalIPs = nil, nil
	s.InternalLocal, s.ExternalLocal, s.HealthCheckNodePort = false, false, 0
	s.Annotations = maps.Clone(s.Annotations)
	maps.DeleteFunc(s.Annotations, func(key, _ string) bool {
		return !slices.ContainsFunc(annotationPrefixes, func(p string) bool { return strings.HasPrefix(key, p) })
	})
	return s
}

// ClusterSlice returns the slice that has these backends, of one service and one Slice, ordered by address and without a version. The error is that
// they listen on different ports, which one slice can't say.
func ClusterSlice(backends []Backend) (Slice, error) {
	first := backends[0]
	s := Slice{
		Cluster: first.Cluster, ClusterID: first.ClusterID, Service: first.Service, Slice: ClusterSliceName(first.Slice),
		Ports: first.Ports, Backends: make([]SliceBackend, 0, len(backends)),
	}
	for _, b := range backends {
		if !slices.Equal(b.Ports, s.Ports) {
			return Slice{}, fmt.Errorf("slice %s of %s: %s and %s listen on different ports", first.Slice, first.Service, first.Address, b.Address)
		}
		s.Backends = append(s.Backends, SliceBackend{Address: b.Address, Endpoint: b.Endpoint, Node: b.Node, Terminating: b.Terminating, Hostname: b.Hostname})
	}
	slices.SortFunc(s.Backends, func(a, b SliceBackend) int { return a.Address.Compare(b.Address) })
	return s, nil
}
