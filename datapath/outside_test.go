package datapath_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
	"causeway/lb"
)

// nodePort is the shop's, at each node's address.
const nodePort = 30080

// stranger is a machine on the underlay that is no node.
type stranger struct {
	ns   namespace
	addr netip.Addr
}

// newClient connects a machine to the underlay, which reaches every node.
func newClient(t *testing.T, m *mesh) stranger {
	t.Helper()
	c := stranger{ns: newStranger(t, m), addr: m.options.underlayAddress(9, 9)}
	for _, n := range m.nodes {
		eventually(t, "the machine outside reaches "+n.row.Name, func() bool {
			conn, err := c.ns.dial(t, "tcp", netip.AddrPortFrom(n.row.Address, 9))
			if err == nil {
				conn.Close()
			}
			return errors.Is(err, unix.ECONNREFUSED)
		})
	}
	return c
}

// nodePort is the node's address with the shop's node port.
func (n *node) nodePort() netip.AddrPort { return netip.AddrPortFrom(n.row.Address, nodePort) }

// outsideFrontend is the shop's at an address and port for clients outside.
func (n *node) outsideFrontend(at netip.AddrPort, p lb.Protocol, nodeLocal bool) lb.Frontend {
	f := shopFrontend(p, lb.AffinityNone)
	f.Address, f.Port, f.Outside = at.Addr(), at.Port(), true
	f.Cluster, f.ClusterID = n.row.Cluster, uint8(n.row.ClusterID)
	f.Target.NodeLocal = nodeLocal
	return f
}

// openOutside opens the shop at an address for clients outside, with the pods as backends; with nodeLocal with those that are on the node.
func (n *node) openOutside(at netip.AddrPort, nodeLocal bool, pods ...*pod) {
	t := n.mesh.t
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		f := n.outsideFrontend(at, protocol, nodeLocal)
		must(t, n.dp.Frontends().Update(t.Context(), f))
		for _, p := range pods {
			if nodeLocal && p.node != n {
				continue
			}
			target := n.shopTarget(p, protocol)
			target.Port = f.Target
			must(t, n.dp.Targets().Update(t.Context(), target))
		}
	}
}

// tells serves port 7080: a connection gets a line that says who answers whom, and then what it sends; a datagram gets that line.
func (p *pod) tells() *pod {
	t := p.node.mesh.t
	t.Helper()
	p.ns.do(t, func() { serveTelling(t, netip.AddrPortFrom(p.addr(), 7080)) })
	return p
}

func serveTelling(t testing.TB, at netip.AddrPort) {
	t.Helper()
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	must(t, err)
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	must(t, err)
	if t.Failed() {
		return
	}
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	line := func(from netip.AddrPort) string {
		return fmt.Sprintf("%s %s\n", at.Addr(), netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
	}
	go func() {
		for {
			conn, err := tcp.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.WriteString(conn, line(conn.RemoteAddr().(*net.TCPAddr).AddrPort()))
				io.Copy(conn, conn)
			}()
		}
	}()
	go func() {
		buf := make([]byte, 65536)
		for {
			_, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			udp.WriteToUDPAddrPort([]byte(line(from)), from)
		}
	}()
}

// asked is who has answered a client, and whom it saw.
type asked struct {
	by   netip.Addr
	from netip.AddrPort
}

func parseAsked(line string) (a asked, err error) {
	by, from, ok := strings.Cut(strings.TrimSpace(line), " ")
	if !ok {
		return a, fmt.Errorf("the answer is %q", line)
	}
	if a.by, err = netip.ParseAddr(by); err == nil {
		a.from, err = netip.ParseAddrPort(from)
	}
	return a, err
}

// ask connects, or sends a datagram, and returns who answers whom. A connection stays open with its reader.
func (c stranger) ask(t testing.TB, network string, to netip.AddrPort) (asked, net.Conn) {
	t.Helper()
	conn, err := c.ns.dial(t, network, to)
	if err != nil {
		t.Fatal(err)
	}
	if network == "udp" {
		conn.Write([]byte("?"))
	}
	a, err := hear(conn)
	if err != nil {
		t.Fatalf("%s %s → %s: %v", network, conn.LocalAddr(), to, err)
	}
	must(t, conn.SetDeadline(time.Now().Add(10*patience))) // What comes next may be much.
	return a, conn
}

// hear reads a line that says who answers whom.
func hear(conn net.Conn) (asked, error) {
	buf := make([]byte, 1)
	var line []byte
	if _, ok := conn.(*net.UDPConn); ok {
		buf = make([]byte, 256)
	}
	for !bytes.HasSuffix(line, []byte("\n")) {
		n, err := conn.Read(buf)
		if err != nil {
			return asked{}, err
		}
		line = append(line, buf[:n]...)
	}
	return parseAsked(string(line))
}

// newOutsideMesh makes a mesh whose nodes take what comes from outside.
func newOutsideMesh(t *testing.T, opts options, clusters ...identity.ClusterID) *mesh {
	t.Helper()
	opts.outside = true
	return newPodsMesh(t, opts, clusters...)
}

var outsideWays = []string{"tcp", "udp"}

// TestNodePort: a client outside is served at a node's address by a pod of that node, which sees the client, and by one of another node or
// cluster, which sees the node.
func TestNodePort(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 1, 2)
		client := newClient(t, m)
		n := m.nodes[0]
		here, there, abroad := n.addPod(300).tells(), m.nodes[1].addPod(301).tells(), m.nodes[2].addPod(301).tells()
		for i, c := range []struct {
			name string
			pod  *pod
			from netip.Addr
		}{{"same node", here, client.addr}, {"same cluster", there, n.podSide()}, {"other cluster", abroad, n.podSide()}} {
			t.Run(c.name, func(t *testing.T) {
				at := netip.AddrPortFrom(n.row.Address, uint16(nodePort+i))
				for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
					f := n.outsideFrontend(at, protocol, false)
					f.Target.Port = c.name
					target := n.shopTarget(c.pod, protocol)
					target.Port = f.Target
					must(t, n.dp.Targets().Update(t.Context(), target))
					must(t, n.dp.Frontends().Update(t.Context(), f))
				}
				for _, network := range outsideWays {
					got, conn := client.ask(t, network, at)
					if got.by != c.pod.addr() || got.from.Addr() != c.from {
						t.Errorf("%s: answered by %s, which saw %s; want %s and %s", network, got.by, got.from.Addr(), c.pod.addr(), c.from)
					}
					if network == "tcp" {
						exchange(t, conn, 8<<20)
					}
					conn.Close()
				}
			})
		}
		if unwanted := unwantedDrops(m.nodes...); len(unwanted) != 0 {
			t.Errorf("packets were dropped: %v", unwanted)
		}
	})
}

// newOutsideShop makes a client outside and the shop at the first node's node port, with a backend on it and one in another cluster.
func newOutsideShop(t *testing.T, opts options) (n *node, client stranger, here, there *pod) {
	t.Helper()
	m := newOutsideMesh(t, opts, 1, 2)
	n, client = m.nodes[0], newClient(t, m)
	here, there = n.addPod(300).tells(), m.nodes[1].addPod(301).tells()
	n.openOutside(n.nodePort(), false, here, there)
	return n, client, here, there
}

// setOutsideTarget makes a pod a backend of the shop that is quarantined or not.
func (n *node) setOutsideTarget(p *pod, quarantined bool) {
	t := n.mesh.t
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		target := n.shopTarget(p, protocol)
		target.Quarantined = quarantined
		must(t, n.dp.Targets().Update(t.Context(), target))
	}
}

func (n *node) deleteOutsideTarget(p *pod) {
	t := n.mesh.t
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		must(t, n.dp.Targets().Delete(t.Context(), n.shopTarget(p, protocol)))
	}
}

// askOften asks so many times, one after the other, and counts who answers.
func (c stranger) askOften(t *testing.T, network string, to netip.AddrPort, times int) map[netip.Addr]int {
	t.Helper()
	by := make(map[netip.Addr]int)
	for range times {
		got, conn := c.ask(t, network, to)
		conn.Close()
		by[got.by]++
	}
	return by
}

// TestNodePortLocal: with the policy Local only backends of the node that was asked answer, and see the client. A node without one refuses.
func TestNodePortLocal(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 1)
		client, a, b := newClient(t, m), m.nodes[0], m.nodes[1]
		here, there := a.addPod(300).tells(), b.addPod(301).tells()
		for _, n := range m.nodes {
			n.openOutside(n.nodePort(), true, here, there)
		}
		for n, p := range map[*node]*pod{a: here, b: there} {
			for _, network := range outsideWays {
				for range 10 {
					got, conn := client.ask(t, network, n.nodePort())
					if own := addrPortOf(conn.LocalAddr()); got.by != p.addr() || got.from != own {
						t.Errorf("%s: answered by %s, which saw %s; want %s and %s", network, got.by, got.from, p.addr(), own)
					}
					conn.Close()
				}
			}
		}
		target := b.shopTarget(there, lb.TCP)
		target.Port.NodeLocal = true
		must(t, b.dp.Targets().Delete(t.Context(), target))
		if _, err := client.ns.dial(t, "tcp", b.nodePort()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a node without backends answers %v, want %v", err, unix.ECONNREFUSED)
		}
	})
}

func addrPortOf(a net.Addr) netip.AddrPort {
	at := netip.MustParseAddrPort(a.String())
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// TestExternalIP: an address that is no node's and that is routed to a node is served there. Without a backend nobody answers, and it is counted.
func TestExternalIP(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		at := netip.MustParseAddrPort("192.0.2.10:80")
		if n.row.Address.Is6() {
			at = netip.MustParseAddrPort("[2001:db8::10]:80")
		}
		client.route(t, at.Addr(), n.row.Address)
		n.openOutside(at, false, here, there)
		for _, network := range outsideWays {
			by := client.askOften(t, network, at, 40)
			if by[here.addr()]+by[there.addr()] != 40 || by[here.addr()] == 0 || by[there.addr()] == 0 {
				t.Errorf("%s: answered by %v, want both", network, by)
			}
		}
		n.deleteOutsideTarget(here)
		n.deleteOutsideTarget(there)
		client.ns.do(t, func() {
			if conn, err := net.DialTimeout("tcp", at.String(), 100*time.Millisecond); err == nil {
				conn.Close()
				t.Error("it answers without a backend")
			}
		})
		if n.drops(datapath.DropNoBackend) == 0 {
			t.Error("no drop is counted for want of a backend")
		}
	})
}

// route has the machine send what is for an address to a node.
func (c stranger) route(t *testing.T, to, via netip.Addr) {
	t.Helper()
	c.ns.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: host(to), Gw: via.AsSlice()}))
	})
}

// TestManyConnectionsFromOutside: a thousand one after the other, and a hundred at a time that all send much.
func TestManyConnectionsFromOutside(t *testing.T) {
	n, client, here, there := newOutsideShop(t, options{})
	by := client.askOften(t, "tcp", n.nodePort(), 1000)
	if by[here.addr()] < 400 || by[there.addr()] < 400 || by[here.addr()]+by[there.addr()] != 1000 {
		t.Errorf("answered by %v, want about half by each of two", by)
	}
	var wg sync.WaitGroup
	for range 100 {
		_, conn := client.ask(t, "tcp", n.nodePort())
		wg.Go(func() {
			defer conn.Close()
			sent, got := make([]byte, 256<<10), make([]byte, 256<<10)
			rand.Read(sent)
			go conn.Write(sent)
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(sent, got) {
				t.Errorf("%s: it does not get what it has sent: %v", conn.LocalAddr(), err)
			}
		})
	}
	wg.Wait()
	if unwanted := unwantedDrops(n.mesh.nodes...); len(unwanted) != 0 {
		t.Errorf("packets were dropped: %v", unwanted)
	}
}

// TestSessionFromOutside: with session affinity a client outside has one backend, by TCP and by UDP each.
func TestSessionFromOutside(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
			f := n.outsideFrontend(n.nodePort(), protocol, false)
			f.SessionAffinity = 3600
			must(t, n.dp.Frontends().Update(t.Context(), f))
		}
		for _, network := range outsideWays {
			by := client.askOften(t, network, n.nodePort(), 40)
			if by[here.addr()] != 40 && by[there.addr()] != 40 {
				t.Errorf("%s: answered by %v, want one only", network, by)
			}
		}
	})
}

// TestQuarantineFromOutside: a quarantined backend gets no new connections, and keeps those that it has.
func TestQuarantineFromOutside(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		for quarantined, other := range map[*pod]*pod{here: there, there: here} {
			n.setOutsideTarget(other, true)
			n.setOutsideTarget(quarantined, false)
			_, kept := client.ask(t, "tcp", n.nodePort())
			_, keptUDP := client.ask(t, "udp", n.nodePort())
			n.setOutsideTarget(other, false)
			n.setOutsideTarget(quarantined, true)
			for _, network := range outsideWays {
				if by := client.askOften(t, network, n.nodePort(), 40); by[other.addr()] != 40 {
					t.Errorf("%s: answered by %v, want %s only", network, by, other.addr())
				}
			}
			exchange(t, kept, 1<<20)
			if got := client.again(t, keptUDP); got.by != quarantined.addr() {
				t.Errorf("datagrams of one client go on to %s, want %s", got.by, quarantined.addr())
			}
			kept.Close()
			keptUDP.Close()
		}
	})
}

// again sends another datagram.
func (stranger) again(t *testing.T, conn net.Conn) asked {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	conn.Write([]byte("?"))
	got, err := hear(conn)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestRemovedBackendFromOutside: its connections stay; datagrams of its clients go to another.
func TestRemovedBackendFromOutside(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		for removed, other := range map[*pod]*pod{here: there, there: here} {
			n.deleteOutsideTarget(other)
			n.setOutsideTarget(removed, false)
			_, stays := client.ask(t, "tcp", n.nodePort())
			_, moves := client.ask(t, "udp", n.nodePort())
			n.setOutsideTarget(other, false)
			n.deleteOutsideTarget(removed)
			exchange(t, stays, 1<<20)
			if got := client.again(t, moves); got.by != other.addr() {
				t.Errorf("the datagrams go on to %s, want %s", got.by, other.addr())
			}
			stays.Close()
			moves.Close()
		}
	})
}

// TestOutsideWithoutAgent: with nobody there but the kernel, connections go on and new ones are made; so they are when another agent comes.
func TestOutsideWithoutAgent(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		var kept []net.Conn
		for range 8 {
			_, conn := client.ask(t, "tcp", n.nodePort())
			defer conn.Close()
			kept = append(kept, conn)
		}
		expect := func() {
			t.Helper()
			for _, conn := range kept {
				must(t, conn.SetDeadline(time.Now().Add(patience)))
				exchange(t, conn, 1<<16)
			}
			for _, network := range outsideWays {
				if by := client.askOften(t, network, n.nodePort(), 40); by[here.addr()] == 0 || by[there.addr()] == 0 {
					t.Errorf("%s: answered by %v, want both", network, by)
				}
			}
		}
		must(t, n.dp.Close())
		expect()
		n.load()
		expect()
		n.openOutside(n.nodePort(), false, here, there)
		if writes := n.dp.Writes(); writes != 0 {
			t.Errorf("the next agent has written to maps %d times", writes)
		}
		must(t, n.dp.Frontends().Prune(t.Context(), values([]lb.Frontend(nil)), all))
		if _, err := client.ns.dial(t, "tcp", n.nodePort()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a port that is no service's any more answers %v, want %v", err, unix.ECONNREFUSED)
		}
	})
}

// TestOutsideInWireGuard: what is sent on to another node is encrypted as pods' packets are.
func TestOutsideInWireGuard(t *testing.T) {
	m := newEncryptedMesh(t, 1, 2)
	m.learnRanges()
	n, client := m.nodes[0], newClient(t, m)
	there := m.nodes[1].addPod(301).tells()
	n.openOutside(n.nodePort(), false, there)
	for _, network := range outsideWays {
		got, conn := client.ask(t, network, n.nodePort())
		if got.by != there.addr() || got.from.Addr() != n.podSide() {
			t.Errorf("%s: answered by %s, which saw %s", network, got.by, got.from)
		}
		if network == "tcp" {
			exchange(t, conn, 8<<20)
		}
		conn.Close()
	}
	if unwanted := unwantedDrops(m.nodes...); len(unwanted) != 0 {
		t.Errorf("packets were dropped: %v", unwanted)
	}
}

// TestOutsideToNodesThemselves: a backend may be a process of a node, this one or another, as pods are that have their node's network.
func TestOutsideToNodesThemselves(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 1)
		n, client := m.nodes[0], newClient(t, m)
		for _, other := range m.nodes {
			other.ns.do(t, func() { serveTelling(t, netip.AddrPortFrom(other.row.Address, 7080)) })
			backend := &pod{node: other, row: identity.Endpoint{Address: other.row.Address}}
			n.openOutside(n.nodePort(), false, backend)
			for _, network := range outsideWays {
				got, conn := client.ask(t, network, n.nodePort())
				if got.by != other.row.Address {
					t.Errorf("%s: answered by %s, want %s", network, got.by, other.row.Address)
				}
				if network == "tcp" {
					exchange(t, conn, 1<<20)
				}
				conn.Close()
			}
			n.deleteOutsideTarget(backend)
		}
	})
}

// TestNodePortFromPods: pods of another node are served at this node's address too, by whichever backend.
func TestNodePortFromPods(t *testing.T) {
	for name, opts := range map[string]options{"IPv4": {outside: true}, "IPv6": {outside: true, underlay6: true, ranges: []int{6}}} {
		t.Run(name, func(t *testing.T) {
			m := newPodsMesh(t, opts, 1, 1, 2)
			n, clients := m.nodes[0], m.nodes[1].addPod(300)
			client := stranger{ns: clients.ns, addr: clients.addr()}
			n.ns.do(t, func() { serveTelling(t, netip.AddrPortFrom(n.row.Address, 7080)) })
			for where, c := range map[string]struct {
				backend *pod
				from    netip.Addr
			}{
				"the node that is asked": {n.addPod(301).tells(), client.addr},
				"the client's node":      {m.nodes[1].addPod(301).tells(), n.podSide()},
				"a third node":           {m.nodes[2].addPod(301).tells(), n.podSide()},
				"a node itself":          {&pod{node: n, row: identity.Endpoint{Address: n.row.Address}}, client.addr},
			} {
				n.openOutside(n.nodePort(), false, c.backend)
				for _, network := range outsideWays {
					got, conn := client.ask(t, network, n.nodePort())
					if got.by != c.backend.addr() || got.from.Addr() != c.from {
						t.Errorf("backend on %s, %s: answered by %s, which saw %s; want %s and %s", where, network, got.by, got.from.Addr(), c.backend.addr(), c.from)
					}
					if network == "tcp" {
						exchange(t, conn, 1<<20)
					}
					conn.Close()
				}
				n.deleteOutsideTarget(c.backend)
			}
			if _, err := client.ns.dial(t, "tcp", n.nodePort()); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("without a backend the client gets %v, want %v", err, unix.ECONNREFUSED)
			}
			if unwanted := unwantedDrops(m.nodes...); len(unwanted) != 0 {
				t.Errorf("packets were dropped: %v", unwanted)
			}
		})
	}
}

// TestErrorsGoOutside: who sends datagrams to a backend that does not listen hears of it.
func TestErrorsGoOutside(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 2)
		n, client := m.nodes[0], newClient(t, m)
		for where, deaf := range map[string]*pod{"same node": n.addPod(300), "other node": m.nodes[1].addPod(300)} {
			n.openOutside(n.nodePort(), false, deaf)
			conn, err := client.ns.dial(t, "udp", n.nodePort())
			must(t, err)
			conn.Write([]byte("?"))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: the client hears %v, want %v", where, err, unix.ECONNREFUSED)
			}
			conn.Close()
			n.deleteOutsideTarget(deaf)
		}
	})
}

// TestOutsidePathMTU: clients learn how large packets to another node may be, and backends how large those to a client behind a narrow link.
func TestOutsidePathMTU(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 2)
		n, router := m.nodes[0], newClient(t, m)
		backends := map[string]*pod{"same node": n.addPod(300).tells(), "other node": m.nodes[1].addPod(300).tells()}
		t.Run("to another node", func(t *testing.T) {
			n.openOutside(n.nodePort(), false, backends["other node"])
			conn, err := router.ns.dial(t, "udp", n.nodePort())
			must(t, err)
			defer conn.Close()
			onSocket(t, conn, func(fd int) error { return discoverMTU(fd, n.row.Address) })
			eventually(t, "the client learns that its datagrams are too large", func() bool {
				_, err := conn.Write(make([]byte, underlayMTU-headerLen(n.row.Address)-8))
				return errors.Is(err, unix.EMSGSIZE)
			})
			n.deleteOutsideTarget(backends["other node"])
		})
		const narrow = 1300
		client := router.behind(t, n, narrow)
		for where, backend := range backends {
			t.Run("from "+where, func(t *testing.T) {
				n.openOutside(n.nodePort(), false, backend)
				got, conn := client.ask(t, "tcp", n.nodePort())
				defer conn.Close()
				exchange(t, conn, 4<<20)
				if mtu := backend.mtuTo(got.from.Addr()); mtu != narrow {
					t.Errorf("the backend sends packets of up to %d bytes, want %d", mtu, narrow)
				}
				n.deleteOutsideTarget(backend)
			})
		}
	})
}

// mtuTo is how large packets to an address may be as far as the pod has found out, in bytes.
func (p *pod) mtuTo(a netip.Addr) (mtu int) {
	t := p.node.mesh.t
	t.Helper()
	p.ns.do(t, func() {
		routes, err := netlink.RouteGet(a.AsSlice())
		must(t, err)
		for _, r := range routes {
			mtu = r.MTU
		}
	})
	return mtu
}

// discoverMTU has datagrams of a socket never be cut.
func discoverMTU(fd int, family netip.Addr) error {
	if family.Is6() {
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
}

// behind connects a machine to this one, which becomes a router, by a link of an MTU in bytes that the machine does not know of.
func (c stranger) behind(t *testing.T, n *node, mtu int) stranger {
	t.Helper()
	near, far, bits := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), 24
	everything := netip.MustParsePrefix("0.0.0.0/0")
	if c.addr.Is6() {
		near, far, bits = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), 64
		everything = netip.MustParsePrefix("::/0")
	}
	machine := stranger{ns: newNamespace(t), addr: far}
	address := func(link string, a netip.Addr) netlink.Link {
		l, err := netlink.LinkByName(link)
		must(t, err)
		must(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, bits)), Flags: unix.IFA_F_NODAD}))
		return l
	}
	c.ns.do(t, func() {
		sysctl(t, "net/ipv4/ip_forward", "1")
		sysctl(t, "net/ipv6/conf/all/forwarding", "1")
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("narrow"), PeerName: "eth0", PeerNamespace: netlink.NsFd(int(machine.ns.handle))}))
		must(t, netlink.LinkSetMTU(address("narrow", near), mtu))
		up(t, "narrow")
	})
	machine.ns.do(t, func() {
		up(t, "lo")
		up(t, "eth0")
		must(t, netlink.RouteAdd(&netlink.Route{
			LinkIndex: address("eth0", far).Attrs().Index, Dst: ipNet(everything), Gw: near.AsSlice(), MTU: mtu, AdvMSS: underlayMTU - headerLen(far) - 20,
		}))
	})
	n.ns.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: ipNet(netip.PrefixFrom(far, bits).Masked()), Gw: c.addr.AsSlice()}))
	})
	eventually(t, "the machine behind the router reaches the node", func() bool {
		_, err := machine.ns.dial(t, "tcp", netip.AddrPortFrom(n.row.Address, 9))
		return errors.Is(err, unix.ECONNREFUSED)
	})
	return machine
}

// TestFragmentsFromOutside: of a datagram to a service that is cut, nothing arrives, and it is counted. Another's pass.
func TestFragmentsFromOutside(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, here, there := newOutsideShop(t, opts)
		n.deleteOutsideTarget(there)
		other := netip.AddrPortFrom(n.row.Address, 7000)
		n.ns.do(t, func() { serveEcho(t, other) })
		conn, err := client.ns.dial(t, "udp", other)
		must(t, err)
		defer conn.Close()
		exchange(t, conn, 4000)
		toShop, err := client.ns.dial(t, "udp", n.nodePort())
		must(t, err)
		defer toShop.Close()
		toShop.Write(make([]byte, 4000))
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropFragment) == 1 })
		if got := client.again(t, toShop); got.by != here.addr() {
			t.Errorf("what follows in one piece is answered by %s, want %s", got.by, here.addr())
		}
	})
}

// TestPortsForOutsideRunOut: connections that can be told apart no more are refused, and counted; those that there are go on.
func TestPortsForOutsideRunOut(t *testing.T) {
	m := newOutsideMesh(t, options{}, 1, 1)
	n, client := m.nodes[0], newClient(t, m)
	n.ns.do(t, func() { sysctl(t, "net/ipv4/ip_local_port_range", "1500 64400") }) // It leaves 1135.
	n.restart()
	n.openOutside(n.nodePort(), false, m.nodes[1].addPod(300).tells())
	_, kept := client.ask(t, "tcp", n.nodePort())
	defer kept.Close()
	ports := make(map[uint16]bool)
	for range 4000 {
		var conn net.Conn
		client.ns.do(t, func() { conn, _ = net.DialTimeout("tcp", n.nodePort().String(), 200*time.Millisecond) })
		if conn == nil {
			break
		}
		got, err := hear(conn)
		must(t, err)
		conn.Close()
		if port := got.from.Port(); port <= 64400 || ports[port] {
			t.Fatalf("a connection has port %d, after %d others", port, len(ports))
		}
		ports[got.from.Port()] = true
	}
	if len(ports) < 500 || n.drops(datapath.DropNoNATPort) == 0 {
		t.Errorf("%d connections got through, and then %d packets were dropped for want of a port", len(ports), n.drops(datapath.DropNoNATPort))
	}
	exchange(t, kept, 1<<20)
}

// TestSecondFamilyFromOutside: a node whose underlay is of IPv4 serves an IPv6 address too, from its second pod range.
func TestSecondFamilyFromOutside(t *testing.T) {
	m := newOutsideMesh(t, options{ranges: []int{4, 6}}, 1, 1)
	for _, n := range m.nodes {
		for _, owner := range m.nodes {
			row := owner.podRange()
			row.Prefix = owner.row.PodCIDRs[1]
			must(t, n.dp.Addresses().Update(t.Context(), row))
		}
	}
	n, client := m.nodes[0], newClient(t, m)
	own, at := netip.MustParseAddr("2001:db8::2"), netip.MustParseAddrPort("[2001:db8::1]:80")
	for ns, a := range map[namespace]netip.Addr{n.ns: at.Addr(), client.ns: own} {
		ns.do(t, func() {
			sysctl(t, "net/ipv6/conf/eth0/disable_ipv6", "0")
			eth0, err := netlink.LinkByName("eth0")
			must(t, err)
			must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, 64)), Flags: unix.IFA_F_NODAD}))
		})
	}
	for _, c := range []struct {
		pod  *pod
		from netip.Addr
	}{{n.addPod(300), own}, {m.nodes[1].addPod(300), n.row.PodSides()[1]}} {
		c.pod.row.Address = c.pod.row.Address6
		c.pod.tells()
		n.openOutside(at, false, c.pod)
		for _, network := range outsideWays {
			got, conn := client.ask(t, network, at)
			if got.by != c.pod.addr() || got.from.Addr() != c.from {
				t.Errorf("%s: answered by %s, which saw %s; want %s and %s", network, got.by, got.from.Addr(), c.pod.addr(), c.from)
			}
			if network == "tcp" {
				exchange(t, conn, 1<<20)
			}
			conn.Close()
		}
		n.deleteOutsideTarget(c.pod)
	}
}
