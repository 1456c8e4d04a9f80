package testbed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	bridgeName = "br0"
	uplinkName = "eth0" // the side of a node or store of its link to the underlay
)

// withHandle runs fn with a netlink handle of a named network namespace.
func withHandle(ns string, fn func(*netlink.Handle) error) error {
	fd, err := netns.GetFromPath(netnsPath(ns))
	if err != nil {
		return fmt.Errorf("opening the network namespace %s: %w", ns, err)
	}
	defer fd.Close()
	h, err := netlink.NewHandleAt(fd, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink in %s: %w", ns, err)
	}
	defer h.Close()
	return fn(h)
}

func loopbackUp(h *netlink.Handle) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.LinkSetUp(lo)
}

// makeUnderlay makes the namespace that stands for the network between the machines: one switch.
func (l layout) makeUnderlay() error {
	if err := createNS(l.underlayNS()); err != nil {
		return err
	}
	return withHandle(l.underlayNS(), func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = bridgeName, underlayMTU
		// What asks for IPv6 addresses is multicast, and goes to all ports: there are no routers that would say who wants what.
		snooping := false
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
			return fmt.Errorf("making the underlay's bridge: %w", missingKind(err, "bridge", "CONFIG_BRIDGE"))
		}
		br, err := h.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		return h.LinkSetUp(br)
	})
}

// missingKind explains the error of a kernel that does not know a kind of link.
func missingKind(err error, kind, option string) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel has no links of kind %s (%w): load the module %q or use a kernel with %s", kind, err, kind, option)
	}
	return err
}

// plug makes a namespace and connects it to the underlay, its side with the given address.
func (l layout) plug(ns, port string, underlay Underlay, address netip.Addr) error {
	if err := createNS(ns); err != nil {
		return err
	}
	fd, err := netns.GetFromPath(netnsPath(ns))
	if err != nil {
		return err
	}
	defer fd.Close()
	err = withHandle(l.underlayNS(), func(h *netlink.Handle) error {
		br, err := h.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = port, underlayMTU, br.Attrs().Index, net.FlagUp
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: uplinkName, PeerNamespace: netlink.NsFd(int(fd))}
		return missingKind(h.LinkAdd(veth), "veth", "CONFIG_VETH")
	})
	if err != nil {
		return fmt.Errorf("connecting %s to the underlay: %w", ns, err)
	}
	if err := withHandle(ns, func(h *netlink.Handle) error { return configureUplink(h, address, underlay.bits()) }); err != nil {
		return fmt.Errorf("configuring %s of %s: %w", uplinkName, ns, err)
	}
	return nil
}

func configureUplink(h *netlink.Handle, address netip.Addr, bits int) error {
	link, err := h.LinkByName(uplinkName)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(bits, address.BitLen())}}
	if address.Is6() {
		// Nobody else has it; the second of looking for one would be lost.
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, addr); err != nil {
		return err
	}
	return h.LinkSetUp(link)
}

// setPorts plugs ports of the underlay in or out, one right after the other.
func (l layout) setPorts(ports []string, up bool) error {
	return withHandle(l.underlayNS(), func(h *netlink.Handle) error {
		links := make([]netlink.Link, len(ports))
		for i, port := range ports {
			link, err := h.LinkByName(port)
			if err != nil {
				return fmt.Errorf("finding the underlay's port %s: %w", port, err)
			}
			links[i] = link
		}
		set := h.LinkSetDown
		if up {
			set = h.LinkSetUp
		}
		for i, link := range links {
			if err := set(link); err != nil {
				return fmt.Errorf("setting the underlay's port %s: %w", ports[i], err)
			}
		}
		return nil
	})
}

// ports returns the interface indexes of the underlay's ports, within its namespace.
func (l layout) ports() ([]int, error) {
	var indexes []int
	err := withHandle(l.underlayNS(), func(h *netlink.Handle) error {
		links, err := h.LinkList()
		for _, link := range links {
			if link.Attrs().MasterIndex != 0 {
				indexes = append(indexes, link.Attrs().Index)
			}
		}
		return err
	})
	return indexes, err
}
