// Package clustermesh is the mesh: it follows the stores of this cluster and of
// its peers into tables, refusing what a channel may not speak for, and publishes
// what this node owns.
//
// Sources write tables, reconcilers read them: this package holds the sources
// that listen to stores (follower.go, accept.go) and the one target that writes
// to a store (publisher.go). It never touches the kernel.
package clustermesh

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"
	"time"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"causeway/identity"
	"causeway/lb"
)

// Row of a table: what a source wrote, and how far it has got. Rows are immutable.
type Row[T any] struct {
	Object T      `json:"object"`
	Status Status `json:"status"`
}

// StatusKind says how far a row has got.
type StatusKind string

// A source writes pending, the table's reconciler answers done or error.
const (
	Pending StatusKind = "pending"
	Done    StatusKind = "done"
	Failed  StatusKind = "error"
)

// Status of a row toward its target.
type Status struct {
	Kind  StatusKind `json:"kind"`
	Error string     `json:"error,omitempty"`
	At    time.Time  `json:"at,omitzero"`
}

// NewRow returns a row that waits for its reconciler.
func NewRow[T any](object T) *Row[T] {
	return &Row[T]{Object: object, Status: Status{Kind: Pending, At: time.Now()}}
}

// Table of rows; every table's primary index is a string, so that rows can be named in messages.
type Table[T any] struct {
	statedb.RWTable[*Row[T]]
	Key func(T) string
	key statedb.Index[*Row[T], string]
}

// ByKey queries the row with the given primary key.
func (t Table[T]) ByKey(key string) statedb.Query[*Row[T]] { return t.key.Query(key) }

// Tables is the desired state of an agent.
type Tables struct {
	DB         *statedb.DB
	Nodes      Table[identity.Node]
	Identities Table[identity.Identity]
	Addresses  Table[identity.Address]
	Endpoints  Table[identity.Endpoint]
	Services   Table[lb.Service]
	Backends   Table[lb.Backend]
	// Frontends and Targets are derived from services and backends: what this node translates, and to whom.
	Frontends Table[lb.Frontend]
	Targets   Table[lb.Target]
	// Routes is derived from services: the ports that are balanced at L7, and how.
	Routes Table[lb.Route]
	// Liveness says which nodes are alive, and Reaches which clusters can be reached.
	Liveness Table[identity.Liveness]
	Reaches  Table[identity.Reach]
	// Tunnels is derived from nodes: how packets get to each.
	Tunnels Table[identity.Tunnel]
	// Publications is what this node keeps in its cluster's store.
	Publications Table[Publication]
	// Peers are the other clusters that this one is connected with.
	Peers Table[Peer]

	identitiesByLabels statedb.Index[*Row[identity.Identity], string]
	nodesByAddress     statedb.Index[*Row[identity.Node], string]
	nodesByTunnelKey   statedb.Index[*Row[identity.Node], string]
	addressesByNode    statedb.Index[*Row[identity.Address], string]
	servicesByName     statedb.Index[*Row[lb.Service], string]
	backendsByService  statedb.Index[*Row[lb.Backend], string]
	backendsBySlice    statedb.Index[*Row[lb.Backend], string]
	frontendsByService statedb.Index[*Row[lb.Frontend], string]
	routesByService    statedb.Index[*Row[lb.Route], string]
	targetsByService   statedb.Index[*Row[lb.Target], string]
	targetsByBackend   statedb.Index[*Row[lb.Target], string]
	targetsByNode      statedb.Index[*Row[lb.Target], string]
}

// Peer is a row of the peers table: another cluster whose store is followed.
type Peer struct {
	Name string             `json:"name"`
	ID   identity.ClusterID `json:"id"`
	// Joining: no packet has been seen to go both ways yet, so its backends get no new connections.
	Joining bool `json:"joining,omitempty"`
}

// NewTables makes empty tables.
func NewTables() (*Tables, error) {
	t := &Tables{DB: statedb.New()}
	t.identitiesByLabels = stringIndex("labels", false, func(i identity.Identity) string { return i.Cluster + "|" + i.Labels.String() })
	t.nodesByAddress = stringIndex("address", false, func(n identity.Node) string { return n.Address.String() })
	t.nodesByTunnelKey = stringsIndex("tunnel-key", func(n identity.Node) (keys []string) {
		for _, k := range n.TunnelKeys {
			keys = append(keys, k.Key.String())
		}
		return keys
	})
	t.addressesByNode = stringIndex("node", false, func(a identity.Address) string { return a.Cluster + "/" + a.Node })
	t.servicesByName = stringIndex("name", false, func(s lb.Service) string { return s.Name.String() })
	t.backendsByService = stringIndex("service", false, func(b lb.Backend) string { return b.Service.String() })
	t.backendsBySlice = stringIndex("slice", false, func(b lb.Backend) string { return sliceKey(b.Cluster, b.Service, b.Slice) })
	t.frontendsByService = stringIndex("service", false, func(f lb.Frontend) string { return f.Target.Service.String() })
	t.routesByService = stringIndex("service", false, func(r lb.Route) string { return r.Port.Service.String() })
	t.targetsByService = stringIndex("service", false, func(x lb.Target) string { return x.Port.Service.String() })
	t.targetsByBackend = stringIndex("backend", false, func(x lb.Target) string {
		return x.Cluster + "/" + x.Port.Service.String() + "/" + x.Address.String()
	})
	t.targetsByNode = stringIndex("node", false, func(x lb.Target) string { return x.Cluster + "/" + x.Node })

	var err error
	add := func(e error) {
		if err == nil {
			err = e
		}
	}
	add(newTable(t.DB, &t.Nodes, "nodes", func(n identity.Node) string { return n.Cluster + "/" + n.Name }, t.nodesByAddress, t.nodesByTunnelKey))
	add(newTable(t.DB, &t.Identities, "identities", func(i identity.Identity) string { return fmt.Sprintf("%08d", i.Number) }, t.identitiesByLabels))
	add(newTable(t.DB, &t.Addresses, "addresses", func(a identity.Address) string { return a.Cluster + "/" + a.Prefix.String() }, t.addressesByNode))
	add(newTable(t.DB, &t.Endpoints, "endpoints", func(e identity.Endpoint) string { return e.ID() }))
	add(newTable(t.DB, &t.Services, "services", func(s lb.Service) string { return s.Cluster + "/" + s.Name.String() }, t.servicesByName))
	add(newTable(t.DB, &t.Backends, "backends", BackendKey, t.backendsByService, t.backendsBySlice))
	add(newTable(t.DB, &t.Frontends, "frontends", FrontendKey, t.frontendsByService))
	add(newTable(t.DB, &t.Targets, "targets", TargetKey, t.targetsByService, t.targetsByBackend, t.targetsByNode))
	add(newTable(t.DB, &t.Routes, "routes", func(r lb.Route) string { return r.Port.String() }, t.routesByService))
	add(newTable(t.DB, &t.Liveness, "liveness", func(l identity.Liveness) string { return l.Cluster + "/" + l.Node }))
	add(newTable(t.DB, &t.Reaches, "reaches", func(r identity.Reach) string { return r.Cluster }))
	add(newTable(t.DB, &t.Tunnels, "tunnels", func(x identity.Tunnel) string { return x.Cluster + "/" + x.Node }))
	add(newTable(t.DB, &t.Peers, "peers", func(p Peer) string { return p.Name }))
	add(newTable(t.DB, &t.Publications, "publications", func(p Publication) string { return p.Key }))
	return t, err
}

// BackendKey is the primary key of the backends table.
func BackendKey(b lb.Backend) string {
	return b.Cluster + "/" + b.Service.String() + "/" + b.Address.String()
}

// FrontendKey is the primary key of the frontends table.
func FrontendKey(f lb.Frontend) string { return f.FrontendKey.String() }

// TargetKey is the primary key of the targets table.
func TargetKey(t lb.Target) string {
	return t.Port.String() + "|" + netip.AddrPortFrom(t.Address, t.Number).String()
}

// IdentityOf returns the cluster's identity for labels, if the table has it.
func (t *Tables) IdentityOf(txn statedb.ReadTxn, cluster string, labels identity.Labels) (identity.Number, bool) {
	row, _, ok := t.Identities.Get(txn, t.identitiesByLabels.Query(cluster+"|"+labels.String()))
	if !ok {
		return 0, false
	}
	return row.Object.Number, true
}

// NodeAt returns the node with the given underlay address.
func (t *Tables) NodeAt(txn statedb.ReadTxn, address netip.Addr) (identity.NodeName, bool) {
	row, _, ok := t.Nodes.Get(txn, t.nodesByAddress.Query(address.String()))
	if !ok {
		return identity.NodeName{}, false
	}
	return identity.NodeName{Cluster: row.Object.Cluster, Node: row.Object.Name}, true
}

// ServicesNamed lists every cluster's declaration of a service, ordered by cluster name.
func (t *Tables) ServicesNamed(txn statedb.ReadTxn, name lb.Name) []lb.Service {
	return objects(t.Services.List(txn, t.servicesByName.Query(name.String())))
}

// BackendsOf lists every cluster's backends of a service.
func (t *Tables) BackendsOf(txn statedb.ReadTxn, name lb.Name) []lb.Backend {
	return objects(t.Backends.List(txn, t.backendsByService.Query(name.String())))
}

// BackendsIn lists the backends of one slice.
func (t *Tables) BackendsIn(txn statedb.ReadTxn, cluster string, service lb.Name, slice string) []lb.Backend {
	return objects(t.Backends.List(txn, t.backendsBySlice.Query(sliceKey(cluster, service, slice))))
}

// FrontendsOf lists the frontends of a service.
func (t *Tables) FrontendsOf(txn statedb.ReadTxn, name lb.Name) []*Row[lb.Frontend] {
	return rows(t.Frontends.List(txn, t.frontendsByService.Query(name.String())))
}

// RoutesOf lists the routes of a service.
func (t *Tables) RoutesOf(txn statedb.ReadTxn, name lb.Name) []*Row[lb.Route] {
	return rows(t.Routes.List(txn, t.routesByService.Query(name.String())))
}

// TargetsOf lists the targets of a service.
func (t *Tables) TargetsOf(txn statedb.ReadTxn, name lb.Name) []*Row[lb.Target] {
	return rows(t.Targets.List(txn, t.targetsByService.Query(name.String())))
}

// EachTargetOf goes over the targets of a service, as far as it is asked to.
func (t *Tables) EachTargetOf(txn statedb.ReadTxn, name lb.Name) iter.Seq[lb.Target] {
	return func(yield func(lb.Target) bool) {
		for row := range t.Targets.List(txn, t.targetsByService.Query(name.String())) {
			if !yield(row.Object) {
				return
			}
		}
	}
}

// TargetsOfBackend lists the targets that stem from one backend.
func (t *Tables) TargetsOfBackend(txn statedb.ReadTxn, b lb.Backend) []*Row[lb.Target] {
	return rows(t.Targets.List(txn, t.targetsByBackend.Query(BackendKey(b))))
}

// TargetsAt lists the targets on a node.
func (t *Tables) TargetsAt(txn statedb.ReadTxn, node identity.NodeName) []*Row[lb.Target] {
	return rows(t.Targets.List(txn, t.targetsByNode.Query(node.String())))
}

// Quarantined tells whether backends on a node shall get no new connections.
func (t *Tables) Quarantined(txn statedb.ReadTxn, node identity.NodeName) bool {
	if peer, _, ok := t.Peers.Get(txn, t.Peers.ByKey(node.Cluster)); ok && peer.Object.Joining {
		return true
	}
	row, _, ok := t.Liveness.Get(txn, t.Liveness.ByKey(node.String()))
	return ok && row.Object.Quarantined
}

// Put inserts an object as pending, unless an equal object is there already; it tells whether it did.
func Put[T any](txn statedb.WriteTxn, table Table[T], object T, equal func(a, b T) bool) (bool, error) {
	old, _, ok := table.Get(txn, table.ByKey(table.Key(object)))
	if ok && equal(old.Object, object) {
		return false, nil
	}
	_, _, err := table.Insert(txn, NewRow(object))
	return true, err
}

// Remove deletes the row with the given primary key, if there is one.
func Remove[T any](txn statedb.WriteTxn, table Table[T], key string) error {
	row, _, ok := table.Get(txn, table.ByKey(key))
	if !ok {
		return nil
	}
	_, _, err := table.Delete(txn, row)
	return err
}

func newTable[T any](db *statedb.DB, table *Table[T], name string, key func(T) string, more ...statedb.Index[*Row[T], string]) error {
	table.Key = key
	table.key = stringIndex("key", true, key)
	secondary := make([]statedb.Indexer[*Row[T]], len(more))
	for i := range more {
		secondary[i] = more[i]
	}
	var err error
	table.RWTable, err = statedb.NewTableAny(db, name,
		func() []string { return []string{"Key", "Object", "Status"} },
		func(r *Row[T]) []string {
			object, _ := json.Marshal(r.Object)
			return []string{key(r.Object), string(object), string(r.Status.Kind)}
		}, table.key, secondary...)
	return err
}

func stringIndex[T any](name string, unique bool, of func(T) string) statedb.Index[*Row[T], string] {
	return keysIndex(name, unique, func(object T) index.KeySet { return index.NewKeySet(index.String(of(object))) })
}

// stringsIndex finds a row by each of any number of strings.
func stringsIndex[T any](name string, of func(T) []string) statedb.Index[*Row[T], string] {
	return keysIndex(name, false, func(object T) index.KeySet { return index.StringSlice(of(object)) })
}

func keysIndex[T any](name string, unique bool, of func(T) index.KeySet) statedb.Index[*Row[T], string] {
	return statedb.Index[*Row[T], string]{
		Name:       name,
		FromObject: func(r *Row[T]) index.KeySet { return of(r.Object) },
		FromKey:    index.String,
		FromString: index.FromString,
		Unique:     unique,
	}
}

func objects[T any](seq func(func(*Row[T], statedb.Revision) bool)) []T {
	var out []T
	for row := range seq {
		out = append(out, row.Object)
	}
	return out
}

func rows[T any](seq func(func(*Row[T], statedb.Revision) bool)) []*Row[T] {
	var out []*Row[T]
	for row := range seq {
		out = append(out, row)
	}
	return out
}

func sliceKey(cluster string, service lb.Name, slice string) string {
	return cluster + "/" + service.String() + "/" + slice
}
