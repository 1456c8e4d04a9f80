package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"causeway/agent/api"
	"causeway/k8s"
	"causeway/kvstore"
	"causeway/lb"
)

// plan is what an apply writes, and on which conditions: every service with the reservations of its addresses.
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
func (p *plan) add(ctx context.Context, wanted k8s.Declaration) error {
	service := wanted.Service
	key := lb.ServiceKey(service.Cluster, service.Name)
	held, err := p.store.Get(ctx, key)
	if err != nil && !errors.Is(err, kvstore.ErrNotFound) {
		return err
	}
	old, oldErr := lb.DecodeService(key, held.Value)
	exists := err == nil && oldErr == nil // what cannot be read is written over
	p.conds = append(p.conds, kvstore.Condition{Key: key, Revision: held.Revision})
	if service.ClusterIPs, err = p.addresses(ctx, wanted, old.ClusterIPs); err != nil {
		return err
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

// addresses returns the service's cluster IPs, one of each family that it wants: that which it asks for, that which it has had, or a free
// one of the cluster's range. It plans their reservations, and to give up what the service has had besides.
func (p *plan) addresses(ctx context.Context, wanted k8s.Declaration, had []netip.Addr) ([]netip.Addr, error) {
	request := wanted.Families
	if len(request.Families) == 0 && len(had) > 0 {
		request.Families = []lb.Family{lb.FamilyOf(had[0])} // the first one stays the first, whatever becomes of the cluster's ranges
		if _, err := request.Resolve(p.cluster.ServiceCIDRs); err != nil {
			request.Families = nil
		}
	}
	families, err := request.Resolve(p.cluster.ServiceCIDRs)
	if err != nil {
		return nil, invalid("service %s: %w", wanted.Name, err)
	}
	ips := make([]netip.Addr, len(families))
	for i, family := range families {
		of := func(ip netip.Addr) bool { return lb.FamilyOf(ip) == family }
		if j := slices.IndexFunc(wanted.ClusterIPs, of); j >= 0 {
			ips[i] = wanted.ClusterIPs[j]
		} else if j := slices.IndexFunc(had, of); j >= 0 {
			ips[i] = had[j]
		}
	}
	if slices.Equal(ips, had) {
		return ips, nil
	}
	if err := p.read(ctx); err != nil {
		return nil, err
	}
	for i, ip := range ips {
		if ip.IsValid() && slices.Contains(had, ip) {
			continue
		}
		if ips[i], err = p.reserve(wanted.Service, families[i], ip); err != nil {
			return nil, err
		}
	}
	p.free(wanted.Name, ips)
	return ips, nil
}

// reserve plans one address of the service: ip, or if that is invalid a free one of the cluster's range of the family.
func (p *plan) reserve(service lb.Service, family lb.Family, ip netip.Addr) (netip.Addr, error) {
	var err error
	if ip.IsValid() {
		err = p.checkIP(service, ip)
	} else {
		ip, err = p.choose(service, family)
	}
	if err != nil {
		return ip, err
	}
	key := reservationKey(service.Cluster, ip)
	p.conds = append(p.conds, kvstore.Condition{Key: key, Revision: p.used[ip].revision})
	p.ops = append(p.ops, kvstore.Op{Kind: kvstore.OpPut, Key: key, Value: []byte(service.Name.String())})
	p.used[ip] = reservation{owner: service.Name.String()}
	return ip, nil
}

// choose returns a free address of the cluster's range of a family, which it has.
func (p *plan) choose(service lb.Service, family lb.Family) (netip.Addr, error) {
	i := slices.IndexFunc(p.cluster.ServiceCIDRs, func(r netip.Prefix) bool { return lb.FamilyOf(r.Addr()) == family })
	ip, err := lb.AllocateClusterIP(p.cluster.ServiceCIDRs[i], service.Name, func(ip netip.Addr) bool {
		_, taken := p.used[ip]
		return taken || p.guard(p.cluster.Name, ip) != ""
	})
	if err != nil {
		return ip, conflict("service %s: %w; delete services, or give the cluster a larger range in cluster.serviceCIDRs", service.Name, err)
	}
	return ip, nil
}

// checkIP tells why a service cannot have an address that it asks for.
func (p *plan) checkIP(service lb.Service, ip netip.Addr) error {
	if reason := p.guard(service.Cluster, ip); reason != "" {
		return conflict("service %s: clusterIP %s: %s; choose another, or leave it out to get a free one", service.Name, ip, reason)
	}
	if r, taken := p.used[ip]; taken && !r.known && r.owner != service.Name.String() {
		return conflict("service %s: clusterIP %s is service %s's; choose another, or leave it out to get a free one", service.Name, ip, r.owner)
	}
	return nil
}

// free plans to give up the addresses that are reserved for a service, but for those that it keeps. Within the plan nobody gets them.
func (p *plan) free(name lb.Name, keep []netip.Addr) {
	for ip, r := range p.used {
		if r.owner == name.String() && r.revision != 0 && !slices.Contains(keep, ip) {
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
