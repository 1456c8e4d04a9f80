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

// TestPodProgram runs the program on single packets.
func TestPodProgram(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	n := m.nodes[0]
	pod, neighbour, remote := n.addPod(300), n.addPod(301), m.nodes[1].addPod(300)
	must(t, n.dp.SetBlackholes([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("100.64.0.0/10")}))
	gone := identity.Address{ClusterID: 1, Prefix: netip.MustParsePrefix("10.1.0.99/32"), Identity: 1<<16 | 300, NodeAddress: n.row.Address}
	must(t, n.dp.Addresses().Update(t.Context(), gone))

	good := packet{srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: pod.addr(), dst: remote.addr()}
	with := func(change func(*packet)) packet { p := good; change(&p); return p }
	to := func(addr string) packet { return with(func(p *packet) { p.dst = netip.MustParseAddr(addr) }) }
	for name, c := range map[string]struct {
		packet  packet
		raw     []byte
		gso     uint32
		verdict uint32
		drop    string
		hop     bool // the packet comes out with one hop less
	}{
		"to a pod of another node":      {packet: good, verdict: verdictRedirect, hop: true},
		"to a pod of this node":         {packet: with(func(p *packet) { p.dst = neighbour.addr() }), verdict: verdictRedirect, hop: true},
		"to this node":                  {packet: with(func(p *packet) { p.dst = n.row.Address }), verdict: verdictPass},
		"to the world":                  {packet: to("192.0.2.1"), verdict: verdictPass},
		"ARP":                           {packet: with(func(p *packet) { p.etherType = 0x0806 }), verdict: verdictPass},
		"another pod's address":         {packet: with(func(p *packet) { p.src = neighbour.addr() }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"nobody's address":              {packet: with(func(p *packet) { p.src = netip.MustParseAddr("192.0.2.7") }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"a remote pod's address":        {packet: with(func(p *packet) { p.src = remote.addr() }), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"another MAC":                   {packet: with(func(p *packet) { p.srcMAC = "02:00:00:00:00:99" }), verdict: verdictDrop, drop: datapath.DropSpoofedMAC},
		"last hop, to another node":     {packet: with(func(p *packet) { p.ttl = 1 }), verdict: verdictDrop, drop: datapath.DropTTLExpired},
		"last hop, on this node":        {packet: with(func(p *packet) { p.ttl, p.dst = 1, neighbour.addr() }), verdict: verdictDrop, drop: datapath.DropTTLExpired},
		"to a pod address of nobody":    {packet: to("10.2.0.200"), verdict: verdictDrop, drop: datapath.DropUnusedAddress},
		"to no service":                 {packet: to("100.64.1.1"), verdict: verdictDrop, drop: datapath.DropUnusedAddress},
		"to a pod that is just leaving": {packet: to("10.1.0.99"), verdict: verdictDrop, drop: datapath.DropNoEndpoint},
		"full size":                     {packet: with(func(p *packet) { p.payload = make([]byte, podMTU-28) }), verdict: verdictRedirect, hop: true},
		"one byte too big":              {packet: with(func(p *packet) { p.payload = make([]byte, podMTU-27) }), verdict: verdictDrop, drop: datapath.DropTooBig},
		"big, but segmented":            {packet: with(func(p *packet) { p.payload = make([]byte, 3000) }), gso: podMTU - 28, verdict: verdictRedirect, hop: true},
		"segments too big":              {packet: with(func(p *packet) { p.payload = make([]byte, 3000) }), gso: podMTU - 27, verdict: verdictDrop, drop: datapath.DropTooBig},
		"IPv6 from nobody's address":    {raw: ipv6Frame("2001:db8::1"), verdict: verdictDrop, drop: datapath.DropSpoofedAddress},
		"IPv6 router solicitation":      {raw: ipv6Frame("ff02::2"), verdict: verdictDrop, drop: datapath.DropIPv6LinkLocal},
		"IPv6 neighbour solicitation":   {raw: ipv6Frame("ff02::1:ff00:1"), verdict: verdictDrop, drop: datapath.DropIPv6LinkLocal},
		"a protocol nobody knows":       {packet: with(func(p *packet) { p.etherType = 0x88b5 }), verdict: verdictDrop, drop: datapath.DropNotIP},
		"IPv4 with half a header":       {raw: withByte(good.bytes(), 14, 0x44), verdict: verdictDrop, drop: datapath.DropMalformed},
		"IPv4 of version 5":             {raw: withByte(good.bytes(), 14, 0x55), verdict: verdictDrop, drop: datapath.DropMalformed},
	} {
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
			if ttl := in[22]; c.hop && (out[22] != ttl-1 || checksum(out[14:34]) != 0) {
				t.Errorf("TTL %d became %d, checksum of the header %#x", ttl, out[22], checksum(out[14:34]))
			}
			if !c.hop && !bytes.Equal(in, out) {
				t.Errorf("the packet was changed from\n%x to\n%x", in, out)
			}
		})
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
