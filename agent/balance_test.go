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

func TestRefusedFrontendsAreRememberedOnce(t *testing.T) {
	tables := newTables(t)
	b := newBalance(tables, "east", 1, nil, clustermesh.NewRefusals())
	loser := shop("west", 2, "100.64.64.9", func(s *lb.Service) { s.Name.Name = "other" })
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"), loser)
	txn := tables.DB.WriteTxn(tables.Frontends, tables.Targets)
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
