package pki

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Files of a directory that Ensure fills: NAME.crt and NAME.key, the keys with mode 0600.
const (
	FileAuthority = "ca"
	FileServer    = "server" // of the cluster's etcd
	FileAgent     = "agent"  // of the cluster's agents, to be brought to every node together with ca.crt
)

// localHosts are in every server's certificate, for tools on the machine itself.
var localHosts = []string{"localhost", "127.0.0.1", "::1"}

// Ensure makes what is missing in a directory: the cluster's authority (unless there is a ca.crt without a key, which is
// somebody else's to sign with), the certificate of its etcd for these hosts, and that of its agents. It renews those that are due or are not for
// all of the hosts. The authority is nil if its key is not there.
func Ensure(dir, cluster string, hosts []string, now time.Time) (*Authority, error) {
	if err := checkCluster(cluster); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	leaves := []struct {
		name    string
		request Request
	}{
		{FileServer, Request{User: FileServer, Server: true, Hosts: serverHosts(hosts)}},
		{FileAgent, Request{User: UserAgent}},
	}
	for _, leaf := range leaves {
		if err := leaf.request.check(); err != nil {
			return nil, err
		}
	}
	authority, err := ensureAuthority(dir, cluster, now)
	if err != nil {
		return nil, err
	}
	for _, leaf := range leaves {
		f := filesOf(dir, leaf.name)
		if authority == nil {
			err = f.mustBeThere(dir)
		} else {
			err = f.ensure(authority, leaf.request, now)
		}
		if err != nil {
			return nil, err
		}
	}
	return authority, nil
}

// serverHosts are the hosts that a server's certificate can be for, and the machine's own.
func serverHosts(hosts []string) (all []string) {
	for _, host := range slices.Concat(hosts, localHosts) {
		address, err := netip.ParseAddr(host)
		everywhere := host == "" || err == nil && address.IsUnspecified()
		if !everywhere && !slices.Contains(all, host) {
			all = append(all, host)
		}
	}
	return all
}

// ensureAuthority reads the authority, or makes it if neither its certificate nor its key is there.
func ensureAuthority(dir, cluster string, now time.Time) (*Authority, error) {
	f := filesOf(dir, FileAuthority)
	if err := checkSecret(f.key); err != nil {
		return nil, err
	}
	p, err := f.read()
	switch {
	case err != nil:
		return nil, err
	case p.Key == nil && p.Cert != nil:
		return nil, nil
	case p.Key != nil && p.Cert == nil:
		return nil, fmt.Errorf("pki: there is %s and no %s: bring the certificate back, or remove the key for a new authority", f.key, f.cert)
	case p.Key != nil:
		return f.authority(p)
	}
	a, err := NewAuthority(cluster, now)
	if err != nil {
		return nil, err
	}
	return a, WriteFiles(f.cert, f.key, Pair{Cert: a.CertPEM(), Key: a.KeyPEM()})
}

// ReadAuthority reads an authority's files, and refuses a key that others on the machine can read.
func ReadAuthority(certFile, keyFile string) (*Authority, error) {
	f := files{certFile, keyFile}
	if err := checkSecret(f.key); err != nil {
		return nil, err
	}
	p, err := f.read()
	if err != nil {
		return nil, err
	}
	for file, content := range map[string][]byte{f.cert: p.Cert, f.key: p.Key} {
		if content == nil {
			return nil, fmt.Errorf("pki: %s: no such file: give the PEM files of the cluster's authority and its key", file)
		}
	}
	return f.authority(p)
}

func (f files) authority(p Pair) (*Authority, error) {
	a, err := ParseAuthority(p.Cert, p.Key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", f.cert, f.key, err)
	}
	return a, nil
}

// checkSecret refuses a private key that others on the machine can read.
func checkSecret(file string) error {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("pki: %w", err)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("pki: %s has mode %04o, so others can read it: chmod 600 %s, and make a new authority if somebody may have", file, info.Mode().Perm(), file)
	}
	return nil
}

// ensure makes the pair anew if what is there will not do.
func (f files) ensure(a *Authority, r Request, now time.Time) error {
	p, err := f.read()
	if err != nil {
		return err
	}
	if f.private() && a.serves(p, r, now) {
		return nil
	}
	if p, err = a.Issue(r, now); err != nil {
		return err
	}
	return WriteFiles(f.cert, f.key, p)
}

// private tells whether nobody else can read the key.
func (f files) private() bool { return checkSecret(f.key) == nil }

// serves tells whether a pair is what Issue would make of the request, and still good for a while.
func (a *Authority) serves(p Pair, r Request, now time.Time) bool {
	cert, err := ParseCert(p.Cert)
	if err != nil || !fits(p) || cert.CheckSignatureFrom(a.Cert) != nil || cert.Subject.CommonName != r.User || a.due(cert, now) {
		return false
	}
	if r.Server && !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		return false
	}
	for _, host := range r.Hosts {
		if !hasHost(cert, host) {
			return false
		}
	}
	return true
}

// due is Due, except for a certificate that ends with its authority: another one would not hold for longer.
func (a *Authority) due(cert *x509.Certificate, now time.Time) bool {
	return now.Before(cert.NotBefore) || Due(cert, now) && cert.NotAfter.Before(a.Cert.NotAfter)
}

func hasHost(cert *x509.Certificate, host string) bool {
	names, addresses := splitHosts([]string{host})
	for _, name := range names {
		return slices.Contains(cert.DNSNames, name)
	}
	for _, address := range cert.IPAddresses {
		if address.Equal(addresses[0]) {
			return true
		}
	}
	return false
}

// mustBeThere refuses a directory with somebody else's authority that lacks what only that can make.
func (f files) mustBeThere(dir string) error {
	p, err := f.read()
	if err != nil {
		return err
	}
	if p.Cert == nil || p.Key == nil {
		return fmt.Errorf("pki: %s has %s.crt without its key, so nothing can be signed here, and %s or %s is missing: have the authority's owner make them, or bring its key",
			dir, FileAuthority, filepath.Base(f.cert), filepath.Base(f.key))
	}
	if _, err := p.TLS(); err != nil {
		return fmt.Errorf("%s and %s: %w", f.cert, f.key, err)
	}
	return nil
}

// EnsureAgent makes what an agent needs in a directory: the authority's certificate, and one of the cluster's agents with its key. It renews that if it is due, or
// another authority's.
func EnsureAgent(dir string, authority *Authority, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	ca := filesOf(dir, FileAuthority).cert
	if has, err := os.ReadFile(ca); err != nil || !bytes.Equal(has, authority.CertPEM()) {
		if err := writeNew(ca, authority.CertPEM(), 0o644); err != nil {
			return err
		}
		if err := os.Rename(ca+newSuffix, ca); err != nil {
			return fmt.Errorf("pki: %w", err)
		}
	}
	return filesOf(dir, FileAgent).ensure(authority, Request{User: UserAgent}, now)
}
