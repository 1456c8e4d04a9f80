package peering

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"causeway/identity/pki"
)

// probeTimeout of each step toward an endpoint. A path that takes longer is of no use for etcd either.
const probeTimeout = 3 * time.Second

// probe is one walk to an endpoint: the name, TCP, TLS. Each step is reported as it ends, and what is not tried any more as skipped.
type probe struct {
	s        *Service
	from, to string
	endpoint string
	config   *tls.Config
	report   func(Check)
}

// open returns the connection, on which nothing has been sent yet; or why there is none.
func (p probe) open(ctx context.Context) (*tls.Conn, error) {
	host, port, err := net.SplitHostPort(p.endpoint)
	if err != nil {
		return nil, fmt.Errorf("endpoint %.100q is not host:port", p.endpoint)
	}
	addresses, err := p.resolve(ctx, host)
	if err != nil {
		p.skip(CheckTCP, CheckTLS)
		return nil, err
	}
	conn, err := p.connect(ctx, addresses, port)
	if err != nil {
		p.skip(CheckTLS)
		return nil, err
	}
	return p.secure(ctx, conn)
}

// step runs a part of the walk for as long as it may take, and reports it.
func (p probe) step(ctx context.Context, name string, do func(context.Context) (detail string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	began := time.Now()
	detail, err := do(ctx)
	c := Check{Name: name, From: p.from, To: p.to, Target: p.endpoint + "/tcp", Outcome: OK, Detail: detail, Took: time.Since(began)}
	if err != nil {
		c.Outcome, c.Detail, c.Cause = Failed, plain(err.Error()), causeOf(name, err)
		p.report(c)
		return &checkError{c, err}
	}
	p.report(c)
	return nil
}

func (p probe) skip(names ...string) {
	for _, name := range names {
		p.report(Check{Name: name, From: p.from, To: p.to, Target: p.endpoint + "/tcp", Outcome: Skipped})
	}
}

func (p probe) resolve(ctx context.Context, host string) (addresses []string, err error) {
	if net.ParseIP(host) != nil {
		p.report(Check{Name: CheckName, From: p.from, To: p.to, Target: p.endpoint + "/tcp", Outcome: Skipped, Detail: "it is an address"})
		return []string{host}, nil
	}
	err = p.step(ctx, CheckName, func(ctx context.Context) (string, error) {
		addresses, err = net.DefaultResolver.LookupHost(ctx, host)
		return strings.Join(addresses, ", "), err
	})
	return addresses, err
}

func (p probe) connect(ctx context.Context, addresses []string, port string) (conn net.Conn, err error) {
	err = p.step(ctx, CheckTCP, func(ctx context.Context) (string, error) {
		for _, address := range addresses {
			if conn, err = p.s.dialer(ctx, "tcp", net.JoinHostPort(address, port)); err == nil {
				return "connected to " + conn.RemoteAddr().String(), nil
			}
		}
		return "", err
	})
	return conn, err
}

func (p probe) secure(ctx context.Context, conn net.Conn) (*tls.Conn, error) {
	secured := tls.Client(conn, p.config)
	err := p.step(ctx, CheckTLS, func(ctx context.Context) (string, error) {
		if err := secured.HandshakeContext(ctx); err != nil {
			return "", err
		}
		leaf := secured.ConnectionState().PeerCertificates[0]
		return fmt.Sprintf("%s, valid until %s", tls.VersionName(secured.ConnectionState().Version), stamp(leaf.NotAfter)), nil
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}

// probeStore walks to the endpoints of a cluster's etcd until one works. Without a certificate of it yet there is nothing that could be read.
func (s *Service) probeStore(ctx context.Context, from string, of side, report func(Check)) error {
	authority, err := pki.ParseCert(of.pem)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	var first error
	for _, url := range of.store {
		endpoint := strings.TrimPrefix(url, "https://")
		host, _, err := net.SplitHostPort(endpoint)
		if err != nil {
			return fmt.Errorf("endpoint %.100q is not host:port", endpoint)
		}
		config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: host, NextProtos: []string{"h2"}, Time: s.Now}
		conn, err := probe{s, from, of.info.Name, endpoint, config, report}.open(ctx)
		if err == nil {
			_ = conn.Close() // nothing was sent
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return fmt.Errorf("%s's etcd cannot be reached: %w", of.info.Name, first)
}

// checkError is a check that has failed.
type checkError struct {
	Check
	err error
}

func (e *checkError) Error() string {
	text := fmt.Sprintf("%s to %s: %s", e.Name, e.Target, e.Detail)
	if e.Cause != "" {
		text += ": " + e.Cause
	}
	return text
}

func (e *checkError) Unwrap() error { return e.err }

// causeOf says what the likely reason of a failure is, and what to do.
func causeOf(check string, err error) string {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var hosts x509.HostnameError
	var notTLS tls.RecordHeaderError
	switch {
	case check == CheckName:
		return "the name is not known here: use an address, or a name that this node's DNS resolves"
	case errors.Is(err, errOther):
		return "compare the fingerprint with clustermesh certs in that cluster; if its authority is new, use a new token"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there: check that it runs, and on this port"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "there is no route to it from this node"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "a firewall or security group drops the packets, or the address is nobody's: allow this port between the clusters' nodes"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate has ended, or one of the clocks is wrong: compare them with date, and set them, e.g. with NTP"
	case errors.As(err, &unknown):
		return "the server shows a certificate that the cluster's authority has not signed: check which one it is started with"
	case errors.As(err, &hosts):
		return "the server's certificate is not for this name or address: add it to the certificate, or use another in peering.storeEndpoints"
	case errors.As(err, &notTLS):
		return "what listens there speaks no TLS: check the port"
	case errors.Is(err, syscall.ECONNRESET), check == CheckTLS:
		return "the server, or something in between, ended the connection: see the agent's log there"
	}
	return ""
}
