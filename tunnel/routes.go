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
)

const (
	// routeProtocol marks our routes in "ip route", so that others' are left alone.
	routeProtocol = 0xca
	// routeMetric is the metric of a route, less the ID of the cluster that owns it. This way the kernel keeps
	// whose a route is while no agent runs.
	routeMetric = 1000
)

// Routes keeps a route through the tunnel to the pod CIDRs of every other node, for this node's own
// processes. Its methods are safe for concurrent use, and act on the network
// namespace of the thread that called NewRoutes.
type Routes struct {
	mu     sync.Mutex
	handle *netlink.Handle
	device int
	mtu    int
	source netip.Addr
	// nodes has what was last set for each node.
	nodes map[identity.NodeName][]routeKey
}

// routeKey tells routes apart.
type routeKey struct {
	prefix netip.Prefix
	owner  identity.ClusterID
}

// NewRoutes returns the routes through the device, for a node with this underlay address.
func NewRoutes(device Device, source netip.Addr) (*Routes, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return &Routes{
		handle: handle, device: device.Index, mtu: device.MTU, source: source.Unmap(),
		nodes: make(map[identity.NodeName][]routeKey),
	}, nil
}

// Close lets go of the netlink socket; the routes stay.
func (r *Routes) Close() error {
	r.handle.Close()
	return nil
}

// Update makes the node's pod CIDRs reachable, and those that it had before unreachable.
// This node itself needs no routes.
func (r *Routes) Update(_ context.Context, n identity.Tunnel) error {
	want := r.keys(n)
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	keep := make(map[routeKey]bool)
	for _, key := range want {
		keep[key] = true
		if err := r.handle.RouteReplace(r.route(key, n.MTU)); err != nil {
			errs = append(errs, fmt.Errorf("setting the route to %s of node %s/%s: %w", key.prefix, n.Cluster, n.Node, err))
		}
	}
	name := n.NodeName()
	for _, key := range r.nodes[name] {
		if !keep[key] {
			errs = append(errs, r.remove(key))
		}
	}
	r.nodes[name] = want
	return errors.Join(errs...)
}

// Delete removes the routes to the node's pod CIDRs.
func (r *Routes) Delete(_ context.Context, n identity.Tunnel) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.nodes, n.NodeName())
	var errs []error
	for _, key := range r.keys(n) {
		errs = append(errs, r.remove(key))
	}
	return errors.Join(errs...)
}

// Prune removes the routes that no desired node has, of clusters that have synced.
func (r *Routes) Prune(_ context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	keep := make(map[routeKey]bool)
	for n := range desired {
		for _, key := range r.keys(n) {
			keep[key] = true
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	have, err := r.list()
	if err != nil {
		return err
	}
	var errs []error
	for _, key := range have {
		if !keep[key] && synced(key.owner) {
			errs = append(errs, r.remove(key))
		}
	}
	return errors.Join(errs...)
}

// keys returns the routes that the node needs.
func (r *Routes) keys(n identity.Tunnel) []routeKey {
	if n.Self || n.Address == r.source {
		return nil
	}
	var keys []routeKey
	for _, p := range n.PodCIDRs {
		keys = append(keys, routeKey{prefix: p.Masked(), owner: n.ClusterID})
	}
	return keys
}

// list returns our routes as they are in the kernel.
func (r *Routes) list() ([]routeKey, error) {
	filter := &netlink.Route{LinkIndex: r.device, Protocol: routeProtocol}
	var have []routeKey
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return r.handle.RouteListFiltered(family, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
		})
		if family == netlink.FAMILY_V6 && errors.Is(err, unix.EOPNOTSUPP) {
			continue // The kernel has no IPv6.
		}
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		for _, route := range routes {
			owner := route.Priority - routeMetric
			if route.Dst == nil || owner <= 0 || owner > 255 {
				continue
			}
			addr, _ := netip.AddrFromSlice(route.Dst.IP)
			bits, _ := route.Dst.Mask.Size()
			have = append(have, routeKey{prefix: netip.PrefixFrom(addr.Unmap(), bits), owner: identity.ClusterID(owner)})
		}
	}
	return have, nil
}

func (r *Routes) remove(key routeKey) error {
	route := r.route(key, 0)
	route.MTU = 0 // Otherwise only a route with that MTU would be removed.
	if err := r.handle.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("removing the route to %s: %w", key.prefix, err)
	}
	return nil
}

// route is for packets of up to mtu bytes, the device's MTU if it is 0. Its source is the node's address, if that is of the same family: it is what the
// other nodes let the node send as.
func (r *Routes) route(key routeKey, mtu int) *netlink.Route {
	if mtu == 0 || mtu > r.mtu {
		mtu = r.mtu
	}
	addr := key.prefix.Addr()
	route := &netlink.Route{
		LinkIndex: r.device,
		Dst:       &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(key.prefix.Bits(), addr.BitLen())},
		MTU:       mtu,
		Priority:  routeMetric + int(key.owner),
		Protocol:  routeProtocol,
	}
	if addr.Is4() {
		route.Scope = netlink.SCOPE_LINK
	} else {
		route.MTU = max(mtu, smallMTU)
	}
	if r.source.Is4() == addr.Is4() {
		route.Src = r.source.AsSlice()
	}
	return route
}
