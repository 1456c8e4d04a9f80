package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// configure gives the device its key, its port and its peers, and leaves what is right as it is.
func (w *WireGuard) configure(s *slot, now time.Time) error {
	device, err := s.read(now)
	if err != nil {
		return err
	}
	port := int(w.cfg.Ports[s.number])
	var cfg wgtypes.Config
	if device.PrivateKey != s.private {
		cfg.PrivateKey = &s.private
	}
	cfg.Peers = w.repairPeers(s, device, now)
	if err := s.set(cfg); err != nil {
		return err
	}
	if device.ListenPort == port {
		return nil
	}
	err = s.set(wgtypes.Config{ListenPort: &port})
	if isAddressInUse(err) {
		return w.portTaken(s)
	}
	return err
}

// isAddressInUse tells whether a port could not be had; WireGuard in user space answers with the number alone.
func isAddressInUse(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || err != nil && strings.Contains(err.Error(), fmt.Sprintf("errno=-%d", int(unix.EADDRINUSE)))
}

// read returns the device as it is.
func (s *slot) read(now time.Time) (*wgtypes.Device, error) {
	start := time.Now()
	device, err := s.device()
	if err != nil {
		return nil, fmt.Errorf("reading WireGuard device %s: %w", s.name, err)
	}
	s.pace.read(now, costOf(time.Since(start), len(device.Peers)))
	return device, nil
}

// set changes the device, if there is something to change.
func (s *slot) set(cfg wgtypes.Config) error {
	if cfg.PrivateKey == nil && cfg.ListenPort == nil && len(cfg.Peers) == 0 {
		return nil
	}
	if err := s.change(cfg); err != nil {
		return fmt.Errorf("configuring WireGuard device %s: %w", s.name, err)
	}
	return nil
}

// repairPeers returns what makes the device's peers the wanted ones, and notes what it says of their sessions.
func (w *WireGuard) repairPeers(s *slot, device *wgtypes.Device, now time.Time) (list []wgtypes.PeerConfig) {
	seen := make(map[identity.WireGuardKey]bool, len(device.Peers))
	for i := range device.Peers {
		have := &device.Peers[i]
		key := identity.WireGuardKey(have.PublicKey)
		want := w.peers.byKey[key]
		if want == nil && !w.pruned {
			continue // Some agent before this one added it, and the stores may not have been read yet.
		}
		if want == nil {
			list = append(list, wgtypes.PeerConfig{PublicKey: have.PublicKey, Remove: true})
			continue
		}
		seen[key] = true
		w.observe(s, want, have, now)
		if !w.isRight(want, have) {
			list = append(list, w.peerConfig(want, want.goesTo()))
		}
	}
	for key, want := range w.peers.byKey {
		if seen[key] {
			continue
		}
		list = append(list, w.peerConfig(want, want.goesTo()))
		w.expect(s, want, now, false)
	}
	w.repaired("peer", s, len(list))
	return list
}

// isRight tells whether the device has the peer as it should be, wherever it has roamed to.
func (w *WireGuard) isRight(want *peer, have *wgtypes.Peer) bool {
	if len(have.AllowedIPs) != 1 || have.PersistentKeepaliveInterval != w.cfg.Keepalive.Truncate(time.Second) || have.Endpoint == nil && want.endpoint.IsValid() {
		return false
	}
	ip, ok := netip.AddrFromSlice(have.AllowedIPs[0].IP)
	ones, bits := have.AllowedIPs[0].Mask.Size()
	return ok && ip.Unmap() == want.address && ones == bits
}

// peerConfig makes a peer what it should be.
func (w *WireGuard) peerConfig(p *peer, endpoint netip.AddrPort) wgtypes.PeerConfig {
	keepalive := w.cfg.Keepalive
	cfg := wgtypes.PeerConfig{
		PublicKey: wgtypes.Key(p.key), ReplaceAllowedIPs: true, AllowedIPs: []net.IPNet{*host(p.address)}, PersistentKeepaliveInterval: &keepalive,
	}
	if endpoint.IsValid() {
		cfg.Endpoint = net.UDPAddrFromAddrPort(endpoint)
	}
	return cfg
}
