package datapath_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf/features"
	"github.com/vishvananda/netlink"

	"causeway/datapath"
)

// echo answers TCP connections and UDP datagrams at the pod's port 7000 with what they send, until the test ends.
func (p *pod) echo() netip.AddrPort {
	t := p.node.mesh.t
	t.Helper()
	at := netip.AddrPortFrom(p.addr(), 7000)
	p.ns.do(t, func() { serveEcho(t, at) })
	return at
}

func serveEcho(t testing.TB, at netip.AddrPort) {
	t.Helper()
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	must(t, err)
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	must(t, err)
	if t.Failed() {
		return
	}
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { defer conn.Close(); io.Copy(conn, conn) }()
		}
	}()
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			udp.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
}

const patience = 3 * time.Second

// dial connects from the namespace.
func (n namespace) dial(t testing.TB, network string, to netip.AddrPort) (conn net.Conn, err error) {
	t.Helper()
	n.do(t, func() {
		if conn, err = net.DialTimeout(network, to.String(), patience); err == nil {
			conn.SetDeadline(time.Now().Add(patience))
		}
	})
	return conn, err
}

// exchange sends size random bytes and expects them back.
func exchange(t testing.TB, conn net.Conn, size int) {
	t.Helper()
	sent := make([]byte, size)
	rand.Read(sent)
	go conn.Write(sent)
	got := make([]byte, size)
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatalf("%s %s → %s: %v", conn.LocalAddr().Network(), conn.LocalAddr(), conn.RemoteAddr(), err)
	}
	if !bytes.Equal(sent, got) {
		t.Fatalf("%s → %s: the echo differs from what was sent", conn.LocalAddr(), conn.RemoteAddr())
	}
}

// reach exchanges data over TCP and UDP.
func (n namespace) reach(t testing.TB, to netip.AddrPort) {
	t.Helper()
	for network, size := range map[string]int{"tcp": 1 << 20, "udp": 1000} {
		conn, err := n.dial(t, network, to)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, conn, size)
		conn.Close()
	}
}

// hasTCX tells whether the kernel is 6.6 or later.
func hasTCX() bool {
	version, err := features.LinuxVersionCode()
	return err == nil && version >= 6<<16|6<<8
}

func eachAttachment(t *testing.T, test func(t *testing.T, opts options)) {
	if hasTCX() {
		t.Run("tcx", func(t *testing.T) { test(t, options{}) })
	}
	t.Run("clsact", func(t *testing.T) { test(t, options{clsact: true}) })
}

func TestPodsReachPods(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 1, 2)
		client := m.nodes[0].addPod(300)
		for name, n := range map[string]*node{"same node": m.nodes[0], "same cluster": m.nodes[1], "other cluster": m.nodes[2]} {
			t.Run(name, func(t *testing.T) { client.ns.reach(t, n.addPod(301).echo()) })
		}
		if want, got := map[bool]string{false: "tcx", true: "clsact"}[opts.clsact], m.nodes[0].dp.Attach(); got != want {
			t.Errorf("programs are attached by %s, not %s", got, want)
		}
	})
}

func TestNodesAndPodsReachEachOther(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		pods := [2]*pod{m.nodes[0].addPod(300), m.nodes[1].addPod(300)}
		for i, n := range m.nodes {
			at := netip.AddrPortFrom(n.row.Address, 7000)
			n.ns.do(t, func() { serveEcho(t, at) })
			t.Run("node to own pod", func(t *testing.T) { n.ns.reach(t, pods[i].echo()) })
			t.Run("pod to own node", func(t *testing.T) { pods[i].ns.reach(t, at) })
		}
		t.Run("node to remote pod", func(t *testing.T) { m.nodes[0].ns.reach(t, netip.AddrPortFrom(pods[1].addr(), 7000)) })
		t.Run("pod to remote node", func(t *testing.T) { pods[0].ns.reach(t, netip.AddrPortFrom(m.nodes[1].row.Address, 7000)) })
	})
}

// TestDualStackPods: pods with an address of each family reach each other by both, over an underlay of either.
func TestDualStackPods(t *testing.T) {
	for name, opts := range map[string]options{
		"IPv4 underlay": {ranges: []int{4, 6}},
		"IPv6 underlay": {ranges: []int{4, 6}, underlay6: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, opts, 1, 2)
			client, neighbour, remote := m.nodes[0].addPod(300), m.nodes[0].addPod(301), m.nodes[1].addPod(301)
			for _, server := range []*pod{neighbour, remote} {
				server.echo()
				at := netip.AddrPortFrom(server.row.Address6, 7000)
				server.ns.do(t, func() { serveEcho(t, at) })
				client.ns.reach(t, netip.AddrPortFrom(server.addr(), 7000))
				client.ns.reach(t, at)
			}
			m.nodes[0].ns.do(t, func() { must(t, m.nodes[0].dp.Endpoints().Delete(t.Context(), client.row)) })
			if conn, err := client.ns.dial(t, "tcp", netip.AddrPortFrom(remote.row.Address6, 7000)); err == nil {
				conn.Close()
				t.Error("the pod still reaches others by IPv6 after its deletion")
			}
		})
	}
}

// TestPodWithIPv6Alone: a node may have an IPv6 pod range only, whatever the underlay is of, and its pods have no IPv4.
func TestPodWithIPv6Alone(t *testing.T) {
	m := newMesh(t, options{ranges: []int{6}}, 1, 2)
	client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(301)
	client.ns.reach(t, server.echo())
	client.ns.do(t, func() {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		must(t, err)
		routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
		must(t, err)
		if len(addrs)+len(routes) != 0 {
			t.Errorf("the pod has IPv4 addresses %v and routes %v", addrs, routes)
		}
	})
	if unwanted := unwantedDrops(m.nodes[0], m.nodes[1]); len(unwanted) != 0 {
		t.Errorf("packets were dropped: %v", unwanted)
	}
}

// unwantedDrops are the nodes' but for what kernels send on their own.
func unwantedDrops(nodes ...*node) map[string]uint64 {
	unwanted := make(map[string]uint64)
	for _, n := range nodes {
		for reason, packets := range n.dropped() {
			if reason != datapath.DropIPv6LinkLocal {
				unwanted[reason] += packets
			}
		}
	}
	return unwanted
}

// lostOf sends n datagrams, one after the other, and counts the answers that don't come. On a slow machine they come late.
func lostOf(t *testing.T, from namespace, to netip.AddrPort, n int) int {
	t.Helper()
	conn, err := from.dial(t, "udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answers, buf := 0, make([]byte, 8)
	for range n {
		conn.SetDeadline(time.Now().Add(10 * time.Millisecond))
		conn.Write([]byte("ping"))
		if _, err := conn.Read(buf); err == nil {
			answers++
		}
	}
	conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
	for answers < n {
		if _, err := conn.Read(buf); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err == nil {
			answers++
		}
	}
	return n - answers
}
