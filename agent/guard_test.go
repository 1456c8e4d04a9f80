package agent

import (
	"net/netip"
	"strings"
	"testing"

	"causeway/clustermesh"
	"causeway/identity"
)

// eastConfig is a node's in east.
var eastConfig = Config{
	Cluster: ClusterConfig{Name: "east", ID: 1},
	KVStore: KVStoreConfig{Endpoints: []string{"https://172.29.1.2:2379"}},
}

// eastStore is what the node knows of stores: its own.
func eastStore(ip netip.Addr) (string, bool) {
	return "east", ip == netip.MustParseAddr("172.29.1.2")
}

func TestWhatAServicesAddressMayBe(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, identity.Node{Cluster: "west", ClusterID: 2, Name: "node1", Address: netip.MustParseAddr("172.29.2.11")})
	info := func(name string, id identity.ClusterID, pods, services string) identity.ClusterInfo {
		return identity.ClusterInfo{Name: name, ID: id, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(pods)}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix(services)}}
	}
	claims := clustermesh.NewClaims(info("east", 1, "10.1.0.0/16", "100.64.64.0/18"))
	for _, peer := range []identity.ClusterInfo{info("west", 2, "10.2.0.0/16", "100.64.128.0/18"), info("north", 3, "10.3.0.0/16", "198.51.100.0/24")} {
		if err := claims.Claim(peer); err != nil {
			t.Fatal(err)
		}
	}
	guard := newGuard(eastConfig, tables, claims, eastStore)
	for _, test := range []struct{ cluster, ip, want string }{
		{"east", "100.64.64.9", ""},
		{"east", "8.8.8.8", ""},
		{"east", "10.2.1.5", "pod range 10.2.0.0/16 of cluster west"},
		{"east", "172.29.1.2", "cluster east's store"},
		{"west", "100.64.128.9", ""},
		{"west", "10.96.0.50", ""},
		{"west", "10.1.1.5", "pod range 10.1.0.0/16 of cluster east"},
		{"west", "172.29.2.11", "node west/node1"},
		{"west", "172.29.1.2", "cluster east's store"},
		{"west", "100.64.64.9", "range 100.64.64.0/18 of cluster east"},
		{"west", "198.51.100.7", "range 198.51.100.0/24 of cluster north"},
		{"west", "8.8.8.8", "public address"},
		{"north", "198.51.100.7", ""},
	} {
		got := guard(test.cluster, netip.MustParseAddr(test.ip))
		if (test.want == "") != (got == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s at %s: %q, want %q", test.cluster, test.ip, got, test.want)
		}
	}
}
