package datapath_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
)

// farWireGuard has the node send to another one by WireGuard, of which the test is the other end. The data path is loaded anew.
func (n *node) farWireGuard(other *node) tun {
	t := n.mesh.t
	t.Helper()
	n.config.Tunnel = [identity.TunnelSlots]netip.Addr{n.row.TunnelAddress(0), n.row.TunnelAddress(1)}
	n.restart()
	must(t, n.dp.Tunnels().Update(t.Context(), n.encryptedTo(other, 0, 0)))
	d := n.tun("causeway-wg0", n.row.TunnelAddress(0), other.row.TunnelAddress(0))
	must(t, n.attachWireGuard(0, "causeway-wg0"))
	return d
}

func (n *node) attachWireGuard(slot uint8, name string) (err error) {
	index := n.linkIndex(name)
	n.ns.do(n.mesh.t, func() { err = n.dp.AttachWireGuard(slot, index) })
	return err
}

// TestWireGuardLetsIn: out of WireGuard comes only the tunnel, between nodes' tunnel addresses, whole or in pieces.
func TestWireGuardLetsIn(t *testing.T) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachPods(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			testWireGuardLetsIn(t, opts)
		})
	})
}

func testWireGuardLetsIn(t *testing.T, opts options) {
	m := newMesh(t, opts, 1, 2)
	n, far := m.nodes[0], m.nodes[1]
	pod, client := n.addPod(300), far.addPod(300)
	device := n.farWireGuard(far)
	inbox := pod.inbox(7002)
	inner := func(payload string) []byte {
		p := packet{src: client.addr(), dst: pod.addr(), dstPort: 7002, payload: []byte(payload)}
		return vxlan(uint32(client.row.Identity), p.bytes())
	}
	good := packet{src: far.row.TunnelAddress(0), dst: n.row.TunnelAddress(0), srcPort: 50000, dstPort: 4789}
	// Each payload is its case's name, followed by enough to be cut.
	long := string(bytes.Repeat([]byte("."), 2000))
	whole := func(change func(*packet)) func(name string) [][]byte {
		return func(name string) [][]byte {
			p := good
			p.payload = inner(name + long)
			change(&p)
			return [][]byte{p.bytes()[14:]}
		}
	}
	cut := func(change func(*packet), order func([][]byte)) func(name string) [][]byte {
		return func(name string) [][]byte {
			pieces := fragments(whole(change)(name)[0], 1024)
			order(pieces)
			return pieces
		}
	}
	asIs, inOrder := func(*packet) {}, func([][]byte) {}
	otherPort := func(p *packet) { p.dstPort = 53 }
	for _, c := range []struct {
		name string
		send func(name string) [][]byte
		drop string // empty: it arrives
	}{
		{"the tunnel's", whole(asIs), ""},
		{"in pieces", cut(asIs, inOrder), ""},
		{"in pieces, the last one first", cut(asIs, slices.Reverse), ""},
		{"another port", whole(otherPort), datapath.DropNotVXLAN},
		{"another port, in pieces", cut(otherPort, inOrder), datapath.DropNotVXLAN},
		{"TCP", whole(func(p *packet) { p.protocol = nextTCP }), datapath.DropNotVXLAN},
		{"to the other slot", whole(func(p *packet) { p.dst = n.row.TunnelAddress(1) }), datapath.DropNotVXLAN},
		{"to a pod", whole(func(p *packet) { p.dst = pod.addr() }), datapath.DropNotVXLAN},
		{"from a slot without key", whole(func(p *packet) { p.src = far.row.TunnelAddress(1) }), datapath.DropNotVXLAN},
		{"from nobody", whole(func(p *packet) { p.src = outsider(p.src) }), datapath.DropNotVXLAN},
		{"from this node", whole(func(p *packet) { p.src = n.row.TunnelAddress(0) }), datapath.DropNotVXLAN},
		{"to itself, with no port", func(string) [][]byte { return [][]byte{good.bytes()[14:][:headerLen(good.src)+4]} }, datapath.DropNotVXLAN},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := n.dropped()
			for _, b := range c.send(c.name) {
				device.write(t, b)
			}
			if c.drop == "" {
				if got := inbox.next(t); got != c.name+long {
					t.Errorf("the pod got %d bytes: %.40q", len(got), got)
				}
			} else {
				eventually(t, "the drop is counted as "+c.drop, func() bool { return n.drops(c.drop) == before[c.drop]+1 })
				before[c.drop]++
			}
			if after := n.dropped(); !sameCounts(before, after) {
				t.Errorf("drops are %v, want %v", after, before)
			}
		})
	}
	t.Run("neighbour discovery is no sign of trouble", func(t *testing.T) {
		before, small := n.dropped(), n.drops(datapath.DropIPv6LinkLocal)
		device.write(t, ipv6Frame("ff02::1")[14:])
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropIPv6LinkLocal) > small })
		if after := n.dropped(); !sameCounts(before, after) {
			t.Errorf("drops are %v, want %v", after, before)
		}
	})
}

// TestWireGuardMarksBySlot: what comes out of a slot's device bears its mark, also when it had to be put together.
func TestWireGuardMarksBySlot(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		n, far := m.nodes[0], m.nodes[1]
		devices := []tun{n.farWireGuard(far), n.tun("causeway-wg1", n.row.TunnelAddress(1), far.row.TunnelAddress(1))}
		must(t, n.attachWireGuard(1, "causeway-wg1"))
		marks := n.readMarks()
		for slot, device := range devices {
			p := packet{src: far.row.TunnelAddress(0), dst: n.row.TunnelAddress(uint8(slot)), dstPort: 4789, payload: make([]byte, 2000)}
			ip := p.bytes()[14:]
			for name, pieces := range map[string][][]byte{"whole": {ip}, "in pieces": fragments(ip, 1024)} {
				for _, b := range pieces {
					device.write(t, b)
				}
				if got, want := marks(), uint32(wireGuardMark+slot); got != want {
					t.Errorf("slot %d, %s: the mark is %#x, want %#x", slot, name, got, want)
				}
			}
		}
	})
}

// readMarks returns a function that returns the mark of the next datagram that the node receives, whatever its port.
func (n *node) readMarks() func() uint32 {
	t := n.mesh.t
	t.Helper()
	var conn net.PacketConn
	n.ns.do(t, func() {
		cfg := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (failed error) {
			err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVMARK, 1) })
			return errors.Join(err, failed)
		}}
		var err error
		if conn, err = cfg.ListenPacket(t.Context(), "ip4:17", "0.0.0.0"); err != nil {
			t.Error(err)
		}
	})
	if conn == nil {
		t.FailNow()
	}
	t.Cleanup(func() { conn.Close() })
	return func() uint32 {
		conn.SetDeadline(time.Now().Add(patience))
		control := make([]byte, 64)
		_, size, _, _, err := conn.(*net.IPConn).ReadMsgIP(make([]byte, 4096), control)
		if err != nil {
			t.Fatal(err)
		}
		messages, err := unix.ParseSocketControlMessage(control[:size])
		if err != nil || len(messages) != 1 || messages[0].Header.Type != unix.SO_MARK {
			t.Fatalf("with the packet came %v, %v", messages, err)
		}
		return uint32(messages[0].Data[0]) | uint32(messages[0].Data[1])<<8 | uint32(messages[0].Data[2])<<16 | uint32(messages[0].Data[3])<<24
	}
}

// TestWireGuardLetsOut: into WireGuard goes only the tunnel, from the slot's address to nodes' tunnel addresses.
func TestWireGuardLetsOut(t *testing.T) {
	eachAttachment(t, func(t *testing.T, attachment options) {
		eachPods(t, func(t *testing.T, opts options) {
			opts.clsact = attachment.clsact
			m := newMesh(t, opts, 1, 2)
			n, far := m.nodes[0], m.nodes[1]
			device := n.farWireGuard(far)
			own, remote, nobody := n.row.TunnelAddress(0), far.row.TunnelAddress(0), outsider(n.row.TunnelAddress(0))
			n.ns.do(t, func() {
				link, err := netlink.LinkByName("causeway-wg0")
				must(t, err)
				must(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: host(n.row.TunnelAddress(1)), Flags: unix.IFA_F_NODAD}))
				must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(nobody)}))
			})
			for _, c := range []struct {
				name     string
				from, to netip.Addr
				port     uint16
				size     int
				passes   bool
			}{
				{"the tunnel's", own, remote, 4789, 100, true},
				{"in pieces", own, remote, 4789, 2000, true},
				{"another port", own, remote, 53, 100, false},
				{"from the other slot", n.row.TunnelAddress(1), remote, 4789, 100, false},
				{"to nobody", own, nobody, 4789, 100, false},
			} {
				t.Run(c.name, func(t *testing.T) {
					before := n.dropped()
					n.datagram(c.from, netip.AddrPortFrom(c.to, c.port), bytes.Repeat([]byte{1}, c.size))
					if !c.passes {
						before[datapath.DropNotVXLAN]++
					} else if got := device.next(t); !bytes.Contains(got, c.from.AsSlice()) || !bytes.Contains(got, c.to.AsSlice()) {
						t.Errorf("what left is %x", got)
					} else if c.size > 1500 {
						device.next(t)
					}
					if after := n.dropped(); !sameCounts(before, after) {
						t.Errorf("drops are %v, want %v", after, before)
					}
				})
			}
			// What was refused has not left: this is all that does.
			n.datagram(own, netip.AddrPortFrom(remote, 4789), []byte("last"))
			if got := device.next(t); !bytes.HasSuffix(got, []byte("last")) {
				t.Errorf("what left is %x", got)
			}
		})
	})
}

// datagram sends a datagram, which the kernel may cut and the programs may refuse, from an address of the node.
func (n *node) datagram(from netip.Addr, to netip.AddrPort, payload []byte) {
	t := n.mesh.t
	t.Helper()
	n.ns.do(t, func() {
		dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err := dialer.Dial("udp", to.String())
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		conn.Write(payload)
	})
}

// TestAttachWireGuardFollowsTheDevice: it may be said again, and a device that replaces another one takes its place.
func TestAttachWireGuardFollowsTheDevice(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		n, far := m.nodes[0], m.nodes[1]
		first := n.farWireGuard(far)
		wrong := packet{src: far.row.TunnelAddress(0), dst: n.row.TunnelAddress(0), dstPort: 53}.bytes()[14:]
		refuses := func(what string, d tun, want bool) {
			t.Helper()
			eventually(t, what, func() bool {
				before := n.drops(datapath.DropNotVXLAN)
				d.write(t, wrong)
				return n.drops(datapath.DropNotVXLAN)-before == map[bool]uint64{true: 1}[want]
			})
		}
		refuses("the device is guarded", first, true)
		must(t, n.attachWireGuard(0, "causeway-wg0"))
		refuses("the device is guarded once", first, true)

		second := n.tun("new", n.row.TunnelAddress(0), far.row.TunnelAddress(0))
		must(t, n.attachWireGuard(0, "new"))
		refuses("the new device is guarded", second, true)
		refuses("the former one no longer is", first, false)

		n.ns.do(t, func() {
			link, err := netlink.LinkByName("new")
			must(t, err)
			must(t, netlink.LinkDel(link))
		})
		third := n.tun("new", n.row.TunnelAddress(0), far.row.TunnelAddress(0))
		refuses("a device that is not known yet is not guarded", third, false)
		must(t, n.attachWireGuard(0, "new"))
		refuses("the device in place of a removed one is guarded", third, true)

		n.restart()
		refuses("the device is guarded while an agent starts", third, true)
		must(t, n.attachWireGuard(0, "new"))
		refuses("and once it has", third, true)
	})
}

// TestAttachWireGuardRefuses says why a device can't be a slot's.
func TestAttachWireGuardRefuses(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	n.tun("tun0", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"))
	n.config.Tunnel[0] = n.row.TunnelAddress(0)
	n.restart()
	for name, c := range map[string]struct {
		slot  uint8
		index int
	}{
		"no such device":         {0, 9999},
		"no such slot":           {identity.TunnelSlots, n.linkIndex("tun0")},
		"a slot without address": {1, n.linkIndex("tun0")},
		"a device with Ethernet": {0, n.linkIndex("eth0")},
	} {
		n.ns.do(t, func() {
			if err := n.dp.AttachWireGuard(c.slot, c.index); err == nil {
				t.Errorf("%s: it was attached", name)
			} else {
				t.Log(err)
			}
		})
	}
	must(t, n.attachWireGuard(0, "tun0"))
}
