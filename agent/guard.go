package agent

import (
	"fmt"
	"net/netip"

	"causeway/clustermesh"
	"causeway/lb"
)

// sharedRange is IPv4's other private range, of RFC 6598.
var sharedRange = netip.MustParsePrefix("100.64.0.0/10")

// newGuard returns what no service's address may be: a pod's, a node's, a store's. What a peer's may be besides is
// limited: its own service range, or a private address in nobody's range. So a peer can draw neither another cluster's
// services to itself, nor the world's.
func newGuard(cfg Config, tables *clustermesh.Tables, claims *clustermesh.Claims, storeAt func(netip.Addr) (cluster string, ok bool)) lb.Guard {
	return func(cluster string, ip netip.Addr) string {
		if owner, prefix, ok := claims.PodRange(ip); ok {
			return fmt.Sprintf("it lies in the pod range %s of cluster %s", prefix, owner)
		}
		if node, ok := tables.NodeAt(tables.DB.ReadTxn(), ip); ok {
			return "it is the address of node " + node.String()
		}
		if owner, ok := storeAt(ip); ok {
			return "it is the address of cluster " + owner + "'s store"
		}
		if cluster == cfg.Cluster.Name {
			return "" // whoever may declare services here may choose
		}
		if other, prefix, ok := claims.Foreign(cluster, ip); ok {
			return fmt.Sprintf("it lies in the range %s of cluster %s", prefix, other)
		}
		if !claims.Own(cluster, ip) && !ip.IsPrivate() && !sharedRange.Contains(ip) {
			return fmt.Sprintf("it is a public address outside of cluster %s's service range", cluster)
		}
		return ""
	}
}
