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
	put(t, tables, tables.Nodes, identity.Node{Cluster: "west", ClusterID: 2, Name: "node2", Address: netip.MustParseAddr("2001:db8:2::12")})
	ranges := func(list string) (prefixes []netip.Prefix) {
		for _, p := range strings.Fields(list) {
			prefixes = append(prefixes, netip.MustParsePrefix(p))
		}
		return prefixes
	}
	info := func(name string, id identity.ClusterID, pods, services string) identity.ClusterInfo {
		return identity.ClusterInfo{Name: name, ID: id, PodCIDRs: ranges(pods), ServiceCIDRs: ranges(services)}
	}
	claims := clustermesh.NewClaims(info("east", 1, "10.1.0.0/16 fd00:10:1::/48", "100.64.64.0/18 fd00:1::/112"))
	for _, peer := range []identity.ClusterInfo{
		info("west", 2, "10.2.0.0/16 fd00:10:2::/48", "100.64.128.0/18 fd00:2::/112"), info("north", 3, "10.3.0.0/16", "198.51.100.0/24 2001:db8:3::/112"),
	} {
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
		{"east", "fd00:1::9", ""},
		{"east", "2001:4860::8888", ""},
		{"east", "fd00:10:2::5", "pod range fd00:10:2::/48 of cluster west"},
		{"west", "fd00:2::9", ""},
		{"west", "fd77::50", ""},
		{"west", "fd00:1::9", "range fd00:1::/112 of cluster east"},
		{"west", "2001:db8:2::12", "node west/node2"},
		{"west", "2001:db8:3::7", "range 2001:db8:3::/112 of cluster north"},
		{"west", "2001:4860::8888", "public address"},
		{"north", "2001:db8:3::7", ""},
	} {
		got := guard(test.cluster, netip.MustParseAddr(test.ip))
		if (test.want == "") != (got == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s at %s: %q, want %q", test.cluster, test.ip, got, test.want)
		}
	}
}
