package testbed

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// A cluster's certificates, in its pki directory. Its store makes them, by "clustermesh kvstore --pki". Each cluster has an
// authority of its own, so a cluster lets another one in by a certificate and a user for it, and by nothing else.
//
//	ca.crt ca.key          the cluster's authority
//	server.crt server.key  its etcd
//	agent.crt agent.key    its own agents; each node gets a copy
const (
	caFile    = pki.FileAuthority
	agentFile = pki.FileAgent
)

// expiredFor is how long ago a certificate ends that Expire makes.
const expiredFor = time.Minute

// Expire lets a cluster's certificate at a peer be one that has expired, as if it had not been renewed in time. Joining
// again mends it.
func (b *Bed) Expire(ctx context.Context, cluster, peer string) error {
	return b.within(ctx, func(s *State) error {
		c, err := s.cluster(cluster)
		if err != nil {
			return err
		}
		if _, err := s.cluster(peer); err != nil {
			return err
		}
		store, err := b.storeOf(ctx, c)
		if err != nil {
			return err
		}
		defer store.Close()
		return b.expire(ctx, store, cluster, peer)
	})
}

func (b *Bed) expire(ctx context.Context, store kvstore.Store, cluster, peer string) error {
	key := peering.PeerKey(peer)
	entry, err := store.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("cluster %s is not joined with %s: %w", cluster, peer, err)
	}
	record, err := peering.DecodePeer(key, entry.Value)
	if err != nil {
		return err
	}
	leaf, err := pki.ParseCert([]byte(record.Cert))
	if err != nil {
		return err
	}
	dir := b.pki(peer)
	authority, err := pki.ReadAuthority(filepath.Join(dir, caFile+".crt"), filepath.Join(dir, caFile+".key"))
	if err != nil {
		return err
	}
	// It was signed long ago for exactly so long.
	signed := time.Now().Add(-pki.LeafValidity)
	pair, err := authority.Issue(pki.Request{User: leaf.Subject.CommonName, Validity: pki.LeafValidity - expiredFor}, signed)
	if err != nil {
		return err
	}
	record.Cert, record.Key = string(pair.Cert), string(pair.Key)
	return store.CompareAndSwap(ctx, key, entry.Revision, peering.EncodePeer(record))
}

// storeOf opens a cluster's store as its agents do, from within the store's namespace.
func (b *Bed) storeOf(ctx context.Context, c *ClusterState) (kvstore.Store, error) {
	k := b.kvstoreConfig(*c, b.pki(c.Name))
	return kvstore.Dial(ctx, kvstore.Config{
		Endpoints: k.Endpoints, CAFile: k.CAFile, CertFile: k.CertFile, KeyFile: k.KeyFile,
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			return b.dialIn(ctx, b.kvstoreNS(c.Name), "tcp", address)
		},
	})
}
