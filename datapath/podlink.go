package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// DefaultPodInterface is the pod's end of its veth, if nothing else is said.
	DefaultPodInterface = "eth0"
	// podLinkAlias starts the alias of every veth of ours; the pod's addresses follow.
	podLinkAlias = "causeway pod "
)

// upTimeout bounds how long a link may take to come up; it usually takes under a millisecond.
const upTimeout = 5 * time.Second

// Gateways, which are the same in every pod. Nobody has the addresses: the pod's neighbour table
// says that the node's end of the veth is it.
var (
	podGateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	podGateway6 = netip.MustParseAddr("fe80::1")
)

// PodGateway returns the next hop of all that a pod sends from one of its addresses.
func PodGateway(address netip.Addr) netip.Addr {
	if address.Is6() {
		return podGateway6
	}
	return podGateway4
}

// minIPv6MTU is what every link of IPv6 has to carry, in bytes (RFC 8200): the kernel has no IPv6 on a link that carries less.
const minIPv6MTU = 1280

// PodLinkConfig says how to connect a pod.
type PodLinkConfig struct {
	// NetNS is the path of the pod's network namespace.
	NetNS string
	// HostLink names the node's end of the veth, Interface the pod's, which is DefaultPodInterface if that is empty; at most 15 bytes each.
	HostLink  string
	Interface string
	// Address of the pod, and the IPv6 one that it has beside an IPv4 one, if it has.
	Address  netip.Addr
	Address6 netip.Addr
	// MTU in bytes, of both ends.
	MTU int
}

// addresses returns the pod's, each of a family of its own.
func (cfg *PodLinkConfig) addresses() []netip.Addr {
	if cfg.Address6.IsValid() {
		return []netip.Addr{cfg.Address, cfg.Address6}
	}
	return []netip.Addr{cfg.Address}
}

// podInterface names the pod's end of the veth.
func (cfg *PodLinkConfig) podInterface() string { return cmp.Or(cfg.Interface, DefaultPodInterface) }

func (cfg *PodLinkConfig) hasIPv6() bool { return cfg.Address.Is6() || cfg.Address6.IsValid() }

// alias marks the veth as ours, of these addresses.
func (cfg *PodLinkConfig) alias() string {
	alias := podLinkAlias + cfg.Address.String()
	if cfg.Address6.IsValid() {
		alias += " " + cfg.Address6.String()
	}
	return alias
}

func (cfg *PodLinkConfig) validate() error {
	switch {
	case !cfg.Address.IsValid() || cfg.Address.Is4In6():
		return fmt.Errorf("%q is no IPv4 or IPv6 address", cfg.Address)
	case cfg.Address6.IsValid() && (!cfg.Address.Is4() || !cfg.Address6.Is6() || cfg.Address6.Is4In6()):
		return fmt.Errorf("%s beside %s: a pod has one address of each family", cfg.Address6, cfg.Address)
	case cfg.hasIPv6() && cfg.MTU < minIPv6MTU:
		return fmt.Errorf("an MTU of %d bytes is below the %d that IPv6 needs", cfg.MTU, minIPv6MTU)
	case len(cfg.HostLink) == 0 || len(cfg.HostLink) >= unix.IFNAMSIZ:
		return fmt.Errorf("link name %q must have 1 to %d bytes", cfg.HostLink, unix.IFNAMSIZ-1)
	}
	return CheckInterfaceName(cfg.podInterface())
}

// CheckInterfaceName tells why a pod's interface cannot have a name: the kernel's rules, and that a pod has a loopback interface already.
func CheckInterfaceName(name string) error {
	reserved := name == "." || name == ".." || name == "lo" || name == "all" || name == "default"
	if reserved || len(name) == 0 || len(name) >= unix.IFNAMSIZ || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ':' || r == '%' }) {
		return fmt.Errorf("interface name %q: want 1 to %d ASCII characters without blanks, \"/\", \":\" and \"%%\", and not lo, all or default, which are the kernel's", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// PodLink is a veth between the node and a pod.
type PodLink struct {
	// IfIndex and HostMAC are those of the node's end, MAC is the pod's.
	IfIndex int
	HostMAC string
	MAC     string
}

// CreatePodLink connects the namespace by a veth: Interface in the pod with each address as a /32 or /128 and a default
// route, HostLink in the calling thread's namespace with such a route to the pod. Neighbours are permanent
// on both ends, so that neither ARP nor neighbour discovery is needed, and addresses are usable at once. A veth of ours that is right already is kept, one that
// isn't is replaced; a device of somebody else is an error.
func CreatePodLink(cfg PodLinkConfig) (PodLink, error) {
	link, err := createPodLink(cfg)
	if err != nil {
		return PodLink{}, fmt.Errorf("connecting %s at %s: %w", cfg.NetNS, cfg.Address, err)
	}
	return link, nil
}

func createPodLink(cfg PodLinkConfig) (PodLink, error) {
	if err := cfg.validate(); err != nil {
		return PodLink{}, err
	}
	ns, err := netns.GetFromPath(cfg.NetNS)
	if err != nil {
		return PodLink{}, fmt.Errorf("opening the network namespace: %w", err)
	}
	defer ns.Close()
	if err := refuseOwn(ns); err != nil {
		return PodLink{}, err
	}
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return PodLink{}, fmt.Errorf("entering the network namespace: %w", err)
	}
	defer pod.Close()

	host, err := ensureVeth(cfg, ns, pod)
	if err != nil {
		return PodLink{}, err
	}
	inner, err := pod.LinkByName(cfg.podInterface())
	if err != nil {
		return PodLink{}, fmt.Errorf("finding %s in the pod: %w", cfg.podInterface(), err)
	}
	if err := setPodSysctls(ns, cfg); err != nil {
		return PodLink{}, fmt.Errorf("in the pod: %w", err)
	}
	if err := configurePodEnd(pod, inner, host.Attrs().HardwareAddr, cfg); err != nil {
		return PodLink{}, err
	}
	if err := configureHostEnd(host, inner.Attrs().HardwareAddr, cfg); err != nil {
		return PodLink{}, err
	}
	if err := awaitUp(pod, inner.Attrs().Index); err != nil {
		return PodLink{}, err
	}
	if err := awaitAddresses(pod, cfg.addresses()); err != nil {
		return PodLink{}, err
	}
	if err := awaitUp(&netlink.Handle{}, host.Attrs().Index); err != nil {
		return PodLink{}, err
	}
	return PodLink{
		IfIndex: host.Attrs().Index,
		HostMAC: host.Attrs().HardwareAddr.String(),
		MAC:     inner.Attrs().HardwareAddr.String(),
	}, nil
}

// refuseOwn refuses the network namespace of the calling thread, which is the node's: a pod with the node's network needs no connection, and one would cut the node off.
func refuseOwn(ns netns.NsHandle) error {
	own, err := netns.Get()
	if err != nil {
		return fmt.Errorf("opening the node's network namespace: %w", err)
	}
	defer own.Close()
	if own.Equal(ns) {
		return errors.New("it is the network namespace of the node itself")
	}
	return nil
}

// awaitUp waits until a link that was set up works, which the kernel brings about a little later: until
// then it drops what is sent, the pod's first packet among it.
func awaitUp(in *netlink.Handle, index int) error {
	for deadline := time.Now().Add(upTimeout); ; time.Sleep(time.Millisecond) {
		link, err := in.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("waiting for link %d to come up: %w", index, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("link %s is still %s %s after it was set up", link.Attrs().Name, link.Attrs().OperState, upTimeout)
		}
	}
}

// awaitAddresses waits until the kernel takes packets to the addresses, which for IPv6 it does a little after it was given them, also if
// it need not ask whether somebody else has them: until then it drops what comes.
func awaitAddresses(in *netlink.Handle, addresses []netip.Addr) error {
	for _, a := range addresses {
		for deadline := time.Now().Add(upTimeout); ; time.Sleep(time.Millisecond) {
			routes, err := in.RouteGet(a.AsSlice())
			if err != nil {
				return fmt.Errorf("waiting for address %s: %w", a, err)
			}
			if len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("the pod does not have address %s yet, %s after it was set", a, upTimeout)
			}
		}
	}
	return nil
}

// ensureVeth returns the node's end of the pod's veth.
func ensureVeth(cfg PodLinkConfig, ns netns.NsHandle, pod *netlink.Handle) (netlink.Link, error) {
	old, err := netlink.LinkByName(cfg.HostLink)
	if err == nil {
		if !isPodLink(old) {
			return nil, fmt.Errorf("link %s exists and is not Causeway's: remove or rename it", cfg.HostLink)
		}
		if podLinkIsRight(old, pod, cfg) {
			return old, nil
		}
		if err := netlink.LinkDel(old); err != nil {
			return nil, fmt.Errorf("removing the outdated link %s: %w", cfg.HostLink, err)
		}
	} else if !isLinkNotFound(err) {
		return nil, fmt.Errorf("finding link %s: %w", cfg.HostLink, err)
	}
	if _, err := pod.LinkByName(cfg.podInterface()); err == nil {
		return nil, fmt.Errorf("the pod has an interface %s already that is not Causeway's", cfg.podInterface())
	}
	return addVeth(cfg, ns)
}

// podLinkIsRight tells whether host is a veth to the pod's interface, made for the same addresses.
func podLinkIsRight(host netlink.Link, pod *netlink.Handle, cfg PodLinkConfig) bool {
	inner, err := pod.LinkByName(cfg.podInterface())
	return err == nil && host.Attrs().Alias == cfg.alias() &&
		inner.Type() == "veth" && inner.Attrs().ParentIndex == host.Attrs().Index &&
		host.Attrs().ParentIndex == inner.Attrs().Index
}

func addVeth(cfg PodLinkConfig, ns netns.NsHandle) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = cfg.HostLink, cfg.MTU
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: cfg.podInterface(), PeerNamespace: netlink.NsFd(int(ns)), PeerMTU: uint32(cfg.MTU)}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("adding veth %s: %w", cfg.HostLink, err)
	}
	link, err := netlink.LinkByName(cfg.HostLink)
	if err != nil {
		return nil, fmt.Errorf("finding veth %s: %w", cfg.HostLink, err)
	}
	if err := netlink.LinkSetAlias(link, cfg.alias()); err != nil {
		return nil, errors.Join(fmt.Errorf("setting the alias of %s: %w", cfg.HostLink, err), netlink.LinkDel(link))
	}
	return link, nil
}

// step is one of several that configure a link.
type step struct {
	what string
	do   func() error
}

func configurePodEnd(pod *netlink.Handle, inner netlink.Link, gatewayMAC net.HardwareAddr, cfg PodLinkConfig) error {
	lo, err := pod.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding lo in the pod: %w", err)
	}
	index := inner.Attrs().Index
	steps := []step{
		{"setting lo up", func() error { return pod.LinkSetUp(lo) }},
		{"setting the MTU", func() error { return pod.LinkSetMTU(inner, cfg.MTU) }},
		{"setting " + cfg.podInterface() + " up", func() error { return pod.LinkSetUp(inner) }},
	}
	for _, a := range cfg.addresses() {
		gateway, everything := PodGateway(a), netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		steps = append(steps,
			// Nobody else can have the address, so it need not be asked for.
			step{"setting the address", func() error {
				return pod.AddrReplace(inner, &netlink.Addr{IPNet: hostNet(a), Flags: unix.IFA_F_NODAD})
			}},
			step{"setting the gateway's MAC", func() error { return pod.NeighSet(neighbour(index, gateway, gatewayMAC)) }},
			step{"setting the default route", func() error {
				return pod.RouteReplace(&netlink.Route{
					LinkIndex: index, Dst: prefixNet(everything), Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
				})
			}})
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s in the pod: %w", s.what, err)
		}
	}
	return nil
}

func configureHostEnd(host netlink.Link, podMAC net.HardwareAddr, cfg PodLinkConfig) error {
	index := host.Attrs().Index
	steps := []step{
		{"setting the MTU", func() error { return netlink.LinkSetMTU(host, cfg.MTU) }},
		{"configuring IPv6", func() error { return setHostSysctls(cfg) }},
		{"setting the link up", func() error { return netlink.LinkSetUp(host) }},
	}
	for _, a := range cfg.addresses() {
		steps = append(steps,
			step{"setting the pod's MAC", func() error { return netlink.NeighSet(neighbour(index, a, podMAC)) }},
			step{"setting the route", func() error {
				return netlink.RouteReplace(&netlink.Route{LinkIndex: index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK})
			}})
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s of %s: %w", s.what, cfg.HostLink, err)
		}
	}
	return nil
}

// DeletePodLink removes a veth made by CreatePodLink; both ends go. One that isn't there is no error.
func DeletePodLink(hostLink string) error {
	link, err := netlink.LinkByName(hostLink)
	if err != nil {
		if isLinkNotFound(err) {
			return nil
		}
		return fmt.Errorf("finding link %s: %w", hostLink, err)
	}
	if !isPodLink(link) {
		return fmt.Errorf("link %s is not Causeway's; it is left alone", hostLink)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing link %s: %w", hostLink, err)
	}
	return nil
}

// PodLinkExists returns the veth if it is there. Its MAC is empty: the pod's end is in the
// pod's namespace.
func PodLinkExists(hostLink string) (PodLink, bool, error) {
	link, err := netlink.LinkByName(hostLink)
	if err != nil {
		if isLinkNotFound(err) {
			return PodLink{}, false, nil
		}
		return PodLink{}, false, fmt.Errorf("finding link %s: %w", hostLink, err)
	}
	if !isPodLink(link) {
		return PodLink{}, false, nil
	}
	return PodLink{IfIndex: link.Attrs().Index, HostMAC: link.Attrs().HardwareAddr.String()}, true, nil
}

// RepairPodLink puts the node's end of a pod's veth back as CreatePodLink made it, whatever was done to it since: a
// link that was down for a moment has lost its route. podMAC is that of the pod's end; NetNS is not used.
func RepairPodLink(cfg PodLinkConfig, podMAC string) error {
	mac, err := net.ParseMAC(podMAC)
	if err != nil {
		return fmt.Errorf("repairing link %s: %w", cfg.HostLink, err)
	}
	link, err := netlink.LinkByName(cfg.HostLink)
	if err != nil {
		return fmt.Errorf("finding link %s: %w", cfg.HostLink, err)
	}
	if !isPodLink(link) {
		return fmt.Errorf("link %s is not Causeway's; it is left alone", cfg.HostLink)
	}
	return configureHostEnd(link, mac, cfg)
}

func isPodLink(l netlink.Link) bool {
	return l.Type() == "veth" && strings.HasPrefix(l.Attrs().Alias, podLinkAlias)
}

func isLinkNotFound(err error) bool { return errors.As(err, &netlink.LinkNotFoundError{}) }

func hostNet(a netip.Addr) *net.IPNet { return prefixNet(netip.PrefixFrom(a, a.BitLen())) }

func prefixNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func neighbour(index int, ip netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	family := unix.AF_INET
	if ip.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac}
}
