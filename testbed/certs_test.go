package testbed

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// Each cluster's store takes its own agents, and lets those of other clusters read what they may read, and nothing else.
func TestCertificates(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	b := mustUp(t, Options{Clusters: []string{"east", "west"}, Nodes: 1})
	s, err := b.State()
	if err != nil {
		t.Fatal(err)
	}
	west, err := s.cluster("west")
	if err != nil {
		t.Fatal(err)
	}
	dial := func(cert string) kvstore.Store {
		t.Helper()
		cfg := b.kvstoreConfig(*west, cert)
		store, err := kvstore.Dial(ctx, kvstore.Config{
			Endpoints: cfg.Endpoints, CAFile: cfg.CAFile, CertFile: cfg.CertFile, KeyFile: cfg.KeyFile,
			Dial: func(ctx context.Context, address string) (net.Conn, error) {
				return b.dialIn(ctx, b.kvstoreNS("west"), "tcp", address)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		return store
	}
	own, peer := dial(agentFile), dial(peerFile("east"))
	for _, key := range []string{kvstore.Prefix + "x", kvstore.PrivatePrefix + "x"} {
		if err := own.Put(ctx, key, []byte("1")); err != nil {
			t.Errorf("an own agent: %v", err)
		}
	}
	if entry, err := peer.Get(ctx, kvstore.Prefix+"x"); err != nil || string(entry.Value) != "1" {
		t.Errorf("a peer reads %q, %v", entry.Value, err)
	}
	if _, err := peer.Get(ctx, kvstore.PrivatePrefix+"x"); !errors.Is(err, kvstore.ErrDenied) {
		t.Errorf("a peer reads what is private: %v", err)
	}
	if err := peer.Put(ctx, kvstore.Prefix+"x", nil); !errors.Is(err, kvstore.ErrDenied) {
		t.Errorf("a peer writes: %v", err)
	}

	dir := b.pki("west")
	pem, err := os.ReadFile(filepath.Join(dir, peerFile("east")+".crt"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(pem)
	if err != nil {
		t.Fatal(err)
	}
	if cluster, ok := pki.ClusterOf(cert.Subject.CommonName); !ok || cluster != "east" {
		t.Errorf("the peer's user is %q", cert.Subject.CommonName)
	}
	keys, _ := filepath.Glob(filepath.Join(dir, "*.key"))
	if len(keys) != 4 {
		t.Errorf("keys %v", keys)
	}
	for _, path := range keys {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", path, fi.Mode(), err)
		}
	}
}
