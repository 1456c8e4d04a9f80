package datapath_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
)

// BenchmarkThroughput sends TCP from pod to pod across nodes for b.Loop's time: through Causeway, and over the same
// underlay through a plain VXLAN device with the kernel's routing. One iteration is one MiB.
func BenchmarkThroughput(b *testing.B) {
	b.Run("causeway", func(b *testing.B) {
		m := newMesh(b, options{}, 1, 2)
		benchmarkTCP(b, m.nodes[0].addPod(300).ns, m.nodes[1].addPod(300).ns, m.nodes[1].pods[0].addr())
	})
	b.Run("plain-vxlan", func(b *testing.B) {
		m := newMesh(b, options{bare: true}, 1, 2)
		from, to := m.nodes[0].addPlainPod(m.nodes[1]), m.nodes[1].addPlainPod(m.nodes[0])
		benchmarkTCP(b, from, to, m.nodes[1].plainAddr())
	})
}

func benchmarkTCP(b *testing.B, from, to namespace, addr netip.Addr) {
	at := netip.AddrPortFrom(addr, 7001)
	received := to.receive(b, at)
	conn, err := from.dial(b, "tcp4", at)
	if err != nil {
		b.Fatal(err)
	}
	must(b, conn.SetDeadline(time.Time{}))
	chunk := make([]byte, 1<<20)
	b.SetBytes(int64(len(chunk)))
	sent := int64(0)
	for b.Loop() {
		n, err := conn.Write(chunk)
		if sent += int64(n); err != nil {
			b.Fatal(err)
		}
	}
	conn.Close()
	if got := <-received; got != sent {
		b.Errorf("%d of %d bytes arrived", got, sent)
	}
}

// receive takes one connection, and tells how many bytes it has brought when it ends.
func (n namespace) receive(t testing.TB, at netip.AddrPort) <-chan int64 {
	var listener net.Listener
	n.do(t, func() {
		var err error
		listener, err = net.Listen("tcp4", at.String())
		must(t, err)
	})
	if listener == nil {
		t.FailNow()
	}
	t.Cleanup(func() { listener.Close() })
	received := make(chan int64, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		// Not io.Copy, which would splice: here data shall be received as programs do.
		buf, sum := make([]byte, 1<<20), int64(0)
		for {
			n, err := conn.Read(buf)
			if sum += int64(n); err != nil {
				break
			}
		}
		received <- sum
	}()
	return received
}

func (n *node) plainAddr() netip.Addr { return n.row.PodCIDRs[0].Addr().Next() }

// addPlainPod connects a pod with nothing of Causeway: a veth, and a route to the other node's pods through a VXLAN
// device between the two.
func (n *node) addPlainPod(other *node) namespace {
	t := n.mesh.t
	pod := newNamespace(t)
	n.ns.do(t, func() {
		must(t, netlink.LinkAdd(&netlink.Vxlan{
			LinkAttrs: attrs("vxlan0"), VxlanId: 42, Port: 4789, Group: other.row.Address.AsSlice(), SrcAddr: n.row.Address.AsSlice(),
		}))
		up(t, "vxlan0")
		vxlan, err := netlink.LinkByName("vxlan0")
		must(t, err)
		must(t, netlink.LinkSetMTU(vxlan, podMTU))
		_, err = datapath.CreatePodLink(datapath.PodLinkConfig{NetNS: pod.path(), HostLink: "cw0", Address: n.plainAddr(), MTU: podMTU})
		must(t, err)
		// The tunnel has addresses of its own, by which the kernel finds the other end's MAC.
		tunnel := func(of *node) netip.Addr {
			a := of.row.Address.As4()
			return netip.AddrFrom4([4]byte{192, 168, a[2], a[3]})
		}
		addr, err := netlink.ParseAddr(tunnel(n).String() + "/16")
		must(t, err)
		must(t, netlink.AddrAdd(vxlan, addr))
		_, to, err := net.ParseCIDR(other.row.PodCIDRs[0].String())
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: vxlan.Attrs().Index, Dst: to, Gw: tunnel(other).AsSlice()}))
		sysctl(t, "net/ipv4/ip_forward", "1")
	})
	return pod
}
