package datapath_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/lb"
)

// shop is a service with a TCP and a UDP frontend at one address.
var (
	shop  = netip.MustParseAddrPort("100.64.64.10:80")
	shop6 = netip.MustParseAddrPort("[fd00:64::10]:80")
)

// shop is the service's address of the family that the node's pods have.
func (n *node) shop() netip.AddrPort {
	if n.row.PodCIDRs[0].Addr().Is6() {
		return shop6
	}
	return shop
}

// udp is the network of that family.
func (n *node) udp() string {
	if n.row.PodCIDRs[0].Addr().Is6() {
		return "udp6"
	}
	return "udp4"
}

func shopPort(p lb.Protocol) lb.PortKey {
	return lb.PortKey{Service: lb.Name{Namespace: "default", Name: "shop"}, Port: "http", Protocol: p}
}

func shopFrontend(p lb.Protocol, affinity lb.Affinity) lb.Frontend {
	return lb.Frontend{
		FrontendKey: lb.FrontendKey{Address: shop.Addr(), Port: shop.Port(), Protocol: p},
		Target:      shopPort(p), Cluster: "cluster1", ClusterID: 1, Affinity: affinity,
	}
}

// shopTarget is the pod as the node sees it.
func (n *node) shopTarget(p *pod, protocol lb.Protocol) lb.Target {
	return lb.Target{
		TargetKey: lb.TargetKey{Port: shopPort(protocol), Address: p.addr(), Number: 7080},
		Cluster:   p.node.row.Cluster, ClusterID: uint8(p.node.row.ClusterID), Node: p.node.row.Name,
		Local: p.node.row.ClusterID == n.row.ClusterID,
	}
}

func (n *node) openShop(affinity lb.Affinity, pods ...*pod) {
	t := n.mesh.t
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		frontend := shopFrontend(protocol, affinity)
		frontend.Address = n.shop().Addr()
		must(t, n.dp.Frontends().Update(context.Background(), frontend))
		for _, p := range pods {
			must(t, n.dp.Targets().Update(context.Background(), n.shopTarget(p, protocol)))
		}
	}
}

// serve answers every connection and datagram at port 7080 with the pod's address.
func (p *pod) serve() *pod {
	t := p.node.mesh.t
	t.Helper()
	p.ns.do(t, func() {
		at := netip.AddrPortFrom(p.addr(), 7080)
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		must(t, err)
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		must(t, err)
		t.Cleanup(func() { tcp.Close(); udp.Close() })
		go func() {
			for {
				conn, err := tcp.Accept()
				if err != nil {
					return
				}
				io.WriteString(conn, p.addr().String())
				conn.Close()
			}
		}()
		go func() {
			buf := make([]byte, 64)
			for {
				_, from, err := udp.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				udp.WriteToUDPAddrPort([]byte(p.addr().String()), from)
			}
		}()
	})
	return p
}

// answers connects n times to the shop and counts who answers.
func (p *pod) answers(t *testing.T, n int) map[string]int {
	t.Helper()
	by := make(map[string]int)
	for range n {
		conn, err := p.ns.dial(t, "tcp", p.node.shop())
		if err != nil {
			t.Fatal(err)
		}
		who, err := io.ReadAll(conn)
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		by[string(who)]++
	}
	return by
}

// newShop makes a client in cluster 1, and a backend in each cluster that serves.
func newShop(t *testing.T) (n *node, client, local, remote *pod) { return newShopOf(t, options{}) }

func newShopOf(t *testing.T, opts options) (n *node, client, local, remote *pod) {
	m := newMesh(t, opts, 1, 2)
	n = m.nodes[0]
	client, local, remote = n.addPod(300), n.addPod(301).serve(), m.nodes[1].addPod(301).serve()
	n.join()
	return n, client, local, remote
}

func TestAffinity(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, local, remote := newShopOf(t, opts)
		here, there := local.addr().String(), remote.addr().String()
		for _, c := range []struct {
			affinity lb.Affinity
			targets  []*pod
			by       []string
		}{
			{lb.AffinityNone, []*pod{local, remote}, []string{here, there}},
			{lb.AffinityNone, []*pod{remote}, []string{there}},
			{lb.AffinityLocal, []*pod{local, remote}, []string{here}},
			{lb.AffinityLocal, []*pod{remote}, []string{there}},
			{lb.AffinityRemote, []*pod{local, remote}, []string{there}},
			{lb.AffinityRemote, []*pod{local}, []string{here}},
		} {
			n.openShop(c.affinity)
			for _, p := range []*pod{local, remote} {
				must(t, n.dp.Targets().Delete(t.Context(), n.shopTarget(p, lb.TCP)))
			}
			n.openShop(c.affinity, c.targets...)
			by := client.answers(t, 40) // All from one of two by chance: once in 2⁴⁰.
			for _, who := range c.by {
				if by[who] == 0 {
					t.Errorf("affinity %s, %d targets: %s never answered: %v", c.affinity, len(c.targets), who, by)
				}
				delete(by, who)
			}
			if len(by) != 0 {
				t.Errorf("affinity %s, %d targets: also answered by %v", c.affinity, len(c.targets), by)
			}
		}
	})
}

// TestClientsHearOfTheServiceOnly: neither getpeername nor recvmsg shows which backend it is.
func TestClientsHearOfTheServiceOnly(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, local, remote := newShopOf(t, opts)
		n.openShop(lb.AffinityNone, local, remote)

		t.Run("TCP", func(t *testing.T) {
			conn, err := client.ns.dial(t, "tcp", n.shop())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if peer := peerName(t, conn.(*net.TCPConn)); peer != n.shop() {
				t.Errorf("getpeername says %s, want %s", peer, n.shop())
			}
		})
		t.Run("connected UDP", func(t *testing.T) {
			conn, err := client.ns.dial(t, "udp", n.shop())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Write([]byte("?"))
			_, from, err := conn.(*net.UDPConn).ReadFromUDPAddrPort(make([]byte, 64))
			if err != nil || from != n.shop() {
				t.Errorf("the answer is from %s, want %s: %v", from, n.shop(), err)
			}
			if peer := peerName(t, conn.(*net.UDPConn)); peer != n.shop() {
				t.Errorf("getpeername says %s, want %s", peer, n.shop())
			}
		})
		t.Run("unconnected UDP", func(t *testing.T) {
			var conn *net.UDPConn
			client.ns.do(t, func() {
				var err error
				conn, err = net.ListenUDP(n.udp(), nil)
				must(t, err)
			})
			defer conn.Close()
			by := make(map[string]int)
			for range 40 {
				buf := make([]byte, 64)
				conn.WriteToUDPAddrPort([]byte("?"), n.shop())
				conn.SetReadDeadline(time.Now().Add(patience))
				size, from, err := conn.ReadFromUDPAddrPort(buf)
				if err != nil || from != n.shop() {
					t.Fatalf("the answer is from %s, want %s: %v", from, n.shop(), err)
				}
				by[string(buf[:size])]++
			}
			if len(by) != 2 {
				t.Errorf("answered by %v, want both", by)
			}
		})
		t.Run("directly to a backend", func(t *testing.T) {
			at := netip.AddrPortFrom(remote.addr(), 7080)
			conn, err := client.ns.dial(t, "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if peer := peerName(t, conn.(*net.TCPConn)); peer != at {
				t.Errorf("getpeername says %s, want %s", peer, at)
			}
		})
	})
}

func TestServiceWithoutBackendRefuses(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, _, _ := newShopOf(t, opts)
		n.openShop(lb.AffinityNone)
		if _, err := client.ns.dial(t, "tcp", n.shop()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connecting gives %v, want %v", err, unix.ECONNREFUSED)
		}
		if got := n.drops(datapath.DropNoBackend); got != 1 {
			t.Errorf("%d drops are counted for want of a backend, want 1", got)
		}
	})
}

// TestNodesOwnProcessesUseServices: not only pods do.
func TestNodesOwnProcessesUseServices(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, _, _, remote := newShopOf(t, opts)
		n.openShop(lb.AffinityNone, remote)
		conn, err := n.ns.dial(t, "tcp", n.shop())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if who, err := io.ReadAll(conn); err != nil || string(who) != remote.addr().String() {
			t.Errorf("answered by %q, %v; want %s", who, err, remote.addr())
		}
	})
}

// peerName asks the kernel, not Go.
func peerName(t *testing.T, conn syscall.Conn) (peer netip.AddrPort) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		sa, err := unix.Getpeername(int(fd))
		must(t, err)
		peer = addrPort(sa)
	})
	must(t, err)
	return peer
}
