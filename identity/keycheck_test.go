package identity

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"math/big"
	"slices"
	"strings"
	"testing"
)

// TestKeysOfDevicesPass and what Curve25519 itself says of the others: a shared secret that anybody knows, or one that another key has too.
func TestKeysOfDevicesPass(t *testing.T) {
	for range 100 {
		private := must[*ecdh.PrivateKey](t)(ecdh.X25519().GenerateKey(rand.Reader))
		if err := WireGuardKey(private.PublicKey().Bytes()).Check(); err != nil {
			t.Fatalf("a key that was just made: %v", err)
		}
	}
}

func TestBadPointsAreRefused(t *testing.T) {
	private := must[*ecdh.PrivateKey](t)(ecdh.X25519().GenerateKey(rand.Reader))
	shared := func(k WireGuardKey) error {
		_, err := private.ECDH(must[*ecdh.PublicKey](t)(ecdh.X25519().NewPublicKey(k[:])))
		return err
	}
	for _, k := range lowOrder {
		if shared(k) == nil {
			t.Errorf("%s is listed as of low order, and is not", k)
		}
		if err := k.Check(); err == nil {
			t.Errorf("%s is of low order, and passes", k)
		}
	}
	p := new(big.Int).SetBytes(fieldPrime)
	if want := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19)); p.Cmp(want) != 0 {
		t.Errorf("the prime is %d, want %d", p, want)
	}
	own := WireGuardKey(private.PublicKey().Bytes())
	twin := own
	twin[WireGuardKeySize-1] |= 0x80 // is ignored by who computes with it
	if own.Check() != nil || twin.Check() == nil {
		t.Errorf("%s: %v; its twin %s: %v", own, own.Check(), twin, twin.Check())
	}
	for _, d := range []int64{-1, 0, 1, 2, 18} { // -1 is of low order, the others are 0, 1, 2 and 18 once more
		var k WireGuardKey
		new(big.Int).Add(p, big.NewInt(d)).FillBytes(k[:])
		slices.Reverse(k[:])
		if err := k.Check(); err == nil {
			t.Errorf("p%+d passes", d)
		}
	}
}

func TestWireGuardKeyText(t *testing.T) {
	encode := base64.StdEncoding.EncodeToString
	for text, want := range map[string]string{
		encode(make([]byte, 32)):                            "all zeros",
		encode([]byte("thirty-one bytes are too little")):   "of 31 bytes; a public key has 32",
		encode([]byte("thirty-three bytes are a byte too")): "of 33 bytes; a public key has 32",
		"": "of 0 bytes", "no base64 at all, is it?": "not base64", strings.Repeat("A", 65): "65 characters; 44 are right",
		strings.TrimSuffix(key1.String(), "="): "not base64", key1.String() + "\n": "",
	} {
		k := key2
		err := k.UnmarshalText([]byte(text))
		if want == "" {
			continue // base64 skips newlines
		}
		if err == nil || !strings.Contains(err.Error(), want) || k != key2 {
			t.Errorf("%q: %v, and the key is %s; want %q and no change", text, err, k, want)
		}
	}
	var k WireGuardKey
	if err := k.UnmarshalText([]byte(key1.String())); err != nil || k != key1 {
		t.Errorf("%s becomes %s, %v", key1, k, err)
	}
}
