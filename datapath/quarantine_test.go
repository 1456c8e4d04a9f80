package datapath_test

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"causeway/lb"
)

// setQuarantine quarantines the shop's pods, or ends that.
func (n *node) setQuarantine(quarantined bool, pods ...*pod) {
	t := n.mesh.t
	t.Helper()
	for _, target := range n.shopTargets(pods...) {
		target.Quarantined = quarantined
		must(t, n.dp.Targets().Update(t.Context(), target))
	}
}

// datagrams sends n datagrams to the shop from one socket, and counts who answers.
func (p *pod) datagrams(t *testing.T, n int) map[string]int {
	t.Helper()
	var conn *net.UDPConn
	p.ns.do(t, func() {
		var err error
		conn, err = net.ListenUDP(p.node.udp(), nil)
		must(t, err)
	})
	defer conn.Close()
	by := make(map[string]int)
	for range n {
		buf := make([]byte, 64)
		conn.WriteToUDPAddrPort([]byte("?"), p.node.shop())
		conn.SetReadDeadline(time.Now().Add(patience))
		size, _, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		by[string(buf[:size])]++
	}
	return by
}

func TestQuarantinedBackendsGetNoNewConnections(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, local, remote := newShopOf(t, opts)
		both := []*pod{local, remote}
		for _, c := range []struct {
			affinity    lb.Affinity
			quarantined []*pod
			by          []*pod
		}{
			{lb.AffinityNone, []*pod{local}, []*pod{remote}},
			{lb.AffinityNone, []*pod{remote}, []*pod{local}},
			{lb.AffinityNone, both, both},
			{lb.AffinityNone, nil, both},
			{lb.AffinityLocal, []*pod{local}, []*pod{remote}},
			{lb.AffinityLocal, []*pod{remote}, []*pod{local}},
			{lb.AffinityLocal, both, []*pod{local}},
			{lb.AffinityRemote, []*pod{local}, []*pod{remote}},
			{lb.AffinityRemote, []*pod{remote}, []*pod{local}},
			{lb.AffinityRemote, both, []*pod{remote}},
		} {
			n.openShop(c.affinity, both...) // None is quarantined any more.
			n.setQuarantine(true, c.quarantined...)
			var want []string
			for _, p := range c.by {
				want = append(want, p.addr().String())
			}
			slices.Sort(want)
			for protocol, by := range map[string]map[string]int{"TCP": client.answers(t, 40), "UDP": client.datagrams(t, 40)} {
				if got := slices.Sorted(maps.Keys(by)); !slices.Equal(got, want) {
					t.Errorf("affinity %s, %d quarantined, %s: answered by %v, want %v", c.affinity, len(c.quarantined), protocol, by, want)
				}
			}
		}
	})
}

// TestQuarantinedBackendKeepsItsConnections: they go on, and so they do after the end of quarantine.
func TestQuarantinedBackendKeepsItsConnections(t *testing.T) {
	n, client, local, _ := newShop(t)
	suspect := n.addPod(301)
	suspect.ns.do(t, func() { serveEcho(t, netip.AddrPortFrom(suspect.addr(), 7080)) })
	n.openShop(lb.AffinityNone, suspect)
	var established []net.Conn
	for _, network := range []string{"tcp", "udp"} {
		conn, err := client.ns.dial(t, network, n.shop())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, 1000)
		established = append(established, conn)
	}
	n.openShop(lb.AffinityNone, local)
	for _, step := range []func(){
		func() { n.setQuarantine(true, suspect) },
		n.restart,
		func() { n.setQuarantine(true, suspect, local) },
		func() { n.setQuarantine(false, local) },
	} {
		step()
		for _, conn := range established {
			must(t, conn.SetDeadline(time.Now().Add(patience)))
			exchange(t, conn, 1000)
		}
	}
	if by := client.answers(t, 40); by[local.addr().String()] != 40 {
		t.Errorf("answered by %v, want %s only", by, local.addr())
	}
}
