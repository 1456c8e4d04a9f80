package datapath_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/datapath"
)

// What the answer to a packet that is too large quotes of it, in bytes.
const quoted = 504

// tooBig is the ICMP answer in an Ethernet frame, of either family.
type tooBig struct {
	srcMAC, dstMAC net.HardwareAddr
	src, dst       netip.Addr
	mtu            int
	quote          []byte
}

// parseTooBig checks all that a receiver checks, checksums included.
func parseTooBig(t *testing.T, b []byte, family netip.Addr) (a tooBig) {
	t.Helper()
	header, kind, code := headerLen(family), byte(3), byte(4)
	if len(b) != 14+header+8+quoted || binary.BigEndian.Uint16(b[12:]) != etherType(family) {
		t.Fatalf("the answer has %d bytes: %x", len(b), b)
	}
	ip, icmp := b[14:14+header], b[14+header:]
	sum := icmp
	if family.Is6() {
		kind, code = 2, 0
		a.src, a.dst = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
		sum = pseudoHeader(a.src, a.dst, icmp)
		sum[39] = 58
		if ip[0] != 0x60 || ip[6] != 58 || ip[7] != 64 || int(binary.BigEndian.Uint16(ip[4:])) != len(icmp) {
			t.Errorf("the IPv6 header is %x", ip)
		}
	} else {
		a.src, a.dst = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
		if ip[0] != 0x45 || ip[8] != 64 || ip[9] != 1 || int(binary.BigEndian.Uint16(ip[2:])) != len(b)-14 || checksum(ip) != 0 {
			t.Errorf("the IPv4 header is %x, checksum %x", ip, checksum(ip))
		}
	}
	if icmp[0] != kind || icmp[1] != code || checksum(sum) != 0 {
		t.Errorf("ICMP's header is %x, checksum %x", icmp[:8], checksum(sum))
	}
	a.dstMAC, a.srcMAC = net.HardwareAddr(b[:6]), net.HardwareAddr(b[6:12])
	a.mtu, a.quote = int(binary.BigEndian.Uint32(icmp[4:])), icmp[8:]
	return a
}

// TestTooBigIsAnswered runs the pod program on packets that are larger than what gets to the node.
func TestTooBigIsAnswered(t *testing.T) {
	eachPods(t, testTooBigIsAnswered)
}

func testTooBigIsAnswered(t *testing.T, opts options) {
	m := newMesh(t, opts, 1, 2)
	n, far := m.nodes[0], m.nodes[1]
	pod, remote := n.addPod(300), far.addPod(300)
	from := n.row.Address
	if from.Is6() != pod.addr().Is6() {
		from = remote.addr() // The node has no address of the family.
	}
	is6 := pod.addr().Is6()
	good := packet{
		srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: pod.addr(), dst: remote.addr(), srcPort: 5, dstPort: 7, payload: bytes.Repeat([]byte("0123456789a"), 128),
	}
	icmp := func(kind byte) packet {
		p := good
		p.protocol, p.srcPort = 1, uint16(kind)<<8 // The type is the first byte.
		if is6 {
			p.protocol = 58
		}
		return p
	}
	later := good.bytes()
	later[21] = 1 // IPv4's fragment offset
	for _, c := range []struct {
		name     string
		mtu      int
		packet   []byte
		told     int // 0: nothing
		families string
	}{
		{"an odd size", 1301, good.bytes(), 1301, "46"},
		{"smaller than IPv6 can do with", 1000, good.bytes(), 1000, "4"},
		{"smaller than IPv6 can do with", 1000, good.bytes(), 1280, "6"},
		{"an echo request", 1300, icmp(map[bool]byte{false: 8, true: 128}[is6]).bytes(), 1300, "46"},
		{"an error: unreachable", 1300, icmp(map[bool]byte{false: 3, true: 1}[is6]).bytes(), 0, "46"},
		{"an error: time exceeded", 1300, icmp(map[bool]byte{false: 11, true: 3}[is6]).bytes(), 0, "46"},
		{"a later fragment", 1300, later, 0, "4"},
	} {
		if !bytes.Contains([]byte(c.families), []byte{map[bool]byte{false: '4', true: '6'}[is6]}) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			way := n.tunnelTo(far)
			way.MTU = c.mtu
			must(t, n.dp.Tunnels().Update(t.Context(), way))
			before := n.dropped()
			before[datapath.DropTooBig]++
			verdict, out := n.run(n.dp.PodProgram(), c.packet, skBuff{Ifindex: uint32(pod.row.IfIndex)})
			if after := n.dropped(); !sameCounts(before, after) {
				t.Errorf("drops are %v, want %v", after, before)
			}
			if c.told == 0 {
				if verdict != verdictDrop || !bytes.Equal(out, c.packet) {
					t.Errorf("verdict %d, and the packet is %x", int32(verdict), out)
				}
				return
			}
			if verdict != verdictRedirect {
				t.Fatalf("verdict %d", int32(verdict))
			}
			a := parseTooBig(t, out, pod.addr())
			if a.src != from || a.dst != pod.addr() || a.srcMAC.String() != pod.row.HostMAC || a.dstMAC.String() != pod.row.MAC || a.mtu != c.told {
				t.Errorf("the answer is from %s %s to %s %s and says %d; want it from %s, saying %d", a.srcMAC, a.src, a.dstMAC, a.dst, a.mtu, from, c.told)
			}
			if !bytes.Equal(a.quote, c.packet[14:][:quoted]) {
				t.Errorf("it quotes\n%x of\n%x", a.quote, c.packet[14:])
			}
		})
	}
}

// TestPodLearnsThePathMTU: after the first datagram that is too large, the pod's kernel refuses such at once, and sends what fits.
func TestPodLearnsThePathMTU(t *testing.T) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachPods(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			m := newMesh(t, opts, 1, 2)
			n, far := m.nodes[0], m.nodes[1]
			client, at := n.addPod(300), far.addPod(301).echo()
			m.narrow(1301)
			conn, err := client.ns.dial(t, "udp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			neverFragment(t, conn)
			headers := headerLen(client.addr()) + 8
			if _, err := conn.Write(make([]byte, 1302-headers)); err != nil {
				t.Fatalf("the first datagram: %v", err)
			}
			eventually(t, "the pod knows the path's MTU", func() bool { return pathMTU(t, conn) == 1301 })
			// The answer itself is an error of the socket, once.
			conn.Write(nil)
			if _, err := conn.Write(make([]byte, 1302-headers)); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("a datagram of one byte more than fits gives %v, want %v", err, unix.EMSGSIZE)
			}
			before := n.drops(datapath.DropTooBig)
			discard(conn)
			exchange(t, conn, 1301-headers)
			if got := n.drops(datapath.DropTooBig) - before; got != 0 {
				t.Errorf("%d packets were too big", got)
			}
			// A socket that has no such wish has its pieces fit. So has the other side, once it knows.
			if !answered(t, client.ns, at, 4000) {
				t.Error("a datagram in pieces is lost")
			}
		})
	})
}

// narrow lowers the MTU of the ways between all nodes, of mode plain.
func (m *mesh) narrow(mtu int) {
	m.t.Helper()
	for _, n := range m.nodes {
		for _, other := range m.nodes {
			if other != n {
				way := n.tunnelTo(other)
				way.MTU = mtu
				must(m.t, n.dp.Tunnels().Update(m.t.Context(), way))
			}
		}
	}
}

// isIPv6 tells whether a connection is of IPv6.
func isIPv6(conn net.Conn) bool {
	return netip.MustParseAddrPort(conn.LocalAddr().String()).Addr().Is6()
}

// onSocket calls f with the connection's socket.
func onSocket(t testing.TB, conn net.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := conn.(interface {
		SyscallConn() (syscall.RawConn, error)
	}).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { must(t, f(int(fd))) }))
}

// neverFragment has datagrams that are too large refused.
func neverFragment(t testing.TB, conn net.Conn) {
	t.Helper()
	onSocket(t, conn, func(fd int) error {
		if isIPv6(conn) {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
}

// pathMTU is what the kernel knows of the way to a connection's peer, in bytes.
func pathMTU(t testing.TB, conn net.Conn) (mtu int) {
	t.Helper()
	onSocket(t, conn, func(fd int) (err error) {
		if isIPv6(conn) {
			mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU)
		} else {
			mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		}
		return err
	})
	return mtu
}

// discard reads what has come.
func discard(conn net.Conn) {
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	for err := error(nil); !errors.Is(err, unix.EAGAIN) && !isTimeout(err); {
		_, err = conn.Read(make([]byte, 65536))
	}
	conn.SetDeadline(time.Now().Add(patience))
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestTCPGoesOnWhenTheWayNarrows, whichever side sends, without a pause that anybody would notice.
func TestTCPGoesOnWhenTheWayNarrows(t *testing.T) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachPods(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			m := newMesh(t, opts, 1, 2)
			client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(301)
			up, err := client.ns.dial(t, "tcp", server.echo())
			if err != nil {
				t.Fatal(err)
			}
			defer up.Close()
			down, err := server.ns.dial(t, "tcp", client.echo())
			if err != nil {
				t.Fatal(err)
			}
			defer down.Close()
			for _, mtu := range slices.Backward([]int{1280, 1350, m.options.podMTU()}) {
				m.narrow(mtu)
				for _, conn := range []net.Conn{up, down} {
					conn.SetDeadline(time.Now().Add(patience))
					exchange(t, conn, 1<<20)
				}
			}
			for _, n := range m.nodes {
				if n.drops(datapath.DropTooBig) == 0 {
					t.Errorf("%s: nothing was too big", n.row.Name)
				}
			}
		})
	})
}
