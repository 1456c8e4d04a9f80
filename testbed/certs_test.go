package testbed

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// Each cluster's store takes its own agents, and nobody else that its authority has signed. (What peers may is tested where they are joined.)
func TestCertificates(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	program, err := realBinary()
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{T: t, bed: mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1, Binary: program})}
	own := m.store("east")
	for _, key := range []string{kvstore.Prefix + "x", kvstore.PrivatePrefix + "x"} {
		if err := own.Put(ctx, key, []byte("1")); err != nil {
			t.Errorf("an own agent: %v", err)
		}
	}
	dir := m.bed.pki("east")
	authority, err := pki.ReadAuthority(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := authority.Issue(pki.Request{User: "stranger"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	theirs := t.TempDir()
	if err := errors.Join(pki.WriteFiles(filepath.Join(theirs, "s.crt"), filepath.Join(theirs, "s.key"), stranger),
		os.WriteFile(filepath.Join(theirs, "ca.crt"), authority.CertPEM(), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.storeWith("east", theirs, "s.crt", "s.key", "ca.crt").Get(ctx, kvstore.Prefix+"x"); !errors.Is(err, kvstore.ErrDenied) {
		t.Errorf("who has no user reads: %v", err)
	}
	keys, _ := filepath.Glob(m.bed.path("east", "*", "pki", "*.key"))
	more, _ := filepath.Glob(filepath.Join(dir, "*.key"))
	if keys = append(keys, more...); len(keys) != 4 {
		t.Errorf("keys %v", keys)
	}
	for _, path := range keys {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", path, fi.Mode(), err)
		}
	}
}
