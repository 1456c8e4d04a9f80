package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// WireGuardStatus is WireGuard as it stands.
type WireGuardStatus struct {
	Devices []WireGuardDevice
	Peers   []WireGuardPeer
	// Problems that keep packets from flowing, a sentence each: a port that is taken, a process that does not start.
	Problems []string
	// Repairs counts what was repaired, by what: device, rule, route, peer, address.
	Repairs map[string]uint64
}

// WireGuardDevice is one slot's.
type WireGuardDevice struct {
	Slot    uint8
	Name    string
	Index   int
	Kind    string // kernel or userspace
	PID     int    // of the process in user space
	Key     identity.WireGuardKey
	Port    uint16
	Address netip.Addr // tunnel address
	MTU     int
	Made    time.Time // when the key was made
	// Dropped packets of the device, by the kernel's counters.
	DroppedReceive, DroppedTransmit uint64
}

// WireGuardPeer is a node's key at a slot's device.
type WireGuardPeer struct {
	Node      identity.NodeName
	Slot      uint8 // of this node
	Remote    uint8 // slot of the other
	Key       identity.WireGuardKey
	Endpoint  netip.AddrPort // where packets go; follows the node if it roams
	Handshake time.Time      // of the last handshake; zero: none yet
	// Received and Transmitted bytes.
	Received, Transmitted uint64
	Keepalive             time.Duration
	Shaken                bool
}

// Status reads the devices and peers back.
func (w *WireGuard) Status() (WireGuardStatus, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	status := WireGuardStatus{Repairs: maps.Clone(w.repairs)}
	for _, s := range w.inUse() {
		if s.problem != nil {
			status.Problems = append(status.Problems, s.problem.Error())
		}
		status.Devices = append(status.Devices, w.deviceStatus(s))
		if s.control == nil || errors.Is(s.problem, errNoAnswer) || s.problem != nil && s.kind == KindUserspace && !alive(s.process.pid) {
			continue
		}
		device, err := s.device()
		if errors.Is(err, fs.ErrNotExist) {
			status.Problems = append(status.Problems, fmt.Sprintf("device %s is gone; it is made anew", s.name))
			continue
		}
		if errors.Is(err, errNoAnswer) {
			status.Problems = append(status.Problems, err.Error())
			continue
		}
		if err != nil {
			return status, fmt.Errorf("reading WireGuard device %s: %w", s.name, err)
		}
		status.Peers = append(status.Peers, w.peerStatus(s, device)...)
	}
	return status, nil
}

func (w *WireGuard) deviceStatus(s *slot) WireGuardDevice {
	d := WireGuardDevice{
		Slot: s.number, Name: s.name, Kind: s.kind, Key: s.public, Port: w.cfg.Ports[s.number], Address: w.cfg.Tunnel[s.number], MTU: w.cfg.MTU, Made: s.made,
	}
	if s.kind == KindUserspace {
		d.PID = s.process.pid
	}
	link, err := w.links.LinkByName(s.name)
	if err != nil {
		return d
	}
	d.Index, d.MTU = link.Attrs().Index, link.Attrs().MTU
	if c := link.Attrs().Statistics; c != nil {
		d.DroppedReceive, d.DroppedTransmit = c.RxDropped+c.RxErrors, c.TxDropped+c.TxErrors
	}
	return d
}

func (w *WireGuard) peerStatus(s *slot, device *wgtypes.Device) []WireGuardPeer {
	list := make([]WireGuardPeer, 0, len(device.Peers))
	for _, have := range device.Peers {
		key := identity.WireGuardKey(have.PublicKey)
		p := w.peers.byKey[key]
		if p == nil {
			continue // It is about to be removed.
		}
		status := WireGuardPeer{
			Node: p.node, Slot: s.number, Remote: p.remote, Key: key, Received: uint64(have.ReceiveBytes), Transmitted: uint64(have.TransmitBytes),
			Keepalive: have.PersistentKeepaliveInterval, Shaken: w.Shaken(p.node, s.number, p.remote),
		}
		if have.LastHandshakeTime.Unix() > 0 {
			status.Handshake = have.LastHandshakeTime
		}
		if have.Endpoint != nil {
			at := have.Endpoint.AddrPort()
			status.Endpoint = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
		}
		list = append(list, status)
	}
	slices.SortFunc(list, func(a, b WireGuardPeer) int {
		return cmp.Or(compareNames(a.Node, b.Node), cmp.Compare(a.Remote, b.Remote))
	})
	return list
}
