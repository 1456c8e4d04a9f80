package datapath

import (
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/vishvananda/netlink"
)

const (
	outsideEgressName  = outsidePrefix + "egress"
	outsideIngressName = outsidePrefix + "ingress"
	outsidePrefix      = "outside-"
)

// loadOutside loads the programs that take what clients outside of the cluster send, if there is an underlay's link that they can be on.
func (d *Datapath) loadOutside(cfg Config, variables map[string]any, maps *bpfMaps) error {
	if cfg.UnderlayIndex == 0 {
		return nil
	}
	link, err := netlink.LinkByIndex(cfg.UnderlayIndex)
	if err != nil {
		return fmt.Errorf("finding the underlay's link, device %d: %w", cfg.UnderlayIndex, err)
	}
	if linkHeaders[link.Attrs().EncapType] != ethernetHeader {
		d.log.Warn("clients outside of the cluster get no answer at node ports and external IPs of this node: the underlay's link is no Ethernet",
			"link", link.Attrs().Name, "kind", link.Attrs().EncapType)
		return nil
	}
	ports, err := freePorts()
	if err != nil {
		return err
	}
	if ports.overlap {
		d.log.Warn("connections from outside may get ports that sockets of this node have too: leave more ports out of the sysctl net.ipv4.ip_local_port_range",
			"first", ports.first, "count", ports.count)
	}
	spec, err := loadOutside()
	if err != nil {
		return err
	}
	if err := errors.Join(spec.Variables["nat_first_port"].Set(ports.first), spec.Variables["nat_ports"].Set(ports.count)); err != nil {
		return fmt.Errorf("setting the ports of connections from outside: %w", err)
	}
	return loadInto(&d.outside, spec, variables, maps)
}

// attachOutside puts the programs on the underlay's link, and takes a former agent's off another one.
func (d *Datapath) attachOutside(cfg Config) error {
	if d.outside.FromOutside == nil {
		return errors.Join(d.attacher.detach(outsideEgressName, egress), d.attacher.detach(outsideIngressName, ingress))
	}
	return errors.Join(
		d.attacher.move(outsideEgressName, cfg.UnderlayIndex, egress, d.outside.ToOutside),
		d.attacher.move(outsideIngressName, cfg.UnderlayIndex, ingress, d.outside.FromOutside),
	)
}

// portRange is which ports of its address on the pods' side a node gives to connections from outside.
type portRange struct {
	first, count uint16
	// overlap: the kernel may give them to sockets too.
	overlap bool
}

const (
	// firstUserPort is the first that needs no privilege to be bound to.
	firstUserPort = 1024
	// minNATPorts are the fewest that are worth having: so many connections to one backend can be open.
	minNATPorts = 1024
)

// portsBeside returns the larger of the two ranges that are left by the one from which the kernel gives ports to sockets, low to high. If it leaves
// too few, they are the last ones all the same.
func portsBeside(low, high uint16) portRange {
	below, above := int(low)-firstUserPort, math.MaxUint16-int(high)
	switch {
	case max(below, above) < minNATPorts:
		return portRange{first: math.MaxUint16 - minNATPorts + 1, count: minNATPorts, overlap: true}
	case below > above:
		return portRange{first: firstUserPort, count: uint16(below)}
	}
	return portRange{first: high + 1, count: uint16(above)}
}

// freePorts reads the kernel's range, which is that of both families, in the calling thread's network namespace.
func freePorts() (portRange, error) {
	const path = "/proc/sys/net/ipv4/ip_local_port_range"
	text, err := os.ReadFile(path)
	if err != nil {
		return portRange{}, fmt.Errorf("finding out which ports sockets get: %w", err)
	}
	var low, high uint16
	if _, err := fmt.Sscan(string(text), &low, &high); err != nil {
		return portRange{}, fmt.Errorf("finding out which ports sockets get: %s says %q: %w", path, text, err)
	}
	return portsBeside(low, high), nil
}
