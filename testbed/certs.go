package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// A cluster's certificates, in its pki directory. Its store makes all but the last, by "clustermesh kvstore --pki". Each cluster has an
// authority of its own, so a cluster lets another one in by a certificate and a user for it, and by nothing else.
//
//	ca.crt ca.key                the cluster's authority
//	server.crt server.key        its etcd
//	agent.crt agent.key          its own agents
//	peer-NAME.crt peer-NAME.key  cluster NAME, here
const (
	caFile    = pki.FileAuthority
	agentFile = pki.FileAgent
)

func peerFile(cluster string) string { return "peer-" + cluster }

// letPeersIn makes, in a cluster's store, a user for every other cluster, and the certificate for it.
func (b *Bed) letPeersIn(ctx context.Context, s *State, c *ClusterState) (err error) {
	dir := b.pki(c.Name)
	authority, err := pki.ReadAuthority(filepath.Join(dir, caFile+".crt"), filepath.Join(dir, caFile+".key"))
	if err != nil {
		return err
	}
	now := time.Now()
	root, err := peering.RootConfig([]string{kvstoreEndpoint(c.KVStore.Address)}, authority, now)
	if err != nil {
		return err
	}
	root.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		return b.dialIn(ctx, b.kvstoreNS(c.Name), "tcp", address)
	}
	access, err := kvstore.OpenAccess(ctx, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, access.Close()) }()
	// The store does so too, and may not be done yet: nobody is to be there before users count.
	if err := access.Prepare(ctx, pki.UserAgent); err != nil {
		return err
	}
	for _, other := range s.Clusters {
		if other.Name == c.Name {
			continue
		}
		user := pki.PeerUser(other.Name)
		pair, err := authority.Issue(pki.Request{User: user}, now)
		if err != nil {
			return err
		}
		file := filepath.Join(dir, peerFile(other.Name))
		if err := pki.WriteFiles(file+".crt", file+".key", pair); err != nil {
			return err
		}
		if err := access.GrantRead(ctx, user, kvstore.Prefix); err != nil {
			return fmt.Errorf("letting cluster %s into the store of %s: %w", other.Name, c.Name, err)
		}
	}
	return nil
}
