package datapath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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

// addStranger connects a machine to the underlay, by its number from 1.
func (m *mesh) addStranger(i int) stranger {
	t := m.t
	t.Helper()
	o := stranger{ns: newNamespace(t), addr: m.options.underlayAddress(200, i)}
	port := fmt.Sprintf("outside%d", i)
	m.underlay.do(t, func() {
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs(port), PeerName: "eth0", PeerNamespace: netlink.NsFd(int(o.ns.handle))}))
		br, err := netlink.LinkByName("br0")
		must(t, err)
		link, err := netlink.LinkByName(port)
		must(t, err)
		must(t, netlink.LinkSetMaster(link, br))
		up(t, port)
	})
	o.ns.do(t, func() {
		up(t, "lo")
		up(t, "eth0")
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		bits := 16
		if o.addr.Is6() {
			bits = 64
		}
		must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(o.addr, bits)), Flags: unix.IFA_F_NODAD}))
	})
	for _, n := range m.nodes {
		eventually(t, "the machine outside reaches the node", func() bool {
			conn, err := o.ns.dial(t, "tcp", netip.AddrPortFrom(n.row.Address, 9))
			if err == nil {
				conn.Close()
			}
			return errors.Is(err, unix.ECONNREFUSED)
		})
	}
	return o
}

// port is the node's address with the shop's node port.
func (n *node) port80() netip.AddrPort { return netip.AddrPortFrom(n.row.Address, nodePort) }

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
func (o stranger) ask(t testing.TB, network string, to netip.AddrPort) (asked, net.Conn) {
	t.Helper()
	conn, err := o.ns.dial(t, network, to)
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
	m := newMesh(t, opts, clusters...)
	m.learnRanges()
	return m
}

var outsideWays = []string{"tcp", "udp"}

// TestNodePort: a client outside is served at a node's address by a pod of that node, which sees the client, and by one of another node or
// cluster, which sees the node.
func TestNodePort(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newOutsideMesh(t, opts, 1, 1, 2)
		client := m.addStranger(1)
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
