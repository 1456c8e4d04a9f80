package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

const clonePath = "/dev/net/tun"

// Offloads of TUNSETOFFLOAD that golang.org/x/sys does not know (linux/if_tun.h).
const (
	offloadUDP4           = 0x20
	offloadUDP6           = 0x40
	offloadTunnel         = 0x80
	offloadTunnelChecksum = 0x100
)

// offload is what the kernel leaves to this device, and takes from it.
type offload struct {
	tunnel bool
	// beyond is added to the offset of the outer transport header that the kernel is told of.
	beyond uint16
}

// attach makes the TUN device, and returns its file descriptor, which does not block.
func attach(name string) (int, error) {
	request, err := unix.NewIfreq(name)
	if err != nil || name == "" || strings.Contains(name, "%") { // With a % the kernel makes up a name.
		return -1, fmt.Errorf("%q is no name for a TUN device: give one of 1 to %d bytes without a %%", name, unix.IFNAMSIZ-1)
	}
	fd, err := unix.Open(clonePath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return -1, fmt.Errorf("the kernel has no TUN devices: load the module tun: %w", err)
	}
	if err != nil {
		return -1, fmt.Errorf("opening %s: %w", clonePath, err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	if err == nil {
		if err = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerSize); err == nil {
			return fd, nil
		}
	}
	unix.Close(fd)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("making TUN device %s: an interface of that name exists, or the name is not one: remove it, or take another: %w", strings.ToValidUTF8(name, "?"), err)
	}
	return -1, fmt.Errorf("making TUN device %s: %w", name, err)
}

// negotiate asks the kernel for as much as it knows: all of it from Linux 6.17 on, UDP from 6.2 on. That every packet comes by itself, with
// all checksums, is what it does otherwise.
func negotiate(fd int) offload {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	const plain = tcp | offloadUDP4 | offloadUDP6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, plain|offloadTunnel|offloadTunnelChecksum) == nil {
		if beyond, ok := probe(fd); ok {
			return offload{tunnel: true, beyond: beyond}
		}
	}
	for _, less := range []int{plain, tcp, unix.TUN_F_CSUM} {
		if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, less) == nil {
			break
		}
	}
	return offload{}
}

// probe finds out how the kernel wants to be told where the outer transport header is. It checks whether there is room for an Ethernet header
// before it, which a TUN device has none of, so the true offset is refused (Linux 6.17 to 6.18 at least, virtio_net_hdr_tnl_to_skb). One that is as
// much larger is taken and does no harm: the kernel finds the outer transport header anew when it receives the packet.
//
// The device is down, so that what passes the check is refused with another error.
func probe(fd int) (beyond uint16, ok bool) {
	packet := probePacket()
	for _, beyond := range []uint16{0, ethernetHeaderLength} {
		o := offload{tunnel: true, beyond: beyond}
		try := append([]byte(nil), packet...)
		o.adapt(try)
		if _, err := unix.Write(fd, try); errors.Is(err, unix.EIO) {
			return beyond, true
		}
	}
	return 0, false
}

// probePacket is two TCP segments in VXLAN put together, between addresses for documentation.
func probePacket() []byte {
	var c coalescer
	c.port = 4789
	for n := range uint32(2) {
		packet := make([]byte, 20+8+8+14+20+20+1)
		packet[0], packet[8], packet[9] = 0x45, 64, protocolUDP
		copy(packet[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2})
		setIPLength(packet, 20, len(packet))
		binary.BigEndian.PutUint16(packet[22:], c.port)
		binary.BigEndian.PutUint16(packet[24:], uint16(len(packet)-20))
		packet[28] = 0x08
		binary.BigEndian.PutUint16(packet[48:], etherType(4))
		inner := packet[50:]
		copy(inner, packet[:20])
		inner[6], inner[9] = 0x40, protocolTCP
		setIPLength(inner, 20, len(inner))
		tcp := inner[20:]
		binary.BigEndian.PutUint32(tcp[tcpSequence:], n)
		tcp[12], tcp[tcpFlags] = 0x50, tcpACK
		binary.BigEndian.PutUint16(tcp[tcpChecksum:], ^add(pseudo(inner, protocolTCP, len(tcp)), sum(tcp)))
		c.add(packet)
	}
	return append(c.groups[0].build(nil), 0, 0)
}

// adapt changes the header of a packet that was put together to what the kernel takes.
func (o offload) adapt(packet []byte) {
	h := decodeHeader(packet)
	h.outerTransport += o.beyond
	h.encode(packet)
}
