package datapath

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"causeway/identity"
)

const (
	guardEgressName  = "underlay-egress"
	guardIngressName = "underlay-ingress"
)

// Lengths of the headers that links put before IP's, in bytes.
const (
	ethernetHeader = 14
	noHeader       = 0
)

// linkHeaders is by the kernel's kind of link, as "ip link" shows it. Other kinds have headers that the programs can't skip.
var linkHeaders = map[string]uint32{
	"ether": ethernetHeader, "loopback": ethernetHeader,
	"none": noHeader, "rawip": noHeader, "ppp": noHeader, "ipip": noHeader, "sit": noHeader, "tunnel6": noHeader,
}

// loadGuard loads the guard for the underlay's link.
func (d *Datapath) loadGuard(cfg Config, maps *bpfMaps) error {
	if cfg.UnderlayIndex == 0 {
		return nil
	}
	link, err := netlink.LinkByIndex(cfg.UnderlayIndex)
	if err != nil {
		return fmt.Errorf("finding the underlay's link, device %d: %w", cfg.UnderlayIndex, err)
	}
	header, ok := linkHeaders[link.Attrs().EncapType]
	if !ok {
		return fmt.Errorf("the underlay's link %s is of the kind %s, whose packets the guard against unencrypted ones can't read: "+
			"put the node's address on another link, or switch encryption off", link.Attrs().Name, link.Attrs().EncapType)
	}
	spec, err := loadUnderlay()
	if err != nil {
		return err
	}
	return loadInto(&d.guard, spec, map[string]any{"link_header_len": header, "vxlan_port": cfg.vxlanPort()}, maps)
}

// attachGuard puts the guard on the underlay's link, and takes a former agent's off another one.
func (d *Datapath) attachGuard(cfg Config) error {
	if cfg.UnderlayIndex == 0 {
		return errors.Join(d.attacher.detach(guardEgressName, egress), d.attacher.detach(guardIngressName, ingress))
	}
	return errors.Join(
		d.attacher.move(guardEgressName, cfg.UnderlayIndex, egress, d.guard.ToUnderlay),
		d.attacher.move(guardIngressName, cfg.UnderlayIndex, ingress, d.guard.FromUnderlay),
	)
}

// loadWireGuard loads the programs for the devices of the slots that have a tunnel address.
func (d *Datapath) loadWireGuard(cfg Config, maps *bpfMaps) error {
	for slot, address := range cfg.Tunnel {
		if !address.IsValid() {
			continue
		}
		spec, err := loadWireguard()
		if err != nil {
			return err
		}
		variables := map[string]any{
			"tunnel_address": toIP(address), "wireguard_mark": wireGuardMark | uint32(slot), "vxlan_port": cfg.vxlanPort(),
		}
		if err := loadInto(&d.wireguard[slot], spec, variables, maps); err != nil {
			return err
		}
	}
	return nil
}

// wireGuardMark is WIREGUARD_MARK of bpf/lib/wireguard.h.
const wireGuardMark = 0xca5e0000

// AttachWireGuard attaches the programs that mark what comes out of a slot's WireGuard device, and let nothing but VXLAN between tunnel
// addresses out of it and into it, this node's being that of the slot. It is to be called for each device before it is used, and
// may be again; a device that replaces another one takes its place. The device is one of the calling thread's network namespace.
// It is safe for concurrent use.
func (d *Datapath) AttachWireGuard(slot uint8, ifindex int) error {
	if slot >= identity.TunnelSlots || d.wireguard[slot].FromWireguard == nil {
		return fmt.Errorf("WireGuard's slot %d has no tunnel address: give the node a pod range", slot)
	}
	link, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return fmt.Errorf("finding WireGuard's device %d of slot %d: %w", ifindex, slot, err)
	}
	if header, ok := linkHeaders[link.Attrs().EncapType]; !ok || header != noHeader {
		return fmt.Errorf("device %s of slot %d is no WireGuard device: it is of the kind %s: remove or rename it", link.Attrs().Name, slot, link.Attrs().EncapType)
	}
	d.wireguardMu.Lock()
	defer d.wireguardMu.Unlock()
	programs := &d.wireguard[slot]
	return errors.Join(
		d.attacher.move(fmt.Sprintf("wireguard%d-egress", slot), ifindex, egress, programs.ToWireguard),
		d.attacher.move(fmt.Sprintf("wireguard%d-ingress", slot), ifindex, ingress, programs.FromWireguard),
	)
}

// vxlanPort is the UDP port of VXLAN.
func (cfg *Config) vxlanPort() uint16 {
	if cfg.VXLANPort == 0 {
		return defaultVXLANPort
	}
	return cfg.VXLANPort
}

// defaultVXLANPort is that of RFC 7348.
const defaultVXLANPort = 4789
