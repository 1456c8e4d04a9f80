package datapath_test

import (
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
)

// TestPodCannotSpoof: a pod that writes its own headers is heard only as itself.
func TestPodCannotSpoof(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		n := m.nodes[0]
		pod, victim, target := n.addPod(300), n.addPod(301), m.nodes[1].addPod(300)
		inbox := target.inbox(7003)
		honest := packet{srcMAC: pod.row.MAC, dstMAC: pod.row.HostMAC, src: pod.addr(), dst: target.addr(), dstPort: 7003, payload: []byte("honest")}

		lie := honest
		lie.src, lie.payload = victim.addr(), []byte("lie")
		pod.sendFrame(lie.bytes())
		lie = honest
		lie.srcMAC = victim.row.MAC
		pod.sendFrame(lie.bytes())
		pod.sendFrame(honest.bytes())

		if got := inbox.next(t); got != "honest" {
			t.Errorf("%q arrived", got)
		}
		for _, reason := range []string{datapath.DropSpoofedAddress, datapath.DropSpoofedMAC} {
			if got := n.drops(reason); got != 1 {
				t.Errorf("%d packets are counted as dropped because %s, want 1", got, reason)
			}
		}
	})
}

// TestDisconnectedPodIsSilent: what an endpoint still sends after its deletion goes nowhere.
func TestDisconnectedPodIsSilent(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	pod := n.addPod(300)
	at := netip.AddrPortFrom(n.row.Address, 7004)
	n.ns.do(t, func() { serveEcho(t, at) })
	pod.ns.reach(t, at)
	n.ns.do(t, func() { must(t, n.dp.Endpoints().Delete(t.Context(), pod.row)) })
	if conn, err := pod.ns.dial(t, "tcp", at); err == nil {
		conn.Close()
		t.Error("the pod still reaches its node")
	}
}

// sendFrame sends an Ethernet frame as it is out of the pod's eth0.
func (p *pod) sendFrame(frame []byte) {
	t := p.node.mesh.t
	t.Helper()
	p.ns.do(t, func() {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		defer unix.Close(fd)
		must(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index}))
	})
}

// TestDeletingAnEndpointWhoseLinkIsGone: the order in which a pod's parts go doesn't matter, and nothing of it stays.
func TestDeletingAnEndpointWhoseLinkIsGone(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		n := newMesh(t, opts, 1).nodes[0]
		pod := n.addPod(300)
		n.ns.do(t, func() {
			must(t, datapath.DeletePodLink(pod.row.HostLink))
			must(t, n.dp.Endpoints().Delete(t.Context(), pod.row))
			must(t, n.dp.Endpoints().Delete(t.Context(), pod.row))
		})
		if links, err := filepath.Glob(filepath.Join(n.config.PinDir, "links", "pod-*")); err != nil || len(links) != 0 {
			t.Errorf("links are left: %v, %v", links, err)
		}
		// The same address comes again, on another link.
		again := pod.row
		n.pods = nil
		if next := n.addPod(300); next.addr() != again.Address || next.row.IfIndex == again.IfIndex {
			t.Errorf("the pod that followed is %+v", next.row)
		} else {
			at := netip.AddrPortFrom(n.row.Address, 7005)
			n.ns.do(t, func() { serveEcho(t, at) })
			next.ns.reach(t, at)
		}
	})
}
