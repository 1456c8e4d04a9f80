package tunnel

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DefaultName and DefaultPort are what a node's tunnel device has unless configured otherwise; the
// port is that of RFC 7348.
const (
	DefaultName = "causeway0"
	DefaultPort = 4789
)

// deviceAlias tells our device from somebody else's of the same name.
const deviceAlias = "causeway tunnel"

// Config of the VXLAN device.
type Config struct {
	// Name of the device; default DefaultName.
	Name string
	// Port is the UDP port that all nodes of the mesh use; default DefaultPort.
	Port uint16
	// MTU of the packets inside the tunnel, in bytes; default what the link that has Address leaves.
	MTU int
	// Address of the node on the underlay.
	Address netip.Addr
	// IPv6 is true where pods have IPv6 addresses: the node forwards IPv6 then.
	IPv6 bool
}

// Device is the VXLAN device as it is.
type Device struct {
	Index int
	MAC   string
	MTU   int
}

// EnsureVXLAN makes the node's VXLAN device: in external mode, so that each packet says
// where it goes and as whom. A right one that exists already is kept, so that traffic goes on when an
// agent restarts; a wrong one of ours is replaced, somebody else's is an error.
func EnsureVXLAN(cfg Config) (Device, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if cfg.Port == 0 {
		cfg.Port = DefaultPort
	}
	if cfg.MTU == 0 {
		_, mtu, err := FindUnderlay(cfg.Address)
		if err != nil {
			return Device{}, err
		}
		cfg.MTU = PodMTU(mtu, cfg.Address)
	}
	link, made, err := ensureLink(cfg)
	if err != nil {
		return Device{}, err
	}
	if err := configure(link, cfg); err != nil {
		if made {
			err = errors.Join(err, netlink.LinkDel(link))
		}
		return Device{}, err
	}
	return Device{Index: link.Attrs().Index, MAC: link.Attrs().HardwareAddr.String(), MTU: cfg.MTU}, nil
}

// ensureLink returns the device, and whether it made it.
func ensureLink(cfg Config) (link netlink.Link, made bool, err error) {
	old, err := netlink.LinkByName(cfg.Name)
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, false, fmt.Errorf("finding device %s: %w", cfg.Name, err)
	}
	if err == nil {
		if old.Attrs().Alias != deviceAlias {
			return nil, false, fmt.Errorf("device %s (%s) exists and is not Causeway's: rename or remove it", cfg.Name, old.Type())
		}
		if vxlan, ok := old.(*netlink.Vxlan); ok && vxlan.FlowBased && vxlan.Port == int(cfg.Port) {
			return old, false, nil
		}
		if err := netlink.LinkDel(old); err != nil {
			return nil, false, fmt.Errorf("removing the outdated device %s: %w", cfg.Name, err)
		}
	}
	link, err = addLink(cfg)
	return link, err == nil, err
}

func addLink(cfg Config) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = cfg.Name, cfg.MTU
	err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: int(cfg.Port)})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("the kernel has no VXLAN: load the module vxlan: %w", err)
	}
	if errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("another VXLAN device in external mode uses UDP port %d: remove it, or give the whole mesh another port: %w", cfg.Port, err)
	}
	if err != nil {
		return nil, fmt.Errorf("adding VXLAN device %s: %w", cfg.Name, err)
	}
	link, err := netlink.LinkByName(cfg.Name)
	if err != nil {
		return nil, fmt.Errorf("finding VXLAN device %s: %w", cfg.Name, err)
	}
	if err := netlink.LinkSetAlias(link, deviceAlias); err != nil {
		return nil, errors.Join(fmt.Errorf("setting the alias of %s: %w", cfg.Name, err), netlink.LinkDel(link))
	}
	return link, nil
}

func configure(link netlink.Link, cfg Config) error {
	if link.Attrs().MTU != cfg.MTU {
		if err := netlink.LinkSetMTU(link, cfg.MTU); err != nil {
			return fmt.Errorf("setting the MTU of %s to %d: %w", cfg.Name, cfg.MTU, err)
		}
	}
	// The tunnel's other ends are known to the data path by IP address alone.
	if err := netlink.LinkSetARPOff(link); err != nil {
		return fmt.Errorf("switching ARP off on %s: %w", cfg.Name, err)
	}
	if err := setSysctls(cfg.Name, cfg.IPv6); err != nil {
		return err
	}
	err := netlink.LinkSetUp(link)
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d is taken: stop what uses it (\"ss -lunp sport = :%d\"), or give the whole mesh another port: %w", cfg.Port, cfg.Port, err)
	}
	if err != nil {
		return fmt.Errorf("setting %s up: %w", cfg.Name, err)
	}
	return nil
}
