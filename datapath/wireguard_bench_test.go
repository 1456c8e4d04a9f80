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
)

// wireGuardMTU is what an underlay of IPv4 leaves to packets in WireGuard, in bytes: the same as Causeway's devices have.
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

// encryptedPods are pods of two nodes that are set up as agents do it that encrypt all.
func encryptedPods(b *testing.B) path {
	m := newEncryptedMesh(b, 1, 2)
	from, to := m.nodes[0].addPod(300), m.nodes[1].addPod(300)
	return path{from.ns, to.ns, to.addr()}
}

// bareTunnel is WireGuard between two nodes, in a process for each as Causeway's.
func bareTunnel(b *testing.B) path {
	m := newMesh(b, options{bare: true}, 1, 2)
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
			endpoint = fmt.Sprintf("endpoint=%s\n", netip.AddrPortFrom(other.row.Address, wireGuardPorts[0]))
		}
		startBare(b, n.ns, "wg0", fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\n%sallowed_ip=%s/32\n",
			hex.EncodeToString(keys[n].Bytes()), wireGuardPorts[0], hex.EncodeToString(keys[other].PublicKey().Bytes()), endpoint, other.plainAddr()))
		n.ns.do(b, func() {
			addAddr(b, "wg0", netip.PrefixFrom(n.plainAddr(), 8))
			up(b, "wg0")
		})
	}
	awaitTunnel(b, m.nodes[0].ns, netip.AddrPortFrom(m.nodes[1].plainAddr(), 9))
	if b.Failed() {
		b.FailNow()
	}
	return path{m.nodes[0].ns, m.nodes[1].ns, m.nodes[1].plainAddr()}
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
