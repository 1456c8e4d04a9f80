package peering

import (
	"errors"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

func newTestAuthority(t *testing.T) *pki.Authority {
	t.Helper()
	a, err := pki.NewAuthority("east", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestStoreAuthority(t *testing.T) {
	ctx := t.Context()
	store := kvstore.NewMemory()
	defer store.Close()
	a, other := newTestAuthority(t), newTestAuthority(t)
	for range 2 {
		if err := StoreAuthority(ctx, store, a); err != nil {
			t.Fatal(err)
		}
	}
	before, err := store.Get(ctx, AuthorityKey)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeAuthority(before.Value)
	if err != nil || got.Fingerprint() != a.Fingerprint() {
		t.Fatalf("the store has %v, %v", got, err)
	}
	if _, err := got.Issue(pki.Request{User: "x"}, time.Now()); err != nil {
		t.Errorf("it cannot sign: %v", err)
	}
	err = StoreAuthority(ctx, store, other)
	if !errors.Is(err, ErrOtherAuthority) || !strings.Contains(err.Error(), a.Fingerprint().String()[:16]) || !strings.Contains(err.Error(), "delete the key causeway/private/v1/ca") {
		t.Errorf("another authority: %v", err)
	}
	if after, err := store.Get(ctx, AuthorityKey); err != nil || string(after.Value) != string(before.Value) {
		t.Error("another authority was stored")
	}
}

func TestDecodeAuthorityRefuses(t *testing.T) {
	a, other := newTestAuthority(t), newTestAuthority(t)
	key := strings.Split(string(a.KeyPEM()), "\n")[1]
	mixed := EncodeAuthority(a)
	for name, tc := range map[string]struct{ value, want string }{
		"nothing":        {"", "not a JSON object"},
		"half an object": {string(mixed[:len(mixed)/2]), "not a JSON object"},
		"no key":         {`{"cert":"` + strings.ReplaceAll(string(other.CertPEM()), "\n", `\n`) + `"}`, "private key"},
		"a wrong type":   {`{"cert":1,"key":"` + key + `"}`, "not a JSON object"},
	} {
		_, err := DecodeAuthority([]byte(tc.value))
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), key[:16]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
