package datapath_test

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
)

// What IPv6 must be able to send, in bytes.
const ipv6MinMTU = 1280

// TestSmallIPv6PacketsAreCut: of what IPv6 must be able to send, the tunnel's packet inside of WireGuard may be cut if the way is too narrow, and
// no other packet may.
func TestSmallIPv6PacketsAreCut(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		opts.ranges = []int{4, 6} // The tunnel addresses are of the first one's family.
		m := newMesh(t, opts, 1, 2)
		n, far := m.nodes[0], m.nodes[1]
		pod, remote := n.addPod(300), far.addPod(300)
		device := n.farWireGuard(far)
		narrow := n.encryptedTo(far, 0, 0)
		narrow.MTU = 1200
		wide := narrow
		wide.MTU = ipv6MinMTU
		for _, c := range []struct {
			name     string
			way      identity.Tunnel
			from, to netip.Addr
			size     int
			cut      bool
			told     int // 0: it is sent
		}{
			{"IPv6 that fits", narrow, pod.row.Address6, remote.row.Address6, 1200, false, 0},
			{"IPv6, one byte larger", narrow, pod.row.Address6, remote.row.Address6, 1201, true, 0},
			{"IPv6 of the least MTU", narrow, pod.row.Address6, remote.row.Address6, 1280, true, 0},
			{"IPv6 of the least MTU, which fits", wide, pod.row.Address6, remote.row.Address6, 1280, false, 0},
			{"IPv6 of more", narrow, pod.row.Address6, remote.row.Address6, 1281, false, 1280},
			{"IPv4 that fits", narrow, pod.row.Address, remote.row.Address, 1200, false, 0},
			{"IPv4, one byte larger", narrow, pod.row.Address, remote.row.Address, 1201, false, 1200},
		} {
			t.Run(c.name, func(t *testing.T) {
				must(t, n.dp.Tunnels().Update(t.Context(), c.way))
				conn, err := pod.ns.dial(t, "udp", netip.AddrPortFrom(c.to, 7000))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				neverFragment(t, conn)
				before := n.drops(datapath.DropTooBig)
				if _, err := conn.Write(make([]byte, c.size-headerLen(c.to)-8)); err != nil {
					t.Fatal(err)
				}
				if c.told != 0 {
					eventually(t, "the pod knows the MTU", func() bool { return pathMTU(t, conn) == c.told })
					if got := n.drops(datapath.DropTooBig) - before; got != 1 {
						t.Errorf("%d packets were too big, want 1", got)
					}
					return
				}
				ip := device.next(t)
				p, ok := parseOuter(ip)
				if !ok || p.length != c.size+50 || p.src != narrow.Local || p.dst != narrow.Remote || p.dontFragment == c.cut || p.fragment {
					t.Errorf("what left is %+v", p)
				}
				if want := map[bool]byte{true: 0x10}[c.cut]; ip[1] != want {
					t.Errorf("its type of service is %#x, want %#x", ip[1], want)
				}
				if _, err := conn.Write(nil); errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("the pod was told: %v", err)
				}
				device.next(t)
			})
		}
	})
}

// TestNothingElseIsCut runs the pod program on a packet of IPv6's least MTU where the way is in the clear, or of IPv6 itself.
func TestNothingElseIsCut(t *testing.T) {
	for name, c := range map[string]struct {
		opts      options
		encrypted bool
	}{
		"on the underlay":     {options{ranges: []int{4, 6}}, false},
		"in a tunnel of IPv6": {options{ranges: []int{6}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, c.opts, 1, 2)
			n, far := m.nodes[0], m.nodes[1]
			pod, remote := n.addPod(300), far.addPod(300)
			from, to := pod.row.Address6, remote.row.Address6
			if !from.IsValid() {
				from, to = pod.row.Address, remote.row.Address
			}
			way := n.tunnelTo(far)
			if c.encrypted {
				way = n.encryptedTo(far, 0, 0)
			}
			way.MTU = 1200
			must(t, n.dp.Tunnels().Update(t.Context(), way))
			in := packet{srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: from, dst: to, payload: make([]byte, ipv6MinMTU-48)}.bytes()
			_, out := n.run(n.dp.PodProgram(), in, skBuff{Ifindex: uint32(pod.row.IfIndex)})
			if told := binary.BigEndian.Uint32(out[14+40+4:]); n.drops(datapath.DropTooBig) != 1 || told != ipv6MinMTU {
				t.Errorf("%d packets were too big, and %d was told", n.drops(datapath.DropTooBig), told)
			}
		})
	}
}
