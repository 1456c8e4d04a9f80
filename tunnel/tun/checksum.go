package tun

import (
	"encoding/binary"
	"math/bits"
)

// sum returns the ones' complement sum of b as words in network order (RFC 1071), not complemented. What is summed up in parts must be so in
// parts of even length, but for the last.
func sum(b []byte) uint16 {
	// The sum does not depend on the order of bytes, but for being swapped itself: so words are loaded as they are, eight bytes at a time.
	le := binary.LittleEndian
	var s, carry uint64
	for len(b) >= 64 {
		s, carry = bits.Add64(s, le.Uint64(b[0:8]), 0)
		s, carry = bits.Add64(s, le.Uint64(b[8:16]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[16:24]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[24:32]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[32:40]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[40:48]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[48:56]), carry)
		s, carry = bits.Add64(s, le.Uint64(b[56:64]), carry)
		s += carry
		b = b[64:]
	}
	for len(b) >= 8 {
		s, carry = bits.Add64(s, le.Uint64(b[0:8]), 0)
		s += carry
		b = b[8:]
	}
	if len(b) > 0 {
		var rest [8]byte
		copy(rest[:], b)
		s, carry = bits.Add64(s, le.Uint64(rest[:]), 0)
		s += carry
	}
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return bits.ReverseBytes16(uint16(s))
}

// add returns the ones' complement sum of two.
func add(a, b uint16) uint16 {
	s := uint32(a) + uint32(b)
	return uint16(s>>16 + s&0xffff)
}

// notZero makes a checksum of 0, which means none in UDP, its other representation.
func notZero(checksum uint16) uint16 {
	if checksum == 0 {
		return 0xffff
	}
	return checksum
}

// pseudo returns the sum of the pseudo header of TCP or UDP in the IP header at the begin of b, which has no options or extension
// headers; length is that of the transport header and what follows.
func pseudo(ip []byte, protocol byte, length int) uint16 {
	addresses := ip[12:20]
	if ip[0]>>4 == 6 {
		addresses = ip[8:40]
	}
	return add(add(sum(addresses), uint16(protocol)), uint16(length))
}

// setIPLength makes an IP packet's header say that it is length bytes long in all, and sets the checksum of an IPv4 header of headerLength bytes.
func setIPLength(ip []byte, headerLength, length int) {
	if ip[0]>>4 == 6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(length-ipv6HeaderLength))
		return
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(length))
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip[:headerLength]))
}
