package agent

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/lb"
)

func TestAServiceGivesWayToANodeThatComesLater(t *testing.T) {
	tables := newTables(t)
	_, refusals := startBalance(t, tables, newGuard(eastConfig, tables, clustermesh.NewClaims(identity.ClusterInfo{Name: "east", ID: 1}), eastStore))
	put(t, tables, tables.Services, shop("west", 2, "172.29.3.11"))
	until(t, tables, tables.Frontends, "the service has its address", func(txn statedb.ReadTxn) bool { return keys(txn, tables.Frontends) != "" })
	put(t, tables, tables.Nodes, identity.Node{Cluster: "north", ClusterID: 3, Name: "node1", Address: netip.MustParseAddr("172.29.3.11")})
	until(t, tables, tables.Frontends, "the node has it", func(txn statedb.ReadTxn) bool { return keys(txn, tables.Frontends) == "" })
	if list := refusals.List(); len(list) != 1 || !strings.Contains(list[0].Reason, "node north/node1") {
		t.Errorf("refusals are %+v", list)
	}
	remove(t, tables, tables.Nodes, "north/node1")
	until(t, tables, tables.Frontends, "the service has it again", func(txn statedb.ReadTxn) bool { return keys(txn, tables.Frontends) != "" })
}

func TestRoutesFollowTheServices(t *testing.T) {
	tables := newTables(t)
	_, refusals := startBalance(t, tables, nil)
	say := func(retries string) {
		t.Helper()
		put(t, tables, tables.Services, shop("west", 2, "100.64.64.9", func(s *lb.Service) {
			s.Annotations = map[string]string{lb.AnnotationL7: "enabled", lb.AnnotationL7Retries: retries}
		}))
	}
	routed := func(retries int) func(statedb.ReadTxn) bool {
		return func(txn statedb.ReadTxn) bool {
			routes := tables.RoutesOf(txn, lb.Name{Namespace: "default", Name: "shop"})
			for row := range tables.Frontends.All(txn) {
				if row.Object.L7 != (len(routes) > 0) {
					t.Errorf("frontend %+v with routes %+v", row.Object, routes)
				}
			}
			if retries < 0 {
				return len(routes) == 0
			}
			return len(routes) > 0 && routes[0].Object.Options.Retries == retries
		}
	}
	say("3")
	until(t, tables, tables.Routes, "it is balanced at L7", routed(3))
	say("4")
	until(t, tables, tables.Routes, "it is balanced as it says now", routed(4))
	say("lots")
	until(t, tables, tables.Routes, "what can't be followed is balanced at L4", routed(-1))
	if list := refusals.List(); keys(tables.DB.ReadTxn(), tables.Frontends) == "" || len(list) != 1 || list[0].Cluster != "west" || !strings.Contains(list[0].Reason, `has the value "lots"`) {
		t.Errorf("refusals are %+v", list)
	}
	say("5")
	until(t, tables, tables.Routes, "it is balanced at L7 again", routed(5))
	if list := refusals.List(); len(list) != 0 {
		t.Errorf("refusals are %+v", list)
	}
	remove(t, tables, tables.Services, "west/default/shop")
	until(t, tables, tables.Routes, "it is gone", routed(-1))
}

func TestRefusedFrontendsAreRememberedOnce(t *testing.T) {
	tables := newTables(t)
	b := newBalance(tables, eastNode, nil, clustermesh.NewRefusals())
	loser := shop("west", 2, "100.64.64.9", func(s *lb.Service) { s.Name.Name = "other" })
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"), loser)
	txn := tables.DB.WriteTxn(tables.Frontends, tables.Routes, tables.Targets)
	defer txn.Abort()
	for range 1000 {
		for _, name := range []lb.Name{loser.Name, {Namespace: "default", Name: "shop"}} {
			if err := b.service(txn, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(b.refused[loser.Name]); n != 1 {
		t.Errorf("one refusal is remembered %d times", n)
	}
}

// eastNode is the node that has eastConfig.
var eastNode = identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11")}

// derived returns when balance has done what follows from the tables.
func derived(t *testing.T, b *balance) {
	t.Helper()
	done := make(chan struct{})
	b.After(t.Context(), func() { close(done) })
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("nothing was derived within %s", patience)
	}
}

// TestWhoGetsConnections: ready backends, then those that terminate on living nodes, then those of dead nodes.
func TestWhoGetsConnections(t *testing.T) {
	tables := newTables(t)
	b, _ := startBalance(t, tables, nil)
	at := func(ip, node string, terminating bool) lb.Backend {
		backend := backend("east", 1, ip)
		backend.Node, backend.Terminating = node, terminating
		return backend
	}
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.ExternalLocal = true }))
	put(t, tables, tables.Backends, at("10.1.1.1", "node1", false), at("10.1.2.2", "node2", false), at("10.1.3.3", "", false))
	for _, step := range []struct {
		what   string
		change func()
		want   string // the active targets: of all backends, and of the node's own
	}{
		{"all are ready", func() {}, "10.1.1.1 10.1.2.2 10.1.3.3, 10.1.1.1"},
		{"one terminates", func() { put(t, tables, tables.Backends, at("10.1.1.1", "node1", true)) }, "10.1.2.2 10.1.3.3, 10.1.1.1"},
		{"its node dies", func() { put(t, tables, tables.Liveness, dead("east", "node1", true)) }, "10.1.2.2 10.1.3.3, "},
		{"its node is back", func() { put(t, tables, tables.Liveness, dead("east", "node1", false)) }, "10.1.2.2 10.1.3.3, 10.1.1.1"},
		{"the next one terminates", func() { put(t, tables, tables.Backends, at("10.1.3.3", "", true)) }, "10.1.2.2, 10.1.1.1"},
		{"the last one's node dies", func() { put(t, tables, tables.Liveness, dead("east", "node2", true)) }, "10.1.1.1 10.1.3.3, 10.1.1.1"},
		{"one comes on a living node", func() { put(t, tables, tables.Backends, at("10.1.1.4", "node1", false)) }, "10.1.1.4, 10.1.1.4"},
		{"and terminates", func() { put(t, tables, tables.Backends, at("10.1.1.4", "node1", true)) }, "10.1.1.1 10.1.1.4 10.1.3.3, 10.1.1.1 10.1.1.4"},
		{"and is gone", func() { remove(t, tables, tables.Backends, clustermesh.BackendKey(at("10.1.1.4", "", false))) }, "10.1.1.1 10.1.3.3, 10.1.1.1"},
		{"the dead node is back", func() { put(t, tables, tables.Liveness, dead("east", "node2", false)) }, "10.1.2.2, 10.1.1.1"},
		{"its backend is gone", func() { remove(t, tables, tables.Backends, clustermesh.BackendKey(at("10.1.2.2", "", false))) }, "10.1.1.1 10.1.3.3, 10.1.1.1"},
		{"all nodes are dead", func() { put(t, tables, tables.Liveness, dead("east", "node1", true), dead("east", "", true)) }, ", "},
	} {
		step.change()
		derived(t, b)
		var all, own []string
		for _, row := range tables.TargetsOf(tables.DB.ReadTxn(), lb.Name{Namespace: "default", Name: "shop"}) {
			switch x := row.Object; {
			case x.Quarantined:
			case x.Port.NodeLocal:
				own = append(own, x.Address.String())
			default:
				all = append(all, x.Address.String())
			}
		}
		slices.Sort(all)
		slices.Sort(own)
		if got := strings.Join(all, " ") + ", " + strings.Join(own, " "); got != step.want {
			t.Errorf("%s: active are %s, want %s", step.what, got, step.want)
		}
	}
}

// TestStandingsFollowAnyHistory compares who gets connections, after random changes of backends, nodes and peers, with the rule as it is written down.
func TestStandingsFollowAnyHistory(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	tables := newTables(t)
	b, _ := startBalance(t, tables, nil)
	clusters, nodes := []string{"east", "west"}, []string{"node1", "node2", ""}
	down := map[identity.NodeName]bool{}
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.InternalLocal = true }), shop("west", 2, "100.64.128.9"))
	put(t, tables, tables.Nodes, identity.Node{Cluster: "west", ClusterID: 2, Name: "node1"}, identity.Node{Cluster: "west", ClusterID: 2, Name: "node2"})
	joining := false
	for step := range 2000 {
		id := 1 + random.IntN(2)
		cluster, node := clusters[id-1], nodes[random.IntN(3)]
		x := backend(cluster, uint8(id), netip.AddrFrom4([4]byte{10, byte(id), 1, byte(random.IntN(4))}).String())
		switch what := random.IntN(12); {
		case what < 5:
			x.Node, x.Terminating = node, random.IntN(2) == 0
			put(t, tables, tables.Backends, x)
		case what < 8:
			remove(t, tables, tables.Backends, clustermesh.BackendKey(x))
		case what < 10 && node != "":
			name := identity.NodeName{Cluster: cluster, Node: node}
			down[name] = !down[name]
			put(t, tables, tables.Liveness, dead(cluster, node, down[name]))
		case what == 10:
			joining = !joining
			put(t, tables, tables.Peers, clustermesh.Peer{Name: "west", ID: 2, Joining: joining})
		default: // All of the service is looked at again.
			global := random.IntN(3) > 0
			put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.InternalLocal, s.Global, s.Shared = random.IntN(2) == 0, global, global }))
		}
		if random.IntN(3) > 0 {
			continue // Several changes at once.
		}
		derived(t, b)
		txn := tables.DB.ReadTxn()
		isDown := func(x lb.Target) bool {
			return down[identity.NodeName{Cluster: x.Cluster, Node: x.Node}] || joining && x.Cluster == "west"
		}
		ready := map[lb.PortKey]bool{}
		for row := range tables.Targets.All(txn) {
			x := row.Object
			ready[x.Port] = ready[x.Port] || !x.Terminating && !isDown(x)
		}
		for row := range tables.Targets.All(txn) {
			x := row.Object
			if want := isDown(x) || x.Terminating && ready[x.Port]; x.Quarantined != want {
				t.Fatalf("step %d: %+v, want quarantined: %v", step, x, want)
			}
		}
	}
	for row := range tables.Services.All(tables.DB.ReadTxn()) {
		remove(t, tables, tables.Services, tables.Services.Key(row.Object))
	}
	derived(t, b)
	if len(b.standings) != 0 {
		t.Errorf("%d ports without targets are remembered", len(b.standings))
	}
}

// TestATerminatingBackendChangesItsOwnTargetAlone, whatever the size of its service.
func TestATerminatingBackendChangesItsOwnTargetAlone(t *testing.T) {
	tables := newTables(t)
	b, _ := startBalance(t, tables, nil)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"))
	var all []lb.Backend
	for i := range 1000 {
		all = append(all, backend("east", 1, netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}).String()))
	}
	put(t, tables, tables.Backends, all...)
	derived(t, b)
	before := tables.Targets.Revision(tables.DB.ReadTxn())
	all[7].Terminating = true
	put(t, tables, tables.Backends, all[7])
	derived(t, b)
	changed := 0
	for _, revision := range tables.Targets.All(tables.DB.ReadTxn()) {
		if revision > before {
			changed++
		}
	}
	if changed != 1 {
		t.Errorf("%d targets were written, want 1", changed)
	}
}

func TestProblemsOfAServiceAreShown(t *testing.T) {
	tables := newTables(t)
	b, refusals := startBalance(t, tables, nil)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) {
		s.SessionAffinity, s.Annotations = 60, map[string]string{lb.AnnotationL7: "enabled"}
	}))
	derived(t, b)
	if list := refusals.List(); len(list) != 1 || !strings.Contains(list[0].Key, "session affinity of service default/shop") || !strings.Contains(list[0].Reason, lb.AnnotationL7Hash) {
		t.Errorf("refusals are %+v", list)
	}
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.SessionAffinity = 60 }))
	derived(t, b)
	if list := refusals.List(); len(list) != 0 {
		t.Errorf("refusals are %+v", list)
	}
}

// TestNodePortsAreThisNodes: they are answered at its address, and the table has a row for clients on the node and one for those outside.
func TestNodePortsAreThisNodes(t *testing.T) {
	tables := newTables(t)
	b, _ := startBalance(t, tables, nil)
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9", func(s *lb.Service) { s.Ports[0].NodePort = 30080 }))
	derived(t, b)
	want := "100.64.64.9:80/TCP 172.29.1.11:30080/TCP 172.29.1.11:30080/TCP/outside"
	if got := keys(tables.DB.ReadTxn(), tables.Frontends); got != want {
		t.Errorf("frontends are %s, want %s", got, want)
	}
}
