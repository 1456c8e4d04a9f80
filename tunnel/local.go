package tunnel

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/identity"
	"causeway/lb"
)

// LocalAddresses makes the addresses of services that are balanced at L7 the node's own, by routes in the table "local", so that packets to them
// reach its L7 proxy. They are on no device, so that nothing takes one for an address of the node. It is the target of the
// frontends table. Its methods are safe for concurrent use, and act on the network namespace of the thread that called NewLocalAddresses.
type LocalAddresses struct {
	mu       sync.Mutex
	handle   *netlink.Handle
	loopback int
	sources  []netip.Addr
	// frontends has those of L7 by where they are, and the route of each.
	frontends map[lb.FrontendKey]routeKey
	// used counts the frontends of a route.
	used map[routeKey]int
}

// NewLocalAddresses makes the node's addresses on the pods' side local, which its L7 proxy connects from, and then those of frontends as it hears of them.
// The node's own clients come from its address on the underlay, or, to services of the other family, from one on the pods' side.
func NewLocalAddresses(node netip.Addr, podSides []netip.Addr) (*LocalAddresses, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	l := &LocalAddresses{handle: handle, frontends: make(map[lb.FrontendKey]routeKey), used: make(map[routeKey]int)}
	if err := l.setup(podSides); err != nil {
		handle.Close()
		return nil, err
	}
	l.sources = append([]netip.Addr{node.Unmap()}, podSides...)
	return l, nil
}

func (l *LocalAddresses) setup(podSides []netip.Addr) error {
	lo, err := l.handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding the loopback device: %w", err)
	}
	l.loopback = lo.Attrs().Index
	for _, a := range podSides {
		if err := l.add(routeKey{prefix: netip.PrefixFrom(a, a.BitLen())}); err != nil {
			return err
		}
	}
	return nil
}

// Close lets go of the netlink socket; the routes stay.
func (l *LocalAddresses) Close() error {
	l.handle.Close()
	return nil
}

// Update makes the frontend's address local if it is balanced at L7. If it is no more, the address stays local until Unused hears of it.
func (l *LocalAddresses) Update(_ context.Context, f lb.Frontend) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !f.L7 || !f.Address.IsValid() {
		return nil
	}
	key := localKey(f)
	if l.frontends[f.FrontendKey] == key {
		return nil
	}
	if err := l.add(key); err != nil {
		return err
	}
	err := l.forget(f.FrontendKey)
	l.frontends[f.FrontendKey] = key
	l.used[key]++
	return err
}

// Delete makes the frontend's address somebody else's again, unless another frontend there is balanced at L7.
func (l *LocalAddresses) Delete(_ context.Context, f lb.Frontend) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.forget(f.FrontendKey)
}

// Prune removes the routes that no desired frontend needs, of clusters that have synced.
func (l *LocalAddresses) Prune(_ context.Context, desired iter.Seq[lb.Frontend], synced func(identity.ClusterID) bool) error {
	keep := make(map[routeKey]bool)
	for f := range desired {
		if f.L7 {
			keep[localKey(f)] = true
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	have, err := l.list()
	if err != nil {
		return err
	}
	var errs []error
	for _, key := range have {
		if !keep[key] && l.used[key] == 0 && synced(key.owner) {
			errs = append(errs, l.remove(key))
		}
	}
	return errors.Join(errs...)
}

// Unused returns the target that takes away the addresses of frontends that were balanced at L7 and are not any more. It comes after that of
// the frontends themselves, as LocalAddresses comes before: packets to an address that is not local would leave by the default route.
func (l *LocalAddresses) Unused() *UnusedAddresses { return &UnusedAddresses{l} }

// UnusedAddresses is what LocalAddresses.Unused returns.
type UnusedAddresses struct{ l *LocalAddresses }

// Update makes the frontend's address not local any more, unless a frontend there is balanced at L7.
func (u *UnusedAddresses) Update(_ context.Context, f lb.Frontend) error {
	if f.L7 {
		return nil
	}
	u.l.mu.Lock()
	defer u.l.mu.Unlock()
	return u.l.forget(f.FrontendKey)
}

// Delete does nothing: LocalAddresses does it.
func (u *UnusedAddresses) Delete(context.Context, lb.Frontend) error { return nil }

// Prune does nothing: LocalAddresses does it.
func (u *UnusedAddresses) Prune(context.Context, iter.Seq[lb.Frontend], func(identity.ClusterID) bool) error {
	return nil
}

// forget takes a frontend from its route, which goes with the last one.
func (l *LocalAddresses) forget(f lb.FrontendKey) error {
	key, known := l.frontends[f]
	if !known {
		return nil
	}
	if l.used[key] == 1 {
		if err := l.remove(key); err != nil {
			return err
		}
		delete(l.used, key)
	} else {
		l.used[key]--
	}
	delete(l.frontends, f)
	return nil
}

func localKey(f lb.Frontend) routeKey {
	a := f.Address.Unmap()
	return routeKey{prefix: netip.PrefixFrom(a, a.BitLen()), owner: identity.ClusterID(f.ClusterID)}
}

func (l *LocalAddresses) add(key routeKey) error {
	if err := l.handle.RouteReplace(l.route(key)); err != nil {
		return fmt.Errorf("making %s an address of this node for its L7 proxy: %w", key.prefix.Addr(), err)
	}
	return nil
}

func (l *LocalAddresses) remove(key routeKey) error {
	route := l.route(key)
	route.Src = nil // Otherwise only a route with that source would be removed.
	if err := l.handle.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("making %s no address of this node any more: %w", key.prefix.Addr(), err)
	}
	return nil
}

// list returns our routes of frontends as they are in the kernel; those of pod-side addresses are of no cluster.
func (l *LocalAddresses) list() ([]routeKey, error) {
	filter := &netlink.Route{LinkIndex: l.loopback, Protocol: routeProtocol, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
	var have []routeKey
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return l.handle.RouteListFiltered(family, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		})
		if family == netlink.FAMILY_V6 && errors.Is(err, unix.EOPNOTSUPP) {
			continue // The kernel has no IPv6.
		}
		if err != nil {
			return nil, fmt.Errorf("listing local routes: %w", err)
		}
		for _, route := range routes {
			owner := route.Priority - routeMetric
			if route.Dst == nil || owner <= 0 || owner > 255 {
				continue
			}
			addr, _ := netip.AddrFromSlice(route.Dst.IP)
			addr = addr.Unmap()
			have = append(have, routeKey{prefix: netip.PrefixFrom(addr, addr.BitLen()), owner: identity.ClusterID(owner)})
		}
	}
	return have, nil
}

// route has a source for what the node itself sends to the address: otherwise that would be the address itself. Of IPv6 the kernel chooses none that is on no device.
func (l *LocalAddresses) route(key routeKey) *netlink.Route {
	addr := key.prefix.Addr()
	route := &netlink.Route{
		LinkIndex: l.loopback,
		Dst:       &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
		Type:      unix.RTN_LOCAL,
		Table:     unix.RT_TABLE_LOCAL,
		Priority:  routeMetric + int(key.owner),
		Protocol:  routeProtocol,
	}
	if !addr.Is4() {
		return route
	}
	route.Scope = netlink.SCOPE_HOST
	for _, source := range l.sources {
		if source.Is4() {
			route.Src = source.AsSlice()
			break
		}
	}
	return route
}
