package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// maxTokenEndpoints is how many nodes a token names: one that is down must not make it worthless.
const maxTokenEndpoints = 4

// setupPeering makes this node's part in the API between clusters.
func (a *agent) setupPeering() error {
	c := a.cfg
	address := netip.AddrPortFrom(c.Node.Address, c.Peering.Port)
	listener, err := net.Listen("tcp", address.String())
	if err != nil {
		return fmt.Errorf("the API between clusters: %w; give it another peering.port, or stop who has it", err)
	}
	a.peeringListener = listener
	a.peering = peering.New(peering.Config{
		Self: a.node.NodeName(), Mesh: c.Gossip.Mesh, Cluster: c.info, Store: a.own().store,
		StoreEndpoints: c.Peering.StoreEndpoints, Resolve: a.resolveEndpoints, Address: address, Endpoints: a.peeringEndpoints, Known: a.peeringEndpointsOf,
		Administer: a.administer, Requires: c.requires(),
		Ring:      a.life.gossip.Ring,
		Adopt:     func(ctx context.Context, keys [][]byte) error { return a.life.gossip.AdoptRing(ctx, keys) },
		Verify:    a.verify,
		Report:    func(peer string) peering.Report { return a.view.word(peer) },
		Forgotten: a.forgotten,
		Follows: func(cluster, user string) bool {
			c := a.channels.get(cluster)
			return c != nil && !c.local && c.peer().User == user
		},
		Now: a.clock.Now, Log: a.log.With("from", "peering"),
	})
	if a.assigned {
		a.peering.Renumber = a.renumber
	}
	a.certs = newCerts(a)
	return nil
}

// startPeering serves the API, and keeps keys and certificates young.
func (a *agent) startPeering(ctx context.Context, tasks *errgroup.Group) {
	a.view = a.newPeerView(ctx)
	a.problems = append(a.problems, a.certs.problems, a.ringProblems)
	tasks.Go(func() error { return a.peering.Run(ctx, a.peeringListener) })
	tasks.Go(func() error { return a.syncRing(ctx) })
	tasks.Go(func() error { return a.certs.Run(ctx) })
	tasks.Go(func() error { return a.view.watchDenied(ctx) })
	tasks.Go(func() error {
		<-ctx.Done()
		a.view.wait()
		return nil
	})
}

func (a *agent) newPeerView(ctx context.Context) *peerView {
	return &peerView{
		channels: a.channels, life: a.life, refusals: a.refusals, now: a.clock.Now, quota: a.cfg.Peering.Quota,
		tunnelPorts: a.tunnelPorts, mesh: a.cfg.Gossip.MeshPort, ask: a.peering.Ask,
		ctx: ctx, reports: map[string]*report{},
	}
}

// peeringEndpoints are where this cluster's agents serve the API: as configured, or at the addresses of nodes that are in
// service, this one first.
func (a *agent) peeringEndpoints() []string {
	if len(a.cfg.Peering.Endpoints) > 0 {
		return a.cfg.Peering.Endpoints
	}
	out := []string{a.peeringAt(a.cfg.Node.Address)}
	for _, n := range a.nodesOf(a.cfg.Cluster.Name) {
		if len(out) < maxTokenEndpoints && n.Address != a.cfg.Node.Address {
			out = append(out, a.peeringAt(n.Address))
		}
	}
	return out
}

// peeringEndpointsOf are where the API of a peer may be served, beside the endpoints that it has named: clusters have it at one port mostly.
func (a *agent) peeringEndpointsOf(cluster string) (out []string) {
	for _, n := range a.nodesOf(cluster) {
		out = append(out, a.peeringAt(n.Address))
	}
	return out
}

func (a *agent) peeringAt(address netip.Addr) string {
	return net.JoinHostPort(address.String(), strconv.Itoa(int(a.cfg.Peering.Port)))
}

// nodesOf lists the nodes of a cluster whose agents are not known to be down.
func (a *agent) nodesOf(cluster string) (nodes []identity.Node) {
	txn := a.tables.DB.ReadTxn()
	for row := range a.tables.Nodes.All(txn) {
		n := row.Object
		if n.Cluster != cluster {
			continue
		}
		if life, _, ok := a.tables.Liveness.Get(txn, a.tables.Liveness.ByKey(n.NodeName().String())); ok && life.Object.State != identity.NodeAlive {
			continue
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// administer connects to the own store as root.
func (a *agent) administer(ctx context.Context, authority *pki.Authority) (peering.Administrator, error) {
	root, err := peering.RootConfig(a.cfg.KVStore.Endpoints, authority, a.clock.Now())
	if err != nil {
		return nil, err
	}
	root.Log, root.Dial = a.log, a.storeDialer()
	access, err := kvstore.OpenAccess(ctx, root)
	if err != nil {
		return nil, fmt.Errorf("the own store's users: %w", err)
	}
	return access, nil
}

// forgottenPause is how often the kernel is looked at for what is left of a cluster.
const forgottenPause = 10 * time.Millisecond

// forgotten waits until nothing of a cluster is in force on this node.
func (a *agent) forgotten(ctx context.Context, cluster string) error {
	for {
		left, err := a.leftOf(cluster)
		if err != nil || left == "" {
			return err
		}
		select {
		case <-time.After(forgottenPause):
		case <-ctx.Done():
			return fmt.Errorf("on this node %s are still in force: %w", left, ctx.Err())
		}
	}
}

// leftOf says what of a cluster is still there.
func (a *agent) leftOf(cluster string) (string, error) {
	if a.channels.get(cluster) != nil {
		return "its channel", nil
	}
	txn := a.tables.DB.ReadTxn()
	for row := range a.tables.Nodes.All(txn) {
		if row.Object.Cluster == cluster {
			return "its nodes", nil
		}
	}
	for row := range a.tables.Targets.All(txn) {
		if row.Object.Cluster == cluster {
			return "its backends", nil
		}
	}
	return a.leftInKernel()
}

// leftInKernel says what is in the kernel of clusters that are followed no more.
func (a *agent) leftInKernel() (string, error) {
	addresses, err1 := a.datapath.ListAddresses()
	frontends, err2 := a.datapath.ListFrontends()
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	gone := func(owner identity.ClusterID) bool {
		_, none := a.channels.follows(owner)
		return none && owner != 0
	}
	for _, e := range addresses {
		if !e.Blackhole && gone(e.Owner) {
			return "its addresses", nil
		}
	}
	for _, f := range frontends {
		for _, b := range append(f.Backends, f.Quarantined...) {
			if gone(b.Owner) {
				return "its backends", nil
			}
		}
	}
	return "", nil
}
