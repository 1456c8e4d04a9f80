package datapath_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"causeway/datapath"
	"causeway/identity"
)

// TestOverlayTakesOnlyWhatTheSenderMaySend sends hand-made VXLAN packets from one node to another.
func TestOverlayTakesOnlyWhatTheSenderMaySend(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newPodsMesh(t, opts, 1, 2)
		sender, receiver := m.nodes[0], m.nodes[1]
		client, pod := sender.addPod(300), receiver.addPod(300)
		stranger := newStranger(t, m)
		inbox := pod.inbox(7002)
		own, foreign := uint32(client.row.Identity), uint32(pod.row.Identity)

		good := packet{src: client.addr(), dst: pod.addr(), dstPort: 7002}
		with := func(change func(*packet)) packet { p := good; change(&p); return p }
		for _, c := range []struct {
			name   string
			from   namespace
			vni    uint32
			packet packet
			drop   string // empty: it arrives
		}{
			{"its own identity", sender.ns, own, good, ""},
			{"another cluster's identity", sender.ns, foreign, good, datapath.DropForeignIdentity},
			{"a local part that is reserved", sender.ns, 1<<16 | 6, good, datapath.DropForeignIdentity},
			{"no identity", sender.ns, 0, good, datapath.DropForeignIdentity},
			{"the identity of the world", sender.ns, 2, good, datapath.DropForeignIdentity},
			{"a client outside, by itself", sender.ns, 2, with(func(p *packet) { p.src = sender.podSide() }), ""},
			{"a client outside, by another node", sender.ns, 2, with(func(p *packet) { p.src = receiver.podSide() }), datapath.DropForeignIdentity},
			{"itself", sender.ns, 6, with(func(p *packet) { p.src = sender.row.Address }), ""},
			{"itself as the host", sender.ns, 1, with(func(p *packet) { p.src = sender.row.Address }), ""},
			{"itself with a pod's address", sender.ns, 6, good, datapath.DropForeignIdentity},
			{"itself with another node's address", sender.ns, 6, with(func(p *packet) { p.src = receiver.row.Address }), datapath.DropForeignIdentity},
			{"from a stranger", stranger, own, good, datapath.DropUnknownNode},
			{"to nobody", sender.ns, own, with(func(p *packet) { p.dst = receiver.inRange(200) }), datapath.DropNoEndpoint},
			{"to the world", sender.ns, own, with(func(p *packet) { p.dst = outsider(p.dst) }), datapath.DropNoEndpoint},
			{"last hop", sender.ns, own, with(func(p *packet) { p.ttl = 1 }), datapath.DropTTLExpired},
			{"of another IP version", sender.ns, own, with(func(p *packet) { p.etherType = 0x86dd ^ 0x0800 ^ etherType(p.src) }), datapath.DropMalformed},
			{"no IP", sender.ns, own, with(func(p *packet) { p.etherType = 0x88b5 }), datapath.DropNotIP},
		} {
			t.Run(c.name, func(t *testing.T) {
				c.packet.payload = []byte(c.name)
				before := receiver.drops(c.drop)
				out, err := c.from.dial(t, "udp", netip.AddrPortFrom(receiver.row.Address, 4789))
				if err != nil {
					t.Fatal(err)
				}
				defer out.Close()
				if _, err := out.Write(vxlan(c.vni, c.packet.bytes())); err != nil {
					t.Fatal(err)
				}
				if c.drop == "" {
					if got := inbox.next(t); got != c.name {
						t.Errorf("the pod got %q", got)
					}
					return
				}
				eventually(t, "the drop is counted as "+c.drop, func() bool { return receiver.drops(c.drop) == before+1 })
				// What is sent after it is all that arrives.
				last := good
				last.payload = []byte("good")
				if _, err := mustDial(t, sender.ns, receiver.row.Address).Write(vxlan(own, last.bytes())); err != nil {
					t.Fatal(err)
				}
				if got := inbox.next(t); got != "good" {
					t.Errorf("the pod got %q", got)
				}
			})
		}
	})
}

// TestNodeSendsNothingToNobody: the node's own packets into the tunnel need a known address.
func TestNodeSendsNothingToNobody(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		n := m.nodes[0]
		send := func(to netip.Addr) {
			conn, err := n.ns.dial(t, "udp", netip.AddrPortFrom(to, 9))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Write([]byte("x"))
		}
		send(m.nodes[1].inRange(200))
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropUnusedAddress) == 1 })
		closed := n.tunnelTo(m.nodes[1])
		closed.Mode = identity.TunnelClosed
		must(t, n.dp.Tunnels().Update(t.Context(), closed))
		send(m.nodes[1].addPod(300).addr())
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropUnencrypted) == 1 })
		must(t, n.dp.Tunnels().Delete(t.Context(), closed))
		send(m.nodes[1].pods[0].addr())
		eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropNoNode) == 1 })
	})
}

// newStranger is a machine on the underlay that is no node.
func newStranger(t *testing.T, m *mesh) namespace {
	t.Helper()
	bare := &mesh{t: t, underlay: m.underlay, options: m.options}
	bare.options.bare = true
	bare.nodes = make([]*node, 9)
	bare.addNode(9, 9)
	return bare.nodes[9].ns
}

func mustDial(t *testing.T, from namespace, to netip.Addr) net.Conn {
	t.Helper()
	conn, err := from.dial(t, "udp", netip.AddrPortFrom(to, 4789))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// inbox receives datagrams.
type inbox struct{ conn *net.UDPConn }

func (p *pod) inbox(port uint16) (in inbox) {
	t := p.node.mesh.t
	t.Helper()
	p.ns.do(t, func() {
		var err error
		in.conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.addr(), port)))
		must(t, err)
	})
	t.Cleanup(func() { in.conn.Close() })
	return in
}

func (in inbox) next(t *testing.T) string {
	t.Helper()
	buf := make([]byte, 65536)
	in.conn.SetReadDeadline(time.Now().Add(patience))
	n, _, err := in.conn.ReadFromUDP(buf)
	if err != nil {
		t.Fatalf("nothing arrived: %v", err)
	}
	return string(buf[:n])
}

// eventually waits for a condition that the kernel reports no change of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
