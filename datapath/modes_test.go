package datapath_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/identity"
)

// wireGuardMark is what the programs know packets by that came out of WireGuard, as bpf/lib/wireguard.h has it.
const wireGuardMark = 0xca5e0000

// tunnelAddresses puts the nodes' tunnel addresses on the underlay itself, which stands in for WireGuard.
func (m *mesh) tunnelAddresses() {
	for _, n := range m.nodes {
		n.ns.do(m.t, func() {
			eth0, err := netlink.LinkByName("eth0")
			must(m.t, err)
			for slot := range uint8(identity.TunnelSlots) {
				must(m.t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: host(n.row.TunnelAddress(slot)), Flags: unix.IFA_F_NODAD}))
			}
			for _, other := range m.nodes {
				for slot := range uint8(identity.TunnelSlots) {
					if other != n {
						must(m.t, netlink.RouteAdd(&netlink.Route{
							LinkIndex: eth0.Attrs().Index, Dst: host(other.row.TunnelAddress(slot)), Scope: netlink.SCOPE_LINK,
						}))
					}
				}
			}
		})
	}
}

func host(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

// mark marks what the node receives from the underlay, as it is when it comes out of WireGuard; 0 ends it.
func (n *node) mark(mark uint32) {
	t := n.mesh.t
	t.Helper()
	const markOffset = 8 // in struct __sk_buff
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{
		asm.Mov.Imm32(asm.R2, int32(mark)), asm.StoreMem(asm.R1, markOffset, asm.R2, asm.Word), asm.Mov.Imm(asm.R0, -1), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	n.ns.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		index := eth0.Attrs().Index
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscAdd(qdisc); !errors.Is(err, unix.EEXIST) {
			must(t, err)
		}
		must(t, netlink.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Handle: 1, Protocol: unix.ETH_P_ALL},
			Fd:          prog.FD(), Name: "mark", DirectAction: true,
		}))
	})
}

// encryptedTo is the row of the way to another node inside of WireGuard.
func (n *node) encryptedTo(other *node, local, remote uint8) identity.Tunnel {
	row := n.tunnelTo(other)
	row.Mode, row.Keys = identity.TunnelWireGuard, []identity.TunnelKey{{Slot: remote}}
	row.Local, row.Remote = n.row.TunnelAddress(local), other.row.TunnelAddress(remote)
	return row
}

// eachPods runs a test with pods and tunnel addresses of each family, on an underlay of each.
func eachPods(t *testing.T, test func(t *testing.T, opts options)) {
	eachFamily(t, test)
	t.Run("IPv6 on IPv4", func(t *testing.T) { test(t, options{ranges: []int{6}}) })
}

// TestPodsReachPodsInWireGuard: between tunnel addresses, by any pair of slots, and while a node has two keys.
func TestPodsReachPodsInWireGuard(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		m.tunnelAddresses()
		client, server := a.addPod(300), b.addPod(301)
		at := server.echo()
		e := a.openEcho()
		a.mark(wireGuardMark)
		b.mark(wireGuardMark + 1)
		for nonce, pair := range [][2]uint8{{0, 0}, {0, 1}, {1, 0}, {1, 1}} {
			there, back := a.encryptedTo(b, pair[0], pair[1]), b.encryptedTo(a, pair[1], pair[0])
			if nonce == 1 { // A key is added before the other one goes.
				there.Keys = []identity.TunnelKey{{Slot: 1}, {Slot: 0}}
			}
			must(t, a.dp.Tunnels().Update(t.Context(), there))
			must(t, b.dp.Tunnels().Update(t.Context(), back))
			client.ns.reach(t, at)
			next := a.capture()
			must(t, e.SendPods(b.podSide(), uint64(nonce), 0))
			expectAnswer(t, e, b, uint64(nonce))
			must(t, e.Send(b.row.Address, uint64(nonce)+100))
			expectAnswer(t, e, b, uint64(nonce)+100)
			for range 2 {
				if p, ok := next(); !ok || p.src != there.Local || p.dst != there.Remote {
					t.Errorf("slots %v: on the wire is %+v, want it from %s to %s", pair, p, there.Local, there.Remote)
				}
			}
		}
		if unwanted := unwantedDrops(a, b); len(unwanted) != 0 {
			t.Errorf("packets were dropped: %v", unwanted)
		}
	})
}

// TestOverlayTakesOnlyWhatCameByItsWay sends hand-made VXLAN packets from each address of a node, marked as out of WireGuard or not.
func TestOverlayTakesOnlyWhatCameByItsWay(t *testing.T) {
	eachPods(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		sender, receiver := m.nodes[0], m.nodes[1]
		m.tunnelAddresses()
		client, pod := sender.addPod(300), receiver.addPod(300)
		inbox := pod.inbox(7002)
		underlay, slot0, slot1 := sender.row.Address, sender.row.TunnelAddress(0), sender.row.TunnelAddress(1)
		plain, encrypted := receiver.tunnelTo(sender), receiver.encryptedTo(sender, 0, 0)
		closed := plain
		closed.Mode, closed.Local, closed.Remote = identity.TunnelClosed, netip.Addr{}, netip.Addr{}
		for _, c := range []struct {
			name string
			way  identity.Tunnel
			from netip.Addr
			mark uint32
			drop string // empty: it arrives
		}{
			{"plain", plain, underlay, 0, ""},
			{"plain, with somebody's mark", plain, underlay, 0x1234, ""},
			{"plain, out of WireGuard", plain, underlay, wireGuardMark, datapath.DropCleartext},
			{"plain, from a tunnel address", plain, slot0, 0, datapath.DropUnknownNode},
			{"encrypted", encrypted, slot0, wireGuardMark, ""},
			{"encrypted, in the other slot of the receiver", encrypted, slot0, wireGuardMark + 1, ""},
			{"encrypted, in a slot without key", encrypted, slot1, wireGuardMark, datapath.DropUnknownNode},
			{"encrypted, but not out of WireGuard", encrypted, slot0, 0, datapath.DropCleartext},
			{"encrypted, with somebody's mark", encrypted, slot0, 0x1234, datapath.DropCleartext},
			{"encrypted, but on the underlay", encrypted, underlay, 0, datapath.DropCleartext},
			{"encrypted, from the underlay's address", encrypted, underlay, wireGuardMark, datapath.DropCleartext},
			{"closed", closed, underlay, 0, datapath.DropCleartext},
			{"closed, out of WireGuard", closed, underlay, wireGuardMark, datapath.DropCleartext},
			{"closed, from a tunnel address", closed, slot0, wireGuardMark, datapath.DropUnknownNode},
		} {
			t.Run(c.name, func(t *testing.T) {
				must(t, receiver.dp.Tunnels().Update(t.Context(), c.way))
				receiver.mark(c.mark)
				before := receiver.dropped()
				good := packet{src: client.addr(), dst: pod.addr(), dstPort: 7002, payload: []byte(c.name)}
				sender.sendFrom(c.from, receiver.row.Address, vxlan(uint32(client.row.Identity), good.bytes()))
				if c.drop == "" {
					if got := inbox.next(t); got != c.name {
						t.Errorf("the pod got %q", got)
					}
				} else {
					eventually(t, "the drop is counted as "+c.drop, func() bool { return receiver.drops(c.drop) == before[c.drop]+1 })
					before[c.drop]++
				}
				if after := receiver.dropped(); !sameCounts(before, after) {
					t.Errorf("drops are %v, want %v", after, before)
				}
			})
		}
		inbox.conn.SetReadDeadline(time.Now())
		if n, _, err := inbox.conn.ReadFromUDP(make([]byte, 64)); err == nil {
			t.Errorf("%d bytes arrived that were dropped", n)
		}
	})
}

// sendFrom sends a datagram to the VXLAN port, from an address of the node.
func (n *node) sendFrom(from, to netip.Addr, datagram []byte) {
	t := n.mesh.t
	t.Helper()
	n.ns.do(t, func() {
		// An address of the other family can't send there, so it goes to the receiver's address of its own.
		dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		for _, other := range n.mesh.nodes {
			if other.row.Address == to && from.Is4() != to.Is4() {
				to = other.row.TunnelAddress(0)
			}
		}
		conn, err := dialer.Dial("udp", netip.AddrPortFrom(to, 4789).String())
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, err = conn.Write(datagram)
		must(t, err)
	})
}

// TestMarkEndsInTheOverlay: neither pods' nor the node's own sockets see that a packet came out of WireGuard.
func TestMarkEndsInTheOverlay(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	m.tunnelAddresses()
	must(t, b.dp.Tunnels().Update(t.Context(), b.encryptedTo(a, 0, 0)))
	b.mark(wireGuardMark)
	var conn net.PacketConn
	b.ns.do(t, func() {
		cfg := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (failed error) {
			err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVMARK, 1) })
			return errors.Join(err, failed)
		}}
		var err error
		conn, err = cfg.ListenPacket(context.Background(), "udp", netip.AddrPortFrom(b.row.Address, 7002).String())
		must(t, err)
	})
	if conn == nil {
		t.FailNow()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	client := a.addPod(300)
	inner := packet{src: client.addr(), dst: b.row.Address, dstPort: 7002, payload: []byte("x")}
	a.sendFrom(a.row.TunnelAddress(0), b.row.Address, vxlan(uint32(client.row.Identity), inner.bytes()))
	control := make([]byte, 64)
	_, n, _, _, err := conn.(*net.UDPConn).ReadMsgUDPAddrPort(make([]byte, 16), control)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 || messages[0].Header.Type != unix.SO_MARK {
		t.Fatalf("with the packet came %v, %v", messages, err)
	}
	for _, b := range messages[0].Data[:4] {
		if b != 0 {
			t.Fatalf("the packet's mark is %x", messages[0].Data)
		}
	}
}
