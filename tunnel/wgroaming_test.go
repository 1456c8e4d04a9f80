package tunnel

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// nat is a relay that does to UDP what a NAT does: b sees packets of a from a port of the relay's, which changes.
type nat struct {
	t      *testing.T
	inside *net.UDPConn // where a sends to
	b      netip.AddrPort

	mu      sync.Mutex
	a       netip.AddrPort
	outside *net.UDPConn // what b sees
	done    sync.WaitGroup
}

// newNAT relays between a and b at an address of the hub.
func newNAT(t *testing.T, hub *machine, b netip.AddrPort) *nat {
	n := &nat{t: t, b: b}
	n.inside = n.listen(hub, b.Port())
	n.forget(hub)
	n.done.Add(1)
	go n.toB()
	t.Cleanup(func() {
		n.inside.Close()
		n.outside.Close()
		n.done.Wait()
	})
	return n
}

func (n *nat) listen(hub *machine, port uint16) *net.UDPConn {
	n.t.Helper()
	var conn *net.UDPConn
	var err error
	hub.in(func() {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(hub.row.Address, port)))
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return conn
}

// forget makes the relay take another port toward b, as a NAT that has forgotten.
func (n *nat) forget(hub *machine) {
	n.t.Helper()
	conn := n.listen(hub, 0)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.outside != nil {
		n.outside.Close()
	}
	n.outside = conn
	n.done.Add(1)
	go n.toA(conn)
}

func (n *nat) port() uint16 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.outside.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func (n *nat) toB() {
	defer n.done.Done()
	buffer := make([]byte, 2048)
	for {
		size, from, err := n.inside.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		n.mu.Lock()
		n.a = from
		out := n.outside
		n.mu.Unlock()
		_, _ = out.WriteToUDPAddrPort(buffer[:size], n.b) // It may be lost, as on any way.
	}
}

func (n *nat) toA(conn *net.UDPConn) {
	defer n.done.Done()
	buffer := make([]byte, 2048)
	for {
		size, _, err := conn.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		n.mu.Lock()
		to := n.a
		n.mu.Unlock()
		if to.IsValid() {
			_, _ = n.inside.WriteToUDPAddrPort(buffer[:size], to) // It may be lost, as on any way.
		}
	}
}

func TestBehindNAT(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		list := machines(t, kind, 3, families{})
		a, b, hub := list[0], list[1], list[2]
		a.cfg.Keepalive = time.Second
		a.open()
		b.open()
		relay := newNAT(t, hub, netip.AddrPortFrom(b.row.Address, b.cfg.Ports[0]))
		hidden, seen := a.row, b.row
		hidden.Address = netip.MustParseAddr("172.29.1.77") // nobody's
		seen.Address = hub.row.Address
		must(t, b.wg.Update(t.Context(), hidden))
		must(t, a.wg.Update(t.Context(), seen))
		b.awaitSession(a, 0, 0, 10*time.Second)
		awaitPacket(t, b, a, 0, 0, 5*time.Second)
		atRelay := func(s WireGuardStatus) bool {
			return s.Peers[0].Endpoint == netip.AddrPortFrom(hub.row.Address, relay.port())
		}
		awaitStatus(t, b, "endpoint at the NAT", 5*time.Second, atRelay)

		// A row that says the same again changes nothing.
		hidden.MTU--
		must(t, b.wg.Update(t.Context(), hidden))
		awaitStatus(t, b, "endpoint at the NAT", time.Second, atRelay)

		// Keepalive tells b of the new port, without anybody's packets.
		relay.forget(hub)
		awaitStatus(t, b, "endpoint at the NAT's new port", 5*time.Second, atRelay)
		awaitPacket(t, b, a, 0, 0, 5*time.Second)

		// b knows the way when its device is made anew.
		b.awaitSaved(func(s peersState) bool {
			return s.Endpoints[a.wg.Keys()[0].Key] == netip.AddrPortFrom(hub.row.Address, relay.port())
		})
		b.removeDevice(0)
		awaitStatus(t, b, "new device", 5*time.Second, func(s WireGuardStatus) bool { return s.Repairs["device"] == 1 && len(s.Peers) == 1 })
		awaitPacket(t, b, a, 0, 0, 5*time.Second)
	})
}

func TestRoaming(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		awaitPacket(t, a, b, 0, 0, 5*time.Second)
		a.in(func() { a.address(netip.MustParsePrefix("172.29.1.101/24")) })
		awaitPacket(t, a, b, 0, 0, 5*time.Second)
		awaitPacket(t, b, a, 0, 0, 5*time.Second)
		moved := netip.MustParseAddrPort("172.29.1.101:51871")
		awaitStatus(t, b, "endpoint at the new address", 5*time.Second, func(s WireGuardStatus) bool { return s.Peers[0].Endpoint == moved })
		a.row.Address = moved.Addr() // and now its row says so
		must(t, b.wg.Update(t.Context(), a.row))
		awaitPacket(t, b, a, 0, 0, 5*time.Second)

		// Its row says so before it has sent anything.
		a.in(func() { a.address(netip.MustParsePrefix("172.29.1.102/24")) })
		a.row.Address = netip.MustParseAddr("172.29.1.102")
		must(t, b.wg.Update(t.Context(), a.row))
		awaitPacket(t, b, a, 0, 0, 5*time.Second)
	})
}

// TestSmallPath has the kernel cut what is too large for a peer's path, where it is marked as such.
func TestSmallPath(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		mtus := func() (small, usual int) {
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: slotTable}, netlink.RT_FILTER_TABLE)
			must(t, err)
			for _, r := range routes {
				if r.Dst != nil && r.Dst.IP.Equal(b.tunnel(0).AsSlice()) && r.Tos == smallTOS && r.MTULock {
					small = r.MTU
				}
			}
			return small, len(routes)
		}
		for _, c := range []struct{ mtu, small, routes int }{{1390, 0, 2}, {1200, 1250, 3}, {1100, 1150, 3}, {1280, 0, 2}, {1200, 1250, 3}} {
			b.row.MTU = c.mtu
			must(t, a.wg.Update(t.Context(), b.row))
			a.in(func() {
				if small, routes := mtus(); small != c.small || routes != c.routes {
					t.Errorf("at an MTU of %d: %d for small ones and %d routes, want %d and %d", c.mtu, small, routes, c.small, c.routes)
				}
			})
		}
		must(t, a.wg.Delete(t.Context(), b.row))
		a.in(func() {
			if _, routes := mtus(); routes != 1 {
				t.Errorf("%d routes are left, want the one that is unreachable", routes)
			}
		})
	})
}
