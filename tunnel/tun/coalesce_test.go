package tun

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
)

// wirePackets are the packets on the wire that a large one becomes, in VXLAN between IPv4 or IPv6 addresses.
func wirePackets(t testing.TB, outer int, l large) (packets [][]byte) {
	t.Helper()
	h, packet := encapsulate(outer, l)
	var s segments
	if err := s.load(h, packet, maxPacket); err != nil {
		t.Fatalf("%s: %v", l.name, err)
	}
	for s.more() {
		p := make([]byte, s.length())
		s.take(p)
		packets = append(packets, p)
	}
	return packets
}

// encapsulate puts VXLAN around a frame, as the kernel does before it hands it over.
func encapsulate(outer int, l large) (header, []byte) {
	vxlan := make([]byte, udpHeaderLength+vxlanHeaderLength)
	binary.BigEndian.PutUint16(vxlan, 50000)
	binary.BigEndian.PutUint16(vxlan[2:], vxlanPort)
	binary.BigEndian.PutUint16(vxlan[udpLength:], uint16(len(vxlan)+len(l.frame)))
	vxlan[8], vxlan[14] = 0x08, 42
	packet, network := frame(outer, protocolUDP, append(vxlan, l.frame...), udpChecksum)
	packet = packet[ethernetHeaderLength:]
	h := l.header
	before := network + len(vxlan)
	h.checksumStart += uint16(before)
	if h.gsoType != gsoNone {
		h.outerTransport, h.innerNetwork = uint16(network), uint16(before+ethernetHeaderLength)
		h.gsoType |= gsoTunnel4
	}
	if outer == 6 && h.gsoType != gsoNone {
		h.gsoType ^= gsoTunnel4 | gsoTunnel6
		h.flags |= tunnelChecksum
	} else {
		clear(packet[network+udpChecksum : network+udpChecksum+2])
	}
	return h, packet
}

// gathered returns the groups that the packets become.
func gathered(packets [][]byte) []group {
	c := coalescer{port: vxlanPort}
	for _, p := range packets {
		c.add(p)
	}
	return c.groups
}

// split takes a group apart as the kernel would.
func (g *group) split(t testing.TB) (packets [][]byte) {
	t.Helper()
	if len(g.packets) == 1 {
		return g.packets
	}
	built := g.build(nil)
	h, whole := decodeHeader(built), built[headerSize:]
	for _, p := range g.packets {
		whole = append(whole, p[g.first.headers:]...)
	}
	if len(whole) != g.length {
		t.Fatalf("the whole has %d bytes, and says %d", len(whole), g.length)
	}
	var s segments
	if err := s.load(h, whole, maxPacket); err != nil {
		t.Fatalf("what was put together is refused: %v", err)
	}
	for s.more() {
		p := make([]byte, s.length())
		s.take(p)
		packets = append(packets, p)
	}
	return packets
}

func TestRoundTrip(t *testing.T) {
	for _, outer := range []int{4, 6} {
		for _, l := range largePackets() {
			packets := wirePackets(t, outer, l)
			groups := gathered(packets)
			want := (len(packets) + maxSegments - 1) / maxSegments
			if l.ends {
				want++ // What ends a connection stays apart.
			}
			if len(groups) != want {
				t.Errorf("outer IPv%d, %s: %d packets become %d, want %d", outer, l.name, len(packets), len(groups), want)
			}
			var again [][]byte
			for i := range groups {
				again = append(again, groups[i].split(t)...)
			}
			expectSame(t, fmt.Sprintf("outer IPv%d, %s", outer, l.name), again, packets)
		}
	}
}

func expectSame(t *testing.T, about string, got, want [][]byte) {
	t.Helper()
	if !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("%s: after being put together and split again, packets are not what they were", about)
	}
}

// TestFlowsTakeTurns mixes the packets of two connections.
func TestFlowsTakeTurns(t *testing.T) {
	other := tcpPacket(4, 5000, 1300, tcpACK, nil)
	a, b := wirePackets(t, 4, tcpPacket(4, 5000, 1300, tcpACK, nil)), wirePackets(t, 4, other)
	for _, p := range b {
		changeInner(p, func(ip, tcp []byte) { tcp[1]++ })
	}
	var mixed [][]byte
	for i := range a {
		mixed = append(mixed, a[i], b[i])
	}
	groups := gathered(mixed)
	if len(groups) != 2 {
		t.Fatalf("there are %d groups, want one for each connection", len(groups))
	}
	expectSame(t, "first", groups[0].split(t), a)
	expectSame(t, "second", groups[1].split(t), b)
}

// changeInner changes the inner headers and makes all checksums right again.
func changeInner(packet []byte, change func(ip, transport []byte)) {
	w, ok := parse(packet, vxlanPort)
	if !ok {
		panic("no packet of VXLAN")
	}
	ip, transport := packet[w.network:], packet[w.transport:]
	change(ip, transport)
	setIPLength(ip, w.transport-w.network, len(ip))
	at := udpChecksum
	if w.tcp {
		at = tcpChecksum
	}
	binary.BigEndian.PutUint16(transport[at:], 0)
	binary.BigEndian.PutUint16(transport[at:], notZero(^add(pseudo(ip, w.protocol(), len(transport)), sum(transport))))
	udp := packet[w.outer:w.network]
	if binary.BigEndian.Uint16(udp[udpChecksum:]) != 0 {
		binary.BigEndian.PutUint16(udp[udpChecksum:], 0)
		binary.BigEndian.PutUint16(udp[udpChecksum:], notZero(^add(pseudo(packet, protocolUDP, len(packet)-w.outer), sum(packet[w.outer:]))))
	}
}

// TestWhatStaysApart changes the second of three packets so that it must cross as it is. None may get lost, nor overtake another of its flow.
func TestWhatStaysApart(t *testing.T) {
	inner := func(change func(ip, transport []byte)) func(p []byte) {
		return func(p []byte) { changeInner(p, change) }
	}
	for _, c := range []struct {
		name   string
		udp    bool
		change func(p []byte)
		groups int
	}{
		{"nothing", false, func(p []byte) {}, 1},
		{"a gap in the sequence", false, inner(func(ip, tcp []byte) { tcp[7] += 8 }), 3},
		{"another acknowledgement", false, inner(func(ip, tcp []byte) { tcp[11]++ }), 3},
		{"another window", false, inner(func(ip, tcp []byte) { tcp[15]++ }), 3},
		{"SYN", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= 2 }), 3},
		{"FIN", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= tcpFIN }), 3},
		{"RST", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= 4 }), 3},
		{"URG", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= 0x20 }), 3},
		{"CWR", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= tcpCWR }), 3},
		{"PSH, which ends a group", false, inner(func(ip, tcp []byte) { tcp[tcpFlags] |= tcpPSH }), 2},
		{"another TTL", false, inner(func(ip, tcp []byte) { ip[8]-- }), 3},
		{"another traffic class", false, inner(func(ip, tcp []byte) { ip[1] |= 1 }), 3},
		{"a fragment", false, inner(func(ip, tcp []byte) { ip[6] |= 0x20 }), 3},
		{"another VNI", false, func(p []byte) { p[20+8+6]++ }, 3},
		{"a reserved bit of VXLAN", false, func(p []byte) { p[20+8] |= 1 }, 3},
		{"another MAC", false, func(p []byte) { p[20+8+8]++ }, 3},
		{"another outer port", false, func(p []byte) { p[20+3]++ }, 3},
		{"another outer source port", false, func(p []byte) { p[20+1]++ }, 3},
		{"another outer address", false, func(p []byte) { p[19]++; setIPLength(p, 20, len(p)) }, 3},
		{"a wrong checksum of TCP", false, func(p []byte) { p[len(p)-1]++ }, 3},
		{"a wrong checksum of the inner IP header", false, func(p []byte) { p[50+10]++ }, 3},
		{"a wrong checksum of the outer IP header", false, func(p []byte) { p[10]++ }, 3},
		{"a wrong outer UDP checksum", false, func(p []byte) { p[26] = 1 }, 3},
		{"UDP", true, func(p []byte) {}, 1},
		{"UDP without a checksum", true, func(p []byte) { p[50+20+6], p[50+20+7] = 0, 0 }, 3},
		{"UDP with a wrong checksum", true, func(p []byte) { p[50+20+7] ^= 1 }, 3},
		{"UDP to another port", true, inner(func(ip, udp []byte) { udp[3]++ }), 2},
	} {
		l := tcpPacket(4, 3*1300, 1300, tcpACK, nil)
		if c.udp {
			l = udpPacket(4, 3*1200, 1200)
		}
		packets := wirePackets(t, 4, l)
		c.change(packets[1])
		groups := gathered(packets)
		if len(groups) != c.groups {
			t.Errorf("%s: there are %d groups, want %d", c.name, len(groups), c.groups)
		}
		expectOrder(t, c.name, groups, packets)
	}
}

// TestIdentificationsCount has packets that may be fragmented, which are put together only if splitting counts their identifications the same.
func TestIdentificationsCount(t *testing.T) {
	for _, step := range []byte{1, 2} {
		packets := wirePackets(t, 4, tcpPacket(4, 3*1300, 1300, tcpACK, nil))
		for i, p := range packets {
			changeInner(p, func(ip, tcp []byte) { ip[5], ip[6] = byte(i)*step, 0 })
		}
		if got, want := len(gathered(packets)) == 1, step == 1; got != want {
			t.Errorf("with identifications %d apart, they are put together: %v, want %v", step, got, want)
		}
	}
}

// expectOrder expects every packet in the groups, those of a flow in the order in which they came.
func expectOrder(t testing.TB, about string, groups []group, packets [][]byte) {
	t.Helper()
	place := map[*byte]int{}
	for i, p := range packets {
		place[&p[0]] = i
	}
	last := map[uint64]int{}
	for i := range groups {
		for _, p := range groups[i].packets {
			at, there := place[&p[0]]
			if !there {
				t.Fatalf("%s: a packet is there twice, or was never given", about)
			}
			delete(place, &p[0])
			if w, ok := parse(p, vxlanPort); ok {
				if before, seen := last[w.flow]; seen && before > at {
					t.Errorf("%s: packet %d overtakes packet %d of its flow", about, at, before)
				}
				last[w.flow] = at
			}
		}
	}
	if len(place) > 0 {
		t.Errorf("%s: %d packets were lost", about, len(place))
	}
}

// TestShortLastPacketEndsGroup has a packet shorter than the first, after which nothing may follow.
func TestShortLastPacketEndsGroup(t *testing.T) {
	packets := slices.Concat(wirePackets(t, 4, udpPacket(4, 3000, 1200)), wirePackets(t, 4, udpPacket(4, 3000, 1200)))
	groups := gathered(packets)
	if len(groups) != 2 || len(groups[0].packets) != 3 || len(groups[1].packets) != 3 {
		t.Errorf("there are %d groups, want two of 3 packets", len(groups))
	}
}

// TestBatchAfterBatch has the memory of a batch used again for the next.
func TestBatchAfterBatch(t *testing.T) {
	c := coalescer{port: vxlanPort}
	for range 3 {
		for _, l := range largePackets() {
			packets := wirePackets(t, 6, l)
			for _, p := range packets {
				c.add(p)
			}
			var again [][]byte
			for i := range c.groups {
				again = append(again, c.groups[i].split(t)...)
			}
			expectSame(t, l.name, again, packets)
			c.reset()
		}
	}
}
