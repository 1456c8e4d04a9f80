package kvstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"
)

const (
	defaultLeaseTTL       = 15 * time.Minute
	defaultRequestTimeout = 5 * time.Second
)

// Config of a connection to a cluster's etcd.
type Config struct {
	// Endpoints of the members of one etcd: "https://host:port", or "host:port", which means
	// the same. "http://host:port" is accepted for an etcd that has no TLS; all must use the same scheme.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files: the authority that signed the server's certificate,
	// and the certificate and key that we show it. All three are needed for https.
	// CertFile and KeyFile are read again for every connection, so that renewed ones come
	// into use by themselves.
	CAFile, CertFile, KeyFile string
	// TLS replaces the three files, for tests and for callers that keep certificates elsewhere.
	TLS *tls.Config
	// LeaseTTL is how long leased keys outlive this process, 15 minutes if 0, rounded up to seconds. It
	// only collects what a node that is gone for good has left behind: liveness is gossip's business. Too short, and
	// an etcd that is away for longer takes the keys of live nodes with it.
	LeaseTTL time.Duration
	// RequestTimeout bounds every request, a wait for the connection included, 5 s if 0. The
	// caller's context may be shorter.
	RequestTimeout time.Duration
	// Dial makes connections to "host:port" instead of the net package's, for those that are to be made somewhere else, such as in another network namespace.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Quota bounds what a Watch holds and delivers, so that a store which somebody else fills cannot fill our memory; none if zero.
	Quota Quota
	// Log gets loss and return of the connection and of the lease; nothing for single requests, whose
	// errors are the caller's. Nil discards.
	Log *slog.Logger
}

// Quota of a watch. What is more is left out, and counted in Status.Excess, until there is room.
type Quota struct {
	// Entries is the number of keys.
	Entries int
	// Bytes of keys and values together.
	Bytes int64
}

// complete fills in defaults and checks everything that can be checked without the server.
func (c *Config) complete() error {
	if c.LeaseTTL == 0 {
		c.LeaseTTL = defaultLeaseTTL
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = defaultRequestTimeout
	}
	if c.LeaseTTL < 0 || c.RequestTimeout < 0 {
		return fmt.Errorf("kvstore: lease TTL %s and request timeout %s must be positive", c.LeaseTTL, c.RequestTimeout)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	secure, err := c.normalizeEndpoints()
	if err != nil {
		return err
	}
	if !secure {
		c.TLS = nil
		return nil
	}
	if c.TLS == nil {
		c.TLS, err = c.loadTLS()
	}
	return err
}

// normalizeEndpoints gives every endpoint a scheme and tells whether it is https.
func (c *Config) normalizeEndpoints() (secure bool, err error) {
	if len(c.Endpoints) == 0 {
		return false, errors.New("kvstore: no endpoints: name at least one, such as https://172.29.1.2:2379")
	}
	normal := make([]string, len(c.Endpoints))
	https := 0
	for i, endpoint := range c.Endpoints {
		switch {
		case strings.HasPrefix(endpoint, "https://"):
			https++
		case strings.HasPrefix(endpoint, "http://"):
		case strings.Contains(endpoint, "://") || endpoint == "":
			return false, fmt.Errorf("kvstore: endpoint %q: want https://host:port", endpoint)
		default:
			endpoint = "https://" + endpoint
			https++
		}
		normal[i] = strings.TrimSuffix(endpoint, "/")
	}
	if https != 0 && https != len(normal) {
		return false, fmt.Errorf("kvstore: endpoints %s mix http and https: use https for all", strings.Join(normal, ", "))
	}
	c.Endpoints = normal
	return https > 0, nil
}

// loadTLS reads the three files, so that a wrong path is told at start and not at the first connection.
func (c *Config) loadTLS() (*tls.Config, error) {
	for _, f := range []struct{ name, path string }{
		{"CA certificate", c.CAFile}, {"client certificate", c.CertFile}, {"client key", c.KeyFile},
	} {
		if f.path == "" {
			return nil, fmt.Errorf("kvstore: no %s file for %s: an https endpoint needs CA, certificate and key", f.name, c.Endpoints[0])
		}
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("kvstore: read CA certificate: %w: give the PEM file of the authority that signed the store's certificate", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("kvstore: CA file %s holds no PEM certificate: give the one of the authority that signed the store's certificate", c.CAFile)
	}
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("kvstore: client certificate %s with key %s: %w: give a PEM certificate and the key that belongs to it", c.CertFile, c.KeyFile, err)
		}
		return &cert, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	return &tls.Config{
		RootCAs:    roots,
		MinVersion: tls.VersionTLS12,
		// The server would refuse an expired certificate too, but over TLS 1.3 it closes the connection with that alert, which a reset can overtake.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := load()
			if err != nil {
				return nil, err
			}
			if end := cert.Leaf.NotAfter; time.Now().After(end) {
				return nil, fmt.Errorf("our client certificate %s expired at %s", c.CertFile, end.UTC().Format(time.RFC3339))
			}
			return cert, nil
		},
	}, nil
}

// user returns the common name of the certificate that we show, for messages; empty without one.
func (c *Config) user() string {
	if c.TLS == nil {
		return ""
	}
	var cert *tls.Certificate
	if c.TLS.GetClientCertificate != nil {
		cert, _ = c.TLS.GetClientCertificate(new(tls.CertificateRequestInfo))
	} else if len(c.TLS.Certificates) > 0 {
		cert = &c.TLS.Certificates[0]
	}
	if cert == nil || len(cert.Certificate) == 0 {
		return ""
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return ""
	}
	return leaf.Subject.CommonName
}
