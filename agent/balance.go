package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/lb"
)

// balance derives what this node translates, the frontends, routes and targets tables, from the services and
// backends of all clusters. The rules are lb's; this is the loop that keeps rows in step, so that one
// backend's change touches that backend's targets alone.
type balance struct {
	tables *clustermesh.Tables
	// node is the agent's own.
	node identity.Node
	// guard says which addresses no remote service may have: a pod's or a node's.
	guard lb.Guard
	// refusals gets the frontends that may not be.
	refusals *clustermesh.Refusals

	// claims are all services that want a frontend; lb.Elect chooses among them.
	claims map[lb.FrontendKey]map[lb.Name]lb.Frontend
	// claimed are the frontends that each service wants, refused those that it may not want.
	claimed map[lb.Name][]lb.FrontendKey
	refused map[lb.Name]map[refusedKey]struct{}
	// standings of the ports that have a target which is not down.
	standings map[lb.PortKey]*standing

	after   chan func()
	recheck chan struct{}
}

// refusedKey is how what is refused of a service is named in the record of refusals.
type refusedKey struct{ cluster, key string }

func newBalance(tables *clustermesh.Tables, node identity.Node, guard lb.Guard, refusals *clustermesh.Refusals) *balance {
	return &balance{
		tables: tables, node: node, guard: guard, refusals: refusals,
		claims: map[lb.FrontendKey]map[lb.Name]lb.Frontend{}, claimed: map[lb.Name][]lb.FrontendKey{}, refused: map[lb.Name]map[refusedKey]struct{}{},
		standings: map[lb.PortKey]*standing{}, after: make(chan func(), 1), recheck: make(chan struct{}, 1),
	}
}

// After runs f once everything that is in the tables now has been derived from.
func (b *balance) After(ctx context.Context, f func()) {
	select {
	case b.after <- f:
	case <-ctx.Done():
	}
}

// Recheck judges all services again, because what the guard says has changed. It never blocks.
func (b *balance) Recheck() {
	select {
	case b.recheck <- struct{}{}:
	default:
	}
}

// changes are those of the tables that others follow from. Nodes count as the guard refuses their addresses.
type changes struct {
	services statedb.ChangeIterator[*clustermesh.Row[lb.Service]]
	backends statedb.ChangeIterator[*clustermesh.Row[lb.Backend]]
	nodes    statedb.ChangeIterator[*clustermesh.Row[identity.Node]]
	liveness statedb.ChangeIterator[*clustermesh.Row[identity.Liveness]]
	peers    statedb.ChangeIterator[*clustermesh.Row[clustermesh.Peer]]
}

func (c changes) close() {
	c.services.Close()
	c.backends.Close()
	c.nodes.Close()
	c.liveness.Close()
	c.peers.Close()
}

func (b *balance) changes() (c changes, err error) {
	t := b.tables
	txn := t.DB.WriteTxn(t.Services, t.Backends, t.Nodes, t.Liveness, t.Peers)
	defer txn.Abort()
	if c.services, err = t.Services.Changes(txn); err != nil {
		return c, err
	}
	if c.backends, err = t.Backends.Changes(txn); err != nil {
		return c, err
	}
	if c.nodes, err = t.Nodes.Changes(txn); err != nil {
		return c, err
	}
	if c.liveness, err = t.Liveness.Changes(txn); err != nil {
		return c, err
	}
	if c.peers, err = t.Peers.Changes(txn); err != nil {
		return c, err
	}
	txn.Commit()
	return c, nil
}

// Run keeps the derived tables in step until ctx ends.
func (b *balance) Run(ctx context.Context) error {
	c, err := b.changes()
	if err != nil {
		return err
	}
	defer c.close()
	var after []func()
	dirty := map[lb.Name]struct{}{}
	for {
		more, err := b.step(c, dirty)
		if err != nil {
			return err
		}
		for _, f := range after {
			f()
		}
		after = nil
		clear(dirty)
		select {
		case <-b.recheck:
			for row := range b.tables.Services.All(b.tables.DB.ReadTxn()) {
				dirty[row.Object.Name] = struct{}{}
			}
		case f := <-b.after:
			after = append(after, f) // not before what was committed until now has been seen
		case <-more[0]:
		case <-more[1]:
		case <-more[2]:
		case <-more[3]:
		case <-more[4]:
		case <-ctx.Done():
			return nil
		}
	}
}

// step applies what has changed since the last one, and brings the dirty services up to date. It returns what closes when
// any of them changes again.
func (b *balance) step(c changes, dirty map[lb.Name]struct{}) (more [5]<-chan struct{}, err error) {
	t := b.tables
	read := t.DB.ReadTxn()
	declared, moreServices := c.services.Next(read)
	for change := range declared {
		dirty[change.Object.Object.Name] = struct{}{}
	}
	nodes, moreNodes := c.nodes.Next(read)
	for change := range nodes {
		if change.Deleted || change.Object.Status.Kind == clustermesh.Pending {
			b.servicesAt(read, change.Object.Object.Address, dirty)
		}
	}
	moved, moreBackends := c.backends.Next(read)
	var single []statedb.Change[*clustermesh.Row[lb.Backend]]
	for change := range moved {
		if _, whole := dirty[change.Object.Object.Service]; !whole {
			single = append(single, change)
		}
	}
	var lives []identity.NodeName
	lived, moreLiveness := c.liveness.Next(read)
	for change := range lived {
		lives = append(lives, change.Object.Object.NodeName())
	}
	peers, morePeers := c.peers.Next(read)
	for change := range peers {
		lives = b.nodesOf(read, change.Object.Object.Name, lives)
	}
	more = [5]<-chan struct{}{moreServices, moreBackends, moreNodes, moreLiveness, morePeers}
	if len(dirty) == 0 && len(single) == 0 && len(lives) == 0 {
		return more, nil
	}

	txn := t.DB.WriteTxn(t.Frontends, t.Routes, t.Targets)
	defer txn.Abort()
	for name := range dirty {
		if err := b.service(txn, name); err != nil {
			return more, err
		}
	}
	for _, change := range single {
		if err := b.backend(txn, change.Object.Object, change.Deleted); err != nil {
			return more, err
		}
	}
	for _, node := range lives {
		if err := b.quarantine(txn, node); err != nil {
			return more, err
		}
	}
	txn.Commit()
	return more, nil
}

// nodesOf appends the nodes of a cluster, and the one without a name, on which those backends are that are on none.
func (b *balance) nodesOf(read statedb.ReadTxn, cluster string, nodes []identity.NodeName) []identity.NodeName {
	nodes = append(nodes, identity.NodeName{Cluster: cluster})
	for row := range b.tables.Nodes.All(read) {
		if row.Object.Cluster == cluster {
			nodes = append(nodes, row.Object.NodeName())
		}
	}
	return nodes
}

// quarantine brings the targets on a node into step with its life. It costs as much as the node has backends, whatever
// the size of their services.
func (b *balance) quarantine(txn statedb.WriteTxn, node identity.NodeName) error {
	down := b.tables.Quarantined(txn, node)
	for _, row := range b.tables.TargetsAt(txn, node) {
		if err := b.putTarget(txn, row.Object, down); err != nil {
			return err
		}
	}
	return nil
}

// putTargets writes what a backend adds to its service, and notes that it is wanted.
func (b *balance) putTargets(txn statedb.WriteTxn, view lb.ServiceView, backend lb.Backend, want map[string]struct{}) error {
	down := b.tables.Quarantined(txn, identity.NodeName{Cluster: backend.Cluster, Node: backend.Node})
	for _, target := range lb.Targets(view, backend) {
		want[clustermesh.TargetKey(target)] = struct{}{}
		if err := b.putTarget(txn, target, down); err != nil {
			return err
		}
	}
	return nil
}

// servicesAt marks the services that want an address.
func (b *balance) servicesAt(read statedb.ReadTxn, ip netip.Addr, dirty map[lb.Name]struct{}) {
	for row := range b.tables.Services.All(read) {
		if slices.Contains(row.Object.ClusterIPs, ip) {
			dirty[row.Object.Name] = struct{}{}
		}
	}
}

func (b *balance) view(txn statedb.ReadTxn, name lb.Name) lb.ServiceView {
	return lb.ServiceView{
		Self: b.node.Cluster, SelfID: uint8(b.node.ClusterID), Node: b.node.Name, NodeAddresses: []netip.Addr{b.node.Address},
		Declared: b.tables.ServicesNamed(txn, name),
	}
}

// service brings everything of a service up to date.
func (b *balance) service(txn statedb.WriteTxn, name lb.Name) error {
	t := b.tables
	view := b.view(txn, name)
	if err := b.frontends(txn, name, view); err != nil {
		return err
	}
	if err := b.routes(txn, name, view); err != nil {
		return err
	}
	want := map[string]struct{}{}
	for _, backend := range t.BackendsOf(txn, name) {
		if err := b.putTargets(txn, view, backend, want); err != nil {
			return err
		}
	}
	return b.dropTargets(txn, t.TargetsOf(txn, name), want)
}

// backend brings the targets of one backend up to date.
func (b *balance) backend(txn statedb.WriteTxn, backend lb.Backend, gone bool) error {
	t := b.tables
	want := map[string]struct{}{}
	if !gone {
		if err := b.putTargets(txn, b.view(txn, backend.Service), backend, want); err != nil {
			return err
		}
	}
	return b.dropTargets(txn, t.TargetsOfBackend(txn, backend), want)
}

// dropTargets deletes the targets that are not wanted.
func (b *balance) dropTargets(txn statedb.WriteTxn, have []*clustermesh.Row[lb.Target], want map[string]struct{}) error {
	for _, row := range have {
		if _, ok := want[clustermesh.TargetKey(row.Object)]; ok {
			continue
		}
		if err := b.dropTarget(txn, row); err != nil {
			return err
		}
	}
	return nil
}

// frontends brings the addresses of a service up to date. An address that several services claim is
// the one's that lb.Elect chooses; the others get it when that one goes.
func (b *balance) frontends(txn statedb.WriteTxn, name lb.Name, view lb.ServiceView) error {
	for r := range b.refused[name] {
		b.refusals.Clear(r.cluster, r.key)
	}
	delete(b.refused, name)
	touched := map[lb.FrontendKey]struct{}{}
	for _, key := range b.claimed[name] {
		delete(b.claims[key], name)
		touched[key] = struct{}{}
	}
	delete(b.claimed, name)

	desired, refused := lb.Frontends(view, b.guard)
	for _, r := range refused {
		b.refuse(name, r)
	}
	for _, frontend := range desired {
		key := frontend.FrontendKey
		if b.claims[key] == nil {
			b.claims[key] = map[lb.Name]lb.Frontend{}
		}
		b.claims[key][name] = frontend
		b.claimed[name] = append(b.claimed[name], key)
		touched[key] = struct{}{}
	}
	for key := range touched {
		if err := b.elect(txn, key); err != nil {
			return err
		}
	}
	return nil
}

// routes brings into step how a service's ports are balanced at L7.
func (b *balance) routes(txn statedb.WriteTxn, name lb.Name, view lb.ServiceView) error {
	t := b.tables
	want := map[string]struct{}{}
	for _, route := range lb.Routes(view) {
		want[t.Routes.Key(route)] = struct{}{}
		if _, err := clustermesh.Put(txn, t.Routes, route, sameRoute); err != nil {
			return err
		}
	}
	for _, row := range t.RoutesOf(txn, name) {
		if _, ok := want[t.Routes.Key(row.Object)]; ok {
			continue
		}
		if _, _, err := t.Routes.Delete(txn, row); err != nil {
			return err
		}
	}
	for _, problem := range view.Problems() {
		b.remember(name, problem.Cluster, problem.What+" of service "+name.String(), problem.Reason)
	}
	return nil
}

func sameRoute(a, b lb.Route) bool { return reflect.DeepEqual(a, b) }

// elect gives a frontend to one of those that claim it.
func (b *balance) elect(txn statedb.WriteTxn, key lb.FrontendKey) error {
	if len(b.claims[key]) == 0 {
		delete(b.claims, key)
		return clustermesh.Remove(txn, b.tables.Frontends, clustermesh.FrontendKey(lb.Frontend{FrontendKey: key}))
	}
	winner, losers := lb.Elect(b.node.Cluster, slices.Collect(maps.Values(b.claims[key])))
	b.refusals.Clear(winner.Cluster, refusalKey(winner))
	delete(b.refused[winner.Target.Service], refusedKey{winner.Cluster, refusalKey(winner)})
	for _, r := range losers {
		b.refuse(r.Target.Service, r)
	}
	_, err := clustermesh.Put(txn, b.tables.Frontends, winner, same)
	return err
}

func (b *balance) refuse(name lb.Name, r lb.Refusal) {
	b.remember(name, r.Cluster, refusalKey(r.Frontend), r.Reason)
}

// remember shows what is refused of a service, until the service is looked at again.
func (b *balance) remember(name lb.Name, cluster, key, reason string) {
	b.refusals.Add(cluster, key, errors.New(reason))
	if b.refused[name] == nil {
		b.refused[name] = map[refusedKey]struct{}{}
	}
	b.refused[name][refusedKey{cluster, key}] = struct{}{}
}

func refusalKey(f lb.Frontend) string {
	return fmt.Sprintf("frontend %s of service %s", f.FrontendKey, f.Target.Service)
}

func same[T comparable](a, b T) bool { return a == b }
