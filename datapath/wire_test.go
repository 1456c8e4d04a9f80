package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// outer is what the underlay sees of a VXLAN packet.
type outer struct {
	src, dst     netip.Addr
	length       int // of the IP packet
	dontFragment bool
	fragment     bool
	vni          uint32
	inner        []byte
}

// capture returns a function that reads the VXLAN packets (and fragments) that the node sends, from now on.
func (n *node) capture() func() (outer, bool) {
	t := n.mesh.t
	t.Helper()
	fd := -1
	n.mesh.underlay.do(t, func() {
		link, err := netlink.LinkByName(n.port)
		must(t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: link.Attrs().Index})) // ETH_P_ALL, in network order
		tv := unix.NsecToTimeval(int64(patience))
		must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	})
	t.Cleanup(func() { unix.Close(fd) })
	own := []netip.Addr{n.row.Address, n.row.TunnelAddress(0), n.row.TunnelAddress(1)}
	return func() (outer, bool) {
		buf := make([]byte, 65536)
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
			size, from, err := unix.Recvfrom(fd, buf, 0)
			ll, ok := from.(*unix.SockaddrLinklayer)
			if err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if p, ok := parseOuter(buf[:size]); ok && slices.Contains(own, p.src) {
				return p, true
			}
		}
		return outer{}, false
	}
}

func parseOuter(b []byte) (p outer, ok bool) {
	if len(b) < 40 {
		return p, false
	}
	protocol, header := b[9], 20
	if b[0]>>4 == 6 {
		protocol, header = b[6], 40
		p = outer{
			src: netip.AddrFrom16([16]byte(b[8:])), dst: netip.AddrFrom16([16]byte(b[24:])), length: 40 + int(binary.BigEndian.Uint16(b[4:])),
			dontFragment: true, fragment: protocol == unix.IPPROTO_FRAGMENT, // No router fragments IPv6.
		}
	} else {
		flags := binary.BigEndian.Uint16(b[6:])
		p = outer{
			src: netip.AddrFrom4([4]byte(b[12:])), dst: netip.AddrFrom4([4]byte(b[16:])), length: int(binary.BigEndian.Uint16(b[2:])),
			dontFragment: flags&0x4000 != 0, fragment: flags&0x3fff != 0,
		}
	}
	if p.fragment {
		return p, true
	}
	if protocol != unix.IPPROTO_UDP || len(b) < header+16 || binary.BigEndian.Uint16(b[header+2:]) != 4789 {
		return p, false
	}
	p.vni = binary.BigEndian.Uint32(b[header+12:]) >> 8
	p.inner = b[header+16:]
	return p, true
}

// TestWireCarriesIdentity: the VNI is the source's identity, and the outer addresses are the nodes'.
func TestWireCarriesIdentity(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(301)
		at := server.echo()
		for name, c := range map[string]struct {
			from *node
			by   namespace
			to   netip.AddrPort
			vni  uint32
		}{
			"a pod's":            {m.nodes[0], client.ns, at, 1<<16 | 300},
			"the node's own":     {m.nodes[0], m.nodes[0].ns, at, 6},
			"the answer's":       {m.nodes[1], client.ns, at, 2<<16 | 301},
			"the answer to node": {m.nodes[1], m.nodes[0].ns, at, 2<<16 | 301},
		} {
			t.Run(name, func(t *testing.T) {
				next := c.from.capture()
				conn, err := c.by.dial(t, "udp", c.to)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				exchange(t, conn, 10)
				p, ok := next()
				if !ok || p.vni != c.vni || (p.dst != m.nodes[0].row.Address && p.dst != m.nodes[1].row.Address) {
					t.Errorf("on the wire is %+v, want VNI %d", p, c.vni)
				}
			})
		}
	})
}

// TestFullSizePacketIsNotFragmented: a pod's largest packet fills the underlay's MTU of 1500 and travels whole.
func TestFullSizePacketIsNotFragmented(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(301)
		at := server.echo()
		next := m.nodes[0].capture()
		conn, err := client.ns.dial(t, "udp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, m.options.podMTU()-headerLen(client.addr())-8)
		if p, ok := next(); !ok || p.fragment || !p.dontFragment || p.length != 1500 {
			t.Errorf("on the wire is a packet of %d bytes, fragment %v, don't fragment %v", p.length, p.fragment, p.dontFragment)
		}

		// A datagram that the pod itself has to cut arrives too: the pieces fit.
		exchange(t, conn, 4000)
		for range 3 {
			if p, ok := next(); !ok || p.fragment || p.length > 1500 {
				t.Errorf("on the wire is a packet of %d bytes, fragment %v", p.length, p.fragment)
			}
		}
	})
}

// TestNodesPathMTU: a node's own processes know what fits into the tunnel.
func TestNodesPathMTU(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		at := m.nodes[1].addPod(301).echo()
		next := m.nodes[0].capture()
		conn, err := m.nodes[0].ns.dial(t, "udp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, 4000)
		for range 3 {
			if p, ok := next(); !ok || p.fragment || p.length > 1500 {
				t.Errorf("on the wire is a packet of %d bytes, fragment %v", p.length, p.fragment)
			}
		}
	})
}
