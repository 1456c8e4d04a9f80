package datapath_test

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// packet is an Ethernet frame with IPv4 and UDP, whose zero fields are filled in with what a well-behaved sender writes.
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
		p.etherType = 0x0800
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
	return append(b, p.ipv4()...)
}

func (p packet) ipv4() []byte {
	length := 28 + len(p.payload)
	b := []byte{0x45, 0, byte(length >> 8), byte(length), 0, 0, 0x40, 0, p.ttl, p.protocol, 0, 0}
	b = append(b, p.src.AsSlice()...)
	b = append(b, p.dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	b = binary.BigEndian.AppendUint16(b, p.srcPort)
	b = binary.BigEndian.AppendUint16(b, p.dstPort)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(p.payload)))
	b = append(b, 0, 0) // The checksum may be left out over IPv4.
	return append(b, p.payload...)
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
