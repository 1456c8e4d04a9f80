package agent

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/statedb"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// fakeLinks are pods' links that exist in name only.
type fakeLinks struct {
	made map[string]identity.Endpoint // by host link
	fail error
}

func (f *fakeLinks) Create(ep identity.Endpoint) (datapath.PodLink, error) {
	if f.fail != nil {
		return datapath.PodLink{}, f.fail
	}
	f.made[ep.HostLink] = ep
	return datapath.PodLink{IfIndex: len(f.made), HostMAC: "02:00:00:00:00:01", MAC: "02:00:00:00:00:02"}, nil
}

func (f *fakeLinks) Find(hostLink string) (datapath.PodLink, bool, error) {
	_, ok := f.made[hostLink]
	return datapath.PodLink{IfIndex: 7}, ok, nil
}

func (f *fakeLinks) Repair(ep identity.Endpoint) error {
	f.made[ep.HostLink] = ep
	return nil
}

func (f *fakeLinks) Delete(hostLink string) error {
	delete(f.made, hostLink)
	return nil
}

// agreeable is a target that agrees with whatever it is told.
type agreeable[T any] struct{}

func (agreeable[T]) Update(context.Context, T) error { return nil }
func (agreeable[T]) Delete(context.Context, T) error { return nil }
func (agreeable[T]) Prune(context.Context, iter.Seq[T], func(identity.ClusterID) bool) error {
	return nil
}

// dualStackConfig is that of a node whose pods have two addresses.
func dualStackConfig(t *testing.T) Config {
	return Config{
		Cluster: ClusterConfig{
			Name: "east", ID: 1,
			PodCIDRs:     []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:10::/48")},
			ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/29"), netip.MustParsePrefix("fd00:1::/112")},
		},
		Node: NodeConfig{
			Name: "node1", Address: netip.MustParseAddr("172.29.1.11"),
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24"), netip.MustParsePrefix("fd00:10:0:1::/64")},
		},
		StateDir: t.TempDir(),
	}
}

func newFakeEndpoints(t *testing.T, cfg Config, tables *clustermesh.Tables, store kvstore.Store, links *fakeLinks) *endpoints {
	log := slog.New(slog.DiscardHandler)
	e := newEndpoints(tables, identity.NewAllocator(store, "east", 1, "node1", log), cfg, 1390, log)
	e.links = links
	return e
}

// dualStackNode is an agent without a kernel: the sources and what follows from them.
type dualStackNode struct {
	tables *clustermesh.Tables
	pods   *endpoints
	links  *fakeLinks
}

func startDualStackNode(t *testing.T) dualStackNode {
	t.Helper()
	cfg, store := dualStackConfig(t), kvstore.NewMemory()
	n := dualStackNode{tables: newTables(t), links: &fakeLinks{made: map[string]identity.Endpoint{}}}
	n.pods = newFakeEndpoints(t, cfg, n.tables, store, n.links)
	local, err := clustermesh.NewLocal(clustermesh.LocalConfig{
		Tables: n.tables, Cluster: cfg.info(), Log: slog.New(slog.DiscardHandler),
		Node: identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: cfg.Node.Address, PodCIDRs: cfg.Node.PodCIDRs,
			Instance: "instance-0123456789", Version: identity.Version{Incarnation: 7, Sequence: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, local.Run)
	startBalance(t, n.tables, nil)
	run(t, newReconciler("endpoints", n.tables, n.tables.Endpoints, agreeable[identity.Endpoint]{}, func(identity.ClusterID) bool { return true }, slog.New(slog.DiscardHandler)).Run)
	return n
}

func (n dualStackNode) add(t *testing.T, name string) identity.Endpoint {
	t.Helper()
	ep, err := n.pods.Add(t.Context(), api.EndpointRequest{Name: name, NetNS: "/proc/self/ns/net", Labels: map[string]string{"app": "shop"}})
	if err != nil {
		t.Fatal(err)
	}
	return ep
}

// published lists the keys of this kind that the node publishes.
func (n dualStackNode) published(txn statedb.ReadTxn, kind string) string {
	var keys []string
	for row := range n.tables.Publications.All(txn) {
		if rest, ok := strings.CutPrefix(row.Object.Key, kvstore.Prefix+kind+"/east/"); ok {
			keys = append(keys, rest)
		}
	}
	return strings.Join(keys, " ")
}

// backends lists the addresses that a frontend leads to.
func (n dualStackNode) backends(txn statedb.ReadTxn, frontend string) string {
	row, _, ok := n.tables.Frontends.Get(txn, n.tables.Frontends.ByKey(frontend))
	if !ok {
		return "no such frontend"
	}
	var backends []string
	for target := range n.tables.Targets.All(txn) {
		if target.Object.Port == row.Object.Target {
			backends = append(backends, netip.AddrPortFrom(target.Object.Address, target.Object.Number).String())
		}
	}
	slices.Sort(backends)
	return strings.Join(backends, " ")
}

func TestADualStackPodIsReachedAtBothItsAddresses(t *testing.T) {
	n := startDualStackNode(t)
	put(t, n.tables, n.tables.Services, shop("east", 1, "100.64.64.2", func(s *lb.Service) {
		s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr("fd00:1::2"))
	}))
	ep := n.add(t, "a")
	if ep.Address.String() != "10.1.1.4" || ep.Address6.String() != "fd00:10:0:1::2" {
		t.Errorf("the pod has %s and %s", ep.Address, ep.Address6)
	}
	if link := n.links.made[ep.HostLink]; link.Address != ep.Address || link.Address6 != ep.Address6 {
		t.Errorf("its link was made with %s and %s", link.Address, link.Address6)
	}
	until(t, n.tables, n.tables.Publications, "both addresses are published", func(txn statedb.ReadTxn) bool {
		return n.published(txn, "addresses") == "10.1.1.4 fd00:10:0:1::2" && n.published(txn, "slices") == "default/shop/node1"
	})
	until(t, n.tables, n.tables.Targets, "each frontend leads to the address of its family", func(txn statedb.ReadTxn) bool {
		return n.backends(txn, "100.64.64.2:80/TCP") == "10.1.1.4:8080" && n.backends(txn, "[fd00:1::2]:80/TCP") == "[fd00:10:0:1::2]:8080"
	})

	change := identity.Renumbered{Labels: ep.Labels, Old: ep.Identity, New: ep.Identity + 1}
	if err := n.pods.Renumber(change); err != nil {
		t.Fatal(err)
	}
	until(t, n.tables, n.tables.Addresses, "both addresses have the new identity", func(txn statedb.ReadTxn) bool {
		count := 0
		for row := range n.tables.Addresses.All(txn) {
			if row.Object.Identity == change.New {
				count++
			}
		}
		return count == 2
	})

	if err := n.pods.Delete(t.Context(), ep.ID()); err != nil {
		t.Fatal(err)
	}
	until(t, n.tables, n.tables.Publications, "both addresses are withdrawn", func(txn statedb.ReadTxn) bool {
		return n.published(txn, "addresses") == "" && n.published(txn, "slices") == ""
	})
	until(t, n.tables, n.tables.Targets, "nobody is led there", func(txn statedb.ReadTxn) bool { return keys(txn, n.tables.Targets) == "" })
	if len(n.links.made) != 0 {
		t.Errorf("links remain: %v", n.links.made)
	}
	if next := n.add(t, "b"); next.Address == ep.Address || next.Address6 == ep.Address6 {
		t.Errorf("an address was given again at once: %s and %s", next.Address, next.Address6)
	}
}

func TestAnAddressThatWasNotNeededIsFreeAgain(t *testing.T) {
	links := &fakeLinks{made: map[string]identity.Endpoint{}, fail: errors.New("no such device")}
	cfg := dualStackConfig(t)
	cfg.Node.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.1.0/29"), netip.MustParsePrefix("fd00:10:0:1::/125")}
	e := newFakeEndpoints(t, cfg, newTables(t), kvstore.NewMemory(), links)
	for range 20 { // more than there are addresses
		if _, err := e.Add(t.Context(), api.EndpointRequest{Name: "a", NetNS: "/proc/self/ns/net"}); err == nil || !strings.Contains(err.Error(), "no such device") {
			t.Fatalf("a pod without a link: %v", err)
		}
	}
}

// TestPodsOfAnEarlierLife holds that pods keep their addresses over restarts, as far as the ranges of the node still have them, and that
// who has to do something about one is told.
func TestPodsOfAnEarlierLife(t *testing.T) {
	ip := netip.MustParseAddr
	for _, test := range []struct {
		name        string
		address     netip.Addr
		address6    netip.Addr
		ranges      string
		mode        identity.Encryption
		want        string // addresses
		wantProblem string
	}{
		{"as it was", ip("10.1.1.9"), ip("fd00:10:0:1::9"), "10.1.1.0/24 fd00:10:0:1::/64", identity.EncryptAll, "10.1.1.9 fd00:10:0:1::9", ""},
		{"the node has become dual-stack", ip("10.1.1.9"), netip.Addr{}, "10.1.1.0/24 fd00:10:0:1::/64", identity.EncryptAll, "10.1.1.9", ""},
		{"the node has lost a range", ip("10.1.1.9"), ip("fd00:10:0:1::9"), "10.1.1.0/24", identity.EncryptAll, "10.1.1.9", ""},
		{"the node has another range", ip("10.1.1.9"), netip.Addr{}, "10.1.2.0/24", identity.EncryptAll, "", ""},
		{"it has a tunnel address", ip("10.1.1.2"), netip.Addr{}, "10.1.1.0/24", identity.EncryptAll, "10.1.1.2",
			"endpoint default/a has the address 10.1.1.2, which is this node's own"},
		{"it has a tunnel address without tunnels", ip("10.1.1.3"), netip.Addr{}, "10.1.1.0/24", identity.EncryptOff, "10.1.1.3", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			links, store, cfg := &fakeLinks{made: map[string]identity.Endpoint{}}, kvstore.NewMemory(), dualStackConfig(t)
			before := newFakeEndpoints(t, cfg, newTables(t), store, links)
			kept := identity.Endpoint{Namespace: "default", Name: "a", Labels: identity.Labels{"app": "a"}, Identity: identity.Compose(1, 300), HostLink: "cwa",
				Address: test.address, Address6: test.address6}
			before.byID[kept.ID()], links.made["cwa"] = kept, kept
			if err := before.save(); err != nil {
				t.Fatal(err)
			}

			cfg.Node.PodCIDRs, cfg.Encryption.Mode = nil, test.mode
			for _, r := range strings.Fields(test.ranges) {
				cfg.Node.PodCIDRs = append(cfg.Node.PodCIDRs, netip.MustParsePrefix(r))
			}
			after := newFakeEndpoints(t, cfg, newTables(t), store, links)
			if err := after.Restore(); err != nil {
				t.Fatal(err)
			}
			got := ""
			if ep, ok := after.get("default/a"); ok {
				got = strings.ReplaceAll(listed(ep.Addresses()), ",", "")
			}
			if got != test.want {
				t.Errorf("it has %q, want %q", got, test.want)
			}
			if problems := strings.Join(after.problems(), "; "); !strings.HasPrefix(problems, test.wantProblem) || (problems == "") != (test.wantProblem == "") {
				t.Errorf("problems are %q, want %q", problems, test.wantProblem)
			}
			var next identity.Endpoint
			if err := after.pools.next(&next); err != nil || slices.Contains(strings.Fields(test.want), next.Address.String()) {
				t.Errorf("the next pod gets %s (%v)", next.Address, err)
			}
		})
	}
}

func TestStatusSaysWhichAddressHasNoBackendOfItsFamily(t *testing.T) {
	tables := newTables(t)
	startBalance(t, tables, nil)
	put(t, tables, tables.Services,
		shop("east", 1, "100.64.64.2", func(s *lb.Service) {
			s.ClusterIPs, s.ExternalIPs = append(s.ClusterIPs, netip.MustParseAddr("fd00:1::2")), []netip.Addr{netip.MustParseAddr("2001:db8::7")}
		}),
		shop("west", 2, "100.64.128.2", func(s *lb.Service) { s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr("fd00:2::2")) }))
	put(t, tables, tables.Backends, backend("west", 2, "10.2.1.5"), backend("west", 2, "10.2.1.6"))
	until(t, tables, tables.Targets, "the backends are there", func(txn statedb.ReadTxn) bool { return strings.Contains(keys(txn, tables.Targets), "10.2.1.6") })
	want := []string{ // each address once, though an external one is two frontends
		"service default/shop: connections to [2001:db8::7]:80/TCP are refused, since none of its 2 backends has an IPv6 address",
		"service default/shop: connections to [fd00:1::2]:80/TCP are refused, since none of its 2 backends has an IPv6 address",
	}
	if problems := oneFamily(tables.DB.ReadTxn(), tables, "east"); !slices.Equal(problems, want) {
		t.Errorf("problems are %q, want %q", problems, want)
	}
	put(t, tables, tables.Backends, backend("east", 1, "fd00:10:0:1::5"))
	until(t, tables, tables.Targets, "it has one", func(txn statedb.ReadTxn) bool { return strings.Contains(keys(txn, tables.Targets), "fd00:10:0:1::5") })
	if problems := oneFamily(tables.DB.ReadTxn(), tables, "east"); len(problems) != 0 {
		t.Errorf("with a backend of each family: %q", problems)
	}
}
