package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/tunnel"
)

// TestTunnelCheckIsOfWhatIsOnTheUnderlay: VXLAN's port is not, if the clusters encrypt; and what is asked of peers follows from the same.
func TestTunnelCheckIsOfWhatIsOnTheUnderlay(t *testing.T) {
	for mode, want := range map[identity.Encryption]string{
		identity.EncryptOff: peering.CheckTunnel, identity.EncryptAll: peering.CheckWireGuard, identity.EncryptInterCluster: peering.CheckWireGuard,
	} {
		a := &agent{cfg: Config{Encryption: EncryptionConfig{Mode: mode}}}
		var names []string
		for _, c := range a.linkChecks(peering.Peer{}) {
			names = append(names, c.name)
			for _, need := range c.needs {
				if !slices.Contains(names, need) {
					t.Errorf("%s: %s needs %s, which is not tried before", mode, c.name, need)
				}
			}
		}
		wireGuard := slices.Contains(names, peering.CheckWireGuard)
		if !slices.Contains(names, want) || wireGuard == slices.Contains(names, peering.CheckTunnel) {
			t.Errorf("%s: the checks are %v", mode, names)
		}
		if requires := a.cfg.requires(); slices.Contains(requires, "wireguard") != wireGuard {
			t.Errorf("%s: of peers is required %v", mode, requires)
		}
		for _, c := range a.cfg.requires() {
			if !slices.Contains(a.cfg.info().Capabilities, c) {
				t.Errorf("%s: it requires %s, and lacks it", mode, c)
			}
		}
	}
}

// TestWhyThereIsNoSession names the port to open, and the direction as far as that can be known.
func TestWhyThereIsNoSession(t *testing.T) {
	tables := newTables(t)
	node := westNode(1)
	node.TunnelKeys = []identity.TunnelKey{{Slot: 0, Key: identity.WireGuardKey{7}, Port: 51871}}
	other := identity.NodeName{Cluster: "west", Node: "node2"}
	var status tunnel.WireGuardStatus
	a := &agent{cfg: Config{Encryption: EncryptionConfig{Mode: identity.EncryptAll}}, tables: tables}
	l := &linkProbe{agent: a}
	why := func(want string) {
		t.Helper()
		if got := l.whyNoSession(node); !strings.Contains(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	why("UDP port 51871 (WireGuard) is dropped between the clusters: open it between all nodes, in both directions")
	a.wireGuardStatus = func() (tunnel.WireGuardStatus, error) { return status, nil }
	status.Peers = []tunnel.WireGuardPeer{{Node: node.NodeName()}, {Node: other, Received: 100, Handshake: time.Now()}}
	why("since nothing of west/node1 gets here")
	status.Peers[0].Received = 148
	why("is dropped on the way to west/node1: packets of it get here")
	status.Peers[0].Handshake = time.Now()
	why("UDP port 51871 (WireGuard) is dropped between the clusters: open it")
	node.TunnelKeys = append(node.TunnelKeys, identity.TunnelKey{Slot: 1, Key: identity.WireGuardKey{8}, Port: 51872})
	why("UDP ports 51871 and 51872 (WireGuard) are dropped between the clusters: open them")
	status.Problems = []string{"UDP port 51871 is another process's"}
	why("is another process's")
	node.TunnelKeys = nil
	why("west/node1 has published no key")
	put(t, tables, tables.Tunnels, identity.Tunnel{Cluster: "west", Node: "node1", Mode: identity.TunnelClosed, Why: "this node has no key yet"})
	why("this node has no key yet")

	node.TunnelKeys = []identity.TunnelKey{{Slot: 1, Port: 51872}, {Slot: 0, Port: 51871}}
	node.Address = netip.MustParseAddr("2001:db8::1")
	if got := a.tunnelTarget(node); got != "[2001:db8::1]:51872/udp" {
		t.Errorf("the target is %s", got)
	}
}
