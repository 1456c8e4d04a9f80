package datapath

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
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

// vxlanPort is the UDP port of VXLAN.
func (cfg *Config) vxlanPort() uint16 {
	if cfg.VXLANPort == 0 {
		return defaultVXLANPort
	}
	return cfg.VXLANPort
}

// defaultVXLANPort is that of RFC 7348.
const defaultVXLANPort = 4789
