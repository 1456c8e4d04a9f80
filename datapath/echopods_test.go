package datapath_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
	"causeway/identity"
)

// smallestEcho is the IP packet of an echo without padding, in bytes.
const smallestEcho = 52

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
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 1, 2)
		e := m.nodes[0].openEcho()
		before := []map[string]uint64{m.nodes[0].dropped(), m.nodes[1].dropped(), m.nodes[2].dropped()}
		for _, n := range m.nodes[1:] {
			must(t, n.dp.Close())
			for i, size := range []int{0, smallestEcho, smallestEcho + 1, 100, 576, 1001, podMTU - 1, podMTU} {
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
	m := newPodsMesh(t, options{}, 1, 2)
	asker, asked := m.nodes[0], m.nodes[1]
	e := asker.openEcho()
	question, answer := asker.capture(), asked.capture()
	for nonce, size := range []int{smallestEcho, 600, podMTU} {
		must(t, e.SendPods(asked.podSide(), uint64(nonce), size))
		expectAnswer(t, e, asked, uint64(nonce))
		q, ok1 := question()
		a, ok2 := answer()
		if !ok1 || !ok2 || q.dst != asked.row.Address || a.dst != asker.row.Address || q.vni != 6 || a.vni != 6 {
			t.Fatalf("on the wire are %+v and %+v", q, a)
		}
		for _, p := range []outer{q, a} {
			if p.length != size+50 || len(p.inner) != size+14 || p.fragment || !p.dontFragment {
				t.Errorf("size %d: on the wire are %d bytes, %d in the tunnel, fragment %v, don't fragment %v", size, p.length, len(p.inner), p.fragment, p.dontFragment)
			}
			if checksum(p.inner[14:34]) != 0 {
				t.Errorf("size %d: the IPv4 checksum is wrong: %x", size, p.inner[14:34])
			}
		}
		from, to := asker.podSide().AsSlice(), asked.podSide().AsSlice()
		if !bytes.Equal(q.inner[26:34], append(bytes.Clone(from), to...)) || !bytes.Equal(a.inner[26:34], append(bytes.Clone(to), from...)) {
			t.Errorf("the request is from and to %v, the answer %v", q.inner[26:34], a.inner[26:34])
		}
		if !bytes.Equal(q.inner[66:], make([]byte, size-smallestEcho)) || !bytes.Equal(a.inner[66:], q.inner[66:]) {
			t.Errorf("size %d: the padding is %x, and comes back as %x", size, q.inner[66:], a.inner[66:])
		}
	}
}

// longEcho is an echo between two nodes' pod sides with so many bytes behind the message.
func longEcho(kind uint8, nonce uint64, from, to *node, padding int) packet {
	p := echoPacket(kind, nonce, from.podSide(), to.podSide())
	p.payload = append(p.payload, make([]byte, padding)...)
	return p
}

// TestPodsEchoIsBetweenNodesOnly sends hand-made VXLAN packets, and then a good request: its answer is the only one.
func TestPodsEchoIsBetweenNodesOnly(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
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
		for nonce, c := range []struct {
			name  string
			from  namespace
			to    *node
			vni   uint32
			frame []byte
			drop  string // empty: the kernel itself refuses it
		}{
			{"a stranger asks in a node's name", stranger, b, 6, toB.bytes(), datapath.DropUnknownNode},
			{"a stranger answers in a node's name", stranger, a, 6, toA.bytes(), datapath.DropUnknownNode},
			{"another node asks in its name", c.ns, b, 6, toB.bytes(), datapath.DropForeignIdentity},
			{"another node answers in its name", c.ns, a, 6, toA.bytes(), datapath.DropForeignIdentity},
			{"in the name of the asked", a.ns, b, 6, longEcho(echoRequest, 666, b, b, 0).bytes(), datapath.DropForeignIdentity},
			{"in nobody's name", a.ns, b, 6, with(toB, func(p *packet) { p.src = netip.MustParseAddr("10.9.9.1") }), datapath.DropForeignIdentity},
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
			{"less than a header", a.ns, b, 6, toB.bytes()[:30], ""},
			{"a byte behind the packet", a.ns, b, 6, append(toB.bytes(), 0), datapath.DropNoEndpoint},
			{"a byte less than it says", a.ns, b, 6, toB.bytes()[:151], datapath.DropNoEndpoint},
			{"the smallest says that it is larger", a.ns, b, 6, withLength(longEcho(echoRequest, 666, a, b, 0).bytes(), 1450), datapath.DropNoEndpoint},
			{"says that it is smaller", a.ns, b, 6, withLength(toB.bytes(), smallestEcho), datapath.DropNoEndpoint},
			{"says that it is nothing", a.ns, b, 6, withLength(toB.bytes(), 0), datapath.DropNoEndpoint},
			{"UDP says that it is smaller", a.ns, b, 6, withByte(toB.bytes(), 39, 32), datapath.DropNoEndpoint},
			{"UDP says that it is larger", a.ns, b, 6, withByte(toB.bytes(), 38, 1), datapath.DropNoEndpoint},
			{"TCP", a.ns, b, 6, with(toB, func(p *packet) { p.protocol = 6 }), datapath.DropNoEndpoint},
			{"a fragment", a.ns, b, 6, withByte(toB.bytes(), 20, 0x20), datapath.DropNoEndpoint},
			{"with options", a.ns, b, 6, withByte(toB.bytes(), 14, 0x46), datapath.DropNoEndpoint},
			{"with a checksum", a.ns, b, 6, withByte(toB.bytes(), 41, 1), datapath.DropNoEndpoint},
		} {
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

// withLength changes the length that the IPv4 header says.
func withLength(frame []byte, length uint16) []byte {
	binary.BigEndian.PutUint16(frame[16:], length)
	return frame
}

// TestPodsCannotAskForNodes: what a pod sends to a pod-side address comes to nothing, whatever it says that it is.
func TestPodsCannotAskForNodes(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
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
	m := newPodsMesh(t, options{}, 1, 2)
	n, other := m.nodes[0], m.nodes[1]
	e := n.openEcho()
	for _, c := range []struct {
		to   netip.Addr
		size int
		want string
	}{
		{other.podSide(), podMTU + 1, "52 to 1450"},
		{other.podSide(), 1 << 20, "52 to 1450"},
		{other.podSide(), smallestEcho - 1, "52 to 1450"},
		{other.podSide(), -1, "52 to 1450"},
		{n.podSide(), 0, "this node"},
		{netip.Addr{}, 0, "no IPv4 address"},
		{netip.MustParseAddr("2001:db8::1"), 0, "no IPv4 address"},
	} {
		if err := e.SendPods(c.to, 1, c.size); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("asking %q with %d bytes: %v, want an error with %q", c.to, c.size, err, c.want)
		}
	}
	must(t, e.SendPods(netip.AddrFrom16(other.podSide().As16()), 2, podMTU))
	expectAnswer(t, e, other, 2)
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
