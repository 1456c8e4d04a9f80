package testbed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// pollInterval is how often something that cannot be watched is asked again.
const pollInterval = 10 * time.Millisecond

// startKVStore starts a cluster's etcd and waits until it answers.
func (b *Bed) startKVStore(ctx context.Context, s *State, c *ClusterState) error {
	cgroup := s.cgroup(cgroupKVStore(c.Name))
	if err := makeCgroup(cgroup); err != nil {
		return err
	}
	p, err := spawn(spec{
		argv: []string{b.binary(), "kvstore",
			"--data-dir", b.path(c.Name, kvstoreName, "data"),
			"--listen-client", kvstoreEndpoint(c.KVStore.Address),
			"--pki", b.pki(c.Name), "--cluster", c.Name,
			// A killed process loses nothing that it has written; only a machine could.
			"--unsafe-no-fsync"},
		env: b.environ(""), netns: b.kvstoreNS(c.Name), cgroup: cgroup, log: b.kvstoreLog(c.Name),
	})
	if err != nil {
		return err
	}
	err = b.update(ctx, func(s *State) error {
		c, err := s.cluster(c.Name)
		if err == nil {
			c.KVStore.Process = p
		}
		return err
	})
	if err != nil {
		return err
	}
	return b.waitKVStore(ctx, c, p)
}

func kvstoreEndpoint(a netip.Addr) string { return netip.AddrPortFrom(a, kvstorePort).String() }

// waitKVStore asks the store for its health until it is well.
func (b *Bed) waitKVStore(ctx context.Context, c *ClusterState, p *Process) error {
	for {
		err := b.askKVStore(ctx, c)
		if err == nil {
			return nil
		}
		if !p.alive() {
			return withLog(fmt.Errorf("the store of cluster %s ended right after its start", c.Name), b.kvstoreLog(c.Name))
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return ctx.Err()
			}
			return withLog(fmt.Errorf("the store of cluster %s does not answer (%w): %w", c.Name, err, context.Cause(ctx)), b.kvstoreLog(c.Name))
		case <-time.After(pollInterval):
		}
	}
}

// askKVStore asks the store for its health. The store makes the certificates for that when it starts first.
func (b *Bed) askKVStore(ctx context.Context, c *ClusterState) error {
	client, err := b.kvstoreHTTP(c)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	return askHealth(ctx, client, "https://"+kvstoreEndpoint(c.KVStore.Address)+"/health")
}

// kvstoreHTTP returns a client that speaks to a store as an agent does, from within the store's namespace.
func (b *Bed) kvstoreHTTP(c *ClusterState) (*http.Client, error) {
	pki := b.pki(c.Name)
	cert, err := tls.LoadX509KeyPair(filepath.Join(pki, agentFile+".crt"), filepath.Join(pki, agentFile+".key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(pki, caFile+".crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return b.dialIn(ctx, b.kvstoreNS(c.Name), network, address)
	}
	return &http.Client{
		Timeout:   time.Second,
		Transport: &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}},
	}, nil
}

// dialIn makes a connection from within a network namespace.
func (b *Bed) dialIn(ctx context.Context, ns, network, address string) (conn net.Conn, err error) {
	err = inNS(ns, func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

func askHealth(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	return nil
}
