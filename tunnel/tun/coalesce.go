package tun

import "encoding/binary"

// Bounds of what is put together.
const (
	// maxPacket is the largest IP packet, in bytes.
	maxPacket = 0xffff
	// maxSegments is how many packets of UDP the kernel takes as one (UDP_MAX_SEGMENTS of older kernels).
	maxSegments = 64
)

// group is some packets that the kernel gets as one.
type group struct {
	first   wire
	packets [][]byte // first's included
	length  int      // of the packet put together, in bytes
	open    bool     // more may follow
	checked bool     // first's checksums are right
}

// coalescer puts the packets of a batch together. Packets of one flow stay in their order.
type coalescer struct {
	port   uint16 // of VXLAN
	groups []group
}

// reset forgets the packets of the last batch, and keeps the memory.
func (c *coalescer) reset() {
	for i := range c.groups {
		clear(c.groups[i].packets)
		c.groups[i].packets = c.groups[i].packets[:0]
		c.groups[i].first = wire{}
	}
	c.groups = c.groups[:0]
}

// add takes the next packet of the batch. It must stay as it is until reset.
func (c *coalescer) add(packet []byte) {
	w, known := parse(packet, c.port)
	if !known {
		c.begin(w).open = false
		return
	}
	if g := c.find(w.flow); g != nil {
		if g.join(&w) {
			return
		}
		// What comes later must not overtake this packet, so nothing joins what was before it.
		g.open = false
	}
	g := c.begin(w)
	g.open = w.joins && !(w.tcp && w.flags()&tcpPSH != 0)
}

// find returns the group that a packet of the flow may join, or nil.
func (c *coalescer) find(flow uint64) *group {
	for i := len(c.groups) - 1; i >= 0; i-- {
		if g := &c.groups[i]; g.open && g.first.flow == flow {
			return g
		}
	}
	return nil
}

// begin makes a group of one packet.
func (c *coalescer) begin(w wire) *group {
	if len(c.groups) < cap(c.groups) {
		c.groups = c.groups[:len(c.groups)+1]
	} else {
		c.groups = append(c.groups, group{})
	}
	g := &c.groups[len(c.groups)-1]
	*g = group{first: w, packets: append(g.packets[:0], w.packet), length: len(w.packet)}
	return g
}

// join takes the packet as the last of the group, if it is the one that follows.
func (g *group) join(w *wire) bool {
	payload, size, n := len(w.packet)-w.headers, len(g.first.payload()), len(g.packets)
	if !w.joins || payload > size || g.length+payload > maxPacket || n == maxSegments || !w.follows(&g.first, n) {
		return false
	}
	if w.tcp && w.sequence() != g.first.sequence()+uint32(n*size) {
		return false
	}
	if !g.checked && !g.first.valid() || !w.valid() {
		return false // The kernel looks at each by itself, and drops what is wrong.
	}
	g.checked = true
	g.packets = append(g.packets, w.packet)
	g.length += payload
	g.open = payload == size && !(w.tcp && w.flags()&tcpPSH != 0)
	return true
}

// build appends the header for the kernel and all headers of the packet put together to dst. Then follow the payloads of all packets.
func (g *group) build(dst []byte) []byte {
	dst = append(dst, make([]byte, headerSize)...)
	begin := len(dst)
	dst = append(dst, g.first.packet[:g.first.headers]...)
	w, packet := &g.first, dst[begin:]

	h := header{
		flags: needsChecksum, gsoType: gsoTunnel4, headers: uint16(w.headers), gsoSize: uint16(len(w.payload())),
		checksumStart: uint16(w.transport), outerTransport: uint16(w.outer), innerNetwork: uint16(w.network),
	}
	if packet[0]>>4 == 6 {
		h.gsoType = gsoTunnel6
	}
	g.buildOuter(packet, &h)
	g.buildInner(packet[w.network:], &h)
	h.encode(dst[begin-headerSize:])
	return dst
}

// buildOuter makes the outer headers those of the whole. A checksum is left to be completed, as the kernel expects it.
func (g *group) buildOuter(packet []byte, h *header) {
	setIPLength(packet, g.first.outer, g.length)
	udp, length := packet[g.first.outer:], g.length-g.first.outer
	binary.BigEndian.PutUint16(udp[udpLength:], uint16(length))
	if binary.BigEndian.Uint16(udp[udpChecksum:]) != 0 {
		h.flags |= tunnelChecksum
		binary.BigEndian.PutUint16(udp[udpChecksum:], notZero(pseudo(packet, protocolUDP, length)))
	}
}

// buildInner makes the inner headers those of the whole; ip begins with the IP header.
func (g *group) buildInner(ip []byte, h *header) {
	w := &g.first
	headerLength, length := w.transport-w.network, g.length-w.transport
	setIPLength(ip, headerLength, g.length-w.network)
	transport := ip[headerLength:]
	if !w.tcp {
		h.gsoType |= gsoUDP
		h.checksumOffset = udpChecksum
		binary.BigEndian.PutUint16(transport[udpLength:], uint16(length))
		binary.BigEndian.PutUint16(transport[udpChecksum:], pseudo(ip, protocolUDP, length))
		return
	}
	h.gsoType |= gsoTCP4
	if ip[0]>>4 == 6 {
		h.gsoType = h.gsoType&^gsoTCP4 | gsoTCP6
	}
	h.checksumOffset = tcpChecksum
	last := g.packets[len(g.packets)-1]
	transport[tcpFlags] |= last[w.transport+tcpFlags] & tcpPSH
	binary.BigEndian.PutUint16(transport[tcpChecksum:], pseudo(ip, protocolTCP, length))
}
