package datapath_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
	"causeway/lb"
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

	there := datapath.Flow{From: a.row.Address, To: b.row.Address}
	must(t, faults.SetLoss(there, 100))
	if conn, err := a.ns.dial(t, "tcp", at); err == nil {
		conn.Close()
		t.Error("connected through a total loss")
	}
	list, err := faults.List()
	if err != nil || len(list) != 1 || list[0].Flow != there || list[0].Percent != 100 || list[0].Lost == 0 {
		t.Errorf("faults are %+v, %v", list, err)
	}

	must(t, faults.SetLoss(there, 30))
	if lost := lostOf(t, a.ns, at, 500); lost < 50 || lost > 300 {
		t.Errorf("%d of 500 were lost at 30%%", lost)
	}
	must(t, faults.Clear())
	if lost := lostOf(t, a.ns, at, 500); lost != 0 {
		t.Errorf("%d of 500 were lost after clearing", lost)
	}

	// Everywhere, in each direction.
	must(t, faults.SetLoss(datapath.Flow{}, 20))
	if lost := lostOf(t, a.ns, at, 500); lost < 100 || lost > 280 {
		t.Errorf("%d of 500 were lost at 20%% each way", lost)
	}
	// The worst counts, and it alone.
	must(t, faults.SetLoss(there, 100))
	if lost := lostOf(t, a.ns, at, 20); lost != 20 {
		t.Errorf("%d of 20 were lost where all should be", lost)
	}
	must(t, faults.Clear())

	// One port of one protocol, whichever side has it.
	back := datapath.Flow{From: b.row.Address, To: a.row.Address, Protocol: lb.UDP, Port: at.Port()}
	must(t, faults.SetLoss(back, 100))
	if lost := lostOf(t, a.ns, at, 20); lost != 20 {
		t.Errorf("%d of 20 answers from a blocked port were lost", lost)
	}
	if conn, err := a.ns.dial(t, "tcp", at); err != nil {
		t.Errorf("over TCP with UDP blocked: %v", err)
	} else {
		conn.Close()
	}
	must(t, faults.SetLoss(back, 0))
	towards := datapath.Flow{From: a.row.Address, To: b.row.Address, Protocol: lb.TCP, Port: at.Port()}
	must(t, faults.SetLoss(towards, 100))
	if conn, err := a.ns.dial(t, "tcp", at); err == nil {
		conn.Close()
		t.Error("connected to a blocked port")
	}
	if lost := lostOf(t, a.ns, at, 20); lost != 0 {
		t.Errorf("%d of 20 were lost over UDP with TCP blocked", lost)
	}
	if list, err = faults.List(); err != nil || len(list) != 1 || list[0].Flow != towards {
		t.Errorf("faults are %+v, %v", list, err)
	}

	for _, percent := range []float64{-1, 101} {
		if err := faults.SetLoss(there, percent); err == nil {
			t.Errorf("a loss of %v%% was accepted", percent)
		}
	}
	for _, flow := range []datapath.Flow{{From: a.row.Address}, {Protocol: lb.UDP, Port: 1}, {From: a.row.Address, To: b.row.Address, Protocol: lb.UDP}, {From: a.row.Address, To: b.row.Address, Port: 1}} {
		if err := faults.SetLoss(flow, 1); err == nil {
			t.Errorf("%+v was accepted", flow)
		}
	}
}
