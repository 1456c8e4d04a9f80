package datapath_test

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// packet is an Ethernet frame with IPv4 or IPv6, as its source is, and UDP, whose zero fields are filled in with what a well-behaved sender writes.
type packet struct {
	srcMAC, dstMAC string
	etherType      uint16
	src, dst       netip.Addr
	ttl            uint8
	protocol       uint8
	srcPort        uint16
	dstPort        uint16
	payload        []byte
}

func (p packet) bytes() []byte {
	if p.etherType == 0 {
		p.etherType = etherType(p.src)
	}
	if p.ttl == 0 {
		p.ttl = 64
	}
	if p.protocol == 0 {
		p.protocol = 17
	}
	var b []byte
	b = append(b, mac(p.dstMAC)...)
	b = append(b, mac(p.srcMAC)...)
	b = binary.BigEndian.AppendUint16(b, p.etherType)
	if p.src.Is6() {
		return append(b, p.ipv6()...)
	}
	return append(b, p.ipv4()...)
}

func (p packet) ipv4() []byte {
	length := 28 + len(p.payload)
	b := []byte{0x45, 0, byte(length >> 8), byte(length), 0, 0, 0x40, 0, p.ttl, p.protocol, 0, 0}
	b = append(b, p.src.AsSlice()...)
	b = append(b, p.dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, p.udp()...) // The checksum may be left out over IPv4.
}

func (p packet) ipv6() []byte {
	udp := p.udp()
	b := []byte{0x60, 0, 0, 0, byte(len(udp) >> 8), byte(len(udp)), p.protocol, p.ttl}
	b = append(b, p.src.AsSlice()...)
	b = append(b, p.dst.AsSlice()...)
	binary.BigEndian.PutUint16(udp[6:], checksum(pseudoHeader(p.src, p.dst, udp)))
	return append(b, udp...)
}

func (p packet) udp() []byte {
	b := binary.BigEndian.AppendUint16(nil, p.srcPort)
	b = binary.BigEndian.AppendUint16(b, p.dstPort)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(p.payload)))
	b = append(b, 0, 0)
	return append(b, p.payload...)
}

// pseudoHeader is what the checksum of UDP is over (RFC 8200, section 8.1); with a right one it is 0.
func pseudoHeader(src, dst netip.Addr, udp []byte) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(udp)))
	b = append(append(b, 0, 0, 0, 17), udp...)
	if len(udp)%2 != 0 {
		b = append(b, 0)
	}
	return b
}

// etherType is that of the address's family.
func etherType(a netip.Addr) uint16 {
	if a.Is6() {
		return 0x86dd
	}
	return 0x0800
}

// headerLen is the length of an IP header of the address's family, in bytes.
func headerLen(a netip.Addr) int {
	if a.Is6() {
		return 40
	}
	return 20
}

// hopsAt is where the TTL or hop limit is in a frame of the address's family.
func hopsAt(a netip.Addr) int {
	if a.Is6() {
		return 14 + 7
	}
	return 14 + 8
}

func mac(s string) net.HardwareAddr {
	if s == "" {
		s = "02:00:00:00:00:01"
	}
	hw, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return hw
}

// checksum is that of RFC 1071; over a header with a right one it is 0.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// vxlan prepends the header of RFC 7348.
func vxlan(vni uint32, frame []byte) []byte {
	return append([]byte{8, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}, frame...)
}

// fragments cuts an IP packet without Ethernet header, each piece but the last with so many bytes of it, a multiple of 8.
func fragments(ip []byte, size int) (pieces [][]byte) {
	header := 20
	if ip[0]>>4 == 6 {
		header = 40
	}
	for body, offset := ip[header:], 0; offset < len(body); offset += size {
		piece, more := body[offset:min(offset+size, len(body))], offset+size < len(body)
		if header == 20 {
			pieces = append(pieces, fragment4(ip[:20], piece, offset, more))
		} else {
			pieces = append(pieces, fragment6(ip[:40], piece, offset, more))
		}
	}
	return pieces
}

func fragment4(header, piece []byte, offset int, more bool) []byte {
	b := append([]byte{}, header...)
	flags := uint16(offset / 8)
	if more {
		flags |= 0x2000
	}
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(piece)))
	binary.BigEndian.PutUint16(b[4:], 0x1234)
	binary.BigEndian.PutUint16(b[6:], flags)
	binary.BigEndian.PutUint16(b[10:], 0)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, piece...)
}

func fragment6(header, piece []byte, offset int, more bool) []byte {
	b := append([]byte{}, header...)
	flags := uint16(offset)
	if more {
		flags |= 1
	}
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(piece)))
	b[6] = 44
	b = append(b, header[6], 0, byte(flags>>8), byte(flags), 0, 0, 0x12, 0x34)
	return append(b, piece...)
}
