package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// EndpointView is what SlicesFor needs to know of an endpoint of this node.
type EndpointView struct {
	Addresses []netip.Addr // at most one of each family
	ID        string       // "namespace/name"
	Labels    map[string]string
	Ready     bool // only ready endpoints are backends
}

// Selects tells whether an endpoint is a backend of the service: ready, in its namespace, with
// every label of its selector. A service without a selector selects nothing.
func (s *Service) Selects(e EndpointView) bool {
	namespace, _, _ := strings.Cut(e.ID, "/")
	if !e.Ready || namespace != s.Name.Namespace || len(s.Selector) == 0 {
		return false
	}
	for k, v := range s.Selector {
		if got, ok := e.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// SlicesFor returns the slices that node publishes for svc: the endpoints which it selects, with their addresses of the families that
// svc has cluster IPs of, at most MaxSliceBackends a slice. A backend stays in the slice that previous has it in, so that one that
// comes or goes changes one slice. A slice that is the same as in previous is returned with its version; others have none:
// the caller sets it before writing them. What previous has and the result has not is to be deleted. A port whose target is a name is in no slice: endpoints
// have labels, but no names of ports.
func SlicesFor(node string, svc Service, endpoints []EndpointView, previous []Slice) []Slice {
	wanted := map[netip.Addr]SliceBackend{}
	families := svc.families()
	for _, e := range endpoints {
		if !svc.Selects(e) {
			continue
		}
		for _, a := range e.Addresses {
			if slices.Contains(families, FamilyOf(a)) {
				wanted[a] = SliceBackend{Address: a, Endpoint: e.ID}
			}
		}
	}
	placed := place(node, wanted, previous)
	result := make([]Slice, 0, len(placed))
	for index, backends := range placed {
		if len(backends) == 0 {
			continue
		}
		s := Slice{
			Cluster:   svc.Cluster,
			ClusterID: svc.ClusterID,
			Service:   svc.Name,
			Slice:     sliceName(node, index),
			Node:      node,
			Ports:     backendPorts(svc.Ports),
			Backends:  backends,
		}
		slices.SortFunc(s.Backends, func(a, b SliceBackend) int { return a.Address.Compare(b.Address) })
		result = append(result, keepVersion(s, previous))
	}
	return result
}

// place distributes the wanted backends over slices by index.
func place(node string, wanted map[netip.Addr]SliceBackend, previous []Slice) [][]SliceBackend {
	was := map[netip.Addr]int{}
	for _, p := range previous {
		if index, ok := sliceIndex(node, p.Slice); ok {
			for _, old := range p.Backends {
				was[old.Address] = index
			}
		}
	}
	addresses := slices.Collect(maps.Keys(wanted))
	var placed [][]SliceBackend
	for i, index := range Parts(addresses, func(a netip.Addr) (int, bool) { index, ok := was[a]; return index, ok }) {
		for len(placed) <= index {
			placed = append(placed, nil)
		}
		placed[index] = append(placed[index], wanted[addresses[i]])
	}
	return placed
}

func backendPorts(ports []ServicePort) []BackendPort {
	result := make([]BackendPort, 0, len(ports))
	for _, p := range ports {
		if p.TargetPort != 0 {
			result = append(result, BackendPort{Name: p.Name, Protocol: p.Protocol, Port: p.TargetPort})
		}
	}
	slices.SortFunc(result, func(a, b BackendPort) int { return cmp.Compare(a.Name, b.Name) })
	return result
}

// keepVersion gives s the version of its previous writing if nothing else differs.
func keepVersion(s Slice, previous []Slice) Slice {
	for _, p := range previous {
		if p.Slice == s.Slice && p.ClusterID == s.ClusterID && slices.Equal(p.Ports, s.Ports) && slices.Equal(p.Backends, s.Backends) {
			s.Incarnation, s.Sequence = p.Incarnation, p.Sequence
		}
	}
	return s
}

func sliceName(node string, index int) string {
	if index == 0 {
		return node
	}
	return fmt.Sprintf("%s.%d", node, index)
}

// sliceIndex is the inverse of sliceName; false if the name isn't one of node's.
func sliceIndex(node, name string) (int, bool) {
	if name == node {
		return 0, true
	}
	number, found := strings.CutPrefix(name, node+".")
	index, err := strconv.Atoi(number)
	if !found || err != nil || index < 1 || index > 9999 || sliceName(node, index) != name {
		return 0, false
	}
	return index, true
}
