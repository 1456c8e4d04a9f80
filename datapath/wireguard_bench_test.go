package datapath_test

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	stocktun "golang.zx2c4.com/wireguard/tun"

	"causeway/tunnel"
	causewaytun "causeway/tunnel/tun"
)

// wireGuardMTU is what an underlay of 1500 leaves.
const wireGuardMTU = 1440

// BenchmarkWireGuard measures from pod to pod by Causeway's programs, VXLAN in WireGuard, and beside it from node to node through a WireGuard tunnel of
// the same kind with the TUN device that comes with it, and nothing of Causeway. One iteration of Throughput is one MiB, and one of Latency is
// a round trip of a small packet.
func BenchmarkWireGuard(b *testing.B) {
	paths := []struct {
		name string
		make func(b *testing.B) path
	}{{"causeway", encryptedPods}, {"bare", bareTunnel}}
	for _, p := range paths {
		b.Run("Throughput/"+p.name, func(b *testing.B) {
			on := p.make(b)
			benchmarkTCP(b, on.from, on.to, on.addr)
		})
		b.Run("Latency/"+p.name, func(b *testing.B) {
			benchmarkRoundTrips(b, p.make(b))
		})
	}
}

// path is what a benchmark sends over.
type path struct {
	from, to namespace
	addr     netip.Addr // of to
}

// encryptedPods are pods of two nodes that have their node addresses on WireGuard devices of package tunnel/tun.
func encryptedPods(b *testing.B) path {
	m := newMesh(b, options{}, 1, 2)
	from, to := m.nodes[0].addPod(300), m.nodes[1].addPod(300)
	for _, n := range m.nodes {
		n.ns.do(b, func() {
			eth0, err := netlink.LinkByName("eth0")
			must(b, err)
			must(b, netlink.AddrDel(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: n.row.Address.AsSlice(), Mask: net.CIDRMask(16, 32)}}))
			setMTU(b, tunnel.DefaultName, wireGuardMTU-tunnel.OverheadIPv4)
		})
	}
	encrypt(b, m, func() (stocktun.Device, error) { return causewaytun.Open("wg0", wireGuardMTU, tunnel.DefaultPort) }, func(n *node) netip.Addr { return n.row.Address })
	for _, p := range []*pod{from, to} {
		p.ns.do(b, func() { setMTU(b, "eth0", wireGuardMTU-tunnel.OverheadIPv4) })
		p.node.ns.do(b, func() { setMTU(b, p.row.HostLink, wireGuardMTU-tunnel.OverheadIPv4) })
	}
	return path{from.ns, to.ns, to.addr()}
}

// bareTunnel is WireGuard between two nodes.
func bareTunnel(b *testing.B) path {
	m := newMesh(b, options{bare: true}, 1, 2)
	inside := func(n *node) netip.Addr { return n.row.PodCIDRs[0].Addr().Next() }
	encrypt(b, m, func() (stocktun.Device, error) { return stocktun.CreateTUN("wg0", wireGuardMTU) }, inside)
	return path{m.nodes[0].ns, m.nodes[1].ns, inside(m.nodes[1])}
}

// encrypt has the two nodes reach each other's inside address through WireGuard, on a device that open makes.
func encrypt(b *testing.B, m *mesh, open func() (stocktun.Device, error), inside func(n *node) netip.Addr) {
	outside := func(n *node) netip.AddrPort {
		a := n.row.Address.As4()
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 28, a[2], a[3]}), 51871)
	}
	keys := map[*node]*ecdh.PrivateKey{}
	for _, n := range m.nodes {
		var err error
		keys[n], err = ecdh.X25519().GenerateKey(rand.Reader)
		must(b, err)
	}
	for i, n := range slices.Backward(m.nodes) {
		// The first node alone knows where the other is, and is there last: handshakes of both at once would destroy each other, and one
		// that meets nobody is repeated only seconds later.
		other, endpoint := m.nodes[1-i], ""
		if i == 0 {
			endpoint = fmt.Sprintf("endpoint=%s\n", outside(other))
		}
		n.ns.do(b, func() {
			addAddr(b, "eth0", netip.PrefixFrom(outside(n).Addr(), 16))
			dev, err := open()
			if err != nil {
				b.Error(err)
				return
			}
			wireGuard := device.NewDevice(dev, bindIn{conn.NewDefaultBind(), b, n.ns}, device.NewLogger(device.LogLevelSilent, ""))
			b.Cleanup(wireGuard.Close)
			must(b, wireGuard.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\n%sallowed_ip=%s/32\n",
				hex.EncodeToString(keys[n].Bytes()), outside(n).Port(), hex.EncodeToString(keys[other].PublicKey().Bytes()), endpoint, inside(other))))
			addAddr(b, "wg0", netip.PrefixFrom(inside(n), 8))
			must(b, wireGuard.Up())
			up(b, "wg0")
		})
	}
	awaitTunnel(b, m.nodes[0].ns, netip.AddrPortFrom(inside(m.nodes[1]), 9))
	if b.Failed() {
		b.FailNow()
	}
}

// bindIn opens its sockets in a namespace, whichever thread learns that the device is up.
type bindIn struct {
	conn.Bind
	b  *testing.B
	ns namespace
}

func (i bindIn) Open(port uint16) (receive []conn.ReceiveFunc, actual uint16, err error) {
	i.ns.do(i.b, func() { receive, actual, err = i.Bind.Open(port) })
	return receive, actual, err
}

// awaitTunnel waits until an address is reached through WireGuard, where nobody listens.
func awaitTunnel(b *testing.B, from namespace, to netip.AddrPort) {
	from.do(b, func() {
		for begin := time.Now(); time.Since(begin) < 30*time.Second; {
			if _, err := net.DialTimeout("tcp4", to.String(), 200*time.Millisecond); errors.Is(err, unix.ECONNREFUSED) {
				return
			}
		}
		b.Errorf("%s is not reached through WireGuard", to.Addr())
	})
}

func addAddr(b *testing.B, name string, addr netip.Prefix) {
	link, err := netlink.LinkByName(name)
	must(b, err)
	must(b, netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())}}))
}

func setMTU(b *testing.B, name string, mtu int) {
	link, err := netlink.LinkByName(name)
	must(b, err)
	must(b, netlink.LinkSetMTU(link, mtu))
}

// benchmarkRoundTrips sends a small packet of UDP there and back, one after the other, and reports the median and the 99th percentile.
func benchmarkRoundTrips(b *testing.B, on path) {
	at := netip.AddrPortFrom(on.addr, 7002)
	var server *net.UDPConn
	on.to.do(b, func() {
		var err error
		server, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		must(b, err)
	})
	defer server.Close()
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	client, err := on.from.dial(b, "udp4", at)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	trip := func(wait time.Duration) (time.Duration, error) {
		begin, buf := time.Now(), make([]byte, 64)
		must(b, client.SetDeadline(begin.Add(wait)))
		if _, err := client.Write(buf); err != nil {
			return 0, err
		}
		_, err := client.Read(buf)
		return time.Since(begin), err
	}
	if _, err := trip(5 * time.Second); err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		d, err := trip(5 * time.Second)
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, d)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1000, "p99-µs")
}
