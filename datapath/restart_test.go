package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
	"causeway/identity"
	"causeway/lb"
)

// restart ends the node's data path as a dying agent does, and loads it again.
func (n *node) restart() {
	n.mesh.t.Helper()
	must(n.mesh.t, n.dp.Close())
	n.load()
}

// refill tells the node everything again, as an agent does after a start.
func (n *node) refill(pods ...*pod) {
	t := n.mesh.t
	t.Helper()
	n.learn()
	for _, p := range pods {
		p.tell(n)
		if p.node == n {
			n.ns.do(t, func() { must(t, n.dp.Endpoints().Update(context.Background(), p.row)) })
		}
	}
}

// TestRestartKeepsTraffic: while the agent is down and comes up again, no datagram is lost and an established
// connection goes on.
func TestRestartKeepsTraffic(t *testing.T) {
	eachAttachment(t, func(t *testing.T, opts options) {
		m := newMesh(t, opts, 1, 2)
		client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(300)
		at := server.echo()
		established, err := client.ns.dial(t, "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer established.Close()
		exchange(t, established, 1000)

		lost := startPings(t, client.ns, at)
		for range 5 {
			for _, n := range m.nodes {
				n.restart()
				n.refill(client, server)
			}
		}
		if sent, n := lost(); n != 0 || sent == 0 {
			t.Errorf("%d of %d datagrams were lost over the restarts", n, sent)
		}
		must(t, established.SetDeadline(time.Now().Add(patience)))
		exchange(t, established, 1<<20)
	})
}

// startPings sends datagrams and awaits each answer, until the returned function is called.
func startPings(t *testing.T, from namespace, to netip.AddrPort) (stop func() (sent, lost int)) {
	t.Helper()
	conn, err := from.dial(t, "udp", to)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	sent, lost := 0, 0
	wg.Go(func() {
		buf := make([]byte, 16)
		for ; ctx.Err() == nil; sent++ {
			conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
			conn.Write([]byte("ping"))
			if _, err := conn.Read(buf); err != nil {
				lost++
			}
		}
	})
	return func() (int, int) {
		cancel()
		wg.Wait()
		conn.Close()
		return sent, lost
	}
}

// TestRestartWritesNothing: an agent that comes up and is told what it knew changes no map, and new
// entries get numbers of their own.
func TestRestartWritesNothing(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	n := m.nodes[0]
	pods := []*pod{n.addPod(300), n.addPod(301), m.nodes[1].addPod(301), m.nodes[1].addPod(301)}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	must(t, n.dp.SetBlackholes(ranges))
	n.openShop(lb.AffinityLocal, pods[1:]...)
	before, err := n.dp.ListFrontends()
	must(t, err)

	n.restart()
	// In another order, and the targets first.
	slices.Reverse(pods)
	for _, p := range pods[:3] {
		must(t, n.dp.Targets().Update(t.Context(), n.shopTarget(p, lb.TCP)))
	}
	n.openShop(lb.AffinityLocal, pods[:3]...)
	must(t, n.dp.SetBlackholes(ranges))
	n.refill(pods...)
	must(t, n.dp.Targets().Prune(t.Context(), values(n.shopTargets(pods[:3]...)), all))
	must(t, n.dp.Frontends().Prune(t.Context(), values([]lb.Frontend{shopFrontend(lb.TCP, ""), shopFrontend(lb.UDP, "")}), all))
	if writes := n.dp.Writes(); writes != 0 {
		t.Errorf("the restart wrote to maps %d times", writes)
	}
	after, err := n.dp.ListFrontends()
	must(t, err)
	if got, want := fmt.Sprint(after), fmt.Sprint(before); got != want {
		t.Errorf("the load balancer became\n%s from\n%s", got, want)
	}

	more := m.nodes[1].addPod(301)
	must(t, n.dp.Targets().Update(t.Context(), n.shopTarget(more, lb.TCP)))
	after, err = n.dp.ListFrontends()
	must(t, err)
	seen := make(map[uint32]bool)
	for _, f := range after {
		for _, b := range f.Backends {
			if seen[b.ID] {
				t.Errorf("backend %d is there twice: %v", b.ID, after)
			}
			seen[b.ID] = true
		}
	}
	if len(seen) != 7 {
		t.Errorf("there are %d backends, want 7", len(seen))
	}
}

// TestRestartWithOtherAttachment: an agent may come up on a kernel that has another way, or be told to use it. The
// kernel loses a packet while a device's qdisc is made, so this is no matter of a plain restart.
func TestRestartWithOtherAttachment(t *testing.T) {
	if !hasTCX() {
		t.Skip("the kernel has clsact alone")
	}
	m := newMesh(t, options{}, 1, 2)
	client, server := m.nodes[0].addPod(300), m.nodes[1].addPod(300)
	at := server.echo()
	for _, clsact := range []bool{true, false} {
		for _, n := range m.nodes {
			n.config.ForceClsact = clsact
			n.restart()
		}
		client.ns.reach(t, at)
		links, err := filepath.Glob(filepath.Join(m.nodes[0].config.PinDir, "links", "pod-*"))
		must(t, err)
		m.nodes[0].ns.do(t, func() {
			link, err := netlink.LinkByIndex(client.row.IfIndex)
			must(t, err)
			filters, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
			must(t, err)
			if (len(filters) == 1) != clsact || (len(links) == 1) == clsact {
				t.Errorf("clsact %v: the pod's device has filters %v and links %v", clsact, filters, links)
			}
		})
	}
}

func TestLoadRefusesMapsOfAnotherVersion(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	// A map in the place of another one.
	pinned := func(name string) string { return filepath.Join(n.config.PinDir, name) }
	must(t, os.Rename(pinned("nodes"), pinned("was-nodes")))
	must(t, os.Rename(pinned("endpoints"), pinned("nodes")))
	n.ns.do(t, func() {
		dp, err := datapath.Load(n.config)
		if err == nil {
			dp.Close()
			t.Error("it was loaded")
			return
		}
		t.Log(err)
	})
}

func TestLoadNeedsBPFFileSystem(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	cfg := n.config
	cfg.PinDir = filepath.Join(t.TempDir(), "causeway")
	n.ns.do(t, func() {
		if _, err := datapath.Load(cfg); err == nil {
			t.Error("it was loaded")
		}
		if _, err := os.Stat(cfg.PinDir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the directory was made all the same: %v", err)
		}
	})
}

// TestPrune: only what nobody wants goes, and only of clusters that have synced.
func TestPrune(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	n := m.nodes[0]
	local, remote := n.addPod(300), m.nodes[1].addPod(300)
	must(t, n.dp.SetBlackholes([]netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}))
	n.openShop(lb.AffinityNone, local, remote)
	n.restart()
	prune := func(synced func(identity.ClusterID) bool) {
		ctx := t.Context()
		must(t, n.dp.Tunnels().Prune(ctx, none[identity.Tunnel], synced))
		must(t, n.dp.Addresses().Prune(ctx, none[identity.Address], synced))
		must(t, n.dp.Targets().Prune(ctx, none[lb.Target], synced))
		must(t, n.dp.Frontends().Prune(ctx, none[lb.Frontend], synced))
		n.ns.do(t, func() { must(t, n.dp.Endpoints().Prune(ctx, none[identity.Endpoint], synced)) })
	}
	type state struct{ addresses, frontends, backends int }
	have := func() (s state) {
		addresses, err := n.dp.ListAddresses()
		must(t, err)
		frontends, err := n.dp.ListFrontends()
		must(t, err)
		s = state{addresses: len(addresses), frontends: len(frontends)}
		for _, f := range frontends {
			s.backends += len(f.Backends)
		}
		return s
	}
	for _, c := range []struct {
		name   string
		synced func(identity.ClusterID) bool
		want   state
	}{
		{"nobody has synced", func(identity.ClusterID) bool { return false }, state{4, 2, 4}},
		{"cluster 2 has", func(id identity.ClusterID) bool { return id == 2 }, state{2, 2, 2}},
		{"all have", all, state{1, 0, 0}},
	} {
		prune(c.synced)
		if got := have(); got != c.want {
			t.Errorf("%s: left are %+v, want %+v", c.name, got, c.want)
		}
	}
	if names, err := filepath.Glob(filepath.Join(n.config.PinDir, "links", "pod-*")); err != nil || len(names) != 0 {
		t.Errorf("links of pods are left: %v, %v", names, err)
	}
}

func TestOpenMapsWithoutAgent(t *testing.T) {
	needRoot(t)
	if _, err := datapath.OpenMaps(mountBPF(t)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v, want %v", err, os.ErrNotExist)
	}
}

func TestMapsShowWhatIsInTheKernel(t *testing.T) {
	m := newMesh(t, options{}, 1, 2)
	n := m.nodes[0]
	local, remote := n.addPod(300), m.nodes[1].addPod(301)
	hole := netip.MustParsePrefix("10.2.0.0/16")
	must(t, n.dp.SetBlackholes([]netip.Prefix{hole}))
	maps, err := datapath.OpenMaps(n.config.PinDir)
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	for prefix, want := range map[netip.Prefix]datapath.AddressEntry{
		local.address().Prefix:  {Identity: local.row.Identity, Owner: 1},
		remote.address().Prefix: {Identity: remote.row.Identity, Owner: 2, Tunnel: m.nodes[1].row.Address},
		hole:                    {Owner: 1, Blackhole: true},
	} {
		want.Prefix = prefix
		if got, ok, err := maps.LookupAddress(prefix); err != nil || !ok || got != want {
			t.Errorf("%s is %+v, %v, %v; want %+v", prefix, got, ok, err, want)
		}
	}
	if got, ok, err := maps.LookupAddress(netip.MustParsePrefix("10.2.1.77/32")); ok || err != nil {
		t.Errorf("an address that isn't there is found: %+v, %v", got, err)
	}
}

// TestBlackholeGivesWay: a prefix that is somebody's is no blackhole, until it is nobody's again.
func TestBlackholeGivesWay(t *testing.T) {
	n := newMesh(t, options{}, 1).nodes[0]
	hole := netip.MustParsePrefix("10.2.0.0/16")
	row := identity.Address{ClusterID: 2, Prefix: hole, Identity: 2<<16 | 300, NodeAddress: netip.MustParseAddr("172.29.2.10")}
	isHole := func() bool {
		entry, ok, err := n.dp.LookupAddress(hole)
		return ok && err == nil && entry.Blackhole
	}
	steps := []struct {
		name string
		do   func() error
		want bool
	}{
		{"set", func() error { return n.dp.SetBlackholes([]netip.Prefix{hole}) }, true},
		{"taken", func() error { return n.dp.Addresses().Update(t.Context(), row) }, false},
		{"set again", func() error { return n.dp.SetBlackholes([]netip.Prefix{hole}) }, false},
		{"given back", func() error { return n.dp.Addresses().Delete(t.Context(), row) }, true},
		{"unset", func() error { return n.dp.SetBlackholes(nil) }, false},
	}
	for _, s := range steps {
		must(t, s.do())
		if isHole() != s.want {
			t.Errorf("%s: blackhole is %v, want %v", s.name, !s.want, s.want)
		}
	}
}

func (n *node) shopTargets(pods ...*pod) (targets []lb.Target) {
	for _, p := range pods {
		targets = append(targets, n.shopTarget(p, lb.TCP), n.shopTarget(p, lb.UDP))
	}
	return targets
}

func all(identity.ClusterID) bool { return true }

func none[T any](func(T) bool) {}

func values[T any](rows []T) func(func(T) bool) { return slices.Values(rows) }
