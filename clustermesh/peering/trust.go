package peering

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// serverName is what a cluster's agents call themselves on the API, in certificates that only its authority signs.
func serverName(cluster string) string { return "peering." + cluster + ".causeway" }

// servingValidity of the certificate that the API is served with. It is made by every agent for itself, in memory.
const servingValidity = 24 * time.Hour

// trust is this cluster's authority as the store has it, and what is made of it.
type trust struct {
	mu        sync.Mutex
	authority *pki.Authority
	serving   *tls.Config // made with the authority; nil if it has changed since
	leaf      *x509.Certificate
}

// Authority returns this cluster's authority, from the own store.
func (s *Service) Authority(ctx context.Context) (*pki.Authority, error) {
	s.trust.mu.Lock()
	authority := s.trust.authority
	s.trust.mu.Unlock()
	if authority != nil {
		return authority, nil
	}
	entry, err := s.Store.Get(ctx, AuthorityKey)
	if errors.Is(err, kvstore.ErrNotFound) {
		return nil, errors.New("the certificate authority is not in the own store: whoever starts the store brings it there, see clustermesh kvstore --help")
	}
	if err != nil {
		return nil, fmt.Errorf("read the certificate authority from the own store: %w", err)
	}
	return DecodeAuthority(entry.Value)
}

// watchAuthority keeps the authority as the store has it.
func (s *Service) watchAuthority(ctx context.Context) error {
	for batch := range s.Store.Watch(ctx, AuthorityKey) {
		for _, e := range batch.Events {
			if e.Key != AuthorityKey || e.Kind == kvstore.EventDelete {
				continue // who took it away has to bring another; until then the last one serves
			}
			authority, err := DecodeAuthority(e.Value)
			if err != nil {
				s.Log.Error("The certificate authority in the own store cannot be read; the last one stays in use", "error", err)
				continue
			}
			s.trust.mu.Lock()
			s.trust.authority, s.trust.serving = authority, nil
			s.trust.mu.Unlock()
		}
	}
	return nil
}

// serverTLS returns what the API is served with now, for tls.Config.GetConfigForClient. The certificate is made anew when it is due or the authority is another.
func (s *Service) serverTLS(*tls.ClientHelloInfo) (*tls.Config, error) {
	t := &s.trust
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.authority == nil {
		return nil, errors.New("the own store has not been read yet, so there is no certificate to serve with")
	}
	if t.serving != nil && !pki.Due(t.leaf, s.Now()) {
		return t.serving, nil
	}
	name := serverName(s.Self.Cluster)
	pair, err := t.authority.Issue(pki.Request{User: name, Server: true, Hosts: []string{name}, Validity: servingValidity}, s.Now())
	if err != nil {
		return nil, fmt.Errorf("make a certificate to serve the API with: %w", err)
	}
	cert, err := pair.TLS()
	if err != nil {
		return nil, err
	}
	if t.leaf, err = pki.ParseCert(pair.Cert); err != nil {
		return nil, err
	}
	cert.Certificate = append(cert.Certificate[:1:1], t.authority.Cert.Raw) // the client has nothing but the authority's fingerprint
	own := x509.NewCertPool()
	own.AddCert(t.authority.Cert)
	t.serving = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}, Time: s.Now,
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: own,
		// A resumed session would carry a certificate that has ended since.
		SessionTicketsDisabled: true,
	}
	return t.serving, nil
}

// ServingCert returns the certificate that this node serves the API with; nil as long as nobody has asked for it.
func (s *Service) ServingCert() *x509.Certificate {
	s.trust.mu.Lock()
	defer s.trust.mu.Unlock()
	return s.trust.leaf
}

// pinned is a cluster as it is known before anything is sent to it: by the fingerprint of its authority.
type pinned struct {
	cluster   string
	authority pki.Fingerprint
	by        string // what names the fingerprint: "token" or "record"
	// cert is this cluster's there; nil if it has none yet.
	cert *tls.Certificate
}

// tls returns what a connection to an endpoint is made with. It fails before anything but a ClientHello is sent if the server is somebody else.
func (p pinned) tls(endpoint string, now func() time.Time) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: serverName(p.cluster), NextProtos: []string{"h2"}, Time: now,
		// There is no system-wide authority to ask: VerifyConnection does it, by the fingerprint.
		InsecureSkipVerify: true,
		VerifyConnection:   func(state tls.ConnectionState) error { return p.verify(endpoint, state.PeerCertificates, now()) },
	}
	if p.cert != nil {
		// Certificates would be left out silently if the server has another authority, which it tells us better itself.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.cert, nil }
	}
	return config
}

// errOther says that a server's authority is not the one that was named.
var errOther = errors.New("another authority")

func (p pinned) verify(endpoint string, chain []*x509.Certificate, now time.Time) error {
	if len(chain) < 2 {
		return fmt.Errorf("%s showed no certificate with its authority: something else listens there, nothing was sent", endpoint)
	}
	authority := chain[len(chain)-1]
	if got := pki.FingerprintOf(authority); got != p.authority {
		return fmt.Errorf("%w: the authority at %s has fingerprint %s and the %s names %s: somebody is in between, or cluster %s has got a new authority since; nothing was sent",
			errOther, endpoint, got, p.by, p.authority, p.cluster)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: serverName(p.cluster), CurrentTime: now}); err != nil {
		return fmt.Errorf("the certificate at %s is signed by cluster %s, but not good: %w", endpoint, p.cluster, err)
	}
	return nil
}

// pinOf is how a peer is known by its record.
func pinOf(p Peer) (pinned, error) {
	authority, err := pki.ParseCert([]byte(p.Authority))
	if err != nil {
		return pinned{}, fmt.Errorf("authority of peer %s: %w", p.Name(), err)
	}
	cert, err := pki.Pair{Cert: []byte(p.Cert), Key: []byte(p.Key)}.TLS()
	if err != nil {
		return pinned{}, fmt.Errorf("certificate for peer %s: %w", p.Name(), err)
	}
	return pinned{cluster: p.Name(), authority: pki.FingerprintOf(authority), by: "record", cert: &cert}, nil
}

// checkSigned refuses a certificate (PEM) that an authority has not signed for a client, for a user of this cluster there, and returns it.
func checkSigned(cert []byte, authority *x509.Certificate, cluster string, now time.Time) (*x509.Certificate, error) {
	leaf, err := pki.ParseCert(cert)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, fmt.Errorf("it is not signed by the authority that came with it: %w", err)
	}
	if of, ok := pki.ClusterOf(leaf.Subject.CommonName); !ok || of != cluster {
		return nil, fmt.Errorf("it is for %.80q, which is no user of cluster %s", leaf.Subject.CommonName, cluster)
	}
	return leaf, nil
}

// parseAuthority reads a certificate (PEM), and refuses one that is no authority's.
func parseAuthority(text []byte) (*x509.Certificate, error) {
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, errors.New("the certificate is not one of an authority")
	}
	return cert, nil
}
