package datapath_test

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"causeway/datapath"
	"causeway/identity"
)

// Verdicts of tc programs, from linux/pkt_cls.h.
const (
	verdictPass     = 0xffffffff
	verdictDrop     = 2
	verdictRedirect = 7
)

// skBuff is the part of struct __sk_buff (linux/bpf.h) that a test run may set.
type skBuff struct {
	_       [10]uint32
	Ifindex uint32
	_       [33]uint32
	GSOSize uint32
	_       uint32
	_       uint64
}

// outsider is an address outside of the mesh, of the family of a.
func outsider(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.MustParseAddr("2001:db8::1")
	}
	return netip.MustParseAddr("192.0.2.1")
}

// serviceAddress is an address of a range for services, of the family of a.
func serviceAddress(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.MustParseAddr("fd00:64::1:1")
	}
	return netip.MustParseAddr("100.64.1.1")
}

// TestPodProgram runs the program on single packets.
func TestPodProgram(t *testing.T) {
	eachFamily(t, testPodProgram)
	t.Run("IPv6 pods on IPv4 nodes", func(t *testing.T) { testPodProgram(t, options{ranges: []int{6}}) })
}

func testPodProgram(t *testing.T, opts options) {
	m := newMesh(t, opts, 1, 2, 2, 2)
	n := m.nodes[0]
	pod, neighbour, remote := n.addPod(300), n.addPod(301), m.nodes[1].addPod(300)
	must(t, n.dp.SetBlackholes([]netip.Prefix{
		netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("100.64.0.0/10"),
		netip.MustParsePrefix("fd00:10:1::/48"), netip.MustParsePrefix("fd00:10:2::/48"), netip.MustParsePrefix("fd00:64::/96"),
	}))
	host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	gone := identity.Address{ClusterID: 1, Prefix: host(n.inRange(99)), Identity: 1<<16 | 300, NodeAddress: n.row.Address}
	must(t, n.dp.Addresses().Update(t.Context(), gone))
	// Nodes to which there is no way, a narrow one, and one that the map does not have.
	way := n.tunnelTo(m.nodes[2])
	way.Mode = identity.TunnelClosed
	must(t, n.dp.Tunnels().Update(t.Context(), way))
	way = n.tunnelTo(m.nodes[3])
	way.MTU = 1300
	must(t, n.dp.Tunnels().Update(t.Context(), way))
	closed, narrow := m.nodes[2].addPod(300), m.nodes[3].addPod(300)
	lost := identity.Address{ClusterID: 2, Prefix: host(m.nodes[1].inRange(98)), Identity: 2<<16 | 300, NodeAddress: outsider(n.row.Address)}
	must(t, n.dp.Addresses().Update(t.Context(), lost))

	headers, mtu := headerLen(pod.addr())+8, m.options.podMTU()
	good := packet{srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: pod.addr(), dst: remote.addr()}
	with := func(change func(*packet)) packet { p := good; change(&p); return p }
	to := func(addr netip.Addr) packet { return with(func(p *packet) { p.dst = addr }) }
	sized := func(size int) packet { return with(func(p *packet) { p.payload = make([]byte, size-headers) }) }
	narrowed := func(size int) packet { p := sized(size); p.dst = narrow.addr(); return p }
	cases := map[string]struct {
		packet  packet
		raw     []byte
		gso     uint32
		verdict uint32
		drop    string
		hop     bool // the packet comes out with one hop less
	}{
		"to a pod of another node":      {packet: good, verdict: verdictRedirect, hop: true},
		"to a pod of this node":         {packet: to(neighbour.addr()), verdict: verdictRedirect, hop: true},
		"to this node":                  {packet: with(func(p *packet) { p.dst = n.row.Address }), verdict: verdictPass},
		"to the world":                  {packet: to(outsider(pod.addr())), verdict: verdictPass},
		"ARP":                           {packet: with(func(p *packet) { p.etherType = 0x0806 }), verdict: verdictPass},
		"another pod's address":         {packet: with(func(p *packet) { p.src = neighbour.addr() }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"nobody's address":              {packet: with(func(p *packet) { p.src = outsider(p.src) }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"a remote pod's address":        {packet: with(func(p *packet) { p.src = remote.addr() }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"another MAC":                   {packet: with(func(p *packet) { p.srcMAC = "02:00:00:00:00:99" }), verdict: verdictDrop, drop: datapath.DropSpoofedMAC},
		"last hop, to another node":     {packet: with(func(p *packet) { p.ttl = 1 }), verdict: verdictDrop, drop: datapath.DropTTLExpired},
		"last hop, on this node":        {packet: with(func(p *packet) { p.ttl, p.dst = 1, neighbour.addr() }), verdict: verdictDrop, drop: datapath.DropTTLExpired},
		"to a pod address of nobody":    {packet: to(m.nodes[1].inRange(200)), verdict: verdictDrop, drop: datapath.DropUnusedAddress},
		"to no service":                 {packet: to(serviceAddress(pod.addr())), verdict: verdictDrop, drop: datapath.DropUnusedAddress},
		"to a pod that is just leaving": {packet: to(n.inRange(99)), verdict: verdictDrop, drop: datapath.DropNoEndpoint},
		"to a node that must be sent to encrypted and cannot be": {packet: to(closed.addr()), verdict: verdictDrop, drop: datapath.DropUnencrypted},
		"to a node that there is not":                            {packet: to(m.nodes[1].inRange(98)), verdict: verdictDrop, drop: datapath.DropNoNode},
		"full size":                                              {packet: sized(mtu), verdict: verdictRedirect, hop: true},
		"one byte too big":                                       {packet: sized(mtu + 1), verdict: verdictRedirect, drop: datapath.DropTooBig},
		"big, but segmented":                                     {packet: sized(3000), gso: uint32(mtu - headers), verdict: verdictRedirect, hop: true},
		"segments too big":                                       {packet: sized(3000), gso: uint32(mtu - headers + 1), verdict: verdictRedirect, drop: datapath.DropTooBig},
		"full size of a narrow way":                              {packet: narrowed(1300), verdict: verdictRedirect, hop: true},
		"too big for a narrow way":                               {packet: narrowed(1301), verdict: verdictRedirect, drop: datapath.DropTooBig},
		"segments too big for the way":                           {packet: narrowed(3000), gso: uint32(1300 - headers + 1), verdict: verdictRedirect, drop: datapath.DropTooBig},
		"with what nobody reads":                                 {packet: with(func(p *packet) { p.protocol = 60 }), verdict: verdictRedirect, hop: true}, // IPv6's destination options
		"IPv6 from nobody's address":                             {raw: ipv6Frame("2001:db8::1"), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"IPv6 router solicitation":                               {raw: ipv6Frame("ff02::2"), verdict: verdictDrop, drop: datapath.DropIPv6LinkLocal},
		"IPv6 neighbour solicitation":                            {raw: ipv6Frame("ff02::1:ff00:1"), verdict: verdictDrop, drop: datapath.DropIPv6LinkLocal},
		"IPv6 to a neighbour":                                    {raw: ipv6Frame("fe80::7"), verdict: verdictDrop, drop: datapath.DropIPv6LinkLocal},
		"a protocol nobody knows":                                {packet: with(func(p *packet) { p.etherType = 0x88b5 }), verdict: verdictDrop, drop: datapath.DropNotIP},
		"with half a header":                                     {raw: withByte(good.bytes(), 14, 0x44), verdict: verdictDrop, drop: datapath.DropMalformed},
		"of version 5":                                           {raw: withByte(good.bytes(), 14, 0x55), verdict: verdictDrop, drop: datapath.DropMalformed},
		"of the other version":                                   {raw: withByte(good.bytes(), 14, good.bytes()[14]^0x20), verdict: verdictDrop, drop: datapath.DropMalformed},
	}
	if pod.addr().Is6() {
		delete(cases, "with half a header") // IPv6's has one length alone.
	}
	if pod.addr().Is6() != n.row.Address.Is6() {
		delete(cases, "to this node") // It has no address of the pod's family.
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			in := c.raw
			if in == nil {
				in = c.packet.bytes()
			}
			before := n.dropped()
			verdict, out := n.run(n.dp.PodProgram(), in, skBuff{Ifindex: uint32(pod.row.IfIndex), GSOSize: c.gso})
			if verdict != c.verdict {
				t.Errorf("verdict %d, want %d", int32(verdict), int32(c.verdict))
			}
			if c.drop != "" {
				before[c.drop]++
			}
			if after := n.dropped(); !sameCounts(before, after) {
				t.Errorf("drops are %v, want %v", after, before)
			}
			answered := c.drop == datapath.DropTooBig
			if answered == bytes.Equal(in, out) && !c.hop {
				t.Errorf("the packet was changed from\n%x to\n%x", in, out)
			}
			if c.hop {
				expectHop(t, in, out, pod.addr())
			}
		})
	}
}

// expectHop checks that the IP packet of the address's family has come out with one hop less, and is the same otherwise.
func expectHop(t *testing.T, in, out []byte, family netip.Addr) {
	t.Helper()
	at := hopsAt(family)
	if out[at] != in[at]-1 {
		t.Errorf("of %d hops are left %d", in[at], out[at])
	}
	want := withByte(in, at, in[at]-1)
	if family.Is4() {
		if checksum(out[14:34]) != 0 {
			t.Errorf("the checksum of the header is wrong: %x", out[14:34])
		}
		copy(want[24:26], out[24:26])
	}
	if !bytes.Equal(out[14:], want[14:]) {
		t.Errorf("the packet was changed from\n%x to\n%x", in, out)
	}
}

// TestPodProgramMAC: a pod gets packets as if from the gateway.
func TestPodProgramMAC(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	from, to := n.addPod(300), n.addPod(301)
	in := packet{srcMAC: from.row.MAC, dstMAC: from.row.HostMAC, src: from.addr(), dst: to.addr()}.bytes()
	_, out := n.run(n.dp.PodProgram(), in, skBuff{Ifindex: uint32(from.row.IfIndex)})
	if want := append(mac(to.row.MAC), mac(to.row.HostMAC)...); !bytes.Equal(out[:12], want) {
		t.Errorf("Ethernet addresses are %x, want %x", out[:12], want)
	}
}

// run runs a program on a packet.
func (n *node) run(prog *ebpf.Program, in []byte, ctx skBuff) (verdict uint32, out []byte) {
	t := n.mesh.t
	t.Helper()
	out = make([]byte, len(in)+256)
	run := ebpf.RunOptions{Data: in, DataOut: out, Context: ctx}
	n.ns.do(t, func() {
		var err error
		verdict, err = prog.Run(&run)
		must(t, err)
	})
	return verdict, run.DataOut
}

// dropped returns the packets dropped by reason.
func (n *node) dropped() map[string]uint64 {
	all, err := n.dp.Drops()
	must(n.mesh.t, err)
	counts := make(map[string]uint64)
	for _, d := range all {
		counts[d.Reason] += d.Packets
	}
	return counts
}

// sameCounts leaves out what kernels send on their own.
func sameCounts(a, b map[string]uint64) bool {
	for reason := range allKeys(a, b) {
		if a[reason] != b[reason] && reason != datapath.DropIPv6LinkLocal {
			return false
		}
	}
	return true
}

func allKeys(maps ...map[string]uint64) map[string]bool {
	keys := make(map[string]bool)
	for _, m := range maps {
		for k := range m {
			keys[k] = true
		}
	}
	return keys
}

func ipv6Frame(dst string) []byte {
	b := append(append([]byte{}, mac("")...), mac("")...)
	b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 59, 64)
	b = append(b, netip.MustParseAddr("fe80::1").AsSlice()...)
	return append(b, netip.MustParseAddr(dst).AsSlice()...)
}

func withByte(b []byte, at int, value byte) []byte {
	b = bytes.Clone(b)
	b[at] = value
	return b
}
