package datapath_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
	"causeway/identity"
)

// smallestEcho is the IP packet of an echo without padding, in bytes, between addresses of a family.
func smallestEcho(family netip.Addr) int { return headerLen(family) + 8 + 24 }

// newPodsMesh makes nodes that know each other's pod ranges.
func newPodsMesh(t testing.TB, opts options, clusters ...identity.ClusterID) *mesh {
	t.Helper()
	m := newMesh(t, opts, clusters...)
	m.learnRanges()
	return m
}

func (n *node) podSide() netip.Addr { return n.row.PodSide() }

// TestPodsEchoIsAnsweredWithoutAgent in every size, between clusters and within one.
func TestPodsEchoIsAnsweredWithoutAgent(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 1, 2)
		e := m.nodes[0].openEcho()
		before := []map[string]uint64{m.nodes[0].dropped(), m.nodes[1].dropped(), m.nodes[2].dropped()}
		smallest, largest := smallestEcho(m.nodes[0].podSide()), m.options.podMTU()
		for _, n := range m.nodes[1:] {
			must(t, n.dp.Close())
			for i, size := range []int{0, smallest, smallest + 1, 100, 576, 1001, largest - 1, largest} {
				nonce := uint64(i)<<56 | 7
				must(t, e.SendPods(n.podSide(), nonce, size))
				expectAnswer(t, e, n, nonce)
			}
			n.load()
		}
		for i, n := range m.nodes {
			if after := n.dropped(); !sameCounts(before[i], after) {
				t.Errorf("%s: drops were %v and are %v", n.row.Name, before[i], after)
			}
		}
	})
}

// TestPodsEchoOnTheWire: from pod side to pod side and back, whole, of the size asked for, and never to be fragmented.
func TestPodsEchoOnTheWire(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2)
		asker, asked := m.nodes[0], m.nodes[1]
		e := asker.openEcho()
		question, answer := asker.capture(), asked.capture()
		smallest, outerHeaders := smallestEcho(asker.podSide()), headerLen(asker.row.Address)+8+8+14
		for nonce, size := range []int{smallest, 601, m.options.podMTU()} {
			must(t, e.SendPods(asked.podSide(), uint64(nonce), size))
			expectAnswer(t, e, asked, uint64(nonce))
			q, ok1 := question()
			a, ok2 := answer()
			if !ok1 || !ok2 || q.dst != asked.row.Address || a.dst != asker.row.Address || q.vni != 6 || a.vni != 6 {
				t.Fatalf("on the wire are %+v and %+v", q, a)
			}
			for _, p := range []outer{q, a} {
				if p.length != size+outerHeaders || len(p.inner) != size+14 || p.fragment || !p.dontFragment {
					t.Errorf("size %d: on the wire are %d bytes, %d in the tunnel, fragment %v, don't fragment %v", size, p.length, len(p.inner), p.fragment, p.dontFragment)
				}
			}
			expectTurnedRound(t, q.inner, a.inner, asker.podSide(), asked.podSide())
			if padding := q.inner[14+smallest:]; !bytes.Equal(padding, make([]byte, size-smallest)) {
				t.Errorf("size %d: the padding is %x", size, padding)
			}
		}
	})
}

// longEcho is an echo between two nodes' pod sides with so many bytes behind the message.
func longEcho(kind uint8, nonce uint64, from, to *node, padding int) packet {
	p := echoPacket(kind, nonce, from.podSide(), to.podSide())
	p.payload = append(p.payload, make([]byte, padding)...)
	return p
}

// TestPodsEchoIsBetweenNodesOnly sends hand-made VXLAN packets, and then a good request: its answer is the only one.
func TestPodsEchoIsBetweenNodesOnly(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2, 3)
		a, b, c := m.nodes[0], m.nodes[1], m.nodes[2]
		e := a.openEcho()
		pod := a.addPod(300)
		stranger := newStranger(t, m)
		toB := longEcho(echoRequest, 666, a, b, 100)
		toA := longEcho(echoReply, 666, b, a, 100)
		with := func(p packet, change func(*packet)) []byte {
			p.payload = bytes.Clone(p.payload)
			change(&p)
			return p.bytes()
		}
		udp := 14 + headerLen(a.podSide())
		cases := []echoCase{
			{"a stranger asks in a node's name", stranger, b, 6, toB.bytes(), datapath.DropUnknownNode},
			{"a stranger answers in a node's name", stranger, a, 6, toA.bytes(), datapath.DropUnknownNode},
			{"another node asks in its name", c.ns, b, 6, toB.bytes(), datapath.DropForeignIdentity},
			{"another node answers in its name", c.ns, a, 6, toA.bytes(), datapath.DropForeignIdentity},
			{"in the name of the asked", a.ns, b, 6, longEcho(echoRequest, 666, b, b, 0).bytes(), datapath.DropForeignIdentity},
			{"in nobody's name", a.ns, b, 6, with(toB, func(p *packet) { p.src = outsider(p.src) }), datapath.DropForeignIdentity},
			{"from a node's underlay address", a.ns, b, 6, with(toB, func(p *packet) { p.src = a.row.Address }), datapath.DropNoEndpoint},
			{"to a node's underlay address", a.ns, b, 6, with(toB, func(p *packet) { p.dst = b.row.Address }), datapath.DropForeignIdentity},
			{"as the host", a.ns, b, 1, toB.bytes(), datapath.DropForeignIdentity},
			{"without identity", a.ns, b, 0, toB.bytes(), datapath.DropForeignIdentity},
			{"as a pod", a.ns, b, 1<<16 | 300, toB.bytes(), datapath.DropNoEndpoint},
			{"as a pod, from its address", a.ns, b, 1<<16 | 300, with(toB, func(p *packet) { p.src = pod.addr() }), datapath.DropNoEndpoint},
			{"answered as a pod", b.ns, a, 2<<16 | 300, toA.bytes(), datapath.DropNoEndpoint},
			{"as another cluster's pod", a.ns, b, 2<<16 | 300, toB.bytes(), datapath.DropForeignIdentity},
			{"to another address of the range", a.ns, b, 6, with(toB, func(p *packet) { p.dst = p.dst.Next() }), datapath.DropForeignIdentity},
			{"to another port", a.ns, b, 6, with(toB, func(p *packet) { p.dstPort++ }), datapath.DropNoEndpoint},
			{"answered from another port", b.ns, a, 6, with(toA, func(p *packet) { p.srcPort++ }), datapath.DropNoEndpoint},
			{"of no type", a.ns, b, 6, with(toB, func(p *packet) { p.payload[8] = 3 }), datapath.DropNoEndpoint},
			{"with another magic", a.ns, b, 6, with(toB, func(p *packet) { p.payload[0]++ }), datapath.DropNoEndpoint},
			{"too short", a.ns, b, 6, with(toB, func(p *packet) { p.payload = p.payload[:23] }), datapath.DropNoEndpoint},
			{"headers alone", a.ns, b, 6, with(toB, func(p *packet) { p.payload = nil }), datapath.DropNoEndpoint},
			{"less than a header", a.ns, b, 6, toB.bytes()[:udp-4], ""},
			{"a byte behind the packet", a.ns, b, 6, append(toB.bytes(), 0), datapath.DropNoEndpoint},
			{"a byte less than it says", a.ns, b, 6, toB.bytes()[:udp+131], datapath.DropNoEndpoint},
			{"the smallest says that it is larger", a.ns, b, 6, withLength(longEcho(echoRequest, 666, a, b, 0).bytes(), 1450), datapath.DropNoEndpoint},
			{"says that it is smaller", a.ns, b, 6, withLength(toB.bytes(), 52), datapath.DropNoEndpoint},
			{"says that it is nothing", a.ns, b, 6, withLength(toB.bytes(), 0), datapath.DropNoEndpoint},
			{"UDP says that it is smaller", a.ns, b, 6, withByte(toB.bytes(), udp+5, 32), datapath.DropNoEndpoint},
			{"UDP says that it is larger", a.ns, b, 6, withByte(toB.bytes(), udp+4, 1), datapath.DropNoEndpoint},
			{"TCP", a.ns, b, 6, with(toB, func(p *packet) { p.protocol = 6 }), datapath.DropNoEndpoint},
		}
		if a.podSide().Is4() {
			cases = append(cases,
				echoCase{"a fragment", a.ns, b, 6, withByte(toB.bytes(), 20, 0x20), datapath.DropNoEndpoint},
				echoCase{"with options", a.ns, b, 6, withByte(toB.bytes(), 14, 0x46), datapath.DropNoEndpoint},
				echoCase{"with a checksum", a.ns, b, 6, withByte(toB.bytes(), 41, 1), datapath.DropNoEndpoint})
		} else {
			cases = append(cases,
				echoCase{"a fragment", a.ns, b, 6, withByte(toB.bytes(), 20, 44), datapath.DropNoEndpoint},
				echoCase{"with an extension header", a.ns, b, 6, withByte(toB.bytes(), 20, 60), datapath.DropNoEndpoint})
		}
		for nonce, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				dropsBefore := c.to.drops(c.drop)
				mustWrite(t, c.from, c.to, vxlan(c.vni, c.frame))
				if c.drop != "" {
					eventually(t, "the drop is counted as "+c.drop, func() bool { return c.to.drops(c.drop) == dropsBefore+1 })
				}
				must(t, e.SendPods(b.podSide(), uint64(nonce), 0))
				expectAnswer(t, e, b, uint64(nonce))
			})
		}
	})
}

// withLength changes the length that the IP header says: IPv6's is without the header.
func withLength(frame []byte, length uint16) []byte {
	at := 16
	if frame[14]>>4 == 6 {
		at = 18
	}
	binary.BigEndian.PutUint16(frame[at:], length)
	return frame
}

// TestPodsCannotAskForNodes: what a pod sends to a pod-side address comes to nothing, whatever it says that it is.
func TestPodsCannotAskForNodes(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		pod := b.addPod(300)
		e := a.openEcho()
		for _, c := range []struct {
			name   string
			src    netip.Addr
			dst    netip.Addr
			kind   uint8
			at     *node
			reason string
		}{
			{"asks the other node", pod.addr(), a.podSide(), echoRequest, a, datapath.DropNoEndpoint},
			{"answers the other node", pod.addr(), a.podSide(), echoReply, a, datapath.DropNoEndpoint},
			{"asks its own node", pod.addr(), b.podSide(), echoRequest, b, datapath.DropNoEndpoint},
			{"asks in its node's name", b.podSide(), a.podSide(), echoRequest, b, datapath.DropSpoofedAddress},
			{"answers in its node's name", b.podSide(), a.podSide(), echoReply, b, datapath.DropSpoofedAddress},
			{"asks in the other's name", a.podSide(), b.podSide(), echoRequest, b, datapath.DropSpoofedAddress},
		} {
			p := echoPacket(c.kind, 666, c.src, c.dst)
			p.srcMAC, p.dstMAC = pod.row.MAC, pod.row.HostMAC
			before := c.at.drops(c.reason)
			pod.sendFrame(p.bytes())
			eventually(t, c.name+": the drop is counted as "+c.reason, func() bool { return c.at.drops(c.reason) == before+1 })
		}
		must(t, e.SendPods(b.podSide(), 1, 0))
		expectAnswer(t, e, b, 1)
	})
}

// TestPodsEchoFollowsTheAddressMap: who misses the other's pod range, or has it elsewhere, does not reach it, and underlay echoes pass
// all the same.
func TestPodsEchoFollowsTheAddressMap(t *testing.T) {
	m := newPodsMesh(t, options{}, 1, 2, 3)
	a, b, c := m.nodes[0], m.nodes[1], m.nodes[2]
	e := a.openEcho()
	lost := func(at *node, reason string) {
		t.Helper()
		before := at.drops(reason)
		must(t, e.SendPods(b.podSide(), 666, 0))
		eventually(t, "the drop is counted as "+reason, func() bool { return at.drops(reason) == before+1 })
		must(t, e.Send(b.row.Address, 2))
		expectAnswer(t, e, b, 2)
	}
	must(t, a.dp.Addresses().Delete(t.Context(), b.podRange()))
	lost(a, datapath.DropUnusedAddress)
	must(t, a.dp.Addresses().Update(t.Context(), b.podRange()))
	must(t, b.dp.Addresses().Delete(t.Context(), a.podRange()))
	lost(b, datapath.DropForeignIdentity)
	elsewhere := a.podRange()
	elsewhere.NodeAddress = c.row.Address
	must(t, b.dp.Addresses().Update(t.Context(), elsewhere))
	lost(b, datapath.DropForeignIdentity)
	must(t, b.dp.Addresses().Update(t.Context(), a.podRange()))
	must(t, e.SendPods(b.podSide(), 3, 0))
	expectAnswer(t, e, b, 3)
}

// TestPodsEchoShowsAPathsMTU: what is larger than the path carries is lost, whole, and sending it is no error.
func TestPodsEchoShowsAPathsMTU(t *testing.T) {
	const size = 1350 // with the tunnel's headers 1400
	for name, narrow := range map[string]func(m *mesh){
		"in the middle, silently": func(m *mesh) {
			m.underlay.do(m.t, func() {
				port, err := netlink.LinkByName(m.nodes[1].port)
				must(m.t, err)
				must(m.t, netlink.LinkSetMTU(port, 1400))
			})
		},
		"known to the asker's kernel": func(m *mesh) { m.nodes[0].narrowRoute(m.nodes[1], 1400) },
		"known to the asked's kernel": func(m *mesh) { m.nodes[1].narrowRoute(m.nodes[0], 1400) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newPodsMesh(t, options{}, 1, 2)
			asker, asked := m.nodes[0], m.nodes[1]
			e := asker.openEcho()
			must(t, e.SendPods(asked.podSide(), 1, podMTU))
			expectAnswer(t, e, asked, 1)
			narrow(m)
			sent := []func() (outer, bool){asker.capture(), asked.capture()}
			for nonce := range uint64(5) {
				for _, large := range []int{size + 8, podMTU} {
					must(t, e.SendPods(asked.podSide(), 666, large))
				}
				must(t, e.SendPods(asked.podSide(), nonce, size))
				expectAnswer(t, e, asked, nonce)
			}
			for _, next := range sent {
				for answered := 0; answered < 5; {
					p, ok := next()
					if !ok || p.fragment || !p.dontFragment {
						t.Fatalf("on the wire is %+v", p)
					}
					if p.length == 1400 {
						answered++
					}
				}
			}
		})
	}
}

// narrowRoute has the node's kernel believe that the way to another has an MTU, as it does when a router has said so.
func (n *node) narrowRoute(to *node, mtu int) {
	n.ns.do(n.mesh.t, func() {
		link, err := netlink.LinkByName("eth0")
		must(n.mesh.t, err)
		must(n.mesh.t, netlink.RouteAdd(&netlink.Route{
			LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, MTU: mtu,
			Dst: ipNet(netip.PrefixFrom(to.row.Address, to.row.Address.BitLen())),
		}))
	})
}

func TestPodsEchoRefuses(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2)
		n, other := m.nodes[0], m.nodes[1]
		e := n.openEcho()
		smallest, largest := smallestEcho(n.podSide()), m.options.podMTU()
		sizes := fmt.Sprintf("%d to %d", smallest, largest)
		otherFamily := netip.MustParseAddr("2001:db8::1")
		if n.podSide().Is6() {
			otherFamily = netip.MustParseAddr("192.0.2.1")
		}
		for _, c := range []struct {
			to   netip.Addr
			size int
			want string
		}{
			{other.podSide(), largest + 1, sizes},
			{other.podSide(), 1 << 20, sizes},
			{other.podSide(), smallest - 1, sizes},
			{other.podSide(), -1, sizes},
			{n.podSide(), 0, "this node"},
			{netip.Addr{}, 0, "it is no IP"},
			{otherFamily, 0, "it is no IP"},
		} {
			if err := e.SendPods(c.to, 1, c.size); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("asking %q with %d bytes: %v, want an error with %q", c.to, c.size, err, c.want)
			}
		}
		must(t, e.SendPods(netip.AddrFrom16(other.podSide().As16()), 2, largest))
		expectAnswer(t, e, other, 2)
	})
}

// TestWithoutPodSide: a data path without such an address neither asks nor answers.
func TestWithoutPodSide(t *testing.T) {
	m := newPodsMesh(t, options{}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	with := b.openEcho()
	a.config.PodSide = netip.Addr{}
	a.restart()
	if err := a.openEcho().SendPods(b.podSide(), 1, 0); err == nil {
		t.Error("asked from no address")
	}
	before := a.drops(datapath.DropForeignIdentity)
	must(t, with.SendPods(a.podSide(), 1, 0))
	eventually(t, "the drop is counted", func() bool { return a.drops(datapath.DropForeignIdentity) == before+1 })
	zero := echoPacket(echoRequest, 666, b.podSide(), netip.IPv4Unspecified())
	mustWrite(t, b.ns, a, vxlan(6, zero.bytes()))
	eventually(t, "the drop is counted", func() bool { return a.drops(datapath.DropForeignIdentity) == before+2 })
}
