package peering

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"causeway/identity"
)

// encryptionConflicts: what one cluster encrypts the other must be able to read, and nothing may be sent in the clear that one of them wants
// encrypted. What they do among their own nodes is their own affair.
func encryptionConflicts(joiner, issuer side) []string {
	ours, theirs := joiner.info.EncryptionMode(), issuer.info.EncryptionMode()
	if ours.Covers(false) == theirs.Covers(false) {
		return nil
	}
	encrypts, plain := joiner.info, issuer.info
	if theirs.Covers(false) {
		encrypts, plain = plain, encrypts
	}
	return []string{fmt.Sprintf("cluster %s encrypts (encryption.mode %s) and cluster %s does not (%s): give both all or inter-cluster, or both off, as encryption.mode of all of their agents",
		encrypts.Name, encrypts.EncryptionMode(), plain.Name, plain.EncryptionMode())}
}

// familyConflicts: without an address family in common nobody of the one reaches anybody of the other.
func familyConflicts(joiner, issuer side) (all []string) {
	a, b := podFamilies(joiner.info), podFamilies(issuer.info)
	if !a.meets(b) {
		all = append(all, fmt.Sprintf("pods of cluster %s have %s addresses only and those of cluster %s %s ones, so none could reach another: give one of the clusters a range of the other family too, in cluster.podCIDRs",
			joiner.info.Name, a, issuer.info.Name, b))
	}
	a, b = endpointFamilies(joiner), endpointFamilies(issuer)
	if a != (families{}) && b != (families{}) && !a.meets(b) {
		all = append(all, fmt.Sprintf("cluster %s is reached at %s addresses only and cluster %s at %s ones, so their nodes cannot reach each other: give the nodes of one an address of the other family as node.address, or name endpoints that the other can reach in peering.endpoints and peering.storeEndpoints",
			joiner.info.Name, a, issuer.info.Name, b))
	}
	return all
}

// families of addresses that there are.
type families struct{ v4, v6 bool }

func (f families) meets(g families) bool { return f.v4 && g.v4 || f.v6 && g.v6 }

func (f families) String() string {
	switch f {
	case families{v4: true}:
		return "IPv4"
	case families{v6: true}:
		return "IPv6"
	case families{}:
		return "no"
	}
	return "IPv4 and IPv6"
}

func (f *families) add(a netip.Addr) {
	if a.Unmap().Is4() {
		f.v4 = true
	} else {
		f.v6 = true
	}
}

func podFamilies(c identity.ClusterInfo) (f families) {
	for _, p := range c.PodCIDRs {
		f.add(p.Addr())
	}
	return f
}

// endpointFamilies returns those of the addresses that a cluster is reached at; none if one of them is a name, which may be anything.
func endpointFamilies(s side) (f families) {
	for _, endpoint := range slices.Concat(s.store, s.endpoints) {
		host, _, err := net.SplitHostPort(strings.TrimPrefix(endpoint, "https://"))
		if err != nil {
			return families{}
		}
		a, err := netip.ParseAddr(host)
		if err != nil {
			return families{}
		}
		f.add(a)
	}
	return f
}
