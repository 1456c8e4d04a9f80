package datapath_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"causeway/datapath"
)

// What an echo is on the wire, as bpf/lib/echo.h has it.
const (
	echoPort    = 8473
	echoRequest = 1
	echoReply   = 2
)

func (n *node) openEcho() *datapath.Echo {
	t := n.mesh.t
	t.Helper()
	var e *datapath.Echo
	n.ns.do(t, func() {
		var err error
		e, err = n.dp.OpenEcho()
		must(t, err)
	})
	if e == nil {
		t.FailNow()
	}
	t.Cleanup(func() { must(t, e.Close()) })
	return e
}

// expectAnswer waits for the next answer.
func expectAnswer(t testing.TB, e *datapath.Echo, from *node, nonce uint64) {
	t.Helper()
	select {
	case a := <-e.Answers():
		if a.Node != from.row.Address || a.Nonce != nonce {
			t.Fatalf("%s answers with nonce %d, want %s with %d", a.Node, a.Nonce, from.row.Address, nonce)
		}
	case <-time.After(patience):
		t.Fatalf("%s doesn't answer nonce %d", from.row.Address, nonce)
	}
}

// echoPacket is an echo as a node sends it to another.
func echoPacket(kind uint8, nonce uint64, from, to netip.Addr) packet {
	payload := append([]byte("causeway"), kind, 0, echoRequest+echoReply-kind, 0, 0, 0, 0, 0)
	p := packet{src: from, dst: to, srcPort: 40000, dstPort: echoPort, payload: binary.NativeEndian.AppendUint64(payload, nonce)}
	if kind == echoReply {
		p.srcPort, p.dstPort = echoPort, 40000
	}
	return p
}

// TestEchoIsAnsweredWithoutAgent: maps, programs and devices are all that it takes.
func TestEchoIsAnsweredWithoutAgent(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 1, 2)
		asker := m.nodes[0]
		e := asker.openEcho()
		before := []map[string]uint64{m.nodes[0].dropped(), m.nodes[1].dropped(), m.nodes[2].dropped()}
		for _, n := range m.nodes[1:] {
			must(t, n.dp.Close())
			for nonce := range uint64(20) {
				start := time.Now()
				must(t, e.Send(n.row.Address, nonce<<56|nonce))
				expectAnswer(t, e, n, nonce<<56|nonce)
				if took := time.Since(start); took > patience {
					t.Errorf("the answer took %v", took)
				}
			}
			n.load()
		}
		for i, n := range m.nodes {
			if after := n.dropped(); !sameCounts(before[i], after) {
				t.Errorf("%s: drops were %v and are %v", n.row.Name, before[i], after)
			}
		}
	})
}

// TestEchoOnTheWire: the answer is the request turned round, with sound headers, to the asker and in the node's name.
func TestEchoOnTheWire(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		asker, asked := m.nodes[0], m.nodes[1]
		e := asker.openEcho()
		question, answer := asker.capture(), asked.capture()
		must(t, e.Send(asked.row.Address, 1<<63|7))
		expectAnswer(t, e, asked, 1<<63|7)
		q, ok1 := question()
		a, ok2 := answer()
		if !ok1 || !ok2 || q.dst != asked.row.Address || a.dst != asker.row.Address || q.vni != 6 || a.vni != 6 || a.length != q.length {
			t.Fatalf("on the wire are %+v and %+v", q, a)
		}
		expectTurnedRound(t, q.inner, a.inner, asker.row.Address, asked.row.Address)
	})
}

// expectTurnedRound checks that one echo is the other turned round, between the addresses, and that both have sound checksums.
func expectTurnedRound(t *testing.T, question, answer []byte, asker, asked netip.Addr) {
	t.Helper()
	udp, size := 14+headerLen(asker), asker.BitLen()/8
	addresses := udp - 2*size
	want := bytes.Clone(question)
	copy(want[0:12], append(bytes.Clone(question[6:12]), question[6:12]...))
	want[11] ^= 1 // The asker's device drops what comes from its own address.
	copy(want[addresses:], append(asked.AsSlice(), asker.AsSlice()...))
	copy(want[udp:], append(bytes.Clone(question[udp+2:udp+4]), question[udp:udp+2]...))
	want[udp+8+8], want[udp+8+10] = echoReply, echoRequest
	if !bytes.Equal(answer, want) {
		t.Errorf("the answer is\n%x, want\n%x", answer, want)
	}
	for _, p := range [][]byte{question, answer} {
		from, _ := netip.AddrFromSlice(p[addresses : addresses+size])
		to, _ := netip.AddrFromSlice(p[addresses+size : udp])
		if asker.Is4() && (checksum(p[14:34]) != 0 || p[udp+6] != 0 || p[udp+7] != 0) {
			t.Errorf("the IPv4 checksum is wrong, or there is a UDP one: %x", p)
		}
		if asker.Is6() && checksum(pseudoHeader(from, to, p[udp:])) != 0 {
			t.Errorf("the UDP checksum is wrong: %x", p)
		}
	}
}

// TestEchoIsBetweenNodesOnly sends hand-made VXLAN packets, and then a good request: its answer is the only one.
func TestEchoIsBetweenNodesOnly(t *testing.T) {
	eachWay(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		e := a.openEcho()
		pod := b.addPod(300)
		stranger := newStranger(t, m)
		toB := echoPacket(echoRequest, 666, a.row.Address, b.row.Address)
		toA := echoPacket(echoReply, 666, b.row.Address, a.row.Address)
		with := func(p packet, change func(*packet)) []byte {
			p.payload = bytes.Clone(p.payload)
			change(&p)
			return p.bytes()
		}
		cases := []echoCase{
			{"a stranger asks", stranger, b, 6, with(toB, func(p *packet) { p.src = outsider(p.src) }), datapath.DropUnknownNode},
			{"a stranger asks in a node's name", stranger, b, 6, toB.bytes(), datapath.DropUnknownNode},
			{"a stranger answers", stranger, a, 6, toA.bytes(), datapath.DropUnknownNode},
			{"in another node's name", a.ns, b, 6, with(toB, func(p *packet) { p.src = b.row.Address }), datapath.DropForeignIdentity},
			{"in a pod's name", b.ns, a, 6, with(toA, func(p *packet) { p.src = pod.addr() }), datapath.DropForeignIdentity},
			{"as another cluster's pod", a.ns, b, 2<<16 | 300, toB.bytes(), datapath.DropForeignIdentity},
			{"answered as another cluster's pod", b.ns, a, 1<<16 | 300, toA.bytes(), datapath.DropForeignIdentity},
			{"without identity", a.ns, b, 0, toB.bytes(), datapath.DropForeignIdentity},
			{"as a pod", a.ns, b, 1<<16 | 300, toB.bytes(), ""},
			{"answered as a pod", b.ns, a, 2<<16 | 300, toA.bytes(), ""},
			{"as the host", a.ns, b, 1, toB.bytes(), ""},
			{"to another node", a.ns, b, 6, with(toB, func(p *packet) { p.dst = a.row.Address }), datapath.DropNoEndpoint},
			{"to a pod", a.ns, b, 6, with(toB, func(p *packet) { p.dst = pod.addr() }), ""},
			{"to another port", a.ns, b, 6, with(toB, func(p *packet) { p.dstPort++ }), ""},
			{"answered from another port", b.ns, a, 6, with(toA, func(p *packet) { p.srcPort++ }), ""},
			{"asked as if answered", b.ns, a, 6, with(toA, func(p *packet) { p.payload[8] = echoRequest }), ""},
			{"of no type", a.ns, b, 6, with(toB, func(p *packet) { p.payload[8] = 3 }), ""},
			{"with another magic", a.ns, b, 6, with(toB, func(p *packet) { p.payload[7]++ }), ""},
			{"one byte short", a.ns, b, 6, with(toB, func(p *packet) { p.payload = p.payload[:23] }), ""},
			{"one byte more", a.ns, b, 6, with(toB, func(p *packet) { p.payload = append(p.payload, 0) }), ""},
			{"a byte behind the packet", a.ns, b, 6, append(toB.bytes(), 0), ""},
			{"TCP", a.ns, b, 6, with(toB, func(p *packet) { p.protocol = 6 }), ""},
			{"of another length", a.ns, b, 6, withByte(toB.bytes(), 14+headerLen(toB.src)+5, 31), ""},
			{"of a type that it denies", a.ns, b, 6, with(toB, func(p *packet) { p.payload[10] = echoRequest }), ""},
		}
		if toB.src.Is4() {
			cases = append(cases,
				echoCase{"a fragment", a.ns, b, 6, withByte(toB.bytes(), 20, 0x20), ""},
				echoCase{"with options", a.ns, b, 6, withByte(toB.bytes(), 14, 0x46), ""},
				echoCase{"with a checksum", a.ns, b, 6, withByte(toB.bytes(), 41, 1), ""})
		} else {
			cases = append(cases,
				echoCase{"a fragment", a.ns, b, 6, withByte(toB.bytes(), 20, 44), ""},
				echoCase{"with an extension header", a.ns, b, 6, withByte(toB.bytes(), 20, 60), ""})
		}
		for nonce, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				dropsBefore := c.to.drops(c.drop)
				mustWrite(t, c.from, c.to, vxlan(c.vni, c.frame))
				if c.drop != "" {
					eventually(t, "the drop is counted as "+c.drop, func() bool { return c.to.drops(c.drop) == dropsBefore+1 })
				}
				// From the same node, and so behind it.
				must(t, e.Send(b.row.Address, uint64(nonce)))
				expectAnswer(t, e, b, uint64(nonce))
			})
		}
	})
}

// echoCase is a frame that is hidden among echoes.
type echoCase struct {
	name  string
	from  namespace
	to    *node
	vni   uint32
	frame []byte
	drop  string // empty: a stack gets it, or refuses it
}

func mustWrite(t *testing.T, from namespace, to *node, datagram []byte) {
	t.Helper()
	if _, err := mustDial(t, from, to.row.Address).Write(datagram); err != nil {
		t.Fatal(err)
	}
}

// TestPodsDontEcho: what a pod sends from its own address reaches the nodes' stacks, in which nobody listens.
func TestPodsDontEcho(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		a, b := m.nodes[0], m.nodes[1]
		pod := b.addPod(300)
		e := a.openEcho()
		for name, to := range map[string]*node{"own node": b, "other node": a} {
			for _, kind := range []uint8{echoRequest, echoReply} {
				var err error
				pod.ns.do(t, func() { err = sendEcho(pod.addr(), to.row.Address, kind) })
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s, kind %d: %v, want %v", name, kind, err, unix.ECONNREFUSED)
				}
			}
		}
		lie := echoPacket(echoReply, 666, b.row.Address, a.row.Address)
		lie.srcMAC, lie.dstMAC = pod.row.MAC, pod.row.HostMAC
		pod.sendFrame(lie.bytes())
		eventually(t, "the lie is dropped", func() bool { return b.drops(datapath.DropSpoofedAddress) == 1 })
		must(t, e.Send(b.row.Address, 1))
		expectAnswer(t, e, b, 1)
	})
}

// sendEcho sends an echo by a socket, and returns what comes back as an error.
func sendEcho(from, to netip.Addr, kind uint8) error {
	p := echoPacket(kind, 666, from, to)
	family := unix.AF_INET
	if from.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1), // of IPv4
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, p.srcPort))),
		unix.Connect(fd, sockaddr(netip.AddrPortFrom(to, p.dstPort))),
		unix.Send(fd, p.payload, 0))
	if err != nil {
		return err
	}
	_, _, err = unix.Recvfrom(fd, make([]byte, 64), 0)
	return err
}

// sockaddr is the address in its family's own form.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return sockaddr6(a)
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// TestEchoNeedsTheDataPath: nothing else of a node answers, and once the data path is back it does.
func TestEchoNeedsTheDataPath(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		asker, asked := m.nodes[0], m.nodes[1]
		e := asker.openEcho()
		tunnel := func(f func(netlink.Link) error) {
			t.Helper()
			asked.ns.do(t, func() {
				link, err := netlink.LinkByIndex(asked.device.Index)
				must(t, err)
				must(t, f(link))
			})
		}
		// A request has come to nothing when the device has it, or, without one, when nobody listens at the tunnel's port.
		received := func() (packets int) {
			tunnel(func(l netlink.Link) error { packets = int(l.Attrs().Statistics.RxPackets); return nil })
			return packets
		}
		for i, c := range []struct {
			name    string
			off, on func()
			arrived func() int
		}{
			{"link down", func() { tunnel(netlink.LinkSetDown) }, func() { tunnel(netlink.LinkSetUp) }, asked.unheard},
			{"programs detached", func() { tunnel(asked.detachOverlay) }, asked.restart, received},
		} {
			c.off()
			before := c.arrived()
			must(t, e.Send(asked.row.Address, 666))
			eventually(t, c.name+": the request arrives", func() bool { return c.arrived() > before })
			c.on()
			must(t, e.Send(asked.row.Address, uint64(i)))
			expectAnswer(t, e, asked, uint64(i))
		}
	})
}

// detachOverlay takes the program off the tunnel device's ingress.
func (n *node) detachOverlay(link netlink.Link) error {
	if err := os.Remove(filepath.Join(n.config.PinDir, "links", "overlay-ingress")); !n.mesh.options.clsact {
		// The kernel does it a little later.
		eventually(n.mesh.t, "the program is detached", func() bool {
			left, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: link.Attrs().Index, Attach: ebpf.AttachTCXIngress})
			return err == nil && len(left.Programs) == 0
		})
		return err
	}
	return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
}

// unheard is how many datagrams came to the node for ports that nobody listens at.
func (n *node) unheard() (count int) {
	t := n.mesh.t
	t.Helper()
	n.ns.do(t, func() {
		stats, err := os.ReadFile("/proc/thread-self/net/snmp")
		must(t, err)
		for line := range strings.Lines(string(stats)) {
			// "Udp: InDatagrams NoPorts …" has the names, the next line of that kind the numbers.
			if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "Udp:" && fields[2] != "NoPorts" {
				count, err = strconv.Atoi(fields[2])
				must(t, err)
			}
		}
	})
	return count
}

// TestAnswersThatNobodyReads do no harm, and aren't taken for answers to an agent that comes later.
func TestAnswersThatNobodyReads(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	asker, asked := m.nodes[0], m.nodes[1]
	from, at := asker.addPod(300), asked.addPod(300).echo()
	before := asker.dropped()
	late := vxlan(6, echoPacket(echoReply, 666, asked.row.Address, asker.row.Address).bytes())
	conn := mustDial(t, asked.ns, asker.row.Address)
	for range 4000 {
		if _, err := conn.Write(late); err != nil {
			t.Fatal(err)
		}
	}
	from.ns.reach(t, at)
	e := asker.openEcho()
	must(t, e.Send(asked.row.Address, 1))
	expectAnswer(t, e, asked, 1)
	if after := asker.dropped(); !sameCounts(before, after) {
		t.Errorf("drops were %v and are %v", before, after)
	}
}

// TestSlowReaderLosesAnswers: neither the kernel nor Close waits for it.
func TestSlowReaderLosesAnswers(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	known := goleak.IgnoreCurrent()
	e := m.nodes[0].openEcho()
	const sent = 1000
	for nonce := range uint64(sent) {
		// A slow machine may still have earlier requests to send.
		if err := e.Send(m.nodes[1].row.Address, nonce); !errors.Is(err, unix.EAGAIN) {
			must(t, err)
		}
	}
	eventually(t, "answers wait", func() bool { return len(e.Answers()) > 0 })
	must(t, e.Close())
	got := 0
	for range e.Answers() {
		got++
	}
	if got == 0 || got >= sent {
		t.Errorf("%d of %d answers were kept", got, sent)
	}
	if err := e.Send(m.nodes[1].row.Address, 1); err == nil {
		t.Error("sent after Close")
	}
	goleak.VerifyNone(t, known)
}

func TestEchoRefuses(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	n := m.nodes[0]
	e := n.openEcho()
	for _, to := range []netip.Addr{n.row.Address, {}, netip.MustParseAddr("2001:db8::1")} {
		if err := e.Send(to, 1); err == nil {
			t.Errorf("asked %q", to)
		}
	}
	must(t, e.Send(netip.AddrFrom16(m.nodes[1].row.Address.As16()), 2))
	expectAnswer(t, e, m.nodes[1], 2)

	// Nobody's address: the node's own program refuses it.
	before := n.drops(datapath.DropUnusedAddress)
	must(t, e.Send(netip.MustParseAddr("172.29.200.200"), 3))
	eventually(t, "the drop is counted", func() bool { return n.drops(datapath.DropUnusedAddress) == before+1 })

	n.ns.do(t, func() {
		link, err := netlink.LinkByIndex(n.device.Index)
		must(t, err)
		must(t, netlink.LinkDel(link))
	})
	if err := e.Send(m.nodes[1].row.Address, 4); err == nil {
		t.Error("sent without the tunnel device")
	}
	n.ns.do(t, func() {
		if _, err := n.dp.OpenEcho(); err == nil {
			t.Error("opened without the tunnel device")
		}
	})
}

// TestEchoOutlivesItsDatapath: in which order an agent closes the two doesn't matter.
func TestEchoOutlivesItsDatapath(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	e := m.nodes[0].openEcho()
	must(t, m.nodes[0].dp.Close())
	must(t, e.Send(m.nodes[1].row.Address, 1))
	expectAnswer(t, e, m.nodes[1], 1)
}

// TestUpgradeMakesTheRing: the pins may be of a version that had no echoes.
func TestUpgradeMakesTheRing(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	for _, n := range m.nodes {
		must(t, os.Remove(filepath.Join(n.config.PinDir, "echo_answers")))
		n.restart()
	}
	e := m.nodes[0].openEcho()
	must(t, e.Send(m.nodes[1].row.Address, 1))
	expectAnswer(t, e, m.nodes[1], 1)
}

// BenchmarkEcho asks another node's data path and awaits the answer.
func BenchmarkEcho(b *testing.B) {
	m := newMesh(b, options{}, 1, 2)
	e := m.nodes[0].openEcho()
	for nonce := uint64(0); b.Loop(); nonce++ {
		must(b, e.Send(m.nodes[1].row.Address, nonce))
		expectAnswer(b, e, m.nodes[1], nonce)
	}
}
