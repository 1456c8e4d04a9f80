package datapath_test

import (
	"net/netip"
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
	if conn, err := pod.ns.dial(t, "tcp4", at); err == nil {
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
