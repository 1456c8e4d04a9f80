package agent

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/k8s"
	"causeway/kvstore"
	"causeway/lb"
)

// applyAttempts bounds how often an apply is tried again when another node changed the same service or
// took the same address in the meantime.
const applyAttempts = 8

// maxApplyOps bounds the writes of one apply, so that all of a file is in force or nothing: kvstore.Store.Txn.
const maxApplyOps = 128

// programmed is how long an apply waits for this node's own kernel before it answers.
const programmed = 2 * time.Second

// services changes what this cluster declares. A service is the cluster's, not a node's: it is written
// to the store, and comes to every node, this one too, by following the store.
type services struct {
	tables  *clustermesh.Tables
	store   kvstore.Store
	cluster ClusterConfig
	guard   lb.Guard
	// refusals shows the newest refused apply until the next one succeeds, for those who did not see its answer.
	refusals *clustermesh.Refusals
	// kubernetes: services are declared there, and nowhere else.
	kubernetes bool
}

// refusedApply is how a refused apply is named among the refusals.
const refusedApply = "service apply"

// Apply declares the services of the manifests, all of them or, if one is refused, none.
func (s *services) Apply(ctx context.Context, manifests []byte) ([]api.ServiceResult, error) {
	if s.kubernetes {
		return nil, conflict("%w", errFromKubernetes)
	}
	results, err := s.applyAll(ctx, manifests)
	var refused *failureOf
	switch {
	case err == nil:
		s.refusals.Clear(s.cluster.Name, refusedApply)
	case errors.As(err, &refused):
		s.refusals.Add(s.cluster.Name, refusedApply, err)
	}
	return results, err
}

func (s *services) applyAll(ctx context.Context, manifests []byte) ([]api.ServiceResult, error) {
	wanted, err := k8s.ParseServices(manifests)
	if err != nil {
		return nil, invalid("%w", err)
	}
	for i := range wanted {
		wanted[i].Cluster, wanted[i].ClusterID = s.cluster.Name, uint8(s.cluster.ID)
	}
	for range applyAttempts {
		var results []api.ServiceResult
		if results, err = s.tryApply(ctx, wanted); err == nil {
			for _, result := range results {
				s.waitProgrammed(ctx, result.Service)
			}
			return results, nil
		}
		if !errors.Is(err, kvstore.ErrConflict) {
			return nil, err
		}
	}
	return nil, conflict("others kept changing these services or their addresses at the same time: %w", err)
}

// tryApply writes the services together with the reservations of their addresses, if none has changed meanwhile.
func (s *services) tryApply(ctx context.Context, wanted []k8s.Declaration) ([]api.ServiceResult, error) {
	p := &plan{services: s}
	for _, service := range wanted {
		if err := p.add(ctx, service); err != nil {
			return nil, err
		}
	}
	switch {
	case len(p.ops) > maxApplyOps:
		return nil, invalid("%d services need %d writes, at most %d are done at once; apply them in several files", len(wanted), len(p.ops), maxApplyOps)
	case len(p.ops) == 0:
		return p.results, nil
	}
	return p.results, s.store.Txn(ctx, p.conds, p.ops)
}

// Delete withdraws a service of this cluster. What other clusters declare under its name stays.
func (s *services) Delete(ctx context.Context, name lb.Name) error {
	if s.kubernetes {
		return conflict("%w", errFromKubernetes)
	}
	var err error
	for range applyAttempts {
		if err = s.tryDelete(ctx, name); !errors.Is(err, kvstore.ErrConflict) {
			return err
		}
	}
	return conflict("service %s: others kept changing it at the same time: %w", name, err)
}

func (s *services) tryDelete(ctx context.Context, name lb.Name) error {
	key := lb.ServiceKey(s.cluster.Name, name)
	held, err := s.store.Get(ctx, key)
	if errors.Is(err, kvstore.ErrNotFound) {
		return missing("service %s is not declared in cluster %s", name, s.cluster.Name)
	}
	if err != nil {
		return err
	}
	p := &plan{services: s}
	if err := p.read(ctx); err != nil {
		return err
	}
	p.conds = []kvstore.Condition{{Key: key, Revision: held.Revision}}
	p.ops = []kvstore.Op{{Kind: kvstore.OpDelete, Key: key}}
	p.free(name, nil)
	return s.store.Txn(ctx, p.conds, p.ops)
}

// waitProgrammed returns when this node's kernel has the service's frontends, or after a while: the
// service is declared either way, and its status shows what is missing.
func (s *services) waitProgrammed(ctx context.Context, name lb.Name) {
	ctx, cancel := context.WithTimeout(ctx, programmed)
	defer cancel()
	for {
		_, changed := s.tables.Frontends.AllWatch(s.tables.DB.ReadTxn())
		done, any := true, false
		for _, row := range s.tables.FrontendsOf(s.tables.DB.ReadTxn(), name) {
			any = true
			done = done && row.Status.Kind == clustermesh.Done
		}
		if done && any {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func reservationPrefix(cluster string) string { return kvstore.Prefix + "clusterips/" + cluster + "/" }

func reservationKey(cluster string, ip netip.Addr) string {
	return reservationPrefix(cluster) + ip.String()
}
