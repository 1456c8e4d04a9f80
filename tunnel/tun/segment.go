package tun

import (
	"encoding/binary"
	"errors"
)

// Lengths of headers without options, in bytes.
const (
	ipv4HeaderLength     = 20
	ipv6HeaderLength     = 40
	udpHeaderLength      = 8
	tcpHeaderLength      = 20
	vxlanHeaderLength    = 8
	ethernetHeaderLength = 14
)

// Offsets of fields, in bytes.
const (
	tcpSequence = 4
	tcpFlags    = 13
	tcpChecksum = 16
	udpLength   = 4
	udpChecksum = 6
)

// Flags of TCP.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpCWR = 0x80
)

const (
	protocolTCP = 6
	protocolUDP = 17
)

var (
	errMalformed = errors.New("the kernel's description does not fit the packet")
	errTooLarge  = errors.New("larger than the MTU")
)

// segments are the packets for the wire that one packet of the kernel's is split into, in the way that Linux's own software does it
// (net/core/gso.c, skb_udp_tunnel_segment, tcp_gso_segment, __udp_gso_segment).
type segments struct {
	packet    []byte // with all headers, and the payload of all
	next      int    // where the payload of the next packet begins; len(packet): all are done
	index     uint16 // of the next packet
	size      int    // payload of a packet
	headers   int    // length of all headers
	tunnel    bool
	checked   bool // the outer UDP header has a checksum
	outer     int  // offset of the outer UDP header
	network   int  // offset of the inner IP header
	transport int  // offset of the inner transport header; 0: the packet is one already
	tcp       bool
	pseudo    uint16 // the inner pseudo header's sum less the length
}

// load takes a packet with its header from the kernel. Nothing of it has to be right. The packet must stay until all segments are
// taken. No segment will be longer than mtu bytes.
func (s *segments) load(h header, packet []byte, mtu int) error {
	*s = segments{packet: packet}
	if h.gsoType == gsoNone {
		if len(packet) > mtu {
			return s.refuse(errTooLarge)
		}
		if h.flags&needsChecksum != 0 && !completeChecksum(packet, int(h.checksumStart), int(h.checksumOffset)) {
			return s.refuse(errMalformed)
		}
		s.headers = len(packet)
		return nil
	}
	if !s.describe(h) {
		return s.refuse(errMalformed)
	}
	if s.headers+min(s.size, len(packet)-s.headers) > mtu {
		return s.refuse(errTooLarge)
	}
	return nil
}

// refuse leaves no segments.
func (s *segments) refuse(err error) error {
	*s = segments{}
	return err
}

// describe checks what the header says of a packet that is to be split, and notes it.
func (s *segments) describe(h header) bool {
	packet, kind := s.packet, h.gsoType&^(gsoTunnel|gsoECN)
	if h.flags&needsChecksum == 0 || h.gsoSize == 0 || len(packet) > 0xffff {
		return false
	}
	s.size, s.transport = int(h.gsoSize), int(h.checksumStart)
	if h.gsoType&gsoTunnel != 0 {
		s.tunnel, s.checked = true, h.flags&tunnelChecksum != 0
		s.outer, s.network = int(h.outerTransport), int(h.innerNetwork)
		if s.network < s.outer+udpHeaderLength || !isIP(packet, 0, s.outer) || (packet[0]>>4 == 6) != (h.gsoType&gsoTunnel == gsoTunnel6) {
			return false
		}
	}
	if !isIP(packet, s.network, s.transport) {
		return false
	}
	s.tcp = kind == gsoTCP4 || kind == gsoTCP6
	version, length, checksum := packet[s.network]>>4, udpHeaderLength, udpChecksum
	switch {
	case s.tcp && (version == 6) == (kind == gsoTCP6):
		if len(packet) < s.transport+tcpHeaderLength {
			return false
		}
		length, checksum = int(packet[s.transport+12]>>4)*4, tcpChecksum
	case kind != gsoUDP:
		return false
	}
	s.headers = s.transport + length
	s.next = s.headers
	if s.tcp && length < tcpHeaderLength || len(packet) <= s.headers || int(h.checksumOffset) != checksum {
		return false
	}
	// The kernel has the pseudo header's sum there, with the length of the whole.
	s.pseudo = add(binary.BigEndian.Uint16(packet[s.transport+checksum:]), ^uint16(len(packet)-s.transport))
	return true
}

// isIP tells whether an IP header of the packet is between two offsets, with an IPv4 header's length as it says. Behind an IPv6 header may be
// extension headers.
func isIP(packet []byte, from, to int) bool {
	if from >= to || to > len(packet) {
		return false
	}
	switch packet[from] >> 4 {
	case 4:
		return to-from >= ipv4HeaderLength && to-from == int(packet[from]&0xf)*4
	case 6:
		return to-from >= ipv6HeaderLength
	}
	return false
}

// more tells whether take has another segment.
func (s *segments) more() bool {
	if s.transport == 0 {
		return len(s.packet) > 0
	}
	return s.next < len(s.packet)
}

// length is that of the next segment, in bytes.
func (s *segments) length() int {
	if s.transport == 0 {
		return len(s.packet)
	}
	return s.headers + min(s.size, len(s.packet)-s.next)
}

// take writes the next segment into dst, which has room for length bytes.
func (s *segments) take(dst []byte) {
	if s.transport == 0 {
		copy(dst, s.packet)
		s.packet = nil
		return
	}
	length := s.length()
	dst = dst[:length]
	copy(dst, s.packet[:s.headers])
	copy(dst[s.headers:], s.packet[s.next:s.next+length-s.headers])
	first, last := s.index == 0, s.next+length-s.headers == len(s.packet)

	s.setNetwork(dst[s.network:], s.transport-s.network)
	if s.tcp {
		tcp := dst[s.transport:]
		binary.BigEndian.PutUint32(tcp[tcpSequence:], binary.BigEndian.Uint32(tcp[tcpSequence:])+uint32(s.next-s.headers))
		if !first {
			tcp[tcpFlags] &^= tcpCWR
		}
		if !last {
			tcp[tcpFlags] &^= tcpFIN | tcpPSH
		}
		s.setChecksum(tcp, tcpChecksum)
	} else {
		udp := dst[s.transport:]
		binary.BigEndian.PutUint16(udp[udpLength:], uint16(len(udp)))
		s.setChecksum(udp, udpChecksum)
	}
	if s.tunnel {
		s.setTunnel(dst)
	}
	s.next += length - s.headers
	s.index++
}

// setNetwork finishes an IP header of a segment. IPv4's identifications count up, as the kernel has reserved them.
func (s *segments) setNetwork(ip []byte, headerLength int) {
	if ip[0]>>4 == 4 {
		binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+s.index)
	}
	setIPLength(ip, headerLength, len(ip))
}

// setChecksum sets the checksum of the inner transport header.
func (s *segments) setChecksum(transport []byte, offset int) {
	binary.BigEndian.PutUint16(transport[offset:], 0)
	checksum := ^add(add(s.pseudo, uint16(len(transport))), sum(transport))
	if !s.tcp {
		checksum = notZero(checksum)
	}
	binary.BigEndian.PutUint16(transport[offset:], checksum)
}

// setTunnel finishes the outer headers of a segment.
func (s *segments) setTunnel(packet []byte) {
	s.setNetwork(packet, s.outer)
	udp := packet[s.outer:]
	binary.BigEndian.PutUint16(udp[udpLength:], uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[udpChecksum:], 0)
	if s.checked {
		binary.BigEndian.PutUint16(udp[udpChecksum:], notZero(^add(pseudo(packet, protocolUDP, len(udp)), sum(udp))))
	}
}

// completeChecksum makes the checksum of the pseudo header alone, which is at start+offset, one of what follows start too. It returns
// false if that is not within the packet.
func completeChecksum(packet []byte, start, offset int) bool {
	if start+offset+2 > len(packet) {
		return false
	}
	// The sum over the field itself adds the pseudo header's.
	checksum := ^sum(packet[start:])
	binary.BigEndian.PutUint16(packet[start+offset:], notZero(checksum))
	return true
}
