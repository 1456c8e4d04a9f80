package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Family is the family of an address. A frontend has one, and leads to backends of the same alone.
type Family uint8

const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf returns the family of a valid address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// FamilyPolicy says of how many families a service's cluster IPs are, as spec.ipFamilyPolicy of a Kubernetes Service does.
type FamilyPolicy string

const (
	SingleStack      FamilyPolicy = "SingleStack"
	PreferDualStack  FamilyPolicy = "PreferDualStack" // both, if the cluster has both
	RequireDualStack FamilyPolicy = "RequireDualStack"
)

// FamilyRequest is what a service asks for: the zero one for SingleStack, of whichever family its cluster prefers.
type FamilyRequest struct {
	Policy FamilyPolicy
	// Families in the order of the cluster IPs, at most two; those that are missing are the cluster's to choose.
	Families []Family
}

// Resolve returns the families, in order, that a service's cluster IPs have in a cluster with the given service ranges, by the
// rules of Kubernetes' API server: families that are asked for come first, else the first range's, and with a policy of dual stack
// the other one follows. The error is a sentence for who asks: a family that the cluster does not have, or one where two are required.
func (r FamilyRequest) Resolve(ranges []netip.Prefix) ([]Family, error) {
	var has []Family
	for _, p := range ranges {
		has = append(has, FamilyOf(p.Addr()))
	}
	if len(has) == 0 {
		return nil, errors.New("the cluster has no service range")
	}
	for _, f := range r.Families {
		if !slices.Contains(has, f) {
			return nil, fmt.Errorf("%s is asked for, but the cluster's service ranges %s have none; add one to cluster.serviceCIDRs, or ask for %s", f, ranges, has[0])
		}
	}
	if r.Policy == RequireDualStack && len(has) < 2 {
		return nil, fmt.Errorf("ipFamilyPolicy RequireDualStack: the cluster has only %s service addresses (%s); write PreferDualStack, or add a range of the other family to cluster.serviceCIDRs",
			has[0], ranges[0])
	}
	families := slices.Clone(r.Families)
	if len(families) == 0 {
		families = has[:1:1]
	}
	if r.Policy != PreferDualStack && r.Policy != RequireDualStack {
		return families, nil
	}
	for _, f := range has {
		if !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	return families, nil
}

// families returns those of the service's cluster IPs: its backends have addresses of these only, since whoever declares it for one
// family may run programs that listen on nothing else. A headless service, which has none, has both.
func (s *Service) families() []Family {
	if s.Headless {
		return []Family{IPv4, IPv6}
	}
	var families []Family
	for _, ip := range s.ClusterIPs {
		if f := FamilyOf(ip); !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	return families
}
