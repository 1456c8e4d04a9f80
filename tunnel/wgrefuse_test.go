package tunnel

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"causeway/identity"
)

func TestKeysHaveOneOwner(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		thief := b.row
		thief.Node, thief.Address = "thief", netip.MustParseAddr("172.29.1.66")
		thief.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.66.0/24")}
		other := thief
		other.Node, other.PodCIDRs, other.Keys = "other", b.row.PodCIDRs, []identity.TunnelKey{{Slot: 0, Key: identity.WireGuardKey{1}, Port: 51871}}
		mine := thief
		mine.Node, mine.Keys = "mine", a.wg.Keys()
		for _, c := range []struct {
			row  identity.Tunnel
			want string
		}{{thief, "node east/thief claims the WireGuard key"}, {other, "node east/other claims the tunnel address"}, {mine, "claims this node's WireGuard key"}} {
			if err := a.wg.Update(t.Context(), c.row); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", c.row.Node, err)
			}
		}
		status, err := a.wg.Status()
		must(t, err)
		if len(status.Peers) != 1 || status.Peers[0].Node != b.row.NodeName() || !status.Peers[0].Shaken {
			t.Errorf("peers are %+v", status.Peers)
		}
		awaitPacket(t, a, b, 0, 0, time.Second)
		must(t, a.wg.Delete(t.Context(), b.row))
		must(t, a.wg.Update(t.Context(), thief))
		if status, err = a.wg.Status(); err != nil || len(status.Peers) != 1 || status.Peers[0].Node.Node != "thief" {
			t.Errorf("after the first owner is gone peers are %+v, %v", status.Peers, err)
		}
	})
}

func TestOpenWireGuardRefuses(t *testing.T) {
	kinds(t)
	for name, c := range map[string]struct {
		harm func(t *testing.T, m *machine)
		want string
	}{
		"a name that is too long": {func(t *testing.T, m *machine) { m.cfg.Name = "causeway-wireguard" }, "15"},
		"no tunnel address":       {func(t *testing.T, m *machine) { m.cfg.Tunnel[0] = netip.Addr{} }, "no tunnel address"},
		"one port for both":       {func(t *testing.T, m *machine) { m.cfg.Ports[1] = m.cfg.Ports[0] }, "two different ones"},
		"an unknown kind":         {func(t *testing.T, m *machine) { m.cfg.Kind = "magic" }, "magic"},
		"a key that others read": {func(t *testing.T, m *machine) {
			must(t, os.WriteFile(keyFile(m.cfg.StateDir, 0), []byte("x"), 0o644))
			must(t, os.Chmod(keyFile(m.cfg.StateDir, 0), 0o644))
		}, "may be read by others"},
		"a key that is short": {func(t *testing.T, m *machine) {
			must(t, os.WriteFile(keyFile(m.cfg.StateDir, 0), []byte("c2hvcnQ="), 0o600))
		}, "5 bytes, want 32"},
		"a device of somebody else's": {func(t *testing.T, m *machine) {
			m.in(func() { must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs(m.cfg.deviceName(0))})) })
		}, "not Causeway's"},
		"a socket of somebody else's": {func(t *testing.T, m *machine) {
			must(t, os.MkdirAll(socketDir, 0o755))
			socket, err := net.Listen("unix", socketPath(m.cfg.deviceName(0)))
			must(t, err)
			t.Cleanup(func() { socket.Close() })
		}, "another network namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			m := machines(t, KindUserspace, 1, families{})[0]
			must(t, os.MkdirAll(m.cfg.StateDir, 0o700))
			original := m.cfg
			c.harm(t, m)
			m.in(func() {
				wg, err := OpenWireGuard(context.Background(), m.cfg)
				if err == nil {
					must(t, wg.Close())
				}
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error is %v, want one with %q", err, c.want)
				}
			})
			m.cfg = original
		})
	}
}

// TestProcessThatEnds has a process that ends at once: it is a problem, not an error, and tried ever more seldom.
func TestProcessThatEnds(t *testing.T) {
	kinds(t)
	m := machines(t, KindUserspace, 1, families{})[0]
	starts := filepath.Join(t.TempDir(), "starts")
	command := m.cfg.Command
	m.cfg.Command = []string{command[0], endArgument, starts}
	m.open()
	count := func() int {
		data, err := os.ReadFile(starts)
		must(t, err)
		return len(data)
	}
	awaitStatus(t, m, "problem", time.Second, func(s WireGuardStatus) bool {
		return len(s.Problems) == 1 && strings.Contains(s.Problems[0], "no TUN today")
	})
	for deadline := time.Now().Add(5 * time.Second); count() < 4; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("started %d times in 5 s", count())
		}
	}
	if n := count(); n > 6 {
		t.Errorf("started %d times", n)
	}
	m.close()
	m.cfg.Command = command
	m.open()
	awaitStatus(t, m, "device that works", 5*time.Second, func(s WireGuardStatus) bool { return len(s.Problems) == 0 })
}

// TestDamagedState starts with files that are cut off or garbage: with the keys that are there, and without peers.
func TestDamagedState(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		a.awaitSaved(hasPeers)
		key := a.wg.Keys()[0]
		for _, damage := range []string{"", "{", `{"slots":[{"slot":77}],"preferred":9}`, "\x00\xff", `{"nodes":[{"cluster":"east"`, `{"nodes":[{"node":"x","mode":"wireguard","keys":[{"key":"AAAA"}]}]}`} {
			a.close()
			must(t, os.WriteFile(filepath.Join(a.cfg.StateDir, slotsName), []byte(damage), 0o600))
			must(t, os.WriteFile(filepath.Join(a.cfg.StateDir, peersName), []byte(damage), 0o600))
			a.open()
			if keys := a.wg.Keys(); len(keys) != 1 || keys[0] != key {
				t.Errorf("%q: keys are %v, want %v", damage, keys, key)
			}
			awaitPacket(t, b, a, 0, 0, time.Second) // The device has its peers still.
			must(t, a.wg.Update(t.Context(), b.row))
			a.awaitSession(b, 0, 0, time.Second)
		}
	})
}

func FuzzDecodePeers(f *testing.F) {
	row := identity.Tunnel{Cluster: "east", ClusterID: 1, Node: "node1", Mode: identity.TunnelWireGuard, Address: netip.MustParseAddr("172.29.1.1"),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}, Keys: []identity.TunnelKey{{Slot: 1, Key: identity.WireGuardKey{1}, Port: 51872}}}
	p := newPeers()
	if _, err := p.set(row, own{}); err != nil {
		f.Fatal(err)
	}
	p.byKey[identity.WireGuardKey{1}].learned = netip.MustParseAddrPort("192.0.2.1:5")
	file := &peersFile{path: filepath.Join(f.TempDir(), "peers"), due: time.Unix(1, 0)}
	if err := file.flush(p); err != nil {
		f.Fatal(err)
	}
	data, err := os.ReadFile(file.path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"nodes":[{"node":"x","mode":"wireguard","podCIDRs":["::/0"],"keys":[{"slot":255,"key":"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		state, err := decodePeers(data)
		if err != nil {
			return
		}
		p := newPeers()
		for _, row := range state.Nodes {
			_, _ = p.set(row, own{}) // It may be refused, and must not be half there:
		}
		for key, q := range p.byKey {
			if q.key != key || p.byAddress[q.address] != q || !q.address.IsValid() || p.nodes[q.node] == nil {
				t.Errorf("the peer %+v is half there", q)
			}
		}
		if len(p.byKey) != len(p.byAddress) {
			t.Errorf("%d keys and %d addresses", len(p.byKey), len(p.byAddress))
		}
	})
}
