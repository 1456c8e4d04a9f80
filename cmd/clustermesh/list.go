package main

import (
	"fmt"
	"strings"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newNodeCommand(e *env) *cobra.Command {
	return family("node", "The nodes of all clusters", "  clustermesh node list", query[[]api.Node]{
		use:     "list",
		short:   "List the nodes that this node knows, of all clusters",
		example: "  clustermesh node list --node east/node1\n  clustermesh node list --watch",
		get:     (*api.Client).Nodes,
		watch:   (*api.Client).WatchNodes,
		print: func(p *printer, nodes []api.Node) {
			t := newTable("NODE", "ADDRESS", "PODS", "HERE", "STATUS")
			for _, n := range nodes {
				t.add(n.Cluster+"/"+n.Name, n.Address, listed(n.PodCIDRs), yes(n.Local), rowStatus(n.Status))
			}
			p.table(t)
		},
	}.command(e))
}

func newEndpointCommand(e *env) *cobra.Command {
	return family("endpoint", "The pods of a node", "  clustermesh endpoint list", query[[]api.Endpoint]{
		use:     "list",
		short:   "List the pods of this node",
		example: "  clustermesh endpoint list --node east/node1\n  clustermesh endpoint list -o yaml",
		get:     (*api.Client).Endpoints,
		watch:   (*api.Client).WatchEndpoints,
		print: func(p *printer, endpoints []api.Endpoint) {
			t := newTable("ENDPOINT", "ADDRESS", "IDENTITY", "LABELS", "LINK", "STATE", "STATUS")
			for _, ep := range endpoints {
				t.add(ep.ID(), listed(ep.Addresses()), ep.Identity, ep.Labels, ep.HostLink, ep.State, rowStatus(ep.Status))
			}
			p.table(t)
		},
	}.command(e))
}

func newIdentityCommand(e *env) *cobra.Command {
	return family("identity", "The identities of all clusters", "  clustermesh identity list", query[[]api.Identity]{
		use:     "list",
		short:   "List the identities of all clusters: which labels have which number",
		example: "  clustermesh identity list --node east/node1\n  clustermesh identity list -o json",
		get:     (*api.Client).Identities,
		watch:   (*api.Client).WatchIdentities,
		print: func(p *printer, identities []api.Identity) {
			t := newTable("IDENTITY", "CLUSTER", "LABELS")
			for _, id := range identities {
				t.add(id.Number, id.Cluster, id.Labels)
			}
			p.table(t)
		},
	}.command(e))
}

func newAddressCommand(e *env) *cobra.Command {
	return family("address", "Who is behind an address, and where", "  clustermesh address list", query[[]api.Address]{
		use:     "list",
		short:   "List the addresses of all clusters: whose they are and where packets for them go",
		example: "  clustermesh address list --node east/node1\n  clustermesh address list --watch",
		get:     (*api.Client).Addresses,
		watch:   (*api.Client).WatchAddresses,
		print: func(p *printer, addresses []api.Address) {
			t := newTable("PREFIX", "IDENTITY", "NODE", "NODE ADDRESS", "ENDPOINT", "STATUS")
			for _, a := range addresses {
				t.add(a.Prefix, a.Identity, a.Cluster+"/"+a.Node, a.NodeAddress, a.Endpoint, rowStatus(a.Status))
			}
			p.table(t)
		},
	}.command(e))
}

// listed shows addresses or prefixes, "10.1.1.0/24, fd00:10:0:1::/64".
func listed[T fmt.Stringer](list []T) string {
	parts := make([]string, len(list))
	for i, v := range list {
		parts[i] = v.String()
	}
	return strings.Join(parts, ", ")
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
