package agent

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/identity"
	"causeway/kvstore"
)

func TestStatusSaysWhenAStoreNeverHadAHeartbeat(t *testing.T) {
	store, tables := kvstore.NewMemory(), newTables(t)
	info := identity.ClusterInfo{Name: "west", ID: 2, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.128.0/18")}, Version: "1"}
	if err := store.Put(t.Context(), identity.ClusterKey, identity.EncodeCluster(info)); err != nil {
		t.Fatal(err)
	}
	refusals, synced := clustermesh.NewRefusals(), make(chan struct{})
	c := channel{cluster: "west", id: 2, store: store, follower: clustermesh.NewFollower(clustermesh.FollowerConfig{
		Cluster: "west", ID: 2, Self: identity.NodeName{Cluster: "east", Node: "node1"}, Store: store, Tables: tables, Refusals: refusals,
		Claims: clustermesh.NewClaims(identity.ClusterInfo{Name: "east", ID: 1}), Synced: func() { close(synced) }, Log: slog.New(slog.DiscardHandler),
	})}
	run(t, c.follower.Run)
	<-synced
	if _, problems := c.state(refusals, time.Now()); len(problems) != 0 {
		t.Errorf("an agent that has just started complains: %q", problems)
	}
	if _, problems := c.state(refusals, time.Now().Add(-time.Hour)); len(problems) != 1 || !strings.Contains(problems[0], "no heartbeat ever came") {
		t.Errorf("the problems are %q", problems)
	}
}

func TestStatusSaysWhatWaitsForLong(t *testing.T) {
	tables := newTables(t)
	row := clustermesh.NewRow(testAddress("10.1.1.2/32", 1))
	for _, test := range []struct {
		age  time.Duration
		want int
	}{{0, 0}, {time.Minute, 1}} {
		waits := *row
		waits.Status.At = time.Now().Add(-test.age)
		txn := tables.DB.WriteTxn(tables.Addresses)
		if _, _, err := tables.Addresses.Insert(txn, &waits); err != nil {
			t.Fatal(err)
		}
		txn.Commit()
		if problems := countRows(tables.DB.ReadTxn(), tables.Addresses, map[string]api.Table{}, true); len(problems) != test.want {
			t.Errorf("a row that waits for %s: problems %q, want %d", test.age, problems, test.want)
		}
	}
}
