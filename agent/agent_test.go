package agent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/statedb"
	"go.uber.org/goleak"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/k8s/cni"
	"causeway/kvstore"
	"causeway/lb"
)

// The test's own binary is the proxy that tests of its supervision start, and the plugin that a container runtime does.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == cni.Name {
		os.Exit(runTestPlugin())
	}
	if version := os.Getenv(beProxy); version != "" {
		if err := runTestProxy(version); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// patience bounds every wait; a wait that needs it has failed.
const patience = 10 * time.Second

func newTables(t *testing.T) *clustermesh.Tables {
	t.Helper()
	tables, err := clustermesh.NewTables()
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

// run runs a task until the test ends.
func run(t *testing.T, task func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- task(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// until waits for a condition on a table, looking again whenever it changes.
func until[T any](t *testing.T, tables *clustermesh.Tables, table clustermesh.Table[T], what string, condition func(statedb.ReadTxn) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		txn := tables.DB.ReadTxn()
		_, changed := table.AllWatch(txn)
		if condition(txn) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: not so after %s", what, patience)
		}
	}
}

func put[T any](t *testing.T, tables *clustermesh.Tables, table clustermesh.Table[T], objects ...T) {
	t.Helper()
	txn := tables.DB.WriteTxn(table)
	defer txn.Abort()
	for _, o := range objects {
		if _, _, err := table.Insert(txn, clustermesh.NewRow(o)); err != nil {
			t.Fatal(err)
		}
	}
	txn.Commit()
}

func remove[T any](t *testing.T, tables *clustermesh.Tables, table clustermesh.Table[T], key string) {
	t.Helper()
	txn := tables.DB.WriteTxn(table)
	defer txn.Abort()
	if err := clustermesh.Remove(txn, table, key); err != nil {
		t.Fatal(err)
	}
	txn.Commit()
}

// fakeTarget is a target that can be told to fail.
type fakeTarget struct {
	mu   sync.Mutex
	fail error
	held map[netip.Prefix]identity.ClusterID
	// changed gets a token for every call that was made.
	changed chan struct{}
}

func newFakeTarget() *fakeTarget {
	return &fakeTarget{held: map[netip.Prefix]identity.ClusterID{}, changed: make(chan struct{}, 10000)}
}

func (f *fakeTarget) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *fakeTarget) has(p string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.held[netip.MustParsePrefix(p)]
	return ok
}

func (f *fakeTarget) do(change func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.changed <- struct{}{} }()
	if f.fail != nil {
		return f.fail
	}
	change()
	return nil
}

func (f *fakeTarget) Update(_ context.Context, a identity.Address) error {
	return f.do(func() { f.held[a.Prefix] = a.ClusterID })
}

func (f *fakeTarget) Delete(_ context.Context, a identity.Address) error {
	return f.do(func() { delete(f.held, a.Prefix) })
}

func (f *fakeTarget) Prune(_ context.Context, desired iter.Seq[identity.Address], synced func(identity.ClusterID) bool) error {
	keep := map[netip.Prefix]bool{}
	for a := range desired {
		keep[a.Prefix] = true
	}
	return f.do(func() {
		for p, owner := range f.held {
			if !keep[p] && synced(owner) {
				delete(f.held, p)
			}
		}
	})
}

// until waits for a condition on what the target holds.
func (f *fakeTarget) until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for !condition() {
		select {
		case <-f.changed:
		case <-deadline:
			t.Fatalf("%s: not so after %s", what, patience)
		}
	}
}

func testAddress(prefix string, cluster identity.ClusterID) identity.Address {
	return identity.Address{Cluster: map[identity.ClusterID]string{1: "east", 2: "west"}[cluster], ClusterID: cluster, Prefix: netip.MustParsePrefix(prefix)}
}

func TestReconcilerRetriesUntilTheTargetAgrees(t *testing.T) {
	tables, target := newTables(t), newFakeTarget()
	target.set(errors.New("no memory left"))
	r := newReconciler("test", tables, tables.Addresses, target, func(identity.ClusterID) bool { return true }, slog.New(slog.DiscardHandler))
	run(t, r.Run)
	a := testAddress("10.1.1.2/32", 1)
	put(t, tables, tables.Addresses, a)
	status := func(txn statedb.ReadTxn) clustermesh.Status {
		row, _, ok := tables.Addresses.Get(txn, tables.Addresses.ByKey(tables.Addresses.Key(a)))
		if !ok {
			return clustermesh.Status{}
		}
		return row.Status
	}
	until(t, tables, tables.Addresses, "the row says why it is not in force", func(txn statedb.ReadTxn) bool {
		s := status(txn)
		return s.Kind == clustermesh.Failed && s.Error == "no memory left"
	})
	target.set(nil)
	until(t, tables, tables.Addresses, "the row says that it is in force", func(txn statedb.ReadTxn) bool { return status(txn).Kind == clustermesh.Done })

	target.set(errors.New("busy"))
	remove(t, tables, tables.Addresses, tables.Addresses.Key(a))
	target.until(t, "the deletion is tried", func() bool { return len(target.changed) > 0 || target.has("10.1.1.2/32") })
	target.set(nil)
	target.until(t, "the deletion is tried again", func() bool { return !target.has("10.1.1.2/32") })
}

func TestPruneSparesClustersThatHaveNotSynced(t *testing.T) {
	tables, target := newTables(t), newFakeTarget()
	target.held[netip.MustParsePrefix("10.1.1.9/32")] = 1
	target.held[netip.MustParsePrefix("10.2.1.9/32")] = 2
	r := newReconciler("test", tables, tables.Addresses, target, func(id identity.ClusterID) bool { return id == 1 }, slog.New(slog.DiscardHandler))
	put(t, tables, tables.Addresses, testAddress("10.1.1.2/32", 1))
	run(t, r.Run)
	r.Prune()
	target.until(t, "what is stale goes", func() bool { return !target.has("10.1.1.9/32") && target.has("10.1.1.2/32") })
	if !target.has("10.2.1.9/32") {
		t.Error("an entry of a cluster that was not heard yet was pruned")
	}
}

// shop declares the service default/shop in a cluster.
func shop(cluster string, id uint8, ip string, change ...func(*lb.Service)) lb.Service {
	s := lb.Service{
		Cluster: cluster, ClusterID: id, Name: lb.Name{Namespace: "default", Name: "shop"}, Global: true, Shared: true, Affinity: lb.AffinityNone,
		ClusterIPs: []netip.Addr{netip.MustParseAddr(ip)}, Ports: []lb.ServicePort{{Protocol: lb.TCP, Port: 80, TargetPort: 8080}},
		Selector: map[string]string{"app": "shop"},
	}
	for _, c := range change {
		c(&s)
	}
	return s
}

func backend(cluster string, id uint8, ip string) lb.Backend {
	return lb.Backend{
		Cluster: cluster, ClusterID: id, Service: lb.Name{Namespace: "default", Name: "shop"}, Address: netip.MustParseAddr(ip), Node: "node1", Slice: "node1",
		Ports: []lb.BackendPort{{Protocol: lb.TCP, Port: 8080}},
	}
}

func startBalance(t *testing.T, tables *clustermesh.Tables, guard lb.Guard) (*balance, *clustermesh.Refusals) {
	b := newBalance(tables, eastNode, guard, clustermesh.NewRefusals())
	run(t, b.Run)
	return b, b.refusals
}

func keys[T any](txn statedb.ReadTxn, table clustermesh.Table[T]) string {
	var out []string
	for row := range table.All(txn) {
		out = append(out, table.Key(row.Object))
	}
	return strings.Join(out, " ")
}

func TestBalanceFollowsServicesAndBackends(t *testing.T) {
	tables := newTables(t)
	startBalance(t, tables, nil)
	frontends := func(want string) {
		t.Helper()
		until(t, tables, tables.Frontends, "frontends are "+want, func(txn statedb.ReadTxn) bool { return keys(txn, tables.Frontends) == want })
	}
	targets := func(want string) {
		t.Helper()
		until(t, tables, tables.Targets, "targets are "+want, func(txn statedb.ReadTxn) bool { return keys(txn, tables.Targets) == want })
	}
	const east, west = "default/shop:80/TCP|10.1.1.2:8080", "default/shop:80/TCP|10.2.1.2:8080"
	put(t, tables, tables.Backends, backend("east", 1, "10.1.1.2"), backend("west", 2, "10.2.1.2"))
	put(t, tables, tables.Services, shop("west", 2, "100.64.128.9"))
	frontends("100.64.128.9:80/TCP")
	targets(west)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"))
	frontends("100.64.128.9:80/TCP 100.64.64.9:80/TCP")
	targets(east + " " + west)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.Global, s.Shared = false, false }))
	frontends("100.64.64.9:80/TCP")
	targets(east)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"))
	targets(east + " " + west)
	remove(t, tables, tables.Backends, clustermesh.BackendKey(backend("west", 2, "10.2.1.2")))
	targets(east)
	remove(t, tables, tables.Services, "east/default/shop")
	frontends("100.64.128.9:80/TCP")
	targets("")
}

func TestTwoServicesWithOneAddress(t *testing.T) {
	tables := newTables(t)
	_, refusals := startBalance(t, tables, nil)
	other := shop("west", 2, "100.64.64.9", func(s *lb.Service) { s.Name.Name = "other" })
	put(t, tables, tables.Services, other)
	owner := func(want string) {
		t.Helper()
		until(t, tables, tables.Frontends, "the address is "+want+"'s", func(txn statedb.ReadTxn) bool {
			row, _, ok := tables.Frontends.Get(txn, tables.Frontends.ByKey("100.64.64.9:80/TCP"))
			return ok && row.Object.Target.Service.Name == want
		})
	}
	owner("other")
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"))
	owner("shop") // the own cluster's comes first
	if list := refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "is taken by service default/shop of cluster east") {
		t.Errorf("refusals are %+v, want the remote service's address", list)
	}
	remove(t, tables, tables.Services, "east/default/shop")
	owner("other")
	if list := refusals.List(); len(list) != 0 {
		t.Errorf("refusals are %+v after their cause has gone", list)
	}
}

func TestRemoteServicesMayNotHavePodsAddresses(t *testing.T) {
	tables := newTables(t)
	claims := clustermesh.NewClaims(identity.ClusterInfo{Name: "east", ID: 1, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}})
	b, refusals := startBalance(t, tables, newGuard(eastConfig, tables, claims, eastStore))
	put(t, tables, tables.Services, shop("west", 2, "10.1.1.2"), shop("west", 2, "100.64.128.9", func(s *lb.Service) { s.Name.Name = "fine" }))
	until(t, tables, tables.Frontends, "the good one is there alone", func(txn statedb.ReadTxn) bool {
		return keys(txn, tables.Frontends) == "100.64.128.9:80/TCP"
	})
	if list := refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "pod range 10.1.0.0/16 of cluster east") {
		t.Errorf("refusals are %+v", list)
	}

	// A cluster that announces its pod range later has it all the same.
	if err := claims.Claim(identity.ClusterInfo{Name: "north", ID: 3, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/24")}}); err != nil {
		t.Fatal(err)
	}
	b.Recheck()
	until(t, tables, tables.Frontends, "none is left", func(txn statedb.ReadTxn) bool { return keys(txn, tables.Frontends) == "" })
}

// manifest is a Service as a user writes it.
func manifest(extra string) []byte {
	return []byte("apiVersion: v1\nkind: Service\nmetadata: {name: shop, annotations: {service.cilium.io/global: \"true\"}}\n" +
		"spec: {selector: {app: shop}, ports: [{port: 80, targetPort: 8080}]" + extra + "}\n")
}

func newServices(t *testing.T, store kvstore.Store) *services {
	return &services{
		tables: newTables(t), store: store, guard: func(string, netip.Addr) string { return "" }, refusals: clustermesh.NewRefusals(),
		cluster: ClusterConfig{Name: "east", ID: 1, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/29")}},
	}
}

func TestApplyAllocatesHonoursAndKeepsAddresses(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	apply := func(extra, action, ip string) {
		t.Helper()
		results, err := s.Apply(brief(t), manifest(extra))
		if err != nil {
			t.Fatal(err)
		}
		if len(results) != 1 || results[0].Action != action || (ip != "" && results[0].ClusterIPs[0] != ip) {
			t.Fatalf("apply says %+v, want %s at %s", results, action, ip)
		}
	}
	apply("", "created", "")
	first, err := s.store.Get(context.Background(), lb.ServiceKey("east", lb.Name{Namespace: "default", Name: "shop"}))
	if err != nil {
		t.Fatal(err)
	}
	apply("", "unchanged", "")
	apply(", clusterIP: 192.0.2.7", "configured", "192.0.2.7")
	apply("", "unchanged", "192.0.2.7")
	if strings.Contains(string(first.Value), "192.0.2.7") {
		t.Error("the first address was not allocated")
	}
	if reserved, _ := s.store.List(context.Background(), reservationPrefix("east")); len(reserved) != 1 {
		t.Errorf("reserved are %v, want the service's one address", reserved)
	}

	stranger := strings.Replace(string(manifest(", clusterIP: 192.0.2.7")), "name: shop", "name: other", 1)
	if _, err := s.Apply(brief(t), []byte(stranger)); err == nil || !strings.Contains(err.Error(), "is service default/shop's") {
		t.Errorf("another service's address was given away: %v", err)
	}
	if err := s.Delete(context.Background(), lb.Name{Namespace: "default", Name: "shop"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(brief(t), []byte(stranger)); err != nil {
		t.Errorf("the address of a deleted service is not free: %v", err)
	}
}

// brief is a context that keeps Apply from waiting long for a kernel that isn't there.
func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func TestRefusedManifestsChangeNothing(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	bad := append(manifest(""), []byte("---\napiVersion: v1\nkind: Service\nmetadata: {name: b, annotations: {service.cilium.io/global: \"true\", service.cilium.io/affinity: nearby}}\nspec: {selector: {app: b}, ports: [{port: 80}]}\n")...)
	if _, err := s.Apply(context.Background(), bad); err == nil || !strings.Contains(err.Error(), "nearby") {
		t.Errorf("an unknown affinity was not refused by its value: %v", err)
	}
	if list := s.refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "nearby") {
		t.Errorf("status does not show the refusal: %+v", list)
	}
	if entries, err := store.List(context.Background(), kvstore.Prefix); err != nil || len(entries) != 0 {
		t.Errorf("the store holds %d entries (%v) after a refusal, want none", len(entries), err)
	}
}

func TestConfigIsRefusedWithAReason(t *testing.T) {
	good := `
cluster: {name: east, id: 1, podCIDRs: [10.1.0.0/16], serviceCIDRs: [100.64.64.0/18]}
node: {name: node1, address: 172.29.1.11, podCIDRs: [10.1.1.0/24]}
kvstore: {endpoints: ["https://172.29.1.2:2379"], caFile: ca, certFile: cert, keyFile: key}
`
	for _, test := range []struct{ old, new, want string }{
		{"", "", ""},
		{"id: 1,", "", ""}, // it takes one that is free
		{"name: node1", "name: Node_1", "node.name"},
		{"10.1.1.0/24", "10.2.1.0/24", "want a range within"},
		{"10.1.1.0/24", "10.1.1.0/30", "too small"},
		{"10.1.1.0/24", "10.1.1.0/24, 10.1.2.0/24", "of the same address family"},
		{"10.1.1.0/24", "10.1.1.1/24", "host bits, write 10.1.1.0/24"},
		{"10.1.1.0/24", "\"fd00:10:1::/64\"", "want a range within"},
		{"172.29.1.11", "\"2001:db8::11\"", ""},
		{"172.29.1.11", "\"::1\"", "loopback"},
		{"172.29.1.11", "\"fe80::1\"", "link-local"},
		{"172.29.1.11", "\"::ffff:172.29.1.11\"", "write 172.29.1.11"},
		{"172.29.1.11", "10.1.2.3", "lies in the cluster's own range 10.1.0.0/16"},
		{"[100.64.64.0/18]", "[100.64.64.0/18, 100.65.0.0/18]", "of the same address family"},
		{"node:", "metrics: {listen: \"127.0.0.1:9464\"}\nnode:", ""},
		{"node:", "metrics: {listen: \"9464\"}\nnode:", "metrics.listen"},
		{"node:", "xds: {listen: \"7960\"}\nnode:", "xds.listen"},
		{"node:", "encryption: {mode: most}\nnode:", "encryption mode"},
		{"node:", "encryption: {kind: hardware}\nnode:", "auto, kernel and userspace"},
		{"node:", "encryption: {ports: [51871]}\nnode:", "want 2 different ones"},
		{"node:", "encryption: {keepalive: 25s}\nnode:", ""},
		{"node:", "encryption: {keepalive: 5ms}\nnode:", "want 1s to 1h"},
		{"node:", "encryption: {rotateEvery: 30d}\nnode:", "is no duration"},
		{"node:", "encryption: {rotateEvery: 5s}\nnode:", "at least a minute"},
		{"node:", "peers: [{name: west}]\nnode:", "peers"},
		{"[10.1.0.0/16], serviceCIDRs: [100.64.64.0/18]}\nnode: {name: node1, address: 172.29.1.11, podCIDRs: [10.1.1.0/24]}",
			"[10.1.0.0/16, \"fd00:10::/48\"], serviceCIDRs: [100.64.64.0/18, \"fd00:1::/112\"]}\nnode: {name: node1, address: 172.29.1.11, podCIDRs: [10.1.1.0/24, \"fd00:10:0:1::/64\"]}", ""},
		{"[10.1.0.0/16]", "[10.1.0.0/16, \"fd00::/8\"]", "prefix fd00::/8 is wider than /32"},
		{"[10.1.0.0/16]", "[10.1.0.0/16, \"fd00:10::/126\"]", "prefix fd00:10::/126 is narrower than /125"},
		{"caFile: ca, certFile: cert", "certFile: cert", "caFile is missing"},
		{"node:", "peering: {endpoints: [west]}\nnode:", "want host:port"},
		{"node:", "peering: {quota: 5}\nnode:", "at least 1000"},
		{"node:", "nodes: 1\nnode:", "nodes"},
		{"node:", "gossip: {mesh: Our Mesh}\nnode:", "gossip: mesh"},
		{"node:", "gossip: {port: 7957}\nnode:", "each pool needs one of its own"},
	} {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		text := good
		if test.old != "" {
			text = strings.Replace(good, test.old, test.new, 1)
		}
		if err := writeFile(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		_, err := LoadConfig(path)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%q instead of %q: error %v, want %q", test.new, test.old, err, test.want)
		}
	}
}

func TestOlderClustersCanBeJoinedWithThoseThatAreLikeThem(t *testing.T) {
	four, six := netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:10::/48")
	for _, test := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Encryption.Mode = identity.EncryptOff }, "ipv4 vxlan"},
		{func(*Config) {}, "ipv4 vxlan wireguard"},
		{func(c *Config) { c.Cluster.PodCIDRs = append(c.Cluster.PodCIDRs, six) }, "ipv4 ipv6 vxlan wireguard"},
		{func(c *Config) { c.Node.Address = netip.MustParseAddr("2001:db8::11") }, "ipv4 ipv6 vxlan wireguard"},
	} {
		c := Config{Cluster: ClusterConfig{PodCIDRs: []netip.Prefix{four}}, Node: NodeConfig{Address: netip.MustParseAddr("172.29.1.11")}}
		c.setDefaults()
		test.change(&c)
		got := c.requires()
		slices.Sort(got)
		if strings.Join(got, " ") != test.want {
			t.Errorf("it requires %s, want %s", got, test.want)
		}
		for _, capability := range got {
			if !slices.Contains(capabilities, capability) {
				t.Errorf("it requires %s, which agents of this version do not have themselves", capability)
			}
		}
	}
}
