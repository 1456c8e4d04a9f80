package k8s

import (
	"errors"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"causeway/lb"
)

// maxFamilies is how many families there are, and so how many cluster IPs a Service may ask for.
const maxFamilies = 2

// clusterIPs returns the addresses that the manifest asks for, at most one of each family; none if it leaves the choice to the cluster.
func clusterIPs(spec *corev1.ServiceSpec) ([]netip.Addr, error) {
	wanted := spec.ClusterIPs
	switch {
	case len(wanted) > maxFamilies:
		return nil, fmt.Errorf("spec.clusterIPs has %d addresses, at most one of IPv4 and one of IPv6 are allowed", len(wanted))
	case len(wanted) == 0 && spec.ClusterIP != "":
		wanted = []string{spec.ClusterIP}
	case len(wanted) > 0 && spec.ClusterIP != "" && wanted[0] != spec.ClusterIP:
		return nil, fmt.Errorf("spec.clusterIP %.80q and the first of spec.clusterIPs %.80q differ", spec.ClusterIP, wanted[0])
	}
	var ips []netip.Addr
	for _, text := range wanted {
		switch text {
		case "":
			if len(wanted) > 1 {
				return nil, errors.New("spec.clusterIPs has an empty address; leave it out to get a free one")
			}
			return nil, nil
		case corev1.ClusterIPNone:
			return nil, errors.New("spec.clusterIP None (a headless Service) has no address to balance, which Causeway does not serve")
		}
		ip, err := netip.ParseAddr(text)
		if err == nil {
			err = lb.CheckAddress(ip)
		}
		if err != nil {
			return nil, fmt.Errorf("spec.clusterIP %.80q: %w", text, err)
		}
		ips = append(ips, ip)
	}
	if len(ips) == maxFamilies && lb.FamilyOf(ips[0]) == lb.FamilyOf(ips[1]) {
		return nil, fmt.Errorf("spec.clusterIPs has two addresses of %s; a Service has at most one of each family", lb.FamilyOf(ips[0]))
	}
	return ips, nil
}

// convertFamilies returns which families the cluster IPs shall have, with what the API server derives from other fields: a
// family from each address that is given, and two required where two are named and the policy is left out.
func convertFamilies(spec *corev1.ServiceSpec, ips []netip.Addr) (lb.FamilyRequest, error) {
	families, err := convertIPFamilies(spec.IPFamilies)
	if err != nil {
		return lb.FamilyRequest{}, err
	}
	for i, ip := range ips {
		switch family := lb.FamilyOf(ip); {
		case i == len(families):
			families = append(families, family)
		case families[i] != family:
			return lb.FamilyRequest{}, fmt.Errorf("spec.clusterIPs[%d] %s is %s, but spec.ipFamilies[%d] %s", i, ip, family, i, families[i])
		}
	}
	if len(families) == maxFamilies && families[0] == families[1] {
		return lb.FamilyRequest{}, fmt.Errorf("spec.ipFamilies and spec.clusterIPs name %s twice", families[0])
	}
	request := lb.FamilyRequest{Families: families, Policy: lb.SingleStack}
	switch p := spec.IPFamilyPolicy; {
	case p == nil && len(families) == maxFamilies:
		request.Policy = lb.RequireDualStack
	case p == nil:
	case *p == corev1.IPFamilyPolicySingleStack || *p == corev1.IPFamilyPolicyPreferDualStack || *p == corev1.IPFamilyPolicyRequireDualStack:
		request.Policy = lb.FamilyPolicy(*p)
	default:
		return lb.FamilyRequest{}, fmt.Errorf("spec.ipFamilyPolicy %.80q is not one of SingleStack, PreferDualStack and RequireDualStack", *p)
	}
	if request.Policy == lb.SingleStack && len(families) == maxFamilies {
		return lb.FamilyRequest{}, errors.New("spec.ipFamilyPolicy SingleStack: spec.ipFamilies or spec.clusterIPs name two families; write PreferDualStack or RequireDualStack, or name one")
	}
	return request, nil
}

func convertIPFamilies(wanted []corev1.IPFamily) ([]lb.Family, error) {
	if len(wanted) > maxFamilies {
		return nil, fmt.Errorf("spec.ipFamilies has %d entries, at most IPv4 and IPv6 are allowed", len(wanted))
	}
	var families []lb.Family
	for _, f := range wanted {
		switch f {
		case corev1.IPv4Protocol:
			families = append(families, lb.IPv4)
		case corev1.IPv6Protocol:
			families = append(families, lb.IPv6)
		default:
			return nil, fmt.Errorf("spec.ipFamilies has %.80q: want IPv4 or IPv6", f)
		}
	}
	if len(families) == maxFamilies && families[0] == families[1] {
		return nil, fmt.Errorf("spec.ipFamilies has %s twice", families[0])
	}
	return families, nil
}
