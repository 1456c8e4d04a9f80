package datapath

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"

	"golang.org/x/sys/unix"
)

// echoMessageSize is that of an echo's message, in bytes.
var echoMessageSize = binary.Size(bpfEchoMessage{})

const (
	udpHeader = 8
	echoHops  = 64 // TTL or hop limit of requests
)

// family is what is different between echoes of the two address families.
type family struct {
	name      string
	etherType uint16
	headers   int // what precedes the message in the IP packet, in bytes: IP without options, and UDP
}

func echoFamily(a netip.Addr) family {
	if a.Unmap().Is4() {
		return family{"IPv4", unix.ETH_P_IP, 20 + udpHeader}
	}
	return family{"IPv6", unix.ETH_P_IPV6, 40 + udpHeader}
}

// echoRequest makes the IP packet of a request, with so many bytes, as bpf/lib/echo.h has it. What follows the message is zeros.
func echoRequest(from netip.AddrPort, to netip.Addr, nonce uint64, size int) ([]byte, error) {
	f := echoFamily(to)
	if size < f.headers+echoMessageSize || size > math.MaxUint16 {
		return nil, fmt.Errorf("an echo of %d bytes is not possible", size)
	}
	packet := echoHeader(from.Addr(), to, size)
	udp := len(packet)
	packet = binary.BigEndian.AppendUint16(packet, from.Port())
	packet = binary.BigEndian.AppendUint16(packet, uint16(bpfEchoPortECHO_PORT))
	packet = binary.BigEndian.AppendUint16(packet, uint16(size-udp))
	packet = append(packet, 0, 0)
	packet, err := binary.Append(packet, binary.NativeEndian, bpfEchoMessage{
		Magic: [8]uint8([]byte("causeway")), Type: uint8(bpfEchoTypeECHO_REQUEST), OtherType: uint8(bpfEchoTypeECHO_REPLY), Nonce: nonce,
	})
	if err != nil {
		return nil, err
	}
	packet = append(packet, make([]byte, size-len(packet))...)
	if to.Is6() { // Without it over IPv4, as RFC 768 allows.
		binary.BigEndian.PutUint16(packet[udp+6:], udpChecksum(from.Addr(), to, packet[udp:]))
	}
	return packet, nil
}

// echoHeader makes the IP header (RFC 791, RFC 8200) of a packet of UDP that is never to be fragmented.
func echoHeader(from, to netip.Addr, size int) []byte {
	if to.Is6() {
		h := []byte{0x60, 0, 0, 0, byte((size - 40) >> 8), byte(size - 40), unix.IPPROTO_UDP, echoHops}
		return append(append(h, from.AsSlice()...), to.AsSlice()...)
	}
	h := []byte{0x45, 0, byte(size >> 8), byte(size), 0, 0, 0x40, 0, echoHops, unix.IPPROTO_UDP, 0, 0}
	h = append(append(h, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], onesComplement(h))
	return h
}

// udpChecksum is that of RFC 8200, section 8.1: a result of 0 is sent as 0xffff.
func udpChecksum(from, to netip.Addr, udp []byte) uint16 {
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(udp)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_UDP)
	if sum := onesComplement(append(pseudo, udp...)); sum != 0 {
		return sum
	}
	return 0xffff
}

// onesComplement is the checksum of RFC 1071.
func onesComplement(b []byte) uint16 {
	if len(b)%2 != 0 {
		b = append(b[:len(b):len(b)], 0)
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
