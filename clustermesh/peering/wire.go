package peering

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"causeway/clustermesh/gossip"
	"causeway/identity"
	"causeway/identity/pki"
)

// The messages of the API and the types of this package. What comes from others is checked here, and only here.

func clusterMessage(c identity.ClusterInfo) *Cluster {
	m := &Cluster{Name: c.Name, Id: uint32(c.ID), Encryption: string(c.Encryption), Version: c.Version, Capabilities: c.Capabilities}
	for _, p := range c.PodCIDRs {
		m.PodCidrs = append(m.PodCidrs, p.String())
	}
	for _, p := range c.ServiceCIDRs {
		m.ServiceCidrs = append(m.ServiceCidrs, p.String())
	}
	return m
}

func (m *Cluster) info() (c identity.ClusterInfo, err error) {
	if m.GetId() > 255 {
		return c, fmt.Errorf("cluster ID %d is not 1 to 255", m.GetId())
	}
	c = identity.ClusterInfo{
		Name: m.GetName(), ID: identity.ClusterID(m.GetId()), Version: m.GetVersion(), Capabilities: m.GetCapabilities(),
		Encryption: identity.Encryption(m.GetEncryption()),
	}
	for _, text := range m.GetServiceCidrs() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return c, errors.New("a service CIDR is none")
		}
		c.ServiceCIDRs = append(c.ServiceCIDRs, p)
	}
	for _, text := range m.GetPodCidrs() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return c, errors.New("a pod CIDR is none")
		}
		c.PodCIDRs = append(c.PodCIDRs, p)
	}
	return c, identity.CheckCluster(c)
}

func (k known) message() *Known {
	return &Known{
		Cluster: clusterMessage(k.info), State: string(k.state), Since: k.since.UnixMilli(), Replaceable: k.replaceable, Introduced: k.introduced, Authority: k.authority[:],
	}
}

func (m *Known) known() (k known, err error) {
	if k.info, err = m.GetCluster().info(); err != nil {
		return k, err
	}
	if len(m.GetAuthority()) != len(k.authority) {
		return k, errors.New("the fingerprint of a peer's authority has a wrong length")
	}
	copy(k.authority[:], m.GetAuthority())
	switch k.state = State(m.GetState()); k.state {
	case Joining, Connected, Left:
	default:
		return k, errors.New("the state of a peer is unknown")
	}
	k.since, k.replaceable, k.introduced = time.UnixMilli(m.GetSince()).UTC(), m.GetReplaceable(), m.GetIntroduced()
	return k, nil
}

func (s side) message() *Side {
	m := &Side{
		Protocol: s.protocol, Mesh: s.mesh, Cluster: clusterMessage(s.info), Authority: s.pem, StoreEndpoints: s.store, Endpoints: s.endpoints, Ring: s.ring, Requires: s.requires,
	}
	for _, k := range s.peers {
		m.Peers = append(m.Peers, k.message())
	}
	return m
}

// maxPeers of a cluster: there are no more IDs.
const maxPeers = 255

// parseSide reads what a cluster says of itself.
func parseSide(m *Side) (s side, err error) {
	s = side{protocol: m.GetProtocol(), mesh: m.GetMesh(), store: m.GetStoreEndpoints(), endpoints: m.GetEndpoints(), ring: m.GetRing(), requires: m.GetRequires()}
	if s.info, err = m.GetCluster().info(); err != nil {
		return s, err
	}
	if err := checkMesh(s.mesh); err != nil {
		return s, err
	}
	if err := checkStoreEndpoints(s.store); err != nil {
		return s, fmt.Errorf("its store: %w", err)
	}
	if err := checkEndpoints(s.endpoints); err != nil {
		return s, fmt.Errorf("its API: %w", err)
	}
	authority, err := parseAuthority(m.GetAuthority())
	if err != nil {
		return s, fmt.Errorf("its authority: %w", err)
	}
	s.authority, s.pem = pki.FingerprintOf(authority), certPEM(authority.Raw)
	if len(m.GetPeers()) > maxPeers || len(s.requires) > identity.MaxCapabilities {
		return s, errors.New("it has more peers or requirements than there can be")
	}
	for i, capability := range s.requires {
		s.requires[i] = plain(capability)
	}
	for _, p := range m.GetPeers() {
		k, err := p.known()
		if err != nil {
			return s, fmt.Errorf("one of its peers: %w", err)
		}
		s.peers = append(s.peers, k)
	}
	return s, nil
}

// ringOf names the key that a ring encrypts with, without telling it.
func ringOf(r gossip.Ring) []byte {
	if len(r.Keys) == 0 {
		return nil
	}
	sum := sha256.Sum256(append([]byte("causeway gossip ring\n"), r.Keys[0]...))
	return sum[:]
}

// checkKeys refuses what are no gossip keys.
func checkKeys(keys [][]byte) error {
	if len(keys) == 0 || len(keys) > 8 {
		return fmt.Errorf("it has sent %d gossip keys instead of 1 to 8", len(keys))
	}
	for _, key := range keys {
		if len(key) != 32 || bytes.Count(key, []byte{0}) == len(key) {
			return errors.New("a gossip key that it has sent is none")
		}
	}
	return nil
}

func checkMessage(c Check) *CheckResult {
	return &CheckResult{
		Name: c.Name, From: c.From, To: c.To, Target: plain(c.Target), Outcome: string(c.Outcome), Detail: plain(c.Detail), Cause: plain(c.Cause), Took: int64(c.Took),
	}
}

// check reads a check that a peer has made; it says so, whatever else it claims.
func (m *CheckResult) check(by, toward string) Check {
	c := Check{
		Name: plain(m.GetName()), From: by, To: toward, Target: plain(m.GetTarget()), Detail: plain(m.GetDetail()), Cause: plain(m.GetCause()),
		Outcome: Failed, Took: max(0, time.Duration(m.GetTook())),
	}
	if o := Outcome(m.GetOutcome()); o == OK || o == Skipped {
		c.Outcome = o
	}
	return c
}
