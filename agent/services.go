package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
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
}

// refusedApply is how a refused apply is named among the refusals.
const refusedApply = "service apply"

// Apply declares the services of the manifests, all of them or, if one is refused, none.
func (s *services) Apply(ctx context.Context, manifests []byte) ([]api.ServiceResult, error) {
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
		if err := s.check(ctx, wanted[i]); err != nil {
			return nil, err
		}
	}
	results := make([]api.ServiceResult, 0, len(wanted))
	for _, service := range wanted {
		result, err := s.apply(ctx, service)
		if err != nil {
			return results, err
		}
		results = append(results, result)
	}
	for _, result := range results {
		s.waitProgrammed(ctx, result.Service)
	}
	return results, nil
}

// check refuses an address that a manifest asks for and cannot have, before anything of the file is written.
func (s *services) check(ctx context.Context, service lb.Service) error {
	if len(service.ClusterIPs) == 0 {
		return nil
	}
	used, err := s.reserved(ctx)
	if err != nil {
		return err
	}
	return s.checkIP(service, used)
}

// checkIP tells why a service cannot have the address that it asks for.
func (s *services) checkIP(service lb.Service, used map[netip.Addr]string) error {
	ip := service.ClusterIPs[0]
	if reason := s.guard(ip); reason != "" {
		return conflict("service %s: clusterIP %s: %s; choose another, or leave it out to get a free one", service.Name, ip, reason)
	}
	if owner, taken := used[ip]; taken && owner != service.Name.String() {
		return conflict("service %s: clusterIP %s is service %s's; choose another, or leave it out to get a free one", service.Name, ip, owner)
	}
	return nil
}

func (s *services) apply(ctx context.Context, service lb.Service) (api.ServiceResult, error) {
	var err error
	for range applyAttempts {
		var result api.ServiceResult
		if result, err = s.tryApply(ctx, service); !errors.Is(err, kvstore.ErrConflict) {
			return result, err
		}
	}
	return api.ServiceResult{}, conflict("service %s: others kept changing it or its address at the same time: %w", service.Name, err)
}

// tryApply writes the service together with the reservation of its address, if neither has changed.
func (s *services) tryApply(ctx context.Context, service lb.Service) (api.ServiceResult, error) {
	key := lb.ServiceKey(service.Cluster, service.Name)
	held, err := s.store.Get(ctx, key)
	if err != nil && !errors.Is(err, kvstore.ErrNotFound) {
		return api.ServiceResult{}, err
	}
	old, oldErr := lb.DecodeService(key, held.Value)
	exists := err == nil && oldErr == nil
	conds := []kvstore.Condition{{Key: key, Revision: held.Revision}}
	var ops []kvstore.Op

	switch {
	case len(service.ClusterIPs) == 0 && exists:
		service.ClusterIPs = old.ClusterIPs
	case exists && reflect.DeepEqual(service.ClusterIPs, old.ClusterIPs):
	default:
		ip, err := s.reserve(ctx, service)
		if err != nil {
			return api.ServiceResult{}, err
		}
		service.ClusterIPs = []netip.Addr{ip}
		reservation := reservationKey(service.Cluster, ip)
		conds = append(conds, kvstore.Condition{Key: reservation})
		ops = append(ops, kvstore.Op{Kind: kvstore.OpPut, Key: reservation, Value: []byte(service.Name.String())})
		if exists {
			for _, ip := range old.ClusterIPs {
				ops = append(ops, kvstore.Op{Kind: kvstore.OpDelete, Key: reservationKey(service.Cluster, ip)})
			}
		}
	}
	result := api.ServiceResult{Service: service.Name, Action: "created"}
	for _, ip := range service.ClusterIPs {
		result.ClusterIPs = append(result.ClusterIPs, ip.String())
	}
	value := lb.EncodeService(service)
	switch {
	case exists && string(value) == string(held.Value):
		result.Action = "unchanged"
		return result, nil
	case exists:
		result.Action = "configured"
	}
	ops = append(ops, kvstore.Op{Kind: kvstore.OpPut, Key: key, Value: value})
	return result, s.store.Txn(ctx, conds, ops)
}

// reserve chooses the service's address: the one it asks for, or a free one of the cluster's range.
func (s *services) reserve(ctx context.Context, service lb.Service) (netip.Addr, error) {
	used, err := s.reserved(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	if len(service.ClusterIPs) > 0 {
		return service.ClusterIPs[0], s.checkIP(service, used)
	}
	ip, err := lb.AllocateClusterIP(s.cluster.ServiceCIDR, service.Name, func(ip netip.Addr) bool {
		_, taken := used[ip]
		return taken || s.guard(ip) != ""
	})
	if err != nil {
		return ip, conflict("service %s: %w; delete services, or give the cluster a larger cluster.serviceCIDR", service.Name, err)
	}
	return ip, nil
}

// reserved reads which addresses are whose.
func (s *services) reserved(ctx context.Context) (map[netip.Addr]string, error) {
	prefix := reservationPrefix(s.cluster.Name)
	entries, err := s.store.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	used := map[netip.Addr]string{}
	for _, entry := range entries {
		if ip, err := netip.ParseAddr(strings.TrimPrefix(entry.Key, prefix)); err == nil {
			used[ip] = string(entry.Value)
		}
	}
	return used, nil
}

// Delete withdraws a service of this cluster. What other clusters declare under its name stays.
func (s *services) Delete(ctx context.Context, name lb.Name) error {
	key := lb.ServiceKey(s.cluster.Name, name)
	held, err := s.store.Get(ctx, key)
	if errors.Is(err, kvstore.ErrNotFound) {
		return missing("service %s is not declared in cluster %s", name, s.cluster.Name)
	}
	if err != nil {
		return err
	}
	ops := []kvstore.Op{{Kind: kvstore.OpDelete, Key: key}}
	if old, err := lb.DecodeService(key, held.Value); err == nil {
		for _, ip := range old.ClusterIPs {
			ops = append(ops, kvstore.Op{Kind: kvstore.OpDelete, Key: reservationKey(s.cluster.Name, ip)})
		}
	}
	if err := s.store.Txn(ctx, []kvstore.Condition{{Key: key, Revision: held.Revision}}, ops); err != nil {
		return fmt.Errorf("service %s: %w", name, err)
	}
	return nil
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

// newGuard returns what no service's address may be: a pod's, or a node's.
func newGuard(tables *clustermesh.Tables, claims *clustermesh.Claims) lb.Guard {
	return func(ip netip.Addr) string {
		if cluster, prefix, ok := claims.PodRange(ip); ok {
			return fmt.Sprintf("it lies in the pod range %s of cluster %s", prefix, cluster)
		}
		if node, ok := tables.NodeAt(tables.DB.ReadTxn(), ip); ok {
			return "it is the address of node " + node.String()
		}
		return ""
	}
}
