package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"causeway/identity"
	"causeway/tunnel"
	causewaytun "causeway/tunnel/tun"
)

// serveArgument makes the test's program be WireGuard's process in user space.
const serveArgument = "serve-wireguard"

// serveIfAsked never returns in a process that was started as WireGuard's, of Causeway or bare.
func serveIfAsked() {
	if len(os.Args) == 3 && os.Args[1] == bareArgument {
		exit(serveBare(os.Args[2]))
	}
	if len(os.Args) != 5 || os.Args[1] != serveArgument {
		return
	}
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	mtu, err := strconv.Atoi(os.Args[3])
	if err == nil {
		err = tunnel.ServeWireGuard(ctx, os.Args[2], mtu, tunnel.DefaultPort, os.Stderr)
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// deviceNumber makes the names of devices differ between nodes: their sockets are in one directory.
var deviceNumber atomic.Uint32

// wireGuardPorts are the nodes' UDP ports, by slot.
var wireGuardPorts = [identity.TunnelSlots]uint16{tunnel.DefaultWireGuardPort, tunnel.DefaultWireGuardPort + 1}

// newEncryptedMesh is newMesh with WireGuard in user space between all nodes, a process for each, set up as an agent does that
// encrypts all. All sessions are there.
func newEncryptedMesh(t testing.TB, clusters ...identity.ClusterID) *mesh {
	t.Helper()
	m := newMesh(t, options{encrypted: true}, clusters...)
	wgs := map[*node]*tunnel.WireGuard{}
	for _, n := range m.nodes {
		wgs[n] = n.openWireGuard()
	}
	// A row for each pair of nodes, which goes to its targets in their order.
	rows := map[[2]*node]identity.Tunnel{}
	for _, n := range m.nodes {
		for _, other := range m.nodes {
			if n == other {
				continue
			}
			row := n.encryptedTo(other, 0, 0)
			row.Keys = wgs[other].Keys()
			rows[[2]*node{n, other}] = row
			must(t, wgs[n].Update(context.Background(), row))
		}
	}
	for pair, row := range rows {
		n := pair[0]
		awaitSession(t, wgs[n], row.NodeName())
		must(t, n.dp.Tunnels().Update(context.Background(), row))
		must(t, n.routes.Update(context.Background(), row))
	}
	return m
}

// openWireGuard makes the node's WireGuard, as an agent does that starts, and keeps it until the test ends.
func (n *node) openWireGuard() *tunnel.WireGuard {
	t := n.mesh.t
	t.Helper()
	program, err := os.Executable()
	must(t, err)
	n.wireGuard = fmt.Sprintf("wgd%d-%d-", os.Getpid()%100000, deviceNumber.Add(1))
	cfg := tunnel.WireGuardConfig{
		StateDir: filepath.Join(t.TempDir(), "state"), Node: n.row.Address, Tunnel: n.config.Tunnel, Ports: wireGuardPorts, Name: n.wireGuard,
		Kind: tunnel.KindUserspace, MTU: tunnel.WireGuardMTU(underlayMTU, n.row.Address), Command: []string{program, serveArgument},
		Log: slog.New(slog.DiscardHandler),
		OnDevice: func(slot uint8, index int) (err error) {
			n.ns.do(t, func() { err = n.dp.AttachWireGuard(slot, index) })
			return err
		},
	}
	t.Cleanup(func() {
		n.ns.do(t, func() { must(t, tunnel.RemoveWireGuard(context.Background(), cfg)) })
	})
	var wg *tunnel.WireGuard
	n.ns.do(t, func() { wg, err = tunnel.OpenWireGuard(context.Background(), cfg) })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- wg.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
		must(t, wg.Close())
	})
	return wg
}

// awaitSession waits until there is a session with a node, both ends in slot 0.
func awaitSession(t testing.TB, wg *tunnel.WireGuard, with identity.NodeName) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		changed := wg.Changed()
		if wg.Shaken(with, 0, 0) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			status, err := wg.Status()
			t.Fatalf("there is no session with %s: %+v %v", with, status, err)
		}
	}
}

// TestLargePacketsReachWireGuard sends a stream from pod to pod: neither the programs nor the routes and the guard on the way make the kernel split it
// before WireGuard's process has it, nor what the process has put together.
func TestLargePacketsReachWireGuard(t *testing.T) {
	needRoot(t)
	if !tunTakesLargePackets(t) {
		t.Skip("before Linux 6.17, VXLAN crosses a TUN device packet by packet")
	}
	m := newEncryptedMesh(t, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	from, to := a.addPod(300), b.addPod(300)
	sent, received := a.wireGuardStatistics(), b.wireGuardStatistics()
	const size = 32 << 20
	at := netip.AddrPortFrom(to.addr(), 7001)
	arrived := to.ns.receive(t, at)
	conn, err := from.ns.dial(t, "tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	must(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	_, err = conn.Write(make([]byte, size))
	must(t, errors.Join(err, conn.Close()))
	if got := <-arrived; got != size {
		t.Errorf("%d of %d bytes arrived", got, size)
	}
	for what, mean := range map[string]uint64{
		"handed to WireGuard":  mean(size, a.wireGuardStatistics().TxPackets-sent.TxPackets),
		"taken from WireGuard": mean(size, b.wireGuardStatistics().RxPackets-received.RxPackets),
	} {
		t.Logf("packets %s have %d bytes of payload on average", what, mean)
		if mean < 4*uint64(m.options.podMTU()) {
			t.Errorf("packets %s have %d bytes of payload on average, as if they came one by one", what, mean)
		}
	}
	if unwanted := unwantedDrops(a, b); len(unwanted) != 0 {
		t.Errorf("packets were dropped: %v", unwanted)
	}
}

func mean(bytes, packets uint64) uint64 { return bytes / max(packets, 1) }

// tunTakesLargePackets tells whether this kernel hands VXLAN to a TUN device as large packets.
func tunTakesLargePackets(t testing.TB) (takes bool) {
	newNamespace(t).do(t, func() {
		device, err := causewaytun.Open("probe", 1440, tunnel.DefaultPort)
		if err != nil {
			t.Error(err)
			return
		}
		takes = device.Tunnels()
		must(t, device.Close())
	})
	return takes
}

// wireGuardStatistics are those of the device of slot 0, which counts a packet that crosses as a large one once.
func (n *node) wireGuardStatistics() (s netlink.LinkStatistics) {
	n.ns.do(n.mesh.t, func() {
		link, err := netlink.LinkByName(n.wireGuard + "0")
		must(n.mesh.t, err)
		s = *link.Attrs().Statistics
	})
	return s
}
