package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Policy routing of tunnel addresses: what has one as its source is routed by the slot's table, which leads into WireGuard or nowhere.
const (
	rulePriority = 77
	slotTable    = 0xca00 // and the slot's number
	// unreachableMetric makes the default the last route of its table, and is what IPv6 has for such routes.
	unreachableMetric = 4096
	// smallTOS is the type of service of outer packets that are too large for the way to their node: only they take the route with
	// the small MTU.
	smallTOS = 0x10
)

// slotRoute is a route of a slot's table, as far as it differs from others.
type slotRoute struct {
	to  netip.Addr // invalid: the unreachable default
	tos int
}

// ensureRoutes makes the slot's address, rule and routes what they should be, and counts what it repairs.
func (w *WireGuard) ensureRoutes(s *slot) error {
	if err := w.ensureAddress(s); err != nil {
		return err
	}
	have, err := w.listRoutes(s)
	if err != nil {
		return err
	}
	want := w.wantedRoutes(s)
	missing := 0
	for key, route := range want {
		if h, ok := have[key]; ok && h.LinkIndex == route.LinkIndex && h.MTU == route.MTU && h.Type == route.Type {
			continue
		}
		missing++
		if err := w.setRoute(route); err != nil {
			return err
		}
	}
	w.repaired("route", s, missing)
	for key, route := range have {
		if _, ok := want[key]; !ok && w.pruned {
			if err := w.removeRoute(&route); err != nil {
				return err
			}
		}
	}
	// The rule is last: its table is complete by then.
	return w.ensureRule(s)
}

func (w *WireGuard) ensureAddress(s *slot) error {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: s.index}}
	tunnel := w.cfg.Tunnel[s.number]
	list, err := dump(func() ([]netlink.Addr, error) { return w.links.AddrList(link, familyOf(tunnel)) })
	if err != nil {
		return fmt.Errorf("listing the addresses of %s: %w", s.name, err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == tunnel {
			return nil
		}
	}
	w.repaired("address", s, 1)
	addr := &netlink.Addr{IPNet: host(tunnel)}
	if tunnel.Is6() {
		addr.Flags = unix.IFA_F_NODAD // Nobody else can have it.
	}
	if err := w.links.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("giving %s its address %s: %w", s.name, tunnel, err)
	}
	return nil
}

func (w *WireGuard) ensureRule(s *slot) error {
	have, err := w.listRules(s)
	if err != nil {
		return err
	}
	want := w.rule(s)
	found := false
	for _, r := range have {
		if !found && sameNet(r.Src, want.Src) && r.Dst == nil && r.Mark == 0 {
			found = true
			continue
		}
		if err := w.links.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("removing a rule for table %d: %w", want.Table, err)
		}
	}
	if found {
		return nil
	}
	w.repaired("rule", s, 1)
	if err := w.links.RuleAdd(want); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding the rule for what comes from %s: %w", w.cfg.Tunnel[s.number], err)
	}
	return nil
}

func (w *WireGuard) rule(s *slot) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Priority, rule.Table = rulePriority, slotTable+int(s.number)
	rule.Family = familyOf(w.cfg.Tunnel[s.number])
	rule.Src = host(w.cfg.Tunnel[s.number])
	return rule
}

// listRules returns the rules of our priority that lead to the slot's table.
func (w *WireGuard) listRules(s *slot) ([]netlink.Rule, error) {
	filter := w.rule(s)
	list, err := dump(func() ([]netlink.Rule, error) {
		return w.links.RuleListFiltered(filter.Family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	})
	if err != nil {
		return nil, fmt.Errorf("listing routing rules: %w", err)
	}
	return list, nil
}

func (w *WireGuard) wantedRoutes(s *slot) map[slotRoute]*netlink.Route {
	family := familyOf(w.cfg.Tunnel[s.number])
	want := make(map[slotRoute]*netlink.Route, len(w.peers.byKey)+1)
	want[slotRoute{}] = w.unreachable(s)
	for _, p := range w.peers.byKey {
		if familyOf(p.address) != family {
			continue // VXLAN packets have one family.
		}
		for _, r := range w.peerRoutes(s, p) {
			want[slotRoute{p.address, r.Tos}] = r
		}
	}
	return want
}

// peerRoutes returns a peer's routes in the slot's table.
func (w *WireGuard) peerRoutes(s *slot, p *peer) []*netlink.Route {
	route := netlink.Route{
		LinkIndex: s.index, Dst: host(p.address), Table: slotTable + int(s.number), Protocol: routeProtocol, Scope: netlink.SCOPE_LINK, Type: unix.RTN_UNICAST,
	}
	if p.address.Is6() {
		route.Scope, route.Priority = netlink.SCOPE_UNIVERSE, 1024
	}
	list := []*netlink.Route{&route}
	if p.small > 0 {
		small := route
		small.Tos, small.MTU, small.MTULock = smallTOS, p.small, true
		list = append(list, &small)
	}
	return list
}

// unreachable returns the default route of the slot's table.
func (w *WireGuard) unreachable(s *slot) *netlink.Route {
	dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if w.cfg.Tunnel[s.number].Is6() {
		dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{Dst: dst, Table: slotTable + int(s.number), Protocol: routeProtocol, Type: unix.RTN_UNREACHABLE, Priority: unreachableMetric}
}

// listRoutes returns what is in the slot's table.
func (w *WireGuard) listRoutes(s *slot) (map[slotRoute]netlink.Route, error) {
	filter := &netlink.Route{Table: slotTable + int(s.number)}
	list, err := dump(func() ([]netlink.Route, error) {
		return w.links.RouteListFiltered(familyOf(w.cfg.Tunnel[s.number]), filter, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("listing the routes to tunnel addresses: %w", err)
	}
	have := make(map[slotRoute]netlink.Route, len(list))
	for _, r := range list {
		key := slotRoute{tos: r.Tos}
		if r.Dst != nil {
			if bits, _ := r.Dst.Mask.Size(); bits > 0 {
				to, _ := netip.AddrFromSlice(r.Dst.IP)
				key.to = to.Unmap()
			}
		}
		if r.Type == unix.RTN_UNREACHABLE {
			r.LinkIndex = 0 // IPv6 says it is the loopback's.
		}
		have[key] = r
	}
	return have, nil
}

func (w *WireGuard) setRoute(route *netlink.Route) error {
	if err := w.links.RouteReplace(route); err != nil {
		return fmt.Errorf("setting the route to tunnel address %s: %w", route.Dst, err)
	}
	return nil
}

func (w *WireGuard) removeRoute(route *netlink.Route) error {
	if err := w.links.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("removing the route to tunnel address %s: %w", route.Dst, err)
	}
	return nil
}

// removeRouting removes the slot's rule and what is left in its table.
func (w *WireGuard) removeRouting(s *slot) error {
	rules, err := w.listRules(s)
	if err != nil {
		return err
	}
	routes, err := w.listRoutes(s)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range rules {
		if err := w.links.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("removing the rule for what comes from %s: %w", r.Src, err))
		}
	}
	for _, r := range routes {
		errs = append(errs, w.removeRoute(&r))
	}
	return errors.Join(errs...)
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// host returns the range that has only an address.
func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func sameNet(a, b *net.IPNet) bool { return a != nil && b != nil && a.String() == b.String() }
