package datapath_test

import (
	"errors"
	"io"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/lb"
)

// stay is the session affinity of the shop in these tests.
const stay = 3 * time.Hour

// openSticky opens the shop with session affinity.
func (n *node) openSticky(pods ...*pod) {
	t := n.mesh.t
	t.Helper()
	n.openShop(lb.AffinityNone, pods...)
	n.setSessionAffinity(stay)
}

func (n *node) setSessionAffinity(d time.Duration) {
	t := n.mesh.t
	t.Helper()
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		frontend := shopFrontend(protocol, lb.AffinityNone)
		frontend.Address, frontend.SessionAffinity = n.shop().Addr(), uint32(d.Seconds())
		must(t, n.dp.Frontends().Update(t.Context(), frontend))
	}
}

// age makes the last connections of the node's clients older.
func (n *node) age(by time.Duration) {
	t := n.mesh.t
	t.Helper()
	count, err := datapath.EditSessions(n.config.PinDir, func(used *uint64, _ *uint32) bool { *used -= uint64(by); return true })
	must(t, err)
	if count == 0 {
		t.Error("no client is remembered")
	}
}

// stays fails unless the same pod answers all of the client's connections and datagrams.
func (p *pod) stays(t *testing.T, what string, at *pod) {
	t.Helper()
	for protocol, by := range map[string]map[string]int{"TCP": p.answers(t, 100), "UDP": p.datagrams(t, 100)} {
		if want := map[string]int{at.addr().String(): 100}; !maps.Equal(by, want) {
			t.Errorf("%s, %s: answered by %v, want %v", what, protocol, by, want)
		}
	}
}

// choose makes the client's next choice be a pod, by keeping the other one out of service meanwhile.
func (p *pod) choose(t *testing.T, this, other *pod) {
	t.Helper()
	p.node.setQuarantine(true, other)
	p.node.setQuarantine(false, this)
	p.answers(t, 1)
	p.datagrams(t, 1)
	p.node.setQuarantine(false, other)
}

func TestSessionAffinity(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, local, remote := newShopOf(t, opts)
		another := n.addPod(300)
		n.openSticky(local, remote)
		client.choose(t, local, remote)
		another.choose(t, remote, local)
		client.stays(t, "from the first connection on", local)
		another.stays(t, "another client", remote)

		n.restart()
		client.stays(t, "while the agent is restarted", local)
		n.openSticky(local, remote)
		client.stays(t, "after that", local)

		n.age(stay - time.Minute)
		client.stays(t, "away for less than the time", local)
		for _, p := range []*pod{client, another} {
			by, udp := map[string]int{}, map[string]int{}
			for range 40 { // All to one of two by chance: once in 2³⁹.
				n.age(stay)
				maps.Copy(by, p.answers(t, 1))
				maps.Copy(udp, p.datagrams(t, 1))
			}
			if len(by) != 2 || len(udp) != 2 {
				t.Errorf("away for longer each time, %s is answered by %v, over UDP by %v", p.addr(), by, udp)
			}
		}

		client.choose(t, local, remote)
		n.setQuarantine(true, local)
		client.stays(t, "its backend is out of service", remote)
		n.setQuarantine(false, local)
		client.stays(t, "the former one is back", remote)
		n.setQuarantine(true, local, remote)
		client.stays(t, "all are out of service", remote)
		n.setQuarantine(false, local, remote)
		for _, target := range n.shopTargets(remote) {
			must(t, n.dp.Targets().Delete(t.Context(), target))
		}
		client.stays(t, "its backend is gone", local)
		n.openSticky(local, remote)
		client.stays(t, "the former one has come again", local)

		n.setSessionAffinity(0)
		if by, udp := client.answers(t, 40), client.datagrams(t, 40); len(by) != 2 || len(udp) != 2 {
			t.Errorf("without session affinity it is answered by %v, over UDP by %v", by, udp)
		}
	})
}

// TestFirstConnectionsAtTheSameTime: they get the same backend, too.
func TestFirstConnectionsAtTheSameTime(t *testing.T) {
	n, client, local, remote := newShop(t)
	n.openSticky(local, remote)
	for round := range 50 {
		_, err := datapath.EditSessions(n.config.PinDir, func(*uint64, *uint32) bool { return false })
		must(t, err)
		who := make(chan string)
		for range 8 {
			go func() {
				conn, err := client.ns.dial(t, "tcp", n.shop())
				if err != nil {
					who <- err.Error()
					return
				}
				defer conn.Close()
				answer, _ := io.ReadAll(conn)
				who <- string(answer)
			}()
		}
		by := map[string]int{}
		for range 8 {
			by[<-who]++
		}
		if len(by) != 1 {
			t.Fatalf("round %d: answered by %v", round, by)
		}
	}
}

// TestSessionEndsByItself: time passes in the kernel as users mean it.
func TestSessionEndsByItself(t *testing.T) {
	n, client, local, remote := newShop(t)
	n.openSticky(local, remote)
	n.setSessionAffinity(time.Second)
	client.choose(t, local, remote)
	for range 20 { // To the same one by chance each time: once in a million.
		<-time.After(1100 * time.Millisecond) // Nothing is to be watched: a look would begin the time anew.
		if client.answers(t, 1)[remote.addr().String()] == 1 {
			return
		}
	}
	t.Error("it is not forgotten")
}

// TestTheNodeIsAClientOfItsOwn: its processes are none of its pods'.
func TestTheNodeIsAClientOfItsOwn(t *testing.T) {
	n, client, local, remote := newShop(t)
	n.openSticky(local, remote)
	client.choose(t, local, remote)
	n.setQuarantine(true, local)
	connect := func(want *pod) {
		t.Helper()
		conn, err := n.ns.dial(t, "tcp", n.shop())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if who, err := io.ReadAll(conn); err != nil || string(who) != want.addr().String() {
			t.Errorf("the node is answered by %q, %v; want %s", who, err, want.addr())
		}
	}
	connect(remote)
	n.setQuarantine(false, local)
	for range 40 {
		connect(remote)
	}
	client.stays(t, "the node has another backend", local)
}

// TestNumberOfABackendThatHasGone: another service's backend may have it now.
func TestNumberOfABackendThatHasGone(t *testing.T) {
	n, client, local, remote := newShop(t)
	n.openSticky(local)
	other := shopFrontend(lb.TCP, lb.AffinityNone)
	other.Port, other.Target.Port = 81, "other"
	target := n.shopTarget(remote, lb.TCP)
	target.Port = other.Target
	must(t, n.dp.Frontends().Update(t.Context(), other))
	must(t, n.dp.Targets().Update(t.Context(), target))
	client.answers(t, 1)
	frontends, err := n.dp.ListFrontends()
	must(t, err)
	for _, f := range frontends {
		if f.Port == 81 {
			_, err = datapath.EditSessions(n.config.PinDir, func(_ *uint64, backend *uint32) bool { *backend = f.Backends[0].ID; return true })
			must(t, err)
		}
	}
	client.stays(t, "it had another service's", local)
}

// TestNodeLocalPortIsAServiceOfItsOwn: without a backend of its own it refuses, whatever the port has.
func TestNodeLocalPortIsAServiceOfItsOwn(t *testing.T) {
	eachFamily(t, func(t *testing.T, opts options) {
		n, client, local, remote := newShopOf(t, opts)
		n.openShop(lb.AffinityNone, local, remote)
		frontend := shopFrontend(lb.TCP, lb.AffinityNone)
		frontend.Address, frontend.Port, frontend.Target.NodeLocal = n.shop().Addr(), 82, true
		must(t, n.dp.Frontends().Update(t.Context(), frontend))
		at := netip.AddrPortFrom(n.shop().Addr(), 82)
		if _, err := client.ns.dial(t, "tcp", at); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connecting gives %v, want %v", err, unix.ECONNREFUSED)
		}
		target := n.shopTarget(local, lb.TCP)
		target.Port.NodeLocal = true
		must(t, n.dp.Targets().Update(t.Context(), target))
		for range 40 {
			conn, err := client.ns.dial(t, "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			who, err := io.ReadAll(conn)
			conn.Close()
			if err != nil || string(who) != local.addr().String() {
				t.Fatalf("answered by %q, %v; want %s", who, err, local.addr())
			}
		}
	})
}

// TestFrontendsForPacketsAreNotForSockets, though they have the same address and port.
func TestFrontendsForPacketsAreNotForSockets(t *testing.T) {
	m := newMesh(t, options{}, 1)
	n, frontends := m.nodes[0], m.nodes[0].dp.Frontends()
	inside := shopFrontend(lb.TCP, lb.AffinityNone)
	outside := inside
	outside.Outside, outside.Target.NodeLocal = true, true
	for i, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return frontends.Update(t.Context(), outside) }, "/outside"},
		{func() error { return frontends.Update(t.Context(), inside) }, " /outside"},
		{func() error { return frontends.Delete(t.Context(), outside) }, ""},
		{func() error { return frontends.Update(t.Context(), outside) }, " /outside"},
		{func() error { return frontends.Prune(t.Context(), values([]lb.Frontend{inside, outside}), all) }, " /outside"},
		{func() error { return frontends.Delete(t.Context(), inside) }, "/outside"},
		{func() error { return frontends.Update(t.Context(), inside) }, " /outside"},
		{func() error { return frontends.Prune(t.Context(), values([]lb.Frontend{inside}), all) }, ""},
	} {
		must(t, step.do())
		list, err := n.dp.ListFrontends()
		must(t, err)
		var got []string
		for _, f := range list {
			got = append(got, strings.TrimPrefix(f.FrontendKey.String(), inside.FrontendKey.String()))
		}
		if strings.Join(got, " ") != step.want || len(got) == 0 {
			t.Errorf("step %d: there are %q, want %q", i, got, step.want)
		}
	}
}
