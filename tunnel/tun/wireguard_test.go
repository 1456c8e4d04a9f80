package tun

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// pair is two nodes with WireGuard between them, and VXLAN inside of it.
type pair [2]*endNode

type endNode struct {
	ns       namespace
	underlay netip.Addr
	tunnel   [2]netip.Addr // IPv4, IPv6: the ends of VXLAN
	inside   [2]netip.Addr // addresses on the VXLAN device
	device   *Device
	key      *ecdh.PrivateKey
	bind     *lossyBind
}

const (
	wireGuardPort = 51871
	wireGuardMTU  = 1440
)

// newPair connects two nodes. VXLAN runs between their IPv6 tunnel addresses if outer6. change may change a device before it is used.
func newPair(t testing.TB, outer6 bool, change func(i int, d *Device)) *pair {
	t.Helper()
	p := &pair{}
	for i := range p {
		n := byte(i + 1)
		p[i] = &endNode{
			ns: newNamespace(t), underlay: netip.AddrFrom4([4]byte{10, 77, 0, n}), bind: &lossyBind{Bind: conn.NewDefaultBind()},
			tunnel: [2]netip.Addr{netip.AddrFrom4([4]byte{10, 88, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x88, 15: n})},
			inside: [2]netip.Addr{netip.AddrFrom4([4]byte{10, 99, 0, n}), netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 15: n})},
		}
		var err error
		if p[i].key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			t.Fatal(err)
		}
		p[i].device = open(t, p[i].ns, "wg0", wireGuardMTU)
		if change != nil {
			change(i, p[i].device)
		}
	}
	p[0].ns.do(t, func() {
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs("eth0"), PeerName: "eth0", PeerNamespace: netlink.NsFd(int(p[1].ns.handle))}))
	})
	family := 0
	if outer6 {
		family = 1
	}
	for i := range slices.Backward(p[:]) { // The one that asks for a session is there last.
		p[i].connect(t, p[1-i], family)
	}
	p.await(t, family)
	return p
}

// await waits until the nodes reach each other in VXLAN.
func (p *pair) await(t testing.TB, family int) {
	to := netip.AddrPortFrom(p[1].inside[family], 9).String()
	p[0].ns.do(t, func() {
		for begin := time.Now(); time.Since(begin) < 20*time.Second; {
			// Nobody listens there; that it is refused says that it got there.
			if _, err := net.DialTimeout("tcp", to, 200*time.Millisecond); errors.Is(err, unix.ECONNREFUSED) {
				return
			}
		}
		t.Errorf("%s is not reached through WireGuard", to)
	})
}

// connect makes a node's end.
func (n *endNode) connect(t testing.TB, other *endNode, family int) {
	// One alone knows where the other is: handshakes of both at once would destroy each other, and cost seconds.
	endpoint := ""
	if n.underlay.Less(other.underlay) {
		endpoint = fmt.Sprintf("endpoint=%s\n", netip.AddrPortFrom(other.underlay, wireGuardPort))
	}
	n.ns.do(t, func() {
		addAddress(t, "eth0", n.underlay, 24)
		up(t, "eth0")
		d := device.NewDevice(n.device, n.bind, device.NewLogger(device.LogLevelSilent, ""))
		t.Cleanup(d.Close)
		must(t, d.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\n%sallowed_ip=%s/32\nallowed_ip=%s/128\n",
			hex.EncodeToString(n.key.Bytes()), wireGuardPort, hex.EncodeToString(other.key.PublicKey().Bytes()),
			endpoint, other.tunnel[0], other.tunnel[1])))
		addAddress(t, "wg0", n.tunnel[0], 24)
		addAddress(t, "wg0", n.tunnel[1], 64)
		must(t, d.Up()) // before the device says that it is up, which would open the sockets in whatever namespace the thread is in
		up(t, "wg0")

		must(t, netlink.LinkAdd(&netlink.Vxlan{
			LinkAttrs: attrs("vxlan0"), VxlanId: 42, Port: vxlanPort, Group: other.tunnel[family].AsSlice(), SrcAddr: n.tunnel[family].AsSlice(), UDPCSum: family == 1,
		}))
		link, err := netlink.LinkByName("vxlan0")
		must(t, err)
		overhead := 50 + 20*family
		must(t, netlink.LinkSetMTU(link, wireGuardMTU-overhead))
		addAddress(t, "vxlan0", n.inside[0], 24)
		addAddress(t, "vxlan0", n.inside[1], 64)
		up(t, "vxlan0")
	})
}

func addAddress(t testing.TB, name string, addr netip.Addr, bits int) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Errorf("finding %s: %v", name, err)
		return
	}
	must(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, addr.BitLen())}, Flags: 2 /* IFA_F_NODAD */}))
}

// lossyBind loses a part of what is sent.
type lossyBind struct {
	conn.Bind
	mu   sync.Mutex
	loss float64 // 0 to 1
	lost int
}

// lose loses that part from now on.
func (b *lossyBind) lose(part float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.loss = part
}

// lostPackets is how many were lost.
func (b *lossyBind) lostPackets() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lost
}

func (b *lossyBind) Send(bufs [][]byte, to conn.Endpoint) error {
	b.mu.Lock()
	kept := make([][]byte, 0, len(bufs))
	for _, p := range bufs {
		// What is smaller is a handshake, or nothing; that is lost for seconds.
		if len(p) > 160 && mathrand.Float64() < b.loss {
			b.lost++
			continue
		}
		kept = append(kept, p)
	}
	b.mu.Unlock()
	if len(kept) == 0 {
		return nil
	}
	return b.Bind.Send(kept, to)
}

// counter returns one of the namespace's, of /proc/net/snmp or of its IPv6 brother.
func (n *endNode) counter(t testing.TB, name string) (value int) {
	t.Helper()
	n.ns.do(t, func() {
		group, field, _ := strings.Cut(name, ".")
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		must(t, err)
		var names []string
		for line := range strings.Lines(string(b)) {
			if fields := strings.Fields(line); fields[0] != group+":" {
				continue
			} else if names == nil {
				names = fields
			} else {
				for i, is := range names {
					if is == field {
						value, err = strconv.Atoi(fields[i])
						must(t, err)
						return
					}
				}
			}
		}
		if b, err = os.ReadFile("/proc/thread-self/net/snmp6"); err == nil {
			for line := range strings.Lines(string(b)) {
				if fields := strings.Fields(line); fields[0] == group+field {
					value, err = strconv.Atoi(fields[1])
					must(t, err)
					return
				}
			}
		}
		t.Errorf("there is no counter %s", name)
	})
	return value
}

// perPacket returns how many bytes a packet has on average that goes into the node's WireGuard device, and that comes out of it.
func (n *endNode) perPacket(t testing.TB) (in, out int) {
	t.Helper()
	n.ns.do(t, func() {
		link, err := netlink.LinkByName("wg0")
		must(t, err)
		s := link.Attrs().Statistics
		in, out = int(s.TxBytes/max(s.TxPackets, 1)), int(s.RxBytes/max(s.RxPackets, 1))
	})
	return in, out
}
