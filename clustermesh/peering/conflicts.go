package peering

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"causeway/identity"
	"causeway/identity/pki"
)

// side is what a cluster says of itself when two are about to be joined. What follows from two of them is found on both
// sides, before anything is written.
type side struct {
	protocol  uint32
	mesh      string
	info      identity.ClusterInfo
	peers     []known
	authority pki.Fingerprint
	pem       []byte // of the authority
	store     []string
	endpoints []string
	ring      []byte   // the SHA-256 of the first gossip key
	requires  []string // capabilities
}

// known is a cluster that a side has a record of.
type known struct {
	info        identity.ClusterInfo
	state       State
	since       time.Time
	replaceable bool
	introduced  bool // it may be introduced
	authority   pki.Fingerprint
}

// joiningFor is how long a peer may take to be connected; after that a record of it may be replaced.
const joiningFor = 2 * time.Minute

// replaceable tells whether a new connection may take the place of a record, without a disconnect first.
func replaceable(p Peer, now time.Time) bool {
	if p.State == Left || p.State == Joining && now.Sub(p.Since) > joiningFor || now.After(p.UserExpires) {
		return true
	}
	cert, err := pki.ParseCert([]byte(p.Cert))
	return err != nil || now.After(cert.NotAfter)
}

// conflicts returns what is in the way of joining, a sentence each, for people at the joiner: all at once, so that nobody has to try again and again.
func conflicts(joiner, issuer side) (all []string) {
	ours, theirs := joiner.info.Name, issuer.info.Name
	if joiner.protocol != issuer.protocol {
		return []string{protocolConflict(ours, joiner.protocol, theirs, issuer.protocol)}
	}
	if joiner.authority == issuer.authority {
		return []string{sameAuthority(ours, theirs)}
	}
	if joiner.mesh != issuer.mesh {
		all = append(all, fmt.Sprintf("cluster %s is of mesh %s and cluster %s of mesh %s: give both the same gossip.mesh", ours, joiner.mesh, theirs, issuer.mesh))
	}
	all = append(all, nameConflicts(joiner, issuer)...)
	all = append(all, idConflicts(joiner, issuer)...)
	all = append(all, rangeConflicts(joiner, issuer)...)
	all = append(all, familyConflicts(joiner, issuer)...)
	all = append(all, encryptionConflicts(joiner, issuer)...)
	all = append(all, capabilityConflicts(joiner, issuer)...)
	return append(all, meshConflicts(joiner, issuer)...)
}

func sameAuthority(joiner, issuer string) string {
	if joiner == issuer {
		return fmt.Sprintf("the token is of this very cluster, %s: run connect in the cluster that is to be joined with it", joiner)
	}
	return fmt.Sprintf("clusters %s and %s have the same certificate authority, so each could take itself for the other: give one of them another", joiner, issuer)
}

func protocolConflict(joiner string, protocol uint32, issuer string, of uint32) string {
	older := joiner
	if protocol > of {
		older = issuer
	}
	return fmt.Sprintf("cluster %s speaks version %d of the peering protocol and cluster %s version %d: update Causeway in %s", joiner, protocol, issuer, of, older)
}

func nameConflicts(joiner, issuer side) (all []string) {
	ours, theirs := joiner.info.Name, issuer.info.Name
	if ours == theirs {
		return []string{fmt.Sprintf("both clusters are called %s: give one of them another cluster.name", ours)}
	}
	here, connectedHere := joiner.peer(theirs)
	there, connectedThere := issuer.peer(ours)
	switch {
	case connectedHere && !here.replaceable:
		all = append(all, alreadyConnected(here, theirs, theirs))
	case connectedThere && !there.replaceable && there.authority != joiner.authority:
		all = append(all, fmt.Sprintf("cluster %s is connected with another cluster called %s: give this one another cluster.name, or run in %s: clustermesh disconnect %s",
			theirs, ours, theirs, ours))
	}
	// Otherwise the record there is of a connection that this cluster has ended without the other knowing. That it is the same cluster
	// it proves by what its authority signs.
	return all
}

func alreadyConnected(k known, with, name string) string {
	if k.state == Joining {
		return fmt.Sprintf("this cluster is being connected with %s since %s: wait for that, or try again %s later", with, stamp(k.since), joiningFor)
	}
	return fmt.Sprintf("already connected with %s since %s: disconnect first, with clustermesh disconnect %s", with, stamp(k.since), name)
}

func idConflicts(joiner, issuer side) (all []string) {
	free := freeID(joiner, issuer)
	for _, c := range issuer.others(joiner) {
		if c.ID == joiner.info.ID {
			all = append(all, fmt.Sprintf("cluster ID %d of %s is taken by %s: %s", c.ID, joiner.info.Name, c.Name, anotherID(joiner.info.Name, free)))
		}
	}
	for _, c := range joiner.others(issuer)[1:] {
		if c.ID == issuer.info.ID {
			all = append(all, fmt.Sprintf("cluster ID %d of %s is taken by %s, a peer of this cluster: %s",
				c.ID, issuer.info.Name, c.Name, anotherID(issuer.info.Name, free)))
		}
	}
	return all
}

// anotherID says how a cluster gets another ID. One that is configured is not changed under its feet.
func anotherID(cluster string, free identity.ClusterID) string {
	return fmt.Sprintf("leave cluster.id out of the configuration of %s's agents and start them again, one after the other; then it takes one that is free (such as %d) when it joins", cluster, free)
}

// freeID returns the smallest ID that no cluster of either side has; 0 if there is none.
func freeID(joiner, issuer side) identity.ClusterID {
	taken := map[int]bool{}
	for _, c := range slices.Concat(joiner.others(side{}), issuer.others(side{})) {
		taken[int(c.ID)] = true
	}
	for id := 1; id <= 255; id++ {
		if !taken[id] {
			return identity.ClusterID(id)
		}
	}
	return 0
}

// rangeConflicts compares each cluster of the one side with each of the other, since they will all be one mesh.
func rangeConflicts(joiner, issuer side) (all []string) {
	for _, a := range joiner.others(issuer) {
		for _, b := range issuer.others(joiner) {
			if a.Name == b.Name {
				continue // the same cluster; two of one name are told elsewhere
			}
			for _, x := range ranges(a) {
				for _, y := range ranges(b) {
					if x.prefix.Overlaps(y.prefix) {
						all = append(all, fmt.Sprintf("%s %s of %s and %s %s of %s overlap, so an address would be in both: give one of the clusters another range",
							x.kind, x.prefix, a.Name, y.kind, y.prefix, b.Name))
					}
				}
			}
		}
	}
	return all
}

type addressRange struct {
	kind   string
	prefix netip.Prefix
}

func ranges(c identity.ClusterInfo) (all []addressRange) {
	for _, p := range c.PodCIDRs {
		all = append(all, addressRange{"pod CIDR", p})
	}
	for _, p := range c.ServiceCIDRs {
		all = append(all, addressRange{"service CIDR", p})
	}
	return all
}

func capabilityConflicts(joiner, issuer side) (all []string) {
	for _, pair := range [][2]side{{joiner, issuer}, {issuer, joiner}} {
		needs, has := pair[0], pair[1]
		for _, capability := range needs.requires {
			if !slices.Contains(has.info.Capabilities, capability) {
				all = append(all, fmt.Sprintf("cluster %s lacks %s, which cluster %s needs of its peers: update or configure all nodes of %s",
					has.info.Name, capability, needs.info.Name, has.info.Name))
			}
		}
	}
	return all
}

// meshConflicts: a cluster joins a mesh, but two meshes don't become one, since each has gossip keys of its own.
func meshConflicts(joiner, issuer side) (all []string) {
	if len(joiner.ring) > 0 && slices.Equal(joiner.ring, issuer.ring) {
		return nil // they are of one mesh already
	}
	for _, p := range joiner.peers {
		known := slices.ContainsFunc(issuer.peers, func(k known) bool { return k.authority == p.authority && k.state != Left })
		if p.state == Left || known || p.authority == issuer.authority {
			continue
		}
		ours, theirs := joiner.info.Name, issuer.info.Name
		if len(issuer.others(joiner)) > 1 {
			return []string{fmt.Sprintf("cluster %s is in a mesh with %s, and %s in another: meshes don't merge, so disconnect %s from its peers first, and then connect it",
				ours, p.info.Name, theirs, ours)}
		}
		return []string{fmt.Sprintf("cluster %s is in a mesh with %s already: create the token there, in %s, and run connect in %s instead", ours, p.info.Name, ours, theirs)}
	}
	return nil
}

func (s side) peer(name string) (known, bool) {
	i := slices.IndexFunc(s.peers, func(k known) bool { return k.info.Name == name })
	if i < 0 {
		return known{}, false
	}
	return s.peers[i], true
}

// others returns the clusters of a side, itself first, without another side's own and without those that have left.
func (s side) others(than side) []identity.ClusterInfo {
	all := []identity.ClusterInfo{s.info}
	for _, k := range s.peers {
		if k.state != Left && k.info.Name != than.info.Name {
			all = append(all, k.info)
		}
	}
	return all
}

// stamp writes a time for people.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
