package datapath_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
)

// guard has the node guard the link, as an agent does that starts; "": none.
func (n *node) guard(link string) {
	t := n.mesh.t
	t.Helper()
	n.config.UnderlayIndex = 0
	if link != "" {
		n.config.UnderlayIndex = n.linkIndex(link)
	}
	n.restart()
}

func (n *node) linkIndex(name string) (index int) {
	t := n.mesh.t
	t.Helper()
	n.ns.do(t, func() {
		link, err := netlink.LinkByName(name)
		must(t, err)
		index = link.Attrs().Index
	})
	return index
}

// reaches makes the node know the way to another one.
func (n *node) reaches(other *node, mode identity.TunnelMode) {
	t := n.mesh.t
	t.Helper()
	row := identity.Tunnel{
		Cluster: other.row.Cluster, ClusterID: other.row.ClusterID, Node: other.row.Name, Mode: mode,
		Address: other.row.Address, PodCIDRs: other.row.PodCIDRs, MTU: podMTU,
	}
	switch mode {
	case identity.TunnelPlain:
		row.Local, row.Remote = n.row.Address, other.row.Address
	case identity.TunnelWireGuard:
		row.Local, row.Remote = n.row.TunnelAddress(0), other.row.TunnelAddress(0)
	}
	must(t, n.dp.Tunnels().Update(context.Background(), row))
}

// IPv6 next headers, RFC 8200.
const (
	nextHopByHop    = 0
	nextTCP         = 6
	nextUDP         = 17
	nextRouting     = 43
	nextFragment    = 44
	nextDestination = 60
)

// ipv6Packet is an IPv6 packet without an Ethernet header. Extension headers are of the kinds given, and 8 bytes long.
func ipv6Packet(src, dst netip.Addr, payload []byte, kinds ...uint8) []byte {
	next, kinds := kinds[0], kinds[1:]
	b := []byte{0x60, 0, 0, 0, 0, 0, next, 64}
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)+8*len(kinds)))
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	for _, kind := range kinds {
		b = append(b, kind, 0, 0, 0, 0, 0, 0, 0)
	}
	return append(b, payload...)
}

func udpHeader(srcPort, dstPort uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, srcPort)
	b = binary.BigEndian.AppendUint16(b, dstPort)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

func frame(etherType uint16, ip []byte) []byte {
	b := append(append([]byte{}, mac("")...), mac("")...)
	return append(binary.BigEndian.AppendUint16(b, etherType), ip...)
}

// TestGuardProgram runs the guard on single packets.
func TestGuardProgram(t *testing.T) {
	m := newMesh(t, options{}, 1, 2, 3, 4)
	n := m.nodes[0]
	plain, secret, closed := m.nodes[1], m.nodes[2], m.nodes[3]
	n.guard("eth0")
	n.reaches(plain, identity.TunnelPlain)
	n.reaches(secret, identity.TunnelWireGuard)
	n.reaches(closed, identity.TunnelClosed)
	stranger := netip.MustParseAddr("172.29.9.9")
	own6, other6 := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")

	to := func(dst netip.Addr) packet {
		return packet{src: n.row.Address, dst: dst, srcPort: 50000, dstPort: 4789}
	}
	with := func(p packet, change func(*packet)) []byte { change(&p); return p.bytes() }
	fragment := func(b []byte, flags uint16) []byte {
		b = bytes.Clone(b)
		binary.BigEndian.PutUint16(b[20:], flags)
		return b
	}
	v6 := func(payload []byte, kinds ...uint8) []byte {
		return frame(0x86dd, ipv6Packet(own6, other6, payload, kinds...))
	}
	vxlan6 := udpHeader(50000, 4789, []byte("pod's packet"))
	for _, c := range []struct {
		name    string
		out     []byte
		refused bool
	}{
		{"to a node in mode plain", to(plain.row.Address).bytes(), false},
		{"to a node in mode wireguard", to(secret.row.Address).bytes(), true},
		{"to its tunnel address", to(secret.row.TunnelAddress(0)).bytes(), true},
		{"to a closed node", to(closed.row.Address).bytes(), true},
		{"to nobody", to(stranger).bytes(), true},
		{"from a tunnel address", with(to(plain.row.Address), func(p *packet) { p.src = n.row.TunnelAddress(0) }), true},
		{"from somebody else", with(to(plain.row.Address), func(p *packet) { p.src = stranger }), true},
		{"another port", with(to(secret.row.Address), func(p *packet) { p.dstPort = 4790 }), false},
		{"WireGuard", with(to(secret.row.Address), func(p *packet) { p.srcPort, p.dstPort = 51871, 51871 }), false},
		{"from the port, to another", with(to(secret.row.Address), func(p *packet) { p.srcPort, p.dstPort = 4789, 50000 }), false},
		{"TCP", with(to(secret.row.Address), func(p *packet) { p.protocol = nextTCP }), false},
		{"ARP", with(to(secret.row.Address), func(p *packet) { p.etherType = 0x0806 }), false},
		{"half a UDP header", to(secret.row.Address).bytes()[:14+20+4], false},
		{"first fragment", fragment(to(secret.row.Address).bytes(), 0x2000), true},
		{"the last fragment of it", fragment(to(secret.row.Address).bytes(), 0x0100), true},
		{"the last fragment of something else", fragment(to(secret.row.Address).bytes(), 0x0100), false},
		{"first fragment to a node in mode plain", fragment(to(plain.row.Address).bytes(), 0x2000), false},
		{"first fragment that hides the port", fragment(to(secret.row.Address).bytes(), 0x2000)[:14+20+4], true},
		{"first fragment of something else with the same number", fragment(with(to(secret.row.Address), func(p *packet) { p.dstPort = 53 }), 0x2000), false},
		{"the last fragment of that", fragment(to(secret.row.Address).bytes(), 0x0100), false},
		{"IPv6 to nobody", v6(vxlan6, nextUDP), true},
		{"IPv6, another port", v6(udpHeader(4789, 53, nil), nextUDP), false},
		{"IPv6, TCP", v6(vxlan6, nextTCP), false},
		{"IPv6, behind options", v6(vxlan6, nextHopByHop, nextUDP), true},
		{"IPv6, behind options, routing and more options", v6(vxlan6, nextDestination, nextRouting, nextDestination, nextUDP), true},
		{"IPv6, TCP behind options", v6(vxlan6, nextDestination, nextTCP), false},
		{"IPv6, behind a fragment header", v6(vxlan6, nextFragment, nextUDP), true},
		{"IPv6, too deep to be seen", v6(vxlan6, append(slices.Repeat([]uint8{nextDestination}, 20), nextUDP)...), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := n.dropped()
			want := uint32(verdictPass)
			if c.refused {
				want = verdictDrop
				before[datapath.DropUnencrypted]++
			}
			verdict, out := n.run(n.dp.GuardPrograms()[0], c.out, skBuff{})
			if verdict != want {
				t.Errorf("verdict %d, want %d", int32(verdict), int32(want))
			}
			if !bytes.Equal(c.out, out) {
				t.Errorf("the packet was changed from\n%x to\n%x", c.out, out)
			}
			if after := n.dropped(); !sameCounts(before, after) {
				t.Errorf("drops are %v, want %v", after, before)
			}
		})
	}
	from := func(src netip.Addr) packet {
		return packet{src: src, dst: n.row.Address, srcPort: 50000, dstPort: 4789}
	}
	for name, c := range map[string]struct {
		in      []byte
		refused bool
	}{
		"from a node in mode plain":            {from(plain.row.Address).bytes(), false},
		"from a node in mode wireguard":        {from(secret.row.Address).bytes(), true},
		"from its tunnel address":              {from(secret.row.TunnelAddress(0)).bytes(), true},
		"from a closed node":                   {from(closed.row.Address).bytes(), true},
		"from nobody":                          {from(stranger).bytes(), true},
		"from a plain node to another address": {with(from(plain.row.Address), func(p *packet) { p.dst = stranger }), true},
		"from nobody, another port":            {with(from(stranger), func(p *packet) { p.dstPort = 53 }), false},
		"first fragment":                       {fragment(from(secret.row.Address).bytes(), 0x2000), true},
		"later fragment":                       {fragment(from(secret.row.Address).bytes(), 0x0100), false},
		"IPv6 behind options":                  {v6(vxlan6, nextHopByHop, nextUDP), true},
	} {
		t.Run(name, func(t *testing.T) {
			before := n.dropped()
			want := uint32(verdictPass)
			if c.refused {
				want = verdictDrop
				before[datapath.DropCleartext]++
			}
			if verdict, _ := n.run(n.dp.GuardPrograms()[1], c.in, skBuff{}); verdict != want {
				t.Errorf("verdict %d, want %d", int32(verdict), int32(want))
			}
			if after := n.dropped(); !sameCounts(before, after) {
				t.Errorf("drops are %v, want %v", after, before)
			}
		})
	}
}

// TestGuardLetsNothingOut: VXLAN that should be encrypted doesn't get onto the underlay, its fragments neither, and everything else does.
func TestGuardLetsNothingOut(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		a.guard("eth0")
		a.reaches(b, identity.TunnelPlain)
		at := b.addPod(300).echo()
		a.addPod(300).ns.reach(t, at)
		other := netip.AddrPortFrom(b.row.Address, 7000)
		b.ns.do(t, func() { serveEcho(t, other) })

		a.reaches(b, identity.TunnelClosed)
		leaked := a.listen("marker")
		secret := bytes.Repeat([]byte("marker"), 1000)
		vxlan, err := a.ns.dial(t, "udp4", netip.AddrPortFrom(b.row.Address, 4789))
		must(t, err)
		defer vxlan.Close()
		before := a.drops(datapath.DropUnencrypted)
		vxlan.Write(secret[:100])
		if got := a.drops(datapath.DropUnencrypted) - before; got != 1 {
			t.Errorf("%d drops are counted of one datagram", got)
		}
		a.mayFragment(vxlan)
		vxlan.Write(secret)
		// While a neighbour isn't known, the kernel has all fragments wait, and then sends each for itself.
		nobody := netip.MustParseAddr("172.29.9.9")
		lost := mustDial(t, a.ns, nobody)
		a.mayFragment(lost)
		lost.Write(secret)
		before = a.drops(datapath.DropUnencrypted)
		a.neighbour(nobody)
		if got := a.drops(datapath.DropUnencrypted) - before; got != 5 {
			t.Errorf("%d drops are counted of 5 fragments that had to wait", got)
		}
		plain, err := a.ns.dial(t, "udp4", other)
		must(t, err)
		defer plain.Close()
		a.mayFragment(plain)
		exchange(t, plain, 6000)
		if n := leaked(); n != 0 {
			t.Errorf("%d packets got out", n)
		}
		// Without the guard they do, so the test would have seen them.
		a.guard("")
		leaked = a.listen("marker")
		eventually(t, "without the guard, fragments get out", func() bool {
			vxlan.Write(secret)
			return leaked() > 0
		})
	})
}

// TestGuardLetsNothingIn: VXLAN in the clear doesn't reach the node, and everything else does.
func TestGuardLetsNothingIn(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		b.guard("eth0")
		b.reaches(a, identity.TunnelPlain)
		a.addPod(300).ns.reach(t, b.addPod(300).echo())
		other := netip.AddrPortFrom(b.row.Address, 7000)
		b.ns.do(t, func() { serveEcho(t, other) })

		b.reaches(a, identity.TunnelWireGuard)
		vxlan := mustDial(t, a.ns, b.row.Address)
		vxlan.Write([]byte("clear"))
		eventually(t, "the drop is counted", func() bool { return b.drops(datapath.DropCleartext) == 1 })
		plain, err := a.ns.dial(t, "udp4", other)
		must(t, err)
		defer plain.Close()
		exchange(t, plain, 6000)
		if got := b.drops(datapath.DropCleartext); got != 1 {
			t.Errorf("%d drops are counted, want 1", got)
		}
	})
}

// TestGuardIsReplacedWithoutGap: while agents start one after the other, nothing slips through.
func TestGuardIsReplacedWithoutGap(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		a.guard("eth0")
		a.reaches(b, identity.TunnelClosed)
		leaked := a.listen("marker")
		vxlan := mustDial(t, a.ns, b.row.Address)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		sent := 0
		wg.Go(func() {
			for ; ctx.Err() == nil; sent++ {
				vxlan.Write([]byte("marker"))
			}
		})
		for range 5 {
			a.restart()
		}
		stop()
		wg.Wait()
		if n := leaked(); n != 0 || sent == 0 {
			t.Errorf("%d of %d packets got out", n, sent)
		}
	})
}

// TestGuardFollowsTheUnderlay: an agent that is told another link guards that one and no longer the former.
func TestGuardFollowsTheUnderlay(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		a.ns.do(t, func() {
			must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("eth1"), PeerName: "eth1-peer"}))
		})
		vxlan := mustDial(t, a.ns, b.row.Address)
		a.reaches(b, identity.TunnelClosed)
		for _, c := range []struct {
			link    string
			refused uint64
		}{{"eth0", 1}, {"eth1", 0}, {"eth0", 1}, {"", 0}} {
			a.guard(c.link)
			// The kernel takes a program off a little after its link is gone.
			eventually(t, fmt.Sprintf("guarding %q, %d packets of 1 are refused on eth0", c.link, c.refused), func() bool {
				before := a.drops(datapath.DropUnencrypted)
				vxlan.Write([]byte("x"))
				return a.drops(datapath.DropUnencrypted)-before == c.refused
			})
		}
	})
}

// TestGuardKnowsTags: frames of VLANs are another network's, and those with the empty tag are not.
func TestGuardKnowsTags(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	b.guard("eth0")
	b.reaches(a, identity.TunnelClosed)
	send := func(tag uint16) {
		p := packet{src: a.row.Address, dst: b.row.Address, srcPort: 1, dstPort: 4789, dstMAC: "ff:ff:ff:ff:ff:ff"}.bytes()
		tagged := append(bytes.Clone(p[:12]), 0x81, 0x00, byte(tag>>8), byte(tag))
		a.ns.do(t, func() { sendFrame(t, "eth0", append(tagged, p[12:]...)) })
	}
	send(5)
	send(0)
	eventually(t, "the drop is counted", func() bool { return b.drops(datapath.DropCleartext) > 0 })
	if got := b.drops(datapath.DropCleartext); got != 1 {
		t.Errorf("%d packets were refused, want the one with the empty tag", got)
	}
}

// TestGuardOfLinkWithoutEthernet: an underlay may be another tunnel, whose packets begin with IP's header.
func TestGuardOfLinkWithoutEthernet(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		n := newMesh(t, opts, 1).nodes[0]
		far := netip.MustParseAddr("192.0.2.2")
		tun := n.tun("tun0", netip.MustParseAddr("192.0.2.1"), far)
		n.guard("tun0")
		secret, other := mustDial(t, n.ns, far), mustDialPort(t, n.ns, far, 53)
		secret.Write([]byte("secret"))
		other.Write([]byte("other"))
		if got := tun.next(t); !bytes.HasSuffix(got, []byte("other")) {
			t.Errorf("what left is %q", got)
		}
		if got := n.drops(datapath.DropUnencrypted); got != 1 {
			t.Errorf("%d drops are counted, want 1", got)
		}
		tun.write(t, packet{src: far, dst: netip.MustParseAddr("192.0.2.1"), dstPort: 4789}.bytes()[14:])
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropCleartext) == 1 })
	})
}

// TestGuardRefusesLinks: what is no link to the underlay.
func TestGuardRefusesLinks(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	for name, index := range map[string]int{"none": 9999, "the tunnel": n.config.VXLANIndex, "negative": -1} {
		cfg := n.config
		cfg.UnderlayIndex = index
		n.ns.do(t, func() {
			if dp, err := datapath.Load(cfg); err == nil {
				dp.Close()
				t.Errorf("%s: it was loaded", name)
			} else {
				t.Log(err)
			}
		})
	}
}

// listen returns a function that tells how many packets with the marker the node has sent to the underlay, from now on.
func (n *node) listen(marker string) (count func() int) {
	t := n.mesh.t
	t.Helper()
	fd := -1
	n.mesh.underlay.do(t, func() {
		link, err := netlink.LinkByName(n.port)
		must(t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		must(t, err)
		must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
		must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: link.Attrs().Index})) // ETH_P_ALL, in network order
	})
	t.Cleanup(func() { unix.Close(fd) })
	found := 0
	return func() int {
		buf := make([]byte, 65536)
		for {
			size, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return found
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && bytes.Contains(buf[:size], []byte(marker)) {
				found++
			}
		}
	}
}

// neighbour tells the node where on the underlay an address is.
func (n *node) neighbour(at netip.Addr) {
	t := n.mesh.t
	t.Helper()
	index := n.linkIndex("eth0")
	n.ns.do(t, func() {
		must(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: at.AsSlice(), HardwareAddr: mac("")}))
	})
}

// mayFragment makes the kernel cut what is too large for the underlay.
func (n *node) mayFragment(conn net.Conn) {
	t := n.mesh.t
	t.Helper()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		must(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT))
	}))
}

func mustDialPort(t *testing.T, from namespace, to netip.Addr, port uint16) net.Conn {
	t.Helper()
	conn, err := from.dial(t, "udp4", netip.AddrPortFrom(to, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sendFrame sends an Ethernet frame as it is out of a link of the thread's namespace.
func sendFrame(t testing.TB, link string, frame []byte) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	must(t, err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}))
}

// tun is a device without Ethernet headers, whose other end is this test.
type tun struct{ fd int }

// tun makes the device in the node's namespace, with an address, and a route to another one.
func (n *node) tun(name string, address, route netip.Addr) tun {
	t := n.mesh.t
	t.Helper()
	d := tun{fd: -1}
	n.ns.do(t, func() {
		var err error
		if d.fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			t.Errorf("opening /dev/net/tun: %v", err)
			return
		}
		req, err := unix.NewIfreq(name)
		must(t, err)
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		must(t, unix.IoctlIfreq(d.fd, unix.TUNSETIFF, req))
		link, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(address, address.BitLen()))}))
		must(t, netlink.LinkSetUp(link))
		must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(route, route.BitLen()))}))
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { unix.Close(d.fd) })
	return d
}

// next returns the next packet that was sent out of the device, but for what the kernel sends by itself.
func (d tun) next(t testing.TB) []byte {
	t.Helper()
	buf := make([]byte, 65536)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		wait := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(wait, 100); err != nil || n == 0 {
			continue
		}
		n, err := unix.Read(d.fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 && (buf[0]>>4 == 4 || buf[6] == nextUDP || buf[6] == nextFragment) {
			return buf[:n]
		}
	}
	t.Fatal("nothing left the device")
	return nil
}

// write has the device receive a packet.
func (d tun) write(t testing.TB, packet []byte) {
	t.Helper()
	if _, err := unix.Write(d.fd, packet); err != nil {
		t.Errorf("writing to the device: %v", err)
	}
}
