package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/identity/pki"
)

// certInterval is how often it is looked whether this node's certificate is due. Those at peers are peering's to renew.
const certInterval = time.Hour

// Names of certificates, as api.Cert has them; those at peers are called "peer NAME".
const (
	certAuthority = "authority"
	certAgent     = "agent"
	certPeering   = "peering"
	certPeer      = "peer "
)

// certs shows the certificates that matter to this node, and renews its own.
type certs struct {
	*agent

	mu      sync.Mutex
	problem string // of renewing this node's own
}

func newCerts(a *agent) *certs { return &certs{agent: a} }

// Run renews this node's own certificate before it ends, until ctx ends.
func (c *certs) Run(ctx context.Context) error {
	tick := time.NewTicker(certInterval)
	defer tick.Stop()
	for {
		if err := c.renewOwn(ctx, false); err != nil && ctx.Err() == nil {
			c.log.Warn("this node's certificate for the own store was not renewed", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// renewOwn has the cluster's authority, whose key the store keeps for the cluster's own nodes, sign a new certificate for this node, if the
// one that it has is due, or at once. The connection takes it up by itself.
func (c *certs) renewOwn(ctx context.Context, now bool) (err error) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.problem = ""
		if err != nil && ctx.Err() == nil {
			c.problem = "this node's certificate for the own store cannot be renewed: " + err.Error()
		}
	}()
	k := c.cfg.KVStore
	leaf, err := readCert(k.CertFile)
	if err != nil {
		return err
	}
	if !now && !pki.Due(leaf, c.clock.Now()) {
		return nil
	}
	authority, err := c.peering.Authority(ctx)
	if err != nil {
		return err
	}
	if err := leaf.CheckSignatureFrom(authority.Cert); err != nil {
		return fmt.Errorf("%s was not signed by the cluster's authority, so somebody else has to renew it: %w", k.CertFile, err)
	}
	pair, err := authority.Issue(pki.Request{User: leaf.Subject.CommonName}, c.clock.Now())
	if err != nil {
		return err
	}
	if err := pki.WriteFiles(k.CertFile, k.KeyFile, pair); err != nil {
		return err
	}
	c.log.Info("this node's certificate for the own store was renewed", "file", k.CertFile)
	return nil
}

func readCert(file string) (*x509.Certificate, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	cert, err := pki.ParseCert(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return cert, nil
}

// problems says what is wrong with certificates that no peer's status shows.
func (c *certs) problems() []string {
	c.mu.Lock()
	problem := c.problem
	c.mu.Unlock()
	var out []string
	if problem != "" {
		out = append(out, problem)
	}
	return append(out, c.peering.Problems()...)
}

// list shows all certificates.
func (c *certs) list() ([]api.Cert, []<-chan struct{}, error) {
	out := []api.Cert{}
	add := func(name, file string, cert *x509.Certificate, renews bool) {
		out = append(out, c.show(name, file, cert, renews))
	}
	if ca, err := readCert(c.cfg.KVStore.CAFile); err == nil {
		add(certAuthority, c.cfg.KVStore.CAFile, ca, false)
	}
	if leaf, err := readCert(c.cfg.KVStore.CertFile); err == nil {
		add(certAgent, c.cfg.KVStore.CertFile, leaf, true)
	}
	if leaf := c.peering.ServingCert(); leaf != nil {
		add(certPeering, "", leaf, true)
	}
	for _, ch := range c.channels.ofPeers() {
		record := ch.peer()
		if ca, err := pki.ParseCert([]byte(record.Authority)); err == nil {
			add("authority of "+ch.cluster, c.peers.file(ch.cluster, peerAuthorityFile), ca, false)
		}
		if leaf, err := pki.ParseCert([]byte(record.Cert)); err == nil {
			add(certPeer+ch.cluster, c.peers.file(ch.cluster, peerCertFile), leaf, true)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range out {
		if out[i].Name == certAgent {
			out[i].Problem = c.problem
		}
	}
	return out, nil, nil
}

func (c *certs) show(name, file string, cert *x509.Certificate, renews bool) api.Cert {
	now := c.clock.Now()
	out := api.Cert{
		Name: name, User: cert.Subject.CommonName, Issuer: cert.Issuer.CommonName, Fingerprint: pki.FingerprintOf(cert).String(),
		NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, File: file, State: "valid",
	}
	if renews {
		out.Renews = cert.NotAfter.Add(-cert.NotAfter.Sub(cert.NotBefore) / 3)
	}
	switch {
	case now.After(cert.NotAfter):
		out.State = "expired"
	case now.Before(cert.NotBefore):
		out.State = "not valid yet"
	case pki.Due(cert, now):
		out.State = "expires soon"
	}
	return out
}

// rotate renews certificates now: one by name, or all that can be.
func (c *certs) rotate(ctx context.Context, name string) error {
	var errs []error
	found := name == ""
	if name == "" || name == certAgent {
		found = true
		errs = append(errs, c.renewOwn(ctx, true))
	}
	for _, ch := range c.channels.ofPeers() {
		if name == "" || name == ch.cluster || name == certPeer+ch.cluster {
			found = true
			if err := c.peering.Renew(ctx, ch.cluster); err != nil {
				errs = append(errs, fmt.Errorf("at cluster %s: %w", ch.cluster, err))
			}
		}
	}
	if !found {
		names := append([]string{certAgent}, c.channels.names()...)
		slices.Sort(names)
		return missing("there is no certificate %q that could be renewed; there are: %s", name, strings.Join(names, ", "))
	}
	return errors.Join(errs...)
}
