package tun

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestSegmentsAreTheKernels sends the same large packets through a VXLAN device over this device twice: so that the kernel splits them, and so
// that this device does. The packets must be the same to the byte.
func TestSegmentsAreTheKernels(t *testing.T) {
	for _, outer := range []struct {
		name         string
		local, other string
		checksum     bool
	}{
		{"outer IPv4", "10.88.0.1", "10.88.0.2", false},
		{"outer IPv4 with checksums", "10.88.0.1", "10.88.0.2", true},
		{"outer IPv6", "fd88::1", "fd88::2", true},
	} {
		t.Run(outer.name, func(t *testing.T) {
			s := newSplitter(t, netip.MustParseAddr(outer.local), netip.MustParseAddr(outer.other), outer.checksum)
			if !s.device.Tunnels() {
				t.Skip("the kernel does not hand over packets of tunnels")
			}
			for _, c := range largePackets() {
				t.Run(c.name, func(t *testing.T) {
					kernel, ours := s.split(t, c, false), s.split(t, c, true)
					compare(t, ours, kernel)
					if len(kernel) != c.segments {
						t.Errorf("the kernel makes %d packets, want %d", len(kernel), c.segments)
					}
				})
			}
		})
	}
}

// large is a packet for the VXLAN device with the kernel's header for it.
type large struct {
	name     string
	header   header
	frame    []byte
	segments int
	ends     bool // has FIN
}

func largePackets() (all []large) {
	for _, family := range []int{4, 6} {
		name := func(s string) string { return fmt.Sprintf("IPv%d %s", family, s) }
		all = append(all,
			tcpPacket(family, 5000, 1300, tcpACK, nil).called(name("TCP")),
			tcpPacket(family, 2600, 1300, tcpACK|tcpPSH, nil).called(name("TCP of two full segments with PSH")),
			tcpPacket(family, 2601, 1300, tcpACK|tcpPSH|tcpFIN, nil).called(name("TCP with FIN and a byte more")),
			tcpPacket(family, 50000, 1201, tcpACK, []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}).called(name("TCP with options and an odd size")),
			tcpPacket(family, 1000, 1300, tcpACK, nil).called(name("TCP in one packet")),
			tcpPacket(family, 3000, 7, tcpACK, nil).called(name("TCP of very small segments")),
			udpPacket(family, 9*1200+77, 1200).called(name("UDP")),
			udpPacket(family, 4*1001, 1001).called(name("UDP of an odd size")),
			udpPacket(family, 900, 1200).called(name("UDP in one packet")),
		)
	}
	return all
}

func (l large) called(name string) large {
	l.name = name
	return l
}

// frame makes an Ethernet frame with IP around the transport header and payload.
func frame(family int, protocol byte, transport []byte, checksum int) (frame []byte, networkLength int) {
	ethernet := []byte{0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 0, 0}
	binary.BigEndian.PutUint16(ethernet[12:], etherType(byte(family)))
	ip := make([]byte, ipv4HeaderLength)
	if family == 4 {
		copy(ip, []byte{0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol})
		copy(ip[12:], []byte{10, 99, 0, 1, 10, 99, 0, 2})
	} else {
		ip = make([]byte, ipv6HeaderLength)
		ip[0], ip[1], ip[6], ip[7] = 0x60, 0x05, protocol, 64
		ip[8], ip[23], ip[24], ip[39] = 0xfd, 1, 0xfd, 2
	}
	setIPLength(ip, len(ip), len(ip)+len(transport))
	binary.BigEndian.PutUint16(transport[checksum:], pseudo(ip, protocol, len(transport)))
	return append(append(ethernet, ip...), transport...), len(ip)
}

func payload(length int) []byte {
	b := make([]byte, length)
	for i := range b {
		b[i] = byte(i * 31 >> 3)
	}
	return b
}

func tcpPacket(family, length, size int, flags byte, options []byte) large {
	tcp := append(make([]byte, tcpHeaderLength), options...)
	binary.BigEndian.PutUint16(tcp, 40000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	binary.BigEndian.PutUint32(tcp[tcpSequence:], 0xfffff000) // goes round
	tcp[12], tcp[tcpFlags], tcp[15] = byte(len(tcp)/4)<<4, flags, 200
	headers := len(tcp)
	f, network := frame(family, protocolTCP, append(tcp, payload(length)...), tcpChecksum)
	kind := byte(gsoTCP4)
	if family == 6 {
		kind = gsoTCP6
	}
	l := describe(f, network, headers, kind, length, size, tcpChecksum)
	l.ends = flags&tcpFIN != 0
	return l
}

func udpPacket(family, length, size int) large {
	udp := make([]byte, udpHeaderLength)
	binary.BigEndian.PutUint16(udp, 40000)
	binary.BigEndian.PutUint16(udp[2:], 53)
	binary.BigEndian.PutUint16(udp[udpLength:], uint16(udpHeaderLength+length))
	f, network := frame(family, protocolUDP, append(udp, payload(length)...), udpChecksum)
	return describe(f, network, udpHeaderLength, gsoUDP, length, size, udpChecksum)
}

func describe(frame []byte, network, headers int, kind byte, length, size, checksum int) large {
	h := header{flags: needsChecksum, checksumStart: uint16(ethernetHeaderLength + network), checksumOffset: uint16(checksum)}
	if length > size {
		h.gsoType, h.gsoSize, h.headers = kind, uint16(size), uint16(ethernetHeaderLength+network+headers)
	}
	return large{header: h, frame: frame, segments: (length + size - 1) / size}
}

// splitter sends frames into a VXLAN device, and reads what comes out of the TUN device below.
type splitter struct {
	ns     namespace
	device *Device
	vxlan  int // index
}

func newSplitter(t *testing.T, local, other netip.Addr, checksum bool) *splitter {
	s := &splitter{ns: newNamespace(t)}
	s.device = open(t, s.ns, "wg0", wireGuardMTU)
	s.ns.do(t, func() {
		// Nothing of its own goes through the device.
		must(t, sysctl("net/ipv6/conf/default/disable_ipv6", !local.Is6()))
		must(t, netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs("vxlan0"), VxlanId: 42, Port: vxlanPort, Group: other.AsSlice(), SrcAddr: local.AsSlice(), UDPCSum: checksum}))
		must(t, sysctl("net/ipv6/conf/vxlan0/disable_ipv6", true))
		if local.Is6() {
			must(t, sysctl("net/ipv6/conf/wg0/addr_gen_mode", true))
		}
		addAddress(t, "wg0", local, local.BitLen()-8)
		up(t, "wg0")
		up(t, "vxlan0")
		link, err := netlink.LinkByName("vxlan0")
		must(t, err)
		s.vxlan = link.Attrs().Index
	})
	return s
}

// split returns the packets on the wire that the frame becomes.
func (s *splitter) split(t *testing.T, l large, ours bool) (packets [][]byte) {
	t.Helper()
	offloads := 0
	if ours {
		offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | offloadUDP4 | offloadUDP6 | offloadTunnel | offloadTunnelChecksum
	}
	must(t, s.device.raw.Control(func(fd uintptr) { must(t, unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloads)) }))
	s.ns.do(t, func() { must(t, sendFrame(s.vxlan, l)) })

	bufs, sizes := make([][]byte, 7), make([]int, 7) // fewer than segments, so that one Read goes on with what another left
	for i := range bufs {
		bufs[i] = make([]byte, 4+wireGuardMTU)
	}
	must(t, s.device.file.SetReadDeadline(time.Now().Add(10*time.Second)))
	reads := 0
	for len(packets) < l.segments {
		n, err := s.device.Read(bufs, sizes, 4)
		if err != nil {
			t.Fatalf("after %d packets: %v", len(packets), err)
		}
		reads++
		for i := range n {
			if p := bufs[i][4 : 4+sizes[i]]; isVXLAN(p) {
				packets = append(packets, bytes.Clone(p))
			}
		}
	}
	if ours && l.segments > 1 && reads >= l.segments && len(bufs) > 1 {
		t.Errorf("%d packets came one by one", l.segments)
	}
	return packets
}

// isVXLAN tells VXLAN from what IPv6 says of itself on a new interface.
func isVXLAN(p []byte) bool {
	length, protocol := parseIP(p)
	return protocol == protocolUDP && binary.BigEndian.Uint16(p[length+2:]) == vxlanPort
}

func sendFrame(index int, l large) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return err
	}
	var h [headerSize]byte
	l.header.encode(h[:])
	_, err = unix.SendmsgN(fd, append(h[:10:10], l.frame...), nil, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}, 0)
	return err
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// compare expects the same packets, but for where the counting of the outer IPv4 header's identification begins.
func compare(t *testing.T, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d", len(got), len(want))
	}
	for i := range got {
		for _, all := range [][][]byte{got, want} {
			w, ok := parse(all[i], vxlanPort)
			if !ok || !w.valid() {
				t.Errorf("packet %d is not sound", i)
			}
		}
	}
	for _, all := range [][][]byte{got, want} {
		countFromZero(all)
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("packet %d of %d is\n%s, want\n%s", i, len(got), dump(got[i]), dump(want[i]))
		}
	}
}

func countFromZero(packets [][]byte) {
	if packets[0][0]>>4 != 4 {
		return
	}
	first := binary.BigEndian.Uint16(packets[0][4:])
	for _, p := range packets {
		binary.BigEndian.PutUint16(p[4:], binary.BigEndian.Uint16(p[4:])-first)
		setIPLength(p, ipv4HeaderLength, len(p))
	}
}

func dump(p []byte) string { return fmt.Sprintf("%x… (%d bytes)", p[:min(len(p), 140)], len(p)) }
