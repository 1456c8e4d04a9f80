package datapath

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const podLinkPrefix = "pod-"

func podLinkName(ifindex int) string { return podLinkPrefix + strconv.Itoa(ifindex) }

func (d *Datapath) attachPod(ifindex int) error {
	return d.attacher.device(podLinkName(ifindex), ifindex, ingress, d.pod.FromPod)
}

// detachPod takes the pod program off a device, after setting the device down: what the pod
// may still send shall not pass unchecked.
func (d *Datapath) detachPod(ifindex int) error {
	if l, err := netlink.LinkByIndex(ifindex); err == nil && l.Type() == "veth" && isPodLink(l) {
		if err := netlink.LinkSetDown(l); err != nil && !errors.Is(err, unix.ENODEV) { // gone meanwhile, with its namespace
			return fmt.Errorf("setting %s down: %w", l.Attrs().Name, err)
		}
	}
	return errors.Join(d.attacher.remove(podLinkName(ifindex)), removeFilter(podLinkName(ifindex), ifindex, ingress))
}

// reattachPods gives the pods that a former agent connected this version's program.
func (d *Datapath) reattachPods() error {
	indexes, err := d.podDevices()
	if err != nil {
		return err
	}
	var errs []error
	for ifindex := range indexes {
		if _, err := netlink.LinkByIndex(ifindex); err != nil {
			errs = append(errs, d.attacher.remove(podLinkName(ifindex))) // The pod went while no agent ran.
			continue
		}
		if err := d.attachPod(ifindex); err != nil {
			if _, gone := netlink.LinkByIndex(ifindex); isLinkNotFound(gone) {
				err = d.attacher.remove(podLinkName(ifindex))
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// podDevices returns the devices that the endpoints map or a pinned link knows of.
func (d *Datapath) podDevices() (map[int]bool, error) {
	indexes := make(map[int]bool)
	names, err := d.attacher.names(podLinkPrefix)
	for _, name := range names {
		ifindex, convErr := strconv.Atoi(strings.TrimPrefix(name, podLinkPrefix))
		if convErr != nil || !d.attached(name) {
			err = errors.Join(err, d.attacher.remove(name))
			continue
		}
		indexes[ifindex] = true
	}
	for _, v := range d.Maps.endpoints.all(&err) {
		indexes[int(v.Ifindex)] = true
	}
	return indexes, err
}

// attached tells whether the pinned link's device still exists.
func (d *Datapath) attached(name string) bool {
	l, err := link.LoadPinnedLink(d.attacher.path(name), nil)
	if err != nil {
		return false
	}
	defer l.Close()
	info, err := l.Info()
	return err == nil && info.TCX() != nil && info.TCX().Ifindex != 0
}
