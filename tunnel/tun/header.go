package tun

import "encoding/binary"

// headerSize is that of struct virtio_net_hdr_v1_hash_tunnel, which is before every packet of the device (linux/virtio_net.h). Its first
// ten bytes are struct virtio_net_hdr, so kernels that know no tunnels use the same, with zeros behind.
const headerSize = 24

// Values of the header's flags.
const (
	needsChecksum  = 1 // the checksum at checksumStart+checksumOffset is of the pseudo header alone
	tunnelChecksum = 8 // the outer UDP header has a checksum
)

// Values of the header's gsoType: what a packet is to be split into, and tunnels as bits besides.
const (
	gsoNone         = 0
	gsoTCP4         = 1
	gsoTCP6         = 4
	gsoUDP          = 5
	gsoTunnel4      = 0x20 // the outer IP header is IPv4
	gsoTunnel6      = 0x40
	gsoTunnel       = gsoTunnel4 | gsoTunnel6
	gsoECN     byte = 0x80 // the first packet alone has TCP's CWR
)

// header says what has yet to be done to a packet. Offsets are in bytes from the packet's begin, which is its outer IP header.
type header struct {
	flags          byte
	gsoType        byte
	headers        uint16 // length of all headers; a hint
	gsoSize        uint16 // payload of each packet but the last, in bytes
	checksumStart  uint16 // where the innermost transport header is
	checksumOffset uint16 // of the checksum in that
	outerTransport uint16
	innerNetwork   uint16
}

// decodeHeader reads a header; b has headerSize bytes.
func decodeHeader(b []byte) header {
	le := binary.LittleEndian
	return header{
		flags: b[0], gsoType: b[1], headers: le.Uint16(b[2:]), gsoSize: le.Uint16(b[4:]), checksumStart: le.Uint16(b[6:]),
		checksumOffset: le.Uint16(b[8:]), outerTransport: le.Uint16(b[20:]), innerNetwork: le.Uint16(b[22:]),
	}
}

// encode writes the header into b, which has headerSize bytes.
func (h header) encode(b []byte) {
	le := binary.LittleEndian
	clear(b[:headerSize])
	b[0], b[1] = h.flags, h.gsoType
	le.PutUint16(b[2:], h.headers)
	le.PutUint16(b[4:], h.gsoSize)
	le.PutUint16(b[6:], h.checksumStart)
	le.PutUint16(b[8:], h.checksumOffset)
	le.PutUint16(b[20:], h.outerTransport)
	le.PutUint16(b[22:], h.innerNetwork)
}
