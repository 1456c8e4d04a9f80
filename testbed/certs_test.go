package testbed

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

// Each cluster's store takes its own agents and those that its own authority has signed for, nobody else.
func TestPKI(t *testing.T) {
	l, _ := newLayout(t.TempDir())
	s, err := newState(l, &Options{Clusters: []string{"east", "west", "far"}, Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.makePKI(s.Clusters); err != nil {
		t.Fatal(err)
	}
	pool := func(cluster string) *x509.CertPool {
		pem, err := os.ReadFile(filepath.Join(l.pki(cluster), "ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		p := x509.NewCertPool()
		p.AppendCertsFromPEM(pem)
		return p
	}
	verify := func(certOf, name, keyOf, key, ca string, usage x509.ExtKeyUsage, host string) error {
		t.Helper()
		pair, err := tls.LoadX509KeyPair(filepath.Join(l.pki(certOf), name+".crt"), filepath.Join(l.pki(keyOf), key+".key"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: pool(ca), KeyUsages: []x509.ExtKeyUsage{usage}, DNSName: host})
		return err
	}
	if err := verify("west", "server", "west", "server", "west", x509.ExtKeyUsageServerAuth, "172.29.2.2"); err != nil {
		t.Error(err)
	}
	if err := verify("west", "agent", "west", "agent", "west", x509.ExtKeyUsageClientAuth, ""); err != nil {
		t.Error(err)
	}
	if err := verify("west", "peer-east", "east", "agent", "west", x509.ExtKeyUsageClientAuth, ""); err != nil {
		t.Error(err)
	}
	if err := verify("east", "agent", "east", "agent", "west", x509.ExtKeyUsageClientAuth, ""); err == nil {
		t.Error("west takes a certificate of east's authority")
	}
	if err := verify("west", "agent", "west", "agent", "west", x509.ExtKeyUsageServerAuth, ""); err == nil {
		t.Error("an agent's certificate makes a server")
	}
	for _, c := range s.Clusters {
		keys, _ := filepath.Glob(filepath.Join(l.pki(c.Name), "*.key"))
		if len(keys) != 3 {
			t.Errorf("keys %v", keys)
		}
		for _, k := range keys {
			if fi, err := os.Stat(k); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v %v", k, fi.Mode(), err)
			}
		}
		if fi, err := os.Stat(l.pki(c.Name)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v", l.pki(c.Name), fi.Mode(), err)
		}
	}
}
