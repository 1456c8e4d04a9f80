package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"causeway/identity"
)

// serveArgument makes the test's program be WireGuard's process in user space.
const serveArgument = "serve-wireguard"

// endArgument makes it end at once, after it has noted its start in a file.
const endArgument = "end-at-once"

func endIfAsked() {
	if len(os.Args) < 3 || os.Args[1] != endArgument {
		return
	}
	file, err := os.OpenFile(os.Args[2], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = file.WriteString("\n")
	}
	fmt.Fprintln(os.Stderr, errors.Join(err, errors.New("no TUN today")))
	os.Exit(1)
}

// serveIfAsked never returns in a process that was started as WireGuard's.
func serveIfAsked() {
	if len(os.Args) != 5 || os.Args[1] != serveArgument {
		return
	}
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	mtu, err := strconv.Atoi(os.Args[3])
	if err == nil {
		err = ServeWireGuard(ctx, os.Args[2], mtu, DefaultPort, os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// deviceNumber makes the names of devices differ between nodes: their sockets are in one directory.
var deviceNumber atomic.Uint32

// machine is a node: a network namespace, with a link to a switch that all machines of the test are at.
type machine struct {
	t      testing.TB
	number int
	space  netns.NsHandle
	cfg    WireGuardConfig
	row    identity.Tunnel
	wg     *WireGuard
	stop   func()
}

// families are the ways that underlay and pods may be addressed in.
type families struct{ underlay6, pods6 bool }

// kinds returns the kinds of device that this kernel can have.
func kinds(t testing.TB) []string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	list := []string{KindUserspace}
	done := make(chan bool)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		must(t, unix.Unshare(unix.CLONE_NEWNET))
		done <- netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs("wg")}) == nil
	}()
	if <-done {
		list = append(list, KindKernel)
	}
	return list
}

// eachKind runs a test with each kind of device.
func eachKind(t *testing.T, f func(t *testing.T, kind string)) {
	for _, kind := range kinds(t) {
		t.Run(kind, func(t *testing.T) { f(t, kind) })
	}
}

// newSpace makes a network namespace that ends with the test.
func newSpace(t testing.TB) netns.NsHandle {
	t.Helper()
	made := make(chan netns.NsHandle)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		must(t, unix.Unshare(unix.CLONE_NEWNET))
		h, err := netns.Get()
		must(t, err)
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		made <- h
	}()
	h := <-made
	t.Cleanup(func() { h.Close() })
	return h
}

// in runs f in a namespace.
func in(t testing.TB, space netns.NsHandle, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		if err := netns.Set(space); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// machines makes nodes on one underlay.
func machines(t testing.TB, kind string, n int, f families) []*machine {
	t.Helper()
	hub := newSpace(t)
	in(t, hub, func() {
		bridge := &netlink.Bridge{LinkAttrs: attrs("hub")}
		must(t, netlink.LinkAdd(bridge))
		must(t, netlink.LinkSetUp(bridge))
	})
	var list []*machine
	for i := range n {
		list = append(list, newMachine(t, hub, kind, i+1, f))
	}
	return list
}

func newMachine(t testing.TB, hub netns.NsHandle, kind string, number int, f families) *machine {
	t.Helper()
	program, err := os.Executable()
	must(t, err)
	underlay := netip.MustParsePrefix(fmt.Sprintf("172.29.1.%d/24", number))
	pods := netip.MustParsePrefix(fmt.Sprintf("10.1.%d.0/24", number))
	if f.underlay6 {
		underlay = netip.MustParsePrefix(fmt.Sprintf("fd29::%d/64", number))
	}
	if f.pods6 {
		pods = netip.MustParsePrefix(fmt.Sprintf("fd10:%d::/64", number))
	}
	m := &machine{t: t, number: number, space: newSpace(t)}
	m.row = identity.Tunnel{Cluster: "east", ClusterID: 1, Node: fmt.Sprint("node", number), Mode: identity.TunnelWireGuard, Address: underlay.Addr(), PodCIDRs: []netip.Prefix{pods}, MTU: 1390}
	m.cfg = WireGuardConfig{
		StateDir: filepath.Join(t.TempDir(), "state"), Node: underlay.Addr(), Ports: [2]uint16{51871, 51872}, Kind: kind, MTU: WireGuardMTU(1500, underlay.Addr()),
		Name: fmt.Sprintf("wgt%d-%d-", os.Getpid()%100000, deviceNumber.Add(1)), Command: []string{program, serveArgument},
		Log: slog.New(slog.NewTextHandler(testLog{t}, nil)),
	}
	for slot := range m.cfg.Tunnel {
		m.cfg.Tunnel[slot] = m.row.TunnelAddress(uint8(slot))
	}
	in(t, hub, func() {
		link := &netlink.Veth{LinkAttrs: attrs(fmt.Sprint("port", number)), PeerName: "eth0", PeerNamespace: netlink.NsFd(m.space)}
		must(t, netlink.LinkAdd(link))
		bridge, err := netlink.LinkByName("hub")
		must(t, err)
		must(t, netlink.LinkSetMaster(link, bridge))
		must(t, netlink.LinkSetUp(link))
	})
	m.in(func() {
		m.address(underlay)
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.LinkSetUp(link))
	})
	t.Cleanup(func() {
		m.close()
		m.in(func() { must(t, RemoveWireGuard(context.Background(), m.cfg)) })
		if _, err := os.Stat(socketPath(m.cfg.deviceName(0))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a socket was left behind: %v", err)
		}
	})
	return m
}

// testLog writes what is logged into the test's log.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}

func (m *machine) in(f func()) { m.t.Helper(); in(m.t, m.space, f) }

// address gives the machine's underlay link an address, its only one.
func (m *machine) address(p netip.Prefix) {
	m.t.Helper()
	link, err := netlink.LinkByName("eth0")
	must(m.t, err)
	old, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	must(m.t, err)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	must(m.t, setSysctl("ipv4/conf/eth0/promote_secondaries", "1")) // otherwise the new one goes with the old
	must(m.t, netlink.AddrAdd(link, addr))
	for _, a := range old {
		must(m.t, netlink.AddrDel(link, &a))
	}
}

// open starts the machine's WireGuard, as an agent does.
func (m *machine) open() {
	m.t.Helper()
	var err error
	m.in(func() { m.wg, err = OpenWireGuard(context.Background(), m.cfg) })
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	wg := m.wg
	go func() { done <- wg.Run(ctx) }()
	m.stop = func() {
		cancel()
		must(m.t, <-done)
		must(m.t, wg.Close())
	}
	m.row.Keys = m.wg.Keys()
}

// close stops it, as an agent that ends.
func (m *machine) close() {
	if m.stop != nil {
		m.stop()
		m.stop = nil
	}
}

// meet tells each machine of the others.
func meet(t *testing.T, list ...*machine) {
	t.Helper()
	for _, m := range list {
		for _, other := range list {
			if m != other {
				must(t, m.wg.Update(t.Context(), other.row))
			}
		}
	}
}

// tunnel returns a machine's tunnel address of a slot.
func (m *machine) tunnel(slot uint8) netip.Addr { return m.cfg.Tunnel[slot] }

// awaitSession waits until m has a session with another, from slot to slot.
func (m *machine) awaitSession(other *machine, local, remote uint8, within time.Duration) {
	m.t.Helper()
	deadline := time.After(within)
	for {
		changed := m.wg.Changed()
		if m.wg.Shaken(other.row.NodeName(), local, remote) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			status, err := m.wg.Status()
			m.t.Fatalf("%s has no session with %s after %s: %+v %v", m.row.Node, other.row.Node, within, status, err)
		}
	}
}

// socketAt opens a UDP socket at a machine's address.
func (m *machine) socketAt(a netip.Addr) *net.UDPConn {
	m.t.Helper()
	var conn *net.UDPConn
	var err error
	m.in(func() { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 4789))) })
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return conn
}

// awaitPacket sends from one machine's slot to another's until a packet gets there.
func awaitPacket(t *testing.T, from, to *machine, local, remote uint8, within time.Duration) {
	t.Helper()
	a, b := from.socketAt(from.tunnel(local)), to.socketAt(to.tunnel(remote))
	defer a.Close()
	defer b.Close()
	buffer := make([]byte, 100)
	for deadline := time.Now().Add(within); time.Now().Before(deadline); {
		_, err := a.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(to.tunnel(remote), 4789))
		if err != nil && !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) {
			t.Logf("sending: %v", err)
		}
		must(t, b.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
		if n, source, err := b.ReadFromUDPAddrPort(buffer); err == nil {
			if string(buffer[:n]) != "hello" || source.Addr().Unmap() != from.tunnel(local) {
				t.Errorf("%q came from %s", buffer[:n], source)
			}
			return
		}
	}
	t.Fatalf("nothing gets from %s to %s within %s", from.row.Node, to.row.Node, within)
}

func TestWireGuardHandshake(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		for name, f := range map[string]families{"IPv4": {}, "IPv6 underlay": {underlay6: true}, "IPv6 pods": {pods6: true}, "IPv6": {true, true}} {
			t.Run(name, func(t *testing.T) {
				list := machines(t, kind, 2, f)
				a, b := list[0], list[1]
				a.open()
				b.open()
				meet(t, a, b)
				a.awaitSession(b, 0, 0, 3*time.Second)
				b.awaitSession(a, 0, 0, 3*time.Second)
				awaitPacket(t, a, b, 0, 0, time.Second)
				awaitPacket(t, b, a, 0, 0, time.Second)
				status, err := a.wg.Status()
				must(t, err)
				if len(status.Devices) != 1 || status.Devices[0].Kind != kind || len(status.Peers) != 1 || status.Peers[0].Keepalive != 0 || len(status.Problems) > 0 || len(status.Repairs) > 0 {
					t.Errorf("status is %+v", status)
				}
			})
		}
	})
}

// awaitSaved waits until the file of peers is as it should be.
func (m *machine) awaitSaved(right func(peersState) bool) {
	m.t.Helper()
	path := filepath.Join(m.cfg.StateDir, peersName)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		data, err := os.ReadFile(path)
		if state, e := decodePeers(data); err == nil && e == nil && right(state) {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the peers are not in %s: %v", path, err)
		}
	}
}

// removeDevice removes a slot's device, as somebody does by hand.
func (m *machine) removeDevice(slot uint8) {
	m.t.Helper()
	name := m.cfg.deviceName(slot)
	var err error
	m.in(func() {
		var link netlink.Link
		if link, err = netlink.LinkByName(name); err == nil {
			err = netlink.LinkDel(link)
		}
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// hasPeers tells whether there are peers in the file.
func hasPeers(s peersState) bool { return len(s.Nodes) > 0 }
