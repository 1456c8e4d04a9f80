package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"causeway/agent/api"
	"causeway/kvstore"
	"causeway/lb"
)

// plan is what an apply writes, and on which conditions: every service with the reservation of its address.
type plan struct {
	*services
	conds   []kvstore.Condition
	ops     []kvstore.Op
	results []api.ServiceResult
	// used are the addresses that somebody has; nil until an address is asked for.
	used map[netip.Addr]reservation
}

// reservation of an address for a service.
type reservation struct {
	owner string // "namespace/name"
	// revision of the reservation's key; 0 if the store has none.
	revision int64
	// known: a service is known by the address, and nothing else. The store may have lost the reservation, or the
	// service was deleted a moment ago: nobody gets the address who does not ask for it.
	known bool
}

// add plans one service.
func (p *plan) add(ctx context.Context, service lb.Service) error {
	key := lb.ServiceKey(service.Cluster, service.Name)
	held, err := p.store.Get(ctx, key)
	if err != nil && !errors.Is(err, kvstore.ErrNotFound) {
		return err
	}
	old, oldErr := lb.DecodeService(key, held.Value)
	exists := err == nil && oldErr == nil // what cannot be read is written over
	p.conds = append(p.conds, kvstore.Condition{Key: key, Revision: held.Revision})
	switch {
	case len(service.ClusterIPs) == 0 && exists:
		service.ClusterIPs = old.ClusterIPs
	case exists && slices.Equal(service.ClusterIPs, old.ClusterIPs):
	default:
		ip, err := p.reserve(ctx, service)
		if err != nil {
			return err
		}
		service.ClusterIPs = []netip.Addr{ip}
	}

	result := api.ServiceResult{Service: service.Name, Action: "created"}
	for _, ip := range service.ClusterIPs {
		result.ClusterIPs = append(result.ClusterIPs, ip.String())
	}
	value := lb.EncodeService(service)
	switch {
	case exists && string(value) == string(held.Value):
		result.Action = "unchanged"
	case exists:
		result.Action = "configured"
	}
	p.results = append(p.results, result)
	if result.Action != "unchanged" {
		p.ops = append(p.ops, kvstore.Op{Kind: kvstore.OpPut, Key: key, Value: value})
	}
	return nil
}

// reserve plans the service's address, the one it asks for or a free one of the cluster's range, and gives up those that
// it had.
func (p *plan) reserve(ctx context.Context, service lb.Service) (netip.Addr, error) {
	if err := p.read(ctx); err != nil {
		return netip.Addr{}, err
	}
	ip, err := p.choose(service)
	if err != nil {
		return ip, err
	}
	key := reservationKey(service.Cluster, ip)
	p.conds = append(p.conds, kvstore.Condition{Key: key, Revision: p.used[ip].revision})
	p.ops = append(p.ops, kvstore.Op{Kind: kvstore.OpPut, Key: key, Value: []byte(service.Name.String())})
	p.free(service.Name, ip)
	p.used[ip] = reservation{owner: service.Name.String()}
	return ip, nil
}

func (p *plan) choose(service lb.Service) (netip.Addr, error) {
	if len(service.ClusterIPs) > 0 {
		return service.ClusterIPs[0], p.checkIP(service)
	}
	ip, err := lb.AllocateClusterIP(p.cluster.ServiceCIDRs[0], service.Name, func(ip netip.Addr) bool {
		_, taken := p.used[ip]
		return taken || p.guard(p.cluster.Name, ip) != ""
	})
	if err != nil {
		return ip, conflict("service %s: %w; delete services, or give the cluster a larger range in cluster.serviceCIDRs", service.Name, err)
	}
	return ip, nil
}

// checkIP tells why a service cannot have the address that it asks for.
func (p *plan) checkIP(service lb.Service) error {
	ip := service.ClusterIPs[0]
	if reason := p.guard(service.Cluster, ip); reason != "" {
		return conflict("service %s: clusterIP %s: %s; choose another, or leave it out to get a free one", service.Name, ip, reason)
	}
	if r, taken := p.used[ip]; taken && !r.known && r.owner != service.Name.String() {
		return conflict("service %s: clusterIP %s is service %s's; choose another, or leave it out to get a free one", service.Name, ip, r.owner)
	}
	return nil
}

// free plans to give up the addresses that are reserved for a service, but for one. Within the plan nobody gets them.
func (p *plan) free(name lb.Name, but netip.Addr) {
	for ip, r := range p.used {
		if r.owner == name.String() && r.revision != 0 && ip != but {
			p.ops = append(p.ops, kvstore.Op{Kind: kvstore.OpDelete, Key: reservationKey(p.cluster.Name, ip)})
		}
	}
}

// read reads which addresses are whose: those that are reserved, and those that services are known by.
func (p *plan) read(ctx context.Context) error {
	if p.used != nil {
		return nil
	}
	prefix := reservationPrefix(p.cluster.Name)
	entries, err := p.store.List(ctx, prefix)
	if err != nil {
		return err
	}
	p.used = map[netip.Addr]reservation{}
	for row := range p.tables.Services.Prefix(p.tables.DB.ReadTxn(), p.tables.Services.ByKey(p.cluster.Name+"/")) {
		for _, ip := range row.Object.ClusterIPs {
			p.used[ip] = reservation{owner: row.Object.Name.String(), known: true}
		}
	}
	for _, entry := range entries {
		if ip, err := netip.ParseAddr(strings.TrimPrefix(entry.Key, prefix)); err == nil {
			p.used[ip] = reservation{owner: string(entry.Value), revision: entry.Revision}
		}
	}
	return nil
}
