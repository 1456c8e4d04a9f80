package agent

import (
	"net/netip"
	"strings"
	"testing"

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
	b := newBalance(tables, "east", 1, nil, clustermesh.NewRefusals())
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
