package datapath_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
	"causeway/lb"
	"causeway/tunnel"
)

// proxied prepares the node for an L7 proxy, as an agent does: addresses, routes, blackholes.
func (n *node) proxied() *tunnel.LocalAddresses {
	t := n.mesh.t
	t.Helper()
	ctx := context.Background()
	var local *tunnel.LocalAddresses
	n.ns.do(t, func() {
		var err error
		local, err = tunnel.NewLocalAddresses(n.row.Address, n.row.PodSides())
		must(t, err)
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { local.Close() })
	for _, owner := range n.mesh.nodes {
		row := owner.podRange()
		for _, row.Prefix = range owner.row.PodCIDRs {
			must(t, n.dp.Addresses().Update(ctx, row))
		}
		if owner != n {
			must(t, n.routes.Update(ctx, n.tunnelTo(owner)))
		}
	}
	must(t, n.dp.SetBlackholes([]netip.Prefix{netip.MustParsePrefix("100.64.64.0/24"), netip.MustParsePrefix("fd00:64::/64")}))
	return local
}

// listenL7 is a proxy that tells each client how it sees the connection, "local remote".
func (n *node) listenL7() (listeners []*net.TCPListener) {
	t := n.mesh.t
	t.Helper()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		var l *net.TCPListener
		n.ns.do(t, func() {
			var cfg net.ListenConfig
			cfg.SetMultipathTCP(false)
			opened, err := cfg.Listen(context.Background(), "tcp", at)
			must(t, err)
			l, _ = opened.(*net.TCPListener)
		})
		if l == nil {
			t.FailNow()
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(conn, "%s %s", conn.LocalAddr(), conn.RemoteAddr())
				conn.Close()
			}
		}()
		listeners = append(listeners, l)
	}
	return listeners
}

// l7Shop is the shop's TCP frontend, balanced at L7.
func (n *node) l7Shop() lb.Frontend {
	f := shopFrontend(lb.TCP, lb.AffinityNone)
	f.Address, f.L7 = n.shop().Addr(), true
	return f
}

// setFrontend does what an agent's reconciler does.
func (n *node) setFrontend(local *tunnel.LocalAddresses, f lb.Frontend) {
	must(n.mesh.t, local.Update(context.Background(), f))
	must(n.mesh.t, n.dp.Frontends().Update(context.Background(), f))
	must(n.mesh.t, local.Unused().Update(context.Background(), f))
}

// ask connects and returns what the other end says.
func (n namespace) ask(t testing.TB, to netip.AddrPort) string {
	t.Helper()
	conn, err := n.dial(t, "tcp", to)
	if err != nil {
		t.Errorf("connecting to %s: %v", to, err)
		return ""
	}
	defer conn.Close()
	said, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("reading from %s: %v", to, err)
	}
	return string(said)
}

// seen reads what listenL7 says.
func seen(t *testing.T, said string) (local, remote netip.AddrPort) {
	t.Helper()
	l, r, _ := strings.Cut(said, " ")
	local, err := netip.ParseAddrPort(l)
	if err == nil {
		remote, err = netip.ParseAddrPort(r)
	}
	if err != nil {
		t.Fatalf("the proxy does not answer, but %q: %v", said, err)
	}
	return local, remote
}

// TestProxySeesServiceAndClient: a connection to an L7 frontend reaches the proxy as the client made it, from a pod and from the node itself.
func TestProxySeesServiceAndClient(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		n, client, backend, _ := newShopOf(t, opts)
		local := n.proxied()
		n.openShop(lb.AffinityNone, backend)
		n.setFrontend(local, n.l7Shop())
		must(t, n.dp.Proxy().Set(n.listenL7()))

		at, from := seen(t, client.ns.ask(t, n.shop()))
		if at != n.shop() || from.Addr() != client.addr() {
			t.Errorf("of a pod the proxy sees %s → %s, want %s → %s", from, at, client.addr(), n.shop())
		}
		at, from = seen(t, n.ns.ask(t, n.shop()))
		if at != n.shop() || from.Addr() == n.shop().Addr() {
			t.Errorf("of the node the proxy sees %s → %s, want its own address → %s", from, at, n.shop())
		}
		if n.row.Address.Is4() == n.shop().Addr().Is4() && from.Addr() != n.row.Address {
			t.Errorf("the node connects from %s, want %s", from, n.row.Address)
		}
		conn, err := client.ns.dial(t, "tcp", n.shop())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if peer := peerName(t, conn.(*net.TCPConn)); peer != n.shop() {
			t.Errorf("getpeername says %s, want %s", peer, n.shop())
		}
		if count, err := n.dp.Proxy().Fallbacks(); count != 0 || err != nil {
			t.Errorf("%d connections are counted as without a proxy, %v; want none", count, err)
		}
	})
}

// TestMappedPeersUseTheProxyForIPv4: an IPv6 socket that names an IPv4 service.
func TestMappedPeersUseTheProxyForIPv4(t *testing.T) {
	n, client, _, _ := newShop(t)
	n.setFrontend(n.proxied(), n.l7Shop())
	must(t, n.dp.Proxy().Set(n.listenL7()[:1]))
	s := client.ns.dualStack(t, unix.SOCK_STREAM)
	if err := s.connect(mapped(shop)); err != nil {
		t.Fatal(err)
	}
	said, _ := s.receive()
	if at, from := seen(t, said); at != shop || from.Addr() != client.addr() {
		t.Errorf("the proxy sees %s → %s, want %s → %s", from, at, client.addr(), shop)
	}
}

// TestWithoutAProxyL4Balances: as soon as nobody has the listener, and counted; and the proxy has them again when there is one.
func TestWithoutAProxyL4Balances(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		n, client, backend, _ := newShopOf(t, opts)
		local, proxy := n.proxied(), n.dp.Proxy()
		n.openShop(lb.AffinityNone, backend)
		n.setFrontend(local, n.l7Shop())
		fallbacks := func(want uint64) {
			t.Helper()
			if who := client.ns.ask(t, n.shop()); who != backend.addr().String() {
				t.Errorf("without a proxy the answer is %q, want the backend's, %s", who, backend.addr())
			}
			if got, err := proxy.Fallbacks(); got != want || err != nil {
				t.Errorf("%d connections are counted as without a proxy, %v; want %d", got, err, want)
			}
		}
		fallbacks(1)
		listeners := n.listenL7()
		must(t, proxy.Set(listeners))
		seen(t, client.ns.ask(t, n.shop()))
		for _, l := range listeners {
			l.Close()
		}
		fallbacks(2)
		must(t, proxy.Set(n.listenL7()))
		seen(t, client.ns.ask(t, n.shop()))
		must(t, proxy.Clear())
		must(t, proxy.Clear())
		fallbacks(3)

		// At L4 on purpose is no fallback.
		must(t, proxy.Set(n.listenL7()))
		l4 := n.l7Shop()
		l4.L7 = false
		n.setFrontend(local, l4)
		fallbacks(3)
		n.setFrontend(local, n.l7Shop())
		seen(t, client.ns.ask(t, n.shop()))
	})
}

// TestProxyOutlivesTheAgent: a data path that is loaded again goes on with the listeners of the one before.
func TestProxyOutlivesTheAgent(t *testing.T) {
	n, client, _, _ := newShop(t)
	n.setFrontend(n.proxied(), n.l7Shop())
	must(t, n.dp.Proxy().Set(n.listenL7()))
	must(t, n.dp.Close())
	seen(t, client.ns.ask(t, shop))
	n.load()
	seen(t, client.ns.ask(t, shop))
	frontends, err := n.dp.ListFrontends()
	if err != nil || len(frontends) != 1 || !frontends[0].L7 {
		t.Errorf("the frontends are %+v, %v; want one of L7", frontends, err)
	}
}

// TestProxyRefusesTwoOfAFamily: it would be chance which of them has the connections.
func TestProxyRefusesTwoOfAFamily(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	l := n.listenL7()
	if err := n.dp.Proxy().Set([]*net.TCPListener{l[0], l[0]}); err == nil || !strings.Contains(err.Error(), "same address family") {
		t.Errorf("two listeners of a family give %v", err)
	}
}

// TestProxysListenersAreOfTCPAlone: Go's own choice is Multipath TCP, which the kernel takes into no such map; the error says so.
func TestProxysListenersAreOfTCPAlone(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(true)
	l, err := cfg.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := n.dp.Proxy().Set([]*net.TCPListener{l.(*net.TCPListener)}); err == nil || !strings.Contains(err.Error(), "SetMultipathTCP(false)") {
		t.Errorf("a listener of Multipath TCP gives %v", err)
	}
}

// TestNodeIsNotReachableAtAService: what listens at all of a node's addresses does not at an L7 service's.
func TestNodeIsNotReachableAtAService(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		n, client, _, _ := newShopOf(t, opts)
		local := n.proxied()
		n.setFrontend(local, n.l7Shop())
		must(t, n.dp.Proxy().Set(n.listenL7()))
		n.ns.do(t, func() { serveEcho(t, netip.MustParseAddrPort("[::]:7000")) })
		elsewhere := netip.AddrPortFrom(n.shop().Addr(), 7000)
		for who, ns := range map[string]namespace{"a pod": client.ns, "the node": n.ns} {
			if _, err := ns.dial(t, "tcp", elsewhere); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s connecting to another port of the service gets %v, want %v", who, err, unix.ECONNREFUSED)
			}
			conn, err := ns.dial(t, "udp", elsewhere)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte("?"))
			// Without an address of the family the node can't tell the pod.
			silent := n.row.Address.Is4() != n.shop().Addr().Is4()
			if silent {
				conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) && (!silent || err == nil) {
				t.Errorf("%s's datagram to another port of the service gets %v, want %v", who, err, unix.ECONNREFUSED)
			}
			conn.Close()
		}
		// Its own addresses are as before.
		if conn, err := client.ns.dial(t, "tcp", netip.AddrPortFrom(n.row.Address, 7000)); n.row.Address.Is4() == client.addr().Is4() && err != nil {
			t.Errorf("the node's own address: %v", err)
		} else if err == nil {
			conn.Close()
		}
	})
}

// dialAs connects as the node's proxy does in the name of an identity; 0: without a mark.
func (n *node) dialAs(t *testing.T, who identity.Number, to netip.AddrPort) (net.Conn, error) {
	t.Helper()
	var source netip.Addr
	for _, side := range n.row.PodSides() {
		if side.Is4() == to.Addr().Is4() {
			source = side
		}
	}
	d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
	d.Control = func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			if to.Addr().Is6() {
				must(t, unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1))
			}
			if who != 0 {
				must(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(int32(uint32(identity.ProxyMark|uint32(who))))))
			}
		})
	}
	var conn net.Conn
	var err error
	n.ns.do(t, func() { conn, err = d.Dial("tcp", to.String()) })
	if err == nil {
		conn.SetDeadline(time.Now().Add(patience))
	}
	return conn, err
}

// sourcePort is that of the TCP or UDP packet inside.
func sourcePort(p outer) int {
	const ethernet = 14
	at := ethernet + 20
	if len(p.inner) > ethernet && p.inner[ethernet]>>4 == 6 {
		at = ethernet + 40
	}
	if len(p.inner) < at+2 {
		return 0
	}
	return int(binary.BigEndian.Uint16(p.inner[at:]))
}

// TestProxyConnectsInTheClientsName: to a pod of another node, with the client's identity on the wire, and to a pod of its own node.
func TestProxyConnectsInTheClientsName(t *testing.T) {
	proxied := func(t *testing.T, opts options, second bool) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		a.proxied()
		b.proxied()
		client, near, far := a.addPod(300), a.addPod(301), b.addPod(301)
		at := func(p *pod) netip.AddrPort {
			to := netip.AddrPortFrom(p.addr(), 7000)
			if second {
				to = netip.AddrPortFrom(p.row.Address6, 7000)
			}
			p.ns.do(t, func() { serveEcho(t, to) })
			return to
		}
		farAt, nearAt := at(far), at(near)
		for _, c := range []struct{ as, vni identity.Number }{
			{client.row.Identity, client.row.Identity}, {0, identity.RemoteNode}, {identity.Host, identity.RemoteNode},
		} {
			next := a.capture()
			conn, err := a.dialAs(t, c.as, farAt)
			if err != nil {
				t.Errorf("as %s: %v", c.as, err)
				continue
			}
			exchange(t, conn, 1<<20)
			conn.Close()
			p, ok := next()
			for ok && sourcePort(p) != conn.LocalAddr().(*net.TCPAddr).Port { // of the connection before
				p, ok = next()
			}
			if !ok || identity.Number(p.vni) != c.vni {
				t.Errorf("as %s: on the wire is VNI %d, want %d", c.as, p.vni, c.vni)
			}
		}
		conn, err := a.dialAs(t, client.row.Identity, nearAt)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, 1<<20)
	}
	eachPods(t, func(t *testing.T, opts options) { proxied(t, opts, false) })
	t.Run("second range, IPv6", func(t *testing.T) { proxied(t, options{ranges: []int{4, 6}}, true) })
}

// TestNodeIsNotReachableOnThePodsSide: what its proxy connects from takes no connections.
func TestNodeIsNotReachableOnThePodsSide(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		a.proxied()
		b.proxied()
		near, far := a.addPod(300), b.addPod(301)
		a.ns.do(t, func() { serveEcho(t, netip.MustParseAddrPort("[::]:7000")) })
		for who, p := range map[string]*pod{"a pod of the node": near, "a pod of another one": far} {
			before := a.drops(datapath.DropNoEndpoint)
			p.ns.do(t, func() {
				conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(a.podSide(), 7000).String(), 200*time.Millisecond)
				if err == nil {
					conn.Close()
					t.Errorf("%s reaches the node", who)
				}
			})
			if a.drops(datapath.DropNoEndpoint) == before {
				t.Errorf("the SYN of %s is not counted as dropped", who)
			}
		}
	})
}

// TestAnswersPassToThePodsSide: of what a pod sends to the node's address there, TCP that opens nothing.
func TestAnswersPassToThePodsSide(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		n := newMesh(t, opts, 1).nodes[0]
		n.proxied()
		p := n.addPod(300)
		for name, c := range map[string]struct {
			protocol, flags uint8
			want            uint32
		}{
			"SYN": {unix.IPPROTO_TCP, 0x02, verdictDrop}, "SYN and ECN": {unix.IPPROTO_TCP, 0xc2, verdictDrop}, "SYN, FIN": {unix.IPPROTO_TCP, 0x03, verdictDrop},
			"SYN, ACK": {unix.IPPROTO_TCP, 0x12, verdictPass}, "ACK": {unix.IPPROTO_TCP, 0x10, verdictPass}, "RST": {unix.IPPROTO_TCP, 0x04, verdictPass},
			"UDP": {unix.IPPROTO_UDP, 0x10, verdictDrop},
		} {
			payload := make([]byte, 20)
			payload[5] = c.flags // Byte 13 behind the IP header.
			sent := packet{srcMAC: p.link.MAC, dstMAC: p.link.HostMAC, src: p.addr(), dst: n.podSide(), protocol: c.protocol, payload: payload}
			if got, _ := n.run(n.dp.PodProgram(), sent.bytes(), skBuff{Ifindex: uint32(p.row.IfIndex)}); got != c.want {
				t.Errorf("%s: the verdict is %#x, want %#x", name, got, c.want)
			}
		}
	})
}

// TestPodCannotForgeTheProxysMark: what a pod marks is sent as its own all the same.
func TestPodCannotForgeTheProxysMark(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a := m.nodes[0]
		client, server := a.addPod(300), m.nodes[1].addPod(301)
		at := server.echo()
		next := a.capture()
		d := net.Dialer{Timeout: patience, Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				must(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(int32(uint32(identity.ProxyMark|identity.Compose(1, 999))))))
			})
		}}
		client.ns.do(t, func() {
			conn, err := d.Dial("tcp", at.String())
			must(t, err)
			if err == nil {
				conn.Close()
			}
		})
		if p, ok := next(); !ok || identity.Number(p.vni) != client.row.Identity {
			t.Errorf("on the wire is VNI %d, want the pod's own, %d", p.vni, client.row.Identity)
		}
	})
}

// BenchmarkConnect connects from a pod to a service that is balanced at L4, without services of L7 and beside a thousand of them.
func BenchmarkConnect(b *testing.B) {
	for _, beside := range []int{0, 1000} {
		b.Run(fmt.Sprintf("beside-%d-at-L7", beside), func(b *testing.B) {
			m := newMesh(b, options{}, 1)
			n := m.nodes[0]
			client, backend := n.addPod(300), n.addPod(301).serve()
			local := n.proxied()
			n.join()
			n.openShop(lb.AffinityNone, backend)
			for i := range beside {
				f := n.l7Shop()
				f.Address, f.Target.Port = netip.AddrFrom4([4]byte{100, 64, byte(65 + i/250), byte(1 + i%250)}), fmt.Sprint(i)
				n.setFrontend(local, f)
			}
			if beside > 0 {
				must(b, n.dp.Proxy().Set(n.listenL7()))
			}
			client.ns.do(b, func() {
				for b.Loop() {
					conn, err := net.Dial("tcp", n.shop().String())
					if err != nil {
						b.Error(err)
						return
					}
					conn.(*net.TCPConn).SetLinger(0)
					conn.Close()
				}
			})
		})
	}
}
