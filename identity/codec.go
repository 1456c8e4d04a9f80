package identity

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"causeway/kvstore"
	"causeway/lb"
)

// The stored forms are JSON objects of their own, so that a row of a table may grow without
// changing what other clusters read. docs/formats.md is their reference.

// storedNode is the value at NodeKey.
type storedNode struct {
	Cluster   string         `json:"cluster"`
	ClusterID ClusterID      `json:"clusterID"`
	Name      string         `json:"name"`
	Address   netip.Addr     `json:"address"`
	PodCIDRs  []netip.Prefix `json:"podCIDRs"`
	Instance  string         `json:"instance"`
	GossipKey []byte         `json:"gossipKey,omitempty"`
	// TunnelKeys, the preferred one first.
	TunnelKeys []TunnelKey `json:"tunnelKeys,omitempty"`
	MTU        int         `json:"mtu,omitempty"`
	Version
}

// storedAddress is the value at AddressKey; its cluster is in the key.
type storedAddress struct {
	IP       netip.Addr `json:"ip"`
	Identity Number     `json:"identity"`
	Node     string     `json:"node"`
	Endpoint string     `json:"endpoint,omitempty"`
	Version
}

// storedIdentity is the value at IdentityKey and at LabelsKey.
type storedIdentity struct {
	Number Number `json:"id"`
	Labels Labels `json:"labels"`
}

// EncodeNode returns the stored form of n, for NodeKey.
func EncodeNode(n Node) []byte {
	return encode(storedNode{
		Cluster: n.Cluster, ClusterID: n.ClusterID, Name: n.Name, Address: n.Address,
		PodCIDRs: n.PodCIDRs, Instance: n.Instance, GossipKey: n.GossipKey, TunnelKeys: n.TunnelKeys, MTU: n.MTU, Version: n.Version,
	})
}

// DecodeNode reads the node stored under key. What it returns is complete and bounded, and its key says
// the same as its fields; whether the store may speak for it is Channel's to say. The error is a sentence for people.
func DecodeNode(key string, value []byte) (Node, error) {
	n, err := decodeNode(key, value)
	if err != nil {
		return Node{}, fmt.Errorf("node entry %s: %w", entryName(key, "nodes/"), err)
	}
	return n, nil
}

func decodeNode(key string, value []byte) (Node, error) {
	parts, err := splitKey(key, kvstore.Prefix+"nodes/", 2)
	if err != nil {
		return Node{}, err
	}
	var s storedNode
	if err := lb.Unmarshal(value, &s); err != nil {
		return Node{}, err
	}
	n := Node{
		Cluster: s.Cluster, ClusterID: s.ClusterID, Name: s.Name, Address: s.Address,
		PodCIDRs: s.PodCIDRs, Instance: s.Instance, GossipKey: s.GossipKey, TunnelKeys: s.TunnelKeys, MTU: s.MTU, Version: s.Version,
	}
	if err := checkNode(n); err != nil {
		return Node{}, err
	}
	if len(n.GossipKey) == 0 {
		n.GossipKey = nil // as one that was left out
	}
	if len(n.TunnelKeys) == 0 {
		n.TunnelKeys = nil
	}
	if n.Cluster != parts[0] || n.Name != parts[1] {
		return Node{}, fmt.Errorf("value is of node %s/%s, but the key of node %s/%s", n.Cluster, n.Name, parts[0], parts[1])
	}
	return n, nil
}

func checkNode(n Node) error {
	if err := lb.CheckName("cluster", n.Cluster); err != nil {
		return err
	}
	if err := lb.CheckName("node", n.Name); err != nil {
		return err
	}
	if n.ClusterID == 0 {
		return errors.New("cluster ID is missing")
	}
	if err := lb.CheckAddress(n.Address); err != nil {
		return err
	}
	if err := checkPodCIDRs(n.PodCIDRs); err != nil {
		return err
	}
	// The first addresses of the range are the node's own.
	if p := n.PodCIDRs[0]; p.Addr().BitLen()-p.Bits() < 3 {
		return fmt.Errorf("pod CIDR %s is too small: a node's first one has at least 8 addresses", p)
	}
	if containsAddr(n.PodCIDRs, n.Address) {
		return fmt.Errorf("address %s lies in the node's own pod CIDRs", n.Address)
	}
	if err := checkPlain("instance", n.Instance); err != nil {
		return err
	}
	if len(n.GossipKey) != 0 && len(n.GossipKey) != ed25519.PublicKeySize {
		return fmt.Errorf("gossip key of %d bytes; an Ed25519 public key has %d", len(n.GossipKey), ed25519.PublicKeySize)
	}
	if err := checkTunnelKeys(n.TunnelKeys); err != nil {
		return err
	}
	if n.MTU != 0 && (n.MTU < MinNodeMTU || n.MTU > MaxNodeMTU) {
		return fmt.Errorf("MTU %d is not %d to %d", n.MTU, MinNodeMTU, MaxNodeMTU)
	}
	return n.Version.check()
}

// check refuses a version that no agent has written.
func (v Version) check() error {
	if v.Incarnation == 0 {
		return errors.New("incarnation is missing")
	}
	return nil
}

// EncodeAddress returns the stored form of a, which must be a single address, for AddressKey.
func EncodeAddress(a Address) []byte {
	return encode(storedAddress{
		IP: a.Prefix.Addr(), Identity: a.Identity, Node: a.Node, Endpoint: a.Endpoint, Version: a.Version,
	})
}

// DecodeAddress reads the address stored under key. The cluster's name comes from the key, its ID from the
// identity; NodeAddress stays empty, it is for the nodes table to say. Otherwise it is like DecodeNode.
func DecodeAddress(key string, value []byte) (Address, error) {
	a, err := decodeAddress(key, value)
	if err != nil {
		return Address{}, fmt.Errorf("address entry %s: %w", entryName(key, "addresses/"), err)
	}
	return a, nil
}

func decodeAddress(key string, value []byte) (Address, error) {
	parts, err := splitKey(key, kvstore.Prefix+"addresses/", 2)
	if err != nil {
		return Address{}, err
	}
	if err := lb.CheckName("cluster", parts[0]); err != nil {
		return Address{}, err
	}
	var s storedAddress
	if err := lb.Unmarshal(value, &s); err != nil {
		return Address{}, err
	}
	if err := checkAddress(s); err != nil {
		return Address{}, err
	}
	if s.IP.String() != parts[1] {
		return Address{}, fmt.Errorf("value is of address %s, but the key of %s", s.IP, quote(parts[1]))
	}
	return Address{
		Cluster: parts[0], ClusterID: s.Identity.Cluster(), Prefix: netip.PrefixFrom(s.IP, s.IP.BitLen()),
		Identity: s.Identity, Node: s.Node, Endpoint: s.Endpoint, Version: s.Version,
	}, nil
}

func checkAddress(s storedAddress) error {
	if err := lb.CheckAddress(s.IP); err != nil {
		return err
	}
	if err := checkNumber(s.Identity); err != nil {
		return err
	}
	if err := lb.CheckName("node", s.Node); err != nil {
		return err
	}
	if s.Endpoint != "" {
		if err := lb.CheckEndpoint(s.Endpoint); err != nil {
			return err
		}
	}
	return s.Version.check()
}

func checkNumber(n Number) error {
	if !n.Valid() {
		return fmt.Errorf("identity %d is not one that a cluster allocates (24 bits: cluster 1 to 255, then %d to %d)", uint32(n), MinLocal, MaxLocal)
	}
	return nil
}

// EncodeIdentity returns the stored form of i, for IdentityKey and LabelsKey.
func EncodeIdentity(i Identity) []byte {
	return encode(storedIdentity{Number: i.Number, Labels: i.Labels})
}

// DecodeIdentity reads the identity stored under an IdentityKey; the cluster's name comes from the key.
// Otherwise it is like DecodeNode.
func DecodeIdentity(key string, value []byte) (Identity, error) {
	i, err := decodeIdentity(key, value)
	if err == nil && key != IdentityKey(i.Cluster, i.Number) {
		err = fmt.Errorf("value is of identity %d, but the key of another", uint32(i.Number))
	}
	if err != nil {
		return Identity{}, fmt.Errorf("identity entry %s: %w", entryName(key, "identities/"), err)
	}
	return i, nil
}

// decodeLabels reads the identity stored under a LabelsKey. That the key is the hash of the labels
// is not checked: two labels with one hash are for the Allocator to notice.
func decodeLabels(key string, value []byte) (Identity, error) {
	i, err := decodeIdentity(key, value)
	if err != nil {
		return Identity{}, fmt.Errorf("labels entry %s: %w", entryName(key, "identities/"), err)
	}
	return i, nil
}

func decodeIdentity(key string, value []byte) (Identity, error) {
	parts, err := splitKey(key, kvstore.Prefix+"identities/", 3)
	if err != nil {
		return Identity{}, err
	}
	if err := lb.CheckName("cluster", parts[0]); err != nil {
		return Identity{}, err
	}
	var s storedIdentity
	if err := lb.Unmarshal(value, &s); err != nil {
		return Identity{}, err
	}
	if err := checkNumber(s.Number); err != nil {
		return Identity{}, err
	}
	if err := CheckLabels(s.Labels); err != nil {
		return Identity{}, err
	}
	return Identity{Cluster: parts[0], Number: s.Number, Labels: s.Labels}, nil
}

// entryName is the part of a key that tells the entry from others of its kind, for errors.
func entryName(key, kind string) string {
	rest, found := strings.CutPrefix(key, kvstore.Prefix+kind)
	if !found || len(rest) > 200 {
		return quote(key)
	}
	if _, name, ok := strings.Cut(rest, "/"); ok && kind == "addresses/" {
		return name // the channel says the cluster
	}
	return rest
}

// encode marshals rows of strings, numbers and addresses, which cannot fail.
func encode(row any) []byte {
	value, err := json.Marshal(row)
	if err != nil {
		panic(fmt.Sprintf("identity: %T does not marshal: %v", row, err))
	}
	return value
}
