package tun

import (
	"bytes"
	"encoding/binary"
)

// wire is what is known of a packet from the wire that is VXLAN around TCP or UDP, everything without options but TCP.
type wire struct {
	packet    []byte
	flow      uint64 // the same in all packets of a flow, and rarely in those of others
	outer     int    // offset of the outer UDP header
	network   int    // offset of the inner IP header
	transport int    // offset of the inner transport header
	headers   int    // length of all headers
	tcp       bool
	joins     bool // is of the plain kind that is put together with others
}

// payload is that of the inner transport protocol.
func (w *wire) payload() []byte { return w.packet[w.headers:] }

// flags are TCP's.
func (w *wire) flags() byte { return w.packet[w.transport+tcpFlags] }

// sequence is TCP's.
func (w *wire) sequence() uint32 {
	return binary.BigEndian.Uint32(w.packet[w.transport+tcpSequence:])
}

// parse reads the headers of a packet. It returns false for all that is not TCP or UDP in VXLAN to the port in the plainest form.
func parse(packet []byte, port uint16) (w wire, ok bool) {
	w.packet = packet
	var protocol byte
	if w.outer, protocol = parseIP(packet); protocol != protocolUDP {
		return w, false
	}
	w.network = w.outer + udpHeaderLength + vxlanHeaderLength + ethernetHeaderLength
	if len(packet) < w.network {
		return w, false
	}
	udp := packet[w.outer:]
	vxlan, ethernet := udp[udpHeaderLength:], udp[udpHeaderLength+vxlanHeaderLength:]
	// All of VXLAN's bits but that of a valid VNI are reserved (RFC 7348, section 5).
	if binary.BigEndian.Uint16(udp[2:]) != port || !udpFits(udp) || binary.BigEndian.Uint32(vxlan) != 0x08000000 || vxlan[7] != 0 {
		return w, false
	}
	inner := packet[w.network:]
	length, protocol := parseIP(inner)
	if length == 0 || binary.BigEndian.Uint16(ethernet[12:]) != etherType(inner[0]>>4) {
		return w, false
	}
	w.transport = w.network + length
	if !w.parseTransport(protocol) {
		return w, false
	}
	ports := binary.BigEndian.Uint32(packet[w.transport:])
	w.flow = uint64(binary.BigEndian.Uint16(udp))<<32 ^ uint64(binary.BigEndian.Uint32(vxlan[4:]))<<24 ^ uint64(ports)
	return w, true
}

// parseTransport notes where the payload begins, and whether the packet is one that can be put together with others.
func (w *wire) parseTransport(protocol byte) bool {
	transport := w.packet[w.transport:]
	switch protocol {
	case protocolTCP:
		if len(transport) < tcpHeaderLength {
			return false
		}
		length := int(transport[12]>>4) * 4
		if length < tcpHeaderLength || length > len(transport) {
			return false
		}
		w.tcp, w.headers = true, w.transport+length
		w.joins = transport[12]&0xf == 0 && transport[tcpFlags]&^tcpPSH == tcpACK && len(transport) > length
	case protocolUDP:
		if len(transport) < udpHeaderLength || !udpFits(transport) {
			return false
		}
		w.headers = w.transport + udpHeaderLength
		// A packet without a checksum would get one when it is split again.
		w.joins = len(transport) > udpHeaderLength && binary.BigEndian.Uint16(transport[udpChecksum:]) != 0
	default:
		return false
	}
	return true
}

// udpFits tells whether a UDP header says that it and its payload are as long as they are.
func udpFits(udp []byte) bool { return int(binary.BigEndian.Uint16(udp[udpLength:])) == len(udp) }

func etherType(ipVersion byte) uint16 {
	if ipVersion == 6 {
		return 0x86dd
	}
	return 0x0800
}

// parseIP returns the length of the packet's IP header and what it carries; 0 if it has options, is a fragment, or does not say that the packet is as
// long as it is.
func parseIP(b []byte) (length int, protocol byte) {
	switch {
	case len(b) >= ipv4HeaderLength && b[0] == 0x45:
		fragment := binary.BigEndian.Uint16(b[6:])&^0x4000 != 0 // all but "don't fragment"
		if fragment || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
			return 0, 0
		}
		return ipv4HeaderLength, b[9]
	case len(b) >= ipv6HeaderLength && b[0]>>4 == 6:
		if int(binary.BigEndian.Uint16(b[4:])) != len(b)-ipv6HeaderLength {
			return 0, 0
		}
		return ipv6HeaderLength, b[6]
	}
	return 0, 0
}

// follows tells whether the headers of a packet are those of first but for what differs from packet to packet of one large one: lengths,
// checksums, IPv4's identification, TCP's sequence and PSH. n is how many packets after first it is.
func (w *wire) follows(first *wire, n int) bool {
	if w.headers != first.headers || w.network != first.network || w.transport != first.transport || w.tcp != first.tcp {
		return false
	}
	a, b := first.packet, w.packet
	udpA, udpB := a[w.outer:w.network], b[w.outer:w.network]
	checksums := binary.BigEndian.Uint16(udpA[udpChecksum:]) != 0 == (binary.BigEndian.Uint16(udpB[udpChecksum:]) != 0)
	return checksums && sameIP(a, b) && bytes.Equal(udpA[:udpLength], udpB[:udpLength]) && bytes.Equal(udpA[udpHeaderLength:], udpB[udpHeaderLength:]) &&
		sameIP(a[w.network:], b[w.network:]) && counts(a[w.network:], b[w.network:], n) &&
		w.sameTransport(a[w.transport:w.headers], b[w.transport:w.headers])
}

func (w *wire) sameTransport(a, b []byte) bool {
	if !w.tcp {
		return bytes.Equal(a[:udpLength], b[:udpLength])
	}
	return bytes.Equal(a[:tcpSequence], b[:tcpSequence]) && bytes.Equal(a[8:tcpFlags], b[8:tcpFlags]) &&
		bytes.Equal(a[14:tcpChecksum], b[14:tcpChecksum]) && bytes.Equal(a[tcpChecksum+2:], b[tcpChecksum+2:])
}

// sameIP compares two IP headers but for length, identification and checksum.
func sameIP(a, b []byte) bool {
	if a[0]>>4 == 6 {
		return bytes.Equal(a[:4], b[:4]) && bytes.Equal(a[6:ipv6HeaderLength], b[6:ipv6HeaderLength])
	}
	return bytes.Equal(a[:2], b[:2]) && bytes.Equal(a[6:10], b[6:10]) && bytes.Equal(a[12:ipv4HeaderLength], b[12:ipv4HeaderLength])
}

// counts tells whether the identification of an IPv4 packet is n more than the first's, as it will be if they are split again. It
// does not matter in packets that must not be fragmented.
func counts(first, ip []byte, n int) bool {
	if ip[0]>>4 == 6 || ip[6]&0x40 != 0 {
		return true
	}
	return binary.BigEndian.Uint16(ip[4:]) == binary.BigEndian.Uint16(first[4:])+uint16(n)
}

// valid verifies all checksums of the packet.
func (w *wire) valid() bool {
	return validIP(w.packet) && validIP(w.packet[w.network:]) &&
		validTransport(w.packet, w.outer, protocolUDP) && validTransport(w.packet[w.network:], w.transport-w.network, w.protocol())
}

func (w *wire) protocol() byte {
	if w.tcp {
		return protocolTCP
	}
	return protocolUDP
}

func validIP(ip []byte) bool { return ip[0]>>4 == 6 || sum(ip[:ipv4HeaderLength]) == 0xffff }

// validTransport verifies the checksum of TCP or UDP. None is right in UDP.
func validTransport(ip []byte, headerLength int, protocol byte) bool {
	transport := ip[headerLength:]
	if protocol == protocolUDP && binary.BigEndian.Uint16(transport[udpChecksum:]) == 0 {
		return true
	}
	return add(pseudo(ip, protocol, len(transport)), sum(transport)) == 0xffff
}
