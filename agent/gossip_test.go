package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/lb"
)

func at(b lb.Backend, node string) lb.Backend {
	b.Node = node
	return b
}

func dead(cluster, node string, quarantined bool) identity.Liveness {
	return identity.Liveness{Cluster: cluster, Node: node, State: identity.NodeDead, Quarantined: quarantined}
}

// TestQuarantineFollowsLiveness: what is on a node that is out of service is marked, also what comes later, and nothing
// else changes.
func TestQuarantineFollowsLiveness(t *testing.T) {
	tables := newTables(t)
	startBalance(t, tables, nil)
	quarantined := func(want string) {
		t.Helper()
		until(t, tables, tables.Targets, "quarantined are "+want, func(txn statedb.ReadTxn) bool {
			var got []string
			for row := range tables.Targets.All(txn) {
				if row.Object.Quarantined {
					got = append(got, row.Object.Address.String())
				}
			}
			return strings.Join(got, " ") == want
		})
	}
	put(t, tables, tables.Services, shop("east", 1, "100.64.64.9"), shop("west", 2, "100.64.128.9"))
	put(t, tables, tables.Backends, at(backend("east", 1, "10.1.1.2"), "node1"), at(backend("west", 2, "10.2.1.2"), "node1"), at(backend("west", 2, "10.2.2.2"), "node2"))
	until(t, tables, tables.Targets, "three targets", func(txn statedb.ReadTxn) bool { return tables.Targets.NumObjects(txn) == 3 })
	put(t, tables, tables.Liveness, dead("west", "node1", true))
	quarantined("10.2.1.2")
	put(t, tables, tables.Backends, at(backend("west", 2, "10.2.1.3"), "node1"))
	quarantined("10.2.1.2 10.2.1.3")
	if problems := failOpen(tables.DB.ReadTxn(), tables); len(problems) != 0 {
		t.Errorf("some are in service, and status says %q", problems)
	}
	put(t, tables, tables.Liveness, dead("west", "node2", true), dead("east", "node1", true))
	quarantined("10.1.1.2 10.2.1.2 10.2.1.3 10.2.2.2")
	if problems := failOpen(tables.DB.ReadTxn(), tables); len(problems) != 1 || !strings.Contains(problems[0], "all of its 4 backends") {
		t.Errorf("all are out of service, and status says %q", problems)
	}
	put(t, tables, tables.Liveness, dead("west", "node1", false))
	quarantined("10.1.1.2 10.2.2.2")
	remove(t, tables, tables.Liveness, "east/node1")
	quarantined("10.2.2.2")
}

// TestSigningKeyIsKept: the node signs with the same key after a restart, and keeps it to itself.
func TestSigningKeyIsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state", "key")
	first, err := loadSigningKey(file)
	if err != nil {
		t.Fatal(err)
	}
	again, err := loadSigningKey(file)
	if err != nil || !again.Equal(first) {
		t.Errorf("another key after a restart: %v", err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(file, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadSigningKey(file); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged key: %v", err)
	}
}

// TestOnlyEntriesOfNodesTravelByGossip: what the cluster owns has no node that could sign it.
func TestOnlyEntriesOfNodesTravelByGossip(t *testing.T) {
	pod := identity.Address{Cluster: "east", Identity: identity.Compose(1, 300), Node: "node1", Prefix: testAddress("10.1.1.2/32", 1).Prefix, Version: identity.Version{Incarnation: 7, Sequence: 3}}
	for key, value := range map[string][]byte{
		identity.AddressKey("east", pod.Prefix.Addr()): identity.EncodeAddress(pod),
		identity.NodeKey("east", "node1"):              []byte(`{"incarnation":7}`),
		identity.ClusterKey:                            []byte(`{}`),
		identity.SyncedKey("east", "node1"):            []byte(`{}`),
	} {
		e, ok := entryOf(clustermesh.Publication{Key: key, Value: string(value)})
		if want := strings.Contains(key, "/addresses/"); ok != want || ok && (e.Incarnation != 7 || e.Sequence != 3 || e.Key != "addresses/east/10.1.1.2") {
			t.Errorf("%s: told %v, %+v", key, ok, e)
		}
	}
}
