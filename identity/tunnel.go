package identity

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Encryption says which packets between nodes a cluster encrypts.
type Encryption string

const (
	EncryptAll          Encryption = "all"           // all that leaves a node for another one
	EncryptInterCluster Encryption = "inter-cluster" // what goes to nodes of other clusters
	EncryptOff          Encryption = "off"
)

// ParseEncryption reads a mode as configured; empty is EncryptAll.
func ParseEncryption(s string) (Encryption, error) {
	switch e := Encryption(s); e {
	case "":
		return EncryptAll, nil
	case EncryptAll, EncryptInterCluster, EncryptOff:
		return e, nil
	}
	return "", fmt.Errorf("encryption mode %s is not one of all, inter-cluster and off", quote(s))
}

// Covers tells whether packets to a node are encrypted in this mode: one of the same cluster, or of another.
func (e Encryption) Covers(sameCluster bool) bool {
	return e == EncryptAll || e == EncryptInterCluster && !sameCluster
}

// WireGuardKeySize is the length of a Curve25519 public key, in bytes.
const WireGuardKeySize = 32

// WireGuardKey is the public key of a WireGuard device. Its text is base64, as "wg show" has it.
type WireGuardKey [WireGuardKeySize]byte

func (k WireGuardKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText implements encoding.TextMarshaler.
func (k WireGuardKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. A key of another length is refused, and what Check refuses.
func (k *WireGuardKey) UnmarshalText(text []byte) error {
	if len(text) > 2*WireGuardKeySize {
		return fmt.Errorf("WireGuard key of %d characters; 44 are right", len(text))
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(string(text))
	if err != nil {
		return errors.New("WireGuard key is not base64")
	}
	if len(raw) != WireGuardKeySize {
		return fmt.Errorf("WireGuard key of %d bytes; a public key has %d", len(raw), WireGuardKeySize)
	}
	key := WireGuardKey(raw)
	if err := key.Check(); err != nil {
		return err
	}
	*k = key
	return nil
}

// TunnelSlots is how many keys a node may have at a time: one, and while it is changed the new one too. Each is of a slot, 0 or 1, with a
// device, a UDP port and a tunnel address of its own, so both work side by side and no packet is lost.
const TunnelSlots = 2

// TunnelKey is a key that a node can be reached with.
type TunnelKey struct {
	Slot uint8        `json:"slot"`
	Key  WireGuardKey `json:"key"`
	// Port is the UDP port of the slot's device, at the node's address.
	Port uint16 `json:"port"`
}

// TunnelAddress returns the address of the node's end of the encrypted tunnel in a slot: the third or fourth one of its first pod
// range, which no pod has (the second one is PodSide). It exists only inside of WireGuard, which binds it to the slot's key. It is invalid if the node has no range.
func (n *Node) TunnelAddress(slot uint8) netip.Addr {
	a := n.PodSide()
	if !a.IsValid() || slot >= TunnelSlots {
		return netip.Addr{}
	}
	for range int(slot) + 1 {
		a = a.Next()
	}
	if !n.PodCIDRs[0].Contains(a) {
		return netip.Addr{} // too small a range: it is another node's
	}
	return a
}

// ReservedPodAddresses is how many addresses at the start of a node's first pod range no pod gets: the network's own, PodSide and the tunnel addresses.
const ReservedPodAddresses = 2 + TunnelSlots

// TunnelMode is how packets get to a node.
type TunnelMode string

const (
	TunnelWireGuard TunnelMode = "wireguard" // in VXLAN inside of WireGuard
	TunnelPlain     TunnelMode = "plain"     // in VXLAN on the underlay, as configured
	TunnelClosed    TunnelMode = "closed"    // not at all: they would have to be encrypted and cannot be
)

// Tunnel is a row of the tunnels table, which is derived: how packets get from this node to another one.
type Tunnel struct {
	Cluster   string     `json:"cluster"`
	ClusterID ClusterID  `json:"clusterID"`
	Node      string     `json:"node"`
	Mode      TunnelMode `json:"mode"`
	// Why the tunnel is closed, a sentence.
	Why string `json:"why,omitempty"`
	// Address of the node on the underlay, by which the address table names it.
	Address netip.Addr `json:"address"`
	// PodCIDRs of the node.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	// Keys of the node; those that there are get to be WireGuard peers in mode wireguard.
	Keys []TunnelKey `json:"keys,omitempty"`
	// Local and Remote are the outer addresses of VXLAN packets that this node sends to that one: tunnel addresses in mode
	// wireguard, underlay addresses in mode plain, none in mode closed.
	Local  netip.Addr `json:"localAddress,omitzero"`
	Remote netip.Addr `json:"remoteAddress,omitzero"`
	// MTU is the largest IP packet of pods that gets to the node, in bytes.
	MTU int `json:"mtu"`
	// Self is true for the row of this node, which nothing is sent to.
	Self bool `json:"self,omitempty"`
}

// NodeName returns the node's name in the mesh.
func (t *Tunnel) NodeName() NodeName { return NodeName{t.Cluster, t.Node} }

// TunnelAddress returns the node's tunnel address of a slot; see Node.TunnelAddress.
func (t *Tunnel) TunnelAddress(slot uint8) netip.Addr {
	return (&Node{PodCIDRs: t.PodCIDRs}).TunnelAddress(slot)
}

// Equal tells whether two rows say the same.
func (t Tunnel) Equal(other Tunnel) bool {
	return t.Cluster == other.Cluster && t.ClusterID == other.ClusterID && t.Node == other.Node && t.Mode == other.Mode && t.Why == other.Why &&
		t.Address == other.Address && slices.Equal(t.PodCIDRs, other.PodCIDRs) && slices.Equal(t.Keys, other.Keys) &&
		t.Local == other.Local && t.Remote == other.Remote && t.MTU == other.MTU && t.Self == other.Self
}
