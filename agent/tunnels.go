package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
)

// sessionPause is how long changes of sessions gather before they are looked at: a node that comes back has many at once.
const sessionPause = 20 * time.Millisecond

// tunnels derives the tunnels table from the nodes table, this node's keys, the sessions and what is known of the paths. The rules are
// tunnelRules'; this is the loop that keeps rows in step, so that one node's change touches that node's row alone.
type tunnels struct {
	tables *clustermesh.Tables
	enc    *encryption

	// unsettled are the nodes whose tunnel may move to other keys by a session that comes or goes.
	unsettled map[identity.NodeName]struct{}
	after     chan func()

	mu sync.Mutex
	// paths are the largest packets of pods that get to each cluster, in bytes, as measured; changed those that are to be looked at.
	paths   map[string]int
	changed map[string]struct{}
	again   chan struct{}
}

func newTunnels(tables *clustermesh.Tables, enc *encryption) *tunnels {
	return &tunnels{
		tables: tables, enc: enc, unsettled: map[identity.NodeName]struct{}{}, after: make(chan func(), 1),
		paths: map[string]int{}, changed: map[string]struct{}{}, again: make(chan struct{}, 1),
	}
}

// setMTU notes the largest packet of pods that gets to a cluster's nodes, in bytes; 0: not known, or as large as this node's. It never blocks.
func (t *tunnels) setMTU(cluster string, mtu int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.paths[cluster] == mtu {
		return
	}
	t.paths[cluster] = mtu
	if mtu == 0 {
		delete(t.paths, cluster)
	}
	t.changed[cluster] = struct{}{}
	wakeUp(t.again)
}

// After runs f once everything that is in the nodes table now has been derived from.
func (t *tunnels) After(ctx context.Context, f func()) {
	select {
	case t.after <- f:
	case <-ctx.Done():
	}
}

// Run derives until ctx ends.
func (t *tunnels) Run(ctx context.Context) error {
	txn := t.tables.DB.WriteTxn(t.tables.Nodes)
	changes, err := t.tables.Nodes.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()
	defer changes.Close()

	var after []func()
	// What closes is kept until that has been seen, and taken anew before what it tells of is looked at, so that no change is missed.
	own, sessions := t.enc.changed(), t.enc.sessionsChanged()
	for {
		more, err := t.step(changes)
		if err != nil {
			return err
		}
		for _, f := range after {
			f()
		}
		after = nil
		moving := sessions
		if len(t.unsettled) == 0 {
			moving = nil // no session moves a tunnel
		}
		select {
		case <-own:
			own, sessions = t.enc.changed(), t.enc.sessionsChanged()
			err = t.derive(t.everyNode)
		case <-moving:
			pause(ctx, sessionPause)
			sessions = t.enc.sessionsChanged()
			err = t.derive(t.unsettledNodes)
		case <-t.again:
			err = t.derive(t.nodesOfChangedPaths)
		case f := <-t.after:
			after = append(after, f) // not before what was committed until now has been seen
		case <-more:
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// pause waits, but not beyond ctx.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// step derives the rows of the nodes that have changed, and returns what closes when any changes again.
func (t *tunnels) step(changes statedb.ChangeIterator[*clustermesh.Row[identity.Node]]) (<-chan struct{}, error) {
	txn := t.tables.DB.WriteTxn(t.tables.Tunnels)
	defer txn.Abort()
	next, more := changes.Next(txn)
	rules := t.enc.rules()
	for change := range next {
		n := change.Object.Object
		if change.Deleted {
			delete(t.unsettled, n.NodeName())
			if err := clustermesh.Remove(txn, t.tables.Tunnels, n.NodeName().String()); err != nil {
				return nil, err
			}
			continue
		}
		if err := t.put(txn, rules, n); err != nil {
			return nil, err
		}
	}
	txn.Commit()
	return more, nil
}

// derive brings the rows of some nodes up to date.
func (t *tunnels) derive(nodes func(statedb.ReadTxn) []identity.Node) error {
	txn := t.tables.DB.WriteTxn(t.tables.Tunnels)
	defer txn.Abort()
	rules := t.enc.rules()
	for _, n := range nodes(txn) {
		if err := t.put(txn, rules, n); err != nil {
			return err
		}
	}
	txn.Commit()
	return nil
}

// put writes a node's row.
func (t *tunnels) put(txn statedb.WriteTxn, rules tunnelRules, n identity.Node) error {
	name := n.NodeName()
	var before *identity.Tunnel
	if row, _, ok := t.tables.Tunnels.Get(txn, t.tables.Tunnels.ByKey(name.String())); ok {
		before = &row.Object
	}
	t.mu.Lock()
	path := t.paths[n.Cluster]
	t.mu.Unlock()
	row := rules.derive(n, before, path, func(p pair) bool { return t.enc.shaken(name, p) })
	delete(t.unsettled, name)
	if row.Mode == identity.TunnelWireGuard && len(rules.slots)*len(n.TunnelKeys) > 1 {
		t.unsettled[name] = struct{}{}
	}
	_, err := clustermesh.Put(txn, t.tables.Tunnels, row, identity.Tunnel.Equal)
	return err
}

func (t *tunnels) everyNode(txn statedb.ReadTxn) (nodes []identity.Node) {
	for row := range t.tables.Nodes.All(txn) {
		nodes = append(nodes, row.Object)
	}
	return nodes
}

func (t *tunnels) unsettledNodes(txn statedb.ReadTxn) (nodes []identity.Node) {
	for name := range t.unsettled {
		if row, _, ok := t.tables.Nodes.Get(txn, t.tables.Nodes.ByKey(name.String())); ok {
			nodes = append(nodes, row.Object)
		}
	}
	return nodes
}

func (t *tunnels) nodesOfChangedPaths(txn statedb.ReadTxn) (nodes []identity.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for cluster := range t.changed {
		for row := range t.tables.Nodes.Prefix(txn, t.tables.Nodes.ByKey(cluster+"/")) {
			nodes = append(nodes, row.Object)
		}
	}
	clear(t.changed)
	return nodes
}

// tunnelMoved tells whether a node's tunnel is another entry in the kernel than before, so that the old one has to be deleted.
func tunnelMoved(old, now identity.Tunnel) bool {
	return old.Address != now.Address || old.TunnelAddress(0) != now.TunnelAddress(0) || old.ClusterID != now.ClusterID ||
		!slices.Equal(old.PodCIDRs, now.PodCIDRs)
}
