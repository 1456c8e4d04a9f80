package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// PodEnd is an interface of a pod as it stands in the pod's network namespace.
type PodEnd struct {
	MAC string
	MTU int // in bytes
	Up  bool
	// Addresses that it has, less those of the link alone.
	Addresses []netip.Addr
	// Gateways of the default routes by it.
	Gateways []netip.Addr
}

// LookAtPodEnd returns an interface of the network namespace at a path. The error wraps fs.ErrNotExist if one of the two does not exist.
func LookAtPodEnd(path, name string) (PodEnd, error) {
	pod, link, err := openPodEnd(path, name)
	if err != nil {
		return PodEnd{}, err
	}
	defer pod.Close()
	end := PodEnd{MAC: link.Attrs().HardwareAddr.String(), MTU: link.Attrs().MTU, Up: link.Attrs().OperState == netlink.OperUp}
	addresses, err := pod.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return PodEnd{}, fmt.Errorf("listing the addresses of %s in %s: %w", name, path, err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.Unmap().IsLinkLocalUnicast() {
			end.Addresses = append(end.Addresses, ip.Unmap())
		}
	}
	routes, err := pod.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return PodEnd{}, fmt.Errorf("listing the routes of %s in %s: %w", name, path, err)
	}
	for _, r := range routes {
		if gateway, ok := netip.AddrFromSlice(r.Gw); ok && isDefault(r) {
			end.Gateways = append(end.Gateways, gateway.Unmap())
		}
	}
	return end, nil
}

func isDefault(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	bits, _ := r.Dst.Mask.Size()
	return bits == 0
}

// DeletePodEnd removes a veth from the pod's side, and the node's end with it; that of anything else is an error. Where the namespace or the interface does
// not exist there is nothing to do.
func DeletePodEnd(path, name string) error {
	pod, link, err := openPodEnd(path, name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pod.Close()
	if link.Type() != "veth" {
		return fmt.Errorf("%s in %s is a %s and not a veth: it is left alone", name, path, link.Type())
	}
	if err := pod.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing %s in %s: %w", name, path, err)
	}
	return nil
}

// openPodEnd returns a handle in a network namespace, which the caller closes, and an interface there.
func openPodEnd(path, name string) (*netlink.Handle, netlink.Link, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the network namespace %s: %w", path, err)
	}
	defer ns.Close()
	pod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("entering the network namespace %s: %w", path, err)
	}
	link, err := pod.LinkByName(name)
	if err != nil {
		pod.Close()
		if isLinkNotFound(err) {
			err = os.ErrNotExist
		}
		return nil, nil, fmt.Errorf("finding %s in %s: %w", name, path, err)
	}
	return pod, link, nil
}
