package k8s

import (
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"causeway/lb"
)

// ManagedBy is the value of the label endpointslice.kubernetes.io/managed-by of EndpointSlices that Causeway writes: those of other clusters' endpoints, which
// are never taken for this cluster's.
const ManagedBy = "causeway.io"

// parsedSlice is what an EndpointSlice says.
type parsedSlice struct {
	service lb.Name
	// backends by address, without cluster and part. They share their Ports.
	backends map[netip.Addr]lb.Backend
}

// parseSlice reads an EndpointSlice. Of several addresses of an endpoint only the first means something, as
// https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/ has it; of an address that is there twice, the better one counts.
// Endpoints that get no connections are left out. name returns a copy of a node's name that others have too.
func parseSlice(s *discoveryv1.EndpointSlice, name func(string) string) parsedSlice {
	p := parsedSlice{
		service:  lb.Name{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]},
		backends: make(map[netip.Addr]lb.Backend, len(s.Endpoints)),
	}
	if s.AddressType != discoveryv1.AddressTypeIPv4 && s.AddressType != discoveryv1.AddressTypeIPv6 || p.service.Name == "" {
		return p // of names, for which there is nothing to be done to packets; or nobody's
	}
	ports := slicePorts(s.Ports)
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		active, terminating := condition(e.Conditions)
		if !active && !terminating || len(e.Addresses) == 0 {
			continue
		}
		address, err := netip.ParseAddr(e.Addresses[0])
		if err != nil || lb.CheckAddress(address.Unmap()) != nil {
			continue // the API server takes none of these, except of reserved ranges, where nobody can be
		}
		b := lb.Backend{Service: p.service, Address: address.Unmap(), Ports: ports, Terminating: terminating}
		if e.NodeName != nil {
			b.Node = name(*e.NodeName)
		}
		if r := e.TargetRef; r != nil && r.Kind == "Pod" {
			b.Endpoint = r.Namespace + "/" + r.Name
		}
		if e.Hostname != nil {
			b.Hostname = *e.Hostname
		}
		if other, twice := p.backends[b.Address]; !twice || other.Terminating {
			p.backends[b.Address] = b
		}
	}
	return p
}

// condition says whether an endpoint gets connections, and whether only if the service has no other. What a condition does not say means
// the usual.
func condition(c discoveryv1.EndpointConditions) (active, terminating bool) {
	is := func(condition *bool, otherwise bool) bool {
		if condition == nil {
			return otherwise
		}
		return *condition
	}
	if is(c.Ready, true) {
		return true, false
	}
	return false, is(c.Serving, true) && is(c.Terminating, false)
}

// slicePorts are the ports that have a number, of the protocols that are balanced.
func slicePorts(ports []discoveryv1.EndpointPort) []lb.BackendPort {
	out := make([]lb.BackendPort, 0, len(ports))
	for _, p := range ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			continue
		}
		port := lb.BackendPort{Protocol: lb.TCP, Port: uint16(*p.Port)}
		if p.Name != nil {
			port.Name = *p.Name
		}
		if p.Protocol != nil {
			protocol, err := convertProtocol(corev1.Protocol(*p.Protocol))
			if err != nil {
				continue
			}
			port.Protocol = protocol
		}
		out = append(out, port)
	}
	return out
}

// numbered is the form of an EndpointSlice's name that could be taken for a part of another.
var numbered = regexp.MustCompile(`\.[0-9]+$`)

// partName names a part of an EndpointSlice, at most lb.MaxSliceBackends of its endpoints: the first one by the object's name, further ones by that
// followed by "." and 1, 2, …. If an object's name has that form already, its first one gets a ".0", so that no two parts have one name.
func partName(object string, part int) string {
	if part == 0 && !numbered.MatchString(object) {
		return object
	}
	return object + "." + strconv.Itoa(part)
}

// partOf is the inverse of partName; false if the name is not that of a part of the object's.
func partOf(object, name string) (part int, ok bool) {
	if name == object {
		return 0, partName(object, 0) == name
	}
	number, found := strings.CutPrefix(name, object+".")
	part, err := strconv.Atoi(number)
	if !found || err != nil || part < 0 || partName(object, part) != name {
		return 0, false
	}
	return part, true
}
