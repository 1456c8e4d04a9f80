package datapath

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"causeway/identity"
)

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
