package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity/pki"
	"causeway/kvstore"

	"golang.org/x/sync/errgroup"
)

// certsInterval is how often it is looked whether a certificate is due.
const certsInterval = time.Hour

// storeCerts is a directory of a cluster's certificates that its store keeps.
type storeCerts struct {
	dir, cluster string
	hosts        []string // besides those of the addresses
	now          func() time.Time
	log          io.Writer
}

// serve runs a store with the certificates, until ctx ends or one of both fails. It calls ready once the store has its users and the authority.
func (c *storeCerts) serve(ctx context.Context, cfg kvstore.ServerConfig, ready func(net.Addr)) error {
	hosts := slices.Clone(c.hosts)
	for _, address := range []string{cfg.ListenClient, cfg.AdvertiseClient, cfg.Members.Initial[cfg.Name]} {
		if host, _, err := net.SplitHostPort(address); err == nil {
			hosts = append(hosts, host)
		} else if address != "" {
			return usageError("address %q: %v: want host:port", address, err)
		}
	}
	authority, err := pki.Ensure(c.dir, c.cluster, hosts, c.now())
	if err != nil {
		return err
	}
	cfg.CAFile = filepath.Join(c.dir, pki.FileAuthority+".crt")
	cfg.CertFile, cfg.KeyFile = filepath.Join(c.dir, pki.FileServer+".crt"), filepath.Join(c.dir, pki.FileServer+".key")
	addresses := make(chan net.Addr, 1)
	cfg.Ready = func(addr net.Addr) { addresses <- addr }

	g, ctx := errgroup.WithContext(ctx)
	ctx, stop := context.WithCancel(ctx)
	g.Go(func() error {
		defer stop()
		return kvstore.Serve(ctx, cfg)
	})
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case addr := <-addresses:
			if err := c.prepare(ctx, addr, authority); err != nil {
				return ignoreEnd(ctx, err)
			}
			ready(addr)
		}
		c.renew(ctx, hosts)
		return nil
	})
	return g.Wait()
}

// ignoreEnd returns err unless it only follows from the end of ctx.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// prepare gives the store its users and the authority.
func (c *storeCerts) prepare(ctx context.Context, addr net.Addr, authority *pki.Authority) error {
	if authority == nil {
		fmt.Fprintf(c.log, "kvstore: %s is not in %s, so the store was not given its users: see clustermesh kvstore init\n", pki.FileAuthority+".key", c.dir)
		return nil
	}
	endpoint, err := local(addr)
	if err != nil {
		return err
	}
	root, err := peering.RootConfig([]string{endpoint}, authority, c.now())
	if err != nil {
		return err
	}
	return peering.PrepareStore(ctx, root, authority)
}

// local returns where this machine reaches what listens at an address, which may be all of its addresses.
func local(addr net.Addr) (string, error) {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return "", fmt.Errorf("kvstore: address %s: %w", addr, err)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port), nil
}

// renew renews certificates that are due, until ctx ends. The store reads them for every connection.
func (c *storeCerts) renew(ctx context.Context, hosts []string) {
	ticker := time.NewTicker(certsInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if _, err := pki.Ensure(c.dir, c.cluster, hosts, c.now()); err != nil {
				fmt.Fprintln(c.log, "kvstore: renewing certificates:", err)
			}
		}
	}
}
