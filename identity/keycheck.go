package identity

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// lowOrder are the points of Curve25519, little-endian, whose secret shared with any key is zero, so that everybody knows it. Those are
// the ones with canonical encodings, from https://cr.yp.to/ecdh.html ("How do I validate Curve25519 public keys?"); RFC 7748, section 6.1, has
// implementations refuse what comes of them.
var lowOrder = []WireGuardKey{
	{},
	{1},
	keyOf("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
	keyOf("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
	keyOf("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"), // -1
}

// fieldPrime is 2^255 - 19, big-endian. The public keys that there are, are less.
var fieldPrime = reversed(keyOf("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"))

// Check refuses what can be no device's public key: a point whose shared secrets everybody knows, all zeros among them, and another way to write
// the same point (RFC 7748, section 5), by which one key could pass for two.
func (k WireGuardKey) Check() error {
	switch {
	case k == WireGuardKey{}:
		return errors.New("WireGuard key is all zeros")
	case slices.Contains(lowOrder, k):
		return fmt.Errorf("WireGuard key %s is a point of low order, which encrypts for everybody", k)
	case bytes.Compare(reversed(k), fieldPrime) >= 0:
		return fmt.Errorf("WireGuard key %s is not in canonical form, so it is no device's", k)
	}
	return nil
}

func keyOf(text string) (k WireGuardKey) {
	raw, err := hex.DecodeString(text)
	if err != nil || copy(k[:], raw) != WireGuardKeySize {
		panic("identity: bad key " + text)
	}
	return k
}

func reversed(k WireGuardKey) []byte {
	slices.Reverse(k[:])
	return k[:]
}

// MinNodeMTU and MaxNodeMTU bound the MTU that a node may publish, in bytes: what every IPv4 host must take (RFC 791), and the longest IP packet.
const (
	MinNodeMTU = 576
	MaxNodeMTU = 65535
)

// checkTunnelKeys wants at most one key a slot, all different.
func checkTunnelKeys(keys []TunnelKey) error {
	if len(keys) > TunnelSlots {
		return fmt.Errorf("%d tunnel keys, at most %d are allowed", len(keys), TunnelSlots)
	}
	for i, k := range keys {
		if k.Slot >= TunnelSlots {
			return fmt.Errorf("tunnel key of slot %d; there are slots 0 and 1", k.Slot)
		}
		if err := k.Key.Check(); err != nil {
			return fmt.Errorf("tunnel key of slot %d: %w", k.Slot, err)
		}
		if k.Port == 0 {
			return fmt.Errorf("tunnel key of slot %d: port is missing", k.Slot)
		}
		for _, other := range keys[:i] {
			switch {
			case other.Slot == k.Slot:
				return fmt.Errorf("two tunnel keys of slot %d", k.Slot)
			case other.Key == k.Key:
				return fmt.Errorf("tunnel keys of both slots are %s", k.Key)
			case other.Port == k.Port:
				return fmt.Errorf("tunnel keys of both slots have port %d", k.Port)
			}
		}
	}
	return nil
}
