package datapath

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Every filter of ours has one of these priorities and the handle, which tell it from other people's. The programs for clients outside share
// their place with the guard, and come after it.
const (
	filterPriority        = 0xca
	filterPriorityOutside = 0xcb
	filterHandle          = 0xca05
)

// setFilter puts prog into the device's clsact qdisc, in place of the one that was there.
func setFilter(name string, ifindex int, at hook, prog *ebpf.Program) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding a clsact qdisc to device %d: %w", ifindex, err)
	}
	filter := &netlink.BpfFilter{FilterAttrs: filterAttrs(name, ifindex, at), Fd: prog.FD(), Name: filterName(name), DirectAction: true}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("attaching %s to device %d as a filter: %w", name, ifindex, err)
	}
	return nil
}

// removeFilter takes our filter off the device, whose name says in which place it is; none there is no error.
func removeFilter(name string, ifindex int, at hook) error {
	err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: filterAttrs(name, ifindex, at)})
	// Without a clsact qdisc the parent is invalid.
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("removing the filter of device %d: %w", ifindex, err)
}

// removeNamedFilters takes our filter of that name off all devices but one; 0: off all.
func removeNamedFilters(name string, at hook, except int) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("listing links: %w", err)
	}
	var errs []error
	for _, link := range links {
		index := link.Attrs().Index
		if index == except {
			continue
		}
		// A link that is gone, or has no clsact qdisc, has no filter.
		filters, err := netlink.FilterList(link, filterAttrs(name, index, at).Parent)
		if err != nil {
			continue
		}
		for _, f := range filters {
			if bpf, ok := f.(*netlink.BpfFilter); ok && bpf.Name == filterName(name) {
				errs = append(errs, removeFilter(name, index, at))
			}
		}
	}
	return errors.Join(errs...)
}

func filterName(name string) string { return "causeway-" + name }

func filterAttrs(name string, ifindex int, at hook) netlink.FilterAttrs {
	parent := uint32(netlink.HANDLE_MIN_INGRESS)
	if at == egress {
		parent = netlink.HANDLE_MIN_EGRESS
	}
	priority := uint16(filterPriority)
	if strings.HasPrefix(name, outsidePrefix) {
		priority = filterPriorityOutside
	}
	return netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Priority: priority, Handle: filterHandle, Protocol: unix.ETH_P_ALL}
}
