package datapath_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
)

// openFaults makes the mesh's underlay subject to faults.
func (m *mesh) openFaults() *datapath.Faults {
	m.t.Helper()
	faults, err := datapath.OpenFaults(mountBPF(m.t))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { must(m.t, faults.Close()) })
	m.underlay.do(m.t, func() {
		for _, n := range m.nodes {
			port, err := netlink.LinkByName(n.port)
			must(m.t, err)
			must(m.t, faults.Attach(port.Attrs().Index))
		}
	})
	return faults
}

// answered tells whether a datagram of so many bytes comes back.
func answered(t *testing.T, from namespace, to netip.AddrPort, size int) bool {
	t.Helper()
	conn, err := from.dial(t, "udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 3 {
		conn.SetDeadline(time.Now().Add(100 * time.Millisecond))
		conn.Write(make([]byte, size))
		if n, err := conn.Read(make([]byte, 65536)); err == nil {
			return n == size
		} else if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
	return false
}

// stream sends bytes in segments of at most so many and reads them back. An error says that they don't come for so long.
func stream(t *testing.T, from namespace, to netip.AddrPort, segment int, wait time.Duration) (err error) {
	t.Helper()
	from.do(t, func() {
		dialer := net.Dialer{Timeout: patience, Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, segment) })
			return errors.Join(err, failed)
		}}
		var conn net.Conn
		if conn, err = dialer.Dial("tcp", to.String()); err != nil {
			t.Error(err) // The handshake is small.
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(wait))
		const size = 1 << 20
		go conn.Write(make([]byte, size))
		_, err = io.ReadFull(conn, make([]byte, size))
	})
	return err
}

// TestPathMTU: what is larger is lost without a word, and it alone.
func TestPathMTU(t *testing.T) {
	m := newMesh(t, options{bare: true}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	at := netip.AddrPortFrom(b.row.Address, 7000)
	b.ns.do(t, func() { serveEcho(t, at) })
	faults := m.openFaults()

	const headers = 28
	for _, c := range []struct {
		name     string
		from, to netip.Addr
	}{
		{"there", a.row.Address, b.row.Address},
		{"back", b.row.Address, a.row.Address},
	} {
		must(t, faults.SetMTU(c.from, c.to, 1400))
		if !answered(t, a.ns, at, 1400-headers) {
			t.Errorf("%s: what fits is lost", c.name)
		}
		if answered(t, a.ns, at, 1400-headers+1) {
			t.Errorf("%s: what is too large is carried", c.name)
		}
		// TCP hands the kernel more than a segment at once.
		if err := stream(t, a.ns, at, 1360, patience); err != nil {
			t.Errorf("%s: segments that fit don't arrive: %v", c.name, err)
		}
		if err := stream(t, a.ns, at, 1361, time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: segments that don't fit: %v", c.name, err)
		}
		list, err := faults.ListMTUs()
		if err != nil || len(list) != 1 || list[0].From != c.from || list[0].To != c.to || list[0].MTU != 1400 || list[0].Lost < 3 {
			t.Errorf("%s: the list is %+v, %v", c.name, list, err)
		}
		must(t, faults.SetMTU(c.from, c.to, 0))
		if !answered(t, a.ns, at, 1500-headers) {
			t.Errorf("%s: still lost", c.name)
		}
	}

	must(t, faults.SetMTU(b.row.Address, a.row.Address, 1300))
	must(t, faults.SetMTU(a.row.Address, b.row.Address, datapath.MaxMTU))
	if list, err := faults.ListMTUs(); err != nil || len(list) != 2 || !slices.IsSortedFunc(list, func(a, b datapath.PathMTU) int { return a.From.Compare(b.From) }) {
		t.Errorf("the list is %+v, %v", list, err)
	}
	must(t, faults.Clear())
	if list, err := faults.ListMTUs(); err != nil || len(list) != 0 {
		t.Errorf("after clearing the list is %+v, %v", list, err)
	}
	for _, mtu := range []int{-1, datapath.MinMTU - 1, datapath.MaxMTU + 1} {
		if err := faults.SetMTU(a.row.Address, b.row.Address, mtu); err == nil {
			t.Errorf("an MTU of %d was accepted", mtu)
		}
	}
	if err := faults.SetMTU(a.row.Address, netip.Addr{}, 1400); err == nil {
		t.Error("an MTU to no address was accepted")
	}
}

// TestPathMTUInTheTunnel: pods' packets count with the tunnel's headers, their segments too, and echoes of their size find it.
func TestPathMTUInTheTunnel(t *testing.T) {
	m := newPodsMesh(t, options{}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	client, at := a.addPod(300), b.addPod(300).echo()
	e := a.openEcho()
	faults := m.openFaults()
	must(t, faults.SetMTU(a.row.Address, b.row.Address, 1400))
	must(t, faults.SetMTU(b.row.Address, a.row.Address, 1390))

	const segment = 1390 - 50 - 40 // TCP's options are part of it
	if err := stream(t, client.ns, at, segment, patience); err != nil {
		t.Errorf("segments that fit don't arrive: %v", err)
	}
	if err := stream(t, client.ns, at, segment+1, time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("segments that don't fit: %v", err)
	}
	for _, size := range []int{1350 + 1, 1340 + 1, 1450} {
		must(t, e.SendPods(b.podSide(), 666, size))
	}
	must(t, e.SendPods(b.podSide(), 1, 1340))
	expectAnswer(t, e, b, 1)
}
