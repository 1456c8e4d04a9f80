// Package pki makes and checks the certificates of a cluster: its authority (authority.go), requests of others (request.go),
// and the files that they are kept in (files.go, ensure.go). Each cluster has an authority of its own. The common name of
// a client's certificate is its user in the cluster's etcd. All private keys are ECDSA on P-256, and none is ever in an error.
package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Users of a cluster's etcd. Those of other clusters are called by [PeerUser].
const (
	// UserRoot administers users and roles, and is needed for nothing else: nobody keeps a certificate of it.
	UserRoot = "root"
	// UserAgent reads and writes what is Causeway's: the cluster's own agents.
	UserAgent = "agent"
	// UserXDS is a client of xDS, and no user of etcd: its certificate opens nothing else.
	UserXDS = "xds-client"
)

// How long certificates hold. They are renewed when a third of that is left.
const (
	AuthorityValidity = 10 * 365 * 24 * time.Hour
	LeafValidity      = 90 * 24 * time.Hour
)

// backdate is how long before now certificates begin to hold, since clocks differ.
const backdate = time.Hour

// Types of PEM blocks.
const (
	pemCert    = "CERTIFICATE"
	pemKey     = "PRIVATE KEY"
	pemRequest = "CERTIFICATE REQUEST"
)

// maxPEM is the longest text that is read, in bytes: the largest real ones, RSA keys and chains, have some 10 KB.
const maxPEM = 64 << 10

// Fingerprint is the SHA-256 of a certificate's DER form.
type Fingerprint [sha256.Size]byte

func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// FingerprintOf returns a certificate's fingerprint.
func FingerprintOf(cert *x509.Certificate) Fingerprint { return sha256.Sum256(cert.Raw) }

// Pair is a certificate with its private key, as PEM.
type Pair struct {
	Cert, Key []byte
}

// TLS returns the pair as crypto/tls wants it.
func (p Pair) TLS() (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("pki: certificate and key: %w", err)
	}
	return pair, nil
}

// ParseCert reads the first certificate of a PEM text.
func ParseCert(cert []byte) (*x509.Certificate, error) {
	der, err := block(cert, "certificate", pemCert)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pki: certificate: %w", err)
	}
	return parsed, nil
}

// Due tells whether a certificate should be renewed: less than a third of its life is left.
func Due(cert *x509.Certificate, now time.Time) bool {
	return cert.NotAfter.Sub(now) < cert.NotAfter.Sub(cert.NotBefore)/3
}

// block returns the DER of the first block of one of the types in a PEM text. Its errors tell nothing of what is in the text.
func block(text []byte, what string, types ...string) ([]byte, error) {
	if len(text) > maxPEM {
		return nil, fmt.Errorf("pki: %s: %d bytes are too many: want at most %d", what, len(text), maxPEM)
	}
	for rest := text; ; {
		var found *pem.Block
		if found, rest = pem.Decode(rest); found == nil {
			return nil, errors.New("pki: " + what + ": no PEM block of type " + types[0])
		}
		for _, t := range types {
			if found.Type == t {
				return found.Bytes, nil
			}
		}
	}
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
