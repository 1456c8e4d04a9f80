package agent

import (
	"net/netip"

	"github.com/cilium/statedb"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
	"causeway/lb"
)

// bpfLB shows the frontends as they stand in the kernel, with the names that the tables know.
func (v *view) bpfLB() ([]api.BPFFrontend, []<-chan struct{}, error) {
	entries, err := v.datapath.ListFrontends()
	if err != nil {
		return nil, nil, err
	}
	txn := v.read()
	clusters := v.clusterNames()
	out := make([]api.BPFFrontend, 0, len(entries))
	for _, e := range entries {
		f := api.BPFFrontend{
			Address: e.Address.String(), Port: e.Port, Protocol: string(e.Protocol), ServiceID: e.Service, Affinity: string(e.Affinity), Outside: e.Outside, L7: e.L7,
			SessionAffinity: e.SessionAffinity,
			Backends:        v.bpfBackends(txn, clusters, e.Backends), Quarantined: v.bpfBackends(txn, clusters, e.Quarantined), FailOpen: e.FailOpen,
		}
		row, _, known := v.tables.Frontends.Get(txn, v.tables.Frontends.ByKey(clustermesh.FrontendKey(lb.Frontend{FrontendKey: e.FrontendKey})))
		if known {
			f.Service = row.Object.Target.String()
		}
		out = append(out, f)
	}
	return out, nil, nil
}

// bpfBackends is never nil: the API has lists, not null.
func (v *view) bpfBackends(txn statedb.ReadTxn, clusters map[identity.ClusterID]string, entries []datapath.BackendEntry) []api.BPFBackend {
	out := make([]api.BPFBackend, 0, len(entries))
	for _, b := range entries {
		backend := api.BPFBackend{
			ID: b.ID, Slot: b.Slot, Group: "remote", Address: b.Address.Addr().String(), Port: b.Address.Port(), Cluster: clusters[b.Owner],
		}
		if b.Local {
			backend.Group = "local"
		}
		address := identity.Address{Cluster: backend.Cluster, Prefix: host(b.Address.Addr())}
		if row, _, ok := v.tables.Addresses.Get(txn, v.tables.Addresses.ByKey(v.tables.Addresses.Key(address))); ok {
			backend.Node, backend.Endpoint = row.Object.Node, row.Object.Endpoint
		}
		out = append(out, backend)
	}
	return out
}

// bpfAddresses shows the address entries as they stand in the kernel.
func (v *view) bpfAddresses() ([]api.BPFAddress, []<-chan struct{}, error) {
	entries, err := v.datapath.ListAddresses()
	if err != nil {
		return nil, nil, err
	}
	txn := v.read()
	clusters := v.clusterNames()
	out := make([]api.BPFAddress, 0, len(entries))
	for _, e := range entries {
		a := api.BPFAddress{Prefix: e.Prefix.String(), Identity: e.Identity, Cluster: clusters[e.Owner], Blackhole: e.Blackhole}
		if e.Tunnel.IsValid() {
			a.Tunnel = e.Tunnel.String()
		}
		row := identity.Address{Cluster: a.Cluster, Prefix: e.Prefix}
		if row, _, ok := v.tables.Addresses.Get(txn, v.tables.Addresses.ByKey(v.tables.Addresses.Key(row))); ok && !e.Blackhole {
			a.Node, a.Endpoint = row.Object.Node, row.Object.Endpoint
		}
		id := identity.Identity{Number: e.Identity}
		if row, _, ok := v.tables.Identities.Get(txn, v.tables.Identities.ByKey(v.tables.Identities.Key(id))); ok {
			a.Labels = row.Object.Labels.String()
		} else if e.Identity.Reserved() && !e.Blackhole {
			a.Labels = "reserved:" + e.Identity.String()
		}
		out = append(out, a)
	}
	return out, nil, nil
}

// bpfDrops shows the drop counters that have counted.
func (v *view) bpfDrops() ([]api.BPFDrop, []<-chan struct{}, error) {
	drops, err := v.datapath.Drops()
	out := make([]api.BPFDrop, 0, len(drops))
	for _, d := range drops {
		out = append(out, api.BPFDrop{Reason: d.Reason, Direction: d.Direction, Packets: d.Packets, Bytes: d.Bytes})
	}
	return out, nil, err
}

func (v *view) clusterNames() map[identity.ClusterID]string {
	names := map[identity.ClusterID]string{}
	for _, c := range v.channels.all() {
		names[c.id] = c.cluster
	}
	return names
}

func host(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }
