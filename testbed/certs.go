package testbed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// certValidity is how long certificates of a test-bed hold; nothing renews them.
const certValidity = 365 * 24 * time.Hour

// A cluster's certificates, in its pki directory. Each cluster has an authority of its own, so that a
// cluster lets another one in by signing a certificate for it, and by nothing else.
//
//	ca.crt ca.key           the cluster's authority
//	server.crt server.key   its etcd
//	agent.crt agent.key     its own agents
//	peer-NAME.crt           cluster NAME, signed here; the key is NAME's agent.key
const (
	caFile     = "ca"
	serverFile = "server"
	agentFile  = "agent"
)

func peerFile(cluster string) string { return "peer-" + cluster }

// authority is a cluster's certificate authority.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority makes a cluster's authority and its directory.
func newAuthority(dir, cluster string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := newKey(filepath.Join(dir, caFile+".key"))
	if err != nil {
		return nil, err
	}
	template, err := newCert(cluster + " certificate authority")
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	a := &authority{dir: dir, cert: template, key: key}
	if a.cert, err = a.sign(caFile, template, key); err != nil {
		return nil, err
	}
	return a, nil
}

// server signs a certificate for an etcd at address; etcd uses it as a client of itself too.
func (a *authority) server(address netip.Addr) error {
	key, err := newKey(filepath.Join(a.dir, serverFile+".key"))
	if err != nil {
		return err
	}
	template, err := newCert(serverFile)
	if err != nil {
		return err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	template.IPAddresses = []net.IP{address.AsSlice(), net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	template.DNSNames = []string{"localhost"}
	_, err = a.sign(serverFile, template, key)
	return err
}

// client signs a certificate NAME.crt for key, with NAME as common name.
func (a *authority) client(name string, key *ecdsa.PrivateKey) error {
	template, err := newCert(name)
	if err != nil {
		return err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	_, err = a.sign(name, template, key)
	return err
}

func (a *authority) sign(name string, template *x509.Certificate, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate %s: %w", name, err)
	}
	if err := writePEM(filepath.Join(a.dir, name+".crt"), "CERTIFICATE", der, 0o644); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newCert(commonName string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName, Organization: []string{"Causeway test-bed"}},
		NotBefore:    now.Add(-time.Hour), // a machine's clock may be set back a little
		NotAfter:     now.Add(certValidity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}, nil
}

func newKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(path, "PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

// makePKI makes every certificate of the bed.
func (l layout) makePKI(clusters []ClusterState) error {
	keys := map[string]*ecdsa.PrivateKey{}
	authorities := map[string]*authority{}
	for _, c := range clusters {
		a, err := newAuthority(l.pki(c.Name), c.Name)
		if err != nil {
			return fmt.Errorf("making the certificates of cluster %s: %w", c.Name, err)
		}
		if err := a.server(c.KVStore.Address); err != nil {
			return err
		}
		key, err := newKey(filepath.Join(a.dir, agentFile+".key"))
		if err != nil {
			return err
		}
		if err := a.client(agentFile, key); err != nil {
			return err
		}
		keys[c.Name], authorities[c.Name] = key, a
	}
	for name, a := range authorities {
		for other, key := range keys {
			if other == name {
				continue
			}
			if err := a.client(peerFile(other), key); err != nil {
				return err
			}
		}
	}
	return nil
}
