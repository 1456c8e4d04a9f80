package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/clustermesh/peering"
	"causeway/datapath"
	"causeway/identity"
	"causeway/k8s"
	"causeway/lb"
)

// staleHeartbeat is the age of a heartbeat at which what comes through a connected channel is called stale.
const staleHeartbeat = 20 * time.Second

// stuckPending is how long a row may wait for its target before something must be wrong with it.
const stuckPending = 20 * time.Second

// view is what the local API shows: the tables, the channels, and the kernel read back.
type view struct {
	cfg      Config
	started  time.Time
	tables   *clustermesh.Tables
	refusals *clustermesh.Refusals
	channels *channels
	datapath *datapath.Datapath
	device   string
	mtu      int
	life     *life
	peers    *peerView
	enc      *encryption
	l7       *l7View
	// kubernetes is nil where services are declared by the local API.
	kubernetes *k8s.Source
	// more are sources of problems that no row shows.
	more []func() []string
}

func (v *view) read() statedb.ReadTxn { return v.tables.DB.ReadTxn() }

func (v *view) status() (api.Status, []<-chan struct{}, error) {
	txn := v.read()
	s := api.Status{
		Problems: []string{}, Version: Version,
		Cluster: v.cfg.Cluster.Name, ClusterID: v.cfg.Cluster.ID, Node: v.cfg.Node.Name,
		Address: v.cfg.Node.Address.String(), PodCIDR: listed(v.cfg.Node.PodCIDRs), Started: v.started,
		Datapath: api.Datapath{Attach: v.datapath.Attach(), Device: v.device, PodMTU: v.mtu},
		Gossip:   v.overview(),
		Tables:   map[string]api.Table{},
	}
	s.Kubernetes = kubernetesStatus(v.kubernetes)
	drops, err := v.datapath.Drops()
	if err != nil {
		s.Problems = append(s.Problems, "drop counters cannot be read: "+err.Error())
	}
	for _, d := range drops {
		if d.Reason != datapath.DropIPv6LinkLocal { // every kernel's small talk when a link comes up
			s.Datapath.Drops += d.Packets
		}
	}
	for _, c := range v.channels.all() {
		state, problems := c.state(v.refusals, v.started)
		s.Stores = append(s.Stores, state)
		if c.local {
			s.Problems = append(s.Problems, problems...)
		}
	}
	s.Peers = v.peers.all()
	for _, p := range s.Peers {
		if p.State == string(peering.Left) {
			continue // shown, and nothing that is wanted is missing: it is for people to take note of, by disconnecting it too
		}
		for _, why := range p.Why {
			s.Problems = append(s.Problems, fmt.Sprintf("peer %s is %s: %s", p.Name, p.State, why))
		}
	}
	s.Problems = append(s.Problems, v.count(txn, s.Tables)...)
	encryption := v.enc.state(txn)
	s.Encryption = api.EncryptionSummary{Mode: encryption.Mode, Nodes: map[identity.TunnelMode]int{}, Rotating: encryption.Rotation != nil}
	for _, d := range encryption.Devices {
		s.Encryption.Kind = d.Kind
	}
	for _, n := range encryption.Nodes {
		s.Encryption.Nodes[n.Mode]++
	}
	s.Problems = append(s.Problems, encryption.Problems...)
	var l7Problems []string
	s.L7, l7Problems = v.l7.summary()
	s.Problems = append(s.Problems, l7Problems...)
	for _, more := range v.more {
		s.Problems = append(s.Problems, more()...)
	}
	s.Problems = append(s.Problems, failOpen(txn, v.tables)...)
	s.Problems = append(s.Problems, oneFamily(txn, v.tables, v.cfg.Cluster.Name)...)
	entries := 0
	for _, r := range v.refusals.List() {
		s.Refusals = append(s.Refusals, api.Refusal{Cluster: r.Cluster, Key: r.Key, Reason: r.Reason, Count: r.Count, Last: r.Last})
		if r.Key != refusedApply { // which changed nothing: nothing is wrong with the mesh
			entries++
		}
	}
	if entries > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d entries are refused, see refusals", entries))
	}
	s.OK = len(s.Problems) == 0
	return s, nil, nil
}

// state says how a channel is, and in sentences what is wrong with it.
func (c *channel) state(refusals *clustermesh.Refusals, started time.Time) (api.Store, []string) {
	store, follower := c.store.Status(), c.follower.State()
	s := api.Store{
		Cluster: c.cluster, ClusterID: c.id, Local: c.local, Endpoints: store.Endpoints, Connected: store.Connected,
		Synced: follower.Synced && follower.Info != nil, LastContact: store.LastContact, LastError: store.LastError, Revision: store.Revision,
		Reconnects: store.Reconnects, Entries: follower.Accepted, Refused: refusals.Total(c.cluster), HeartbeatAge: -1,
	}
	if !follower.Heartbeat.IsZero() {
		s.HeartbeatAge = time.Since(follower.Heartbeat).Milliseconds()
	}
	var problems []string
	switch {
	case !store.Connected:
		problems = append(problems, fmt.Sprintf("store of cluster %s: %s; what was known of it stays in force", c.cluster, cmp.Or(store.LastError, "not reached yet")))
	case follower.Lost:
		problems = append(problems, fmt.Sprintf("store of cluster %s was emptied: %d entries are held from memory until their owners publish again", c.cluster, follower.Held))
	case !s.Synced:
		problems = append(problems, fmt.Sprintf("store of cluster %s: connected, but not read in full yet", c.cluster))
	case s.HeartbeatAge > staleHeartbeat.Milliseconds():
		problems = append(problems, fmt.Sprintf("store of cluster %s: connected, but the last heartbeat came %s ago; it may not be taking writes",
			c.cluster, time.Since(follower.Heartbeat).Round(time.Second)))
	case s.HeartbeatAge < 0 && time.Since(started) > staleHeartbeat:
		problems = append(problems, fmt.Sprintf("store of cluster %s: connected, but no heartbeat ever came; it may not be taking writes", c.cluster))
	}
	if follower.Held > 0 && !follower.Lost {
		problems = append(problems, fmt.Sprintf("store of cluster %s has lost %d entries that nobody withdrew, and that are held from memory: those of nodes come again with their agents, services have to be applied again",
			c.cluster, follower.Held))
	}
	return s, problems
}

// count counts the tables' rows, and says which have not got where they should.
func (v *view) count(txn statedb.ReadTxn, into map[string]api.Table) []string {
	t := v.tables
	var problems []string
	problems = append(problems, countRows(txn, t.Nodes, into, false)...)
	problems = append(problems, countRows(txn, t.Tunnels, into, true)...)
	problems = append(problems, countRows(txn, t.Identities, into, false)...)
	problems = append(problems, countRows(txn, t.Addresses, into, true)...)
	problems = append(problems, countRows(txn, t.Endpoints, into, true)...)
	problems = append(problems, countRows(txn, t.Services, into, false)...)
	problems = append(problems, countRows(txn, t.Backends, into, false)...)
	problems = append(problems, countRows(txn, t.Frontends, into, true)...)
	problems = append(problems, countRows(txn, t.Targets, into, true)...)
	problems = append(problems, countRows(txn, t.Routes, into, false)...)
	problems = append(problems, countRows(txn, t.Liveness, into, false)...)
	problems = append(problems, countRows(txn, t.Reaches, into, false)...)
	problems = append(problems, countRows(txn, t.Peers, into, false)...)
	problems = append(problems, countRows(txn, t.Publications, into, true)...)
	return problems
}

// countRows counts one table; only one with a target has rows that can be pending or fail.
func countRows[T any](txn statedb.ReadTxn, table clustermesh.Table[T], into map[string]api.Table, target bool) []string {
	var count api.Table
	var first, stuck string
	for row := range table.All(txn) {
		count.Rows++
		switch {
		case !target:
		case row.Status.Kind == clustermesh.Pending:
			count.Pending++
			if time.Since(row.Status.At) > stuckPending {
				stuck = cmp.Or(stuck, table.Key(row.Object))
			}
		case row.Status.Kind == clustermesh.Failed:
			count.Errors++
			first = cmp.Or(first, table.Key(row.Object)+": "+row.Status.Error)
		}
	}
	into[table.Name()] = count
	var problems []string
	if stuck != "" {
		problems = append(problems, fmt.Sprintf("%d of %d %s wait to be put into force, %s for longer than %s", count.Pending, count.Rows, table.Name(), stuck, stuckPending))
	}
	if count.Errors == 0 {
		return problems
	}
	return append(problems, fmt.Sprintf("%d of %d %s are not in force, first %s", count.Errors, count.Rows, table.Name(), first))
}

// failOpen says of which services all backends would be quarantined, so that none is.
func failOpen(txn statedb.ReadTxn, tables *clustermesh.Tables) (problems []string) {
	all, out := map[lb.PortKey]int{}, map[lb.PortKey]int{}
	for row := range tables.Targets.All(txn) {
		all[row.Object.Port]++
		if row.Object.Quarantined {
			out[row.Object.Port]++
		}
	}
	for port, n := range out {
		if n == all[port] {
			problems = append(problems, fmt.Sprintf("service %s: all of its %d backends are on nodes that do not answer or are drained, so none is taken out of service", port, n))
		}
	}
	slices.Sort(problems)
	return problems
}

// oneFamily says which addresses of the cluster's own services have no backend of their family, while there are some of the other: who
// connects to them is refused, though the service is well to see. Other clusters' addresses are their own nodes' to complain of.
func oneFamily(txn statedb.ReadTxn, tables *clustermesh.Tables, cluster string) (problems []string) {
	backends := map[lb.PortKey]int{}
	for row := range tables.Targets.All(txn) {
		backends[row.Object.Port]++
	}
	for row := range tables.Frontends.All(txn) {
		f, other := row.Object, row.Object.Target
		if other.Family = lb.IPv4; f.Target.Family == lb.IPv4 {
			other.Family = lb.IPv6
		}
		if f.Cluster == cluster && !f.Outside && backends[f.Target] == 0 && backends[other] > 0 {
			problems = append(problems, fmt.Sprintf("service %s: connections to %s are refused, since none of its %d backends has an %s address",
				f.Target.Service, f.FrontendKey, backends[other], f.Target.Family))
		}
	}
	slices.Sort(problems)
	return problems
}

func rowStatus(s clustermesh.Status) api.RowStatus {
	return api.RowStatus{Kind: string(s.Kind), Error: s.Error, At: s.At}
}

// collect turns a table's rows into what the API shows of them.
func collect[T, A any](table clustermesh.Table[T], txn statedb.ReadTxn, show func(*clustermesh.Row[T]) A) ([]A, []<-chan struct{}, error) {
	rows, changed := table.AllWatch(txn)
	out := []A{}
	for row := range rows {
		out = append(out, show(row))
	}
	return out, []<-chan struct{}{changed}, nil
}

func (v *view) nodes() ([]api.Node, []<-chan struct{}, error) {
	txn := v.read()
	return collect(v.tables.Nodes, txn, func(r *clustermesh.Row[identity.Node]) api.Node {
		n := api.Node{Node: r.Object, Status: rowStatus(r.Status)}
		if t, _, ok := v.tables.Tunnels.Get(txn, v.tables.Tunnels.ByKey(r.Object.NodeName().String())); ok {
			n.Status = rowStatus(t.Status)
		}
		return n
	})
}

func (v *view) endpoints() ([]api.Endpoint, []<-chan struct{}, error) {
	return collect(v.tables.Endpoints, v.read(), func(r *clustermesh.Row[identity.Endpoint]) api.Endpoint {
		return api.Endpoint{Endpoint: r.Object, Status: rowStatus(r.Status)}
	})
}

func (v *view) identities() ([]api.Identity, []<-chan struct{}, error) {
	return collect(v.tables.Identities, v.read(), func(r *clustermesh.Row[identity.Identity]) api.Identity {
		return api.Identity{Identity: r.Object}
	})
}

func (v *view) addresses() ([]api.Address, []<-chan struct{}, error) {
	return collect(v.tables.Addresses, v.read(), func(r *clustermesh.Row[identity.Address]) api.Address {
		return api.Address{Address: r.Object, Status: rowStatus(r.Status)}
	})
}

func (v *view) services() ([]api.Service, []<-chan struct{}, error) {
	txn := v.read()
	declared, c1 := v.tables.Services.AllWatch(txn)
	frontends, c2 := v.tables.Frontends.AllWatch(txn)
	targets, c3 := v.tables.Targets.AllWatch(txn)
	routes, c4 := v.tables.Routes.AllWatch(txn)
	byName := map[lb.Name]*api.Service{}
	at := func(name lb.Name) *api.Service {
		if byName[name] == nil {
			byName[name] = &api.Service{Name: name, Declared: []lb.Service{}, Frontends: []api.Frontend{}, Backends: []api.Backend{}}
		}
		return byName[name]
	}
	for row := range declared {
		s := at(row.Object.Name)
		s.Declared = append(s.Declared, row.Object)
	}
	for row := range frontends {
		s := at(row.Object.Target.Service)
		s.Frontends = append(s.Frontends, api.Frontend{Frontend: row.Object, Status: rowStatus(row.Status)})
	}
	for row := range targets {
		s := at(row.Object.Port.Service)
		s.Backends = append(s.Backends, api.Backend{Target: row.Object, Status: rowStatus(row.Status)})
	}
	for row := range routes {
		s := at(row.Object.Port.Service)
		s.Routes = append(s.Routes, row.Object)
	}
	out := make([]api.Service, 0, len(byName))
	for _, s := range byName {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b api.Service) int { return cmp.Compare(a.Name.String(), b.Name.String()) })
	return out, []<-chan struct{}{c1, c2, c3, c4}, nil
}

// listed lists addresses or prefixes for people.
func listed[T fmt.Stringer](list []T) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = v.String()
	}
	return strings.Join(texts, ", ")
}
