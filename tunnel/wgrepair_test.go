package tunnel

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// occupy takes a UDP port of the machine.
func (m *machine) occupy(port uint16) *net.UDPConn {
	m.t.Helper()
	var conn *net.UDPConn
	var err error
	m.in(func() { conn, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(port)}) })
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return conn
}

func (m *machine) link() netlink.Link {
	m.t.Helper()
	link, err := netlink.LinkByName(m.cfg.deviceName(0))
	must(m.t, err)
	return link
}

// configure changes the machine's device behind the agent's back.
func (m *machine) configure(cfg wgtypes.Config) {
	m.t.Helper()
	m.in(func() {
		c, err := wgctrl.New()
		must(m.t, err)
		defer c.Close()
		must(m.t, c.ConfigureDevice(m.cfg.deviceName(0), cfg))
	})
}

func TestRepairs(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		for _, f := range []families{{}, {pods6: true}} {
			list := machines(t, kind, 2, f)
			a, b := list[0], list[1]
			a.open()
			b.open()
			meet(t, a, b)
			a.awaitSession(b, 0, 0, 5*time.Second)
			none := func(func(identity.Tunnel) bool) {}
			must(t, a.wg.Prune(t.Context(), none, func(identity.ClusterID) bool { return false }))
			family := familyOf(a.tunnel(0))
			stranger, err := wgtypes.GeneratePrivateKey()
			must(t, err)
			key := wgtypes.Key(b.wg.Keys()[0].Key)
			for _, c := range []struct {
				what string
				harm func()
			}{
				{"device", func() { must(t, netlink.LinkDel(a.link())) }},
				{"device", func() { must(t, netlink.LinkSetDown(a.link())) }},
				{"rule", func() {
					rules, err := netlink.RuleList(family)
					must(t, err)
					for _, r := range rules {
						if r.Priority == rulePriority {
							must(t, netlink.RuleDel(&r))
						}
					}
				}},
				{"route", func() {
					routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: slotTable}, netlink.RT_FILTER_TABLE)
					must(t, err)
					if len(routes) != 2 {
						t.Errorf("routes are %v, want one to the peer and one that is unreachable", routes)
					}
					for _, r := range routes {
						must(t, netlink.RouteDel(&r))
					}
				}},
				{"address", func() {
					addrs, err := netlink.AddrList(a.link(), family)
					must(t, err)
					for _, addr := range addrs {
						must(t, netlink.AddrDel(a.link(), &addr))
					}
				}},
				{"peer", func() { a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, Remove: true}}}) }},
				{"peer", func() {
					all := net.IPNet{IP: a.tunnel(0).AsSlice(), Mask: net.CIDRMask(8, a.tunnel(0).BitLen())}
					a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, AllowedIPs: []net.IPNet{all}}}})
				}},
				{"peer", func() {
					mine := *host(b.tunnel(0))
					a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: stranger.PublicKey(), AllowedIPs: []net.IPNet{mine}}}})
				}},
			} {
				before, err := a.wg.Status()
				must(t, err)
				a.in(c.harm)
				awaitStatus(t, a, "repair of a "+c.what, 5*time.Second, func(now WireGuardStatus) bool {
					return now.Repairs[c.what] > before.Repairs[c.what] && len(now.Peers) == 1 && len(now.Problems) == 0
				})
				awaitPacket(t, a, b, 0, 0, 5*time.Second)
				awaitPacket(t, b, a, 0, 0, 5*time.Second)
			}
		}
	})
}

func TestPortTaken(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		list := machines(t, kind, 2, families{})
		a, b := list[0], list[1]
		b.open()
		conn := a.occupy(a.cfg.Ports[0])
		a.open()
		status, err := a.wg.Status()
		must(t, err)
		if len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "UDP port 51871") {
			t.Errorf("problems are %q", status.Problems)
		}
		if err := a.wg.Update(t.Context(), b.row); err == nil || !strings.Contains(err.Error(), "UDP port 51871") {
			t.Errorf("a peer of a device that does not work: %v", err)
		}
		must(t, b.wg.Update(t.Context(), a.row))
		conn.Close()
		awaitStatus(t, a, "device that works", 5*time.Second, func(s WireGuardStatus) bool { return len(s.Problems) == 0 })
		must(t, a.wg.Update(t.Context(), b.row))
		awaitPacket(t, a, b, 0, 0, 5*time.Second)
	})
}

// TestNothingInTheClear sends from the tunnel address to what is no peer: it must not take another way out.
func TestNothingInTheClear(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		must(t, a.wg.Delete(t.Context(), b.row))
		for _, to := range []netip.Addr{b.tunnel(0), b.row.Address} {
			conn := a.socketAt(a.tunnel(0))
			_, err := conn.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(to, 4789))
			if err == nil {
				t.Errorf("a packet from the tunnel address to %s found a way", to)
			}
			conn.Close()
		}
	})
}

func TestAllowedIPsBind(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		list := machines(t, kind, 3, families{})
		a, b, c := list[0], list[1], list[2]
		for _, m := range list {
			m.open()
		}
		meet(t, list...)
		b.awaitSession(a, 0, 0, 5*time.Second)
		a.awaitSession(b, 0, 0, 5*time.Second)
		// b takes c's tunnel address, and sends with it.
		b.in(func() {
			must(t, netlink.AddrAdd(b.link(), &netlink.Addr{IPNet: host(c.tunnel(0))}))
			rule := netlink.NewRule()
			rule.Priority, rule.Table, rule.Src, rule.Family = rulePriority, slotTable, host(c.tunnel(0)), netlink.FAMILY_V4
			must(t, netlink.RuleAdd(rule))
		})
		forged, honest, at := b.socketAt(c.tunnel(0)), b.socketAt(b.tunnel(0)), a.socketAt(a.tunnel(0))
		to := netip.AddrPortFrom(a.tunnel(0), 4789)
		_, err := forged.WriteToUDPAddrPort([]byte("forged"), to)
		must(t, err)
		_, err = honest.WriteToUDPAddrPort([]byte("honest"), to)
		must(t, err)
		buffer := make([]byte, 100)
		must(t, at.SetReadDeadline(time.Now().Add(5*time.Second)))
		n, err := at.Read(buffer)
		if err != nil || string(buffer[:n]) != "honest" {
			t.Errorf("%q came first, %v", buffer[:n], err)
		}
		status, err := a.wg.Status()
		must(t, err)
		if status.Devices[0].DroppedReceive == 0 && kind == KindKernel {
			t.Errorf("the forged packet is not counted: %+v", status.Devices[0])
		}
	})
}
