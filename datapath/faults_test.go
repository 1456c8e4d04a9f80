package datapath_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
)

func TestFaults(t *testing.T) {
	m := newMesh(t, options{bare: true}, 1, 2)
	a, b := m.nodes[0], m.nodes[1]
	at := netip.AddrPortFrom(b.row.Address, 7000)
	b.ns.do(t, func() { serveEcho(t, at) })
	dir := mountBPF(t)
	faults, err := datapath.OpenFaults(dir)
	if err != nil {
		t.Fatal(err)
	}
	m.underlay.do(t, func() {
		for _, n := range m.nodes {
			port, err := netlink.LinkByName(n.port)
			must(t, err)
			must(t, faults.Attach(port.Attrs().Index))
			must(t, faults.Attach(port.Attrs().Index))
		}
	})
	must(t, faults.Close())
	// As another command does, later.
	if faults, err = datapath.OpenFaults(dir); err != nil {
		t.Fatal(err)
	}
	defer faults.Close()
	a.ns.reach(t, at)

	must(t, faults.SetLoss(a.row.Address, b.row.Address, 100))
	if conn, err := a.ns.dial(t, "tcp4", at); err == nil {
		conn.Close()
		t.Error("connected through a total loss")
	}
	list, err := faults.List()
	if err != nil || len(list) != 1 || list[0].From != a.row.Address || list[0].To != b.row.Address || list[0].Percent != 100 || list[0].Lost == 0 {
		t.Errorf("faults are %+v, %v", list, err)
	}

	must(t, faults.SetLoss(a.row.Address, b.row.Address, 30))
	if lost := lostOf(t, a.ns, at, 500); lost < 50 || lost > 300 {
		t.Errorf("%d of 500 were lost at 30%%", lost)
	}
	must(t, faults.Clear())
	if lost := lostOf(t, a.ns, at, 500); lost != 0 {
		t.Errorf("%d of 500 were lost after clearing", lost)
	}
	for _, percent := range []float64{-1, 101} {
		if err := faults.SetLoss(a.row.Address, b.row.Address, percent); err == nil {
			t.Errorf("a loss of %v%% was accepted", percent)
		}
	}
}
