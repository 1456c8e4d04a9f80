package gossip

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"causeway/identity"
)

// Kinds of keys that deltas have. Those of nodes' entries are the keys of the store without its prefix; the others
// are gossip's own, and in no store.
const (
	kindAddress = "addresses" // addresses/CLUSTER/IP
	kindSlice   = "slices"    // slices/CLUSTER/NAMESPACE/SERVICE/SLICE
	kindFacts   = "facts"     // facts/CLUSTER/NODE: what a node says of itself
	kindVerdict = "verdicts"  // verdicts/CLUSTER/NODE: what a cluster says of a node's life
	kindKeyring = "keyring"   // keyring: the mesh's gossip keys
)

// Bounds of a delta, in bytes. A value of the store has at most 64 KiB.
const (
	maxKey   = 600
	maxValue = 64 << 10
)

// Delta is one entry that its owner has written or withdrawn, signed by the node that says so. The newest of a key
// wins, whichever way it came. On the wire it is a CBOR array (RFC 8949): docs/formats.md.
type Delta struct {
	_ struct{} `cbor:",toarray"`
	// Cluster and Node that sign.
	Cluster, Node string
	Key           string
	// Incarnation and Sequence order what is said of a key; for a verdict they are its epoch and its severity.
	Incarnation, Sequence uint64
	// Withdrawn: the entry is gone. It beats the entry of the same version.
	Withdrawn bool
	// Value is what the store has or will have under the key, or gossip's own record in CBOR.
	Value []byte
	// Signature of the above by the node's Ed25519 key (RFC 8032), which its entry in its cluster's store names.
	Signature []byte
}

// Version of the entry.
func (d *Delta) Version() identity.Version {
	return identity.Version{Incarnation: d.Incarnation, Sequence: d.Sequence}
}

// Signer is the node that says it.
func (d *Delta) Signer() identity.NodeName {
	return identity.NodeName{Cluster: d.Cluster, Node: d.Node}
}

// newer tells whether d replaces old.
func (d *Delta) newer(old *Delta) bool {
	if v, w := d.Version(), old.Version(); v != w {
		return v.Newer(w)
	}
	return d.Withdrawn && !old.Withdrawn
}

// kind and subject split the key: facts/east/node1 is of kind facts, about east/node1.
func (d *Delta) kind() string {
	kind, _, _ := strings.Cut(d.Key, "/")
	return kind
}

func (d *Delta) subject() (identity.NodeName, bool) {
	parts := strings.Split(d.Key, "/")
	if len(parts) != 3 {
		return identity.NodeName{}, false
	}
	return identity.NodeName{Cluster: parts[1], Node: parts[2]}, true
}

// about returns the cluster that the key is of; empty for the mesh's own.
func (d *Delta) about() string {
	parts := strings.SplitN(d.Key, "/", 3)
	if len(parts) < 3 {
		return ""
	}
	return parts[1]
}

// signingContext keeps signatures of deltas from meaning anything elsewhere.
const signingContext = "causeway gossip delta v1\x00"

func (d *Delta) signed() []byte {
	unsigned := *d
	unsigned.Signature = nil
	return append([]byte(signingContext), encode(&unsigned)...)
}

func (d *Delta) sign(key ed25519.PrivateKey) { d.Signature = ed25519.Sign(key, d.signed()) }

// ErrForged says that a message was not signed by whom it names.
var ErrForged = errors.New("signature is not the node's")

func (d *Delta) verify(key ed25519.PublicKey) error {
	if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, d.signed(), d.Signature) {
		return fmt.Errorf("%s: %w %s", d.Key, ErrForged, d.Signer())
	}
	return nil
}

// may tells why the signer may not say this: a node speaks for its own entries, and its cluster's nodes for each other's lives.
func (d *Delta) may() error {
	if len(d.Key) > maxKey || len(d.Value) > maxValue {
		return fmt.Errorf("%.60q: too long (key %d bytes, value %d)", d.Key, len(d.Key), len(d.Value))
	}
	if kind := d.kind(); kind == kindKeyring && d.Key == kindKeyring {
		return nil
	}
	if d.about() != d.Cluster {
		return fmt.Errorf("%s: node %s may not speak for another cluster", d.Key, d.Signer())
	}
	switch d.kind() {
	case kindAddress:
		return nil // whose it is depends on the signer's ranges: mayBeAt
	case kindSlice:
		return d.maySlice()
	case kindVerdict:
		_, ok := d.subject()
		if !ok {
			return fmt.Errorf("%.60q: no node's", d.Key)
		}
		return nil
	case kindFacts:
		if s, ok := d.subject(); !ok || s != d.Signer() {
			return fmt.Errorf("%s: node %s may only speak for itself", d.Key, d.Signer())
		}
		return nil
	}
	return fmt.Errorf("%.60q: unknown kind, from a newer version", d.Key)
}

// mayBeAt tells why an address is not one that the signer may have, whose pod ranges these are; other entries may be anywhere.
func (d *Delta) mayBeAt(ranges []netip.Prefix) error {
	if d.kind() != kindAddress {
		return nil
	}
	ip, err := netip.ParseAddr(d.Key[strings.LastIndex(d.Key, "/")+1:])
	if err != nil || !slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return fmt.Errorf("%.100s: outside of node %s's pod ranges %v", d.Key, d.Signer(), ranges)
	}
	return nil
}

// ofCluster tells whether the entry is a slice that is a cluster's and no node's. Who signs it may be another node each time.
func (d *Delta) ofCluster() bool {
	return d.kind() == kindSlice && strings.HasPrefix(d.Key[strings.LastIndex(d.Key, "/")+1:], "_")
}

func (d *Delta) maySlice() error {
	if d.ofCluster() {
		return nil // any node of its cluster may be elected to publish it
	}
	name := d.Key[strings.LastIndex(d.Key, "/")+1:]
	if node, _, _ := strings.Cut(name, "."); node != d.Node {
		return fmt.Errorf("%s: node %s may only speak for itself", d.Key, d.Signer())
	}
	return nil
}

// The encoding is deterministic, since signatures are over it, and the decoding strict and bounded.
var encMode, decMode = modes()

func modes() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: 1 << 17, MaxMapPairs: 1 << 12, MaxNestedLevels: 8,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

// encode marshals our own types, which cannot fail.
func encode(v any) []byte {
	b, err := encMode.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("gossip: %T does not marshal: %v", v, err))
	}
	return b
}

func decode(b []byte, v any) error {
	if err := decMode.Unmarshal(b, v); err != nil {
		return fmt.Errorf("gossip message of %d bytes: %w", len(b), err)
	}
	return nil
}
