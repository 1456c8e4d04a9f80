package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"regexp"
	"time"
)

// Authority is a cluster's certificate authority.
type Authority struct {
	Cert *x509.Certificate
	key  crypto.Signer
}

// Request says what a certificate is for.
type Request struct {
	// User is the common name.
	User string
	// Groups are the organizations, which Kubernetes takes for the user's groups; Causeway if there are none.
	Groups []string
	// Server: it may be shown by a server, for these hosts (names or addresses), as well as by a client.
	Server bool
	Hosts  []string
	// Validity, LeafValidity if 0. It begins an hour before now, since clocks differ, and ends with the authority's own at the latest.
	Validity time.Duration
}

// NewAuthority makes a cluster's authority. It can sign certificates for servers and clients, but no other authorities.
func NewAuthority(cluster string, now time.Time) (*Authority, error) {
	if err := checkCluster(cluster); err != nil {
		return nil, err
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	template, err := newTemplate("authority of cluster "+cluster, now, AuthorityValidity)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	cert, err := create(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Authority{cert, key}, nil
}

// ParseAuthority reads an authority from PEM, and refuses a certificate that may not sign, or another's key. Somebody else's
// authority may have any kind of key that crypto/x509 can sign with, in PKCS #8, PKCS #1 or SEC 1.
func ParseAuthority(cert, key []byte) (*Authority, error) {
	parsed, err := ParseCert(cert)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	switch {
	case !parsed.BasicConstraintsValid || !parsed.IsCA:
		return nil, fmt.Errorf("pki: authority: the certificate of %q is not an authority's: it may not sign others", parsed.Subject)
	case parsed.KeyUsage != 0 && parsed.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fmt.Errorf("pki: authority: the certificate of %q lacks the key usage to sign certificates", parsed.Subject)
	}
	signer, err := parseKey(key)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	if !sameKey(parsed.PublicKey, signer.Public()) {
		return nil, fmt.Errorf("pki: authority: the private key does not belong to the certificate of %q", parsed.Subject)
	}
	return &Authority{parsed, signer}, nil
}

// CertPEM returns the certificate.
func (a *Authority) CertPEM() []byte { return encode(pemCert, a.Cert.Raw) }

// KeyPEM returns the private key, which is for the cluster's own agents alone.
func (a *Authority) KeyPEM() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		panic(err) // a key that was parsed or made, and that can't be written
	}
	return encode(pemKey, der)
}

// Fingerprint names the authority.
func (a *Authority) Fingerprint() Fingerprint { return FingerprintOf(a.Cert) }

// Issue makes a key, and a certificate for it.
func (a *Authority) Issue(r Request, now time.Time) (Pair, error) {
	key, err := newKey()
	if err != nil {
		return Pair{}, err
	}
	cert, err := a.issue(key.Public(), r, now)
	if err != nil {
		return Pair{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Pair{}, errors.New("pki: a new private key cannot be written")
	}
	return Pair{Cert: cert, Key: encode(pemKey, der)}, nil
}

// issue makes a certificate for a public key.
func (a *Authority) issue(key crypto.PublicKey, r Request, now time.Time) ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	if !now.Before(a.Cert.NotAfter) {
		return nil, fmt.Errorf("pki: certificate for %q: the authority itself has expired on %s: make a new one", r.User, a.Cert.NotAfter.Format(time.RFC3339))
	}
	if r.Validity == 0 {
		r.Validity = LeafValidity
	}
	template, err := newTemplate(r.User, now, r.Validity)
	if err != nil {
		return nil, err
	}
	if template.NotAfter.After(a.Cert.NotAfter) {
		template.NotAfter = a.Cert.NotAfter
	}
	if len(r.Groups) > 0 {
		template.Subject.Organization = r.Groups
	}
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if r.Server {
		// etcd shows its own certificate as a client too, to itself.
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		template.DNSNames, template.IPAddresses = splitHosts(r.Hosts)
	}
	cert, err := create(template, a.Cert, key, a.key)
	if err != nil {
		return nil, err
	}
	return encode(pemCert, cert.Raw), nil
}

// userName is what a common name may be: it is a user's name in etcd or Kubernetes, and ends up in messages and logs.
var userName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$`)

func (r Request) check() error {
	switch {
	case !userName.MatchString(r.User):
		return fmt.Errorf("pki: user %.130q: want 1 to 128 letters, digits, dots, colons, hyphens and underscores", r.User)
	case r.Validity < 0:
		return fmt.Errorf("pki: certificate for %q: the validity %s is negative", r.User, r.Validity)
	case r.Server && len(r.Hosts) == 0:
		return fmt.Errorf("pki: certificate for the server %q: no host: name at least one name or address that it is reached at", r.User)
	case !r.Server && len(r.Hosts) > 0:
		return fmt.Errorf("pki: certificate for %q: hosts are for servers, and this one is a client's", r.User)
	}
	for _, host := range r.Hosts {
		if _, err := netip.ParseAddr(host); err != nil && !hostName.MatchString(host) {
			return fmt.Errorf("pki: certificate for %q: host %.255q is neither an address nor a name", r.User, host)
		}
	}
	return nil
}

var hostName = regexp.MustCompile(`^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?)*$`)

func splitHosts(hosts []string) (names []string, addresses []net.IP) {
	for _, host := range hosts {
		if address, err := netip.ParseAddr(host); err == nil {
			addresses = append(addresses, net.IP(address.Unmap().WithZone("").AsSlice()))
		} else {
			names = append(names, host)
		}
	}
	return names, addresses
}

// newTemplate is what all certificates have in common.
func newTemplate(commonName string, now time.Time, validity time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("pki: serial number: %w", err)
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName, Organization: []string{"Causeway"}},
		NotBefore:    now.Add(-backdate).UTC(),
		NotAfter:     now.Add(validity).UTC(),
	}, nil
}

func create(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, fmt.Errorf("pki: sign the certificate of %q: %w", template.Subject.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pki: the certificate of %q that was signed: %w", template.Subject.CommonName, err)
	}
	return cert, nil
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("pki: make a private key: %w", err)
	}
	return key, nil
}

// parseKey reads a private key. Its errors say nothing of what is wrong inside, which could be part of a key.
func parseKey(text []byte) (crypto.Signer, error) {
	der, err := block(text, "private key", pemKey, "EC PRIVATE KEY", "RSA PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	if key, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if signer, ok := key.(crypto.Signer); ok {
			return signer, nil
		}
		return nil, errors.New("pki: private key: of a kind that cannot sign")
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	return nil, errors.New("pki: private key: damaged, encrypted or of an unknown kind: want PKCS #8 without a password")
}

// sameKey compares public keys, which all of crypto's know how to.
func sameKey(a, b crypto.PublicKey) bool {
	comparable, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && comparable.Equal(b)
}
