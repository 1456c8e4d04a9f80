// Package pki makes and checks the certificates of a cluster: its authority, and what that has signed. Each cluster has
// an authority of its own. The common name of a client's certificate is its user in the cluster's etcd.
package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"time"
)

// Users of a cluster's etcd. Those of other clusters are called by [PeerUser].
const (
	// UserRoot administers users and roles, and is needed for nothing else: nobody keeps a certificate of it.
	UserRoot = "root"
	// UserAgent reads and writes what is Causeway's: the cluster's own agents.
	UserAgent = "agent"
)

// How long certificates hold. They are renewed when a third of that is left.
const (
	AuthorityValidity = 10 * 365 * 24 * time.Hour
	LeafValidity      = 90 * 24 * time.Hour
)

var errTODO = errors.New("not implemented")

// Fingerprint is the SHA-256 of a certificate's DER form.
type Fingerprint [32]byte

func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// Authority is a cluster's certificate authority.
type Authority struct {
	Cert *x509.Certificate
}

// NewAuthority makes a cluster's authority.
func NewAuthority(cluster string, now time.Time) (*Authority, error) { return nil, errTODO }

// ParseAuthority reads an authority from PEM, and refuses a certificate that may not sign, or another's key.
func ParseAuthority(cert, key []byte) (*Authority, error) { return nil, errTODO }

// CertPEM returns the certificate.
func (a *Authority) CertPEM() []byte { return nil }

// KeyPEM returns the private key, which is for the cluster's own agents alone.
func (a *Authority) KeyPEM() []byte { return nil }

// Fingerprint names the authority.
func (a *Authority) Fingerprint() Fingerprint { return FingerprintOf(a.Cert) }

// FingerprintOf returns a certificate's fingerprint.
func FingerprintOf(cert *x509.Certificate) Fingerprint { return Fingerprint{} }

// Request says what a certificate is for.
type Request struct {
	// User is the common name.
	User string
	// Server: it may be shown by a server, for these hosts (names or addresses), as well as by a client.
	Server bool
	Hosts  []string
	// Validity, LeafValidity if 0. It begins an hour before now, since clocks differ.
	Validity time.Duration
}

// Pair is a certificate with its private key, as PEM.
type Pair struct {
	Cert, Key []byte
}

// TLS returns the pair as crypto/tls wants it.
func (p Pair) TLS() (tls.Certificate, error) { return tls.Certificate{}, errTODO }

// Issue makes a key, and a certificate for it.
func (a *Authority) Issue(r Request, now time.Time) (Pair, error) { return Pair{}, errTODO }

// Sign makes a certificate for the key of a PKCS #10 request (PEM), which proves that its sender has the key. Nothing else
// of the request is used: who it is for is the signer's to say.
func (a *Authority) Sign(request []byte, r Request, now time.Time) (cert []byte, err error) {
	return nil, errTODO
}

// NewRequest makes a key, and a request for a certificate for it, both PEM.
func NewRequest() (request, key []byte, err error) { return nil, nil, errTODO }

// ParseCert reads the first certificate of a PEM text.
func ParseCert(cert []byte) (*x509.Certificate, error) { return nil, errTODO }

// Due tells whether a certificate should be renewed: less than a third of its life is left.
func Due(cert *x509.Certificate, now time.Time) bool { return false }

// PeerUser returns the name of a new user for a peer. It is another one for each connection, so that a certificate of an
// earlier one never works again.
func PeerUser(cluster string) string { return "" }

// ClusterOf returns the cluster that a peer's user is of.
func ClusterOf(user string) (cluster string, ok bool) { return "", false }

// Files of a directory that Ensure fills: NAME.crt and NAME.key, the keys with mode 0600.
const (
	FileAuthority = "ca"
	FileServer    = "server" // of the cluster's etcd
	FileAgent     = "agent"  // of the cluster's agents, to be brought to every node together with ca.crt
)

// Ensure makes what is missing in a directory: the cluster's authority (unless there is a ca.crt without a key, which is
// somebody else's to sign with), the certificate of its etcd for these hosts, and that of its agents. It renews those that are due or are not for
// all of the hosts. The authority is nil if its key is not there.
func Ensure(dir, cluster string, hosts []string, now time.Time) (*Authority, error) {
	return nil, errTODO
}

// WriteFiles replaces a certificate and its key at once, the key with mode 0600.
func WriteFiles(certFile, keyFile string, p Pair) error { return errTODO }
