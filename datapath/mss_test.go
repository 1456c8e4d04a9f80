package datapath_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// tcpFrame is a TCP segment in an Ethernet frame, with options padded to whole words with their end.
func tcpFrame(p packet, flags byte, options []byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	// UDP's ports are where TCP's are; the rest replaces the payload of a packet made for this.
	tcp := binary.BigEndian.AppendUint16(nil, p.srcPort)
	tcp = binary.BigEndian.AppendUint16(tcp, p.dstPort)
	tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0, byte(5+len(options)/4)<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	tcp = append(append(tcp, options...), p.payload...)
	p.protocol, p.payload = nextTCP, make([]byte, len(tcp)-8)
	frame := p.bytes()
	at := 14 + headerLen(p.src)
	copy(frame[at:], tcp)
	binary.BigEndian.PutUint16(frame[at+16:], checksum(tcpSum(p.src, p.dst, tcp)))
	return frame
}

// tcpSum is what the checksum is over; with a right one it is 0.
func tcpSum(src, dst netip.Addr, tcp []byte) []byte {
	b := pseudoHeader(src, dst, tcp)
	b[len(src.AsSlice())*2+7] = nextTCP
	return b
}

type mssCase struct {
	name    string
	flags   byte
	options []byte
	want    []byte // nil: as they are
}

// mssCases are for a largest segment of max bytes.
func mssCases(max uint16) []mssCase {
	hi, lo := byte(max>>8), byte(max)
	return []mssCase{
		{"larger", tcpSYN, []byte{2, 4, 0x05, 0xb4}, []byte{2, 4, hi, lo}},
		{"larger, in the answer", tcpSYN | tcpACK, []byte{2, 4, 0x05, 0xb4}, []byte{2, 4, hi, lo}},
		{"one larger", tcpSYN, binary.BigEndian.AppendUint16([]byte{2, 4}, max+1), []byte{2, 4, hi, lo}},
		{"the largest there is", tcpSYN, []byte{2, 4, 0xff, 0xff}, []byte{2, 4, hi, lo}},
		{"equal", tcpSYN, []byte{2, 4, hi, lo}, nil},
		{"smaller", tcpSYN, []byte{2, 4, 0x02, 0x18}, nil},
		{"none", tcpSYN, []byte{4, 2, 1, 3, 3, 7}, nil},
		{"no options", tcpSYN, nil, nil},
		{"no SYN", tcpACK, []byte{2, 4, 0x05, 0xb4}, nil},
		{"at an odd place", tcpSYN, []byte{1, 2, 4, 0x05, 0xb4}, []byte{1, 2, 4, hi, lo}},
		{"behind others", tcpSYN, []byte{4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 2, 4, 0x05, 0xb4}, []byte{4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 2, 4, hi, lo}},
		{"at the end of the most options", tcpSYN, append(bytes.Repeat([]byte{1}, 36), 2, 4, 0x05, 0xb4), append(bytes.Repeat([]byte{1}, 36), 2, 4, hi, lo)},
		{"behind the end", tcpSYN, []byte{0, 2, 4, 0x05, 0xb4}, nil},
		{"of another length", tcpSYN, []byte{2, 6, 0x05, 0xb4, 0x05, 0xb4}, nil},
		{"behind an option without length", tcpSYN, []byte{8, 0, 2, 4, 0x05, 0xb4}, nil},
		{"behind an option of length 1", tcpSYN, []byte{8, 1, 2, 4, 0x05, 0xb4}, nil},
		{"behind an option that is longer than all", tcpSYN, []byte{8, 200, 2, 4, 0x05, 0xb4}, nil},
		{"cut off by the header's end", tcpSYN, []byte{1, 1, 2, 4}, nil},
	}
}

// TestSegmentSizeIsLowered in what a pod sends, and in what it gets, to what fits into the way's packets.
func TestSegmentSizeIsLowered(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		n, far := m.nodes[0], m.nodes[1]
		pod, remote := n.addPod(300), far.addPod(300)
		m.narrow(1301)
		max := uint16(1301 - 20 - headerLen(pod.addr()))
		arrived := pod.listen()
		for _, c := range mssCases(max) {
			out := packet{srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: pod.addr(), dst: remote.addr(), srcPort: 5000, dstPort: 7000, payload: []byte("odd")}
			in := packet{src: remote.addr(), dst: pod.addr(), srcPort: 7000, dstPort: 5000, payload: []byte("odd")}
			t.Run(c.name, func(t *testing.T) {
				frame := tcpFrame(out, c.flags, c.options)
				verdict, sent := n.run(n.dp.PodProgram(), frame, skBuff{Ifindex: uint32(pod.row.IfIndex)})
				if verdict != verdictRedirect {
					t.Errorf("verdict %d", int32(verdict))
				}
				c.expect(t, frame, sent)

				frame = tcpFrame(in, c.flags, c.options)
				far.sendFrom(far.row.Address, n.row.Address, vxlan(uint32(remote.row.Identity), frame))
				c.expect(t, frame, arrived(t))
			})
		}
		t.Run("with more words than there are", func(t *testing.T) {
			frame := tcpFrame(packet{srcMAC: pod.row.MAC, src: pod.addr(), dst: remote.addr()}, tcpSYN, []byte{1})
			frame[14+headerLen(pod.addr())+12] = 0xf0
			_, sent := n.run(n.dp.PodProgram(), frame, skBuff{Ifindex: uint32(pod.row.IfIndex)})
			expectHop(t, frame, sent, pod.addr())
		})
		t.Run("a header that is cut off", func(t *testing.T) {
			frame := tcpFrame(packet{srcMAC: pod.row.MAC, src: pod.addr(), dst: remote.addr()}, tcpSYN, nil)[:14+headerLen(pod.addr())+13]
			_, sent := n.run(n.dp.PodProgram(), frame, skBuff{Ifindex: uint32(pod.row.IfIndex)})
			expectHop(t, frame, sent, pod.addr())
		})
	})
}

// expect checks that a frame came out with the options that are wanted, a right checksum, one hop less, and no other change.
func (c mssCase) expect(t *testing.T, in, out []byte) {
	t.Helper()
	family := netip.AddrFrom4([4]byte{})
	if in[14]>>4 == 6 {
		family = netip.IPv6Unspecified()
	}
	at := 14 + headerLen(family)
	if len(out) != len(in) {
		t.Fatalf("%d bytes came out of %d", len(out), len(in))
	}
	want := bytes.Clone(in)
	if c.want != nil {
		copy(want[at+20:], c.want)
	}
	copy(want[at+16:at+18], out[at+16:at+18])
	expectHop(t, want, out, family)
	addresses := in[at-2*len(family.AsSlice()) : at]
	src, _ := netip.AddrFromSlice(addresses[:len(addresses)/2])
	dst, _ := netip.AddrFromSlice(addresses[len(addresses)/2:])
	if sum := checksum(tcpSum(src, dst, out[at:])); sum != 0 {
		t.Errorf("the checksum is wrong by %#x", sum)
	}
}

// listen returns a function that returns the next TCP segment that the pod gets, from now on, as a frame.
func (p *pod) listen() func(t *testing.T) []byte {
	t := p.node.mesh.t
	t.Helper()
	fd := -1
	p.ns.do(t, func() {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: link.Attrs().Index})) // ETH_P_ALL, in network order
		wait := unix.NsecToTimeval(int64(patience))
		must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait))
	})
	t.Cleanup(func() { unix.Close(fd) })
	return func(t *testing.T) []byte {
		t.Helper()
		buf := make([]byte, 65536)
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
			size, from, err := unix.Recvfrom(fd, buf, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if ip := buf[14:]; ip[0]>>4 == 4 && ip[9] == nextTCP || ip[0]>>4 == 6 && ip[6] == nextTCP {
				return bytes.Clone(buf[:size])
			}
		}
		t.Fatal("nothing arrived")
		return nil
	}
}

// TestConnectionsBeginWithSegmentsThatFit, whoever of the two opens them, and though one of the nodes alone knows that the way is narrow.
func TestConnectionsBeginWithSegmentsThatFit(t *testing.T) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachPods(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			m := newMesh(t, opts, 1, 2)
			here, there := m.nodes[0].addPod(300), m.nodes[1].addPod(301)
			way := m.nodes[0].tunnelTo(m.nodes[1])
			way.MTU = 1300
			must(t, m.nodes[0].dp.Tunnels().Update(t.Context(), way))
			for name, c := range map[string]struct {
				from namespace
				to   netip.AddrPort
			}{"from here": {here.ns, there.echo()}, "from there": {there.ns, here.echo()}} {
				conn, err := c.from.dial(t, "tcp", c.to)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if got, want := segmentSize(t, conn), 1300-headerLen(here.addr())-20-12; got != want {
					t.Errorf("%s: segments have up to %d bytes beside the time stamps, want %d", name, got, want)
				}
				exchange(t, conn, 1<<20)
			}
			for _, n := range m.nodes {
				if unwanted := unwantedDrops(n); len(unwanted) != 0 {
					t.Errorf("%s dropped packets: %v", n.row.Name, unwanted)
				}
			}
		})
	})
}

// segmentSize is what the kernel puts into a segment at most, in bytes.
func segmentSize(t *testing.T, conn net.Conn) (size int) {
	t.Helper()
	onSocket(t, conn, func(fd int) (err error) {
		size, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG)
		return err
	})
	return size
}
